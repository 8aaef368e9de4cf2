//! The ranges of a stage's quantizers at its start and end: `ranges.csv`.

use crate::{Error, Result};
use models::{Network, TensorRange};
use std::fmt::Write as _;
use std::path::Path;
use whole_file::seal;

/// The lines of the file.
#[derive(Default)]
pub(crate) struct Ranges(String);

impl Ranges {
    /// Adds the ranges of the network's quantizers. `at` is `start` or `end`.
    pub(crate) fn add(&mut self, at: &str, network: &Network) -> Result<()> {
        for TensorRange { node, weights, bits, lo, hi } in network.ranges()? {
            let tensor = if weights { "weights" } else { "output" };
            writeln!(self.0, "{node},{tensor},{at},{},{lo},{hi}", bits.get()).expect("memory takes it");
        }
        Ok(())
    }

    /// Writes the file and returns its SHA-256. Writes nothing for a network without quantizers.
    pub(crate) fn write(self, path: &Path) -> Result<Option<String>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let text = format!("node,tensor,at,bits,lowest,highest\n{}", self.0);
        let hash = seal::sha256(&text);
        whole_file::write(path, text).map_err(|e| Error::file(path, e))?;
        Ok(Some(hash))
    }
}
