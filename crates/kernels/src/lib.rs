//! The numerical operations of a quantized network over Candle tensors.
//!
//! Each operation has a file with its definition, its derivative, its kernels and its tests against
//! a plain-Candle reference.
//!
//! Feature maps are NHWC (`[images, height, width, channels]`) and contiguous. Feature maps and
//! their gradients are either all `f32` or all `bf16`; all other tensors are `f32`, and sums have
//! at least the precision of `f32`. Nothing uses Candle's autograd: a network owns its forward and
//! backward passes and calls the functions here for both. All functions keep three promises:
//!
//! * **No host synchronization.** A kernel reads what it needs (quantization ranges, statistics)
//!   from tensors and returns its results as tensors.
//! * **The same bits for any number of threads** and, with `f32`, for any instruction set. Work is
//!   cut into pieces that depend only on the shapes, and sums are combined in a fixed order. (With
//!   `bf16` maps, a processor's own product instructions may give sums that differ in the last
//!   bits.)
//! * **Clear errors.** The error for a wrong shape or dtype names the operation and the argument.
//!
//! Units of a network pass each other a [`FeatureMap`]: floats, the levels of their quantizer (one
//! byte each), or a normalization that its readers compute.
//!
//! An operation runs where its tensors are: on the CPU or, with the feature `cuda`, on a GPU.
//! [`gpu`] describes how kernels are launched and tested.

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
/// Each function clamps to an interval, and the kernels compute it that way.
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
    /// Returns the interval that the activation clamps to.
    pub const fn bounds(self) -> (f32, f32) {
        match self {
            Self::Identity => (f32::NEG_INFINITY, f32::INFINITY),
            Self::Relu => (0.0, f32::INFINITY),
            Self::Relu6 => (0.0, 6.0),
        }
    }

    /// Computes `φ(x)`; NaN stays NaN.
    pub fn apply(self, x: f32) -> f32 {
        clamp(x, self.bounds())
    }
}

/// Clamps `x` to `(lo, hi)` in two vector instructions; NaN stays NaN.
#[inline(always)]
fn clamp(x: f32, (lo, hi): (f32, f32)) -> f32 {
    let x = if x < lo { lo } else { x };
    if x > hi { hi } else { x }
}

/// A uniform fake quantizer of a tensor, whose grid is [`quant_core::Grid::spanning`] over the
/// range.
#[derive(Clone, Copy, Debug)]
pub struct Quantizer<'a> {
    /// The range `(lo, hi)`: `[2]` for the whole tensor or, for weights, `[2, C]` with one range
    /// for each output channel (the last dimension).
    pub range: &'a Tensor,
    /// The bit width.
    pub bits: Bits,
}

/// The weight of a convolution as an operand: its floats and, if it is quantized, the data from
/// which its levels are computed.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The weight in the layout of its [`convolution::Kernel`]; the quantized one, if it is
    /// quantized.
    pub value: &'a Tensor,
    /// The weight before quantization and its quantizer, with one range for the whole weight or one
    /// for each output channel. They allow a product of levels. `value` must be this weight after
    /// quantization.
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
    /// Returns the number of multiplications and additions.
    pub(crate) fn operations(self) -> usize {
        2 * self.rows * self.columns * self.depth
    }
}

/// An error of an operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: {argument} has shape {found:?}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// The shape of the argument.
        found: Shape,
        /// The expected shape.
        expected: String,
    },
    /// An argument has the wrong dtype.
    #[error("{op}: {argument} is {found:?}, expected {expected:?}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// The dtype of the argument.
        found: DType,
        /// The expected dtype.
        expected: DType,
    },
    /// A setting is outside what the operation supports.
    #[error("{op}: {message}")]
    Setting {
        /// The operation.
        op: &'static str,
        /// A message that says which setting was found and which are supported.
        message: String,
    },
    /// A Candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;
