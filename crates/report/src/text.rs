//! The report as Markdown and as plain text, both made from one document.

use std::collections::BTreeSet;

use crate::names::{
    FLOAT, bits_label, dataset_label, is_synthetic, method_label, model_label, table_label, without_pfq,
};
use crate::paper::{Paper, PaperPruned};
use crate::row::Row;
use crate::stats::{Estimate, Range, Summary, Verdict, paired, summarize};

/// The contents of a report besides the rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// The heading.
    pub title: String,
    /// The exact command that made the rows.
    pub command: String,
    /// The name of the settings' profile.
    pub profile: String,
    /// The name of the data set.
    pub dataset: String,
    /// Remarks for the reader, each of one or more sentences.
    pub notes: Vec<String>,
    /// Further facts on how the rows were made, as (name, value). Those in the rows are added too.
    pub provenance: Vec<(String, String)>,
}

/// Returns the report as Markdown: the results in the paper's layout, the order of the methods, and
/// how it was made.
pub fn markdown(rows: &[Row], about: &About) -> String {
    let document = Document::new(rows, about);
    let mut blocks = vec![format!("# {}", document.title)];
    blocks.extend(document.caveats.iter().map(|line| format!("> **{line}**")));
    blocks.push(document.results.markdown());
    blocks.extend(document.remarks);
    if !document.orderings.rows.is_empty() {
        blocks.push(format!("## {}", document.question));
        blocks.push(document.orderings.markdown());
        blocks.push(document.verdict);
    }
    if !document.notes.is_empty() {
        blocks.push("## Notes".into());
        blocks.push(list(&document.notes));
    }
    blocks.push("## How it was made".into());
    blocks.push(format!("```sh\n{}\n```", document.command));
    blocks.push(list(&document.made));
    blocks.join("\n\n") + "\n"
}

/// Returns the report as aligned plain text, at most 100 columns wide.
pub fn terminal(rows: &[Row], about: &About) -> String {
    let document = Document::new(rows, about);
    let mut blocks = vec![wrap(&document.title, "", "")];
    blocks.extend(document.caveats.iter().map(|line| wrap(line, "! ", "")));
    blocks.push(format!("{}\n* the best of its group", document.results.plain()));
    blocks.extend(document.remarks.iter().map(|line| wrap(line, "", "")));
    if !document.orderings.rows.is_empty() {
        blocks.push(document.orderings.plain());
        blocks.push(wrap(&document.verdict, "", ""));
    }
    let bullets =
        |lines: &[String]| lines.iter().map(|line| wrap(line, "- ", "")).collect::<Vec<_>>().join("\n");
    blocks.extend((!document.notes.is_empty()).then(|| bullets(&document.notes)));
    blocks.push(format!("{}\n{}", wrap(&document.command, "$ ", " \\"), bullets(&document.made)));
    blocks.join("\n\n") + "\n"
}

/// Returns the reasons why the rows cannot be compared with the paper in absolute terms.
pub(crate) fn caveats(rows: &[Row]) -> Vec<String> {
    let mut reasons = BTreeSet::new();
    for row in rows.iter().filter(|row| !row.comparable()) {
        let theirs = Paper::published().dataset(&row.table);
        if is_synthetic(&row.dataset) {
            reasons.insert("SYNTHETIC DATA".to_string());
        } else if let Some(theirs) = theirs.filter(|theirs| *theirs != row.dataset) {
            reasons.insert(format!("{}, not {}", dataset_label(&row.dataset), dataset_label(theirs)));
        }
        if row.width != 1.0 {
            reasons.insert(format!("network width ×{}", row.width));
        }
    }
    reasons.into_iter().collect()
}

/// The contents of a report, independent of its format.
pub(crate) struct Document {
    title: String,
    pub(crate) caveats: Vec<String>,
    pub(crate) results: Table<'static>,
    pub(crate) remarks: Vec<String>,
    /// Whether the paper has figures for any of the rows.
    pub(crate) published: bool,
    pub(crate) question: &'static str,
    pub(crate) orderings: Table<'static>,
    pub(crate) verdict: String,
    notes: Vec<String>,
    command: String,
    pub(crate) made: Vec<String>,
}

