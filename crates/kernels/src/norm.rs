//! Batch normalization, activation and fake quantization in one pass, with both backward passes.
//!
//! Over `z[…, C]` with `M` rows, per channel (the index is left out):
//!
//! * statistics: `μ = Σz/M`, `V = Σ(z − μ)²/M` ([`channel_stats`]);
//! * forward: `u = scale·z + shift`, `y = Q(φ(u))` ([`forward`]), where batch normalization is
//!   `scale = γ/√(V + ε)` and `shift = β − μ·scale` ([`inv_std`], [`affine`]), and a plain bias is
//!   `scale = 1`;
//! * the gradient of `u`: `g = ∂y·φ'(u)·[Q does not clamp φ(u)]`. `u` is computed again from `z`,
//!   nothing else is kept;
//! * frozen statistics ([`backward_affine`]): `∂z = scale·g`, `∂shift = Σg`;
//! * batch statistics ([`backward_batch`]), which depend on `z` themselves: with
//!   `x̂ = (z − μ)/√(V + ε)`, `∂β = Σg`, `∂γ = Σg·x̂`, `∂z = γ/√(V + ε) · (g − ∂β/M − x̂·∂γ/M)`.
//!
//! Sums are `f32` inside a block that fits in cache and `f64` across blocks.

use crate::cpu::{self, CHUNK, Check, simd, values};
use crate::{Activation, Quantizer, Result, clamp};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use quant_core::Grid;
use std::mem::MaybeUninit;

/// The statistics of a batch, each `[C]`.
#[derive(Clone, Debug)]
pub struct Stats {
    /// The mean `μ`.
    pub mean: Tensor,
    /// The biased variance `V`, over `M` and not `M − 1`.
    pub variance: Tensor,
    /// The smallest element.
    pub min: Tensor,
    /// The largest element.
    pub max: Tensor,
}

/// The gradients of a normalization with batch statistics.
#[derive(Clone, Debug)]
pub struct BatchGrads {
    /// Of the input, of its shape.
    pub z: Tensor,
    /// Of `γ`, `[C]`.
    pub gamma: Tensor,
    /// Of `β`, `[C]`.
    pub beta: Tensor,
}

/// The statistics of each channel of `z[…, C]`, in one pass over memory.
///
/// The relative error of the variance is some 1e-6, also where it is tiny beside the mean, or near the
/// smallest numbers there are; that of a constant channel is exactly 0.
pub fn channel_stats(z: &Tensor) -> Result<Stats> {
    let check = Check("norm::channel_stats");
    check.rows("z", z)?;
    let all = check.float("z", z)?.apply_op1_no_bwd(&ChannelStats)?;
    Ok(Stats { mean: all.get(0)?, variance: all.get(1)?, min: all.get(2)?, max: all.get(3)? })
}

/// `1 / √(variance + epsilon)`.
pub fn inv_std(variance: &Tensor, epsilon: f64) -> Result<Tensor> {
    Ok((variance + epsilon)?.sqrt()?.recip()?)
}

/// Normalization with given statistics as `(scale, shift)`: `γ·inv_std` and `β − mean·scale`.
pub fn affine(gamma: &Tensor, beta: &Tensor, mean: &Tensor, inv_std: &Tensor) -> Result<(Tensor, Tensor)> {
    let scale = (gamma * inv_std)?;
    let shift = (beta - (mean * &scale)?)?;
    Ok((scale, shift))
}

