//! Pictures in a tar file, or in tar files in a tar file, read in place.
//!
//! The positions of the members are found once and kept in a file beside the archive.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::error::{Error, Result};
use crate::source::Event;

use super::files::{Stored, is_picture};

/// The first line of an index. To be changed when its form does.
const FORM: &str = "pfq tar index 1";

/// The file that keeps the positions of an archive's members.
fn index_file(archive: &Path) -> PathBuf {
    let mut name = OsString::from(archive);
    name.push(".index");
    name.into()
}

/// The pictures in an archive. Those of an archive in it are named `<inner>.tar/<picture>`.
///
/// They are taken from the index beside the archive if that was made when the archive had its present
/// length and time of change; otherwise the archive is gone through and the index written. Where it cannot be
/// written, that is told and the archive will be gone through again.
pub(super) fn pictures(archive: &Path, on_event: &mut dyn FnMut(Event)) -> Result<Vec<Stored>> {
    let state = state(archive)?;
    let path = index_file(archive);
    if let Some(found) = fs::read_to_string(&path).ok().and_then(|text| parse(&text, &state, archive)) {
        return Ok(found);
    }
    on_event(Event::Indexing { archive: archive.display().to_string() });
    let found = walk(archive)?;
    if let Err(error) = whole_file::write(&path, text(&found, &state)) {
        on_event(Event::NotKept { file: path.display().to_string(), why: error.to_string() });
    }
    Ok(found)
}

/// What tells one state of an archive from another: length, and time of change in nanoseconds.
fn state(archive: &Path) -> Result<String> {
    let metadata = fs::metadata(archive).map_err(Error::io(archive))?;
    let changed = metadata.modified().map_err(Error::io(archive))?;
    let changed = changed.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    Ok(format!("{} bytes, changed at {changed}", metadata.len()))
}

/// The index: its form, the state of the archive, the number of members, then a line for each: position,
/// length, name.
fn text(found: &[Stored], state: &str) -> String {
    let mut text = format!("{FORM}\n{state}\n{}\n", found.len());
    for member in found {
        let offset = member.offset.unwrap_or_default();
        text.push_str(&format!("{offset}\t{}\t{}\n", member.size, member.name));
    }
    text
}

/// The members in an index; `None` if it is of another state of the archive, or not whole.
fn parse(text: &str, state: &str, archive: &Path) -> Option<Vec<Stored>> {
    let mut lines = text.lines();
    if (lines.next(), lines.next()) != (Some(FORM), Some(state)) {
        return None;
    }
    let count: usize = lines.next()?.parse().ok()?;
    let container: Arc<Path> = archive.into();
    let member = |line: &str| {
        let mut columns = line.splitn(3, '\t');
        let mut number = || columns.next()?.parse().ok();
        let (offset, size) = (number()?, number()?);
        let name = columns.next()?.into();
        Some(Stored { container: Arc::clone(&container), name, offset: Some(offset), size })
    };
    let found: Option<Vec<Stored>> = lines.map(member).collect();
    found.filter(|found| found.len() == count)
}

/// Goes through the archive, and the archives in it, from header to header.
fn walk(archive: &Path) -> Result<Vec<Stored>> {
    let length = fs::metadata(archive).map_err(Error::io(archive))?.len();
    let mut found = Vec::new();
    for inner in members(archive, 0, length, "", &mut found)? {
        let Stored { name, offset, size, .. } = inner;
        members(archive, offset.unwrap_or_default(), size, &format!("{name}/"), &mut found)?;
    }
    Ok(found)
}

/// Adds the pictures of the archive in the given section, and returns the archives in it. `prefix` goes before
/// the names.
fn members(
    archive: &Path,
    start: u64,
    length: u64,
    prefix: &str,
    found: &mut Vec<Stored>,
) -> Result<Vec<Stored>> {
    let place = format!("{}{}{}", archive.display(), if prefix.is_empty() { "" } else { ": " }, prefix);
    let broken =
        |error: io::Error| Error::malformed(&place, format!("it is not a complete tar file: {error}"));
    let container: Arc<Path> = archive.into();
    let file = File::open(archive).map_err(Error::io(archive))?;
    let mut tar = tar::Archive::new(Section { file, start, length, at: 0 });
    let mut inner = Vec::new();
    for entry in tar.entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(broken)?;
        // A line break or a tab would break the index.
        let Some(path) = path.to_str().filter(|path| !path.contains(['\n', '\t'])) else { continue };
        let path = path.trim_start_matches("./");
        let (position, size) = (entry.raw_file_position(), entry.size());
        if position + size > length {
            let what = format!(
                "it is truncated: its member {path} ends at byte {}, the archive at {length}",
                position + size
            );
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
        let name = format!("{prefix}{path}").into();
        kind.push(Stored { container: Arc::clone(&container), name, offset: Some(start + position), size });
    }
    Ok(inner)
}

/// A part of a file, as a file.
struct Section {
    file: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.length.saturating_sub(self.at).min(buffer.len() as u64) as usize;
        self.file.seek(SeekFrom::Start(self.start + self.at))?;
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
