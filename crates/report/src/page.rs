//! One HTML page with all results. It has no scripts, loads nothing, and is deterministic.

mod curves;
mod exhibit;
mod judged;
mod style;

use std::collections::{BTreeMap, BTreeSet};

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::bench::{self, Speed};
use crate::claims::Claim;
use crate::deviations::Deviation;
use crate::names::{FLOAT, bits_label, dataset_label, method_label, model_label, table_label};
use crate::network::NetworkRow;
use crate::paper::{Paper, PaperRow, distinct};
use crate::row::Row;
use crate::stage::{StageRecord, trace};
use crate::stats::{Verdict, seeds_label, summarize};
use crate::text::{About, Cell, Column, Document, Table, counted, duration};

pub use exhibit::Exhibit;
use judged::Judged;

/// A table of results that the programs can produce.
#[derive(Clone, Debug, Default)]
pub struct TableEntry {
    /// The table's name in the results, as "table3".
    pub name: String,
    /// The heading.
    pub title: String,
    /// Whether the table is an ablation, which chooses settings on held-out training images.
    pub chooses: bool,
}

/// The results of one table in one profile: the contents of a folder `<table>/<profile>/`.
#[derive(Clone, Debug, Default)]
pub struct TableResults {
    /// The table's name, as "table3".
    pub table: String,
    /// The name of the settings' profile.
    pub profile: String,
    /// The rows.
    pub rows: Vec<Row>,
    /// The stages that produced the rows.
    pub stages: Vec<StageRecord>,
    /// The folder's pictures, files and other CSV tables.
    pub exhibit: Exhibit,
}

/// The published networks of a profile: the contents of a folder `networks/<profile>/`.
#[derive(Clone, Debug, Default)]
pub struct PublishedNetworks {
    /// The name of the settings' profile.
    pub profile: String,
    /// The networks.
    pub rows: Vec<NetworkRow>,
    /// The folder's files.
    pub exhibit: Exhibit,
}

/// The contents of the page.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The known tables, whether they were run or not.
    pub tables: Vec<TableEntry>,
    /// The results of the tables that were run.
    pub runs: Vec<TableResults>,
    /// The paper's figures and further measurements, one folder each.
    pub exhibits: Vec<Exhibit>,
    /// The published networks.
    pub networks: Vec<PublishedNetworks>,
    /// The measured speeds, compared with PyTorch.
    pub speeds: Vec<Speed>,
    /// The other files in the folder of benchmarks.
    pub bench: Exhibit,
    /// The paper's claims.
    pub claims: Vec<Claim>,
    /// The points where we differ from the paper.
    pub deviations: Vec<Deviation>,
}

const TITLE: &str = "PfQ reproduced: every result beside the paper's";

/// The content security policy: nothing may be loaded or executed, whatever the inputs contain.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";

impl Page {
    /// Returns whether there are no results at all to show.
    pub fn is_empty(&self) -> bool {
        let Self { runs, exhibits, networks, speeds, .. } = self;
        runs.is_empty() && exhibits.is_empty() && networks.is_empty() && speeds.is_empty()
    }