/// `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[C]`.
pub fn forward(
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<Tensor> {
    let check = Check("norm::forward");
    let (_, c) = check.rows("z", z)?;
    check.quantizer(quant)?;
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    Ok(check.float("z", z)?.apply_op3_no_bwd(&scale, &shift, &Forward { act, quant })?)
}

/// The smallest and the largest element of `φ(scale·z + shift)`, `[2]`, without a pass over `z`: exactly
/// those of what [`forward`] gives without a quantizer, as all steps are monotone, rounding included.
pub fn output_range(stats: &Stats, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Tensor> {
    let check = Check("norm::output_range");
    let (_, c) = check.rows("stats.min", &stats.min)?;
    let (min, max) = (check.dims("stats.min", &stats.min, &[c])?, check.dims("stats.max", &stats.max, &[c])?);
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    Ok(min.apply_op2_no_bwd(&max, &OutputRange { scale: &scale, shift: &shift, act })?)
}

/// The gradients of `Q(φ(γ·x̂ + β))` where `mean` and `inv_std` are those of this batch `z`.
pub fn backward_batch(
    z: &Tensor,
    gy: &Tensor,
    gamma: &Tensor,
    beta: &Tensor,
    mean: &Tensor,
    inv_std: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<BatchGrads> {
    let check = Check("norm::backward_batch");
    let (_, c) = check.rows("z", z)?;
    check.quantizer(quant)?;
    let gy = check.dims("gy", gy, z.dims())?;
    let (gamma, beta) = (check.dims("gamma", gamma, &[c])?, check.dims("beta", beta, &[c])?);
    let (mean, inv_std) = (check.dims("mean", mean, &[c])?, check.dims("inv_std", inv_std, &[c])?);
    let z = check.float("z", z)?;
    let (scale, shift) = affine(&gamma, &beta, &mean, &inv_std)?;
    let batch = Batch { scale: &scale, shift: &shift, mean: &mean, inv_std: &inv_std, act, quant };
    let sums = z.apply_op2_no_bwd(&gy, &BatchSums(batch))?;
    let gz = z.apply_op3_no_bwd(&gy, &sums, &BatchGradZ(batch))?;
    Ok(BatchGrads { z: gz, gamma: sums.get(1)?, beta: sums.get(0)? })
}

/// The gradients of `Q(φ(scale·z + shift))` with respect to `z` and `shift`.
pub fn backward_affine(
    z: &Tensor,
    gy: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<(Tensor, Tensor)> {
    let check = Check("norm::backward_affine");
    let (rows, c) = check.rows("z", z)?;
    check.quantizer(quant)?;
    let gy = check.dims("gy", gy, z.dims())?;
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    let op = BackwardAffine { scale: &scale, shift: &shift, act, quant };
    // One tensor comes out of an operation: ∂z, then ∂shift. The copy keeps the small gradient, which
    // lives until the optimizer's step, from holding the memory of the large one.
    let all = check.float("z", z)?.apply_op2_no_bwd(&gy, &op)?;
    let gz = all.narrow(0, 0, rows * c)?.reshape(z.shape())?;
    Ok((gz, all.narrow(0, rows * c, c)?.force_contiguous()?))
}

/// Elements of a tile, at least: small numbers of channels are repeated over several rows up to this
/// length, so that the inner loops are long whatever `C` is.
const TILE: usize = 256;

/// The rows of a tile.
fn tile_rows(c: usize) -> usize {
    TILE.div_ceil(c)
}

/// Elements of a chunk: whole tiles.
fn chunk_len(c: usize) -> usize {
    let tile = tile_rows(c) * c;
    (CHUNK / tile).max(1) * tile
}

/// Per-channel values, repeated over the rows of a tile.
fn tiled(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    let channels = values(tensor)?;
    Ok(channels.repeat(tile_rows(channels.len())))
}

/// The sums over a tile's rows, added to those of the channels, and the tile's sums set back to 0.
#[inline(always)]
fn fold(tile: &mut [f32], channels: &mut [f64]) {
    for row in tile.chunks_mut(channels.len()) {
        for (channel, sum) in channels.iter_mut().zip(row) {
            *channel += f64::from(*sum);
            *sum = 0.0;
        }
    }
}

struct ChannelStats;

/// The moments of some of the rows, per channel.
struct Moments {
    rows: f64,
    mean: Vec<f64>,
    /// `Σ(z − mean)²`.
    squares: Vec<f64>,
    min: Vec<f32>,
    max: Vec<f32>,
}

impl Moments {
    fn none(c: usize) -> Self {
        let (min, max) = (vec![f32::INFINITY; c], vec![f32::NEG_INFINITY; c]);
        Self { rows: 0.0, mean: vec![0.0; c], squares: vec![0.0; c], min, max }
    }
}

simd! {
    /// Adds rows to moments, by the rule of Chan, Golub and LeVeque (1983).
    fn merge(all: &mut Moments, more: &Moments) {
        let rows = all.rows + more.rows;
        let share = more.rows / rows;
        let weight = all.rows * share;
        for i in 0..all.mean.len() {
            let delta = more.mean[i] - all.mean[i];
            all.mean[i] += delta * share;
            all.squares[i] += more.squares[i] + delta * delta * weight;
        }
        for (all, more) in all.min.iter_mut().zip(&more.min) {
            *all = all.min(*more);
        }
        for (all, more) in all.max.iter_mut().zip(&more.max) {
            *all = all.max(*more);
        }
        all.rows = rows;
    }
}

/// Scratch of [`block_moments`], one element per position of a tile.
struct Scratch {
    pivot: Vec<f32>,
    sum: Vec<f32>,
    min: Vec<f32>,
    max: Vec<f32>,
    mean: Vec<f32>,
    scale: Vec<f32>,
    squares: Vec<f32>,
}

impl Scratch {
    fn new(c: usize) -> Self {
        let zeros = || vec![0.0; tile_rows(c) * c];
        Self {
            pivot: zeros(),
            sum: zeros(),
            min: zeros(),
            max: zeros(),
            mean: zeros(),
            scale: zeros(),
            squares: zeros(),
        }
    }
}

/// The power of two that brings numbers up to `range` near 1, so that no square under- or overflows.
#[inline(always)]
fn normalizer(range: f32) -> f32 {
    let exponent = (range.to_bits() >> 23).clamp(1, 253);
    f32::from_bits((254 - exponent) << 23)
}

/// Adds some tiles at a time, as the sums are loaded and stored each time, to the sums of the differences
/// from the pivot, and to the extremes.
#[inline(always)]
fn add_extremes<const N: usize>(
    tiles: [&[f32]; N],
    pivot: &[f32],
    sum: &mut [f32],
    min: &mut [f32],
    max: &mut [f32],
) {
    let n = tiles[0].len();
    let tiles = tiles.map(|z| &z[..n]);
    let (pivot, sum, min, max) = (&pivot[..n], &mut sum[..n], &mut min[..n], &mut max[..n]);
    for i in 0..n {
        let (mut s, mut lo, mut hi) = (sum[i], min[i], max[i]);
        for z in tiles {
            s += z[i] - pivot[i];
            lo = if z[i] < lo { z[i] } else { lo };
            hi = if z[i] > hi { z[i] } else { hi };
        }
        (sum[i], min[i], max[i]) = (s, lo, hi);
    }
}

/// Adds some tiles to the sums of the scaled differences from the mean, and of their squares.
#[inline(always)]
fn add_squares<const N: usize>(
    tiles: [&[f32]; N],
    mean: &[f32],
    scale: &[f32],
    sum: &mut [f32],
    squares: &mut [f32],
) {
    let n = tiles[0].len();
    let tiles = tiles.map(|z| &z[..n]);
    let (mean, scale, sum, squares) = (&mean[..n], &scale[..n], &mut sum[..n], &mut squares[..n]);
    for i in 0..n {
        let (mut s, mut q) = (sum[i], squares[i]);
        for z in tiles {
            let difference = (z[i] - mean[i]) * scale[i];
            s += difference;
            q = difference.mul_add(difference, q);
        }
        (sum[i], squares[i]) = (s, q);
    }
}

simd! {
    /// The moments of a block that fits in cache, in two passes over it. The first sums the differences
    /// from the first row, which gives the mean, exactly so for a constant channel; the second the
    /// differences from that mean and their squares, where the former correct for the mean's rounding.
    fn block_moments(z: &[f32], scratch: &mut Scratch, moments: &mut Moments) {
        let c = moments.mean.len();
        let rows = (z.len() / c) as f64;
        let Scratch { pivot, sum, min, max, mean, scale, squares } = scratch;
        let tile = pivot.len();
        for row in pivot.chunks_exact_mut(c) {
            row.copy_from_slice(&z[..c]);
        }
        sum.fill(0.0);
        min.fill(f32::INFINITY);
        max.fill(f32::NEG_INFINITY);
        let tiles = z.chunks_exact(4 * tile);
        let rest = tiles.remainder();
        for z in tiles {
            add_extremes(std::array::from_fn::<_, 4, _>(|i| &z[i * tile..][..tile]), pivot, sum, min, max);
        }
        for z in rest.chunks(tile) {
            add_extremes([z], pivot, sum, min, max);
        }
        moments.rows = rows;
        moments.mean.fill(0.0);
        fold(sum, &mut moments.mean);
        moments.min.copy_from_slice(&min[..c]);
        moments.max.copy_from_slice(&max[..c]);
        for (min, max) in min.chunks_exact(c).zip(max.chunks_exact(c)).skip(1) {
            for i in 0..c {
                moments.min[i] = moments.min[i].min(min[i]);
                moments.max[i] = moments.max[i].max(max[i]);
            }
        }
        for i in 0..c {
            mean[i] = pivot[i] + (moments.mean[i] / rows) as f32;
            scale[i] = normalizer(moments.max[i] - moments.min[i]);
        }
        for start in (c..tile).step_by(c) {
            mean.copy_within(..c, start);
            scale.copy_within(..c, start);
        }
        squares.fill(0.0);
        let tiles = z.chunks_exact(4 * tile);
        for z in tiles {
            add_squares(std::array::from_fn::<_, 4, _>(|i| &z[i * tile..][..tile]), mean, scale, sum, squares);
        }
        for z in rest.chunks(tile) {
            add_squares([z], mean, scale, sum, squares);
        }
        moments.mean.fill(0.0);
        moments.squares.fill(0.0);
        fold(sum, &mut moments.mean);
        fold(squares, &mut moments.squares);
        for i in 0..c {
            let correction = moments.mean[i] / rows;
            let unit = f64::from(1.0 / scale[i]);
            let squares = moments.squares[i] - rows * correction * correction;
            // Never below 0 by rounding; NaN stays.
            let squares = if squares < 0.0 { 0.0 } else { squares };
            moments.squares[i] = squares * (unit * unit);
            moments.mean[i] = f64::from(mean[i]) + correction * unit;
        }
    }
}

impl CustomOp1 for ChannelStats {
    fn name(&self) -> &'static str {
        "channel-stats"
    }

    fn cpu_fwd(&self, z: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let z = cpu::slice(z, layout)?;
        let c = layout.dims()[layout.dims().len() - 1];
        let rows = z.len() / c;
        let mut all = Moments::none(c);
        let parts = cpu::parts(rows, c, |part| {
            let (mut all, mut block, mut scratch) = (Moments::none(c), Moments::none(c), Scratch::new(c));
            for z in z[part.start * c..part.end * c].chunks(chunk_len(c)) {
                block_moments(z, &mut scratch, &mut block);
                merge(&mut all, &block);
            }
            all
        });
        parts.iter().for_each(|part| merge(&mut all, part));
        let mut stats: Vec<f32> = all.mean.iter().map(|mean| *mean as f32).collect();
        stats.extend(all.squares.iter().map(|squares| (squares / rows as f64) as f32));
        stats.extend(all.min);
        stats.extend(all.max);
        cpu::output(stats, (4, c))
    }
}

struct Forward<'a> {
    act: Activation,
    quant: Option<Quantizer<'a>>,
}

simd! {
    fn normalize(
        z: &[f32],
        y: &mut [MaybeUninit<f32>],
        scale: &[f32],
        shift: &[f32],
        bounds: (f32, f32),
        grid: Option<Grid>,
    ) {
        #[inline(always)]
        fn tiles(z: &[f32], y: &mut [MaybeUninit<f32>], scale: &[f32], shift: &[f32], f: impl Fn(f32) -> f32) {
            for (z, y) in z.chunks(scale.len()).zip(y.chunks_mut(scale.len())) {
                for (((y, z), scale), shift) in y.iter_mut().zip(z).zip(scale).zip(shift) {
                    y.write(f(z.mul_add(*scale, *shift)));
                }
            }
        }
        match grid {
            None => tiles(z, y, scale, shift, |u| clamp(u, bounds)),
            Some(grid) => tiles(z, y, scale, shift, |u| grid.fake(clamp(u, bounds))),
        }
    }
}

impl CustomOp3 for Forward<'_> {
    fn name(&self) -> &'static str {
        "norm-forward"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let z = cpu::slice(z, layout)?;
        let (scale, shift) = (cpu::slice(scale, scale_layout)?, cpu::slice(shift, shift_layout)?);
        let c = scale.len();
        let (scale, shift) = (scale.repeat(tile_rows(c)), shift.repeat(tile_rows(c)));
        let grid = self.quant.map(cpu::grid).transpose()?;
        let chunk = chunk_len(c);
        // SAFETY: `normalize` writes all of `y`, which is as long as its part of `z`.
        #[allow(unsafe_code)]
        let y = unsafe {
            cpu::fill_uninit(z.len(), chunk, |i, y| {
                normalize(&z[i * chunk..][..y.len()], y, &scale, &shift, self.act.bounds(), grid);
            })
        };
        cpu::output(y, layout.shape())
    }
}

