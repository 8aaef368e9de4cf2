//! Tests of the page as text: what it contains, and that inputs cannot inject markup.

mod sample;

use std::collections::BTreeSet;

use report::{Claim, Deviation, Exhibit, Page, Paper, Row, TableEntry, TableResults};

const CLAIMS: &str = "
[[claim]]
id = \"ours-better\"
says = \"Ours is better.\"
table = \"table3\"
expect = { kind = \"rising\", of = \"top1\", methods = [\"dfq_with_fine_tune\", \"ours\"] }

[[claim]]
id = \"more-at-fewer-bits\"
says = \"PfQ gains more at fewer bits.\"
table = \"table1\"
paper = \"contradicts\"
expect = { kind = \"larger_gain\", method = \"pfq\", over = \"original\", at = \"a3w32\", than = \"a4w32\" }
";

/// Returns a run of every row of a paper's table, with the paper's accuracy, for each seed.
fn run(number: usize, seeds: u64) -> TableResults {
    let table = format!("table{number}");
    let row = |of: &report::PaperRow, seed: u64| {
        Row {
            table: table.clone(),
            dataset: of.dataset.clone(),
            model: of.model.clone(),
            width: 0.25,
            activation_bits: of.activation_bits,
            weight_bits: of.weight_bits,
            method: of.method.clone(),
            seed,
            top1_percent: of.top1_percent + 0.01 * seed as f64,
            macs: (of.mac_millions * 1e6) as u64,
            ..sample::row()
        }
        .compare(Paper::published())
    };
    let rows =
        Paper::published().table(&table).iter().flat_map(|of| (0..seeds).map(move |seed| row(of, seed)));
    TableResults { rows: rows.collect(), table, profile: "reduced".into(), ..TableResults::default() }
}

fn page(runs: Vec<TableResults>) -> Page {
    Page { runs, claims: Claim::parse(CLAIMS, "claims.toml").unwrap(), ..Page::default() }
}

/// Returns every value of an attribute.
fn values<'a>(html: &'a str, attribute: &str) -> Vec<&'a str> {
    let start = format!(" {attribute}=\"");
    html.split(&start).skip(1).map(|rest| rest.split_once('"').unwrap().0).collect()
}

/// Returns the part of the page about a table.
fn part<'a>(html: &'a str, table: &str) -> &'a str {
    let (_, rest) = html.split_once(&format!("id=\"{table}\"")).unwrap();
    rest.split_once("</article>").unwrap().0
}

/// Checks the properties that every page must have.
fn check_form(html: &str) {
    assert!(html.starts_with("<!DOCTYPE html><html lang=\"en\">") && html.ends_with("</html>\n"));
    for forbidden in ["<script", "<img", "<iframe", "<object", "@import", "url("] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    assert!(values(html, "src").is_empty());
    let ids = values(html, "id");
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "an id twice");
    for link in values(html, "href") {
        match link.strip_prefix('#') {
            Some(id) => assert!(ids.contains(&id), "no {link}"),
            None => assert!(!link.starts_with("http") || link.starts_with("https://arxiv.org/"), "{link}"),
        }
    }
    for id in values(html, "aria-labelledby") {
        assert!(ids.contains(&id), "no {id}");
    }
    let count = |part: &str| html.matches(part).count();
    assert_eq!(count("<h1"), 1);
    assert_eq!(count("<table"), count("<caption>"));
    assert_eq!(count("<th "), count("scope=\"col\"") + count("scope=\"row\""));
    assert_eq!(
        count("<svg"),
        count("role=\"img\"") + count("aria-hidden=\"true\"") - count("<span aria-hidden")
    );
    let levels = html.split("<h").skip(1).filter_map(|rest| rest.chars().next()?.to_digit(10));
    levels.fold(0, |before, level| {
        assert!(level <= before + 1, "a heading of level {level} after one of {before}");
        level
    });
}

#[test]
fn every_table_is_there_whatever_has_been_run() {
    fn check(runs: Vec<TableResults>, expect: &[&str], missing: &[&str]) {
        let page = page(runs);
        let html = page.html();
        check_form(&html);
        for table in Paper::published().tables() {
            let part = part(&html, table);
            let rows = Paper::published().table(table);
            assert!(part.matches("<tr").count() > rows.len() && part.contains("<table"), "{table}");
            for row in rows {
                assert!(part.contains(&format!("{:.2}", row.top1_percent)), "{table}");
            }
        }
        for text in expect {
            assert!(html.contains(text), "no {text}");
        }
        for text in missing {
            assert!(!html.contains(text), "{text}");
        }
        assert_eq!(html, page.html(), "not the same bytes again");
    }
    check(
        vec![],
        &["Not run yet.", "</span>not run</span>", "The paper’s own figures contradict it."],
        &["Profile "],
    );
    check(
        vec![run(3, 1)],
        &["Profile reduced", "one seed", "</span>not decided</span>", "network width ×0.25", "71.57"],
        &["over 3 seeds"],
    );
    check(
        (1..=5).map(|number| run(number, 3)).collect(),
        &[
            "mean ± standard deviation over 3 seeds",
            "</span>holds</span>",
            "</span>fails</span>",
            "75.32 ± 0.01",
        ],
        &["Not run yet."],
    );
}

