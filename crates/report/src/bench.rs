//! Speed measurements: several implementations of the same work, measured in turns.
//!
//! Speeds of a shared machine drift, so a ratio is computed between the turns of the same round.
//! The report shows the median over the rounds, with the lowest and the highest round.

mod chart;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::{Result, write_text};
use crate::names::{BLUE, GREEN, ORANGE, PURPLE, model_label};
use crate::row::{read_table, write_table};
use crate::text::{Cell, Column, Table, list, optional, wrap};

/// One of the compared implementations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Implementation {
    /// The name in the CSV file.
    pub id: &'static str,
    /// The display name.
    pub label: &'static str,
    /// The colour in plots, from the palette of Okabe and Ito.
    pub colour: (u8, u8, u8),
}

/// The implementations, ours first.
pub const IMPLEMENTATIONS: [Implementation; 4] = [
    Implementation { id: OURS, label: "ours", colour: BLUE },
    Implementation { id: "pytorch_eager", label: "eager", colour: ORANGE },
    Implementation { id: "pytorch_channels_last", label: "channels_last", colour: GREEN },
    Implementation { id: "pytorch_compile", label: "compile", colour: PURPLE },
];

/// The name of our own implementation in the CSV file.
pub const OURS: &str = "ours";

/// The measurement of one implementation in one case: a row of the CSV file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// The network that the case is taken from, as "mobilenet_v2".
    pub network: String,
    /// The factor that multiplies the network's widths.
    pub width: f64,
    /// The number of images per step.
    pub batch: usize,
    /// "train", "eval", or the name of an operation, whose step is a forward and a backward pass.
    pub what: String,
    /// "float" or "a4w4".
    pub precision: String,
    /// The dtype of feature maps, "f32" or "bf16". PyTorch uses autocast for "bf16".
    #[serde(default = "f32_maps")]
    pub arithmetic: String,
    /// One of [`IMPLEMENTATIONS`].
    pub implementation: String,
    /// The median speed over the rounds; `None` if the implementation did not run.
    pub images_per_second: Option<f64>,
    /// The speed of the slowest round.
    pub images_per_second_min: Option<f64>,
    /// The speed of the fastest round.
    pub images_per_second_max: Option<f64>,
    /// The median of our speed divided by this one's in the same round. `None` for ours.
    pub ratio_of_ours: Option<f64>,
    /// The lowest of the ratios.
    pub ratio_of_ours_min: Option<f64>,
    /// The highest of the ratios.
    pub ratio_of_ours_max: Option<f64>,
    /// The peak resident memory of the process while it was measured, in MiB.
    pub peak_mib: Option<f64>,
    /// The resident memory of the process before the case was set up (mainly libraries), in MiB.
    pub before_mib: Option<f64>,
    /// The number of turns of each implementation.
    pub rounds: usize,
    /// The number of threads that compute.
    pub threads: usize,
    /// The least memory traffic of a step in MiB: each operand and each result of each operation
    /// once. It is counted only for ours on a GPU.
    #[serde(default)]
    pub step_mib: Option<f64>,
    /// This traffic per second in the median round, in percent of a large copy's, on a GPU.
    #[serde(default)]
    pub share_of_copy_percent: Option<f64>,
    /// The reason why the implementation did not run.
    pub problem: Option<String>,
}

/// The median, the lowest and the highest of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median; for an even number of values, the mean of the middle two.
    pub median: f64,
    /// The lowest value.
    pub min: f64,
    /// The highest value.
    pub max: f64,
}

impl Spread {
    /// Computes the spread of some values; `None` if there are no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (middle, (&min, &max)) = (values.len() / 2, values.first().zip(values.last())?);
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, min, max })
    }
}

impl Speed {
    /// Fills in the statistics of the rounds: this implementation's images per second and, unless
    /// it is ours, the ratios to `ours` in the same rounds.
    pub fn measured(mut self, rounds: &[f64], ours: Option<&[f64]>) -> Self {
        let speed = Spread::of(rounds.iter().copied());
        let ratio =
            ours.and_then(|ours| Spread::of(ours.iter().zip(rounds).map(|(ours, theirs)| ours / theirs)));
        let parts =
            |spread: Option<Spread>| (spread.map(|s| s.median), spread.map(|s| s.min), spread.map(|s| s.max));
        (self.images_per_second, self.images_per_second_min, self.images_per_second_max) = parts(speed);
        (self.ratio_of_ours, self.ratio_of_ours_min, self.ratio_of_ours_max) = parts(ratio);
        self.rounds = rounds.len();
        self
    }