struct OutputRange<'a> {
    scale: &'a Tensor,
    shift: &'a Tensor,
    act: Activation,
}

impl CustomOp2 for OutputRange<'_> {
    fn name(&self) -> &'static str {
        "norm-output-range"
    }

    fn cpu_fwd(
        &self,
        min: &CpuStorage,
        min_layout: &Layout,
        max: &CpuStorage,
        max_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (scale, shift) = (values(self.scale)?, values(self.shift)?);
        let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
        for extremes in [cpu::slice(min, min_layout)?, cpu::slice(max, max_layout)?] {
            for ((z, scale), shift) in extremes.iter().zip(&scale).zip(&shift) {
                let y = self.act.apply(z.mul_add(*scale, *shift));
                lo = lo.min(y);
                hi = hi.max(y);
            }
        }
        cpu::output(vec![lo, hi], 2)
    }
}

/// Batch normalization, activation and quantizer, as their backward kernels need them.
#[derive(Clone, Copy)]
struct Batch<'a> {
    scale: &'a Tensor,
    shift: &'a Tensor,
    mean: &'a Tensor,
    inv_std: &'a Tensor,
    act: Activation,
    quant: Option<Quantizer<'a>>,
}

/// Where the gradient passes through activation and quantizer. Strictly inside the activation's bounds
/// `φ(u) = u`.
#[derive(Clone, Copy)]
struct Gate {
    bounds: (f32, f32),
    grid: Option<Grid>,
}

