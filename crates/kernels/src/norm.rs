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
//! * frozen statistics ([`Epilogue::affine`]): `∂z = scale·g`, `∂shift = Σg`;
//! * batch statistics ([`Epilogue::batch`]), which depend on `z` themselves: with
//!   `x̂ = (z − μ)/√(V + ε)`, `∂β = Σg`, `∂γ = Σg·x̂`, `∂z = γ/√(V + ε) · (g − ∂β/M − x̂·∂γ/M)`.
//!
//! Sums are `f32` inside a block that fits in cache and `f64` across blocks. On a GPU they are `f32` over the few
//! rows that a thread has in registers, and `f64` across these.

pub(crate) mod gpu;

use crate::cpu::{self, CHUNK, Check, simd, values};
use crate::feature::byte;
use crate::moments::{MomentSums, Moments};
use crate::{Activation, FeatureMap, Quantizer, Result, clamp, profile};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Shape, Tensor};
use quant_core::{Bits, Grid};
use std::mem::MaybeUninit;
use std::ops::Range;

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

/// A batch normalization as the forward pass applies it with the statistics of a batch; each `[C]`.
#[derive(Clone, Debug)]
pub struct Normalization {
    /// The mean `μ`.
    pub mean: Tensor,
    /// `1/√(V + ε)`.
    pub inv_std: Tensor,
    /// `γ/√(V + ε)`.
    pub scale: Tensor,
    /// `β − μ·scale`.
    pub shift: Tensor,
}

/// Running statistics, each `[C]`: moving averages of the batches' means and unbiased variances.
#[derive(Clone, Debug)]
pub struct Running {
    /// Of the means.
    pub mean: Tensor,
    /// Of the variances, over `M − 1`.
    pub variance: Tensor,
}

