//! What learned quantizers (PACT, DSQ) do in a network: their first values, forward and backward.

use crate::{ActivationKind, ActivationQuantizer, Method, Result, WeightKind, WeightQuantizer};
use candle_core::{DType, Device, Tensor};
use kernels::{dorefa, dsq, pact, quantize};
use quant_core::Bits;

/// The first value of DSQ's softness, the paper's.
const FIRST_SOFTNESS: f32 = 0.2;

/// The gradients of a quantizer's input and of what it learns, in the order of [`crate::Network::parameters`].
pub(crate) struct LearnedGradients {
    /// Of the input.
    pub input: Tensor,
    /// Of its parameters.
    pub parameters: Vec<Tensor>,
}

impl From<dsq::Grads> for LearnedGradients {
    fn from(gradients: dsq::Grads) -> Self {
        let dsq::Grads { x, bounds, softness } = gradients;
        Self { input: x, parameters: vec![bounds, softness] }
    }
}

fn first_softness(device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(&[FIRST_SOFTNESS], device)?)
}

impl ActivationQuantizer {
    /// `old` with other bits if it is of the method's kind, else a new one, to be set by the first training batch.
    pub(crate) fn carried_over(
        old: Option<Self>,
        bits: Bits,
        method: Method,
        signed: bool,
        device: &Device,
    ) -> Result<Self> {
        Ok(match (old, method) {
            (Some(old @ Self { kind: ActivationKind::Uniform, .. }), Method::Uniform)
            | (Some(old @ Self { kind: ActivationKind::Pact { .. }, .. }), Method::Pact)
            | (Some(old @ Self { kind: ActivationKind::Dsq { .. }, .. }), Method::Dsq) => {
                Self { bits, ..old }
            }
            (_, Method::Uniform) => Self::unset(bits, device)?,
            (_, Method::Pact) => {
                let range = Tensor::zeros(1, DType::F32, device)?;
                Self { bits, range, ready: false, kind: ActivationKind::Pact { signed } }
            }
            (_, Method::Dsq) => {
                let kind = ActivationKind::Dsq { softness: first_softness(device)? };
                Self { kind, ..Self::unset(bits, device)? }
            }
        })
    }

    /// Whether what it spans is learned, so that it acts on floats and has gradients.
    pub(crate) fn is_learned(&self) -> bool {
        !matches!(self.kind, ActivationKind::Uniform)
    }

    /// The quantized values of `x`; `x` itself while the range has never been set.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if !self.ready {
            return Ok(x.clone());
        }
        Ok(match self.kind {
            ActivationKind::Uniform => quantize::forward(x, self.kernel())?,
            ActivationKind::Pact { signed } => pact::forward(x, &self.range, self.bits, signed)?,
            ActivationKind::Dsq { .. } => dsq::forward(x, &self.range, self.bits)?,
        })
    }

    /// The gradients of [`ActivationQuantizer::apply`].
    pub(crate) fn gradients(&self, x: &Tensor, gy: &Tensor) -> Result<LearnedGradients> {
        Ok(match &self.kind {
            ActivationKind::Uniform => {
                let input = quantize::backward(x, gy, self.kernel())?;
                LearnedGradients { input, parameters: Vec::new() }
            }
            ActivationKind::Pact { signed } => {
                let pact::Grads { x, alpha } = pact::backward(x, gy, &self.range, *signed)?;
                LearnedGradients { input: x, parameters: vec![alpha] }
            }
            ActivationKind::Dsq { softness } => {
                dsq::backward(x, gy, &self.range, softness, self.bits)?.into()
            }
        })
    }

    /// Sets the bounds from a batch's extremes `[2]`, in place: α of PACT to the larger of their sizes, the bounds of
    /// DSQ to the extremes themselves.
    pub(crate) fn set_from(&self, extremes: &Tensor) -> Result<()> {
        let bounds = match self.kind {
            ActivationKind::Pact { .. } => extremes.abs()?.max_keepdim(0)?,
            _ => extremes.clone(),
        };
        Ok(self.range.slice_set(&bounds, 0, 0)?)
    }

    /// Brings back, in place, what a step of the optimizer took out of its range.
    pub(crate) fn project(&self) -> Result<()> {
        match &self.kind {
            ActivationKind::Uniform => Ok(()),
            ActivationKind::Pact { .. } => Ok(self.range.slice_set(&self.range.relu()?, 0, 0)?),
            ActivationKind::Dsq { softness } => Ok(dsq::project(&self.range, softness)?),
        }
    }
}

impl WeightQuantizer {
    /// `old` with other bits if it is of the method's kind, else a new one; DSQ's bounds begin as the weights' extremes.
    pub(crate) fn learned(old: Option<Self>, bits: Bits, method: Method, weight: &Tensor) -> Result<Self> {
        let kind = match (old.map(|old| old.kind), method) {
            (_, Method::Uniform) => WeightKind::Uniform,
            (_, Method::Pact) => WeightKind::Dorefa,
            (Some(kind @ WeightKind::Dsq { .. }), Method::Dsq) => kind,
            (_, Method::Dsq) => WeightKind::Dsq {
                bounds: quantize::min_max(weight)?,
                softness: first_softness(weight.device())?,
            },
        };
        Ok(Self { bits, kind, folded: false })
    }

    /// The quantized weights, where the kind is not uniform.
    pub(crate) fn apply(&self, weight: &Tensor) -> Result<Option<Tensor>> {
        Ok(match &self.kind {
            WeightKind::Uniform => None,
            WeightKind::Dorefa => Some(dorefa::forward(weight, self.bits)?),
            WeightKind::Dsq { bounds, .. } => Some(dsq::forward(weight, bounds, self.bits)?),
        })
    }

    /// The gradients of [`WeightQuantizer::apply`], likewise.
    pub(crate) fn gradients(&self, weight: &Tensor, gy: &Tensor) -> Result<Option<LearnedGradients>> {
        Ok(match &self.kind {
            WeightKind::Uniform => None,
            WeightKind::Dorefa => {
                let input = dorefa::backward(weight, gy)?;
                Some(LearnedGradients { input, parameters: Vec::new() })
            }
            WeightKind::Dsq { bounds, softness } => {
                Some(dsq::backward(weight, gy, bounds, softness, self.bits)?.into())
            }
        })
    }

    /// Brings back, in place, what a step of the optimizer took out of its range.
    pub(crate) fn project(&self) -> Result<()> {
        match &self.kind {
            WeightKind::Uniform | WeightKind::Dorefa => Ok(()),
            WeightKind::Dsq { bounds, softness } => Ok(dsq::project(bounds, softness)?),
        }
    }
}
