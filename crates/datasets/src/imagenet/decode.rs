//! Pictures from the bytes of their files.

use image::ImageFormat;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::error::catch_panic;
use crate::memory::CHANNELS;

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picture {
    /// Columns, at least one.
    pub width: usize,
    /// Rows, at least one.
    pub height: usize,
    /// `[height, width, 3]`: red, green, blue.
    pub pixels: Vec<u8>,
}

/// Decodes a JPEG or a PNG, which their first bytes distinguish, into red, green and blue.
///
/// The result is that of `PIL.Image.open(..).convert("RGB")`: grey becomes three equal channels, CMYK and
/// YCCK are taken as Adobe writes them (inverted), an alpha channel is dropped, of 16 bits the upper 8 count,
/// and the orientation in EXIF is ignored. A JPEG that ends before its picture does is refused. The error
/// says what is wrong.
pub(super) fn decode(bytes: &[u8]) -> Result<Picture, String> {
    let format = match bytes {
        [0xff, 0xd8, 0xff, ..] => jpeg,
        [0x89, b'P', b'N', b'G', ..] => png,
        [] => return Err("the file is empty".into()),
        _ => {
            let begin = &bytes[..bytes.len().min(4)];
            return Err(format!("it is neither a JPEG nor a PNG: it begins with the bytes {begin:02x?}"));
        }
    };
    let picture = catch_panic(|| format(bytes))??;
    let Picture { width, height, pixels } = &picture;
    if pixels.is_empty() || pixels.len() != width * height * CHANNELS {
        return Err(format!("it decodes to {} bytes for {width}x{height} pixels", pixels.len()));
    }
    Ok(picture)
}

fn jpeg(bytes: &[u8]) -> Result<Picture, String> {
    match jpeg_with(bytes, true) {
        // A complete picture should not be lost for what libjpeg only warns of. But if the marker of the end
        // is missing, the decoder would make up the rest.
        Err(_) if ends_with_its_mark(bytes) => jpeg_with(bytes, false),
        Err(what) => Err(format!("the JPEG is truncated or damaged: {what}")),
        done => done,
    }
}

fn jpeg_with(bytes: &[u8], strict: bool) -> Result<Picture, String> {
    let options = DecoderOptions::default().set_strict_mode(strict).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let pixels = decoder.decode().map_err(|error| error.to_string())?;
    let (width, height) = decoder.dimensions().ok_or("it has no size")?;
    Ok(Picture { width, height, pixels })
}

/// Whether the marker of a JPEG's end is near the end of the file; some programs append a few bytes.
fn ends_with_its_mark(bytes: &[u8]) -> bool {
    const NEAR: usize = 1024;
    bytes[bytes.len().saturating_sub(NEAR)..].windows(2).any(|pair| pair == [0xff, 0xd9])
}

