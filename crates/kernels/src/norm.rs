//! Batch normalization, activation and fake quantization in one pass, with both backward passes.
//!
//! For `z[…, C]` with `M` rows, and for each channel (the channel index is left out):
//!
//! * statistics: `μ = Σz/M`, `V = Σ(z − μ)²/M` ([`channel_stats`]);
//! * forward: `u = scale·z + shift`, `y = Q(φ(u))` ([`forward`]). Batch normalization has
//!   `scale = γ/√(V + ε)` and `shift = β − μ·scale` ([`inv_std`], [`affine`]); a plain bias has
//!   `scale = 1`;
//! * the gradient of `u`: `g = ∂y·φ'(u)·[Q does not clamp φ(u)]`. The backward pass recomputes `u`
//!   from `z`, so nothing but `z` is kept;
//! * frozen statistics ([`Epilogue::affine`]): `∂z = scale·g`, `∂shift = Σg`;
//! * batch statistics ([`Epilogue::batch`]), which themselves depend on `z`: with
//!   `x̂ = (z − μ)/√(V + ε)`, `∂β = Σg`, `∂γ = Σg·x̂`, `∂z = γ/√(V + ε) · (g − ∂β/M − x̂·∂γ/M)`.
//!
//! The CPU sums in `f32` inside a block that fits in cache and in `f64` across blocks. A GPU sums
//! in `f32` over the few rows that a thread holds in registers, and in `f64` across these.

pub(crate) mod gpu;

use crate::affine::AffineActivation;
use crate::check::Check;
use crate::cpu::{self, open, read_ahead, simd, values};
use crate::elements::{Element, Nearest, by_element};
use crate::moments::{MomentAccumulator, Moments};
use crate::tile::{TILES, block_rows, fold, tiled};
use crate::work::{Written, blocks, parts, write_tiles};
use crate::{Activation, Error, FeatureMap, Quantizer, Result, profiler};
use candle_core::Tensor;
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
pub struct BatchNormalization {
    /// The mean `μ`.
    pub mean: Tensor,
    /// `1/√(V + ε)`.
    pub inv_std: Tensor,
    /// `γ/√(V + ε)`.
    pub scale: Tensor,
    /// `β − μ·scale`.
    pub shift: Tensor,
}

/// Running statistics, each `[C]`: moving averages of the batch means and the unbiased batch
/// variances.
#[derive(Clone, Debug)]
pub struct Running {
    /// The moving average of the means.
    pub mean: Tensor,
    /// The moving average of the variances, over `M − 1`.
    pub variance: Tensor,
}

/// Returns the statistics of each channel of `z[…, C]`, in one pass over memory.
///
/// The relative error of the variance is about 1e-6, even if the variance is tiny compared with the
/// mean, or close to the smallest `f32` numbers. The variance of a constant channel is exactly 0.
pub fn channel_stats(z: &Tensor) -> Result<Stats> {
    let check = Check("norm::channel_stats");
    let (rows, c) = check.rows("z", z)?;
    let _note = profiler::note(check.0, 0, z.dtype().size_in_bytes() * z.elem_count());
    let z = check.map_float("z", z)?;
    if crate::gpu::runs(z.device()) {
        return gpu::channel_stats(&z);
    }
    by_element!(z.dtype(), T => {
        let opened = open(&z);
        let z: &[T] = opened.elements()?;
        Stats::of_parts(parts(rows, c, |part| {
            let z = &z[part.start * c..part.end * c];
            let (mut moments, mut floats) = (MomentAccumulator::new(c), Vec::new());
            z.chunks(block_rows(c) * c).for_each(|z| moments.add(T::floats(z, &mut floats)));
            moments.finish(z)
        }))
    })
}

/// Returns `1 / √(variance + epsilon)`.
pub fn inv_std(variance: &Tensor, epsilon: f64) -> Result<Tensor> {
    Ok((variance + epsilon)?.sqrt()?.recip()?)
}

/// Returns normalization with the given statistics as `(scale, shift)`: `γ·inv_std` and
/// `β − mean·scale`.
pub fn affine(gamma: &Tensor, beta: &Tensor, mean: &Tensor, inv_std: &Tensor) -> Result<(Tensor, Tensor)> {
    let scale = (gamma * inv_std)?;
    let shift = (beta - (mean * &scale)?)?;
    Ok((scale, shift))
}

