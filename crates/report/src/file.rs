//! Files appear whole or not at all.

use std::fs;
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
    replace(path, |temporary| {
        fs::write(temporary, text).map_err(|source| Error::Io { path: path.into(), source })
    })
}

/// Lets `write` fill a temporary file beside `path` (with the same extension), then renames it to `path`.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |source| Error::Io { path: path.into(), source };
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(io)?;
    let suffix = path.extension().map(|extension| format!(".{}", extension.display())).unwrap_or_default();
    let mut builder = tempfile::Builder::new();
    builder.prefix(".unfinished-").suffix(&suffix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as usual
    let temporary = builder.tempfile_in(folder).map_err(io)?.into_temp_path();
    write(&temporary)?;
    temporary.persist(path).map_err(|error| io(error.error))
}
