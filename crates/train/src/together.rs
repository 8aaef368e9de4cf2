//! Training of one network by several ranks, each of which has a part of every batch.
//!
//! A step has the same images with the same augmentation as in one process; rank `r` of `n` has the
//! `r`-th part of the batch. The gradients are summed over the ranks, and each rank updates its own
//! copy of the network, so that all copies have the same bits. Rank 0 has the run: it reads the
//! checkpoint, sends the other ranks the starting state, and writes the results.

use crate::{Error, Result, Training};
use candle_core::Tensor;
use datasets::{Dataset, Part};
use models::{Gradients, Network, Parameter};
use ranks::Ranks;

/// What every rank knows about a run.
pub(crate) struct Work<'a> {
    pub(crate) data: &'a dyn Dataset,
    pub(crate) training: &'a Training,
    pub(crate) seed: u64,
    pub(crate) ranks: Option<&'a dyn Ranks>,
}

impl<'a> Work<'a> {
    /// Checks that every rank has an image in every step.
    pub(crate) fn check(&self) -> Result<()> {
        let Some(ranks) = self.ranks else { return Ok(()) };
        let steps = self.data.train_images().div_ceil(self.training.batch);
        let least = self.images(steps.saturating_sub(1)).min(self.training.batch);
        if least < ranks.size() {
            let found = format!("{}, with {least} images in the smallest step", self.training.batch);
            let expected = "no fewer images in any step of an epoch than there are processes";
            return Err(Error::Setting { key: "batch", found, expected });
        }
        Ok(())
    }

    /// Returns what rank 0 passed as `own`.
    pub(crate) fn first_says(&self, own: bool) -> bool {
        self.ranks.map_or(own, |ranks| ranks.broadcast(vec![own.into()]) == [1])
    }

    /// Returns the part of each batch that this rank has.
    pub(crate) fn part(&self) -> Part {
        self.ranks.map_or(Part::WHOLE, |ranks| Part { index: ranks.rank(), of: ranks.size() })
    }

    /// Returns the number of images of all ranks in a step.
    fn images(&self, step: usize) -> usize {
        let Training { batch, .. } = *self.training;
        batch.min(self.data.train_images() - step * batch)
    }

    /// Returns this rank's share of a step, or `None` if this process trains alone.
    pub(crate) fn share(&self, epoch: usize, step: usize) -> Option<Share<'a>> {
        self.ranks.map(|ranks| Share { ranks, starts: (epoch, step) == (0, 0) })
    }

    /// Makes the network the same on all ranks after an epoch, and checks that it is.
    ///
    /// Without `sync_norm` the moving averages differ, because each rank has computed them from its
    /// own images. `missing` is the number of steps that this rank skipped.
    pub(crate) fn agree(&self, network: &mut Network, missing: usize) -> Result<()> {
        let Some(ranks) = self.ranks else { return Ok(()) };
        let fail = |problem: String| Err(Error::Ranks { rank: ranks.rank(), problem });
        if missing > 0 {
            return fail(format!(
                "made {missing} steps less than it should, as there were no images for it that can be read: expected \
                 some in each; remove what is damaged from the data"
            ));
        }
        if !self.training.sync_norm {
            network.agree_on_averages(ranks)?;
        }
        let tensors = network.tensors();
        let own = tensors.iter().map(|(_, tensor)| digest(tensor)).collect::<Result<Vec<f64>>>()?;
        let all = ranks.gather(&own);
        match all.iter().enumerate().find(|(i, other)| own[i % own.len()] != **other) {
            Some((i, _)) => {
                let ((name, _), other) = (&tensors[i % own.len()], i / own.len());
                fail(format!("has another {name} than rank {other} after an epoch: expected the same bits"))
            }
            None => Ok(()),
        }
    }
}

/// Computes a hash of a tensor's bits (FNV-1a over 32-bit words), as a whole number that f64
/// represents exactly.
fn digest(tensor: &Tensor) -> Result<f64> {
    let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    let add = |hash: u64, value: f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0000_0100_0000_01b3);
    Ok((values.into_iter().fold(0xcbf2_9ce4_8422_2325, add) >> 12) as f64)
}

/// The share of a step that one rank has.
pub(crate) struct Share<'a> {
    pub(crate) ranks: &'a dyn Ranks,
    /// Whether this is the first step of the training, in which quantizers are initialized.
    pub(crate) starts: bool,
}

impl Share<'_> {
    /// Scales `gradient`, of the mean loss over the `own` images of this rank, so that the sum over
    /// all ranks is the gradient of the mean loss over all images.
    ///
    /// Images that can't be read are left out, so only the ranks together know how many there are.
    pub(crate) fn of(&self, gradient: &Tensor, own: usize) -> Result<Tensor> {
        let all: f64 = self.ranks.gather(&[own as f64]).into_iter().sum();
        Ok((gradient * (own as f64 / all))?)
    }

    /// Sums every parameter's gradient over all ranks, in one reduction.
    pub(crate) fn sums(&self, parameters: &[Parameter], gradients: &Gradients) -> Result<Vec<Tensor>> {
        let flat = |parameter: &Parameter| Ok(gradients.of(parameter)?.flatten_all()?);
        let all = parameters.iter().map(flat).collect::<Result<Vec<Tensor>>>()?;
        let all = self.ranks.sum_tensor(&Tensor::cat(&all, 0)?)?;
        let mut done = 0;
        let mut sums = Vec::with_capacity(parameters.len());
        for Parameter { tensor, .. } in parameters {
            let count = tensor.elem_count();
            sums.push(all.narrow(0, done, count)?.reshape(tensor.shape())?);
            done += count;
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Of 4 and 4 images one can't be read: the sum is still the gradient of a mean.
    #[test]
    fn shares_are_of_the_images_that_were_read() {
        let mut all = ranks::threads(2);
        let of = |ranks: &dyn Ranks, own| {
            let gradient = Tensor::new(&[7f32], &Device::Cpu).unwrap();
            Share { ranks, starts: false }.of(&gradient, own).unwrap().to_vec1::<f32>().unwrap()
        };
        let (second, first) = (all.pop().unwrap(), all.pop().unwrap());
        let found = std::thread::scope(|scope| {
            let other = scope.spawn(move || of(&second, 4));
            [of(&first, 3), other.join().unwrap()]
        });
        assert_eq!(found, [[3.0], [4.0]]);
    }
}
