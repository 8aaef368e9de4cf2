//! Quantized values as integers, for computations outside the passes.

use crate::{Network, Result, Unit};
use candle_core::Tensor;
use quant_core::{Bits, Grid};

/// The values of a quantizer: level `q`, 0 … `max_level`, represents
/// `offset + step·(q − zero_point)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Lattice {
    /// One step for the whole tensor or, for weights, one for each output channel; as many as there
    /// are zero points.
    pub steps: Vec<f32>,
    /// The levels that represent the offset, which is 0 in most schemes.
    pub zero_points: Vec<u8>,
    /// The term added to every value: DSQ's lower bound, LSQ+'s offset, the −1 of DoReFa's weights.
    pub offset: f32,
    /// The largest level: `2^b − 1`, or `2^b − 2` for a symmetric grid.
    pub max_level: u8,
}

/// The quantized weights of a unit.
#[derive(Debug, Clone)]
pub struct WeightLevels {
    /// The levels in the layout of the weight, as floats that hold them exactly.
    pub levels: Tensor,
    /// The values that the levels represent.
    pub lattice: Lattice,
    /// Whether the values include the factor of batch normalization, `γ/√(V+ε)`, so that only the
    /// shift remains to be added.
    pub folded: bool,
}

/// The range of a network's quantizer.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorRange {
    /// The name of the node.
    pub node: String,
    /// Whether the quantizer is that of the node's weights. Otherwise, it is that of the node's
    /// output.
    pub weights: bool,
    /// The bit width.
    pub bits: Bits,
    /// The lowest value of all grids. If the grid of the weights is that of the folded filters, the
    /// value includes the folding factor.
    pub lo: f32,
    /// The highest value of all grids.
    pub hi: f32,
}

impl Network {
    /// Returns the ranges of all quantizers in the order of the nodes, weights before outputs.
    ///
    /// Quantizers that no training batch has set are left out.
    pub fn ranges(&self) -> Result<Vec<TensorRange>> {
        let mut all = Vec::new();
        for node in &self.nodes {
            let mut push = |weights, bits, lattice: Lattice| {
                let (lo, hi) = lattice.range();
                all.push(TensorRange { node: node.name().into(), weights, bits, lo, hi });
            };
            if let Some((unit, quantizer)) =
                node.unit().and_then(|unit| Some((unit, unit.weight_quantizer.as_ref()?)))
                && let Some(levels) = unit.weight_levels(self.epsilon)?
            {
                push(true, quantizer.bits, levels.lattice);
            }
            if let Some(quantizer) = node.quantizer()
                && let Some(lattice) = quantizer.output_lattice()?
            {
                push(false, quantizer.bits, lattice);
            }
        }
        Ok(all)
    }

    /// Sets the ranges of the uniform activation quantizers to those of `other`, a copy of this
    /// network.
    pub fn take_ranges(&mut self, other: &Self) -> Result<()> {
        for (node, other) in self.nodes.iter_mut().zip(&other.nodes) {
            if let (Some(quantizer), Some(range)) =
                (node.quantizer_mut(), other.quantizer().and_then(|q| q.range()))
            {
                let range = range.to_vec1::<f32>()?;
                quantizer.set_range(range[0], range[1])?;
            }
        }
        Ok(())
    }
}

impl Lattice {
    /// Returns the lattice of one grid, or of one grid for each output channel.
    pub(crate) fn of_grids(grids: impl IntoIterator<Item = Grid>, bits: Bits) -> Self {
        let (steps, zero_points) =
            grids.into_iter().map(|grid| (grid.step(), grid.zero_point() as u8)).unzip();
        Self { steps, zero_points, offset: 0.0, max_level: bits.max_level() as u8 }
    }

    /// Returns the lowest and the highest value of all grids.
    pub fn range(&self) -> (f32, f32) {
        let at = |level: u8, (step, zero_point): (&f32, &u8)| {
            (f32::from(level) - f32::from(*zero_point)).mul_add(*step, self.offset)
        };
        let all = || self.steps.iter().zip(&self.zero_points);
        let (lowest, highest) = (all().map(|grid| at(0, grid)), all().map(|grid| at(self.max_level, grid)));
        (lowest.fold(f32::INFINITY, f32::min), highest.fold(f32::NEG_INFINITY, f32::max))
    }

    /// Returns the levels of values that are on the lattice, with the channels last.
    fn levels(&self, values: &Tensor) -> Result<Tensor> {
        let device = values.device();
        let steps = Tensor::new(&self.steps[..], device)?;
        let zeros: Vec<f32> = self.zero_points.iter().copied().map(f32::from).collect();
        let zeros = Tensor::new(zeros, device)?;
        let levels = ((values - f64::from(self.offset))?.broadcast_div(&steps)?).round()?;
        Ok(levels.broadcast_add(&zeros)?)
    }
}

impl Unit {
    /// Returns the levels that the passes compute with and the values that they represent, or
    /// `None` if the weights are not quantized. `epsilon` is the network's.
    pub fn weight_levels(&self, epsilon: f64) -> Result<Option<WeightLevels>> {
        let Some(quantizer) = &self.weight_quantizer else { return Ok(None) };
        let factor = self.folding_factor(epsilon)?;
        let folded = factor.is_some();
        let weight = factor.map_or(Ok(self.weight.clone()), |factor| self.weight.broadcast_mul(&factor))?;
        let Some(lattice) = quantizer.lattice(&weight)? else { return Ok(None) };
        let levels = lattice.levels(&quantizer.apply(&weight)?)?;
        Ok(Some(WeightLevels { levels, lattice, folded }))
    }

    /// Returns a tensor that has the layout of the weight, such as its levels, in PyTorch's layout:
    /// `[C_out, C_in, k, k]`, with `C_in = 1` for a depthwise convolution.
    pub fn in_pytorch_layout(&self, weight: &Tensor) -> Result<Tensor> {
        let [filters, inputs, side, _] = self.kernel.pytorch_dims(self.input_channels(), self.filters());
        let weight = weight.reshape((side, side, inputs, filters))?;
        Ok(weight.permute((3, 2, 0, 1))?.contiguous()?)
    }
}
