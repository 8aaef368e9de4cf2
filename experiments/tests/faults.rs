//! Tables from end to end if something is wrong: something is missing, in the way, or impossible.

mod tiny;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use tiny::{Place, TABLE3, said};

/// Two rows: one network at some bits.
const ROWS: &str = "mobilenet_v1,a4w4";

/// A finished row no longer needs the stages that it started from, but its share of pruned weights
/// and its float accuracy come from them.
#[test]
fn a_missing_early_stage_is_run_again_or_named() {
    let place = Place::new();
    let ours = format!("{ROWS},ours");
    place.run(&["--only", &ours]);
    let rows = place.rows();
    assert!(rows[0].weights_pruned_percent > 0.0);

    std::fs::remove_dir_all(place.stage("pretrain")).unwrap();
    let said = place.run(&["--only", &ours]);
    assert!(said.contains("mobilenet_v1 pre-train seed 0 …"), "{said}");
    assert_eq!(place.rows(), rows);

    // A stage without its outcome counts as missing. The other row does not need it, but the table
    // does, and no results record its outcome.
    std::fs::remove_file(place.path("results/table3/tiny/stages.json")).unwrap();
    let first = std::fs::read_dir(place.path("runs")).unwrap().map(|entry| entry.unwrap().path());
    let first = first.filter(|path| path.to_str().unwrap().contains("prune")).min().unwrap();
    std::fs::remove_file(first.join("outcome.json")).unwrap();
    let flags = ["--data", "synthetic", "--only", &format!("{ROWS},dfq_with_fine_tune")];
    place.check_refused(&flags, &["stage mobilenet_v1 PfQ", "is missing", "without --only"]);
    assert_eq!(place.rows(), rows, "what was there stays");
}

