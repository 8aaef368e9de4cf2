//! Training of a [`models::Network`]: SGD with momentum, the paper's learning-rate schedule, the
//! epoch loop with evaluation, and checkpoints from which an interrupted run goes on bit for bit. Several processes may train
//! one network together ([`follow`]).

#![forbid(unsafe_code)]

mod calibrate;
mod evaluate;
mod fit;
mod limit;
mod run;
mod settings;
mod state;
mod step;
mod together;
mod totals;

pub use calibrate::calibrate;
pub use evaluate::{Evaluation, evaluate, evaluate_in};
pub use fit::{dismiss, fit, follow};
pub use limit::TimeLimit;
pub use run::{EpochMetrics, Progress, Trained, TrainingRun};
pub use settings::{Arithmetic, Decay, Training};
pub use step::{Found, Trainer};

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// The network could not be run, read or written.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] datasets::Error),
    /// A setting is impossible.
    #[error("setting {key} = {found} is impossible: expected {expected}")]
    Setting {
        /// Name of the setting.
        key: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The momenta are those of another network.
    #[error("parameter {parameter} has no velocity: make them anew for this network")]
    Velocity {
        /// The parameter's name.
        parameter: String,
    },
    /// The network's outputs are no numbers, although its own numbers are.
    #[error(
        "network {network} has a loss of {loss} on the test images: expected a finite one; its outputs overflow, as its weights \
         are too large"
    )]
    Loss {
        /// The network's name.
        network: String,
        /// What was found.
        loss: f64,
    },
    /// The loss, or a number of the network, is no longer finite.
    #[error(
        "training diverged in epoch {epoch}: {what}; a smaller learning rate (now {rate:.5}) or a longer warm-up \
         usually helps"
    )]
    Diverged {
        /// What was found.
        what: String,
        /// Epoch, from 1.
        epoch: usize,
        /// Learning rate of the last step.
        rate: f64,
    },
    /// Not a failure: the time is up. A checkpoint is on the disk from which the same call goes on.
    #[error(
        "stopped after epoch {epoch} of {epochs}, as the next one would end after the time limit; the same command \
         goes on from the checkpoint"
    )]
    TimeLimit {
        /// Epochs done.
        epoch: usize,
        /// Epochs in all.
        epochs: usize,
    },
    /// The ranks that train together do not do the same.
    #[error("rank {rank} {problem}")]
    Ranks {
        /// The rank that found it.
        rank: usize,
        /// What was found and what was expected.
        problem: String,
    },
    /// A checkpoint or metrics file could not be used.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: String,
        /// What was found and what to do.
        problem: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
