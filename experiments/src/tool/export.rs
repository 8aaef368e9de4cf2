use super::network::NetworkFile;
use super::values;
use anyhow::{Context, Error, Result, bail};
use clap::{Args, ValueEnum};
use models::Import;
use onnx::{Normalize, Options};
use std::path::PathBuf;

/// Writes the network as ONNX, with QuantizeLinear and DequantizeLinear if quantized, or as a
/// PyTorch state dict
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq export pruned.safetensors pruned.onnx\n\n\
                  The graph maps `images` [N, 3, H, W] to `logits` [N, classes]. Images must be normalized \
                  beforehand as in training, unless --mean and --std make the normalization part of the \
                  graph.")]
pub(super) struct Export {
    #[command(flatten)]
    network: NetworkFile,

    /// Output file: .onnx, or .safetensors for --format safetensors-torch
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Format: ONNX, or tensors that PyTorch can load
    ///
    /// safetensors-torch holds the tensors of a float network that has not been pruned, with the
    /// names of torchvision (MobileNetV2) or timm (V1).
    #[arg(long, value_enum, default_value = "onnx")]
    format: Format,

    /// Fold batch normalization into the weights (for quantized weights: into a step for each
    /// filter)
    #[arg(long)]
    fold: bool,

    /// Store levels of up to 4 bits in bytes, for runtimes without ONNX's 4-bit tensors (opset 21)
    #[arg(long)]
    int8: bool,

    /// Normalize in the graph: take images with intensities from 0 to 1, and subtract this from
    /// their channels
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', value_parser = values::one, requires = "std")]
    mean: Option<Vec<f32>>,

    /// With --mean: divide the channels by this
    #[arg(long, value_name = "R,G,B", value_delimiter = ',', value_parser = values::one, requires = "mean")]
    std: Option<Vec<f32>>,
}

/// The format of the written file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Onnx,
    SafetensorsTorch,
}

impl Export {
    pub fn run(&self) -> Result<String> {
        match self.format {
            Format::Onnx => self.onnx(),
            Format::SafetensorsTorch => self.state_dict(),
        }
    }

    fn state_dict(&self) -> Result<String> {
        let out = self.out.display();
        if self.fold || self.int8 || self.mean.is_some() {
            bail!("--fold, --int8, --mean and --std are about ONNX: leave them out");
        }
        let (network, text) = self.network.open_for(&[(&self.out, "safetensors")])?;
        let naming = network.save_state_dict(&self.out).map_err(|error| match error {
            // The error is about the network and does not name the file.
            models::Error::Structure { .. } => Error::new(error).context(format!("{out} is not written")),
            _ => error.into(),
        })?;
        let note = match network.epsilon {
            epsilon if epsilon == Import::default().epsilon => String::new(),
            epsilon => format!("; the module must have ε = {epsilon:e} in its batch normalization"),
        };
        Ok(format!("{text}written to {out}, with {}'s names{note}\n", naming.name()))
    }

    fn onnx(&self) -> Result<String> {
        let out = self.out.display();
        let normalize = match (&self.mean, &self.std) {
            (Some(mean), Some(std)) => Some(normalize(mean, std)?),
            _ => None,
        };
        let (network, text) = self.network.open_for(&[(&self.out, "onnx")])?;
        let options = Options { fold: self.fold, int8: self.int8, normalize };
        let onnx::Written { opset, bytes } = onnx::save(&network, &options, &self.out)?;
        Ok(format!("{text}written to {out}: opset {opset}, {bytes} bytes\n"))
    }
}

fn normalize(mean: &[f32], std: &[f32]) -> Result<Normalize> {
    let three = |flag: &str, values: &[f32]| {
        <[f32; 3]>::try_from(values)
            .ok()
            .with_context(|| format!("{flag}: expected three numbers such as 0.5,0.5,0.5"))
    };
    let normalize = Normalize { mean: three("--mean", mean)?, std: three("--std", std)? };
    if normalize.std.iter().any(|&std| std <= 0.0) {
        bail!("--std {:?}: expected numbers above 0", normalize.std);
    }
    Ok(normalize)
}
