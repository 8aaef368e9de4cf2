//! The inputs of a stage's key, written out.
//!
//! A key names a result permanently, and a store keeps hours of work under it. So everything that
//! enters a key is written here, and nothing is derived from how the settings' types are defined.
//! The settings are destructured without `..`, so that a new setting does not compile before it is
//! added here. A new setting is left out of the key if it has the value that was implied before, so
//! that the keys of stored stages do not change.

use crate::{Error, Outcome, Result, Stage, StageKind};
use baselines::{Calibration, Cap, Dfq};
use datasets::Augmentation;
use kernels::Activation;
use models::{Fold, Input, Method, MobileNet, Quantization, WeightGrid};
use pfq::{Corrected, Criterion, PfQ};
use serde_json::{Value, json};
use train::{Arithmetic, Decay, Training};
use whole_file::seal;

/// The highest [`version`].
const RESULT_VERSION: u32 = 3;

/// Returns the version of the results of a kind of stage.
///
/// It must be raised if a change makes stages of this kind give other results from the same inputs,
/// so that results stored by older versions are not taken for new ones. `experiments/tests/bits.rs`
/// finds such a change. The keys of later stages change with it; those of earlier stages do not.
fn version(kind: &StageKind) -> u32 {
    match kind {
        StageKind::Given { .. } => RESULT_VERSION,
        StageKind::Pretrain { .. } => RESULT_VERSION,
        StageKind::Prune { .. } => RESULT_VERSION,
        StageKind::FineTune { .. } => RESULT_VERSION,
        StageKind::Equalize { .. } => RESULT_VERSION,
    }
}

impl Stage {
    /// Returns the key under which the stage's result is stored.
    ///
    /// It is the first 16 hexadecimal digits of a SHA-256 over the stage's settings, seed and
    /// version, its parent's key and the data's fingerprint.
    ///
    /// # Errors
    /// If a setting is NaN or infinite, which JSON cannot distinguish from a setting that is not
    /// given.
    pub fn key(&self, data_fingerprint: &str) -> Result<String> {
        self.key_by(version, data_fingerprint)
    }

    fn key_by(&self, version: fn(&StageKind) -> u32, data_fingerprint: &str) -> Result<String> {
        let parent = self.parent.as_ref().map(|parent| parent.key_by(version, data_fingerprint));
        let parent = parent.transpose()?;
        Ok(key(version(&self.kind), &settings(&self.kind)?, parent.as_deref(), data_fingerprint))
    }
}

fn key(version: u32, settings: &Value, parent: Option<&str>, data: &str) -> String {
    let inputs = json!({ "version": version, "stage": settings, "parent": parent, "data": data });
    // Objects are written with sorted names, and numbers as serde_json writes them.
    let mut hash = seal::sha256(inputs.to_string());
    hash.truncate(16);
    hash
}

/// Returns whether an outcome's key is that of its settings, its parent's key and its data, in any
/// version so far.
pub(crate) fn fits(outcome: &Outcome) -> bool {
    let Outcome { key: found, stage, parent, data, .. } = outcome;
    (1..=RESULT_VERSION).any(|version| key(version, stage, parent.as_deref(), &data.fingerprint) == *found)
}

/// Returns a stage's kind and all of its settings, as they enter its key and are stored in its
/// outcome.
pub(crate) fn settings(kind: &StageKind) -> Result<Value> {
    Ok(match kind {
        StageKind::Given { hash } => json!({ "given": { "network": format!("{hash:032x}") } }),
        StageKind::Pretrain { network, training, seed } => json!({
            "pretrain": { "network": network_settings(network)?, "training": training_settings(training)?, "seed": seed },
        }),
        StageKind::Prune { pfq } => json!({ "prune": { "pfq": pfq_settings(pfq)? } }),
        StageKind::FineTune { quantization, training, seed } => json!({
            "fine_tune": {
                "quantization": quantization_settings(quantization),
                "training": training_settings(training)?,
                "seed": seed,
            },
        }),
        StageKind::Equalize { dfq, quantization } => json!({
            "equalize": { "dfq": dfq_settings(dfq)?, "quantization": quantization_settings(quantization) },
        }),
    })
}

