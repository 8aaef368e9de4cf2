//! Algorithm 1 from end to end: the resulting network is smaller, exactly quantized, and stored in
//! its file.

mod common;

use candle_core::{Device, Tensor};
use common::{bits_of, data, images, mobilenet, pretrain, quantization, recipe, run_well, training, values};
use datasets::DataSource;
use models::{Extras, HEAD, Network, Node, Version};
use pfq::PfQ;
use quant_core::{Bits, Grid};
use std::collections::BTreeSet;
use std::sync::Arc;
use train::{TrainingRun, evaluate, fit};
use workflow::{Outcome, Recipe, Store};

fn distinct(values: impl IntoIterator<Item = f32>) -> usize {
    // −0 and 0 are the same value.
    values.into_iter().map(|x| (x + 0.0).to_bits()).collect::<BTreeSet<_>>().len()
}

fn grid(range: &Tensor, bits: Bits) -> Grid {
    let range = values(range);
    Grid::new(range[0], range[1], bits).unwrap()
}

/// Checks for a batch that every output between image and pooling lies on its quantizer's grid,
/// except for the logits and outputs that only go into sums. Returns the largest number of levels
/// that an output takes.
fn check_activations(network: &Network, images: &Tensor) -> usize {
    let readers = network.readers();
    let mut most = 0;
    network
        .forward_observed(images, &mut |i, _, y| {
            let node = &network.nodes[i];
            let (name, is_sum) =
                (node.name(), |&reader: &usize| matches!(network.nodes[reader], Node::Sum(_)));
            if matches!(node, Node::Image(_) | Node::Pool(_)) || readers[i].iter().all(is_sum) {
                return Ok(());
            }
            let quantizer = node.quantizer().unwrap_or_else(|| panic!("{name} is not quantized"));
            let (range, bits) = (quantizer.range().expect("the range has been set"), quantizer.bits);
            let (grid, y) = (grid(range, bits), values(y));
            let levels = distinct(y.iter().copied());
            assert!(levels <= 1 << bits.get(), "{name} takes {levels} values at {} bits", bits.get());
            let off = y.iter().find(|y| **y != grid.fake(**y));
            assert!(off.is_none(), "{name} gives {off:?}, which is not on {grid:?}");
            most = most.max(levels);
            Ok(())
        })
        .unwrap();
    most
}

/// Quantizes a tensor on the grid that its own extremes span.
fn on_grid(weight: &Tensor, bits: Bits, name: &str) -> Tensor {
    let all = values(weight);
    let (lo, hi) = all.iter().fold((f32::MAX, f32::MIN), |(lo, hi), x| (lo.min(*x), hi.max(*x)));
    let grid = Grid::new(lo, hi, bits).unwrap();
    let quantized: Vec<f32> = all.iter().map(|x| grid.fake(*x)).collect();
    let levels = distinct(quantized.iter().copied());
    assert!(
        levels <= 1 << bits.get() && (levels > 1 || all.len() == 1),
        "{name} takes {levels} values at {} bits",
        bits.get()
    );
    Tensor::from_vec(quantized, weight.shape(), &Device::Cpu).unwrap()
}

/// Checks that the network computes with at most `2^b` values of each folded weight tensor.
///
/// It quantizes the weights by [`Grid`], one number at a time, and compares the bits of the outputs
/// with those of a network that has these weights and no weight quantizers.
fn check_weights(network: &Network, images: &Tensor) {
    let mut stated = network.duplicate().unwrap();
    let epsilon = stated.epsilon;
    for unit in stated.units_mut() {
        let quantizer = unit.weight_quantizer.take().expect("every weight is quantized");
        let Some(norm) = unit.batch_norm() else {
            assert_eq!(unit.name, HEAD, "normalization is live");
            unit.weight = on_grid(&unit.weight, quantizer.bits, HEAD);
            continue;
        };
        assert!(quantizer.folded(), "{}", unit.name);
        // γ/√(V+ε)
        let scale = (&norm.gamma / (&norm.variance + epsilon).unwrap().sqrt().unwrap()).unwrap();
        let folded = on_grid(&unit.weight.broadcast_mul(&scale).unwrap(), quantizer.bits, &unit.name);
        unit.weight = folded.broadcast_div(&scale).unwrap();
    }
    let [stated, found] = [&stated, network].map(|network| network.forward(images).unwrap());
    assert_eq!(bits_of(&stated), bits_of(&found), "the weights in use are not the quantized ones");
}