/// The results of one machine are continued on another one without its store: rows with the current
/// settings stay.
#[test]
fn rows_of_another_store_stay() {
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    let [ours] = &place.rows()[..] else { panic!("{:?}", place.rows()) };
    let other_row = || {
        place.run(&["--only", &format!("{ROWS},dfq_with_fine_tune")]);
        place.rows()
    };
    std::fs::remove_dir_all(place.path("runs")).unwrap();
    let both = other_row();
    assert_eq!((both.len(), both.contains(ours)), (2, true), "{both:?}");
    // So do those of another seed.
    std::fs::remove_dir_all(place.path("runs")).unwrap();
    place.run(&["--only", &format!("{ROWS},ours"), "--seeds", "1"]);
    let three = place.rows();
    assert!(three.len() == 3 && both.iter().all(|row| three.contains(row)), "{three:?}");

    let settings = place.path("tiny.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(&settings, text.replace("threshold = 0.95", "threshold = 0.94")).unwrap();
    assert_eq!(other_row().len(), 1, "of the present settings");
}

/// Impossible flags are refused before anything is looked for, loaded or started.
#[test]
fn flags_are_checked_before_data_are_looked_for() {
    let place = Place::new();
    let check = |flags: &[&str], parts: &[&str]| {
        place.check_refused(&[flags, &["--data", "no/such/folder"]].concat(), parts);
    };
    check(&["--only", "foo"], &["--only foo is unknown"]);
    check(&["--only", "a2w2"], &["--only a2w2 picks no row of table3"]);
    check(&["--seeds", "1,0,1"], &["--seeds", "1 twice"]);
    check(&["--device", "abacus"], &["--device abacus"]);
    check(&[], &["no/such/folder"]);
    assert_eq!(place.stages(), 0);
}

/// A key can't hold settings that are not finite, and a stage can't run with settings that are not
/// positive.
#[test]
fn impossible_settings_are_refused_before_anything_runs() {
    let place = Place::new();
    let text = std::fs::read_to_string(place.path("tiny.toml")).unwrap();
    for (from, to) in [
        ("threshold = 0.95", "threshold = inf"),
        ("threshold = 0.95", "threshold = nan"),
        ("absorb_sigmas = 3.0", "absorb_sigmas = nan"),
        ("tolerance = 0.001", "tolerance = 0.0"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(place.path("tiny.toml"), text.replace(from, to)).unwrap();
        let (key, value) = to.split_once(" = ").unwrap();
        let value = value.parse::<f64>().unwrap();
        place.check_refused(&["--data", "synthetic"], &[&format!("{key} = {value}: expected")]);
    }
    assert_eq!(place.stages(), 0);
}

/// Flips one bit in each kind of file of a table's results, at random places. The page is then
/// either refused or the same, and `pfq verify` names the file.
#[test]
fn flipped_bits_of_results_are_found() {
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    let results = place.path("results");
    let page = || experiments::report_page::read(&results).map(|page| page.html());
    let whole = page().unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(20);
    let (mut told, mut same) = (0, 0);
    for name in ["table3.csv", "table3.md", "table3.svg", "table3.png", "profile.toml", "stages.json"] {
        let path = results.join("table3/tiny").join(name);
        let bytes = std::fs::read(&path).unwrap();
        for _ in 0..25 {
            let mut flipped = bytes.clone();
            let bit = random.random_range(0..8 * bytes.len());
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, flipped).unwrap();
            match page() {
                Err(error) => {
                    assert!(format!("{error:#}").contains(name), "{error:#}");
                    told += 1;
                }
                Ok(html) => {
                    assert!(name == "stages.json" && html == whole, "bit {bit} of {name} went unnoticed");
                    same += 1;
                }
            }
        }
        let (code, text) = pfq(&place, &["verify", "results"]);
        if name != "stages.json" {
            assert!(code == 1 && text.contains("WRONG") && text.contains(name), "{text}");
        }
        std::fs::write(&path, bytes).unwrap();
    }
    println!("{told} of 150 flips were told, {same} changed nothing that is read");
    assert!(told >= 145, "{told} of 150");
    assert_eq!(page().unwrap(), whole);
}

/// Runs `pfq`; returns its exit code and what it prints on both outputs.
fn pfq(place: &Place, flags: &[&str]) -> (i32, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_pfq")).current_dir(place.root()).args(flags).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout.clone()).unwrap() + &said(&output))
}

/// `pfq verify` accepts intact stores and results, evaluates again, and names what is wrong.
#[test]
fn stores_and_results_are_verified() {
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    let check = |flags: &[&str], code: i32, parts: &[&str]| {
        let (found, text) = pfq(&place, &[&["verify"], flags].concat());
        assert_eq!(found, code, "{flags:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{flags:?}: {text:?} lacks {part:?}");
        }
    };
    check(&["runs"], 0, &["ok     mobilenet_v1 pre-train seed 0: 3 files", "5 checked, nothing wrong"]);
    check(&["results"], 0, &["results/table3/tiny: 6 files; 1 row from 5 stages", "1 checked"]);
    let again = ["runs", "--data", "synthetic", "--config", "tiny.toml"];
    check(&again, 0, &["again, to the bit", "5 checked, nothing wrong"]);
    check(
        &["runs", "--data", "synthetic", "--profile", "quick"],
        0,
        &["not evaluated, as these are other data"],
    );
    check(&["no"], 1, &["no is not a folder"]);
    std::fs::create_dir(place.path("empty")).unwrap();
    check(&["empty"], 1, &["neither stages nor results"]);

    // Only evaluation finds a network that is intact, but not the one that the figures belong to.
    let (first, last) = (place.stage("pretrain"), "outcome.json");
    let text = std::fs::read_to_string(first.join(last)).unwrap();
    let mut outcome: serde_json::Value = serde_json::Value::Null;
    for (figure, value) in [("top1_percent", 73.0), ("loss", 1.5)] {
        outcome = serde_json::from_str(&text).unwrap();
        outcome["evaluation"][figure] = value.into();
        outcome["seal"] = whole_file::seal::of(&outcome).into();
        std::fs::write(first.join(last), outcome.to_string()).unwrap();
        check(&["runs"], 0, &[]);
        let said = format!("{value}");
        check(
            &again,
            1,
            &["WRONG  mobilenet_v1 pre-train seed 0: its network has loss", &said, "1 of 5 are wrong"],
        );
    }

    // These settings are not the ones of the key.
    outcome["stage"]["pretrain"]["seed"] = 1.into();
    outcome["seal"] = whole_file::seal::of(&outcome).into();
    std::fs::write(first.join(last), outcome.to_string()).unwrap();
    check(&["runs"], 1, &["is not that of its folder, settings and data"]);
    std::fs::write(first.join(last), text).unwrap();

    // This row does not follow from its stages, and the hashes of the results fit it.
    let results = place.path("results/table3/tiny");
    let mut rows = report::read_csv(&results.join("table3.csv")).unwrap();
    rows[0].top1_percent += 10.0;
    report::write_csv(&rows, &results.join("table3.csv")).unwrap();
    let mut stages: serde_json::Value =
        serde_json::from_slice(&std::fs::read(results.join("stages.json")).unwrap()).unwrap();
    let csv = std::fs::read(results.join("table3.csv")).unwrap();
    stages["files"]["table3.csv"] = whole_file::seal::sha256(csv).into();
    stages["seal"] = whole_file::seal::of(&stages).into();
    std::fs::write(results.join("stages.json"), stages.to_string()).unwrap();
    check(&["results"], 1, &["seed 0: top1_percent", "the stages say"]);
    std::fs::remove_file(results.join("stages.json")).unwrap();
    check(&["results"], 1, &["table3.csv lacks its stages.json"]);
}

