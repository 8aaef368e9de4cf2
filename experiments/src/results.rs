//! The contents of a folder of results, and the stages that they come from.

use anyhow::{Context as _, Result, bail};
use report::STAGES;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use workflow::{Outcome, Planned, Stage};

/// The name of the results' folder with the published networks of each profile.
pub(crate) const PUBLISHED: &str = "networks";

/// The name of the file with the settings in a folder of results.
pub(crate) const PROFILE: &str = "profile.toml";

/// Returns the names in a folder whose paths satisfy `kind`, sorted and without hidden ones.
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

/// Reads the outcomes of the stages that a folder of results comes from.
///
/// # Errors
/// If they can't be read, or are not what was written.
pub(crate) fn outcomes(place: &Path) -> Result<Vec<Outcome>> {
    report::read_stages(place)?;
    let path = place.join(STAGES);
    let read = || -> Result<Vec<Outcome>> {
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        // Older versions wrote a plain list.
        let stages = value.get_mut("stages").map(Value::take).unwrap_or(value);
        let stages: Vec<Value> = serde_json::from_value(stages)?;
        stages.into_iter().map(|stage| Outcome::of_results(stage).map_err(anyhow::Error::msg)).collect()
    };
    read().with_context(|| path.display().to_string())
}

/// Returns the outcomes of a plan's stages that have one, by their keys.
pub(crate) fn done(plan: &[Planned]) -> BTreeMap<&str, &Outcome> {
    plan.iter().filter_map(|p| Some((p.key.as_str(), p.outcome.as_ref()?))).collect()
}

/// Returns the outcomes of a stage and of those before it, the first one first.
///
/// # Errors
/// If one is missing, or was made from another network than the one that the stage before it has.
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
                "stage {} ({key}) is missing from the store, but {} was made from it: run the table again \
                 without --only, which runs the missing stage",
                of.label(),
                stage.label()
            )
        })?;
        if let (Some(then), Some(now)) =
            (&outcome.parent_network, line.last().and_then(|parent| parent.network_hash()))
            && then != now
        {
            bail!(
                "stage {} ({key}) was made from another network than the published one of the stage before \
                 it: write the results to another folder (--out), where the published stages do not count",
                of.label()
            );
        }
        line.push(outcome);
    }
    Ok(line)
}