impl BatchNormalization {
    /// Returns the normalization with the statistics of a batch.
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

/// Returns the [`BatchNormalization::new`] of a training step, and updates the running statistics.
///
/// The running statistics change in place: they move towards those of this batch, which has `rows`
/// rows, by the factor `momentum`.
pub fn prepare(
    stats: &Stats,
    gamma: &Tensor,
    beta: &Tensor,
    epsilon: f64,
    running: &Running,
    momentum: f64,
    rows: usize,
) -> Result<BatchNormalization> {
    // Turns the biased variance into the unbiased one.
    let unbias = rows as f64 / (rows.max(2) - 1) as f64;
    if crate::gpu::runs(stats.mean.device()) {
        return gpu::prepare(stats, gamma, beta, epsilon, running, momentum, unbias);
    }
    for (old, new) in [(&running.mean, &stats.mean), (&running.variance, &(&stats.variance * unbias)?)] {
        old.slice_set(&(old + ((new - old)? * momentum)?)?, 0, 0)?;
    }
    BatchNormalization::new(stats, gamma, beta, epsilon)
}

/// Returns `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[C]`.
pub fn forward(
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    let check = Check("norm::forward");
    let (rows, c) = check.rows("z", z)?;
    let read = z.dtype().size_in_bytes();
    let written = if quant.is_some() { 1 } else { read };
    let _note = profiler::note(check.0, 0, (read + written) * rows * c);
    let tensor = check.map_float("z", z)?;
    if crate::gpu::runs(z.device()) {
        return gpu::forward(&check, &tensor, scale, shift, act, quant);
    }
    check.quantizer(quant)?;
    let affine = AffineActivation::new(&check, c, scale, shift, act)?;
    by_element!(tensor.dtype(), T => {
        let opened = open(&tensor);
        let z: &[T] = opened.elements()?;
        FeatureMap::write::<T, _>(
            opened.dims(),
            (rows, c),
            quant,
            block_rows(c),
            || (),
            |(), rows, y| affine.write(&z[rows.start * c..rows.end * c], y),
        )
    })
}

/// Returns [`forward`] without a quantizer. On the CPU its readers compute it
/// ([`FeatureMap::Deferred`]).
pub fn deferred(z: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<FeatureMap> {
    if crate::gpu::runs(z.device()) {
        return forward(z, scale, shift, act, None);
    }
    FeatureMap::deferred(&Check("norm::deferred"), z, scale, shift, act, None)
}

/// Returns what a backward pass reads in place of `y`, the levels that [`forward`] returned.
///
/// On the CPU this is the same map, recomputed whenever it is read, so that the levels need not be
/// kept. On a GPU it is `y` itself.
pub fn recomputed(
    y: &FeatureMap,
    z: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    if crate::gpu::runs(z.device()) {
        return Ok(y.clone());
    }
    FeatureMap::deferred(&Check("norm::recomputed"), z, scale, shift, act, quant)
}

/// Returns the smallest and the largest element of `φ(scale·z + shift)`, `[2]`, without a pass over
/// `z`.
///
/// They are exactly the extremes of what [`forward`] returns for floats without a quantizer,
/// because all steps, including rounding, are monotone.
pub fn output_range(stats: &Stats, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Tensor> {
    let check = Check("norm::output_range");
    let (_, c) = check.rows("stats.min", &stats.min)?;
    let (min, max) = (check.dims("stats.min", &stats.min, &[c])?, check.dims("stats.max", &stats.max, &[c])?);
    let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
    if crate::gpu::runs(min.device()) {
        return gpu::output_range(&min, &max, &scale, &shift, act);
    }
    let (scale, shift) = (values(&scale)?, values(&shift)?);
    let (mut lo, mut hi) = (f32::INFINITY, f32::NEG_INFINITY);
    for extremes in [values(&min)?, values(&max)?] {
        for ((z, scale), shift) in extremes.iter().zip(&scale).zip(&shift) {
            let y = act.apply(z.mul_add(*scale, *shift));
            lo = lo.min(y);
            hi = hi.max(y);
        }
    }
    cpu::tensor(vec![lo, hi], 2)
}

/// The operations after a convolution's output `z[…, C]` in a training step,
/// `y = Q(φ(scale·z + shift))`, with all that their gradients need.
#[derive(Clone, Debug)]
pub struct Epilogue {
    pub(crate) z: Tensor,
    pub(crate) scale: Tensor,
    pub(crate) shift: Tensor,
    /// The mean and `1/√(V + ε)` of `z` itself; `None` if scale and shift do not depend on `z`.
    batch: Option<[Tensor; 2]>,
    pub(crate) act: Activation,
    /// The quantizer's range and bits.
    quant: Option<(Tensor, Bits)>,
}

/// The gradient of a feature map `y[…, C]`.
#[derive(Clone, Debug)]
pub struct MapGradient {
    /// `∂y`.
    pub tensor: Tensor,
    /// The sums that the [`Epilogue`] that made `y` needs, if they were taken while the gradient
    /// was in cache. They are of no use to any other epilogue.
    pub(crate) sums: Option<GradientSums>,
}

/// A function that adds up numbers over all parts of a batch, element by element. Every part passes
/// equally many.
pub type Total<'a> = &'a dyn Fn(&[f64]) -> Vec<f64>;

fn parts_on_a_gpu(op: &'static str) -> Error {
    let message = "statistics of a batch in several parts are computed on the CPU alone, and this is a GPU: expected each \
                   part to have its own (sync_norm = false)";
    Error::Setting { op, message: message.into() }
}

/// `Σg` and `Σg·(z − mean)` of each channel.
#[derive(Clone, Debug)]
pub(crate) struct GradientSums {
    g: Vec<f64>,
    products: Vec<f64>,
}

/// The gradients of an [`Epilogue`].
pub struct Gradients {
    /// The gradient of the convolution's output, computed when it is read.
    pub z: DeferredGradient,
    /// The gradient of `γ`, `[C]`, if the normalization uses batch statistics.
    pub gamma: Option<Tensor>,
    /// The gradient of `β` or the shift, `[C]`.
    pub shift: Tensor,
}

impl From<Tensor> for MapGradient {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, sums: None }
    }
}

impl Epilogue {
    /// Returns whether only the scale and the shift are applied, so that a gradient of the output
    /// is one of `scale·z + shift`.
    pub fn is_affine(&self) -> bool {
        self.act == Activation::Identity && self.quant.is_none()
    }

