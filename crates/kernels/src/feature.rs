//! Feature maps: floats, the levels of a quantizer, or a normalization that is deferred to its
//! readers.
//!
//! A CPU kernel opens its operands ([`FeatureMap::read`]) and stores its results
//! ([`FeatureMap::write`]) here. [`crate::elements`] defines how the elements lie in memory.

pub(crate) mod gpu;

use crate::affine::AffineActivation;
use crate::check::Check;
use crate::cpu::{self, open};
use crate::elements::{Element, Sink, Stored, by_element, copy, whole_numbers};
use crate::tile::block_rows;
use crate::work::{CHUNK, Written, append, blocks};
use crate::{Activation, Quantizer, Result, profiler};
use candle_core::{DType, Device, Tensor};
use quant_core::{Bits, Grid};
use std::ops::Range;

/// A quantized feature map `[…, C]`, in which each element is the index of its level.
///
/// An index takes one byte: a quarter of an `f32`, half of a `bf16`. Level `q` has the value that
/// the [`Grid`] over the range gives it: `(q − z)·step`.
#[derive(Clone, Debug)]
pub struct Levels {
    /// The levels, `u8`.
    pub levels: Tensor,
    /// The quantizer's range, `[2]`.
    pub range: Tensor,
    /// The quantizer's bit width.
    pub bits: Bits,
    /// The dtype of the floats that the levels stand for: `F32` or `BF16`. Operations return their
    /// output in this dtype.
    pub dtype: DType,
}

/// The feature map `Q(φ(scale·z + shift))`, with or without a quantizer, that each operation
/// computes from `z` as it reads it.
///
/// It is never in memory as a whole, because writing and reading it would cost more than computing
/// it again. It exists on the CPU only.
#[derive(Clone, Debug)]
pub struct Deferred {
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: Activation,
    /// The quantizer's range and bit width.
    quant: Option<(Tensor, Bits)>,
}

/// What one unit of a network hands to the next.
///
/// Operations take it as `&FeatureMap`, or floats as `&Tensor`. A clone shares the tensors' memory.
#[derive(Clone, Debug)]
pub enum FeatureMap {
    /// Floats.
    Float(Tensor),
    /// Levels that stand for floats.
    Levels(Levels),
    /// Floats that are computed when they are read ([`crate::norm::deferred`]).
    Deferred(Deferred),
}

impl From<&Tensor> for FeatureMap {
    fn from(tensor: &Tensor) -> Self {
        Self::Float(tensor.clone())
    }
}

impl From<&Self> for FeatureMap {
    fn from(map: &Self) -> Self {
        map.clone()
    }
}

impl FeatureMap {
    /// Quantizes `x` to levels; without a quantizer, returns `x` itself.
    pub fn quantize(x: &Tensor, quant: Option<Quantizer<'_>>) -> Result<Self> {
        let check = Check("feature::quantize");
        let Some(quant) = quant else { return Ok(Self::Float(x.clone())) };
        let _note = profiler::note(check.0, 0, (x.dtype().size_in_bytes() + 1) * x.elem_count());
        check.quantizer(Some(quant))?;
        let x = check.map_float("x", x)?;
        if crate::gpu::runs(x.device()) {
            return gpu::quantize(&x, quant);
        }
        by_element!(x.dtype(), T => {
            let opened = open(&x);
            let x = Stored::<T>::Floats(opened.elements()?);
            let size = (x.len(), 1);
            Self::write(opened.dims(), size, Some(quant), CHUNK, || (), |(), part, y| copy(x.part(part), y))
        })
    }

