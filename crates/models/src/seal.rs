//! Files that hold a hash of themselves: in the metadata, of all bytes but its own, in whose place there are zeros.

use std::ops::Range;
use whole_file::seal::{SEAL, sha256_of_pieces};

/// What stands in the seal's place while the rest is hashed.
pub(crate) const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Where a seal stands among a safetensors file's bytes: in its header, after the name.
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

/// Seals a file's bytes, in whose metadata the seal is [`BLANK`].
pub(crate) fn close(data: &mut [u8]) {
    if let Some(place) = place(data, BLANK) {
        let seal = hash(data, &place);
        data[place].copy_from_slice(seal.as_bytes());
    }
}

/// Whether the bytes are those that were sealed.
pub(crate) fn holds(data: &[u8], seal: &str) -> bool {
    place(data, seal).is_some_and(|place| hash(data, &place) == seal)
}
