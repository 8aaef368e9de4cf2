//! The launch of augment.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty, module, name};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("augment");

pub(super) fn batch(
    images: &Tensor,
    [index, corners, flip]: [&Tensor; 3],
    pad: usize,
    [mean, std]: [&Tensor; 2],
    dtype: DType,
) -> Result<Tensor> {
    let (count, h, w, c) = images.dims4()?;
    let b = index.elem_count();
    let y = empty((b, h, w, c), dtype, images.device())?;
    Launch::shared(MODULE, format!("batch_{}", name(dtype)), y.elem_count())
        .read(images)?
        .read(index)?
        .read(corners)?
        .read(flip)?
        .read(mean)?
        .read(std)?
        .write(&y)?
        .sizes([count, h, w, c, b, pad])?
        .run()?;
    Ok(y)
}
