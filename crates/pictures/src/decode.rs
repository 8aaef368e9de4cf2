//! Decoding of picture files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Cursor;

use image::{ImageError, ImageFormat, ImageReader};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::{CHANNELS, Picture, catch_panic};

/// The maximum number of pixels of a picture, 8192 x 8192; PIL warns beyond 1.3 times as many.
/// Decoders need at most 16 bytes per pixel.
const MOST_PIXELS: usize = 1 << 26;

/// Decodes a JPEG or a PNG, which the first bytes tell apart, into red, green and blue.
///
/// The result is that of `PIL.Image.open(..).convert("RGB")`: grey becomes three equal channels,
/// CMYK and YCCK are read as Adobe writes them (inverted), an alpha channel is dropped, and the
/// orientation in EXIF is ignored. Of values of 16 bits the upper byte is taken, as PIL does for
/// colours; greys of 16 bits, which PIL clips at 255, are read in the same way here. A JPEG whose data end before its picture is refused, even if it has an end marker.
///
/// # Errors
/// A description of what is wrong with the file.
pub fn decode(bytes: &[u8]) -> Result<Picture, String> {
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
    if has_separate_scans(bytes) {
        return Err("the JPEG has its channels in separate scans, which the decoder does not support".into());
    }
    if has_coarse_first_channel(bytes) {
        return Err(
            "the JPEG has more samples of a colour than of brightness, which the decoder does not support"
                .into(),
        );
    }
    if lacks_scans(bytes) {
        return Err("the JPEG is truncated or damaged: it ends before the last of its scans".into());
    }
    match jpeg_with(&with_ones(bytes), true) {
        // A complete picture should not be refused for problems that libjpeg only warns about. But
        // if a scan's data end or are damaged before the picture is complete, the decoder would
        // make up the rest.
        Err(what) if has_end(bytes) && !INCOMPLETE.iter().any(|part| what.contains(part)) => {
            jpeg_with(bytes, false)
        }
        Err(what) => Err(format!("the JPEG is truncated or damaged: {what}")),
        done => done,
    }
}

/// The decoder's errors after which it decodes no more blocks.
const INCOMPLETE: [&str; 3] = ["Premature end", "Bad Huffman Code", "more than bits left"];

fn jpeg_with(bytes: &[u8], strict: bool) -> Result<Picture, String> {
    let options = DecoderOptions::default().set_strict_mode(strict).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|error| error.to_string())?;
    let (width, height) = decoder.dimensions().ok_or("it has no size")?;
    check_size(width, height)?;
    let pixels = decoder.decode().map_err(|error| error.to_string())?;
    Ok(Picture { width, height, pixels })
}

/// Returns whether a JPEG has an end marker near the end of the file; some programs append a few
/// bytes.
fn has_end(bytes: &[u8]) -> bool {
    const NEAR: usize = 1024;
    bytes[bytes.len().saturating_sub(NEAR)..].windows(2).any(|pair| pair == [0xff, 0xd9])
}

/// Inserts sixteen bytes of ones before the end marker of a JPEG.
///
/// If a scan's data end too early, the decoder continues with zeros, which it decodes as blocks. No
/// code consists only of ones, so the inserted bytes make it report an error instead. If the data
/// are complete, it does not read that far.
fn with_ones(bytes: &[u8]) -> Cow<'_, [u8]> {
    let scans = segments(bytes).filter(|(marker, _)| *marker == SCAN);
    match bytes.windows(2).rposition(|pair| pair == [0xff, 0xd9]) {
        // After the first scan of a progressive JPEG the decoder expects a marker immediately.
        Some(end) if !is_progressive(bytes) || scans.count() > 1 => {
            Cow::Owned([&bytes[..end], &[0xff, 0].repeat(16), &bytes[end..]].concat())
        }
        _ => Cow::Borrowed(bytes),
    }
}

/// The markers of frames (sequential, extended, progressive) and of scans.
const SEQUENTIAL: u8 = 0xc0;
const EXTENDED: u8 = 0xc1;
const PROGRESSIVE: u8 = 0xc2;
const SCAN: u8 = 0xda;