    /// Returns whether a whole network was measured.
    pub fn of_network(&self) -> bool {
        matches!(self.what.as_str(), "train" | "eval")
    }

    /// Returns the measured work without the dtype of feature maps.
    fn work(&self) -> (&str, u64, usize, &str, &str) {
        (&self.network, self.width.to_bits(), self.batch, &self.what, &self.precision)
    }
}

/// Returns the dtype of feature maps in older files, which do not say it.
fn f32_maps() -> String {
    "f32".into()
}

/// The rows of one case.
struct Case<'a>(&'a [Speed]);

impl<'a> Case<'a> {
    fn all(rows: &'a [Speed]) -> impl Iterator<Item = Self> {
        rows.chunk_by(|a, b| (a.work(), &a.arithmetic) == (b.work(), &b.arithmetic)).map(Self)
    }

    fn row(&self, id: &str) -> Option<&'a Speed> {
        self.0.iter().find(|row| row.implementation == id)
    }

    /// Returns the fastest implementation that is not ours.
    fn best(&self) -> Option<&'a Speed> {
        fastest(self.0.iter().filter(|row| row.implementation != OURS)).map(|(_, row)| row)
    }

    fn first(&self) -> &'a Speed {
        &self.0[0]
    }
}

/// The kind of device on which the implementations ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU that the implementations use in turns.
    Gpu,
}

impl Place {
    /// Returns the common part of the files' names.
    fn stem(self) -> &'static str {
        match self {
            Self::Cpu => "pytorch",
            Self::Gpu => "cuda",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Cpu => "Speed beside PyTorch on a CPU",
            Self::Gpu => "Speed beside PyTorch on a GPU",
        }
    }
}

/// The contents of a report besides the rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// The command that made the rows.
    pub command: String,
    /// Remarks for the reader.
    pub notes: Vec<String>,
    /// The machine and the software, as (name, value).
    pub machine: Vec<(String, String)>,
    /// The kind of device.
    pub place: Place,
}

/// Writes `pytorch.csv`, `.md`, `.svg` and `.png` to a folder, or `cuda.*` if on a GPU.
pub fn write(rows: &[Speed], about: &About, folder: &Path) -> Result<()> {
    let path = |extension: &str| folder.join(format!("{}.{extension}", about.place.stem()));
    write_table(rows, &path("csv"))?;
    write_text(&markdown(rows, about), &path("md"))?;
    chart::plot(rows, about, &path("svg"), &path("png"))
}

/// Reads the rows of a `pytorch.csv`.
pub fn read_csv(path: &Path) -> Result<Vec<Speed>> {
    read_table(path)
}

/// Returns the report as Markdown.
pub fn markdown(rows: &[Speed], about: &About) -> String {
    let mut blocks = vec![format!("# {}", about.place.title()), READING.into()];
    for (heading, table) in tables(rows) {
        blocks.extend([format!("## {heading}"), table.markdown()]);
    }
    blocks.extend(["## Notes".into(), list(&notes(rows, about)), "## How it was made".into()]);
    blocks.push(format!("```sh\n{}\n```", about.command));
    blocks.push(list(&machine(about)));
    blocks.join("\n\n") + "\n"
}

/// Returns the report as plain text.
pub fn terminal(rows: &[Speed], about: &About) -> String {
    let mut blocks = vec![wrap(READING, "", "")];
    blocks.extend(tables(rows).into_iter().map(|(heading, table)| format!("{heading}\n\n{}", table.plain())));
    let lines = notes(rows, about).into_iter().chain(machine(about));
    blocks.push(lines.map(|line| wrap(&line, "- ", "")).collect::<Vec<_>>().join("\n"));
    blocks.join("\n\n") + "\n"
}

pub(crate) const READING: &str = "×2 means that ours does twice as many images a second. A ratio is the median over rounds \
                       in which every implementation had its turn, with the lowest and the highest round; \
                       PyTorch's best is its mode with the highest median.";

fn machine(about: &About) -> Vec<String> {
    about.machine.iter().map(|(name, value)| format!("{name}: {value}")).collect()
}

/// Returns the notes, and the implementations that did not run.
fn notes(rows: &[Speed], about: &About) -> Vec<String> {
    let mut notes = about.notes.clone();
    for row in rows {
        if let Some(problem) = &row.problem {
            let Speed { network, width, batch, what, precision, implementation, .. } = row;
            notes.push(format!(
                "{implementation} did not run in {network} {width:?} {batch} {what} {precision}: {problem}"
            ));
        }
    }
    notes
}

