//! Which tensors of a network are quantized, and how (method section 7).

use crate::{Network, Norm, Result};
use candle_core::{Device, Tensor};
use kernels::{Activation, Quantizer};
use quant_core::{Bits, Precision};
use serde::{Deserialize, Serialize};

/// Quantizer of an activation tensor.
#[derive(Debug, Clone)]
pub struct ActivationQuantizer {
    /// Bit width.
    pub bits: Bits,
    /// What the quantizer spans. Uniform: `[2]`, the moving averages of the lowest and the highest value. PACT: `[1]`,
    /// the learned bound α. DSQ: `[2]`, the learned bounds.
    pub range: Tensor,
    /// Whether the range has been set. The first training batch sets it; later ones move it, or training learns it.
    pub ready: bool,
    /// How values become levels.
    pub kind: ActivationKind,
}

/// How activations become levels.
#[derive(Debug, Clone)]
pub enum ActivationKind {
    /// Uniform levels ([`kernels::quantize`]).
    Uniform,
    /// A clip with a learned bound ([`kernels::pact`]).
    Pact {
        /// Whether values of both signs come in.
        signed: bool,
    },
    /// Soft steps ([`kernels::dsq`]).
    Dsq {
        /// `[1]`: the learned softness.
        softness: Tensor,
    },
}

impl ActivationQuantizer {
    /// A uniform quantizer without a range.
    pub(crate) fn unset(bits: Bits, device: &Device) -> Result<Self> {
        let range = Tensor::zeros(2, candle_core::DType::F32, device)?;
        Ok(Self { bits, range, ready: false, kind: ActivationKind::Uniform })
    }

    /// As the kernels of uniform quantization take it.
    pub(crate) fn kernel(&self) -> Quantizer<'_> {
        Quantizer { range: &self.range, bits: self.bits }
    }

    /// What a batch's extremes `[2]` do to the range: a uniform one moves towards them by `momentum` of the distance; a
    /// learned one is set by the first batch, and from then on only kept within what makes sense.
    pub(crate) fn observe(&mut self, batch: &Tensor, momentum: f64) -> Result<()> {
        match self.kind {
            ActivationKind::Uniform => {
                let momentum = if self.ready { momentum } else { 1.0 };
                kernels::quantize::update_range(&self.range, batch, momentum)?;
            }
            _ if self.ready => self.project()?,
            _ => self.set_from(batch)?,
        }
        self.ready = true;
        Ok(())
    }
}

/// Quantizer of a weight tensor.
#[derive(Debug, Clone)]
pub struct WeightQuantizer {
    /// Bit width.
    pub bits: Bits,
    /// How weights become levels.
    pub kind: WeightKind,
    /// Whether the grid is that of the batch-norm-folded filter: each filter is multiplied by
    /// `γ/√(V+ε)` of the running variance before quantization and divided by it after, so that
    /// what is deployed (the folded weights) lies on one per-tensor grid while batch normalization
    /// stays live. Without effect where batch normalization has been folded already.
    pub folded: bool,
}

/// How weights become levels.
#[derive(Debug, Clone)]
pub enum WeightKind {
    /// Uniform levels between the weights' own extremes ([`kernels::quantize`]).
    Uniform,
    /// Uniform levels of a normalized tanh, which span [−1, 1] whatever the weights' size ([`kernels::dorefa`]).
    Dorefa,
    /// Soft steps ([`kernels::dsq`]).
    Dsq {
        /// `[2]`: the learned bounds.
        bounds: Tensor,
        /// `[1]`: the learned softness.
        softness: Tensor,
    },
}

/// How the tensors between the first and the last layer are quantized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Uniform: activations by moving averages of their extremes, weights by their own.
    #[default]
    Uniform,
    /// PACT: activations by a clip with a learned bound, weights by DoReFa.
    Pact,
    /// DSQ: soft steps with learned bounds and softness for both.
    Dsq,
}

impl Method {
    fn is_uniform(&self) -> bool {
        *self == Self::Uniform
    }
}

