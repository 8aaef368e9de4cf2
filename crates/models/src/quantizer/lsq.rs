//! LSQ: learned steps for activations and weights. Activations of both signs use LSQ+, which also
//! learns an offset ([`kernels::lsq`]).

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Lattice, Result, Role};
use candle_core::Tensor;
use kernels::lsq;
use quant_core::Bits;
use serde_json::Value;

pub(super) const SCHEMES: Schemes = Schemes {
    name: "lsq",
    title: "LSQ",
    unsigned: &Lsq::Unsigned,
    signed: &Lsq::Offset,
    weights: &[&Lsq::Weights],
};

/// The kind of tensor and its levels.
#[derive(Debug)]
enum Lsq {
    /// Activations that are never negative, on unsigned levels.
    Unsigned,
    /// Activations of both signs, on unsigned levels that begin at an offset.
    Offset,
    /// Weights, on signed levels.
    Weights,
}

impl Lsq {
    fn signed(&self) -> bool {
        matches!(self, Self::Weights)
    }

    fn params<'a>(&self, by: &'a [Tensor], bits: Bits) -> lsq::Params<'a> {
        lsq::Params { step: &by[0], offset: by.get(1), bits, signed: self.signed() }
    }
}

impl Scheme for Lsq {
    fn kind(&self) -> Value {
        match self {
            Self::Unsigned | Self::Weights => "lsq".into(),
            Self::Offset => "lsq_plus".into(),
        }
    }

    fn tensors(&self) -> &'static [Slot] {
        const STEP: Slot = Slot { name: "step", len: 1, role: Some(Role::Interval) };
        const OFFSET: Slot = Slot { name: "offset", len: 1, role: Some(Role::Interval) };
        match self {
            Self::Unsigned | Self::Weights => &[STEP],
            Self::Offset => &[STEP, OFFSET],
        }
    }

    /// Returns `false`, because a step belongs to a number of levels.
    fn spans_any_bits(&self) -> bool {
        false
    }

    fn start(&self, own: &[Tensor], x: &Tensor, bits: Bits) -> Result<()> {
        match own {
            [step] => step.slice_set(&lsq::initial_step(x, bits, self.signed())?, 0, 0)?,
            _ => {
                let (step, offset) = lsq::initial_step_and_offset(x, bits)?;
                own[0].slice_set(&step, 0, 0)?;
                own[1].slice_set(&offset, 0, 0)?;
            }
        }
        Ok(())
    }

    fn project(&self, own: &[Tensor]) -> Result<()> {
        Ok(lsq::project(&own[0])?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(lsq::forward(x, self.params(by, bits))?)
    }

    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        let step = by[0].to_vec1::<f32>()?[0].max(lsq::MIN_STEP);
        let offset = by.get(1).map_or(Ok(0.0), |offset| offset.to_vec1::<f32>().map(|offset| offset[0]))?;
        let max_level = bits.max_level() as u8;
        let zero_point = if self.signed() { max_level / 2 + 1 } else { 0 };
        Ok(Lattice { steps: vec![step], zero_points: vec![zero_point], offset, max_level })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes> {
        // All weights, or the activations of one image.
        let items = if self.signed() { x.elem_count() } else { x.elem_count() / x.dims()[0] };
        let lsq::Gradients { x, step, offset } = lsq::backward(x, gy, self.params(by, bits), items)?;
        Ok(Slopes { x, own: std::iter::once(step).chain(offset).collect() })
    }
}
