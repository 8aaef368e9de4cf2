//! The store of stages: nothing runs twice, nothing is mixed up, and interrupted work resumes.
//!
//! Other processes are this binary, started again to run the test `child`.

mod common;

use candle_core::Device;
use common::{bits, data, executed, pretrain, recipe, run, run_well, training};
use models::{Method, Network, Version};
use pfq::PfQ;
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use train::TimeLimit;
use workflow::{Error, Event, Outcome, Published, Purpose, Recipe, Stage, StageKind, Store};

/// The environment variable that names the store to another process.
const STORE: &str = "PFQ_TEST_STORE";
/// The environment variable with the event at which another process stops, as [`run`] reports it.
const HOLD: &str = "PFQ_TEST_HOLD";

fn small() -> Arc<datasets::InMemoryDataset> {
    data(60, 40, 5)
}

/// Returns a workflow of pre-training, pruning, and fine-tuning in two epochs.
fn short_workflow() -> Arc<Stage> {
    let recipe = recipe(4);
    let pruned = pretrain(Version::V1, 1, 0).then(StageKind::Prune { pfq: recipe.pfq });
    let training = recipe.trainings.get(Purpose::Activations).unwrap();
    pruned.then(StageKind::FineTune { quantization: recipe.quantization, training, seed: 1 })
}

#[test]
fn a_stage_runs_once() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let end = short_workflow();
    let labels: Vec<String> = end.lineage().iter().map(|stage| stage.label()).collect();

    let (outcome, told) = run_well(&store, &end, &data);
    let expected: Vec<String> =
        labels.iter().flat_map(|label| [format!("started {label}"), format!("finished {label}")]).collect();
    assert_eq!(told, expected);
    for stage in end.lineage() {
        let folder = store.folder(&stage, &data.fingerprint).unwrap();
        for (file, there) in
            [("outcome.json", true), ("network.safetensors", true), ("checkpoint.safetensors", false)]
        {
            assert_eq!(folder.join(file).exists(), there, "{file} in {}", folder.display());
        }
    }

    // Again with the same store, and with a new one in the same folder.
    for store in [store.clone(), Store::new(folder.path())] {
        let (again, told) = run_well(&store, &end, &data);
        assert_eq!(told, [format!("found {}", labels[2])]);
        assert_eq!(
            (again.key, again.evaluation.top1_percent, again.metrics.len()),
            (outcome.key.clone(), outcome.evaluation.top1_percent, outcome.metrics.len())
        );
    }
    // Only what is missing is run.
    std::fs::remove_dir_all(store.folder(&end.lineage()[1], &data.fingerprint).unwrap()).unwrap();
    let (_, told) = run_well(&store, &end, &data);
    assert_eq!(told, [format!("found {}", labels[2])], "what is before a finished stage is not needed");
    std::fs::remove_dir_all(store.folder(&end, &data.fingerprint).unwrap()).unwrap();
    let (_, told) = run_well(&store, &end, &data);
    assert_eq!(executed(&told), [&labels[1], &labels[2]]);
}

