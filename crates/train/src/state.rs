//! The state of a training between two epochs, and its checkpoint.

use crate::evaluate::evaluate_on;
use crate::run::{CHECKPOINT, EpochMetrics, METRICS, Progress, Trained, TrainingRun};
use crate::together::Work;
use crate::totals::Totals;
use crate::{Error, Evaluation, Result, TimeLimit, Trainer, Training};
use datasets::Feed;
use models::{Extras, Network};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The number of steps between two reads of the loss. On an accelerator each read waits for the
/// device, which otherwise never waits for the host.
const STEPS_PER_REPORT: usize = 20;

/// The state that is carried from epoch to epoch. The order and the augmentation of images depend
/// only on (seed, epoch), so there is no random state.
pub(crate) struct State {
    pub(crate) trainer: Trainer,
    /// The metrics of the epochs that have been evaluated.
    pub(crate) metrics: Vec<EpochMetrics>,
    /// The percentages of low-variance filters, for the same epochs.
    low_variance_percent: Vec<Option<f64>>,
}

/// The result of training an epoch: [`EpochMetrics`] without the evaluation.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct TrainedEpoch {
    epoch: usize,
    rate: f64,
    train_loss: f64,
    train_top1_percent: f64,
    seconds: f64,
    #[serde(default)]
    low_variance_percent: Option<f64>,
}

impl State {
    pub(crate) fn new(network: Network, run: &TrainingRun) -> Result<Self> {
        let trainer = Trainer::new(network, run.training, run.records())?;
        Ok(Self { trainer, metrics: Vec::new(), low_variance_percent: Vec::new() })
    }

    /// Trains until the last epoch; `trained` is an epoch that still has to be evaluated.
    ///
    /// Checkpoints and metrics are written only if `run` is given, which of several ranks only
    /// rank 0 has.
    pub(crate) fn train(
        mut self,
        trained: Option<TrainedEpoch>,
        work: &Work,
        run: Option<&TrainingRun>,
        observe: &mut dyn FnMut(Progress),
    ) -> Result<Trained> {
        let dtype = work.training.arithmetic.dtype();
        let mut feed = Feed::new(work.data, self.trainer.network().device(), dtype).part(work.part());
        // A checkpoint lacks the evaluation of its last epoch.
        if let Some(trained) = trained {
            self.evaluate(trained, work, run, &mut feed)?;
        }
        let epochs = work.training.epochs();
        let limit = run.and_then(|run| run.limit);
        for epoch in self.metrics.len()..epochs {
            if !work.first_says(limit.is_none_or(TimeLimit::allows_an_epoch)) {
                return Err(Error::TimeLimit { epoch, epochs });
            }
            let started = Instant::now();
            let trained = self.epoch(epoch, work, &mut feed, observe)?;
            run.map_or(Ok(()), |run| self.save(trained, run))?;
            let metrics = self.evaluate(trained, work, run, &mut feed)?;
            // The duration includes writing the checkpoint, which must also be done within the
            // limit.
            limit.inspect(|limit| limit.note(started.elapsed()));
            observe(Progress::Epoch { epochs, metrics });
        }
        let Self { trainer, metrics, low_variance_percent } = self;
        Ok(Trained { network: trainer.into_network(), metrics, low_variance_percent })
    }

