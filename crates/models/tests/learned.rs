//! Networks with learned quantizers: what is attached where, levels, files. Their passes are compared with PyTorch in
//! `golden.rs`.

use candle_core::{Device, Tensor};
use kernels::{Activation, loss::softmax_cross_entropy, sgd};
use models::{
    ActivationKind, Extras, Fold, Input, Method, MobileNet, Network, Quantization, Role, Step, Version,
    WeightKind,
};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

const STEP: Step = Step { range_momentum: 0.1 };
const BITS: u32 = 4;

fn settings(method: Method, fold: Fold) -> Quantization {
    let [few, eight] = [BITS, 8].map(|bits| Precision::try_from(bits).unwrap());
    Quantization { activations: few, weights: few, first_layer: eight, last_layer: eight, fold, method }
}

fn float() -> Network {
    let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    config.init(1, &Device::Cpu).unwrap()
}

fn images() -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let values: Vec<f32> = (0..6 * 12 * 12 * 3).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, (6, 12, 12, 3), &Device::Cpu).unwrap()
}

/// A network that has taken some steps of training, with what it learns.
fn trained(method: Method) -> Network {
    let mut network = float();
    network.quantize(&settings(method, Fold::Unfolded)).unwrap();
    let labels = Tensor::new(&[0u32, 1, 2, 3, 4, 5], &Device::Cpu).unwrap();
    let parameters = network.parameters();
    for _ in 0..4 {
        let (logits, tape) = network.forward_train(&images(), STEP).unwrap();
        let loss = softmax_cross_entropy(&logits, &labels, 0.0).unwrap();
        let gradients = network.backward(tape, &loss.grad).unwrap();
        assert_eq!(gradients.len(), parameters.len());
        for (parameter, gradient) in parameters.iter().zip(&gradients) {
            let velocity = gradient.zeros_like().unwrap();
            sgd::step(&parameter.tensor, gradient, &velocity, 0.05, 0.0, 0.0).unwrap();
        }
    }
    network
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn distinct(tensor: &Tensor) -> usize {
    bits(&(tensor + 0.0).unwrap()).into_iter().collect::<BTreeSet<_>>().len()
}

#[test]
fn every_layer_but_the_first_and_the_last_learns() {
    for method in [Method::Pact, Method::Dsq] {
        let network = trained(method);
        let head = &network.head;
        for q in [&network.input_quantizer, &head.input_quantizer] {
            let q = q.as_ref().unwrap();
            assert!(q.bits.get() == 8 && matches!(q.kind, ActivationKind::Uniform), "{q:?}");
        }
        let uniform = [&network.units[0].weight_quantizer, &head.weight_quantizer];
        for q in uniform.map(|q| q.as_ref().unwrap()) {
            assert!(q.bits.get() == 8 && matches!(q.kind, WeightKind::Uniform), "{q:?}");
        }
        for (i, unit) in network.units.iter().enumerate() {
            let q = unit.output_quantizer.as_ref().unwrap();
            let both_signs = unit.activation == Activation::Identity;
            let fits = match &q.kind {
                ActivationKind::Uniform => false,
                ActivationKind::Pact { signed } => method == Method::Pact && *signed == both_signs,
                ActivationKind::Dsq { .. } => method == Method::Dsq,
            };
            assert!(fits && q.ready && q.bits.get() == BITS, "{}: {q:?}", unit.name);
            let q = unit.weight_quantizer.as_ref().unwrap();
            let fits = match &q.kind {
                WeightKind::Uniform => i == 0,
                WeightKind::Dorefa => i > 0 && method == Method::Pact,
                WeightKind::Dsq { .. } => i > 0 && method == Method::Dsq,
            };
            assert!(fits, "{}: {q:?}", unit.name);
        }
        let units = network.units.len();
        let count = |role: Role| network.parameters().iter().filter(|p| p.role == role).count();
        let expected = if method == Method::Pact { [units, 0] } else { [0, 2 * units + 2 * (units - 1)] };
        assert_eq!([Role::Clip, Role::Interval].map(count), expected, "{method:?}");
        // What the first batch set has moved since.
        let mut started = float();
        started.quantize(&settings(method, Fold::Unfolded)).unwrap();
        started.forward_train(&images(), STEP).unwrap();
        let (started, learned) = (started.parameters(), network.parameters());
        let moved = started.iter().zip(&learned).filter(|(a, b)| bits(&a.tensor) != bits(&b.tensor)).count();
        assert!(moved as f64 > 0.95 * learned.len() as f64, "{moved} of {} parameters moved", learned.len());
    }
}

#[test]
fn outputs_take_no_more_values_than_there_are_levels() {
    for method in [Method::Pact, Method::Dsq] {
        let network = trained(method);
        let mut most = 0;
        let mut observe = |i: usize, _: &Tensor, y: &Tensor| {
            let levels = distinct(y);
            assert!(levels <= 1 << BITS, "{}: {levels} values", network.units[i].name);
            most = most.max(levels);
            Ok(())
        };
        let observed = network.forward_observed(&images(), &mut observe).unwrap();
        // The running statistics are still on their way, so not all levels need be in use; a bit less would not do.
        assert!(most > 1 << (BITS - 1), "{method:?}: {most} levels at most");
        assert_eq!(bits(&observed), bits(&network.forward(&images()).unwrap()), "{method:?}: observed");
    }
}

#[test]
fn a_file_gives_the_same_network_back() {
    for method in [Method::Pact, Method::Dsq] {
        let mut network = trained(method);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        network.save(&path, &Extras::default()).unwrap();
        let (mut read, _) = Network::load(&path, &Device::Cpu).unwrap();
        for ((name, a), (other, b)) in network.tensors().iter().zip(read.tensors()) {
            assert_eq!((name, bits(a)), (&other, bits(b)));
        }
        // Further training goes on from what was learned, and a new stage of the same method does too.
        for again in [false, true] {
            if again {
                network.quantize(&settings(method, Fold::Unfolded)).unwrap();
                read.quantize(&settings(method, Fold::Unfolded)).unwrap();
            }
            let [a, b] = [&mut network, &mut read].map(|n| n.forward_train(&images(), STEP).unwrap().0);
            assert_eq!(bits(&a), bits(&b), "{method:?}");
        }
        let found = read.duplicate().unwrap().forward(&images()).unwrap();
        assert_eq!(bits(&found), bits(&read.forward(&images()).unwrap()), "{method:?}: duplicate");
    }
}

/// Bounds beyond what makes sense, as a step of the optimizer may leave them, are brought back by the next batch.
#[test]
fn parameters_are_kept_in_their_ranges() {
    let mut network = trained(Method::Dsq);
    let set = |network: &Network, name: &str, values: &[f32]| {
        let parameter = network.parameters().into_iter().find(|p| p.name == name).unwrap();
        parameter.tensor.slice_set(&Tensor::new(values, &Device::Cpu).unwrap(), 0, 0).unwrap();
        parameter.tensor
    };
    let unit = network.units[3].name.clone();
    let softness = set(&network, &format!("{unit}.softness"), &[0.8]);
    let weights = set(&network, &format!("{unit}.weight_softness"), &[-0.1]);
    let bounds = set(&network, &format!("{unit}.bounds"), &[3.0, 1.0]);
    network.forward_train(&images(), STEP).unwrap();
    let values = |tensor: &Tensor| tensor.to_vec1::<f32>().unwrap();
    assert_eq!((values(&softness), values(&weights)), (vec![0.5], vec![1e-4]));
    assert_eq!(values(&bounds), [2.0, 2.0]);

    let mut network = trained(Method::Pact);
    let alpha = set(&network, &format!("{unit}.alpha"), &[-2.0]);
    network.forward_train(&images(), STEP).unwrap();
    assert_eq!(values(&alpha), [0.0]);
}

#[test]
fn learned_methods_refuse_folded_normalization() {
    for method in [Method::Pact, Method::Dsq] {
        for fold in [Fold::Frozen, Fold::BatchStatistics] {
            let message = float().quantize(&settings(method, fold)).unwrap_err().to_string();
            assert!(message.contains("unfolded") && message.contains(&format!("{method:?}")), "{message}");
        }
    }
}

#[test]
fn learned_quantizers_of_the_image_or_the_classifier_are_errors() {
    for place in ["input quantizer", "head"] {
        let mut network = trained(Method::Pact);
        let learned = network.units[1].output_quantizer.clone();
        match place {
            "head" => network.head.input_quantizer = learned,
            _ => network.input_quantizer = learned,
        }
        let message = network.validate().unwrap_err().to_string();
        assert!(message.contains(place) && message.contains("uniform"), "{message}");
    }
}

/// Settings without a method, as they were before there was a choice, are uniform, and are written without it.
#[test]
fn the_method_goes_without_saying_where_it_is_uniform() {
    let text = r#"{"activations":4,"weights":4,"first_layer":8,"last_layer":8,"fold":"unfolded"}"#;
    let read: Quantization = serde_json::from_str(text).unwrap();
    assert_eq!(read, settings(Method::Uniform, Fold::Unfolded));
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
    let pact = serde_json::to_string(&settings(Method::Pact, Fold::Unfolded)).unwrap();
    assert!(pact.ends_with(r#""fold":"unfolded","method":"pact"}"#), "{pact}");
}