/// A store that lacks a stage uses the published one, provided that it was made from the network
/// that its parent has in the store.
#[test]
fn published_stages_count_as_done() {
    let folder = tempfile::tempdir().unwrap();
    let (first, data, end) = (Store::new(folder.path().join("first")), small(), short_workflow());
    let lineage = end.lineage();
    let labels: Vec<String> = lineage.iter().map(|stage| stage.label()).collect();
    let (expected, _) = run_well(&first, &end, &data);
    let outcome = |stage: &Stage| first.outcome(stage, &data.fingerprint).unwrap().unwrap();
    let outcomes: Vec<Outcome> = lineage.iter().map(|stage| outcome(stage)).collect();
    // The networks of some stages, given by their indices.
    let networks = |places: &[usize]| {
        let file = |stage: &Stage| first.network_file(stage, &data.fingerprint).unwrap();
        places.iter().map(|&place| (outcomes[place].key.clone(), file(&lineage[place]))).collect()
    };
    let beside = |name: &str, outcomes: &[Outcome], places: &[usize]| {
        let published = Published::new(outcomes.to_vec(), networks(places)).unwrap();
        Store::new(folder.path().join(name)).beside(published)
    };
    let check_plan = |store: &Store, ends: &[Arc<Stage>], expected: &[(bool, bool)]| {
        let plan = store.plan(ends, &data.fingerprint).unwrap();
        let found: Vec<_> = plan.iter().map(|planned| (planned.published, planned.to_do)).collect();
        assert_eq!(found, expected);
    };

    // The last stage is done, and the outcomes of the stages before it are known.
    let store = beside("last", &outcomes, &[2]);
    check_plan(&store, &lineage[2..], &[(true, false); 3]);
    let (found, told) = run_well(&store, &end, &data);
    assert_eq!((found, told), (expected.clone(), vec![format!("found {}", labels[2])]));
    assert!(!folder.path().join("last").exists());
    assert!(
        bits(&store.network(&end, &data.fingerprint, &Device::Cpu).unwrap())
            == bits(&first.network(&end, &data.fingerprint, &Device::Cpu).unwrap())
    );
    // A network that is not published must be made if it is asked for, or if a stage after it needs
    // it.
    check_plan(&store, &lineage[1..2], &[(true, true), (true, true)]);

    // The first stage is done, and the last one must be made from it.
    let store = beside("first_alone", &outcomes, &[0]);
    check_plan(&store, &lineage[2..], &[(true, false), (true, true), (true, true)]);
    let (outcome, told) = run_well(&store, &end, &data);
    assert_eq!(executed(&told), [&labels[1], &labels[2]]);
    assert_eq!(outcome.network_hash(), expected.network_hash());
    check_plan(&store, &lineage[2..], &[(true, false), (false, false), (false, false)]);

    // Published stages are ignored if they were made from another network than the store has.
    let store = beside("mixed", &outcomes, &[1, 2]);
    run_well(&store, &lineage[0], &data);
    check_plan(&store, &lineage[2..], &[(false, false), (true, false), (true, false)]);
    let mut others = outcomes.clone();
    others[1].parent_network = Some("0".repeat(64));
    let store = beside("mixed", &others, &[1, 2]);
    check_plan(&store, &lineage[2..], &[(false, false), (false, true), (false, true)]);
    let (_, told) = run_well(&store, &end, &data);
    assert_eq!(executed(&told), [&labels[1], &labels[2]]);

    // A published network must belong to one of the published stages.
    let error = Published::new(outcomes[..2].to_vec(), networks(&[2])).unwrap_err().to_string();
    assert!(error.contains(&outcomes[2].key), "{error}");
}

/// Returns the keys of a workflow's stages.
fn keys(end: &Arc<Stage>) -> Vec<String> {
    end.lineage().iter().map(|stage| stage.key("some data").unwrap()).collect()
}

/// Checks that two workflows share exactly their first `expected` stages.
#[track_caller]
fn check_shared(a: &Arc<Stage>, b: &Arc<Stage>, expected: usize, what: &str) {
    let (a, b) = (keys(a), keys(b));
    let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    assert_eq!(shared, expected, "{what}: stages shared");
    assert!(a[shared..].iter().all(|key| !b.contains(key)), "{what}: a key comes up again elsewhere");
}

