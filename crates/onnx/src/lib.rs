//! Export of networks to ONNX files, for other runtimes.
//!
//! [`save`] walks the nodes of a [`Network`] and writes the same computation with ONNX operators:
//! convolutions with their batch normalization, activations, sums, pooling. A quantized activation
//! becomes QuantizeLinear and DequantizeLinear. Quantized weights are stored as levels, followed by
//! a DequantizeLinear. The layout is NCHW.
//!
//! A quantized value of any scheme is `offset + step·(q − zero_point)` ([`models::Lattice`]), so
//! PACT, DSQ and LSQ use the same operators; an offset is subtracted before them and added after
//! them. Rounding is as in the passes, except for values that lie within float rounding of the
//! middle between two levels: QuantizeLinear divides by the step and rounds halves to even, uniform
//! quantizers multiply by the reciprocal of the step, and DSQ rounds halves up.

#![forbid(unsafe_code)]

mod graph;
mod lower;
mod proto;

use models::Network;
use std::path::Path;

/// The options of an export.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Options {
    /// Whether batch normalization is folded into the weights and a bias. For quantized weights, it
    /// is folded into one step for each output channel.
    pub fold: bool,
    /// Whether levels of up to 4 bits take a byte each, for runtimes without ONNX's 4-bit tensors
    /// (opset 21).
    pub int8: bool,
    /// Image normalization as a part of the graph, which then takes intensities from 0 to 1.
    /// Without it, the graph takes images that are normalized as in training.
    pub normalize: Option<Normalize>,
}

/// The normalization `(x − mean)/std` of each of three channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// The mean of each channel, where full intensity is 1.
    pub mean: [f32; 3],
    /// The standard deviation of each channel, where full intensity is 1.
    pub std: [f32; 3],
}

/// A summary of the written file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The operator set version: 13, or 21 if there are 4-bit tensors.
    pub opset: i64,
    /// The length of the file in bytes.
    pub bytes: usize,
}

/// An error of an export.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An operation of the network failed.
    #[error(transparent)]
    Network(#[from] models::Error),
    /// Normalization is requested for images that do not have 3 channels.
    #[error("mean and std are those of 3 channels, but the network's images have {0}")]
    Channels(usize),
    /// The file could not be written.
    #[error("{path} could not be written: {source}")]
    File {
        /// The file.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Writes `network` to `path` as an ONNX model, completely or not at all.
///
/// The model maps `images` `[N, C, H, W]` to `logits` `[N, classes]`, for any `N`. A convolution
/// has the name of its unit, and its tensors have the same suffixes as in the network's own file.
///
/// # Errors
/// If the network's tensors do not fit each other, or the file can't be written.
pub fn save(network: &Network, options: &Options, path: &Path) -> Result<Written> {
    let (model, opset) = lower::model(network, options)?;
    let bytes = prost::Message::encode_to_vec(&model);
    let written = Written { opset, bytes: bytes.len() };
    let fail = |source| Error::File { path: path.display().to_string(), source };
    whole_file::write(path, bytes).map_err(fail)?;
    Ok(written)
}
