//! Tests of claims: which files are read or refused, and verdicts computed by hand.

mod sample;

use report::{Claim, Comparison, PaperSays, Row, StageRecord, Verdict};
use serde_json::json;

/// Reads a claim from the lines of its entry after `id` and `says`.
fn claim(lines: &str) -> Claim {
    let text = format!("[[claim]]\nid = \"a-claim\"\nsays = \"Something.\"\n{lines}");
    let mut claims = Claim::parse(&text, "claims.toml").unwrap();
    assert_eq!(claims.len(), 1);
    claims.remove(0)
}

fn row(
    table: &str,
    model: &str,
    bits: (u32, u32),
    method: &str,
    seed: u64,
    top1_percent: f64,
    macs: u64,
) -> Row {
    Row {
        table: table.into(),
        model: model.into(),
        activation_bits: bits.0,
        weight_bits: bits.1,
        method: method.into(),
        seed,
        top1_percent,
        macs,
        weights_pruned_percent: if method == "original" { 0.0 } else { 30.0 + seed as f64 },
        ..sample::row()
    }
}

/// Returns rows of MobileNetV2 in Table 3: DFQ and ours at 4 and at 3 bits, a value per seed.
fn table3(dfq4: &[f64], ours4: &[f64], dfq3: &[f64], ours3: &[f64]) -> Vec<Row> {
    let of = |bits: u32, method: &'static str, macs: u64, values: &[f64]| {
        let row = move |(seed, top1): (usize, &f64)| {
            row("table3", "mobilenet_v2", (bits, bits), method, seed as u64, *top1, macs)
        };
        values.iter().enumerate().map(row).collect::<Vec<_>>()
    };
    let (dfq, ours) = ("dfq_with_fine_tune", "ours");
    [
        of(4, dfq, 147_000_000, dfq4),
        of(4, ours, 92_000_000, ours4),
        of(3, dfq, 147_000_000, dfq3),
        of(3, ours, 92_000_000, ours3),
    ]
    .concat()
}

/// Formats each comparison as "cell: what: mean (interval) of count, paper value: verdict".
fn text(comparisons: &[Comparison]) -> Vec<String> {
    let one = |of: &Comparison| {
        let estimate = of.estimate.map_or("nothing".into(), |of| {
            let interval = of.interval.map_or("–".into(), |(low, high)| format!("{low:.2} to {high:.2}"));
            format!("{:.2} ({interval}) of {}", of.mean, of.count)
        });
        let paper = of.paper.map_or("–".into(), |paper| format!("{paper:.2}"));
        format!("{}: {}: {estimate}, paper {paper}: {}", of.cell, of.what, of.verdict.label())
    };
    comparisons.iter().map(one).collect()
}

#[test]
fn orders_are_judged_in_each_cell() {
    let claim = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\n\
         expect = { kind = \"rising\", of = \"top1\", methods = [\"dfq_with_fine_tune\", \"ours\"] }",
    );
    let check = |rows: &[Row], four: &str, three: &str| {
        let expect = [
            format!("MobileNetV2 A4/W4: Ours − DFQ + fine-tune: {four}"),
            format!("MobileNetV2 A3/W3: Ours − DFQ + fine-tune: {three}"),
        ];
        assert_eq!(text(&claim.judge(rows, &[])), expect);
    };
    // The differences are 1, 2, 3: 2 ± 4.303 / √3; and 4.9, 5, 5.1: 5 ± 4.303 · 0.1 / √3.
    check(
        &table3(&[70.0; 3], &[71.0, 72.0, 73.0], &[60.0; 3], &[64.9, 65.0, 65.1]),
        "2.00 (-0.48 to 4.48) of 3, paper 0.56: not decided",
        "5.00 (4.75 to 5.25) of 3, paper 0.91: holds",
    );
    // Two seeds of ours and three of DFQ make two pairs. The differences are −5 and −5.02.
    check(
        &table3(&[70.0; 3], &[65.0, 64.98], &[], &[60.0]),
        "-5.01 (-5.14 to -4.88) of 2, paper 0.56: fails",
        "nothing, paper 0.91: not run",
    );
    // One seed decides nothing. Rows of other tables do not count.
    let mut rows = table3(&[10.0], &[70.0], &[1.0], &[2.0]);
    rows.iter_mut().skip(2).for_each(|row| row.table = "table2".into());
    check(&rows, "60.00 (–) of 1, paper 0.56: not decided", "nothing, paper 0.91: not run");
}

