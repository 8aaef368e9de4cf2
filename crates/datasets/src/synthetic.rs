//! A synthetic stand-in for CIFAR-100, for tests and for machines without the real data.

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cifar::{CLASSES, PIXELS, SIDE, with_capacity};
use crate::error::Result;
use crate::memory::{Images, InMemoryDataset};

/// The numbers of images and the seed of `DataSource::Synthetic`.
const TRAIN: usize = 10_000;
const TEST: usize = 2_000;
const SEED: u64 = 100;

/// The numbers of shapes and textures. A class has a shape, a texture, and a range of colours.
const SHAPES: usize = 10;
const TEXTURES: usize = 5;

/// The number of units of a coordinate per pixel.
const UNIT: i32 = 16;
/// The radius of shapes in the coordinates of `inside`.
const RADIUS: i32 = 256;
/// The number of hues, which form a circle that begins at red.
const HUES: i32 = 6 * 256;

/// Draws the data set of `DataSource::Synthetic`.
pub(crate) fn default() -> Result<InMemoryDataset> {
    synthetic(TRAIN, TEST, SEED)
}

/// Draws `train` + `test` pictures of 32x32 RGB pixels, whose labels cycle through 100 classes.
///
/// A class is one of 10 shapes with one of 5 textures in warm or in cold colours. Each picture
/// draws the shape at another position, in another size and shade, on a gradient of random colours,
/// with clutter around it, partly covered and with noise. So a small convolutional network learns
/// the classes in a few epochs, but not perfectly, and colours alone tell little. Every class is
/// symmetric under mirroring left to right.
///
/// All arithmetic uses integers, and all random numbers come from ChaCha8, so a seed gives the same
/// bytes on every machine. `DataSource::Synthetic` has 10,000 + 2,000 pictures with seed 100.
///
/// # Errors
///
/// [`Error::Invalid`](crate::Error::Invalid) if `train` is 0.
pub fn synthetic(train: usize, test: usize, seed: u64) -> Result<InMemoryDataset> {
    let source = format!("synthetic (seed {seed}, {train} + {test} images)");
    InMemoryDataset::new("synthetic", source, CLASSES, draw_all(train, seed, 0), draw_all(test, seed, 1))
}

/// Draws `n` pictures of the split, each from its own stream of random numbers.
fn draw_all(n: usize, seed: u64, split: u8) -> Images {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8] = split;
    let mut rng = ChaCha8Rng::from_seed(key);
    let mut images = with_capacity(n);
    for i in 0..n {
        rng.set_stream(i as u64);
        rng.set_word_pos(0);
        let class = i % CLASSES;
        images.labels.push(class as u16);
        images.pixels.extend_from_slice(&draw(class, &mut rng));
    }
    images
}

type Color = [i32; 3];

/// The pixels of a picture, in row-major order.
type Shades = [[Color; SIDE]; SIDE];

/// Draws a picture of the class.
fn draw(class: usize, rng: &mut ChaCha8Rng) -> [u8; PIXELS] {
    let shape = class % SHAPES;
    let texture = class / SHAPES % TEXTURES;
    let cold = class / (SHAPES * TEXTURES);

    // The background is a gradient between two dull colours.
    let ground = [(); 2].map(|_| {
        let (hue, light) = (rng.random_range(0..HUES), rng.random_range(40..170));
        color(hue, light, rng.random_range(0..128))
    });
    let (slope_x, slope_y) = (rng.random_range(-4..=4), rng.random_range(-4..=4));
    let clutter: [Blot; 4] = std::array::from_fn(|_| Blot::random(rng, 2..5));
    let cover = Blot::random(rng, 2..6);

    // Warm hues are around orange, and cold hues are on the opposite side of the circle.
    let hue = 128 + cold as i32 * HUES / 2 + rng.random_range(-340..=340);
    let light = rng.random_range(150..=255);
    let bright = color(hue, light, rng.random_range(120..=230));
    let dark = bright.map(|value| value * 5 / 16);

    let middle = SIDE as i32 * UNIT / 2;
    let (x0, y0) = (middle + rng.random_range(-64..=64), middle + rng.random_range(-64..=64));
    let radius = rng.random_range(8 * UNIT..=12 * UNIT);
    let weave = Weave {
        texture,
        width: rng.random_range(2 * UNIT..=3 * UNIT),
        phase: [rng.random_range(0..64), rng.random_range(0..64)],
        lean: rng.random(),
    };

    // Each layer covers the layers drawn before it.
    let half = SIDE as i32 / 2;
    let mut shades: Shades = std::array::from_fn(|row| {
        std::array::from_fn(|column| {
            let share = 128 + slope_x * (column as i32 - half) + slope_y * (row as i32 - half);
            let share = share.clamp(0, 256);
            std::array::from_fn(|c| (ground[0][c] * (256 - share) + ground[1][c] * share) / 256)
        })
    });
    clutter.iter().for_each(|blot| blot.paint(&mut shades));
    let us: [i32; SIDE] = std::array::from_fn(|column| (center(column) - x0) * RADIUS / radius);
    for (row, shades) in shades.iter_mut().enumerate() {
        let y = center(row) - y0;
        let v = y * RADIUS / radius;
        for (column, shade) in shades.iter_mut().enumerate() {
            if inside(shape, us[column], v) {
                *shade = if weave.is_dark(center(column) - x0, y) { dark } else { bright };
            }
        }
    }
    cover.paint(&mut shades);

    let mut pixels = [0; PIXELS];
    rng.fill_bytes(&mut pixels);
    for (pixel, shade) in pixels.iter_mut().zip(shades.as_flattened().as_flattened()) {
        // The sum of two random 4-bit numbers makes small deviations likelier than large ones.
        let deviation = i32::from(*pixel >> 4) + i32::from(*pixel & 15) - 15;
        *pixel = (shade + 2 * deviation).clamp(0, 255) as u8;
    }
    pixels
}

