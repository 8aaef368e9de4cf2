//! The network that all steps work on, and what is known of its channels.

use super::normal::{Moments, clipped};
use crate::{Error, Result};
use candle_core::Tensor;
use kernels::Activation;
use models::{Network, Norm, Unit};

/// A network whose batch normalization has been folded, with the statistics of every unit's channels
/// before their activation, which DFQ uses in place of data.
pub(crate) struct Folded {
    pub(crate) network: Network,
    pub(crate) channels: Vec<Vec<Channel>>,
}

/// The distribution of one channel before its activation, as batch normalization leaves it:
/// `N(β, γ²)` (Nagel et al., section 4.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Channel {
    /// β.
    pub(crate) mean: f64,
    /// `|γ|·√(V/(V+ε))`.
    pub(crate) deviation: f64,
    /// Whether `V < ε`: the filter gives nearly a constant.
    pub(crate) constant: bool,
}

impl Channel {
    /// Mean and variance after the activation.
    pub(crate) fn after(&self, activation: Activation) -> Moments {
        let (lo, hi) = activation.bounds();
        clipped(self.mean, self.deviation, (lo.into(), hi.into()))
    }
}

impl Folded {
    /// Step 1: folds batch normalization and keeps its statistics.
    pub(crate) fn new(network: &Network) -> Result<Self> {
        let mut channels = Vec::with_capacity(network.units.len());
        for unit in &network.units {
            let norm = unit
                .batch_norm()
                .ok_or_else(|| Error::Folded { network: network.name.clone(), unit: unit.name.clone() })?;
            let [gamma, beta, variance] =
                [&norm.gamma, &norm.beta, &norm.variance].map(|t| t.to_vec1::<f32>());
            let of_channel = |((gamma, beta), variance): ((f32, f32), f32)| {
                let variance = f64::from(variance);
                Channel {
                    mean: beta.into(),
                    deviation: f64::from(gamma.abs()) * (variance / (variance + network.epsilon)).sqrt(),
                    constant: variance < network.epsilon,
                }
            };
            channels.push(gamma?.into_iter().zip(beta?).zip(variance?).map(of_channel).collect());
        }
        let mut network = network.duplicate()?;
        network.fold()?;
        Ok(Self { network, channels })
    }

    /// Step 2: ReLU for ReLU6, as equalization needs `φ(s·x) = s·φ(x)` (Nagel et al., section 4.1), and
    /// absorption `φ(y − c) = φ(y) − c` above c. Where a value exceeds 6 this changes the outputs.
    pub(crate) fn replace_relu6(&mut self) {
        for unit in &mut self.network.units {
            if unit.activation == Activation::Relu6 {
                unit.activation = Activation::Relu;
            }
        }
    }

    /// The pairs `(i, i + 1)` of neighbouring units, each by its first, whose shared tensor nothing
    /// else reads: it is neither the beginning nor the end of a residual.
    pub(crate) fn pairs(&self) -> Vec<usize> {
        let tied = |i| self.network.residuals.iter().any(|r| r.from == i || r.to == i);
        (0..self.network.units.len().saturating_sub(1)).filter(|&i| !tied(i)).collect()
    }

    /// Mean and variance of every channel of every unit's output: after the activation and, where a
    /// residual ends, after the addition, whose summands are taken to be independent.
    pub(crate) fn outputs(&self) -> Vec<Vec<Moments>> {
        let mut outputs: Vec<Vec<Moments>> = Vec::with_capacity(self.channels.len());
        for (i, (unit, channels)) in self.network.units.iter().zip(&self.channels).enumerate() {
            let mut output: Vec<Moments> = channels.iter().map(|c| c.after(unit.activation)).collect();
            if let Some(from) = self.network.residual_into(i) {
                for (sum, shortcut) in output.iter_mut().zip(&outputs[from]) {
                    sum.mean += shortcut.mean;
                    sum.variance += shortcut.variance;
                }
            }
            outputs.push(output);
        }
        outputs
    }

    /// Adds `change` `[C]` to a unit's bias.
    pub(crate) fn add_to_bias(&mut self, unit: usize, change: &Tensor) -> Result<()> {
        let bias = bias_mut(&mut self.network.units[unit]);
        *bias = (&*bias + change)?;
        Ok(())
    }
}

/// The bias of a unit of a folded network.
pub(crate) fn bias_mut(unit: &mut Unit) -> &mut Tensor {
    match &mut unit.norm {
        Norm::Bias(bias) => bias,
        Norm::Batch(_) => unreachable!("batch normalization has been folded"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{chain, gaussian_images, mobilenet, relative_difference};
    use super::*;
    use models::{Kernel, Version};

    #[test]
    fn folding_keeps_outputs_and_statistics() {
        let network = mobilenet(Version::V2, Activation::Relu6);
        let images = gaussian_images(4, &network);
        let folded = Folded::new(&network).unwrap();
        let (before, after) = (network.forward(&images).unwrap(), folded.network.forward(&images).unwrap());
        assert!(relative_difference(&before, &after) < 1e-4);
    }

    #[test]
    fn hand_worked_channels() {
        let network = chain(1, &[(Kernel::Pointwise, Activation::Relu)], &[&[1.0, 1.0, 1.0]])
            .norm(0, &[[2.0, -1.0, 0.0, 1.0], [-2.0, 0.5, 0.0, 3e-5], [0.0, 1.0, 0.0, 1e-9]])
            .network;
        let folded = Folded::new(&network).unwrap();
        let expect = [(-1.0, 2.0, false), (0.5, 2.0 * 0.75f64.sqrt(), false), (1.0, 0.0, true)];
        for (channel, (mean, deviation, constant)) in folded.channels[0].iter().zip(expect) {
            assert_eq!((channel.mean, channel.constant), (mean, constant));
            assert!((channel.deviation - deviation).abs() < 1e-4, "{channel:?}");
        }
    }

    #[test]
    fn pairs_leave_out_both_ends_of_residuals() {
        let folded = Folded::new(&mobilenet(Version::V2, Activation::Relu6)).unwrap();
        let pairs = folded.pairs();
        for (i, unit) in folded.network.units.iter().enumerate() {
            let tied = folded.network.residuals.iter().any(|r| r.from == i || r.to == i);
            let last = i + 1 == folded.network.units.len();
            assert_eq!(pairs.contains(&i), !tied && !last, "{}", unit.name);
        }
        // Every expansion and depthwise unit, and some projections.
        assert!(pairs.len() > 34 && pairs.len() < folded.network.units.len() - 10, "{}", pairs.len());
    }

    #[test]
    fn sums_of_residuals_add_means_and_variances() {
        use Activation::{Identity, Relu};
        use Kernel::Pointwise;
        let mut network = chain(
            1,
            &[(Pointwise, Identity), (Pointwise, Relu), (Pointwise, Identity)],
            &[&[1.0], &[1.0], &[1.0]],
        )
        .norm(0, &[[3.0, 1.0, 0.0, 1.0]])
        .norm(2, &[[4.0, -2.0, 0.0, 1.0]])
        .network;
        network.residuals.push(models::Residual { from: 0, to: 2 });
        let outputs = Folded::new(&network).unwrap().outputs();
        let sum = outputs[2][0];
        assert!((sum.mean - (-1.0)).abs() < 1e-4 && (sum.variance - 25.0).abs() < 1e-2, "{sum:?}");
    }
}