#[test]
fn gains_are_differences_of_differences() {
    let claim = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\nexpect = { kind = \"larger_gain\", method = \"ours\", \
         over = \"dfq_with_fine_tune\", at = \"a3w3\", than = \"a4w4\" }",
    );
    let check = |rows: &[Row], expect: &str| {
        let what = "MobileNetV2: (Ours − DFQ + fine-tune) at A3/W3 − at A4/W4: ";
        assert_eq!(text(&claim.judge(rows, &[])), [format!("{what}{expect}")]);
    };
    // The gains are 1 and 2 at 4 bits, and 4 and 5 at 3 bits, so both seeds differ by 3.
    check(
        &table3(&[70.0, 70.0], &[71.0, 72.0], &[60.0, 60.0], &[64.0, 65.0]),
        "3.00 (3.00 to 3.00) of 2, paper 0.35: holds",
    );
    // The gains are 1 and 2 at 4 bits, and 4 and 2 at 3 bits, so they differ by 3 and 0: 1.5 ±
    // 12.706 · 1.5.
    check(
        &table3(&[70.0, 70.0], &[71.0, 72.0], &[60.0, 60.0], &[64.0, 62.0]),
        "1.50 (-17.56 to 20.56) of 2, paper 0.35: not decided",
    );
    check(&table3(&[70.0, 70.0], &[71.0, 72.0], &[], &[]), "nothing, paper 0.35: not run");
}

#[test]
fn macs_shares_and_published_values_are_compared() {
    let macs = |more: &str| {
        claim(&format!(
            "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w4\"]\nexpect = {{ kind = \"rising\", \
             of = \"macs\", methods = [\"ours\", \"dfq_with_fine_tune\"]{more} }}"
        ))
    };
    let rows = table3(&[70.0; 2], &[71.0; 2], &[], &[]);
    let what = "MobileNetV2 A4/W4: DFQ + fine-tune − Ours: ";
    assert_eq!(
        text(&macs("").judge(&rows, &[])),
        [format!("{what}55.00 (55.00 to 55.00) of 2, paper 54.80: holds")]
    );
    // If both counts are equal, "fewer" fails and "no more" holds.
    let same: Vec<Row> = rows.iter().map(|row| Row { macs: 92, ..row.clone() }).collect();
    assert_eq!(macs("").judge(&same, &[])[0].verdict, Verdict::Fails);
    assert_eq!(macs(", or_equal = true").judge(&same, &[])[0].verdict, Verdict::Holds);

    let share = |from: f64, to: f64, paper: &str| {
        claim(&format!(
            "table = \"table1\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w32\"]\npaper = \"{paper}\"\n\
             expect = {{ kind = \"between\", of = \"weights_pruned\", method = \"pfq\", from = {from:?}, to = {to:?} }}"
        ))
    };
    // Seeds 0 and 1 have pruned 30 and 31 %: 30.5 ± 12.706 · 0.5 = 24.15 to 36.85.
    let rows: Vec<Row> =
        [0, 1].map(|seed| row("table1", "mobilenet_v2", (4, 32), "pfq", seed, 70.0, 1)).into();
    let check = |from: f64, to: f64, paper: &str, expect: Verdict| {
        let found = share(from, to, paper).judge(&rows, &[]);
        assert_eq!((found[0].verdict, found[0].paper), (expect, Some(35.74)), "{from} to {to}");
    };
    check(24.0, 37.0, "agrees", Verdict::Holds);
    check(25.0, 37.0, "agrees", Verdict::NotDecided);
    check(37.0, 50.0, "contradicts", Verdict::Fails);

    let published = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w4\"]\n\
         expect = { kind = \"published\", of = \"top1\", method = \"ours\", within = 1.0 }",
    );
    // The paper has 72.70, so the differences are −0.2 and 0: −0.1 ± 12.706 · 0.1.
    let check = |values: &[f64], width: f64, expect: Verdict| {
        let rows: Vec<Row> =
            table3(&[], values, &[], &[]).into_iter().map(|row| Row { width, ..row }).collect();
        assert_eq!(published.judge(&rows, &[])[0].verdict, expect, "{values:?} ×{width}");
    };
    check(&[72.5, 72.7], 1.0, Verdict::NotDecided);
    check(&[72.69, 72.71], 1.0, Verdict::Holds);
    check(&[60.69, 60.71], 1.0, Verdict::Fails);
    check(&[72.69, 72.71], 0.25, Verdict::NotRun);
}