/// Returns the coordinate of the center of a column or row.
fn center(index: usize) -> i32 {
    index as i32 * UNIT + UNIT / 2
}

/// Returns whether the point is inside the shape, which covers about the disc of `RADIUS` around
/// the origin; v points down.
fn inside(shape: usize, u: i32, v: i32) -> bool {
    let (au, av) = (u.abs(), v.abs());
    let far = au.max(av);
    let square = u * u + v * v;
    match shape {
        // disc, square, diamond
        0 => square < RADIUS * RADIUS,
        1 => far < 220,
        2 => au + av < 290,
        // triangles: up, down
        3 => v < 200 && 2 * au < v + 256,
        4 => v > -200 && 2 * au < 256 - v,
        // ring, frame
        5 => (140 * 140..RADIUS * RADIUS).contains(&square),
        6 => (130..235).contains(&far),
        // upright and diagonal cross
        7 => au.min(av) < 85 && far < 250,
        8 => (au - av).abs() < 95 && far < 230,
        // cup
        _ => square < RADIUS * RADIUS && u * u + (v + 120) * (v + 120) > 190 * 190,
    }
}

/// The texture of a shape, which determines where the shape is dark.
struct Weave {
    texture: usize,
    /// The width of a stripe.
    width: i32,
    phase: [i32; 2],
    /// The direction of diagonal stripes.
    lean: bool,
}

impl Weave {
    fn is_dark(&self, x: i32, y: i32) -> bool {
        let stripe = |position: i32| position.div_euclid(self.width) & 1 == 1;
        let (x, y) = (x + self.phase[0], y + self.phase[1]);
        match self.texture {
            0 => false,
            1 => stripe(x),
            2 => stripe(y),
            3 => stripe(x) != stripe(y),
            // The distance across diagonal stripes is about 5/7 of x + y or x - y.
            _ => stripe((if self.lean { x + y } else { x - y }) * 5 / 7),
        }
    }
}

/// A rectangle or a disc of one colour.
struct Blot {
    x: i32,
    y: i32,
    size: i32,
    round: bool,
    color: Color,
}

impl Blot {
    /// Draws a blot at a random place. `pixels` is the range of its radius, or of half its edge.
    fn random(rng: &mut ChaCha8Rng, pixels: std::ops::Range<i32>) -> Blot {
        let side = SIDE as i32 * UNIT;
        let (x, y) = (rng.random_range(0..side), rng.random_range(0..side));
        let size = rng.random_range(pixels.start * UNIT..pixels.end * UNIT);
        let (hue, light, strength) =
            (rng.random_range(0..HUES), rng.random_range(60..=255), rng.random_range(0..=256));
        Blot { x, y, size, round: rng.random(), color: color(hue, light, strength) }
    }

    /// Paints the pixels that the blot covers.
    fn paint(&self, shades: &mut Shades) {
        let near = |&(row, _): &(usize, &mut [Color; SIDE])| (center(row) - self.y).abs() < self.size;
        for (row, shades) in shades.iter_mut().enumerate().filter(near) {
            for (column, shade) in shades.iter_mut().enumerate() {
                if self.covers(center(column), center(row)) {
                    *shade = self.color;
                }
            }
        }
    }

    fn covers(&self, x: i32, y: i32) -> bool {
        let (dx, dy) = (x - self.x, y - self.y);
        match self.round {
            true => dx * dx + dy * dy < self.size * self.size,
            false => dx.abs().max(dy.abs()) < self.size,
        }
    }
}

