//! The settings of quantization: which tensors of a network are quantized, and how (method section
//! 7).

use crate::{Method, Network, Node, Norm, Quantizer, Result};
use candle_core::Tensor;
use kernels::Activation;
use quant_core::Precision;
use serde::{Deserialize, Serialize};

/// The treatment of batch normalization while the weights are quantized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// The weights are quantized as they are; normalization stays live.
    #[default]
    Unfolded,
    /// The grid is that of the folded filters; normalization stays live, with batch statistics.
    ///
    /// With few bits, this can diverge: a filter whose quantized weights are all zero gets a
    /// running variance of zero, its folding factor grows to `γ/√ε`, and then its weights span the
    /// range of the whole layer.
    BatchStatistics,
    /// The filters are folded with the batch statistics of a second convolution, by the float
    /// weights, and the folded filters are quantized.
    ///
    /// Training computes with the weights that are deployed (Jacob et al. 2018, figure C.8;
    /// Krishnamoorthi 2018, section 3.2.2). Gradients go through both convolutions and the
    /// statistics.
    FloatStatistics,
    /// Normalization is folded permanently with the running statistics, and a bias remains.
    Frozen,
}

/// The number of grids of uniformly quantized weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightGrid {
    /// One grid for the whole tensor, between its extremes.
    #[default]
    Tensor,
    /// One grid for each output channel, between the extremes of its filter. Sums of products stay
    /// exact, because a channel's step is a factor of the whole sum.
    Channel,
}

/// The settings of a fine-tuning stage. By default, nothing is quantized. Bit widths are 2…8, or 32
/// for float.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quantization {
    /// The bits of every activation tensor except the image and the pooled features.
    pub activations: Precision,
    /// The bits of outputs without an activation function, if activations are quantized: those of
    /// MobileNetV2's bottlenecks, and the residual sums. If not given, those of `activations`. The
    /// paper does not say.
    pub linear: Option<Precision>,
    /// The bits of every weight tensor except those of the first layer and the classifier.
    pub weights: Precision,
    /// The bits of the input image (if activations are quantized) and of the first layer's weights
    /// (if weights are quantized).
    pub first_layer: Precision,
    /// The bits of the pooled features (if activations are quantized) and of the classifier's
    /// weights (if weights are quantized).
    pub last_layer: Precision,
    /// The treatment of batch normalization. The learned methods need [`Fold::Unfolded`].
    pub fold: Fold,
    /// The quantization method. The image, the first layer's weights, the pooled features and the
    /// classifier's weights are uniform in every method.
    pub method: Method,
    /// The number of grids of a uniformly quantized weight tensor.
    pub weight_grid: WeightGrid,
    /// Whether the gradients of DSQ's bounds and softness, which are sums over all values, are
    /// scaled as LSQ scales the gradient of its step. Other methods ignore it.
    pub gradient_scale: bool,
}

impl Network {
    /// Attaches the quantizers of `settings`, in place.
    ///
    /// Existing quantizers of the same kind keep their ranges and what they learned: they carry
    /// over from an earlier stage. Steps of LSQ carry over only if the bits are the same. The first
    /// training batch sets the ranges of new quantizers. [`Fold::Frozen`] first folds batch
    /// normalization, whatever the bits of the weights.
    ///
    /// # Errors
    /// If a learned method is combined with folded batch normalization.
    pub fn quantize(&mut self, settings: &Quantization) -> Result<()> {
        let Quantization { method, fold, .. } = *settings;
        if method != Method::Uniform && fold != Fold::Unfolded {
            let problem =
                format!("method {method:?} with fold {fold:?}: the learned methods need \"unfolded\"");
            return Err(self.structure_error("quantization", problem));
        }
        let Quantization { activations, linear, weights, first_layer, last_layer, .. } = *settings;
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
        // A sum is quantized once. Its summands are quantized only if another node reads them too.
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
            let signed = node.activation() == Activation::Identity;
            let (precision, method) = match node {
                Node::Image(_) => (first_layer, Method::Uniform),
                Node::Pool(_) => (last_layer, Method::Uniform),
                // The logits, and the outputs that only sums read.
                _ if is_summand => (Precision::Float, method),
                Node::Unit(_) | Node::Sum(_) if signed => (linear.unwrap_or(activations), method),
                Node::Unit(_) | Node::Sum(_) => (activations, method),
            };
            activation(node.quantizer_mut(), precision, method, signed)?;
        }
        Ok(())
    }

    /// Folds every batch normalization into its convolution, with the running statistics:
    /// `W ← W·γ/√(V+ε)`, bias `β − μγ/√(V+ε)`.
    ///
    /// The evaluated outputs stay the same up to rounding.
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
