//! The network that all steps work on, and the statistics of its channels.

use super::normal::{Moments, clipped};
use super::{Cap, Normalization};
use crate::{Error, Result};
use candle_core::Tensor;
use kernels::{Activation, norm};
use models::{BatchNorm, Network, Node, Norm, Sum, Unit};

/// A network whose weights are those that will be quantized, and the statistics of its channels,
/// which DFQ uses in place of data.
///
/// If batch normalization is frozen, it has been folded into the weights. `channels` has one entry
/// for each node: the channels of a unit before the activation. The entry is empty for other nodes
/// and for the classifier.
pub(crate) struct Draft {
    pub(crate) network: Network,
    pub(crate) channels: Vec<Vec<Channel>>,
}

/// The distribution of one channel before its activation, as batch normalization leaves it:
/// `N(β, γ²)` (Nagel et al., section 4.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Channel {
    /// β, the mean.
    pub(crate) mean: f64,
    /// `|γ|·√(V/(V+ε))`, the deviation.
    pub(crate) deviation: f64,
    /// Whether `V < ε`, so that the filter is nearly constant.
    pub(crate) constant: bool,
    /// The upper bound of the activation's output, in addition to the activation's own bound. It is
    /// infinite without a cap.
    pub(crate) cap: f64,
}

impl Channel {
    /// Returns the mean and variance after the activation.
    pub(crate) fn after(&self, activation: Activation) -> Moments {
        let (lo, hi) = activation.bounds();
        clipped(self.mean, self.deviation, (lo.into(), f64::from(hi).min(self.cap)))
    }
}

impl Draft {
    /// Step 1: folds batch normalization, unless it stays live, and keeps its statistics.
    pub(crate) fn new(network: &Network, normalization: Normalization) -> Result<Self> {
        let mut channels = Vec::with_capacity(network.nodes.len());
        for (i, node) in network.nodes.iter().enumerate() {
            let Some(unit) = node.unit().filter(|_| i != network.last()) else {
                channels.push(Vec::new());
                continue;
            };
            let norm = unit
                .batch_norm()
                .ok_or_else(|| Error::Folded { network: network.name.clone(), unit: unit.name.clone() })?;
            let [gamma, beta, variance] =
                [&norm.gamma, &norm.beta, &norm.variance].map(|t| t.to_vec1::<f32>());
            let caps = match &unit.cap {
                Some(caps) => caps.to_vec1::<f32>()?,
                None => vec![f32::INFINITY; unit.filters()],
            };
            let of_channel = |(((gamma, beta), variance), cap): (((f32, f32), f32), f32)| {
                let variance = f64::from(variance);
                Channel {
                    mean: beta.into(),
                    deviation: f64::from(gamma.abs()) * (variance / (variance + network.epsilon)).sqrt(),
                    constant: variance < network.epsilon,
                    cap: cap.into(),
                }
            };
            channels.push(gamma?.into_iter().zip(beta?).zip(variance?).zip(caps).map(of_channel).collect());
        }
        let mut network = network.duplicate()?;
        if normalization == Normalization::Frozen {
            network.fold()?;
        }
        Ok(Self { network, channels })
    }

    /// Step 2: replaces ReLU6.
    ///
    /// Equalization needs `φ(s·x) = s·φ(x)` (Nagel et al., section 4.1), and absorption
    /// `φ(y − c) = φ(y) − c` above c. [`Cap::None`] means ReLU everywhere, which changes the
    /// outputs where a value exceeds 6. [`Cap::PerChannel`] means ReLU with caps of 6 in units that
    /// may be scaled.
    pub(crate) fn free_relu6(&mut self, cap: Cap) -> Result<()> {
        if cap == Cap::PerChannel {
            for [maker, _] in self.pairs() {
                let unit = self.unit_mut(maker);
                if unit.activation == Activation::Relu6 {
                    unit.activation = Activation::Relu;
                    self.channels[maker].iter_mut().for_each(|channel| channel.cap = channel.cap.min(6.0));
                    self.set_caps(maker)?;
                }
            }
            return Ok(());
        }
        for node in &mut self.network.nodes {
            if let Node::Unit(Unit { activation, .. }) | Node::Sum(Sum { activation, .. }) = node
                && *activation == Activation::Relu6
            {
                *activation = Activation::Relu;
            }
        }
        Ok(())
    }

