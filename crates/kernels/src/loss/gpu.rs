//! Launches of loss.cu.

use super::Loss;
use crate::Result;
use crate::gpu::{Launch, Module, empty, module};
use candle_core::{DType, Tensor};

const MODULE: Module = module!("loss");

pub(super) fn forward(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Loss> {
    let (n, k) = logits.dims2()?;
    // The gradient, followed by the loss and the number of correct images.
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
    Ok(Loss {
        loss: all.narrow(0, n * k, 1)?.reshape(())?,
        grad: all.narrow(0, 0, n * k)?.reshape((n, k))?,
        correct: all.narrow(0, n * k + 1, 1)?.reshape(())?,
    })
}
