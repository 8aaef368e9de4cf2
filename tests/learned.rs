//! Methods that learn their quantizers, from end to end: fine-tuned from a float network as in
//! Table 4, interrupted and resumed.

mod common;

use candle_core::Device;
use common::{bits, data, pretrain, quantization, recipe, run_well, training};
use models::{Fold, Method, Network, Quantization, Role, Version};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use train::{Progress, Trained, Training, TrainingRun, evaluate, fit};
use workflow::{Purpose, Store};

/// Returns the bits of what a method learns in addition to the usual parameters.
fn learned(network: &Network) -> Vec<(String, Vec<u32>)> {
    let own: Vec<String> = network
        .parameters()
        .into_iter()
        .filter(|parameter| matches!(parameter.role, Role::Clip | Role::Interval))
        .map(|parameter| parameter.name)
        .collect();
    bits(network).into_iter().filter(|(name, _)| own.contains(name)).collect()
}

#[test]
fn a_network_is_fine_tuned_once_and_its_loss_falls() {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), data(300, 100, 5));
    let root = pretrain(Version::V2, 1, 0);
    for method in Method::learned() {
        let name = method.title();
        let mut recipe = recipe(4);
        recipe.trainings.set(Purpose::Learned(method), training(5));
        let end = recipe.learned(&root, method).unwrap();
        assert_eq!(end.lineage().len(), 2, "{name}: nothing but fine-tuning after the float network");
        let (outcome, _) = run_well(&store, &end, &data);
        assert!(outcome.label.contains(&format!("fine-tune {name} A4/W4")), "{}", outcome.label);
        let losses: Vec<f64> = outcome.metrics.iter().map(|m| m.train_loss).collect();
        assert!(losses[4] < losses[0] - 0.05, "{name}: losses of the epochs: {losses:?}");
        // The reported evaluation is that of the network in the file, including the learned bounds.
        let network = store.network(&end, &data.fingerprint, &Device::Cpu).unwrap();
        assert!(!learned(&network).is_empty());
        assert_eq!(evaluate(&network, &data).unwrap(), outcome.evaluation, "{name}");
        let float = store.network(&root, &data.fingerprint, &Device::Cpu).unwrap();
        assert_eq!((network.macs(), network.weights()), (float.macs(), float.weights()), "{name}: pruned");
    }
}

#[test]
fn an_interrupted_run_goes_on_with_the_same_bits() {
    let data = data(80, 40, 5);
    let training: Training = training(3);
    for method in Method::learned() {
        let name = method.title();
        let network = || {
            let mut network = common::mobilenet(Version::V2).init(3, &Device::Cpu).unwrap();
            let settings = Quantization { fold: Fold::Unfolded, method, ..quantization(4) };
            network.quantize(&settings).unwrap();
            network
        };
        let go = |folder: &Path, observe: &mut dyn FnMut(Progress)| -> Trained {
            fit(
                network(),
                &TrainingRun {
                    data: &data,
                    training: &training,
                    seed: 2,
                    folder,
                    identity: name,
                    parent_network: None,
                    limit: None,
                    ranks: None,
                    graphs: false,
                },
                observe,
            )
            .unwrap()
        };
        let [whole, parts] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let expected = go(whole.path(), &mut |_| ()).network;

        // The run ends in the middle of the second epoch.
        let interrupted = catch_unwind(AssertUnwindSafe(|| {
            go(parts.path(), &mut |progress| {
                if let Progress::Steps { epoch: 2, .. } = progress {
                    panic!("interrupted");
                }
            })
        }));
        assert!(interrupted.is_err());
        let mut resumed = false;
        let found =
            go(parts.path(), &mut |progress| resumed |= matches!(progress, Progress::Resumed { epoch: 1 }))
                .network;
        assert!(resumed, "{name}: began anew");
        assert!(!learned(&found).is_empty());
        assert_eq!(learned(&found), learned(&expected), "{name}: what is learned");
        assert_eq!(bits(&found), bits(&expected), "{name}");
    }
}