/// The statistics of each channel of `z[…, C]`, in one pass over memory.
///
/// The relative error of the variance is some 1e-6, also where it is tiny beside the mean, or near the
/// smallest numbers there are; that of a constant channel is exactly 0.
pub fn channel_stats(z: &Tensor) -> Result<Stats> {
    let check = Check("norm::channel_stats");
    check.rows("z", z)?;
    let _note = profile::note(check.0, 0, 4 * z.elem_count());
    let z = check.map_float("z", z)?;
    if crate::gpu::runs(z.device()) {
        return gpu::channel_stats(&z);
    }
    let opened = cpu::open(&z);
    let (z, c) = (opened.floats()?, opened.dims()[opened.dims().len() - 1]);
    let parts = cpu::parts(z.len() / c, c, |part| {
        let z = &z[part.start * c..part.end * c];
        let mut sums = MomentSums::new(c);
        z.chunks(chunk_len(c)).for_each(|z| sums.add(z));
        sums.moments(z)
    });
    Stats::of_parts(parts)
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

impl Normalization {
    /// With the statistics of a batch.
    pub fn new(stats: &Stats, gamma: &Tensor, beta: &Tensor, epsilon: f64) -> Result<Self> {
        let inv_std = inv_std(&stats.variance, epsilon)?;
        let (scale, shift) = affine(gamma, beta, &stats.mean, &inv_std)?;
        Ok(Self { mean: stats.mean.clone(), inv_std, scale, shift })
    }

    fn checked(&self, check: &Check, c: usize) -> Result<Self> {
        Ok(Self {
            mean: check.dims("mean", &self.mean, &[c])?,
            inv_std: check.dims("inv_std", &self.inv_std, &[c])?,
            scale: check.dims("scale", &self.scale, &[c])?,
            shift: check.dims("shift", &self.shift, &[c])?,
        })
    }
}

/// What a training step needs of a batch normalization: [`Normalization::new`], and the running statistics after
/// this batch of `rows` rows, moved towards it by `momentum`.
pub fn prepare(
    stats: &Stats,
    gamma: &Tensor,
    beta: &Tensor,
    epsilon: f64,
    running: &Running,
    momentum: f64,
    rows: usize,
) -> Result<(Normalization, Running)> {
    // From the biased variance to the unbiased one.
    let unbias = rows as f64 / (rows.max(2) - 1) as f64;
    if crate::gpu::runs(stats.mean.device()) {
        return gpu::prepare(stats, gamma, beta, epsilon, running, momentum, unbias);
    }
    let moved = |old: &Tensor, new: &Tensor| old + ((new - old)? * momentum)?;
    let running = Running {
        mean: moved(&running.mean, &stats.mean)?,
        variance: moved(&running.variance, &(&stats.variance * unbias)?)?,
    };
    Ok((Normalization::new(stats, gamma, beta, epsilon)?, running))
}

/// `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[C]`.
pub fn forward(
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let check = Check("norm::forward");
    let (rows, c) = check.rows("z", z)?;
    let written = if quant.is_some() { 1 } else { 4 };
    let _note = profile::note(check.0, 0, (4 + written) * rows * c);
    let tensor = check.map_float("z", z)?;
    if crate::gpu::runs(z.device()) {
        return gpu::forward(&check, &tensor, scale, shift, act, quant);
    }
    let normalizer = Normalizer::new(&check, c, scale, shift, act, quant)?;
    let opened = cpu::open(&tensor);
    let z = opened.floats()?;
    let part = |rows: Range<usize>| &z[rows.start * c..rows.end * c];
    let per_block = chunk_len(c) / c;
    // SAFETY: the normalizer writes all of `y`, which is as long as its part of `z`.
    #[allow(unsafe_code)]
    unsafe {
        match quant {
            None => {
                let fill = |(): &mut (), rows, y: &mut [_]| normalizer.floats(part(rows), y);
                let (y, _) = cpu::blocks((rows, c), per_block, || (), fill);
                Ok(FeatureMap::Float(Tensor::from_vec(y, tensor.dims(), &Device::Cpu)?))
            }
            Some(quant) => {
                let fill = |(): &mut (), rows, y: &mut [_]| normalizer.levels(part(rows), y);
                let (y, _) = cpu::blocks((rows, c), per_block, || (), fill);
                FeatureMap::of_levels(y, tensor.dims(), quant)
            }
        }
    }
}

/// The smallest and the largest element of `φ(scale·z + shift)`, `[2]`, without a pass over `z`: exactly
/// those of what [`forward`] gives without a quantizer, as all steps are monotone, rounding included.
pub fn output_range(stats: &Stats, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Tensor> {
    let check = Check("norm::output_range");
    let (_, c) = check.rows("stats.min", &stats.min)?;
    let (min, max) = (check.dims("stats.min", &stats.min, &[c])?, check.dims("stats.max", &stats.max, &[c])?);
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    if crate::gpu::runs(min.device()) {
        return gpu::output_range(&min, &max, &scale, &shift, act);
    }
    Ok(min.apply_op2_no_bwd(&max, &OutputRange { scale: &scale, shift: &shift, act })?)
}

/// What follows a convolution's output `z[…, C]` in a training step, `y = Q(φ(scale·z + shift))`, as its gradients need
/// it.
#[derive(Clone, Debug)]
pub struct Epilogue {
    pub(crate) z: Tensor,
    pub(crate) scale: Tensor,
    pub(crate) shift: Tensor,
    /// The mean and `1/√(V + ε)` of `z` itself; none where scale and shift do not depend on it.
    batch: Option<[Tensor; 2]>,
    pub(crate) act: Activation,
    /// The quantizer's range and bits.
    quant: Option<(Tensor, Bits)>,
}

/// The gradient of a feature map `y[…, C]`.
#[derive(Clone, Debug)]
pub struct Gradient {
    /// `∂y`.
    pub tensor: Tensor,
    /// What the [`Epilogue`] that made `y` needs of it, if it was summed up while it was in cache; of use to no other.
    pub(crate) sums: Option<Sums>,
}

/// `Σg` and `Σg·(z − mean)` of each channel.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    g: Vec<f64>,
    products: Vec<f64>,
}

/// The gradients of an [`Epilogue`].
pub struct Grads {
    /// Of the convolution's output, not computed yet.
    pub z: OutputGradient,
    /// Of `γ`, `[C]`, where normalization has the statistics of the batch.
    pub gamma: Option<Tensor>,
    /// Of `β` or the shift, `[C]`.
    pub shift: Tensor,
}

impl From<Tensor> for Gradient {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, sums: None }
    }
}

