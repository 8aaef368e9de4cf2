//! Pictures of every kind are decoded as PIL decodes them, and damaged ones are refused.

mod common;

use common::{jpeg_of, png_of, scene};
use image::{DynamicImage, ImageBuffer, Luma, Rgb, RgbaImage};
use pictures::decode;

/// Compares the pixels with PIL's for the same file. No value may differ by more than `most`, and
/// the average difference must be at most `mean`. Decoders may round differently, and may
/// interpolate subsampled colours differently.
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
        (include_bytes!(concat!($name, ".jpg")), include_bytes!(concat!($name, ".rgb")))
    };
}

#[test]
fn every_kind_of_jpeg_decodes_as_by_pil() {
    let (jpeg, rgb) = beside_pil!("grey");
    check(jpeg, rgb, 0.1, 1);
    let (jpeg, rgb) = beside_pil!("progressive");
    check(jpeg, rgb, 0.5, 4);
    // The EXIF orientation asks for a quarter turn.
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
    // Sixteen bits, of which the upper byte is taken; an alpha channel; one channel.
    let low = |x: u32, y: u32| (x * 13 + y * 29) as u8;
    let deep = |x, y| rgb.get_pixel(x, y).0.map(|high| u16::from_be_bytes([high, low(x, y)]));
    let deep = ImageBuffer::from_fn(20, 10, |x, y| Rgb(deep(x, y)));
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

/// Writes bits, the most significant first, as in the scans of a JPEG.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    waiting: u32,
    count: u32,
}

impl Bits {
    fn put(&mut self, value: u32, bits: u32) {
        for bit in (0..bits).rev() {
            self.waiting = self.waiting << 1 | (value >> bit & 1);
            self.count += 1;
            if self.count == 8 {
                let byte = std::mem::take(&mut self.waiting) as u8;
                self.count = 0;
                self.bytes.push(byte);
                if byte == 0xff {
                    self.bytes.push(0);
                }
            }
        }
    }
}

/// Returns the level of a block of 8x8 pixels: the luminance varies, the colours do not.
fn level(channel: usize, row: usize, column: usize) -> i32 {
    if channel == 0 { (row * 37 + column * 53) as i32 % 200 - 100 } else { 0 }
}

