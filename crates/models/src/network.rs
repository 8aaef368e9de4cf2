use crate::{Error, Parameter, Quantizer, Result, Role};
use candle_core::{Device, Tensor};
use kernels::convolution::Kernel;
use kernels::{Activation, norm};
use serde::{Deserialize, Serialize};

/// A convolutional network for images, in NHWC and float32.
///
/// Unit `i` reads the output of unit `i − 1` (unit 0 the image); a [`Residual`] adds an earlier
/// output to a later one; the [`Head`] averages the last unit's output over space and classifies.
#[derive(Debug)]
pub struct Network {
    /// What it is, e.g. `mobilenet_v2`; part of every result row.
    pub name: String,
    /// Height, width and channels of an input image.
    pub input: [usize; 3],
    /// Quantizer of the input image.
    pub input_quantizer: Option<Quantizer>,
    /// The convolutions in order.
    pub units: Vec<Unit>,
    /// The residual additions, ordered by their end.
    pub residuals: Vec<Residual>,
    /// Global average pooling and classifier.
    pub head: Head,
    /// ε of every batch normalization; also the default pruning threshold τ (method section 2).
    pub epsilon: f64,
}

/// One convolution with what follows it: `Q(φ(norm(x ∗ w)))`.
#[derive(Debug)]
pub struct Unit {
    /// Unique name, e.g. `blocks.3.depthwise`.
    pub name: String,
    /// The kind of convolution.
    pub kernel: Kernel,
    /// Weights, in the layout of the kernel.
    pub weight: Tensor,
    /// Quantizer of the weights.
    pub weight_quantizer: Option<Quantizer>,
    /// Batch normalization, or the bias that is left after folding it.
    pub norm: Norm,
    /// φ. Must be the identity where a residual ends.
    pub activation: Activation,
    /// Quantizer of the unit's output. Where a residual ends it is applied once, to the sum: the
    /// addition itself is not rounded, and whatever reads the sum (the next convolution and a
    /// later shortcut alike) reads the quantized one.
    pub output_quantizer: Option<Quantizer>,
}

/// What stands between the convolution and the activation.
#[derive(Debug)]
pub enum Norm {
    /// Batch normalization.
    Batch(BatchNorm),
    /// A bias `[C]`: batch normalization has been folded into the weights.
    Bias(Tensor),
}

/// Batch normalization; each tensor is `[C]`.
#[derive(Debug)]
pub struct BatchNorm {
    /// Scale γ, learned.
    pub gamma: Tensor,
    /// Shift β, learned.
    pub beta: Tensor,
    /// Running mean μ: moving average with momentum 0.1.
    pub mean: Tensor,
    /// Running variance V: moving average, momentum 0.1, of the unbiased batch variance (N/(N−1)),
    /// as in PyTorch. This is what τ is compared with.
    pub variance: Tensor,
}

/// The output of unit `from` is added to that of unit `to` (before `to`'s quantizer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residual {
    /// Index of the unit whose output is the shortcut.
    pub from: usize,
    /// Index of the unit whose output becomes the sum.
    pub to: usize,
}

/// Global average pooling, then a linear classifier.
#[derive(Debug)]
pub struct Head {
    /// Quantizer of the pooled features.
    pub input_quantizer: Option<Quantizer>,
    /// `[C, classes]`.
    pub weight: Tensor,
    /// Quantizer of the weights.
    pub weight_quantizer: Option<Quantizer>,
    /// `[classes]`; float in every setting.
    pub bias: Tensor,
}

impl Unit {
    /// Number of filters (output channels).
    pub fn filters(&self) -> usize {
        self.kernel.filters(&self.weight)
    }

    /// Number of input channels.
    pub fn input_channels(&self) -> usize {
        self.kernel.input_channels(&self.weight)
    }

    /// The batch normalization, unless it has been folded.
    pub fn batch_norm(&self) -> Option<&BatchNorm> {
        match &self.norm {
            Norm::Batch(norm) => Some(norm),
            Norm::Bias(_) => None,
        }
    }
}

impl BatchNorm {
    /// γ = 1, β = 0, μ = 0, V = 1.
    pub(crate) fn init(channels: usize, device: &Device) -> Result<Self> {
        let ones = || Tensor::ones(channels, candle_core::DType::F32, device);
        let zeros = || Tensor::zeros(channels, candle_core::DType::F32, device);
        Ok(Self { gamma: ones()?, beta: zeros()?, mean: zeros()?, variance: ones()? })
    }

    /// The affine map of the running statistics, `(γ/√(V+ε), β − μγ/√(V+ε))`, each `[C]`.
    pub fn affine(&self, epsilon: f64) -> Result<(Tensor, Tensor)> {
        let inv_std = norm::inv_std(&self.variance, epsilon)?;
        Ok(norm::affine(&self.gamma, &self.beta, &self.mean, &inv_std)?)
    }

    /// `γ/√(V+ε)` of the running variance.
    pub fn scale(&self, epsilon: f64) -> Result<Tensor> {
        Ok((&self.gamma * norm::inv_std(&self.variance, epsilon)?)?)
    }
}

