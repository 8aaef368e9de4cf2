use super::data::{self, Wanted};
use super::network::NetworkFile;
use crate::progress::duration;
use anyhow::Result;
use clap::Args;
use std::time::Instant;

/// Measures the top-1 accuracy and the loss on test images
#[derive(Debug, Args)]
#[command(after_help = "Example: pfq eval pruned.safetensors --data data/cifar-100-binary\n\n\
                  The images are normalized with the mean and standard deviation of the training images, as in the \
                  project's own training.")]
pub(super) struct Eval {
    #[command(flatten)]
    network: NetworkFile,

    /// A folder val/<class>/* of pictures, of any classes. For a network with an input of 32×32 also CIFAR-100: auto ($PFQ_DATA,
    /// ./data, the Hugging Face hub, else synthetic), synthetic, hub, or a folder with the official files. With an input of 64×64
    /// or more, ImageNet: auto ($PFQ_IMAGENET, ./imagenet), hub, or a folder with class folders, flat val/*.JPEG and a list of
    /// classes, the official archives, or the hub's tables
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    data: String,

    /// Take only so many test images, spread over the classes
    #[arg(long, value_name = "IMAGES")]
    limit: Option<usize>,

    /// Of ImageNet's pictures, leave out up to so many that are damaged before that is an error
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    bad_percent: f64,
}

impl Eval {
    pub fn run(&self) -> Result<String> {
        let (network, mut text) = self.network.open()?;
        let wanted = Wanted {
            place: &self.data,
            limits: [None, self.limit],
            bad_percent: self.bad_percent,
            settings: None,
        };
        let data = data::load(wanted, &network)?;
        let started = Instant::now();
        let evaluation = train::evaluate(&network, &*data)?;
        let skipped = data.skipped();
        for skipped in &skipped {
            text += &format!("left out {}: {}\n", skipped.file, skipped.why);
        }
        text += &format!(
            "{} from {}: {} test images in {}\ntop-1 {:.2} %, loss {:.4}\n",
            data.name(),
            data.source(),
            data.test_images() - skipped.len(),
            duration(started.elapsed().as_secs_f64()),
            evaluation.top1_percent,
            evaluation.loss
        );
        Ok(text)
    }
}
