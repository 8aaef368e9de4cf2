use crate::{Found, Result};
use candle_core::{DType, Tensor};
use ranks::Ranks;

/// Sums of losses and of correct classifications over steps, kept on the device until they are
/// read. On an accelerator, reading waits for all pending work; adding does not.
#[derive(Default)]
pub(crate) struct Totals {
    loss: Option<Tensor>,
    correct: Option<Tensor>,
    images: usize,
}

/// The means that [`Totals::read`] computes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Means {
    /// The number of images so far.
    pub(crate) images: usize,
    /// The mean loss per image, in nats.
    pub(crate) loss: f64,
    /// The percentage of correctly classified images.
    pub(crate) top1_percent: f64,
}

impl Totals {
    /// Adds the results of a step with `images` images.
    pub(crate) fn add(&mut self, step: &Found, images: usize) -> Result<()> {
        // The sums are float64, so that they stay accurate for any number of steps.
        let loss = (step.loss.to_dtype(DType::F64)? * images as f64)?;
        let correct = step.correct.to_dtype(DType::F64)?;
        let add = |total: Option<Tensor>, x: Tensor| total.map_or(Ok(x.clone()), |total| total + x);
        self.loss = Some(add(self.loss.take(), loss)?);
        self.correct = Some(add(self.correct.take(), correct)?);
        self.images += images;
        Ok(())
    }

    /// Returns the means so far, over the images of all ranks. Losses and accuracies are read from
    /// the device only here, in one copy.
    ///
    /// # Errors
    /// If there was no image.
    pub(crate) fn read(&self, ranks: Option<&dyn Ranks>) -> Result<Means> {
        let mut sums = match (&self.loss, &self.correct) {
            (Some(loss), Some(correct)) => Tensor::cat(&[loss, correct], 0)?.to_vec1::<f64>()?,
            _ => vec![0.0; 2],
        };
        sums.push(self.images as f64);
        if let Some(ranks) = ranks {
            sums = ranks.totals(&sums);
        }
        if sums[2] == 0.0 {
            let problem = "none of the images can be read: expected at least one that is not damaged";
            return Err(datasets::Error::Invalid(problem.into()).into());
        }
        let mean = |sum: f64| sum / sums[2];
        Ok(Means { images: sums[2] as usize, loss: mean(sums[0]), top1_percent: 100.0 * mean(sums[1]) })
    }
}
