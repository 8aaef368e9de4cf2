//! Running a table: profile and flags → stages → rows → files.

use crate::flags::{Flags, Only};
use crate::networks::{self, Pick};
use crate::output;
use crate::process::one_line;
use crate::profile::ModelName;
use crate::results::{self, PROFILE};
use crate::session::{self, Done, Session};
use crate::tables;
use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches};
use quant_core::Precision;
use report::{Paper, Row, STAGES};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use workflow::{Outcome, Recipe, Stage, StageKind};

/// A table of the paper, or one of our own like it: the workflows of its columns, and the models
/// and bits that they run for.
pub struct Table {
    /// The name, e.g. `table3`, which also names the results' folder and files.
    pub name: &'static str,
    /// The heading of the written table.
    pub title: &'static str,
    /// Models, in the paper's order.
    pub models: &'static [ModelName],
    /// Bits of activations and weights; 32 is float.
    pub bits: &'static [(u32, u32)],
    /// The compared methods; the last one is the paper's own.
    pub methods: &'static [Method],
    /// Whether the table serves to choose settings. If so, it is made on held-out training images,
    /// and the test set is not touched.
    pub chooses: bool,
}

/// A method, which is a column of a table.
pub struct Method {
    /// The name in the paper's CSV files and ours.
    pub name: &'static str,
    /// The workflow of the method on a pre-trained network.
    pub workflow: fn(&Recipe, &Arc<Stage>) -> workflow::Result<Arc<Stage>>,
}

/// A planned result, which becomes a row of the CSV file.
pub struct RowPlan {
    /// The model.
    pub model: ModelName,
    /// Bits of activations and weights.
    pub bits: (u32, u32),
    /// The method's name.
    pub method: &'static str,
    /// The seed of the fine-tuning.
    pub seed: u64,
    /// The stage whose network the row is about.
    pub stage: Arc<Stage>,
    /// The stage's key on the session's data.
    pub key: String,
}

/// Runs the binary of one or more tables: parses the flags, runs missing stages, writes the
/// results.
pub fn main(tables: &[&Table]) -> Result<()> {
    let flags = parse(tables);
    let only = only(tables, &flags)?;
    let chooses = tables.iter().any(|table| table.chooses);
    session::main(&flags, chooses, |session| run(tables, &only, session, &flags))
}

