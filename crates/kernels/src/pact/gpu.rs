//! Launches of pact.cu.

use super::Gradients;
use crate::Result;
use crate::gpu::{Launch, Module, empty, grouped, module};
use crate::learned::gpu::{summed, totals};
use candle_core::Tensor;
use quant_core::Bits;

const MODULE: Module = module!("pact");

pub(super) fn forward(x: &Tensor, alpha: &Tensor, bits: Bits, signed: bool) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x.device())?;
    let (kernel, count) = grouped("forward", x.dtype(), &[x, &y])?;
    Launch::shared(MODULE, kernel, count)
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
    let (launch, parts, count) = summed(MODULE, "backward", 1, &[x, gy, &gx])?;
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
