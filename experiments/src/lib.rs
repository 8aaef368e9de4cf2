//! What the table binaries share: flags, profiles, progress, and running a table's stages.
//!
//! A table's binary is a [`Table`] and a call of [`main`]; the benchmark beside PyTorch is [`mod@bench`], Figure 3
//! [`mod@figure3`], the tool for networks in files [`mod@tool`]. Only this crate parses flags and prints.

pub mod bench;
mod device;
pub mod figure3;
mod flags;
mod process;
mod profile;
mod progress;
mod table;
pub mod tool;

pub use flags::{Flags, Only};
pub use profile::{Data, ModelName, NetworkSettings, Profile, Pruning, QuantizationSettings, Trainings};
pub use table::{Cell, Method, Table, main};
