//! Files that appear whole or not at all.
//!
//! What is to be written goes to a temporary file in the same folder, is flushed to the disk, and takes the
//! place of the old file by being renamed. So a reader, and a program that goes on after a crash, finds
//! either the old file or the new one. A process that is killed in between leaves its temporary file,
//! `.unfinished-` and random letters, which nothing reads.

#![forbid(unsafe_code)]

use std::convert::identity;
use std::fs;
use std::io;
use std::path::Path;

/// Writes `contents` to `path`, whole or not at all; makes the folder where it is missing.
pub fn write(path: &Path, contents: impl AsRef<[u8]>) -> io::Result<()> {
    replace(path, identity, |temporary| fs::write(temporary, contents))
}

/// Lets `fill` write a temporary file beside `path` (with the same extension, as some writers go by it),
/// which then becomes `path`; makes the folder where it is missing. Errors of the file system that do not
/// come from `fill` go through `fail`. After any error, `path` is as it was and the temporary file is gone.
pub fn replace<E>(
    path: &Path,
    fail: impl Fn(io::Error) -> E,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(&fail)?;
    let suffix = path.extension().map(|extension| format!(".{}", extension.display())).unwrap_or_default();
    let mut builder = tempfile::Builder::new();
    builder.prefix(".unfinished-").suffix(&suffix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as usual
    let temporary = builder.tempfile_in(folder).map_err(&fail)?;
    fill(temporary.path())?;
    // Before the rename, or a power failure could leave an empty file under the new name.
    temporary.as_file().sync_all().map_err(&fail)?;
    temporary.persist(path).map_err(|error| fail(error.error))?;
    Ok(())
}

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
    fn a_target_that_cannot_be_replaced_stays_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, "text").is_err());
        assert!(path.is_dir() && fs::read_dir(folder.path()).unwrap().count() == 1);
    }
}
