//! The paper's baselines: methods that prepare a [`models::Network`] for quantized fine-tuning.
//!
//! [`Dfq`] (Nagel et al. 2019) prepares a pre-trained network without any data.

#![forbid(unsafe_code)]

mod dfq;

pub use dfq::{Calibration, Cap, Dfq, DfqReport, LayerReport, Normalization};

use models::{Fold, Method};

/// An error in the preparation of a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The quantization's `fold` does not match DFQ's `normalization`.
    #[error(
        "DFQ leaves batch normalization as its `normalization` says: set `fold` to {expected:?}, found {found:?}"
    )]
    Fold {
        /// The `fold` of the quantization settings.
        found: Fold,
        /// The `fold` that matches DFQ's settings.
        expected: Fold,
    },
    /// DFQ only sets the ranges of uniform quantizers.
    #[error("DFQ prepares uniform quantizers: set `method` to \"uniform\", found {0:?}")]
    Method(Method),
    /// The weights stay float, so DFQ has nothing to prepare.
    #[error(
        "DFQ prepares weights for their quantization, but `weights` is 32 (float): set it to 2 to 8 bits"
    )]
    FloatWeights,
    /// Batch normalization has been folded, so DFQ can't use its statistics.
    #[error(
        "network {network}: unit {unit} has no batch normalization any more, and DFQ takes its statistics \
         from there; start from the pre-trained network, before any folding"
    )]
    Folded {
        /// The name of the network.
        network: String,
        /// The first unit without batch normalization.
        unit: String,
    },
    /// A quantizer's range is not usable.
    #[error(transparent)]
    Quantizer(#[from] quant_core::Error),
    /// An operation of the network failed.
    #[error(transparent)]
    Network(#[from] models::Error),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
