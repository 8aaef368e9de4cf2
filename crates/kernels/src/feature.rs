//! Feature maps in float, or by the levels of their quantizer.

pub(crate) mod gpu;

use crate::cpu::{self, CHUNK, Check, simd};
use crate::{Quantizer, Result, profile};
use candle_core::{DType, Device, Tensor};
use quant_core::{Bits, Grid};
use std::mem::MaybeUninit;

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

/// What one unit of a network hands to the next.
#[derive(Clone, Debug)]
pub enum FeatureMap {
    /// Floats.
    Float(Tensor),
    /// Levels that stand for floats.
    Levels(Levels),
}

/// A feature map as an operation reads it; a `&Tensor` is one too.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Floats.
    Float(&'a Tensor),
    /// Levels that stand for floats.
    Levels(&'a Levels),
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

    /// The dtype of the floats, or of those that the levels stand for.
    pub fn dtype(&self) -> DType {
        Input::from(self).dtype()
    }

    /// The floats that the levels stand for.
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

    /// The device.
    pub(crate) fn device(self) -> &'a Device {
        self.tensor().device()
    }

    /// The dtype of the floats.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Float(tensor) => tensor.dtype(),
            Self::Levels(levels) => levels.dtype,
        }
    }

    fn tensor(self) -> &'a Tensor {
        match self {
            Self::Float(tensor) => tensor,
            Self::Levels(levels) => &levels.levels,
        }
    }

    /// The floats that the levels stand for.
    pub fn to_float(self) -> Result<Tensor> {
        match self {
            Self::Float(tensor) => Ok(tensor.clone()),
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
            Self::Float(tensor) => OpenInput { tensor: check.float(argument, tensor)?, grid: None },
            Self::Levels(levels) => {
                let tensor = check.dtype(argument, &levels.levels, DType::U8)?;
                OpenInput { tensor, grid: Some(levels.grid()?) }
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
    grid: Option<Grid>,
}

impl OpenInput {
    pub(crate) fn opened(&self) -> (cpu::Opened<'_>, Option<Grid>) {
        (cpu::open(&self.tensor), self.grid)
    }
}

/// The elements of a feature map in a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Float(&'a [f32]),
    Levels(&'a [u8], Grid),
}

impl<'a> Source<'a> {
    pub(crate) fn new((opened, grid): &'a (cpu::Opened<'_>, Option<Grid>)) -> Result<Self> {
        Ok(match grid {
            None => Self::Float(opened.floats()?),
            Some(grid) => Self::Levels(opened.bytes()?, *grid),
        })
    }

    pub(crate) fn part(self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::Float(x) => Self::Float(&x[range]),
            Self::Levels(q, grid) => Self::Levels(&q[range], grid),
        }
    }

    /// The floats; `scratch` holds them if they must be computed.
    pub(crate) fn floats(self, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Self::Float(x) => x,
            Self::Levels(q, grid) => {
                scratch.clear();
                scratch.reserve(q.len());
                to_values(q, &mut scratch.spare_capacity_mut()[..q.len()], &grid);
                // SAFETY: just written.
                #[allow(unsafe_code)]
                unsafe {
                    scratch.set_len(q.len());
                }
                scratch
            }
        }
    }
}

/// The byte of a level, which is a whole number from 0 to 255: the last one of the sum with 2²³, where floats are
/// whole numbers. (A conversion would look for numbers that do not fit, in several instructions.)
#[inline(always)]
pub(crate) fn byte(level: f32) -> u8 {
    (level + 8_388_608.0).to_bits() as u8
}

/// The levels of some floats.
pub(crate) fn levels(x: &[f32], grid: &Grid) -> Vec<u8> {
    let mut levels = Vec::with_capacity(x.len());
    to_levels(x, &mut levels.spare_capacity_mut()[..x.len()], grid);
    // SAFETY: just written.
    #[allow(unsafe_code)]
    unsafe {
        levels.set_len(x.len());
    }
    levels
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

    #[test]
    fn same_bits_everywhere() {
        let (x, range) = (random(1, &[300_001]), tensor(&[-0.4, 0.7]));
        let quant = Quantizer { range: &range, bits: Bits::new(4).unwrap() };
        assert_same_everywhere(|| vec![FeatureMap::quantize(&x, Some(quant)).unwrap().to_float().unwrap()]);
    }
}