/// Returns the tables that have rows, with their headings.
pub(crate) fn tables(rows: &[Speed]) -> Vec<(String, Table<'static>)> {
    let cases: Vec<Case> = Case::all(rows).collect();
    let (networks, operations): (Vec<_>, Vec<_>) =
        cases.iter().partition::<Vec<_>, _>(|case| case.first().of_network());
    let batch = operations.first().map_or(0, |case| case.first().batch);
    // Memory is measured only on a CPU, and the share of a copy's speed only on a GPU.
    let with_memory: Vec<_> =
        networks.iter().copied().filter(|case| case.first().peak_mib.is_some()).collect();
    let with_share: Vec<_> =
        networks.iter().copied().filter(|case| case.first().share_of_copy_percent.is_some()).collect();
    let table = |head: &[Column<'static>], cases: &[&Case], cells: fn(&Case) -> Vec<String>| Table {
        head: head.to_vec(),
        rows: cases.iter().map(|case| cells(case).into_iter().map(Cell::from).collect()).collect(),
    };
    let all = [
        ("Whole networks, images a second".into(), table(&NETWORKS, &networks, network_cells)),
        (
            "At its best: the fastest of each, whatever it computes in; the ratio is that of the medians".into(),
            best_table(&networks),
        ),
        (
            format!("Single operations, forward and backward, ms for a batch of {batch}"),
            table(&OPERATIONS, &operations, operation_cells),
        ),
        (
            "Memory, MiB: the peak less what was resident before the case was set up".into(),
            table(&MEMORY, &with_memory, memory_cells),
        ),
        (
            "Ours beside the memory's speed: what a step moves at least, and its share of what a large copy moves in \
             the same time"
                .into(),
            table(&SHARE, &with_share, share_cells),
        ),
    ];
    all.into_iter().filter(|(_, table)| !table.rows.is_empty()).collect()
}

const NETWORKS: [Column; 10] = [
    ("network", false),
    ("what", false),
    ("bits", false),
    ("batch", true),
    ("ours", true),
    ("PyTorch's best", true),
    ("ratio", true),
    ("eager", true),
    ("channels_last", true),
    ("compile", true),
];

fn network_cells(case: &Case) -> Vec<String> {
    let mut cells = case_cells(case);
    let speed = |row: Option<&Speed>| optional(row.and_then(|row| row.images_per_second), three_figures);
    cells.extend([speed(case.row(OURS)), best_cell(case, three_figures)]);
    cells.push(ratio_cell(case.best()));
    cells.extend(IMPLEMENTATIONS[1..].iter().map(|mode| {
        optional(case.row(mode.id).and_then(|row| row.ratio_of_ours), |ratio| format!("×{ratio:.2}"))
    }));
    cells
}

/// Returns the row with the highest speed among the measured ones, with its images per second.
fn fastest<'a>(rows: impl Iterator<Item = &'a Speed>) -> Option<(f64, &'a Speed)> {
    let measured = rows.filter_map(|row| Some((row.images_per_second?, row)));
    measured.max_by(|a, b| a.0.total_cmp(&b.0))
}

/// Returns the table of the cases that were measured in both dtypes: our faster one next to
/// PyTorch's faster one.
fn best_table(networks: &[&Case]) -> Table<'static> {
    let columns = [("network", false), ("what", false), ("bits", false), ("batch", true), ("ours", true)];
    let head = columns.into_iter().chain([("PyTorch's best", true), ("ratio", true)]).collect();
    let groups =
        networks.chunk_by(|a, b| a.first().work() == b.first().work()).filter(|group| group.len() > 1);
    let row = |group: &[&Case]| {
        let ours = fastest(group.iter().filter_map(|case| case.row(OURS)));
        let best = fastest(group.iter().filter_map(|case| case.best()));
        let Speed { network, width, batch, what, precision, .. } = group[0].first();
        let cells = [
            model_label(network, *width),
            what.clone(),
            bits_label(precision),
            batch.to_string(),
            optional(ours, |(speed, row)| format!("{} ({})", three_figures(speed), row.arithmetic)),
            optional(best, |(speed, row)| {
                format!("{} ({}, {})", three_figures(speed), label(&row.implementation), row.arithmetic)
            }),
            optional(ours.zip(best), |((ours, _), (best, _))| format!("×{:.2}", ours / best)),
        ];
        cells.into_iter().map(Cell::from).collect()
    };
    Table { head, rows: groups.map(row).collect() }
}

