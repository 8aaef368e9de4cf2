//! Which tensors of a network are quantized, and how (method section 7).

use crate::{Method, Network, Node, Norm, Quantizer, Result};
use candle_core::Tensor;
use kernels::Activation;
use quant_core::Precision;
use serde::{Deserialize, Serialize};

/// Batch normalization while the weights are quantized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The weights are quantized as they are; normalization stays live.
    #[default]
    Unfolded,
    /// The grid is that of the folded filter; normalization stays live, with batch statistics.
    ///
    /// Few bits can make this run away: a filter whose quantized weights are all zero gets a running
    /// variance of zero, its folding factor grows to `γ/√ε`, and then its weights span the range of
    /// the whole layer.
    BatchStatistics,
    /// The filters are folded with the statistics that a second convolution, by the float weights, has on the batch, and the
    /// folded filters are quantized: what training computes with is what is deployed (Jacob et al. 2018, figure C.8;
    /// Krishnamoorthi 2018, section 3.2.2). Gradients go through both convolutions and the statistics.
    FloatStatistics,
    /// Folded for good with the running statistics; a bias is left.
    Frozen,
}

/// How many grids uniformly quantized weights have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightGrid {
    /// One for the whole tensor, between its extremes.
    #[default]
    Tensor,
    /// One for each output channel, between the extremes of its filter. Sums of products stay exact: a channel's step is
    /// a factor of the whole sum.
    Channel,
}

/// What a fine-tuning stage quantizes; by default nothing. Bit widths are 2…8, or 32 for float.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    #[serde(default, skip_serializing_if = "is_default")]
    pub method: Method,
    /// How many grids a weight tensor has where it is uniform. (Not written where it is one, likewise.)
    #[serde(default, skip_serializing_if = "is_default")]
    pub weight_grid: WeightGrid,
    /// Whether DSQ's gradients of bounds and softness, sums over all values, are scaled as LSQ scales that of its step; of no
    /// effect in other methods. (Not written where they are not, likewise.)
    #[serde(default, skip_serializing_if = "is_default")]
    pub gradient_scale: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Network {
    /// Attaches the quantizers that `settings` ask for, in place. Quantizers of the same kind that are there already
    /// keep their ranges and what they learned (they carry over from an earlier stage); the ranges of new ones are set
    /// by the first training batch. With [`Fold::Frozen`] folds batch normalization first, whatever the weights' bits.
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
        let Quantization { activations, weights, first_layer, last_layer, .. } = *settings;
        if fold == Fold::Frozen {
            self.fold()?;
        }
        let device = self.device().clone();
        let activation =
            |place: &mut Option<Quantizer>, precision: Precision, method, signed| -> Result<()> {
                let bits = activations.bits().and(precision.bits());
                let new =
                    |bits| Quantizer::of_activations(place.take(), bits, method, settings, signed, &device);
                *place = bits.map(new).transpose()?;
                Ok(())
            };
        let weight =
            |place: &mut Option<Quantizer>, precision: Precision, method, weight: &Tensor| -> Result<()> {
                let bits = weights.bits().and(precision.bits());
                let new = |bits| Quantizer::of_weights(place.take(), bits, method, settings, weight);
                *place = bits.map(new).transpose()?;
                Ok(())
            };
        let (readers, last) = (self.readers(), self.last());
        // A sum is quantized once, and its summands only where something else reads them too.
        let is_sum = |&reader: &usize| matches!(self.nodes[reader], Node::Sum(_));
        let summands: Vec<bool> = readers.iter().map(|readers| readers.iter().all(is_sum)).collect();
        for (i, (node, is_summand)) in self.nodes.iter_mut().zip(summands).enumerate() {
            if let Node::Unit(unit) = node {
                let (precision, method) = match unit.input {
                    _ if i == last => (last_layer, Method::Uniform),
                    0 => (first_layer, Method::Uniform),
                    _ => (weights, method),
                };
                weight(&mut unit.weight_quantizer, precision, method, &unit.weight)?;
            }
            let (precision, method) = match node {
                Node::Image(_) => (first_layer, Method::Uniform),
                Node::Pool(_) => (last_layer, Method::Uniform),
                // The logits, and what goes into sums alone.
                _ if is_summand => (Precision::Float, method),
                Node::Unit(_) | Node::Sum(_) => (activations, method),
            };
            let signed = node.activation() == Activation::Identity;
            activation(node.quantizer_mut(), precision, method, signed)?;
        }
        Ok(())
    }

    /// Folds every batch normalization into its convolution, with the running statistics:
    /// `W ← W·γ/√(V+ε)`, bias `β − μγ/√(V+ε)`. The evaluated outputs stay the same up to rounding.
    pub fn fold(&mut self) -> Result<()> {
        let epsilon = self.epsilon;
        for unit in self.units_mut() {
            if let Norm::Batch(norm) = &unit.norm {
                let (scale, shift) = norm.affine(epsilon)?;
                unit.weight = unit.weight.broadcast_mul(&scale)?;
                unit.norm = Norm::Bias(shift);
            }
        }
        Ok(())
    }
}
