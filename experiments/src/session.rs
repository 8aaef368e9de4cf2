//! The session of a program that runs stages: its settings, data, device and store.

use crate::flags::{Flags, PlanFormat, Running};
use crate::job::Job;
use crate::profile::{self, ModelName, Profile};
use crate::progress::Display;
use crate::published::Folder;
use crate::{command, device, output, process, results, signals, slurm};
use anyhow::{Context as _, Result, bail};
use candle_core::Device;
use datasets::{DataSource, Dataset, InMemoryDataset, imagenet};
use models::Network;
use ranks::Ranks;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use train::{Arithmetic, TimeLimit};
use workflow::{Outcome, Planned, Provenance, Resources, Stage, StageKind, Store};

/// The number of training images that replace the test set if a table chooses settings.
const HOLD_OUT: usize = 5000;

/// The training throughput that a plan assumes before any stage has been measured, in
/// multiply–accumulates of the forward pass per second. It was measured on two cores of a 2.6 GHz
/// server processor.
const ASSUMED_MACS_PER_SECOND: f64 = 1e10;

/// Whether all requested work is done.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// All of it is done.
    All,
    /// The time limit ended the work; the same command resumes it.
    InTime,
}

/// Runs a program's work where it runs fastest, in a session as the flags ask for.
///
/// If the time limit ended the work, the exit code says so. If the work `chooses` settings,
/// training images replace the test set. Of several processes that train together, the first one
/// does the work.
pub(crate) fn main(
    flags: &Flags,
    chooses: bool,
    work: impl FnOnce(&mut Session) -> Result<Done> + Send,
) -> Result<()> {
    signals::watch();
    let mut done = Done::All;
    process::run(|| {
        let job = Job::open()?;
        if job.ranks().is_some_and(|ranks| !ranks.is_first()) {
            output::silence();
        }
        let take_part = || {
            let mut session = Session::open(flags, chooses, &job)?;
            if session.follow()? { Ok(Done::All) } else { work(&mut session) }
        };
        let result = take_part();
        done = job.end(result)?;
        Ok(())
    })?;
    if done == Done::InTime {
        process::end_in_time()?;
    }
    Ok(())
}

/// The device that stages run on, and the store that keeps them.
pub(crate) struct Machine {
    device: Device,
    /// The arithmetic that replaces the profile's.
    arithmetic: Option<Arithmetic>,
    /// The device's name for the records, including that arithmetic.
    name: String,
    store: Store,
    /// Whether training steps on a GPU become CUDA graphs.
    graphs: bool,
    /// The processes that train together, if there are several.
    ranks: Option<Rc<dyn Ranks>>,
}

impl Machine {
    /// Opens the device and the store that the flags name. The time limit starts here.
    pub fn open(running: &Running) -> Result<Self> {
        let limit = running.time_limit.map(TimeLimit::after);
        let (device, name) = device::open(&running.device)?;
        let (arithmetic, name) = match running.arithmetic {
            Some(wanted) => wanted.set(&device, name).map(|(arithmetic, name)| (Some(arithmetic), name))?,
            None => (None, name),
        };
        let mut store = Store::new(&running.store);
        if running.strict {
            store = store.strict();
        }
        if let Some(limit) = limit {
            store = store.within(limit);
        }
        let graphs = device::allow_graphs(&device, running.cuda_graphs)?;
        Ok(Self { device, arithmetic, name, store, graphs, ranks: None })
    }
}

/// The settings, data, device and store that the flags ask for.
pub(crate) struct Session {
    /// All settings.
    pub profile: Profile,
    /// The seeds of the fine-tuning.
    pub seeds: Vec<u64>,
    /// The training and test images.
    pub data: Box<dyn Dataset>,
    /// The command, the commit and the device, for the records.
    pub provenance: Provenance,
    machine: Machine,
    /// The network that workflows without pre-training start from.
    given: Option<Network>,
    display: Display,
    out: PathBuf,
}

