//! Tests of the public interface: rows in, files and text out.

mod sample;

use std::fs;
use std::path::Path;

use report::{
    About, Estimate, Paper, Row, Summary, markdown, paired, plot, read_csv, summarize, terminal, write_csv,
    write_text,
};

/// Returns a row of Table 3 as a run on the paper's data would give it.
fn row(model: &str, bits: u32, method: &str, seed: u64, top1_percent: f64) -> Row {
    Row {
        table: "table3".into(),
        profile: "quick".into(),
        model: model.into(),
        activation_bits: bits,
        weight_bits: bits,
        method: method.into(),
        seed,
        top1_percent,
        macs: if method == "ours" { 92_400_000 } else { 147_240_000 },
        weights_pruned_percent: if method == "ours" { 35.74 } else { 0.0 },
        ..sample::row()
    }
    .compare(Paper::published())
}

/// Returns rows of MobileNetV2 at 4 bits: ours is 1, 2, 3 points above DFQ for seeds 0, 1, 2.
fn three_seeds() -> Vec<Row> {
    let ours = [72.0, 74.0, 76.0].into_iter().enumerate();
    let dfq = [71.0, 72.0, 73.0].into_iter().enumerate();
    let ours = ours.map(|(seed, top1)| row("mobilenet_v2", 4, "ours", seed as u64, top1));
    ours.chain(dfq.map(|(seed, top1)| row("mobilenet_v2", 4, "dfq_with_fine_tune", seed as u64, top1)))
        .collect()
}

fn about() -> About {
    About {
        title: "Table 3".into(),
        command: "pfq table3 --seeds 0,1,2".into(),
        profile: "quick".into(),
        dataset: "cifar100".into(),
        notes: vec!["A note.".into()],
        provenance: vec![("images".into(), "50000".into())],
    }
}

#[test]
fn paper_has_every_published_row() {
    fn check(table: &str, expect: (usize, &str)) {
        let rows = Paper::published().table(table);
        let sum: f64 = rows.iter().map(|row| row.top1_percent).fold(0.0, |sum, top1| sum + top1);
        assert_eq!((rows.len(), format!("{sum:.2}").as_str()), expect, "{table}");
    }
    assert_eq!(
        Paper::published().tables().collect::<Vec<_>>(),
        ["table1", "table2", "table3", "table4", "table5"]
    );
    check("table1", (12, "893.85"));
    check("table2", (8, "573.14"));
    check("table3", (8, "561.16"));
    check("table4", (4, "251.11"));
    check("table5", (2, "141.58"));
    check("table6", (0, "0.00"));
    assert_eq!(Paper::published().pruned_weights().len(), 3);
}

#[test]
fn paper_is_looked_up_by_table() {
    fn check(input: (&str, &str, u32, &str), expect: Option<(f64, f64)>) {
        let (table, model, bits, method) = input;
        let found = Paper::published().lookup(table, model, bits, bits, method);
        assert_eq!(found.map(|row| (row.top1_percent, row.mac_millions)), expect, "{input:?}");
    }
    check(("table3", "mobilenet_v1", 4, "dfq_with_fine_tune"), Some((71.57, 510.0)));
    check(("table3", "mobilenet_v2", 4, "ours"), Some((72.70, 92.4)));
    check(("table5", "mobilenet_v2", 4, "ours"), Some((71.58, 92.4)));
    check(("table3", "mobilenet_v2", 5, "ours"), None);
    check(("figure3", "mobilenet_v2", 4, "ours"), None);
}

