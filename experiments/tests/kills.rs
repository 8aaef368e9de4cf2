//! A table that is killed at each call that changes a file and at random moments, and one in which
//! each such call fails. Afterwards, the same command gives what an undisturbed run gives, and
//! nothing is left over.
//!
//! A library that is loaded before the system's, `kills/layer.c`, intercepts the calls.
#![cfg(target_os = "linux")]

mod tiny;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tiny::{Place, TABLE3, said};
use whole_file::seal::sha256;

/// `ENOSPC`, `EIO` and `EACCES`, as Linux numbers them.
const ERRORS: [(&str, &str); 3] = [("a full disk", "28"), ("a failing disk", "5"), ("no permission", "13")];

/// The distance between the calls that the short tests try; the long ones try every call.
const STEP: usize = 11;

/// The intercepting library, and what a run gives without faults.
struct Faults {
    folder: tempfile::TempDir,
    /// The number of calls of an undisturbed run.
    calls: usize,
    expected: BTreeMap<String, String>,
    /// The seconds that such a run takes.
    seconds: f64,
}

impl Faults {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("layer.c");
        std::fs::write(&source, include_str!("kills/layer.c")).unwrap();
        let compiler = std::env::var("CC").unwrap_or("cc".into());
        let built = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&folder.path().join("layer.so"), &source])
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(built.success(), "the layer does not compile: {built}");
        let mut faults = Self { folder, calls: 0, expected: BTreeMap::new(), seconds: 0.0 };
        let place = Place::new();
        let started = Instant::now();
        let output = faults.run(&place, &[("FAULT_COUNT", "count")]);
        assert!(output.status.success(), "{}", said(&output));
        faults.seconds = started.elapsed().as_secs_f64();
        faults.calls = std::fs::read_to_string(place.path("count")).unwrap().trim().parse().unwrap();
        faults.expected = what_is_there(&place);
        assert!(faults.calls > 100 && faults.expected.len() > 20, "{} {:?}", faults.calls, faults.expected);
        faults
    }

    fn command(&self, place: &Place, faults: &[(&str, &str)]) -> Command {
        let mut command = Command::new(TABLE3);
        command
            .current_dir(place.root())
            .args(["--config", "tiny.toml", "--device", "cpu", "--data", "synthetic"])
            .args(["--only", "mobilenet_v1,a4w4,ours"])
            .args(["--store".as_ref(), place.path("all/runs").as_os_str()])
            .args(["--out".as_ref(), place.path("all/results").as_os_str()])
            .env("LD_PRELOAD", self.folder.path().join("layer.so"))
            .env("FAULT_UNDER", place.path("all"))
            .envs(faults.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, place: &Place, faults: &[(&str, &str)]) -> Output {
        self.command(place, faults).output().unwrap()
    }

    /// Runs the same command once more without faults: it must give and leave behind what an
    /// undisturbed run does.
    #[track_caller]
    fn check_afterwards(&self, place: &Place, what: &str) {
        let output = self.run(place, &[]);
        assert!(output.status.success(), "after {what}: {}", said(&output));
        let found = what_is_there(place);
        assert!(
            found == self.expected,
            "after {what}: {:?}, expected {:?}",
            found.iter().filter(|entry| self.expected.get(entry.0) != Some(entry.1)).collect::<Vec<_>>(),
            self.expected.keys().collect::<Vec<_>>()
        );
    }

    /// Kills a run at a call.
    fn kill_at(&self, call: usize) {
        let place = Place::new();
        let output = self.run(&place, &[("FAULT_AT", &call.to_string()), ("FAULT_HOW", "kill")]);
        assert_eq!(output.status.code(), None, "call {call} was not reached: {}", said(&output));
        self.check_afterwards(&place, &format!("a kill at call {call}"));
    }

    /// Makes a call fail: the run must not panic, and nothing of the failure may be left
    /// afterwards. Returns whether the run succeeded.
    fn fail_at(&self, call: usize, (what, error): (&str, &str)) -> bool {
        let place = Place::new();
        let output = self.run(&place, &[("FAULT_AT", &call.to_string()), ("FAULT_HOW", error)]);
        let told = said(&output);
        assert!(!told.contains("panicked"), "call {call}, {what}: {told}");
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "call {call}, {what}: {}: {told}",
            output.status
        );
        self.check_afterwards(&place, &format!("{what} at call {call}"));
        output.status.success()
    }

    /// Kills a run after a time; returns whether it was still running.
    fn kill_after(&self, seconds: f64) -> bool {
        let place = Place::new();
        let mut child = self.command(&place, &[]).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(seconds));
        child.kill().unwrap();
        let killed = child.wait().unwrap().code().is_none();
        self.check_afterwards(&place, &format!("a kill after {seconds} s"));
        killed
    }
}