    /// Returns `Q(φ(scale·z + shift))`, deferred to its readers, for `z[…, C]` on the CPU, with
    /// `scale` and `shift` `[C]`.
    pub(crate) fn deferred(
        check: &Check,
        z: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<Self> {
        let (_, c) = check.rows("z", z)?;
        check.quantizer(quant)?;
        Ok(Self::Deferred(Deferred {
            z: check.map_float("z", z)?,
            scale: check.dims("scale", scale, &[c])?,
            shift: check.dims("shift", shift, &[c])?,
            act,
            quant: quant.map(|quant| (quant.range.clone(), quant.bits)),
        }))
    }

    /// Wraps `map`: as the levels of floats of `dtype`, or, without a quantizer, as floats.
    pub(crate) fn of(map: Tensor, dtype: DType, quant: Option<Quantizer<'_>>) -> Self {
        match quant {
            None => Self::Float(map),
            Some(quant) => {
                Self::Levels(Levels { levels: map, range: quant.range.clone(), bits: quant.bits, dtype })
            }
        }
    }

    /// Creates the map with dimensions `dims` and elements `T` that `f(state, rows, elements)`
    /// writes on the CPU, in blocks of `per_block` rows.
    ///
    /// The map is quantized if there is a quantizer. `size` is `(rows, width)`; see [`blocks`].
    pub(crate) fn write<T: Element, S: Send>(
        dims: &[usize],
        size: (usize, usize),
        quant: Option<Quantizer<'_>>,
        per_block: usize,
        init: impl Fn() -> S + Sync + Send,
        f: impl for<'a> Fn(&mut S, Range<usize>, Sink<'a, T>) -> Written<'a> + Sync + Send,
    ) -> Result<Self> {
        let map = match quant {
            None => {
                let run =
                    blocks(size, per_block, init, |state, rows, y| (f(state, rows, Sink::Floats(y)), ()));
                cpu::tensor(run.0, dims)?
            }
            Some(quant) => {
                let grid = cpu::grid(quant)?;
                let run = blocks(size, per_block, init, |state, rows, y| {
                    (f(state, rows, Sink::Levels(y, grid)), ())
                });
                cpu::tensor(run.0, dims)?
            }
        };
        Ok(Self::of(map, T::DTYPE, quant))
    }

    /// Opens the map on the CPU, and calls `f` with its elements `T`, which must match
    /// [`FeatureMap::dtype`].
    pub(crate) fn read<T: Element, R>(
        &self,
        check: &Check,
        argument: &'static str,
        f: impl FnOnce(Operand<'_, T>) -> Result<R>,
    ) -> Result<R> {
        match self {
            Self::Deferred(deferred) => {
                f(Operand::Deferred(open(&deferred.z).elements()?, &deferred.affine(check)?))
            }
            _ => self.read_stored(check, argument, |x| f(Operand::Stored(x))),
        }
    }

    /// Does the same as [`FeatureMap::read`] for kernels whose parts are not whole rows: it
    /// computes a deferred map first.
    pub(crate) fn read_stored<T: Element, R>(
        &self,
        check: &Check,
        argument: &'static str,
        f: impl FnOnce(Stored<'_, T>) -> Result<R>,
    ) -> Result<R> {
        if let Self::Levels(levels) = self {
            let tensor = check.dtype(argument, &levels.levels, DType::U8)?;
            return f(Stored::Levels(open(&tensor).elements()?, levels.grid()?));
        }
        let tensor = check.dtype(argument, &self.to_float()?, T::DTYPE)?;
        f(Stored::Floats(open(&tensor).elements()?))
    }

    /// Returns the dimensions.
    pub fn dims(&self) -> &[usize] {
        self.tensor().dims()
    }

    /// Returns the dtype of the floats that the map stands for.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Float(tensor) => tensor.dtype(),
            Self::Levels(levels) => levels.dtype,
            Self::Deferred(deferred) => deferred.z.dtype(),
        }
    }

    /// Returns the size in memory, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.tensor().elem_count() * self.tensor().dtype().size_in_bytes()
    }

    /// Returns the device.
    pub(crate) fn device(&self) -> &Device {
        self.tensor().device()
    }

    /// Returns the tensor that is in memory.
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Float(tensor) => tensor,
            Self::Levels(levels) => &levels.levels,
            Self::Deferred(deferred) => &deferred.z,
        }
    }

    /// Returns the floats that the map stands for.
    pub fn to_float(&self) -> Result<Tensor> {
        match self {
            Self::Float(tensor) => Ok(tensor.clone()),
            Self::Levels(levels) if crate::gpu::runs(levels.levels.device()) => gpu::to_float(levels),
            Self::Levels(_) | Self::Deferred(_) => by_element!(self.dtype(), T => {
                self.read::<T, _>(&Check("feature::to_float"), "x", |x| {
                    let (c, len) = (*self.dims().last().unwrap_or(&1), x.len());
                    let size = (len / c.max(1), c);
                    let (floats, _) = blocks(
                        size,
                        block_rows(c),
                        || (),
                        |(), rows, y| (x.part(rows.start * c..rows.end * c).write(Sink::<T>::Floats(y)), ()),
                    );
                    cpu::tensor(floats, self.dims())
                })
            }),
        }
    }
}