fn network_settings(network: &MobileNet) -> Result<Value> {
    let MobileNet { version, input, classes, width, first_expansion, activation } = network;
    Ok(json!({
        "version": version.name(),
        "input": match input {
            Input::Cifar => "cifar".into(),
            Input::Imagenet => "imagenet".into(),
            Input::Other(strides) => format!("strides {strides}"),
        },
        "classes": classes,
        "width": finite("width", *width)?,
        "first_expansion": first_expansion,
        "activation": match activation {
            Activation::Identity => "identity",
            Activation::Relu => "relu",
            Activation::Relu6 => "relu6",
        },
    }))
}

fn training_settings(training: &Training) -> Result<Value> {
    let Training {
        warmup_epochs,
        cosine_epochs,
        learning_rate,
        batch,
        momentum,
        weight_decay,
        decay_norm,
        label_smoothing,
        range_momentum,
        augmentation: Augmentation { pad, flip },
        decay,
        arithmetic,
        sync_norm,
    } = training;
    let mut settings = json!({
        "warmup_epochs": finite("warmup_epochs", *warmup_epochs)?,
        "cosine_epochs": finite("cosine_epochs", *cosine_epochs)?,
        "learning_rate": finite("learning_rate", *learning_rate)?,
        "batch": batch,
        "momentum": finite("momentum", *momentum)?,
        "weight_decay": finite("weight_decay", *weight_decay)?,
        "decay_norm": decay_norm,
        "label_smoothing": finite("label_smoothing", *label_smoothing)?,
        "range_momentum": finite("range_momentum", *range_momentum)?,
        "augmentation": { "pad": pad, "flip": flip },
    });
    match decay {
        Decay::Cosine => {}
        Decay::AccuracyDrop => settings["decay"] = "accuracy_drop".into(),
    }
    match arithmetic {
        Arithmetic::F32 => {}
        Arithmetic::Bf16 => settings["arithmetic"] = "bf16".into(),
    }
    if *sync_norm {
        settings["sync_norm"] = true.into();
    }
    Ok(settings)
}

fn quantization_settings(quantization: &Quantization) -> Value {
    let Quantization {
        activations,
        linear,
        weights,
        first_layer,
        last_layer,
        fold,
        method,
        weight_grid,
        gradient_scale,
    } = *quantization;
    let mut settings = json!({
        "activations": u32::from(activations),
        "weights": u32::from(weights),
        "first_layer": u32::from(first_layer),
        "last_layer": u32::from(last_layer),
        "fold": match fold {
            Fold::Unfolded => "unfolded",
            Fold::BatchStatistics => "batch_statistics",
            Fold::FloatStatistics => "float_statistics",
            Fold::Frozen => "frozen",
        },
    });
    if let Some(linear) = linear {
        settings["linear"] = u32::from(linear).into();
    }
    if method != Method::Uniform {
        settings["method"] = method.name().into();
    }
    match weight_grid {
        WeightGrid::Tensor => {}
        WeightGrid::Channel => settings["weight_grid"] = "channel".into(),
    }
    // Other methods ignore it.
    if gradient_scale && method == Method::Dsq {
        settings["gradient_scale"] = true.into();
    }
    settings
}

fn pfq_settings(pfq: &PfQ) -> Result<Value> {
    let PfQ { threshold, bias_correction, corrected, criterion } = pfq;
    let mut settings = json!({
        "threshold": threshold.map(|threshold| finite("threshold", threshold)).transpose()?,
        "bias_correction": bias_correction,
    });
    match corrected {
        Corrected::Mean => {}
        Corrected::Beta => settings["corrected"] = "beta".into(),
    }
    match criterion {
        Criterion::Variance => {}
        Criterion::SmallestGamma => settings["criterion"] = "smallest_gamma".into(),
        Criterion::Random { seed } => settings["criterion"] = json!({ "random": { "seed": seed } }),
    }
    Ok(settings)
}

fn dfq_settings(dfq: &Dfq) -> Result<Value> {
    let Dfq {
        equalize,
        absorb,
        correct_bias,
        range_sigmas,
        absorb_sigmas,
        tolerance,
        max_sweeps,
        cap,
        // It is determined by the quantization's `fold`.
        normalization: _,
        calibration,
    } = dfq;
    let mut settings = json!({
        "equalize": equalize,
        "absorb": absorb,
        "correct_bias": correct_bias,
        "range_sigmas": finite("range_sigmas", *range_sigmas)?,
        "absorb_sigmas": finite("absorb_sigmas", *absorb_sigmas)?,
        "tolerance": finite("tolerance", *tolerance)?,
        "max_sweeps": max_sweeps,
    });
    match cap {
        Cap::None => {}
        Cap::PerChannel => settings["cap"] = "per_channel".into(),
    }
    if let Some(Calibration { batches, batch, momentum }) = calibration {
        let momentum = finite("calibration.momentum", *momentum)?;
        settings["calibration"] = json!({ "batches": batches, "batch": batch, "momentum": momentum });
    }
    Ok(settings)
}