const OPERATIONS: [Column; 4] =
    [("operation", false), ("ours", true), ("PyTorch's best", true), ("ratio", true)];

fn operation_cells(case: &Case) -> Vec<String> {
    let batch = case.first().batch as f64;
    let milliseconds = |speed: f64| three_figures(1e3 * batch / speed);
    let ours = case.row(OURS).and_then(|row| row.images_per_second);
    vec![
        case.first().what.clone(),
        optional(ours, milliseconds),
        best_cell(case, milliseconds),
        ratio_cell(case.best()),
    ]
}

const MEMORY: [Column; 9] = [
    ("network", false),
    ("what", false),
    ("bits", false),
    ("batch", true),
    ("ours", true),
    ("eager", true),
    ("channels_last", true),
    ("compile", true),
    ("before (ours, PyTorch)", true),
];

fn memory_cells(case: &Case) -> Vec<String> {
    let mut cells = case_cells(case);
    cells.extend(IMPLEMENTATIONS.iter().map(|implementation| {
        let row = case.row(implementation.id);
        let own = row.and_then(|row| row.peak_mib.zip(row.before_mib)).map(|(peak, before)| peak - before);
        optional(own, |mib| format!("{mib:.0}"))
    }));
    let before =
        |row: Option<&Speed>| optional(row.and_then(|row| row.before_mib), |mib| format!("{mib:.0}"));
    cells.push(format!("{}, {}", before(case.row(OURS)), before(case.best())));
    cells
}

const SHARE: [Column; 7] = [
    ("network", false),
    ("what", false),
    ("bits", false),
    ("batch", true),
    ("images/s", true),
    ("MiB a step", true),
    ("of the copy", true),
];

fn share_cells(case: &Case) -> Vec<String> {
    let ours = case.first();
    let mut cells = case_cells(case);
    cells.push(optional(ours.images_per_second, three_figures));
    cells.push(optional(ours.step_mib, three_figures));
    cells.push(optional(ours.share_of_copy_percent, |share| format!("{share:.0} %")));
    cells
}

/// Returns the cells for the network, the work, the bits and the batch size.
fn case_cells(case: &Case) -> Vec<String> {
    let Speed { network, width, batch, what, .. } = case.first();
    vec![model_label(network, *width), what.clone(), precision_label(case.first()), batch.to_string()]
}

fn best_cell(case: &Case, show: impl Fn(f64) -> String) -> String {
    let best = case.best().and_then(|row| Some((row, row.images_per_second?)));
    optional(best, |(row, speed)| format!("{} ({})", show(speed), label(&row.implementation)))
}

fn ratio_cell(row: Option<&Speed>) -> String {
    let ratio =
        row.and_then(|row| Some((row.ratio_of_ours?, row.ratio_of_ours_min?, row.ratio_of_ours_max?)));
    optional(ratio, |(median, min, max)| format!("×{median:.2} ({min:.2}–{max:.2})"))
}

/// Returns the name of an implementation for people.
pub fn label(implementation: &str) -> &str {
    let known = IMPLEMENTATIONS.iter().find(|known| known.id == implementation);
    known.map_or(implementation, |known| known.label)
}

/// Returns the bits, and the dtype of feature maps if it is not f32.
fn precision_label(row: &Speed) -> String {
    let bits = bits_label(&row.precision);
    if row.arithmetic == f32_maps() { bits } else { format!("{bits}, {}", row.arithmetic) }
}

fn bits_label(precision: &str) -> String {
    match precision {
        "a4w4" => "A4/W4".into(),
        other => other.into(),
    }
}