impl Document {
    pub(crate) fn new(rows: &[Row], about: &About) -> Self {
        let summaries = summarize(rows);
        let groups: Vec<_> = summaries.chunk_by(|a, b| a.group() == b.group()).collect();
        let orderings: Vec<_> = groups.iter().flat_map(|group| orderings(rows, group)).collect();
        let reasons = caveats(rows).join("; ");
        // The paper has nothing to compare with our own tables, such as ablations.
        let published = rows.iter().any(|row| !Paper::published().table(&row.table).is_empty());
        let (comparable, question, verdict, absent): (_, _, _, [&[&str]; 2]) = if published {
            (
                "these figures cannot be compared with the paper's in absolute terms, only in their order. Differences \
                 marked † are for reference.",
                "Does the order of the methods hold?",
                verdict(&orderings),
                [&[], &[]],
            )
        } else {
            (
                "what is compared is the order of the alternatives, not the figures.",
                "Do the alternatives differ?",
                "Two alternatives differ if the 95 % interval of their difference (Student's t, pairs of the same seed) \
                 excludes zero. A single seed decides nothing."
                    .into(),
                [&["paper", "diff."], &["paper", "verdict"]],
            )
        };
        let caveat = format!("{reasons}: {comparable}");
        let found =
            Table { head: RESULTS.to_vec(), rows: groups.iter().flat_map(|group| results(group)).collect() };
        let compared =
            Table { head: ORDERINGS.to_vec(), rows: orderings.iter().map(Ordering::cells).collect() };
        Document {
            title: about.title.clone(),
            caveats: (!reasons.is_empty()).then_some(caveat).into_iter().collect(),
            results: found.without(absent[0]),
            remarks: remarks(&summaries),
            published,
            question,
            verdict,
            orderings: compared.without(absent[1]),
            notes: about.notes.clone(),
            command: about.command.clone(),
            made: made(rows, about),
        }
    }
}

/// A column's heading, and whether its cells are numbers.
pub(crate) type Column<'a> = (&'a str, bool);

/// The index of the column with our accuracy.
const TOP1: usize = 3;

const RESULTS: [Column; 9] = [
    ("model", false),
    ("bits", false),
    ("method", false),
    ("top-1 %", true),
    ("paper", true),
    ("diff.", true),
    ("MACs M", true),
    ("paper", true),
    ("pruned %", true),
];

fn results(group: &[Summary]) -> Vec<Vec<Cell>> {
    let best = group.iter().map(|summary| summary.mean).fold(f64::MIN, f64::max);
    let row = |summary: &Summary| {
        let spread = summary.std.map(|std| format!(" ± {std:.2}")).unwrap_or_default();
        let mark = if summary.comparable() { "" } else { " †" };
        let top1 = format!("{:.2}{spread}", summary.mean);
        [
            model_label(&summary.model, summary.width),
            bits_label(summary.activation_bits, summary.weight_bits),
            method_label(&summary.method).to_string(),
            top1,
            optional(summary.paper_top1_percent, |value| format!("{value:.2}")),
            optional(summary.top1_minus_paper, |value| signed(value) + mark),
            format!("{:.1}", summary.macs / 1e6),
            optional(summary.paper_mac_millions, |value| value.to_string()),
            format!("{:.1}", summary.weights_pruned_percent),
        ]
        .map(Cell::from)
        .into()
    };
    let mut rows: Vec<Vec<Cell>> = group.iter().map(row).collect();
    for (row, summary) in rows.iter_mut().zip(group) {
        row[TOP1].strong = group.len() > 1 && summary.mean == best;
    }
    rows
}

/// The comparison of a method with another one of its group.
struct Ordering<'a> {
    ours: &'a Summary,
    other: &'a Summary,
    difference: Estimate,
    paper: Option<f64>,
}

const ORDERINGS: [Column; 8] = [
    ("model", false),
    ("bits", false),
    ("method − method", false),
    ("diff.", true),
    ("95 % interval", true),
    ("pairs", true),
    ("paper", true),
    ("verdict", false),
];

