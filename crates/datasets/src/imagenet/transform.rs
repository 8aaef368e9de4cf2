//! The transforms of a picture into a network's input: crop, scaling, mirroring, normalization.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use rand::Rng;

use crate::batches::{Normalization, Purpose, rng};
use crate::memory::CHANNELS;

use super::decode::Picture;
use super::options::Options;

/// How often a crop is drawn before the fallback, as in torchvision.
const ATTEMPTS: usize = 10;

/// A part of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Crop {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

/// The crop of torchvision's `RandomResizedCrop` for a picture of `height` x `width`: it draws a share of the
/// area evenly from `scale`, the logarithm of a ratio of width to height evenly from that of `ratio`, and a
/// place. After ten draws that do not fit, it takes the largest crop in the middle whose ratio is in `ratio`.
///
/// `uniform` draws numbers in `0..1`.
pub(super) fn random_crop(
    height: usize,
    width: usize,
    scale: [f64; 2],
    ratio: [f64; 2],
    mut uniform: impl FnMut() -> f64,
) -> Crop {
    let mut between = |low: f64, high: f64| low + (high - low) * uniform();
    let area = (height * width) as f64;
    for _ in 0..ATTEMPTS {
        let target = area * between(scale[0], scale[1]);
        let aspect = between(ratio[0].ln(), ratio[1].ln()).exp();
        let w = (target * aspect).sqrt().round_ties_even() as usize;
        let h = (target / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = between(0.0, (height - h + 1) as f64) as usize;
            let left = between(0.0, (width - w + 1) as f64) as usize;
            return Crop { top, left, height: h, width: w };
        }
    }
    let whole = width as f64 / height as f64;
    let (h, w) = if whole < ratio[0] {
        ((width as f64 / ratio[0]).round_ties_even() as usize, width)
    } else if whole > ratio[1] {
        (height, (height as f64 * ratio[1]).round_ties_even() as usize)
    } else {
        (height, width)
    };
    // Rounding must give at least a pixel and at most the picture.
    let (h, w) = (h.clamp(1, height), w.clamp(1, width));
    Crop { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
}

/// How a picture becomes a network's input, `[side, side, 3]`.
pub(super) enum Transform {
    /// For training: a random crop, scaled, and mirrored with probability one half if `flip`. The random
    /// numbers depend on these fields alone and not on the order of images.
    Train { seed: u64, epoch: usize, index: usize, flip: bool },
    /// For evaluation: the picture with its shorter side scaled to `resize`, of which the middle is taken.
    Test,
}

impl Transform {
    /// Writes the network's input to `target`, `[side, side, 3]`.
    pub fn write(
        &self,
        picture: &Picture,
        options: &Options,
        table: &Normalization,
        resizer: &mut Resizer,
        target: &mut [f32],
    ) -> Result<(), String> {
        let side = options.side;
        let Picture { width, height, .. } = *picture;
        let (pixels, crop, flip) = match *self {
            Transform::Train { seed, epoch, index, flip } => {
                let mut rng = rng(seed, epoch, Purpose::Augment);
                // Each image has its own stream under the epoch's key.
                rng.set_stream(index as u64);
                let crop = random_crop(height, width, options.scale, options.ratio, || rng.random());
                let flip = flip && rng.random();
                let pixels = resize(resizer, picture, crop, side, side)?;
                let all = Crop { top: 0, left: 0, height: side, width: side };
                (Picture { width: side, height: side, pixels }, all, flip)
            }
            Transform::Test => {
                let all = Crop { top: 0, left: 0, height, width };
                let [h, w] = shorter_side_to(height, width, options.resize);
                let pixels = resize(resizer, picture, all, h, w)?;
                (Picture { width: w, height: h, pixels }, middle(h, w, side), false)
            }
        };
        let (target, _) = target.as_chunks_mut::<CHANNELS>();
        for (y, row) in target.chunks_exact_mut(side).enumerate() {
            let begin = ((crop.top + y) * pixels.width + crop.left) * CHANNELS;
            let (line, _) = pixels.pixels[begin..][..side * CHANNELS].as_chunks::<CHANNELS>();
            line.iter().zip(&mut *row).for_each(|(source, target)| table.pixel(source, target));
            if flip {
                row.reverse();
            }
        }
        Ok(())
    }
}

/// The height and width of a picture whose shorter side is scaled to `side`, as torchvision's `Resize`
/// computes them.
fn shorter_side_to(height: usize, width: usize, side: usize) -> [usize; 2] {
    match height <= width {
        true => [side, side * width / height],
        false => [side * height / width, side],
    }
}

/// The middle of a picture, as torchvision's `CenterCrop` finds it. `side` must fit.
fn middle(height: usize, width: usize, side: usize) -> Crop {
    let half = |rest: usize| (rest as f64 / 2.0).round_ties_even() as usize;
    Crop { top: half(height - side), left: half(width - side), height: side, width: side }
}

/// Cuts `crop` out of the picture and scales it to `height` x `width`: bilinear, and where it becomes
/// smaller, averaged over the support of the smaller picture ("antialias"), as PIL and torchvision do.
pub(super) fn resize(
    resizer: &mut Resizer,
    picture: &Picture,
    crop: Crop,
    height: usize,
    width: usize,
) -> Result<Vec<u8>, String> {
    fn failed(error: impl std::fmt::Display) -> String {
        format!("it cannot be scaled: {error}")
    }
    let Picture { width: w, height: h, ref pixels } = *picture;
    let source = TypedImageRef::<U8x3>::from_buffer(w as u32, h as u32, pixels).map_err(failed)?;
    // The crop precedes the scaling, so no pixel outside the crop may contribute.
    let [left, top, w, h] = [crop.left, crop.top, crop.width, crop.height].map(|x| x as u32);
    let source = TypedCroppedImage::from_ref(&source, left, top, w, h).map_err(failed)?;
    let mut scaled = vec![0; height * width * CHANNELS];
    let mut target =
        TypedImage::<U8x3>::from_buffer(width as u32, height as u32, &mut scaled).map_err(failed)?;
    let options =
        ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
    // `resize` would be compiled for every type of pixel.
    resizer.resize_typed(&source, &mut target, &options).map_err(failed)?;
    Ok(scaled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Picture {
        Picture { width: 64, height: 48, pixels: include_bytes!("../../tests/pictures/source.rgb").to_vec() }
    }

    #[test]
    fn scaling_agrees_with_pil() {
        let text = include_str!("../../tests/pictures/scaled.txt");
        let mut cases = 0;
        for line in text.lines() {
            let (numbers, hex) = line.rsplit_once(' ').unwrap();
            let numbers: Vec<usize> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
            let [left, top, width, height, w, h] = numbers[..] else { panic!("{numbers:?}") };
            let crop = Crop { top, left, height, width };
            let scaled = resize(&mut Resizer::new(), &source(), crop, h, w).unwrap();
            let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
            assert_eq!((scaled.len(), hex.len()), (w * h * 3, w * h * 6));
            // Both round to whole numbers twice, after scaling columns and after scaling rows.
            let most = scaled.iter().enumerate().map(|(i, &found)| found.abs_diff(byte(i))).max().unwrap();
            assert!(most <= 1, "{most} for {numbers:?}");
            cases += 1;
        }
        assert_eq!(cases, 12);
    }

    /// The crop that the given draws lead to.
    fn check(height: usize, width: usize, draws: &[f64], expected: [usize; 4]) {
        let mut rest = draws.iter();
        let crop = random_crop(height, width, [0.08, 1.0], [3.0 / 4.0, 4.0 / 3.0], || *rest.next().unwrap());
        assert_eq!([crop.top, crop.left, crop.height, crop.width], expected, "{height} {width} {draws:?}");
        assert_eq!(rest.next(), None);
    }

    #[test]
    fn random_crops_are_those_worked_out_by_hand() {
        // Share 0.54 of 400 x 300, ratio 1 (the middle between the logarithms): 64,800 pixels, a square of
        // 254.6, hence 255. Places 0 to 45 downwards and 0 to 145 to the right: 0.5 * 46 = 23, 0.25 * 146 =
        // 36.5.
        check(300, 400, &[0.5, 0.5, 0.5, 0.25], [23, 36, 255, 255]);
        // The smallest share and ratio: 9,600 pixels, sqrt(9600 * 3/4) = 84.9 wide, sqrt(9600 * 4/3) = 113.1
        // high.
        check(300, 400, &[0.0, 0.0, 0.0, 0.999999], [0, 315, 113, 85]);
        // Share 0.99 at ratio 1 is 345 squared, which 300 rows do not hold; the next draw does.
        check(300, 400, &[0.99, 0.5, 0.0, 0.0, 0.0, 0.0], [0, 0, 113, 85]);
    }

    #[test]
    fn where_no_draw_fits_the_middle_is_taken() {
        // In a strip, no share of 0.54 or more has a ratio of at most 4/3.
        let never = [0.5; 20];
        // 10 rows, 10 * 4/3 = 13.3 columns, in the middle of 100: (100 - 13) / 2 = 43.
        check(10, 100, &never, [0, 43, 10, 13]);
        // 10 columns, 10 / (3/4) = 13.3 rows.
        check(100, 10, &never, [43, 0, 13, 10]);
        // A ratio that is allowed, yet a share too large for it: the whole picture.
        check(100, 130, &[1.0, 0.0].repeat(10), [0, 0, 100, 130]);
        check(1, 1000, &never, [0, 499, 1, 1]);
        // The crop is inside the picture, whatever the picture's shape is.
        let mut rng = rng(1, 2, Purpose::Augment);
        for (height, width) in [(1, 1), (1, 7), (300, 2), (5, 4), (333, 500)] {
            for _ in 0..200 {
                let crop = random_crop(height, width, [0.08, 1.0], [0.75, 4.0 / 3.0], || rng.random());
                assert!(crop.height > 0 && crop.top + crop.height <= height, "{crop:?}");
                assert!(crop.width > 0 && crop.left + crop.width <= width, "{crop:?}");
            }
        }
    }

    #[test]
    fn random_crops_are_uniformly_distributed() {
        // With a ratio of 1 every share of the area fits a square picture and is equally likely.
        let mut rng = rng(3, 0, Purpose::Augment);
        let crops: Vec<Crop> =
            (0..20_000).map(|_| random_crop(1000, 1000, [0.2, 0.8], [1.0, 1.0], || rng.random())).collect();
        let mean = crops.iter().map(|crop| (crop.height * crop.width) as f64).sum::<f64>() / 2e10;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let left = crops.iter().map(|crop| crop.left as f64 / (1000 - crop.width) as f64).sum::<f64>() / 2e4;
        assert!((left - 0.5).abs() < 0.01, "{left}");
    }

    #[test]
    fn evaluation_sizes_are_torchvisions() {
        assert_eq!(shorter_side_to(333, 500, 256), [256, 384]);
        assert_eq!(shorter_side_to(500, 333, 256), [384, 256]);
        assert_eq!(shorter_side_to(375, 500, 256), [256, 341]);
        assert_eq!(shorter_side_to(100, 100, 256), [256, 256]);
        let place = |crop: Crop| (crop.top, crop.left);
        assert_eq!(place(middle(256, 341, 224)), (16, 58)); // 58.5, to the even neighbour
        assert_eq!(place(middle(259, 256, 224)), (18, 16)); // 17.5, likewise
    }

    #[test]
    fn views_are_normalized_and_mirrored() {
        let options = Options { side: 8, resize: 10, ..Options::default() };
        let (mean, std) = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]);
        let table = Normalization::of(mean, std);
        let seen = |view: Transform| {
            let mut target = vec![f32::NAN; 8 * 8 * 3];
            view.write(&source(), &options, &table, &mut Resizer::new(), &mut target).unwrap();
            target
        };
        let all = Crop { top: 0, left: 0, height: 48, width: 64 };
        let scaled = resize(&mut Resizer::new(), &source(), all, 10, 13).unwrap();
        let test = seen(Transform::Test);
        for (p, &found) in test.iter().enumerate() {
            let (y, x, c) = (p / 24 + 1, p / 3 % 8 + 2, p % 3); // the middle of 10 x 13
            let expected = (f32::from(scaled[(y * 13 + x) * 3 + c]) / 255.0 - mean[c]) / std[c];
            assert!((found - expected).abs() < 1e-6, "{p}: {found} {expected}");
        }
        let train = |index, flip| seen(Transform::Train { seed: 1, epoch: 2, index, flip });
        let mirrored = |pixels: &[f32]| -> Vec<f32> {
            let row = |row: &[f32]| row.chunks(3).rev().flatten().copied().collect::<Vec<f32>>();
            pixels.chunks(24).flat_map(row).collect()
        };
        let mut turned = 0;
        for index in 0..100 {
            let (plain, flipped) = (train(index, false), train(index, true));
            // The crop is the same whether mirroring is allowed or not.
            assert!(flipped == plain || flipped == mirrored(&plain), "{index}");
            turned += usize::from(flipped != plain);
        }
        assert!((30..70).contains(&turned), "{turned}");
        assert_eq!(train(5, true), train(5, true));
        assert_ne!(train(5, false), train(6, false));
        assert_ne!(train(5, false), seen(Transform::Train { seed: 1, epoch: 3, index: 5, flip: false }));
        assert_ne!(train(5, false), seen(Transform::Train { seed: 2, epoch: 2, index: 5, flip: false }));
    }
}
