use super::network::NetworkFile;
use crate::flags::parse_bits;
use anyhow::Result;
use clap::Args;
use models::{Extras, Network};
use quant_core::Precision;
use std::path::PathBuf;

/// A trained network, the file that it goes to quantized, and the bits.
#[derive(Debug, Args)]
pub(super) struct Conversion {
    #[command(flatten)]
    pub network: NetworkFile,

    /// Output file for the quantized network (.safetensors)
    #[arg(value_name = "OUT")]
    pub out: PathBuf,

    /// Bits of activations and weights, 2 to 8 each, such as a4w4
    #[arg(long, value_name = "aNwM", value_parser = bits)]
    pub bits: [Precision; 2],
}

impl Conversion {
    /// Checks the output path and reads the network; also returns a line that describes it.
    pub fn open(&self) -> Result<(Network, String)> {
        self.network.open_for(&[(&self.out, "safetensors")])
    }

    /// Writes the result; returns a line that says so.
    pub fn save(&self, quantized: &Network, extras: &Extras) -> Result<String> {
        quantized.save_in_one_file(&self.out, extras)?;
        Ok(format!("written to {}\n", self.out.display()))
    }
}

/// Parses the bits of activations and weights.
fn bits(text: &str) -> Result<[Precision; 2], String> {
    let (activations, weights) = parse_bits(&text.to_ascii_lowercase())
        .ok_or_else(|| "expected bits of activations and weights, such as a8w8".to_string())?;
    Ok([quantized(activations)?, quantized(weights)?])
}

pub(super) fn precision(text: &str) -> Result<Precision, String> {
    quantized(text.parse().map_err(|_| "expected a whole number of bits, 2 to 8".to_string())?)
}

fn quantized(bits: u32) -> Result<Precision, String> {
    match Precision::try_from(bits) {
        Ok(Precision::Quantized(bits)) => Ok(Precision::Quantized(bits)),
        _ => Err(format!("expected 2 to 8 bits, not {bits}")),
    }
}
