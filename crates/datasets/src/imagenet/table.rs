//! The hub's parquet files, which are unpacked once into tar files to read pictures in place.
//!
//! A parquet file compresses a hundred pictures or more together, so reading one picture means
//! reading all of them. Training needs random access, because each epoch has its own random order.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

// This trait and the reader below must come from the same version of parquet.
use candle_datasets::hub::FileReader;
use parquet::file::reader::SerializedFileReader;

use crate::error::{Error, Result};
use crate::event::Event;
use crate::table::{bytes, integer, text};
use pictures::catch_panic;

use super::classes::Classes;
use super::files::is_picture;

/// Writes the pictures of a parquet file to a tar file, each as `<class>/<name>`.
///
/// The columns are `label` and `image`, a group with the `bytes` and the `path` of a file. The tar
/// file is written atomically.
pub(super) fn unpack(
    table: &Path,
    archive: &Path,
    classes: &Classes,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let name = table.display().to_string();
    on_event(Event::Unpacking { table: name.clone(), archive: archive.display().to_string() });
    whole_file::replace(
        archive,
        |error| Error::write(archive)(error),
        |temporary| {
            catch_panic(|| write(table, &name, temporary, classes))
                .unwrap_or_else(|what| Err(Error::malformed(&name, what)))
        },
    )
}

fn write(table: &Path, name: &str, archive: &Path, classes: &Classes) -> Result<()> {
    let bad = |what: String| Error::malformed(name, what);
    let not_parquet = |error| bad(format!("it is not a complete parquet file: {error}"));
    let reader =
        SerializedFileReader::new(File::open(table).map_err(Error::io(table))?).map_err(not_parquet)?;
    let rows = reader.metadata().file_metadata().num_rows();
    let mut tar = tar::Builder::new(BufWriter::new(File::create(archive).map_err(Error::write(archive))?));
    let mut done = 0;
    for (i, row) in reader.get_row_iter(None).map_err(not_parquet)?.enumerate() {
        let row = row.map_err(not_parquet)?;
        let label = integer(&row, "label").ok_or_else(|| bad(format!("row {i} has no integer label")))?;
        let class = usize::try_from(label).ok().and_then(|label| classes.name(label));
        let class = class
            .ok_or_else(|| bad(format!("row {i} has the label {label} of {} classes", classes.len())))?;
        let picture = bytes(&row, "image").ok_or_else(|| bad(format!("row {i} has no image.bytes")))?;
        let file = text(&row, "image", "path").unwrap_or_default();
        let file = file.rsplit('/').next().filter(|file| is_picture(file));
        // The hub's names end with the class, which would give the pictures another order.
        let suffix = format!("_{class}.");
        let file = file.map_or_else(|| format!("{i:06}.JPEG"), |file| file.replacen(&suffix, ".", 1));
        let mut header = tar::Header::new_gnu();
        header.set_size(picture.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{class}/{file}"), picture.data())
            .map_err(Error::write(archive))?;
        done += 1;
    }
    if done != rows {
        return Err(bad(format!("it ends after {done} of {rows} rows")));
    }
    let finish = |tar: tar::Builder<BufWriter<File>>| -> io::Result<()> { tar.into_inner()?.flush() };
    finish(tar).map_err(Error::write(archive))
}