#[test]
fn comparison_is_signed_and_says_where_it_is_absolute() {
    fn check(input: Row, expect: (Option<&str>, bool)) {
        let row = input.compare(Paper::published());
        let difference = row.top1_minus_paper.map(|points| format!("{points:+.2}"));
        assert_eq!((difference.as_deref(), row.comparable()), expect, "{row:?}");
    }
    let ours = || row("mobilenet_v2", 4, "ours", 0, 70.2);
    check(ours(), (Some("-2.50"), true));
    check(Row { top1_percent: 73.7, ..ours() }, (Some("+1.00"), true));
    check(Row { dataset: "synthetic".into(), ..ours() }, (Some("-2.50"), false));
    check(Row { width: 0.25, ..ours() }, (Some("-2.50"), false));
    check(Row { method: "mine".into(), ..ours() }, (None, true));
}

#[test]
fn csv_comes_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let check = |input: Vec<Row>| {
        let path = folder.path().join("new/folder/table3.csv");
        write_csv(&input, &path).unwrap();
        assert_eq!(read_csv(&path).unwrap(), input);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file stayed");
    };
    check(three_seeds());
    check(vec![Row { device: "a, \"b\"\nc".into(), method: "mine".into(), ..three_seeds()[0].clone() }]);
    check(vec![]);
}

#[test]
fn errors_begin_with_the_file() {
    fn check<T: std::fmt::Debug>(path: &Path, result: report::Result<T>) {
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()), "{message}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "one,two\n1,2\n").unwrap();
    let (missing, below) = (folder.path().join("missing.csv"), file.join("below.png"));
    check(&missing, read_csv(&missing));
    check(&file, read_csv(&file));
    check(&below, write_csv(&three_seeds(), &below));
    check(&below, write_text("text", &below));
    check(&below, plot(&three_seeds(), &about(), &folder.path().join("a.svg"), &below));
}

#[test]
fn summaries_are_means_over_seeds() {
    fn check(input: &[Row], expect: &[&str]) {
        let text = |of: Summary| {
            let Summary { method, seeds, mean, std, top1_minus_paper, .. } = of;
            format!("{method}: {seeds} seeds, {mean:.2}, {std:.2?}, {top1_minus_paper:.2?}")
        };
        assert_eq!(summarize(input).into_iter().map(text).collect::<Vec<_>>(), expect);
    }
    let rows = three_seeds();
    check(
        &rows,
        &[
            "dfq_with_fine_tune: 3 seeds, 72.00, Some(1.00), Some(-0.14)",
            "ours: 3 seeds, 74.00, Some(2.00), Some(1.30)",
        ],
    );
    check(&rows[..1], &["ours: 1 seeds, 72.00, None, Some(-0.70)"]);
    // The later row of the same seed counts.
    let later = Row { top1_percent: 70.0, ..rows[0].clone() };
    check(&[rows[0].clone(), later], &["ours: 1 seeds, 70.00, None, Some(-2.70)"]);
    check(&[], &[]);
}

#[test]
fn summaries_are_in_the_order_of_every_table_of_the_paper() {
    fn check(table: &str) {
        let theirs = Paper::published().table(table);
        let run = |row: &report::PaperRow| Row {
            table: table.into(),
            weight_bits: row.weight_bits,
            ..self::row(&row.model, row.activation_bits, &row.method, 0, row.top1_percent)
        };
        let rows: Vec<Row> = theirs.iter().rev().map(run).collect();
        let found =
            summarize(&rows).into_iter().map(|of| (of.model, of.activation_bits, of.weight_bits, of.method));
        let expect =
            theirs.iter().cloned().map(|of| (of.model, of.activation_bits, of.weight_bits, of.method));
        assert_eq!(found.collect::<Vec<_>>(), expect.collect::<Vec<_>>(), "{table}");
    }
    Paper::published().tables().for_each(check);
}

#[test]
fn methods_of_our_own_have_the_order_of_the_rows_with_the_same_bits() {
    let run = |bits, method: &str| Row { table: "mine".into(), ..row("mobilenet_v2", bits, method, 0, 50.0) };
    // The second method was run at 3 bits alone, and still stands before the last one.
    let rows = [run(4, "first"), run(4, "last"), run(3, "first"), run(3, "second"), run(3, "last")];
    let found: Vec<_> = summarize(&rows).into_iter().map(|of| (of.activation_bits, of.method)).collect();
    let expect = [(4, "first"), (4, "last"), (3, "first"), (3, "second"), (3, "last")];
    assert_eq!(found, expect.map(|(bits, method)| (bits, method.to_string())));
}

