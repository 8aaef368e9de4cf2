//! What the table binaries share: flags, profiles, progress, and running a table's stages.
//!
//! A table's binary is a [`Table`] of [`tables`] and a call of [`main`]; Figure 3 is [`mod@figure3`], the measurement of the
//! premise [`mod@premise`], the tool for networks in files [`mod@tool`], the benchmark beside PyTorch [`mod@bench`], the page of all results
//! [`report_page`]. Only this crate parses flags and prints.

#![forbid(unsafe_code)]
// They panic where their reader has gone: what is printed goes through `output`.
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