/// Returns the comparisons of a group.
///
/// Every method is compared with the same method without PfQ. The last method, which is the
/// proposed one or the default, is compared with all others.
fn orderings<'a>(rows: &[Row], group: &'a [Summary]) -> Vec<Ordering<'a>> {
    let Some((last, others)) = group.split_last() else { return Vec::new() };
    let unpruned = |ours: &'a Summary| {
        let name = without_pfq(&ours.method)?;
        Some((ours, others.iter().find(|other| other.method == name)?))
    };
    let mut pairs: Vec<(&Summary, &Summary)> = group.iter().filter_map(unpruned).collect();
    for pair in others.iter().map(|other| (last, other)) {
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    let alike =
        |row: &&Row| (&*row.table, &*row.dataset, row.width) == (&*last.table, &*last.dataset, last.width);
    let rows: Vec<Row> = rows.iter().filter(alike).cloned().collect();
    let ordering = |(ours, other): (&'a Summary, &'a Summary)| {
        let (abits, wbits) = (ours.activation_bits, ours.weight_bits);
        let difference = paired(&rows, &ours.model, abits, wbits, &ours.method, &other.method)?;
        let paper = ours.paper_top1_percent.zip(other.paper_top1_percent).map(|(ours, other)| ours - other);
        Some(Ordering { ours, other, difference, paper })
    };
    pairs.into_iter().filter_map(ordering).collect()
}

impl Ordering<'_> {
    /// Returns whether the paper's order holds; `None` if the paper has no order.
    fn verdict(&self) -> Option<Verdict> {
        let towards_the_paper = match self.paper? {
            paper if paper > 0.0 => self.difference,
            paper if paper < 0.0 => self.difference.negated(),
            _ => return None,
        };
        let p_value = towards_the_paper.p_value(Range::POSITIVE);
        Some(Verdict::of(Some(towards_the_paper), Range::POSITIVE, p_value))
    }

    fn cells(&self) -> Vec<Cell> {
        [
            model_label(&self.ours.model, self.ours.width),
            bits_label(self.ours.activation_bits, self.ours.weight_bits),
            format!("{} − {}", method_label(&self.ours.method), method_label(&self.other.method)),
            signed(self.difference.mean),
            optional(self.difference.interval, interval),
            self.difference.count.to_string(),
            optional(self.paper, signed),
            optional(self.verdict(), |verdict| verdict.label().into()),
        ]
        .map(Cell::from)
        .into()
    }
}

/// Summarizes how many orders hold, and how they were decided.
fn verdict(orderings: &[Ordering]) -> String {
    let count = |verdict| orderings.iter().filter(|ordering| ordering.verdict() == Some(verdict)).count();
    let same = |ordering: &&Ordering| {
        let paper = ordering.paper.filter(|_| ordering.verdict() == Some(Verdict::NotDecided));
        paper.is_some_and(|paper| paper * ordering.difference.mean > 0.0)
    };
    format!(
        "Orders of the paper that hold: {}; that fail: {}; that are not decided: {} (of these, as in the paper by their \
         means: {}). An order is decided if the 95 % interval of its difference (Student's t, pairs of the same seed) \
         excludes zero, or if all pairs have the same difference. Each is judged by itself; the page of all results \
         corrects for their number. A single seed decides nothing.",
        count(Verdict::Holds),
        count(Verdict::Fails),
        count(Verdict::NotDecided),
        orderings.iter().filter(same).count(),
    )
}

