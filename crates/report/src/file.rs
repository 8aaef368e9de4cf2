//! Errors, and files that appear whole or not at all.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong; every message begins with the file it is about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file, or the folder it belongs in, cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The file is not a CSV file of rows.
    #[error("{}: {source}", path.display())]
    Csv {
        /// The file.
        path: PathBuf,
        /// The reason, with the line.
        source: csv::Error,
    },
    /// The file is not a JSON file of stages.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The reason, with the line.
        source: serde_json::Error,
    },
    /// The file is not what was written.
    #[error("{}: {problem}; run the same command again to write the results anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// An entry of a list of claims or deviations is wrong.
    #[error("{file}: {entry}: {problem}")]
    Entry {
        /// The file.
        file: String,
        /// The entry, by its place and its id.
        entry: String,
        /// What was found and what is expected.
        problem: String,
    },
    /// The plot cannot be drawn.
    #[error("{}: cannot draw: {reason}", path.display())]
    Draw {
        /// The picture's file.
        path: PathBuf,
        /// What the drawing library says.
        reason: String,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Writes `text` to `path`, whole or not at all; makes the folder where it is missing.
pub fn write_text(text: &str, path: &Path) -> Result<()> {
    whole_file::write(path, text).map_err(|source| Error::Io { path: path.into(), source })
}

/// [`whole_file::replace`] with this crate's error.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    whole_file::replace(path, |source| Error::Io { path: path.into(), source }, write)
}