#[test]
fn recipes_share_what_they_have_in_common() {
    let root = pretrain(Version::V1, 1, 0);
    let one = recipe(4).algorithm1(&root).unwrap();
    let check = |expected: usize, what: &str, change: &dyn Fn(&mut Recipe)| {
        let mut other = recipe(4);
        change(&mut other);
        check_shared(&one, &other.algorithm1(&root).unwrap(), expected, what);
    };
    check(5, "the same", &|_| ());
    check(5, "what only DFQ needs", &|r| {
        r.dfq.equalize = false;
        r.trainings.set(Purpose::Dfq, training(9));
    });
    check(4, "weight training", &|r| r.trainings.set(Purpose::Weights, training(2)));
    check(4, "weight bits", &|r| r.quantization.weights = Precision::try_from(3).unwrap());
    check(2, "activation bits", &|r| r.quantization.activations = Precision::try_from(3).unwrap());
    check(2, "activation training", &|r| r.trainings.set(Purpose::Activations, training(3)));
    check(2, "seed", &|r| r.seed = 2);
    check(1, "τ", &|r| r.pfq.threshold = Some(1e-4));
    check(1, "bias correction", &|r| r.pfq.bias_correction = false);
    let other = recipe(4);
    check_shared(&one, &other.dfq_with_fine_tune(&root).unwrap(), 1, "DFQ");
    check_shared(&one, &other.fine_tune_once(&root).unwrap(), 2, "fine-tuning once, from PfQ");
    check_shared(&one, &other.pfq(&root).unwrap(), 3, "PfQ of Table 1, up to the activations");
    check_shared(&one, &other.pfq_without_bias_correction(&root).unwrap(), 1, "PfQ without bias correction");
    check_shared(&one, &other.activations_only(&root).unwrap(), 1, "no pruning");
    let [pact, dsq] = [Method::Pact, Method::Dsq].map(|method| other.learned(&root, method).unwrap());
    check_shared(&one, &pact, 1, "PACT");
    check_shared(&one, &dsq, 1, "DSQ");
    check_shared(&pact, &dsq, 1, "PACT and DSQ");
    check_shared(
        &one,
        &recipe(4).algorithm1(&pretrain(Version::V1, 1, 1)).unwrap(),
        0,
        "another pre-training",
    );
}

#[test]
fn other_data_are_another_result() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let stage = pretrain(Version::V1, 1, 0);
    let (first, _) = run_well(&store, &stage, &data(40, 20, 5));
    let (second, told) = run_well(&store, &stage, &data(40, 20, 6));
    assert_eq!(executed(&told).len(), 1);
    assert_ne!(first.key, second.key);
    assert_ne!(first.data.fingerprint, second.data.fingerprint);
}

#[test]
fn a_plan_names_each_stage_once() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let root = pretrain(Version::V1, 1, 0);
    let ends = [
        recipe(4).algorithm1(&root).unwrap(),
        recipe(3).algorithm1(&root).unwrap(),
        recipe(4).dfq_with_fine_tune(&root).unwrap(),
        recipe(4).algorithm1(&root).unwrap(),
    ];
    let plan = store.plan(&ends, &data.fingerprint).unwrap();
    // The workflows share the root and the first pruning: 5 + 3 + 2 stages.
    assert_eq!(plan.len(), 10);
    let keys: Vec<&str> = plan.iter().map(|planned| planned.key.as_str()).collect();
    assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), 10, "a stage is planned twice: {keys:?}");
    for (i, planned) in plan.iter().enumerate() {
        assert_eq!(planned.key, planned.stage.key(&data.fingerprint).unwrap());
        assert!(planned.outcome.is_none() && planned.epochs.is_empty());
        if let Some(parent) = &planned.stage.parent {
            let parent = parent.key(&data.fingerprint).unwrap();
            assert!(
                keys[..i].contains(&parent.as_str()),
                "{} comes before its parent",
                planned.stage.label()
            );
        }
    }
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "planning left something behind");

    let pruned = ends[1].lineage()[1].clone();
    run_well(&store, &pruned, &data);
    let plan = store.plan(&ends, &data.fingerprint).unwrap();
    let done: Vec<bool> = plan.iter().map(|planned| planned.outcome.is_some()).collect();
    assert_eq!(done, [true, true, false, false, false, false, false, false, false, false]);
    assert_eq!(plan[0].epochs.len(), 1);
}

