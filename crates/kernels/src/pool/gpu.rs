//! Launches of pool.cu.

use crate::check::Check;
use crate::feature::gpu::Map;
use crate::gpu::{Launch, Module, empty, module, name, width};
use crate::{FeatureMap, Result};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("pool");

pub(super) fn global_average(check: &Check, x: &FeatureMap) -> Result<Tensor> {
    let (n, h, w, c) = check.map("x", x.dims())?;
    let x = Map::new(check, "x", x)?;
    let y = empty((n, c), DType::F32, x.tensor.device())?;
    let width = width(c, [&x.tensor, &y])?;
    Launch::each(MODULE, format!("average_{}_{width}", x.name()), n * c / width)
        .read(&x.tensor)?
        .read_if(x.range.as_ref())?
        .write(&y)?
        .sizes([n, h * w, c])?
        .floats([x.max_level])
        .run()?;
    Ok(y)
}

pub(super) fn backward(gy: &Tensor, h: usize, w: usize, dtype: DType) -> Result<Tensor> {
    let (n, c) = gy.dims2()?;
    let gx = empty((n, h, w, c), dtype, gy.device())?;
    let width = width(c, [gy, &gx])?;
    Launch::shared(MODULE, format!("backward_{}_{width}", name(dtype)), n * h * w * c / width)
        .read(gy)?
        .write(&gx)?
        .sizes([n, h * w, c])?
        .floats([1.0 / (h * w) as f32])
        .run()?;
    Ok(gx)
}
