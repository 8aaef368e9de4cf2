//! Shared code of the tests: tiny data, tiny networks, settings, and a record of the store's
//! events.

#![allow(dead_code, reason = "not every test uses all of it")]

use candle_core::{Device, Tensor};
use datasets::{Augmentation, Dataset, InMemoryDataset};
use models::{Fold, Input, MobileNet, Network, Quantization, Version};
use pfq::PfQ;
use quant_core::Precision;
use std::collections::BTreeMap;
use std::sync::Arc;
use train::{Arithmetic, Decay, Training};
use workflow::{
    Event, Outcome, Provenance, Purpose, Recipe, Resources, Result, Stage, StageKind, Store, Trainings,
};

/// Returns synthetic images, which depend on `seed`.
pub fn data(train: usize, test: usize, seed: u64) -> Arc<InMemoryDataset> {
    Arc::new(datasets::synthetic(train, test, seed).unwrap())
}

/// Returns a network with eight channels in nearly every layer: half a million multiply–accumulates
/// (V1) or two million (V2).
pub fn mobilenet(version: Version) -> MobileNet {
    MobileNet { width: 0.01, ..MobileNet::new(version, Input::Cifar, 100) }
}

pub fn training(epochs: usize) -> Training {
    Training {
        warmup_epochs: 0.0,
        cosine_epochs: epochs as f64,
        learning_rate: 0.05,
        batch: 20,
        momentum: 0.9,
        weight_decay: 1e-3,
        decay_norm: true,
        label_smoothing: 0.0,
        range_momentum: 0.1,
        augmentation: Augmentation { pad: 2, flip: true },
        decay: Decay::Cosine,
        arithmetic: Arithmetic::F32,
        sync_norm: false,
    }
}

pub fn quantization(bits: u32) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    Quantization {
        activations: precision(bits),
        weights: precision(bits),
        first_layer: precision(8),
        last_layer: precision(8),
        fold: Fold::BatchStatistics,
        ..Quantization::default()
    }
}

pub fn recipe(bits: u32) -> Recipe {
    use Purpose::{Dfq, Once, Weights};
    let others = [Weights, Once, Dfq].map(|purpose| (purpose, training(1)));
    Recipe {
        quantization: quantization(bits),
        pfq: PfQ::default(),
        dfq: baselines::Dfq::default(),
        trainings: Trainings([(Purpose::Activations, training(2))].into_iter().chain(others).collect()),
        seed: 1,
    }
}

pub fn pretrain(version: Version, epochs: usize, seed: u64) -> Arc<Stage> {
    Stage::root(StageKind::Pretrain { network: mobilenet(version), training: training(epochs), seed })
}

/// Runs a stage and returns its outcome and the store's events as texts.
///
/// The texts are `found LABEL`, `started LABEL`, `finished LABEL`, `waiting LABEL`,
/// `set aside LABEL`, `no locks` and `resumed N`. `watch` gets each text and event, also those of
/// events without a text.
pub fn run(
    store: &Store,
    stage: &Stage,
    data: &dyn Dataset,
    watch: &mut dyn FnMut(&str, &Event),
) -> (Result<Outcome>, Vec<String>) {
    let provenance =
        Provenance { command: "test".into(), git_commit: "none".into(), device: "processor".into() };
    let resources = Resources {
        data,
        device: &Device::Cpu,
        provenance: &provenance,
        given: None,
        ranks: None,
        graphs: false,
    };
    let mut told = Vec::new();
    let outcome = store.run(stage, &resources, &mut |event| {
        let text = match &event {
            Event::Found(outcome) => format!("found {}", outcome.label),
            Event::Started(stage) => format!("started {}", stage.label()),
            Event::Finished(outcome) => format!("finished {}", outcome.label),
            Event::Waiting(stage) => format!("waiting {}", stage.label()),
            Event::NoLocks(_) => "no locks".into(),
            Event::SetAside(stage, ..) => format!("set aside {}", stage.label()),
            Event::Progress(_, train::Progress::Resumed { epoch }) => format!("resumed {epoch}"),
            Event::Progress(..) => String::new(),
        };
        watch(&text, &event);
        if !text.is_empty() {
            told.push(text);
        }
    });
    (outcome, told)
}

/// [`run`] for a stage that must succeed.
#[track_caller]
pub fn run_well(store: &Store, stage: &Stage, data: &dyn Dataset) -> (Outcome, Vec<String>) {
    let (outcome, told) = run(store, stage, data, &mut |_, _| ());
    (outcome.unwrap(), told)
}

/// Returns the labels of the stages that were run, given the store's events.
pub fn executed(told: &[String]) -> Vec<&str> {
    told.iter().filter_map(|text| text.strip_prefix("started ")).collect()
}

/// Returns the bits of every tensor.
pub fn bits(network: &Network) -> BTreeMap<String, Vec<u32>> {
    network.tensors().into_iter().map(|(name, tensor)| (name, bits_of(tensor))).collect()
}

pub fn bits_of(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Returns the first `count` test images as a batch.
pub fn images(data: &Arc<InMemoryDataset>, count: usize) -> Tensor {
    datasets::test_batches(data, count).next().unwrap().unwrap().images
}
