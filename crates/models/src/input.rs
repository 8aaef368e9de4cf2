//! Reading of files that come from outside.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;

/// The largest length of a network's file in bytes: 1000 times that of the larger of the paper's
/// networks.
const MOST_BYTES: u64 = 16 << 30;

/// Reads a file.
///
/// # Errors
/// Those of the file system, and an error if the path is no regular file (a pipe would block, a
/// device never ends) or the file is longer than `MOST_BYTES`.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    if metadata.len() > MOST_BYTES {
        let what = format!("it has {} bytes: expected at most {MOST_BYTES}", metadata.len());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    std::fs::read(path)
}
