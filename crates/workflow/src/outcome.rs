use crate::{Error, Result, key};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use train::{Arithmetic, EpochMetrics, Evaluation};
use whole_file::seal;

/// The file that marks a stage as done.
pub(crate) const OUTCOME: &str = "outcome.json";
/// The file of a stage's resulting network.
pub const NETWORK: &str = "network.safetensors";
/// The file of the quantizers' ranges at the stage's start and end.
pub(crate) const RANGES: &str = "ranges.csv";

/// Who made a result, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The exact command line.
    pub command: String,
    /// The commit of the source that the binary was built from. It ends in `-dirty` if the source
    /// had been edited.
    pub git_commit: String,
    /// The processor or accelerator.
    pub device: String,
}

/// The result of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The stage's key.
    pub key: String,
    /// [`Stage::label`](crate::Stage::label).
    pub label: String,
    /// [`Stage::step`](crate::Stage::step).
    #[serde(default)]
    pub step: String,
    /// The stage's kind and settings, as they entered the key.
    pub stage: Value,
    /// The key of the stage whose network is the input.
    pub parent: Option<String>,
    /// The data set's name, source and fingerprint.
    pub data: DataOrigin,
    /// The evaluation of the resulting network on the test set; after training, that of the last
    /// epoch.
    pub evaluation: Evaluation,
    /// The number of multiply–accumulates of the resulting network for one image.
    pub macs: u64,
    /// The number of convolution and classifier weights of the resulting network.
    pub weights: u64,
    /// The wall time of this stage alone in seconds, over all of its sessions.
    pub seconds: f64,
    /// The metrics of every epoch, for stages that train.
    pub metrics: Vec<EpochMetrics>,
    /// For every epoch, the percentage of filters whose running variance is below ε. It is empty
    /// for stages of older versions and for stages that do not train.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub low_variance_percent: Vec<Option<f64>>,
    /// The report of a stage without training.
    pub report: Option<Value>,
    /// The kind of each layer of the network that the report is about, by its name: `full`,
    /// `depthwise` or `pointwise`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, String>,
    /// Who made the result, and with what.
    pub provenance: Provenance,
    /// The SHA-256 of `metrics.csv`, `ranges.csv` and the network's files, by file name. It is
    /// empty for stages of older versions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
    /// The SHA-256 of the file of the input network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_network: Option<String>,
    /// [`seal::of`] all other fields. A new field must therefore be left out if it has its default;
    /// otherwise the seals of stored outcomes no longer match when they are written to results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
}

/// The data that a result comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataOrigin {
    /// The name of the data set, such as `cifar100` or `synthetic`.
    pub name: String,
    /// The folder, hub repository or generator.
    pub source: String,
    /// The data set's fingerprint, [`Dataset::fingerprint`](datasets::Dataset::fingerprint).
    pub fingerprint: String,
    /// The files of images that could not be used and were left out. The fingerprint does not
    /// reflect this, because such images are decoded only when they are needed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

impl Outcome {
    /// Reads a stage's outcome from its folder; returns `None` if the stage has not been run.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the file differs from what was written. Damage to outcomes of older
    /// versions cannot be detected.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(OUTCOME);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::file(&path, e)),
        };
        let value = serde_json::from_slice(&text).map_err(|e| format!("can't be understood: {e}"));
        let outcome = value.and_then(Self::from_value);
        outcome.map(Some).map_err(|problem| Error::Damaged { path: path.display().to_string(), problem })
    }

    /// Parses an outcome and checks its seal.
    ///
    /// # Errors
    /// A description of what was found and expected, if `value` differs from what was written.
    fn from_value(value: Value) -> Result<Self, String> {
        let sealed = seal::check(&value)?;
        let outcome: Self = serde_json::from_value(value).map_err(|e| format!("can't be understood: {e}"))?;
        if !sealed && !outcome.files.is_empty() {
            return Err("it has no seal, but hashes, which are not without one".into());
        }
        Ok(outcome)
    }

    /// Parses an outcome that was written to results, and checks its seal and its key.
    ///
    /// # Errors
    /// A description of what was found and expected, if `value` differs from what was written, or
    /// if its key does not match its settings, its parent's key and its data.
    pub fn of_results(value: Value) -> Result<Self, String> {
        let outcome = Self::from_value(value)?;
        match key::fits(&outcome) {
            true => Ok(outcome),
            false => Err(format!("its key {} is not that of its settings and data", outcome.key)),
        }
    }

    /// Returns the arithmetic of the stage's last evaluation: that of its training, or `f32` for
    /// stages that do not train.
    pub fn arithmetic(&self) -> Arithmetic {
        let settings = self.stage.as_object().and_then(|kinds| kinds.values().next());
        let arithmetic = settings.and_then(|settings| settings.get("training")?.get("arithmetic"));
        arithmetic.and_then(|name| Arithmetic::deserialize(name).ok()).unwrap_or_default()
    }

    /// Seals the outcome and writes it to the stage's folder, whole or not at all.
    pub(crate) fn write(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(OUTCOME);
        let fail = |e: serde_json::Error| Error::file(&path, e);
        self.seal = None;
        // The outcome is serialized and parsed before it is sealed, so that the seal matches what
        // will be read.
        let text = serde_json::to_string(self).map_err(fail)?;
        self.seal = Some(seal::of(&serde_json::from_str(&text).map_err(fail)?));
        let text = serde_json::to_string_pretty(self).map_err(fail)?;
        whole_file::write(&path, text).map_err(|e| Error::file(&path, e))
    }

    /// Returns the SHA-256 of the network's file, or `None` for stages of older versions.
    pub fn network_hash(&self) -> Option<&str> {
        self.files.get(NETWORK).map(String::as_str)
    }

    /// Checks that the files in the stage's folder are those that the stage wrote.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first file that is missing or differs.
    pub fn check_files(&self, folder: &Path) -> Result<()> {
        for (name, expected) in &self.files {
            let path = folder.join(name);
            let damaged = |problem: String| Error::Damaged { path: path.display().to_string(), problem };
            let found = match seal::sha256_of_file(&path) {
                Ok(found) => found,
                Err(e) if e.kind() == ErrorKind::NotFound => return Err(damaged(e.to_string())),
                Err(e) => return Err(Error::file(&path, e)),
            };
            if found != *expected {
                return Err(damaged(format!("has SHA-256 {found}, expected {expected}")));
            }
        }
        Ok(())
    }
}
