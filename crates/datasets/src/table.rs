//! CIFAR-100 from the hub's parquet files, and access to the columns of such files.

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

// This trait and the reader below must come from the same version of parquet.
use candle_datasets::hub::FileReader;
use image::codecs::png::PngDecoder;
use image::{ColorType, ImageDecoder, Limits};
use parquet::data_type::ByteArray;
use parquet::file::reader::SerializedFileReader;
use parquet::record::{Field, Row};
use rayon::prelude::*;

use crate::cifar::{PIXELS, SIDE, check_labels, with_capacity};
use crate::error::{Error, Result};
use crate::memory::Images;
use pictures::catch_panic;

/// The memory in bytes that the decoder of a picture may allocate.
const MOST_MEMORY: u64 = 1 << 20;

/// Reads a table of exactly `records` rows with the columns `img` (a group whose `bytes` are a PNG
/// of 32x32 RGB pixels), `fine_label` and `coarse_label`.
///
/// Anything else is [`Error::Malformed`].
pub(crate) fn read(path: &Path, records: usize) -> Result<Images> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(Error::io(path))?;
    catch_panic(|| decode(file, &name, records)).unwrap_or_else(|what| Err(Error::malformed(&name, what)))
}

fn decode(file: File, name: &str, records: usize) -> Result<Images> {
    let bad = |what: String| Error::malformed(name, what);
    let not_parquet = |error| bad(format!("it is not a complete parquet file: {error}"));
    let reader = SerializedFileReader::new(file).map_err(not_parquet)?;
    let rows = reader.metadata().file_metadata().num_rows();
    if rows != records as i64 {
        return Err(bad(format!("it has {rows} rows instead of {records}")));
    }
    let mut images = with_capacity(records);
    let mut pngs = Vec::with_capacity(records);
    for (i, row) in reader.get_row_iter(None).map_err(not_parquet)?.enumerate() {
        let row = row.map_err(not_parquet)?;
        let label =
            |column| integer(&row, column).ok_or_else(|| bad(format!("row {i} has no integer {column}")));
        images.labels.push(check_labels(name, i, label("coarse_label")?, label("fine_label")?)?);
        pngs.push(bytes(&row, "img").ok_or_else(|| bad(format!("row {i} has no img.bytes")))?);
    }
    if pngs.len() != records {
        return Err(bad(format!("it ends after {} of {records} rows", pngs.len())));
    }
    images.pixels.resize(records * PIXELS, 0);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST_MEMORY);
    images.pixels.par_chunks_exact_mut(PIXELS).zip(&pngs).enumerate().try_for_each(
        |(i, (pixels, png))| {
            let damaged = |error| bad(format!("the picture of row {i} cannot be decoded: {error}"));
            let decoder =
                PngDecoder::with_limits(Cursor::new(png.data()), limits.clone()).map_err(damaged)?;
            let (color, (width, height)) = (decoder.color_type(), decoder.dimensions());
            // The size is checked first, because a small file can describe a picture that does not
            // fit into memory.
            if color != ColorType::Rgb8 || [width, height] != [SIDE as u32; 2] {
                let what = format!(
                    "the picture of row {i} is {width}x{height} {color:?} instead of {SIDE}x{SIDE} Rgb8"
                );
                return Err(bad(what));
            }
            decoder.read_image(pixels).map_err(damaged)
        },
    )?;
    Ok(images)
}

fn column<'a>(row: &'a Row, name: &str) -> Option<&'a Field> {
    row.get_column_iter().find(|(column, _)| *column == name).map(|(_, field)| field)
}

/// Returns the integer in the column `name`.
pub(crate) fn integer(row: &Row, name: &str) -> Option<i64> {
    match column(row, name)? {
        Field::Byte(value) => Some((*value).into()),
        Field::Short(value) => Some((*value).into()),
        Field::Int(value) => Some((*value).into()),
        Field::Long(value) => Some(*value),
        Field::UByte(value) => Some((*value).into()),
        Field::UShort(value) => Some((*value).into()),
        Field::UInt(value) => Some((*value).into()),
        Field::ULong(value) => i64::try_from(*value).ok(),
        _ => None,
    }
}

/// Returns the `bytes` in the column `name`, which is a group.
pub(crate) fn bytes(row: &Row, name: &str) -> Option<ByteArray> {
    let Field::Group(group) = column(row, name)? else { return None };
    match column(group, "bytes")? {
        Field::Bytes(bytes) => Some(bytes.clone()),
        _ => None,
    }
}

/// Returns the text field `inner` in the column `name`, which is a group.
pub(crate) fn text(row: &Row, name: &str, inner: &str) -> Option<String> {
    let Field::Group(group) = column(row, name)? else { return None };
    match column(group, inner)? {
        Field::Str(text) => Some(text.clone()),
        _ => None,
    }
}
