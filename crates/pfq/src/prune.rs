use crate::{Constants, Error, Group, Result, groups};
use candle_core::Tensor;
use models::{BatchNorm, Network, Node, Norm, Unit};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The settings of pruning for quantization: which filters count as constant, and whether their
/// constants are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PfQ {
    /// The threshold τ: filters whose running variance is below it are removed. `None` means the ε
    /// of the network's batch normalization, so that the method has no parameter of its own.
    pub threshold: Option<f64>,
    /// Whether the layers that read a removed channel take up its constant. `false` is the paper's
    /// "PfQ (w/o bias correction)".
    pub bias_correction: bool,
    /// Which parameter of a live normalization takes up the constants.
    pub corrected: Corrected,
    /// How the filters are chosen.
    pub criterion: Criterion,
}

impl Default for PfQ {
    fn default() -> Self {
        Self {
            threshold: None,
            bias_correction: true,
            corrected: Corrected::default(),
            criterion: Criterion::default(),
        }
    }
}

/// The parameter that bias correction changes in a live normalization. Evaluation is the same for
/// both, up to rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Corrected {
    /// The running mean, `μ ← μ − Σ_j w_j a_j`. Training does not read it: there the normalization
    /// subtracts a constant with the mean of the batch, whether its channel is removed or not.
    #[default]
    Mean,
    /// The shift, `β ← β + γ/√(V+ε)·Σ_j w_j a_j`. It stays in training, although the normalization
    /// there has removed nothing.
    Beta,
}

/// How the filters are chosen.
///
/// Criteria other than [`Criterion::Variance`] remove as many filters of each layer as `Variance`
/// would, so that the numbers of weights and multiply–accumulates are the same. Their filters are
/// not constant; `φ(β)`, which is near their mean, takes the place of the constant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Criterion {
    /// The filters with a running variance below τ: PfQ.
    #[default]
    Variance,
    /// The filters with the smallest |γ|. A channel that several units produce counts with the
    /// largest of their |γ|.
    SmallestGamma,
    /// Random filters.
    Random {
        /// The seed of the random numbers.
        seed: u64,
    },
}

/// The result of pruning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The threshold τ that was used.
    pub threshold: f64,
    /// One entry for every unit except the classifier, in order.
    pub layers: Vec<LayerReport>,
    /// The number of convolution and classifier weights before.
    pub weights_before: u64,
    /// The number of convolution and classifier weights after.
    pub weights_after: u64,
    /// The number of multiply–accumulates for one image before.
    pub macs_before: u64,
    /// The number of multiply–accumulates for one image after.
    pub macs_after: u64,
    /// The number of channels, tied by residuals, that are low in some but not in all of their
    /// producers. They stay. Like `kept_as_last`, this is about the choice by variance.
    pub low_in_part: usize,
    /// The number of channels that stay although every layer that reads them reads a constant,
    /// because a layer must keep one channel.
    pub kept_as_last: usize,
}

/// The result of pruning for one unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// The name of the unit.
    pub name: String,
    /// The number of filters before.
    pub filters: usize,
    /// The number of filters whose running variance was below τ.
    pub low: usize,
    /// The number of filters removed. It is larger than `low` if other units of the channel's group
    /// were low, and smaller if channels are tied to others that were not, or if the last channel
    /// of a group was kept.
    pub removed: usize,
}