    /// Returns the page as HTML.
    pub fn html(&self) -> String {
        let judged = self.judged();
        let mut sections = vec![
            ("claims", "Claims", judged::summary(&judged, &self.profiles())),
            ("tables", "Tables", self.tables(&judged)),
            ("evidence", "Evidence for each claim", judged::evidence(&judged)),
            ("figures", "Figures and further measurements", self.figures()),
            ("curves", "Training curves", self.curves()),
            ("networks", "Published networks", self.networks()),
            ("speed", "Speed", self.speed()),
            ("provenance", "What was run, where and how", self.provenance()),
            ("deviations", "Deviations from the paper", self.deviations()),
            ("reading", "How to read this page", reading()),
        ];
        sections.retain(|(id, ..)| *id != "networks" || !self.networks.is_empty());
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    meta name="color-scheme" content="light dark";
                    meta name="description" content="Results of an independent reproduction of arXiv:2011.06751";
                    link rel="icon" href="data:,";
                    title { (TITLE) }
                    style { (PreEscaped(style::CSS)) }
                }
                body {
                    a.skip href="#main" { "Skip to the results" }
                    header {
                        h1 { (TITLE) }
                        p.lede {
                            "An independent implementation, in Rust, of “Filter Pre-Pruning for Improved Fine-tuning "
                            "of Quantized Deep Neural Networks” (Nishikawa and Ikegaya, 2020, "
                            a href="https://arxiv.org/abs/2011.06751" { "arXiv:2011.06751" }
                            "). Every figure on this page is read from the files beside it, which the runs wrote."
                        }
                        nav aria-label="Sections" {
                            ul { @for (id, heading, _) in &sections { li { a href={ "#" (id) } { (heading) } } } }
                        }
                    }
                    main #main {
                        @for (id, heading, body) in &sections {
                            section #(id) aria-labelledby={ (id) "-heading" } {
                                h2 #{ (id) "-heading" } { (heading) }
                                (body)
                            }
                        }
                    }
                    footer { p { "Made by " code { "just report" } "." } }
                }
            }
        };
        page.into_string() + "\n"
    }

    /// Returns every claim with its comparisons in each profile that was run.
    fn judged(&self) -> Vec<Judged<'_>> {
        let judge = |claim| {
            let by_profile = self.profiles().into_iter().map(|profile| {
                let (rows, stages) = (self.rows(profile), self.stages(profile));
                (profile, Claim::judge(claim, &rows, &stages))
            });
            Judged { claim, by_profile: by_profile.collect() }
        };
        self.claims.iter().map(judge).collect()
    }

    /// Returns the verdicts as text: a line for each claim, with a verdict for each profile.
    pub fn verdicts(&self) -> String {
        let all = self.judged();
        let width = all.iter().map(|judged| judged.claim.id.chars().count()).max().unwrap_or(0);
        let line = |judged: &Judged| {
            let verdicts = judged
                .by_profile
                .iter()
                .map(|(profile, comparisons)| format!("{profile}: {}", judged::verdict(comparisons).label()));
            format!("{:<width$} {}", judged.claim.id, verdicts.collect::<Vec<_>>().join(", "))
        };
        all.iter().map(|of| line(of).trim_end().to_string()).collect::<Vec<_>>().join("\n")
    }

    /// Returns the results on the test set. Ablations, which only choose settings, are left out.
    fn tested(&self) -> impl Iterator<Item = &TableResults> {
        self.runs.iter().filter(|run| !self.chooses(&run.table))
    }

    fn chooses(&self, table: &str) -> bool {
        self.entry(table).is_some_and(|entry| entry.chooses)
    }

    fn entry(&self, table: &str) -> Option<&TableEntry> {
        self.tables.iter().find(|entry| entry.name == table)
    }

    fn title(&self, table: &str) -> String {
        self.entry(table).map_or_else(|| table_label(table), |entry| entry.title.clone())
    }

    /// Returns the name of a table in captions.
    fn label(&self, table: &str) -> String {
        if Paper::published().table(table).is_empty() { self.title(table) } else { table_label(table) }
    }

    /// Returns the profiles that were run, beginning with the paper's own.
    fn profiles(&self) -> Vec<&str> {
        const KNOWN: [&str; 4] = ["paper", "full", "reduced", "quick"];
        let found: BTreeSet<&str> = self.tested().map(|run| run.profile.as_str()).collect();
        let mut found: Vec<&str> = found.into_iter().collect();
        found.sort_by_key(|profile| KNOWN.iter().position(|known| known == profile).unwrap_or(KNOWN.len()));
        found
    }

    fn rows(&self, profile: &str) -> Vec<Row> {
        let runs = self.tested().filter(|run| run.profile == profile);
        runs.flat_map(|run| run.rows.iter().cloned()).collect()
    }

    /// Returns the stages of all tables of a profile. A stage that tables share appears once.
    fn stages(&self, profile: &str) -> Vec<StageRecord> {
        let runs = self.tested().filter(|run| run.profile == profile);
        let all: BTreeMap<&str, &StageRecord> =
            runs.flat_map(|run| &run.stages).map(|stage| (stage.key.as_str(), stage)).collect();
        all.into_values().cloned().collect()
    }

    /// Renders the paper's tables, even if they were not run, and then our own that were run.
    fn tables(&self, judged: &[Judged]) -> Markup {
        let profiles = self.profiles();
        let of = |table: &str| {
            let mut runs: Vec<&TableResults> = self.tested().filter(|run| run.table == table).collect();
            runs.sort_by_key(|run| profiles.iter().position(|profile| *profile == run.profile));
            runs
        };
        let own = self.tested().map(|run| run.table.as_str());
        html! {
            @for table in distinct(Paper::published().tables().map(|name: &str| name).chain(own)) {
                article #(table) {
                    h3 { (self.title(table)) }
                    @for run in of(table) { (run.results(&self.label(table))) }
                    @if of(table).is_empty() { (not_run(table)) }
                    (judged::links(judged, table))
                }
            }
        }
    }

    fn figures(&self) -> Markup {
        let choosing: Vec<&TableResults> = self.runs.iter().filter(|run| self.chooses(&run.table)).collect();
        html! {
            @if self.exhibits.is_empty() && choosing.is_empty() { p { "None has been made yet." } }
            @for exhibit in &self.exhibits {
                article {
                    h3 { (exhibit.title) }
                    (exhibit.pictures(None))
                    (exhibit.sheets())
                    (exhibit.links())
                }
            }
            @for table in distinct(choosing.iter().map(|run| run.table.as_str())) {
                article #(table) {
                    h3 { "Ablation: " (self.title(table)) }
                    @for run in choosing.iter().filter(|run| run.table == table) { (run.results(&self.label(table))) }
                }
            }
        }
    }

    fn curves(&self) -> Markup {
        html! {
            (curves::legend())
            @for profile in self.profiles() {
                h3 { "Profile " (profile) }
                (curves::of(&self.stages(profile)))
            }
            @if self.tested().next().is_none() { p { "Nothing has been run yet." } }
        }
    }

    fn networks(&self) -> Markup {
        html! {
            p {
                "Networks behind these figures, with which they can be checked without any training: "
                code { "cargo run --release --bin report -- --verify" } " evaluates all of them, and prints what is said here \
                 beside what it finds. The programs of the tables take them for what they are, so that a later stage can be \
                 repeated without those before it."
            }
            @for of in &self.networks {
                h3 { "Profile " (of.profile) }
                (table_html(&format!("Networks of profile {}", of.profile), &of.table()))
                (of.exhibit.links())
            }
        }
    }

    fn speed(&self) -> Markup {
        let tables = bench::tables(&self.speeds);
        html! {
            @if tables.is_empty() && self.bench.is_empty() { p { "Nothing has been measured yet." } }
            @if !tables.is_empty() {
                h3 { "Beside PyTorch" }
                p { (bench::READING) }
                @for (heading, table) in &tables { (table_html(heading, table)) }
            }
            (self.bench.pictures(Some("Images a second in training and evaluation, ours and PyTorch's modes: the \
                                       figures are those of the tables above.")))
            (self.bench.sheets())
            (self.bench.links())
        }
    }

    fn provenance(&self) -> Markup {
        let total = |stages: &[StageRecord]| stages.iter().map(|stage| stage.seconds).sum::<f64>();
        html! {
            @if self.tested().next().is_none() { p { "Nothing has been run yet." } }
            @for profile in self.profiles() {
                @let stages = self.stages(profile);
                h3 { "Profile " (profile) }
                p {
                    (counted(stages.len(), "stage")) ", each counted once though tables share them: "
                    (duration(total(&stages))) " of wall time."
                }
                @for run in self.tested().filter(|run| run.profile == profile) { (run.made(&self.label(&run.table))) }
                details {
                    summary { "Every stage of profile " (profile) }
                    (stage_table(profile, &stages))
                }
            }
        }
    }

    fn deviations(&self) -> Markup {
        let head =
            [("point", false), ("the paper", false), ("here", false), ("why", false), ("effect", false)];
        let row = |of: &Deviation| {
            let effect = of.effect.clone().unwrap_or_else(|| "not measured".into());
            [of.point.clone(), of.paper.clone(), of.ours.clone(), of.why.clone(), effect]
                .map(Cell::from)
                .into()
        };
        let table = Table { head: head.into(), rows: self.deviations.iter().map(row).collect() };
        html! {
            p { "What the paper leaves open, and where we knowingly do something else." }
            div.prose { (table_html("Deviations and choices", &table)) }
        }
    }
}

