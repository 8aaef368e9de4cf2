//! DFQ at 8 bits, without fine-tuning, loses at most one percentage point of the float network's
//! accuracy.

mod common;

use baselines::{Calibration, Cap, Dfq, Normalization};
use common::{data, quantization, run_well, training};
use models::{Input, MobileNet, Quantization, Version};
use quant_core::Precision;
use train::Training;
use workflow::{Stage, StageKind, Store};

#[test]
fn eight_bits_cost_at_most_a_point() {
    let (folder, data) = (tempfile::tempdir().unwrap(), data(2000, 600, 5));
    let store = Store::new(folder.path());
    let eight = Precision::try_from(8).unwrap();
    let calibration = Some(Calibration { batches: 20, batch: 64, momentum: 0.1 });
    // The accuracy must be far above the 1 % of guessing, at which nothing could be lost.
    let training = Training { warmup_epochs: 1.0, batch: 16, weight_decay: 1e-4, ..training(4) };
    let network = MobileNet { width: 0.125, ..MobileNet::new(Version::V1, Input::Cifar, 100) };
    let float = Stage::root(StageKind::Pretrain { network, training, seed: 0 });
    let trained = run_well(&store, &float, &data).0.evaluation.top1_percent;
    assert!(trained > 5.0, "{trained} % in float, of a hundred classes");
    let cap = Cap::PerChannel;
    for dfq in [
        Dfq { cap, ..Dfq::default() },
        Dfq { cap, calibration, ..Dfq::default() },
        Dfq { cap, normalization: Normalization::Live, ..Dfq::default() },
    ] {
        let quantization =
            Quantization { fold: dfq.fold(), activations: eight, weights: eight, ..quantization(8) };
        let prepared = float.then(StageKind::Equalize { dfq, quantization });
        let found = run_well(&store, &prepared, &data).0.evaluation.top1_percent;
        println!("{found} %, {trained} % in float, by {dfq:?}");
        assert!(found > trained - 1.0, "{found} % by {dfq:?}, {trained} % in float");
        // Every quantizer's range is in the file next to the outcome. Only calibration changes the
        // ranges of outputs.
        let file = store.folder(&prepared, &data.fingerprint).unwrap().join("ranges.csv");
        let ranges = std::fs::read_to_string(file).unwrap();
        let of = |what: &str, at: &str| -> Vec<String> {
            let lines = ranges.lines().filter(|line| line.contains(what) && line.contains(at));
            lines.map(|line| line.replace(at, "")).collect()
        };
        let [start, end] = [",start,8,", ",end,8,"].map(|at| of(",output", at));
        assert!(start.len() > 20 && start.len() == end.len(), "{ranges}");
        assert_eq!(start == end, dfq.calibration.is_none());
        assert_eq!(of(",weights", ",start,8,"), of(",weights", ",end,8,"));
        assert_eq!(
            of(",weights", ",end,8,").len(),
            network.init(0, &candle_core::Device::Cpu).unwrap().units().count()
        );
    }
}
