use crate::{Error, TimeLimit, Training};
use datasets::Dataset;
use models::Network;
use ranks::Ranks;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One training run.
pub struct TrainingRun<'a> {
    /// The training and test images.
    pub data: &'a dyn Dataset,
    /// The training settings.
    pub training: &'a Training,
    /// The seed of the order and the augmentation of the training images.
    pub seed: u64,
    /// The folder of the run's `metrics.csv` and `checkpoint.safetensors`, including its parts if
    /// it has any.
    pub folder: &'a Path,
    /// The name of the run. A checkpoint with another name is an error and is not resumed.
    pub identity: &'a str,
    /// The SHA-256 of the file of the initial network, if it comes from a file. A checkpoint that
    /// started from another network is treated as damaged.
    pub parent_network: Option<&'a str>,
    /// The time limit after which the run stops, to be resumed by another call.
    pub limit: Option<&'a TimeLimit>,
    /// The ranks that train together, or `None` if this process trains alone. This process is
    /// rank 0, and the other ranks are in [`follow`](crate::follow).
    pub ranks: Option<&'a dyn Ranks>,
    /// Whether steps on a GPU are launches of a CUDA graph ([`Trainer::new`](crate::Trainer::new)). It has no effect if
    /// several ranks train.
    pub graphs: bool,
}

impl TrainingRun<'_> {
    /// Returns whether steps are recorded. Several ranks wait for each other on the host, which a
    /// graph cannot do.
    pub(crate) fn records(&self) -> bool {
        self.graphs && self.ranks.is_none()
    }
}

/// The file of a run's metrics, in its folder.
pub const METRICS: &str = "metrics.csv";

/// The file of a run's checkpoint, in its folder.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// The metrics of one epoch: a line of `metrics.csv`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The learning rate of the epoch's last step.
    pub rate: f64,
    /// The mean training loss over the epoch, in nats, while the weights change.
    pub train_loss: f64,
    /// The training accuracy over the epoch, in percent, while the weights change.
    pub train_top1_percent: f64,
    /// The test loss after the epoch, in nats.
    pub test_loss: f64,
    /// The test accuracy after the epoch, in percent.
    pub test_top1_percent: f64,
    /// The wall time of the epoch in seconds, including its evaluation.
    pub seconds: f64,
}

impl EpochMetrics {
    /// Reads the metrics of the epochs that a run has finished from its `metrics.csv`. The result
    /// is empty if there is no such file, and ends before the first line that cannot be read.
    pub fn read(path: &Path) -> Vec<Self> {
        let Ok(mut reader) = csv::Reader::from_path(path) else { return Vec::new() };
        reader.deserialize().map_while(|line| line.ok()).collect()
    }
}

/// An event during a run.
#[derive(Debug)]
pub enum Progress {
    /// The checkpoint of an earlier run was found.
    Resumed {
        /// The number of finished epochs.
        epoch: usize,
    },
    /// Steps are not launches of a CUDA graph although this was requested; holds the reason.
    NoGraphs(Error),
    /// Some steps of an epoch are done.
    Steps {
        /// The epoch, from 1.
        epoch: usize,
        /// The total number of epochs.
        epochs: usize,
        /// The number of finished steps of this epoch.
        step: usize,
        /// The number of steps per epoch.
        steps: usize,
        /// The mean training loss of the epoch so far.
        loss: f64,
        /// The number of training images per second in this epoch.
        images_per_second: f64,
    },
    /// An epoch is done and its checkpoint is on disk.
    Epoch {
        /// The total number of epochs.
        epochs: usize,
        /// The metrics of the epoch.
        metrics: EpochMetrics,
    },
}

/// A trained network.
#[derive(Debug)]
pub struct Trained {
    /// The network after the last epoch.
    pub network: Network,
    /// The metrics of every epoch, including those before an interruption.
    pub metrics: Vec<EpochMetrics>,
    /// For every epoch, the percentage of filters whose running variance is below the ε of batch
    /// normalization, which is PfQ's default threshold. It is `None` if there are no such layers,
    /// and for epochs trained by older versions.
    pub low_variance_percent: Vec<Option<f64>>,
}
