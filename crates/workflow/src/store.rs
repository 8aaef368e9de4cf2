use crate::outcome::{NETWORK, OUTCOME, RANGES};
use crate::ranges::Ranges;
use crate::{DataOrigin, Error, Outcome, Provenance, Published, Result, Stage, StageKind, key};
use baselines::Calibration;
use candle_core::Device;
use datasets::Dataset;
use models::{Extras, Network};
use ranks::Ranks;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use train::{EpochMetrics, Evaluation, METRICS, Progress, TimeLimit, TrainingRun, calibrate, evaluate, fit};
use whole_file::seal;

/// A folder of finished and unfinished stages, with one folder per stage.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limit: Option<Arc<TimeLimit>>,
    strict: bool,
    published: Arc<Published>,
}

/// The source from which a stage's outcome is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The store itself.
    Store,
    /// A published outcome with its network.
    Published,
    /// A published outcome without its network.
    Record,
}

/// The resources that a stage runs on.
pub struct Resources<'a> {
    /// The training and test images.
    pub data: &'a dyn Dataset,
    /// The device of the tensors.
    pub device: &'a Device,
    /// The provenance that is recorded with every outcome.
    pub provenance: &'a Provenance,
    /// The initial network of workflows that do not pre-train.
    pub given: Option<&'a Network>,
    /// The ranks that train together, or `None` if this process trains alone. This process is
    /// rank 0, and the other ranks are in [`train::follow`]. Only rank 0 uses the store and does
    /// everything other than training.
    pub ranks: Option<&'a dyn Ranks>,
    /// Whether training steps on a GPU are launches of a CUDA graph, which give the same bits.
    pub graphs: bool,
}

