//! Launches of feature.cu.

use super::{FeatureMap, Levels};
use crate::check::Check;
use crate::gpu::{Launch, Module, empty, grids, grouped, module, name};
use crate::{Quantizer, Result};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("feature");

/// A feature map in the form that kernels read: contiguous floats or levels.
pub(crate) struct Map {
    pub(crate) tensor: Tensor,
    /// The range and the largest level, if the map is levels.
    pub(crate) range: Option<Tensor>,
    pub(crate) max_level: f32,
}

impl Map {
    pub(crate) fn new(check: &Check, argument: &'static str, x: &FeatureMap) -> Result<Self> {
        Ok(match x {
            FeatureMap::Levels(levels) => Self {
                tensor: check.dtype(argument, &levels.levels, DType::U8)?,
                range: Some(levels.range.clone()),
                max_level: levels.bits.max_level() as f32,
            },
            FeatureMap::Float(_) | FeatureMap::Deferred(_) => {
                Self::float(check.map_float(argument, &x.to_float()?)?)
            }
        })
    }

    /// Wraps contiguous floats.
    pub(crate) fn float(tensor: Tensor) -> Self {
        Self { tensor, range: None, max_level: 0.0 }
    }

    /// Returns the dtype's name in the names of kernels.
    pub(crate) fn name(&self) -> &'static str {
        name(self.tensor.dtype())
    }
}

/// Returns a tensor of dtype `to` and of the shape of `x`, written by an elementwise kernel for
/// dtype `of`.
fn convert(kernel: &str, x: &Tensor, quant: Quantizer<'_>, of: DType, to: DType) -> Result<Tensor> {
    let y = empty(x.dims(), to, x.device())?;
    let (kernel, count) = grouped(kernel, of, &[x, &y])?;
    Launch::shared(MODULE, kernel, count)
        .read(x)?
        .read(quant.range)?
        .write(&y)?
        .sizes([count, grids(quant)])?
        .floats([quant.bits.max_level() as f32])
        .run()?;
    Ok(y)
}

pub(super) fn quantize(x: &Tensor, quant: Quantizer<'_>) -> Result<FeatureMap> {
    Ok(FeatureMap::of(convert("levels", x, quant, x.dtype(), DType::U8)?, x.dtype(), Some(quant)))
}

pub(super) fn to_float(levels: &Levels) -> Result<Tensor> {
    let contiguous = levels.levels.contiguous()?;
    convert("values", &contiguous, levels.quantizer(), levels.dtype, levels.dtype)
}

/// Returns the levels of `x` minus their zero point, in `bf16`, which holds these whole numbers of
/// at most 8 bits exactly. `x` is either levels or the floats before quantization.
pub(crate) fn integers(x: &Tensor, quant: Quantizer<'_>) -> Result<Tensor> {
    convert("integers", x, quant, x.dtype(), DType::BF16)
}

/// Returns the products of the step of `a` with the steps of the grids of `b`, followed by 0.
///
/// Without `b` there is one product, the step of `a`. [`crate::gpu::product`] multiplies a product
/// of integers by the factor of a single grid; [`scaled`] applies the factors of one grid for each
/// column.
pub(crate) fn steps(a: Quantizer<'_>, b: Option<Quantizer<'_>>) -> Result<Tensor> {
    let grids = b.map_or(1, grids);
    let factors = empty(grids + 1, DType::F32, a.range.device())?;
    let max_level = |quant: Quantizer<'_>| quant.bits.max_level() as f32;
    Launch::each(MODULE, "steps", grids + 1)
        .read(a.range)?
        .read_if(b.map(|b| b.range))?
        .write(&factors)?
        .sizes([grids])?
        .floats([max_level(a), b.map_or(0.0, max_level)])
        .run()?;
    Ok(factors)
}

/// Returns `sums[rows, columns]` (`f32`) in `dtype`, with each column multiplied by its factor.
/// `factors` has at least one factor for each column.
pub(crate) fn scaled(sums: &Tensor, factors: &Tensor, dtype: DType) -> Result<Tensor> {
    let (_, channels) = sums.dims2()?;
    let y = empty(sums.dims(), dtype, sums.device())?;
    let (kernel, count) = grouped("scale", dtype, &[sums, &y])?;
    Launch::shared(MODULE, kernel, count)
        .read(sums)?
        .read(factors)?
        .write(&y)?
        .sizes([count, channels])?
        .run()?;
    Ok(y)
}