/// Without any time, each call does the one epoch that it may always start, and the last call
/// finishes the work.
#[test]
fn a_workflow_in_pieces_gives_the_bits_of_one() {
    let (data, end) = (small(), short_workflow());
    let whole_folder = tempfile::tempdir().unwrap();
    let (expected, _) = run_well(&Store::new(whole_folder.path()), &end, &data);

    let folder = tempfile::tempdir().unwrap();
    let in_time = || Store::new(folder.path()).within(TimeLimit::after(Duration::ZERO));
    let [first, second, third] = &end.lineage()[..] else { panic!("three stages") };
    let mut all = Vec::new();
    let outcome = loop {
        let (result, told) = run(&in_time(), &end, &data, &mut |_, _| ());
        all.push(told);
        match result {
            Ok(outcome) => break outcome,
            Err(error) => assert!(error.is_time_limit() && all.len() < 4, "{}", story(&error)),
        }
    };
    let [first, second, third] = [first, second, third].map(|stage| stage.label());
    assert_eq!(
        all,
        [
            vec![format!("started {first}"), format!("finished {first}")],
            vec![
                format!("found {first}"),
                format!("started {second}"),
                format!("finished {second}"),
                format!("started {third}")
            ],
            vec![
                format!("found {second}"),
                format!("started {third}"),
                "resumed 1".into(),
                format!("finished {third}")
            ],
        ]
    );
    assert_eq!((outcome.evaluation, outcome.metrics.len()), (expected.evaluation, 2));
    assert_eq!(
        (&outcome.low_variance_percent, outcome.low_variance_percent.len()),
        (&expected.low_variance_percent, 2)
    );
    let folder_of =
        |root: &Path| Store::new(root).folder(&end, &data.fingerprint).unwrap().join("network.safetensors");
    let network = |root: &Path| Network::load(&folder_of(root), &Device::Cpu).unwrap().0;
    assert!(bits(&network(folder.path())) == bits(&network(whole_folder.path())));
    // Finished work needs no time.
    let (again, told) = run(&in_time(), &end, &data, &mut |_, _| ());
    assert_eq!((again.unwrap().key, told), (outcome.key, vec![format!("found {third}")]));
}

/// The process that other tests start; by itself it tests nothing.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(STORE) else { return };
    let hold = std::env::var(HOLD).unwrap();
    let (outcome, _) = run(&Store::new(folder), &short_workflow(), &small(), &mut |told, event| {
        let epoch = match event {
            Event::Progress(stage, train::Progress::Steps { epoch, .. }) => {
                format!("epoch {epoch} of {}", stage.label())
            }
            _ => String::new(),
        };
        println!("{told}{epoch}");
        if told == hold || epoch == hold {
            println!("holding");
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
    });
    outcome.unwrap();
}

