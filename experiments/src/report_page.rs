//! The page of all results: reads everything under `results/` and writes `results/index.html`.

use crate::published::Folder;
use crate::results::{self, entries};
use crate::{networks, output, process, tables};
use anyhow::{Context, Error, Result, anyhow, bail};
use clap::Parser;
use report::{
    Claim, Deviation, Exhibit, NETWORKS, Page, PublishedNetworks, STAGES, Stages, TableEntry, TableResults,
};
use std::fmt::Display;
use std::path::{Path, PathBuf};

const CLAIMS: &str = include_str!("../claims.toml");
const DEVIATIONS: &str = include_str!("../deviations.toml");

/// Flags of the binary `report`.
#[derive(Debug, Clone, Parser)]
#[command(version, about = "Writes one HTML page of all results, with a verdict on every claim of the paper")]
struct Flags {
    /// Folder with the results
    #[arg(long, value_name = "DIR", default_value = "results")]
    results: PathBuf,

    /// File for the page; index.html in the folder with the results if not given. The page's links
    /// to files work only there
    #[arg(long, value_name = "FILE", conflicts_with = "verify")]
    out: Option<PathBuf>,

    /// Evaluate every published network instead of writing the page
    ///
    /// The networks are in networks/PROFILE/ in the folder with the results. The published and the
    /// measured figures are printed, and the exit code is 1 if they differ.
    #[arg(long)]
    verify: bool,

    /// Images for --verify, given as for --data of the tables
    #[arg(long, value_name = "WHERE", default_value = "auto", requires = "verify")]
    data: String,
}

/// Runs the binary: reads the results, writes the page, prints the verdicts.
pub fn main() -> Result<()> {
    let flags = Flags::parse();
    if flags.verify {
        return process::run(|| networks::verify(&flags.results, &flags.data));
    }
    let out = flags.out.unwrap_or_else(|| flags.results.join("index.html"));
    output::check_extension(&out, "html").map_err(|problem| anyhow!("--out {problem}"))?;
    let page = read(&flags.results)?;
    if page.is_empty() {
        bail!(
            "{} holds no results: run a table first, or name the folder with --results",
            flags.results.display()
        );
    }
    let html = page.html();
    report::write_text(&html, &out)?;
    output::print(&page.verdicts());
    output::print(&format!("Written to {} ({} KiB).", out.display(), html.len().div_ceil(1024)));
    Ok(())
}

/// Returns the paper's claims that can fail, from `experiments/claims.toml`.
pub fn claims() -> report::Result<Vec<Claim>> {
    Claim::parse(CLAIMS, "experiments/claims.toml")
}

/// Returns the deviations from the paper, from `experiments/deviations.toml`.
pub fn deviations() -> report::Result<Vec<Deviation>> {
    Deviation::parse(DEVIATIONS, "experiments/deviations.toml")
}

/// Reads everything that a folder of results holds.
///
/// `<table>/<profile>/<table>.csv` are a table's rows, `bench/` is speed, and `networks/<profile>/`
/// are published networks. Any other folder with pictures or CSV files, such as
/// `figure3/<profile>/`, is shown as it is.
pub fn read(results: &Path) -> Result<Page> {
    let tables = tables::every().map(|table| TableEntry {
        name: table.name.into(),
        title: table.title.into(),
        chooses: table.chooses,
    });
    let mut page =
        Page { tables: tables.collect(), claims: claims()?, deviations: deviations()?, ..Page::default() };
    if !results.is_dir() {
        bail!("{} is not a folder: run a table first, or name the folder with --results", results.display());
    }
    for name in entries(results, Path::is_dir)? {
        let folder = results.join(&name);
        if name == "bench" {
            page.bench = exhibit(results, &[&name], "Benchmarks", &["pytorch.csv"])?;
            let speeds = folder.join("pytorch.csv");
            if speeds.is_file() {
                page.speeds = report::bench::read_csv(&speeds)?;
            }
            continue;
        }
        if name == results::PUBLISHED {
            for profile in entries(&folder, Path::is_dir)? {
                let exhibit = exhibit(results, &[&name, &profile], "", &[NETWORKS])?;
                let folder = folder.join(&profile);
                if let Some(networks) = Folder::read(&folder)? {
                    report::read_stages(&folder)?.check_files(&folder)?;
                    page.networks.push(PublishedNetworks {
                        profile,
                        rows: networks.rows().to_vec(),
                        exhibit,
                    });
                }
            }
            continue;
        }
        let file = format!("{name}.csv");
        for profile in entries(&folder, Path::is_dir)? {
            let title = format!("{}, profile {profile}", title(&name));
            let exhibit = exhibit(results, &[&name, &profile], &title, &[&file])?;
            let folder = folder.join(&profile);
            let stages = match folder.join(STAGES).is_file() {
                true => report::read_stages(&folder)?,
                false => Stages::default(),
            };
            stages.check_files(&folder)?;
            let path = folder.join(&file);
            if path.is_file() {
                let rows = report::read_csv(&path)?;
                if !stages.files.is_empty() {
                    stages
                        .check_rows(&rows)
                        .map_err(Error::msg)
                        .with_context(|| path.display().to_string())?;
                }
                page.runs.push(TableResults {
                    table: name.clone(),
                    profile,
                    rows,
                    stages: stages.records,
                    exhibit,
                });
            } else {
                page.exhibits.push(exhibit);
            }
        }
        page.exhibits.push(exhibit(results, &[&name], &title(&name), &[])?);
    }
    page.exhibits.retain(|exhibit| !exhibit.is_empty());
    Ok(page)
}

/// Returns a title: "figure3" gives "Figure 3", and "ablation" gives "Ablation".
fn title(name: &str) -> String {
    let words = name.replace(['_', '-'], " ");
    let split = words.find(|c: char| c.is_ascii_digit()).unwrap_or(words.len());
    let (word, number) = words.split_at(split);
    let mut letters = word.trim_end().chars();
    let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{} {number}", letters.as_str()).trim_end().into()
}

/// Collects the files of one folder under `results`. Files named in `read` are only linked to,
/// because their rows are shown elsewhere.
fn exhibit(results: &Path, parts: &[&str], title: &str, read: &[&str]) -> Result<Exhibit> {
    let folder = parts.iter().fold(results.to_path_buf(), |path, part| path.join(part));
    let mut exhibit = Exhibit { title: title.into(), ..Exhibit::default() };
    for name in entries(&folder, Path::is_file)? {
        let (path, link) = (folder.join(&name), format!("{}/{name}", parts.join("/")));
        // A file that is not of the kind that its name says must not prevent the page: it is only
        // linked to.
        let unreadable = |why: &dyn Display| output::tell(&format!("{} is not shown: {why}", path.display()));
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => match std::fs::read_to_string(&path) {
                Ok(text) => exhibit.drawings.push((link.clone(), text)),
                Err(error) => unreadable(&error),
            },
            Some("csv") if !read.contains(&name.as_str()) => match lines(&path) {
                Ok(lines) => exhibit.tables.push((link.clone(), lines)),
                Err(error) => unreadable(&error),
            },
            _ => {}
        }
        exhibit.files.push(link);
    }
    Ok(exhibit)
}

/// Reads the lines of a CSV file, the heading first.
fn lines(path: &Path) -> csv::Result<Vec<Vec<String>>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_path(path)?;
    reader.records().map(|record| Ok(record?.iter().map(String::from).collect())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_have_titles() {
        for (name, expect) in
            [("figure3", "Figure 3"), ("ablation", "Ablation"), ("open_points", "Open points"), ("", "")]
        {
            assert_eq!(title(name), expect);
        }
    }
}