/// Formats a number with three significant figures, or with all digits before the point.
fn three_figures(value: f64) -> String {
    let decimals = if value >= 100.0 { 0 } else { 2 - (value.max(0.01).log10().floor() as i32).clamp(-2, 2) };
    format!("{value:.*}", decimals.max(0) as usize)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn three_figures_are_shown() {
        for (value, text) in
            [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123")]
        {
            assert_eq!(three_figures(value), text);
        }
    }

    /// Returns a case with median speeds of 200 images/s for ours, 90 for eager and 180 for
    /// channels_last. Compile did not run.
    pub(crate) fn case(network: &str, width: f64, what: &str, precision: &str) -> Vec<Speed> {
        let ours = [180.0, 200.0, 240.0];
        let speeds = IMPLEMENTATIONS.iter().enumerate().map(|(i, implementation)| {
            let row = Speed {
                network: network.into(),
                width,
                batch: 64,
                what: what.into(),
                precision: precision.into(),
                arithmetic: f32_maps(),
                implementation: implementation.id.into(),
                peak_mib: Some(300.0 + 100.0 * i as f64),
                before_mib: Some(if i == 0 { 10.0 } else { 200.0 }),
                rounds: 3,
                threads: 2,
                problem: (i == 3).then(|| "no compiler".into()),
                ..Speed::default()
            };
            let rounds: Vec<f64> = [100.0, 100.0, 80.0].iter().map(|speed| speed * i as f64 * 0.9).collect();
            match i {
                0 => row.measured(&ours, None),
                3 => Speed { peak_mib: None, before_mib: None, ..row },
                _ => row.measured(&rounds, Some(&ours)),
            }
        });
        speeds.collect()
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let rows = case("mobilenet_v2", 1.0, "train", "float");
        let eager = &rows[1];
        let close = |found: Option<f64>, expected: f64| assert!((found.unwrap() - expected).abs() < 1e-9);
        close(eager.images_per_second, 90.0);
        close(eager.ratio_of_ours, 200.0 / 90.0);
        close(eager.ratio_of_ours_min, 180.0 / 90.0);
        close(eager.ratio_of_ours_max, 240.0 / 72.0);
        assert_eq!((rows[0].ratio_of_ours, rows[0].rounds), (None, 3));
    }

    #[test]
    fn on_a_gpu_the_share_of_the_memorys_speed_is_shown() {
        let mut rows = case("mobilenet_v2", 1.0, "train", "a4w4");
        for row in &mut rows {
            (row.peak_mib, row.before_mib) = (None, None);
        }
        (rows[0].step_mib, rows[0].share_of_copy_percent) = (Some(812.4), Some(43.6));
        let about = About { place: Place::Gpu, ..About::default() };
        let text = markdown(&rows, &about);
        assert!(text.contains("# Speed beside PyTorch on a GPU"), "{text}");
        assert!(text.contains("| MobileNetV2 | train | A4/W4 | 64 | 200 | 812 | 44 % |"), "{text}");
        assert!(!text.contains("Memory, MiB"), "{text}");
        let folder = tempfile::tempdir().unwrap();
        write(&rows, &about, folder.path()).unwrap();
        for extension in ["csv", "md", "svg", "png"] {
            assert!(folder.path().join(format!("cuda.{extension}")).exists(), "{extension}");
        }
    }

    /// Ours is fastest in bf16, at 240 images/s, and PyTorch in float32, at 180.
    #[test]
    fn the_best_of_each_stands_beside_the_other() {
        let floats = case("mobilenet_v2", 1.0, "train", "float");
        let mut halves = floats.clone();
        for row in &mut halves {
            row.arithmetic = "bf16".into();
            let factor = if row.implementation == OURS { 1.2 } else { 0.5 };
            row.images_per_second = row.images_per_second.map(|speed| factor * speed);
        }
        let text = markdown(&[floats.clone(), halves].concat(), &About::default());
        for part in [
            "| MobileNetV2 | train | float | 64 | 240 (bf16) | 180 (channels_last, f32) | ×1.33 |",
            "| MobileNetV2 | train | float, bf16 | 64 | 240 |",
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(!markdown(&floats, &About::default()).contains("At its best"));
    }

    #[test]
    fn reports_name_the_best_mode_and_what_did_not_run() {
        let rows = [
            case("mobilenet_v2", 0.25, "train", "a4w4"),
            case("mobilenet_v2", 1.0, "depthwise s1 32@32x32", "float"),
        ]
        .concat();
        let text = markdown(&rows, &About { command: "a command".into(), ..About::default() });
        for part in [
            "| MobileNetV2 ×0.25 | train | A4/W4 | 64 | 200 | 180 (channels_last) | ×1.11 (1.00–1.67) | ×2.22 | ×1.11 | – |",
            "| depthwise s1 32@32x32 | 320 | 356 (channels_last) | ×1.11 (1.00–1.67) |",
            "| MobileNetV2 ×0.25 | train | A4/W4 | 64 | 290 | 200 | 300 | – | 10, 200 |",
            "pytorch_compile did not run in mobilenet_v2 0.25 64 train a4w4: no compiler",
            "a command",
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
    }
}