    /// Returns the epilogue `Q(φ(γ·x̂ + β))` of a `norm` with the statistics of this batch `z`.
    pub fn batch(
        z: &Tensor,
        norm: &BatchNormalization,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        let check = Check("norm::Epilogue::batch");
        let (_, c) = check.rows("z", z)?;
        let BatchNormalization { mean, inv_std, scale, shift } = norm.checked(&check, c)?;
        Self::new(&check, z, [scale, shift], Some([mean, inv_std]), act, quant)
    }

    /// Returns the epilogue whose `scale` and `shift`, `[C]`, do not depend on `z`.
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

    /// Returns the gradients, from the gradient of `y`.
    pub fn backward(&self, gradient: &MapGradient) -> Result<Gradients> {
        self.backward_of_part(gradient, None)
    }

    /// Returns [`Epilogue::backward`] for a `z` that may be one part of a batch with
    /// [`Stats::merged`] statistics.
    ///
    /// `total` adds up numbers over all parts. The returned gradients of γ and β are those of this
    /// part alone, and the caller must add them up over the parts; the gradient of `z` takes all
    /// parts into account.
    ///
    /// # Errors
    /// Returns an error if `total` is given on a GPU.
    pub fn backward_of_part(&self, gradient: &MapGradient, total: Option<Total<'_>>) -> Result<Gradients> {
        let check = Check("norm::backward");
        let gy = check.map_of("gradient", &gradient.tensor, &self.z)?;
        let gradients = |[slope, offset]: [Tensor; 2], gamma, shift| Gradients {
            z: DeferredGradient { of: self.clone(), gy: gy.clone(), slope, offset },
            gamma,
            shift,
        };
        if crate::gpu::runs(self.z.device()) {
            if total.is_some() {
                return Err(parts_on_a_gpu(check.0));
            }
            let _note = self.note_sums();
            let [gamma, shift, slope, offset] = gpu::coefficients(self, &gy)?;
            return Ok(gradients([slope, offset], self.batch.as_ref().map(|_| gamma), shift));
        }
        let found;
        let sums = match &gradient.sums {
            Some(sums) => sums,
            None => {
                let _note = self.note_sums();
                found = by_element!(gy.dtype(), T => {
                    self.read::<T, _>(|of| Ok(of.sums(open(&gy).elements()?)))?
                });
                &found
            }
        };
        let c = sums.g.len();
        let tensor = |values: Vec<f32>| cpu::tensor(values, c);
        let Some(inv_std) = self.inv_std() else {
            let zeros = self.scale.zeros_like()?;
            return Ok(gradients([zeros.clone(), zeros], None, tensor(sums.shift())?));
        };
        let (inv_std, scale) = (values(inv_std)?, values(&self.scale)?);
        let rows = gy.elem_count() / c;
        let (gamma, shift) = (sums.gamma(&inv_std), sums.shift());
        // The sums from which the derivatives of mean and variance follow.
        let (of_gamma, of_shift, rows) = match total {
            None => (gamma.clone(), shift.clone(), rows),
            Some(total) => {
                let (sums, rows) = sums.totals(rows, total);
                (sums.gamma(&inv_std), sums.shift(), rows)
            }
        };
        let rows = rows as f32;
        let slope = (0..c).map(|i| -scale[i] * inv_std[i] * (of_gamma[i] / rows)).collect();
        let offset = (0..c).map(|i| -scale[i] * (of_shift[i] / rows)).collect();
        Ok(gradients([tensor(slope)?, tensor(offset)?], Some(tensor(gamma)?), tensor(shift)?))
    }

