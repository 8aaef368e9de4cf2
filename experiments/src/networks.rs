//! Publishing networks next to the results, in `<results>/networks/<profile>/`: they are written
//! from a store, used for stages that another store lacks, and evaluated again.
//!
//! Such a folder holds the networks as their stages wrote them, `networks.csv` with a description
//! of each, the settings, and `stages.json` with the outcomes of all stages that the networks come
//! from.

use crate::output;
use crate::process::one_line;
use crate::profile::{ModelName, Profile};
use crate::progress::Display;
use crate::published::{Examined, Folder};
use crate::results::{self, PROFILE, entries};
use crate::session::{self, Session};
use crate::tool::text;
use anyhow::{Context as _, Result, bail};
use models::MAX_FILE_BYTES;
use report::{NETWORKS, NetworkRow, Row};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use whole_file::seal;
use workflow::{Outcome, Stage};

/// The maximum size in bytes of all networks of a profile together, because they are kept with the
/// code.
const MAX_BYTES: u64 = 96 << 20;

/// A network to publish.
pub(crate) struct Pick {
    /// The file's name without the extension.
    pub name: String,
    /// The value of [`NetworkRow::subject`].
    pub subject: String,
    /// The value of [`NetworkRow::seed`].
    pub seed: u64,
    /// The model of the network.
    pub model: ModelName,
    /// The stage that produced the network.
    pub stage: Arc<Stage>,
}

/// Copies networks of finished stages to the folder of the session's profile, in place of
/// everything that is published there. A network comes from the store or, if the store lacks it,
/// from that folder. Returns a description of what was written.
pub(crate) fn publish(picks: &[Pick], session: &Session) -> Result<String> {
    let fingerprint = session.data.fingerprint();
    let ends: Vec<Arc<Stage>> = picks.iter().map(|pick| pick.stage.clone()).collect();
    let plan = session.plan(&ends)?;
    let done = results::done(&plan);
    // A network that is published already keeps its name, whatever table publishes more.
    let mut named = report::read_networks(&session.folder(results::PUBLISHED)).unwrap_or_default();
    let keys: BTreeSet<String> =
        picks.iter().map(|pick| pick.stage.key(fingerprint)).collect::<workflow::Result<_>>()?;
    named.retain(|row| keys.contains(&row.key));
    let (mut outcomes, mut rows, mut files) = (Vec::<&Outcome>::new(), Vec::<NetworkRow>::new(), Vec::new());
    for pick in picks {
        let lineage = results::line(&pick.stage, fingerprint, &done)?;
        for outcome in &lineage {
            if !outcomes.iter().any(|known| known.key == outcome.key) {
                outcomes.push(outcome);
            }
        }
        let outcome = *lineage.last().context("a workflow without stages")?;
        if rows.iter().any(|row| row.key == outcome.key) {
            continue;
        }
        let (mut file, mut subject) = (format!("{}.safetensors", pick.name), pick.subject.clone());
        if let Some(row) = named.iter().find(|row| row.key == outcome.key) {
            (file, subject) = (row.file.clone(), row.subject.clone());
        } else if rows.iter().chain(&named).any(|row| row.file == file) {
            // Alternatives may start from networks of their own that differ only in their settings.
            file = format!("{}-{}.safetensors", pick.name, &outcome.key[..8]);
        }
        let row = NetworkRow {
            file,
            bytes: 0,
            sha256: outcome.network_hash().unwrap_or_default().into(),
            key: outcome.key.clone(),
            parent: outcome.parent.clone(),
            model: pick.model.version().name().into(),
            width: session.profile.network(pick.model, session.data.classes())?.width,
            subject,
            seed: pick.seed,
            settings: outcome.stage.to_string(),
            dataset: outcome.data.name.clone(),
            top1_percent: outcome.evaluation.top1_percent,
            loss: outcome.evaluation.loss,
            macs: outcome.macs,
            weights: outcome.weights,
        };
        let path = session.network_file(&pick.stage)?;
        let bytes = std::fs::read(&path).with_context(|| format!("{} could not be read", path.display()))?;
        let found = seal::sha256(&bytes);
        if found != row.sha256 {
            bail!(
                "{} has SHA-256 {found}, expected {} as in its outcome: run the table again, which repairs \
                 it (older versions wrote no hash; their stages must be run again)",
                path.display(),
                if row.sha256.is_empty() { "none" } else { &row.sha256 }
            );
        }
        // A network that exceeds the size limit of a file has further parts next to it.
        let parts = outcome.files.keys().filter(|name| name.starts_with("network.part-"));
        let parts = parts.map(|name| Ok(path.with_file_name(name).metadata()?.len()));
        let parts =
            parts.sum::<std::io::Result<u64>>().with_context(|| format!("parts of {}", path.display()))?;
        rows.push(NetworkRow { bytes: bytes.len() as u64 + parts, ..row });
        files.push(bytes);
    }
    if rows.is_empty() {
        bail!(
            "not even pre-training is done, so there is no network to publish: run the table first (--plan \
             shows what is done)"
        );
    }
    let sizes: Vec<(&str, u64)> = rows.iter().map(|row| (row.file.as_str(), row.bytes)).collect();
    check_sizes(&sizes)?;
    session.claim(results::PUBLISHED)?;
    let folder = session.folder(results::PUBLISHED);
    let before = report::read_stages(&folder).map(|stages| stages.files).unwrap_or_default();
    for (row, bytes) in rows.iter().zip(files) {
        let path = folder.join(&row.file);
        whole_file::write(&path, bytes)
            .with_context(|| format!("{} could not be written", path.display()))?;
    }
    report::write_networks(&rows, &folder)?;
    report::write_text(&toml::to_string(&session.profile)?, &folder.join(PROFILE))?;
    let names: Vec<String> =
        rows.iter().map(|row| row.file.clone()).chain([NETWORKS.into(), PROFILE.into()]).collect();
    report::write_stages(&outcomes, &folder, &names)?;
    for name in before.keys().filter(|name| !names.contains(name)) {
        std::fs::remove_file(folder.join(name)).ok();
    }
    let lines = rows
        .iter()
        .map(|row| vec![row.file.clone(), mebibytes(row.bytes), format!("{:.2}", row.top1_percent)]);
    let mut said = text::table(&["network", "MiB", "top-1 %"], &lines.collect::<Vec<_>>());
    let all = rows.iter().map(|row| row.bytes).sum();
    let count = report::counted(rows.len(), "network");
    said += &format!("{count}, {} MiB. Written to {}.", mebibytes(all), folder.display());
    Ok(said)
}