impl Session {
    /// Opens the session, as one of the job's ranks if there are several.
    fn open(flags: &Flags, chooses: bool, job: &Job) -> Result<Self> {
        let mut machine = Machine::open(&flags.running)?;
        machine.ranks = job.ranks_on(&machine.device)?;
        let mut profile = match &flags.config {
            Some(path) => Profile::read(path)?,
            None => Profile::named(flags.profile(&machine.device))?,
        };
        if chooses {
            profile.data.hold_out.get_or_insert(HOLD_OUT);
        }
        flags.narrow(&mut profile)?;
        let seeds = flags.seeds.clone().unwrap_or_else(|| profile.seeds.clone());
        profile::check_seeds(&seeds).context("--seeds")?;
        let mut display = Display::new();
        // The first rank downloads and indexes the data, so that the other ranks find them.
        let data = match machine.ranks.as_deref() {
            Some(ranks) if !ranks.is_first() => {
                ranks.barrier();
                load(&flags.data, &profile.data, &mut display)?
            }
            ranks => {
                let data = load(&flags.data, &profile.data, &mut display)?;
                ranks.inspect(|ranks| ranks.barrier());
                data
            }
        };
        let out = flags.out.clone();
        let mut session = Self { seeds, out, display, ..Self::of(machine, profile, data) };
        session.tell_data();
        session.tell_ranks();
        match session.take_published() {
            // Published networks that can't be used are about to be replaced.
            Err(error) if flags.publish => {
                session.display.line(&format!("the published networks are not taken: {error:#}"))
            }
            result => result?,
        }
        Ok(session)
    }

    /// Makes stages whose networks are published next to the results count as done.
    fn take_published(&mut self) -> Result<()> {
        let place = self.folder(results::PUBLISHED);
        if let Some(folder) = Folder::read(&place)? {
            self.display.line(&format!(
                "published in {}: {}",
                place.display(),
                report::counted(folder.rows().len(), "network")
            ));
            self.machine.store = self.machine.store.clone().beside(folder.published()?);
        }
        Ok(())
    }

    /// Takes part in the trainings of the first rank until it ends. Returns false at once on the
    /// first rank, or if there is only one process.
    fn follow(&self) -> Result<bool> {
        let Machine { device, ranks, .. } = &self.machine;
        match ranks.as_deref().filter(|ranks| !ranks.is_first()) {
            None => Ok(false),
            Some(ranks) => train::follow(ranks, &*self.data, device).map(|()| true).map_err(Into::into),
        }
    }

    /// Tells how batches are divided among the ranks.
    fn tell_ranks(&self) {
        let Some(ranks) = &self.machine.ranks else { return };
        let trainings = self.profile.training.0.values();
        let batches: BTreeSet<usize> = trainings.clone().map(|training| training.batch).collect();
        let batches: Vec<String> = batches.iter().map(usize::to_string).collect();
        let together = trainings.filter(|training| training.sync_norm).count();
        self.display.line(&format!(
            "{} processes train together: a batch has {} images, of all of them; statistics are those of {}",
            ranks.size(),
            batches.join(" or "),
            match together {
                0 => "each one's own images",
                n if n == self.profile.training.0.len() => "the whole batch",
                _ => "each one's own images, or of the whole batch if the profile sets sync_norm",
            }
        ));
    }

    /// Creates a session with the machine's store for workflows that start from a given network.
    pub fn given(machine: Machine, profile: Profile, data: Box<dyn Dataset>, network: Network) -> Self {
        let session = Self { given: Some(network), ..Self::of(machine, profile, data) };
        session.tell_data();
        session
    }

    fn of(machine: Machine, mut profile: Profile, data: Box<dyn Dataset>) -> Self {
        let mut device = machine.name.clone();
        let trainings = &mut profile.training.0;
        if let Some(arithmetic) = machine.arithmetic {
            trainings.values_mut().for_each(|training| training.arithmetic = arithmetic);
        } else if trainings.values().any(|training| training.arithmetic == Arithmetic::Bf16) {
            device += device::BFLOAT16;
        }
        if let Some(ranks) = &machine.ranks {
            device += &format!(", {} processes", ranks.size());
        }
        Self {
            seeds: profile.seeds.clone(),
            profile,
            data,
            provenance: Provenance {
                command: command::line(),
                git_commit: env!("PFQ_COMMIT").into(),
                device,
            },
            machine,
            given: None,
            display: Display::new(),
            out: PathBuf::new(),
        }
    }

