use crate::{Error, Result, key};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use train::{Arithmetic, EpochMetrics, Evaluation};
use whole_file::seal;

/// The file that says that a stage is done.
pub(crate) const OUTCOME: &str = "outcome.json";
/// The file of the network that a stage gave.
pub(crate) const NETWORK: &str = "network.safetensors";
/// A training's metrics.
pub(crate) const METRICS: &str = "metrics.csv";

/// What its quantizers spanned when it began and when it ended.
pub(crate) const RANGES: &str = "ranges.csv";

/// Who made a result, with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The exact command line.
    pub command: String,
    /// Commit of the source that the binary was built from; ends in `-dirty` if it had been edited.
    pub git_commit: String,
    /// Processor or accelerator.
    pub device: String,
}

/// What a stage gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The stage's key.
    pub key: String,
    /// [`Stage::label`](crate::Stage::label).
    pub label: String,
    /// [`Stage::step`](crate::Stage::step).
    #[serde(default)]
    pub step: String,
    /// What it does, with its settings as they entered the key.
    pub stage: Value,
    /// Key of the stage whose network it began from.
    pub parent: Option<String>,
    /// The data set's name, source and fingerprint.
    pub data: DataOrigin,
    /// The resulting network on the test set; after training, that of the last epoch.
    pub evaluation: Evaluation,
    /// Multiply–accumulates of the resulting network for one image.
    pub macs: u64,
    /// Its conv and classifier weights.
    pub weights: u64,
    /// Wall time of this stage alone, over all of its sessions.
    pub seconds: f64,
    /// Of every epoch, for stages that train.
    pub metrics: Vec<EpochMetrics>,
    /// After every epoch the share, in percent, of the filters whose running variance is below ε; stages of older versions, and
    /// those that do not train, have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub low_variance_percent: Vec<Option<f64>>,
    /// What a stage without training reports about its work.
    pub report: Option<Value>,
    /// What each layer of its report is: `full`, `depthwise` or `pointwise`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, String>,
    /// Who made it.
    pub provenance: Provenance,
    /// SHA-256 of `metrics.csv` and of the network's files, by name; stages of older versions have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
    /// SHA-256 of the file of the network that it began from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_network: Option<String>,
    /// [`seal::of`] all of this. So a field that is added here is to be left out where it has its default, or the seals of
    /// stored outcomes would no longer fit once they are written to results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<String>,
}

/// Which data a result comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataOrigin {
    /// `cifar100` or `synthetic`.
    pub name: String,
    /// Folder, hub repository or generator.
    pub source: String,
    /// Hash of every image and label.
    pub fingerprint: String,
    /// Images that could not be used and were left out, by their files; those of pictures that are decoded as they are
    /// needed, which no fingerprint has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

impl Outcome {
    /// Reads what a stage gave from its folder; `None` if it has not been run.
    ///
    /// # Errors
    /// [`Error::Damaged`] where it is not what was written. Outcomes of older versions have nothing that would tell.
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

    /// The outcome that was written as `value`.
    ///
    /// # Errors
    /// What was found and what was expected, where it is not what was written.
    fn from_value(value: Value) -> Result<Self, String> {
        let sealed = seal::check(&value)?;
        let outcome: Self = serde_json::from_value(value).map_err(|e| format!("can't be understood: {e}"))?;
        if !sealed && !outcome.files.is_empty() {
            return Err("it has no seal, but hashes, which are not without one".into());
        }
        Ok(outcome)
    }

    /// The outcome that was written to results as `value`, which a key and a seal of its own make sure of.
    ///
    /// # Errors
    /// What was found and what was expected, where it is not what was written, or its key is not that of its settings, its
    /// parent's key and its data.
    pub fn of_results(value: Value) -> Result<Self, String> {
        let outcome = Self::from_value(value)?;
        match key::fits(&outcome) {
            true => Ok(outcome),
            false => Err(format!("its key {} is not that of its settings and data", outcome.key)),
        }
    }

    /// How the stage's last evaluation was computed: as its training, and what does not train in `f32`.
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
        // As it will be read, so that the seal is one of what can be read.
        let text = serde_json::to_string(self).map_err(fail)?;
        self.seal = Some(seal::of(&serde_json::from_str(&text).map_err(fail)?));
        let text = serde_json::to_string_pretty(self).map_err(fail)?;
        whole_file::write(&path, text).map_err(|e| Error::file(&path, e))
    }

    /// The SHA-256 of the network's file; none for stages of older versions.
    pub fn network_hash(&self) -> Option<&str> {
        self.files.get(NETWORK).map(String::as_str)
    }

    /// Checks that the files in the stage's folder are those that the stage wrote.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first that is not.
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
