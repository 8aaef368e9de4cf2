//! Launches of the sums over all elements in learned.cuh.

use crate::Result;
use crate::gpu::{BLOCKS, Launch, Module, THREADS, empty};
use candle_core::{DType, Device, Tensor};

/// Makes a launch of a kernel that takes `sums` sums over `count` groups of elements. Also returns
/// the tensor `[sums, blocks]` to which each block writes its share.
pub(crate) fn summed(
    module: Module,
    kernel: impl AsRef<str>,
    sums: usize,
    count: usize,
    device: &Device,
) -> Result<(Launch, Tensor)> {
    let blocks = count.div_ceil(8 * THREADS).clamp(1, BLOCKS);
    Ok((Launch::new(module, kernel, [blocks, 1], [1, THREADS]), empty((sums, blocks), DType::F64, device)?))
}

/// Returns the sums `[sums]` over the blocks' shares.
pub(crate) fn totals(module: Module, parts: &Tensor) -> Result<Tensor> {
    let (sums, blocks) = parts.dims2()?;
    let totals = empty(sums, DType::F32, parts.device())?;
    Launch::new(module, "totals", [1, 1], [sums, THREADS / sums])
        .read(parts)?
        .write(&totals)?
        .sizes([blocks])?
        .run()?;
    Ok(totals)
}