/// Returns remarks on float weights, pre-trained networks, and the paper's pruned weights.
fn remarks(summaries: &[Summary]) -> Vec<String> {
    let models = || summaries.chunk_by(|a, b| a.model == b.model && a.width == b.width);
    let by_model = || models().map(|of| &of[0]);
    let mut began: Vec<String> = models().flat_map(began).collect();
    began.dedup();
    let theirs = |pruned: &&PaperPruned| {
        by_model().any(|first| {
            first.model == pruned.model && Paper::published().dataset(&first.table) == Some(&pruned.dataset)
        })
    };
    let pruned: Vec<String> = Paper::published()
        .pruned_weights()
        .iter()
        .filter(theirs)
        .map(|row| {
            format!("{} {} % ({})", model_label(&row.model, 1.0), row.weights_pruned_percent, row.source)
        })
        .collect();
    let sentence = |head: &str, parts: Vec<String>| {
        (!parts.is_empty()).then(|| format!("{head}: {}.", parts.join(", ")))
    };
    let float = summaries.iter().any(|summary| summary.weight_bits == 32).then(|| FLOAT.into());
    [
        float,
        sentence("Pre-trained float networks that the runs began from", began),
        sentence("Weights pruned in the paper", pruned),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns the float accuracy of a model, or that of each method if they differ.
fn began(of: &[Summary]) -> Vec<String> {
    let float = |row: &Summary| format!("{:.2} %", row.float_top1_percent);
    let label = model_label(&of[0].model, of[0].width);
    if of.iter().all(|row| float(row) == float(&of[0])) {
        return vec![format!("{label} {}", float(&of[0]))];
    }
    of.iter().map(|row| format!("{label} {} ({})", float(row), method_label(&row.method))).collect()
}

fn made(rows: &[Row], about: &About) -> Vec<String> {
    let distinct = |value: fn(&Row) -> String| {
        let values: BTreeSet<String> = rows.iter().map(value).collect();
        match values.len() {
            0..=4 => values.into_iter().collect::<Vec<_>>().join(", "),
            more => format!("{more} different, see the rows"),
        }
    };
    let seeds: BTreeSet<u64> = rows.iter().map(|row| row.seed).collect();
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    let longest = rows.iter().map(|row| row.wall_seconds).fold(0.0, f64::max);
    let facts = [
        ("profile", about.profile.clone()),
        ("data", dataset_label(&about.dataset).into()),
        ("seeds", seeds.join(", ")),
        ("device", distinct(|row| row.device.clone())),
        ("code", distinct(|row| row.git_commit.clone())),
        ("settings", distinct(|row| row.settings_hash.clone())),
        ("longest run", duration(longest)),
        ("paper's figures", citation(rows)),
    ];
    let facts = facts.into_iter().map(|(name, value)| (name.to_string(), value));
    let all = facts.chain(about.provenance.iter().cloned());
    all.filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("{name}: {value}")).collect()
}

fn citation(rows: &[Row]) -> String {
    let known = rows.iter().filter(|row| !Paper::published().table(&row.table).is_empty());
    let tables: BTreeSet<String> = known.map(|row| table_label(&row.table)).collect();
    let tables = tables.into_iter().collect::<Vec<_>>().join(", ");
    if tables.is_empty() { tables } else { format!("{tables} of Nishikawa and Ikegaya, arXiv:2011.06751") }
}

/// Formats a duration as `42 s`, `3 min 20 s` or `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

pub(crate) fn optional<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or("–".into(), show)
}

/// Formats the ends of an interval.
pub(crate) fn interval((low, high): (f64, f64)) -> String {
    format!("{} … {}", signed(low), signed(high))
}

/// Formats a number with two decimals and a sign, with a true minus. A number that rounds to zero
/// has no sign.
pub(crate) fn signed(value: f64) -> String {
    match format!("{value:+.2}").as_str() {
        "+0.00" | "-0.00" => "0.00".into(),
        text => text.replace('-', "−"),
    }
}

/// Formats a number in the shortest form that is read back as the same number, as "1e-5" or "0.95".
pub fn shortest(value: f64) -> String {
    let (plain, scientific) = (value.to_string(), format!("{value:e}"));
    if scientific.len() < plain.len() { scientific } else { plain }
}

/// Returns a count with its noun, as "1 row", "2 rows" or "3 classes".
pub fn counted(count: usize, noun: &str) -> String {
    let ending = match (count, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {noun}{ending}")
}

pub(crate) fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("- {line}")).collect::<Vec<_>>().join("\n")
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) text: String,
    /// Whether the cell is emphasized.
    pub(crate) strong: bool,
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, strong: false }
    }
}

/// A table of text.
pub(crate) struct Table<'a> {
    pub(crate) head: Vec<Column<'a>>,
    pub(crate) rows: Vec<Vec<Cell>>,
}

