//! Checks of the stages in a folder: that files are what was written, and that stages were made
//! from each other.

use crate::outcome::{NETWORK, Outcome};
use crate::store::checkpoint_file;
use crate::{Error, Result, key};
use candle_core::Device;
use models::Network;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A stage's folder and the finding about it.
#[derive(Debug)]
pub struct Checked {
    /// The folder.
    pub folder: PathBuf,
    /// The finding.
    pub finding: Finding,
}

/// The state of a stage's folder.
#[derive(Debug)]
pub enum Finding {
    /// A finished stage whose hashes all match.
    Whole(Box<Outcome>),
    /// A finished stage of an older version, which recorded no hashes. Its network can be read.
    Unhashed(Box<Outcome>),
    /// An intact checkpoint of an unfinished stage.
    Unfinished,
    /// Neither an outcome nor a checkpoint: the stage was only started, or its damaged files were
    /// set aside.
    Begun,
    /// A file differs from what was written.
    Damaged(Error),
}

/// Checks every stage of a store: its hashes, its key, and that it was made from the network that
/// its parent has.
///
/// # Errors
/// If a folder or a file cannot be read.
pub fn verify(store: &Path) -> Result<Vec<Checked>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(store).map_err(|e| Error::file(store, e))? {
        let path = entry.map_err(|e| Error::file(store, e))?.path();
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort();
    let mut all = Vec::new();
    for folder in folders {
        let finding = match examine(&folder) {
            Err(error) if error.is_damage() => Finding::Damaged(error),
            result => result?,
        };
        all.push(Checked { folder, finding });
    }
    let networks: BTreeMap<String, String> = all
        .iter()
        .filter_map(|checked| {
            let outcome = checked.finding.outcome()?;
            Some((outcome.key.clone(), outcome.network_hash()?.to_string()))
        })
        .collect();
    for Checked { folder, finding } in &mut all {
        let Some(outcome) = finding.outcome() else { continue };
        let now = outcome.parent.as_ref().and_then(|parent| networks.get(parent));
        if let (Some(then), Some(now)) = (&outcome.parent_network, now)
            && then != now
        {
            let problem = format!("was made from a network of SHA-256 {then}, and that is {now} now");
            *finding = Finding::Damaged(Error::Damaged { path: folder.display().to_string(), problem });
        }
    }
    Ok(all)
}

fn examine(folder: &Path) -> Result<Finding> {
    let Some(outcome) = Outcome::read(folder)? else {
        let checkpoint = checkpoint_file(folder);
        if !checkpoint.exists() {
            return Ok(Finding::Begun);
        }
        Network::load(&checkpoint, &Device::Cpu)?;
        return Ok(Finding::Unfinished);
    };
    let ends_with_key = folder.file_name().is_some_and(|name| name.to_string_lossy().ends_with(&outcome.key));
    if !ends_with_key || !key::fits(&outcome) {
        let problem = format!("its key {} is not that of its folder, settings and data", outcome.key);
        return Err(Error::Damaged { path: folder.display().to_string(), problem });
    }
    outcome.check_files(folder)?;
    Ok(match outcome.network_hash() {
        Some(_) => Finding::Whole(outcome.into()),
        None => {
            Network::load(&folder.join(NETWORK), &Device::Cpu)?;
            Finding::Unhashed(outcome.into())
        }
    })
}

impl Finding {
    /// Returns the outcome of a finished stage.
    pub fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Whole(outcome) | Self::Unhashed(outcome) => Some(outcome),
            Self::Unfinished | Self::Begun | Self::Damaged(_) => None,
        }
    }
}
