//! The tool `pfq`, for a network in a file: running variances, pruning, multiply–accumulates,
//! evaluation, quantization with and without training, and export. It also verifies stores and
//! results.

mod conversion;
mod data;
mod eval;
mod export;
mod macs;
mod network;
mod prune;
mod quantize;
pub(crate) mod text;
mod tune;
mod values;
mod variance;
mod verify;

use crate::{output, process};
use anyhow::Result;
use clap::{Parser, Subcommand};

/// Command line of the tool.
#[derive(Debug, Parser)]
#[command(
    name = "pfq",
    version,
    about = "Filter pre-pruning for quantization (PfQ) of a network in a file",
    after_help = "FILE is a network that this project wrote (.safetensors with the structure in it), or \
                  public weights of MobileNetV1 or V2 with the tensor names of torchvision or timm \
                  (.safetensors, or .pth and .pt as torch.save writes them).\n\n\
                  Example: pfq prune mobilenet_v2.pth pruned.safetensors"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Variance(variance::Variance),
    Prune(prune::Prune),
    Macs(macs::Macs),
    Eval(eval::Eval),
    Quantize(quantize::Quantize),
    Tune(tune::Tune),
    Export(export::Export),
    Verify(verify::Verify),
}

impl Cli {
    /// Runs the command; returns the text to print.
    ///
    /// # Errors
    /// If a file can't be read as a network or written, or an argument does not fit it.
    pub fn run(&self) -> Result<String> {
        match &self.command {
            Command::Variance(command) => command.run(),
            Command::Prune(command) => command.run(),
            Command::Macs(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Quantize(command) => command.run(),
            Command::Tune(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Verify(command) => command.run(),
        }
    }
}

/// Runs the tool's binary.
pub fn main() -> Result<()> {
    let cli = Cli::parse();
    process::run(|| {
        output::print(cli.run()?.trim_end());
        Ok(())
    })
}
