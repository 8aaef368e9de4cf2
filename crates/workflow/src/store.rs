use crate::{Error, Result, Stage, StageKind, key};
use candle_core::{DType, Device};
use datasets::Dataset;
use models::{Extras, Network};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use train::{EpochMetrics, Evaluation, Progress, TimeLimit, TrainingRun, evaluate, fit};

/// A folder of finished and unfinished stages, one folder each.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limit: Option<Arc<TimeLimit>>,
}

/// What a stage runs on.
pub struct Resources<'a> {
    /// Training and test images.
    pub data: &'a dyn Dataset,
    /// Where tensors live.
    pub device: &'a Device,
    /// In which feature maps are kept while a stage trains: `F32`, on a GPU also `BF16`.
    pub dtype: DType,
    /// Recorded with every outcome.
    pub provenance: &'a Provenance,
}

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
    /// [`Stage::label`].
    pub label: String,
    /// [`Stage::step`].
    #[serde(default)]
    pub step: String,
    /// What it does, with its settings as they entered the key.
    pub stage: serde_json::Value,
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
    /// What a stage without training reports about its work.
    pub report: Option<serde_json::Value>,
    /// What each layer of its report is: `full`, `depthwise` or `pointwise`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, String>,
    /// Who made it.
    pub provenance: Provenance,
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
}

