//! Whether the stages in a folder are what was written, and made from each other.

use crate::outcome::{NETWORK, Outcome};
use crate::store::{DAMAGED, checkpoint_file};
use crate::{Error, Result, key};
use candle_core::Device;
use models::Network;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A stage's folder, and what was found there.
#[derive(Debug)]
pub struct Checked {
    /// The folder.
    pub folder: PathBuf,
    /// What was found.
    pub finding: Finding,
}

/// What was found in a stage's folder.
#[derive(Debug)]
pub enum Finding {
    /// A finished stage; every hash is right.
    Whole(Box<Outcome>),
    /// A finished stage of an older version, which wrote no hashes. Its network can be read.
    Unhashed(Box<Outcome>),
    /// A whole checkpoint of a stage that goes on.
    Unfinished,
    /// Neither an outcome nor a checkpoint: a stage that was begun, and damaged files that were set aside.
    Begun,
    /// Something is not what was written.
    Damaged(Error),
}

/// Checks every stage of a store: hashes, keys, and that each was made from the network of the one before it.
///
/// # Errors
/// When a folder or a file can't be read.
pub fn verify(store: &Path) -> Result<Vec<Checked>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(store).map_err(|e| Error::file(store, e))? {
        let path = entry.map_err(|e| Error::file(store, e))?.path();
        let aside = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(DAMAGED));
        if path.is_dir() && !aside {
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
    /// What a finished stage gave.
    pub fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Whole(outcome) | Self::Unhashed(outcome) => Some(outcome),
            Self::Unfinished | Self::Begun | Self::Damaged(_) => None,
        }
    }
}