    fn epoch(
        &mut self,
        epoch: usize,
        work: &Work,
        feed: &mut Feed,
        observe: &mut dyn FnMut(Progress),
    ) -> Result<TrainedEpoch> {
        let Work { training, seed, ranks, .. } = *work;
        let started = Instant::now();
        let batches = feed.train(training.batch, training.augmentation, seed, epoch)?;
        let steps = batches.len();
        if steps == 0 {
            return Err(Error::Setting {
                key: "batch",
                found: format!("{} of no training images", training.batch),
                expected: "at least one training image",
            });
        }
        let accuracies: Vec<f64> = self.metrics.iter().map(|epoch| epoch.train_top1_percent).collect();
        let mut totals = Totals::default();
        let (mut rate, mut done) = (0.0, 0);
        let report = |totals: &Totals, done: usize, rate: f64, observe: &mut dyn FnMut(Progress)| {
            let means = totals.read(ranks)?;
            let loss = means.loss;
            if !loss.is_finite() {
                let what = format!("the loss is {loss} after step {done}");
                return Err(Error::Diverged { what, epoch: epoch + 1, rate });
            }
            let images_per_second = means.images as f64 / started.elapsed().as_secs_f64();
            let (epoch, epochs) = (epoch + 1, training.epochs());
            observe(Progress::Steps { epoch, epochs, step: done, steps, loss, images_per_second });
            Ok(means)
        };
        for (step, batch) in batches.enumerate() {
            let batch = batch?;
            // The rate is taken at the middle of the step.
            rate = training.rate(epoch as f64 + (step as f64 + 0.5) / steps as f64, &accuracies);
            let (images, labels) = (&batch.images, &batch.labels);
            let found = match work.share(epoch, step) {
                Some(share) => self.trainer.shared_step(images, labels, rate, share)?,
                None => self.trainer.step(images, labels, rate)?,
            };
            totals.add(&found, labels.elem_count())?;
            if let Some(problem) = self.trainer.no_graphs() {
                observe(Progress::NoGraphs(problem));
            }
            done = step + 1;
            if done % STEPS_PER_REPORT == 0 && done < steps {
                report(&totals, done, rate, observe)?;
            }
        }
        // Steps whose images can't be read are left out, so `done` may be less than `steps`.
        work.agree(self.trainer.network_mut(), steps - done)?;
        let means = report(&totals, done, rate, observe)?;
        let network = self.trainer.network();
        // Quantizers map NaN to a level, so the loss may stay finite.
        if let Err(error) = network.check_values() {
            return Err(Error::Diverged { what: error.to_string(), epoch: epoch + 1, rate });
        }
        Ok(TrainedEpoch {
            epoch: epoch + 1,
            rate,
            train_loss: means.loss,
            train_top1_percent: means.top1_percent,
            seconds: started.elapsed().as_secs_f64(),
            low_variance_percent: network.low_variance_percent(network.epsilon)?,
        })
    }

    /// Evaluates the trained epoch, and writes the metrics of all epochs if `run` is given.
    fn evaluate(
        &mut self,
        trained: TrainedEpoch,
        work: &Work,
        run: Option<&TrainingRun>,
        feed: &mut Feed,
    ) -> Result<EpochMetrics> {
        let TrainedEpoch { epoch, rate, train_loss, train_top1_percent, seconds, low_variance_percent } =
            trained;
        let started = Instant::now();
        let Evaluation { loss, top1_percent } = evaluate_on(self.trainer.network(), feed, work.ranks)?;
        if !loss.is_finite() {
            return Err(Error::Diverged { what: format!("the loss on the test set is {loss}"), epoch, rate });
        }
        let metrics = EpochMetrics {
            epoch,
            rate,
            train_loss,
            train_top1_percent,
            test_loss: loss,
            test_top1_percent: top1_percent,
            seconds: seconds + started.elapsed().as_secs_f64(),
        };
        self.metrics.push(metrics);
        self.low_variance_percent.push(low_variance_percent);
        if let Some(run) = run {
            write_metrics(&self.metrics, &self.low_variance_percent, &run.folder.join(METRICS))?;
        }
        Ok(metrics)
    }

    fn checkpoint(run: &TrainingRun) -> PathBuf {
        run.folder.join(CHECKPOINT)
    }

    /// Writes the checkpoint of a trained epoch, before the epoch is evaluated.
    fn save(&self, trained: TrainedEpoch, run: &TrainingRun) -> Result<()> {
        let mut extras = Extras { sealed: true, ..self.extras(Some(trained)) };
        extras.metadata.insert("identity".into(), run.identity.into());
        if let Some(hash) = run.parent_network {
            extras.metadata.insert("parent_network".into(), hash.into());
        }
        self.trainer.network().save(&Self::checkpoint(run), &extras)?;
        Ok(())
    }

    /// Returns what a file holds in addition to the network: momenta, metrics and the epoch to
    /// evaluate.
    pub(crate) fn extras(&self, trained: Option<TrainedEpoch>) -> Extras {
        let mut extras = Extras::default();
        for (parameter, velocity) in self.trainer.velocities() {
            extras.tensors.insert(velocity_name(parameter), velocity.clone());
        }
        extras.metadata.insert("metrics".into(), json(&self.metrics));
        extras.metadata.insert("low_variance_percent".into(), json(&self.low_variance_percent));
        if let Some(trained) = trained {
            extras.metadata.insert("trained".into(), json(&trained));
        }
        extras
    }