impl Epilogue {
    /// Where `norm` has the statistics of this batch `z`: `Q(φ(γ·x̂ + β))`.
    pub fn batch(
        z: &Tensor,
        norm: &Normalization,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        let check = Check("norm::Epilogue::batch");
        let (_, c) = check.rows("z", z)?;
        let Normalization { mean, inv_std, scale, shift } = norm.checked(&check, c)?;
        Self::new(&check, z, [scale, shift], Some([mean, inv_std]), act, quant)
    }

    /// Where `scale` and `shift`, `[C]`, do not depend on `z`.
    pub fn affine(
        z: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        let check = Check("norm::Epilogue::affine");
        let (_, c) = check.rows("z", z)?;
        let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
        Self::new(&check, z, [scale, shift], None, act, quant)
    }

    fn new(
        check: &Check,
        z: &Tensor,
        [scale, shift]: [Tensor; 2],
        batch: Option<[Tensor; 2]>,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        check.quantizer(quant)?;
        let quant = quant.map(|quant| (quant.range.clone(), quant.bits));
        Ok(Self { z: check.map_float("z", z)?, scale, shift, batch, act, quant })
    }

    pub(crate) fn mean(&self) -> Option<&Tensor> {
        self.batch.as_ref().map(|[mean, _]| mean)
    }

    pub(crate) fn inv_std(&self) -> Option<&Tensor> {
        self.batch.as_ref().map(|[_, inv_std]| inv_std)
    }

    pub(crate) fn quantizer(&self) -> Option<Quantizer<'_>> {
        self.quant.as_ref().map(|(range, bits)| Quantizer { range, bits: *bits })
    }

    /// The gradients from that of `y`.
    pub fn backward(&self, gradient: &Gradient) -> Result<Grads> {
        let check = Check("norm::backward");
        let gy = check.map_of("gradient", &gradient.tensor, &self.z)?;
        let grads = |[slope, offset]: [Tensor; 2], gamma, shift| Grads {
            z: OutputGradient { of: self.clone(), gy: gy.clone(), slope, offset },
            gamma,
            shift,
        };
        if crate::gpu::runs(self.z.device()) {
            let _note = self.note_sums();
            let [gamma, shift, slope, offset] = gpu::coefficients(self, &gy)?;
            return Ok(grads([slope, offset], self.batch.as_ref().map(|_| gamma), shift));
        }
        let found;
        let Sums { g, products } = match &gradient.sums {
            Some(sums) => sums,
            None => {
                let _note = self.note_sums();
                found = self.open()?.sums(cpu::open(&gy).floats()?);
                &found
            }
        };
        let c = g.len();
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, c, &Device::Cpu);
        let shift: Vec<f32> = g.iter().map(|sum| *sum as f32).collect();
        let Some(inv_std) = self.inv_std() else {
            let zeros = self.scale.zeros_like()?;
            return Ok(grads([zeros.clone(), zeros], None, tensor(shift)?));
        };
        let (inv_std, scale) = (values(inv_std)?, values(&self.scale)?);
        let gamma: Vec<f32> = products
            .iter()
            .zip(&inv_std)
            .map(|(product, inv_std)| (product * f64::from(*inv_std)) as f32)
            .collect();
        let rows = (gy.elem_count() / c) as f32;
        let slope = (0..c).map(|i| -scale[i] * inv_std[i] * (gamma[i] / rows)).collect();
        let offset = (0..c).map(|i| -scale[i] * (shift[i] / rows)).collect();
        Ok(grads([tensor(slope)?, tensor(offset)?], Some(tensor(gamma)?), tensor(shift)?))
    }

    fn note_sums(&self) -> profile::Note {
        profile::note("norm::backward: sums", 0, 8 * self.z.elem_count())
    }

    /// Opens what made an operation's input of dimensions `x`.
    pub(crate) fn open_below(&self, check: &Check, x: &[usize]) -> Result<OpenEpilogue<'_>> {
        if self.z.dims() != x {
            return Err(check.shape("below.z", &self.z, format!("{x:?}")));
        }
        self.open()
    }

    fn open(&self) -> Result<OpenEpilogue<'_>> {
        let channels = self.z.dims()[self.z.dims().len() - 1];
        let z = cpu::open(&self.z);
        z.floats()?;
        let (scale, shift) = (tiled(&self.scale)?, tiled(&self.shift)?);
        let mean = match self.mean() {
            Some(mean) => tiled(mean)?,
            None => vec![0.0; scale.len()],
        };
        let gate = Gate { bounds: self.act.bounds(), grid: self.quantizer().map(cpu::grid).transpose()? };
        Ok(OpenEpilogue { z, channels, scale, shift, mean, gate })
    }
}

