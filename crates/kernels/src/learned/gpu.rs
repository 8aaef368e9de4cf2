//! Sums over all elements, as learned.cuh takes them.

use crate::Result;
use crate::gpu::{BLOCKS, Launch, Module, THREADS, empty};
use candle_core::{DType, Device, Tensor};

/// A launch of a kernel that leaves `sums` sums over `count` groups of elements, and where each of its blocks leaves
/// its shares, `[sums, blocks]`.
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

/// The sums `[sums]` of the blocks' shares.
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