/// Checks that files are small enough to be kept with the code.
fn check_sizes(files: &[(&str, u64)]) -> Result<()> {
    let list = |files: &mut dyn Iterator<Item = &(&str, u64)>| {
        let of = |(name, bytes): &(&str, u64)| format!("{name} {} MiB", mebibytes(*bytes));
        files.map(of).collect::<Vec<_>>().join(", ")
    };
    let large = list(&mut files.iter().filter(|(_, bytes)| *bytes > MAX_FILE_BYTES as u64));
    if !large.is_empty() {
        bail!(
            "too large to be published: {large}; expected at most {} MiB a file",
            mebibytes(MAX_FILE_BYTES as u64)
        );
    }
    let all = files.iter().map(|(_, bytes)| bytes).sum();
    if all > MAX_BYTES {
        bail!(
            "too large to be published: {} MiB together ({}); expected at most {} MiB: publish fewer rows (--only, --seeds)",
            mebibytes(all),
            list(&mut files.iter()),
            mebibytes(MAX_BYTES)
        );
    }
    Ok(())
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// Evaluates every published network next to the results in a folder, and prints the published and
/// the measured figures.
///
/// # Errors
/// If a figure is not reproduced, or if there is no network.
pub(crate) fn verify(results: &Path, wanted: &str) -> Result<()> {
    let networks = results.join(results::PUBLISHED);
    let profiles = if networks.is_dir() { entries(&networks, Path::is_dir)? } else { Vec::new() };
    let tables = rows_of_tables(results)?;
    let (mut lines, mut wrong) = (Vec::new(), 0);
    for profile in profiles {
        let place = networks.join(&profile);
        let Some(folder) = Folder::read(&place)? else { continue };
        let settings = Profile::read(&place.join(PROFILE))?;
        let data = session::load(wanted, &settings.data, &mut Display::new())?;
        if let Some(row) = folder.rows().first()
            && folder.rows().iter().all(|row| row.dataset != data.name())
        {
            bail!(
                "the networks in {} were measured on {}, but {} from {} was found: name the images with --data",
                place.display(),
                row.dataset,
                data.name(),
                data.source()
            );
        }
        for row in folder.rows() {
            let (found, mut problems) = match folder.examine(row, &*data) {
                Ok(Examined { found, problems }) => (Some(found), problems),
                Err(error) => (None, vec![one_line(&error)]),
            };
            let of_it = tables.iter().filter(|of| of.settings_hash == row.key);
            let others = of_it.filter(|of| (of.top1_percent, of.macs) != (row.top1_percent, row.macs));
            let others: BTreeSet<&str> = others.map(|of| of.table.as_str()).collect();
            problems.extend(others.iter().map(|table| format!("{table} says another figure")));
            wrong += usize::from(!problems.is_empty());
            let [top1, loss] = found.map_or_else(
                || ["–", "–"].map(String::from),
                |found| [format!("{:.2}", found.top1_percent), format!("{:.6}", found.loss)],
            );
            let said = match problems.is_empty() {
                true => "the same".into(),
                false => format!("WRONG: {}", problems.join("; ")),
            };
            output::tell(&format!("{profile}/{}: {said}", row.file));
            lines.push(vec![
                format!("{profile}/{}", row.file),
                format!("{:.2}", row.top1_percent),
                top1,
                format!("{:.6}", row.loss),
                loss,
                said,
            ]);
        }
    }
    if lines.is_empty() {
        bail!("{} holds no published networks", networks.display());
    }
    let heading = ["network", "published top-1, %", "measured, %", "published loss", "measured", ""];
    output::print(text::table(&heading, &lines).trim_end());
    if wrong > 0 {
        bail!("{wrong} of {} published networks do not match what was published", lines.len());
    }
    output::print(&format!("{} published networks evaluated, every figure found again.", lines.len()));
    Ok(())
}

/// Reads the rows of all tables in a folder of results.
fn rows_of_tables(results: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in entries(results, Path::is_dir)? {
        let folder = results.join(&name);
        for profile in entries(&folder, Path::is_dir)? {
            let path = folder.join(profile).join(format!("{name}.csv"));
            if name != results::PUBLISHED && path.is_file() {
                rows.extend(report::read_csv(&path)?);
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_is_named() {
        let mebibyte = 1 << 20;
        check_sizes(&[("a", 16 * mebibyte), ("b", 0)]).unwrap();
        check_sizes(&[("a", 16 * mebibyte); 6]).unwrap();
        let error =
            check_sizes(&[("a", 16 * mebibyte), ("b", 16 * mebibyte + 1), ("c", 1)]).unwrap_err().to_string();
        assert!(error.contains(": b 16.0 MiB;") && error.contains("at most 16.0 MiB a file"), "{error}");
        let error = check_sizes(&[("a", 14 * mebibyte); 7]).unwrap_err().to_string();
        assert!(error.contains("98.0 MiB together (a 14.0 MiB, ") && error.contains("96.0"), "{error}");
    }
}