    fn tell_data(&self) {
        let Self { data, display, .. } = self;
        display.line(&format!(
            "data: {}: {} training, {} test images",
            data.title(),
            data.train_images(),
            data.test_images()
        ));
    }

    /// Returns the folder of the results called `name`. Networks for which training images were
    /// held out have a folder of their own next to the profile's.
    pub fn folder(&self, name: &str) -> PathBuf {
        let held_out = name == results::PUBLISHED && self.profile.data.hold_out.is_some();
        self.out.join(name).join(format!("{}{}", self.profile.name, if held_out { "_holdout" } else { "" }))
    }

    /// Checks, before anything runs, that the results called `name` can be written and do not
    /// replace results on other data. Results on real data are a record, which a run that fell back
    /// to synthetic images must not overwrite.
    pub fn claim(&self, name: &str) -> Result<()> {
        let folder = self.folder(name);
        let shown = folder.display();
        if folder.join(report::STAGES).is_file() {
            let ours = self.data.name();
            let stages = report::read_stages(&folder).context(
                "it is not known on which data the results there were made; move them away to write new ones",
            )?;
            let theirs = stages.records.iter().map(|stage| stage.data.name.as_str());
            if let Some(theirs) = theirs.into_iter().find(|name| *name != ours && !report::is_synthetic(name))
            {
                bail!(
                    "{shown} holds results on {theirs}, but this run would write results on {ours}: name \
                     another folder with --out, or move that one away"
                );
            }
        }
        whole_file::sweep(&folder).ok();
        whole_file::check(&folder).with_context(|| format!("{shown}: the results can't be written there"))
    }

    /// Does the same as [`Session::claim`] for results that are written as a whole from `stages`.
    /// They also do not replace results on real data that have more stages or another `[pfq]`.
    pub fn claim_whole(&self, name: &str, stages: &[Arc<Stage>]) -> Result<()> {
        self.claim(name)?;
        let folder = self.folder(name);
        let Ok(written) = report::read_stages(&folder) else { return Ok(()) };
        if written.records.iter().all(|stage| report::is_synthetic(&stage.data.name)) {
            return Ok(());
        }
        let keys = stages.iter().map(|stage| stage.key(self.data.fingerprint()));
        let keys = keys.collect::<workflow::Result<BTreeSet<String>>>()?;
        let shown = folder.display();
        if let Some(lost) = written.records.iter().find(|stage| !keys.contains(&stage.key)) {
            bail!(
                "{shown} holds results of {} (stage {}), which this run would drop: leave --only out, give a changed \
                 profile another name, name another folder with --out, or move that one away",
                lost.label,
                lost.key
            );
        }
        if Profile::read(&folder.join(results::PROFILE)).is_ok_and(|theirs| theirs.pfq != self.profile.pfq) {
            bail!(
                "{shown} holds results with another [pfq]: give the profile another name, name another folder with \
                 --out, or move that one away"
            );
        }
        Ok(())
    }

    /// Returns the stage that every workflow of this model and seed starts with.
    pub fn pretraining(&self, model: ModelName, seed: u64) -> Result<Arc<Stage>> {
        Ok(Stage::root(StageKind::Pretrain {
            network: self.profile.network(model, self.data.classes())?,
            training: self.profile.pretraining(model)?,
            seed: self.profile.pretraining_seed.unwrap_or(seed),
        }))
    }

    /// Returns the outcome of a stage, which runs if it has not been run; `None` if the time limit
    /// ended it.
    pub fn run(&mut self, stage: &Stage) -> Result<Option<Outcome>> {
        self.run_by(Store::run, stage)
    }

