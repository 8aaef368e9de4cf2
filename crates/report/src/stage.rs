//! The contents of `stages.json`: a run's stages with metrics, pruning reports and provenance.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use whole_file::seal;

use crate::file::{Error, Result, write_text};
use crate::row::{Row, pruned_percent};

/// The result of a stage of a workflow.
///
/// Only the settings that a report needs are read, so that results of code versions with more or
/// other settings can be read too.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct StageRecord {
    /// The stage's key.
    pub key: String,
    /// The full name of the stage, as "mobilenet_v2 fine-tune A4/W4 seed 0".
    pub label: String,
    /// The step of the workflow, as "fine-tune A4/W4"; older results have it only in the label.
    pub step: Option<String>,
    /// The kind of each layer in the report, as "depthwise"; in older results only in layer names.
    #[serde(default)]
    pub layers: BTreeMap<String, String>,
    /// The key of the stage whose network it started from; `None` for pre-training.
    pub parent: Option<String>,
    /// The kind of the stage with its settings.
    pub stage: BTreeMap<String, Value>,
    /// The data.
    pub data: DataRecord,
    /// The evaluation of the resulting network on the test set.
    pub evaluation: Evaluation,
    /// The number of multiply-accumulates of the resulting network for one image.
    pub macs: u64,
    /// The number of weights of the resulting network.
    pub weights: u64,
    /// The wall time of this stage alone, in seconds.
    pub seconds: f64,
    /// The metrics of every epoch, for stages that train.
    pub metrics: Vec<Epoch>,
    /// The report of a stage without training about its work.
    pub report: Option<Value>,
    /// The provenance of the result.
    pub provenance: Provenance,
}

/// The data that a stage used.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct DataRecord {
    /// The name of the data set, as "cifar100".
    pub name: String,
    /// The origin of the data.
    pub source: String,
}

/// The evaluation of a network on the test set. A null is read as NaN.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The mean cross-entropy.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Top-1 accuracy in percent.
    #[serde(deserialize_with = "number")]
    pub top1_percent: f64,
}

/// The metrics of one epoch of training. A null is read as NaN.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Epoch {
    /// The number of the epoch, from 1.
    pub epoch: usize,
    /// The mean cross-entropy in training.
    #[serde(deserialize_with = "number")]
    pub train_loss: f64,
    /// Top-1 accuracy in training, in percent.
    #[serde(deserialize_with = "number")]
    pub train_top1_percent: f64,
    /// The mean cross-entropy on the test set.
    #[serde(deserialize_with = "number")]
    pub test_loss: f64,
    /// Top-1 accuracy on the test set, in percent.
    #[serde(deserialize_with = "number")]
    pub test_top1_percent: f64,
    /// The percentage of filters with a running variance below ε after the epoch; NaN if unknown.
    #[serde(skip, default = "unknown")]
    pub low_variance_percent: f64,
}

fn unknown() -> f64 {
    f64::NAN
}

/// The command, the code and the device that made a result.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Provenance {
    /// The command.
    pub command: String,
    /// The commit of the code.
    pub git_commit: String,
    /// The device.
    pub device: String,
}

/// The report of a pruning stage.
#[derive(Deserialize, Clone, Debug, PartialEq)]
pub struct PruningRecord {
    /// The threshold of the running variance below which filters were candidates.
    pub threshold: f64,
    /// The layers, each with its counts.
    pub layers: Vec<LayerRecord>,
}

/// The counts of one layer's filters at pruning.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct LayerRecord {
    /// The layer's name, as "blocks.3.depthwise".
    pub name: String,
    /// The number of filters before pruning.
    pub filters: usize,
    /// The number of filters with a running variance below the threshold.
    pub low: usize,
    /// The number of filters that were removed.
    pub removed: usize,
}

/// Reads a number. JSON has no NaN, so a metric that is NaN is written as null.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The contents of a folder's `stages.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stages {
    /// The stages.
    pub records: Vec<StageRecord>,
    /// The SHA-256 of each file that was made from the stages, by name; empty in results of older
    /// versions, which are a plain list of stages.
    pub files: BTreeMap<String, String>,
}

/// The name of the file with the stages in a folder of results.
pub const STAGES: &str = "stages.json";