/// Returns `value` if it is finite and can enter a key.
fn finite(setting: &'static str, value: f64) -> Result<f64> {
    if value.is_finite() { Ok(value) } else { Err(Error::NotFinite { setting, value }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant_core::Precision;
    use std::sync::Arc;

    fn pretrain(network: MobileNet, training: Training, seed: u64) -> StageKind {
        StageKind::Pretrain { network, training, seed }
    }

    fn prune(threshold: Option<f64>, bias_correction: bool) -> StageKind {
        StageKind::Prune { pfq: PfQ { threshold, bias_correction, ..PfQ::default() } }
    }

    fn tune(quantization: Quantization, training: Training, seed: u64) -> StageKind {
        StageKind::FineTune { quantization, training, seed }
    }

    fn equalize(dfq: Dfq, quantization: Quantization) -> StageKind {
        StageKind::Equalize { dfq, quantization }
    }

    fn network() -> MobileNet {
        MobileNet { width: 0.25, ..MobileNet::new(models::Version::V1, Input::Cifar, 100) }
    }

    fn training() -> Training {
        Training {
            warmup_epochs: 1.0,
            cosine_epochs: 15.0,
            learning_rate: 0.1,
            batch: 64,
            momentum: 0.9,
            weight_decay: 5e-4,
            decay_norm: true,
            label_smoothing: 0.0,
            range_momentum: 0.01,
            augmentation: Augmentation { pad: 4, flip: true },
            decay: Decay::Cosine,
            arithmetic: Arithmetic::F32,
            sync_norm: false,
        }
    }

    fn precision(bits: u32) -> Precision {
        Precision::try_from(bits).unwrap()
    }

    fn quantization(weights: u32) -> Quantization {
        let (four, eight) = (precision(4), precision(8));
        Quantization {
            activations: four,
            weights: precision(weights),
            first_layer: eight,
            last_layer: eight,
            ..Quantization::default()
        }
    }

    #[track_caller]
    fn check(stage: &Stage, data: &str, expected: &str) {
        assert_eq!(stage.key(data).unwrap(), expected, "{stage:?}");
    }

    /// Checks the keys of all kinds of stages, with each setting changed alone. The expected keys
    /// come from an independent program that only has JSON and SHA-256.
    #[test]
    fn every_setting_is_in_the_key() {
        use models::Version;
        let (network, training, quantization, three) = (network(), training(), quantization(4), precision(3));
        let dfq = Dfq::default();
        let chosen = |criterion| StageKind::Prune { pfq: PfQ { criterion, ..PfQ::default() } };
        let calibration = Calibration { batches: 100, batch: 64, momentum: 0.01 };
        let keys = [
            (pretrain(network, training, 0), "6bde133e0811c12a"),
            (pretrain(MobileNet { version: Version::V2, ..network }, training, 0), "3ef7754008a8fd81"),
            (pretrain(MobileNet { input: Input::Imagenet, ..network }, training, 0), "4cd0bb7ddc589324"),
            (pretrain(MobileNet { classes: 10, ..network }, training, 0), "cbe9b3d523374535"),
            (pretrain(MobileNet { width: 1.0, ..network }, training, 0), "2633ba8bc4f9cf9a"),
            (pretrain(MobileNet { first_expansion: false, ..network }, training, 0), "e51ffa20f87130d1"),
            (
                pretrain(MobileNet { activation: Activation::Relu, ..network }, training, 0),
                "3824af7964df3c5b",
            ),
            (pretrain(network, training, 1), "bc61b19353eb7a15"),
            (pretrain(network, Training { warmup_epochs: 0.0, ..training }, 0), "2a0ce4315561a842"),
            (pretrain(network, Training { cosine_epochs: 7.0, ..training }, 0), "28e16a2136bb60b9"),
            (pretrain(network, Training { learning_rate: 1e-5, ..training }, 0), "d5e0b7baf80d0848"),
            (pretrain(network, Training { batch: 32, ..training }, 0), "ad085c7e84734d97"),
            (pretrain(network, Training { momentum: 0.0, ..training }, 0), "db55b05ee7af62e3"),
            (pretrain(network, Training { weight_decay: 0.0, ..training }, 0), "4a16ca62246764f0"),
            (pretrain(network, Training { decay_norm: false, ..training }, 0), "ec4cc8d479f8291e"),
            (pretrain(network, Training { label_smoothing: 0.1, ..training }, 0), "82dff30b5e67eed9"),
            (pretrain(network, Training { range_momentum: 0.1, ..training }, 0), "c3b3096ffcae9365"),
            (
                pretrain(
                    network,
                    Training { augmentation: Augmentation { pad: 0, flip: true }, ..training },
                    0,
                ),
                "27132041fb0aca0c",
            ),
            (
                pretrain(
                    network,
                    Training { augmentation: Augmentation { pad: 4, flip: false }, ..training },
                    0,
                ),
                "25adc9815d529178",
            ),
            (pretrain(network, Training { decay: Decay::AccuracyDrop, ..training }, 0), "aeac80adf73a079a"),
            (pretrain(network, Training { arithmetic: Arithmetic::Bf16, ..training }, 0), "d9acabf1f96325f5"),
            (pretrain(network, Training { sync_norm: true, ..training }, 0), "e00d6c4ec3ea1938"),
            (tune(quantization, training, 0), "ff279a61187eec70"),
            (tune(quantization, Training { learning_rate: 1e-5, ..training }, 0), "6a8a4276110668ac"),
            (tune(quantization, training, 1), "c44c97671ed11dba"),
            (tune(Quantization { activations: three, ..quantization }, training, 0), "d3d0da65eeeef42b"),
            (
                tune(Quantization { activations: Precision::Float, ..quantization }, training, 0),
                "35dff0834bf04796",
            ),
            (tune(Quantization { linear: Some(three), ..quantization }, training, 0), "60edc866d3d72958"),
            (tune(Quantization { weights: three, ..quantization }, training, 0), "d9229a27c1526c67"),
            (tune(Quantization { first_layer: three, ..quantization }, training, 0), "c3f63e398389bf83"),
            (tune(Quantization { last_layer: three, ..quantization }, training, 0), "8288a3ad17c73c79"),
            (tune(Quantization { fold: Fold::Frozen, ..quantization }, training, 0), "89dda74bea1aeb9e"),
            (
                tune(Quantization { fold: Fold::BatchStatistics, ..quantization }, training, 0),
                "73adf2617a75a94d",
            ),
            (tune(Quantization { method: Method::Pact, ..quantization }, training, 0), "df0b1660001a168d"),
            (tune(Quantization { method: Method::Dsq, ..quantization }, training, 0), "142b6e84e8c5e81a"),
            (
                tune(Quantization { method: Method::Dsq, gradient_scale: true, ..quantization }, training, 0),
                "fae885b892b466af",
            ),
            (tune(Quantization { gradient_scale: true, ..quantization }, training, 0), "ff279a61187eec70"),
            (
                tune(Quantization { weight_grid: WeightGrid::Channel, ..quantization }, training, 0),
                "c083a52cd20e03d5",
            ),
            (prune(None, true), "92f2478f57882147"),
            (prune(None, false), "8744005203065d98"),
            (prune(Some(1e-5), true), "bb6fa6202767ac5b"),
            (prune(Some(1e-5), false), "1b988b3394e3007e"),
            (prune(Some(0.01), true), "a346b57ab71799b2"),
            (prune(Some(0.01), false), "cf659e615224c90a"),
            (StageKind::Given { hash: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef }, "25fb37fcf136b8cd"),
            (chosen(Criterion::SmallestGamma), "493816752d7d44b9"),
            (chosen(Criterion::Random { seed: 1 }), "257433d426d01292"),
            (
                StageKind::Prune { pfq: PfQ { corrected: Corrected::Beta, ..PfQ::default() } },
                "2316e9ae79d3aeb5",
            ),
            (equalize(dfq, quantization), "318efb97f695a427"),
            (equalize(Dfq { equalize: false, ..dfq }, quantization), "7b1792c95995d273"),
            (equalize(Dfq { absorb: false, ..dfq }, quantization), "b9224843d3d1831a"),
            (equalize(Dfq { correct_bias: false, ..dfq }, quantization), "9cc6f01aaa1e7c75"),
            (equalize(Dfq { range_sigmas: 4.5, ..dfq }, quantization), "eedd947bdf70a406"),
            (equalize(Dfq { absorb_sigmas: 2.0, ..dfq }, quantization), "b7ddbbef2fa71e39"),
            (equalize(Dfq { tolerance: 1e-6, ..dfq }, quantization), "d396aadbe53d91b9"),
            (equalize(Dfq { max_sweeps: 1, ..dfq }, quantization), "053af0c33afd2452"),
            (equalize(Dfq { cap: Cap::PerChannel, ..dfq }, quantization), "d52667047b413c05"),
            (equalize(Dfq { calibration: Some(calibration), ..dfq }, quantization), "e991bfc11003cb99"),
            (equalize(dfq, Quantization { fold: Fold::Frozen, ..quantization }), "27c697b6882fdd37"),
        ];
        for (kind, key) in keys {
            check(&Stage::root(kind), "data", key);
        }
    }

    #[test]
    fn the_data_and_what_came_before_are_in_the_key() {
        let root = Stage::root(pretrain(network(), training(), 0));
        let pruned = root.then(prune(None, true));
        let tuned = pruned.then(tune(quantization(4), training(), 0));
        check(&root, "data", "6bde133e0811c12a");
        check(&pruned, "data", "aa297aaa1e8d9177");
        check(&tuned, "data", "26055da6fbcd39e5");
        check(&tuned, "other", "ef051805e0ac5051");
    }

    /// A new version of one kind of stage leaves the keys of earlier stages unchanged.
    #[test]
    fn kinds_of_stages_have_versions_of_their_own() {
        let root = Stage::root(pretrain(network(), training(), 0));
        let tuned = root.then(tune(quantization(4), training(), 0));
        let next = tuned.then(prune(None, true));
        let newer = |kind: &StageKind| version(kind) + u32::from(matches!(kind, StageKind::FineTune { .. }));
        let same = [&root, &tuned, &next]
            .map(|stage| stage.key("data").unwrap() == stage.key_by(newer, "data").unwrap());
        assert_eq!(same, [true, false, false]);
    }

    /// Checks the stages of MobileNetV2 at A4/W4 by our method in results/table3/reduced, which
    /// were run at version 2.
    #[test]
    fn keys_of_stored_stages_stay_what_they_were() {
        let data = "1465f6dce7af2ddf02526af1c2774137ae118fdb11dc8d28a714b4fd619a771e";
        let network = MobileNet { version: models::Version::V2, ..network() };
        let tune = |weights: u32, learning_rate: f64| {
            let training = Training { warmup_epochs: 0.0, cosine_epochs: 1.0, learning_rate, ..training() };
            tune(quantization(weights), training, 0)
        };
        let mut parent = None;
        for (kind, key) in [
            (pretrain(network, training(), 0), "20c9dec823f353e6"),
            (prune(None, true), "39c7080382015ffe"),
            (tune(32, 0.01), "c2e576991450d12b"),
            (prune(None, true), "e14dc7877acc4e5a"),
            (tune(4, 0.001), "5b487442a8fa4314"),
        ] {
            let stage = Stage { kind, parent };
            assert_eq!(stage.key_by(|_| 2, data).unwrap(), key, "{}", stage.label());
            parent = Some(Arc::new(stage));
        }
    }

    #[test]
    fn what_is_not_finite_has_no_key() {
        let check = |kind: StageKind, setting: &str| {
            let stage = Stage::root(pretrain(network(), training(), 0)).then(kind);
            let error = stage.then(prune(None, true)).key("data").unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("setting {setting} = ")) && error.contains("finite"),
                "{error}"
            );
        };
        check(prune(Some(f64::INFINITY), true), "threshold");
        check(prune(Some(f64::NAN), true), "threshold");
        check(pretrain(MobileNet { width: f64::NAN, ..network() }, training(), 0), "width");
        check(equalize(Dfq { absorb_sigmas: f64::NAN, ..Dfq::default() }, quantization(4)), "absorb_sigmas");
        check(
            tune(quantization(4), Training { weight_decay: f64::INFINITY, ..training() }, 0),
            "weight_decay",
        );
    }
}
