//! Running a table: profile and flags → stages → rows → files.

use crate::flags::{Flags, Only, TIME_LIMIT};
use crate::profile::{ModelName, Profile};
use crate::progress::{Display, duration};
use crate::{device, process};
use anyhow::{Result, bail};
use clap::Parser;
use datasets::{Dataset, Source};
use quant_core::Precision;
use report::{Paper, Row};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use train::TimeLimit;
use workflow::{Context, Kind, Outcome, Planned, Provenance, Recipe, Stage, Store};

/// A table of the paper, or one of our own like it: which workflows stand in its columns, for which models
/// and bits.
pub struct Table {
    /// Its name, e.g. `table3`; names the results' folder and files.
    pub name: &'static str,
    /// Heading of the written table.
    pub title: &'static str,
    /// Models, in the paper's order.
    pub models: &'static [ModelName],
    /// Bits of activations and weights; 32 is float.
    pub bits: &'static [(u32, u32)],
    /// The compared methods, the paper's own last.
    pub methods: &'static [Method],
    /// Whether settings are chosen by it: then it is made on training images held out for that, and the test
    /// set is not touched.
    pub chooses: bool,
}

/// A column of a table.
pub struct Method {
    /// Its name in the paper's CSV files and ours.
    pub name: &'static str,
    /// The workflow that it stands for, on a pre-trained network.
    pub workflow: fn(&Recipe, &Arc<Stage>) -> Arc<Stage>,
}

/// One result to be had: a row of the CSV file.
pub struct Cell {
    /// The model.
    pub model: ModelName,
    /// Bits of activations and weights.
    pub bits: (u32, u32),
    /// The method's name.
    pub method: &'static str,
    /// Seed of the fine-tuning.
    pub seed: u64,
    /// The stage whose network the row is about.
    pub stage: Arc<Stage>,
}

/// Training throughput that a plan assumes before any stage has been measured, in multiply–accumulates
/// of the forward pass a second; measured on two cores of a 2.6 GHz server processor.
const ASSUMED_MACS_PER_SECOND: f64 = 1e10;

/// Runs the binary of one or more tables: parses the flags, runs what is missing, writes the results.
pub fn main(tables: &[&Table]) -> Result<()> {
    let flags = Flags::parse();
    let mut done = true;
    process::run(|| {
        done = run(tables, &flags)?;
        Ok(())
    })?;
    if !done {
        std::process::exit(TIME_LIMIT);
    }
    Ok(())
}

/// Whether all is done: not if the time limit ended it.
fn run(tables: &[&Table], flags: &Flags) -> Result<bool> {
    let limit = flags.time_limit.map(TimeLimit::after);
    let (device, device_name) = device::open(&flags.device)?;
    let mut profile = match &flags.config {
        Some(path) => Profile::read(path)?,
        None => Profile::named(flags.profile(&device))?,
    };
    let mut display = Display::new();
    if tables.iter().any(|table| table.chooses) {
        profile.data.hold_out.get_or_insert(HOLD_OUT);
    }
    let data = load(&flags.data, &profile, &mut display)?;
    let only = Only::parse(&flags.only, &names(tables, Table::models), &names(tables, Table::methods))?;
    let seeds = flags.seeds.as_deref().unwrap_or(&profile.seeds);
    let cells = tables
        .iter()
        .map(|table| table.cells(&profile, seeds, data.classes))
        .collect::<Result<Vec<Vec<Cell>>>>()?;
    let picked: Vec<&Cell> =
        cells.iter().flatten().filter(|c| only.picks(c.model.version().name(), c.bits, c.method)).collect();
    if picked.is_empty() {
        bail!(
            "--only {} picks no row of {}",
            flags.only.join(","),
            names(tables, |t| vec![t.name]).join(", ")
        );
    }
    let store = Store::new(&flags.store);
    let store = match limit {
        Some(limit) => store.within(limit),
        None => store,
    };
    let ends: Vec<Arc<Stage>> = picked.iter().map(|c| c.stage.clone()).collect();
    if flags.plan {
        show_plan(&store.plan(&ends, &data.fingerprint)?, &data)?;
        return Ok(true);
    }
    let provenance =
        Provenance { command: command_line(), git_commit: env!("PFQ_COMMIT").into(), device: device_name };
    let context = Context { data: &data, device: &device, provenance: &provenance };
    let mut done = true;
    for cell in &picked {
        match store.run(&cell.stage, &context, &mut |event| display.stage(event)) {
            Err(error) if error.is_time_limit() => {
                display.clear();
                display.line(&format!("{:#}", anyhow::Error::from(error)));
                done = false;
                break;
            }
            result => result?,
        };
    }
    for (table, cells) in tables.iter().zip(&cells) {
        let folder = flags.out.join(table.name).join(&profile.name);
        if let Some(text) = table.write(&profile, cells, &store, &data, &provenance, &folder)? {
            println!("{text}");
            println!("Written to {}.", folder.display());
        }
    }
    if !done {
        println!(
            "The time limit is over and stages are left: run the same command again to go on (--plan shows them)."
        );
    }
    Ok(done)
}

