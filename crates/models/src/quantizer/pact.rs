//! PACT: activations by a clip with a learned bound ([`kernels::pact`]), weights by DoReFa ([`kernels::dorefa`]).

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

/// Between 0 and α, or −α and α where values of both signs come in.
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

    /// α begins as the largest size of a value.
    fn start(&self, own: &[Tensor], x: &Tensor, _: Bits) -> Result<()> {
        Ok(own[0].slice_set(&quantize::min_max(x)?.abs()?.max_keepdim(0)?, 0, 0)?)
    }

    /// α is never negative.
    fn project(&self, own: &[Tensor]) -> Result<()> {
        Ok(own[0].slice_set(&own[0].relu()?, 0, 0)?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(pact::forward(x, &by[0], bits, self.signed)?)
    }

    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        // An α below 0 stands for 0.
        let alpha = by[0].to_vec1::<f32>()?[0].max(0.0);
        let grid = if self.signed { Grid::symmetric(alpha, bits) } else { Grid::spanning(0.0, alpha, bits) };
        Ok(Lattice { max_level: grid.max_level() as u8, ..Lattice::of_grids([grid], bits) })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], _: Bits) -> Result<Slopes> {
        let pact::Gradients { x, alpha } = pact::backward(x, gy, &by[0], self.signed)?;
        Ok(Slopes { x, own: vec![alpha] })
    }
}

/// Levels of a normalized tanh, which span [−1, 1] whatever the weights' size.
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
