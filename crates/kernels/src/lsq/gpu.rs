//! Launches of lsq.cu.

use super::{Gradients, MIN_STEP, Params};
use crate::Result;
use crate::gpu::{Launch, Module, empty, grouped, module};
use crate::learned::gpu::{summed, totals};
use candle_core::Tensor;

const MODULE: Module = module!("lsq");

pub(super) fn forward(x: &Tensor, params: Params<'_>) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x.device())?;
    let (kernel, count) = grouped("forward", x.dtype(), &[x, &y])?;
    let (low, high) = params.levels();
    Launch::shared(MODULE, kernel, count)
        .read(x)?
        .read(params.step)?
        .read_if(params.offset)?
        .write(&y)?
        .sizes([count])?
        .floats([low, high, MIN_STEP])
        .run()?;
    Ok(y)
}

pub(super) fn backward(x: &Tensor, gy: &Tensor, params: Params<'_>, g: f64) -> Result<Gradients> {
    let gx = empty(x.dims(), x.dtype(), x.device())?;
    let (low, high) = params.levels();
    let (launch, parts, count) = summed(MODULE, "backward", 2, &[x, gy, &gx])?;
    launch
        .read(x)?
        .read(gy)?
        .read(params.step)?
        .read_if(params.offset)?
        .write(&gx)?
        .write(&parts)?
        .doubles([g])
        .sizes([count])?
        .floats([low, high, MIN_STEP])
        .run()?;
    let sums = totals(MODULE, &parts)?;
    let offset = params.offset.map(|_| sums.narrow(0, 1, 1)).transpose()?;
    Ok(Gradients { x: gx, step: sums.narrow(0, 0, 1)?, offset })
}

/// Returns the sum of the absolute values, `[1]`.
pub(super) fn magnitude(x: &Tensor) -> Result<Tensor> {
    let (launch, parts, count) = summed(MODULE, "magnitude", 1, &[x])?;
    launch.read(x)?.write(&parts)?.sizes([count])?.run()?;
    totals(MODULE, &parts)
}

pub(super) fn project(step: &Tensor) -> Result<()> {
    Launch::new(MODULE, "project", [1, 1], [1, 1]).write(step)?.floats([MIN_STEP]).run()
}
