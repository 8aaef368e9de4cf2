use crate::Result;
use datasets::{Dataset, test_batches};
use models::Network;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// How a network does on the test set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Share of images whose label has the largest logit, in percent.
    pub top1_percent: f64,
}

/// Images a step of evaluation; no effect on the result, as running statistics are used.
const BATCH: usize = 250;

/// Evaluates `network` on the test images of `data`.
pub fn evaluate(network: &Network, data: &Arc<Dataset>) -> Result<Evaluation> {
    let device = network.device();
    let (mut loss, mut correct, mut images) = (0.0, 0.0, 0);
    for batch in test_batches(data, BATCH) {
        let batch = batch?;
        let count = batch.labels.elem_count();
        let logits = network.forward(&batch.images.to_device(device)?)?;
        let result = kernels::loss::softmax_cross_entropy(&logits, &batch.labels.to_device(device)?, 0.0)?;
        loss += count as f64 * f64::from(result.loss.to_scalar::<f32>()?);
        correct += f64::from(result.correct.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?);
        images += count;
    }
    Ok(Evaluation { loss: loss / images as f64, top1_percent: 100.0 * correct / images as f64 })
}
