//! Which tensors of a network are quantized, and how (method section 7).

use crate::{Network, Norm, Result};
use candle_core::{Device, Tensor};
use kernels::Quantizer;
use quant_core::{Bits, Precision};
use serde::{Deserialize, Serialize};

/// Uniform quantizer of an activation tensor.
#[derive(Debug, Clone)]
pub struct ActivationQuantizer {
    /// Bit width.
    pub bits: Bits,
    /// `[2]`: the moving averages of the lowest and the highest value.
    pub range: Tensor,
    /// Whether the range has been set. The first training batch sets it, later ones move it.
    pub ready: bool,
}

impl ActivationQuantizer {
    pub(crate) fn unset(bits: Bits, device: &Device) -> Result<Self> {
        Ok(Self { bits, range: Tensor::zeros(2, candle_core::DType::F32, device)?, ready: false })
    }

    pub(crate) fn kernel(&self) -> Quantizer<'_> {
        Quantizer { range: &self.range, bits: self.bits }
    }

    /// Moves the range towards a batch's extremes `[2]`, by `momentum` of the distance.
    pub(crate) fn observe(&mut self, batch: &Tensor, momentum: f64) -> Result<()> {
        let momentum = if self.ready { momentum } else { 1.0 };
        kernels::quantize::update_range(&self.range, batch, momentum)?;
        self.ready = true;
        Ok(())
    }
}

/// Uniform quantizer of a weight tensor; its range is the weights' own extremes (min–max).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightQuantizer {
    /// Bit width.
    pub bits: Bits,
    /// Whether the grid is that of the batch-norm-folded filter: each filter is multiplied by
    /// `γ/√(V+ε)` of the running variance before quantization and divided by it after, so that
    /// what is deployed (the folded weights) lies on one per-tensor grid while batch normalization
    /// stays live. Without effect where batch normalization has been folded already.
    pub folded: bool,
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
    /// Batch normalization under quantized weights.
    pub fold: Fold,
}

impl Network {
    /// Attaches the quantizers that `settings` ask for, in place. Ranges that are there already are
    /// kept (they carry over from an earlier stage), new ones are set by the first training batch.
    /// With [`Fold::Frozen`] and quantized weights, folds batch normalization first.
    pub fn quantize(&mut self, settings: &Quantization) -> Result<()> {
        let device = self.device().clone();
        let activation = |old: Option<ActivationQuantizer>, precision: Precision| -> Result<_> {
            let wanted = match settings.activations {
                Precision::Float => None,
                Precision::Quantized(_) => precision.bits(),
            };
            Ok(match (wanted, old) {
                (None, _) => None,
                (Some(bits), Some(old)) => Some(ActivationQuantizer { bits, ..old }),
                (Some(bits), None) => Some(ActivationQuantizer::unset(bits, &device)?),
            })
        };
        let weight = |precision: Precision| {
            let folded = settings.fold == Fold::BatchStatistics;
            settings.weights.bits().and(precision.bits()).map(|bits| WeightQuantizer { bits, folded })
        };
        if settings.fold == Fold::Frozen && settings.weights.bits().is_some() {
            self.fold()?;
        }
        self.input_quantizer = activation(self.input_quantizer.take(), settings.first_layer)?;
        for (i, unit) in self.units.iter_mut().enumerate() {
            let own = if i == 0 { settings.first_layer } else { settings.weights };
            unit.weight_quantizer = weight(own);
            unit.output_quantizer = activation(unit.output_quantizer.take(), settings.activations)?;
        }
        self.head.input_quantizer = activation(self.head.input_quantizer.take(), settings.last_layer)?;
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
