//! The code that the binaries share: flags, profiles, progress, and running a table's stages.
//!
//! A table's binary calls [`main`] with a [`Table`] of [`tables`]. Figure 3 is [`mod@figure3`], the
//! measurement of the premise [`mod@premise`], the tool for networks in files [`mod@tool`], the
//! benchmark against PyTorch [`mod@bench`], and the page of all results [`report_page`]. Only this
//! crate parses flags and prints.

#![forbid(unsafe_code)]
// These macros panic if the reader has closed the output; `output` does not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod all;
pub mod bench;
mod command;
mod device;
pub mod figure3;
mod flags;
mod job;
mod networks;
mod output;
pub mod premise;
mod pretrained;
mod process;
mod profile;
mod progress;
mod published;
pub mod report_page;
mod results;
mod session;
mod signals;
mod slurm;
mod table;
pub mod tables;
pub mod tool;

pub use device::Arithmetic;
pub use flags::{Flags, Only};
pub use process::exit;
pub use profile::{DataSettings, ModelName, NetworkSettings, Profile, Pruning, QuantizationSettings};
pub use table::{Method, RowPlan, Table, main};