/// Batch normalization while the weights are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The weights are quantized as they are; normalization stays live.
    Unfolded,
    /// The grid is that of the folded filter; normalization stays live, with batch statistics.
    ///
    /// Few bits can make this run away: a filter whose quantized weights are all zero gets a running
    /// variance of zero, its folding factor grows to `γ/√ε`, and then its weights span the range of
    /// the whole layer.
    BatchStatistics,
    /// Folded for good with the running statistics; a bias is left.
    Frozen,
}

/// What a fine-tuning stage quantizes. Bit widths are 2…8, or 32 for float.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// Bits of every activation tensor but the two below.
    pub activations: Precision,
    /// Bits of every weight tensor but the two below.
    pub weights: Precision,
    /// Bits of the input image (where activations are quantized) and of the first layer's weights
    /// (where weights are).
    pub first_layer: Precision,
    /// Bits of the pooled features and of the classifier's weights, likewise.
    pub last_layer: Precision,
    /// Batch normalization under quantized weights. The learned methods need [`Fold::Unfolded`].
    pub fold: Fold,
    /// How tensors are quantized. The image, the first layer's weights, the pooled features and the classifier's weights
    /// are uniform in every method. (Not written where it is uniform: the keys of stored stages are hashes of this.)
    #[serde(default, skip_serializing_if = "Method::is_uniform")]
    pub method: Method,
}

impl Network {
    /// Attaches the quantizers that `settings` ask for, in place. Quantizers of the same kind that are there already
    /// keep their ranges and what they learned (they carry over from an earlier stage); the ranges of new ones are set
    /// by the first training batch. With [`Fold::Frozen`] and quantized weights, folds batch normalization first.
    ///
    /// # Errors
    /// When a learned method is to go with folded batch normalization.
    pub fn quantize(&mut self, settings: &Quantization) -> Result<()> {
        let Quantization { method, fold, .. } = *settings;
        if method != Method::Uniform && fold != Fold::Unfolded {
            let problem =
                format!("method {method:?} with fold {fold:?}: the learned methods need \"unfolded\"");
            return Err(self.structure_error("quantization", problem));
        }
        let device = self.device().clone();
        let quantized = |precision: Precision| settings.activations.bits().and(precision.bits());
        let uniform = |old: Option<ActivationQuantizer>, precision: Precision| -> Result<_> {
            let new = |bits| ActivationQuantizer::carried_over(old, bits, Method::Uniform, false, &device);
            quantized(precision).map(new).transpose()
        };
        let weight = |precision: Precision| {
            let folded = fold == Fold::BatchStatistics;
            let new = |bits| WeightQuantizer { bits, kind: WeightKind::Uniform, folded };
            settings.weights.bits().and(precision.bits()).map(new)
        };
        if fold == Fold::Frozen && settings.weights.bits().is_some() {
            self.fold()?;
        }
        self.input_quantizer = uniform(self.input_quantizer.take(), settings.first_layer)?;
        for (i, unit) in self.units.iter_mut().enumerate() {
            unit.weight_quantizer = match (settings.weights.bits(), method) {
                _ if i == 0 => weight(settings.first_layer),
                (Some(bits), Method::Pact | Method::Dsq) => {
                    let old = unit.weight_quantizer.take();
                    Some(WeightQuantizer::learned(old, bits, method, &unit.weight)?)
                }
                _ => weight(settings.weights),
            };
            let signed = unit.activation == Activation::Identity;
            let old = unit.output_quantizer.take();
            let new = |bits| ActivationQuantizer::carried_over(old, bits, method, signed, &device);
            unit.output_quantizer = quantized(settings.activations).map(new).transpose()?;
        }
        self.head.input_quantizer = uniform(self.head.input_quantizer.take(), settings.last_layer)?;
        self.head.weight_quantizer = weight(settings.last_layer);
        Ok(())
    }

    /// Folds every batch normalization into its convolution, with the running statistics:
    /// `W ← W·γ/√(V+ε)`, bias `β − μγ/√(V+ε)`. The evaluated outputs stay the same up to rounding.
    pub fn fold(&mut self) -> Result<()> {
        for unit in &mut self.units {
            if let Norm::Batch(norm) = &unit.norm {
                let (scale, shift) = norm.affine(self.epsilon)?;
                unit.weight = unit.weight.broadcast_mul(&scale)?;
                unit.norm = Norm::Bias(shift);
            }
        }
        Ok(())
    }
}
