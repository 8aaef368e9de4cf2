use super::data::{self, Wanted};
use super::network::NetworkFile;
use super::values;
use crate::published::PublishedFile;
use anyhow::{Context, Result, bail};
use clap::Args;
use datasets::Dataset;
use integer::{Engine, FRACTION, MULTIPLIER_BITS};
use models::Network;
use std::time::Instant;
use train::Evaluation;

/// Measures the top-1 accuracy and the loss on test images
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq eval pruned.safetensors --data data/cifar-100-binary\n\n\
                  The images are normalized with the mean and standard deviation of the training images, as in the \
                  project's own training. A published network (results/networks/PROFILE/*) is evaluated on the images and in the \
                  arithmetic of its stage, so that the figures agree with the table to the last digit.")]
pub(super) struct Eval {
    #[command(flatten)]
    network: NetworkFile,

    /// Test images: a folder, auto, hub, or, for networks with an input of 32×32, synthetic
    ///
    /// A folder val/CLASS/* has pictures of any classes. A network with an input of 32×32 also
    /// takes CIFAR-100: auto ($PFQ_DATA, ./data, the Hugging Face hub, otherwise synthetic),
    /// synthetic, hub, or a folder with the official files. A network with an input of 64×64 or
    /// more takes ImageNet: auto ($PFQ_IMAGENET, ./imagenet), hub, or a folder with class folders,
    /// flat val/*.JPEG and a list of classes, the official archives, or the hub's tables.
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    data: String,

    /// Use only this many test images, spread over the classes
    #[arg(long, value_name = "IMAGES", value_parser = values::count)]
    limit: Option<usize>,

    /// Largest share of damaged pictures that are left out; more are an error
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, value_parser = values::percent)]
    bad_percent: f64,

    /// Also evaluate in whole numbers, as an integer engine does, and compare; needs weights and
    /// activations that are all quantized
    #[arg(long)]
    integer: bool,
}

impl Eval {
    pub fn run(&self) -> Result<String> {
        let (network, mut text) = self.network.open()?;
        let file = self.network.file.display();
        let engine = self.integer.then(|| Engine::new(&network)).transpose();
        let engine = engine.with_context(|| format!("{file} can't be evaluated in whole numbers"))?;
        let published = PublishedFile::find(&self.network.file)?;
        let wanted = Wanted {
            place: &self.data,
            limits: [None, self.limit],
            bad_percent: self.bad_percent,
            settings: published.as_ref().map(|published| published.data()),
        };
        let data = data::load(wanted, &network)?;
        if let Some(of) = published.as_ref().map(PublishedFile::dataset)
            && self.data == "auto"
            && report::is_synthetic(data.name())
            && !report::is_synthetic(of)
        {
            bail!(
                "the network's figures are published for {of}, which was not found: name the images with --data"
            );
        }
        let started = Instant::now();
        let evaluated = || -> Result<String> {
            if let Some(engine) = &engine {
                return compared(&network, engine, &*data);
            }
            let (Evaluation { top1_percent, loss }, said) = match published {
                Some(published) if published.is_of(&*data)? => published.evaluate(&*data)?,
                _ => (train::evaluate(&network, &*data)?, String::new()),
            };
            Ok(format!("top-1 {top1_percent:.2} %, loss {loss:.4}\n{said}"))
        };
        let evaluated = evaluated();
        let skipped = data.skipped();
        for skipped in &skipped {
            text += &format!("left out {}: {}\n", skipped.file, skipped.why);
        }
        if data.test_images() == skipped.len() && !skipped.is_empty() {
            bail!("{text}none of the test images can be used: {}", data.title());
        }
        let said = evaluated?;
        text += &format!(
            "{}: {} in {}\n{said}",
            data.title(),
            report::counted(data.test_images() - skipped.len(), "test image"),
            report::duration(started.elapsed().as_secs_f64()),
        );
        Ok(text)
    }
}

/// Compares the simulation with floats to the evaluation in whole numbers; returns the text to
/// print.
fn compared(network: &Network, engine: &Engine, data: &dyn Dataset) -> Result<String> {
    /// The number of images whose logits are computed at once.
    const BATCH: usize = 100;
    let (mut images, mut hits, mut different, mut distance, mut largest) = (0, [0; 2], 0, 0f32, 0f32);
    for batch in data.test_batches(BATCH) {
        let batch = batch?;
        let logits = [network.forward(&batch.images)?, engine.logits(&batch.images)?];
        let [simulated, whole] = logits.map(|logits| logits.to_vec2::<f32>());
        for ((a, b), label) in simulated?.iter().zip(whole?).zip(batch.labels.to_vec1::<u32>()?) {
            if let Some(logit) = a.iter().find(|logit| !logit.is_finite()) {
                bail!(
                    "the network gives a logit of {logit}: expected finite logits; its weights are too large"
                );
            }
            let predictions = [best(a), best(&b)];
            images += 1;
            different += usize::from(predictions[0] != predictions[1]);
            for (hits, prediction) in hits.iter_mut().zip(predictions) {
                *hits += usize::from(prediction == label as usize);
            }
            distance = a.iter().zip(b).fold(distance, |most, (a, b)| most.max((a - b).abs()));
            largest = a.iter().fold(largest, |most, a| most.max(a.abs()));
        }
    }
    let [simulated, whole] = hits.map(|hits| 100.0 * hits as f64 / images.max(1) as f64);
    Ok(format!(
        "simulated: top-1 {simulated:.2} %\nin whole numbers: top-1 {whole:.2} % (multipliers of \
         {MULTIPLIER_BITS} bits, residuals with {FRACTION} fractional bits)\n{different} of {images} \
         predictions differ; logits differ by {distance:.2e} at most; the largest logit has a magnitude of \
         {largest:.2}\n"
    ))
}

/// Returns the index of the largest logit, the first one if several are equal.
fn best(logits: &[f32]) -> usize {
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.unwrap_or_default()
}
