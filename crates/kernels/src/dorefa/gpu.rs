//! Launches of dorefa.cu.

use crate::gpu::{Launch, Module, empty, module};
use crate::{Result, quantize};
use candle_core::Tensor;
use quant_core::Bits;

const MODULE: Module = module!("dorefa");

pub(super) fn forward(weight: &Tensor, bits: Bits) -> Result<Tensor> {
    let y = empty(weight.dims(), weight.dtype(), weight.device())?;
    Launch::shared(MODULE, "forward", weight.elem_count())
        .read(weight)?
        .read(&quantize::min_max(weight)?)?
        .write(&y)?
        .sizes([weight.elem_count()])?
        .floats([bits.max_level() as f32])
        .run()?;
    Ok(y)
}

pub(super) fn backward(weight: &Tensor, gy: &Tensor) -> Result<Tensor> {
    let gw = empty(weight.dims(), weight.dtype(), weight.device())?;
    Launch::shared(MODULE, "backward", weight.elem_count())
        .read(weight)?
        .read(gy)?
        .read(&quantize::min_max(weight)?)?
        .write(&gw)?
        .sizes([weight.elem_count()])?
        .run()?;
    Ok(gw)
}