/// An [`Epilogue`] open for reading, the values of channels repeated over the rows of a tile.
pub(crate) struct OpenEpilogue<'a> {
    z: cpu::Opened<'a>,
    channels: usize,
    scale: Vec<f32>,
    shift: Vec<f32>,
    mean: Vec<f32>,
    gate: Gate,
}

impl OpenEpilogue<'_> {
    /// Some rows of `z`.
    fn z(&self, rows: Range<usize>) -> &[f32] {
        let z = self.z.floats().expect("checked when it was opened");
        &z[rows.start * self.channels..rows.end * self.channels]
    }

    /// The sums over the whole of `gy`.
    fn sums(&self, gy: &[f32]) -> Sums {
        let c = self.channels;
        let parts = cpu::parts(gy.len() / c, c, |part| {
            let mut sums = GradientSums::new(self);
            let rows = part.clone().step_by(chunk_len(c) / c);
            for (row, gy) in rows.zip(gy[part.start * c..part.end * c].chunks(chunk_len(c))) {
                sums.add(row, gy);
            }
            sums.finish()
        });
        Sums::of_parts(parts).expect("no map is empty")
    }
}

impl Sums {
    /// Of the parts of the rows together.
    pub(crate) fn of_parts(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut all, more| {
            for (all, more) in all.g.iter_mut().zip(more.g) {
                *all += more;
            }
            for (all, more) in all.products.iter_mut().zip(more.products) {
                *all += more;
            }
            all
        })
    }
}

/// [`Sums`] over rows as they come.
pub(crate) struct GradientSums<'a> {
    of: &'a OpenEpilogue<'a>,
    /// Tiles in the next two, which have one element for each position of a tile. They are folded after the block
    /// that brings them to [`TILES`].
    tiles: usize,
    g: Vec<f32>,
    products: Vec<f32>,
    sums: Sums,
}

impl<'a> GradientSums<'a> {
    pub(crate) fn new(of: &'a OpenEpilogue<'a>) -> Self {
        let tile = || vec![0.0; of.scale.len()];
        let sums = || vec![0.0; of.channels];
        Self { of, tiles: 0, g: tile(), products: tile(), sums: Sums { g: sums(), products: sums() } }
    }