    fn note_sums(&self) -> profiler::Note {
        profiler::note("norm::backward: sums", 0, 2 * self.z.dtype().size_in_bytes() * self.z.elem_count())
    }

    /// Opens the epilogue for reading, and calls `f` with it.
    fn read<T: Element, R>(&self, f: impl FnOnce(&OpenEpilogue<'_, T>) -> Result<R>) -> Result<R> {
        let opened = open(&self.z);
        let (scale, shift) = (tiled(&self.scale)?, tiled(&self.shift)?);
        let mean = match self.mean() {
            Some(mean) => tiled(mean)?,
            None => vec![0.0; scale.len()],
        };
        let channels = self.scale.elem_count();
        let gate = Gate { bounds: self.act.bounds(), grid: self.quantizer().map(cpu::grid).transpose()? };
        f(&OpenEpilogue { z: opened.elements()?, channels, scale, shift, mean, gate })
    }

    /// Opens the epilogue that made an operation's input, of dimensions `x`, if one is given, and
    /// calls `f` with it.
    pub(crate) fn read_below<T: Element, R>(
        below: Option<&Self>,
        check: &Check,
        x: &[usize],
        f: impl FnOnce(Option<&OpenEpilogue<'_, T>>) -> Result<R>,
    ) -> Result<R> {
        match below {
            None => f(None),
            Some(below) if below.z.dims() == x => below.read(|below| f(Some(below))),
            Some(below) => Err(check.shape("below.z", &below.z, format!("{x:?}"))),
        }
    }
}

/// Returns the number of bytes of an operation's input, plus those of the map it was made from if
/// that is read too.
pub(crate) fn bytes_with(x: &FeatureMap, below: Option<&Epilogue>) -> usize {
    match (x, below) {
        (FeatureMap::Deferred(_), _) | (_, None) => x.bytes(),
        (_, Some(below)) => x.bytes() + below.z.dtype().size_in_bytes() * below.z.elem_count(),
    }
}

/// An [`Epilogue`] open for reading, with the per-channel values repeated over the rows of a tile.
pub(crate) struct OpenEpilogue<'a, T> {
    z: &'a [T],
    channels: usize,
    scale: Vec<f32>,
    shift: Vec<f32>,
    mean: Vec<f32>,
    gate: Gate,
}

impl<T: Element> OpenEpilogue<'_, T> {
    /// Returns the range of elements of some rows.
    fn part(&self, rows: Range<usize>) -> Range<usize> {
        rows.start * self.channels..rows.end * self.channels
    }

    /// Computes the sums over the whole of `gy`.
    fn sums(&self, gy: &[T]) -> GradientSums {
        let (c, per_block) = (self.channels, block_rows(self.channels));
        let found = parts(gy.len() / c, c, |part| {
            let (mut sums, mut floats) = (GradientAccumulator::new(self), Vec::new());
            for start in part.clone().step_by(per_block) {
                let gy = &gy[self.part(start..part.end.min(start + per_block))];
                sums.add(start, T::floats(gy, &mut floats));
            }
            sums.finish()
        });
        GradientSums::of_parts(found).expect("no map is empty")
    }
}

impl GradientSums {
    /// Adds up the sums of all parts of the rows.
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

    /// Returns the sums and the number of rows of a whole batch, where `self` and `rows` are those
    /// of one part.
    fn totals(&self, rows: usize, total: Total<'_>) -> (Self, usize) {
        let c = self.g.len();
        let all = total(&[&self.g[..], &self.products, &[rows as f64]].concat());
        (Self { g: all[..c].to_vec(), products: all[c..2 * c].to_vec() }, all[2 * c] as usize)
    }

    /// Returns the gradient of γ.
    fn gamma(&self, inv_std: &[f32]) -> Vec<f32> {
        let of = |(product, inv_std): (&f64, &f32)| (product * f64::from(*inv_std)) as f32;
        self.products.iter().zip(inv_std).map(of).collect()
    }

