//! Where the bytes of pictures are: files of their own, or sections of an archive.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{Error, Result};

/// What folders of a whole split are called.
const SPLITS: [&str; 3] = ["train", "val", "validation"];

/// A picture's file, or the section of an archive that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// The folder of the split, or the archive.
    pub container: Arc<Path>,
    /// Its path in there, with `/`. In an archive it can have the name of an archive in that one.
    pub name: Box<str>,
    /// Where it begins in the archive; `None`: it is a file of its own.
    pub offset: Option<u64>,
    /// Its length in bytes.
    pub size: u64,
}

impl Stored {
    /// Its name without folders.
    pub fn file_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// The name of the innermost folder that it is in, or of the archive in the archive: that of its class, if
    /// pictures are sorted so. A folder of a whole split is none.
    pub fn folder(&self) -> Option<&str> {
        let (folders, _) = self.name.rsplit_once('/')?;
        let folder = folders.rsplit('/').next()?;
        Some(folder.strip_suffix(".tar").unwrap_or(folder)).filter(|folder| !SPLITS.contains(folder))
    }

    /// Its bytes.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let Some(offset) = self.offset else { return fs::read(self.container.join(&*self.name)) };
        // Opened anew each time: cheap beside decoding, and a position of its own for every thread.
        let mut file = File::open(&self.container)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; self.size as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            None => write!(f, "{}", self.container.join(&*self.name).display()),
            Some(_) => write!(f, "{}: {}", self.container.display(), self.name),
        }
    }
}

/// Whether a file of this name is taken for a picture. What it really is, its bytes say.
pub(super) fn is_picture(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !name.starts_with('.') && ["jpeg", "jpg", "png"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The pictures in a folder and in the folders directly in it, in no order that matters. Links are followed.
pub(super) fn scan(folder: &Path) -> Result<Vec<Stored>> {
    let container: Arc<Path> = folder.into();
    let (mut found, folders) = list(&container, "")?;
    let inner: Vec<Vec<Stored>> = folders
        .par_iter()
        .map(|name| list(&container, &format!("{name}/")).map(|(found, _)| found))
        .collect::<Result<_>>()?;
    found.extend(inner.into_iter().flatten());
    Ok(found)
}

/// The pictures in the folder `prefix` of `container`, and the names of the folders in it.
fn list(container: &Arc<Path>, prefix: &str) -> Result<(Vec<Stored>, Vec<String>)> {
    let folder = container.join(prefix);
    let (mut found, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let entry = entry.map_err(Error::io(&folder))?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return Err(Error::Invalid(format!("the name of {} is not UTF-8: rename it", path.display())));
        };
        if name.starts_with('.') {
            continue;
        }
        let metadata = fs::metadata(&path).map_err(Error::io(&path))?;
        if metadata.is_dir() {
            folders.push(name);
        } else if is_picture(&name) {
            let (container, name) = (Arc::clone(container), format!("{prefix}{name}").into());
            found.push(Stored { container, name, offset: None, size: metadata.len() });
        }
    }
    Ok((found, folders))
}