    /// Adds rows of `∂y`, from row `first` on.
    pub(crate) fn add(&mut self, first: usize, gy: &[f32]) {
        let OpenEpilogue { channels, scale, shift, mean, gate, .. } = self.of;
        let z = self.of.z(first..first + gy.len() / channels);
        add_batch_sums(z, gy, scale, shift, mean, *gate, &mut self.g, &mut self.products);
        self.tiles += gy.len().div_ceil(scale.len());
        if self.tiles >= TILES {
            self.fold();
        }
    }

    fn fold(&mut self) {
        fold(&mut self.g, &mut self.sums.g);
        fold(&mut self.products, &mut self.sums.products);
        self.tiles = 0;
    }

    pub(crate) fn finish(mut self) -> Sums {
        self.fold();
        self.sums
    }
}

/// The gradient `∂z` of a convolution's output, computed block by block where it is used
/// ([`crate::pointwise::backward`]), or as a whole: `scale·g + slope·(z − mean) + offset`.
pub struct OutputGradient {
    of: Epilogue,
    gy: Tensor,
    slope: Tensor,
    offset: Tensor,
}

impl OutputGradient {
    /// The convolution's output, whose gradient this is.
    pub fn z(&self) -> &Tensor {
        &self.of.z
    }

    /// The whole gradient, of the shape of `z`.
    pub fn tensor(&self) -> Result<Tensor> {
        let z = &self.of.z;
        let _note = profile::note("norm::backward: gradient", 0, 12 * z.elem_count());
        if crate::gpu::runs(z.device()) {
            return gpu::gradient(&self.of, &self.gy, &self.slope, &self.offset);
        }
        let opened = self.open()?;
        let c = opened.of.channels;
        let size = (z.elem_count() / c, c);
        // SAFETY: `rows` writes all of its block.
        #[allow(unsafe_code)]
        let (gz, _) =
            unsafe { cpu::blocks(size, chunk_len(c) / c, || (), |(), rows, gz| opened.rows(rows, gz)) };
        Ok(Tensor::from_vec(gz, z.dims(), &Device::Cpu)?)
    }

    pub(crate) fn open(&self) -> Result<OpenGradient<'_>> {
        let gy = cpu::open(&self.gy);
        gy.floats()?;
        Ok(OpenGradient { of: self.of.open()?, gy, slope: tiled(&self.slope)?, offset: tiled(&self.offset)? })
    }
}

/// An [`OutputGradient`] with its tensors open for reading.
pub(crate) struct OpenGradient<'a> {
    of: OpenEpilogue<'a>,
    gy: cpu::Opened<'a>,
    slope: Vec<f32>,
    offset: Vec<f32>,
}

impl OpenGradient<'_> {
    /// Writes the gradient of some rows.
    pub(crate) fn rows(&self, rows: Range<usize>, gz: &mut [MaybeUninit<f32>]) {
        let OpenEpilogue { channels: c, scale, shift, mean, gate, .. } = &self.of;
        let gy = &self.gy.floats().expect("checked when it was opened")[rows.start * c..rows.end * c];
        let z = self.of.z(rows);
        batch_grad_z(z, gy, gz, scale, shift, mean, &self.slope, &self.offset, *gate);
    }
}

/// Elements of a tile, at least: small numbers of channels are repeated over several rows up to this
/// length, so that the inner loops are long whatever `C` is.
const TILE: usize = 256;

/// After so many tiles, sums in `f32` are added to those in `f64`.
pub(crate) const TILES: usize = 32;

/// The rows of a tile.
pub(crate) fn tile_rows(c: usize) -> usize {
    TILE.div_ceil(c)
}

/// Elements of a chunk: whole tiles.
fn chunk_len(c: usize) -> usize {
    let tile = tile_rows(c) * c;
    (CHUNK / tile).max(1) * tile
}

/// Per-channel values, repeated over the rows of a tile.
pub(crate) fn tiled(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    let channels = values(tensor)?;
    Ok(channels.repeat(tile_rows(channels.len())))
}