    /// Returns the gradient of β or the shift.
    fn shift(&self) -> Vec<f32> {
        self.g.iter().map(|sum| *sum as f32).collect()
    }
}

/// An accumulator of the [`GradientSums`] of rows, block by block.
pub(crate) struct GradientAccumulator<'a, T> {
    of: &'a OpenEpilogue<'a, T>,
    /// The number of tiles summed in `g` and `products`, which have one element for each position
    /// of a tile. They are folded after the block that brings this number to [`TILES`].
    tiles: usize,
    g: Vec<f32>,
    products: Vec<f32>,
    sums: GradientSums,
}

impl<'a, T: Element> GradientAccumulator<'a, T> {
    pub(crate) fn new(of: &'a OpenEpilogue<'a, T>) -> Self {
        let tile = || vec![0.0; of.scale.len()];
        let sums = || vec![0.0; of.channels];
        Self { of, tiles: 0, g: tile(), products: tile(), sums: GradientSums { g: sums(), products: sums() } }
    }

    /// Adds rows of `∂y`, starting at row `first`.
    pub(crate) fn add(&mut self, first: usize, gy: &[f32]) {
        let OpenEpilogue { z, channels, scale, shift, mean, gate } = self.of;
        let z = &z[self.of.part(first..first + gy.len() / channels)];
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

    pub(crate) fn finish(mut self) -> GradientSums {
        self.fold();
        self.sums
    }
}

/// The gradient `∂z` of a convolution's output, `scale·g + slope·(z − mean) + offset`.
///
/// It is computed block by block as it is read ([`crate::convolution::backward`]), or as a whole.
pub struct DeferredGradient {
    of: Epilogue,
    gy: Tensor,
    slope: Tensor,
    offset: Tensor,
}

impl DeferredGradient {
    /// Returns the gradient of `z` if the loss depends on `z` only through its mean and variance.
    ///
    /// `mean` and `variance` are the gradients of these, `[C]`. The result is
    /// `∂μ/M + 2·∂V·(z − μ)/M`, where `M`, here `rows`, is the number of rows of the statistics.
    pub fn of_statistics(
        z: &Tensor,
        norm: &BatchNormalization,
        rows: usize,
        mean: &Tensor,
        variance: &Tensor,
    ) -> Result<Self> {
        let check = Check("norm::DeferredGradient::of_statistics");
        let (_, c) = check.rows("z", z)?;
        let of = Epilogue::batch(z, norm, Activation::Identity, None)?;
        let slope = (check.dims("variance", variance, &[c])? * (2.0 / rows as f64))?;
        let offset = (check.dims("mean", mean, &[c])? / rows as f64)?;
        Ok(Self { of, gy: z.zeros_like()?, slope, offset })
    }

    /// Returns the convolution's output, whose gradient this is.
    pub(crate) fn z(&self) -> &Tensor {
        &self.of.z
    }

    /// Computes the whole gradient, of the shape of `z`.
    pub fn tensor(&self) -> Result<Tensor> {
        let z = &self.of.z;
        let _note =
            profiler::note("norm::backward: gradient", 0, 3 * z.dtype().size_in_bytes() * z.elem_count());
        if crate::gpu::runs(z.device()) {
            return gpu::gradient(&self.of, &self.gy, &self.slope, &self.offset);
        }
        by_element!(z.dtype(), T => self.read::<T, _>(|gradient| {
            let c = gradient.of.channels;
            let size = (z.elem_count() / c, c);
            let (gz, _) = blocks(
                size,
                block_rows(c),
                || (),
                |(), rows, gz| (gradient.rows(rows, gz), ()),
            );
            cpu::tensor(gz, z.dims())
        }))
    }

    /// Opens the gradient for reading, and calls `f` with it.
    pub(crate) fn read<T: Element, R>(&self, f: impl FnOnce(&OpenGradient<'_, T>) -> Result<R>) -> Result<R> {
        let gy = open(&self.gy);
        let (gy, slope, offset) = (gy.elements()?, tiled(&self.slope)?, tiled(&self.offset)?);
        self.of.read(|of| f(&OpenGradient { of, gy, slope, offset }))
    }
}

/// A [`DeferredGradient`] with its tensors open for reading.
pub(crate) struct OpenGradient<'a, T> {
    of: &'a OpenEpilogue<'a, T>,
    gy: &'a [T],
    slope: Vec<f32>,
    offset: Vec<f32>,
}

impl<T: Element> OpenGradient<'_, T> {
    /// Writes the gradient of some rows.
    pub(crate) fn rows<'z>(&self, rows: Range<usize>, gz: &'z mut [MaybeUninit<T>]) -> Written<'z> {
        let OpenEpilogue { z, scale, shift, mean, gate, .. } = self.of;
        let part = self.of.part(rows);
        let (z, gy) = (&z[part.clone()], &self.gy[part]);
        gradient(z, gy, gz, scale, shift, mean, &self.slope, &self.offset, *gate)
    }
}

