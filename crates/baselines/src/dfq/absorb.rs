//! Step 4: absorption of high biases (Nagel et al., section 4.1, "Absorbing high biases").

use super::draft::Draft;
use crate::Result;
use candle_core::Tensor;
use kernels::Activation;
use models::Kernel;

impl Draft {
    /// Moves `c = max(0, β − n·γ)` of every channel after a ReLU into the bias of the pointwise
    /// unit that reads it: `b¹ ← b¹ − c`, `b² ← b² + W²c`.
    ///
    /// `φ(y − c) = φ(y) − c` holds for `y ≥ c`, which is true except in the lowest tail of
    /// `N(β, γ²)` (0.13 % at n = 3). So the outputs stay nearly the same, while the activation's
    /// range and its cap shrink by c. Returns the number of such channels for each node.
    pub(crate) fn absorb(&mut self, sigmas: f64) -> Result<Vec<usize>> {
        let mut counts = vec![0; self.channels.len()];
        for [maker, reader] in self.pairs() {
            let kernel = self.unit(reader).kernel;
            if self.unit(maker).activation != Activation::Relu || kernel != Kernel::Pointwise {
                continue;
            }
            let mut amounts = Vec::with_capacity(self.channels[maker].len());
            for channel in &mut self.channels[maker] {
                // Nothing above the cap gets through, so no more than the cap is absorbed.
                let amount = (channel.mean - sigmas * channel.deviation).max(0.0).min(channel.cap);
                channel.mean -= amount;
                channel.cap -= amount;
                amounts.push(amount as f32);
            }
            counts[maker] = amounts.iter().filter(|&&amount| amount > 0.0).count();
            let amounts = Tensor::new(amounts, self.network.device())?;
            let gained = kernel.response(&self.unit(reader).weight, &amounts)?;
            self.set_caps(maker)?;
            self.add_to_output(maker, &amounts.neg()?)?;
            self.add_to_convolution(reader, &gained)?;
        }
        Ok(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FROZEN, chain, gaussian_images, relative_difference};
    use super::*;
    use Activation::{Identity, Relu, Relu6};
    use Kernel::{Depthwise, Pointwise};

    /// Returns a network of images → pointwise → depthwise → pointwise with two channels and high
    /// biases everywhere.
    ///
    /// The values of the second unit stay above `β − 3γ` for images in `[−1, 1]`.
    fn network(activation: Activation) -> models::Network {
        let depthwise: Vec<f32> = (0..18).map(|i| 0.01 * (i as f32 - 9.0)).collect();
        chain(
            3,
            &[(Pointwise, activation), (Depthwise { stride: 1 }, activation), (Pointwise, Identity)],
            &[&[0.1, 0.2, -0.1, 0.1, 0.3, -0.2], &depthwise, &[1.0, -2.0, 0.5, 3.0]],
        )
        .norm(0, &[[0.2, 5.0, 0.0, 1.0], [0.2, 5.0, 0.0, 1.0]])
        .norm(1, &[[1.0, 50.0, 0.0, 1.0], [2.0, 40.0, 0.0, 1.0]])
        .network
    }

    #[test]
    fn outputs_stay_and_the_range_shrinks() {
        let network = network(Relu);
        let images = gaussian_images(4, &network).clamp(-1f32, 1f32).unwrap();
        let mut folded = Draft::new(&network, FROZEN).unwrap();
        // The first unit is left out because a depthwise unit reads it, and so is the last.
        assert_eq!(folded.absorb(3.0).unwrap(), [0, 0, 2, 0, 0, 0]);
        let means: Vec<f64> = folded.channels[2].iter().map(|c| c.mean).collect();
        assert!((means[0] - 3.0).abs() < 1e-4 && (means[1] - 6.0).abs() < 1e-4, "{means:?}");
        let highest = |network: &models::Network| {
            let mut highest = 0.0;
            network
                .forward_observed(&images, &mut |i, _, y| {
                    if i == 2 {
                        highest = y.max_all()?.to_scalar::<f32>()?;
                    }
                    Ok(())
                })
                .unwrap();
            highest
        };
        assert!(highest(&folded.network) < 0.3 * highest(&network));
        let (before, after) = (network.forward(&images).unwrap(), folded.network.forward(&images).unwrap());
        assert!(relative_difference(&before, &after) < 1e-4);
    }

    /// A cap decreases by the absorbed amount, which never exceeds the cap. So the outputs do not
    /// change even where values are cut off.
    #[test]
    fn caps_sink() {
        let mut draft = Draft::new(&network(Relu), FROZEN).unwrap();
        // The second unit's outputs are 50 ± 1 and 40 ± 2. Three deviations below are 47 and 34.
        for (channel, cap) in draft.channels[2].iter_mut().zip([48.5, 30.0]) {
            channel.cap = cap;
        }
        draft.set_caps(2).unwrap();
        let images = gaussian_images(4, &draft.network).clamp(-1f32, 1f32).unwrap();
        let before = draft.network.forward(&images).unwrap();
        draft.absorb(3.0).unwrap();
        let caps = draft.unit(2).cap.as_ref().unwrap().to_vec1::<f32>().unwrap();
        assert!((caps[0] - 1.5).abs() < 1e-4 && caps[1] == 0.0, "{caps:?}");
        assert!(relative_difference(&before, &draft.network.forward(&images).unwrap()) < 1e-4);
    }

    #[test]
    fn only_behind_relu() {
        for activation in [Identity, Relu6] {
            assert_eq!(Draft::new(&network(activation), FROZEN).unwrap().absorb(3.0).unwrap(), [0; 6]);
        }
    }
}
