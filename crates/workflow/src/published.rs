//! Outcomes of stages that were run elsewhere and published alongside the results.

use crate::{Error, Outcome, Result};
use candle_core::Device;
use models::Network;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use whole_file::seal;

/// Outcomes of stages that were run elsewhere, with the networks of some of them.
///
/// A stage whose network is published counts as done in a [`Store`](crate::Store) that lacks it. Of
/// the other stages only the outcome is known. It is enough for a row of a table, which needs the
/// outcomes of the stages before its last one; if the network is needed, the stage is run.
#[derive(Debug, Default)]
pub struct Published {
    stages: BTreeMap<String, Record>,
}

#[derive(Debug)]
struct Record {
    outcome: Outcome,
    /// The file of the network.
    network: Option<PathBuf>,
    /// The problem with the network's file, or `None` if it is intact. It is set once the file has
    /// been checked.
    problem: OnceLock<Option<String>>,
}

impl Published {
    /// Collects outcomes, and the files of networks by the keys of the stages that made them. No
    /// file is read yet.
    ///
    /// # Errors
    /// If a network belongs to none of the stages, or its stage did not record its hash.
    pub fn new(outcomes: Vec<Outcome>, mut networks: BTreeMap<String, PathBuf>) -> Result<Self> {
        let mut stages = BTreeMap::new();
        for outcome in outcomes {
            let network = networks.remove(&outcome.key);
            if let (Some(path), None) = (&network, outcome.network_hash()) {
                return Err(damaged(path, format!("stage {} has no hash of its network", outcome.key)));
            }
            stages.insert(outcome.key.clone(), Record { outcome, network, problem: OnceLock::new() });
        }
        match networks.first_key_value() {
            Some((key, path)) => {
                Err(damaged(path, format!("its stage {key} is none of those that it came with")))
            }
            None => Ok(Self { stages }),
        }
    }

    /// Returns the outcome of the stage with that key.
    pub fn outcome(&self, key: &str) -> Option<&Outcome> {
        self.stages.get(key).map(|record| &record.outcome)
    }

    /// Returns the network's file of the stage with that key; `None` if only its outcome is known.
    pub fn file(&self, key: &str) -> Option<&Path> {
        self.stages.get(key)?.network.as_deref()
    }

    /// Returns whether the network of the stage with that key is published. The file is read once.
    ///
    /// # Errors
    /// [`Error::Published`] if the file is not what the stage wrote.
    pub(crate) fn has_network(&self, key: &str) -> Result<bool> {
        let Some(Record { outcome, network: Some(path), problem }) = self.stages.get(key) else {
            return Ok(false);
        };
        let check = || match (seal::sha256_of_file(path), outcome.network_hash()) {
            (Ok(found), Some(expected)) if found == expected => None,
            (Ok(found), expected) => {
                Some(format!("has SHA-256 {found}, expected {}", expected.unwrap_or("none")))
            }
            (Err(error), _) => Some(error.to_string()),
        };
        match problem.get_or_init(check) {
            None => Ok(true),
            Some(problem) => Err(damaged(path, problem)),
        }
    }

    /// Reads the network of the stage with that key, if it is published.
    ///
    /// # Errors
    /// [`Error::Published`] if the file is not what the stage wrote.
    pub fn network(&self, key: &str, device: &Device) -> Result<Option<Network>> {
        let Some(Record { outcome, network: Some(path), .. }) = self.stages.get(key) else { return Ok(None) };
        match Network::load_verified(path, outcome.network_hash().unwrap_or_default(), device) {
            Ok((network, _)) => Ok(Some(network)),
            Err(models::Error::Damaged { problem, .. }) => Err(damaged(path, problem)),
            Err(error) => Err(error.into()),
        }
    }
}

fn damaged(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::Published { path: path.display().to_string(), problem: problem.to_string() }
}
