//! Pictures that the tests of this crate and of `datasets` make.

use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use std::io::Cursor;

/// Returns a picture that differs for every `i`.
pub fn scene(width: u32, height: u32, i: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 5 + i * 40) as u8, (y * 4 + i * 90) as u8, ((x + y) * 2 + i * 20) as u8])
    })
}

/// Encodes a picture as a JPEG.
pub fn jpeg_of(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    picture.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, 95)).unwrap();
    bytes
}

/// Encodes a picture as a PNG.
pub fn png_of(picture: &DynamicImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}