impl Gate {
    fn new(act: Activation, quant: Option<Quantizer<'_>>) -> candle_core::Result<Self> {
        Ok(Self { bounds: act.bounds(), grid: quant.map(cpu::grid).transpose()? })
    }
}

/// The gradient at `u` of the gated function.
#[inline(always)]
fn gated(u: f32, gy: f32, (lo, hi): (f32, f32), passes: impl Fn(f32) -> bool) -> f32 {
    if (lo < u) & (u < hi) & passes(u) { gy } else { 0.0 }
}

/// `Σg` and `Σg·x̂`, `[2, C]`: the gradients of `β` and `γ`.
struct BatchSums<'a>(Batch<'a>);

simd! {
    /// Adds `g` and `g·(z − mean)` of some rows to the sums of a tile.
    fn add_batch_sums(
        z: &[f32],
        gy: &[f32],
        scale: &[f32],
        shift: &[f32],
        mean: &[f32],
        gate: Gate,
        sum: &mut [f32],
        product: &mut [f32],
    ) {
        #[inline(always)]
        fn tiles(
            z: &[f32],
            gy: &[f32],
            [scale, shift, mean]: [&[f32]; 3],
            [sum, product]: [&mut [f32]; 2],
            g: impl Fn(f32, f32) -> f32,
        ) {
            for (z, gy) in z.chunks(scale.len()).zip(gy.chunks(scale.len())) {
                let n = z.len();
                let (gy, scale, shift, mean) = (&gy[..n], &scale[..n], &shift[..n], &mean[..n]);
                let (sum, product) = (&mut sum[..n], &mut product[..n]);
                for i in 0..n {
                    let g = g(z[i].mul_add(scale[i], shift[i]), gy[i]);
                    sum[i] += g;
                    product[i] = g.mul_add(z[i] - mean[i], product[i]);
                }
            }
        }
        let (channels, sums, bounds) = ([scale, shift, mean], [sum, product], gate.bounds);
        match gate.grid {
            None => tiles(z, gy, channels, sums, |u, gy| gated(u, gy, bounds, |_| true)),
            Some(grid) => tiles(z, gy, channels, sums, |u, gy| gated(u, gy, bounds, |u| grid.passes(u))),
        }
    }
}

