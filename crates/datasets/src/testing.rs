//! A data set of three and two images in every form, for the tests of this crate.

use std::io::{Cursor, Write};
use std::path::Path;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use image::{DynamicImage, ImageFormat, RgbImage};
use md5::{Digest, Md5};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::cifar::{CLASSES, Expected, Manifest, Release};
use crate::dataset::{Dataset, Images, hex};

/// The python form of `images(3)` and `images(2)`, written by `make.py` beside them.
pub const PICKLES: [&[u8]; 2] =
    [include_bytes!("../tests/fixtures/train"), include_bytes!("../tests/fixtures/test")];

/// The value of a pixel by the formula of `make.py`.
fn value(i: usize, c: usize, y: usize, x: usize) -> u8 {
    ((i * 91 + c * 57 + y * 7 + x * 3) % 251) as u8
}

pub fn images(n: usize) -> Images {
    let pixels = (0..n).flat_map(|i| (0..3072).map(move |p| value(i, p % 3, p / 96, p / 3 % 32))).collect();
    let labels = (0..n).map(|i| ((i * 37 + 5) % 100) as u16).collect();
    Images { pixels, labels, height: 32, width: 32, channels: 3 }
}

pub fn binary(n: usize) -> Vec<u8> {
    let record = |i: usize| {
        let labels = [(i % 20) as u8, ((i * 37 + 5) % 100) as u8];
        labels.into_iter().chain((0..3072).map(move |p| value(i, p / 1024, p % 1024 / 32, p % 32)))
    };
    (0..n).flat_map(record).collect()
}

fn expected(contents: &[u8]) -> Expected {
    Expected { bytes: Some(contents.len() as u64), md5: hex(&Md5::digest(contents)) }
}

pub fn manifest(binary_archive: &[u8], python_archive: &[u8]) -> Manifest {
    Manifest {
        records: [3, 2],
        binary: Release { archive: expected(binary_archive), members: [3, 2].map(|n| expected(&binary(n))) },
        python: Release { archive: expected(python_archive), members: PICKLES.map(expected) },
        fingerprint: Dataset::new("cifar100", "", CLASSES, images(3), images(2)).unwrap().fingerprint,
    }
}

/// Writes a file, and the folders around it.
pub fn write(path: &Path, contents: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, contents).unwrap();
}

pub fn tar_gz(folder: &str, names: &[&str], contents: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut append = |name: &str, contents: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{folder}/{name}"), contents).unwrap();
    };
    append("names.txt", b"not of interest");
    names.iter().zip(contents).for_each(|(name, contents)| append(name, contents));
    tar.into_inner().unwrap().finish().unwrap()
}

/// A parquet file as the hub has it. `flaw` is `"png"` for none, or says what is wrong with the pictures.
pub fn parquet(images: &Images, flaw: &str) -> Vec<u8> {
    let schema = "message schema {
        optional group img { optional binary bytes; optional binary path (UTF8); }
        optional int64 fine_label;
        optional int64 coarse_label;
    }";
    let schema =
        if flaw == "no column" { schema.replace("binary bytes", "binary other") } else { schema.into() };
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let n = images.len();
    let bytes = (0..n).map(|i| png(images.image(i), flaw).into()).collect();
    let paths = (0..n).map(|i| format!("drawing_{i}.png").into_bytes().into()).collect();
    for column in [bytes, paths] {
        let column: Vec<ByteArray> = column;
        let mut writer = group.next_column().unwrap().unwrap();
        writer.typed::<ByteArrayType>().write_batch(&column, Some(&vec![2; n]), None).unwrap();
        writer.close().unwrap();
    }
    let fine = images.labels.iter().map(|&label| label.into()).collect();
    let coarse = (0..n as i64).map(|i| i % 20).collect();
    for column in [fine, coarse] {
        let column: Vec<i64> = column;
        let mut writer = group.next_column().unwrap().unwrap();
        writer.typed::<Int64Type>().write_batch(&column, Some(&vec![1; n]), None).unwrap();
        writer.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

fn png(pixels: &[u8], flaw: &str) -> Vec<u8> {
    let image = DynamicImage::ImageRgb8(RgbImage::from_raw(32, 32, pixels.to_vec()).unwrap());
    let image = match flaw {
        "grey" => image.grayscale(),
        "small" => image.crop_imm(0, 0, 16, 16),
        _ => image,
    };
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, ImageFormat::Png).unwrap();
    if flaw == "junk" {
        out.set_position(0);
        out.write_all(b"junk").unwrap();
    }
    out.into_inner()
}
