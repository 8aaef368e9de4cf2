//! Published networks: copied from a store, used if another store lacks them, evaluated again, and
//! refused if they are not what was published.

mod tiny;

use report::{NetworkRow, STAGES};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use tiny::{Place, said};
use whole_file::seal;

/// Two rows of a table.
const ROWS: &str = "mobilenet_v1,a4w4";
/// Their networks.
const NAMES: [&str; 4] = [
    "mobilenet_v1-float-seed0.safetensors",
    "mobilenet_v1-a4w4-dfq_with_fine_tune-seed0.safetensors",
    "mobilenet_v1-pruned-seed0.safetensors",
    "mobilenet_v1-a4w4-ours-seed0.safetensors",
];
const OURS: &str = NAMES[3];

/// Returns a place where these rows were run and their networks published.
fn first() -> &'static Place {
    static FIRST: OnceLock<Place> = OnceLock::new();
    FIRST.get_or_init(|| {
        let place = Place::new();
        place.run(&["--only", ROWS]);
        place.run(&["--only", ROWS, "--publish"]);
        place
    })
}

/// Returns a place that has nothing but what was published.
fn elsewhere() -> Place {
    let place = Place::new();
    let folder = networks(&place);
    std::fs::create_dir_all(&folder).unwrap();
    for entry in std::fs::read_dir(networks(first())).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    place
}

fn networks(place: &Place) -> PathBuf {
    place.path("results/networks/tiny")
}

fn list(place: &Place) -> Vec<NetworkRow> {
    report::read_networks(&networks(place)).unwrap()
}

fn row(place: &Place, file: &str) -> NetworkRow {
    list(place).into_iter().find(|row| row.file == file).unwrap()
}

fn run(program: &str, place: &Place, flags: &[&str]) -> Output {
    Command::new(program).current_dir(place.root()).args(flags).output().unwrap()
}

/// Returns what a program printed, and whether it succeeded.
fn printed(output: Output) -> (String, bool) {
    (String::from_utf8(output.stdout.clone()).unwrap() + &said(&output), output.status.success())
}

fn report(place: &Place, flags: &[&str]) -> (String, bool) {
    printed(run(env!("CARGO_BIN_EXE_report"), place, flags))
}

/// Runs `report --verify` on the networks of a place; returns what it prints, and whether it finds
/// all of them right.
fn verify(place: &Place) -> (String, bool) {
    report(place, &["--verify", "--data", "synthetic"])
}

/// Flips one bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// Changes the folder's stages and seals them again, as someone who falsifies them could do.
fn falsify(folder: &Path, change: impl Fn(&mut Value)) {
    let path = folder.join(STAGES);
    let mut all: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for stage in all["stages"].as_array_mut().unwrap() {
        change(stage);
        stage[seal::SEAL] = seal::of(stage).into();
    }
    let files: Vec<String> = all["files"].as_object().unwrap().keys().cloned().collect();
    for name in files {
        all["files"][&name] = seal::sha256_of_file(&folder.join(&name)).unwrap().into();
    }
    all[seal::SEAL] = seal::of(&all).into();
    std::fs::write(path, all.to_string()).unwrap();
}