/// Returns the pre-training and first pruning of MobileNetV2 with accuracies before and after, and
/// the number of low filters by layer.
fn pruned(seed: u64, before: f64, after: f64, low: &[(&str, usize)]) -> Vec<StageRecord> {
    let layers: Vec<_> = low
        .iter()
        .map(|(name, low)| json!({"name": name, "filters": 64, "low": low, "removed": low}))
        .collect();
    let stage = |key: String,
                 parent: Option<String>,
                 label: &str,
                 kind: serde_json::Value,
                 top1: f64,
                 report: serde_json::Value| {
        let value = json!({
            "key": key, "label": label, "stage": kind, "parent": parent, "macs": 1, "weights": 1, "seconds": 1.0,
            "data": {"name": "cifar100", "source": "data"}, "metrics": [], "report": report,
            "evaluation": {"loss": 1.0, "top1_percent": top1},
            "provenance": {"command": "c", "git_commit": "g", "device": "cpu"},
        });
        serde_json::from_value::<StageRecord>(value).unwrap()
    };
    let (first, second) = (format!("pre{seed}"), format!("prune{seed}"));
    let network = json!({"pretrain": {"network": {"version": "mobilenet_v2", "width": 1.0}, "seed": seed}});
    let prune = |correct: bool| json!({"prune": {"pfq": {"threshold": null, "bias_correction": correct}}});
    let at_random = json!({"prune": {"pfq": {"threshold": null, "bias_correction": true, "criterion": {"random": {"seed": 0}}}}});
    let report = json!({"threshold": 1e-5, "layers": layers});
    vec![
        stage(first.clone(), None, "mobilenet_v2 pre-train", network, before, json!(null)),
        stage(second.clone(), Some(first.clone()), "mobilenet_v2 PfQ", prune(true), after, report.clone()),
        // Neither a pruning without correction, nor one by another criterion, nor a later pruning is
        // the first pruning.
        stage(format!("{second}r"), Some(first.clone()), "mobilenet_v2 PfQ", at_random, 1.0, report.clone()),
        stage(format!("{second}w"), Some(first), "mobilenet_v2 PfQ w/o", prune(false), 1.0, report.clone()),
        stage(format!("{second}x"), Some(second), "mobilenet_v2 PfQ", prune(true), 1.0, report),
    ]
}

