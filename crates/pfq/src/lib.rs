//! Filter pre-pruning for quantization, PfQ (method section 2, the paper's section 3).
//!
//! A filter whose running variance is below τ has a constant output. [`PfQ::apply`] removes such
//! filters and keeps their constant contributions:
//!
//! 1. [`Constants`] follows constants through the network: which channels of which outputs are
//!    constant, and their values.
//! 2. [`groups()`] finds the filters and slices that must be removed together.
//! 3. A channel is removed if every layer that reads it reads a constant. The means or biases of
//!    these layers take up the constants (bias correction), and the tensors get smaller.

#![forbid(unsafe_code)]

mod analysis;
mod groups;
mod prune;

pub use analysis::{Constants, variances};
pub use groups::{Group, groups};
pub use prune::{Corrected, Criterion, LayerReport, PfQ, Report};

/// An error while pruning.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// The network can't be read.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// An activation quantizer has no usable range.
    #[error("a quantizer makes {0} of a constant channel: expected finite ranges, as training leaves them")]
    Range(f32),
    /// The weights are quantized already; pruning must come first.
    #[error("unit {0} has quantized weights: prune before weight quantization (Algorithm 1, steps 2 and 4)")]
    QuantizedWeights(String),
    /// No unit has batch normalization, as after folding it.
    #[error(
        "no unit of network {0} has batch normalization, so its filters have no running variances: prune before \
         normalization is folded"
    )]
    NoNormalization(String),
    /// The threshold is not a positive, finite number.
    #[error(
        "threshold τ = {0} is not usable: expected a positive number, such as the ε of batch normalization"
    )]
    Threshold(f64),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
