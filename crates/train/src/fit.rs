//! Training from the start or from a checkpoint to the end, by this process or by all ranks of a
//! job.

use crate::run::{Progress, Trained, TrainingRun};
use crate::state::{State, TrainedEpoch, json};
use crate::together::Work;
use crate::{Error, Result, Training};
use candle_core::Device;
use datasets::Dataset;
use models::{Extras, Network};
use ranks::Ranks;
use serde::de::DeserializeOwned;
use std::path::Path;

/// Trains `network` and writes a checkpoint after every epoch; the parameters are updated in place.
///
/// The checkpoint is written before the epoch is evaluated, so a failing evaluation does not lose
/// the epoch. If the folder has a checkpoint of the same run, training resumes from it. The result
/// then has the same bits as that of an uninterrupted run, provided that all of it runs on the same
/// device. The checkpoint may come from any device.
///
/// # Errors
/// [`Error::TimeLimit`] if the run's limit does not allow another epoch: the checkpoint is on disk,
/// and the same call resumes from it. Otherwise an error if a setting is impossible, training
/// diverges, or a computation, the data or a file fails.
pub fn fit(network: Network, run: &TrainingRun, observe: &mut dyn FnMut(Progress)) -> Result<Trained> {
    run.training.validate()?;
    let &TrainingRun { data, training, seed, ranks, .. } = run;
    let work = Work { data, training, seed, ranks };
    work.check()?;
    let (state, trained) = match State::load(&network, run)? {
        Some((state, trained)) => {
            observe(Progress::Resumed { epoch: state.metrics.len() + usize::from(trained.is_some()) });
            (state, trained)
        }
        None => (State::new(network, run)?, None),
    };
    announce(&work, &state, trained)?;
    state.train(trained, &work, Some(run), observe)
}

/// Sends the other ranks the state from which training starts, and its settings.
fn announce(work: &Work, state: &State, trained: Option<TrainedEpoch>) -> Result<()> {
    let Some(ranks) = work.ranks else { return Ok(()) };
    let mut extras = state.extras(trained);
    let mut tell = |key: &str, value: String| extras.metadata.insert(key.into(), value);
    tell(TRAINING, json(work.training));
    tell(SEED, json(&work.seed));
    tell(DATA, work.data.fingerprint().into());
    ranks.broadcast(state.trainer.network().to_bytes(&extras)?);
    Ok(())
}

/// Takes part in every training that rank 0 runs, until rank 0 calls [`dismiss`].
///
/// All ranks other than rank 0 call this.
///
/// # Errors
/// Those of [`fit`](crate::fit()), and an error if the data differ from those of rank 0. The other
/// ranks cannot continue after an error, so the caller must end the job.
pub fn follow(ranks: &dyn Ranks, data: &dyn Dataset, device: &Device) -> Result<()> {
    loop {
        let message = ranks.broadcast(Vec::new());
        if message.is_empty() {
            return Ok(());
        }
        let fail = |problem: String| Error::Ranks { rank: ranks.rank(), problem };
        let (network, mut extras) = Network::from_bytes(Path::new("what rank 0 sent"), &message, device)?;
        let training: Training = read(said(&extras, TRAINING)).map_err(fail)?;
        let (state, trained) = State::of(network, &mut extras, (&training, false), fail)?;
        let said = |key| said(&extras, key);
        if said(DATA) != data.fingerprint() {
            let (found, expected) = (data.fingerprint(), said(DATA));
            let problem = format!("has data of the fingerprint {found}, and rank 0 those of {expected}");
            return Err(fail(format!("{problem}: expected every rank to read the same")));
        }
        let work =
            Work { data, training: &training, seed: read(said(SEED)).map_err(fail)?, ranks: Some(ranks) };
        match state.train(trained, &work, None, &mut |_| ()) {
            Ok(_) | Err(Error::TimeLimit { .. }) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Ends [`follow`] on the other ranks: rank 0 has nothing more to train.
pub fn dismiss(ranks: &dyn Ranks) {
    ranks.broadcast(Vec::new());
}

/// Metadata keys of what rank 0 sends in addition to a state.
const TRAINING: &str = "training";
const SEED: &str = "seed";
const DATA: &str = "data";

fn said<'a>(extras: &'a Extras, key: &str) -> &'a str {
    extras.metadata.get(key).map_or("", String::as_str)
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|e| format!("can't read what rank 0 sent: {e}"))
}