/// Another process, which is killed when this is dropped if it still runs.
struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Killing fails if the process has already ended, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the short workflow in another process and waits until it stops at `hold`.
fn start(store: &Path, hold: &str) -> Process {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .envs([(STORE, store.as_os_str()), (HOLD, hold.as_ref())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut process = Process { child, output };
    let mut printed = String::new();
    while !printed.ends_with("holding\n") {
        let read = process.output.read_line(&mut printed).unwrap();
        assert!(read > 0, "the process ended before {hold:?}, having printed\n{printed}");
    }
    process
}

#[test]
fn a_killed_workflow_goes_on_where_it_was() {
    let (data, end) = (small(), short_workflow());
    let whole_folder = tempfile::tempdir().unwrap();
    let whole = Store::new(whole_folder.path());
    let (expected, _) = run_well(&whole, &end, &data);

    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let [first, second, third] = &end.lineage()[..] else { panic!("three stages") };
    for hold in [format!("started {}", second.label()), format!("epoch 2 of {}", third.label())] {
        let mut process = start(folder.path(), &hold);
        process.child.kill().unwrap();
        let status = process.child.wait().unwrap();
        assert!(!status.success(), "the process should have been killed: {status}");
    }
    let plan = store.plan(std::slice::from_ref(&end), &data.fingerprint).unwrap();
    let state: Vec<_> =
        plan.iter().map(|planned| (planned.outcome.is_some(), planned.epochs.len())).collect();
    assert_eq!(state, [(true, 1), (true, 0), (false, 1)]);

    let (outcome, told) = run_well(&store, &end, &data);
    let label = third.label();
    assert_eq!(
        told,
        [
            format!("found {}", second.label()),
            format!("started {label}"),
            "resumed 1".to_string(),
            format!("finished {label}")
        ]
    );
    assert_eq!(outcome.metrics.len(), 2);
    assert_eq!(outcome.evaluation, expected.evaluation);
    for stage in [first, second, third] {
        let network = |store: &Store| bits(&store.network(stage, &data.fingerprint, &Device::Cpu).unwrap());
        assert!(network(&store) == network(&whole), "{} has other bits after a kill", stage.label());
    }
}

/// If another process is running a stage, this one waits and takes its result.
#[test]
fn two_processes_run_a_stage_once() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let stage = &short_workflow().lineage()[0];
    let label = stage.label();
    let mut process = start(folder.path(), &format!("started {label}"));
    let mut answers = process.child.stdin.take().unwrap();
    let (outcome, told) = run(&store, stage, &data, &mut |told, _| {
        if told.starts_with("waiting") {
            assert!(!store.folder(stage, &data.fingerprint).unwrap().join("outcome.json").exists());
            answers.write_all(b"go on\n").unwrap();
        }
    });
    assert_eq!(told, [format!("waiting {label}"), format!("found {label}")]);
    assert_eq!(outcome.unwrap().label, label);
    // The other process continues its workflow to the end.
    let mut rest = String::new();
    process.output.read_to_string(&mut rest).unwrap();
    assert!(process.child.wait().unwrap().success(), "{rest}");
    assert_eq!(rest.matches(&format!("finished {label}")).count(), 1, "{rest}");
    assert!(store.outcome(&short_workflow(), &data.fingerprint).unwrap().is_some());
}

#[test]
fn two_threads_run_a_stage_once() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let stage = pretrain(Version::V1, 1, 0);
    let (started, has_started) = mpsc::channel();
    let (waits, is_waiting) = mpsc::channel();
    let (first, second) = {
        let (store, stage, data) = (&store, &*stage, &data);
        std::thread::scope(|scope| {
            let first = scope.spawn(move || {
                run(store, stage, data, &mut |told, _| {
                    if told.starts_with("started") {
                        started.send(()).unwrap();
                        is_waiting.recv().unwrap();
                    }
                })
            });
            let second = scope.spawn(move || {
                has_started.recv().unwrap();
                run(store, stage, data, &mut |told, _| {
                    if told.starts_with("waiting") {
                        waits.send(()).unwrap();
                    }
                })
            });
            (first.join().unwrap(), second.join().unwrap())
        })
    };
    let label = stage.label();
    assert_eq!(first.1, [format!("started {label}"), format!("finished {label}")]);
    assert_eq!(second.1, [format!("waiting {label}"), format!("found {label}")]);
    assert_eq!(first.0.unwrap().key, second.0.unwrap().key);
}

/// Returns the messages of an error and of its causes.
fn story(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        story = format!("{story}: {error}");
        source = error.source();
    }
    story
}

#[test]
fn a_failed_stage_is_named_and_what_came_before_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let end = short_workflow();
    // The weights are quantized by now, so the network cannot be pruned.
    let impossible = end.then(StageKind::Prune { pfq: PfQ::default() });
    let (outcome, _) = run(&store, &impossible, &data, &mut |_, _| ());
    let error = outcome.unwrap_err();
    assert!(matches!(&error, Error::Stage { label, .. } if *label == impossible.label()), "{error:?}");
    assert!(story(&error).contains("quantized weights"), "{}", story(&error));
    assert!(store.outcome(&impossible, &data.fingerprint).unwrap().is_none());
    let (_, told) = run_well(&store, &end, &data);
    assert_eq!(told, [format!("found {}", end.label())]);
}

/// Flips a random bit of a file.
fn flip(path: &Path, random: &mut impl Rng) {
    let mut data = std::fs::read(path).unwrap();
    let bit = random.random_range(0..8 * data.len());
    data[bit / 8] ^= 1 << (bit % 8);
    std::fs::write(path, data).unwrap();
}

