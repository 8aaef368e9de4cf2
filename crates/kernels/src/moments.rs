//! The per-channel moments of rows, computed in one pass while the rows are in cache.
//!
//! With a pivot `p`, `μ = p + Σ(z − p)/M` and `Σ(z − μ)² = Σ(z − p)² − M·(μ − p)²`. Little cancels
//! if `p` is near the mean, so the pivot is the mean of the first rows. If it turns out not to be
//! near the mean of a channel, or if the channel's squares leave the range of `f32`, that channel
//! alone is computed again.

use crate::cpu::simd;
use crate::elements::Element;
use crate::tile::{TILES, fold, tile_rows};

/// The smallest number of rows whose mean is the pivot; fewer are used only if there are fewer.
const PIVOT_ROWS: usize = 32;

/// The largest accepted ratio of `Σ(z − p)²` to `Σ(z − μ)²`, by which rounding errors grow.
const MAX_CANCELLATION: f64 = 4.0;

/// The range of the mean of `(z − p)²` in which the terms neither underflow nor overflow in `f32`.
const MEAN_SQUARES: std::ops::Range<f64> = 1e-30..1e30;

/// The moments of some rows, per channel.
pub(crate) struct Moments {
    rows: f64,
    pub(crate) mean: Vec<f64>,
    /// `Σ(z − mean)²`.
    squares: Vec<f64>,
    pub(crate) min: Vec<f32>,
    pub(crate) max: Vec<f32>,
}

impl Moments {
    /// Creates the moments of `rows` rows from their means, biased variances and extremes.
    pub(crate) fn new(rows: f64, mean: Vec<f64>, variance: Vec<f64>, min: Vec<f32>, max: Vec<f32>) -> Self {
        let squares = variance.into_iter().map(|variance| variance * rows).collect();
        Self { rows, mean, squares, min, max }
    }

    /// Returns the number of rows.
    pub(crate) fn rows(&self) -> f64 {
        self.rows
    }

    /// Combines the moments of parts of the rows, by the rule of Chan, Golub and LeVeque (1983).
    pub(crate) fn merged(parts: Vec<Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut all, more| {
            let rows = all.rows + more.rows;
            let share = more.rows / rows;
            let weight = all.rows * share;
            for i in 0..all.mean.len() {
                let delta = more.mean[i] - all.mean[i];
                all.mean[i] += delta * share;
                all.squares[i] += more.squares[i] + delta * delta * weight;
                all.min[i] = all.min[i].min(more.min[i]);
                all.max[i] = all.max[i].max(more.max[i]);
            }
            all.rows = rows;
            all
        })
    }

    /// Returns the biased variance of each channel.
    pub(crate) fn variance(&self) -> impl Iterator<Item = f64> {
        self.squares.iter().map(|squares| squares / self.rows)
    }
}

/// The sums from which the [`Moments`] of rows are computed, added up block by block.
pub(crate) struct MomentAccumulator {
    rows: usize,
    /// The pivot. This and the next four fields have one element for each position of a tile.
    pivot: Vec<f32>,
    sum: Vec<f32>,
    squares: Vec<f32>,
    min: Vec<f32>,
    max: Vec<f32>,
    /// The per-channel totals, to which `sum` is added after at most [`TILES`] tiles. `all_squares`
    /// is the same for `squares`.
    sums: Vec<f64>,
    all_squares: Vec<f64>,
}

impl MomentAccumulator {
    pub(crate) fn new(channels: usize) -> Self {
        let tile = |value| vec![value; tile_rows(channels) * channels];
        Self {
            rows: 0,
            pivot: tile(0.0),
            sum: tile(0.0),
            squares: tile(0.0),
            min: tile(f32::INFINITY),
            max: tile(f32::NEG_INFINITY),
            sums: vec![0.0; channels],
            all_squares: vec![0.0; channels],
        }
    }

    /// Adds a block of rows, which should fit in cache.
    pub(crate) fn add(&mut self, z: &[f32]) {
        let channels = self.sums.len();
        if self.rows == 0 {
            let tiles = PIVOT_ROWS.div_ceil(tile_rows(channels));
            find_pivot(&z[..z.len().min(tiles * self.pivot.len())], self);
        }
        add_rows(z, self);
        self.rows += z.len() / channels;
    }