impl PfQ {
    /// Returns the pruned network and a report. The tensors of `network` are not changed.
    ///
    /// A channel is removed from its whole [`Group`] if every reader outside of the group reads a
    /// constant there. In a pointwise → depthwise → pointwise chain, this means that the variance
    /// of the producer or of the depthwise filter is low. For channels tied by residuals, every
    /// producer must be low.
    ///
    /// # Errors
    /// If weights are quantized already, no unit has batch normalization, or τ is not positive and
    /// finite.
    pub fn apply(&self, network: &Network) -> Result<(Network, Report)> {
        let Choice { threshold, constants, keep, low_in_part, kept_as_last } = self.choose(network)?;
        // For criteria other than the variance, every filter is treated as if it were constant.
        let given = match self.criterion {
            Criterion::Variance => &constants,
            _ => &Constants::find(network, f64::MAX)?,
        };
        let mut pruned = network.duplicate()?;
        let readers = network.readers();
        for (i, keep) in keep.iter().enumerate().filter(|(_, keep)| keep.contains(&false)) {
            for &reader in &readers[i] {
                if let Node::Unit(unit) = &mut pruned.nodes[reader] {
                    self.shrink_input(unit, keep, &given.output[i], network.epsilon)?;
                }
            }
            if let Node::Unit(unit) = &mut pruned.nodes[i] {
                shrink_filters(unit, keep)?;
            }
        }
        pruned.validate()?;

        let count = |flags: &[bool], wanted: bool| flags.iter().filter(|&&f| f == wanted).count();
        let layer = |(i, node): (usize, &Node)| {
            let unit = node.unit().filter(|_| i != network.last())?;
            Some(LayerReport {
                name: unit.name.clone(),
                filters: unit.filters(),
                low: count(&constants.low[i], true),
                removed: count(&keep[i], false),
            })
        };
        let layers = network.nodes.iter().enumerate().filter_map(layer).collect();
        let report = Report {
            threshold,
            layers,
            weights_before: network.weights(),
            weights_after: pruned.weights(),
            macs_before: network.macs(),
            macs_after: pruned.macs(),
            low_in_part,
            kept_as_last,
        };
        Ok((pruned, report))
    }

    /// Returns which channels stay: `kept[i][j]` is for channel j of node i's output.
    ///
    /// # Errors
    /// Those of [`PfQ::apply`].
    pub fn kept(&self, network: &Network) -> Result<Vec<Vec<bool>>> {
        Ok(self.choose(network)?.keep)
    }

    fn choose(&self, network: &Network) -> Result<Choice> {
        let threshold = self.threshold.unwrap_or(network.epsilon);
        if !(threshold.is_finite() && threshold > 0.0) {
            return Err(Error::Threshold(threshold));
        }
        if let Some(unit) = network.units().find(|u| u.weight_quantizer.is_some()) {
            return Err(Error::QuantizedWeights(unit.name.clone()));
        }
        if network.units().all(|unit| unit.batch_norm().is_none()) {
            return Err(Error::NoNormalization(network.name.clone()));
        }
        let constants = Constants::find(network, threshold)?;
        let mut low_in_part = 0;
        let mut kept_as_last = 0;
        // keep[i][j]: whether channel j of node i's output stays.
        let mut keep: Vec<Vec<bool>> =
            network.shapes().into_iter().map(|[.., channels]| vec![true; channels]).collect();
        for (number, group) in groups(network).into_iter().enumerate() {
            let mut stays: Vec<bool> = (0..keep[group.nodes[0]].len())
                .map(|j| group.read.iter().any(|&i| constants.output[i][j].is_none()))
                .collect();
            if !stays.contains(&true) {
                stays[most_varied(network, &group)?] = true;
                kept_as_last += 1;
            } else if group.tied {
                let low = |j: usize| group.nodes.iter().any(|&i| constants.low[i][j]);
                low_in_part += (0..stays.len()).filter(|&j| stays[j] && low(j)).count();
            }
            let removed = stays.iter().filter(|&&stays| !stays).count();
            if let Some(order) = self.criterion.order(network, &group, number)? {
                stays.fill(true);
                order.into_iter().take(removed).for_each(|j| stays[j] = false);
            }
            for &i in &group.nodes {
                keep[i] = stays.clone();
            }
        }
        Ok(Choice { threshold, constants, keep, low_in_part, kept_as_last })
    }

