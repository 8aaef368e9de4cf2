//! Tables from end to end on a GPU and on the CPU: every kind of stage, and a store that both
//! share. Skipped with a message if no GPU answers.
#![cfg(feature = "cuda")]

mod tiny;

use candle_core::Device;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Returns a folder with the tiny profile, if a GPU answers.
fn folder() -> Option<tempfile::TempDir> {
    if let Err(error) = Device::new_cuda(0) {
        eprintln!("skipped: no GPU answers: {error}");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    tiny::write_profile(folder.path());
    Some(folder)
}

/// Returns what a table's program prints in a folder; it must succeed.
#[track_caller]
fn run(program: &str, folder: &Path, flags: &[&str]) -> String {
    let common = ["--config", "tiny.toml", "--data", "synthetic"];
    let mut command = Command::new(program);
    // The software GPU looks for races in the tests of single kernels. Here this would take three
    // times as long.
    command.env("SOFTWARE_GPU_RACES", "0");
    let output = command.current_dir(folder).args(common).args(flags).output().unwrap();
    assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the stages of a table from its `stages.json`.
fn stages(folder: &Path, out: &str, table: &str) -> Vec<Value> {
    let file = folder.join(out).join(table).join("tiny/stages.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    whole["stages"].as_array().unwrap().clone()
}

/// Returns the loss of a stage's network on the test images.
fn loss(stage: &Value) -> f64 {
    stage["evaluation"]["loss"].as_f64().unwrap()
}

/// DFQ, both fine-tunings of PfQ, PACT and DSQ give the same results on a GPU as on a CPU: networks
/// of the same size, and losses that agree up to the order of sums.
#[test]
fn tables_on_a_gpu_and_on_a_cpu() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let tables = [("table3", env!("CARGO_BIN_EXE_table3")), ("table4", env!("CARGO_BIN_EXE_table4"))];
    for (table, program) in tables {
        let rows = ["--only", "mobilenet_v2,a4w4"];
        let flags = |more: &[&'static str]| [&rows[..], more].concat();
        run(program, folder, &flags(&["--device", "cpu", "--store", "cpu", "--out", "on_cpu"]));
        // Some steps are CUDA graphs, which change no bit.
        let graphs: &[&str] = if table == "table3" { &["--cuda-graphs"] } else { &[] };
        let on_gpu = flags(&["--device", "cuda", "--store", "gpu", "--out", "on_gpu"]);
        run(program, folder, &[&on_gpu, graphs].concat());
        let (expected, found) = (stages(folder, "on_cpu", table), stages(folder, "on_gpu", table));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let label = &expected["label"];
            assert_eq!(found["key"], expected["key"], "{label}");
            let device = found["provenance"]["device"].as_str().unwrap();
            assert!(device.starts_with("cuda:0 ("), "{device}");
            let first = |stage: &Value| stage["metrics"][0]["train_loss"].as_f64();
            let off = (loss(found) - loss(expected)).abs();
            eprintln!(
                "{label}: {off:.1e} off, of {}; {:?}, {:?}",
                loss(expected),
                first(found),
                first(expected)
            );
            // Filters whose variances are within rounding of τ could go either way; there are none.
            assert_eq!(found["weights"], expected["weights"], "{label}");
            assert_eq!(found["macs"], expected["macs"], "{label}");
            assert!(off < 0.02, "{label}: {found:#}\n{expected:#}");
            // The first step of every pre-training starts from the same network.
            if expected["parent"].is_null() {
                assert!((first(found).unwrap() - first(expected).unwrap()).abs() < 1e-4, "{label}");
            }
        }
        // A CPU need not repeat what a GPU has done.
        let plan = run(program, folder, &flags(&["--device", "cpu", "--store", "gpu", "--plan"]));
        let done = plan.lines().find_map(|line| line.split_once(" stages done")).expect("a plan");
        let (done, all) = done.0.split_once(" of ").unwrap();
        assert_eq!(done, all, "{plan}");
    }
    let removed = stages(folder, "on_gpu", "table3");
    let weights = removed.iter().map(|stage| stage["weights"].as_u64().unwrap());
    assert!(weights.clone().min() < weights.max(), "no filter was removed");
}

/// Feature maps in bfloat16, and products that round their operands: close to the CPU's result, but
/// not equal.
#[test]
fn other_arithmetics() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let losses = |device: &str, arithmetic: &str| -> Vec<f64> {
        let rows = ["--only", "mobilenet_v2,a4w4,ours", "--device", device];
        let flags = ["--arithmetic", arithmetic, "--store", arithmetic, "--out", arithmetic];
        run(env!("CARGO_BIN_EXE_table3"), folder, &[&rows[..], &flags].concat());
        let stages = stages(folder, arithmetic, "table3");
        stages.iter().map(loss).collect()
    };
    let expected = losses("cpu", "f32");
    for arithmetic in ["bf16", "tf32"] {
        let found = losses("cuda", arithmetic);
        eprintln!("{arithmetic}: {found:?}, expected {expected:?}");
        assert_ne!(found, expected);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 0.1, "{arithmetic}: {found}, expected {expected}");
        }
    }
}