impl Stats {
    /// Returns these statistics, of `rows` rows, as the numbers that [`Stats::merged`] takes.
    ///
    /// They are the number of rows, then the means of all channels, their variances, their minima,
    /// and their maxima.
    ///
    /// # Errors
    /// Returns an error on a GPU.
    pub fn to_values(&self, rows: usize) -> Result<Vec<f64>> {
        if crate::gpu::runs(self.mean.device()) {
            return Err(parts_on_a_gpu("norm::Stats::to_values"));
        }
        let mut all = vec![rows as f64];
        for tensor in [&self.mean, &self.variance, &self.min, &self.max] {
            all.extend(values(tensor)?.into_iter().map(f64::from));
        }
        Ok(all)
    }

    /// Merges the statistics of all parts of a batch, and returns them with their number of rows.
    ///
    /// `parts` holds what [`Stats::to_values`] returned for each part, one after the other, each
    /// with `channels` channels.
    pub fn merged(parts: &[f64], channels: usize) -> Result<(Self, usize)> {
        let of = |part: &[f64]| {
            let floats = |tensor: usize| part[1 + tensor * channels..][..channels].iter().map(|x| *x as f32);
            let doubles = |tensor: usize| part[1 + tensor * channels..][..channels].to_vec();
            Moments::new(part[0], doubles(0), doubles(1), floats(2).collect(), floats(3).collect())
        };
        let parts: Vec<Moments> = parts.chunks_exact(1 + 4 * channels).map(of).collect();
        let rows = parts.iter().map(Moments::rows).sum::<f64>() as usize;
        Ok((Self::of_parts(parts)?, rows))
    }

    /// Merges the statistics of the parts of the rows, of which there must be at least one.
    pub(crate) fn of_parts(parts: Vec<Moments>) -> Result<Self> {
        let all = Moments::merged(parts).expect("no map is empty");
        let c = all.mean.len();
        let tensor = |values: Vec<f32>| cpu::tensor(values, c);
        Ok(Self {
            mean: tensor(all.mean.iter().map(|mean| *mean as f32).collect())?,
            variance: tensor(all.variance().map(|variance| variance as f32).collect())?,
            min: tensor(all.min)?,
            max: tensor(all.max)?,
        })
    }
}

/// The condition under which the gradient passes through activation and quantizer. Strictly inside
/// the activation's bounds `φ(u) = u`, so the grid is tested at `u`.
#[derive(Clone, Copy)]
struct Gate {
    bounds: (f32, f32),
    grid: Option<Grid>,
}

/// Returns the gradient at `u` of the gated function. Outside the bounds and at the kinks it is 0, as
/// in PyTorch.
#[inline(always)]
fn gated(u: f32, gy: f32, (lo, hi): (f32, f32), passes: impl Fn(f32) -> bool) -> f32 {
    if (lo < u) & (u < hi) & passes(u) { gy } else { 0.0 }
}

simd! {
    /// Adds `g` and `g·(z − mean)` of some rows to the sums of a tile.
    fn add_batch_sums<T: Element>(
        z: &[T],
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

/// Adds four tiles at a time, because each call loads and stores the sums.
#[inline(always)]
fn add_tiles<T: Element>(
    all_z: &[T],
    all_gy: &[f32],
    channels: [&[f32]; 3],
    sum: &mut [f32],
    product: &mut [f32],
    g: impl Fn(f32, f32) -> f32 + Copy,
) {
    let tile = sum.len();
    let (groups, of_gy) = (all_z.chunks_exact(4 * tile), all_gy.chunks_exact(4 * tile));
    let rest = groups.remainder().chunks(tile).zip(of_gy.remainder().chunks(tile));
    for (i, (z, of_gy)) in groups.zip(of_gy).enumerate() {
        read_ahead(all_z, i * 4 * tile, 4 * tile);
        read_ahead(all_gy, i * 4 * tile, 4 * tile);
        let z = std::array::from_fn::<_, 4, _>(|i| &z[i * tile..][..tile]);
        let of_gy = std::array::from_fn(|i| &of_gy[i * tile..][..tile]);
        add_products(z, of_gy, channels, sum, product, g);
    }
    for (z, gy) in rest {
        add_products([z], [gy], channels, sum, product, g);
    }
}

#[inline(always)]
fn add_products<T: Element, const N: usize>(
    z: [&[T]; N],
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
            let z = z[i].float();
            let g = g(z.mul_add(scale[i], shift[i]), gy[i]);
            s += g;
            p = g.mul_add(z - mean[i], p);
        }
        (sum[i], product[i]) = (s, p);
    }
}