/// The results that are kept with the code are verified. Those of older versions without hashes are
/// compared row by row with their stages.
#[test]
fn results_of_older_versions_are_verified_by_their_rows() {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results");
    let (code, text) = pfq(&Place::new(), &["verify", results.to_str().unwrap()]);
    assert!(
        code == 0
            && text.contains("ablation_weight_decay/short: no hashes")
            && text.contains("nothing wrong"),
        "{text}"
    );
    // They had a plain list of stages.
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    let path = place.path("results/table3/tiny/stages.json");
    let stages: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, stages["stages"].to_string()).unwrap();
    place.run(&["--draw"]);
}

/// Results on real data are a record. A run that found no data and fell back to synthetic ones
/// leaves them alone.
#[test]
fn results_of_other_data_stay() {
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    let results = place.path("results/table3/tiny");
    // Makes the results look like results on CIFAR-100.
    let stages = std::fs::read_to_string(results.join("stages.json")).unwrap();
    let mut real: serde_json::Value = serde_json::from_str(&stages).unwrap();
    for stage in real["stages"].as_array_mut().unwrap() {
        stage["data"]["name"] = "cifar100".into();
        stage["seal"] = whole_file::seal::of(stage).into();
    }
    real["seal"] = whole_file::seal::of(&real).into();
    let real = real.to_string();
    std::fs::write(results.join("stages.json"), &real).unwrap();
    let files = || -> Vec<Vec<u8>> {
        ["table3.csv", "table3.md", "table3.svg", "stages.json", "profile.toml"]
            .map(|name| std::fs::read(results.join(name)).unwrap())
            .into()
    };
    let before = files();
    let flags = ["--data", "synthetic", "--only", &format!("{ROWS},dfq_with_fine_tune")];
    let begun = place.stages();
    place.check_refused(&flags, &["results/table3/tiny", "cifar100", "synthetic", "--out"]);
    assert!(files() == before && place.stages() == begun, "something was done");
    place.run(&[&flags[2..], &["--out", "elsewhere"]].concat());
    // Results on synthetic data may be replaced.
    std::fs::write(results.join("stages.json"), &stages).unwrap();
    place.run(&flags[2..]);
}

