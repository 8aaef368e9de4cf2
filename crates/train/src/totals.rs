use crate::{Found, Result};
use candle_core::{DType, Tensor};
use ranks::Ranks;

/// Losses and hits summed up over steps, where they were computed, until they are read: on an accelerator, reading
/// waits for everything that was begun before, and adding does not.
#[derive(Default)]
pub(crate) struct Totals {
    loss: Option<Tensor>,
    correct: Option<Tensor>,
    images: usize,
}

/// What [`Totals::read`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Means {
    /// Images until now.
    pub(crate) images: usize,
    /// Mean loss of an image, in nats.
    pub(crate) loss: f64,
    /// Share of images classified correctly, in percent.
    pub(crate) top1_percent: f64,
}

impl Totals {
    /// Adds what a step found of `images` images.
    pub(crate) fn add(&mut self, step: &Found, images: usize) -> Result<()> {
        // In float64, so that the sums of an epoch are exact enough for any number of steps.
        let loss = (step.loss.to_dtype(DType::F64)? * images as f64)?;
        let correct = step.correct.to_dtype(DType::F64)?;
        let add = |total: Option<Tensor>, x: Tensor| total.map_or(Ok(x.clone()), |total| total + x);
        self.loss = Some(add(self.loss.take(), loss)?);
        self.correct = Some(add(self.correct.take(), correct)?);
        self.images += images;
        Ok(())
    }

    /// The means so far, over the images of all ranks: the one place where training and evaluation read anything from the
    /// device, in one copy.
    pub(crate) fn read(&self, ranks: Option<&dyn Ranks>) -> Result<Means> {
        let mut sums = match (&self.loss, &self.correct) {
            (Some(loss), Some(correct)) => Tensor::cat(&[loss, correct], 0)?.to_vec1::<f64>()?,
            _ => vec![0.0; 2],
        };
        sums.push(self.images as f64);
        if let Some(ranks) = ranks {
            sums = ranks.totals(&sums);
        }
        let mean = |sum: f64| sum / sums[2].max(1.0);
        Ok(Means { images: sums[2] as usize, loss: mean(sums[0]), top1_percent: 100.0 * mean(sums[1]) })
    }
}
