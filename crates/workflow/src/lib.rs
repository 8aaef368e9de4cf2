//! Stages and their store.
//!
//! A [`Stage`] is a pure function with a name: pre-train, prune, fine-tune, equalize. Its inputs
//! (parent stage, settings, data, seed) are hashed to its key, and the [`Store`] keeps what it gave
//! under that key. So a stage that has been run is never run again, tables share what they have in
//! common, an interrupted run goes on where it was, and two processes can share the work.

#![forbid(unsafe_code)]

mod key;
mod outcome;
mod published;
mod ranges;
mod recipe;
mod stage;
mod store;
mod verify;

pub use outcome::{DataOrigin, Outcome, Provenance};
pub use published::Published;
pub use recipe::{Purpose, Recipe, Trainings};
pub use stage::{Stage, StageKind};
pub use store::{Event, Planned, Resources, Store, image_range};
pub use verify::{Checked, Finding, verify};

use std::path::Path;

/// What can go wrong while running stages.
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
    /// A setting has no place in a key.
    #[error("setting {setting} = {value}: expected a finite number")]
    NotFinite {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// The settings lack a training that a workflow needs.
    #[error("the settings have no [training.{0}]; add it, e.g. with `like = \"once\"` and what differs")]
    NoTraining(Purpose),
    /// Not a failure: the time is up before the stage was begun.
    #[error("not begun, as it would end after the time limit; the same command goes on from here")]
    TimeLimit,
    /// A stage failed; names it.
    #[error("stage {label} ({folder})")]
    Stage {
        /// What the stage is.
        label: String,
        /// Its folder in the store.
        folder: String,
        /// Why it failed.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    /// A file that could not be used, and why.
    pub(crate) fn file(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::File { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// Whether nothing failed, but the time limit of [`Store::within`] ended the work.
    pub fn is_time_limit(&self) -> bool {
        match self {
            Self::Stage { source, .. } => source.is_time_limit(),
            Self::TimeLimit | Self::Train(train::Error::TimeLimit { .. }) => true,
            _ => false,
        }
    }

    /// Whether a file of the stage itself is missing or is not what was written.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::Model(models::Error::Damaged { .. })
                | Self::Train(train::Error::Model(models::Error::Damaged { .. }))
        )
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
