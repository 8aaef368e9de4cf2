//! Uniform quantization ([`kernels::quantize`]): activations between moving averages of their extremes, weights between
//! their own.

use super::{Scheme, Schemes, Slot};
use crate::{Gradients, Result};
use candle_core::Tensor;
use kernels::quantize;
use quant_core::Bits;
use serde_json::Value;

pub(super) const SCHEMES: Schemes = Schemes {
    title: "uniform",
    unsigned: &Uniform::Tracked,
    signed: &Uniform::Tracked,
    weights: &[&Uniform::Extremes { folded: false }, &Uniform::Extremes { folded: true }],
};

/// Where the range comes from.
#[derive(Debug)]
enum Uniform {
    /// Moving averages of the batches' extremes.
    Tracked,
    /// The tensor's own extremes.
    Extremes { folded: bool },
}

impl Scheme for Uniform {
    fn kind(&self) -> Value {
        Value::Null
    }

    fn tensors(&self) -> &'static [Slot] {
        match self {
            Self::Tracked => &[Slot { name: "range", len: 2, role: None }],
            Self::Extremes { .. } => &[],
        }
    }

    fn folded(&self) -> bool {
        matches!(self, Self::Extremes { folded: true })
    }

    fn start(&self, own: &[Tensor], x: &Tensor, _: Bits) -> Result<()> {
        self.update(own, x, 1.0)
    }

    fn update(&self, own: &[Tensor], x: &Tensor, momentum: f64) -> Result<()> {
        for range in own {
            quantize::update_range(range, &quantize::min_max(x)?, momentum)?;
        }
        Ok(())
    }

    fn by(&self, own: &[Tensor], x: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Self::Tracked => Ok(own.to_vec()),
            Self::Extremes { .. } => Ok(vec![quantize::min_max(x)?]),
        }
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(quantize::forward(x, kernels::Quantizer { range: &by[0], bits })?)
    }

    fn backward(
        &self,
        x: &Tensor,
        gy: &Tensor,
        by: &[Tensor],
        bits: Bits,
        _: &mut Gradients,
    ) -> Result<Tensor> {
        Ok(quantize::backward(x, gy, kernels::Quantizer { range: &by[0], bits })?)
    }

    fn grid<'a>(&self, by: &'a [Tensor], bits: Bits) -> Option<kernels::Quantizer<'a>> {
        by.first().map(|range| kernels::Quantizer { range, bits })
    }
}
