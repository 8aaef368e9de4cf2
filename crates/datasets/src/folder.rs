//! Loading of CIFAR-100 from the files of a folder.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use md5::{Digest, Md5};

use crate::cifar::{Expected, Manifest, Release, parse_binary, parse_python};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::memory::{Images, InMemoryDataset};
use crate::table;

/// A function that parses a file. Its arguments are the file's name for messages, its contents, and
/// the expected number of records.
type Parse = fn(&str, &[u8], usize) -> Result<Images>;

/// The files of a published format.
struct Form<'a> {
    /// The folder inside the archive.
    folder: &'static str,
    archive: &'static str,
    /// The names of the training file and of the test file.
    files: [&'static str; 2],
    parse: Parse,
    release: &'a Release,
}

/// The names of the hub's parquet files. Their folder is [`TABLES_FOLDER`].
pub(crate) const TABLES: [&str; 2] = ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"];
pub(crate) const TABLES_FOLDER: &str = "cifar100";

/// Loads the first format that the folder holds, in the order documented at `DataSource::Folder`.
///
/// Files are verified after they have been read, so exactly the verified bytes are parsed.
pub(crate) fn load(
    folder: &Path,
    manifest: &Manifest,
    on_event: &mut dyn FnMut(Event),
) -> Result<InMemoryDataset> {
    on_event(Event::Trying { place: format!("the folder {}", folder.display()) });
    let none = |what: String| Err(Error::NoData { folder: folder.into(), what });
    if !folder.exists() {
        return none("there is no such folder".into());
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

    if folder.is_file() {
        let length = fs::metadata(folder).map_err(Error::io(folder))?.len();
        let is_archive =
            |form: &&Form| folder.ends_with(form.archive) || form.release.archive.bytes == Some(length);
        return match forms.iter().find(is_archive) {
            Some(form) => found(folder, form.unpack(folder, manifest)?),
            None => none(
                "it is a file, and neither of the official archives: name the folder that holds it".into(),
            ),
        };
    }
    // The file names of the other formats are too common to be recognized outside their folder.
    if let Some(paths) = pair(folder, binary.files)? {
        return found(folder, binary.read(&paths, manifest)?);
    }
    for form in &forms {
        for place in places(folder, form.folder) {
            if let Some(paths) = pair(&place, form.files)? {
                return found(&place, form.read(&paths, manifest)?);
            }
        }
    }
    for form in &forms {
        for archive in [folder.join(form.archive), folder.join(form.folder).join(form.archive)] {
            if archive.is_file() {
                return found(&archive, form.unpack(&archive, manifest)?);
            }
        }
    }
    for place in places(folder, TABLES_FOLDER) {
        if let Some([train, test]) = pair(&place, TABLES)? {
            let [n_train, n_test] = manifest.records;
            return found(&place, [table::read(&train, n_train)?, table::read(&test, n_test)?]);
        }
    }
    none(format!(
        "it has neither train.bin nor {}/train.bin, {}/train, {}, {} or {TABLES_FOLDER}/{}",
        binary.folder, python.folder, binary.archive, python.archive, TABLES[0]
    ))
}

/// Returns the folders in which the files of an archive's folder `name` can lie.
///
/// They are `name` and `name/name` under `folder` (unpacking by hand can nest them), and `folder`
/// itself if it has this name.
fn places(folder: &Path, name: &str) -> impl Iterator<Item = PathBuf> {
    let own = folder.canonicalize().is_ok_and(|folder| folder.ends_with(name));
    let inner = folder.join(name);
    [inner.clone(), inner.join(name)].into_iter().chain(own.then(|| folder.to_path_buf()))
}

/// Returns the paths of the two files in `folder`; `None` if neither exists.
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
    /// Reads and verifies the unpacked files.
    fn read(&self, paths: &[PathBuf; 2], manifest: &Manifest) -> Result<[Images; 2]> {
        let read = |split: usize| {
            let (path, expected) = (&paths[split], &self.release.members[split]);
            let name = path.display().to_string();
            // The length is checked first, because a file of a wrong length need not be read.
            expected.check_size(&name, fs::metadata(path).map_err(Error::io(path))?.len())?;
            let contents = fs::read(path).map_err(Error::io(path))?;
            expected.check(&name, &contents)?;
            (self.parse)(&name, &contents, manifest.records[split])
        };
        Ok([read(0)?, read(1)?])
    }

    /// Reads the files in the archive without unpacking it to disk.
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

/// Checks the length and the MD5 of a file without keeping its contents in memory.
fn check_file(path: &Path, name: &str, expected: &Expected) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    expected.check_size(name, file.metadata().map_err(Error::io(path))?.len())?;
    let mut hash = Md5::new();
    io::copy(&mut file, &mut hash).map_err(Error::io(path))?;
    expected.check_md5(name, hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PICKLES, binary, images, manifest, parquet, tar_gz, write};

    fn quietly(folder: &Path, manifest: &Manifest) -> Result<InMemoryDataset> {
        load(folder, manifest, &mut |_| {})
    }

    fn message(folder: &Path, manifest: &Manifest) -> String {
        quietly(folder, manifest).unwrap_err().to_string()
    }

    #[test]
    fn every_form_gives_the_same_data() {
        let (bins, pickles) = ([binary(3), binary(2)], PICKLES.map(<[u8]>::to_vec));
        let tables = [parquet(&images(3), "png"), parquet(&images(2), "png")];
        let binary_archive = tar_gz("cifar-100-binary", &["train.bin", "test.bin"], &bins);
        let python_archive = tar_gz("cifar-100-python", &["train", "test"], &pickles);
        let manifest = manifest(&binary_archive, &python_archive);
        let (a, b) = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet");
        type Files<'a> = [(&'a str, &'a [u8]); 2];
        let cases: [(&str, Files); 14] = [
            ("", [("train.bin", &bins[0]), ("test.bin", &bins[1])]),
            ("", [("cifar-100-binary/train.bin", &bins[0]), ("cifar-100-binary/test.bin", &bins[1])]),
            (
                "cifar-100-binary",
                [("cifar-100-binary/train.bin", &bins[0]), ("cifar-100-binary/test.bin", &bins[1])],
            ),
            ("", [("cifar-100-python/train", &pickles[0]), ("cifar-100-python/test", &pickles[1])]),
            (
                "cifar-100-python",
                [("cifar-100-python/train", &pickles[0]), ("cifar-100-python/test", &pickles[1])],
            ),
            // These are a folder nested in another one of its name, an archive in its folder, and
            // the path of an archive.
            (
                "",
                [
                    ("cifar-100-python/cifar-100-python/train", &pickles[0]),
                    ("cifar-100-python/cifar-100-python/test", &pickles[1]),
                ],
            ),
            (
                "",
                [
                    ("cifar-100-binary/cifar-100-binary/train.bin", &bins[0]),
                    ("cifar-100-binary/cifar-100-binary/test.bin", &bins[1]),
                ],
            ),
            ("", [("cifar-100-binary/cifar-100-binary.tar.gz", &binary_archive), ("other", b"")]),
            ("cifar-100-python.tar.gz", [("cifar-100-python.tar.gz", &python_archive), ("other", b"")]),
            ("cifar (1).tgz", [("cifar (1).tgz", &binary_archive), ("other", b"")]),
            ("", [("cifar-100-binary.tar.gz", &binary_archive), ("other", b"")]),
            ("", [("cifar-100-python.tar.gz", &python_archive), ("train/other", b"")]),
            ("", [(&format!("cifar100/{a}"), &tables[0]), (&format!("cifar100/{b}"), &tables[1])]),
            ("cifar100", [(&format!("cifar100/{a}"), &tables[0]), (&format!("cifar100/{b}"), &tables[1])]),
        ];
        for (folder, files) in cases {
            let dir = tempfile::tempdir().unwrap();
            files.iter().for_each(|(name, contents)| write(&dir.path().join(name), contents));
            let mut events = Vec::new();
            let data = load(&dir.path().join(folder), &manifest, &mut |event| events.push(event)).unwrap();
            assert_eq!((&data.train, &data.test), (&images(3), &images(2)), "{files:?}");
            assert_eq!((data.name.as_str(), data.classes), ("cifar100", 100));
            assert_eq!(data.fingerprint, manifest.fingerprint);
            assert!(data.source.starts_with(dir.path().to_str().unwrap()), "{}", data.source);
            assert!(matches!(events.as_slice(), [Event::Trying { .. }]), "{events:?}");
        }
    }

    #[test]
    fn a_folder_without_data_is_told_from_a_broken_one() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = manifest(b"", b"");
        let absent = dir.path().join("absent");
        assert!(matches!(quietly(&absent, &manifest), Err(Error::NoData { .. })));
        assert!(message(&absent, &manifest).contains("there is no such folder"));
        // Common names such as these are not recognized outside their folder.
        for name in ["train", "test", "train-00000-of-00001.parquet"] {
            write(&dir.path().join(name), b"something else");
        }
        assert!(matches!(quietly(dir.path(), &manifest), Err(Error::NoData { .. })));
        assert!(message(dir.path(), &manifest).contains("cifar-100-python/train"));
        assert!(message(&dir.path().join("train"), &manifest).contains("name the folder that holds it"));
        write(&dir.path().join("train.bin"), &binary(3));
        assert!(message(dir.path(), &manifest).contains("test.bin is missing, although"));
        fs::remove_file(dir.path().join("train.bin")).unwrap();
        write(&dir.path().join("cifar-100-python/test"), PICKLES[1]);
        assert!(message(dir.path(), &manifest).contains("train is missing, although"));
    }

    #[test]
    fn truncated_and_corrupted_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = manifest(b"", b"");
        let (train, test) = (dir.path().join("train.bin"), dir.path().join("test.bin"));
        write(&train, &binary(3));
        write(&test, &binary(2)[..5000]);
        let text = message(dir.path(), &manifest);
        assert!(
            text.contains("test.bin has 5000 bytes instead of 6148") && text.contains("delete it"),
            "{text}"
        );
        let mut contents = binary(2);
        contents[77] ^= 1;
        write(&test, &contents);
        assert!(matches!(quietly(dir.path(), &manifest), Err(Error::Checksum { .. })));
        assert!(message(dir.path(), &manifest).contains("test.bin has MD5"));
        let gone = check_file(&dir.path().join("gone"), "gone", &manifest.binary.archive).unwrap_err();
        assert!(
            gone.to_string().starts_with("cannot read ") && gone.to_string().contains("gone: "),
            "{gone}"
        );
    }

    #[test]
    fn archives_and_their_members_are_verified() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("cifar-100-binary.tar.gz");
        let names = ["train.bin", "test.bin"];
        let good = tar_gz("cifar-100-binary", &names, &[binary(3), binary(2)]);

        write(&archive, &good[..good.len() - 9]);
        assert!(matches!(quietly(dir.path(), &manifest(&good, b"")), Err(Error::WrongSize { .. })));
        let mut damaged = good.clone();
        damaged[40] ^= 1;
        write(&archive, &damaged);
        assert!(matches!(quietly(dir.path(), &manifest(&good, b"")), Err(Error::Checksum { .. })));
        // From here on the checksum of the archive is right, so the later checks are reached.
        assert!(matches!(quietly(dir.path(), &manifest(&damaged, b"")), Err(Error::Malformed { .. })));
        let check = |contents: &[u8]| {
            write(&archive, contents);
            message(dir.path(), &manifest(contents, b""))
        };
        assert!(check(&good[..good.len() / 2]).contains("cannot be unpacked"));
        let mut wrong = binary(2);
        wrong[5] ^= 1;
        let text = check(&tar_gz("cifar-100-binary", &names, &[binary(3), wrong]));
        assert!(text.contains("cifar-100-binary.tar.gz: cifar-100-binary/test.bin has MD5"), "{text}");
        let text = check(&tar_gz("cifar-100-binary", &names, &[binary(3), binary(1)]));
        assert!(text.contains("test.bin has 3074 bytes instead of 6148"), "{text}");
        assert!(
            check(&tar_gz("elsewhere", &names, &[binary(3), binary(2)]))
                .contains("lacks train.bin or test.bin")
        );
    }

    #[test]
    fn damaged_tables_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let [train, test] = TABLES.map(|name| dir.path().join(TABLES_FOLDER).join(name));
        let manifest = manifest(b"", b"");
        let good = parquet(&images(3), "png");
        write(&test, &parquet(&images(2), "png"));
        let check = |contents: &[u8]| {
            write(&train, contents);
            let error = quietly(dir.path(), &manifest).unwrap_err();
            assert!(
                matches!(&error, Error::Malformed { file, .. } if file.contains("train-00000")),
                "{error}"
            );
            error.to_string()
        };
        assert!(check(&good[..good.len() - 100]).contains("not a complete parquet file"));
        assert!(check(b"").contains("not a complete parquet file"));
        assert!(check(&parquet(&images(2), "png")).contains("2 rows instead of 3"));
        assert!(check(&parquet(&images(3), "junk")).contains("picture of row 0 cannot be decoded"));
        assert!(
            check(&parquet(&images(3), "grey"))
                .contains("picture of row 0 is 32x32 L8 instead of 32x32 Rgb8")
        );
        assert!(check(&parquet(&images(3), "small")).contains("picture of row 0 is 16x16"));
        assert!(check(&parquet(&images(3), "huge")).contains("picture of row 0 is 4096x4096"));
        assert!(check(&parquet(&images(3), "no column")).contains("no img.bytes"));
        let mut labels = images(3);
        labels.labels[2] = 100;
        assert!(check(&parquet(&labels, "png")).contains("record 2 has the fine label 100"));
        // Labels may have any integer type.
        write(&train, &parquet(&images(3), "unsigned"));
        assert_eq!(quietly(dir.path(), &manifest).unwrap().train, images(3));
        // A wrong byte elsewhere gives an error or the right pictures, but never a panic.
        for at in (0..good.len()).step_by(61) {
            let mut damaged = good.clone();
            damaged[at] ^= 0x55;
            write(&train, &damaged);
            if let Ok(data) = quietly(dir.path(), &manifest) {
                assert_eq!(data.train.pixels, images(3).pixels, "byte {at}");
            }
        }
    }

    #[test]
    fn pictures_without_a_checksum_are_compared_by_fingerprint() {
        let dir = tempfile::tempdir().unwrap();
        let mut other = images(3);
        other.pixels[0] ^= 1;
        for (name, images) in TABLES.iter().zip([other, images(2)]) {
            write(&dir.path().join(TABLES_FOLDER).join(name), &parquet(&images, "png"));
        }
        let mut events = Vec::new();
        load(dir.path(), &manifest(b"", b""), &mut |event| events.push(event)).unwrap();
        assert!(matches!(&events[..], [Event::Trying { .. }, Event::Unverified { .. }]), "{events:?}");
    }
}