#[test]
fn networks_of_rows_are_published_with_what_they_are() {
    let place = first();
    let (list, rows) = (list(place), place.rows());
    assert_eq!(list.iter().map(|row| row.file.as_str()).collect::<Vec<_>>(), NAMES);
    for row in &list {
        let path = networks(place).join(&row.file);
        assert_eq!(seal::sha256_of_file(&path).unwrap(), row.sha256);
        assert_eq!(path.metadata().unwrap().len(), row.bytes);
        let stored = place.stage(&row.key).join("network.safetensors");
        assert!(std::fs::read(stored).unwrap() == std::fs::read(path).unwrap(), "{}", row.file);
        assert_eq!((row.model.as_str(), row.width, row.seed), ("mobilenet_v1", 0.1, 0));
    }
    // The networks are those of the table.
    for (file, method) in [(NAMES[1], "dfq_with_fine_tune"), (OURS, "ours")] {
        let (network, row) = (row(place, file), rows.iter().find(|row| row.method == method).unwrap());
        assert_eq!(
            (&network.key, network.top1_percent, network.macs),
            (&row.settings_hash, row.top1_percent, row.macs)
        );
        assert_eq!(network.subject, format!("A4/W4 {method}"));
        assert!(network.settings.contains("\"fine_tune\""), "{}", network.settings);
    }
    let (float, pruned) = (row(place, NAMES[0]), row(place, NAMES[2]));
    assert_eq!((float.subject.as_str(), pruned.subject.as_str()), ("float", "pruned"));
    assert_eq!((float.parent, pruned.parent), (None, Some(float.key)));
    assert!(pruned.weights < float.weights);

    // The page lists them.
    let html = experiments::report_page::read(&place.path("results")).unwrap().html();
    for part in ["Published networks", "Networks of profile tiny", OURS, &pruned.sha256[..12]] {
        assert!(html.contains(part), "no {part}");
    }
    let (text, well) = printed(run(env!("CARGO_BIN_EXE_pfq"), place, &["verify", "results"]));
    assert!(well && text.contains("4 published networks"), "{text}");
}

/// Publishing again adds rows and drops networks that no longer belong to a row. Where nothing has
/// been run, nothing can be published.
#[test]
fn rows_are_published_as_they_come() {
    let place = Place::new();
    place.check_refused(&["--data", "synthetic", "--publish"], &["not even pre-training is done"]);
    place.check_refused(&["--data", "synthetic", "--publish", "--plan"], &["--publish", "--plan"]);
    let (figure3, well) = printed(run(
        env!("CARGO_BIN_EXE_figure3"),
        &place,
        &["--config", "tiny.toml", "--data", "synthetic", "--publish"],
    ));
    assert!(!well && figure3.contains("--publish is of rows of tables"), "{figure3}");

    let ours = format!("{ROWS},ours");
    place.run(&["--only", &ours]);
    place.run(&["--publish"]);
    assert_eq!(
        list(&place).iter().map(|row| row.file.as_str()).collect::<Vec<_>>(),
        [NAMES[0], NAMES[2], OURS]
    );
    // A network that is damaged in the store is not published.
    let path = place.stage(&row(&place, OURS).key).join("network.safetensors");
    let whole = std::fs::read(&path).unwrap();
    flip(&path);
    place.check_refused(
        &["--data", "synthetic", "--publish"],
        &["network.safetensors has SHA-256", "run the table again"],
    );
    std::fs::write(path, whole).unwrap();
    // A row may come from another store, which has continued from the published network.
    std::fs::remove_dir_all(place.path("runs")).unwrap();
    let dfq = format!("{ROWS},dfq_with_fine_tune");
    place.run(&["--only", &dfq]);
    assert_eq!(place.stages(), 2, "DFQ from the published network, and its fine-tuning");
    place.run(&["--only", &dfq, "--publish"]);
    assert_eq!(list(&place).iter().map(|row| row.file.as_str()).collect::<Vec<_>>(), NAMES);
    assert!(verify(&place).1);
    // If the lists can't be read, the store must have everything.
    let path = networks(&place).join(STAGES);
    let stages = std::fs::read(&path).unwrap();
    flip(&path);
    place.check_refused(&["--data", "synthetic", "--only", &dfq], &[STAGES]);
    let flags = ["--data", "synthetic", "--only", &dfq, "--publish"];
    place.check_refused(&flags, &["not taken", "is missing from the store"]);
    std::fs::write(path, stages).unwrap();
    // With other settings, these networks no longer belong to a row.
    place.pretrain_for(2);
    place.run(&["--only", &ours]);
    place.run(&["--only", &ours, "--publish"]);
    assert_eq!(
        list(&place).iter().map(|row| row.file.as_str()).collect::<Vec<_>>(),
        [NAMES[0], NAMES[2], OURS]
    );
    assert!(!networks(&place).join(NAMES[1]).exists() && verify(&place).1);
}

