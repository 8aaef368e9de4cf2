//! Pictures from the bytes of their files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Cursor;

use image::{ImageError, ImageFormat, ImageReader};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::{CHANNELS, Picture, catch_panic};

/// The number of pixels that no picture may exceed, 8192 x 8192: PIL warns beyond 1.3 times as many. A
/// decoder needs at most 16 bytes for each.
const MOST_PIXELS: usize = 1 << 26;

/// Decodes a JPEG or a PNG, which their first bytes distinguish, into red, green and blue.
///
/// The result is that of `PIL.Image.open(..).convert("RGB")`: grey becomes three equal channels, CMYK and
/// YCCK are taken as Adobe writes them (inverted), an alpha channel is dropped, of 16 bits the upper 8 count,
/// and the orientation in EXIF is ignored. A JPEG whose data end before its picture does is refused, also where the marker of
/// an end follows. The error says what is wrong.
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
        // A complete picture should not be lost for what libjpeg only warns of. But where a scan's data end or are damaged
        // before the picture is complete, the decoder would make up the rest.
        Err(what) if has_end(bytes) && !INCOMPLETE.iter().any(|part| what.contains(part)) => {
            jpeg_with(bytes, false)
        }
        Err(what) => Err(format!("the JPEG is truncated or damaged: {what}")),
        done => done,
    }
}

/// Of the decoder's errors those after which no more blocks are decoded.
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

/// Whether the marker of a JPEG's end is near the end of the file; some programs append a few bytes.
fn has_end(bytes: &[u8]) -> bool {
    const NEAR: usize = 1024;
    bytes[bytes.len().saturating_sub(NEAR)..].windows(2).any(|pair| pair == [0xff, 0xd9])
}

/// The JPEG with sixteen bytes of ones before the marker of its end. Where a scan's data end too early the decoder goes on with
/// zeros, which it takes for blocks; but no code consists of ones alone, so that it meets an error in these. Data that are
/// complete are not read so far.
fn with_ones(bytes: &[u8]) -> Cow<'_, [u8]> {
    let scans = segments(bytes).filter(|(marker, _)| *marker == SCAN);
    match bytes.windows(2).rposition(|pair| pair == [0xff, 0xd9]) {
        // Behind the first scan of a progressive JPEG the decoder expects a marker at once.
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

/// A JPEG's headers: their markers and what they contain. The data of scans between them are passed over.
fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes.get(2..).unwrap_or_default();
    // A header is a marker (255 and a number that is neither 0 nor 255), a length and a segment.
    std::iter::from_fn(move || {
        loop {
            let at = rest.windows(2).position(|pair| pair[0] == 0xff && ![0, 0xff].contains(&pair[1]))?;
            let marker = rest[at + 1];
            rest = &rest[at + 2..];
            match marker {
                // Restarts have no length.
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

/// Whether the first scan of a sequential JPEG lacks a channel. zune-jpeg (0.5.15) can decode such a picture
/// to wrong pixels without an error: where a channel has fewer rows than another, and where a scan ends in
/// flat blocks.
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

/// Whether another channel has more samples than the first, in a row or in a column. zune-jpeg (0.5.15) decodes many such
/// pictures to wrong pixels without an error.
fn has_coarse_first_channel(bytes: &[u8]) -> bool {
    let frame = segments(bytes).find(|(marker, _)| [SEQUENTIAL, EXTENDED, PROGRESSIVE].contains(marker));
    let channels = frame.and_then(|(_, segment)| segment.get(6..)).unwrap_or_default();
    // Of each channel: its number, its factors across and down in four bits each, and the number of its table.
    let mut factors = channels.as_chunks::<3>().0.iter().map(|&[_, both, _]| (both >> 4, both & 0xf));
    let Some(first) = factors.next() else { return false };
    factors.any(|(across, down)| across > first.0 || down > first.1)
}

/// Whether a progressive JPEG ends before scans that others announce: those that refine what has been sent without its
/// last bits, and those of the remaining frequencies of a channel of which some have been sent.
fn lacks_scans(bytes: &[u8]) -> bool {
    if !is_progressive(bytes) {
        return false;
    }
    // For each channel's number the bits that its 64 coefficients still lack; none where nothing has been sent.
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
    Ok(Picture { width, height, pixels: picture.into_rgb8().into_raw() })
}

fn check_size(width: usize, height: usize) -> Result<(), String> {
    match width.checked_mul(height) {
        Some(pixels) if pixels <= MOST_PIXELS => Ok(()),
        _ => Err(format!("it has {width}x{height} pixels: expected at most {MOST_PIXELS} in all")),
    }
}
