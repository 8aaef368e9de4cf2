//! The learning-rate schedule compared with PyTorch's and with values computed by hand, and the
//! settings that are refused.

use datasets::Augmentation;
use train::{Arithmetic, Decay, Error, Training};

fn training(learning_rate: f64, warmup_epochs: f64, cosine_epochs: f64) -> Training {
    Training {
        warmup_epochs,
        cosine_epochs,
        learning_rate,
        batch: 64,
        momentum: 0.9,
        weight_decay: 1e-5,
        decay_norm: true,
        label_smoothing: 0.0,
        range_momentum: 0.1,
        augmentation: Augmentation::none(),
        decay: Decay::Cosine,
        arithmetic: Arithmetic::F32,
        sync_norm: false,
    }
}

/// Compares with PyTorch's LinearLR and CosineAnnealingLR, which compute each rate from the last
/// one and so accumulate float64 rounding errors: at most 1e-13 over these 240 steps.
#[test]
fn rates_are_those_of_pytorch() {
    let cases: serde_json::Value = serde_json::from_str(include_str!("schedule/schedule.json")).unwrap();
    let mut compared = 0;
    for case in cases.as_array().unwrap() {
        let number = |name: &str| case[name].as_f64().unwrap();
        let training = training(number("learning_rate"), number("warmup_epochs"), number("cosine_epochs"));
        for pair in case["rates"].as_array().unwrap() {
            let (t, expected) = (pair[0].as_f64().unwrap(), pair[1].as_f64().unwrap());
            let found = training.rate(t, &[]);
            assert!(
                (found - expected).abs() <= 1e-12 * training.learning_rate,
                "{found} and not {expected} at {t} epochs of {training:?}"
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 240 + 40 + 21);
}

#[test]
fn rates_by_hand() {
    #[track_caller]
    fn check(training: Training, t: f64, expected: f64) {
        let found = training.rate(t, &[]);
        assert!((found - expected).abs() < 1e-15, "{found} and not {expected} at {t}");
    }
    // The paper's pre-training reaches 0.256 after 16 epochs and half of it 52 epochs later; a
    // quarter of the cosine's way gives cos 45°.
    let paper = training(0.256, 16.0, 104.0);
    assert_eq!(paper.epochs(), 120);
    check(paper, 0.0, 0.0);
    check(paper, 1.0, 0.016);
    check(paper, 4.0, 0.064);
    check(paper, 16.0, 0.256);
    check(paper, 16.0 + 26.0, 0.128 * (1.0 + 0.5f64.sqrt()));
    check(paper, 68.0, 0.128);
    check(paper, 120.0, 0.0);
    // The rate does not rise again after the end.
    check(paper, 130.0, 0.0);
    // Without warm-up the schedule starts at the full rate.
    let fine_tuning = training(0.01, 0.0, 3.0);
    assert_eq!(fine_tuning.epochs(), 3);
    check(fine_tuning, 0.0, 0.01);
    check(fine_tuning, 1.0, 0.0075);
    check(fine_tuning, 2.0, 0.0025);
    // The warm-up may take a fraction of an epoch.
    let short = training(0.1, 0.5, 1.5);
    assert_eq!(short.epochs(), 2);
    check(short, 0.25, 0.05);
    check(short, 1.25, 0.05);
}

#[test]
fn rates_fall_where_the_accuracy_drops() {
    let training = Training { decay: Decay::AccuracyDrop, ..training(0.1, 1.0, 5.0) };
    let check = |t: f64, accuracies: &[f64], expected: f64| {
        let found = training.rate(t, accuracies);
        assert!((found - expected).abs() < 1e-15, "{found} and not {expected} after {accuracies:?}");
    };
    check(0.5, &[], 0.05);
    check(1.5, &[50.0], 0.1);
    // The same accuracy is not a drop.
    check(2.5, &[50.0, 50.0], 0.1);
    check(3.5, &[50.0, 50.0, 49.9], 0.01);
    // Each accuracy is compared with the previous one, not with the best one.
    check(4.5, &[50.0, 50.0, 49.9, 49.95], 0.01);
    check(5.5, &[50.0, 50.0, 49.9, 49.95, 40.0], 0.001);
}

/// Checks that setting `key` is refused with a message that names it and its value.
#[track_caller]
fn check_refused(key: &str, value: &str, change: impl Fn(&mut Training)) {
    let mut settings = training(0.1, 1.0, 2.0);
    settings.validate().unwrap();
    change(&mut settings);
    let Err(error) = settings.validate() else { panic!("{key} = {value} was accepted") };
    assert!(matches!(error, Error::Setting { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(&format!("{key} = {value} ")), "{message:?} does not name {key} = {value}");
    assert!(message.contains("expected"), "{message}");
}

#[test]
fn impossible_settings_are_refused_by_name() {
    check_refused("warmup_epochs", "-1", |t| t.warmup_epochs = -1.0);
    check_refused("warmup_epochs", "NaN", |t| t.warmup_epochs = f64::NAN);
    check_refused("cosine_epochs", "0", |t| t.cosine_epochs = 0.0);
    check_refused("warmup_epochs + cosine_epochs", "3.5", |t| t.warmup_epochs = 1.5);
    check_refused("warmup_epochs + cosine_epochs", "100001", |t| t.cosine_epochs = 1e5);
    for rate in [0.0, -0.1, f64::NAN] {
        check_refused("learning_rate", &rate.to_string(), |t| t.learning_rate = rate);
    }
    check_refused("batch", "0", |t| t.batch = 0);
    check_refused("batch", "100000", |t| t.batch = 100_000);
    for momentum in [-0.1, 1.0, f64::NAN] {
        check_refused("momentum", &momentum.to_string(), |t| t.momentum = momentum);
    }
    check_refused("weight_decay", "-0.00001", |t| t.weight_decay = -1e-5);
    check_refused("label_smoothing", "1", |t| t.label_smoothing = 1.0);
    for momentum in [0.0, 1.1] {
        check_refused("range_momentum", &momentum.to_string(), |t| t.range_momentum = momentum);
    }
}

/// The limits of the allowed ranges are accepted.
#[test]
fn extreme_settings_are_accepted() {
    let mut settings = training(1e-9, 0.0, 1.0);
    (settings.momentum, settings.weight_decay, settings.range_momentum) = (0.0, 0.0, 1.0);
    (settings.batch, settings.label_smoothing) = (1, 0.0);
    settings.validate().unwrap();
    training(0.1, 0.5, 1.5).validate().unwrap();
    training(0.1, 0.0, 10_000.0).validate().unwrap();
}