/// Makes a JPEG of `width` x `height` pixels in three channels, in which each block has a single
/// level. `factors` are the channels' horizontal and vertical sampling factors, and `scans` the
/// channels of each scan.
fn flat_blocks(
    (width, height): (usize, usize),
    factors: [(usize, usize); 3],
    scans: &[&[usize]],
    progressive: bool,
) -> Vec<u8> {
    let mut jpeg = vec![0xff, 0xd8];
    let segment = |jpeg: &mut Vec<u8>, marker: u8, contents: &[u8]| {
        jpeg.extend([0xff, marker]);
        jpeg.extend((contents.len() as u16 + 2).to_be_bytes());
        jpeg.extend(contents);
    };
    // With a quantization step of 8, the level of a block is its only coefficient.
    segment(&mut jpeg, 0xdb, &[&[0][..], &[8; 64]].concat());
    let mut frame = vec![8, 0, height as u8, 0, width as u8, 3];
    (0..3).for_each(|c| frame.extend([c as u8 + 1, (factors[c].0 << 4 | factors[c].1) as u8, 0]));
    segment(&mut jpeg, if progressive { 0xc2 } else { 0xc0 }, &frame);
    // The Huffman tables: codes of four bits for differences of 0 to 11 bits, and a code of one bit
    // for the end of a block.
    let four = [0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    segment(&mut jpeg, 0xc4, &[&[0x00][..], &four, &Vec::from_iter(0..12)].concat());
    segment(&mut jpeg, 0xc4, &[&[0x10, 1][..], &[0; 15], &[0]].concat());
    let most = |f: fn(&(usize, usize)) -> usize| factors.iter().map(f).max().unwrap();
    let (across, down) = (most(|f| f.0), most(|f| f.1));
    for scan in scans {
        let mut header = vec![scan.len() as u8];
        scan.iter().for_each(|&c| header.extend([c as u8 + 1, 0]));
        header.extend(if progressive { [0, 0, 0] } else { [0, 63, 0] });
        segment(&mut jpeg, 0xda, &header);
        let (mut bits, mut last) = (Bits::default(), [0; 3]);
        let mut block = |channel: usize, row: usize, column: usize| {
            let value = level(channel, row, column);
            let difference = value - std::mem::replace(&mut last[channel], value);
            let size = 32 - difference.unsigned_abs().leading_zeros();
            bits.put(size, 4);
            bits.put((difference - i32::from(difference < 0)) as u32, size);
            if !progressive {
                bits.put(0, 1);
            }
        };
        if let [channel] = **scan {
            // The blocks of a scan with one channel come row by row, without those beyond the
            // picture.
            let blocks = |size: usize, factor: usize, most: usize| (size * factor).div_ceil(most).div_ceil(8);
            let (columns, rows) =
                (blocks(width, factors[channel].0, across), blocks(height, factors[channel].1, down));
            (0..rows * columns).for_each(|i| block(channel, i / columns, i % columns));
        } else {
            for unit in 0..height.div_ceil(8 * down) * width.div_ceil(8 * across) {
                let (row, column) = (unit / width.div_ceil(8 * across), unit % width.div_ceil(8 * across));
                for &c in *scan {
                    let (h, v) = factors[c];
                    (0..h * v).for_each(|i| block(c, row * v + i / h, column * h + i % h));
                }
            }
        }
        bits.put(0x7f, 7);
        jpeg.extend(bits.bytes);
    }
    jpeg.extend([0xff, 0xd9]);
    jpeg
}

#[test]
fn separate_scans_are_decoded_right_or_refused() {
    let separate: &[&[usize]] = &[&[0], &[1], &[2]];
    let orders: [&[&[usize]]; 4] = [&[&[0, 1, 2]], separate, &[&[0], &[1, 2]], &[&[2], &[0], &[1]]];
    let (mut right, mut refused) = (0, 0);
    for size in [(40, 56), (35, 41), (16, 16)] {
        for factor in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)] {
            for (order, progressive) in orders.iter().flat_map(|order| [(order, false), (order, true)]) {
                let jpeg = flat_blocks(size, [factor, (1, 1), (1, 1)], order, progressive);
                let case = format!("{size:?} {factor:?} {order:?} {progressive}");
                let picture = match decode(&jpeg) {
                    Ok(picture) => picture,
                    Err(error) => {
                        assert!(order.len() > 1 && !progressive, "{case}: {error}");
                        assert!(error.contains("separate scans"), "{case}: {error}");
                        refused += 1;
                        continue;
                    }
                };
                assert_eq!((picture.width, picture.height), size, "{case}");
                for (i, pixel) in picture.pixels.chunks(3).enumerate() {
                    let expected = 128 + level(0, i / size.0 / 8, i % size.0 / 8);
                    assert_eq!(pixel, [expected as u8; 3], "{case}: pixel {i}");
                }
                right += 1;
            }
        }
    }
    assert_eq!((right, refused), (75, 45));
}

#[test]
fn channels_of_any_sampling_are_decoded_right_or_refused() {
    let all = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (3, 1)];
    let (mut right, mut coarse) = (0, 0);
    for (y, cb, cr) in all.into_iter().flat_map(|y| all.map(|cb| all.map(|cr| (y, cb, cr)))).flatten() {
        // A JPEG's unit may have at most ten blocks.
        if y.0 * y.1 + cb.0 * cb.1 + cr.0 * cr.1 > 10 {
            continue;
        }
        for progressive in [false, true] {
            let size = (70, 75);
            let jpeg = flat_blocks(size, [y, cb, cr], &[&[0, 1, 2]], progressive);
            let case = format!("{y:?} {cb:?} {cr:?} {progressive}");
            let is_first_finest = y.0 >= cb.0.max(cr.0) && y.1 >= cb.1.max(cr.1);
            match decode(&jpeg) {
                Ok(picture) => {
                    assert!(is_first_finest, "{case}");
                    for (i, pixel) in picture.pixels.chunks(3).enumerate() {
                        let expected = 128 + level(0, i / size.0 / 8, i % size.0 / 8);
                        assert_eq!(pixel, [expected as u8; 3], "{case}: pixel {i}");
                    }
                    right += 1;
                }
                Err(error) => {
                    assert_eq!(
                        !is_first_finest,
                        error.contains("more samples of a colour"),
                        "{case}: {error}"
                    );
                    coarse += usize::from(!is_first_finest);
                }
            }
        }
    }
    assert!(right > 50 && coarse > 50, "{right} right, {coarse} refused");
}

