//! The locations of pictures: each is a file or a section of an archive.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use pictures::Picture;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// The folder names that stand for a whole split.
const SPLITS: [&str; 3] = ["train", "val", "validation"];

/// The largest size of a picture's file in bytes.
const LONGEST: u64 = 256 << 20;

/// The location of a picture: a file, or a section of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// The folder of the split, or the archive.
    pub container: Arc<Path>,
    /// The path inside the container, with `/`. It can lead through an inner archive.
    pub name: Box<str>,
    /// The position in the archive, in bytes; `None` for a file.
    pub offset: Option<u64>,
    /// The length in bytes.
    pub size: u64,
}

impl Stored {
    /// Returns the name without folders.
    pub fn file_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// Returns the name of the innermost folder or inner archive, or `None` if it is the folder of
    /// a whole split in an archive.
    ///
    /// If pictures are sorted into folders by class, this is the class.
    pub fn folder(&self) -> Option<&str> {
        let (folders, _) = self.name.rsplit_once('/')?;
        let folder = folders.rsplit('/').next()?;
        let folder = folder.strip_suffix(".tar").unwrap_or(folder);
        (self.offset.is_none() || !SPLITS.contains(&folder)).then_some(folder)
    }

    /// Reads and decodes the picture.
    pub fn picture(&self) -> Result<Picture, String> {
        decode(self.read())
    }

    /// Reads the bytes of the picture.
    ///
    /// # Errors
    ///
    /// Returns the errors of the file system, and an error if it is not a regular file (reading a
    /// pipe would wait for a writer) or is longer than [`LONGEST`].
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let path = match self.offset {
            None => self.container.join(&*self.name),
            Some(_) => self.container.to_path_buf(),
        };
        let metadata = fs::metadata(&path)?;
        let size = if self.offset.is_none() { metadata.len() } else { self.size };
        if !metadata.is_file() || size > LONGEST {
            let what = format!("it has {size} bytes: expected a regular file, and at most {LONGEST} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // Opening the file is cheap compared to decoding, and gives every thread its own position.
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(self.offset.unwrap_or_default()))?;
        let mut bytes = vec![0; size as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Decodes what [`Stored::read`] returned.
pub(super) fn decode(read: io::Result<Vec<u8>>) -> Result<Picture, String> {
    pictures::decode(&read.map_err(|error| format!("it cannot be read: {error}"))?)
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            None => write!(f, "{}", self.container.join(&*self.name).display()),
            Some(_) => write!(f, "{}: {}", self.container.display(), self.name),
        }
    }
}

/// Returns whether a file of this name counts as a picture. Its first bytes tell the format.
pub(super) fn is_picture(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !name.starts_with('.') && ["jpeg", "jpg", "png"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Lists the pictures in a folder and its direct subfolders, in any order. Links are followed. A
/// single subfolder with a split's name, as in `val/val`, is taken for the folder.
pub(super) fn scan(folder: &Path) -> Result<Vec<Stored>> {
    let container: Arc<Path> = folder.into();
    let (mut found, folders) = list(&container, "")?;
    if let ([only], true) = (&folders[..], found.is_empty())
        && SPLITS.contains(&only.as_str())
    {
        return scan(&folder.join(only));
    }
    let inner: Vec<Vec<Stored>> = folders
        .par_iter()
        .map(|name| list(&container, &format!("{name}/")).map(|(found, _)| found))
        .collect::<Result<_>>()?;
    found.extend(inner.into_iter().flatten());
    Ok(found)
}

/// Lists the pictures in the folder `prefix` of `container`, and the names of its subfolders.
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