/// The sums over a tile's rows, added to those of the channels, and the tile's sums set back to 0.
#[inline(always)]
pub(crate) fn fold(tile: &mut [f32], channels: &mut [f64]) {
    for row in tile.chunks_mut(channels.len()) {
        for (channel, sum) in channels.iter_mut().zip(row) {
            *channel += f64::from(*sum);
            *sum = 0.0;
        }
    }
}

impl Stats {
    /// Of the parts of the rows together, of which there must be one.
    pub(crate) fn of_parts(parts: Vec<Moments>) -> Result<Self> {
        let all = Moments::merged(parts).expect("no map is empty");
        let tensor = |values: Vec<f32>| {
            let c = values.len();
            Tensor::from_vec(values, c, &Device::Cpu)
        };
        Ok(Self {
            mean: tensor(all.mean.iter().map(|mean| *mean as f32).collect())?,
            variance: tensor(all.variance().map(|variance| variance as f32).collect())?,
            min: tensor(all.min)?,
            max: tensor(all.max)?,
        })
    }
}

/// `Q(φ(scale·z + shift))` of some rows, as floats or as levels.
pub(crate) struct Normalizer {
    scale: Vec<f32>,
    shift: Vec<f32>,
    bounds: (f32, f32),
    grid: Option<Grid>,
}

impl Normalizer {
    pub(crate) fn new(
        check: &Check,
        c: usize,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        check.quantizer(quant)?;
        let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
        let grid = quant.map(cpu::grid).transpose()?;
        Ok(Self { scale: tiled(&scale)?, shift: tiled(&shift)?, bounds: act.bounds(), grid })
    }

    /// Scale and shift, each of at least as many elements as there are channels.
    pub(crate) fn affine(&self) -> [&[f32]; 2] {
        [&self.scale, &self.shift]
    }

    /// The bounds of the activation.
    pub(crate) fn bounds(&self) -> (f32, f32) {
        self.bounds
    }

    /// Writes all of `y`, which must be as long as `z`, both whole rows; without a quantizer.
    pub(crate) fn floats(&self, z: &[f32], y: &mut [MaybeUninit<f32>]) {
        debug_assert!(self.grid.is_none(), "quantized feature maps are written as levels");
        normalize(z, y, &self.scale, &self.shift, self.bounds);
    }

    /// Writes all of `y`, which must be as long as `z`; with a quantizer.
    pub(crate) fn levels(&self, z: &[f32], y: &mut [MaybeUninit<u8>]) {
        let grid = self.grid.as_ref().expect("levels are those of a quantizer");
        normalize_levels(z, y, &self.scale, &self.shift, self.bounds, grid);
    }
}

/// Writes `f(scale·z + shift)`.
#[inline(always)]
fn normalize_tiles<T>(
    z: &[f32],
    y: &mut [MaybeUninit<T>],
    scale: &[f32],
    shift: &[f32],
    f: impl Fn(f32) -> T,
) {
    assert_eq!(z.len(), y.len());
    for (z, y) in z.chunks(scale.len()).zip(y.chunks_mut(scale.len())) {
        for (((y, z), scale), shift) in y.iter_mut().zip(z).zip(scale).zip(shift) {
            y.write(f(z.mul_add(*scale, *shift)));
        }
    }
}

simd! {
    fn normalize(z: &[f32], y: &mut [MaybeUninit<f32>], scale: &[f32], shift: &[f32], bounds: (f32, f32)) {
        normalize_tiles(z, y, scale, shift, |u| clamp(u, bounds));
    }
}

