//! Launches of loss.cu.

use crate::Result;
use crate::gpu::{Launch, Module, empty, module};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("loss");

/// The gradient, then the loss and the number of correct images, `[N·K + 2]`.
pub(super) fn forward(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Tensor> {
    let (n, k) = logits.dims2()?;
    let all = empty(n * k + 2, DType::F32, logits.device())?;
    let found = empty((2, n), DType::F64, logits.device())?;
    for (kernel, blocks, threads) in [("images", n, 128), ("batch", 1, 256)] {
        Launch::new(MODULE, kernel, [blocks, 1], [threads, 1])
            .read(logits)?
            .read(labels)?
            .write(&all)?
            .write(&found)?
            .doubles([smoothing, 1.0 / n as f64])
            .sizes([n, k])?
            .run()?;
    }
    Ok(all)
}
