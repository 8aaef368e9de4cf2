//! Feature maps in float, by the levels of their quantizer, or as a normalization that is left to who reads it.

pub(crate) mod gpu;

use crate::cpu::{self, CHUNK, Check, simd};
use crate::norm::{self, Epilogue, Normalizer};
use crate::{Activation, Quantizer, Result, profile};
use candle_core::{DType, Device, Tensor};
use quant_core::{Bits, Grid};
use std::mem::MaybeUninit;
use std::ops::Range;

/// A feature map `[…, C]` that is quantized: each element is the number of its level, one byte, a quarter of the
/// memory of the float that it stands for. The value of level `q` is that of the [`Grid`] over the range:
/// `(q − z)·step`.
#[derive(Clone, Debug)]
pub struct Levels {
    /// The levels, `u8`.
    pub levels: Tensor,
    /// The quantizer's range, `[2]`.
    pub range: Tensor,
    /// The quantizer's bit width.
    pub bits: Bits,
    /// The dtype of the floats that they stand for: `F32`, on a GPU also `BF16`. Operations give their output in it.
    pub dtype: DType,
}

/// The feature map `φ(scale·z + shift)`, which each operation that reads it computes from `z` as it reads. So it is
/// never in memory as a whole, where writing and reading it would cost more than to compute it again. On the CPU.
#[derive(Clone, Debug)]
pub struct Normalized {
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: Activation,
}

/// What one unit of a network hands to the next.
#[derive(Clone, Debug)]
pub enum FeatureMap {
    /// Floats.
    Float(Tensor),
    /// Levels that stand for floats.
    Levels(Levels),
    /// Floats that are computed where they are read.
    Normalized(Normalized),
}

/// A feature map as an operation reads it; a `&Tensor` is one too.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Floats.
    Float(&'a Tensor),
    /// Levels that stand for floats.
    Levels(&'a Levels),
    /// Floats that are computed where they are read.
    Normalized(&'a Normalized),
}

impl<'a> From<&'a Tensor> for Input<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Float(tensor)
    }
}

impl<'a> From<&'a FeatureMap> for Input<'a> {
    fn from(map: &'a FeatureMap) -> Self {
        match map {
            FeatureMap::Float(tensor) => Self::Float(tensor),
            FeatureMap::Levels(levels) => Self::Levels(levels),
            FeatureMap::Normalized(normalized) => Self::Normalized(normalized),
        }
    }
}

impl FeatureMap {
    /// The quantized `x`, as levels; `x` itself without a quantizer.
    pub fn quantize(x: &Tensor, quant: Option<Quantizer<'_>>) -> Result<Self> {
        let check = Check("feature::quantize");
        let Some(quant) = quant else { return Ok(Self::Float(x.clone())) };
        let _note = profile::note(check.0, 0, 5 * x.elem_count());
        check.quantizer(Some(quant))?;
        let x = check.map_float("x", x)?;
        if crate::gpu::runs(x.device()) {
            return gpu::quantize(&x, quant);
        }
        let grid = cpu::grid(quant)?;
        let opened = cpu::open(&x);
        let x = opened.floats()?;
        // SAFETY: `to_levels` writes all of `y`, which is as long as its part of `x`.
        #[allow(unsafe_code)]
        let (levels, _) =
            unsafe { cpu::blocks((x.len(), 1), CHUNK, || (), |(), part, y| to_levels(&x[part], y, &grid)) };
        Self::of_levels(levels, opened.dims(), quant)
    }

    /// `φ(scale·z + shift)` for `z[…, C]`, with `scale` and `shift` of shape `[C]`: the floats of [`norm::forward`], on
    /// the CPU left to who reads them.
    pub fn normalized(z: &Tensor, scale: &Tensor, shift: &Tensor, act: Activation) -> Result<Self> {
        if crate::gpu::runs(z.device()) {
            return norm::forward(z, scale, shift, act, None);
        }
        let check = Check("feature::normalized");
        let (_, c) = check.rows("z", z)?;
        Ok(Self::Normalized(Normalized {
            z: check.float("z", z)?,
            scale: check.dims("scale", scale, &[c])?,
            shift: check.dims("shift", shift, &[c])?,
            act,
        }))
    }

    pub(crate) fn of_levels(levels: Vec<u8>, dims: &[usize], quant: Quantizer<'_>) -> Result<Self> {
        Self::of(Tensor::from_vec(levels, dims, quant.range.device())?, DType::F32, Some(quant))
    }

