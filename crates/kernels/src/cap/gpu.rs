//! Launches of cap.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty, grouped, module};
use candle_core::Tensor;

const MODULE: Module = module!("cap");

pub(super) fn forward(x: &Tensor, cap: &Tensor) -> Result<Tensor> {
    launch("lower", &[x], cap)
}

pub(super) fn backward(y: &Tensor, gy: &Tensor, cap: &Tensor) -> Result<Tensor> {
    launch("pass", &[y, gy], cap)
}

/// Returns the output of a kernel that reads `maps`, which have one shape and dtype.
fn launch(kernel: &str, maps: &[&Tensor], cap: &Tensor) -> Result<Tensor> {
    let like = maps[0];
    let out = empty(like.dims(), like.dtype(), like.device())?;
    let all: Vec<&Tensor> = maps.iter().copied().chain([&out]).collect();
    let (kernel, count) = grouped(kernel, like.dtype(), &all)?;
    let launch = Launch::shared(MODULE, kernel, count);
    let launch = maps.iter().try_fold(launch, |launch, map| launch.read(map))?;
    launch.read(cap)?.write(&out)?.sizes([count, cap.elem_count()])?.run()?;
    Ok(out)
}
