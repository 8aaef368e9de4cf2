//! Errors, and files that are written atomically.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate. Every message begins with the file that it is about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file or its folder cannot be read or written.
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
        /// The reason, with the line number.
        source: csv::Error,
    },
    /// The file is not a JSON file of stages.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The reason, with the line number.
        source: serde_json::Error,
    },
    /// The contents of the file are not those that were written.
    #[error("{}: {problem}; restore it, or move its folder away and make what is in it anew", path.display())]
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
        /// The entry's position and id.
        entry: String,
        /// What was found and what is expected.
        problem: String,
    },
    /// The plot cannot be drawn.
    #[error("{}: cannot draw: {reason}", path.display())]
    Draw {
        /// The picture's file.
        path: PathBuf,
        /// The message of the drawing library.
        reason: String,
    },
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Writes `text` to `path` atomically. Creates the folder if it is missing.
pub fn write_text(text: &str, path: &Path) -> Result<()> {
    whole_file::write(path, text).map_err(|source| Error::Io { path: path.into(), source })
}

/// Calls [`whole_file::replace`] with this crate's error.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    whole_file::replace(path, |source| Error::Io { path: path.into(), source }, write)
}