    /// Sets a unit's caps to those of its channels, if they have any.
    pub(crate) fn set_caps(&mut self, node: usize) -> Result<()> {
        let caps = self.channels[node].iter().map(|channel| channel.cap as f32);
        let caps: Vec<f32> = caps.filter(|cap| cap.is_finite()).collect();
        if !caps.is_empty() {
            let caps = Tensor::new(caps, self.network.device())?;
            self.unit_mut(node).cap = Some(caps);
        }
        Ok(())
    }

    /// Returns the pairs of units of which the second is the only reader of the first.
    ///
    /// The tensor between them is neither a summand nor read by several nodes.
    pub(crate) fn pairs(&self) -> Vec<[usize; 2]> {
        let (nodes, readers) = (&self.network.nodes, self.network.readers());
        let is_pair =
            |&[maker, reader]: &[usize; 2]| [maker, reader].map(|i| nodes[i].unit().is_some()) == [true; 2];
        let alone = |(maker, readers): (usize, &Vec<usize>)| match readers[..] {
            [reader] => Some([maker, reader]),
            _ => None,
        };
        readers.iter().enumerate().filter_map(alone).filter(is_pair).collect()
    }

    /// Returns the unit that is node `node`.
    pub(crate) fn unit(&self, node: usize) -> &Unit {
        self.network.nodes[node].unit().expect("pairs are of units")
    }

    /// Returns [`Draft::unit`] for changes.
    pub(crate) fn unit_mut(&mut self, node: usize) -> &mut Unit {
        self.network.nodes[node].unit_mut().expect("pairs are of units")
    }

    /// Returns the mean and variance of every channel of every node's output. Images are assumed to
    /// have mean 0, and summands to be independent.
    pub(crate) fn outputs(&self) -> Vec<Vec<Moments>> {
        let nothing = Moments { mean: 0.0, variance: 0.0 };
        let mut outputs: Vec<Vec<Moments>> = Vec::with_capacity(self.channels.len());
        for (node, channels) in self.network.nodes.iter().zip(&self.channels) {
            outputs.push(match node {
                Node::Image(_) => vec![nothing; self.network.input[2]],
                Node::Unit(unit) => channels.iter().map(|c| c.after(unit.activation)).collect(),
                Node::Sum(sum) => {
                    let of_sum = |sum_of: Moments| match sum.activation {
                        Activation::Identity => sum_of,
                        activation => {
                            let (lo, hi) = activation.bounds();
                            clipped(sum_of.mean, sum_of.variance.sqrt(), (lo.into(), hi.into()))
                        }
                    };
                    summed(sum, &outputs).map(of_sum).collect()
                }
                // Pooling keeps the means.
                Node::Pool(pool) => outputs[pool.input].clone(),
            });
        }
        outputs
    }

    /// Divides a unit's weights, and its output before the activation, by `scales` `[C]`.
    ///
    /// A live normalization then has the mean `μ/s` and the variance `V/s²`, so its γ becomes
    /// `γ·√((V/s² + ε)/(V + ε))` and its β becomes `β/s`.
    pub(crate) fn divide(&mut self, unit: usize, scales: &Tensor) -> Result<()> {
        let epsilon = self.network.epsilon;
        let unit = self.unit_mut(unit);
        unit.weight = unit.weight.broadcast_div(scales)?;
        match &mut unit.norm {
            Norm::Bias(bias) => *bias = (&*bias / scales)?,
            Norm::Batch(BatchNorm { gamma, beta, mean, variance }) => {
                let before = norm::inv_std(variance, epsilon)?;
                *variance = (&*variance / scales.sqr()?)?;
                *gamma = ((&*gamma * before)? / norm::inv_std(variance, epsilon)?)?;
                *beta = (&*beta / scales)?;
                *mean = (&*mean / scales)?;
            }
        }
        Ok(())
    }

    /// Adds `change` `[C]` to a unit's output before its activation.
    pub(crate) fn add_to_output(&mut self, unit: usize, change: &Tensor) -> Result<()> {
        let (Norm::Bias(shift) | Norm::Batch(BatchNorm { beta: shift, .. })) = &mut self.unit_mut(unit).norm;
        *shift = (&*shift + change)?;
        Ok(())
    }

