//! Launches of dorefa.cu.

use crate::gpu::{Launch, Module, empty};
use crate::{Result, quantize};
use candle_core::Tensor;
use quant_core::Bits;

pub(super) fn forward(weight: &Tensor, bits: Bits) -> Result<Tensor> {
    let y = empty(weight.dims(), weight.dtype(), weight.device())?;
    Launch::shared(Module::Dorefa, "forward", weight.elem_count())
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
    Launch::shared(Module::Dorefa, "backward", weight.elem_count())
        .read(weight)?
        .read(gy)?
        .read(&quantize::min_max(weight)?)?
        .write(&gw)?
        .sizes([weight.elem_count()])?
        .run()?;
    Ok(gw)
}
