//! Networks that are published beside the results.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::Result;
use crate::row::{read_table, write_table};

/// The file that lists the networks of a folder.
pub const NETWORKS: &str = "networks.csv";

/// One published network: one line of `networks.csv`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct NetworkRow {
    /// Its file, in the folder of the list.
    pub file: String,
    /// The file's size.
    pub bytes: u64,
    /// SHA-256 of the file, in lower-case hexadecimal digits.
    pub sha256: String,
    /// Key of the stage that gave it.
    pub key: String,
    /// Key of the stage before that one; none for pre-training.
    pub parent: Option<String>,
    /// The network, "mobilenet_v1" or "mobilenet_v2".
    pub model: String,
    /// What the network's widths are multiplied by, before pruning.
    pub width: f64,
    /// What it is: "float", "pruned", or bits and method of a row of a table, as "A4/W4 ours".
    pub subject: String,
    /// Seed of the row; of the pre-training for what no row has alone.
    pub seed: u64,
    /// The stage's settings as JSON, as they entered its key.
    pub settings: String,
    /// The data, as "cifar100".
    pub dataset: String,
    /// Top-1 accuracy on the test images, in percent.
    pub top1_percent: f64,
    /// Mean cross-entropy on the test images, in nats.
    pub loss: f64,
    /// Multiply–accumulates of one image.
    pub macs: u64,
    /// Conv and classifier weights.
    pub weights: u64,
}

/// Writes the list of a folder's networks, whole or not at all.
pub fn write_networks(rows: &[NetworkRow], folder: &Path) -> Result<()> {
    write_table(rows, &folder.join(NETWORKS))
}

/// Reads what [`write_networks`] wrote.
pub fn read_networks(folder: &Path) -> Result<Vec<NetworkRow>> {
    read_table(&folder.join(NETWORKS))
}
