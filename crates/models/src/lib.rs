//! [`Network`], the one structure for MobileNetV1 and V2: forward and backward passes, counts,
//! files.
//!
//! A network is a plain ordered list of [`Node`]s: convolutions with the operations after them
//! ([`Unit`]), sums at the ends of residuals, pooling. Each node names the earlier nodes that it
//! reads. Training, MAC counting, pruning, folding and equalization all read this one structure.
//! Both MobileNets are values of it ([`MobileNet::init`]), not code of their own.

#![forbid(unsafe_code)]

mod agree;
mod count;
mod file;
mod import;
mod input;
mod lattice;
mod mobilenet;
mod network;
mod parameter;
mod pass;
mod pth;
mod quantization;
mod quantizer;
mod seal;
mod structure;
mod values;

pub use count::Layer;
pub use file::{Extras, MAX_FILE_BYTES};
pub use import::{Import, Naming, Origin};
pub use kernels::convolution::Kernel;
pub use lattice::{Lattice, TensorRange, WeightLevels};
pub use mobilenet::{Input, MobileNet, Strides, Version};
pub use network::{BatchNorm, HEAD, Image, MOST_CHANNELS, Network, Node, Norm, Pool, Sum, Unit};
pub use parameter::{Gradients, Parameter, Role};
pub use pass::{Observer, Step, Tape};
pub use quantization::{Fold, Quantization, WeightGrid};
pub use quantizer::{Method, Quantizer};

/// An error of a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// A quantizer's settings are not usable.
    #[error(transparent)]
    Quantizer(#[from] quant_core::Error),
    /// The passes can't run this structure.
    #[error("network {network}, {place}: {problem}")]
    Structure {
        /// Name of the network.
        network: String,
        /// The unit or setting concerned.
        place: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A parameter has no gradient, several gradients, or one of another shape.
    #[error("parameter {parameter}: {problem}")]
    Gradient {
        /// The parameter's name.
        parameter: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A network file could not be read or written.
    #[error("network file {path}: {problem}")]
    File {
        /// The path of the file.
        path: String,
        /// What was found, what was expected, and what to do.
        problem: String,
    },
    /// A network file, or a part of it, is missing, or differs from what was written.
    #[error("network file {path}: {problem}")]
    Damaged {
        /// The path of the file.
        path: String,
        /// What was found and what was expected.
        problem: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