impl PublishedNetworks {
    fn table(&self) -> Table<'_> {
        let head: Vec<Column> = vec![
            ("network", false),
            ("what it is", false),
            ("seed", true),
            ("top-1, %", true),
            ("MACs, M", true),
            ("size, MiB", true),
            ("SHA-256", false),
            ("file", false),
        ];
        let cells = |row: &NetworkRow| {
            [
                model_label(&row.model, row.width),
                row.subject.clone(),
                row.seed.to_string(),
                format!("{:.2}", row.top1_percent),
                format!("{:.1}", row.macs as f64 / 1e6),
                format!("{:.1}", row.bytes as f64 / f64::from(1 << 20)),
                format!("{:.12}…", row.sha256),
                row.file.clone(),
            ]
            .map(Cell::from)
            .into()
        };
        Table { head, rows: self.rows.iter().map(cells).collect() }
    }
}

impl TableResults {
    fn document(&self) -> Document {
        let dataset = self.rows.first().map(|row| row.dataset.clone()).unwrap_or_default();
        Document::new(&self.rows, &About { profile: self.profile.clone(), dataset, ..About::default() })
    }

    /// Renders the table, with the paper's figures or else with its differences, and the picture.
    fn results(&self, label: &str) -> Markup {
        const HEAD: [&str; 9] = [
            "network",
            "bits",
            "method",
            "top-1, %",
            "paper’s top-1, %",
            "difference, points",
            "MACs, M",
            "paper’s MACs, M",
            "weights pruned, %",
        ];
        let document = self.document();
        // The paper has nothing to compare with our own tables.
        let about_paper = |name: &&str| name.starts_with("paper") || name.starts_with("difference");
        let head = HEAD.into_iter().filter(|name| document.published || !about_paper(name));
        let numbers = document.results.head.iter().map(|(_, number)| *number);
        let table = Table { head: head.zip(numbers).collect(), rows: document.results.rows };
        let description = match document.published {
            true => {
                "Our mean top-1 accuracy beside the paper's for each method: the figures are those of the table above."
            }
            false => {
                "Our mean top-1 accuracy for each alternative: the figures are those of the table above."
            }
        };
        let dataset = self.rows.first().map_or("", |row| dataset_label(&row.dataset));
        let caption = format!("{label}, profile {}, {dataset}: {}", self.profile, self.spread());
        html! {
            h4 { "Profile " (self.profile) }
            @for caveat in &document.caveats { p.caveat { (caveat) } }
            (table_html(&caption, &table))
            @if !document.published && !document.orderings.rows.is_empty() {
                (table_html(&format!("{label}, profile {}: {}", self.profile, document.question), &document.orderings))
                p { (document.verdict) }
            }
            (self.exhibit.pictures(Some(description)))
            @for remark in &document.remarks { p { (remark) } }
            (self.exhibit.sheets())
            (self.exhibit.links())
        }
    }