#[test]
fn the_first_pruning_is_judged_over_pre_trained_networks() {
    let check = |of: &str, from: f64, to: f64, stages: &[StageRecord], expect: &str| {
        let claim = claim(&format!(
            "models = [\"mobilenet_v2\"]\npaper = \"silent\"\n\
             expect = {{ kind = \"first_pruning\", of = \"{of}\", from = {from:?}, to = {to:?} }}"
        ));
        assert_eq!(text(&claim.judge(&[], stages)), [expect]);
    };
    let low = [("stem", 1), ("blocks.0.depthwise", 2), ("blocks.1.depthwise", 1)];
    let (a, b) = (pruned(0, 50.0, 50.02, &low), pruned(1, 51.0, 51.0, &low));
    let both = [a.clone(), b].concat();
    // The changes are 0.02 and 0: 0.01 ± 12.706 · 0.01.
    let what = "MobileNetV2: after pruning − before: ";
    check("top1_change", -0.2, 0.2, &both, &format!("{what}0.01 (-0.12 to 0.14) of 2, paper –: holds"));
    check("top1_change", -0.2, 0.1, &both, &format!("{what}0.01 (-0.12 to 0.14) of 2, paper –: not decided"));
    check("top1_change", -0.2, 0.2, &a, &format!("{what}0.02 (–) of 1, paper –: not decided"));
    let what = "MobileNetV2: depthwise of all low filters: ";
    check(
        "low_in_depthwise",
        50.0,
        100.0,
        &both,
        &format!("{what}75.00 (75.00 to 75.00) of 2, paper –: holds"),
    );
    check(
        "low_in_depthwise",
        80.0,
        100.0,
        &both,
        &format!("{what}75.00 (75.00 to 75.00) of 2, paper –: fails"),
    );
    let none = pruned(0, 50.0, 50.0, &[("stem", 0)]);
    check("low_in_depthwise", 50.0, 100.0, &none, &format!("{what}nothing, paper –: not run"));
}

/// The paper has one share of pruned weights for a network, which is that of the methods that
/// prune.
#[test]
fn the_paper_prunes_nothing_where_its_networks_are_whole() {
    for (method, share) in [("original", "0.00"), ("pfq", "35.74"), ("pfq_without_bias_correction", "35.74")]
    {
        let claim = claim(&format!(
            "table = \"table1\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w32\"]\nexpect = {{ kind = \"between\", of = \
             \"weights_pruned\", method = \"{method}\", from = 0.0, to = 40.0 }}"
        ));
        assert_eq!(format!("{:.2}", claim.judge(&[], &[])[0].paper.unwrap()), share, "{method}");
    }
}

#[test]
fn what_the_papers_own_figures_say_must_be_said() {
    let gain = |table: &str, method: &str, over: &str, at: &str, than: &str, paper: &str| {
        let text = format!(
            "[[claim]]\nid = \"gain\"\nsays = \"More.\"\ntable = \"{table}\"\npaper = \"{paper}\"\nexpect = {{ kind = \
             \"larger_gain\", method = \"{method}\", over = \"{over}\", at = \"{at}\", than = \"{than}\" }}"
        );
        Claim::parse(&text, "claims.toml").map(|claims| claims[0].paper)
    };
    // In Table 1, MobileNetV2 gains 0.96 points at 4 bits and 0.92 at 3 bits.
    let table1 = |paper| gain("table1", "pfq", "original", "a3w32", "a4w32", paper);
    assert_eq!(table1("contradicts").unwrap(), PaperSays::Contradicts);
    for paper in ["agrees", "silent"] {
        let error = table1(paper).unwrap_err().to_string();
        assert!(error.contains("claim 1 (gain)") && error.contains("Contradicts"), "{error}");
    }
    assert_eq!(
        gain("table3", "ours", "dfq_with_fine_tune", "a3w3", "a4w4", "agrees").unwrap(),
        PaperSays::Agrees
    );
    assert!(gain("table3", "ours", "dfq_with_fine_tune", "a3w3", "a4w4", "contradicts").is_err());
}

