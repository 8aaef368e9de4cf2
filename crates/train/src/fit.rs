//! A training from its beginning, or from its checkpoint, to its end: by this process, or by all ranks of a job.

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

/// Trains `network` (its parameters are updated in place), writing a checkpoint after every epoch, before it is
/// evaluated: whatever fails in the evaluation does not cost the epoch.
/// If the folder has a checkpoint of the same run, goes on from there; the result has the same bits
/// as that of a run that was not interrupted, if all of it runs on the same device. The checkpoint may be from any
/// device.
///
/// # Errors
/// Beside what can go wrong, [`Error::TimeLimit`] where the run's limit does not allow for another epoch: the
/// checkpoint is on the disk, and the same call goes on from it.
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
    tell(&work, &state, trained)?;
    state.train(trained, &work, Some(run), observe)
}

/// Tells the other ranks what is trained, and from where on.
fn tell(work: &Work, state: &State, trained: Option<TrainedEpoch>) -> Result<()> {
    let Some(ranks) = work.ranks else { return Ok(()) };
    let mut extras = state.extras(trained);
    let mut tell = |key: &str, value: String| extras.metadata.insert(key.into(), value);
    tell(TRAINING, json(work.training));
    tell(SEED, json(&work.seed));
    tell(DATA, work.data.fingerprint().into());
    ranks.broadcast(state.trainer.network().to_bytes(&extras)?);
    Ok(())
}

/// Takes part in every training that rank 0 runs, as one of the other ranks, until rank 0 calls [`dismiss`].
///
/// # Errors
/// Those of [`fit`](crate::fit()), and where the data are not those of rank 0. The others can't go on then: the job is to be
/// ended.
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

/// Lets the ranks that [`follow`] end: rank 0 has nothing more to train.
pub fn dismiss(ranks: &dyn Ranks) {
    ranks.broadcast(Vec::new());
}

/// Names of what rank 0 sends beside a state.
const TRAINING: &str = "training";
const SEED: &str = "seed";
const DATA: &str = "data";

fn said<'a>(extras: &'a Extras, key: &str) -> &'a str {
    extras.metadata.get(key).map_or("", String::as_str)
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|e| format!("can't read what rank 0 sent: {e}"))
}