/// Returns every file by its path, with what does not change from run to run: hashes of whole
/// networks, outcomes and tables without times, and nothing for the rest.
fn what_is_there(place: &Place) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    let mut folders = vec![place.path("all")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(place.path("all")).unwrap().display().to_string();
                files.insert(name, content(&path));
            }
        }
    }
    files
}

fn content(path: &Path) -> String {
    let read = || std::fs::read(path).unwrap();
    match path.file_name().unwrap().to_str().unwrap() {
        "network.safetensors" => sha256(read()),
        "outcome.json" => {
            let outcome: serde_json::Value = serde_json::from_slice(&read()).unwrap();
            [&outcome["key"], &outcome["evaluation"], &outcome["parent_network"], &outcome["report"]]
                .map(ToString::to_string)
                .concat()
        }
        "metrics.csv" => std::str::from_utf8(&read()).unwrap().lines().count().to_string(),
        "table3.csv" => {
            let rows = report::read_csv(path).unwrap();
            format!(
                "{:?}",
                rows.into_iter().map(|row| report::Row { wall_seconds: 0.0, ..row }).collect::<Vec<_>>()
            )
        }
        _ => String::new(),
    }
}

#[test]
fn a_run_that_is_killed_at_some_calls() {
    let faults = Faults::new();
    (1..=faults.calls).step_by(STEP).for_each(|call| faults.kill_at(call));
}

#[test]
fn a_run_in_which_some_calls_fail() {
    let faults = Faults::new();
    for (index, call) in (1..=faults.calls).step_by(STEP).enumerate() {
        faults.fail_at(call, ERRORS[index % ERRORS.len()]);
    }
}

#[test]
#[ignore = "minutes"]
fn a_run_that_is_killed_at_every_call() {
    let faults = Faults::new();
    (1..=faults.calls).for_each(|call| faults.kill_at(call));
    println!("{} kills", faults.calls);
}

#[test]
#[ignore = "minutes"]
fn a_run_in_which_every_call_fails() {
    let faults = Faults::new();
    let mut went_on = 0;
    for call in 1..=faults.calls {
        went_on += usize::from(faults.fail_at(call, ERRORS[call % ERRORS.len()]));
    }
    println!("{} errors, {went_on} of which the run went on from", faults.calls);
}

#[test]
#[ignore = "minutes"]
fn a_run_that_is_killed_at_random_moments() {
    let faults = Faults::new();
    let mut random = ChaCha8Rng::seed_from_u64(20);
    let killed = (0..200).filter(|_| faults.kill_after(random.random_range(0.0..faults.seconds))).count();
    println!("200 kills, {killed} of them before the end");
}

/// The file systems of some clusters refuse every lock: the run says so once and goes on.
#[test]
fn a_store_without_locks() {
    let faults = Faults::new();
    let place = Place::new();
    let output = faults.run(&place, &[("FAULT_NO_LOCKS", "1")]);
    let told = said(&output);
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("has no locks").count(), 1, "{told}");
    assert!(!told.contains("waiting"), "{told}");
    assert!(what_is_there(&place) == faults.expected);
}