/// Reads the `stages.json` of a folder, and checks that it has not changed since it was written.
pub fn read_stages(folder: &Path) -> Result<Stages> {
    let path = folder.join(STAGES);
    let damaged = |problem: String| Error::Damaged { path: path.clone(), problem };
    let json = |source| Error::Json { path: path.clone(), source };
    let text = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let mut value: Value = serde_json::from_slice(&text).map_err(json)?;
    let mut files = BTreeMap::new();
    if value.is_object() {
        if !seal::check(&value).map_err(damaged)? {
            return Err(damaged("it has no seal".into()));
        }
        files = serde_json::from_value(value["files"].take()).map_err(json)?;
        value = value["stages"].take();
    }
    for stage in value.as_array().into_iter().flatten() {
        seal::check(stage).map_err(|problem| damaged(format!("stage {}: {problem}", stage["key"])))?;
    }
    Ok(Stages { records: records(value).map_err(json)?, files })
}

/// Reads stages. A stage's list of low-variance percentages is distributed to its epochs.
fn records(value: Value) -> serde_json::Result<Vec<StageRecord>> {
    #[derive(Deserialize)]
    struct Low {
        #[serde(default)]
        low_variance_percent: Vec<Option<f64>>,
    }
    let low = Vec::<Low>::deserialize(&value)?;
    let mut records: Vec<StageRecord> = serde_json::from_value(value)?;
    for (record, Low { low_variance_percent }) in records.iter_mut().zip(low) {
        for (epoch, low) in record.metrics.iter_mut().zip(low_variance_percent) {
            epoch.low_variance_percent = low.unwrap_or(f64::NAN);
        }
    }
    Ok(records)
}

/// Writes `stages.json`: the stages, and the hashes of the files `names` in the folder, which were
/// made from them.
///
/// Write it last, because the other files are checked against it.
pub fn write_stages(stages: &impl Serialize, folder: &Path, names: &[String]) -> Result<()> {
    let path = folder.join(STAGES);
    let json = |source| Error::Json { path: path.clone(), source };
    let mut files = BTreeMap::new();
    for name in names {
        let file = folder.join(name);
        let hash = seal::sha256_of_file(&file).map_err(|source| Error::Io { path: file, source })?;
        files.insert(name.clone(), hash);
    }
    #[derive(Serialize)]
    struct Whole<'a, S: Serialize> {
        files: BTreeMap<String, String>,
        stages: &'a S,
        #[serde(skip_serializing_if = "Option::is_none")]
        seal: Option<String>,
    }
    let mut whole = Whole { files, stages, seal: None };
    let text = serde_json::to_string(&whole).map_err(json)?;
    whole.seal = Some(seal::of(&serde_json::from_str(&text).map_err(json)?));
    write_text(&serde_json::to_string_pretty(&whole).map_err(json)?, &path)
}

impl Stages {
    /// Checks that the files in the folder are those that the stages were written with.
    ///
    /// # Errors
    /// Names the first file that differs.
    pub fn check_files(&self, folder: &Path) -> Result<()> {
        for (name, expected) in &self.files {
            let path = folder.join(name);
            let found = match seal::sha256_of_file(&path) {
                Ok(found) if found == *expected => continue,
                Ok(found) => format!("has SHA-256 {found}"),
                Err(error) => error.to_string(),
            };
            let problem = format!("{found}, expected {expected} by {STAGES}");
            return Err(Error::Damaged { path, problem });
        }
        Ok(())
    }

    /// Checks that a table's rows agree with the stages.
    ///
    /// # Errors
    /// Says which value of a row differs, and which value was expected.
    pub fn check_rows(&self, rows: &[Row]) -> std::result::Result<(), String> {
        let by_key = by_key(&self.records);
        for row in rows {
            let named = format!(
                "row {} A{}/W{} {} seed {}",
                row.model, row.activation_bits, row.weight_bits, row.method, row.seed
            );
            let line = line(&by_key, &row.settings_hash).ok_or_else(|| {
                format!("{named}: stage {} or one before it is not in {STAGES}", row.settings_hash)
            })?;
            let (Some(first), Some(last)) = (line.first(), line.last()) else { continue };
            let pruned = pruned_percent(first.weights, last.weights);
            let seconds: f64 = line.iter().map(|stage| stage.seconds).sum();
            for (what, found, expected) in [
                ("top1_percent", row.top1_percent, last.evaluation.top1_percent),
                ("float_top1_percent", row.float_top1_percent, first.evaluation.top1_percent),
                ("weights_pruned_percent", row.weights_pruned_percent, pruned),
                ("wall_seconds", row.wall_seconds, seconds),
                ("macs", row.macs as f64, last.macs as f64),
                ("seed", row.seed as f64, last.seed().unwrap_or(row.seed) as f64),
                ("width", row.width, first.width().unwrap_or(row.width)),
            ] {
                if found != expected {
                    return Err(format!("{named}: {what} = {found}, and the stages say {expected}"));
                }
            }
            for (what, found, expected) in [
                ("model", &*row.model, first.model().unwrap_or(&row.model)),
                ("dataset", &*row.dataset, &*last.data.name),
                ("git_commit", &*row.git_commit, &*last.provenance.git_commit),
                ("device", &*row.device, &*last.provenance.device),
            ] {
                if found != expected {
                    return Err(format!("{named}: {what} = {found}, and the stages say {expected}"));
                }
            }
        }
        Ok(())
    }
}

