//! Launches of bias.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty, module, total};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("bias");

pub(super) fn add(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (n, k) = x.dims2()?;
    let y = empty((n, k), DType::F32, x.device())?;
    Launch::each(MODULE, "add", n * k).read(x)?.read(bias)?.write(&y)?.sizes([n, k])?.run()?;
    Ok(y)
}

pub(super) fn gradient(gy: &Tensor) -> Result<Tensor> {
    total(MODULE, gy, gy.dims()[1])
}