    /// Does the same as [`Session::run`], but runs a stage whose network is published too.
    fn run_here(&mut self, stage: &Stage) -> Result<Option<Outcome>> {
        self.run_by(Store::run_here, stage)
    }

    /// Returns what stages run on, the store that keeps them, and the display of their progress.
    fn parts(&mut self) -> (Resources<'_>, &Store, &mut Display) {
        let Self { data, machine, provenance, given, display, .. } = self;
        let Machine { device, store, ranks, graphs, .. } = machine;
        let (data, given, ranks) = (&**data, given.as_ref(), ranks.as_deref());
        (Resources { data, device, provenance, given, ranks, graphs: *graphs }, store, display)
    }

    fn run_by(&mut self, run: Run, stage: &Stage) -> Result<Option<Outcome>> {
        let (resources, store, display) = self.parts();
        match run(store, stage, &resources, &mut |event| display.stage(event)) {
            Err(error) if error.is_time_limit() => {
                display.clear();
                display.line(&format!("{:#}", anyhow::Error::from(error)));
                Ok(None)
            }
            result => Ok(Some(result?)),
        }
    }

    /// Returns the stages that `ends` need, each once, with their outcomes if they have been run.
    pub fn plan(&self, ends: &[Arc<Stage>]) -> Result<Vec<Planned>> {
        Ok(self.machine.store.plan(ends, self.data.fingerprint())?)
    }

    /// Returns whether a stage's network is published, whether or not the store has it too.
    pub fn is_published(&self, stage: &Stage) -> bool {
        stage
            .key(self.data.fingerprint())
            .is_ok_and(|key| self.machine.store.published().file(&key).is_some())
    }

    /// Returns the file of a finished stage's network.
    pub fn network_file(&self, stage: &Stage) -> Result<PathBuf> {
        Ok(self.machine.store.network_file(stage, self.data.fingerprint())?)
    }

    /// Returns a stage's outcome and network; runs the stage if it has not been run.
    pub fn produce(&mut self, stage: &Stage) -> Result<(Outcome, Network)> {
        let (resources, store, display) = self.parts();
        Ok(store.produce(stage, resources.device, &resources, &mut |event| display.stage(event))?)
    }

    /// Prepares the data, before a stage runs.
    fn prepare(&mut self) -> Result<()> {
        Ok(self.data.prepare(&mut |event| self.display.data(&event))?)
    }

    /// Tells how many images could not be used.
    pub fn tell_skipped(&self) {
        let skipped = self.data.skipped();
        if let Some(first) = skipped.first() {
            let count = skipped.len();
            self.display.line(&format!(
                "{} could not be used, the first being {} ({})",
                report::counted(count, "image"),
                first.file,
                first.why
            ));
        }
    }

    /// Does what the flags ask for instead of the whole work, which ends in the stages `ends`:
    /// shows the plan or runs one stage. Returns `None` if they ask for the whole work. `rows`
    /// names the rows that are about a stage, by its key; `title` names the jobs of a cluster.
    pub fn part(
        &mut self,
        ends: &[Arc<Stage>],
        rows: &BTreeMap<String, String>,
        title: &str,
        flags: &Flags,
    ) -> Result<Option<Done>> {
        for (flag, given) in [("--publish", flags.publish), ("--draw", flags.draw)] {
            if given {
                bail!(
                    "{flag} is of rows of tables, but {title} has none: use the program of a table, such as \
                     table3"
                );
            }
        }
        match (&flags.stage, flags.plan, flags.format) {
            (None, false, _) => Ok(None),
            (None, true, PlanFormat::Text) => self.show_plan(ends, rows).map(|()| Some(Done::All)),
            (None, true, PlanFormat::Slurm) => {
                let (plan, fingerprint) = (self.plan(ends)?, self.data.fingerprint());
                output::print(&slurm::script(&plan, fingerprint, &command::without_plan()?, title)?);
                Ok(Some(Done::All))
            }
            (Some(key), ..) => {
                let plan = self.plan(ends)?;
                let planned = plan.iter().find(|planned| planned.key == *key);
                let planned = planned.with_context(|| {
                    format!(
                        "--stage {key}: expected the key of one of the {} stages that --plan shows",
                        plan.len()
                    )
                })?;
                if planned.to_do || planned.published {
                    self.prepare()?;
                }
                let Some(outcome) = self.run_here(&planned.stage)? else { return Ok(Some(Done::InTime)) };
                match self.machine.store.published().outcome(key) {
                    Some(published) => output::print(&repeated(&outcome, published)),
                    None if planned.to_do => {}
                    None => output::print(&format!(
                        "{}: done already, top-1 {:.2} %",
                        outcome.label, outcome.evaluation.top1_percent
                    )),
                }
                Ok(Some(Done::All))
            }
        }
    }