/// A strict store reports the damaged file. Any other store sets it aside, runs the stage again,
/// and gets the same bits.
#[test]
fn what_is_damaged_is_an_error_or_is_set_aside_and_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data, end) = (Store::new(folder.path()), small(), short_workflow());
    run_well(&store, &end, &data);
    let [root, next, _] = &end.lineage()[..] else { panic!("three stages") };
    let folder_of = |stage: &Stage| store.folder(stage, &data.fingerprint).unwrap();
    let network = |stage: &Stage| bits(&store.network(stage, &data.fingerprint, &Device::Cpu).unwrap());
    let (first, second) = (network(root), network(next));
    let damage = |file: &str, change: &dyn Fn(&mut Vec<u8>), stage: &Stage| {
        let path = folder_of(root).join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        if bytes.is_empty() { std::fs::remove_file(&path) } else { std::fs::write(&path, &bytes) }.unwrap();
        // The next stage is removed, so that the damaged network is needed again.
        if file != "outcome.json" {
            std::fs::remove_dir_all(folder_of(next)).unwrap();
        }
        let story = story(&run(&store.clone().strict(), stage, &data, &mut |_, _| ()).0.unwrap_err());
        assert!(story.contains(&path.display().to_string()), "{story:?} does not name {}", path.display());
        let (_, told) = run_well(&store, stage, &data);
        let root = root.label();
        assert!(told.contains(&format!("set aside {root}")) && executed(&told).contains(&&*root), "{told:?}");
    };
    let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    damage("outcome.json", &half, root);
    damage("outcome.json", &|bytes| bytes[100] ^= 1, root);
    damage("network.safetensors", &half, next);
    damage("network.safetensors", &|bytes| *bytes.last_mut().unwrap() ^= 1, next);
    damage("network.safetensors", &Vec::clear, next);
    assert!(network(root) == first && network(next) == second, "other bits after a repair");
    let aside: BTreeSet<_> =
        (1..=5).map(|number| folder_of(root).join(format!("damaged-{number}"))).collect();
    assert!(aside.iter().all(|place| place.is_dir()), "{aside:?}");
    assert!(aside.iter().all(|place| place.join("outcome.json").exists()));
    // Undamaged stages are still intact.
    assert_eq!(run_well(&store, &end, &data).1, [format!("found {}", end.label())]);
}

/// Random bits are flipped in each kind of file. A strict store reports this, unless the flip
/// changes nothing that is read.
#[test]
fn flipped_bits_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data, end) = (Store::new(folder.path()), small(), short_workflow());
    let [root, next, _] = &end.lineage()[..] else { panic!("three stages") };
    // The last stage stops after its first epoch and leaves a checkpoint.
    run_well(&store, next, &data);
    let limited = store.clone().strict().within(TimeLimit::after(Duration::ZERO));
    let unfinished = |store: &Store| run(store, &end, &data, &mut |_, _| ()).0;
    assert!(unfinished(&limited).unwrap_err().is_time_limit());
    let folder_of = |stage: &Stage| store.folder(stage, &data.fingerprint).unwrap();
    let outcome = |stage: &Stage| store.outcome(stage, &data.fingerprint);
    let found = outcome(root).unwrap();

    let mut random = ChaCha8Rng::seed_from_u64(20);
    let (mut told, mut same) = (0, 0);
    let strict = store.clone().strict();
    for (stage, file, flips) in [
        (root, "network.safetensors", 100),
        (root, "outcome.json", 100),
        (&end, "checkpoint.safetensors", 100),
    ] {
        let path = folder_of(stage).join(file);
        let whole = std::fs::read(&path).unwrap();
        for _ in 0..flips {
            flip(&path, &mut random);
            let result = match file {
                "network.safetensors" => store.network(root, &data.fingerprint, &Device::Cpu).map(drop),
                "outcome.json" => outcome(root).map(|outcome| assert_eq!(outcome, found, "a silent change")),
                _ => unfinished(&strict).map(drop),
            };
            match result {
                Err(error) => {
                    assert!(story(&error).contains(file), "{}", story(&error));
                    told += 1;
                }
                Ok(()) if file == "outcome.json" => same += 1,
                Ok(()) => panic!("a bit of {file} was flipped, and nobody noticed"),
            }
            std::fs::write(&path, &whole).unwrap();
        }
    }
    println!("{told} of 300 flips were told, {same} changed nothing that is read");
    assert!(told >= 295, "{told} of 300");
    // This has damaged nothing, and the run resumes.
    assert_eq!(executed(&run_well(&store, &end, &data).1), [&end.label()]);
}

