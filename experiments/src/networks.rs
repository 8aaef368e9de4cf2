//! Networks that are published beside the results, in `<results>/networks/<profile>/`: written from a store, taken for stages
//! that another store lacks, and evaluated again.
//!
//! Such a folder holds the networks as their stages wrote them, `networks.csv` that says what each is, the settings, and
//! `stages.json` with the outcomes of all stages that the networks come from.

use crate::process::one_line;
use crate::profile::{DataSettings, ModelName, Profile};
use crate::progress::Display;
use crate::session::{self, Session};
use crate::table::{self, PROFILE};
use crate::tool::text;
use crate::{output, report_page};
use anyhow::{Context as _, Result, bail};
use candle_core::Device;
use datasets::Dataset;
use models::{MAX_FILE_BYTES, Network};
use report::{NETWORKS, NetworkRow, Row, STAGES};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use train::{Arithmetic, Evaluation};
use whole_file::seal;
use workflow::{Outcome, Published, Stage};

/// The name of the results' folder in which each profile has one of its networks.
pub(crate) const FOLDER: &str = "networks";

/// The most bytes that the networks of a profile may have together: they are kept with the code.
const MAX_BYTES: u64 = 96 << 20;

/// How far a loss may be from the one that was said, as a part of it: sums are taken in another order on another device.
pub(crate) const TOLERANCE: f64 = 1e-4;

/// A network to be published.
pub(crate) struct Pick {
    /// Its file's name without the extension.
    pub name: String,
    /// [`NetworkRow::subject`].
    pub subject: String,
    /// [`NetworkRow::seed`].
    pub seed: u64,
    /// What was pre-trained.
    pub model: ModelName,
    /// The stage that gave it.
    pub stage: Arc<Stage>,
}

/// Copies networks of finished stages to the folder of the session's profile, from its store or, where it lacks one, from that
/// folder, in place of whatever else is published there; says what was written.
pub(crate) fn publish(picks: &[Pick], session: &Session) -> Result<String> {
    let fingerprint = session.data.fingerprint();
    let ends: Vec<Arc<Stage>> = picks.iter().map(|pick| pick.stage.clone()).collect();
    let plan = session.plan(&ends)?;
    let done = table::done(&plan);
    let (mut outcomes, mut rows, mut files) = (Vec::<&Outcome>::new(), Vec::<NetworkRow>::new(), Vec::new());
    for pick in picks {
        let lineage = table::line(&pick.stage, fingerprint, &done)?;
        for outcome in &lineage {
            if !outcomes.iter().any(|known| known.key == outcome.key) {
                outcomes.push(outcome);
            }
        }
        let outcome = *lineage.last().context("a workflow without stages")?;
        if rows.iter().any(|row| row.key == outcome.key) {
            continue;
        }
        let mut file = format!("{}.safetensors", pick.name);
        if rows.iter().any(|row| row.file == file) {
            // Alternatives may begin from networks of their own, which differ in their settings alone.
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
            subject: pick.subject.clone(),
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
                "{} has SHA-256 {found}, expected {} by its outcome: run the table again, which mends it (stages of older \
                 versions wrote no hash and are to be run anew)",
                path.display(),
                if row.sha256.is_empty() { "none" } else { &row.sha256 }
            );
        }
        // What is larger than a file may be lies in parts beside it.
        let parts = outcome.files.keys().filter(|name| name.starts_with("network.part-"));
        let parts = parts.map(|name| Ok(path.with_file_name(name).metadata()?.len()));
        let parts =
            parts.sum::<std::io::Result<u64>>().with_context(|| format!("parts of {}", path.display()))?;
        rows.push(NetworkRow { bytes: bytes.len() as u64 + parts, ..row });
        files.push(bytes);
    }
    if rows.is_empty() {
        bail!(
            "no row has been run whose network could be published: run the table first (--plan shows what is done)"
        );
    }
    let sizes: Vec<(&str, u64)> = rows.iter().map(|row| (row.file.as_str(), row.bytes)).collect();
    check_sizes(&sizes)?;
    session.claim(FOLDER)?;
    let folder = session.folder(FOLDER);
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
    said += &format!("{} networks, {} MiB. Written to {}.", rows.len(), mebibytes(all), folder.display());
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