/// Training images that stand in for the test set where a table chooses settings.
const HOLD_OUT: usize = 5000;

/// What tables name, each once.
fn names(tables: &[&Table], f: impl Fn(&Table) -> Vec<&'static str>) -> Vec<&'static str> {
    let mut names: Vec<&str> = Vec::new();
    for name in tables.iter().flat_map(|table| f(table)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Loads the data and takes the part that the profile asks for.
pub(crate) fn load(wanted: &str, profile: &Profile, display: &mut Display) -> Result<Arc<Dataset>> {
    let source: Source = wanted.parse().unwrap_or_else(|never| match never {});
    let mut data = datasets::load(&source, &mut |event| display.data(&event))?;
    display.clear();
    if let Some(images) = profile.data.hold_out {
        data = data.hold_out(images, 0)?;
        // A figure on held-out training images must not pass for one on the test set.
        data.name += "_holdout";
    }
    // The synthetic set is smaller than CIFAR-100: all of it, where a profile asks for more.
    let at_most = |wanted: Option<usize>, there: usize| wanted.filter(|&n| n < there);
    let (train, test) = (
        at_most(profile.data.train_images, data.train.len()),
        at_most(profile.data.test_images, data.test.len()),
    );
    let data = data.limit(train, test)?;
    let Dataset { name, source, train, test, .. } = &data;
    display.line(&format!(
        "data: {name} from {source}: {} training, {} test images",
        train.len(),
        test.len()
    ));
    Ok(Arc::new(data))
}

/// The command that runs this program as it was called.
pub(crate) fn command_line() -> String {
    let mut words: Vec<String> = std::env::args().collect();
    let program = words.first().map(Path::new).and_then(Path::file_name).map(|name| name.to_string_lossy());
    let program = program.unwrap_or_default().into_owned();
    words.splice(..1.min(words.len()), ["cargo run --release --bin".into(), program, "--".into()]);
    words.join(" ").trim_end_matches(" --").into()
}

impl Table {
    fn models(&self) -> Vec<&'static str> {
        self.models.iter().map(|model| model.version().name()).collect()
    }

    fn methods(&self) -> Vec<&'static str> {
        self.methods.iter().map(|method| method.name).collect()
    }

    /// Every cell of the table, in the paper's order, for every seed.
    pub fn cells(&self, profile: &Profile, seeds: &[u64], classes: usize) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        for &model in self.models {
            let network = profile.network(model, classes)?;
            for &bits in self.bits {
                let (a, w) = (Precision::try_from(bits.0)?, Precision::try_from(bits.1)?);
                for method in self.methods {
                    for &seed in seeds {
                        let pretrained = Stage::root(Kind::Pretrain {
                            network,
                            training: profile.training.pretraining,
                            seed: profile.pretraining_seed.unwrap_or(seed),
                        });
                        let stage = (method.workflow)(&profile.recipe(a, w, seed), &pretrained);
                        cells.push(Cell { model, bits, method: method.name, seed, stage });
                    }
                }
            }
        }
        Ok(cells)
    }

    /// Writes CSV, Markdown, plots, the settings and every stage's outcome to `folder`, from those
    /// cells that have been run; gives the table as text. `None`, and nothing written, where none has.
    fn write(
        &self,
        profile: &Profile,
        cells: &[Cell],
        store: &Store,
        data: &Dataset,
        provenance: &Provenance,
        folder: &Path,
    ) -> Result<Option<String>> {
        let ends: Vec<Arc<Stage>> = cells.iter().map(|cell| cell.stage.clone()).collect();
        let plan = store.plan(&ends, &data.fingerprint)?;
        let done: BTreeMap<&str, &Outcome> =
            plan.iter().filter_map(|p| Some((p.key.as_str(), p.outcome.as_ref()?))).collect();
        let mut rows = Vec::new();
        let mut outcomes: BTreeMap<&str, &Outcome> = BTreeMap::new();
        for cell in cells {
            let keys = cell.stage.lineage().into_iter().map(|stage| stage.key(&data.fingerprint));
            let lineage: Vec<&Outcome> = keys.filter_map(|key| done.get(key.as_str()).copied()).collect();
            // A cell that `--only` left out, now or in earlier runs, is not in the table.
            if lineage.last().is_some_and(|end| end.key == cell.stage.key(&data.fingerprint)) {
                rows.push(self.row(profile, cell, &lineage, data)?.compare(Paper::published()));
                outcomes.extend(lineage.into_iter().map(|outcome| (outcome.key.as_str(), outcome)));
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let context = report::Context {
            title: self.title.into(),
            command: provenance.command.clone(),
            profile: profile.name.clone(),
            dataset: data.name.clone(),
            notes: notes(&rows, outcomes.values().copied()),
            provenance: vec![
                (
                    "Data".into(),
                    format!(
                        "{} ({} training, {} test images)",
                        data.source,
                        data.train.len(),
                        data.test.len()
                    ),
                ),
                ("Settings".into(), "`profile.toml`, every stage with its metrics in `stages.json`".into()),
            ],
        };
        let path = |extension: &str| folder.join(format!("{}.{extension}", self.name));
        report::write_csv(&rows, &path("csv"))?;
        report::write_text(&report::markdown(&rows, &context), &path("md"))?;
        report::plot(&rows, &context, &path("svg"), &path("png"))?;
        report::write_text(&toml::to_string(profile)?, &folder.join("profile.toml"))?;
        let stages: Vec<&Outcome> = outcomes.into_values().collect();
        report::write_text(&serde_json::to_string_pretty(&stages)?, &folder.join("stages.json"))?;
        Ok(Some(report::terminal(&rows, &context)))
    }

    fn row(&self, profile: &Profile, cell: &Cell, lineage: &[&Outcome], data: &Dataset) -> Result<Row> {
        let (Some(first), Some(last)) = (lineage.first(), lineage.last()) else {
            bail!("a workflow without stages: {}", cell.method);
        };
        Ok(Row {
            table: self.name.into(),
            profile: profile.name.clone(),
            dataset: data.name.clone(),
            model: cell.model.version().name().into(),
            width: profile.network(cell.model, data.classes)?.width,
            activation_bits: cell.bits.0,
            weight_bits: cell.bits.1,
            method: cell.method.into(),
            seed: cell.seed,
            top1_percent: last.evaluation.top1_percent,
            macs: last.macs,
            weights_pruned_percent: 100.0 * (1.0 - last.weights as f64 / first.weights as f64),
            float_top1_percent: first.evaluation.top1_percent,
            paper_top1_percent: None,
            paper_mac_millions: None,
            top1_minus_paper: None,
            settings_hash: last.key.clone(),
            git_commit: last.provenance.git_commit.clone(),
            device: last.provenance.device.clone(),
            wall_seconds: lineage.iter().map(|outcome| outcome.seconds).sum(),
        })
    }
}

/// What a reader of the table should know: the float networks it began from, and what pruning did.
fn notes<'a>(rows: &[Row], outcomes: impl Iterator<Item = &'a Outcome>) -> Vec<String> {
    let mut notes = Vec::new();
    let mut models: Vec<(&str, f64)> =
        rows.iter().map(|r| (r.model.as_str(), r.float_top1_percent)).collect();
    models.dedup();
    for (model, top1) in models {
        notes.push(format!("{model} in float, before pruning and quantization: top-1 {top1:.2} %."));
    }
    for outcome in outcomes {
        let report = outcome.report.clone().and_then(|r| serde_json::from_value::<pfq::Report>(r).ok());
        if let Some(report) = report {
            let sum = |f: fn(&pfq::LayerReport) -> usize| report.layers.iter().map(f).sum::<usize>();
            notes.push(format!(
                "{} (stage {}): {} of {} filters have a running variance below τ = {:.0e}; {} filters removed, \
                 weights {} → {}, MACs {:.2} M → {:.2} M, top-1 right after it {:.2} %.",
                outcome.label,
                outcome.key,
                sum(|l| l.low),
                sum(|l| l.filters),
                report.threshold,
                sum(|l| l.removed),
                report.weights_before,
                report.weights_after,
                report.macs_before as f64 / 1e6,
                report.macs_after as f64 / 1e6,
                outcome.evaluation.top1_percent,
            ));
        }
    }
    notes
}

/// Prints a plan: what is done, what is to do, and an estimate of how long that takes.
pub(crate) fn show_plan(plan: &[Planned], data: &Dataset) -> Result<()> {
    // Multiply–accumulates of the forward passes that an epoch needs, evaluation counted in.
    let epoch_work = |macs: u64| macs as f64 * (data.train.len() as f64 + data.test.len() as f64 / 3.0);
    let (mut work, mut seconds) = (0.0, 0.0);
    for outcome in plan.iter().filter_map(|p| p.outcome.as_ref()) {
        work += epoch_work(outcome.macs) * outcome.metrics.len() as f64;
        seconds += outcome.metrics.iter().map(|m| m.seconds).sum::<f64>();
    }
    let (rate, basis) = if seconds > 0.0 {
        (work / seconds, "the speed of the stages that are done")
    } else {
        (ASSUMED_MACS_PER_SECOND, "an assumed speed, as nothing has been measured yet")
    };
    let mut left = 0.0;
    for planned in plan {
        let label = planned.stage.label();
        let status = match (&planned.outcome, planned.stage.training()) {
            (Some(outcome), _) => {
                format!(
                    "done: top-1 {:.2} %, took {}",
                    outcome.evaluation.top1_percent,
                    duration(outcome.seconds)
                )
            }
            (None, None) => "to do: seconds".into(),
            (None, Some(training)) => {
                // Pruning makes later stages cheaper; how much is not known before.
                let Kind::Pretrain { network, .. } = &planned.stage.origin().kind else {
                    bail!("stage {label} does not begin with pre-training");
                };
                let epochs = training.epochs().saturating_sub(planned.epochs_done);
                let estimate = epoch_work(network.macs()?) * epochs as f64 / rate;
                left += estimate;
                let begun = if planned.epochs_done > 0 { "begun" } else { "to do" };
                format!("{begun}: {epochs} epochs, about {}", duration(estimate))
            }
        };
        println!("{}  {label:<48} {status}", planned.key);
    }
    let done = plan.iter().filter(|p| p.outcome.is_some()).count();
    println!("{done} of {} stages done; about {} left (from {basis}).", plan.len(), duration(left));
    Ok(())
}