simd! {
    fn normalize_levels(
        z: &[f32],
        y: &mut [MaybeUninit<u8>],
        scale: &[f32],
        shift: &[f32],
        bounds: (f32, f32),
        grid: &Grid,
    ) {
        let grid = *grid;
        normalize_tiles(z, y, scale, shift, |u| byte(grid.level(clamp(u, bounds))));
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

/// Where the gradient passes through activation and quantizer. Strictly inside the activation's bounds
/// `φ(u) = u`.
#[derive(Clone, Copy)]
struct Gate {
    bounds: (f32, f32),
    grid: Option<Grid>,
}

/// The gradient at `u` of the gated function.
#[inline(always)]
fn gated(u: f32, gy: f32, (lo, hi): (f32, f32), passes: impl Fn(f32) -> bool) -> f32 {
    if (lo < u) & (u < hi) & passes(u) { gy } else { 0.0 }
}

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
        let bounds = gate.bounds;
        match gate.grid {
            None => add_tiles(z, gy, [scale, shift, mean], sum, product, |u, gy| gated(u, gy, bounds, |_| true)),
            Some(grid) => add_tiles(z, gy, [scale, shift, mean], sum, product, |u, gy| {
                gated(u, gy, bounds, |u| grid.passes(u))
            }),
        }
    }
}

/// Adds some tiles at a time, as the sums are loaded and stored each time.
#[inline(always)]
fn add_tiles(
    z: &[f32],
    gy: &[f32],
    channels: [&[f32]; 3],
    sum: &mut [f32],
    product: &mut [f32],
    g: impl Fn(f32, f32) -> f32 + Copy,
) {
    let tile = sum.len();
    let (groups, of_gy) = (z.chunks_exact(4 * tile), gy.chunks_exact(4 * tile));
    let rest = groups.remainder().chunks(tile).zip(of_gy.remainder().chunks(tile));
    for (z, gy) in groups.zip(of_gy) {
        let [z, gy] = [z, gy].map(|all| std::array::from_fn::<_, 4, _>(|i| &all[i * tile..][..tile]));
        add_products(z, gy, channels, sum, product, g);
    }
    for (z, gy) in rest {
        add_products([z], [gy], channels, sum, product, g);
    }
}

#[inline(always)]
fn add_products<const N: usize>(
    z: [&[f32]; N],
    gy: [&[f32]; N],
    channels: [&[f32]; 3],
    sum: &mut [f32],
    product: &mut [f32],
    g: impl Fn(f32, f32) -> f32,
) {
    let n = z[0].len();
    let (z, gy) = (z.map(|z| &z[..n]), gy.map(|gy| &gy[..n]));
    let [scale, shift, mean] = channels.map(|channel| &channel[..n]);
    let (sum, product) = (&mut sum[..n], &mut product[..n]);
    for i in 0..n {
        let (mut s, mut p) = (sum[i], product[i]);
        for (z, gy) in z.iter().zip(&gy) {
            let g = g(z[i].mul_add(scale[i], shift[i]), gy[i]);
            s += g;
            p = g.mul_add(z[i] - mean[i], p);
        }
        (sum[i], product[i]) = (s, p);
    }
}

