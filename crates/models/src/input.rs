//! Bytes of files that come from outside.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;

/// The most bytes that a network's file may have: 1000 times as many as the larger of the paper's networks takes.
const MOST_BYTES: u64 = 16 << 30;

/// Reads a file.
///
/// # Errors
/// Those of the file system, and one if it is no regular file (a pipe would be waited for, a device never ends) or is
/// longer than any network's.
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