/// A folder of published networks.
pub(crate) struct Folder {
    place: PathBuf,
    rows: Vec<NetworkRow>,
    outcomes: Vec<Outcome>,
}

impl Folder {
    /// Reads the lists of the networks, but none of these, in a folder; `None` where it holds none.
    pub fn read(place: &Path) -> Result<Option<Self>> {
        if !place.join(NETWORKS).is_file() {
            return Ok(None);
        }
        let outcomes = outcomes(place)?;
        Ok(Some(Self { place: place.into(), rows: report::read_networks(place)?, outcomes }))
    }

    /// The list.
    pub fn rows(&self) -> &[NetworkRow] {
        &self.rows
    }

    /// The networks, for a store.
    ///
    /// # Errors
    /// Where the list of networks and the stages contradict each other.
    pub fn published(self) -> Result<Published> {
        let mut networks = BTreeMap::new();
        for row in &self.rows {
            self.outcome(row)?;
            networks.insert(row.key.clone(), self.place.join(&row.file));
        }
        Ok(Published::new(self.outcomes, networks)?)
    }

    /// What the stage gave that a line of the list is of.
    fn outcome(&self, row: &NetworkRow) -> Result<&Outcome> {
        let path = self.place.join(&row.file);
        let path = path.display();
        let Some(outcome) = self.outcomes.iter().find(|outcome| outcome.key == row.key) else {
            bail!("{path}: its stage {} by {NETWORKS} is none of those in {STAGES}", row.key);
        };
        let Evaluation { loss, top1_percent } = outcome.evaluation;
        for (what, said, expected) in [
            ("sha256", &row.sha256, &outcome.network_hash().unwrap_or("none").to_string()),
            ("parent", &format!("{:?}", row.parent), &format!("{:?}", outcome.parent)),
            ("settings", &row.settings, &outcome.stage.to_string()),
            ("dataset", &row.dataset, &outcome.data.name),
            ("top1_percent", &row.top1_percent.to_string(), &top1_percent.to_string()),
            ("loss", &row.loss.to_string(), &loss.to_string()),
            ("macs", &row.macs.to_string(), &outcome.macs.to_string()),
            ("weights", &row.weights.to_string(), &outcome.weights.to_string()),
        ] {
            if said != expected {
                bail!(
                    "{path}: {NETWORKS} says {what} = {said}, and stage {} in {STAGES} {expected}",
                    row.key
                );
            }
        }
        Ok(outcome)
    }

    /// Checks the file of a network, evaluates it as its stage did, and compares.
    ///
    /// # Errors
    /// Where it can't be evaluated: it is not what was published, or the data are others.
    pub fn examine(&self, row: &NetworkRow, data: &dyn Dataset) -> Result<Examined> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.key == row.key);
        let arithmetic = outcome.map_or(Arithmetic::F32, Outcome::arithmetic);
        if let Some(outcome) = outcome
            && outcome.data.fingerprint != data.fingerprint()
        {
            bail!("{} from {} are other data than its {}", data.name(), data.source(), outcome.data.source);
        }
        let (network, _) = Network::load_verified(&self.place.join(&row.file), &row.sha256, &Device::Cpu)?;
        let found = train::evaluate_in(&network, data, arithmetic)?;
        let mut problems = Vec::new();
        let loss_differs = (found.loss - row.loss).abs() > TOLERANCE * row.loss.abs();
        if found.top1_percent != row.top1_percent || loss_differs {
            let processors = match (arithmetic, outcome) {
                (Arithmetic::Bf16, Some(outcome)) => {
                    format!(
                        " (it was found in bf16 on {}; other processors round otherwise)",
                        outcome.provenance.device
                    )
                }
                _ => String::new(),
            };
            problems.push(format!("the figures differ{processors}"));
        }
        if (network.macs(), network.weights()) != (row.macs, row.weights) {
            problems.push(format!("it has {} MACs and {} weights", network.macs(), network.weights()));
        }
        problems.extend(self.outcome(row).err().map(|error| error.to_string()));
        Ok(Examined { found, problems })
    }
}

