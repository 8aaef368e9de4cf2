//! Result rows, comparison with the paper, its claims, plots, Markdown, and one HTML page of all.
//!
//! The crate turns plain values into files and text. [`Row`]s are read and written as CSV,
//! [`Paper`] holds the published figures, [`summarize`] and [`paired`] compute statistics over
//! seeds, and each [`Claim`] gets a [`Verdict`]. [`markdown`] and [`terminal`] report a table,
//! [`plot()`] draws it, and [`Page`] shows everything. No code is specific to one table; the tables
//! differ only in data, the paper's CSV files. Speed measurements are in [`mod@bench`].
//!
//! ```
//! use report::Paper;
//!
//! let theirs = Paper::published().lookup("table3", "mobilenet_v2", 4, 4, "ours").unwrap();
//! assert_eq!((theirs.top1_percent, theirs.mac_millions), (72.70, 92.4));
//! ```

#![forbid(unsafe_code)]

pub mod bench;
mod canvas;
mod claims;
mod deviations;
mod entries;
mod file;
pub mod histogram;
mod names;
mod network;
mod page;
mod paper;
mod plot;
pub mod premise;
mod row;
mod scale;
mod stage;
mod stats;
mod text;

pub use claims::{Claim, Comparison, Expect, PaperSays, PruningQuantity};
pub use deviations::Deviation;
pub use file::{Error, Result, write_text};
pub use names::is_synthetic;
pub use network::{NETWORKS, NetworkRow, read_networks, write_networks};
pub use page::{Exhibit, Page, PublishedNetworks, TableEntry, TableResults};
pub use paper::{Paper, PaperPruned, PaperRow};
pub use plot::plot;
pub use row::{Row, pruned_percent, read_csv, write_csv};
pub use stage::{
    DataRecord, Epoch, Evaluation, LayerRecord, Provenance, PruningRecord, STAGES, StageRecord, Stages,
    Traced, read_stages, trace, write_stages,
};
pub use stats::{
    Estimate, LEVEL, MOST_NEEDED, Quantity, Range, Summary, Verdict, by_seed, differences, holm, paired,
    summarize,
};
pub use text::{About, counted, duration, markdown, shortest, terminal};
