//! Result rows, comparison with the paper, plots and Markdown.
//!
//! Plain values go in, files and text come out: [`Row`]s to and from CSV, [`Paper`] with the published
//! figures, [`summarize`] and [`paired`] over seeds, [`markdown`] and [`terminal`] for the report, [`plot`]
//! for the picture. Nothing here knows one table from another; what they differ in is data: the paper's CSV
//! files and the table of [`METHODS`]. Measurements of speed have a module of their own, [`mod@bench`].
//!
//! ```
//! use report::Paper;
//!
//! let theirs = Paper::published().lookup("table3", "mobilenet_v2", 4, 4, "ours").unwrap();
//! assert_eq!((theirs.top1_percent, theirs.mac_millions), (72.70, 92.4));
//! ```

pub mod bench;
mod canvas;
mod file;
pub mod histogram;
mod names;
mod paper;
mod plot;
mod row;
mod stats;
mod text;

pub use file::{Error, Result, write_text};
pub use names::{METHODS, Method};
pub use paper::{Paper, PaperPruned, PaperRow};
pub use plot::plot;
pub use row::{Row, read_csv, write_csv};
pub use stats::{Paired, Summary, paired, summarize};
pub use text::{Context, markdown, terminal};
