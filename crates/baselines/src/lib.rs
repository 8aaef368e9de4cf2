//! The paper's baselines as ways to prepare a [`models::Network`] for quantized fine-tuning.
//!
//! [`Dfq`] (Nagel et al. 2019) prepares a pre-trained network without any data.

#![forbid(unsafe_code)]

mod dfq;

pub use dfq::{Calibration, Cap, Dfq, DfqReport, LayerReport, Normalization};

use models::{Fold, Method};

/// What can be wrong with the preparation of a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What quantizes goes against what DFQ leaves of batch normalization.
    #[error(
        "DFQ leaves batch normalization as its `normalization` says: set `fold` to {expected:?}, found {found:?}"
    )]
    Fold {
        /// What the quantization says.
        found: Fold,
        /// What goes with DFQ's settings.
        expected: Fold,
    },
    /// DFQ sets the ranges of uniform quantizers.
    #[error("DFQ prepares uniform quantizers: set `method` to \"uniform\", found {0:?}")]
    Method(Method),
    /// There is nothing for DFQ to prepare.
    #[error(
        "DFQ prepares weights for their quantization, but `weights` is 32 (float): set it to 2 to 8 bits"
    )]
    FloatWeights,
    /// The statistics that DFQ takes from batch normalization are gone.
    #[error(
        "network {network}: unit {unit} has no batch normalization any more, and DFQ takes its statistics \
         from there; start from the pre-trained network, before any folding"
    )]
    Folded {
        /// Name of the network.
        network: String,
        /// The first unit without batch normalization.
        unit: String,
    },
    /// A quantizer's range is not usable.
    #[error(transparent)]
    Quantizer(#[from] quant_core::Error),
    /// A network could not do its part.
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
