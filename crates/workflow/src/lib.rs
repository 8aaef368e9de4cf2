//! Stages and their store.
//!
//! A [`Stage`] is a pure function with a name: pre-train, prune, fine-tune, equalize. Its inputs
//! (parent stage, settings, data, seed) are hashed to its key, and the [`Store`] keeps its result
//! under that key. So a stage is never run twice, tables share their common stages, an interrupted
//! run resumes, and two processes can share the work.

#![forbid(unsafe_code)]

mod key;
mod outcome;
mod published;
mod ranges;
mod recipe;
mod stage;
mod store;
mod verify;

pub use outcome::{DataOrigin, NETWORK, Outcome, Provenance};
pub use published::Published;
pub use recipe::{Purpose, Recipe, Trainings};
pub use stage::{Stage, StageKind};
pub use store::{Event, Planned, Resources, Store, image_range};
pub use verify::{Checked, Finding, verify};

use std::path::Path;

/// Errors of running stages.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A network could not be built, read or written.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// Training or evaluation failed.
    #[error(transparent)]
    Train(#[from] train::Error),
    /// Pruning failed.
    #[error(transparent)]
    Prune(#[from] pfq::Error),
    /// The baseline could not be applied.
    #[error(transparent)]
    Baseline(#[from] baselines::Error),
    /// A file of the store could not be used.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: String,
        /// What was found and what to do.
        problem: String,
    },
    /// A file of the store is missing or is not what was written.
    #[error("{path} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A published network is missing or is not what was published.
    #[error(
        "{path}, a published network, can't be used: {problem}; restore the file, or remove its folder to do without \
         what is published"
    )]
    Published {
        /// The file.
        path: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A setting is not finite, so the stage has no key.
    #[error("setting {setting} = {value}: expected a finite number")]
    NotFinite {
        /// The name of the setting.
        setting: &'static str,
        /// The value of the setting.
        value: f64,
    },
    /// The settings lack a training that a workflow needs.
    #[error("the settings have no [training.{0}]; add it, e.g. with `like = \"once\"` and what differs")]
    NoTraining(Purpose),
    /// The time limit was reached before the stage was started, which is not a failure.
    #[error("not begun, as it would end after the time limit; the same command goes on from here")]
    TimeLimit,
    /// A stage failed.
    #[error("stage {label} ({folder})")]
    Stage {
        /// The label of the stage.
        label: String,
        /// The folder of the stage in the store.
        folder: String,
        /// The reason.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    /// Creates an [`Error::File`].
    pub(crate) fn file(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::File { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// Returns whether the time limit of [`Store::within`] ended the work, which is not a failure.
    pub fn is_time_limit(&self) -> bool {
        match self {
            Self::Stage { source, .. } => source.is_time_limit(),
            Self::TimeLimit | Self::Train(train::Error::TimeLimit { .. }) => true,
            _ => false,
        }
    }

    /// Returns whether a file of the stage itself is missing or differs from what was written.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::Model(models::Error::Damaged { .. })
                | Self::Train(train::Error::Model(models::Error::Damaged { .. }))
        )
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