simd! {
    /// Writes `∂z = scale·g + slope·(z − mean) + offset`.
    fn gradient<'z, T: Element>(
        z: &[T],
        gy: &[T],
        gz: &'z mut [MaybeUninit<T>],
        scale: &[f32],
        shift: &[f32],
        mean: &[f32],
        slope: &[f32],
        offset: &[f32],
        gate: Gate,
    ) -> Written<'z> {
        #[inline(always)]
        fn tiles<'z, T: Element>(
            z: &[T],
            gy: &[T],
            gz: &'z mut [MaybeUninit<T>],
            [scale, shift, mean, slope, offset]: [&[f32]; 5],
            g: impl Fn(f32, f32) -> f32 + Copy,
        ) -> Written<'z> {
            assert!(z.len() == gy.len() && z.len() == gz.len());
            let of_piece = |[start, at]: [usize; 2], n: usize| {
                read_ahead(z, start, n);
                read_ahead(gy, start, n);
                let (z, gy): (&[T], &[T]) = (&z[start..][..n], &gy[start..][..n]);
                let [scale, shift, mean, slope, offset] =
                    [scale, shift, mean, slope, offset].map(|all| &all[at..][..n]);
                move |i: usize| {
                    let z = z[i].float();
                    let g = g(z.mul_add(scale[i], shift[i]), gy[i].float());
                    scale[i].mul_add(g, slope[i].mul_add(z - mean[i], offset[i]))
                }
            };
            write_tiles(gz, scale.len(), of_piece, Nearest).into()
        }
        let (channels, bounds) = ([scale, shift, mean, slope, offset], gate.bounds);
        match gate.grid {
            None => tiles(z, gy, gz, channels, |u, gy| gated(u, gy, bounds, |_| true)),
            Some(grid) => tiles(z, gy, gz, channels, move |u, gy| gated(u, gy, bounds, |u| grid.passes(u))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize;
    use crate::testing::*;
    use candle_core::Device;
    use quant_core::Bits;

    const ACTIVATIONS: [Activation; 3] = [Activation::Identity, Activation::Relu, Activation::Relu6];

    fn activate(u: &Tensor, act: Activation) -> candle_core::Result<Tensor> {
        match act {
            Activation::Identity => Ok(u.clone()),
            Activation::Relu => u.relu(),
            Activation::Relu6 => u.clamp(0.0, 6.0),
        }
    }

    /// Computes `φ(scale·z + shift)` with plain Candle operations.
    fn reference(z: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> candle_core::Result<Tensor> {
        activate(&z.broadcast_mul(scale)?.broadcast_add(shift)?, act)
    }

    /// Computes `φ(γ·x̂ + β)` with the statistics of `z` itself.
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

    /// Returns [`forward`] as floats.
    fn normalized(
        z: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Tensor {
        forward(z, scale, shift, act, quant).unwrap().to_float().unwrap()
    }

    /// Returns 1 where a quantizer passes the gradient, and 0 elsewhere. In a reference, `y·mask`
    /// has the straight-through gradient of `Q(y)`.
    fn mask(y: &Tensor, quant: Option<Quantizer<'_>>) -> Tensor {
        let ones = y.ones_like().unwrap();
        quant.map_or(ones.clone(), |quant| quantize::backward(y, &ones, quant).unwrap())
    }

    /// Calls `f` for all activations, with and without a quantizer, and for many shapes.
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

    /// Returns `[C]` random values around `middle`.
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
            let gradients = Epilogue::affine(&z, &scale, &shift, act, quant)
                .unwrap()
                .backward(&gy.clone().into())
                .unwrap();
            assert!(gradients.gamma.is_none(), "the scale is not trained");
            let (gz, gshift) = (gradients.z.tensor().unwrap(), gradients.shift);
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
            let norm = BatchNormalization::new(&stats, &gamma, &beta, EPSILON).unwrap();
            let y = normalized(&z, &norm.scale, &norm.shift, act, None);
            assert_close(&y, &batch_reference(&z, &gamma, &beta, act).unwrap(), 1e-5, context);
            let gradients =
                Epilogue::batch(&z, &norm, act, quant).unwrap().backward(&gy.clone().into()).unwrap();
            let gy = (gy * mask(&y, quant)).unwrap();
            let reference = |inputs: &[Tensor]| batch_reference(&inputs[0], &inputs[1], &inputs[2], act);
            let (gz, gamma_found) = (gradients.z.tensor().unwrap(), gradients.gamma.unwrap());
            let found = [&gz, &gamma_found, &gradients.shift];
            assert_gradients(&[&z, &gamma, &beta], &gy, reference, &found, context);
        });
    }

    /// Asserts that the statistics agree with a two-pass computation in `f64`.
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
            // The error of f32 may be half of the smallest subnormal number.
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
            // Means far from 0, compared with which the variance is tiny.
            assert_stats(&values(&|channel, noise| 1.0 + channel as f64 + 1e-5 * noise), c);
            assert_stats(&values(&|channel, noise| 1e4 + channel as f64 + 0.05 * noise), c);
            // Variances down to 1e-42, which is subnormal, next to channels of order 1.
            assert_stats(&values(&|channel, noise| 10f64.powi(-(channel as i32 % 22)) * noise), c);
            assert_stats(&values(&|channel, noise| 10f64.powi(15 - channel as i32 % 30) * (noise + 0.5)), c);
            // Few nonzero elements, as after a ReLU.
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
                    let norm = BatchNormalization::new(&stats, &gamma, &beta, EPSILON).unwrap();
                    let act = Activation::Relu6;
                    let y = normalized(&z, &norm.scale, &norm.shift, act, quant);
                    let backward = |of: Epilogue| {
                        let gradients = of.backward(&gy.clone().into()).unwrap();
                        (gradients.z.tensor().unwrap(), gradients.gamma, gradients.shift)
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

    /// Checks that parts of a batch with the sums of all parts give the results and gradients of
    /// the whole batch. The means and variances of each part are rounded to `f32` once more; the
    /// tolerances allow for this.
    #[test]
    fn parts_of_a_batch_are_as_the_whole() {
        const C: usize = 5;
        let (z, gy) = (random(1, &[6, 4, 4, C]), random(2, &[6, 4, 4, C]));
        let (gamma, beta) = (channels(3, C, 1.0), channels(4, C, 0.5));
        let act = Activation::Relu6;
        let whole = channel_stats(&z).unwrap();
        let norm = BatchNormalization::new(&whole, &gamma, &beta, EPSILON).unwrap();
        let expected = Epilogue::batch(&z, &norm, act, None).unwrap().backward(&gy.clone().into()).unwrap();

        // Parts of different sizes.
        let parts: Vec<[Tensor; 2]> = [(0, 1), (1, 2), (3, 3)]
            .map(|(start, images)| {
                [&z, &gy].map(|map| map.narrow(0, start, images).unwrap().contiguous().unwrap())
            })
            .into();
        let values = |[z, _]: &[Tensor; 2]| channel_stats(z).unwrap().to_values(z.elem_count() / C).unwrap();
        let (merged, rows) = Stats::merged(&parts.iter().flat_map(values).collect::<Vec<_>>(), C).unwrap();
        assert_eq!(rows, 6 * 4 * 4);
        assert_close(&merged.mean, &whole.mean, 1e-6, "mean");
        assert_close(&merged.variance, &whole.variance, 1e-6, "variance");
        assert_eq!(elements(&merged.min), elements(&whole.min));
        assert_eq!(elements(&merged.max), elements(&whole.max));

        let norm = BatchNormalization::new(&merged, &gamma, &beta, EPSILON).unwrap();
        let backward = |[z, gy]: &[Tensor; 2], total: Total<'_>| {
            let epilogue = Epilogue::batch(z, &norm, act, None).unwrap();
            epilogue.backward_of_part(&gy.clone().into(), Some(total)).unwrap()
        };
        let sums = std::cell::RefCell::new(vec![0.0; 2 * C + 1]);
        for part in &parts {
            backward(part, &|own| {
                sums.borrow_mut().iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                own.to_vec()
            });
        }
        let found: Vec<Gradients> =
            parts.iter().map(|part| backward(part, &|_| sums.borrow().clone())).collect();
        let gz: Vec<Tensor> = found.iter().map(|part| part.z.tensor().unwrap()).collect();
        assert_close(&Tensor::cat(&gz, 0).unwrap(), &expected.z.tensor().unwrap(), 1e-5, "∂z");
        let add = |of: fn(&Gradients) -> &Tensor| {
            found[1..].iter().fold(of(&found[0]).clone(), |sum, part| (sum + of(part)).unwrap())
        };
        assert_close(&add(|part| part.gamma.as_ref().unwrap()), &expected.gamma.unwrap(), 1e-5, "∂γ");
        assert_close(&add(|part| &part.shift), &expected.shift, 1e-5, "∂β");
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
