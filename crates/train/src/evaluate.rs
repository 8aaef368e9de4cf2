use crate::totals::{Means, Totals};
use crate::{Arithmetic, Error, Found, Result};
use datasets::{Dataset, Feed};
use models::Network;
use ranks::Ranks;
use serde::{Deserialize, Serialize};

/// The loss and accuracy of a network on the test set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The mean cross-entropy, in nats.
    pub loss: f64,
    /// The percentage of images whose label has the largest logit.
    pub top1_percent: f64,
}

/// The maximum numbers of images and pixels per evaluation step. They affect only the rounding of
/// the loss because normalization uses running statistics.
const IMAGES: usize = 250;
const PIXELS: usize = 32 * 224 * 224;

/// Evaluates `network`, on its device, on the test images of `data`.
///
/// # Errors
/// If a computation or reading the data fails, or if the loss is not finite.
pub fn evaluate(network: &Network, data: &dyn Dataset) -> Result<Evaluation> {
    evaluate_in(network, data, Arithmetic::F32)
}

/// Evaluates like [`evaluate`], with the same bits as a training in `arithmetic` after each epoch.
pub fn evaluate_in(network: &Network, data: &dyn Dataset, arithmetic: Arithmetic) -> Result<Evaluation> {
    let mut feed = Feed::new(data, network.device(), arithmetic.dtype());
    let evaluation = evaluate_on(network, &mut feed, None)?;
    match evaluation.loss.is_finite() {
        true => Ok(evaluation),
        false => Err(Error::Loss { network: network.name.clone(), loss: evaluation.loss }),
    }
}

/// Evaluates `network` on the test images of `feed`, which is on the network's device, and combines
/// the result with those of the other ranks.
pub(crate) fn evaluate_on(
    network: &Network,
    feed: &mut Feed,
    ranks: Option<&dyn Ranks>,
) -> Result<Evaluation> {
    let mut totals = Totals::default();
    let (height, width) = feed.data().side();
    for batch in feed.test((PIXELS / (height * width).max(1)).clamp(1, IMAGES))? {
        let batch = batch?;
        let logits = network.forward(&batch.images)?;
        let loss = kernels::loss::softmax_cross_entropy(&logits, &batch.labels, 0.0)?;
        totals.add(&Found::of(&loss)?, batch.labels.elem_count())?;
    }
    let Means { loss, top1_percent, .. } = totals.read(ranks)?;
    Ok(Evaluation { loss, top1_percent })
}
