//! Training of a [`models::Network`].
//!
//! This crate has SGD with momentum, the paper's learning-rate schedule, the epoch loop with
//! evaluation, and checkpoints from which an interrupted run resumes bit for bit. Several processes
//! can train one network together ([`follow`]).

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
pub use run::{CHECKPOINT, EpochMetrics, METRICS, Progress, Trained, TrainingRun};
pub use settings::{Arithmetic, Decay, Training};
pub use step::{Found, Trainer};

/// Errors of training and evaluation.
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
        /// The name of the setting.
        key: &'static str,
        /// The value of the setting.
        found: String,
        /// The allowed values.
        expected: &'static str,
    },
    /// A parameter has no momentum: the momenta belong to another network.
    #[error("parameter {parameter} has no velocity: make them anew for this network")]
    Velocity {
        /// The name of the parameter.
        parameter: String,
    },
    /// The loss on the test images is not finite although the network's own values are.
    #[error(
        "network {network} has a loss of {loss} on the test images: expected a finite one; its outputs overflow, as its weights \
         are too large"
    )]
    Loss {
        /// The name of the network.
        network: String,
        /// The loss that was computed.
        loss: f64,
    },
    /// The loss or a value of the network is no longer finite.
    #[error(
        "training diverged in epoch {epoch}: {what}; a smaller learning rate (now {rate:.5}) or a longer warm-up \
         usually helps"
    )]
    Diverged {
        /// What was found.
        what: String,
        /// The epoch, from 1.
        epoch: usize,
        /// The learning rate of the last step.
        rate: f64,
    },
    /// The time limit has been reached, which is not a failure: the same call resumes from the
    /// checkpoint on disk.
    #[error(
        "stopped after epoch {epoch} of {epochs}, as the next one would end after the time limit; the same command \
         goes on from the checkpoint"
    )]
    TimeLimit {
        /// The number of finished epochs.
        epoch: usize,
        /// The total number of epochs.
        epochs: usize,
    },
    /// The ranks that train together do not compute the same.
    #[error("rank {rank} {problem}")]
    Ranks {
        /// The rank that found the difference.
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

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
