use super::network::NetworkFile;
use super::text::{millions, table};
use super::values;
use anyhow::Result;
use clap::Args;

/// Counts the multiply–accumulates of every layer for one image, as the paper counts them
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq macs pruned.safetensors\n\n\
                        The convolutions and the classifier are counted, without normalization and biases.")]
pub(super) struct Macs {
    #[command(flatten)]
    network: NetworkFile,

    /// Height and width of the image; those of the network's input if not given
    #[arg(long, value_name = "PIXELS", value_parser = values::pixels)]
    size: Option<usize>,
}

impl Macs {
    pub fn run(&self) -> Result<String> {
        let (mut network, mut text) = self.network.open()?;
        if let Some(size) = self.size {
            network.input[0] = size;
            network.input[1] = size;
        }
        let (macs, weights) = (network.macs(), network.weights());
        let layers = network.layers();
        let rows: Vec<Vec<String>> = layers
            .iter()
            .map(|layer| {
                vec![
                    layer.name.clone(),
                    layer.filters.to_string(),
                    layer.weights.to_string(),
                    layer.macs.to_string(),
                    format!("{:.1}", 100.0 * layer.macs as f64 / macs as f64),
                ]
            })
            .collect();
        text += &table(&["layer", "filters", "weights", "MACs", "%"], &rows);
        let [height, width, _] = network.input;
        text += &format!(
            "{} M MACs ({macs}) for an image of {height}×{width}, {} M weights ({weights})\n",
            millions(macs),
            millions(weights)
        );
        Ok(text)
    }
}