impl CustomOp2 for BatchSums<'_> {
    fn name(&self) -> &'static str {
        "norm-backward-batch-sums"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        layout: &Layout,
        gy: &CpuStorage,
        gy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Batch { scale, shift, mean, inv_std, act, quant } = self.0;
        let (z, gy) = (cpu::slice(z, layout)?, cpu::slice(gy, gy_layout)?);
        let inv_std = values(inv_std)?;
        let c = inv_std.len();
        let (scale, shift, mean) = (tiled(scale)?, tiled(shift)?, tiled(mean)?);
        let gate = Gate::new(act, quant)?;
        let parts = cpu::parts(z.len() / c, c, |part| {
            let part = part.start * c..part.end * c;
            let (mut sums, mut products) = (vec![0.0; c], vec![0.0; c]);
            let (mut sum, mut product) = (vec![0.0; scale.len()], vec![0.0; scale.len()]);
            for (z, gy) in z[part.clone()].chunks(chunk_len(c)).zip(gy[part].chunks(chunk_len(c))) {
                add_batch_sums(z, gy, &scale, &shift, &mean, gate, &mut sum, &mut product);
                fold(&mut sum, &mut sums);
                fold(&mut product, &mut products);
            }
            (sums, products)
        });
        let mut all = vec![0.0; 2 * c];
        for i in 0..c {
            all[i] = parts.iter().map(|(sums, _)| sums[i]).sum::<f64>() as f32;
            let products = parts.iter().map(|(_, products)| products[i]).sum::<f64>();
            all[c + i] = (products * f64::from(inv_std[i])) as f32;
        }
        cpu::output(all, (2, c))
    }
}

/// `∂z`, from `z`, `∂y` and the sums.
struct BatchGradZ<'a>(Batch<'a>);

simd! {
    /// `∂z = scale·g + slope·(z − mean) + offset`.
    fn batch_grad_z(
        z: &[f32],
        gy: &[f32],
        gz: &mut [f32],
        scale: &[f32],
        shift: &[f32],
        mean: &[f32],
        slope: &[f32],
        offset: &[f32],
        gate: Gate,
    ) {
        #[inline(always)]
        fn tiles(
            z: &[f32],
            gy: &[f32],
            gz: &mut [f32],
            [scale, shift, mean, slope, offset]: [&[f32]; 5],
            g: impl Fn(f32, f32) -> f32,
        ) {
            let tile = scale.len();
            for ((z, gy), gz) in z.chunks(tile).zip(gy.chunks(tile)).zip(gz.chunks_mut(tile)) {
                let n = z.len();
                let (gy, gz) = (&gy[..n], &mut gz[..n]);
                let (scale, shift, mean) = (&scale[..n], &shift[..n], &mean[..n]);
                let (slope, offset) = (&slope[..n], &offset[..n]);
                for i in 0..n {
                    let g = g(z[i].mul_add(scale[i], shift[i]), gy[i]);
                    gz[i] = scale[i].mul_add(g, slope[i].mul_add(z[i] - mean[i], offset[i]));
                }
            }
        }
        let (channels, bounds) = ([scale, shift, mean, slope, offset], gate.bounds);
        match gate.grid {
            None => tiles(z, gy, gz, channels, |u, gy| gated(u, gy, bounds, |_| true)),
            Some(grid) => tiles(z, gy, gz, channels, |u, gy| gated(u, gy, bounds, |u| grid.passes(u))),
        }
    }
}

impl CustomOp3 for BatchGradZ<'_> {
    fn name(&self) -> &'static str {
        "norm-backward-batch"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        layout: &Layout,
        gy: &CpuStorage,
        gy_layout: &Layout,
        sums: &CpuStorage,
        sums_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Batch { scale, shift, mean, inv_std, act, quant } = self.0;
        let (z, gy) = (cpu::slice(z, layout)?, cpu::slice(gy, gy_layout)?);
        let (scale, shift, mean, inv_std) = (tiled(scale)?, tiled(shift)?, tiled(mean)?, tiled(inv_std)?);
        let (sums, products) = cpu::slice(sums, sums_layout)?.split_at(sums_layout.dims()[1]);
        let c = sums.len();
        let rows = (z.len() / c) as f32;
        let slope: Vec<f32> =
            (0..scale.len()).map(|i| -scale[i] * inv_std[i] * (products[i % c] / rows)).collect();
        let offset: Vec<f32> = (0..scale.len()).map(|i| -scale[i] * (sums[i % c] / rows)).collect();
        let gate = Gate::new(act, quant)?;
        let chunk = chunk_len(c);
        let gz = cpu::fill(z.len(), chunk, |i, gz| {
            let (z, gy) = (&z[i * chunk..][..gz.len()], &gy[i * chunk..][..gz.len()]);
            batch_grad_z(z, gy, gz, &scale, &shift, &mean, &slope, &offset, gate);
        });
        cpu::output(gz, layout.shape())
    }
}

