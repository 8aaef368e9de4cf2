//! Step 5: activation ranges from batch normalization (Nagel et al., section 5).

use super::draft::{Draft, summed};
use super::normal::Moments;
use crate::Result;
use models::{Node, Quantizer};
use quant_core::{Error, Grid};

impl Draft {
    /// Sets the range of every activation quantizer.
    ///
    /// The range of a unit is `β ± n·γ` over its channels, limited to the activation's bounds and
    /// the caps. The range of a sum is computed in the same way. The pooled features have the range
    /// of the tensor that is pooled, and the image has the range `image`. All ranges except `image`
    /// are widened to contain zero.
    ///
    /// # Errors
    /// If a range is not finite or `image` is not in order.
    pub(crate) fn set_ranges(&mut self, sigmas: f64, image: (f32, f32)) -> Result<()> {
        let ranges = self.ranges(sigmas, image)?;
        for (node, range) in self.network.nodes.iter_mut().zip(ranges) {
            set(node.quantizer_mut(), range)?;
        }
        Ok(())
    }

    /// Returns the range of every node's output.
    fn ranges(&self, sigmas: f64, image: (f32, f32)) -> Result<Vec<(f32, f32)>> {
        let outputs = self.outputs();
        let mut ranges: Vec<(f32, f32)> = Vec::with_capacity(outputs.len());
        for (node, channels) in self.network.nodes.iter().zip(&self.channels) {
            // The mean and deviation before the activation, and the cap.
            let spreads: Vec<(f64, f64, f64)> = match node {
                Node::Image(_) => {
                    ranges.push(image);
                    continue;
                }
                Node::Pool(pool) => {
                    ranges.push(ranges[pool.input]);
                    continue;
                }
                Node::Unit(_) => channels.iter().map(|c| (c.mean, c.deviation, c.cap)).collect(),
                Node::Sum(sum) => {
                    let spread = |sum: Moments| (sum.mean, sum.variance.sqrt(), f64::INFINITY);
                    summed(sum, &outputs).map(spread).collect()
                }
            };
            let (mut low, mut high) = (0f32, 0f32);
            for (mean, deviation, cap) in spreads {
                let (lo, hi) = ((mean - sigmas * deviation) as f32, (mean + sigmas * deviation) as f32);
                if !(lo.is_finite() && hi.is_finite()) {
                    return Err(Error::Range { lo, hi }.into());
                }
                (low, high) = (low.min(lo), high.max(hi.min(cap as f32)));
            }
            ranges.push((node.activation().apply(low), node.activation().apply(high)));
        }
        Ok(ranges)
    }
}

fn set(quantizer: &mut Option<Quantizer>, (lo, hi): (f32, f32)) -> Result<()> {
    if let Some(quantizer) = quantizer {
        Grid::new(lo, hi, quantizer.bits)?;
        quantizer.set_range(lo, hi)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FROZEN, chain, insert_sum, quantization};
    use super::*;
    use kernels::Activation::{Identity, Relu, Relu6};
    use models::Kernel::Pointwise;

    /// Returns a draft of image → ReLU → identity → identity + the first unit's output → ReLU6 →
    /// ReLU, in one channel.
    fn folded() -> Draft {
        let units = [Relu, Identity, Identity, Relu6, Relu].map(|activation| (Pointwise, activation));
        let mut network = chain(1, &units, &[&[1.0f32] as &[f32]; 5])
            .norm(0, &[[1.0, 20.0, 0.0, 1.0]])
            .norm(1, &[[-2.0, 1.0, 0.0, 1.0]])
            .norm(2, &[[2.0, -30.0, 0.0, 1.0]])
            .norm(3, &[[1.0, 2.0, 0.0, 1.0]])
            .norm(4, &[[0.5, -4.0, 0.0, 1.0]])
            .network;
        insert_sum(&mut network, 1, 3);
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        folded.network.quantize(&quantization(8)).unwrap();
        folded
    }

    #[test]
    fn hand_worked_ranges() {
        let mut folded = folded();
        folded.set_ranges(6.0, (-2.0, 3.0)).unwrap();
        let nodes = &folded.network.nodes;
        let check = |node: usize, lo: f64, hi: f64| {
            let range = nodes[node].quantizer().and_then(Quantizer::range).expect("it has been set");
            let range = range.to_vec1::<f32>().unwrap();
            let close = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-3;
            assert!(close(range[0], lo) && close(range[1], hi), "{range:?}, not [{lo}, {hi}]");
        };
        check(0, -2.0, 3.0);
        check(1, 0.0, 20.0 + 6.0);
        check(2, 1.0 - 12.0, 1.0 + 12.0);
        // The sum is quantized instead of the unit that only it reads.
        assert!(nodes[3].quantizer().is_none());
        // At 20 deviations above zero, ReLU changes nothing: the means are −30 + 20, the variances
        // 4 + 1.
        let spread = 6.0 * 5f64.sqrt();
        check(4, -10.0 - spread, -10.0 + spread);
        check(5, 0.0, 6.0);
        // −4 + 6 · 0.5 < 0, so the unit is never active.
        check(6, 0.0, 0.0);
        // The range of the pooled features.
        check(7, 0.0, 0.0);
    }

    #[test]
    fn ranges_end_at_the_caps() {
        let mut draft = folded();
        draft.channels[1][0].cap = 7.5;
        draft.set_caps(1).unwrap();
        draft.set_ranges(6.0, (-2.0, 3.0)).unwrap();
        let range = draft.network.nodes[1].quantizer().and_then(Quantizer::range).unwrap();
        assert_eq!(range.to_vec1::<f32>().unwrap(), [0.0, 7.5]);
        // The clipped output has the mean 7.5 and almost no variance.
        let output = draft.outputs()[1][0];
        assert!((output.mean - 7.5).abs() < 1e-6 && output.variance < 1e-6, "{output:?}");
    }

    #[test]
    fn ranges_that_are_not_finite_are_errors() {
        let mut folded = folded();
        assert!(folded.set_ranges(6.0, (1.0, -1.0)).is_err());
        folded.channels[2][0].mean = f64::NAN;
        assert!(folded.set_ranges(6.0, (-1.0, 1.0)).is_err());
    }
}
