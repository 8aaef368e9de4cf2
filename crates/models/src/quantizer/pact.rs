//! PACT: activations by a clip with a learned bound ([`kernels::pact`]), weights by DoReFa ([`kernels::dorefa`]).

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Result, Role};
use candle_core::Tensor;
use kernels::{dorefa, pact, quantize};
use quant_core::Bits;
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
    fn update(&self, own: &[Tensor], _: &Tensor, _: f64) -> Result<()> {
        Ok(own[0].slice_set(&own[0].relu()?, 0, 0)?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(pact::forward(x, &by[0], bits, self.signed)?)
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

    fn backward(&self, x: &Tensor, gy: &Tensor, _: &[Tensor], _: Bits) -> Result<Slopes> {
        Ok(Slopes { x: dorefa::backward(x, gy)?, own: vec![] })
    }
}