    /// Returns the moments of all added rows, which `z` must contain.
    pub(crate) fn finish<T: Element>(self, z: &[T]) -> Moments {
        let Self { rows, pivot, mut min, mut max, sums, all_squares, .. } = self;
        let channels = sums.len();
        assert_eq!(z.len(), rows * channels);
        for i in channels..min.len() {
            min[i % channels] = min[i % channels].min(min[i]);
            max[i % channels] = max[i % channels].max(max[i]);
        }
        min.truncate(channels);
        max.truncate(channels);
        let rows = rows as f64;
        let of_channel = |i: usize| {
            let (sum, squares) = (sums[i], all_squares[i]);
            if min[i] == max[i] && squares == 0.0 {
                return (f64::from(min[i]), 0.0);
            }
            let centred = squares - sum * (sum / rows);
            if squares <= MAX_CANCELLATION * centred && MEAN_SQUARES.contains(&(squares / rows)) {
                (f64::from(pivot[i]) + sum / rows, centred)
            } else {
                in_two_passes(z[i..].iter().step_by(channels).map(|z| f64::from(z.float())), rows)
            }
        };
        let (mean, squares) = (0..channels).map(of_channel).unzip();
        Moments { rows, mean, squares, min, max }
    }
}

/// Computes the mean and `Σ(z − mean)²` of one channel.
fn in_two_passes(z: impl Iterator<Item = f64> + Clone, rows: f64) -> (f64, f64) {
    let mean = z.clone().sum::<f64>() / rows;
    (mean, z.map(|z| (z - mean) * (z - mean)).sum())
}

/// Adds `N` tiles at once, because each call loads and stores the sums.
#[inline(always)]
fn add_tiles<const N: usize>(
    tiles: [&[f32]; N],
    pivot: &[f32],
    sum: &mut [f32],
    squares: &mut [f32],
    min: &mut [f32],
    max: &mut [f32],
) {
    let n = tiles[0].len();
    let tiles = tiles.map(|z| &z[..n]);
    let (pivot, sum, squares) = (&pivot[..n], &mut sum[..n], &mut squares[..n]);
    let (min, max) = (&mut min[..n], &mut max[..n]);
    for i in 0..n {
        let (p, mut s, mut q, mut lo, mut hi) = (pivot[i], sum[i], squares[i], min[i], max[i]);
        for z in tiles {
            let difference = z[i] - p;
            s += difference;
            q = difference.mul_add(difference, q);
            lo = if z[i] < lo { z[i] } else { lo };
            hi = if z[i] > hi { z[i] } else { hi };
        }
        (sum[i], squares[i], min[i], max[i]) = (s, q, lo, hi);
    }
}

simd! {
    /// Adds rows to the sums, in `f32` over up to [`TILES`] tiles.
    fn add_rows(z: &[f32], sums: &mut MomentAccumulator) {
        let MomentAccumulator { pivot, sum, squares, min, max, sums, all_squares, .. } = sums;
        let tile = pivot.len();
        for z in z.chunks(TILES * tile) {
            let tiles = z.chunks_exact(4 * tile);
            let rest = tiles.remainder();
            for z in tiles {
                let z = std::array::from_fn::<_, 4, _>(|i| &z[i * tile..][..tile]);
                add_tiles(z, pivot, sum, squares, min, max);
            }
            for z in rest.chunks(tile) {
                add_tiles([z], pivot, sum, squares, min, max);
            }
            fold(sum, sums);
            fold(squares, all_squares);
        }
    }
}

simd! {
    /// Sets the pivot to the mean of some rows. For a constant channel the pivot is exact.
    fn find_pivot(z: &[f32], sums: &mut MomentAccumulator) {
        let MomentAccumulator { pivot, sum, sums, .. } = sums;
        let (c, tile) = (sums.len(), pivot.len());
        for row in pivot.chunks_exact_mut(c) {
            row.copy_from_slice(&z[..c]);
        }
        for z in z.chunks(tile) {
            let (pivot, sum) = (&pivot[..z.len()], &mut sum[..z.len()]);
            for i in 0..z.len() {
                sum[i] += z[i] - pivot[i];
            }
        }
        fold(sum, sums);
        let rows = (z.len() / c) as f64;
        for i in 0..c {
            pivot[i] += (sums[i] / rows) as f32;
            sums[i] = 0.0;
        }
        for start in (c..tile).step_by(c) {
            pivot.copy_within(..c, start);
        }
    }
}