/// Figures on real data are a record too: a part of them, or other settings, do not replace them.
/// Results on synthetic data are none, whatever follows them.
#[test]
fn figures_of_real_data_stay() {
    let place = Place::new();
    place.run(&["--only", &format!("{ROWS},ours")]);
    tiny::write_pictures(&place.path("pictures"), &["cat", "dog", "newt"]);
    place.change(|profile| {
        profile["data"] =
            toml::Value::Table("imagenet = { train_limit = '16', test_limit = '6' }".parse().unwrap());
        let training = profile["training"]["pretraining"].as_table_mut().unwrap();
        training["augmentation"] = toml::Value::Table("pad = 0\nflip = true".parse().unwrap());
    });
    let figure3 = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_figure3"));
        command.current_dir(place.root()).args(["--config", "tiny.toml", "--data", "pictures"]);
        let output = command.args(["--device", "cpu"]).args(flags).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout.clone()).unwrap() + &said(&output))
    };
    let (well, text) = figure3(&[]);
    assert!(well && text.contains("filters have V < τ"), "{text}");
    let outputs = || std::fs::read(place.path("results/figure3/tiny/outputs.csv")).unwrap();
    let before = outputs();
    let (well, text) = figure3(&["--only", "mobilenet_v1"]);
    assert!(!well && text.contains("holds results of mobilenet_v2 pre-train"), "{text}");
    place.change(|profile| profile["pfq"]["threshold"] = 0.9.into());
    let (well, text) = figure3(&[]);
    assert!(!well && text.contains("another [pfq]"), "{text}");
    assert!(outputs() == before);
    let flags = ["--data", "pictures", "--only", &format!("{ROWS},ours")];
    assert!(place.table3(&flags).status.success(), "rows on synthetic data are replaced");
    assert!(place.rows().iter().all(|row| !report::is_synthetic(&row.dataset)));
    std::fs::remove_dir_all(place.path("pictures/val")).unwrap();
    let flags = [&flags[..], &["--out", "elsewhere"]].concat();
    place.check_refused(&flags, &["no test images", "val/CLASS/*"]);
}

/// What is done is drawn again without running anything, and a stage that is done is named.
#[test]
fn what_is_done_is_drawn_and_said() {
    let place = Place::new();
    let flags = ["--data", "synthetic", "--only", &format!("{ROWS},ours")];
    place.run(&flags[2..]);
    // What was run is drawn again, also without the store.
    let (rows, picture) = (place.rows(), place.path("results/table3/tiny/table3.svg"));
    std::fs::remove_file(&picture).unwrap();
    std::fs::rename(place.path("runs"), place.path("away")).unwrap();
    place.run(&["--draw"]);
    assert!(picture.is_file() && place.rows() == rows && place.stages() == 0);
    place
        .check_refused(&["--data", "synthetic", "--draw", "--out", "nowhere"], &["no row that has been run"]);
    std::fs::rename(place.path("away"), place.path("runs")).unwrap();
    let key = rows[0].settings_hash.clone();
    let output = place.table3(&["--data", "synthetic", "--stage", &key]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("done already, top-1"), "{text}");
    let empty = place.path("empty");
    std::fs::create_dir(&empty).unwrap();
    let mut report = Command::new(env!("CARGO_BIN_EXE_report"));
    let output = report.arg("--results").arg(&empty).output().unwrap();
    assert!(!output.status.success() && said(&output).contains("holds no results"), "{}", said(&output));
}

/// Figures of several seeds that are the same run would have no spread.
#[test]
fn a_method_without_anything_random_has_one_row() {
    let place = Place::new();
    let mut ablation = Command::new(env!("CARGO_BIN_EXE_ablation"));
    ablation.current_dir(place.root()).args(["--config", "tiny.toml", "--data", "synthetic"]);
    let output = ablation
        .args(["--device", "cpu", "--only", "ablation_dfq_alone,mobilenet_v2", "--seeds", "0,1"])
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let file = place.path("results/ablation_dfq_alone/tiny/ablation_dfq_alone.csv");
    let rows = report::read_csv(&file).unwrap();
    let methods: std::collections::BTreeSet<&str> = rows.iter().map(|row| row.method.as_str()).collect();
    assert!(rows.len() == methods.len() && rows.iter().all(|row| row.seed == 0), "{rows:?}");
}

