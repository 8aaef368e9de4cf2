//! Filter pre-pruning for quantization, PfQ (method section 2, the paper's section 3).
//!
//! A filter whose running variance is below τ gives a constant. [`PfQ::apply`] removes such filters
//! and keeps the constants that they contributed:
//!
//! 1. [`Constants`] follows constants through the network: which channels of which outputs are
//!    constant, and their values;
//! 2. [`groups`] finds which filters and slices stand or fall together;
//! 3. a channel goes if everything that reads it reads a constant; the readers' means or biases take
//!    up what they lose (bias correction), and the tensors get smaller.

#![forbid(unsafe_code)]

mod analysis;
mod groups;
mod prune;

pub use analysis::{Constants, LayerVariance, variances};
pub use groups::{Group, groups};
pub use prune::{Corrected, Criterion, LayerReport, PfQ, Report};

/// What can go wrong while pruning.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// The network is not one that can be read.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// An activation quantizer has no usable range.
    #[error("a quantizer makes {0} of a constant channel: expected finite ranges, as training leaves them")]
    Range(f32),
    /// Pruning comes before the weights are quantized.
    #[error("unit {0} has quantized weights: prune before weight quantization (Algorithm 1, steps 2 and 4)")]
    QuantizedWeights(String),
    /// The threshold is not a positive number.
    #[error(
        "threshold τ = {0} is not usable: expected a positive number, such as the ε of batch normalization"
    )]
    Threshold(f64),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