    /// Restores the state from a network and its [`State::extras`], and the epoch that still has to
    /// be evaluated. `fail` turns a problem into an error.
    pub(crate) fn of(
        network: Network,
        extras: &mut Extras,
        (training, graphs): (&Training, bool),
        fail: impl Fn(String) -> Error,
    ) -> Result<(Self, Option<TrainedEpoch>)> {
        let unreadable = |e: serde_json::Error| {
            fail(format!("its metrics can't be read ({e}); delete the file to begin anew"))
        };
        let metrics = extras.metadata.get("metrics").map_or("", String::as_str);
        let metrics: Vec<EpochMetrics> = serde_json::from_str(metrics).map_err(unreadable)?;
        // Older checkpoints lack these percentages.
        let low = extras.metadata.get("low_variance_percent").map(|text| serde_json::from_str(text));
        let mut low_variance_percent: Vec<Option<f64>> =
            low.transpose().map_err(unreadable)?.unwrap_or_default();
        low_variance_percent.resize(metrics.len(), None);
        let trained = extras.metadata.get("trained").map(|text| serde_json::from_str(text));
        let trained = trained.transpose().map_err(unreadable)?;
        let mut velocities = BTreeMap::new();
        for parameter in network.parameters() {
            let name = velocity_name(&parameter.name);
            let missing = || fail(format!("lacks {name}; delete the file to begin the run anew"));
            velocities.insert(parameter.name, extras.tensors.remove(&name).ok_or_else(missing)?);
        }
        let trainer = Trainer::resumed(network, velocities, training, graphs);
        Ok((Self { trainer, metrics, low_variance_percent }, trained))
    }

    /// Reads the state from the run's checkpoint, and the epoch that still has to be evaluated.
    /// Returns `None` if there is no checkpoint yet.
    pub(crate) fn load(start: &Network, run: &TrainingRun) -> Result<Option<(Self, Option<TrainedEpoch>)>> {
        let path = Self::checkpoint(run);
        if !path.exists() {
            return Ok(None);
        }
        let fail = |problem: String| Error::File { path: path.display().to_string(), problem };
        let (network, mut extras) = Network::load(&path, start.device())?;
        let found = extras.metadata.get("identity").map_or("none", String::as_str);
        if found != run.identity {
            let problem = format!(
                "is the checkpoint of run {found}, expected that of {}; move it away or choose another folder",
                run.identity
            );
            return Err(fail(problem));
        }
        // Older checkpoints do not record the network that they started from.
        if let (Some(began), Some(now)) = (extras.metadata.get("parent_network"), run.parent_network)
            && began != now
        {
            let path = path.display().to_string();
            let problem =
                format!("its training began from a network of SHA-256 {began}, and that is {now} now");
            return Err(models::Error::Damaged { path, problem }.into());
        }
        let (state, trained) = Self::of(network, &mut extras, (run.training, run.records()), fail)?;
        // Older checkpoints were written after the evaluation, and have no seal.
        if trained.is_some() != extras.sealed {
            let (path, problem) =
                (path.display().to_string(), "its seal is missing, or its last epoch".into());
            return Err(models::Error::Damaged { path, problem }.into());
        }
        Ok(Some((state, trained)))
    }
}

pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("metrics are plain numbers")
}

fn velocity_name(parameter: &str) -> String {
    format!("velocity.{parameter}")
}

/// Writes a line for every epoch: its metrics and its percentage of low-variance filters.
fn write_metrics(metrics: &[EpochMetrics], low_variance_percent: &[Option<f64>], path: &Path) -> Result<()> {
    let fail = |problem: String| Error::File { path: path.display().to_string(), problem };
    #[derive(Serialize)]
    struct Low {
        low_variance_percent: Option<f64>,
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    for (row, &low_variance_percent) in metrics.iter().zip(low_variance_percent) {
        writer.serialize((row, Low { low_variance_percent })).map_err(|e| fail(e.to_string()))?;
    }
    let text = writer.into_inner().map_err(|e| fail(e.to_string()))?;
    whole_file::write(path, text).map_err(|e| fail(e.to_string()))
}
