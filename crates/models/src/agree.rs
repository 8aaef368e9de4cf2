//! Values that ranks of the same training find separately and must agree on.

use crate::{Network, Parameter, Result, Role};
use candle_core::Tensor;
use ranks::Ranks;

impl Network {
    /// Makes the moving averages of all ranks equal.
    ///
    /// Running statistics are averaged. The range of an activation becomes the smallest one that
    /// contains the ranges of all ranks.
    pub fn agree_on_averages(&mut self, ranks: &dyn Ranks) -> Result<()> {
        for (name, role, tensor) in self.slots_mut() {
            let is_a = |field: &str| role.is_none() && name.ends_with(field);
            if is_a(".mean") || is_a(".variance") {
                *tensor = average(ranks, tensor)?;
            } else if is_a(".range") {
                *tensor = widest(ranks, tensor)?;
            }
        }
        Ok(())
    }

    /// Averages over all ranks, in place, what quantizers learn: each rank has initialized it from
    /// its own first images.
    pub fn agree_on_starts(&self, ranks: &dyn Ranks) -> Result<()> {
        for Parameter { tensor, role, .. } in self.parameters() {
            if matches!(role, Role::Clip | Role::Interval) {
                tensor.slice_set(&average(ranks, &tensor)?, 0, 0)?;
            }
        }
        Ok(())
    }
}

/// Returns the mean of a tensor over all ranks.
fn average(ranks: &dyn Ranks, tensor: &Tensor) -> Result<Tensor> {
    let mut values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    ranks.sum(&mut values);
    values.iter_mut().for_each(|value| *value /= ranks.size() as f32);
    Ok(Tensor::from_vec(values, tensor.shape(), tensor.device())?)
}

/// Returns the range `[2]` from the lowest to the highest value of the ranks' ranges.
pub(crate) fn widest(ranks: &dyn Ranks, range: &Tensor) -> Result<Tensor> {
    let own: Vec<f64> = range.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    let all = ranks.gather(&own);
    let (lows, highs) = (all.iter().step_by(2), all.iter().skip(1).step_by(2));
    let (lo, hi) =
        (lows.copied().fold(f64::INFINITY, f64::min), highs.copied().fold(f64::NEG_INFINITY, f64::max));
    Ok(Tensor::new(&[lo as f32, hi as f32], range.device())?)
}
