//! Softmax cross-entropy with label smoothing.
//!
//! With `p = softmax(logits)` and the target `t = (1 − ε)·onehot(label) + ε/K` (PyTorch's
//! convention), the loss of an image is `−Σ_k t_k·ln p_k`. The loss of a batch is the mean over its
//! images, so the gradient is `(p − t)/N`.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open};
use crate::work::{CHUNK, generate};
use crate::{Result, profiler};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// The results of [`softmax_cross_entropy`].
#[derive(Clone, Debug)]
pub struct Loss {
    /// The mean loss of the batch, a scalar.
    pub loss: Tensor,
    /// The gradient of the mean loss with respect to the logits, `[N, K]`.
    pub grad: Tensor,
    /// The number of images whose largest logit (the first, if several are equal) is at the label.
    /// It is an `f32` scalar, so that it can be summed with the losses.
    pub correct: Tensor,
}

/// Computes the mean cross-entropy of `logits[N, K]` against `labels[N]` (`u32`), its gradient, and
/// the number of images classified correctly.
///
/// # Errors
/// Returns an error for wrong shapes and for a label that is not below `K`. On a GPU, where nothing
/// waits for the results of a kernel, such a label makes the loss and the gradient of its image NaN
/// instead.
pub fn softmax_cross_entropy(logits: &Tensor, labels: &Tensor, smoothing: f64) -> Result<Loss> {
    let check = Check("loss::softmax_cross_entropy");
    let (n, k) = match logits.dims() {
        &[n, k] if n > 0 && k > 0 => (n, k),
        _ => return Err(check.shape("logits", logits, "[images, classes]")),
    };
    let _note = profiler::note(check.0, 0, 8 * logits.elem_count());
    let labels = check.of("labels", labels, &[n], DType::U32)?;
    let logits = check.float("logits", logits)?;
    if crate::gpu::runs(logits.device()) {
        return gpu::forward(&logits, &labels, smoothing);
    }
    let (logits, labels) = (open(&logits), open(&labels));
    let (logits, labels) = (logits.floats()?, labels.elements::<u32>()?);
    if let Some(label) = labels.iter().find(|label| **label as usize >= k) {
        return Err(check.setting(format!("label {label} is outside the {k} classes")));
    }
    let images = (CHUNK / 8 / k).max(1);
    let (grad, found) = generate(
        n * k,
        images * k,
        || (),
        |(), range: Range<usize>, grad| {
            let (mut loss, mut correct) = (0.0, 0usize);
            for (row, grad) in (range.start / k..).zip(grad.chunks_exact_mut(k)) {
                let logits = &logits[row * k..][..k];
                let (l, c) = image(logits, labels[row] as usize, smoothing, 1.0 / n as f64, grad);
                loss += l;
                correct += usize::from(c);
            }
            (loss, correct)
        },
    );
    let (loss, correct) = found.into_iter().fold((0.0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    Ok(Loss {
        loss: cpu::tensor(vec![(loss / n as f64) as f32], ())?,
        grad: cpu::tensor(grad, (n, k))?,
        correct: cpu::tensor(vec![correct as f32], ())?,
    })
}

/// Writes `scale` times the gradient of one image's loss, and returns the loss and whether the
/// image is classified correctly.
fn image(logits: &[f32], label: usize, smoothing: f64, scale: f64, grad: &mut [f32]) -> (f64, bool) {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    let max = f64::from(logits[best]);
    let spread = smoothing / logits.len() as f64;
    let (mut sum, mut total) = (0.0, 0.0);
    for logit in logits {
        let shifted = f64::from(*logit) - max;
        sum += shifted.exp();
        total += shifted;
    }
    for (grad, logit) in grad.iter_mut().zip(logits) {
        *grad = (((f64::from(*logit) - max).exp() / sum - spread) * scale) as f32;
    }
    let p = (f64::from(logits[label]) - max).exp() / sum;
    grad[label] = ((p - spread - (1.0 - smoothing)) * scale) as f32;
    // The loss is −Σ t·(shifted − ln sum), and the targets sum to 1.
    let at_label = f64::from(logits[label]) - max;
    (sum.ln() - (1.0 - smoothing) * at_label - spread * total, best == label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn labels(n: usize, k: usize) -> Tensor {
        let labels: Vec<u32> = (0..n).map(|i| (i * 7 % k) as u32).collect();
        Tensor::new(labels, &candle_core::Device::Cpu).unwrap()
    }

    fn reference(logits: &Tensor, labels: &Tensor, smoothing: f64) -> candle_core::Result<Tensor> {
        let (n, k) = logits.dims2()?;
        let log_p = candle_nn::ops::log_softmax(logits, 1)?;
        let at_label = log_p.gather(&labels.unsqueeze(1)?, 1)?.sum_all()?;
        ((at_label * (smoothing - 1.0))? - (log_p.sum_all()? * (smoothing / k as f64))?)? / n as f64
    }

    #[test]
    fn loss_and_gradient_match_the_reference() {
        for (n, k) in [(1, 2), (1, 100), (5, 3), (200, 100), (64, 1000)] {
            for smoothing in [0.0, 0.1] {
                let context = format!("{n}×{k}, smoothing {smoothing}");
                let logits = (random(1, &[n, k]) * 5.0).unwrap();
                let labels = labels(n, k);
                let found = softmax_cross_entropy(&logits, &labels, smoothing).unwrap();
                let reference = |inputs: &[Tensor]| reference(&inputs[0], &labels, smoothing);
                assert_close(&found.loss, &reference(std::slice::from_ref(&logits)).unwrap(), 1e-6, &context);
                let one = Tensor::new(1f32, logits.device()).unwrap();
                assert_gradients(&[&logits], &one, reference, &[&found.grad], &context);
                let best = logits.argmax(1).unwrap().eq(&labels).unwrap();
                let best = best.to_dtype(DType::F32).unwrap().sum_all().unwrap();
                assert_eq!(elements(&found.correct), elements(&best));
            }
        }
    }

    #[test]
    fn huge_logits_stay_finite_and_ties_go_to_the_first() {
        let logits =
            Tensor::new(&[[3e38f32, -3e38, 0.0], [1.0, 1.0, 0.0]], &candle_core::Device::Cpu).unwrap();
        let labels = Tensor::new(&[0u32, 1], &candle_core::Device::Cpu).unwrap();
        let found = softmax_cross_entropy(&logits, &labels, 0.0).unwrap();
        assert!(elements(&found.grad).iter().all(|g| g.is_finite()));
        assert!(found.loss.to_scalar::<f32>().unwrap().is_finite());
        assert_eq!(found.correct.to_scalar::<f32>().unwrap(), 1.0);
    }

    #[test]
    fn labels_outside_the_classes_are_errors() {
        let labels = Tensor::new(&[0u32, 3], &candle_core::Device::Cpu).unwrap();
        let message = softmax_cross_entropy(&random(1, &[2, 3]), &labels, 0.0).unwrap_err().to_string();
        assert!(message.contains("label 3 is outside the 3 classes"), "{message}");
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let (logits, labels) = (random(1, &[500, 100]), labels(500, 100));
        assert_same_on_threads(|| {
            let found = softmax_cross_entropy(&logits, &labels, 0.1).unwrap();
            vec![found.loss, found.grad, found.correct]
        });
    }
}