    /// Runs the stages that `ends` need, as far as they are not done.
    pub fn run_all(&mut self, ends: &[Arc<Stage>]) -> Result<Done> {
        let plan = self.plan(ends)?;
        let to_do = plan.iter().filter(|planned| planned.to_do).count();
        if to_do > 0 {
            self.prepare()?;
            let left = self.time_left(&plan)?;
            self.display.line(&format!("{to_do} of {} stages to run; {left}", plan.len()));
        }
        let mut number = 0;
        // A finished stage no longer needs the stages before it, but tables read their outcomes.
        // For published stages these are known.
        for planned in plan.iter().filter(|planned| planned.to_do || !planned.published) {
            if planned.to_do {
                number += 1;
                self.display.count(Some((number, to_do)));
            }
            if self.run(&planned.stage)?.is_none() {
                return Ok(Done::InTime);
            }
        }
        self.display.count(None);
        Ok(Done::All)
    }

    /// Prints which stages are done, which are left, and an estimate of the time left. `rows` names
    /// the rows that are about a stage, by its key.
    fn show_plan(&self, ends: &[Arc<Stage>], rows: &BTreeMap<String, String>) -> Result<()> {
        let plan = self.plan(ends)?;
        let (speed, _) = self.speed(&plan)?;
        for planned in &plan {
            let status = match planned.outcome.as_ref().filter(|_| !planned.to_do) {
                Some(outcome) => {
                    let top1 = outcome.evaluation.top1_percent;
                    let done = if planned.published { "published" } else { "done" };
                    format!("{done}: top-1 {top1:.2} %, took {}", report::duration(outcome.seconds))
                }
                None => match self.epochs_left(planned)? {
                    None => "to do: a few seconds".into(),
                    Some((epochs, work)) => {
                        let what = match planned.epochs.len() {
                            0 => format!("to do: {}", report::counted(epochs, "epoch")),
                            done => format!("begun: {epochs} of {} epochs left", epochs + done),
                        };
                        format!("{what}, about {}", report::duration(work / speed))
                    }
                },
            };
            let row = rows.get(&planned.key).map_or(String::new(), |row| format!(" ({row})"));
            let label = planned.stage.label();
            output::print(&format!("{}  {label:<48} {status}{row}", planned.key));
        }
        let done = plan.iter().filter(|p| !p.to_do).count();
        let left = match done == plan.len() {
            true => String::new(),
            false => format!("; {}", self.time_left(&plan)?),
        };
        output::print(&format!("{done} of {} stages done{left}.", plan.len()));
        Ok(())
    }

    /// Describes how long the stages of a plan will take that must be run.
    fn time_left(&self, plan: &[Planned]) -> Result<String> {
        let (speed, basis) = self.speed(plan)?;
        let mut work = 0.0;
        for planned in plan.iter().filter(|planned| planned.to_do) {
            work += self.epochs_left(planned)?.map_or(0.0, |(_, work)| work);
        }
        Ok(format!("about {} left (estimated from {basis})", report::duration(work / speed)))
    }

