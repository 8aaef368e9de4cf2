//! The page of all results in a real browser: headless Chromium, if it is installed.

#[path = "../../crates/report/tests/sample/mod.rs"]
mod sample;

use report::{Paper, Row};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the folder of the results that are kept with the code.
fn results() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../results")
}

fn browser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|file| file.is_file())
}

/// What a browser makes of a page in a window of a given width.
#[derive(Debug)]
struct Seen {
    /// The width of the window; `scroll` is the width that the page needs. Both are in CSS pixels.
    inner: u64,
    scroll: u64,
    tables: usize,
    /// Those of the five tables that have no table of figures.
    missing: Vec<String>,
    /// The number of headings without height, which were not laid out.
    flat: usize,
    console: Vec<String>,
}

/// Shows the page in a frame of that width and measures it. Windows can't be arbitrarily narrow.
fn look(browser: &Path, html: &str, width: u32) -> Seen {
    let folder = tempfile::tempdir().unwrap();
    let inner = html.replace('&', "&amp;").replace('"', "&quot;");
    let frame = format!(
        "<!DOCTYPE html><meta charset=utf-8><link rel=icon href='data:,'><body>\
         <iframe width={width} height=800 style='border:0' srcdoc=\"{inner}\"></iframe><pre id=seen></pre><script>\
         window.onload = () => {{\
           const frame = document.querySelector('iframe'), inside = frame.contentDocument;\
           const missing = [1, 2, 3, 4, 5].map(n => 'table' + n)\
             .filter(id => !inside.querySelector('#' + id + ' table tbody tr'));\
           document.getElementById('seen').textContent = JSON.stringify({{\
             inner: frame.contentWindow.innerWidth, scroll: inside.documentElement.scrollWidth,\
             tables: inside.querySelectorAll('table').length, missing,\
             flat: [...inside.querySelectorAll('h1, h2, h3')].filter(h => h.offsetHeight == 0).length}});\
         }}</script>"
    );
    let file = folder.path().join("frame.html");
    std::fs::write(&file, frame).unwrap();
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--enable-logging=stderr", "--window-size=1400,900", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
        .arg(format!("file://{}", file.display()))
        .output()
        .unwrap();
    let (dom, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let seen = dom.split_once("<pre id=\"seen\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let (seen, _) = seen.unwrap_or_else(|| panic!("the browser gave no page ({}): {log}", output.status));
    let seen: Value = serde_json::from_str(seen).unwrap_or_else(|error| panic!("{error}: {seen}: {log}"));
    Seen {
        inner: seen["inner"].as_u64().unwrap(),
        scroll: seen["scroll"].as_u64().unwrap(),
        tables: seen["tables"].as_u64().unwrap() as usize,
        missing: serde_json::from_value(seen["missing"].clone()).unwrap(),
        flat: seen["flat"].as_u64().unwrap() as usize,
        console: log.lines().filter(|line| line.contains("CONSOLE")).map(String::from).collect(),
    }
}

/// Writes results of every table with three seeds and with long names, as the tables' binaries do.
fn all_tables(folder: &Path) {
    for table in Paper::published().tables() {
        let row = |of: &report::PaperRow, seed: u64| {
            Row {
                table: table.into(),
                model: of.model.clone(),
                width: 0.25,
                activation_bits: of.activation_bits,
                weight_bits: of.weight_bits,
                method: of.method.clone(),
                seed,
                top1_percent: 0.5 * of.top1_percent + (seed as f64 * 1.7 + of.top1_percent * 7.3) % 1.0,
                macs: (of.mac_millions * 1e6) as u64,
                weights_pruned_percent: if of.method == "original" { 0.0 } else { 33.3 },
                settings_hash: "0123456789abcdef".repeat(8),
                git_commit: "0123456789ab".into(),
                device: "a_processor_with_a_name_that_has_no_place_to_break_".repeat(3),
                ..sample::row()
            }
            .compare(Paper::published())
        };
        let rows: Vec<Row> = Paper::published()
            .table(table)
            .iter()
            .flat_map(|of| (0..3).map(move |seed| row(of, seed)))
            .collect();
        let folder = folder.join(table).join("reduced");
        let about = report::About { title: table.into(), ..report::About::default() };
        report::write_csv(&rows, &folder.join(format!("{table}.csv"))).unwrap();
        report::plot(&rows, &about, &folder.join("a.svg"), &folder.join("a.png")).unwrap();
    }
    report::write_text(
        "layer,variance\nblocks.0.depthwise,1.23456789e-7\n",
        &folder.join("figure3/reduced/variances.csv"),
    )
    .unwrap();
}

#[test]
fn the_page_fits_phones_and_desktops_without_an_error() {
    let Some(browser) = browser() else {
        println!("skipped: no chromium in PATH");
        return;
    };
    // The measurement finds the faults of a bad page.
    let bad =
        "<!DOCTYPE html><body><h1>a</h1><div style='width:2000px'>wide</div><script>nothing.of.it()</script>";
    let seen = look(&browser, bad, 360);
    assert!(seen.inner == 360 && seen.scroll >= 2000, "{seen:?}");
    assert!(seen.missing.len() == 5 && seen.console.len() == 1, "{seen:?}");

    let folder = tempfile::tempdir().unwrap();
    all_tables(folder.path());
    let empty = tempfile::tempdir().unwrap();
    for (results, least) in [(results(), 20), (folder.path().into(), 30), (empty.path().into(), 20)] {
        let html = experiments::report_page::read(&results).unwrap().html();
        for width in [360, 1280] {
            let seen = look(&browser, &html, width);
            assert_eq!(seen.inner, u64::from(width), "{seen:?}");
            assert!(seen.scroll <= seen.inner, "{}: {seen:?}", results.display());
            assert!(seen.missing.is_empty() && seen.tables >= least && seen.flat == 0, "{seen:?}");
            assert!(seen.console.is_empty(), "{seen:?}");
        }
    }
}

#[test]
fn the_results_kept_with_the_code_make_a_page() {
    let page = experiments::report_page::read(&results()).unwrap();
    let html = page.html();
    assert!(!page.runs.is_empty() && !page.speeds.is_empty());
    for run in &page.runs {
        assert!(!run.rows.is_empty() && !run.stages.is_empty(), "{} {}", run.table, run.profile);
        assert!(run.exhibit.drawings.iter().all(|(path, _)| html.contains(path)));
    }
    assert!(html.len() < 1 << 20, "{} bytes", html.len());
    // Every file that the page links to is there.
    let links = html.split(" href=\"").skip(1).map(|rest| rest.split_once('"').unwrap().0);
    let links: Vec<&str> = links.filter(|link| !link.contains(':') && !link.starts_with('#')).collect();
    assert!(links.len() > 5);
    for link in links {
        assert!(results().join(link).is_file(), "no {link}");
    }
}

/// A result that contradicts the paper stays as it is, with an explanation beside it.
#[test]
fn every_failed_claim_of_the_results_says_why() {
    let html = experiments::report_page::read(&results()).unwrap().html();
    let articles =
        html.split("<article class=\"claim\"").skip(1).map(|of| of.split_once("</article>").unwrap().0);
    let failed: Vec<&str> = articles.filter(|of| of.contains("verdict fails")).collect();
    assert!(!failed.is_empty());
    for article in failed {
        assert!(
            ["our best explanation", "forced by the design"].iter().any(|why| article.contains(why)),
            "{article}"
        );
    }
}

#[test]
fn every_table_has_claims_that_the_paper_bears_out() {
    let claims = experiments::report_page::claims().unwrap();
    let contradicted = claims.iter().filter(|claim| claim.paper == report::PaperSays::Contradicts);
    assert_eq!(contradicted.map(|claim| claim.id.as_str()).collect::<Vec<_>>(), [""; 0]);
    for table in Paper::published().tables() {
        assert!(claims.iter().any(|claim| claim.table.as_deref() == Some(table)), "{table}");
    }
    assert!(!experiments::report_page::deviations().unwrap().is_empty());
}

/// A mistyped name must not replace a table by the page.
#[test]
fn only_a_page_is_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("table3.csv");
    std::fs::write(&csv, "a record").unwrap();
    let mut report = Command::new(env!("CARGO_BIN_EXE_report"));
    let output = report.arg("--results").arg(results()).arg("--out").arg(&csv).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("table3.csv") && error.contains(".html"), "{error}");
    assert_eq!(std::fs::read_to_string(&csv).unwrap(), "a record");
}

#[test]
fn a_missing_folder_is_explained() {
    let error = experiments::report_page::read(Path::new("no/such/folder")).unwrap_err().to_string();
    assert!(error.contains("no/such/folder") && error.contains("--results"), "{error}");
}

/// A file in another encoding is linked to, and the page is made all the same.
#[test]
fn files_that_are_not_what_they_are_called_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let notes = folder.path().join("notes/reduced");
    std::fs::create_dir_all(&notes).unwrap();
    std::fs::write(notes.join("plain.csv"), "layer,variance\nstem,1\n").unwrap();
    std::fs::write(notes.join("latin.csv"), b"netz,gr\xf6\xdfe\na,1\n").unwrap();
    std::fs::write(notes.join("latin.svg"), b"<svg><text>\xfc</text></svg>").unwrap();
    let html = experiments::report_page::read(folder.path()).unwrap().html();
    for part in ["<caption>plain</caption>", "notes/reduced/latin.csv", "notes/reduced/latin.svg"] {
        assert!(html.contains(part), "no {part}");
    }
}