impl Table<'_> {
    /// Removes the columns with these names.
    fn without(mut self, names: &[&str]) -> Self {
        let kept: Vec<bool> = self.head.iter().map(|(name, _)| !names.contains(name)).collect();
        for row in &mut self.rows {
            let mut kept = kept.iter();
            row.retain(|_| kept.next() == Some(&true));
        }
        self.head.retain(|(name, _)| !names.contains(name));
        self
    }

    pub(crate) fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |", cells.join(" | "));
        let head = self.head.iter().map(|(name, _)| name.to_string()).collect();
        let rule =
            self.head.iter().map(|(_, number)| if *number { "---:" } else { "---" }.to_string()).collect();
        let cell = |cell: &Cell| {
            let text = cell.text.replace('|', "\\|");
            if cell.strong { format!("**{text}**") } else { text }
        };
        let body = self.rows.iter().map(|row| row.iter().map(cell).collect());
        [head, rule].into_iter().chain(body).map(line).collect::<Vec<_>>().join("\n")
    }

    /// Returns the table with aligned columns, two spaces apart, or one space if the lines would
    /// get too long.
    ///
    /// A star follows an emphasized cell.
    pub(crate) fn plain(&self) -> String {
        let length = |text: &str| text.chars().count();
        let starred: Vec<bool> =
            (0..self.head.len()).map(|column| self.rows.iter().any(|row| row[column].strong)).collect();
        let cell = |(cell, starred): (&Cell, &bool)| match (cell.strong, starred) {
            (true, _) => format!("{} *", cell.text),
            (false, true) => format!("{}  ", cell.text),
            (false, false) => cell.text.clone(),
        };
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().zip(&starred).map(cell).collect()).collect();
        let cells = |column: usize| rows.iter().map(move |row| length(&row[column]));
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| cells(column).chain([length(self.head[column].0)]).max().unwrap_or(0))
            .collect();
        let total = widths.iter().sum::<usize>() + 2 * (widths.len() - 1);
        let gap = if total <= WIDTH { "  " } else { " " };
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded = cells.zip(&widths).zip(&self.head).map(|((cell, &width), (_, number))| {
                if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            padded.collect::<Vec<_>>().join(gap).trim_end().to_string()
        };
        let head = line(&mut self.head.iter().map(|(name, _)| *name));
        let rule =
            line(&mut widths.iter().map(|width| "─".repeat(*width)).collect::<Vec<_>>().iter().map(|s| &**s));
        let body = rows.iter().map(|row| line(&mut row.iter().map(|cell| &**cell)));
        [head, rule].into_iter().chain(body).collect::<Vec<_>>().join("\n")
    }
}

/// The width of plain text in columns.
const WIDTH: usize = 100;

/// The units that stay on the line of their number.
const UNITS: [&str; 8] = ["%", "M", "MiB", "KiB", "s", "ms", "min", "h"];

/// Returns the words of `text`. A number and its unit are one word.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let unit = UNITS.contains(&word.trim_end_matches(['.', ',', ';', ':', ')']));
        match words.last_mut() {
            Some(number) if unit && number.ends_with(|last: char| last.is_ascii_digit()) => {
                *number += &format!(" {word}");
            }
            _ => words.push(word.into()),
        }
    }
    words
}

/// Breaks `text` between words. `first` is put before the first line, equally many spaces before
/// the other lines, and `broken` after each line that continues.
pub(crate) fn wrap(text: &str, first: &str, broken: &str) -> String {
    let limit = WIDTH - broken.chars().count();
    let mut lines = Vec::new();
    let mut line = first.to_string();
    let mut begun = false;
    for word in words(text) {
        if begun && line.chars().count() + 1 + word.chars().count() > limit {
            lines.push(line + broken);
            line = " ".repeat(first.chars().count());
            begun = false;
        }
        line += if begun { " " } else { "" };
        line += &word;
        begun = true;
    }
    lines.push(line);
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let got = [0.2, 59.6, 200.0, 7500.0].map(duration);
        assert_eq!(got, ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]);
    }

    #[test]
    fn numbers_have_their_shortest_exact_form() {
        for (value, expect) in [
            (1e-5, "1e-5"),
            (1.5e-5, "1.5e-5"),
            (0.95, "0.95"),
            (0.001, "1e-3"),
            (1.0, "1"),
            (12.5, "12.5"),
            (123.456, "123.456"),
        ] {
            assert_eq!(shortest(value), expect);
            assert_eq!(expect.parse(), Ok(value));
        }
    }

    #[test]
    fn lines_do_not_begin_with_a_unit() {
        let check = |text: &str| {
            for length in 80..110 {
                let wrapped = wrap(&format!("{} {text}", "x".repeat(length)), "- ", "");
                let second = wrapped.lines().nth(1).unwrap_or("  -").trim_start().to_string();
                assert!(!UNITS.iter().any(|unit| second.starts_with(unit)), "{wrapped}");
                assert_eq!(wrapped.split_whitespace().skip(2).collect::<Vec<_>>().join(" "), text);
            }
        };
        check("95 % interval");
        check("15.92 M, 2 h 13 min; 83.1 s. 36.42 %).");
    }

    #[test]
    fn one_is_no_plural() {
        assert_eq!([0, 1, 2].map(|count| counted(count, "row")), ["0 rows", "1 row", "2 rows"]);
    }
}
