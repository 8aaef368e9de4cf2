//! Pictures in a tar file, or in tar files inside a tar file, which are read in place.
//!
//! The positions of the members are found once and stored in a file next to the archive. The crate
//! `tar` reads the headers. It expects an archive to be a whole file, so [`Section`] presents a
//! part of a file as one. positioned-io has sections too, but it adds positions from broken headers
//! without overflow checks.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::event::Event;

use super::files::{Stored, is_picture};

/// The position, the length and the name of a picture or of an inner archive.
type Member = (u64, u64, Box<str>);

/// The contents of the index file next to an archive.
#[derive(Deserialize, Serialize)]
struct Index {
    /// The state of the archive when its pictures were found.
    state: State,
    members: Vec<Member>,
}

/// The state of an archive: its length in bytes and its time of change in nanoseconds since 1970.
#[derive(Deserialize, Serialize, PartialEq)]
struct State(u64, u128);

impl State {
    fn of(archive: &Path) -> Result<State> {
        let metadata = fs::metadata(archive).map_err(Error::io(archive))?;
        let changed = metadata.modified().map_err(Error::io(archive))?;
        Ok(State(metadata.len(), changed.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos())))
    }
}

/// Returns the path of the index file of an archive.
fn index_of(archive: &Path) -> PathBuf {
    let mut path = OsString::from(archive);
    path.push(".index");
    path.into()
}

/// Lists the pictures in an archive. A picture in an inner archive is named
/// `<inner>.tar/<picture>`.
///
/// The list comes from the index file if the index was made from the archive's present state.
/// Otherwise the archive is searched and the index is written. If it cannot be written,
/// [`Event::NotKept`] is reported.
pub(super) fn pictures(archive: &Path, on_event: &mut dyn FnMut(Event)) -> Result<Vec<Stored>> {
    let state = State::of(archive)?;
    let path = index_of(archive);
    let kept = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Index>(&text).ok());
    // An index with positions beyond the end of the archive is damaged.
    let inside = |&(position, size, _): &Member| position.checked_add(size).is_some_and(|end| end <= state.0);
    let index = match kept.filter(|index| index.state == state && index.members.iter().all(inside)) {
        Some(index) => index,
        None => {
            on_event(Event::Indexing { archive: archive.display().to_string() });
            let index = Index { members: walk(archive, state.0)?, state };
            let text = serde_json::to_vec(&index).map_err(io::Error::from);
            if let Err(error) = text.and_then(|text| whole_file::write(&path, text)) {
                on_event(Event::NotKept { file: path.display().to_string(), why: error.to_string() });
            }
            index
        }
    };
    let container: Arc<Path> = archive.into();
    let stored =
        |(offset, size, name)| Stored { container: Arc::clone(&container), name, offset: Some(offset), size };
    Ok(index.members.into_iter().map(stored).collect())
}

/// Writes an index for the archive's present state; `members` is the JSON of its members.
pub(super) fn set_index(archive: &Path, members: &[u8]) {
    let State(length, changed) = State::of(archive).expect("the archive is there");
    let index = [format!(r#"{{"state":[{length},{changed}],"members":"#).as_bytes(), members, b"}"].concat();
    fs::write(index_of(archive), index).expect("the folder can be written");
}

/// Searches an archive of `length` bytes and its inner archives for pictures.
fn walk(archive: &Path, length: u64) -> Result<Vec<Member>> {
    let mut found = Vec::new();
    for (start, length, name) in members(archive, 0, length, "", &mut found)? {
        members(archive, start, length, &format!("{name}/"), &mut found)?;
    }
    Ok(found)
}

/// Adds the pictures of the archive in a section of the file, and returns its inner archives.
///
/// `prefix` is put before the names.
fn members(
    archive: &Path,
    start: u64,
    length: u64,
    prefix: &str,
    found: &mut Vec<Member>,
) -> Result<Vec<Member>> {
    let place = format!("{}{}{}", archive.display(), if prefix.is_empty() { "" } else { ": " }, prefix);
    let broken =
        |error: io::Error| Error::malformed(&place, format!("it is not a complete tar file: {error}"));
    let file = File::open(archive).map_err(Error::io(archive))?;
    let mut tar = tar::Archive::new(Section { file, start, length, at: 0 });
    let mut inner = Vec::new();
    for entry in tar.entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(broken)?;
        let Some(path) = path.to_str() else { continue };
        let path = path.trim_start_matches("./");
        let (position, size) = (entry.raw_file_position(), entry.size());
        let end = position.saturating_add(size);
        if end > length {
            let what =
                format!("it is truncated: its member {path} ends at byte {end}, the archive at {length}");
            return Err(Error::malformed(&place, what));
        }
        let name = path.rsplit('/').next().unwrap_or(path);
        let kind = if is_picture(name) {
            &mut *found
        } else if name.ends_with(".tar") && prefix.is_empty() {
            &mut inner
        } else {
            continue;
        };
        kind.push((start + position, size, format!("{prefix}{path}").into()));
    }
    Ok(inner)
}

/// A section of a file that can be read like a file.
struct Section {
    file: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.length.saturating_sub(self.at).min(buffer.len() as u64) as usize;
        self.file.seek(SeekFrom::Start(self.start.saturating_add(self.at)))?;
        let n = self.file.read(&mut buffer[..left])?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