    /// Returns the speed in [work](Self::epoch_work) per second, and a description of its basis.
    fn speed(&self, plan: &[Planned]) -> Result<(f64, &'static str)> {
        let (mut work, mut seconds) = (0.0, 0.0);
        // Published stages were run on another machine.
        for planned in plan.iter().filter(|planned| !planned.published && !planned.epochs.is_empty()) {
            let macs = match &planned.outcome {
                Some(outcome) => outcome.macs,
                None => unpruned_macs(planned)?,
            };
            work += self.epoch_work(macs) * planned.epochs.len() as f64;
            seconds += planned.epochs.iter().map(|epoch| epoch.seconds).sum::<f64>();
        }
        Ok(match seconds > 0.0 {
            true => (work / seconds, "the speed of the epochs that are done"),
            false => (ASSUMED_MACS_PER_SECOND, "an assumed speed, because nothing has been measured yet"),
        })
    }

    /// Returns the work of an epoch in multiply–accumulates of the forward pass.
    fn epoch_work(&self, macs: u64) -> f64 {
        let (train, test) = (self.data.train_images() as f64, self.data.test_images() as f64);
        // Evaluating an image takes a third of the time of training on it.
        macs as f64 * (train + test / 3.0)
    }

    /// Returns the number of epochs left of a stage that must be run, and their work; `None` if the
    /// stage trains nothing.
    fn epochs_left(&self, planned: &Planned) -> Result<Option<(usize, f64)>> {
        let Some(training) = planned.stage.training() else { return Ok(None) };
        let epochs = training.epochs().saturating_sub(planned.epochs.len());
        Ok(Some((epochs, self.epoch_work(unpruned_macs(planned)?) * epochs as f64)))
    }
}

/// Returns the multiply–accumulates of the network that a stage's lineage begins with. Pruning makes
/// later stages cheaper; by how much is not known in advance.
fn unpruned_macs(planned: &Planned) -> Result<u64> {
    match &planned.stage.origin().kind {
        StageKind::Pretrain { network, .. } => Ok(network.macs()?),
        _ => bail!("stage {} does not begin with pre-training", planned.stage.label()),
    }
}

/// How a stage is run: [`Store::run`] or [`Store::run_here`].
type Run = fn(&Store, &Stage, &Resources, &mut dyn FnMut(workflow::Event)) -> workflow::Result<Outcome>;

/// Describes a stage that was run again, compared with its published outcome.
fn repeated(now: &Outcome, published: &Outcome) -> String {
    let shown = |outcome: &Outcome| outcome.network_hash().map_or("unknown", |hash| &hash[..16]).to_string();
    match now.network_hash() == published.network_hash() {
        true => format!("{}: the published network again, to the bit (SHA-256 {}…)", now.label, shown(now)),
        false => format!(
            "{}: not the published network: SHA-256 {}…, top-1 {:.2} %; published SHA-256 {}…, top-1 {:.2} %",
            now.label,
            shown(now),
            now.evaluation.top1_percent,
            shown(published),
            published.evaluation.top1_percent
        ),
    }
}

/// Loads the data that `--data` and the settings ask for, reduced to the part that the settings
/// take.
pub(crate) fn load(
    wanted: &str,
    settings: &profile::DataSettings,
    display: &mut Display,
) -> Result<Box<dyn Dataset>> {
    let source = DataSource::from(wanted);
    let data: Box<dyn Dataset> = match &settings.imagenet {
        Some(options) => {
            let data = imagenet::load(&source, options, &mut |event| display.data(&event))?;
            Box::new(match settings.hold_out {
                Some(images) => data.hold_out(images, 0)?,
                None => data,
            })
        }
        None => {
            let mut data = datasets::load(&source, &mut |event| display.data(&event))?;
            if let Some(images) = settings.hold_out {
                data = data.hold_out(images, 0)?;
                // A figure on held-out training images must not pass for one on the test set.
                data.name += "_holdout";
            }
            // The synthetic set is smaller than CIFAR-100. If a profile asks for more images, it
            // takes all of them.
            let at_most = |wanted: Option<usize>, there: usize| wanted.filter(|&n| n < there);
            let train = at_most(settings.train_images, data.train.len());
            let test = at_most(settings.test_images, data.test.len());
            Box::new(Arc::<InMemoryDataset>::new(data.limit(train, test)?))
        }
    };
    display.clear();
    Ok(data)
}