fn png(bytes: &[u8]) -> Result<Picture, String> {
    let picture = image::load_from_memory_with_format(bytes, ImageFormat::Png)
        .map_err(|error| format!("the PNG cannot be decoded: {error}"))?;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    Ok(Picture { width, height, pixels: picture.into_rgb8().into_raw() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imagenet::tests::{jpeg_of, png_of, scene};
    use image::{DynamicImage, ImageBuffer, Luma, Rgb, RgbaImage};

    /// Compares with PIL's pixels of the same file: no value may differ by more than `most`, and the average
    /// difference must be at most `mean`. Decoders may round differently, and may interpolate subsampled
    /// colours differently.
    fn check(jpeg: &[u8], by_pil: &[u8], mean: f64, most: u8) {
        let picture = decode(jpeg).unwrap();
        assert_eq!((picture.width, picture.height, picture.pixels.len()), (32, 24, by_pil.len()));
        let differences = picture.pixels.iter().zip(by_pil).map(|(&a, &b)| a.abs_diff(b));
        let found = differences.clone().max().unwrap();
        let average = differences.map(f64::from).sum::<f64>() / by_pil.len() as f64;
        assert!(found <= most && average <= mean, "differences: {found} at most, {average} on average");
    }

    macro_rules! beside_pil {
        ($name:literal) => {
            (
                include_bytes!(concat!("../../tests/pictures/", $name, ".jpg")),
                include_bytes!(concat!("../../tests/pictures/", $name, ".rgb")),
            )
        };
    }

    #[test]
    fn every_kind_of_jpeg_decodes_as_by_pil() {
        let (jpeg, rgb) = beside_pil!("grey");
        check(jpeg, rgb, 0.1, 1);
        let (jpeg, rgb) = beside_pil!("progressive");
        check(jpeg, rgb, 0.5, 4);
        // Its EXIF asks to turn it by a quarter.
        let (jpeg, rgb) = beside_pil!("turned");
        check(jpeg, rgb, 0.5, 4);
        let (jpeg, rgb) = beside_pil!("cmyk");
        check(jpeg, rgb, 0.5, 3);
        let (jpeg, rgb) = beside_pil!("ycck");
        check(jpeg, rgb, 0.8, 5);
    }

    #[test]
    fn a_png_is_told_by_its_bytes() {
        let rgb = scene(20, 10, 3);
        let picture = decode(&png_of(&DynamicImage::ImageRgb8(rgb.clone()))).unwrap();
        assert_eq!((picture.width, picture.height, &picture.pixels), (20, 10, rgb.as_raw()));
        // Sixteen bits, alpha, one channel.
        let deep =
            ImageBuffer::from_fn(20, 10, |x, y| Rgb(rgb.get_pixel(x, y).0.map(|v| u16::from(v) * 257)));
        assert_eq!(decode(&png_of(&DynamicImage::ImageRgb16(deep))).unwrap(), picture);
        let clear = RgbaImage::from_fn(20, 10, |x, y| {
            let [r, g, b] = rgb.get_pixel(x, y).0;
            image::Rgba([r, g, b, (x * 9) as u8])
        });
        assert_eq!(decode(&png_of(&DynamicImage::ImageRgba8(clear))).unwrap(), picture);
        let grey = ImageBuffer::from_fn(3, 2, |x, _| Luma([x as u8 * 100]));
        let picture = decode(&png_of(&DynamicImage::ImageLuma8(grey))).unwrap();
        assert_eq!(picture.pixels, [[0; 3], [100; 3], [200; 3], [0; 3], [100; 3], [200; 3]].concat());
    }

    #[test]
    fn damaged_pictures_are_refused_or_decoded_but_never_a_crash() {
        let whole = jpeg_of(&scene(100, 80, 1));
        let size = decode(&whole).unwrap().pixels.len();
        assert_eq!(size, 100 * 80 * 3);
        // A cut anywhere before its last pixels is noticed.
        for end in (3..whole.len() - 40).step_by(17) {
            let error = decode(&whole[..end]).unwrap_err();
            assert!(error.contains("truncated or damaged"), "{end}: {error}");
        }
        let progressive = beside_pil!("progressive").0;
        assert!(decode(&progressive[..progressive.len() / 2]).is_err());
        // Appended bytes do not matter.
        assert_eq!(decode(&[&whole[..], &[0; 50]].concat()).unwrap().pixels.len(), size);
        let png = png_of(&DynamicImage::ImageRgb8(scene(100, 80, 1)));
        assert!(decode(&png[..png.len() / 2]).unwrap_err().contains("PNG"));
        for (bytes, expected) in
            [(&b""[..], "empty"), (&b"GIF89a..."[..], "neither a JPEG nor a PNG"), (&b"\xff"[..], "ff")]
        {
            assert!(decode(bytes).unwrap_err().contains(expected), "{bytes:?}");
        }
        for original in [&whole[..], &png] {
            for at in (0..original.len()).step_by(7) {
                let mut damaged = original.to_vec();
                damaged[at] ^= 0x55;
                if let Ok(picture) = decode(&damaged) {
                    assert_eq!(picture.pixels.len(), picture.width * picture.height * 3);
                }
            }
        }
    }
}
