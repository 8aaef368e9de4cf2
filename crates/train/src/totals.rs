use crate::Result;
use candle_core::{DType, Tensor};
use kernels::loss::Loss;

/// Losses and hits summed up over steps, where they were computed, until they are read: on an accelerator, reading
/// waits for everything that was begun before, and adding does not.
#[derive(Default)]
pub(crate) struct Totals {
    loss: Option<Tensor>,
    correct: Option<Tensor>,
    images: usize,
}

/// What [`Totals::read`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Means {
    /// Mean loss of an image, in nats.
    pub(crate) loss: f64,
    /// Share of images classified correctly, in percent.
    pub(crate) top1_percent: f64,
}

impl Totals {
    /// Adds a step's mean loss and number of hits over `images` images.
    pub(crate) fn add(&mut self, step: &Loss, images: usize) -> Result<()> {
        // In float64, so that the sums of an epoch are exact enough for any number of steps.
        let loss = (step.loss.to_dtype(DType::F64)? * images as f64)?;
        let correct = step.correct.to_dtype(DType::F64)?;
        let add = |total: Option<Tensor>, x: Tensor| total.map_or(Ok(x.clone()), |total| total + x);
        self.loss = Some(add(self.loss.take(), loss)?);
        self.correct = Some(add(self.correct.take(), correct)?);
        self.images += images;
        Ok(())
    }

    /// Images so far.
    pub(crate) fn images(&self) -> usize {
        self.images
    }

    /// The means so far: the one place where training and evaluation read anything from the device, in one copy.
    pub(crate) fn read(&self) -> Result<Means> {
        let (Some(loss), Some(correct)) = (&self.loss, &self.correct) else {
            return Ok(Means { loss: 0.0, top1_percent: 0.0 });
        };
        let sums = Tensor::stack(&[loss, correct], 0)?.to_vec1::<f64>()?;
        let mean = |sum: f64| sum / self.images.max(1) as f64;
        Ok(Means { loss: mean(sums[0]), top1_percent: 100.0 * mean(sums[1]) })
    }
}