/// `∂z`, then `∂shift`, in one vector.
struct BackwardAffine<'a> {
    scale: &'a Tensor,
    shift: &'a Tensor,
    act: Activation,
    quant: Option<Quantizer<'a>>,
}

simd! {
    /// `∂z = scale·g`, and adds `g` to the sums of a tile.
    fn affine_grads(
        z: &[f32],
        gy: &[f32],
        gz: &mut [f32],
        scale: &[f32],
        shift: &[f32],
        gate: Gate,
        sum: &mut [f32],
    ) {
        #[inline(always)]
        fn tiles(
            z: &[f32],
            gy: &[f32],
            gz: &mut [f32],
            [scale, shift]: [&[f32]; 2],
            sum: &mut [f32],
            g: impl Fn(f32, f32) -> f32,
        ) {
            let tile = scale.len();
            for ((z, gy), gz) in z.chunks(tile).zip(gy.chunks(tile)).zip(gz.chunks_mut(tile)) {
                let n = z.len();
                let (gy, gz, sum) = (&gy[..n], &mut gz[..n], &mut sum[..n]);
                let (scale, shift) = (&scale[..n], &shift[..n]);
                for i in 0..n {
                    let g = g(z[i].mul_add(scale[i], shift[i]), gy[i]);
                    gz[i] = scale[i] * g;
                    sum[i] += g;
                }
            }
        }
        let (channels, bounds) = ([scale, shift], gate.bounds);
        match gate.grid {
            None => tiles(z, gy, gz, channels, sum, |u, gy| gated(u, gy, bounds, |_| true)),
            Some(grid) => tiles(z, gy, gz, channels, sum, |u, gy| gated(u, gy, bounds, |u| grid.passes(u))),
        }
    }
}