/// The float and the pruned network are published before any row is done, and rows continue from
/// them.
#[test]
fn a_pre_trained_network_is_published_before_its_rows() {
    let place = Place::new();
    let pruned = row(first(), NAMES[2]).key;
    let (text, well) = printed(place.table3(&["--data", "synthetic", "--stage", &pruned]));
    assert!(well, "{text}");
    place.run(&["--publish"]);
    assert_eq!(list(&place).iter().map(|row| row.file.as_str()).collect::<Vec<_>>(), [NAMES[0], NAMES[2]]);
    assert!(verify(&place).1);
    std::fs::remove_dir_all(place.path("runs")).unwrap();
    place.run(&["--only", &format!("{ROWS},ours")]);
    assert_eq!(place.stages(), 3, "everything but pre-training and pruning");
    assert_eq!(place.rows()[0].settings_hash, row(first(), OURS).key);
}

/// Networks of tables that `--only` does not pick, or that another program makes, stay published.
#[test]
fn networks_of_other_tables_stay_published() {
    let place = elsewhere();
    let mut expected = NAMES;
    expected.sort();
    for (program, only) in [(env!("CARGO_BIN_EXE_all"), "table1"), (env!("CARGO_BIN_EXE_table1"), "pfq")] {
        let flags = ["--config", "tiny.toml", "--data", "synthetic", "--only", only, "--publish"];
        let (text, well) = printed(run(program, &place, &flags));
        assert!(well, "{text}");
        let mut files: Vec<String> = list(&place).into_iter().map(|row| row.file).collect();
        files.sort();
        assert_eq!(files, expected, "{program}");
    }
    // Table 2 has the same network as Table 3 under another name, and the file keeps its name.
    let flags = ["--config", "tiny.toml", "--data", "synthetic", "--only", "a4w4", "--publish"];
    let (text, well) = printed(run(env!("CARGO_BIN_EXE_table2"), &place, &flags));
    assert!(well, "{text}");
    let ours = row(&place, OURS);
    assert_eq!((ours.subject.as_str(), ours.key), ("A4/W4 ours", row(first(), OURS).key));
}

/// With an empty store, a table is made from the published networks, and one of its stages is run
/// again.
#[test]
fn a_table_is_drawn_and_a_stage_repeated_without_pre_training() {
    let place = elsewhere();
    let flags = ["--only", ROWS];
    let plan = place.table3(&[&["--data", "synthetic", "--plan"], &flags[..]].concat());
    let plan = String::from_utf8(plan.stdout).unwrap();
    let lines = plan.lines().filter(|line| line.contains("published: top-1")).count();
    // Pre-training; DFQ and its fine-tuning; the five stages of Algorithm 1 without the first,
    // which is that pre-training.
    assert!(lines == 7 && plan.contains("7 of 7 stages done"), "{plan}");

    let said = place.run(&flags);
    assert!(said.contains("published in results/networks/tiny: 4 networks"), "{said}");
    assert_eq!(place.stages(), 0, "{said}");
    for file in ["table3.csv", "profile.toml"] {
        let read =
            |place: &Place| std::fs::read_to_string(place.path("results/table3/tiny").join(file)).unwrap();
        assert_eq!(read(&place), read(first()), "{file}");
    }

    // The stages in between are not published, so only their outcomes are known. If their networks
    // are needed, these stages are run, starting from the pruned network, and compared too.
    let between = plan.lines().find(|line| line.contains("fine-tune A4/W32 seed 0")).unwrap();
    let between = between.split_whitespace().next().unwrap();
    let (text, well) = printed(place.table3(&["--data", "synthetic", "--stage", between]));
    assert!(well && text.contains("the published network again, to the bit"), "{text}");
    assert!(!text.contains("done already") && place.stages() == 1, "{text}");
    let key = row(&place, OURS).key;
    let output = place.table3(&["--data", "synthetic", "--stage", &key]);
    let (text, well) = printed(output);
    assert!(well && text.contains("the published network again, to the bit"), "{text}");
    let ran: Vec<&str> = text.lines().filter_map(|line| line.strip_suffix(" …")).collect();
    assert_eq!(ran, ["mobilenet_v1 PfQ", "mobilenet_v1 fine-tune A4/W4 seed 0"]);
    assert_eq!(place.stages(), 3);
    // An outcome alone does not make a row: at 3 bits nothing is published, so everything except
    // pre-training and pruning is run.
    let said = place.run(&["--only", "mobilenet_v1,a3w3,ours"]);
    assert!(said.contains("fine-tune A3/W32") && !said.contains("pre-train seed 0 …"), "{said}");
    assert_eq!(place.rows().len(), 3);
}