/// Parses the command line of the program for these tables. `--help` lists the tables and the rows
/// that `--only` can pick.
pub(crate) fn parse(tables: &[&Table]) -> Flags {
    let about = match tables {
        [table] => format!("Runs the stages of a table and writes it. {}", table.title),
        _ => "Runs the stages of several tables, which share them, and writes the tables".into(),
    };
    let titles: String = tables.iter().map(|table| format!("  {}: {}\n", table.name, table.title)).collect();
    let models = names(tables, Table::models).join(", ");
    let bits =
        |table: &Table| -> Vec<String> { table.bits.iter().map(|(a, w)| format!("a{a}w{w}")).collect() };
    let bits = names(tables, bits).join(", ");
    let rows = match tables {
        [table] => format!("Rows for --only: {models}; {bits}; {}", table.methods().join(", ")),
        _ => format!("Rows for --only: {models}; {bits}; the methods of a table; and the tables\n{titles}"),
    };
    let matches = Flags::command().about(about).after_help(rows).get_matches();
    Flags::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Returns the rows that `--only` picks; an error if the tables have no such row.
pub(crate) fn only(tables: &[&Table], flags: &Flags) -> Result<Only> {
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

/// Runs the missing stages of the tables and writes the tables.
pub(crate) fn run(tables: &[&Table], only: &Only, session: &mut Session, flags: &Flags) -> Result<Done> {
    let tables: Vec<&Table> = tables.iter().copied().filter(|table| only.picks_table(table.name)).collect();
    let rows = tables.iter().map(|table| table.rows(session)).collect::<Result<Vec<Vec<RowPlan>>>>()?;
    let picked: Vec<(&Table, Vec<&RowPlan>)> = tables
        .iter()
        .zip(&rows)
        .map(|(table, rows)| {
            let picks = |row: &&RowPlan| {
                session.seeds.contains(&row.seed)
                    && only.picks(table.name, row.model.version().name(), row.bits, row.method)
            };
            (*table, rows.iter().filter(picks).collect())
        })
        .collect();
    if flags.publish {
        output::print(&networks::publish(&to_publish(&picked, session)?, session)?);
        return Ok(Done::All);
    }
    let ends: Vec<Arc<Stage>> =
        picked.iter().flat_map(|(_, rows)| rows).map(|row| row.stage.clone()).collect();
    for (table, rows) in tables.iter().zip(&rows) {
        table.check_written(session, rows)?;
    }
    let title = if let [table] = tables[..] { table.name } else { "tables" };
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for (table, rows) in &picked {
        for row in rows {
            let name = match tables.len() {
                1 => row.method.to_string(),
                _ => format!("{}: {}", table.name, row.method),
            };
            let names = names.entry(row.key.clone()).or_default();
            *names += &format!("{}{name}", if names.is_empty() { "" } else { ", " });
        }
    }
    if !flags.draw
        && let Some(done) = session.part(&ends, &names, title, flags)?
    {
        return Ok(done);
    }
    for table in &tables {
        session.claim(table.name)?;
    }
    let done = if flags.draw { Done::All } else { session.run_all(&ends)? };
    session.tell_skipped();
    let mut drawn = false;
    for (table, rows) in tables.iter().zip(&rows) {
        let folder = session.folder(table.name);
        if let Some(text) = table.write(session, rows, &folder)? {
            output::print(&format!("{text}\nWritten to {}.", folder.display()));
            drawn = true;
        }
    }
    if flags.draw && !drawn {
        bail!("--draw found no row that has been run (--plan shows what is left)");
    }
    Ok(done)
}

/// Returns the networks of the picked rows, and those of other rows of any table that are already
/// published.
fn to_publish(picked: &[(&Table, Vec<&RowPlan>)], session: &Session) -> Result<Vec<Pick>> {
    let of = |rows: &[(&Table, Vec<&RowPlan>)]| -> Result<Vec<Pick>> {
        let picks = rows.iter().map(|(table, rows)| table.networks(rows, session));
        Ok(picks.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    };
    // A table that the profile has no settings for has no rows.
    let rows: Vec<(&Table, Vec<RowPlan>)> =
        tables::every().filter_map(|table| Some((table, table.rows(session).ok()?))).collect();
    let all: Vec<_> = rows.iter().map(|(table, rows)| (*table, rows.iter().collect())).collect();
    let picked = of(picked)?;
    let mut picks = of(&all)?;
    picks.retain(|pick| picked.iter().any(|of| of.stage == pick.stage) || session.is_published(&pick.stage));
    picks.extend(picked);
    Ok(picks)
}

/// Returns the names that `f` gives for the tables, each once.
fn names<T: PartialEq>(tables: &[&Table], f: impl Fn(&Table) -> Vec<T>) -> Vec<T> {
    let mut names: Vec<T> = Vec::new();
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

    /// Returns every model with all bits and methods, in the paper's order.
    fn combinations(&self) -> Vec<(ModelName, (u32, u32), &'static Method)> {
        let mut all = Vec::new();
        for &model in self.models {
            for &bits in self.bits {
                all.extend(self.methods.iter().map(|method| (model, bits, method)));
            }
        }
        all
    }

    /// Returns the path of the file with the rows.
    fn file(&self, session: &Session) -> PathBuf {
        session.folder(self.name).join(format!("{}.csv", self.name))
    }

    /// Returns every row of the table, in the paper's order, for every seed that the run or the
    /// profile has, or that the written table has from earlier runs.
    fn rows(&self, session: &Session) -> Result<Vec<RowPlan>> {
        let written = report::read_csv(&self.file(session)).unwrap_or_default();
        let seeds: BTreeSet<u64> = session
            .seeds
            .iter()
            .chain(&session.profile.seeds)
            .copied()
            .chain(written.iter().map(|row| row.seed))
            .collect();
        let mut rows = Vec::new();
        for (model, bits, method) in self.combinations() {
            let (a, w) = (Precision::try_from(bits.0)?, Precision::try_from(bits.1)?);
            for &seed in &seeds {
                let recipe = session.profile.recipe(a, w, seed);
                let stage = (method.workflow)(&recipe, &session.pretraining(model, seed)?)?;
                let key = stage.key(session.data.fingerprint())?;
                rows.push(RowPlan { model, bits, method: method.name, seed, stage, key });
            }
        }
        Ok(rows)
    }

    /// Checks that writing the table keeps all of its rows, before anything is run.
    fn check_written(&self, session: &Session, plans: &[RowPlan]) -> Result<()> {
        if session.folder(self.name).join(STAGES).is_file() && !report::is_synthetic(session.data.name()) {
            report::read_stages(&session.folder(self.name))?;
        }
        let mut kept: BTreeSet<String> =
            written(&session.folder(self.name)).into_iter().map(|outcome| outcome.key).collect();
        kept.retain(|key| plans.iter().any(|row| row.key == *key));
        self.check_kept(
            session,
            &kept,
            "of other settings, or without their stages",
            "give the profile another name, ",
        )
    }

    /// Checks that all rows in the table's file are among those that are kept. Rows on real data are
    /// a record, which other settings of the same name and other networks must not replace.
    fn check_kept(
        &self,
        session: &Session,
        kept: &BTreeSet<String>,
        which: &str,
        advice: &str,
    ) -> Result<()> {
        let (folder, file) = (session.folder(self.name), self.file(session));
        if report::is_synthetic(session.data.name()) || !file.is_file() {
            return Ok(());
        }
        let lost = lost(&report::read_csv(&file)?, kept);
        if lost > 0 {
            bail!(
                "{} holds {} {which}, which this run would drop: {advice}name another folder with --out, or move that \
                 one away",
                folder.display(),
                report::counted(lost, "row")
            );
        }
        Ok(())
    }

    /// Returns the networks to publish. For each model and bits, these are those of our rows and of
    /// the other method with the best mean over the seeds, as far as they are done, together with
    /// the float and pruned networks that they come from. The latter are published before any row
    /// is done, because pre-training is the longest part.
    fn networks(&self, rows: &[&RowPlan], session: &Session) -> Result<Vec<Pick>> {
        let ends: Vec<Arc<Stage>> = rows.iter().map(|row| row.stage.clone()).collect();
        let plan = session.plan(&ends)?;
        let done: BTreeMap<&str, f64> = plan
            .iter()
            .filter(|planned| !planned.to_do)
            .filter_map(|planned| {
                Some((planned.key.as_str(), planned.outcome.as_ref()?.evaluation.top1_percent))
            })
            .collect();
        let ours = self.methods.last().map_or("", |method| method.name);
        let mut picks = Vec::new();
        for &model in self.models {
            for &bits in self.bits {
                let of = || rows.iter().filter(|row| (row.model, row.bits) == (model, bits));
                let mean = |method: &str| {
                    let of = of().filter(|row| row.method == method);
                    let top1: Vec<f64> = of.filter_map(|row| done.get(row.key.as_str()).copied()).collect();
                    (!top1.is_empty()).then(|| top1.iter().sum::<f64>() / top1.len() as f64)
                };
                let others = of().map(|row| row.method).filter(|method| *method != ours);
                let best = others
                    .filter_map(|method| Some((method, mean(method)?)))
                    .max_by(|a, b| a.1.total_cmp(&b.1))
                    .map(|(method, _)| method);
                let picked =
                    |row: &&&RowPlan| row.method == ours || best.is_none_or(|best| row.method == best);
                for row in of().filter(picked) {
                    picks.extend(networks_of(row, row.method == ours));
                }
            }
        }
        // The plan has computed all of these keys, so none is an error.
        let key = |pick: &Pick| pick.stage.key(session.data.fingerprint());
        picks.retain(|pick| key(pick).is_ok_and(|key| done.contains_key(key.as_str())));
        Ok(picks)
    }

    /// Writes CSV, Markdown, plots, the settings and every stage's outcome to `folder`, from the
    /// rows that have been run; returns the table as text. Returns `None` and writes nothing if no
    /// row has been run.
    ///
    /// A row that is already in the folder stays even if the store lacks it, because it may come
    /// from another machine. Its key must still match the settings, and it must come from the
    /// networks that are here.
    fn write(&self, session: &Session, plans: &[RowPlan], folder: &Path) -> Result<Option<String>> {
        let Session { profile, data, provenance, .. } = session;
        let ends: Vec<Arc<Stage>> = plans.iter().map(|row| row.stage.clone()).collect();
        let plan = session.plan(&ends)?;
        let here = results::done(&plan);
        let written = written(folder);
        let mut all = here.clone();
        for outcome in &written {
            all.entry(&outcome.key).or_insert(outcome);
        }
        let mut rows = Vec::new();
        let mut outcomes: Vec<&Outcome> = Vec::new();
        for planned in plans {
            // A row that `--only` or `--seeds` left out, now and in earlier runs, is not in the
            // table.
            let key = planned.key.as_str();
            if !all.contains_key(key) {
                continue;
            }
            // Without anything random all seeds are the same row.
            if rows.iter().any(|row: &Row| row.settings_hash == key && row.method == planned.method) {
                continue;
            }
            let lineage = match results::line(&planned.stage, data.fingerprint(), &all) {
                Err(_) if !here.contains_key(key) => continue,
                lineage => lineage?,
            };
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
        let kept = rows.iter().map(|row| row.settings_hash.clone()).collect();
        self.check_kept(session, &kept, "that were made from other networks than those of the store", "")?;
        let about = report::About {
            title: self.title.into(),
            command: provenance.command.clone(),
            profile: profile.name.clone(),
            dataset: data.name().into(),
            notes: notes(&outcomes),
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

/// Returns the outcomes of the stages whose rows an earlier run wrote to a folder; empty if there
/// are none, or if they can't be read, for example because an older version wrote them.
fn written(folder: &Path) -> Vec<Outcome> {
    if !folder.join(STAGES).exists() {
        return Vec::new();
    }
    results::outcomes(folder).unwrap_or_else(|problem| {
        let problem = one_line(&problem);
        output::tell(&format!("rows of earlier runs are left out, unless the store has them: {problem}"));
        Vec::new()
    })
}

/// Returns the network of a row, after the float network that it started from and, for a row of
/// ours, the network right after the first pruning.
fn networks_of(row: &RowPlan, is_ours: bool) -> Vec<Pick> {
    let RowPlan { model, bits: (a, w), method, seed, stage, .. } = row;
    let pick = |name: String, subject: String, seed: u64, stage: &Arc<Stage>| {
        let name = format!("{}-{name}-seed{seed}", model.version().name());
        Pick { name, subject, seed, model: *model, stage: stage.clone() }
    };
    let lineage = stage.lineage();
    let began = lineage[0].seed().unwrap_or(*seed);
    let mut picks = vec![pick("float".into(), "float".into(), began, &lineage[0])];
    let pruned = lineage.get(1).filter(|stage| is_ours && matches!(stage.kind, StageKind::Prune { .. }));
    picks.extend(pruned.map(|pruned| pick("pruned".into(), "pruned".into(), began, pruned)));
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let name = format!("a{a}w{w}-{}", method.chars().map(plain).collect::<String>());
    picks.push(pick(name, format!("A{a}/W{w} {method}"), *seed, stage));
    picks
}

/// Returns notes for the table's readers: the accuracy of the float networks, and what pruning did.
fn notes(outcomes: &[&Outcome]) -> Vec<String> {
    let mut notes = Vec::new();
    for Outcome { label, key, evaluation, .. } in outcomes.iter().filter(|outcome| outcome.parent.is_none()) {
        notes.push(format!(
            "{label} (stage {key}): top-1 {:.2} % in float, before pruning and quantization.",
            evaluation.top1_percent
        ));
    }
    for outcome in outcomes {
        let pruning = outcome.report.clone().and_then(|r| serde_json::from_value::<pfq::Report>(r).ok());
        if let Some(pruning) = pruning {
            let sum = |f: fn(&pfq::LayerReport) -> usize| pruning.layers.iter().map(f).sum::<usize>();
            notes.push(format!(
                "{} (stage {}): {} of {} filters have a running variance below τ = {}; {} removed, \
                 weights {} → {}, MACs {:.2} M → {:.2} M, top-1 right after it {:.2} %.",
                outcome.label,
                outcome.key,
                sum(|l| l.low),
                sum(|l| l.filters),
                report::shortest(pruning.threshold),
                report::counted(sum(|l| l.removed), "filter"),
                pruning.weights_before,
                pruning.weights_after,
                pruning.macs_before as f64 / 1e6,
                pruning.macs_after as f64 / 1e6,
                outcome.evaluation.top1_percent,
            ));
        }
    }
    notes
}

/// Returns the number of rows whose stages are not among those that are kept.
fn lost(rows: &[Row], kept: &BTreeSet<String>) -> usize {
    let real = rows.iter().filter(|row| !report::is_synthetic(&row.dataset));
    real.filter(|row| !kept.contains(&row.settings_hash)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_other_settings_are_counted() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results/table3/reduced/table3.csv");
        let rows = report::read_csv(&file).unwrap();
        let mut kept: BTreeSet<String> = rows.iter().map(|row| row.settings_hash.clone()).collect();
        assert_eq!((rows.len(), kept.len(), lost(&rows, &kept)), (24, 24, 0));
        kept.remove(&rows[3].settings_hash);
        assert_eq!(lost(&rows, &kept), 1);
    }

    #[test]
    fn every_pre_training_and_pruning_has_one_note() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results/table1/reduced");
        let outcomes = results::outcomes(&folder).unwrap();
        let found = notes(&outcomes.iter().collect::<Vec<_>>());
        let of = |what: &str| found.iter().filter(|note| note.contains(what)).count();
        // Two networks, with and without the bias correction.
        assert_eq!((of("pre-train seed 0 (stage "), of("PfQ (stage "), of("PfQ without")), (2, 2, 2));
        assert_eq!(found.len(), 6, "{found:#?}");
    }
}
