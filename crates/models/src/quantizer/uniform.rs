//! Uniform quantization ([`kernels::quantize`]): between moving averages of the extremes for
//! activations, between the tensor's own extremes for weights.

use super::{Scheme, Schemes, Slopes, Slot};
use crate::{Fold, Lattice, Result, WeightGrid};
use candle_core::Tensor;
use kernels::{norm, quantize};
use quant_core::{Bits, Grid};
use serde_json::Value;

pub(super) const SCHEMES: Schemes = Schemes {
    name: "uniform",
    title: "uniform",
    unsigned: &Uniform::Tracked,
    signed: &Uniform::Tracked,
    weights: &[
        &Uniform::Extremes { grid: WeightGrid::Tensor, fold: Fold::Unfolded },
        &Uniform::Extremes { grid: WeightGrid::Tensor, fold: Fold::BatchStatistics },
        &Uniform::Extremes { grid: WeightGrid::Tensor, fold: Fold::FloatStatistics },
        &Uniform::Extremes { grid: WeightGrid::Channel, fold: Fold::Unfolded },
        &Uniform::Extremes { grid: WeightGrid::Channel, fold: Fold::BatchStatistics },
        &Uniform::Extremes { grid: WeightGrid::Channel, fold: Fold::FloatStatistics },
    ],
};

/// The source of the range.
#[derive(Debug)]
enum Uniform {
    /// Moving averages of the batches' extremes.
    Tracked,
    /// The weights' own extremes.
    Extremes { grid: WeightGrid, fold: Fold },
}

impl Scheme for Uniform {
    fn kind(&self) -> Value {
        match (self.weight_grid(), self.fold()) {
            (WeightGrid::Channel, Fold::FloatStatistics) => "channels_float_statistics".into(),
            (WeightGrid::Tensor, Fold::FloatStatistics) => "float_statistics".into(),
            (WeightGrid::Channel, _) => "channels".into(),
            (WeightGrid::Tensor, _) => Value::Null,
        }
    }

    fn tensors(&self) -> &'static [Slot] {
        match self {
            Self::Tracked => &[Slot { name: "range", len: 2, role: None }],
            Self::Extremes { .. } => &[],
        }
    }

    fn fold(&self) -> Fold {
        match self {
            Self::Tracked => Fold::Unfolded,
            Self::Extremes { fold, .. } => *fold,
        }
    }

    fn weight_grid(&self) -> WeightGrid {
        match self {
            Self::Tracked => WeightGrid::Tensor,
            Self::Extremes { grid, .. } => *grid,
        }
    }

    fn by(&self, own: &[Tensor], x: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Self::Tracked => Ok(own.to_vec()),
            Self::Extremes { grid: WeightGrid::Tensor, .. } => Ok(vec![quantize::min_max(x)?]),
            Self::Extremes { grid: WeightGrid::Channel, .. } => {
                let stats = norm::channel_stats(x)?;
                Ok(vec![Tensor::stack(&[stats.min, stats.max], 0)?])
            }
        }
    }

    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor> {
        Ok(quantize::forward(x, kernels::Quantizer { range: &by[0], bits })?)
    }

    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice> {
        let ends = by[0].reshape((2, ()))?.to_vec2::<f32>()?;
        Ok(Lattice::of_grids(
            ends[0].iter().zip(&ends[1]).map(|(&lo, &hi)| Grid::spanning(lo, hi, bits)),
            bits,
        ))
    }

    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes> {
        Ok(Slopes { x: quantize::backward(x, gy, kernels::Quantizer { range: &by[0], bits })?, own: vec![] })
    }

    fn grid<'a>(&self, by: &'a [Tensor], bits: Bits) -> Option<kernels::Quantizer<'a>> {
        by.first().map(|range| kernels::Quantizer { range, bits })
    }
}