#[test]
fn differences_are_paired_by_seed() {
    fn check(input: &[Row], expect: Option<&str>) {
        let found = paired(input, "mobilenet_v2", 4, 4, "ours", "dfq_with_fine_tune");
        let text = |Estimate { count, mean, interval, .. }: Estimate| {
            format!("{count} pairs, {mean:.3}, {interval:.3?}")
        };
        assert_eq!(found.map(text).as_deref(), expect);
    }
    let rows = three_seeds();
    // The differences are 1, 2, 3, with mean 2 and deviation 1: 2 ± 4.303 / √3.
    check(&rows, Some("3 pairs, 2.000, Some((-0.484, 4.484))"));
    // The differences are 1, 2, with mean 1.5 and deviation √½: 1.5 ± 12.706 / 2.
    check(&[&rows[..2], &rows[3..]].concat(), Some("2 pairs, 1.500, Some((-4.853, 7.853))"));
    check(&[&rows[..1], &rows[3..]].concat(), Some("1 pairs, 1.000, None"));
    check(&rows[..3], None);
    check(&[&rows[..1], &rows[4..]].concat(), None);
}

#[test]
fn markdown_is_in_the_layout_of_the_paper() {
    let expect = "\
# Table 3

| model | bits | method | top-1 % | paper | diff. | MACs M | paper | pruned % |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| MobileNetV2 | A4/W4 | DFQ + fine-tune | 72.00 ± 1.00 | 72.14 | −0.14 | 147.2 | 147.2 | 0.0 |
| MobileNetV2 | A4/W4 | Ours | **74.00 ± 2.00** | 72.70 | +1.30 | 92.4 | 92.4 | 35.7 |

Pre-trained float networks that the runs began from: MobileNetV2 75.50 %.

Weights pruned in the paper: MobileNetV2 35.74 % (Table 1).

## Does the order of the methods hold?

| model | bits | method − method | diff. | 95 % interval | pairs | paper | verdict |
| --- | --- | --- | ---: | ---: | ---: | ---: | --- |
| MobileNetV2 | A4/W4 | Ours − DFQ + fine-tune | +2.00 | −0.48 … +4.48 | 3 | +0.56 | not decided |

Orders of the paper that hold: 0; that fail: 0; that are not decided: 1 (of these, as in the paper by their means: 1). An order is decided if the 95 % interval of its difference (Student's t, pairs of the same seed) excludes zero, or if all pairs have the same difference. Each is judged by itself; the page of all results corrects for their number. A single seed decides nothing.

## Notes

- A note.

## How it was made

```sh
pfq table3 --seeds 0,1,2
```

- profile: quick
- data: CIFAR-100
- seeds: 0, 1, 2
- device: cpu
- code: c0de
- settings: 5e77
- longest run: 1 min 23 s
- paper's figures: Table 3 of Nishikawa and Ikegaya, arXiv:2011.06751
- images: 50000
";
    assert_eq!(markdown(&three_seeds(), &about()), expect);
}

/// Equal accuracies are no order, whichever method is ahead in the paper.
#[test]
fn no_difference_is_no_order() {
    let equal = |table: &str, bits: (u32, u32), methods: [&'static str; 2]| {
        let of = |method: &str, seed: u64| Row {
            table: table.into(),
            activation_bits: bits.0,
            weight_bits: bits.1,
            ..row("mobilenet_v2", 4, method, seed, 70.0)
        };
        let rows = methods.iter().flat_map(|method| (0..3).map(|seed| of(method, seed)));
        let rows: Vec<Row> = rows.map(|row| row.compare(Paper::published())).collect();
        markdown(&rows, &about())
    };
    let behind = equal("table2", (4, 4), ["fine_tune_once_with_pfq", "algorithm1"]);
    assert!(behind.contains("| 0.00 | 0.00 … 0.00 | 3 | −0.08 | fails |"), "{behind}");
    let ahead = equal("table1", (4, 32), ["original", "pfq"]);
    assert!(ahead.contains("| 0.00 | 0.00 … 0.00 | 3 | +0.96 | fails |"), "{ahead}");
}

#[test]
fn ablations_have_nothing_published_beside_them() {
    let alternative = |method: &str, seed: u64, top1: f64| Row {
        table: "ablation_threshold".into(),
        width: 0.25,
        ..row("mobilenet_v2", 4, method, seed, top1)
    };
    // The default is the last method.
    let rows: Vec<Row> =
        [("high", 70.0), ("default", 72.0)].map(|(method, top1)| alternative(method, 0, top1)).into();
    let text = markdown(&rows, &About::default());
    for part in [
        "> **network width ×0.25: what is compared is the order of the alternatives, not the figures.**",
        "| model | bits | method | top-1 % | MACs M | pruned % |",
        "| MobileNetV2 ×0.25 | A4/W4 | default | **72.00** |",
        "## Do the alternatives differ?\n\n| model | bits | method − method | diff. | 95 % interval | pairs |",
        "| MobileNetV2 ×0.25 | A4/W4 | default − high | +2.00 | – | 1 |\n\nTwo alternatives differ if ",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(!text.contains("paper"), "{text}");
    let said = terminal(&rows, &About::default());
    assert!(said.contains("\n\nTwo alternatives differ if the 95 % interval of their difference"), "{said}");
    assert!(text.contains("that the runs began from: MobileNetV2 ×0.25 75.50 %.\n"), "{text}");
    // The comparisons of a method with and without PfQ come first, and appear once.
    let methods =
        [("fold", 70.0), ("fold after PfQ", 71.0), ("live without PfQ", 73.0), ("live with PfQ", 72.5)];
    let pairs: Vec<Row> = methods.map(|(method, top1)| alternative(method, 0, top1)).into();
    let text = markdown(&pairs, &About::default());
    let compared: Vec<&str> = text.lines().filter_map(|line| line.split(" | A4/W4 | ").nth(1)).collect();
    let expect = [
        "fold after PfQ − fold | +1.00 | – | 1 |",
        "live with PfQ − live without PfQ | −0.50 | – | 1 |",
        "live with PfQ − fold | +2.50 | – | 1 |",
        "live with PfQ − fold after PfQ | +1.50 | – | 1 |",
    ];
    assert_eq!(compared[methods.len()..], expect, "{text}");
    // One alternative has its own pre-training.
    let rows = [rows[0].clone(), Row { float_top1_percent: 74.0, ..rows[1].clone() }];
    let text = markdown(&rows, &About::default());
    let began = "began from: MobileNetV2 ×0.25 75.50 % (high), MobileNetV2 ×0.25 74.00 % (default).\n";
    assert!(text.contains(began), "{text}");
}

#[test]
fn reports_say_what_cannot_be_compared() {
    fn check(input: Row, expect: Option<&str>) {
        let rows = [input];
        for text in [markdown(&rows, &about()), terminal(&rows, &about())] {
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(
                text.contains("cannot be compared with the paper's in absolute terms"),
                expect.is_some()
            );
            assert!(text.contains(expect.unwrap_or_default()), "{text}");
        }
    }
    let ours = || row("mobilenet_v2", 4, "ours", 0, 50.0);
    check(ours(), None);
    check(Row { dataset: "synthetic".into(), ..ours() }, Some("SYNTHETIC DATA: these figures"));
    check(Row { width: 0.25, ..ours() }, Some("network width ×0.25: these figures"));
    check(Row { dataset: "cifar10".into(), ..ours() }, Some("CIFAR-10, not CIFAR-100: these figures"));
}

#[test]
fn terminal_text_is_at_most_100_columns_wide() {
    fn check(table: &str) {
        let run = |row: &report::PaperRow, seed| Row {
            table: table.into(),
            weight_bits: row.weight_bits,
            width: 0.25,
            ..self::row(
                &row.model,
                row.activation_bits,
                &row.method,
                seed,
                10.0 + (row.top1_percent * 7.3) % 50.0,
            )
        };
        let rows: Vec<Row> =
            Paper::published().table(table).iter().flat_map(|row| [run(row, 0), run(row, 1)]).collect();
        let about = About { command: "word ".repeat(50), notes: vec!["word ".repeat(50)], ..about() };
        let text = terminal(&rows, &about);
        let longest = text.lines().max_by_key(|line| line.chars().count()).unwrap();
        assert!(longest.chars().count() <= 100, "{} columns: {longest}", longest.chars().count());
        assert!(text.contains(" *\n") || text.contains(" * "), "the best are marked:\n{text}");
    }
    Paper::published().tables().for_each(check);
}

#[test]
fn plots_show_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let check = |input: &[Row], expect: &[&str]| {
        let (svg, png) = (folder.path().join("new/a.svg"), folder.path().join("new/a.png"));
        plot(input, &about(), &svg, &png).unwrap();
        let (svg, png) = (fs::read_to_string(svg).unwrap(), fs::read(png).unwrap());
        assert!(svg.starts_with("<svg width=\"1200\" height=\"720\"") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("sans-serif"));
        for text in expect {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!((&png[16..20], &png[20..24]), (&2400u32.to_be_bytes()[..], &1440u32.to_be_bytes()[..]));
        (svg, png)
    };
    let rows = three_seeds();
    let labels = ["Table 3", "DFQ + fine-tune", "Ours", "MobileNetV2", "A4/W4", "74.00", "72.70", "one seed"];
    let first = check(&rows, &labels);
    let other = check(&rows[..4], &labels[..5]);
    assert!(first.0 != other.0 && first.1 != other.1, "other data, the same plot");
    check(&[Row { dataset: "synthetic".into(), ..rows[0].clone() }], &["SYNTHETIC DATA", "Only the order"]);
    check(&[Row { top1_percent: f64::NAN, ..rows[0].clone() }], &["NaN"]);
    check(&[], &["Table 3"]);
}

#[test]
fn plots_of_many_methods_have_more_lines_of_legend() {
    let folder = tempfile::tempdir().unwrap();
    let (svg, png) = (folder.path().join("a.svg"), folder.path().join("a.png"));
    let methods = [
        "as published",
        "the paper's rate",
        "ReLU for ReLU6",
        "ranges β ± 6γ",
        "frozen normalization",
        "live normalization",
        "live normalization alone",
        "30 epochs",
        "as the profile says",
        "ours",
    ];
    let of = |method: &str, seed: u64| {
        let row = row("mobilenet_v2", 4, method, seed, 70.0 + seed as f64);
        Row { table: "ablation_dfq".into(), ..row }.compare(Paper::published())
    };
    let rows: Vec<Row> = methods.iter().flat_map(|method| [of(method, 0), of(method, 1)]).collect();
    plot(&rows, &about(), &svg, &png).unwrap();
    let (svg, png) = (fs::read_to_string(svg).unwrap(), fs::read(png).unwrap());
    assert!(svg.starts_with("<svg width=\"1200\" height=\"746\""), "{svg}");
    assert_eq!((&png[16..20], &png[20..24]), (&2400u32.to_be_bytes()[..], &1492u32.to_be_bytes()[..]));
    for text in ["live normalization alone", "as the profile says", "Ours", "mean ± standard deviation"] {
        assert!(svg.contains(text), "no {text} in {svg}");
    }
}
