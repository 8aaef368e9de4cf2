//! Seals: hashes that files hold of themselves.
//!
//! The seal is in the metadata. It is the hash of the file's bytes with [`BLANK`] in place of the
//! seal.

use std::ops::Range;
use whole_file::seal::{SEAL, sha256_of_pieces};

/// The placeholder of the seal while the file is hashed.
pub(crate) const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Returns the position of the seal in a safetensors file: in its header, after its key.
fn place(data: &[u8], seal: &str) -> Option<Range<usize>> {
    let header = usize::try_from(u64::from_le_bytes(*data.first_chunk()?)).ok()?;
    let header = data.get(8..header.checked_add(8)?)?;
    let entry = format!("\"{SEAL}\":\"{seal}\"");
    let start = header.windows(entry.len()).position(|window| window == entry.as_bytes())?;
    let end = 8 + start + entry.len() - 1;
    Some(end - seal.len()..end)
}

fn hash(data: &[u8], place: &Range<usize>) -> String {
    sha256_of_pieces([&data[..place.start], BLANK.as_bytes(), &data[place.end..]])
}

/// Writes the seal into a file's bytes, whose metadata has [`BLANK`] as the seal.
pub(crate) fn close(data: &mut [u8]) {
    if let Some(place) = place(data, BLANK) {
        let seal = hash(data, &place);
        data[place].copy_from_slice(seal.as_bytes());
    }
}

/// Returns whether the bytes match their seal.
pub(crate) fn holds(data: &[u8], seal: &str) -> bool {
    place(data, seal).is_some_and(|place| hash(data, &place) == seal)
}
