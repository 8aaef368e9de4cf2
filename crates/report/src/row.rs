//! The result of one run.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::file::{Error, Result, replace};
use crate::paper::Paper;

/// The result of one run: one line of `tableN.csv`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Row {
    /// The table that the run belongs to, as "table3".
    pub table: String,
    /// The name of the settings' profile.
    pub profile: String,
    /// The name of the data set, as "cifar100" or "synthetic".
    pub dataset: String,
    /// The network, "mobilenet_v1" or "mobilenet_v2".
    pub model: String,
    /// The factor that multiplies the network's widths; 1 is the paper's network.
    pub width: f64,
    /// The bit width of the activations.
    pub activation_bits: u32,
    /// The bit width of the weights; 32 is float.
    pub weight_bits: u32,
    /// The method's name.
    pub method: String,
    /// The seed of all random numbers of the run.
    pub seed: u64,
    /// The batch size of the last training, over all processes together; `None` in older files.
    #[serde(default)]
    pub batch: Option<usize>,
    /// Top-1 accuracy on the test images, in percent.
    pub top1_percent: f64,
    /// The number of multiply-accumulates for one image.
    pub macs: u64,
    /// The percentage of the weights that pruning removed.
    pub weights_pruned_percent: f64,
    /// Top-1 accuracy, in percent, of the pre-trained float network from which the run started.
    pub float_top1_percent: f64,
    /// The paper's top-1 accuracy in percent, if its table has this row.
    pub paper_top1_percent: Option<f64>,
    /// The paper's number of multiply-accumulates, in millions.
    pub paper_mac_millions: Option<f64>,
    /// Our accuracy minus the paper's, in percentage points.
    pub top1_minus_paper: Option<f64>,
    /// The hash of the settings that determine the result.
    pub settings_hash: String,
    /// The commit of the code.
    pub git_commit: String,
    /// The device on which the run was made.
    pub device: String,
    /// The duration, in seconds, of the stages that this row needed. A stage that several rows
    /// share counts in full in each.
    pub wall_seconds: f64,
}

impl Row {
    /// Fills the three columns about the paper, or clears them if its table lacks this row.
    ///
    /// Runs on other data or with narrower networks get the paper's figures too, as a reference.
    /// [`Row::comparable`] says whether the difference is meaningful in absolute terms.
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

    /// Returns whether the run uses the paper's data and the paper's network width.
    pub fn comparable(&self) -> bool {
        comparable(&self.table, &self.dataset, self.width)
    }
}

/// Returns the percentage of `before` weights that were removed, if `after` weights are left.
pub fn pruned_percent(before: u64, after: u64) -> f64 {
    100.0 * (1.0 - after as f64 / before as f64)
}

pub(crate) fn comparable(table: &str, dataset: &str, width: f64) -> bool {
    width == 1.0 && Paper::published().dataset(table).is_none_or(|theirs| theirs == dataset)
}

/// Writes the rows as CSV atomically. Creates the folder if it is missing.
pub fn write_csv(rows: &[Row], path: &Path) -> Result<()> {
    write_table(rows, path)
}

/// Writes rows of any type as CSV.
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

/// Reads rows of any type from CSV.
pub(crate) fn read_table<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = csv::Reader::from_path(path).and_then(|reader| reader.into_deserialize().collect());
    rows.map_err(|source| Error::Csv { path: path.into(), source })
}
