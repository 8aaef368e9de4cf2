//! Launches of the sums over all elements in learned.cuh.

use crate::Result;
use crate::gpu::{BLOCKS, Launch, Module, THREADS, empty, grouped};
use candle_core::{DType, Tensor};

/// Makes a launch of an elementwise kernel that also takes `sums` sums over all elements of
/// `tensors`. Also returns the tensor `[sums, blocks]` to which each block writes its share, and the
/// number of groups of elements.
pub(crate) fn summed(
    module: Module,
    kernel: &str,
    sums: usize,
    tensors: &[&Tensor],
) -> Result<(Launch, Tensor, usize)> {
    let (kernel, count) = grouped(kernel, tensors[0].dtype(), tensors)?;
    let blocks = count.div_ceil(8 * THREADS).clamp(1, BLOCKS);
    let parts = empty((sums, blocks), DType::F64, tensors[0].device())?;
    Ok((Launch::new(module, kernel, [blocks, 1], [1, THREADS]), parts, count))
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