    /// Removes the slices of a unit's weights that read removed channels, and corrects the bias.
    ///
    /// In a normalized unit, [`Corrected`] says which parameter changes. A unit with a bias gets
    /// `b ← b + Σ_j w_j a_j`. A depthwise unit shares the channels of its input, so nothing is done
    /// here.
    fn shrink_input(
        &self,
        unit: &mut Unit,
        keep: &[bool],
        constants: &[Option<f32>],
        epsilon: f64,
    ) -> Result<()> {
        if unit.kernel.is_depthwise() {
            return Ok(());
        }
        if self.bias_correction {
            let lost = |(keep, constant): (&bool, &Option<f32>)| constant.filter(|_| !keep).unwrap_or(0.0);
            let lost: Vec<f32> = keep.iter().zip(constants).map(lost).collect();
            // This unit is pointwise: full convolutions read the image, which keeps its channels.
            let lost = Tensor::from_vec(lost, (1, keep.len()), unit.weight.device())?;
            let shift = lost.matmul(&unit.weight)?.squeeze(0)?;
            match &mut unit.norm {
                Norm::Batch(norm) => match self.corrected {
                    Corrected::Mean => norm.mean = (&norm.mean - shift)?,
                    Corrected::Beta => norm.beta = (&norm.beta + (norm.scale(epsilon)? * shift)?)?,
                },
                Norm::Bias(bias) => *bias = (&*bias + shift)?,
            }
        }
        unit.weight = unit.kernel.select_inputs(&unit.weight, &indices(keep, &unit.weight)?)?;
        Ok(())
    }
}

impl Criterion {
    /// Returns the channels of a group in the order of removal, or `None` if the running variances
    /// decide.
    fn order(self, network: &Network, group: &Group, number: usize) -> Result<Option<Vec<usize>>> {
        let norms = group.nodes.iter().filter_map(|&i| network.nodes[i].unit()?.batch_norm());
        let gammas = norms.map(|norm| norm.gamma.abs()?.to_vec1::<f32>());
        let gammas = gammas.collect::<candle_core::Result<Vec<_>>>()?;
        let mut order: Vec<usize> = (0..gammas.first().map_or(0, Vec::len)).collect();
        match self {
            Self::Variance => return Ok(None),
            Self::SmallestGamma => {
                let largest = |j: usize| gammas.iter().map(|gamma| gamma[j]).fold(0.0, f32::max);
                order.sort_by(|&a, &b| largest(a).total_cmp(&largest(b)));
            }
            Self::Random { seed } => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(number as u64);
                order.shuffle(&mut rng);
            }
        }
        Ok(Some(order))
    }
}

/// The channels to remove.
struct Choice {
    /// The threshold τ that was used.
    threshold: f64,
    constants: Constants,
    /// `keep[i][j]`: whether channel j of node i's output stays.
    keep: Vec<Vec<bool>>,
    /// These two counts are as in the [`Report`].
    low_in_part: usize,
    kept_as_last: usize,
}

/// Returns the channel of `group` with the largest running variance in any of its normalized units.
fn most_varied(network: &Network, group: &Group) -> Result<usize> {
    let mut best = (0, f32::NEG_INFINITY);
    for &i in &group.nodes {
        if let Some(norm) = network.nodes[i].unit().and_then(Unit::batch_norm) {
            for (j, v) in norm.variance.to_vec1::<f32>()?.into_iter().enumerate() {
                if v > best.1 {
                    best = (j, v);
                }
            }
        }
    }
    Ok(best.0)
}

/// Removes filters from a unit's own tensors.
fn shrink_filters(unit: &mut Unit, keep: &[bool]) -> Result<()> {
    let indices = indices(keep, &unit.weight)?;
    let select = |tensor: &Tensor| tensor.contiguous()?.index_select(&indices, 0);
    unit.weight = unit.kernel.select_filters(&unit.weight, &indices)?;
    unit.cap = unit.cap.as_ref().map(select).transpose()?;
    unit.norm = match &unit.norm {
        Norm::Batch(norm) => Norm::Batch(BatchNorm {
            gamma: select(&norm.gamma)?,
            beta: select(&norm.beta)?,
            mean: select(&norm.mean)?,
            variance: select(&norm.variance)?,
        }),
        Norm::Bias(bias) => Norm::Bias(select(bias)?),
    };
    Ok(())
}

/// Returns the indices of the channels that stay, on the device of `tensor`.
fn indices(keep: &[bool], tensor: &Tensor) -> Result<Tensor> {
    let indices: Vec<u32> = (0..keep.len() as u32).filter(|&j| keep[j as usize]).collect();
    Ok(Tensor::new(indices, tensor.device())?)
}
