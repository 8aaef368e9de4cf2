//! Launches of pact.cu.

use super::Gradients;
use crate::Result;
use crate::gpu::{Launch, Module, empty, module, name, width};
use crate::learned::gpu::{summed, totals};
use candle_core::Tensor;
use quant_core::Bits;

const MODULE: Module = module!("pact");

pub(super) fn forward(x: &Tensor, alpha: &Tensor, bits: Bits, signed: bool) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x.device())?;
    let width = width(x.elem_count(), [x, &y])?;
    let count = x.elem_count() / width;
    Launch::shared(MODULE, format!("forward_{}_{width}", name(x.dtype())), count)
        .read(x)?
        .read(alpha)?
        .write(&y)?
        .sizes([count, usize::from(signed)])?
        .floats([bits.max_level() as f32])
        .run()?;
    Ok(y)
}

pub(super) fn backward(x: &Tensor, gy: &Tensor, alpha: &Tensor, signed: bool) -> Result<Gradients> {
    let gx = empty(x.dims(), x.dtype(), x.device())?;
    let width = width(x.elem_count(), [x, gy, &gx])?;
    let count = x.elem_count() / width;
    let kernel = format!("backward_{}_{width}", name(x.dtype()));
    let (launch, parts) = summed(MODULE, kernel, 1, count, x.device())?;
    launch
        .read(x)?
        .read(gy)?
        .read(alpha)?
        .write(&gx)?
        .write(&parts)?
        .sizes([count, usize::from(signed)])?
        .run()?;
    Ok(Gradients { x: gx, alpha: totals(MODULE, &parts)? })
}