/// A stage without hashes, as older versions wrote it, is accepted.
#[test]
fn a_store_of_an_older_version_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data, end) = (Store::new(folder.path()), small(), short_workflow());
    run_well(&store, &end, &data);
    for stage in end.lineage() {
        let path = store.folder(&stage, &data.fingerprint).unwrap().join("outcome.json");
        let mut outcome: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for new in ["files", "parent_network", "seal"] {
            outcome.as_object_mut().unwrap().remove(new);
        }
        std::fs::write(&path, outcome.to_string()).unwrap();
    }
    std::fs::remove_dir_all(store.folder(&end, &data.fingerprint).unwrap()).unwrap();
    let (_, told) = run_well(&store.strict(), &end, &data);
    assert_eq!(executed(&told), [&end.label()]);
}

/// A stage is run again if it was made from another network than its parent has now.
#[test]
fn a_stage_is_made_from_what_is_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data, end) = (Store::new(folder.path()), small(), short_workflow());
    run_well(&store, &end, &data);
    let [root, next, _] = &end.lineage()[..] else { panic!("three stages") };
    replace_network(&store, root);
    let error = store.outcome(next, &data.fingerprint).unwrap_err().to_string();
    assert!(error.contains("was made from a network of SHA-256"), "{error}");
    let (_, told) = run_well(&store, next, &data);
    assert_eq!(executed(&told), [&next.label()]);
}

/// A training does not resume from a checkpoint that started from another network.
#[test]
fn a_checkpoint_goes_on_from_the_network_that_it_began_from() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), small());
    let recipe = recipe(4);
    let (training, root) = (recipe.trainings.get(Purpose::Activations).unwrap(), pretrain(Version::V1, 1, 0));
    let end = root.then(StageKind::FineTune { quantization: recipe.quantization, training, seed: 1 });
    run_well(&store, &root, &data);
    // The stage stops after its first epoch and leaves a checkpoint.
    let limited = store.clone().within(TimeLimit::after(Duration::ZERO));
    assert!(run(&limited, &end, &data, &mut |_, _| ()).0.unwrap_err().is_time_limit());
    let checkpoint = store.folder(&end, &data.fingerprint).unwrap().join("checkpoint.safetensors");
    let began = std::fs::read(&checkpoint).unwrap();

    replace_network(&store, &root);
    let error = story(&run(&store.clone().strict(), &end, &data, &mut |_, _| ()).0.unwrap_err());
    assert!(
        error.contains("checkpoint.safetensors") && error.contains("began from a network of SHA-256"),
        "{error}"
    );
    let (_, told) = run_well(&store, &end, &data);
    assert!(told.contains(&format!("set aside {}", end.label())), "{told:?}");
    let aside = checkpoint.with_file_name("damaged-1").join("checkpoint.safetensors");
    assert!(std::fs::read(aside).unwrap() == began);
    // The result must be the same as without the old checkpoint.
    let ended = |store: &Store| bits(&store.network(&end, &data.fingerprint, &Device::Cpu).unwrap());
    let found = ended(&store);
    std::fs::remove_dir_all(checkpoint.parent().unwrap()).unwrap();
    run_well(&store, &end, &data);
    assert!(ended(&store) == found, "the old checkpoint left something");
}

/// Gives the stage another network, as if it had been run again on a machine that gives other bits.
fn replace_network(store: &Store, stage: &Stage) {
    let data = small();
    let place = store.folder(stage, &data.fingerprint).unwrap();
    let (other_folder, other) = (tempfile::tempdir().unwrap(), pretrain(Version::V1, 1, 1));
    let other_store = Store::new(other_folder.path());
    run_well(&other_store, &other, &data);
    let other_place = other_store.folder(&other, &data.fingerprint).unwrap();
    std::fs::copy(other_place.join("network.safetensors"), place.join("network.safetensors")).unwrap();
    let read = |place: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(place.join("outcome.json")).unwrap()).unwrap()
    };
    let mut outcome = read(&place);
    outcome["files"] = read(&other_place)["files"].clone();
    outcome["seal"] = whole_file::seal::of(&outcome).into();
    std::fs::write(place.join("outcome.json"), outcome.to_string()).unwrap();
}
