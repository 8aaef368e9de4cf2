//! One run's result.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::file::{Error, Result, replace};
use crate::paper::Paper;

/// One run's result: one line of `tableN.csv`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Row {
    /// The table that the run belongs to, as "table3".
    pub table: String,
    /// The profile of settings.
    pub profile: String,
    /// The data, as "cifar100" or "synthetic".
    pub dataset: String,
    /// The network, "mobilenet_v1" or "mobilenet_v2".
    pub model: String,
    /// What the network's widths are multiplied by; 1 is the paper's network.
    pub width: f64,
    /// Bits of the activations.
    pub activation_bits: u32,
    /// Bits of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method's name.
    pub method: String,
    /// The seed of everything random in the run.
    pub seed: u64,
    /// Images a step of the last training, of all processes that train together; none in older files.
    #[serde(default)]
    pub batch: Option<usize>,
    /// Top-1 accuracy on the test images, in percent.
    pub top1_percent: f64,
    /// Multiply-accumulates of one image.
    pub macs: u64,
    /// Percent of the weights that pruning removed.
    pub weights_pruned_percent: f64,
    /// Top-1 accuracy, in percent, of the pre-trained float network that the run began from.
    pub float_top1_percent: f64,
    /// The paper's accuracy, where its table has this row.
    pub paper_top1_percent: Option<f64>,
    /// The paper's millions of multiply-accumulates.
    pub paper_mac_millions: Option<f64>,
    /// Our accuracy less the paper's, in points.
    pub top1_minus_paper: Option<f64>,
    /// Hash of the settings that decide the result.
    pub settings_hash: String,
    /// The commit of the code.
    pub git_commit: String,
    /// The device that it ran on.
    pub device: String,
    /// Seconds of the stages that this row needed; a stage that several rows share is counted in full in each.
    pub wall_seconds: f64,
}

impl Row {
    /// Fills the three columns about the paper where its table has this row, and clears them where not.
    ///
    /// Runs on other data or with narrower networks get the paper's figures too, as a reference; whether the
    /// difference means anything in absolute terms, [`Row::comparable`] says.
    pub fn compare(self, paper: &Paper) -> Row {
        let theirs =
            paper.lookup(&self.table, &self.model, self.activation_bits, self.weight_bits, &self.method);
        Row {
            paper_top1_percent: theirs.map(|row| row.top1_percent),
            paper_mac_millions: theirs.map(|row| row.mac_millions),
            top1_minus_paper: theirs.map(|row| self.top1_percent - row.top1_percent),
            ..self
        }
    }

    /// Whether the run is on the paper's data with the paper's network.
    pub fn comparable(&self) -> bool {
        comparable(&self.table, &self.dataset, self.width)
    }
}

/// Percent of `before` weights that are not among the `after` that are left.
pub fn pruned_percent(before: u64, after: u64) -> f64 {
    100.0 * (1.0 - after as f64 / before as f64)
}

pub(crate) fn comparable(table: &str, dataset: &str, width: f64) -> bool {
    width == 1.0 && Paper::published().dataset(table).is_none_or(|theirs| theirs == dataset)
}

/// Writes the rows as CSV, whole or not at all; makes the folder where it is missing.
pub fn write_csv(rows: &[Row], path: &Path) -> Result<()> {
    write_table(rows, path)
}

/// Writes any rows as CSV.
pub(crate) fn write_table<T: Serialize>(rows: &[T], path: &Path) -> Result<()> {
    replace(path, |temporary| {
        let csv = |source| Error::Csv { path: path.into(), source };
        let mut writer = csv::Writer::from_path(temporary).map_err(csv)?;
        rows.iter().try_for_each(|row| writer.serialize(row)).map_err(csv)?;
        writer.flush().map_err(|source| Error::Io { path: path.into(), source })
    })
}

/// Reads rows that [`write_csv`] wrote.
pub fn read_csv(path: &Path) -> Result<Vec<Row>> {
    read_table(path)
}

/// Reads any rows from CSV.
pub(crate) fn read_table<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = csv::Reader::from_path(path).and_then(|reader| reader.into_deserialize().collect());
    rows.map_err(|source| Error::Csv { path: path.into(), source })
}