    /// Adds `change` `[C]` to the output of a unit's convolution.
    ///
    /// A live normalization subtracts it from the running mean. Training normalizes with the
    /// batch's mean, so it needs no change.
    pub(crate) fn add_to_convolution(&mut self, unit: usize, change: &Tensor) -> Result<()> {
        match &mut self.unit_mut(unit).norm {
            Norm::Bias(bias) => *bias = (&*bias + change)?,
            Norm::Batch(BatchNorm { mean, .. }) => *mean = (&*mean - change)?,
        }
        Ok(())
    }
}

/// Returns the mean and variance of a sum before its activation, given the outputs of the nodes
/// before it.
pub(crate) fn summed<'a>(sum: &Sum, outputs: &'a [Vec<Moments>]) -> impl Iterator<Item = Moments> + 'a {
    let [a, b] = sum.inputs.map(|input| &outputs[input]);
    a.iter().zip(b).map(|(a, b)| Moments { mean: a.mean + b.mean, variance: a.variance + b.variance })
}

/// Returns the bias of a unit of a folded network.
#[cfg(test)]
pub(crate) fn bias_mut(unit: &mut Unit) -> &mut Tensor {
    match &mut unit.norm {
        Norm::Bias(bias) => bias,
        Norm::Batch(_) => unreachable!("batch normalization has been folded"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FROZEN, chain, gaussian_images, insert_sum, mobilenet, relative_difference};
    use super::*;
    use models::{Kernel, Version};

    #[test]
    fn folding_keeps_outputs_and_statistics() {
        let network = mobilenet(Version::V2, Activation::Relu6);
        let images = gaussian_images(4, &network);
        let folded = Draft::new(&network, FROZEN).unwrap();
        let (before, after) = (network.forward(&images).unwrap(), folded.network.forward(&images).unwrap());
        assert!(relative_difference(&before, &after) < 1e-4);
    }

    #[test]
    fn hand_worked_channels() {
        let network = chain(1, &[(Kernel::Pointwise, Activation::Relu)], &[&[1.0, 1.0, 1.0]])
            .norm(0, &[[2.0, -1.0, 0.0, 1.0], [-2.0, 0.5, 0.0, 3e-5], [0.0, 1.0, 0.0, 1e-9]])
            .network;
        let folded = Draft::new(&network, FROZEN).unwrap();
        let expect = [(-1.0, 2.0, false), (0.5, 2.0 * 0.75f64.sqrt(), false), (1.0, 0.0, true)];
        for (channel, (mean, deviation, constant)) in folded.channels[1].iter().zip(expect) {
            assert_eq!((channel.mean, channel.constant), (mean, constant));
            assert!((channel.deviation - deviation).abs() < 1e-4, "{channel:?}");
        }
    }

    #[test]
    fn pairs_leave_out_both_ends_of_residuals() {
        let folded = Draft::new(&mobilenet(Version::V2, Activation::Relu6), FROZEN).unwrap();
        let pairs = folded.pairs();
        let nodes = &folded.network.nodes;
        for (i, node) in nodes.iter().enumerate() {
            // The next node reads a unit, unless it is a sum or the pooling.
            let is_shortcut = |node: &Node| matches!(node, Node::Sum(sum) if sum.inputs[0] == i);
            let paired = node.unit().is_some()
                && nodes.get(i + 1).is_some_and(|next| next.unit().is_some())
                && !nodes.iter().any(is_shortcut);
            assert_eq!(pairs.contains(&[i, i + 1]), paired, "{}", node.name());
        }
        // The pairs include every expansion and depthwise unit, and some projections.
        assert!(pairs.len() > 34 && pairs.len() < folded.network.units().count() - 11, "{}", pairs.len());
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
        insert_sum(&mut network, 1, 3);
        let outputs = Draft::new(&network, FROZEN).unwrap().outputs();
        let sum = outputs[4][0];
        assert!((sum.mean - (-1.0)).abs() < 1e-4 && (sum.variance - 25.0).abs() < 1e-2, "{sum:?}");
        // An activation after it clips the sum.
        let Node::Sum(node) = &mut network.nodes[4] else { panic!("the sum") };
        node.activation = Relu;
        let folded = Draft::new(&network, FROZEN).unwrap();
        let clipped = clipped(sum.mean, sum.variance.sqrt(), (0.0, f64::INFINITY));
        assert_eq!(folded.outputs()[4][0], clipped);
        assert!(clipped.mean > 0.0, "{clipped:?}");
        // The sum reads the first and the last unit.
        assert_eq!(folded.pairs(), [[2, 3]]);
    }
}