/// The method that lists every tensor of a network with its name and, if it is learned, its role. Files,
/// gradients and copies go by this list and its order. A macro, as it is needed for shared and for `mut`
/// references.
macro_rules! slots {
    ($method:ident, $iter:ident $(, $mutable:tt)?) => {
        pub(crate) fn $method(&$($mutable)? self) -> Vec<(String, Option<Role>, &$($mutable)? Tensor)> {
            let Self { input_quantizer, units, head, .. } = self;
            let mut all = Vec::new();
            let mut push = |name: &str, field: &str, role, tensor| all.push((format!("{name}.{field}"), role, tensor));
            for (field, role, tensor) in input_quantizer.$iter().flat_map(Quantizer::$method) {
                push("input", field, role, tensor);
            }
            for Unit { name, weight, weight_quantizer, norm, output_quantizer, .. } in units {
                push(name, "weight", Some(Role::Weight), weight);
                for (field, role, tensor) in weight_quantizer.$iter().flat_map(Quantizer::$method) {
                    push(name, &format!("weight_{field}"), role, tensor);
                }
                match norm {
                    Norm::Batch(BatchNorm { gamma, beta, mean, variance }) => {
                        push(name, "gamma", Some(Role::NormOrBias), gamma);
                        push(name, "beta", Some(Role::NormOrBias), beta);
                        push(name, "mean", None, mean);
                        push(name, "variance", None, variance);
                    }
                    Norm::Bias(bias) => push(name, "bias", Some(Role::NormOrBias), bias),
                }
                for (field, role, tensor) in output_quantizer.$iter().flat_map(Quantizer::$method) {
                    push(name, field, role, tensor);
                }
            }
            let Head { input_quantizer, weight, weight_quantizer, bias } = head;
            for (field, role, tensor) in input_quantizer.$iter().flat_map(Quantizer::$method) {
                push("head", field, role, tensor);
            }
            push("head", "weight", Some(Role::Weight), weight);
            for (field, role, tensor) in weight_quantizer.$iter().flat_map(Quantizer::$method) {
                push("head", &format!("weight_{field}"), role, tensor);
            }
            push("head", "bias", Some(Role::NormOrBias), bias);
            all
        }
    };
}

impl Network {
    /// The device that holds the network.
    pub fn device(&self) -> &Device {
        self.head.weight.device()
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.head.bias.dims()[0]
    }

    /// The shortcut that ends at unit `to`.
    pub fn residual_into(&self, to: usize) -> Option<usize> {
        self.residuals.iter().find(|r| r.to == to).map(|r| r.from)
    }

    /// An error about a place in this network.
    pub fn structure_error(&self, place: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Structure { network: self.name.clone(), place: place.into(), problem: problem.into() }
    }

    /// Checks what the passes rely on: channels that match, residuals over equal shapes and
    /// identities, a full convolution only in front, nothing to learn in the image's quantizer.
    pub fn validate(&self) -> Result<()> {
        let mut channels = self.input[2];
        for (i, unit) in self.units.iter().enumerate() {
            if unit.input_channels() != channels {
                let found = unit.input_channels();
                return Err(self
                    .structure_error(&unit.name, format!("reads {found} channels, but {channels} come in")));
            }
            if i > 0 && matches!(unit.kernel, Kernel::Full { .. }) {
                return Err(self.structure_error(&unit.name, "only the first unit may be a full convolution"));
            }
            channels = unit.filters();
        }
        for r in &self.residuals {
            let (Some(from), Some(to)) = (self.units.get(r.from), self.units.get(r.to)) else {
                return Err(self.structure_error(format!("{r:?}"), "names a unit that does not exist"));
            };
            if r.from >= r.to || from.filters() != to.filters() || to.activation != Activation::Identity {
                return Err(self.structure_error(
                    format!("residual {} → {}", from.name, to.name),
                    format!(
                        "must run forward over equal channels to a unit without activation; found {} → {} channels, {:?}",
                        from.filters(), to.filters(), to.activation
                    ),
                ));
            }
        }
        for (i, r) in self.residuals.iter().enumerate() {
            if self.residuals[..i].iter().any(|other| other.from == r.from || other.to == r.to) {
                return Err(
                    self.structure_error(format!("{r:?}"), "begins or ends where another residual does")
                );
            }
        }
        if self.input_quantizer.as_ref().is_some_and(Quantizer::learns) {
            return Err(self.structure_error(
                "input quantizer",
                "is learned, but the gradient of an image is not computed; a uniform one works here",
            ));
        }
        if self.head.weight.dims()[0] != channels {
            let found = self.head.weight.dims()[0];
            return Err(
                self.structure_error("head", format!("reads {found} channels, but {channels} come in"))
            );
        }
        Ok(())
    }

    /// Every learned tensor, in a fixed order.
    pub fn parameters(&self) -> Vec<Parameter> {
        let parameter = |(name, role, tensor): (_, Option<Role>, &Tensor)| {
            role.map(|role| Parameter { name, tensor: tensor.clone(), role })
        };
        self.slots().into_iter().filter_map(parameter).collect()
    }

    /// Every tensor with its name: parameters, running statistics and quantizer ranges.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        self.slots().into_iter().map(|(name, _, tensor)| (name, tensor)).collect()
    }

    slots!(slots, iter);
    slots!(slots_mut, iter_mut, mut);

    /// The same network with every tensor replaced by `f` of it.
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut copy = self.structure().skeleton()?;
        for ((_, _, to), (_, _, from)) in copy.slots_mut().into_iter().zip(self.slots()) {
            *to = f(from)?;
        }
        Ok(copy)
    }

    /// A copy that shares no storage with this one: an optimizer updates parameters in place, so a
    /// shallow copy would be trained along.
    pub fn duplicate(&self) -> Result<Self> {
        self.map(|t| Ok(t.copy()?))
    }

    /// A copy on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|t| Ok(if t.device().same_device(device) { t.copy()? } else { t.to_device(device)? }))
    }
}