fn by_key(stages: &[StageRecord]) -> BTreeMap<&str, &StageRecord> {
    stages.iter().map(|of| (of.key.as_str(), of)).collect()
}

/// Returns the stages from the first one to the one with this key; `None` if one is missing.
fn line<'a>(by_key: &BTreeMap<&str, &'a StageRecord>, key: &str) -> Option<Vec<&'a StageRecord>> {
    let mut line: Vec<&StageRecord> = Vec::new();
    let mut next = Some(key);
    while let Some(key) = next {
        // This ends the search in a damaged file whose parents form a cycle.
        let stage = by_key.get(key).copied().filter(|_| line.len() < by_key.len())?;
        line.push(stage);
        next = stage.parent.as_deref();
    }
    line.reverse();
    Some(line)
}

impl StageRecord {
    /// Returns the kind of the stage: "pretrain", "prune", "fine_tune" or another one.
    pub fn kind(&self) -> &str {
        self.stage.keys().next().map_or("", String::as_str)
    }

    fn setting(&self, name: &str) -> Option<&Value> {
        self.stage.values().next()?.get(name)
    }

    /// Returns the seed, for stages that have one.
    pub fn seed(&self) -> Option<u64> {
        self.setting("seed")?.as_u64()
    }

    /// Returns the network's name, for pre-training.
    pub fn model(&self) -> Option<&str> {
        self.setting("network")?.get("version")?.as_str()
    }

    /// Returns the factor that multiplies the network's widths, for pre-training.
    pub fn width(&self) -> Option<f64> {
        self.setting("network")?.get("width")?.as_f64()
    }

    /// Returns a remark on the rule of the learning rate if it is not the usual one.
    fn rule(&self) -> &'static str {
        let decay = self.setting("training").and_then(|training| training.get("decay"));
        if decay.and_then(Value::as_str) == Some("accuracy_drop") { " (accuracy drop)" } else { "" }
    }

    /// Returns whether the stage prunes by the variance and corrects the means of the layers that
    /// read the removed filters. Settings with these values are left out of a stage's record.
    pub fn prunes_as_published(&self) -> bool {
        let Some(pfq) = self.setting("pfq").filter(|_| self.kind() == "prune") else { return false };
        let correction = pfq.get("bias_correction").and_then(Value::as_bool) == Some(true);
        correction && pfq.get("criterion").is_none() && pfq.get("corrected").is_none()
    }

    /// Returns the pruning report, for stages that prune.
    pub fn pruning(&self) -> Option<PruningRecord> {
        serde_json::from_value(self.report.clone()?).ok()
    }

    /// Returns the step without network and seed, as "fine-tune A4/W4".
    fn step(&self, model: &str) -> &str {
        self.step.as_deref().unwrap_or_else(|| {
            let step = self.label.strip_prefix(model).unwrap_or(&self.label).trim_start();
            let seed = self.seed().map(|seed| format!(" seed {seed}")).unwrap_or_default();
            step.strip_suffix(&seed).unwrap_or(step)
        })
    }

    /// Returns whether a layer of the report is a depthwise convolution.
    pub fn is_depthwise(&self, layer: &LayerRecord) -> bool {
        self.layers.get(&layer.name).map_or(layer.name.ends_with("depthwise"), |kind| kind == "depthwise")
    }
}

/// A stage with the pre-training from which its workflow started.
#[derive(Clone, Debug, PartialEq)]
pub struct Traced<'a> {
    /// The stage.
    pub stage: &'a StageRecord,
    /// The pre-training, which can be the stage itself.
    pub origin: &'a StageRecord,
    /// The steps after the pre-training up to this stage, or the pre-training if it is the stage.
    pub steps: Vec<String>,
}

