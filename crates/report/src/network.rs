//! The list of the networks that are published with the results.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::Result;
use crate::row::{read_table, write_table};

/// The name of the file that lists the networks of a folder.
pub const NETWORKS: &str = "networks.csv";

/// A published network: one line of `networks.csv`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct NetworkRow {
    /// The name of the network's file, in the folder of the list.
    pub file: String,
    /// The size of the file in bytes.
    pub bytes: u64,
    /// The SHA-256 of the file, as lower-case hex digits.
    pub sha256: String,
    /// The key of the stage that produced the network.
    pub key: String,
    /// The key of the stage before it; `None` for pre-training.
    pub parent: Option<String>,
    /// The architecture, "mobilenet_v1" or "mobilenet_v2".
    pub model: String,
    /// The factor that multiplies the network's widths, before pruning.
    pub width: f64,
    /// The kind of network: "float", "pruned", or a row's bits and method, as "A4/W4 ours".
    pub subject: String,
    /// The seed of the table's row, or of the pre-training if several rows share the network.
    pub seed: u64,
    /// The stage's settings as JSON, in the form that its key is computed from.
    pub settings: String,
    /// The name of the data set, as "cifar100".
    pub dataset: String,
    /// Top-1 accuracy on the test images, in percent.
    pub top1_percent: f64,
    /// Mean cross-entropy on the test images, in nats.
    pub loss: f64,
    /// The number of multiply–accumulates for one image.
    pub macs: u64,
    /// The number of convolution and classifier weights.
    pub weights: u64,
}

/// Writes the list of a folder's networks atomically.
pub fn write_networks(rows: &[NetworkRow], folder: &Path) -> Result<()> {
    write_table(rows, &folder.join(NETWORKS))
}

/// Reads the list that [`write_networks`] wrote.
pub fn read_networks(folder: &Path) -> Result<Vec<NetworkRow>> {
    read_table(&folder.join(NETWORKS))
}