/// Small files may describe pictures that do not fit into memory.
#[test]
fn pictures_of_too_many_pixels_are_refused() {
    let refused = |bytes: &[u8]| {
        let error = decode(bytes).map(|picture| (picture.width, picture.height)).unwrap_err();
        assert!(error.contains("expected at most 67108864"), "{error}");
    };
    let mut jpeg = jpeg_of(&scene(8, 8, 0));
    let frame = jpeg.windows(4).position(|window| window == [0xff, 0xc0, 0, 17]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0x40, 0, 0x40, 0]);
    refused(&jpeg);
    // The size follows the signature and the header's length and name; the header's checksum is
    // after it.
    let mut png = png_of(&DynamicImage::ImageLuma8(ImageBuffer::new(8, 8)));
    png[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    let mut crc = flate2::Crc::new();
    crc.update(&png[12..29]);
    png[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    refused(&png);
    let wide = png_of(&DynamicImage::ImageLuma8(ImageBuffer::new(1 << 15, 4)));
    assert_eq!(decode(&wide).unwrap().pixels.len(), 3 << 17);
}

/// Some programs add an end marker to an incomplete picture, and libjpeg makes up the rest.
#[test]
fn a_part_of_a_picture_is_refused_although_it_has_an_end() {
    let closed = |part: &[u8]| [part, &[0xff, 0xd9]].concat();
    let begin = |jpeg: &[u8]| {
        let scan = jpeg.windows(2).position(|pair| pair == [0xff, 0xda]).unwrap();
        scan + 2 + usize::from(u16::from_be_bytes([jpeg[scan + 2], jpeg[scan + 3]]))
    };
    let refused = |jpeg: &[u8], what: &str| {
        let error = decode(jpeg).map(|picture| (picture.width, picture.height)).expect_err(what);
        assert!(error.contains("truncated or damaged"), "{what}: {error}");
    };
    let whole = jpeg_of(&scene(100, 80, 1));
    // The last bytes are two of the marker and up to two that end the last block.
    for end in (begin(&whole)..whole.len() - 4).step_by(11) {
        refused(&closed(&whole[..end]), &format!("the first {end} bytes of {}", whole.len()));
    }
    // Bytes after the end marker do not matter.
    refused(&[&closed(&whole[..whole.len() / 2])[..], &[0; 50]].concat(), "with a tail");
    // Flat blocks, of which the decoder would make any number from the zeros after the data.
    for factor in [(1, 1), (2, 1), (2, 2)] {
        let flat = flat_blocks((96, 96), [factor, (1, 1), (1, 1)], &[&[0, 1, 2]], false);
        assert!(decode(&flat).is_ok());
        for end in (begin(&flat)..flat.len() - 4).step_by(7) {
            refused(&closed(&flat[..end]), &format!("{end} bytes of flat blocks"));
        }
    }
    // Some scans are missing, or a part of the last one.
    let progressive = beside_pil!("progressive").0;
    assert!(decode(progressive).is_ok());
    for end in begin(progressive)..progressive.len() - 4 {
        refused(&closed(&progressive[..end]), &format!("{end} bytes, progressive"));
    }
}

#[test]
fn damaged_pictures_are_refused_or_decoded_but_never_a_crash() {
    let whole = jpeg_of(&scene(100, 80, 1));
    let size = decode(&whole).unwrap().pixels.len();
    assert_eq!(size, 100 * 80 * 3);
    // A cut anywhere before the last pixels is noticed.
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
