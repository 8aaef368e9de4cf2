//! The transforms of a picture into a network's input: crop, scaling, mirroring, normalization.

use pictures::{Crop, Picture, Region, Scaler};
use rand::Rng;

use crate::batches::{Normalization, Purpose, rng};
use crate::memory::CHANNELS;

use super::options::Options;

/// The number of draws of a crop before the fallback, as in torchvision.
const ATTEMPTS: usize = 10;

/// Draws the crop of torchvision's `RandomResizedCrop` for a picture of `height` x `width`.
///
/// It draws a share of the area uniformly from `scale`, the logarithm of width/height uniformly
/// between the logarithms of `ratio`, and a position. After ten draws that do not fit, it returns
/// the largest centered crop whose ratio lies in `ratio`. `uniform` returns numbers in `0..1`.
fn random_crop(
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
    // Rounding could give 0 pixels, or more than the picture has.
    let (h, w) = (h.clamp(1, height), w.clamp(1, width));
    Crop { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
}

/// A transform of a picture into a network's input, `[side, side, 3]`.
pub(super) enum Transform {
    /// The transform for training: a random crop, scaled, and mirrored with probability one half if
    /// `flip`. The random numbers depend only on these fields and not on the order of the images.
    Train { seed: u64, epoch: usize, index: usize, flip: bool },
    /// The transform for evaluation: the center after scaling the shorter side to `resize`.
    Test,
}

impl Transform {
    /// Writes the network's input to `target`, `[side, side, 3]`.
    pub fn write(
        &self,
        picture: &Picture,
        options: &Options,
        table: &Normalization,
        scaler: &mut Scaler,
        target: &mut [f32],
    ) -> Result<(), String> {
        let side = options.side;
        let Picture { width, height, .. } = *picture;
        let (pixels, flip) = match *self {
            Transform::Train { seed, epoch, index, flip } => {
                let mut rng = rng(seed, epoch, Purpose::Augment);
                // Each image has its own stream under the epoch's key.
                rng.set_stream(index as u64);
                let crop = random_crop(height, width, options.scale, options.ratio, || rng.random());
                let flip = flip && rng.random();
                (scaler.scale(picture, crop, None, side, side)?, flip)
            }
            Transform::Test => {
                let all = Crop { top: 0, left: 0, height, width };
                let [h, w] = shorter_side_to(height, width, options.resize);
                let pixels = if h.max(w) <= LONGEST * options.resize {
                    cut_middle(&scaler.scale(picture, all, None, h, w)?, h, w, side)
                } else {
                    let region = middle(height, width, options.resize, side);
                    scaler.scale(picture, all, Some(region), side, side)?
                };
                (pixels, false)
            }
        };
        let (lines, _) = pixels.as_chunks::<CHANNELS>();
        let (target, _) = target.as_chunks_mut::<CHANNELS>();
        for (line, row) in lines.chunks_exact(side).zip(target.chunks_exact_mut(side)) {
            line.iter().zip(&mut *row).for_each(|(source, target)| table.pixel(source, target));
            if flip {
                row.reverse();
            }
        }
        Ok(())
    }
}

/// Scales a picture down so that its shorter side has `side` pixels, if it is longer.
///
/// Evaluation computes the same pixels from the result as from the picture. A picture that is too
/// long to be scaled as a whole is returned unchanged.
pub(super) fn shrink(picture: Picture, side: usize, scaler: &mut Scaler) -> Result<Picture, String> {
    let Picture { width, height, .. } = picture;
    let [h, w] = shorter_side_to(height, width, side);
    if height.min(width) <= side || h.max(w) > LONGEST * side {
        return Ok(picture);
    }
    let all = Crop { top: 0, left: 0, height, width };
    Ok(Picture { width: w, height: h, pixels: scaler.scale(&picture, all, None, h, w)? })
}

/// Returns the height and width of a picture whose shorter side is scaled to `side`, as
/// torchvision's `Resize` computes them.
fn shorter_side_to(height: usize, width: usize, side: usize) -> [usize; 2] {
    match height <= width {
        true => [side, side * width / height],
        false => [side * height / width, side],
    }
}

/// The largest ratio of the longer side to the shorter side of a picture that is scaled as a whole.
///
/// A longer one would become too large, so only its center is scaled; a few values differ by 1.
const LONGEST: usize = 64;

/// Returns where the center begins along one side, as in torchvision's `CenterCrop`.
fn begin(size: usize, side: usize) -> usize {
    ((size - side) as f64 / 2.0).round_ties_even() as usize
}

/// Cuts the center of `side` x `side` out of a picture of `height` x `width`, which must hold it.
fn cut_middle(pixels: &[u8], height: usize, width: usize, side: usize) -> Vec<u8> {
    let rows = pixels.chunks_exact(width * CHANNELS).skip(begin(height, side)).take(side);
    rows.flat_map(|row| &row[begin(width, side) * CHANNELS..][..side * CHANNELS]).copied().collect()
}

/// Returns the region, before scaling, that torchvision's `CenterCrop` of its `Resize` takes.
fn middle(height: usize, width: usize, resize: usize, side: usize) -> Region {
    let [h, w] = shorter_side_to(height, width, resize);
    let along = |size: usize, scaled: usize| {
        let scale = size as f64 / scaled as f64;
        let begin = begin(scaled, side) as f64 * scale;
        // Rounding must not lead beyond the end of the picture.
        (begin, (side as f64 * scale).min(size as f64 - begin))
    };
    let ((top, height), (left, width)) = (along(height, h), along(width, w));
    Region { top, left, height, width }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imagenet::tests::scene;

    fn source() -> Picture {
        Picture { width: 64, height: 48, pixels: scene(64, 48, 0).into_raw() }
    }

    /// Checks the crop that results from the given draws.
    fn check(height: usize, width: usize, draws: &[f64], expected: [usize; 4]) {
        let mut rest = draws.iter();
        let crop = random_crop(height, width, [0.08, 1.0], [3.0 / 4.0, 4.0 / 3.0], || *rest.next().unwrap());
        assert_eq!([crop.top, crop.left, crop.height, crop.width], expected, "{height} {width} {draws:?}");
        assert_eq!(rest.next(), None);
    }

    #[test]
    fn random_crops_are_those_worked_out_by_hand() {
        // The share is 0.54 of 400 x 300 and the ratio is 1 (the middle between the logarithms).
        // These are 64,800 pixels, a square with sides of 254.6, rounded to 255. The top can be 0
        // to 45, and the left 0 to 145: 0.5 * 46 = 23, 0.25 * 146 = 36.5.
        check(300, 400, &[0.5, 0.5, 0.5, 0.25], [23, 36, 255, 255]);
        // The smallest share and ratio give 9,600 pixels, sqrt(9600 * 3/4) = 84.9 wide and
        // sqrt(9600 * 4/3) = 113.1 high.
        check(300, 400, &[0.0, 0.0, 0.0, 0.999999], [0, 315, 113, 85]);
        // A share of 0.99 at ratio 1 has 345 rows, which do not fit into 300. The next draw fits.
        check(300, 400, &[0.99, 0.5, 0.0, 0.0, 0.0, 0.0], [0, 0, 113, 85]);
    }

    #[test]
    fn where_no_draw_fits_the_middle_is_taken() {
        // In a narrow strip, no crop of a share of 0.54 or more has a ratio of at most 4/3.
        let never = [0.5; 20];
        // It has 10 rows and 10 * 4/3 = 13.3 columns in the middle of 100: (100 - 13) / 2 = 43.
        check(10, 100, &never, [0, 43, 10, 13]);
        // The crop has 10 columns and 10 / (3/4) = 13.3 rows.
        check(100, 10, &never, [43, 0, 13, 10]);
        // The picture's ratio is allowed, but the drawn share is too large for it, so the crop is
        // the whole picture.
        check(100, 130, &[1.0, 0.0].repeat(10), [0, 0, 100, 130]);
        check(1, 1000, &never, [0, 499, 1, 1]);
        // The crop lies inside pictures of any shape.
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
        // With ratio 1 every share of the area fits a square picture and is equally likely.
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
        // The center of 256 x 341 begins at (16, 58), because 58.5 is rounded to even. The center
        // of 259 x 256 begins at (18, 16), because 17.5 is rounded to even.
        let place = |height, width| {
            let Region { top, left, .. } = middle(height, width, 256, 224);
            (top, left)
        };
        assert_eq!(place(256, 341), (16.0, 58.0));
        assert_eq!(place(259, 256), (18.0, 16.0));
        assert_eq!(place(512, 682), (32.0, 116.0));
    }

    /// The center that is scaled alone has the same pixels as the center of the scaled picture.
    ///
    /// The scales are equal except for the rounding of a position in f64, which moves a few sums
    /// over the border between two levels.
    #[test]
    fn the_middle_is_that_of_the_scaled_picture() {
        let (resize_to, side) = (32, 28);
        let mut rng = rng(5, 0, Purpose::Augment);
        let (mut differing, mut values) = (0, 0);
        for case in 0..400 {
            let [height, width] = [(); 2].map(|_| rng.random_range(1..150));
            let pixels = (0..height * width * 3).map(|_| rng.random()).collect();
            let (picture, all) = (Picture { width, height, pixels }, Crop { top: 0, left: 0, height, width });
            let [h, w] = shorter_side_to(height, width, resize_to);
            let whole = Scaler::default().scale(&picture, all, None, h, w).unwrap();
            let expected = cut_middle(&whole, h, w, side);
            let region = middle(height, width, resize_to, side);
            let found = Scaler::default().scale(&picture, all, Some(region), side, side).unwrap();
            let most = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(most <= 1, "case {case}: {height}x{width} differs by {most}");
            differing += found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            values += found.len();
        }
        assert!(differing * 1000 < values, "{differing} of {values} differ");
    }

    /// Scaled as a whole, these pictures would take gigabytes.
    #[test]
    fn long_and_thin_pictures_are_seen_in_no_time() {
        let options = Options { side: 224, resize: 256, ..Options::default() };
        let table = Normalization::of([0.0; 3], [1.0; 3]);
        for (height, width) in [(1, 65_000), (65_000, 1), (1, 1), (3, 1 << 20)] {
            let picture = Picture { width, height, pixels: vec![51; height * width * 3] };
            let train = Transform::Train { seed: 1, epoch: 0, index: 0, flip: true };
            for transform in [Transform::Test, train] {
                let mut target = vec![f32::NAN; 224 * 224 * 3];
                transform.write(&picture, &options, &table, &mut Scaler::default(), &mut target).unwrap();
                assert!(target.iter().all(|&value| value == 0.2), "{height}x{width}");
            }
        }
    }

    #[test]
    fn inputs_are_normalized_and_mirrored() {
        let options = Options { side: 8, resize: 10, ..Options::default() };
        let (mean, std) = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]);
        let table = Normalization::of(mean, std);
        let seen = |view: Transform| {
            let mut target = vec![f32::NAN; 8 * 8 * 3];
            view.write(&source(), &options, &table, &mut Scaler::default(), &mut target).unwrap();
            target
        };
        let all = Crop { top: 0, left: 0, height: 48, width: 64 };
        let scaled = Scaler::default().scale(&source(), all, None, 10, 13).unwrap();
        let test = seen(Transform::Test);
        for (p, &found) in test.iter().enumerate() {
            let (y, x, c) = (p / 24 + 1, p / 3 % 8 + 2, p % 3); // the center of 10 x 13
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
            // The crop does not depend on whether mirroring is allowed.
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
