//! Launches of quantize.cu.

use crate::gpu::{Launch, Module, empty, grids, grouped, module};
use crate::{Quantizer, Result};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("quantize");

/// The number of elements up to which one block finds the extremes. A second launch would take
/// longer.
const ONE_BLOCK: usize = 16 * 1024;

/// The maximum number of blocks that find extremes.
const MOST_BLOCKS: usize = 512;

pub(super) fn forward(x: &Tensor, quant: Quantizer<'_>) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x.device())?;
    let (kernel, count) = grouped("fake", x.dtype(), &[x, &y])?;
    Launch::shared(MODULE, kernel, count)
        .read(x)?
        .read(quant.range)?
        .write(&y)?
        .sizes([count, grids(quant)])?
        .floats([quant.bits.max_level() as f32])
        .run()?;
    Ok(y)
}

pub(super) fn backward(x: &Tensor, gy: &Tensor, quant: Quantizer<'_>) -> Result<Tensor> {
    let gx = empty(x.dims(), x.dtype(), x.device())?;
    let (kernel, count) = grouped("mask", x.dtype(), &[x, gy, &gx])?;
    Launch::shared(MODULE, kernel, count)
        .read(x)?
        .read(gy)?
        .read(quant.range)?
        .write(&gx)?
        .sizes([count, grids(quant)])?
        .floats([quant.bits.max_level() as f32])
        .run()?;
    Ok(gx)
}

pub(super) fn min_max(x: &Tensor) -> Result<Tensor> {
    let (kernel, count) = grouped("extremes", x.dtype(), &[x])?;
    let blocks = if x.elem_count() <= ONE_BLOCK { 1 } else { count.div_ceil(256 * 8).min(MOST_BLOCKS) };
    let parts = empty((2, blocks), DType::F32, x.device())?;
    Launch::new(MODULE, kernel, [blocks, 1], [256, 1]).read(x)?.write(&parts)?.sizes([count])?.run()?;
    extremes_of_all(&parts)
}

/// Returns the smallest element of the first row and the largest of the second row of `parts[2,
/// n]`.
pub(crate) fn extremes_of_all(parts: &Tensor) -> Result<Tensor> {
    let count = parts.dims()[1];
    if count == 1 {
        return Ok(parts.reshape(2)?);
    }
    let extremes = empty(2, DType::F32, parts.device())?;
    Launch::new(MODULE, "extremes_of_all", [1, 1], [256, 1])
        .read(parts)?
        .write(&extremes)?
        .sizes([count])?
        .run()?;
    Ok(extremes)
}

pub(super) fn update_range(range: &Tensor, batch: &Tensor, momentum: f32) -> Result<()> {
    Launch::new(MODULE, "update_range", [1, 1], [2, 1]).write(range)?.read(batch)?.floats([momentum]).run()
}
