use crate::{Error, TimeLimit, Training};
use datasets::Dataset;
use models::Network;
use ranks::Ranks;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One training run.
pub struct TrainingRun<'a> {
    /// Training and test images.
    pub data: &'a dyn Dataset,
    /// Rates, lengths and the rest.
    pub training: &'a Training,
    /// Seed of the order and the augmentation of the training images.
    pub seed: u64,
    /// Folder of the run's `checkpoint.safetensors` (with its parts, where it has any) and `metrics.csv`.
    pub folder: &'a Path,
    /// Names the run; a checkpoint of another run is an error, not a start.
    pub identity: &'a str,
    /// SHA-256 of the file of the network that training begins from, where it is from one. A checkpoint that began from another
    /// is damaged.
    pub parent_network: Option<&'a str>,
    /// When to stop, if the run is to go on another time.
    pub limit: Option<&'a TimeLimit>,
    /// The ranks that train together, of which this one is rank 0 and the others are in [`follow`](crate::follow); none where
    /// this process trains alone.
    pub ranks: Option<&'a dyn Ranks>,
    /// Whether steps on a GPU are launches of a CUDA graph ([`Trainer::new`]); without effect where several ranks train.
    pub graphs: bool,
}

impl TrainingRun<'_> {
    /// Whether steps are recorded. Where several ranks train, they wait for each other on the host.
    pub(crate) fn records(&self) -> bool {
        self.graphs && self.ranks.is_none()
    }
}

/// What one epoch gave: a line of `metrics.csv`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// From 1.
    pub epoch: usize,
    /// Learning rate of its last step.
    pub rate: f64,
    /// Mean training loss over the epoch, in nats, while the weights moved.
    pub train_loss: f64,
    /// Training accuracy likewise, in percent.
    pub train_top1_percent: f64,
    /// Test loss after the epoch, in nats.
    pub test_loss: f64,
    /// Test accuracy after the epoch, in percent.
    pub test_top1_percent: f64,
    /// Wall time of the epoch with its evaluation.
    pub seconds: f64,
}

/// What a run tells while it goes.
#[derive(Debug)]
pub enum Progress {
    /// An earlier run's checkpoint was found; `epoch` epochs are done.
    Resumed {
        /// Epochs done.
        epoch: usize,
    },
    /// Steps are no launches of a CUDA graph, although they were to be, for that reason.
    NoGraphs(Error),
    /// Some steps of an epoch are done.
    Steps {
        /// From 1.
        epoch: usize,
        /// Epochs in all.
        epochs: usize,
        /// Steps done in this epoch.
        step: usize,
        /// Steps an epoch.
        steps: usize,
        /// Mean training loss so far in the epoch.
        loss: f64,
        /// Training images a second, in this epoch.
        images_per_second: f64,
    },
    /// An epoch is done and its checkpoint is on the disk.
    Epoch {
        /// Epochs in all.
        epochs: usize,
        /// What it gave.
        metrics: EpochMetrics,
    },
}

/// A trained network.
#[derive(Debug)]
pub struct Trained {
    /// The network after the last epoch.
    pub network: Network,
    /// Every epoch's metrics, those before an interruption included.
    pub metrics: Vec<EpochMetrics>,
    /// After every epoch the share, in percent, of the filters whose running variance is below the ε of batch normalization, and
    /// which PfQ would find at its usual threshold; `None` where there are no such layers, and for epochs of older versions.
    pub low_variance_percent: Vec<Option<f64>>,
}