impl Levels {
    pub(crate) fn quantizer(&self) -> Quantizer<'_> {
        Quantizer { range: &self.range, bits: self.bits }
    }

    fn grid(&self) -> Result<Grid> {
        cpu::grid(self.quantizer())
    }
}

impl Deferred {
    fn affine(&self, check: &Check) -> Result<AffineActivation> {
        let (_, c) = check.rows("z", &self.z)?;
        let grid = |(range, bits): &(Tensor, Bits)| cpu::grid(Quantizer { range, bits: *bits });
        let grid = self.quant.as_ref().map(grid).transpose()?;
        Ok(AffineActivation::new(check, c, &self.scale, &self.shift, self.act)?.on(grid))
    }
}

/// The elements of a feature map, as a kernel reads them.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a, T> {
    Stored(Stored<'a, T>),
    /// Whole rows of `z`, and the function to compute from them.
    Deferred(&'a [T], &'a AffineActivation),
}

impl<'a, T: Element> Operand<'a, T> {
    /// Returns some of the elements; for a deferred map they must be whole rows.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Stored(x) => Self::Stored(x.part(range)),
            Self::Deferred(z, affine) => Self::Deferred(&z[range], affine),
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Stored(x) => x.len(),
            Self::Deferred(z, _) => z.len(),
        }
    }

    /// Writes the elements.
    fn write(self, y: Sink<'_, T>) -> Written<'_> {
        match self {
            Self::Stored(x) => copy(x, y),
            Self::Deferred(z, affine) => affine.write(z, y),
        }
    }

    /// Returns the elements; `scratch` holds them if they must be computed.
    pub(crate) fn elements(self, scratch: &'a mut Vec<T>) -> &'a [T] {
        if let Self::Stored(Stored::Floats(x)) = self {
            return x;
        }
        scratch.clear();
        self.append_to(scratch)
    }

    /// Returns the elements as factors of a product that must be multiplied by [`Operand::scale`].
    /// Levels become whole numbers if the element type would round their values.
    pub(crate) fn factors(self, scratch: &'a mut Vec<T>) -> &'a [T] {
        match self {
            Self::Stored(Stored::Levels(q, grid)) if T::DTYPE == DType::BF16 => {
                scratch.clear();
                append(scratch, q.len(), |y| whole_numbers(q, &grid, y))
            }
            Self::Deferred(z, affine) if T::DTYPE == DType::BF16 => {
                let Some(grid) = affine.grid() else { return self.elements(scratch) };
                scratch.clear();
                append(scratch, z.len(), |y| affine.whole_numbers(z, grid, y))
            }
            _ => self.elements(scratch),
        }
    }

    /// Returns the factor by which the product of [`Operand::factors`] must be multiplied.
    pub(crate) fn scale(self) -> f32 {
        match self {
            Self::Stored(Stored::Levels(_, grid)) if T::DTYPE == DType::BF16 => grid.step(),
            Self::Deferred(_, affine) if T::DTYPE == DType::BF16 => {
                affine.grid().map_or(1.0, |grid| grid.step())
            }
            _ => 1.0,
        }
    }

    /// Appends the elements, and returns them.
    pub(crate) fn append_to(self, elements: &mut Vec<T>) -> &[T] {
        append(elements, self.len(), |y| self.write(Sink::Floats(y)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use crate::{norm, quantize};

    #[test]
    fn levels_stand_for_what_fake_quantization_gives() {
        for (lo, hi) in [(0.0, 0.75), (-0.9, 0.95), (-0.5, 0.0)] {
            for bits in 2..=8 {
                let (x, range) = (random(1, &[3, 5, 7, 611]), tensor(&[lo, hi]));
                let quant = Quantizer { range: &range, bits: Bits::new(bits).unwrap() };
                let map = FeatureMap::quantize(&x, Some(quant)).unwrap();
                assert_eq!(map.dims(), x.dims());
                let expected = quantize::forward(&x, quant).unwrap();
                assert_eq!(elements(&map.to_float().unwrap()), elements(&expected), "[{lo}, {hi}] at {bits}");
            }
        }
    }

    /// Checks that a reader of a deferred map computes the same bits as [`norm::forward`] writes.
    #[test]
    fn deferred_maps_are_read_as_if_they_were_written() {
        use crate::{depthwise, pointwise, pool, residual};
        for ([n, h, w], c) in MAPS
            .iter()
            .flat_map(|&(n, h, w)| CHANNELS.map(|c| ([n, h, w], c)))
            .chain([([2, 41, 40], 33), ([3, 8, 8], 700)])
        {
            let context = format!("{n}×{h}×{w}×{c}");
            let (z, scale, shift) = (random(1, &[n, h, w, c]), random(2, &[c]), random(3, &[c]));
            let deferred = norm::deferred(&z, &scale, &shift, Activation::Relu6).unwrap();
            assert!(matches!(deferred, FeatureMap::Deferred(_)), "left to its readers");
            let written = norm::forward(&z, &scale, &shift, Activation::Relu6, None).unwrap();
            let same = |read: &dyn Fn(&FeatureMap) -> Tensor| {
                assert_eq!(elements(&read(&deferred)), elements(&read(&written)), "{context}");
            };
            same(&|x| x.to_float().unwrap());
            same(&|x| pool::global_average(x).unwrap());
            same(&|x| residual::add(&z, x).unwrap());
            same(&|x| residual::add_normalized(&z, &scale, &shift, x).unwrap().0);
            let (weight, gy) = (random(4, &[c, 19]), random(5, &[n, h, w, 19]));
            same(&|x| pointwise::forward_stats(x, &weight).unwrap().0);
            same(&|x| pointwise::grad_weight(x, &gy).unwrap());
            let weight = random(6, &[3, 3, c]);
            for stride in [1, 2] {
                same(&|x| depthwise::forward_stats(x, &weight, stride).unwrap().0);
                let gy = random(7, depthwise::forward(&z, &weight, stride).unwrap().dims());
                same(&|x| depthwise::grad_weight(x, &gy, stride).unwrap());
            }
        }
    }

    /// Checks that the map that a backward pass reads in place of the levels has the same bits as
    /// the floats that the levels stand for.
    #[test]
    fn levels_are_recomputed_as_they_were() {
        use crate::{depthwise, pointwise};
        let range = tensor(&[-0.1, 1.3]);
        let quant = Some(Quantizer { range: &range, bits: Bits::new(4).unwrap() });
        for (dims, dtype) in [[1, 1, 1, 1], [2, 5, 7, 33], [3, 8, 8, 300]]
            .iter()
            .flat_map(|dims| [(dims, DType::F32), (dims, DType::BF16)])
        {
            let (c, context) = (dims[3], format!("{dims:?}, {dtype:?}"));
            let stored = |seed, dims: &[usize]| random(seed, dims).to_dtype(dtype).unwrap();
            let (z, scale, shift) = (stored(1, dims), random(2, &[c]), random(3, &[c]));
            let levels = norm::forward(&z, &scale, &shift, Activation::Relu6, quant).unwrap();
            assert!(matches!(levels, FeatureMap::Levels(_)));
            let again = norm::recomputed(&levels, &z, &scale, &shift, Activation::Relu6, quant).unwrap();
            assert!(matches!(again, FeatureMap::Deferred(_)), "no levels are kept");
            let same = |read: &dyn Fn(&FeatureMap) -> Tensor| {
                assert_eq!(elements(&read(&again)), elements(&read(&levels)), "{context}");
            };
            same(&|x| x.to_float().unwrap());
            let gy = stored(5, &[dims[0], dims[1], dims[2], 19]);
            same(&|x| pointwise::grad_weight(x, &gy).unwrap());
            for stride in [1, 2] {
                let y = depthwise::forward(&z, &random(6, &[3, 3, c]), stride).unwrap();
                let gy = stored(7, y.dims());
                same(&|x| depthwise::grad_weight(x, &gy, stride).unwrap());
            }
        }
    }

    #[test]
    fn same_bits_everywhere() {
        let (x, range) = (random(1, &[300_001]), tensor(&[-0.4, 0.7]));
        let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
        assert_same_everywhere(|| vec![FeatureMap::quantize(&x, Some(quant)).unwrap().to_float().unwrap()]);
    }
}
