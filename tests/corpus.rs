//! Runs the fuzz targets on the inputs of their corpora and on damaged copies of them.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;
use std::time::{Duration, Instant};

/// The number of damaged copies of each input, unless `CORPUS_COPIES` is set.
const COPIES: usize = 40;

/// The maximum time for one input, on a busy machine and without optimization.
const LIMIT: Duration = Duration::from_secs(20);

/// Returns a copy with some bytes changed, cut out, repeated, or cut off.
fn damaged(input: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut data = input.to_vec();
    for _ in 0..rng.random_range(1..4) {
        if data.is_empty() {
            break;
        }
        let at = rng.random_range(0..data.len());
        let end = (at + rng.random_range(1..16)).min(data.len());
        match rng.random_range(0..6) {
            0 => data[at] ^= 1 << rng.random_range(0..8),
            1 => data[at] = *[0, 1, b'0', b'9', b'-', 0x7f, 0x80, 0xff].get(rng.random_range(0..8)).unwrap(),
            2 => data[at..end].fill(0xff),
            3 => drop(data.drain(at..end)),
            4 => {
                let part = data[at..end].to_vec();
                data.splice(at..at, part);
            }
            _ => data.truncate(at),
        }
    }
    data
}

fn check(target: &str) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = std::fs::read_dir(&corpus)
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
        .map(|entry| entry.unwrap().path())
        .collect::<Vec<_>>();
    inputs.sort();
    assert!(!inputs.is_empty(), "{target} has no corpus");
    let copies = std::env::var("CORPUS_COPIES").map_or(COPIES, |copies| copies.parse().expect("a number"));
    for path in inputs {
        let whole = std::fs::read(&path).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(whole.len() as u64);
        for copy in 0..=copies {
            let data = if copy == 0 { whole.clone() } else { damaged(&whole, &mut rng) };
            let began = Instant::now();
            // The panic message would not say which copy it was.
            if let Err(panic) = std::panic::catch_unwind(|| fuzz::run(target, &data)) {
                let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-panic"));
                std::fs::write(&kept, &data).unwrap();
                eprintln!("{target}: copy {copy} of {} panics; it is in {}", path.display(), kept.display());
                std::panic::resume_unwind(panic);
            }
            assert!(began.elapsed() < LIMIT, "copy {copy} of {} took {:?}", path.display(), began.elapsed());
        }
    }
}

#[test]
fn inputs_of_the_corpora_are_read_or_refused() {
    fuzz::TARGETS.iter().for_each(|(target, _)| check(target));
}