/// Networks for which training images are held out do not replace the other networks of the
/// profile.
#[test]
fn networks_of_other_images_have_a_folder_of_their_own() {
    let place = elsewhere();
    let path = place.path("tiny.toml");
    let mut profile: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    profile["data"].as_table_mut().unwrap().insert("hold_out".into(), 8.into());
    std::fs::write(path, profile.to_string()).unwrap();
    let ours = format!("{ROWS},ours");
    place.run(&["--only", &ours]);
    place.run(&["--only", &ours, "--publish"]);
    let held_out = report::read_networks(&place.path("results/networks/tiny_holdout")).unwrap();
    assert_eq!(held_out.iter().map(|row| row.file.as_str()).collect::<Vec<_>>(), [NAMES[0], NAMES[2], OURS]);
    assert!(held_out.iter().all(|row| row.dataset == "synthetic_holdout_part"));
    let (text, well) = verify(&place);
    assert!(well && text.contains("7 published networks evaluated, every figure found again"), "{text}");
}

#[test]
fn every_published_figure_is_found_again() {
    let (text, well) = verify(first());
    assert!(well && text.contains("4 published networks evaluated, every figure found again"), "{text}");
    assert_eq!(text.lines().filter(|line| line.ends_with("  the same")).count(), 4, "{text}");
    // The tool evaluates one of them.
    let file = format!("results/networks/tiny/{OURS}");
    let (text, well) =
        printed(run(env!("CARGO_BIN_EXE_pfq"), first(), &["eval", &file, "--data", "synthetic"]));
    let NetworkRow { top1_percent, loss, .. } = row(first(), OURS);
    assert!(well && text.contains(&format!("top-1 {top1_percent:.2} %, loss {loss:.4}\n")), "{text}");
    let published =
        format!("published (A4/W4 ours) with top-1 {top1_percent:.2} %, loss {loss:.4}: the same");
    assert!(text.contains(&published), "{text}");
    // On other images the figure is another one.
    let limited = ["eval", &file, "--data", "synthetic", "--limit", "10"];
    let (text, well) = printed(run(env!("CARGO_BIN_EXE_pfq"), first(), &limited));
    assert!(well && text.contains("10 test images") && !text.contains("published ("), "{text}");

    // A network that was trained in bf16 is also evaluated in bf16.
    let place = Place::new();
    let flags = ["--only", "mobilenet_v2,a4w4,ours", "--arithmetic", "bf16"];
    place.run(&flags);
    place.run(&[&flags[..], &["--publish"]].concat());
    let (text, well) = verify(&place);
    assert!(well && text.contains("3 published networks evaluated"), "{text}");
    let (text, well) = printed(run(
        env!("CARGO_BIN_EXE_pfq"),
        &place,
        &["verify", "runs", "--config", "tiny.toml", "--data", "synthetic"],
    ));
    assert!(well && text.matches("to the bit").count() == 5, "{text}");
}