/// What was found of a published network.
pub(crate) struct Examined {
    /// Its evaluation now.
    pub found: Evaluation,
    /// Whatever is not as it was said; nothing if all is.
    pub problems: Vec<String>,
}

/// The file of a published network.
pub(crate) struct PublishedFile {
    folder: Folder,
    row: NetworkRow,
    settings: Profile,
}

impl PublishedFile {
    /// The file, if the list beside it has it.
    pub fn find(file: &Path) -> Result<Option<Self>> {
        let place = file.parent().unwrap_or(Path::new(""));
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let Some(folder) = Folder::read(place)? else { return Ok(None) };
        let Some(row) = folder.rows.iter().find(|row| row.file == name).cloned() else { return Ok(None) };
        Ok(Some(Self { folder, row, settings: Profile::read(&place.join(PROFILE))? }))
    }

    /// Which images its stage took.
    pub fn data(&self) -> &DataSettings {
        &self.settings.data
    }

    /// Whether its figures are of these images.
    pub fn is_of(&self, data: &dyn Dataset) -> bool {
        self.folder.outcome(&self.row).is_ok_and(|outcome| outcome.data.fingerprint == data.fingerprint())
    }

    /// Its evaluation, and in words whether that is what was published.
    pub fn evaluate(&self, data: &dyn Dataset) -> Result<(Evaluation, String)> {
        let Self { folder, row, .. } = self;
        let Examined { found, problems } = folder.examine(row, data)?;
        let agrees = if problems.is_empty() { "the same".into() } else { problems.join("; ") };
        let NetworkRow { subject, top1_percent, loss, .. } = row;
        Ok((
            found,
            format!("published ({subject}) with top-1 {top1_percent:.2} %, loss {loss:.4}: {agrees}\n"),
        ))
    }
}

/// Evaluates every published network beside the results in a folder, and prints what was said and what was found.
///
/// # Errors
/// When a figure is not found again, and where there is no network.
pub(crate) fn verify(results: &Path, wanted: &str) -> Result<()> {
    let networks = results.join(FOLDER);
    let profiles =
        if networks.is_dir() { report_page::entries(&networks, Path::is_dir)? } else { Vec::new() };
    let tables = rows_of_tables(results)?;
    let (mut lines, mut wrong) = (Vec::new(), 0);
    for profile in profiles {
        let place = networks.join(&profile);
        let Some(folder) = Folder::read(&place)? else { continue };
        let settings = Profile::read(&place.join(PROFILE))?;
        let data = session::load(wanted, &settings.data, &mut Display::new())?;
        for row in &folder.rows {
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
            lines.push(vec![
                format!("{profile}/{}", row.file),
                format!("{:.2}", row.top1_percent),
                top1,
                format!("{:.6}", row.loss),
                loss,
                if problems.is_empty() {
                    "the same".into()
                } else {
                    format!("WRONG: {}", problems.join("; "))
                },
            ]);
        }
    }
    if lines.is_empty() {
        bail!("{} holds no published networks", networks.display());
    }
    let heading = ["network", "top-1 said, %", "found, %", "loss said", "found", ""];
    output::print(text::table(&heading, &lines).trim_end());
    if wrong > 0 {
        bail!("{wrong} of {} published networks are not as they were said to be", lines.len());
    }
    output::print(&format!("{} published networks evaluated, every figure found again.", lines.len()));
    Ok(())
}

/// The rows of all tables beside each other in a folder of results.
fn rows_of_tables(results: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in report_page::entries(results, Path::is_dir)? {
        let folder = results.join(&name);
        for profile in report_page::entries(&folder, Path::is_dir)? {
            let path = folder.join(profile).join(format!("{name}.csv"));
            if name != FOLDER && name != "bench" && path.is_file() {
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
