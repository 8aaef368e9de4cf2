//! Bit widths, quantization grids and batch-norm folding: the arithmetic, without tensors.
//!
//! A fake-quantized value is `level × step`, shifted by an integer zero point, so its level can be
//! read back as an integer at any time. Everything here is scalar; the kernels apply [`Grid`] to
//! whole tensors.

#![forbid(unsafe_code)]

mod bits;
mod fold;
mod grid;

pub use bits::{Bits, Precision};
pub use fold::{fold_scale, fold_shift};
pub use grid::Grid;

/// An error in the settings of a quantizer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The bit width is outside 2…8 (and not the 32 that stands for float).
    #[error("bit width {0} is not supported: use 2 to 8, or 32 for no quantization")]
    Bits(u32),
    /// A range with a bound that is not finite, or with the lower bound above the upper.
    #[error(
        "quantization range [{lo}, {hi}] is not usable: both bounds must be finite and in order; \
         a diverged training run (NaN or infinity) is the usual cause"
    )]
    Range {
        /// The lower bound.
        lo: f32,
        /// The upper bound.
        hi: f32,
    },
}
