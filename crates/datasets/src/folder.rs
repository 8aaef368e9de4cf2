//! CIFAR-100 from the files of a folder.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use md5::{Digest, Md5};

use crate::cifar::{Expected, Manifest, Release, parse_binary, parse_python};
use crate::dataset::{Dataset, Images};
use crate::error::{Error, Result};
use crate::source::Event;
use crate::table;

/// Makes images of the contents of a file: its name for messages, its bytes, the number of records it must have.
type Parse = fn(&str, &[u8], usize) -> Result<Images>;

/// The files of one published form.
struct Form<'a> {
    /// The folder that the archive unpacks to.
    folder: &'static str,
    archive: &'static str,
    /// For training and testing.
    files: [&'static str; 2],
    parse: Parse,
    release: &'a Release,
}

/// The parquet files of the hub, and their folder there.
pub(crate) const TABLES: [&str; 2] = ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"];
pub(crate) const TABLES_FOLDER: &str = "cifar100";

/// Loads whichever form the folder holds; the order is documented at `Source::Folder`.
///
/// Contents are verified in memory after they were read, so what is parsed is what was checked.
pub(crate) fn load(folder: &Path, manifest: &Manifest, on_event: &mut dyn FnMut(Event)) -> Result<Dataset> {
    on_event(Event::Trying { place: format!("the folder {}", folder.display()) });
    if !folder.is_dir() {
        return Err(Error::NoData { folder: folder.into(), what: "there is no such folder".into() });
    }
    let forms = [
        Form {
            folder: "cifar-100-binary",
            archive: "cifar-100-binary.tar.gz",
            files: ["train.bin", "test.bin"],
            parse: parse_binary,
            release: &manifest.binary,
        },
        Form {
            folder: "cifar-100-python",
            archive: "cifar-100-python.tar.gz",
            files: ["train", "test"],
            parse: parse_python,
            release: &manifest.python,
        },
    ];
    let [binary, python] = &forms;
    let mut found = |source: &Path, images| manifest.dataset(source.display().to_string(), images, on_event);

    // Only these two names are telling enough to count wherever they are.
    if let Some(paths) = pair(folder, binary.files)? {
        return found(folder, binary.read(&paths, manifest)?);
    }
    for form in &forms {
        for inner in [folder.join(form.folder), folder.to_path_buf()] {
            if inner.ends_with(form.folder)
                && let Some(paths) = pair(&inner, form.files)?
            {
                return found(&inner, form.read(&paths, manifest)?);
            }
        }
    }
    for form in &forms {
        let archive = folder.join(form.archive);
        if archive.is_file() {
            return found(&archive, form.unpack(&archive, manifest)?);
        }
    }
    for inner in [folder.join(TABLES_FOLDER), folder.to_path_buf()] {
        if inner.ends_with(TABLES_FOLDER)
            && let Some([train, test]) = pair(&inner, TABLES)?
        {
            let [n_train, n_test] = manifest.records;
            return found(&inner, [table::read(&train, n_train)?, table::read(&test, n_test)?]);
        }
    }
    let what = format!(
        "it has no train.bin and test.bin, no {}/, no {}/, no {}, no {} and no {TABLES_FOLDER}/{}",
        binary.folder, python.folder, binary.archive, python.archive, TABLES[0]
    );
    Err(Error::NoData { folder: folder.into(), what })
}

/// The two files in `folder`, if either is there.
fn pair(folder: &Path, names: [&str; 2]) -> Result<Option<[PathBuf; 2]>> {
    let [train, test] = names.map(|name| folder.join(name));
    match (train.is_file(), test.is_file()) {
        (true, true) => Ok(Some([train, test])),
        (false, false) => Ok(None),
        (true, false) => Err(Error::MissingFile { path: test, beside: train }),
        (false, true) => Err(Error::MissingFile { path: train, beside: test }),
    }
}

impl Form<'_> {
    /// Reads the unpacked files.
    fn read(&self, paths: &[PathBuf; 2], manifest: &Manifest) -> Result<[Images; 2]> {
        let read = |split: usize| {
            let (path, expected) = (&paths[split], &self.release.members[split]);
            let name = path.display().to_string();
            // The length first: there is no point in reading a file that cannot be right.
            expected.check_size(&name, fs::metadata(path).map_err(Error::io(path))?.len())?;
            let contents = fs::read(path).map_err(Error::io(path))?;
            expected.check(&name, &contents)?;
            (self.parse)(&name, &contents, manifest.records[split])
        };
        Ok([read(0)?, read(1)?])
    }

    /// Reads the files out of the archive, without unpacking it to the disk.
    fn unpack(&self, archive: &Path, manifest: &Manifest) -> Result<[Images; 2]> {
        let name = archive.display().to_string();
        check_file(archive, &name, &self.release.archive)?;

        let broken = |error: io::Error| Error::malformed(&name, format!("it cannot be unpacked: {error}"));
        let mut images = [None, None];
        let mut tar = tar::Archive::new(GzDecoder::new(File::open(archive).map_err(Error::io(archive))?));
        for entry in tar.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let path = entry.path().map_err(broken)?.into_owned();
            let Some(split) = self.files.iter().position(|file| path == Path::new(self.folder).join(file))
            else {
                continue;
            };
            let member = format!("{name}: {}", path.display());
            let expected = &self.release.members[split];
            expected.check_size(&member, entry.size())?;
            let mut contents = Vec::with_capacity(entry.size() as usize);
            entry.read_to_end(&mut contents).map_err(broken)?;
            expected.check(&member, &contents)?;
            images[split] = Some((self.parse)(&member, &contents, manifest.records[split])?);
        }
        match images {
            [Some(train), Some(test)] => Ok([train, test]),
            _ => Err(Error::malformed(
                name,
                format!("it lacks {} or {} in {}", self.files[0], self.files[1], self.folder),
            )),
        }
    }
}

/// Checks a file that is too large to be kept in memory.
fn check_file(path: &Path, name: &str, expected: &Expected) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    expected.check_size(name, file.metadata().map_err(Error::io(path))?.len())?;
    let mut hash = Md5::new();
    io::copy(&mut file, &mut hash).map_err(Error::io(path))?;
    expected.check_md5(name, hash)
}
