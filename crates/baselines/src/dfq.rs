//! DFQ: "Data-Free Quantization through Weight Equalization and Bias Correction" (Nagel et al.
//! 2019, arXiv 1906.04721). There is one file for each step, in the paper's order.

mod absorb;
mod correct;
mod draft;
mod equalize;
mod normal;
mod ranges;
#[cfg(test)]
mod testing;

use crate::{Error, Result};
use draft::Draft;
use kernels::quantize;
use models::{Fold, Method, Network, Quantization, Unit};
use quant_core::Precision;
use serde::{Deserialize, Serialize};

/// The settings of DFQ.
///
/// # Differences from the paper
///
/// * Biases are absorbed only into pointwise layers. For a depthwise layer, the paper's formula
///   counts all nine taps. At the border, zero padding removes some of them, and the outputs would
///   be wrong.
/// * The deviation of a channel before its activation is `|γ|·√(V/(V+ε))`, which is what batch
///   normalization gives exactly. The paper's `γ` is its limit for `V ≫ ε`.
/// * A filter with a running variance `V < ε` is nearly constant. Equalization may make its weights
///   smaller but not larger. Because its weights are so small, it would multiply the channel's
///   bias, and with it the range of the whole activation tensor, by many orders of magnitude.
///   [`LayerReport::constant`] counts these filters.
/// * As in the paper, bias correction counts all nine taps of a depthwise filter. At the border,
///   where padding removes some of them, it corrects slightly too much.
/// * The classifier takes part in bias correction, but not in equalization and absorption.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dfq {
    /// Whether cross-layer equalization of weight ranges is on (section 4.1).
    pub equalize: bool,
    /// Whether high biases are absorbed into the next layer (section 4.1, "Absorbing high biases").
    pub absorb: bool,
    /// Whether the bias that quantized weights introduce is corrected analytically (section 4.2).
    pub correct_bias: bool,
    /// `n` in the activation ranges `β ± n·γ`. The default is the paper's 6.
    pub range_sigmas: f64,
    /// `n` in the absorbed amount `c = max(0, β − n·γ)`. The default is the paper's 3.
    pub absorb_sigmas: f64,
    /// The tolerance of equalization, which stops when no channel's scale differs from 1 by more.
    /// The default, 0.001, is far below the step of any quantizer; the paper says "until
    /// convergence".
    pub tolerance: f64,
    /// The largest number of sweeps over all pairs of layers. The default is 1000.
    pub max_sweeps: usize,
    /// The replacement of ReLU6 where channels may be scaled. The default is the paper's ReLU.
    #[serde(default)]
    pub cap: Cap,
    /// The treatment of batch normalization. The default is frozen, as in the paper.
    #[serde(default)]
    pub normalization: Normalization,
    /// The calibration of the activation ranges on batches of training images, before any training.
    /// It is done by the caller, which has the images. Without it, the ranges stay `β ± n·γ`, which
    /// needs no data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

/// The replacement of ReLU6 where cross-layer equalization may scale a channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cap {
    /// ReLU in the whole network. Values above 6 pass, and a channel that is made larger enlarges
    /// the range of the whole tensor.
    #[default]
    None,
    /// `min(max(x, 0), 6/s)` for a channel divided by `s`. This equals the scaled ReLU6, so the
    /// outputs do not change.
    PerChannel,
}

/// The treatment of batch normalization after the preparation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// It is folded permanently. The folded weights are equalized and quantized.
    #[default]
    Frozen,
    /// It stays live in training. The unfolded weights, which are quantized, are equalized, and
    /// mean, variance, γ and β are scaled with them.
    Live,
}

/// The estimation of activation ranges on training images without augmentation.
///
/// As in training, the first batch sets the ranges, and each further batch moves them by `momentum`
/// of the distance to its extremes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The number of batches. It is smaller if there are fewer training images.
    pub batches: usize,
    /// The number of images in a batch.
    pub batch: usize,
    /// The fraction by which a batch moves the ranges.
    pub momentum: f64,
}