    /// `map` as the levels of floats of `dtype`, or without a quantizer as floats.
    pub(crate) fn of(map: Tensor, dtype: DType, quant: Option<Quantizer<'_>>) -> Result<Self> {
        Ok(match quant {
            None => Self::Float(map),
            Some(quant) => {
                Self::Levels(Levels { levels: map, range: quant.range.clone(), bits: quant.bits, dtype })
            }
        })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        Input::from(self).dims()
    }

    /// The dtype of the floats that it stands for.
    pub fn dtype(&self) -> DType {
        Input::from(self).dtype()
    }

    /// The floats that it stands for.
    pub fn to_float(&self) -> Result<Tensor> {
        Input::from(self).to_float()
    }
}

impl<'a> Input<'a> {
    /// The dimensions.
    pub fn dims(self) -> &'a [usize] {
        self.tensor().dims()
    }

    /// Its size in memory.
    pub(crate) fn bytes(self) -> usize {
        self.tensor().elem_count() * self.tensor().dtype().size_in_bytes()
    }

    /// [`Input::bytes`], and those of the map that it was made of, if that is read too.
    pub(crate) fn bytes_with(self, below: Option<&Epilogue>) -> usize {
        match (self, below) {
            (Self::Normalized(_), _) | (_, None) => self.bytes(),
            (_, Some(below)) => self.bytes() + 4 * below.z.elem_count(),
        }
    }

    /// The device.
    pub(crate) fn device(self) -> &'a Device {
        self.tensor().device()
    }

    /// The dtype of the floats.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Float(tensor) => tensor.dtype(),
            Self::Levels(levels) => levels.dtype,
            Self::Normalized(normalized) => normalized.z.dtype(),
        }
    }

    /// What is in memory.
    fn tensor(self) -> &'a Tensor {
        match self {
            Self::Float(tensor) => tensor,
            Self::Levels(levels) => &levels.levels,
            Self::Normalized(normalized) => &normalized.z,
        }
    }

    /// The floats that it stands for.
    pub fn to_float(self) -> Result<Tensor> {
        match self {
            Self::Float(tensor) => Ok(tensor.clone()),
            Self::Normalized(Normalized { z, scale, shift, act }) => {
                match norm::forward(z, scale, shift, *act, None)? {
                    FeatureMap::Float(y) => Ok(y),
                    _ => unreachable!("there is no quantizer"),
                }
            }
            Self::Levels(levels) => {
                if crate::gpu::runs(levels.levels.device()) {
                    return gpu::to_float(levels);
                }
                let grid = levels.grid()?;
                let opened = cpu::open(&levels.levels);
                let q = opened.bytes()?;
                // SAFETY: `to_values` writes all of `y`, which is as long as its part of `q`.
                #[allow(unsafe_code)]
                let (values, _) = unsafe {
                    cpu::blocks((q.len(), 1), CHUNK, || (), |(), part, y| to_values(&q[part], y, &grid))
                };
                Ok(Tensor::from_vec(values, self.dims(), levels.levels.device())?)
            }
        }
    }

    /// The feature map, contiguous, as a kernel reads it.
    pub(crate) fn open(self, check: &Check, argument: &'static str) -> Result<OpenInput> {
        Ok(match self {
            Self::Float(tensor) => {
                OpenInput { tensor: check.float(argument, tensor)?, meaning: Meaning::Values }
            }
            Self::Levels(levels) => {
                let tensor = check.dtype(argument, &levels.levels, DType::U8)?;
                OpenInput { tensor, meaning: Meaning::Levels(levels.grid()?) }
            }
            Self::Normalized(Normalized { z, scale, shift, act }) => {
                let (_, c) = check.rows(argument, z)?;
                let normalizer = Normalizer::new(check, c, scale, shift, *act, None)?;
                OpenInput { tensor: z.clone(), meaning: Meaning::Normalized(normalizer) }
            }
        })
    }
}

impl Levels {
    pub(crate) fn quantizer(&self) -> Quantizer<'_> {
        Quantizer { range: &self.range, bits: self.bits }
    }

    pub(crate) fn grid(&self) -> Result<Grid> {
        Ok(cpu::grid(self.quantizer())?)
    }
}

/// A contiguous feature map, checked.
pub(crate) struct OpenInput {
    tensor: Tensor,
    meaning: Meaning,
}

/// What the elements of a feature map's tensor stand for.
pub(crate) enum Meaning {
    /// For themselves.
    Values,
    Levels(Grid),
    Normalized(Normalizer),
}

