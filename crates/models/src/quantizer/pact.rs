//! PACT: a clip with a learned bound for activations ([`kernels::pact`]), DoReFa for weights
//! ([`kernels::dorefa`]).

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Lattice, Result, Role};
use candle_core::Tensor;
use kernels::{dorefa, pact, quantize};
use quant_core::{Bits, Grid};
use serde_json::{Value, json};

pub(super) const SCHEMES: Schemes = Schemes {
    name: "pact",
    title: "PACT",
    unsigned: &Clip { signed: false },
    signed: &Clip { signed: true },
    weights: &[&Dorefa],
};

/// A clip to [0, α], or to [−α, α] for values of both signs.
#[derive(Debug)]
struct Clip {
    signed: bool,
}

impl Scheme for Clip {
    fn kind(&self) -> Value {
        json!({ "pact": { "signed": self.signed } })
    }

    fn tensors(&self) -> &'static [Slot] {
        &[Slot { name: "alpha", len: 1, role: Some(Role::Clip) }]
    }

    /// Initializes α to the largest absolute value.
    fn start(&self, own: &[Tensor], x: &Tensor, _: Bits) -> Result<()> {
        Ok(own[0].slice_set(&quantize::min_max(x)?.abs()?.max_keepdim(0)?, 0, 0)?)
    }

    /// Keeps α from being negative.
    fn project(&self, own: &[Tensor]) -> Result<()> {
        Ok(own[0].slice_set(&own[0].relu()?, 0, 0)?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(pact::forward(x, &by[0], bits, self.signed)?)
    }

    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        // A negative α counts as 0.
        let alpha = by[0].to_vec1::<f32>()?[0].max(0.0);
        let grid = if self.signed { Grid::symmetric(alpha, bits) } else { Grid::spanning(0.0, alpha, bits) };
        Ok(Lattice { max_level: grid.max_level() as u8, ..Lattice::of_grids([grid], bits) })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], _: Bits) -> Result<Slopes> {
        let pact::Gradients { x, alpha } = pact::backward(x, gy, &by[0], self.signed)?;
        Ok(Slopes { x, own: vec![alpha] })
    }
}

/// The levels of a normalized tanh, which span [−1, 1] for weights of any size.
#[derive(Debug)]
struct Dorefa;

impl Scheme for Dorefa {
    fn kind(&self) -> Value {
        "dorefa".into()
    }

    fn forward(&self, x: &Tensor, _: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(dorefa::forward(x, bits)?)
    }

    fn lattice(&self, _: &[Tensor], bits: Bits) -> Result<Lattice> {
        let max_level = bits.max_level() as u8;
        Ok(Lattice { steps: vec![2.0 / f32::from(max_level)], zero_points: vec![0], offset: -1.0, max_level })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, _: &[Tensor], _: Bits) -> Result<Slopes> {
        Ok(Slopes { x: dorefa::backward(x, gy)?, own: vec![] })
    }
}
