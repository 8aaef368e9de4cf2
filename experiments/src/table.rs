//! Running a table: profile and flags → stages → rows → files.

use crate::flags::{Flags, Only};
use crate::profile::ModelName;
use crate::session::{self, Done, Session};
use crate::{figure3, output, tables};
use anyhow::{Context as _, Result, bail};
use clap::Parser;
use quant_core::Precision;
use report::{Paper, Row};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use workflow::{Outcome, Recipe, Stage};

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
    pub workflow: fn(&Recipe, &Arc<Stage>) -> workflow::Result<Arc<Stage>>,
}

/// One result to be had: a row of the CSV file.
pub struct RowPlan {
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

/// The file of the settings in a folder of results.
pub(crate) const PROFILE: &str = "profile.toml";

/// Runs the binary of one or more tables: parses the flags, runs what is missing, writes the results.
pub fn main(tables: &[&Table]) -> Result<()> {
    let flags = Flags::parse();
    let only = only(tables, &flags)?;
    let chooses = tables.iter().any(|table| table.chooses);
    session::main(&flags, chooses, |session| run(tables, &only, session, &flags))
}

/// Runs the binary of every table and Figure 3, which have their stages in common.
pub fn all() -> Result<()> {
    let flags = Flags::parse();
    let only = only(&tables::ALL, &flags)?;
    session::main(&flags, false, |session| {
        let done = run(&tables::ALL, &only, session, &flags)?;
        // `--only` picks rows of tables, and the figure begins with stages that a plan of all tables has.
        if done == Done::InTime || flags.plan || flags.stage.is_some() || !flags.only.is_empty() {
            return Ok(done);
        }
        figure3::run(&figure3::subjects(&flags)?, session, &flags)
    })
}

/// Which rows `--only` picks: some of those that the tables have.
fn only(tables: &[&Table], flags: &Flags) -> Result<Only> {
    let of = |f: fn(&Table) -> Vec<&'static str>| names(tables, f);
    let titles = of(|table| vec![table.name]);
    let only = Only::parse(&flags.only, &of(Table::models), &of(Table::methods), &titles)?;
    let picked = |table: &&Table| {
        let row = |(model, bits, method): (ModelName, (u32, u32), &Method)| {
            only.picks(table.name, model.version().name(), bits, method.name)
        };
        table.combinations().into_iter().any(row)
    };
    if !tables.iter().any(picked) {
        bail!("--only {} picks no row of {}", flags.only.join(","), titles.join(", "));
    }
    Ok(only)
}

/// Runs what is missing of the tables and writes them.
fn run(tables: &[&Table], only: &Only, session: &mut Session, flags: &Flags) -> Result<Done> {
    let tables: Vec<&Table> = tables.iter().copied().filter(|table| only.picks_table(table.name)).collect();
    let rows = tables.iter().map(|table| table.rows(session)).collect::<Result<Vec<Vec<RowPlan>>>>()?;
    let picked: Vec<&RowPlan> = tables
        .iter()
        .zip(&rows)
        .flat_map(|(table, rows)| rows.iter().map(|row| (table.name, row)))
        .filter(|(table, row)| only.picks(table, row.model.version().name(), row.bits, row.method))
        .map(|(_, row)| row)
        .collect();
    let ends: Vec<Arc<Stage>> = picked.iter().map(|row| row.stage.clone()).collect();
    let title = if let [table] = tables[..] { table.name } else { "tables" };
    if let Some(done) = session.part(&ends, title, flags)? {
        return Ok(done);
    }
    for table in &tables {
        session.claim(table.name)?;
    }
    let mut done = Done::All;
    // A finished stage needs those before it no more, but the table does.
    for stage in picked.iter().flat_map(|row| row.stage.lineage()) {
        if session.run(&stage)?.is_none() {
            done = Done::InTime;
            break;
        }
    }
    session.tell_skipped();
    for (table, rows) in tables.iter().zip(&rows) {
        let folder = session.folder(table.name);
        if let Some(text) = table.write(session, rows, &folder)? {
            output::print(&format!("{text}\nWritten to {}.", folder.display()));
        }
    }
    Ok(done)
}

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

impl Table {
    fn models(&self) -> Vec<&'static str> {
        self.models.iter().map(|model| model.version().name()).collect()
    }