#[test]
fn errors_name_the_entry_and_what_is_expected() {
    const GOOD: &str = "[[claim]]\nid = \"good\"\nsays = \"Something.\"\ntable = \"table3\"\n\
                        expect = { kind = \"rising\", of = \"top1\", methods = [\"dfq_with_fine_tune\", \"ours\"] }\n";
    fn check(from: &str, to: &str, parts: &[&str]) {
        assert!(GOOD.contains(from), "no {from:?}");
        let text = GOOD.replace("good", "first") + &GOOD.replacen(from, to, 1);
        let error = Claim::parse(&text, "claims.toml").unwrap_err().to_string();
        assert!(error.starts_with("claims.toml: claim 2 ("), "{error}");
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    }
    assert_eq!(Claim::parse(GOOD, "claims.toml").unwrap().len(), 1);
    check("says =", "sais =", &["(good)", "sais", "says"]);
    check("kind = \"rising\",", "kind = \"rising\", strictly = true,", &["(good)", "strictly", "or_equal"]);
    check("\"rising\"", "\"falling\"", &["falling", "larger_gain", "first_pruning"]);
    check("\"top1\"", "\"top5\"", &["top5", "top1"]);
    check("table3", "table9", &["table9", "table1, table2, table3, table4, table5"]);
    check("\"ours\"", "\"hours\"", &["hours", "dfq_with_fine_tune, ours"]);
    check("[\"dfq_with_fine_tune\", \"ours\"]", "[\"ours\"]", &["two or more"]);
    check("table = ", "models = [\"resnet\"]\ntable = ", &["models", "resnet", "mobilenet_v1, mobilenet_v2"]);
    check("table = ", "bits = [\"a2w2\"]\ntable = ", &["bits", "a2w2", "a4w4, a3w3"]);
    check("id = \"good\"", "id = \"Not Good\"", &["(Not Good)", "lower-case"]);
    check("id = \"good\"", "id = \"first\"", &["(first)", "another entry"]);
    check("id = \"good\"\n", "", &["(without id)", "id"]);
    let unknown = Claim::parse("[[clam]]\nid = \"a\"\n", "claims.toml").unwrap_err().to_string();
    assert!(unknown.contains("claims.toml: clam: expected [[claim]] only"), "{unknown}");
    assert!(Claim::parse("", "claims.toml").unwrap_err().to_string().contains("found none"));
    assert!(
        Claim::parse("[[claim]", "claims.toml")
            .unwrap_err()
            .to_string()
            .starts_with("claims.toml: the whole")
    );
}

#[test]
fn pooled_claims_are_about_the_mean_over_cells() {
    let pooled = |more: &str| {
        claim(&format!(
            "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\npooled = true\nexpect = {{ kind = \"rising\", of = \"top1\", \
             methods = [\"dfq_with_fine_tune\", \"ours\"]{more} }}"
        ))
    };
    // The differences are 1, 2, 3 at 4 bits and 3, 2, 1.3 at 3 bits, so the means are 2, 2, 2.15.
    // The paper has 0.56 and 0.91.
    let rows = table3(&[70.0; 3], &[71.0, 72.0, 73.0], &[60.0; 3], &[63.0, 62.0, 61.3]);
    let expect = "mean of 2 cells: Ours − DFQ + fine-tune: 2.05 (1.83 to 2.27) of 3, paper 0.73: holds";
    assert_eq!(text(&pooled("").judge(&rows, &[])), [expect]);
    // A seed that one cell lacks does not count.
    let rows = table3(&[70.0; 3], &[71.0, 72.0, 73.0], &[60.0; 2], &[63.0, 62.0]);
    let expect = "mean of 2 cells: Ours − DFQ + fine-tune: 2.00 (2.00 to 2.00) of 2, paper 0.73: holds";
    assert_eq!(text(&pooled("").judge(&rows, &[])), [expect]);

    // The means are −0.2, −0.1, −0.3: −0.2 ± 4.303 · 0.1 / √3 = −0.45 to 0.05. So no gain is
    // decided, but the loss is at most half a point.
    let rows = table3(&[70.0; 3], &[69.8, 69.9, 69.7], &[60.0; 3], &[59.8, 59.9, 59.7]);
    let verdict = |more: &str| pooled(more).judge(&rows, &[])[0].verdict;
    assert_eq!(verdict(""), Verdict::NotDecided);
    assert_eq!(verdict(", margin = 0.5"), Verdict::Holds);
    assert_eq!(verdict(", margin = 0.4"), Verdict::NotDecided);
}

