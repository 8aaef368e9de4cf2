//! Launches of dsq.cu.

use super::{Gradients, SOFTNESS};
use crate::Result;
use crate::gpu::{Launch, Module, empty, grouped, module};
use crate::learned::gpu::{summed, totals};
use candle_core::Tensor;
use quant_core::Bits;

const MODULE: Module = module!("dsq");

pub(super) fn forward(x: &Tensor, bounds: &Tensor, bits: Bits) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x.device())?;
    let (kernel, count) = grouped("forward", x.dtype(), &[x, &y])?;
    Launch::shared(MODULE, kernel, count)
        .read(x)?
        .read(bounds)?
        .write(&y)?
        .sizes([count])?
        .floats([bits.max_level() as f32])
        .run()?;
    Ok(y)
}

pub(super) fn backward(
    x: &Tensor,
    gy: &Tensor,
    bounds: &Tensor,
    softness: &Tensor,
    bits: Bits,
) -> Result<Gradients> {
    let gx = empty(x.dims(), x.dtype(), x.device())?;
    let (launch, parts, count) = summed(MODULE, "backward", 3, &[x, gy, &gx])?;
    launch
        .read(x)?
        .read(gy)?
        .read(bounds)?
        .read(softness)?
        .write(&gx)?
        .write(&parts)?
        .sizes([count])?
        .floats([bits.max_level() as f32, SOFTNESS.0, SOFTNESS.1])
        .run()?;
    let sums = totals(MODULE, &parts)?;
    Ok(Gradients { x: gx, bounds: sums.narrow(0, 0, 2)?, softness: sums.narrow(0, 2, 1)? })
}

pub(super) fn project(bounds: &Tensor, softness: &Tensor) -> Result<()> {
    Launch::new(MODULE, "project", [1, 1], [1, 1])
        .write(bounds)?
        .write(softness)?
        .floats([SOFTNESS.0, SOFTNESS.1])
        .run()
}