/// Returns the headers of a JPEG: their markers and contents. The data of scans between them are
/// skipped.
fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes.get(2..).unwrap_or_default();
    // A header consists of a marker (255 and a number that is neither 0 nor 255), a length and a
    // segment.
    std::iter::from_fn(move || {
        loop {
            let at = rest.windows(2).position(|pair| pair[0] == 0xff && ![0, 0xff].contains(&pair[1]))?;
            let marker = rest[at + 1];
            rest = &rest[at + 2..];
            match marker {
                // Restart markers have no length.
                0xd0..=0xd7 => continue,
                0xd9 => return None,
                _ => {}
            }
            let &[high, low, ref after @ ..] = rest else { return None };
            let length = usize::from(u16::from_be_bytes([high, low])).saturating_sub(2).min(after.len());
            let (segment, behind) = after.split_at(length);
            rest = behind;
            return Some((marker, segment));
        }
    })
}

fn is_progressive(bytes: &[u8]) -> bool {
    segments(bytes).take_while(|(marker, _)| *marker != SCAN).any(|(marker, _)| marker == PROGRESSIVE)
}

/// Returns whether the first scan of a sequential JPEG lacks a channel.
///
/// zune-jpeg (0.5.15) may decode such a picture to wrong pixels without an error: if a channel has
/// fewer rows than another, or if a scan ends in flat blocks.
fn has_separate_scans(bytes: &[u8]) -> bool {
    let mut channels = 0;
    for (marker, segment) in segments(bytes) {
        match (marker, segment) {
            (SEQUENTIAL | EXTENDED, [_, _, _, _, _, count, ..]) => channels = *count,
            (SCAN, [scanned, ..]) => return *scanned < channels,
            _ => {}
        }
    }
    false
}

/// Returns whether another channel has more samples than the first, in a row or in a column.
/// zune-jpeg (0.5.15) decodes many such pictures to wrong pixels without an error.
fn has_coarse_first_channel(bytes: &[u8]) -> bool {
    let frame = segments(bytes).find(|(marker, _)| [SEQUENTIAL, EXTENDED, PROGRESSIVE].contains(marker));
    let channels = frame.and_then(|(_, segment)| segment.get(6..)).unwrap_or_default();
    // Each channel has its number, its horizontal and vertical factors in four bits each, and the
    // number of its table.
    let mut factors = channels.as_chunks::<3>().0.iter().map(|&[_, both, _]| (both >> 4, both & 0xf));
    let Some(first) = factors.next() else { return false };
    factors.any(|(across, down)| across > first.0 || down > first.1)
}

/// Returns whether a progressive JPEG lacks scans that its other scans imply: those that add the
/// missing low bits of coefficients, and those of the remaining frequencies of a channel that has
/// some.
fn lacks_scans(bytes: &[u8]) -> bool {
    if !is_progressive(bytes) {
        return false;
    }
    // For each channel's number, the number of low bits that its 64 coefficients still lack, or
    // `None` if a coefficient has not been sent.
    let mut lacking: BTreeMap<u8, [Option<u8>; 64]> = BTreeMap::new();
    for (_, segment) in segments(bytes).filter(|(marker, _)| *marker == SCAN) {
        let Some((&count, rest)) = segment.split_first() else { return true };
        let channels = 2 * usize::from(count);
        let (Some(channels), Some(&[from, to, bits])) =
            (rest.get(..channels), rest.get(channels..).and_then(<[u8]>::first_chunk))
        else {
            return true;
        };
        for channel in channels.iter().step_by(2) {
            let coefficients = lacking.entry(*channel).or_insert([None; 64]);
            if let Some(range) = coefficients.get_mut(usize::from(from)..=usize::from(to)) {
                range.fill(Some(bits & 0xf));
            }
        }
    }
    lacking.values().any(|coefficients| {
        let unrefined = coefficients.iter().flatten().any(|&bits| bits > 0);
        let sent = coefficients[1..].iter().flatten().count();
        unrefined || (sent > 0 && sent < 63)
    })
}

fn png(bytes: &[u8]) -> Result<Picture, String> {
    let failed = |error: ImageError| format!("the PNG cannot be decoded: {error}");
    let reader = || ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    let (width, height) = reader().into_dimensions().map_err(failed)?;
    let (width, height) = (width as usize, height as usize);
    check_size(width, height)?;
    let picture = reader().decode().map_err(failed)?;
    let pixels = match picture.color().bytes_per_pixel() / picture.color().channel_count() {
        1 => picture.into_rgb8().into_raw(),
        _ => picture.into_rgb16().iter().map(|value| (value >> 8) as u8).collect(),
    };
    Ok(Picture { width, height, pixels })
}

fn check_size(width: usize, height: usize) -> Result<(), String> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= MOST_PIXELS => Ok(()),
        _ => Err(format!("it has {width}x{height} pixels: expected at most {MOST_PIXELS} in all")),
    }
}