    /// Says which statistic the figures show.
    fn spread(&self) -> String {
        let summaries = summarize(&self.rows);
        match summaries.iter().map(|of| of.seeds).max() {
            None => "no rows".into(),
            Some(1) => "one seed".into(),
            Some(_) => format!("mean ± standard deviation over {}", seeds_label(&summaries)),
        }
    }

    /// Lists the commands, the data and the provenance.
    fn made(&self, label: &str) -> Markup {
        let commands: BTreeSet<&str> = self.stages.iter().map(|of| of.provenance.command.as_str()).collect();
        let data: BTreeSet<String> = self
            .stages
            .iter()
            .map(|of| format!("{} from {}", dataset_label(&of.data.name), of.data.source))
            .collect();
        html! {
            h4 { (label) }
            @if !commands.is_empty() {
                pre tabindex="0" role="region" aria-label={ "Commands of " (label) ", profile " (self.profile) } {
                    code { @for command in commands { (command) "\n" } }
                }
            }
            ul {
                @for line in self.document().made { li { (line) } }
                @for line in data { li { "source: " (line) } }
            }
        }
    }
}

/// Renders the paper's figures for a table that has not been run.
fn not_run(table: &str) -> Markup {
    let head: Vec<Column> = vec![
        ("network", false),
        ("bits", false),
        ("method", false),
        ("paper’s top-1, %", true),
        ("paper’s MACs, M", true),
    ];
    let rows = Paper::published().table(table);
    let cells = |row: &PaperRow| {
        [
            model_label(&row.model, 1.0),
            bits_label(row.activation_bits, row.weight_bits),
            method_label(&row.method).into(),
            format!("{:.2}", row.top1_percent),
            row.mac_millions.to_string(),
        ]
        .map(Cell::from)
        .into()
    };
    let table_of = Table { head, rows: rows.iter().map(cells).collect() };
    let dataset = rows.first().map_or("", |row| dataset_label(&row.dataset));
    html! {
        p { "Not run yet." }
        (table_html(&format!("{} of the paper, {dataset}", table_label(table)), &table_of))
        @if rows.iter().any(|row| row.weight_bits == 32) { p { (FLOAT) } }
    }
}