simd! {
    /// `∂z = scale·g + slope·(z − mean) + offset`.
    fn batch_grad_z(
        z: &[f32],
        gy: &[f32],
        gz: &mut [MaybeUninit<f32>],
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
            gz: &mut [MaybeUninit<f32>],
            [scale, shift, mean, slope, offset]: [&[f32]; 5],
            g: impl Fn(f32, f32) -> f32,
        ) {
            assert!(z.len() == gy.len() && z.len() == gz.len());
            let tile = scale.len();
            for ((z, gy), gz) in z.chunks(tile).zip(gy.chunks(tile)).zip(gz.chunks_mut(tile)) {
                let n = z.len();
                let (gy, gz) = (&gy[..n], &mut gz[..n]);
                let (scale, shift, mean) = (&scale[..n], &shift[..n], &mean[..n]);
                let (slope, offset) = (&slope[..n], &offset[..n]);
                for i in 0..n {
                    let g = g(z[i].mul_add(scale[i], shift[i]), gy[i]);
                    gz[i].write(scale[i].mul_add(g, slope[i].mul_add(z[i] - mean[i], offset[i])));
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

    /// [`forward`], as floats.
    fn normalized(
        z: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Tensor {
        forward(z, scale, shift, act, quant).unwrap().to_float().unwrap()
    }

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
            let y = normalized(&z, &scale, &shift, act, None);
            assert_close(&y, &reference(&z, &scale, &shift, act).unwrap(), 1e-6, context);
            let range = output_range(&channel_stats(&z).unwrap(), &scale, &shift, act).unwrap();
            assert_eq!(elements(&range), elements(&quantize::min_max(&y).unwrap()), "{context}");
            if let Some(quant) = quant {
                let quantized = normalized(&z, &scale, &shift, act, Some(quant));
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
            let y = normalized(&z, &scale, &shift, act, None);
            let range = output_range(&channel_stats(&z).unwrap(), &scale, &shift, act).unwrap();
            assert_eq!(elements(&range), elements(&quantize::min_max(&y).unwrap()));
        }
    }

    #[test]
    fn affine_gradients_match_the_reference() {
        for_all(|dims, act, quant, context| {
            let (z, gy) = (random(1, dims), random(4, dims));
            let (scale, shift) = (channels(2, dims[3], 3.0), channels(3, dims[3], 1.0));
            let mask = mask(&normalized(&z, &scale, &shift, act, None), quant);
            let grads = Epilogue::affine(&z, &scale, &shift, act, quant)
                .unwrap()
                .backward(&gy.clone().into())
                .unwrap();
            assert!(grads.gamma.is_none(), "the scale is not trained");
            let (gz, gshift) = (grads.z.tensor().unwrap(), grads.shift);
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
            let norm = Normalization::new(&stats, &gamma, &beta, EPSILON).unwrap();
            let y = normalized(&z, &norm.scale, &norm.shift, act, None);
            assert_close(&y, &batch_reference(&z, &gamma, &beta, act).unwrap(), 1e-5, context);
            let grads = Epilogue::batch(&z, &norm, act, quant).unwrap().backward(&gy.clone().into()).unwrap();
            let gy = (gy * mask(&y, quant)).unwrap();
            let reference = |inputs: &[Tensor]| batch_reference(&inputs[0], &inputs[1], &inputs[2], act);
            let (gz, gamma_found) = (grads.z.tensor().unwrap(), grads.gamma.unwrap());
            let found = [&gz, &gamma_found, &grads.shift];
            assert_gradients(&[&z, &gamma, &beta], &gy, reference, &found, context);
        });
    }

    /// Asserts that the statistics are those of a two-pass computation in `f64`.
    #[track_caller]
    fn assert_stats(values: &[f32], c: usize) {
        let z = Tensor::new(values, &Device::Cpu).unwrap().reshape(((), c)).unwrap();
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
                "{} and not {exact_mean} of {i}",
                mean[i]
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
            let z = Tensor::from_vec(values, (rows, c), &Device::Cpu).unwrap();
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
            assert!(elements(&normalized(&z, &one, &one, act, None))[1].is_nan());
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
                    let norm = Normalization::new(&stats, &gamma, &beta, EPSILON).unwrap();
                    let act = Activation::Relu6;
                    let y = normalized(&z, &norm.scale, &norm.shift, act, quant);
                    let backward = |of: Epilogue| {
                        let grads = of.backward(&gy.clone().into()).unwrap();
                        (grads.z.tensor().unwrap(), grads.gamma, grads.shift)
                    };
                    let (batch_gz, ggamma, gbeta) = backward(Epilogue::batch(&z, &norm, act, quant).unwrap());
                    let (gz, _, gshift) =
                        backward(Epilogue::affine(&z, &norm.scale, &norm.shift, act, quant).unwrap());
                    let Stats { mean, variance, min, max } = stats;
                    vec![mean, variance, min, max, y, batch_gz, ggamma.unwrap(), gbeta, gz, gshift]
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
