//! Reading published networks, which are used for stages that a store lacks and evaluated again.

use crate::profile::{DataSettings, Profile};
use crate::results::{PROFILE, outcomes};
use anyhow::{Result, bail};
use candle_core::Device;
use datasets::Dataset;
use models::Network;
use report::{NETWORKS, NetworkRow, STAGES};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use train::{Arithmetic, Evaluation};
use workflow::{Outcome, Published};

/// The relative tolerance of a published loss, because another device adds up sums in another
/// order.
const TOLERANCE: f64 = 1e-4;

/// Returns whether figures are found again, to the last digit of top-1.
pub(crate) fn agree(found: Evaluation, expected: Evaluation) -> bool {
    found.top1_percent == expected.top1_percent
        && (found.loss - expected.loss).abs() <= TOLERANCE * expected.loss.abs()
}

/// A folder of published networks.
pub(crate) struct Folder {
    place: PathBuf,
    rows: Vec<NetworkRow>,
    outcomes: Vec<Outcome>,
}

impl Folder {
    /// Reads the lists in a folder of published networks, but not the networks; `None` if it holds
    /// none.
    pub fn read(place: &Path) -> Result<Option<Self>> {
        if !place.join(NETWORKS).is_file() {
            return Ok(None);
        }
        let outcomes = outcomes(place)?;
        Ok(Some(Self { place: place.into(), rows: report::read_networks(place)?, outcomes }))
    }

    /// Returns the list of the networks.
    pub fn rows(&self) -> &[NetworkRow] {
        &self.rows
    }

    /// Returns the networks for use by a store.
    ///
    /// # Errors
    /// If the list of networks and the stages contradict each other.
    pub fn published(self) -> Result<Published> {
        let mut networks = BTreeMap::new();
        for row in &self.rows {
            self.outcome(row)?;
            networks.insert(row.key.clone(), self.place.join(&row.file));
        }
        Ok(Published::new(self.outcomes, networks)?)
    }

    /// Returns the outcome of the stage that a row names; an error if they contradict each other.
    fn outcome(&self, row: &NetworkRow) -> Result<&Outcome> {
        let path = self.place.join(&row.file);
        let path = path.display();
        let Some(outcome) = self.outcomes.iter().find(|outcome| outcome.key == row.key) else {
            bail!("{path}: {NETWORKS} names stage {}: expected one of those in {STAGES}", row.key);
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
                    "{path}: {NETWORKS} says {what} = {said}, but stage {} in {STAGES} has {expected}",
                    row.key
                );
            }
        }
        Ok(outcome)
    }

    /// Checks a network's file, evaluates the network as its stage did, and compares the figures.
    ///
    /// # Errors
    /// If it can't be evaluated, because it is not what was published or the data differ.
    pub fn examine(&self, row: &NetworkRow, data: &dyn Dataset) -> Result<Examined> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.key == row.key);
        let arithmetic = outcome.map_or(Arithmetic::F32, Outcome::arithmetic);
        if let Some(outcome) = outcome
            && outcome.data.fingerprint != data.fingerprint()
        {
            bail!(
                "{} from {} is not the data of the network's stage: expected {}",
                data.name(),
                data.source(),
                outcome.data.source
            );
        }
        let (network, _) = Network::load_verified(&self.place.join(&row.file), &row.sha256, &Device::Cpu)?;
        let found = train::evaluate_in(&network, data, arithmetic)?;
        let mut problems = Vec::new();
        if !agree(found, Evaluation { loss: row.loss, top1_percent: row.top1_percent }) {
            let processors = match (arithmetic, outcome) {
                (Arithmetic::Bf16, Some(outcome)) => {
                    format!(
                        " (the published ones were found in bf16 on {}; other processors round differently)",
                        outcome.provenance.device
                    )
                }
                _ => String::new(),
            };
            problems.push(format!("the figures differ{processors}"));
        }
        if (network.macs(), network.weights()) != (row.macs, row.weights) {
            problems.push(format!(
                "the network has {} MACs and {} weights",
                network.macs(),
                network.weights()
            ));
        }
        problems.extend(self.outcome(row).err().map(|error| error.to_string()));
        Ok(Examined { found, problems })
    }
}

/// The result of examining a published network.
pub(crate) struct Examined {
    /// The evaluation that was measured now.
    pub found: Evaluation,
    /// Everything that differs from what was published; empty if nothing does.
    pub problems: Vec<String>,
}

/// The file of a published network.
pub(crate) struct PublishedFile {
    folder: Folder,
    row: NetworkRow,
    settings: Profile,
}

impl PublishedFile {
    /// Finds a file in the list next to it; `None` if it is not listed.
    pub fn find(file: &Path) -> Result<Option<Self>> {
        let place = file.parent().unwrap_or(Path::new(""));
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let Some(folder) = Folder::read(place)? else { return Ok(None) };
        let Some(row) = folder.rows.iter().find(|row| row.file == name).cloned() else { return Ok(None) };
        Ok(Some(Self { folder, row, settings: Profile::read(&place.join(PROFILE))? }))
    }

    /// Returns which images its stage used.
    pub fn data(&self) -> &DataSettings {
        &self.settings.data
    }

    /// Returns whether its figures were measured on these images; an error if the lists beside it
    /// contradict each other.
    pub fn is_of(&self, data: &dyn Dataset) -> Result<bool> {
        Ok(self.folder.outcome(&self.row)?.data.fingerprint == data.fingerprint())
    }

    /// Returns the name of the data set of the published figures.
    pub fn dataset(&self) -> &str {
        &self.row.dataset
    }

    /// Evaluates the network; also returns a line that says whether the result is the published
    /// one.
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
