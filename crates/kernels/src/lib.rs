//! The numerical operations of a quantized network over Candle tensors, each in one file with its
//! definition, its derivative, its kernels and its tests against a plain-Candle reference.
//!
//! Feature maps are NHWC (`[images, height, width, channels]`) and contiguous. They and their gradients are `f32`, or all
//! of them `bf16`; everything else is `f32`, and so are all sums. Nothing uses Candle's autograd: a network owns its
//! forward and backward passes and calls the functions here for both. Three promises hold for all of them:
//!
//! * **No host synchronization.** What a kernel needs (quantization ranges, statistics) it reads from
//!   tensors; what it finds it returns as tensors.
//! * **The same bits whatever the number of threads** and, of `f32`, whatever the instruction set: work is cut in
//!   pieces that depend on the shapes alone, and sums are combined in a fixed order. (With `bf16` maps a processor's own
//!   products may differ in the last bits of their sums.)
//! * **Clear errors.** A wrong shape or dtype names the operation and the argument.
//!
//! What the forward pass hands on is a [`FeatureMap`]: floats, or the levels of their quantizer, one byte each.
//!
//! An operation runs where its tensors are: on the CPU, or (feature `cuda`) on a GPU ([`gpu`] says how the kernels are
//! launched and tested).

mod affine;
pub mod augment;
pub mod bias;
mod blockwise;
pub mod cap;
mod check;
pub mod convolution;
mod cpu;
pub mod depthwise;
pub mod dorefa;
pub mod dsq;
mod elements;
mod feature;
pub mod gpu;
pub mod im2col;
mod learned;
pub mod loss;
pub mod lsq;
pub mod memory;
mod moments;
pub mod norm;
pub mod pact;
pub mod pointwise;
pub mod pool;
mod product;
pub mod profiler;
pub mod quantize;
pub mod residual;
pub mod sgd;
mod tanh;
#[cfg(test)]
mod testing;
mod tile;
mod work;

pub use feature::{Deferred, FeatureMap, Levels};

use candle_core::{DType, Shape, Tensor};
use quant_core::Bits;
use serde::{Deserialize, Serialize};

/// The activation function `φ` after a normalization.
///
/// Each is a clamp to an interval, which is how the kernels compute it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `φ(x) = x`.
    Identity,
    /// `φ(x) = max(x, 0)`.
    Relu,
    /// `φ(x) = min(max(x, 0), 6)`.
    Relu6,
}

impl Activation {
    /// The interval that the activation clamps to.
    pub const fn bounds(self) -> (f32, f32) {
        match self {
            Self::Identity => (f32::NEG_INFINITY, f32::INFINITY),
            Self::Relu => (0.0, f32::INFINITY),
            Self::Relu6 => (0.0, 6.0),
        }
    }

    /// `φ(x)`; NaN stays NaN.
    pub fn apply(self, x: f32) -> f32 {
        clamp(x, self.bounds())
    }

    /// Whether `φ'(x) = 1`: strictly inside the interval. Elsewhere, the kinks included, it is 0, as in
    /// PyTorch.
    pub fn passes(self, x: f32) -> bool {
        let (lo, hi) = self.bounds();
        lo < x && x < hi
    }
}

/// `x` clamped to `(lo, hi)`, NaN staying NaN, in two vector instructions.
#[inline(always)]
fn clamp(x: f32, (lo, hi): (f32, f32)) -> f32 {
    let x = if x < lo { lo } else { x };
    if x > hi { hi } else { x }
}

/// A uniform fake quantizer of a tensor: the grid is [`quant_core::Grid::spanning`] of the range.
#[derive(Clone, Copy, Debug)]
pub struct Quantizer<'a> {
    /// The range `(lo, hi)`: `[2]` of the whole tensor or, of weights, `[2, C]` with one of each output channel, the last
    /// dimension.
    pub range: &'a Tensor,
    /// The bit width.
    pub bits: Bits,
}

/// The weight of a convolution as an operand: as floats, and, if it is quantized, by what its levels follow from.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The weight, in the layout of its [`convolution::Kernel`] (the quantized one, if it is quantized).
    pub value: &'a Tensor,
    /// The weight before quantization and its quantizer, of the whole or of each output channel, so that a product may be
    /// one of levels. `value` must be the quantized `original`.
    pub quantized: Option<(&'a Tensor, Quantizer<'a>)>,
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(value: &'a Tensor) -> Self {
        Self { value, quantized: None }
    }
}

/// The sizes of a matrix product `c[rows, columns] = a[rows, depth]·b[depth, columns]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductSizes {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) depth: usize,
}

impl ProductSizes {
    /// Multiplications and additions.
    pub(crate) fn operations(self) -> usize {
        2 * self.rows * self.columns * self.depth
    }
}

/// What can be wrong with a call of an operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: {argument} has shape {found:?}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its shape.
        found: Shape,
        /// The shape it should have.
        expected: String,
    },
    /// An argument has the wrong dtype.
    #[error("{op}: {argument} is {found:?}, expected {expected:?}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its dtype.
        found: DType,
        /// The dtype it should have.
        expected: DType,
    },
    /// A setting is outside what the operation supports.
    #[error("{op}: {message}")]
    Setting {
        /// The operation.
        op: &'static str,
        /// What was found and what is supported.
        message: String,
    },
    /// Candle could not do its part.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;