/// Judges two comparisons, each decided if alone: t = 5 with 2 degrees of freedom, p = 0.0377.
#[test]
fn verdicts_are_corrected_for_the_number_of_comparisons() {
    let both = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\n\
         expect = { kind = \"rising\", of = \"top1\", methods = [\"dfq_with_fine_tune\", \"ours\"] }",
    );
    let deviation = 2.0 * 3f64.sqrt() / 5.0;
    let ours = |base: f64| [base + 2.0 - deviation, base + 2.0, base + 2.0 + deviation];
    let rows = table3(&[70.0; 3], &ours(70.0), &[60.0; 3], &ours(60.0));
    for of in both.judge(&rows, &[]) {
        assert!((of.p_value.unwrap() - 2.0 * 0.037750).abs() < 1e-5, "{:?}", of.p_value);
        assert_eq!(of.verdict, Verdict::NotDecided);
        // At 2.5 %: 4.177 / √4 · 0.693 = 1.447 < 2, 6.205 / √3 · 0.693 = 2.48 > 2.
        assert_eq!(of.needed, Some(4));
    }
    let one = table3(&[70.0; 3], &ours(70.0), &[], &[]);
    assert_eq!(both.judge(&one, &[])[0].verdict, Verdict::Holds);
}

#[test]
fn seeds_of_one_pre_trained_network_are_one_value_of_what_it_decides() {
    let stages = |pre_training: &[u64]| -> Vec<StageRecord> {
        let mut stages = Vec::new();
        for (seed, pre_training) in pre_training.iter().enumerate() {
            let mut of = pruned(*pre_training, 50.0, 50.0, &[("stem", 1)]);
            let tune = json!({
                "key": format!("tune{seed}"), "label": "fine-tune", "stage": {"fine_tune": {"seed": seed}},
                "parent": format!("prune{pre_training}"), "macs": 1, "weights": 1, "seconds": 1.0,
                "data": {"name": "cifar100", "source": "data"}, "metrics": [], "report": null,
                "evaluation": {"loss": 1.0, "top1_percent": 1.0},
                "provenance": {"command": "c", "git_commit": "g", "device": "cpu"},
            });
            of.push(serde_json::from_value(tune).unwrap());
            stages.extend(of);
        }
        stages
    };
    let macs = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w4\"]\n\
         expect = { kind = \"rising\", of = \"macs\", methods = [\"ours\", \"dfq_with_fine_tune\"] }",
    );
    let top1 = claim(
        "table = \"table3\"\nmodels = [\"mobilenet_v2\"]\nbits = [\"a4w4\"]\n\
         expect = { kind = \"rising\", of = \"top1\", methods = [\"dfq_with_fine_tune\", \"ours\"] }",
    );
    let rows = table3(&[70.0; 2], &[71.0, 71.01], &[], &[]);
    let check = |claim: &Claim, pre_training: &[u64], count: usize, networks: usize, verdict: Verdict| {
        let of = claim.judge(&rows, &stages(pre_training)).remove(0);
        assert_eq!((of.estimate.unwrap().count, of.networks, of.verdict), (count, Some(networks), verdict));
    };
    check(&macs, &[0, 0], 1, 1, Verdict::NotDecided);
    check(&macs, &[0, 1], 2, 2, Verdict::Holds);
    check(&macs, &[7, 7], 1, 1, Verdict::NotDecided);
    check(&top1, &[0, 0], 2, 1, Verdict::Holds);
    check(&top1, &[0, 1], 2, 2, Verdict::Holds);
}