/// Returns the RGB colour of a hue (any integer; the circle has `HUES` steps). `light` (0 to 255)
/// is its largest channel, and `strength` (0 to 256) is its distance from grey.
fn color(hue: i32, light: i32, strength: i32) -> Color {
    // A channel is full up to one sixth of the circle from its own hue, zero from one third on, and
    // linear in between.
    [0, HUES / 3, 2 * HUES / 3].map(|own| {
        let away = (hue - own).rem_euclid(HUES);
        let pure = (2 * HUES / 6 - away.min(HUES - away)).clamp(0, 256);
        light * (256 * 256 - strength * (256 - pure)) / (256 * 256)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_bytes_everywhere() {
        let data = synthetic(200, 100, 3).unwrap();
        assert_eq!(data.fingerprint, "09216edc0a6aae28a37759729f6c0fd096ecd22ddb97798fb88ca512a6a13d3f");
        assert_eq!(data, synthetic(200, 100, 3).unwrap());
        assert_ne!(data.train, synthetic(200, 100, 4).unwrap().train);
        // Training and test pictures differ, and do not depend on the number of pictures.
        assert_ne!(data.train.image(0), data.test.image(0));
        assert_eq!(data.train.pixels, synthetic(300, 1, 3).unwrap().train.pixels[..data.train.pixels.len()]);
    }

    #[test]
    fn classes_come_in_turn_and_no_picture_twice() {
        let data = default().unwrap();
        assert!(data.train.labels.iter().enumerate().all(|(i, &label)| usize::from(label) == i % 100));
        let all = |images: &Images| (0..images.len()).map(|i| images.image(i).to_vec()).collect::<Vec<_>>();
        let mut pictures = [all(&data.train), all(&data.test)].concat();
        pictures.sort_unstable();
        pictures.dedup();
        assert_eq!(pictures.len(), TRAIN + TEST);
    }

    #[test]
    fn shapes_and_textures_are_symmetric_and_distinct() {
        let area = |shape| {
            (-300..300).flat_map(|v| (-300..300).map(move |u| inside(shape, u, v))).collect::<Vec<_>>()
        };
        let areas: Vec<_> = (0..SHAPES).map(area).collect();
        for (i, a) in areas.iter().enumerate() {
            let filled = a.iter().filter(|&&inside| inside).count();
            assert!((60_000..210_000).contains(&filled), "shape {i} fills {filled}");
            assert!((-300..300).all(|v| (0..300).all(|u| inside(i, u, v) == inside(i, -u, v))), "shape {i}");
            for (j, b) in areas.iter().enumerate().skip(i + 1) {
                let different = a.iter().zip(b).filter(|(a, b)| a != b).count();
                assert!(different > 20_000, "shapes {i} and {j} differ in {different}");
            }
        }
        let dark = |texture, phase| {
            let weave = Weave { texture, width: 32, phase: [phase, 0], lean: true };
            (-99..99)
                .flat_map(|y| (-99..99).map(move |x| (x, y)))
                .filter(|&(x, y)| weave.is_dark(x, y))
                .count()
        };
        assert_eq!(dark(0, 0), 0);
        assert!((1..TEXTURES).all(|texture| dark(texture, 0).abs_diff(198 * 198 / 2) < 3000));
    }

    #[test]
    fn colors_are_what_they_are_called() {
        assert_eq!(color(0, 255, 256), [255, 0, 0]);
        assert_eq!(color(HUES / 3, 200, 256), [0, 200, 0]);
        assert_eq!(color(-HUES / 3, 255, 256), [0, 0, 255]);
        assert_eq!(color(HUES / 6, 255, 256), [255, 255, 0]);
        assert_eq!(color(77, 90, 0), [90; 3]);
        assert_eq!(color(0, 200, 128), [200, 100, 100]);
    }

    /// Returns the share of test pictures whose `features` are nearest to their class's mean.
    fn nearest_mean(data: &InMemoryDataset, features: fn(&[u8]) -> Vec<f32>) -> f32 {
        let mut means =
            vec![features(data.train.image(0)).iter().map(|_| 0.0).collect::<Vec<f32>>(); CLASSES];
        let share = CLASSES as f32 / data.train.len() as f32;
        for (i, &label) in data.train.labels.iter().enumerate() {
            let mean = &mut means[usize::from(label)];
            mean.iter_mut().zip(features(data.train.image(i))).for_each(|(mean, x)| *mean += x * share);
        }
        let nearest = |image: &[u8]| {
            let image = features(image);
            let distance =
                |mean: &Vec<f32>| mean.iter().zip(&image).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            (0..CLASSES).min_by(|&a, &b| distance(&means[a]).total_cmp(&distance(&means[b]))).unwrap()
        };
        let labels = data.test.labels.iter().enumerate();
        let right = labels.filter(|&(i, &label)| nearest(data.test.image(i)) == usize::from(label)).count();
        right as f32 / data.test.len() as f32
    }

    #[test]
    fn there_is_something_to_learn_that_the_average_does_not_tell() {
        let data = default().unwrap();
        let by_pixels = nearest_mean(&data, |image| image.iter().map(|&x| x.into()).collect());
        assert!((0.02..0.4).contains(&by_pixels), "{by_pixels}");
        let by_color = nearest_mean(&data, |image| {
            (0..3)
                .map(|c| image.iter().skip(c).step_by(3).map(|&x| f32::from(x)).sum::<f32>() / 1024.0)
                .collect()
        });
        assert!((0.01..0.1).contains(&by_color), "{by_color}");
    }
}
