//! Files that are written completely or not at all.
//!
//! The contents are written to a temporary file in the same folder, flushed to disk, and renamed to
//! the target. A reader, or a program that resumes after a crash, therefore finds either the old
//! file or the new one. A process that is killed in between leaves its temporary file
//! (`.unfinished-` and random letters), which nothing reads and [`sweep`] removes.
//!
//! Hashes ([`mod@seal`]) tell whether a file still has the contents that were written.

#![forbid(unsafe_code)]

pub mod seal;

use std::convert::identity;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Writes `contents` to `path`, completely or not at all. Creates the folder if it is missing.
pub fn write(path: &Path, contents: impl AsRef<[u8]>) -> io::Result<()> {
    replace(path, identity, |temporary| fs::write(temporary, contents))
}

/// Replaces `path` by a temporary file that `fill` writes.
///
/// The temporary file is in the same folder and has the same extension, which some writers depend
/// on. The folder is created if it is missing. File system errors that do not come from `fill` are
/// converted by `fail`. After any error, `path` is unchanged and the temporary file is removed.
pub fn replace<E>(
    path: &Path,
    fail: impl Fn(io::Error) -> E,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(&fail)?;
    let suffix = path.extension().map(|extension| format!(".{}", extension.display())).unwrap_or_default();
    let mut temporary = builder().suffix(&suffix).tempfile_in(folder).map_err(&fail)?;
    // The lock keeps `sweep` from removing the file. Without locks, `sweep` goes by the file's age.
    temporary.as_file().try_lock().ok();
    fill(temporary.path())?;
    // Without this, a power failure after the rename could leave an empty file under the new name.
    temporary.as_file().sync_all().map_err(&fail)?;
    fs::rename(temporary.path(), path).map_err(&fail)?;
    // The temporary name does not exist any more.
    temporary.disable_cleanup(true);
    Ok(())
}

/// Removes the temporary files in `folder` that killed processes left.
///
/// These are the files that no process has locked or, if the file system has no locks, those older
/// than an hour.
pub fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let left = || {
            let file = fs::File::open(entry.path()).ok()?;
            Some(match file.try_lock() {
                Ok(()) => true,
                Err(fs::TryLockError::WouldBlock) => false,
                Err(fs::TryLockError::Error(_)) => {
                    file.metadata().ok()?.modified().ok()?.elapsed().ok()? > LONG
                }
            })
        };
        // Another process that sweeps may have removed the file already.
        if left() == Some(true)
            && let Err(error) = fs::remove_file(entry.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    Ok(())
}

/// The age after which a temporary file counts as abandoned if the file system has no locks. No
/// file takes this long to write.
const LONG: Duration = Duration::from_secs(3600);

/// Checks that files can be written in `folder`, which is created if it is missing.
pub fn check(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    builder().tempfile_in(folder).map(drop)
}

fn builder<'a>() -> tempfile::Builder<'static, 'a> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // the umask still applies
    builder
}

/// The prefix of the names of temporary files.
const PREFIX: &str = ".unfinished-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/file.txt");
        write(&path, "old").unwrap();
        let failed = replace(&path, identity, |temporary| {
            assert_eq!((temporary.parent(), temporary.extension()), (path.parent(), path.extension()));
            fs::write(temporary, "half of the n")?;
            Err(io::Error::other("no more"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        let files = || fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), files()), ("old", 1));
        write(&path, "new").unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), files()), ("new", 1));
    }

    #[test]
    fn what_is_left_unfinished_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let names = [".unfinished-a1b2c3.json", "unfinished.json", "kept.json"];
        for name in names {
            fs::write(folder.path().join(name), "half").unwrap();
        }
        let found = || names.map(|name| folder.path().join(name).exists());
        // A file that is being written is not removed.
        replace(&folder.path().join("kept.json"), identity, |temporary| {
            sweep(folder.path())?;
            assert!(temporary.exists());
            fs::write(temporary, "whole")
        })
        .unwrap();
        assert_eq!(found(), [false, true, true]);
        check(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(check(&folder.path().join("kept.json/below")).is_err());
    }

    #[test]
    fn a_target_that_cannot_be_replaced_stays_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, "text").is_err());
        assert!(path.is_dir() && fs::read_dir(folder.path()).unwrap().count() == 1);
    }
}