/// Checks that an ablation and a table of our own are shown by their means and differences. The
/// ablation chooses settings, so it is no evidence for claims, and its profile has no verdicts.
#[test]
fn tables_of_our_own_are_shown_by_their_differences() {
    let own = |table: &str, profile: &str| {
        let mut run = run(3, 3);
        (run.table, run.profile) = (table.into(), profile.into());
        run.rows.iter_mut().for_each(|row| row.table = table.into());
        run.rows = run.rows.into_iter().map(|row| row.compare(Paper::published())).collect();
        run
    };
    let entry =
        |name: &str, title: &str, chooses| TableEntry { name: name.into(), title: title.into(), chooses };
    let page = Page {
        tables: vec![entry("beyond", "Beyond the paper", false), entry("ablation_x", "The setting x", true)],
        ..page(vec![run(3, 3), own("beyond", "reduced"), own("ablation_x", "short")])
    };
    let html = page.html();
    check_form(&html);
    for (table, heading) in [("beyond", "Beyond the paper"), ("ablation_x", "Ablation: The setting x")] {
        let part = part(&html, table);
        for text in
            [heading, "Do the alternatives differ?", "Ours − DFQ + fine-tune", ">+9.27<", "75.32 ± 0.01"]
        {
            assert!(part.contains(text), "{table}: no {text} in {part}");
        }
        assert!(!part.contains("paper’s top-1"), "{part}");
    }
    assert!(!part(&html, "table3").contains("Do the alternatives differ?"));
    assert!(!page.verdicts().contains("short"), "{}", page.verdicts());
}

#[test]
fn what_comes_in_is_text() {
    const BAD: &str = "<script>alert('x')</script> \"&amp;\" <b>";
    let escaped = "&lt;script&gt;alert('x')&lt;/script&gt; &quot;&amp;amp;&quot; &lt;b&gt;";
    let mut bad = run(3, 1);
    for row in &mut bad.rows {
        (row.device, row.method, row.dataset) = (BAD.into(), BAD.into(), BAD.into());
    }
    bad.profile = BAD.into();
    bad.exhibit.files = vec![format!("table3/{BAD}.csv")];
    let exhibit = Exhibit {
        title: BAD.into(),
        files: vec![],
        drawings: vec![(BAD.into(), format!("<svg><text fill=\"#222222\">{escaped}</text></svg>"))],
        tables: vec![(BAD.into(), vec![vec![BAD.into()], vec![BAD.into()]])],
    };
    let deviation = Deviation {
        id: "bad".into(),
        point: BAD.into(),
        paper: BAD.into(),
        ours: BAD.into(),
        why: BAD.into(),
        effect: Some(BAD.into()),
    };
    let mut page = Page { exhibits: vec![exhibit], deviations: vec![deviation], ..page(vec![bad]) };
    page.claims[0].says = BAD.into();
    page.claims[0].note = Some(BAD.into());
    let html = page.html();
    check_form(&html);
    assert!(html.matches(escaped).count() > 15);
    assert!(html.contains("(1 row)"), "{html}");
    // A picture that could execute something is linked, not shown.
    page.exhibits[0].drawings[0].1 = "<svg><script>alert(1)</script></svg>".into();
    check_form(&page.html());
}

#[test]
fn verdicts_are_told_as_text_too() {
    let page = page(vec![run(3, 3)]);
    let lines: Vec<String> = page.verdicts().lines().map(String::from).collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("ours-better ") && lines[0].ends_with("reduced: holds"), "{lines:?}");
    assert!(lines[1].ends_with("reduced: not run"), "{lines:?}");
    // Long names move the column of verdicts.
    let mut page = page;
    page.claims[1].id = "a-claim-with-a-name-of-more-than-36-letters".into();
    let columns: Vec<_> = page.verdicts().lines().map(|line| line.find("reduced: ")).collect();
    assert_eq!(columns, [Some(44), Some(44)]);
}