fn stage_table(profile: &str, stages: &[StageRecord]) -> Markup {
    let head: Vec<Column> = vec![
        ("network", false),
        ("steps", false),
        ("seed", true),
        ("epochs", true),
        ("top-1, %", true),
        ("loss", true),
        ("MACs, M", true),
        ("time", true),
        ("code", false),
        ("device", false),
    ];
    let mut traced = trace(stages);
    traced.sort_by(|a, b| {
        let key =
            |of: &crate::stage::Traced| (of.origin.label.clone(), of.steps.join(" → "), of.stage.key.clone());
        key(a).cmp(&key(b))
    });
    let cells = |of: &crate::stage::Traced| {
        let stage = of.stage;
        [
            model_label(of.origin.model().unwrap_or_default(), of.origin.width().unwrap_or(1.0)),
            of.steps.join(" → "),
            stage.seed().map_or("–".into(), |seed| seed.to_string()),
            stage.metrics.len().to_string(),
            format!("{:.2}", stage.evaluation.top1_percent),
            format!("{:.3}", stage.evaluation.loss),
            format!("{:.1}", stage.macs as f64 / 1e6),
            duration(stage.seconds),
            stage.provenance.git_commit.clone(),
            stage.provenance.device.clone(),
        ]
        .map(Cell::from)
        .into()
    };
    let table = Table { head, rows: traced.iter().map(cells).collect() };
    table_html(
        &format!(
            "Stages of profile {profile}; the accuracy is that after the stage, on the test set or on what was held out for it"
        ),
        &table,
    )
}

/// Renders a table in a box that scrolls if the table is too wide.
///
/// A rule separates groups of rows that have equal first two cells, if there are such groups.
fn table_html(caption: &str, table: &Table) -> Markup {
    let first = |index: usize| table.rows[index].iter().take(2).map(|cell| &cell.text).collect::<Vec<_>>();
    let grouped = (1..table.rows.len()).any(|index| first(index) == first(index - 1));
    let begins = |index: usize| grouped && index > 0 && first(index) != first(index - 1);
    html! {
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead {
                    tr { @for (name, number) in &table.head { th scope="col" class=[number.then_some("number")] { (name) } } }
                }
                tbody {
                    @for (index, row) in table.rows.iter().enumerate() {
                        tr class=[begins(index).then_some("begins")] {
                            @for (place, (cell, (_, number))) in row.iter().zip(&table.head).enumerate() {
                                @if place == 0 { th scope="row" { (cell.text) } }
                                @else {
                                    td class=[(!number).then_some("words")] {
                                        @if cell.strong { strong { (cell.text) } } @else { (cell.text) }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn reading() -> Markup {
    html! {
        p {
            "Accuracies are those of the last epoch, never the best epoch’s, on the test set (in ablations, on training "
            "images that were held out). MACs are the multiply–accumulates of one image. A difference is ours less the "
            "paper’s; where † stands, the network, its width or the data are not the paper’s, and only the order of the "
            "methods can be compared."
        }
        p {
            "A claim is a statement of the paper that can fail. It is about one or more comparisons, each of a network at "
            "some bits; a pooled claim is about their mean. Methods are compared in pairs of the same seed, which share their "
            "pre-trained network. The mean of the differences has a 95 % confidence interval by Student’s t, and a p-value "
            "that it is at the nearest end of where the claim says. Where a claim has several comparisons, these are "
            "corrected for their number (Holm), so an interval can exclude what the verdict leaves open. A comparison"
        }
        dl {
            dt { (judged::badge(Verdict::Holds)) }
            dd { "where the mean is where the claim says, and the corrected p-value is below 0.05," }
            dt { (judged::badge(Verdict::Fails)) }
            dd { "where the mean is elsewhere, and the corrected p-value is below 0.05," }
            dt { (judged::badge(Verdict::NotDecided)) }
            dd { "where it is larger, or where there is one value only, which has no spread," }
            dt { (judged::badge(Verdict::NotRun)) }
            dd { "where nothing, or not all that it needs, has been run." }
        }
        p {
            "A claim holds if all of its comparisons hold, and fails if one fails. What an undecided comparison would take is "
            "the number of values at which the mean and the spread that were found would decide it, at 0.05 divided by the "
            "number of the claim’s comparisons."
        }
        p {
            "What follows from the pre-trained network, such as the filters that the first pruning removes and the "
            "multiply–accumulates that are left, is one value for each pre-trained network, whatever the number of seeds. "
            "Accuracies have a value for each seed; where all seeds share one pre-trained network, verdicts about them are about "
            "fine-tuning that network. A verdict that the design of a profile forces is marked so: it is no evidence."
        }
    }
}