impl OpenInput {
    pub(crate) fn opened(&self) -> (cpu::Opened<'_>, &Meaning) {
        (cpu::open(&self.tensor), &self.meaning)
    }
}

/// The elements of a feature map in a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Float(&'a [f32]),
    Levels(&'a [u8], Grid),
    /// Whole rows of `z`.
    Normalized(&'a [f32], &'a Normalizer),
}

impl<'a> Source<'a> {
    pub(crate) fn new((opened, meaning): &'a (cpu::Opened<'_>, &Meaning)) -> Result<Self> {
        Ok(match meaning {
            Meaning::Values => Self::Float(opened.floats()?),
            Meaning::Levels(grid) => Self::Levels(opened.bytes()?, *grid),
            Meaning::Normalized(normalizer) => Self::Normalized(opened.floats()?, normalizer),
        })
    }

    /// Some of the elements; of a normalized map whole rows.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Float(x) => Self::Float(&x[range]),
            Self::Levels(q, grid) => Self::Levels(&q[range], grid),
            Self::Normalized(z, normalizer) => Self::Normalized(&z[range], normalizer),
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Float(x) | Self::Normalized(x, _) => x.len(),
            Self::Levels(q, _) => q.len(),
        }
    }

    /// The floats; `scratch` holds them if they must be computed.
    pub(crate) fn floats(self, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        if let Self::Float(x) = self {
            return x;
        }
        scratch.clear();
        self.append_to(scratch);
        scratch
    }

    /// Appends the floats.
    pub(crate) fn append_to(self, floats: &mut Vec<f32>) {
        cpu::append(floats, self.len(), |y| match self {
            Self::Float(x) => drop(y.write_copy_of_slice(x)),
            Self::Levels(q, grid) => to_values(q, y, &grid),
            Self::Normalized(z, normalizer) => normalizer.floats(z, y),
        });
    }
}

/// The byte of a level, which is a whole number from 0 to 255: the last one of the sum with 2²³, where floats are
/// whole numbers. (A conversion would look for numbers that do not fit, in several instructions.)
#[inline(always)]
pub(crate) fn byte(level: f32) -> u8 {
    (level + 8_388_608.0).to_bits() as u8
}

simd! {
    fn to_levels(x: &[f32], levels: &mut [MaybeUninit<u8>], grid: &Grid) {
        let grid = *grid;
        for (level, x) in levels.iter_mut().zip(x) {
            level.write(byte(grid.level(*x)));
        }
    }
}

simd! {
    fn to_values(levels: &[u8], values: &mut [MaybeUninit<f32>], grid: &Grid) {
        let grid = *grid;
        for (value, level) in values.iter_mut().zip(levels) {
            value.write(grid.value(f32::from(*level)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize;
    use crate::testing::*;

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

    /// To the bit: who reads a normalization computes what [`norm::forward`] writes.
    #[test]
    fn normalizations_are_read_as_if_they_were_written() {
        use crate::{depthwise, pointwise, pool, residual};
        for ([n, h, w], c) in MAPS
            .iter()
            .flat_map(|&(n, h, w)| CHANNELS.map(|c| ([n, h, w], c)))
            .chain([([2, 41, 40], 33), ([3, 8, 8], 700)])
        {
            let context = format!("{n}×{h}×{w}×{c}");
            let (z, scale, shift) = (random(1, &[n, h, w, c]), random(2, &[c]), random(3, &[c]));
            let lazy = FeatureMap::normalized(&z, &scale, &shift, Activation::Relu6).unwrap();
            assert!(matches!(lazy, FeatureMap::Normalized(_)), "left to who reads it");
            let written = norm::forward(&z, &scale, &shift, Activation::Relu6, None).unwrap();
            let same = |read: &dyn Fn(&FeatureMap) -> Tensor| {
                assert_eq!(elements(&read(&lazy)), elements(&read(&written)), "{context}");
            };
            same(&|x| x.to_float().unwrap());
            same(&|x| pool::global_average(x).unwrap());
            same(&|x| match residual::add_quantize(&z, x, None).unwrap() {
                FeatureMap::Float(sum) => sum,
                _ => unreachable!("there is no quantizer"),
            });
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

    #[test]
    fn same_bits_everywhere() {
        let (x, range) = (random(1, &[300_001]), tensor(&[-0.4, 0.7]));
        let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
        assert_same_everywhere(|| vec![FeatureMap::quantize(&x, Some(quant)).unwrap().to_float().unwrap()]);
    }
}