/// If the results can't be written, this is noticed before hours of training.
#[test]
fn results_that_cannot_be_written_are_noticed_first() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").unwrap();
    let out = Path::new("file").join("below");
    let flags = ["--data", "synthetic", "--out", out.to_str().unwrap()];
    place.check_refused(&flags, &["file/below/table3/tiny", "can't be written"]);
    assert_eq!(place.stages(), 0);
}

/// A run that is ended by a signal says what is kept, and the same command resumes it.
#[test]
#[cfg(unix)]
fn signals_end_a_run_with_a_line_that_says_what_is_kept() {
    let undisturbed = Place::new();
    undisturbed.pretrain_for(5);
    let ours = ["--only", &format!("{ROWS},ours")];
    undisturbed.run(&ours);

    let place = Place::new();
    place.pretrain_for(5);
    let flags = ["--config", "tiny.toml", "--device", "cpu", "--data", "synthetic"];
    for (signal, code, epoch) in [("INT", 130, 1), ("TERM", 143, 2), ("HUP", 129, 3)] {
        // This must not depend on how the test was started: a shell's background jobs ignore
        // SIGINT.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT,TERM,HUP", TABLE3]);
        command.current_dir(place.root()).args(flags).args(ours);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let reached = lines.any(|line| line.starts_with(&format!("  epoch {epoch}/5")));
        assert!(reached, "epoch {epoch} was not reached");
        let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let rest: Vec<String> = lines.collect();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{rest:?}");
        let line = rest.last().unwrap();
        let expected = format!("Ended by SIG{signal}: mobilenet_v1 pre-train seed 0 is kept up to epoch ");
        assert!(
            line.starts_with(&expected) && line.ends_with("The same command goes on from there."),
            "{rest:?}"
        );
    }
    let said = place.run(&ours);
    assert!(said.contains("going on from the checkpoint"), "{said}");
    assert_eq!(place.rows(), undisturbed.rows());
}

/// A run that was started with a signal ignored, as by nohup, goes on when the signal comes.
#[test]
#[cfg(target_os = "linux")]
fn an_ignored_signal_stays_ignored() {
    let place = Place::new();
    let script = format!(
        "trap '' HUP; {TABLE3} --config tiny.toml --device cpu --data synthetic --only {ROWS},ours 2>said & \
         until grep -q epoch said; do sleep 0.05; done; kill -HUP $!; wait $!"
    );
    let status = Command::new("sh").current_dir(place.root()).args(["-c", &script]).status().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(place.rows().len(), 1);
}

/// A closed or full output does not end a run: its results are the same as those of any other run.
#[test]
#[cfg(target_os = "linux")]
fn printing_is_not_worth_a_run() {
    let undisturbed = Place::new();
    let ours = format!("{ROWS},ours");
    undisturbed.run(&["--only", &ours]);
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    // A pipe whose reader has gone.
    let closed = || {
        let mut reader = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
        let pipe = reader.stdin.take().unwrap();
        reader.wait().unwrap();
        Stdio::from(pipe)
    };
    let check = |stdout: Stdio, stderr: Stdio, flags: &[&str], code: i32| {
        let place = Place::new();
        let common = ["--config", "tiny.toml", "--device", "cpu", "--data", "synthetic", "--only", &ours];
        let mut command = Command::new(TABLE3);
        let command = command.current_dir(place.root()).args(common).args(flags);
        let output = command.stdout(stdout).stderr(stderr).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(!said(&output).contains("panicked"), "{}", said(&output));
        if flags.is_empty() {
            assert_eq!(place.rows(), undisturbed.rows());
        }
        said(&output)
    };
    check(Stdio::null(), closed(), &[], 0);
    check(Stdio::null(), full(), &[], 0);
    check(closed(), Stdio::piped(), &[], 0);
    check(closed(), Stdio::piped(), &["--plan"], 0);
    let said = check(full(), Stdio::piped(), &[], 1);
    assert!(said.contains("Error: standard output could not be written (No space left"), "{said}");
}
