//! Networks as ONNX files, for runtimes other than this project's.
//!
//! [`save`] walks the nodes of a [`Network`] and writes the same computation in ONNX's operators: convolutions with their
//! batch normalization, activations, sums, pooling. Where the network quantizes an activation, QuantizeLinear and
//! DequantizeLinear stand; quantized weights are stored as their levels, behind a DequantizeLinear. Layout is NCHW.
//!
//! A quantized value of any scheme is `offset + step·(q − zero_point)` ([`models::Lattice`]), so PACT, DSQ and LSQ are
//! written with the same operators; an offset is subtracted before and added behind. Rounding is that of the passes but
//! for values that lie in the middle between two levels to within float rounding: QuantizeLinear divides by the step and
//! rounds halves to even, uniform quantizers multiply by its reciprocal, DSQ rounds halves up.

#![forbid(unsafe_code)]

mod graph;
mod lower;
mod proto;

use models::Network;
use std::path::Path;

/// How a network is written.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Options {
    /// Batch normalization goes into the weights, of quantized ones into a step for each output channel; a bias is left.
    pub fold: bool,
    /// Levels of up to 4 bits take a byte each, for runtimes without ONNX's 4-bit tensors (opset 21).
    pub int8: bool,
    /// Normalization of images as a part of the graph, which then takes intensities from 0 to 1. Without it the graph takes
    /// images that have been normalized as the network was trained.
    pub normalize: Option<Normalize>,
}

/// `(x − mean)/std` for each of three channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// The mean of each channel, full intensity being 1.
    pub mean: [f32; 3],
    /// The standard deviation of each channel, likewise.
    pub std: [f32; 3],
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The version of ONNX's operators: 13, or 21 where there are tensors of 4 bits.
    pub opset: i64,
    /// Length of the file.
    pub bytes: usize,
}

/// What can go wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The network could not do its part.
    #[error(transparent)]
    Network(#[from] models::Error),
    /// The images that are to be normalized have another number of channels.
    #[error("mean and std are those of 3 channels, but the network's images have {0}")]
    Channels(usize),
    /// The file could not be written.
    #[error("{path} could not be written: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Writes `network` to `path` as an ONNX model, whole or not at all.
///
/// It maps `images` `[N, C, H, W]` to `logits` `[N, classes]`, for any `N`. The convolutions have the names of the
/// network's units, and their tensors those that stand behind the units' names in the network's own file.
///
/// # Errors
/// When the network's tensors do not fit each other, or the file can't be written.
pub fn save(network: &Network, options: &Options, path: &Path) -> Result<Written> {
    let (model, opset) = lower::model(network, options)?;
    let bytes = prost::Message::encode_to_vec(&model);
    let written = Written { opset, bytes: bytes.len() };
    let fail = |source| Error::File { path: path.display().to_string(), source };
    whole_file::write(path, bytes).map_err(fail)?;
    Ok(written)
}