/// An event during the work of a store.
#[derive(Debug)]
pub enum Event<'a> {
    /// The stage had already been run. Its outcome comes from the store or from what is published.
    Found(&'a Outcome),
    /// Another process is running the stage, and this one waits for it to end.
    Waiting(&'a Stage),
    /// The file system has no locks, so two processes may run a stage at the same time.
    NoLocks(&'a std::io::Error),
    /// The stage's files are damaged, for the given reason, and have been moved to the given
    /// folder. The stage is run again.
    SetAside(&'a Stage, &'a Error, &'a Path),
    /// The stage starts or resumes.
    Started(&'a Stage),
    /// The training of the stage makes progress.
    Progress(&'a Stage, Progress),
    /// The stage is done.
    Finished(&'a Outcome),
}

/// A stage in a plan.
#[derive(Debug)]
pub struct Planned {
    /// The stage.
    pub stage: Arc<Stage>,
    /// The key of the stage.
    pub key: String,
    /// The outcome of the stage, if it has been run and is not damaged.
    pub outcome: Option<Outcome>,
    /// Whether the outcome is a published one and not in the store.
    pub published: bool,
    /// Whether the stage must be run. It must if it has no outcome, or if its network is needed but
    /// neither stored nor published: as an end of the plan or as the input of a stage that must be
    /// run.
    pub to_do: bool,
    /// The epochs in the stage's `metrics.csv`, which have been trained and evaluated.
    pub epochs: Vec<EpochMetrics>,
}

impl Store {
    /// Opens the store in folder `root`, which is created when the first stage runs.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), limit: None, strict: false, published: Arc::default() }
    }

    /// Sets a time limit: nothing that would end after it is started.
    ///
    /// When the limit is reached, [`Store::run`] returns an error for which
    /// [`Error::is_time_limit`] holds, and another call resumes the work.
    pub fn within(self, limit: TimeLimit) -> Self {
        Self { limit: Some(Arc::new(limit)), ..self }
    }

    /// Makes damaged files an error. Otherwise they are set aside and the stage is run again.
    pub fn strict(self) -> Self {
        Self { strict: true, ..self }
    }

    /// Adds published stages, which count as done if the store lacks them.
    ///
    /// Stages in the store take precedence. A published stage is ignored if it was made from
    /// another network than its parent has here.
    pub fn beside(self, published: Published) -> Self {
        Self { published: published.into(), ..self }
    }

    /// Returns the folder of a stage.
    ///
    /// # Errors
    /// If a setting is not finite.
    pub fn folder(&self, stage: &Stage, data_fingerprint: &str) -> Result<PathBuf> {
        let kind = match stage.kind {
            StageKind::Given { .. } => "given",
            StageKind::Pretrain { .. } => "pretrain",
            StageKind::Prune { .. } => "prune",
            StageKind::FineTune { .. } => "finetune",
            StageKind::Equalize { .. } => "dfq",
        };
        Ok(self.root.join(format!("{}-{kind}-{}", stage.model(), stage.key(data_fingerprint)?)))
    }

    /// Returns what is published beside the store.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// Returns the file of a stage's network: the one in the store, or the published one if the
    /// stage counts as done by it.
    ///
    /// # Errors
    /// Those of [`Store::outcome`].
    pub fn network_file(&self, stage: &Stage, data_fingerprint: &str) -> Result<PathBuf> {
        if let Some((outcome, Source::Published)) = self.known(stage, data_fingerprint)?
            && let Some(file) = self.published.file(&outcome.key)
        {
            return Ok(file.into());
        }
        Ok(self.folder(stage, data_fingerprint)?.join(NETWORK))
    }

    /// Returns the outcome of a stage that has been run here, or elsewhere and published.
    ///
    /// # Errors
    /// If the outcome is damaged, belongs to another stage, or was made from another network than
    /// the parent stage has now.
    pub fn outcome(&self, stage: &Stage, data_fingerprint: &str) -> Result<Option<Outcome>> {
        Ok(self.known(stage, data_fingerprint)?.map(|(outcome, _)| outcome))
    }

    /// Returns the outcome of a stage and its source.
    fn known(&self, stage: &Stage, data_fingerprint: &str) -> Result<Option<(Outcome, Source)>> {
        if let Some(outcome) = self.stored(stage, data_fingerprint)? {
            return Ok(Some((outcome, Source::Store)));
        }
        let key = stage.key(data_fingerprint)?;
        let Some(outcome) = self.published.outcome(&key) else { return Ok(None) };
        if let Some(parent) = &stage.parent {
            // The published outcome is valid only for the network that it was made from.
            let parent = self.known(parent, data_fingerprint)?;
            let now = parent.as_ref().and_then(|(outcome, _)| outcome.network_hash());
            if now.is_none() || now != outcome.parent_network.as_deref() {
                return Ok(None);
            }
        }
        let source = if self.published.has_network(&key)? { Source::Published } else { Source::Record };
        Ok(Some((outcome.clone(), source)))
    }

    /// Returns the outcome of a stage that has been run in this store.
    fn stored(&self, stage: &Stage, data_fingerprint: &str) -> Result<Option<Outcome>> {
        let folder = self.folder(stage, data_fingerprint)?;
        let Some(outcome) = Outcome::read(&folder)? else { return Ok(None) };
        let damaged = |problem: String| {
            let path = folder.join(OUTCOME).display().to_string();
            Err(Error::Damaged { path, problem })
        };
        let key = stage.key(data_fingerprint)?;
        if outcome.key != key {
            return damaged(format!("is of stage {}, expected {key}", outcome.key));
        }
        if let (Some(parent), Some(then)) = (&stage.parent, &outcome.parent_network) {
            // A damaged parent is reported when its network is needed.
            let parent = Outcome::read(&self.folder(parent, data_fingerprint)?).ok().flatten();
            if let Some(now) = parent.as_ref().and_then(Outcome::network_hash).filter(|now| now != then) {
                return damaged(format!("was made from a network of SHA-256 {then}, and that is {now} now"));
            }
        }
        // Older outcomes lack this field. In newer ones the seal covers it, so it is not changed.
        let step = if outcome.step.is_empty() { stage.step() } else { outcome.step };
        Ok(Some(Outcome { step, ..outcome }))
    }

    /// Returns [`Store::known`], but treats a stage that is damaged in the store as missing, unless
    /// the store is strict.
    fn intact(&self, stage: &Stage, data_fingerprint: &str) -> Result<Option<(Outcome, Source)>> {
        match self.known(stage, data_fingerprint) {
            Err(error) if error.is_damage() && !self.strict => Ok(None),
            result => result,
        }
    }

    /// Reads the network of a finished stage.
    pub fn network(&self, stage: &Stage, data_fingerprint: &str, device: &Device) -> Result<Network> {
        let path = self.folder(stage, data_fingerprint)?.join(NETWORK);
        let known = self.known(stage, data_fingerprint)?;
        if let Some((outcome, Source::Published)) = &known
            && let Some(network) = self.published.network(&outcome.key, device)?
        {
            return Ok(network);
        }
        Ok(match known.as_ref().and_then(|(outcome, _)| outcome.network_hash()) {
            Some(hash) => Network::load_verified(&path, hash, device)?,
            None => Network::load(&path, device)?,
        }
        .0)
    }

    /// Returns the outcome of `stage` and its network on `device`. Runs the stage if needed, and
    /// again if its network is damaged.
    pub fn produce(
        &self,
        stage: &Stage,
        device: &Device,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<(Outcome, Network)> {
        let fingerprint = resources.data.fingerprint();
        let folder = self.folder(stage, fingerprint)?;
        if let Some((outcome, Source::Store | Source::Published)) = self.intact(stage, fingerprint)? {
            match self.network(stage, fingerprint, device) {
                Ok(network) => return Ok((outcome, network)),
                Err(error) if error.is_damage() && !self.strict => {
                    let lock = self.lock(stage, &folder, observe)?;
                    // Another process may have repaired the stage during the wait.
                    if self.network(stage, fingerprint, &Device::Cpu).is_err_and(|e| e.is_damage()) {
                        set_aside(stage, &folder, &FINISHED, &error, observe)?;
                    }
                    drop(lock);
                }
                Err(error) => return Err(error),
            }
        }
        let outcome = self.run(stage, resources, observe)?;
        Ok((outcome, self.network(stage, fingerprint, device)?))
    }

    /// Returns the stages that `ends` need, each once, parents before children.
    pub fn plan(&self, ends: &[Arc<Stage>], data_fingerprint: &str) -> Result<Vec<Planned>> {
        let mut plan: Vec<Planned> = Vec::new();
        let mut records = Vec::new();
        for stage in ends.iter().flat_map(Stage::lineage) {
            let key = stage.key(data_fingerprint)?;
            if plan.iter().any(|p| p.key == key) {
                continue;
            }
            let known = self.intact(&stage, data_fingerprint)?;
            let epochs = EpochMetrics::read(&self.folder(&stage, data_fingerprint)?.join(METRICS));
            let (outcome, source) = known.unzip();
            let published = source.is_some_and(|source| source != Source::Store);
            // Whether a stage without its network must be run depends on the stages after it, so
            // the loop below decides.
            let to_do = source.is_none();
            let is_record = source == Some(Source::Record);
            records.push(is_record);
            plan.push(Planned { stage, key, outcome, published, to_do, epochs });
        }
        let mut needed =
            ends.iter().map(|end| end.key(data_fingerprint)).collect::<Result<BTreeSet<String>>>()?;
        // Visits children before their parents.
        for (planned, is_record) in plan.iter_mut().zip(records).rev() {
            planned.to_do |= is_record && needed.contains(&planned.key);
            if let (true, Some(parent)) = (planned.to_do, &planned.stage.parent) {
                needed.insert(parent.key(data_fingerprint)?);
            }
        }
        Ok(plan)
    }

    /// Returns the outcome of `stage`. It comes from the store if the stage has been run, or from
    /// what is published if that includes the network. Otherwise this runs the stage and the stages
    /// that it needs.
    pub fn run(
        &self,
        stage: &Stage,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        match self.intact(stage, resources.data.fingerprint())? {
            Some((outcome, Source::Published)) => {
                observe(Event::Found(&outcome));
                Ok(outcome)
            }
            _ => self.run_here(stage, resources, observe),
        }
    }

    /// Runs the stage as [`Store::run`] does, unless the store itself has it: a published network
    /// does not count.
    pub fn run_here(
        &self,
        stage: &Stage,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let fingerprint = resources.data.fingerprint();
        let folder = self.folder(stage, fingerprint)?;
        if let Some((outcome, Source::Store)) = self.intact(stage, fingerprint)? {
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
        let lock = self.lock(stage, &folder, observe).map_err(named)?;
        whole_file::sweep(&folder).map_err(|e| named(Error::file(&folder, e)))?;
        match self.stored(stage, fingerprint) {
            // Another process has run the stage during the wait.
            Ok(Some(outcome)) => {
                observe(Event::Found(&outcome));
                return Ok(outcome);
            }
            Err(error) if error.is_damage() && !self.strict => {
                set_aside(stage, &folder, &FINISHED, &error, observe).map_err(named)?;
            }
            result => drop(result.map_err(named)?),
        }
        if self.limit.as_ref().is_some_and(|limit| !limit.allows_an_epoch()) {
            return Err(named(Error::TimeLimit));
        }
        observe(Event::Started(stage));
        let outcome = match self.execute(stage, &folder, resources, observe) {
            // Only the checkpoint can be damaged here: damaged parents have been set aside by
            // `produce`, and other errors of the parents are wrapped.
            Err(error) if error.is_damage() && !self.strict => {
                set_aside(stage, &folder, &["checkpoint.", "metrics."], &error, observe).map_err(named)?;
                self.execute(stage, &folder, resources, observe)
            }
            result => result,
        };
        let outcome = outcome.map_err(named)?;
        observe(Event::Finished(&outcome));
        drop(lock);
        Ok(outcome)
    }

    /// Locks a stage's folder; waits if another process holds the lock.
    fn lock(&self, stage: &Stage, folder: &Path, observe: &mut dyn FnMut(Event)) -> Result<Lock> {
        let lock = Lock::try_take(folder)?;
        match &lock {
            Lock::Held(_) => {}
            Lock::Taken(file) => {
                observe(Event::Waiting(stage));
                file.lock().map_err(|e| Error::file(folder, format!("could not be locked: {e}")))?;
            }
            Lock::Impossible(error) => observe(Event::NoLocks(error)),
        }
        Ok(lock)
    }

    fn execute(
        &self,
        stage: &Stage,
        folder: &Path,
        resources: &Resources,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let Resources { data, device, provenance, given, ranks, graphs } = *resources;
        let started = Instant::now();
        let key = stage.key(data.fingerprint())?;
        let mut parent_network = None;
        let mut input = |device: &Device, observe: &mut dyn FnMut(Event)| -> Result<Network> {
            let parent = stage.parent.as_ref().ok_or_else(|| {
                Error::file(folder, format!("stage {} has no parent to take a network from", stage.label()))
            })?;
            let (outcome, network) =
                self.produce(parent, device, resources, observe).map_err(|source| Error::Stage {
                    label: parent.label(),
                    folder: self.root.display().to_string(),
                    source: Box::new(source),
                })?;
            parent_network = outcome.network_hash().map(String::from);
            Ok(network)
        };
        let train = |network, parent_network, training, seed, observe: &mut dyn FnMut(Event)| {
            let limit = self.limit.as_deref();
            let identity = &key;
            let run =
                TrainingRun { data, training, seed, folder, identity, parent_network, limit, ranks, graphs };
            fit(network, &run, &mut |p| observe(Event::Progress(stage, p)))
        };
        let mut ranges = Ranges::default();
        let mut low_variance_percent = Vec::new();
        let (network, metrics, report) = match &stage.kind {
            StageKind::Given { hash } => {
                let expected = format!("{hash:032x}");
                let given =
                    given.filter(|given| given.sha256().is_ok_and(|found| found.starts_with(&expected)));
                let given =
                    given.ok_or_else(|| Error::file(folder, format!("no network {expected}… was given")))?;
                (given.to_device(device)?, Vec::new(), None)
            }
            StageKind::Pretrain { network, training, seed } => {
                let trained = train(network.init(*seed, device)?, None, training, *seed, observe)?;
                low_variance_percent = trained.low_variance_percent;
                (trained.network, trained.metrics, None)
            }
            StageKind::FineTune { quantization, training, seed } => {
                let mut network = input(device, observe)?;
                network.quantize(quantization)?;
                ranges.add("start", &network)?;
                let trained = train(network, parent_network.as_deref(), training, *seed, observe)?;
                low_variance_percent = trained.low_variance_percent;
                (trained.network, trained.metrics, None)
            }
            // Pruning and equalization consist of many small operations on weights, each of which
            // depends on the last, so they always run on the CPU.
            StageKind::Prune { pfq } => {
                let (network, report) = pfq.apply(&input(&Device::Cpu, observe)?)?;
                (network.to_device(device)?, Vec::new(), Some(serde_json::to_value(report)))
            }
            StageKind::Equalize { dfq, quantization } => {
                let (network, report) =
                    dfq.apply(&input(&Device::Cpu, observe)?, quantization, image_range(data))?;
                let mut network = network.to_device(device)?;
                ranges.add("start", &network)?;
                if let Some(Calibration { batches, batch, momentum }) = dfq.calibration {
                    calibrate(&mut network, data, (batches, batch), momentum)?;
                }
                (network, Vec::new(), Some(serde_json::to_value(report)))
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
        let mut files = network.save(&folder.join(NETWORK), &Extras::default())?;
        ranges.add("end", &network)?;
        if let Some(hash) = ranges.write(&folder.join(RANGES))? {
            files.insert(RANGES.into(), hash);
        }
        if !metrics.is_empty() {
            let path = folder.join(METRICS);
            let hash = seal::sha256_of_file(&path).map_err(|e| Error::file(&path, e))?;
            files.insert(METRICS.into(), hash);
        }
        let mut outcome = Outcome {
            key,
            label: stage.label(),
            step: stage.step(),
            stage: key::settings(&stage.kind)?,
            parent: stage.parent.as_ref().map(|p| p.key(data.fingerprint())).transpose()?,
            data: DataOrigin {
                name: data.name().into(),
                source: data.source().into(),
                fingerprint: data.fingerprint().into(),
                left_out: data.skipped().into_iter().map(|skipped| skipped.file).collect(),
            },
            evaluation,
            macs: network.macs(),
            weights: network.weights(),
            seconds,
            metrics,
            low_variance_percent,
            layers: match report {
                Some(_) => {
                    network.layers().into_iter().map(|layer| (layer.name, layer.kind.into())).collect()
                }
                None => BTreeMap::new(),
            },
            report: report.transpose().map_err(|e| Error::file(folder, e))?,
            provenance: provenance.clone(),
            files,
            parent_network,
            seal: None,
        };
        // The outcome is written last, because it marks the stage as done.
        outcome.write(folder)?;
        // The checkpoint is not needed any more; it is twice as large as the final network.
        Network::remove(&checkpoint_file(folder))?;
        Ok(outcome)
    }
}

pub(crate) fn checkpoint_file(folder: &Path) -> PathBuf {
    folder.join(train::CHECKPOINT)
}

/// Moves those of a stage's files whose names begin with one of `prefixes` into a new folder inside
/// the stage's folder.
fn set_aside(
    stage: &Stage,
    folder: &Path,
    prefixes: &[&str],
    why: &Error,
    observe: &mut dyn FnMut(Event),
) -> Result<()> {
    let fail =
        |e: std::io::Error| Error::file(folder, format!("what is damaged could not be set aside: {e}"));
    let mut places = (1..).map(|number| folder.join(format!("{DAMAGED}{number}")));
    let place = places.find(|place| !place.exists()).expect("there are more numbers than folders");
    std::fs::create_dir(&place).map_err(fail)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        names.push(entry.map_err(fail)?.file_name());
    }
    // The outcome marks the stage as done, so it is moved first.
    names.sort_by_key(|name| name != OUTCOME);
    let begins = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    for name in names.into_iter().filter(|name| begins(&name.to_string_lossy())) {
        std::fs::rename(folder.join(&name), place.join(&name)).map_err(fail)?;
    }
    observe(Event::SetAside(stage, why, &place));
    Ok(())
}

/// The prefixes of the names of a finished stage's files.
const FINISHED: [&str; 4] = ["outcome.", "network.", "metrics.", "ranges."];

/// The prefix of the names of folders with damaged files.
const DAMAGED: &str = "damaged-";

/// Returns the lowest and the highest value of a normalized image: those of black and white in the
/// channel with the most extreme values.
pub fn image_range(data: &dyn Dataset) -> (f32, f32) {
    let ends =
        |pixel: f32| data.mean().into_iter().zip(data.std()).map(move |(mean, std)| (pixel - mean) / std);
    (ends(0.0).fold(0.0, f32::min), ends(1.0).fold(0.0, f32::max))
}

/// A lock on a stage's folder against other processes. The system releases it when the file is
/// closed, and so also when the process is killed.
enum Lock {
    /// This process holds the lock. The file is only kept open.
    Held(#[allow(dead_code)] File),
    /// Another process holds the lock.
    Taken(File),
    /// The file system has no locks.
    Impossible(std::io::Error),
}

impl Lock {
    /// Takes the lock if no other process holds it.
    fn try_take(folder: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| Error::file(folder, format!("could not be locked: {e}"));
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

/// Returns whether an error means that the file system has no locks, as on some clusters.
fn no_locks(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK)
}

/// Removes the checkpoint and temporary files that a process left when it was killed after the
/// stage's end. Errors are ignored, because the files do no harm.
fn tidy(folder: &Path) {
    let is_left = |name: &str| name.starts_with("checkpoint.") || name.starts_with(".unfinished-");
    let left = std::fs::read_dir(folder).is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| is_left(&entry.file_name().to_string_lossy())))
    });
    if left && matches!(Lock::try_take(folder), Ok(Lock::Held(_))) {
        Network::remove(&checkpoint_file(folder)).ok();
        whole_file::sweep(folder).ok();
    }
}