impl CustomOp2 for BackwardAffine<'_> {
    fn name(&self) -> &'static str {
        "norm-backward-affine"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        layout: &Layout,
        gy: &CpuStorage,
        gy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (z, gy) = (cpu::slice(z, layout)?, cpu::slice(gy, gy_layout)?);
        let (scale, shift) = (tiled(self.scale)?, tiled(self.shift)?);
        let gate = Gate::new(self.act, self.quant)?;
        let c = layout.dims()[layout.dims().len() - 1];
        // Larger chunks than elsewhere, as each leaves sums to add up.
        let chunk = 4 * chunk_len(c);
        let scratch = || vec![0.0; scale.len()];
        let (mut all, sums) = cpu::generate(z.len(), c, chunk, scratch, |sum, i, gz| {
            let (z, gy) = (&z[i * chunk..][..gz.len()], &gy[i * chunk..][..gz.len()]);
            affine_grads(z, gy, gz, &scale, &shift, gate, sum);
            let mut channels = vec![0.0; c];
            fold(sum, &mut channels);
            channels
        });
        all.extend((0..c).map(|i| sums.iter().map(|channels| channels[i]).sum::<f64>() as f32));
        let len = all.len();
        cpu::output(all, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize;
    use crate::testing::*;
    use quant_core::Bits;

    const ACTIVATIONS: [Activation; 3] = [Activation::Identity, Activation::Relu, Activation::Relu6];

    fn activate(u: &Tensor, act: Activation) -> candle_core::Result<Tensor> {
        match act {
            Activation::Identity => Ok(u.clone()),
            Activation::Relu => u.relu(),
            Activation::Relu6 => u.clamp(0.0, 6.0),
        }
    }

    /// `φ(scale·z + shift)`, by plain Candle operations.
    fn reference(z: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> candle_core::Result<Tensor> {
        activate(&z.broadcast_mul(scale)?.broadcast_add(shift)?, act)
    }

    /// `φ(γ·x̂ + β)` with the statistics of `z` itself.
    fn batch_reference(
        z: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        act: Activation,
    ) -> candle_core::Result<Tensor> {
        let c = gamma.elem_count();
        let rows = z.reshape(((), c))?;
        let centered = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
        let std = (centered.sqr()?.mean_keepdim(0)? + EPSILON)?.sqrt()?;
        reference(&centered.broadcast_div(&std)?.reshape(z.shape())?, gamma, beta, act)
    }

    const EPSILON: f64 = 1e-5;

    /// Where a quantizer passes the gradient, as a factor. In a reference, `y·mask` has the
    /// straight-through gradient of `Q(y)`.
    fn mask(y: &Tensor, quant: Option<Quantizer<'_>>) -> Tensor {
        let ones = y.ones_like().unwrap();
        quant.map_or(ones.clone(), |quant| quantize::backward(y, &ones, quant).unwrap())
    }

    /// Calls `f` for all activations, with and without quantizer, at many shapes.
    fn for_all(f: impl Fn(&[usize], Activation, Option<Quantizer<'_>>, &str)) {
        let range = tensor(&[-0.5, 2.5]);
        let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
        for (n, h, w) in MAPS {
            for c in CHANNELS {
                for act in ACTIVATIONS {
                    for quant in [None, Some(quant)] {
                        let context =
                            format!("{n}×{h}×{w}×{c}, {act:?}, {:?}", quant.map(|quant| quant.bits));
                        f(&[n, h, w, c], act, quant, &context);
                    }
                }
            }
        }
    }

    /// `[C]` values around `middle`.
    fn channels(seed: u64, c: usize, middle: f64) -> Tensor {
        (random(seed, &[c]) + middle).unwrap()
    }

    #[test]
    fn forward_and_its_range_match_the_reference() {
        for_all(|dims, act, quant, context| {
            let (z, scale, shift) = (random(1, dims), channels(2, dims[3], 3.0), channels(3, dims[3], 1.0));
            let y = forward(&z, &scale, &shift, act, None).unwrap();
            assert_close(&y, &reference(&z, &scale, &shift, act).unwrap(), 1e-6, context);
            let range = output_range(&channel_stats(&z).unwrap(), &scale, &shift, act).unwrap();
            assert_eq!(elements(&range), elements(&quantize::min_max(&y).unwrap()), "{context}");
            if let Some(quant) = quant {
                let quantized = forward(&z, &scale, &shift, act, Some(quant)).unwrap();
                assert_eq!(
                    elements(&quantized),
                    elements(&quantize::forward(&y, quant).unwrap()),
                    "{context}"
                );
            }
        });
    }

    #[test]
    fn range_of_negative_scales() {
        let z = random(1, &[50, 4]);
        let (scale, shift) = (tensor(&[-2.0, 0.0, 1e-3, -0.5]), tensor(&[0.1, -0.2, 0.3, -4.0]));
        for act in ACTIVATIONS {
            let y = forward(&z, &scale, &shift, act, None).unwrap();
            let range = output_range(&channel_stats(&z).unwrap(), &scale, &shift, act).unwrap();
            assert_eq!(elements(&range), elements(&quantize::min_max(&y).unwrap()));
        }
    }

    #[test]
    fn affine_gradients_match_the_reference() {
        for_all(|dims, act, quant, context| {
            let (z, gy) = (random(1, dims), random(4, dims));
            let (scale, shift) = (channels(2, dims[3], 3.0), channels(3, dims[3], 1.0));
            let mask = mask(&forward(&z, &scale, &shift, act, None).unwrap(), quant);
            let (gz, gshift) = backward_affine(&z, &gy, &scale, &shift, act, quant).unwrap();
            let gy = (gy * mask).unwrap();
            let wide = scale.to_dtype(candle_core::DType::F64).unwrap();
            let reference = |inputs: &[Tensor]| reference(&inputs[0], &wide, &inputs[1], act);
            assert_gradients(&[&z, &shift], &gy, reference, &[&gz, &gshift], context);
        });
    }

    #[test]
    fn batch_gradients_match_the_reference() {
        for_all(|dims, act, quant, context| {
            // With few rows the gradients of z are differences of nearly equal numbers.
            if dims[0] * dims[1] * dims[2] < 6 {
                return;
            }
            let (z, gy) = (random(1, dims), random(4, dims));
            let (gamma, beta) = (channels(2, dims[3], 2.0), channels(3, dims[3], 1.0));
            let stats = channel_stats(&z).unwrap();
            let inv_std = inv_std(&stats.variance, EPSILON).unwrap();
            let (scale, shift) = affine(&gamma, &beta, &stats.mean, &inv_std).unwrap();
            let y = forward(&z, &scale, &shift, act, None).unwrap();
            assert_close(&y, &batch_reference(&z, &gamma, &beta, act).unwrap(), 1e-5, context);
            let grads = backward_batch(&z, &gy, &gamma, &beta, &stats.mean, &inv_std, act, quant).unwrap();
            let gy = (gy * mask(&y, quant)).unwrap();
            let reference = |inputs: &[Tensor]| batch_reference(&inputs[0], &inputs[1], &inputs[2], act);
            let found = [&grads.z, &grads.gamma, &grads.beta];
            assert_gradients(&[&z, &gamma, &beta], &gy, reference, &found, context);
        });
    }

    /// Asserts that the statistics are those of a two-pass computation in `f64`.
    #[track_caller]
    fn assert_stats(values: &[f32], c: usize) {
        let z = Tensor::new(values, &candle_core::Device::Cpu).unwrap().reshape(((), c)).unwrap();
        let stats = channel_stats(&z).unwrap();
        let rows = (values.len() / c) as f64;
        let [mean, variance, min, max] =
            [stats.mean, stats.variance, stats.min, stats.max].map(|t| elements(&t));
        for i in 0..c {
            let channel = || values.iter().skip(i).step_by(c).map(|z| f64::from(*z));
            let exact_mean = channel().sum::<f64>() / rows;
            let exact = channel().map(|z| (z - exact_mean).powi(2)).sum::<f64>() / rows;
            assert!(
                (mean[i] - exact_mean).abs() <= 1e-7 * exact_mean.abs() + 1e-6 * exact.sqrt(),
                "mean of {i}"
            );
            // Half a unit of the smallest subnormal number is as near as f32 comes.
            let tolerance = 3e-6 * exact + 1e-45;
            assert!((variance[i] - exact).abs() <= tolerance, "{} and not {exact} of {i}", variance[i]);
            assert_eq!(min[i], channel().fold(f64::INFINITY, f64::min));
            assert_eq!(max[i], channel().fold(f64::NEG_INFINITY, f64::max));
        }
    }

    #[test]
    fn statistics_are_accurate_at_every_scale() {
        for (rows, c) in [(1, 3), (2, 1), (7, 16), (1000, 33), (9001, 48), (333, 1280), (400_000, 1)] {
            let noise = elements(&random(rows as u64, &[rows, c]));
            let values = |f: &dyn Fn(usize, f64) -> f64| -> Vec<f32> {
                noise.iter().enumerate().map(|(i, noise)| f(i % c, *noise) as f32).collect()
            };
            assert_stats(&values(&|_, noise| noise), c);
            // Means far from 0, against which the variance is tiny.
            assert_stats(&values(&|channel, noise| 1.0 + channel as f64 + 1e-5 * noise), c);
            assert_stats(&values(&|channel, noise| 1e4 + channel as f64 + 0.05 * noise), c);
            // Variances down to 1e-42, below the smallest normal number, beside channels of order 1.
            assert_stats(&values(&|channel, noise| 10f64.powi(-(channel as i32 % 22)) * noise), c);
            assert_stats(&values(&|channel, noise| 10f64.powi(15 - channel as i32 % 30) * (noise + 0.5)), c);
            // Few elements that are not 0, as after a rectifier.
            assert_stats(&values(&|_, noise| if noise > 0.99 { noise } else { 0.0 }), c);
        }
    }

    #[test]
    fn constant_channels_have_no_variance() {
        for (rows, c) in [(3, 5), (100_003, 3), (700, 1280)] {
            let values: Vec<f32> = (0..rows * c).map(|i| 0.1 + (i % c) as f32 * 1.7e-3).collect();
            let z = Tensor::from_vec(values, (rows, c), &candle_core::Device::Cpu).unwrap();
            let stats = channel_stats(&z).unwrap();
            assert!(elements(&stats.variance).iter().all(|variance| *variance == 0.0));
            assert_eq!(elements(&stats.mean), elements(&z.get(0).unwrap()));
        }
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let z = tensor(&[1.0, f32::NAN, 2.0, 3.0]).reshape((4, 1)).unwrap();
        let stats = channel_stats(&z).unwrap();
        assert!(elements(&stats.mean)[0].is_nan());
        assert!(elements(&stats.variance)[0].is_nan());
        let one = tensor(&[1.0]);
        for act in ACTIVATIONS {
            assert!(elements(&forward(&z, &one, &one, act, None).unwrap())[1].is_nan());
        }
    }

    #[test]
    fn same_bits_everywhere() {
        let range = tensor(&[0.0, 2.5]);
        let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
        for dims in LARGE {
            let (z, gy) = (random(1, &dims), random(2, &dims));
            let (gamma, beta) = (channels(3, dims[3], 1.5), channels(4, dims[3], 0.5));
            for quant in [None, Some(quant)] {
                assert_same_everywhere(|| {
                    let stats = channel_stats(&z).unwrap();
                    let inv_std = inv_std(&stats.variance, EPSILON).unwrap();
                    let (scale, shift) = affine(&gamma, &beta, &stats.mean, &inv_std).unwrap();
                    let act = Activation::Relu6;
                    let y = forward(&z, &scale, &shift, act, quant).unwrap();
                    let batch =
                        backward_batch(&z, &gy, &gamma, &beta, &stats.mean, &inv_std, act, quant).unwrap();
                    let (gz, gshift) = backward_affine(&z, &gy, &scale, &shift, act, quant).unwrap();
                    let Stats { mean, variance, min, max } = stats;
                    vec![mean, variance, min, max, y, batch.z, batch.gamma, batch.beta, gz, gshift]
                });
            }
        }
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (z, short, long) = (random(1, &[4, 3]), random(2, &[2]), random(3, &[3]));
        let message = forward(&z, &long, &short, Activation::Relu, None).unwrap_err().to_string();
        assert_eq!(message, "norm::forward: shift has shape [2], expected [3]");
        let quant = Quantizer { range: &long, bits: Bits::new(4).unwrap() };
        let message = forward(&z, &long, &long, Activation::Relu, Some(quant)).unwrap_err().to_string();
        assert_eq!(message, "norm::forward: range has shape [3], expected [2]");
        assert!(channel_stats(&random(1, &[0, 3])).is_err());
    }
}