/// A network that is not what was published is named and not used, with and without `--strict`.
#[test]
fn damaged_networks_are_refused() {
    let check = |damage: &dyn Fn(&Path), parts: &[&str]| {
        let place = elsewhere();
        damage(&networks(&place));
        for strict in [&[][..], &["--strict"]] {
            place.check_refused(&[&["--data", "synthetic", "--only", ROWS], strict].concat(), parts);
        }
        assert_eq!(place.stages(), 0, "something was run instead");
        assert!(!verify(&place).1);
        let (text, well) = report(&place, &[]);
        assert!(!well, "{text}");
        // A program works without published networks too.
        std::fs::remove_dir_all(networks(&place)).unwrap();
        place.run(&["--plan"]);
    };
    for name in NAMES {
        check(&|folder| flip(&folder.join(name)), &[name, "a published network", "SHA-256", "expected"]);
    }
    check(&|folder| std::fs::remove_file(folder.join(OURS)).unwrap(), &[OURS, "a published network"]);
    // This is the network of another stage.
    let pruned = NAMES[2];
    let other = |folder: &Path| assert!(std::fs::copy(folder.join(pruned), folder.join(OURS)).unwrap() > 0);
    check(&other, &[OURS, "SHA-256"]);
    check(&|folder| flip(&folder.join(STAGES)), &[STAGES]);
    let edit = |folder: &Path, from: &str, to: &str| {
        let path = folder.join("networks.csv");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replacen(from, to, 1)).unwrap();
    };
    let [ours, float] = [row(first(), OURS), row(first(), NAMES[0])];
    check(&|folder| edit(folder, &ours.key, &float.key), &[OURS, "sha256"]);
    check(&|folder| edit(folder, &ours.key, "0123456789abcdef"), &[OURS, "0123456789abcdef"]);
    // These settings are sealed, but are not the ones of the key.
    check(
        &|folder| {
            falsify(folder, |stage| {
                if stage["key"] == ours.key.as_str() {
                    stage["stage"]["fine_tune"]["training"]["learning_rate"] = 0.5.into();
                }
            })
        },
        &[STAGES, &ours.key, "is not that of its settings"],
    );
}

/// Evaluating the network finds a figure that was changed everywhere, with all hashes made again.
#[test]
fn a_falsified_figure_is_found() {
    let place = elsewhere();
    let folder = networks(&place);
    let mut rows = list(&place);
    let falsified = rows.iter_mut().find(|row| row.file == OURS).unwrap();
    let (key, then) = (falsified.key.clone(), falsified.top1_percent);
    falsified.top1_percent = 99.5;
    report::write_networks(&rows, &folder).unwrap();
    let (text, well) = verify(&place);
    assert!(!well && text.contains("top1_percent = 99.5"), "{text}");
    let file = folder.join(OURS).display().to_string();
    let (text, well) =
        printed(run(env!("CARGO_BIN_EXE_pfq"), &place, &["eval", &file, "--data", "synthetic"]));
    assert!(!well && text.contains("says top1_percent = 99.5"), "{text}");
    falsify(&folder, |stage| {
        if stage["key"] == key.as_str() {
            stage["evaluation"]["top1_percent"] = 99.5.into();
        }
    });
    let (text, well) = verify(&place);
    let line = text.lines().find(|line| line.contains(OURS)).unwrap();
    assert!(!well && text.contains("1 of 4 published networks"), "{text}");
    assert!(
        line.contains("99.5")
            && line.contains(&then.to_string())
            && line.contains("WRONG: the figures differ"),
        "{line}"
    );
    assert_eq!(text.matches("  the same").count(), 3, "{text}");

    // The table's figures are compared as well.
    let place = elsewhere();
    place.run(&["--only", ROWS]);
    let path = place.path("results/table3/tiny/table3.csv");
    let mut rows = report::read_csv(&path).unwrap();
    rows.iter_mut().filter(|row| row.method == "ours").for_each(|row| row.top1_percent = 99.5);
    report::write_csv(&rows, &path).unwrap();
    let (text, well) = verify(&place);
    assert!(!well && text.contains("table3 says another figure"), "{text}");
}
