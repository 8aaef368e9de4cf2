//! What lies in a folder of results, and the stages that it comes from.

use anyhow::{Context as _, Result, bail};
use report::STAGES;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use workflow::{Outcome, Planned, Stage};

/// The name of the results' folder in which each profile has one of its networks.
pub(crate) const NETWORKS: &str = "networks";

/// The file of the settings in a folder of results.
pub(crate) const PROFILE: &str = "profile.toml";

/// The names in a folder that are of a kind, sorted, without hidden ones.
pub(crate) fn entries(folder: &Path, kind: fn(&Path) -> bool) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind(&entry.path()) && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    };
    list().with_context(|| format!("folder {} could not be read", folder.display()))
}

/// What the stages gave that a folder of results comes from.
///
/// # Errors
/// Where that is not what was written.
pub(crate) fn outcomes(place: &Path) -> Result<Vec<Outcome>> {
    report::read_stages(place)?;
    let path = place.join(STAGES);
    let read = || -> Result<Vec<Outcome>> {
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let stages: Vec<Value> = serde_json::from_value(value["stages"].take())?;
        stages.into_iter().map(|stage| Outcome::of_results(stage).map_err(anyhow::Error::msg)).collect()
    };
    read().with_context(|| path.display().to_string())
}

/// What stages of a plan gave, by their keys.
pub(crate) fn done(plan: &[Planned]) -> BTreeMap<&str, &Outcome> {
    plan.iter().filter_map(|p| Some((p.key.as_str(), p.outcome.as_ref()?))).collect()
}

/// What a stage and those before it gave, the first one first.
///
/// # Errors
/// Where one is missing, or was made from another network than that of the stage before it.
pub(crate) fn line<'a>(
    stage: &Arc<Stage>,
    fingerprint: &str,
    done: &BTreeMap<&str, &'a Outcome>,
) -> Result<Vec<&'a Outcome>> {
    let mut line: Vec<&Outcome> = Vec::new();
    for of in stage.lineage() {
        let key = of.key(fingerprint)?;
        let outcome = *done.get(key.as_str()).with_context(|| {
            format!(
                "stage {} ({key}) is missing from the store, and {} was made from it: run the table again without --only to \
                 make it anew",
                of.label(),
                stage.label()
            )
        })?;
        if let (Some(then), Some(now)) =
            (&outcome.parent_network, line.last().and_then(|parent| parent.network_hash()))
            && then != now
        {
            bail!(
                "stage {} ({key}) was made from another network than the published one of the stage before it: write results \
                 elsewhere (--out), so that what is published does not count",
                of.label()
            );
        }
        line.push(outcome);
    }
    Ok(line)
}
