//! Each stage keeps its bits, because results that were made with earlier commits stand beside new
//! ones.

mod tiny;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use tiny::{Place, said};
use whole_file::seal::sha256;

/// Rows that have every kind of stage, with every method.
const RUNS: [(&str, &str); 3] = [
    (env!("CARGO_BIN_EXE_all"), "mobilenet_v2,a4w4,a4w32"),
    (env!("CARGO_BIN_EXE_table3"), "mobilenet_v1,a3w3"),
    (env!("CARGO_BIN_EXE_ablation"), "ablation_dfq,mobilenet_v2,a4w4"),
];

/// Returns the SHA-256 of all values of each network in a store, by the name of its stage.
fn networks(store: &Path) -> BTreeMap<String, String> {
    let network = |folder: &Path| {
        let file = std::fs::read(folder.join("network.safetensors")).unwrap();
        // The values follow the header, whose length comes first.
        let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        sha256(&file[8 + header..])
    };
    let stages = std::fs::read_dir(store).unwrap().map(|stage| stage.unwrap());
    stages.map(|stage| (stage.file_name().into_string().unwrap(), network(&stage.path()))).collect()
}

/// The expected hashes hold with the functions of the GNU C library, on every processor that we
/// have met.
#[test]
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")), ignore)]
fn stages_of_a_version_keep_their_bits() {
    let place = Place::new();
    for (program, rows) in RUNS {
        let mut command = Command::new(program);
        command.current_dir(place.root()).args(["--config", "tiny.toml", "--data", "synthetic"]);
        let output = command.args(["--device", "cpu", "--only", rows]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    let found = networks(&place.path("runs"));
    let expected = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bits.csv");
    if std::env::var_os("PFQ_WRITE_BITS").is_some() {
        let lines: String = found.iter().map(|(stage, hash)| format!("{stage},{hash}\n")).collect();
        std::fs::write(&expected, lines).unwrap();
    }
    let expected = std::fs::read_to_string(expected).unwrap();
    let expected: BTreeMap<_, _> = expected.lines().filter_map(|line| line.split_once(',')).collect();
    for (stage, hash) in &found {
        let Some(expected) = expected.get(stage.as_str()) else {
            panic!(
                "tests/bits.csv lacks {stage}: if its version or settings were meant to change, run this test \
                 with PFQ_WRITE_BITS=1"
            );
        };
        assert!(
            hash == expected,
            "{stage} has other bits than the results that were made with it: restore them, or raise its \
             version in crates/workflow/src/key.rs and run its rows in results/ again"
        );
    }
    assert_eq!(found.len(), expected.len());
}