impl Default for Dfq {
    fn default() -> Self {
        Self {
            equalize: true,
            absorb: true,
            correct_bias: true,
            range_sigmas: 6.0,
            absorb_sigmas: 3.0,
            tolerance: 1e-3,
            max_sweeps: 1000,
            cap: Cap::None,
            normalization: Normalization::Frozen,
            calibration: None,
        }
    }
}

/// The result of DFQ for a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DfqReport {
    /// The number of sweeps until equalization converged, or [`Dfq::max_sweeps`] if it did not.
    pub sweeps: usize,
    /// The largest `|s − 1|` of a scale that another sweep would apply.
    pub remaining: f64,
    /// The results for every convolution and the classifier, in order.
    pub layers: Vec<LayerReport>,
}

/// The result of DFQ for one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// The name of the unit, or `head`.
    pub name: String,
    /// The lowest and highest weight before equalization, with batch normalization folded if it is
    /// frozen.
    pub range_before: (f32, f32),
    /// The lowest and highest weight after equalization. A quantizer of the whole tensor spans this
    /// range, widened to contain zero.
    pub range_after: (f32, f32),
    /// The number of filters whose running variance is below ε.
    pub constant: usize,
    /// The number of channels of which a part of the bias was absorbed into the next layer.
    pub absorbed: usize,
    /// The mean |change| of a bias by bias correction.
    pub correction: f64,
}

impl Dfq {
    /// Returns the treatment of batch normalization in quantization that matches the settings.
    pub fn fold(&self) -> Fold {
        match self.normalization {
            Normalization::Frozen => Fold::Frozen,
            Normalization::Live => Fold::Unfolded,
        }
    }

    /// Returns a copy of a pre-trained network with quantizers, ready to run or to be fine-tuned,
    /// and a report.
    ///
    /// `image_range` is the lowest and the highest value of a normalized image. Training continues
    /// from the activation ranges set here.
    ///
    /// Normalized images are assumed to have mean 0. If `equalize` or `absorb` is set, ReLU6
    /// becomes ReLU. Without caps ([`Cap::None`]), this alone changes the outputs wherever a value
    /// exceeds 6.
    ///
    /// # Errors
    /// If weights stay float, quantizers are not uniform, `quantization.fold` is not [`Dfq::fold`],
    /// batch normalization has been folded before, or a range is not finite.
    pub fn apply(
        &self,
        network: &Network,
        quantization: &Quantization,
        image_range: (f32, f32),
    ) -> Result<(Network, DfqReport)> {
        if quantization.fold != self.fold() {
            return Err(Error::Fold { found: quantization.fold, expected: self.fold() });
        }
        if quantization.weights == Precision::Float {
            return Err(Error::FloatWeights);
        }
        if quantization.method != Method::Uniform {
            return Err(Error::Method(quantization.method));
        }
        let mut draft = Draft::new(network, self.normalization)?;
        let before = weight_ranges(&draft.network)?;
        let constant: Vec<usize> =
            draft.channels.iter().map(|node| node.iter().filter(|c| c.constant).count()).collect();

        if self.equalize || self.absorb {
            draft.free_relu6(self.cap)?;
        }
        let (sweeps, remaining) = if self.equalize {
            draft.equalize(self.tolerance, self.max_sweeps)?
        } else {
            (0, draft.imbalance()?)
        };
        let absorbed =
            if self.absorb { draft.absorb(self.absorb_sigmas)? } else { vec![0; draft.channels.len()] };
        let after = weight_ranges(&draft.network)?;
        draft.network.quantize(quantization)?;
        draft.set_ranges(self.range_sigmas, image_range)?;
        let corrections = if self.correct_bias { draft.correct_bias()? } else { vec![0.0; after.len()] };

        let network = draft.network;
        let units = network.nodes.iter().enumerate().filter_map(|(i, node)| Some((i, node.unit()?)));
        let layers = units
            .zip(before.into_iter().zip(after).zip(corrections))
            .map(|((i, unit), ((range_before, range_after), correction))| LayerReport {
                name: unit.name.clone(),
                range_before,
                range_after,
                constant: constant[i],
                absorbed: absorbed[i],
                correction,
            })
            .collect();
        Ok((network, DfqReport { sweeps, remaining, layers }))
    }
}