/// Returns every stage that can be traced back to its pre-training, in the given order.
pub fn trace(stages: &[StageRecord]) -> Vec<Traced<'_>> {
    let by_key = by_key(stages);
    let traced = |stage: &'_ StageRecord| {
        let line = line(&by_key, &stage.key)?;
        let (origin, after) = line.split_first()?;
        let (origin, model) = (*origin, origin.model()?);
        let steps = if after.is_empty() { &line[..] } else { after };
        Some(Traced {
            stage: line[line.len() - 1],
            origin,
            steps: steps.iter().map(|of| format!("{}{}", of.step(model), of.rule())).collect(),
        })
    };
    stages.iter().filter_map(traced).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// Returns a workflow of MobileNetV2: pre-training, and a pruning of one filter below τ in each
    /// of the given layers.
    pub(crate) fn pruned(seed: u64, top1: (f64, f64), low: &[&str]) -> Vec<StageRecord> {
        let layers: Vec<_> =
            low.iter().map(|name| json!({"name": name, "filters": 8, "low": 1, "removed": 1})).collect();
        let common = |key: String, label: String, top1: f64| {
            json!({
                "key": key, "label": label, "macs": 10, "weights": 100, "seconds": 60.0,
                "data": {"name": "cifar100", "source": "data", "fingerprint": "f"},
                "evaluation": {"loss": 1.0, "top1_percent": top1},
                "provenance": {"command": "cargo run", "git_commit": "c0de", "device": "cpu"},
            })
        };
        let join = |mut common: Value, own: Value| {
            let own = own.as_object().unwrap().clone();
            common.as_object_mut().unwrap().extend(own);
            serde_json::from_value::<StageRecord>(common).unwrap()
        };
        let epoch = |epoch: usize, loss: f64| {
            json!({"epoch": epoch, "rate": 0.1, "train_loss": loss, "train_top1_percent": 10.0 * epoch as f64,
                   "test_loss": null, "test_top1_percent": 12.0 * epoch as f64, "seconds": 3.0})
        };
        let pretrain = join(
            common(format!("a{seed}"), format!("mobilenet_v2 pre-train seed {seed}"), top1.0),
            json!({
                "stage": {"pretrain": {"network": {"version": "mobilenet_v2", "width": 0.25}, "seed": seed}},
                "parent": null, "report": null, "metrics": [epoch(1, 3.0), epoch(2, 2.0)],
            }),
        );
        let prune = join(
            common(format!("b{seed}"), "mobilenet_v2 PfQ".into(), top1.1),
            json!({
                "stage": {"prune": {"pfq": {"threshold": null, "bias_correction": true}}},
                "parent": format!("a{seed}"), "metrics": [],
                "report": {"threshold": 1e-5, "layers": layers, "new": 1},
            }),
        );
        vec![pretrain, prune]
    }

    #[test]
    fn shares_of_low_variance_filters_are_those_of_epochs() {
        let epoch = |epoch: usize| json!({"epoch": epoch, "train_loss": 1.0, "train_top1_percent": 1.0, "test_loss": 1.0, "test_top1_percent": 1.0});
        let stage = |low: Option<Value>| {
            let mut stage = json!({
                "key": "a", "label": "a", "macs": 1, "weights": 1, "seconds": 1.0, "parent": null, "report": null,
                "stage": {"pretrain": {}}, "data": {"name": "a", "source": "a"}, "metrics": [epoch(1), epoch(2)],
                "evaluation": {"loss": 1.0, "top1_percent": 1.0},
                "provenance": {"command": "a", "git_commit": "a", "device": "a"},
            });
            low.into_iter().for_each(|low| stage["low_variance_percent"] = low);
            stage
        };
        let records = records(json!([stage(None), stage(Some(json!([null, 12.5])))])).unwrap();
        let low = |record: &StageRecord| {
            record.metrics.iter().map(|of| of.low_variance_percent).collect::<Vec<_>>()
        };
        assert!(low(&records[0]).iter().all(|low| low.is_nan()));
        assert!(low(&records[1])[0].is_nan() && low(&records[1])[1] == 12.5);
    }

    #[test]
    fn stages_are_read_with_their_line() {
        let stages = pruned(3, (50.0, 49.9), &["stem", "blocks.0.depthwise"]);
        let traced = trace(&stages);
        assert_eq!(traced[0].steps, ["pre-train"]);
        assert_eq!(traced[1].steps, ["PfQ"]);
        assert_eq!((traced[1].origin.seed(), traced[1].origin.model()), (Some(3), Some("mobilenet_v2")));
        assert!(traced[1].stage.prunes_as_published() && !traced[0].stage.prunes_as_published());
        assert_eq!(traced[1].stage.pruning().unwrap().layers.len(), 2);
        assert!(traced[0].stage.metrics[0].test_loss.is_nan());
        // A stage without its pre-training is left out.
        assert!(trace(&stages[1..]).is_empty());
        let circle = StageRecord { parent: Some("b3".into()), ..stages[1].clone() };
        assert!(trace(&[circle]).is_empty());
    }
}
