use crate::process::one_line;
use crate::profile::Profile;
use crate::progress::Display;
use crate::published::{Folder, agree};
use crate::{output, session};
use anyhow::{Result, bail};
use candle_core::Device;
use clap::Args;
use datasets::Dataset;
use models::Network;
use report::STAGES;
use std::path::{Path, PathBuf};
use workflow::{Checked, Finding, Outcome};

/// Checks every hash of a store or of results, and the chain from rows to stages to data
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Store of stages, such as runs, or folder of results
    #[arg(value_name = "STORE|RESULTS")]
    folder: PathBuf,

    /// Evaluate the networks of a store again, on the images that --profile or --config takes from
    /// WHERE
    #[arg(long, value_name = "WHERE")]
    data: Option<String>,

    /// Profile that selects the images
    #[arg(
        long,
        value_name = "NAME",
        default_value = "reduced",
        conflicts_with = "config",
        requires = "data"
    )]
    profile: String,

    /// Settings file instead of a profile
    #[arg(long, value_name = "FILE", requires = "data")]
    config: Option<PathBuf>,
}

/// The findings, as lines, and their numbers.
#[derive(Default)]
struct Report {
    text: String,
    checked: usize,
    wrong: usize,
    /// The number of networks that were evaluated again.
    evaluated: usize,
}

impl Report {
    fn stage(&mut self, outcome: &Outcome, folder: &Path, data: Option<&dyn Dataset>, files: String) {
        let found = match data {
            None => Ok(files),
            Some(data) if data.fingerprint() != outcome.data.fingerprint => {
                Ok(format!("{files}; not evaluated, as these are other data than its {}", outcome.data.name))
            }
            Some(data) => {
                self.evaluated += 1;
                evaluate(outcome, folder, data).map(|again| format!("{files}; {again}"))
            }
        };
        self.add(&outcome.label, found);
    }

    fn add(&mut self, what: &str, result: Result<String>) {
        self.checked += 1;
        match result {
            Ok(found) => self.text += &format!("ok     {what}: {found}\n"),
            Err(error) => {
                self.wrong += 1;
                self.text += &format!("WRONG  {what}: {}\n", one_line(&error));
            }
        }
    }
}

impl Verify {
    pub fn run(&self) -> Result<String> {
        let mut report = Report::default();
        if !self.folder.is_dir() {
            bail!("{} is not a folder: expected a store, such as runs, or results", self.folder.display());
        }
        let stages = workflow::verify(&self.folder)?;
        let outcomes = stages.iter().filter(|stage| stage.finding.outcome().is_some()).count();
        if self.data.is_some() && outcomes == 0 {
            bail!(
                "--data is for networks of a store, but {} has none: leave --data out; report --verify evaluates the \
                 published networks of results",
                self.folder.display()
            );
        }
        let data = self.data.as_ref().map(|wanted| self.load(wanted)).transpose()?;
        for Checked { folder, finding } in stages {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            match finding {
                Finding::Whole(outcome) => {
                    let files = report::counted(outcome.files.len() + 1, "file");
                    report.stage(&outcome, &folder, data.as_deref(), files);
                }
                Finding::Unhashed(outcome) => {
                    let files = "no hashes, because an older version wrote it".into();
                    report.stage(&outcome, &folder, data.as_deref(), files);
                }
                Finding::Unfinished => report.add(&name, Ok("unfinished, with a valid checkpoint".into())),
                Finding::Begun => {}
                Finding::Damaged(error) => report.add(&name, Err(error.into())),
            }
        }
        results(&self.folder, &mut report)?;
        let Report { text, checked, wrong, evaluated } = report;
        if checked == 0 {
            bail!("{} holds neither stages nor results", self.folder.display());
        }
        if wrong > 0 {
            output::print(text.trim_end());
            bail!("{wrong} of {checked} are wrong");
        }
        let again = match data {
            Some(_) => format!("; {evaluated} of {} evaluated again", report::counted(outcomes, "network")),
            None => String::new(),
        };
        Ok(format!("{text}{checked} checked, nothing wrong{again}\n"))
    }

    fn load(&self, wanted: &str) -> Result<Box<dyn Dataset>> {
        let profile = match &self.config {
            Some(path) => Profile::read(path)?,
            None => Profile::named(&self.profile)?,
        };
        session::load(wanted, &profile.data, &mut Display::new())
    }
}

/// Evaluates a stage's network again, on the data of its evaluation; returns the finding.
fn evaluate(outcome: &Outcome, folder: &Path, data: &dyn Dataset) -> Result<String> {
    let (network, _) = Network::load(&folder.join(workflow::NETWORK), &Device::Cpu)?;
    let now = train::evaluate_in(&network, data, outcome.arithmetic())?;
    let then = outcome.evaluation;
    if !agree(now, then) || (network.macs(), network.weights()) != (outcome.macs, outcome.weights) {
        bail!(
            "its network has loss {}, top-1 {} %, {} MACs and {} weights, but the outcome says loss {}, \
             top-1 {} %, {} MACs and {} weights",
            now.loss,
            now.top1_percent,
            network.macs(),
            network.weights(),
            then.loss,
            then.top1_percent,
            outcome.macs,
            outcome.weights
        );
    }
    let same = if now == then { "to the bit" } else { "up to the order of sums" };
    Ok(format!("loss {:.4} and top-1 {:.2} % again, {same}", now.loss, now.top1_percent))
}

/// Checks the results in a folder and in its subfolders.
fn results(folder: &Path, report: &mut Report) -> Result<()> {
    let name = folder.display().to_string();
    if folder.join(STAGES).is_file() {
        report.add(&name, check_results(folder));
    } else if let Some(table) = table(folder)? {
        let problem = format!("{} lacks its {STAGES}: run the table again", table.display());
        report.add(&name, Err(anyhow::Error::msg(problem)));
    }
    for name in crate::results::entries(folder, Path::is_dir)? {
        results(&folder.join(name), report)?;
    }
    Ok(())
}

/// Returns the rows' file, `<table>/<profile>/<table>.csv`, if the folder is one of a table.
fn table(folder: &Path) -> Result<Option<PathBuf>> {
    let folder = folder.canonicalize()?;
    let name = folder.parent().and_then(Path::file_name);
    Ok(name.map(|name| folder.join(name).with_extension("csv")).filter(|path| path.is_file()))
}

/// Checks the results of a table, or of a figure, which has no rows.
fn check_results(folder: &Path) -> Result<String> {
    let stages = report::read_stages(folder)?;
    stages.check_files(folder)?;
    let mut rows = 0;
    if let Some(networks) = Folder::read(folder)? {
        let count = networks.rows().len();
        networks.published()?;
        return Ok(format!(
            "{}; {}",
            report::counted(stages.files.len() + 1, "file"),
            report::counted(count, "published network")
        ));
    }
    if let Some(path) = table(folder)? {
        let read = report::read_csv(&path)?;
        stages.check_rows(&read).map_err(anyhow::Error::msg)?;
        rows = read.len();
    }
    let files = match stages.files.len() {
        0 => "no hashes, because an older version wrote it".into(),
        files => report::counted(files + 1, "file"),
    };
    let (rows, stages) = (report::counted(rows, "row"), report::counted(stages.records.len(), "stage"));
    Ok(format!("{files}; {rows} from {stages}"))
}