/// Returns the lowest and highest weight of every unit, including the classifier.
fn weight_ranges(network: &Network) -> Result<Vec<(f32, f32)>> {
    let range = |unit: &Unit| {
        let range = quantize::min_max(&unit.weight)?.to_vec1::<f32>()?;
        Ok((range[0], range[1]))
    };
    network.units().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::testing::{
        Gaussian, chain, gaussian_images, mobilenet, quantization, relative_difference, unbalance, zero_gamma,
    };
    use super::*;
    use candle_core::{DType::F32, Device::Cpu};
    use kernels::Activation::{Relu, Relu6};
    use models::Version;

    const IMAGES: (f32, f32) = (-6.0, 6.0);

    fn refused(network: &Network, quantization: &Quantization, expect: &str) {
        let error = Dfq::default().apply(network, quantization, IMAGES).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn unusable_settings_are_errors() {
        let mut network = mobilenet(Version::V1, Relu);
        let good = quantization(4);
        refused(&network, &Quantization { fold: Fold::Unfolded, ..good }, "Unfolded");
        refused(&network, &Quantization { fold: Fold::BatchStatistics, ..good }, "BatchStatistics");
        let live = Dfq { normalization: Normalization::Live, ..Dfq::default() };
        assert!(live.apply(&network, &good, IMAGES).unwrap_err().to_string().contains("Unfolded"));
        refused(&network, &Quantization { weights: Precision::Float, ..good }, "`weights` is 32");
        refused(&network, &Quantization { method: Method::Dsq, ..good }, "Dsq");
        assert!(Dfq::default().apply(&network, &good, (1.0, -1.0)).is_err());
        network.fold().unwrap();
        refused(&network, &good, "unit stem has no batch normalization");
    }

    /// Checks that on a network with badly balanced filters, DFQ at 8 bits comes much closer to the
    /// float outputs than the same quantizers without it.
    fn check(version: Version) {
        let mut network = mobilenet(version, Relu);
        let mut gaussian = Gaussian::new(1);
        for pair in Draft::new(&network, Normalization::Frozen).unwrap().pairs() {
            // If γ is 0, there is no filter to unbalance against the layer that reads it.
            unbalance(
                &mut network,
                pair,
                |j| if zero_gamma(j) { 1.0 } else { (2.0 * gaussian.next()).exp() },
            );
        }
        let images = gaussian_images(4, &network);
        let logits = network.forward(&images).unwrap();
        let none = Dfq { equalize: false, absorb: false, correct_bias: false, ..Dfq::default() };
        let distance = |dfq: Dfq| {
            let (prepared, report) = dfq.apply(&network, &quantization(8), IMAGES).unwrap();
            (relative_difference(&logits, &prepared.forward(&images).unwrap()), report)
        };
        let ((plain, untouched), (dfq, report)) = (distance(none), distance(Dfq::default()));
        assert!(dfq < 0.5 * plain, "{version:?}: {dfq} with DFQ, {plain} without");
        // The input network is unchanged.
        assert_eq!(relative_difference(&logits, &network.forward(&images).unwrap()), 0.0);

        let names: Vec<&str> = report.layers.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(
            (names.len(), names[0], names[names.len() - 1]),
            (network.units().count(), "stem", "head")
        );
        let narrowed = |(lo, hi): (f32, f32), (lower, higher): (f32, f32)| (higher - lower) / (hi - lo) < 0.5;
        let many = report.layers.iter().filter(|l| narrowed(l.range_before, l.range_after)).count();
        assert!(many > names.len() / 4, "{many} ranges shrank");
        assert!(report.remaining <= Dfq::default().tolerance && report.sweeps > 1);
        assert!(report.layers.iter().any(|l| l.absorbed > 0));
        // The first layer reads images, which have mean 0, so its bias is not corrected.
        assert!(report.layers.iter().enumerate().all(|(i, l)| (l.correction > 0.0) == (i > 0)), "{report:?}");
        assert!(untouched.remaining > 1.0 && untouched.sweeps == 0);
        for layer in &untouched.layers {
            assert_eq!((layer.range_before, layer.absorbed, layer.correction), (layer.range_after, 0, 0.0));
        }
    }

    #[test]
    fn mobilenet_v1_survives_eight_bits() {
        check(Version::V1);
    }

    #[test]
    fn mobilenet_v2_survives_eight_bits() {
        check(Version::V2);
    }

    /// With caps, equalization of a float network changes the outputs only by rounding. The values
    /// exceed 6, so ReLU instead of ReLU6 changes them.
    #[test]
    fn caps_keep_what_relu6_gives() {
        for (version, normalization) in [
            (Version::V1, Normalization::Frozen),
            (Version::V2, Normalization::Frozen),
            (Version::V1, Normalization::Live),
            (Version::V2, Normalization::Live),
        ] {
            let network = mobilenet(version, Relu6);
            let images = gaussian_images(4, &network);
            let logits = network.forward(&images).unwrap();
            let prepared = |cap| {
                let mut draft = Draft::new(&network, normalization).unwrap();
                draft.free_relu6(cap).unwrap();
                let (sweeps, remaining) = draft.equalize(1e-3, 1000).unwrap();
                assert!(sweeps > 1 && remaining <= 1e-3, "{sweeps} sweeps, {remaining} left");
                draft.network.validate().unwrap();
                relative_difference(&logits, &draft.network.forward(&images).unwrap())
            };
            let (with, without) = (prepared(Cap::PerChannel), prepared(Cap::None));
            // The difference is the rounding of some thirty layers in float32, and an occasional
            // kink.
            assert!(with < 1e-4, "{version:?}, {normalization:?}: off by {with} with caps");
            assert!(
                without > 1e-2,
                "{version:?}, {normalization:?}: off by {without} without, so nothing was cut off"
            );
        }
    }

    /// If the scales are powers of two, which cause no rounding, ReLU6 and ReLU with caps give the
    /// same bits.
    #[test]
    fn caps_are_exact() {
        use models::Kernel::Pointwise;
        // The weights that make and read each channel give s = √(8/2) = 2, √(1/4) = ½, and √(16/1)
        // = 4.
        let units = [(Pointwise, Relu6), (Pointwise, kernels::Activation::Identity)];
        let network = chain(1, &units, &[&[8.0, -1.0, 16.0], &[2.0, 4.0, 1.0]]).network;
        let images = (gaussian_images(4, &network) * 3.0).unwrap();
        let mut highest = 0f32;
        let observe = &mut |i: usize, _: Option<&candle_core::Tensor>, y: &candle_core::Tensor| {
            if i == 1 {
                highest = y.max_all()?.to_scalar()?;
            }
            Ok(())
        };
        network.forward_observed(&images, observe).unwrap();
        assert_eq!(highest, 6.0, "values are cut off");
        // There is no folding here, because it would divide by √(1 + ε).
        let mut draft = Draft::new(&network, Normalization::Frozen).unwrap();
        draft.network = network.duplicate().unwrap();
        for unit in draft.network.units_mut() {
            unit.norm = models::Norm::Bias(candle_core::Tensor::zeros(unit.filters(), F32, &Cpu).unwrap());
        }
        let logits = draft.network.forward(&images).unwrap();
        draft.free_relu6(Cap::PerChannel).unwrap();
        draft.equalize(1e-3, 10).unwrap();
        let caps = draft.unit(1).cap.as_ref().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(caps, [3.0, 12.0, 1.5]);
        assert_eq!(relative_difference(&logits, &draft.network.forward(&images).unwrap()), 0.0);
    }

    /// Caps that the network has already are scaled too, and absorption lowers them.
    #[test]
    fn caps_of_the_network_count() {
        use models::Kernel::Pointwise;
        // The scales are 2, ½ and 4, as above. The third channel has a high β, of which 2 is
        // absorbed before it is scaled.
        let units = [(Pointwise, Relu), (Pointwise, kernels::Activation::Identity)];
        let mut network = chain(1, &units, &[&[8.0, -1.0, 16.0], &[2.0, 4.0, 1.0]])
            .norm(0, &[[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], [0.25, 2.75, 0.0, 1.0]])
            .network;
        let caps = candle_core::Tensor::new(&[1f32, 2.0, 6.0], &Cpu).unwrap();
        network.nodes[1].unit_mut().unwrap().cap = Some(caps);
        let images = gaussian_images(4, &network);
        let logits = network.forward(&images).unwrap();
        let caps = |draft: &Draft| draft.unit(1).cap.as_ref().unwrap().to_vec1::<f32>().unwrap();
        for normalization in [Normalization::Frozen, Normalization::Live] {
            let mut draft = Draft::new(&network, normalization).unwrap();
            draft.free_relu6(Cap::PerChannel).unwrap();
            draft.equalize(1e-3, 10).unwrap();
            let off = relative_difference(&logits, &draft.network.forward(&images).unwrap());
            assert!(off < 1e-5, "{normalization:?}: off by {off}");
            let scaled = caps(&draft);
            draft.absorb(3.0).unwrap();
            let absorbed = caps(&draft);
            assert_eq!(scaled[..2], absorbed[..2]);
            assert!((absorbed[2] / scaled[2] - 4.0 / 6.0).abs() < 1e-3, "{scaled:?}, {absorbed:?}");
        }
    }

    /// In evaluation, live normalization gives about the same as frozen normalization: the weights
    /// are the same up to their factors.
    #[test]
    fn live_normalization_prepares_alike() {
        for version in [Version::V1, Version::V2] {
            let network = mobilenet(version, Relu6);
            let images = gaussian_images(4, &network);
            let logits = network.forward(&images).unwrap();
            let dfq = Dfq { normalization: Normalization::Live, cap: Cap::PerChannel, ..Dfq::default() };
            let live = Quantization { fold: Fold::Unfolded, ..quantization(8) };
            let (prepared, report) = dfq.apply(&network, &live, IMAGES).unwrap();
            assert!(prepared.units().rev().skip(1).all(|unit| unit.batch_norm().is_some()));
            assert!(report.layers.iter().any(|layer| layer.absorbed > 0));
            let off = relative_difference(&logits, &prepared.forward(&images).unwrap());
            let frozen = Dfq { normalization: Normalization::Frozen, ..dfq };
            let (folded, _) = frozen.apply(&network, &quantization(8), IMAGES).unwrap();
            let frozen = relative_difference(&logits, &folded.forward(&images).unwrap());
            println!("{version:?}: live {off}, frozen {frozen}");
            assert!(off < 0.3 && frozen < 0.3, "{version:?}: off by {off} live, {frozen} frozen");
        }
    }

    #[test]
    fn relu6_goes_only_where_homogeneity_is_needed() {
        let network = mobilenet(Version::V2, Relu6);
        let count = |dfq: Dfq, activation| {
            let (prepared, _) = dfq.apply(&network, &quantization(4), IMAGES).unwrap();
            prepared.units().filter(|u| u.activation == activation).count()
        };
        let off = Dfq { equalize: false, absorb: false, ..Dfq::default() };
        assert_eq!(count(off, Relu), 0);
        assert_eq!(count(off, Relu6), 36);
        assert_eq!(count(Dfq { absorb: true, ..off }, Relu6), 0);
        assert_eq!(count(Dfq::default(), Relu), 36);
        // Only units whose channels may be scaled change: the stem's output is a summand too, and
        // the last unit's is pooled.
        let capped = Dfq { cap: Cap::PerChannel, ..Dfq::default() };
        assert_eq!((count(capped, Relu), count(capped, Relu6)), (34, 2));
    }
}
