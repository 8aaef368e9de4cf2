//! Launches of bias.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty};
use candle_core::{DType, Tensor};

pub(super) fn add(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (n, k) = x.dims2()?;
    let y = empty((n, k), DType::F32, x.device())?;
    Launch::each(Module::Bias, "add", n * k).read(x)?.read(bias)?.write(&y)?.sizes([n, k])?.run()?;
    Ok(y)
}

pub(super) fn gradient(gy: &Tensor) -> Result<Tensor> {
    let (n, k) = gy.dims2()?;
    let gradient = empty(k, DType::F32, gy.device())?;
    let grid = [k.div_ceil(CLASSES), 1];
    Launch::new(Module::Bias, "gradient", grid, [CLASSES, ROWS])
        .read(gy)?
        .write(&gradient)?
        .sizes([n, k])?
        .run()?;
    Ok(gradient)
}

/// The block of the kernel that sums: threads along classes and along images (`CLASSES` and `ROWS` in bias.cu).
const CLASSES: usize = 32;
const ROWS: usize = 8;
