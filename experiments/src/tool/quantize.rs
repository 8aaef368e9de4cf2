use super::conversion::{Conversion, precision};
use super::data::{self, Wanted};
use super::text::{short, table};
use super::values;
use anyhow::{Result, bail};
use baselines::{Cap, Dfq, DfqReport};
use clap::Args;
use datasets::{Augmentation, Dataset};
use models::{Extras, Fold, Network, Quantization, WeightGrid};
use quant_core::Precision;
use workflow::image_range;

/// Quantizes a trained network without training (DFQ), and writes it
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq quantize mobilenet_v2.pth a8w8.safetensors --bits a8w8\n\n\
                  Batch normalization is folded, ReLU6 becomes ReLU, weight ranges are equalized across \
                  layers, high biases are absorbed, activation ranges are set to β ± 6γ, and the bias that \
                  quantized weights introduce is corrected. No images are needed; with --data, activation \
                  ranges are measured on images.")]
pub(super) struct Quantize {
    #[command(flatten)]
    conversion: Conversion,

    /// Bits of the image, the first layer's weights, the pooled features and the classifier's
    /// weights
    #[arg(long, value_name = "BITS", default_value = "8", value_parser = precision)]
    end_layers: Precision,

    /// Use a grid for each output channel of a weight tensor instead of one for the whole tensor
    #[arg(long)]
    per_channel: bool,

    /// Measure activation ranges on images instead of using β ± 6γ
    ///
    /// This takes a folder with train/CLASS/*, or any other data that pfq tune takes.
    #[arg(long, value_name = "WHERE")]
    data: Option<String>,

    /// With --data: use this many training images, spread over the classes
    #[arg(long, value_name = "IMAGES", default_value_t = 1000, value_parser = values::count, requires = "data")]
    images: usize,

    /// With --data: largest share of damaged pictures that are left out; more are an error
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, value_parser = values::percent, requires = "data")]
    bad_percent: f64,

    /// Lowest and highest value of a normalized image; those of black and white if not given
    ///
    /// Black and white are normalized with the mean and standard deviation of --data or, without
    /// it, of ImageNet or, if the input is smaller than 64×64, of CIFAR-100.
    #[arg(long, value_name = "LO,HI", value_delimiter = ',', value_parser = values::one, allow_hyphen_values = true)]
    image_range: Option<Vec<f32>>,
}

/// The range of a normalized image: black and white with the mean and standard deviation that
/// torchvision's networks are trained with, in the channels with the extreme values: (0 −
/// 0.485)/0.229 and (1 − 0.406)/0.225.
const IMAGENET: (f32, f32) = (-2.117_904, 2.64);

/// The same range for CIFAR-100: (0 − 0.5071)/0.2673 and (1 − 0.4865)/0.2564.
const CIFAR: (f32, f32) = (-1.897_119, 2.002_73);

impl Quantize {
    pub fn run(&self) -> Result<String> {
        let (network, mut text) = self.conversion.open()?;
        let data = self.data.as_deref().map(|place| {
            let limits = [Some(self.images), None];
            data::load(Wanted { place, limits, bad_percent: self.bad_percent, settings: None }, &network)
        });
        let data = data.transpose()?;
        let image_range = match (self.image_range.as_deref(), data.as_deref()) {
            (None, Some(data)) => image_range(data),
            (None, None) if network.input[0] < data::LARGE => CIFAR,
            (None, None) => IMAGENET,
            (Some(&[lo, hi]), _) if lo <= 0.0 && 0.0 < hi => (lo, hi),
            (Some(range), _) => {
                bail!("--image-range {range:?}: expected two numbers around 0 such as -2.1,2.7")
            }
        };
        let [activations, weights] = self.conversion.bits;
        let quantization = Quantization {
            activations,
            weights,
            first_layer: self.end_layers,
            last_layer: self.end_layers,
            fold: Fold::Frozen,
            weight_grid: if self.per_channel { WeightGrid::Channel } else { WeightGrid::Tensor },
            ..Quantization::default()
        };
        let dfq = Dfq { cap: Cap::PerChannel, ..Dfq::default() };
        let (mut quantized, report) = dfq.apply(&network, &quantization, image_range)?;
        let seen = data.map(|data| ranges_of_images(&mut quantized, &*data)).transpose()?;
        let mut extras = Extras::default();
        extras.metadata.insert("dfq".into(), serde_json::to_string(&report)?);
        let written = self.conversion.save(&quantized, &extras)?;
        text += &described(&report);
        if let Some(images) = seen {
            text += &format!("ranges of activations from {}\n", report::counted(images, "training image"));
        }
        Ok(text + &written)
    }
}

/// Sets the range of each activation except the image to the mean of its extremes over batches of
/// training images, as training would. Returns the number of images.
fn ranges_of_images(quantized: &mut Network, data: &dyn Dataset) -> Result<usize> {
    const BATCH: usize = 50;
    let mut float = quantized.duplicate()?;
    float.nodes.iter_mut().for_each(|node| *node.quantizer_mut() = None);
    let mut sums = vec![(0f64, 0f64); float.nodes.len()];
    let (mut images, mut batches) = (0, 0);
    for batch in data.train_batches(BATCH, Augmentation { pad: 0, flip: false }, 0, 0) {
        let batch = batch?;
        (images, batches) = (images + batch.labels.elem_count(), batches + 1);
        float.forward_observed(&batch.images, &mut |node, _, y| {
            let ends = kernels::quantize::min_max(y)?.to_vec1::<f32>()?;
            let (low, high) = &mut sums[node];
            *low += f64::from(ends[0]);
            *high += f64::from(ends[1]);
            Ok(())
        })?;
    }
    if images == 0 {
        bail!("{} has no training images to measure ranges on", data.source());
    }
    for (node, (low, high)) in quantized.nodes.iter_mut().zip(sums).skip(1) {
        if let Some(quantizer) = node.quantizer_mut() {
            quantizer.set_range((low / f64::from(batches)) as f32, (high / f64::from(batches)) as f32)?;
        }
    }
    Ok(images)
}

fn described(report: &DfqReport) -> String {
    let before = ranges(report.layers.iter().map(|layer| layer.range_before));
    let after = ranges(report.layers.iter().map(|layer| layer.range_after));
    let rows: Vec<Vec<String>> = report
        .layers
        .iter()
        .zip(before.into_iter().zip(after))
        .map(|(layer, (before, after))| {
            vec![
                layer.name.clone(),
                before,
                after,
                layer.absorbed.to_string(),
                format!("{:.4}", layer.correction),
            ]
        })
        .collect();
    let mut text = table(&["layer", "folded weights", "equalized", "absorbed", "correction"], &rows);
    text += &format!("equalized in {}\n", report::counted(report.sweeps, "sweep"));
    text
}

/// Formats ranges so that their upper ends stand under each other.
fn ranges(ranges: impl Iterator<Item = (f32, f32)>) -> Vec<String> {
    let ends: Vec<(String, String)> = ranges.map(|(lo, hi)| (short(lo), short(hi))).collect();
    let wide = ends.iter().map(|(_, hi)| hi.len()).max().unwrap_or(0);
    ends.into_iter().map(|(lo, hi)| format!("{lo} … {hi:>wide$}")).collect()
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn narrow_ranges_are_told_apart() {
        let shown = ranges([(-1.25, 10.5), (-0.000_123_4, 0.000_056_7)].into_iter());
        assert_eq!(shown, ["-1.250 …  10.500", "-1.23e-4 … 5.67e-5"]);
    }
}