/// Checks that the network has the same logits after it has been written to a file and read.
fn check_file(network: &Network, images: &Tensor) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.safetensors");
    network.save(&path, &Extras::default()).unwrap();
    let (read, _) = Network::load(&path, &Device::Cpu).unwrap();
    assert_eq!((read.macs(), read.weights()), (network.macs(), network.weights()));
    let [logits, again] = [network, &read].map(|network| network.forward(images).unwrap());
    assert_eq!(bits_of(&logits), bits_of(&again), "logits after reading the file");
}

/// Runs Algorithm 1 at 4 bits. A few epochs on synthetic images must bring some variances below
/// `threshold`.
fn check(version: Version, threshold: f64) {
    let folder = tempfile::tempdir().unwrap();
    let (store, data) = (Store::new(folder.path()), data(200, 100, 5));
    let pfq = PfQ { threshold: Some(threshold), ..PfQ::default() };
    let end = Recipe { pfq, ..recipe(4) }.algorithm1(&pretrain(version, 3, 0)).unwrap();
    let (last, told) = run_well(&store, &end, &data);
    assert_eq!(told.len(), 10, "five stages, each begun and finished: {told:?}");

    let stages: Vec<(Outcome, Network)> = end
        .lineage()
        .iter()
        .map(|stage| {
            let outcome = store.outcome(stage, &data.fingerprint).unwrap().expect("has run");
            (outcome, store.network(stage, &data.fingerprint, &Device::Cpu).unwrap())
        })
        .collect();
    let [_, (pruned, _), (_, activations), _, (end, network)] = &stages[..] else { panic!("five stages") };
    assert_eq!(end.key, last.key);
    for window in stages.windows(2) {
        let ((before, _), (after, network)) = (&window[0], &window[1]);
        assert_eq!(after.parent.as_ref(), Some(&before.key));
        assert_eq!((after.macs, after.weights), (network.macs(), network.weights()), "{}", after.label);
        let prunes = after.stage.get("prune").is_some();
        assert_eq!(after.report.is_some(), prunes, "{}", after.label);
        assert!(after.macs <= before.macs && (prunes || after.macs == before.macs), "{}", after.label);
        // The reported evaluation is that of the network in the file.
        assert_eq!(evaluate(network, &data).unwrap(), after.evaluation, "{}", after.label);
    }
    assert!(pruned.macs < stages[0].0.macs && pruned.weights < stages[0].0.weights, "nothing was pruned");
    // Every layer must keep one channel; some layer must have kept more.
    assert!(network.units().any(|unit| unit.filters() > 1), "everything was pruned");

    // Step 3 quantizes only the activations, step 5 also the weights.
    let images = images(&data, 100);
    assert!(activations.units().all(|unit| unit.weight_quantizer.is_none()));
    check_activations(activations, &images);
    assert_eq!(check_activations(network, &images), 16, "no unit takes all of its levels");
    check_weights(network, &images);
    check_file(network, &images);
}

#[test]
fn v1() {
    check(Version::V1, 0.1);
}

#[test]
fn v2() {
    check(Version::V2, 0.05);
}

/// No test image of the real CIFAR-100 takes a unit off its grid. This runs if the environment
/// variable `PFQ_DATA` names the folder of the data.
#[test]
fn every_real_image_stays_on_the_grid() {
    let Some(folder) = std::env::var_os("PFQ_DATA").filter(|folder| !folder.is_empty()) else {
        eprintln!("skipped: PFQ_DATA is not set");
        return;
    };
    let data = match datasets::load(&DataSource::Folder(folder.into()), &mut |_| ()) {
        Err(error @ datasets::Error::NoData { .. }) => {
            eprintln!("skipped: {error}");
            return;
        }
        data => Arc::new(data.unwrap().limit(Some(500), None).unwrap()),
    };
    let mut network = mobilenet(Version::V1).init(0, &Device::Cpu).unwrap();
    network.quantize(&quantization(4)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let run = TrainingRun {
        data: &data,
        training: &training(1),
        seed: 0,
        folder: folder.path(),
        identity: "real images",
        parent_network: None,
        limit: None,
        ranks: None,
        graphs: false,
    };
    let network = fit(network, &run, &mut |_| ()).unwrap().network;
    let mut seen = 0;
    for batch in datasets::test_batches(&data, 500) {
        let images = batch.unwrap().images;
        check_activations(&network, &images);
        seen += images.dims()[0];
    }
    assert_eq!(seen, 10_000);
    check_weights(&network, &images(&data, 100));
}