    fn methods(&self) -> Vec<&'static str> {
        self.methods.iter().map(|method| method.name).collect()
    }

    /// Every model with all bits and methods, in the paper's order.
    fn combinations(&self) -> Vec<(ModelName, (u32, u32), &'static Method)> {
        let mut all = Vec::new();
        for &model in self.models {
            for &bits in self.bits {
                all.extend(self.methods.iter().map(|method| (model, bits, method)));
            }
        }
        all
    }

    /// Every row of the table, in the paper's order, for every seed.
    fn rows(&self, session: &Session) -> Result<Vec<RowPlan>> {
        let mut rows = Vec::new();
        for (model, bits, method) in self.combinations() {
            let (a, w) = (Precision::try_from(bits.0)?, Precision::try_from(bits.1)?);
            for &seed in &session.seeds {
                let recipe = session.profile.recipe(a, w, seed);
                let stage = (method.workflow)(&recipe, &session.pretraining(model, seed)?)?;
                rows.push(RowPlan { model, bits, method: method.name, seed, stage });
            }
        }
        Ok(rows)
    }

    /// Writes CSV, Markdown, plots, the settings and every stage's outcome to `folder`, from those
    /// rows that have been run; gives the table as text. `None`, and nothing written, where none has.
    fn write(&self, session: &Session, plans: &[RowPlan], folder: &Path) -> Result<Option<String>> {
        let Session { profile, data, provenance, .. } = session;
        let ends: Vec<Arc<Stage>> = plans.iter().map(|row| row.stage.clone()).collect();
        let plan = session.plan(&ends)?;
        let done: BTreeMap<&str, &Outcome> =
            plan.iter().filter_map(|p| Some((p.key.as_str(), p.outcome.as_ref()?))).collect();
        let mut rows = Vec::new();
        let mut outcomes: Vec<&Outcome> = Vec::new();
        for planned in plans {
            let lineage = planned.stage.lineage();
            let keys = lineage.iter().map(|stage| stage.key(data.fingerprint()));
            let keys = keys.collect::<workflow::Result<Vec<String>>>()?;
            // A row that `--only` left out, now or in earlier runs, is not in the table.
            if keys.last().is_none_or(|key| !done.contains_key(key.as_str())) {
                continue;
            }
            let find = |(stage, key): (&Arc<Stage>, &String)| {
                done.get(key.as_str()).copied().with_context(|| {
                    format!(
                        "stage {} ({key}) is missing from the store, and {} was made from it: run the table again without \
                         --only to make it anew",
                        stage.label(),
                        planned.stage.label()
                    )
                })
            };
            let lineage = lineage.iter().zip(&keys).map(find).collect::<Result<Vec<&Outcome>>>()?;
            rows.push(self.row(session, planned, &lineage)?.compare(Paper::published()));
            for outcome in lineage {
                if !outcomes.iter().any(|known| known.key == outcome.key) {
                    outcomes.push(outcome);
                }
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let about = report::About {
            title: self.title.into(),
            command: provenance.command.clone(),
            profile: profile.name.clone(),
            dataset: data.name().into(),
            notes: notes(&rows, &outcomes),
            provenance: vec![
                (
                    "Data".into(),
                    format!(
                        "{} ({} training, {} test images)",
                        data.source(),
                        data.train_images(),
                        data.test_images()
                    ),
                ),
                ("Settings".into(), "`profile.toml`, every stage with its metrics in `stages.json`".into()),
            ],
        };
        let names = ["csv", "md", "svg", "png"].map(|extension| format!("{}.{extension}", self.name));
        let [csv, markdown, svg, png] = names.each_ref().map(|name| folder.join(name));
        report::write_csv(&rows, &csv)?;
        report::write_text(&report::markdown(&rows, &about), &markdown)?;
        report::plot(&rows, &about, &svg, &png)?;
        report::write_text(&toml::to_string(profile)?, &folder.join(PROFILE))?;
        let names: Vec<String> = names.into_iter().chain([PROFILE.into()]).collect();
        report::write_stages(&outcomes, folder, &names)?;
        Ok(Some(report::terminal(&rows, &about)))
    }

    fn row(&self, session: &Session, planned: &RowPlan, lineage: &[&Outcome]) -> Result<Row> {
        let Session { profile, data, .. } = session;
        let (Some(first), Some(last)) = (lineage.first(), lineage.last()) else {
            bail!("a workflow without stages: {}", planned.method);
        };
        Ok(Row {
            table: self.name.into(),
            profile: profile.name.clone(),
            dataset: data.name().into(),
            model: planned.model.version().name().into(),
            width: profile.network(planned.model, data.classes())?.width,
            activation_bits: planned.bits.0,
            weight_bits: planned.bits.1,
            method: planned.method.into(),
            seed: planned.seed,
            batch: planned.stage.lineage().iter().rev().find_map(|stage| Some(stage.training()?.batch)),
            top1_percent: last.evaluation.top1_percent,
            macs: last.macs,
            weights_pruned_percent: report::pruned_percent(first.weights, last.weights),
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
fn notes(rows: &[Row], outcomes: &[&Outcome]) -> Vec<String> {
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