/// What the store tells while it works.
#[derive(Debug)]
pub enum Event<'a> {
    /// The stage had been run; its outcome is taken from the store.
    Found(&'a Outcome),
    /// Another process runs the stage; its end is waited for.
    Waiting(&'a Stage),
    /// The file system has no locks: nothing keeps two processes from running a stage at once.
    NoLocks(&'a std::io::Error),
    /// The stage begins (or goes on).
    Started(&'a Stage),
    /// The stage trains.
    Progress(&'a Stage, Progress),
    /// The stage is done.
    Finished(&'a Outcome),
}

/// A stage in a plan.
#[derive(Debug)]
pub struct Planned {
    /// The stage.
    pub stage: Arc<Stage>,
    /// Its key.
    pub key: String,
    /// What it gave, if it has been run.
    pub outcome: Option<Outcome>,
    /// Epochs of an unfinished run that its checkpoint holds.
    pub epochs_done: usize,
}

impl Store {
    /// The store in folder `root`, which is made when the first stage runs.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), limit: None }
    }

    /// The same store, in which nothing is begun that would end after the limit: [`Store::run`] is then an error for
    /// which [`Error::is_time_limit`] holds, and goes on another time.
    pub fn within(self, limit: TimeLimit) -> Self {
        Self { limit: Some(Arc::new(limit)), ..self }
    }

    /// The folder of a stage.
    ///
    /// # Errors
    /// When a setting is not finite.
    pub fn folder(&self, stage: &Stage, data_fingerprint: &str) -> Result<PathBuf> {
        let kind = match stage.kind {
            StageKind::Pretrain { .. } => "pretrain",
            StageKind::Prune { .. } => "prune",
            StageKind::FineTune { .. } => "finetune",
            StageKind::Equalize { .. } => "dfq",
        };
        Ok(self.root.join(format!("{}-{kind}-{}", stage.model(), stage.key(data_fingerprint)?)))
    }

    /// What the stage gave, if it has been run.
    pub fn outcome(&self, stage: &Stage, data_fingerprint: &str) -> Result<Option<Outcome>> {
        let path = self.folder(stage, data_fingerprint)?.join("outcome.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let outcome: Outcome = serde_json::from_str(&text).map_err(|e| {
                    file_error(
                        &path,
                        format!("can't be understood ({e}); delete its folder to run the stage again"),
                    )
                })?;
                // Outcomes that were written before it was a field lack it.
                Ok(Some(Outcome { step: stage.step(), ..outcome }))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(file_error(&path, e)),
        }
    }

    /// The network that a finished stage gave.
    pub fn network(&self, stage: &Stage, data_fingerprint: &str, device: &Device) -> Result<Network> {
        let path = network_file(&self.folder(stage, data_fingerprint)?);
        Ok(Network::load(&path, device)?.0)
    }

    /// The stages that `ends` need, each once, parents before children.
    pub fn plan(&self, ends: &[Arc<Stage>], data_fingerprint: &str) -> Result<Vec<Planned>> {
        let mut plan: Vec<Planned> = Vec::new();
        for stage in ends.iter().flat_map(Stage::lineage) {
            let key = stage.key(data_fingerprint)?;
            if plan.iter().any(|p| p.key == key) {
                continue;
            }
            let outcome = self.outcome(&stage, data_fingerprint)?;
            // The metrics file has a heading and a line for every epoch.
            let metrics = self.folder(&stage, data_fingerprint)?.join("metrics.csv");
            let epochs_done =
                std::fs::read_to_string(metrics).map_or(0, |text| text.lines().count().saturating_sub(1));
            plan.push(Planned { stage, key, outcome, epochs_done });
        }
        Ok(plan)
    }

    /// The outcome of `stage`: from the store if it has been run, else by running it and whatever it
    /// needs before it.
    pub fn run(
        &self,
        stage: &Stage,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let fingerprint = resources.data.fingerprint();
        let folder = self.folder(stage, fingerprint)?;
        if let Some(outcome) = self.outcome(stage, fingerprint)? {
            tidy(&folder);
            observe(Event::Found(&outcome));
            return Ok(outcome);
        }
        if let Some(parent) = &stage.parent {
            self.run(parent, resources, observe)?;
        }
        let named = |source: Error| Error::Stage {
            label: stage.label(),
            folder: folder.display().to_string(),
            source: Box::new(source),
        };
        let lock = Lock::try_take(&folder).map_err(named)?;
        match &lock {
            Lock::Held(_) => {}
            Lock::Taken(file) => {
                observe(Event::Waiting(stage));
                file.lock().map_err(|e| named(file_error(&folder, format!("could not be locked: {e}"))))?;
            }
            Lock::Impossible(error) => observe(Event::NoLocks(error)),
        }
        // Whoever has the lock is alone here; without locks another process may be writing now.
        let age = if let Lock::Impossible(_) = lock { Duration::from_secs(3600) } else { Duration::ZERO };
        whole_file::sweep(&folder, age).map_err(|e| named(file_error(&folder, e)))?;
        let outcome = match self.outcome(stage, fingerprint)? {
            // Another process has run it while this one waited.
            Some(outcome) => {
                observe(Event::Found(&outcome));
                outcome
            }
            None => {
                if self.limit.as_ref().is_some_and(|limit| !limit.allows_an_epoch()) {
                    return Err(named(Error::TimeLimit));
                }
                observe(Event::Started(stage));
                let outcome = self.execute(stage, &folder, resources, observe).map_err(named)?;
                observe(Event::Finished(&outcome));
                outcome
            }
        };
        drop(lock);
        Ok(outcome)
    }

    fn execute(
        &self,
        stage: &Stage,
        folder: &Path,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let Resources { data, device, dtype, provenance } = *resources;
        let started = Instant::now();
        let key = stage.key(data.fingerprint())?;
        let input = |device: &Device| -> Result<Network> {
            let parent = stage.parent.as_ref().ok_or_else(|| {
                file_error(folder, format!("stage {} has no parent to take a network from", stage.label()))
            })?;
            self.network(parent, data.fingerprint(), device)
        };
        let mut train = |network, training: &train::Training, seed| {
            let limit = self.limit.as_deref();
            let run = TrainingRun { data, training, seed, folder, identity: &key, dtype, limit };
            fit(network, &run, &mut |p| observe(Event::Progress(stage, p)))
        };
        let (network, metrics, report) = match &stage.kind {
            StageKind::Pretrain { network, training, seed } => {
                let trained = train(network.init(*seed, device)?, training, *seed)?;
                (trained.network, trained.metrics, None)
            }
            StageKind::FineTune { quantization, training, seed } => {
                let mut network = input(device)?;
                network.quantize(quantization)?;
                let trained = train(network, training, *seed)?;
                (trained.network, trained.metrics, None)
            }
            // Many small results of weights alone, each of which decides on the next: on a CPU wherever images are.
            StageKind::Prune { pfq } => {
                let (network, report) = pfq.apply(&input(&Device::Cpu)?)?;
                (network.to_device(device)?, Vec::new(), Some(serde_json::to_value(report)))
            }
            StageKind::Equalize { dfq, quantization } => {
                let (network, report) = dfq.apply(&input(&Device::Cpu)?, quantization, image_range(data))?;
                (network.to_device(device)?, Vec::new(), Some(serde_json::to_value(report)))
            }
        };
        network.check_values()?;
        let (evaluation, seconds) = match metrics.last() {
            Some(last) => {
                let evaluation = Evaluation { loss: last.test_loss, top1_percent: last.test_top1_percent };
                (evaluation, metrics.iter().map(|m| m.seconds).sum())
            }
            None => (evaluate(&network, data)?, started.elapsed().as_secs_f64()),
        };
        let outcome = Outcome {
            key,
            label: stage.label(),
            step: stage.step(),
            stage: key::settings(&stage.kind)?,
            parent: stage.parent.as_ref().map(|p| p.key(data.fingerprint())).transpose()?,
            data: DataOrigin {
                name: data.name().into(),
                source: data.source().into(),
                fingerprint: data.fingerprint().into(),
            },
            evaluation,
            macs: network.macs(),
            weights: network.weights(),
            seconds,
            metrics,
            layers: match report {
                Some(_) => {
                    network.layers().into_iter().map(|layer| (layer.name, layer.kind.into())).collect()
                }
                None => BTreeMap::new(),
            },
            report: report.transpose().map_err(|e| file_error(folder, e))?,
            provenance: provenance.clone(),
        };
        network.save(&network_file(folder), &Extras::default())?;
        // The outcome is written last: it is what says that the stage is done.
        let text = serde_json::to_string_pretty(&outcome).map_err(|e| file_error(folder, e))?;
        let path = folder.join("outcome.json");
        whole_file::write(&path, text).map_err(|e| file_error(&path, e))?;
        // The final network replaces the checkpoint, which is twice its size.
        Network::remove(&checkpoint_file(folder))?;
        Ok(outcome)
    }
}

fn checkpoint_file(folder: &Path) -> PathBuf {
    folder.join("checkpoint.safetensors")
}

fn network_file(folder: &Path) -> PathBuf {
    folder.join("network.safetensors")
}

/// Lowest and highest value of a normalized image: black and white in the channel where they lie
/// farthest out.
fn image_range(data: &dyn Dataset) -> (f32, f32) {
    let ends =
        |pixel: f32| data.mean().into_iter().zip(data.std()).map(move |(mean, std)| (pixel - mean) / std);
    (ends(0.0).fold(0.0, f32::min), ends(1.0).fold(0.0, f32::max))
}

/// The lock of a stage's folder against other processes, which goes with the file, also when the process is killed.
enum Lock {
    /// This process has it. What the file is of is nobody's business but the system's.
    Held(#[allow(dead_code)] File),
    /// Another process has it.
    Taken(File),
    /// The file system has no locks.
    Impossible(std::io::Error),
}

impl Lock {
    /// Takes the lock if nobody has it.
    fn try_take(folder: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| file_error(folder, format!("could not be locked: {e}"));
        std::fs::create_dir_all(folder).map_err(fail)?;
        let file = File::create(folder.join("lock")).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => Ok(Self::Held(file)),
            Err(TryLockError::WouldBlock) => Ok(Self::Taken(file)),
            Err(TryLockError::Error(e)) if no_locks(&e) => Ok(Self::Impossible(e)),
            Err(TryLockError::Error(e)) => Err(fail(e)),
        }
    }
}

/// Whether an error says that the file system has no locks, as that of some clusters.
fn no_locks(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK)
}

/// Removes what a process left that was killed after the stage's end: its checkpoint, and temporary files. That it can't
/// be removed is no reason to stop.
fn tidy(folder: &Path) {
    let is_left = |name: &str| name.starts_with("checkpoint.") || name.starts_with(".unfinished-");
    let left = std::fs::read_dir(folder).is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| is_left(&entry.file_name().to_string_lossy())))
    });
    if left && matches!(Lock::try_take(folder), Ok(Lock::Held(_))) {
        Network::remove(&checkpoint_file(folder)).ok();
        whole_file::sweep(folder, Duration::ZERO).ok();
    }
}

fn file_error(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::File { path: path.display().to_string(), problem: problem.to_string() }
}
