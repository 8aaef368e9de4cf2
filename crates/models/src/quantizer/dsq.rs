//! DSQ: soft steps with learned bounds and softness ([`kernels::dsq`]) for activations and weights.

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Lattice, Result, Role};
use candle_core::Tensor;
use kernels::{dsq, quantize};
use quant_core::Bits;
use serde_json::Value;

pub(super) const SCHEMES: Schemes =
    Schemes { name: "dsq", title: "DSQ", unsigned: &Soft, signed: &Soft, weights: &[&Soft] };

/// The softness with which training begins, the paper's.
const FIRST_SOFTNESS: f64 = 0.2;

#[derive(Debug)]
struct Soft;

impl Scheme for Soft {
    fn kind(&self) -> Value {
        "dsq".into()
    }

    fn tensors(&self) -> &'static [Slot] {
        &[
            Slot { name: "bounds", len: 2, role: Some(Role::Interval) },
            Slot { name: "softness", len: 1, role: Some(Role::Interval) },
        ]
    }

    /// The bounds begin as the extremes.
    fn start(&self, own: &[Tensor], x: &Tensor, _: Bits) -> Result<()> {
        own[0].slice_set(&quantize::min_max(x)?, 0, 0)?;
        Ok(own[1].slice_set(&(own[1].zeros_like()? + FIRST_SOFTNESS)?, 0, 0)?)
    }

    fn update(&self, own: &[Tensor], _: &Tensor, _: f64) -> Result<()> {
        Ok(dsq::project(&own[0], &own[1])?)
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(dsq::forward(x, &by[0], bits)?)
    }

    /// Where a value lies in the middle between two levels it takes the upper one.
    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        let bounds = by[0].to_vec1::<f32>()?;
        let max_level = bits.max_level() as u8;
        let step = ((bounds[1] - bounds[0]) / f32::from(max_level)).max(f32::MIN_POSITIVE);
        Ok(Lattice { steps: vec![step], zero_points: vec![0], offset: bounds[0], max_level })
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes> {
        let dsq::Gradients { x, bounds, softness } = dsq::backward(x, gy, &by[0], &by[1], bits)?;
        Ok(Slopes { x, own: vec![bounds, softness] })
    }
}
