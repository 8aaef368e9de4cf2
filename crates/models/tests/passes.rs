//! The network's backward pass compared with differences of its forward pass, and its files.

use candle_core::{DType, Device, Tensor};
use kernels::loss::softmax_cross_entropy;
use models::{Extras, Fold, Input, MobileNet, Network, Norm, Quantization, Step, Version};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEP: Step = Step::alone(0.1);

fn network(version: Version, first_expansion: bool) -> Network {
    let config = MobileNet { width: 0.25, first_expansion, ..MobileNet::new(version, Input::Cifar, 10) };
    config.init(1, &Device::Cpu).unwrap()
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn labels(count: usize) -> Tensor {
    Tensor::from_vec((0..count as u32).map(|i| i % 10).collect(), count, &Device::Cpu).unwrap()
}

fn quantization(activations: u32, weights: u32, fold: Fold) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    Quantization {
        activations: precision(activations),
        weights: precision(weights),
        first_layer: precision(8),
        last_layer: precision(8),
        fold,
        ..Quantization::default()
    }
}

/// Returns the training loss of labels 0, 1, 2, …. It is computed in float64 from the logits on,
/// because float32 rounding would be as large as the differences of losses.
fn loss(network: &mut Network, images: &Tensor) -> f64 {
    let (logits, _) = network.forward_train(images, STEP).unwrap();
    let rows = logits.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let entropy = |(i, row): (usize, &Vec<f64>)| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[i % 10];
    rows.iter().enumerate().map(entropy).sum::<f64>() / rows.len() as f64
}

/// The changes of the loss in the two central differences. They are so small that they cross few
/// kinks of ReLU6, and large compared with the remaining rounding (3e-7 was found).
const CHANGES: [f64; 2] = [1.2e-4, 3e-5];
/// The largest error with the smaller step, from kinks and rounding (4 % was found, once in 476).
const SMALL: f64 = 0.06;
/// If the error is larger, kinks must be the cause: with the step, which is a quarter of the first,
/// the error falls to less than this fraction.
const FALL: f64 = 0.4;
/// The largest error of three quarters of the parameters.
const USUAL: f64 = 0.01;

/// Checks, for every parameter tensor, the derivative of the loss in the direction of its own
/// gradient.
///
/// By the backward pass, it is the gradient's norm. By the forward pass, it is a central
/// difference. Elements that are missing in a gradient do not show here; `golden.rs` compares
/// gradients element by element.
fn check_gradients(version: Version, first_expansion: bool, prepare: impl Fn(&mut Network)) {
    let mut network = network(version, first_expansion);
    // Maps of twelve, six and three pixels: even and odd sizes.
    let images = random(&[8, 12, 12, 3], 2);
    // Keep away from β = 0, where half of the values are near the kink.
    for (i, unit) in network.units_mut().enumerate() {
        let channels = unit.filters();
        if let Norm::Batch(norm) = &mut unit.norm {
            norm.gamma = ((random(&[channels], 100 + i as u64) * 0.4).unwrap() + 0.8).unwrap();
            norm.beta = (random(&[channels], 200 + i as u64) + 1.0).unwrap();
        }
    }
    prepare(&mut network);
    let (logits, tape) = network.forward_train(&images, STEP).unwrap();
    let result = softmax_cross_entropy(&logits, &labels(8), 0.0).unwrap();
    let gradients = network.backward(tape, &result.grad).unwrap();
    let parameters = network.parameters();
    let mut found = Vec::new();
    for parameter in &parameters {
        let gradient = gradients.of(parameter).unwrap();
        let slope = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        // The loss is too flat for float32 differences.
        if slope < 2e-3 {
            continue;
        }
        let original = parameter.tensor.copy().unwrap();
        let [coarse, fine] = CHANGES.map(|change| {
            let size = change / slope;
            let direction = (gradient * (size / slope)).unwrap();
            let mut at = |sign: f64| {
                let moved = (&original + (&direction * sign).unwrap()).unwrap();
                parameter.tensor.slice_set(&moved, 0, 0).unwrap();
                loss(&mut network, &images)
            };
            (at(1.0) - at(-1.0)) / (2.0 * size) / slope - 1.0
        });
        parameter.tensor.slice_set(&original, 0, 0).unwrap();
        assert!(
            fine.abs() < SMALL || fine.abs() < FALL * coarse.abs(),
            "{}: the derivative is {slope:.5} by the backward pass; differences of the loss are off by {:.2} % of it \
             over a step, and by {:.2} % over a quarter of the step",
            parameter.name,
            100.0 * coarse,
            100.0 * fine
        );
        found.push(fine.abs());
    }
    let all = parameters.len();
    // The remaining parameters are shifts before a normalization, whose gradient is zero.
    assert!(found.len() > all * 4 / 5, "only {} of {all} could be checked", found.len());
    found.sort_by(f64::total_cmp);
    let usual = found[found.len() * 3 / 4];
    assert!(usual < USUAL, "a quarter of the derivatives are off by {:.2} % and more", 100.0 * usual);
}

#[test]
fn gradients_of_v1() {
    check_gradients(Version::V1, true, |_| ());
}

#[test]
fn gradients_of_v2_with_residuals() {
    check_gradients(Version::V2, true, |_| ());
    check_gradients(Version::V2, false, |_| ());
}

#[test]
fn gradients_with_folded_norm() {
    // The folded statistics are those of the batch, so that activations stay in range.
    check_gradients(Version::V2, true, |network| {
        for _ in 0..60 {
            loss(network, &random(&[8, 12, 12, 3], 2));
        }
        network.fold().unwrap();
    });
}

/// Evaluation never has a convolution's output in memory, unless the pass is observed.
#[test]
fn an_observed_pass_gives_the_same_bits() {
    for version in [Version::V1, Version::V2] {
        let folds = [Fold::Unfolded, Fold::BatchStatistics, Fold::FloatStatistics, Fold::Frozen];
        let settings = folds.map(|fold| Some(quantization(4, 3, fold)));
        let float_weights = [Fold::Unfolded, Fold::Frozen].map(|fold| Some(quantization(4, 32, fold)));
        for settings in settings.into_iter().chain([None]).chain(float_weights) {
            let mut network = network(version, true);
            if let Some(settings) = &settings {
                network.quantize(settings).unwrap();
                let folded = network.units().all(|unit| unit.batch_norm().is_none());
                assert_eq!(folded, settings.fold == Fold::Frozen);
            }
            let images = random(&[2, 12, 12, 3], 5);
            network.forward_train(&images, STEP).unwrap();
            let bits = |logits: Tensor| -> Vec<u32> {
                logits
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
                    .into_iter()
                    .map(f32::to_bits)
                    .collect()
            };
            let mut nodes = 0;
            let mut observe = |i: usize, z: Option<&Tensor>, y: &Tensor| {
                assert!(i == nodes && z.is_some() == network.nodes[i].unit().is_some());
                assert!(z.is_none_or(|z| z.dims() == y.dims()));
                nodes += 1;
                Ok(())
            };
            let observed = network.forward_observed(&images, &mut observe).unwrap();
            assert_eq!(nodes, network.nodes.len());
            assert_eq!(bits(network.forward(&images).unwrap()), bits(observed), "{version:?}, {settings:?}");
        }
    }
}

#[test]
fn eight_bits_are_close_to_float() {
    for fold in [Fold::Unfolded, Fold::BatchStatistics, Fold::FloatStatistics, Fold::Frozen] {
        let mut network = network(Version::V2, true);
        let images = random(&[8, 32, 32, 3], 3);
        for _ in 0..60 {
            loss(&mut network, &images);
        }
        let float = network.forward(&images).unwrap();
        network.quantize(&quantization(8, 8, fold)).unwrap();
        loss(&mut network, &images); // sets the ranges
        let quantized = network.forward(&images).unwrap();
        let max = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let (error, scale) = (max((&float - quantized).unwrap()), max(float));
        assert!(error > 0.0 && error < 0.35 * scale, "{fold:?}: error {error} at scale {scale}");
    }
}

#[test]
fn a_file_gives_the_same_network_back() {
    for fold in [Fold::BatchStatistics, Fold::FloatStatistics] {
        check_file(fold);
    }
}

/// Checks that the network read from a file evaluates and trains like the one that was written.
fn check_file(fold: Fold) {
    let mut network = network(Version::V2, true);
    network.quantize(&quantization(4, 4, fold)).unwrap();
    let images = random(&[2, 32, 32, 3], 4);
    loss(&mut network, &images);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.safetensors");
    let mut extras = Extras::default();
    extras.metadata.insert("note".into(), "kept".into());
    extras.tensors.insert("velocity".into(), random(&[3], 5));
    network.save(&path, &extras).unwrap();
    let (mut read, found) = Network::load(&path, &Device::Cpu).unwrap();
    assert_eq!(found.metadata, extras.metadata);
    assert_eq!(found.tensors.keys().collect::<Vec<_>>(), ["velocity"]);
    let bits = |t: Tensor| {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(bits(network.forward(&images).unwrap()), bits(read.forward(&images).unwrap()));
    assert_eq!(loss(&mut network, &images), loss(&mut read, &images));
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.safetensors");
    network(Version::V1, true).save(&path, &Extras::default()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = Network::load(&path, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("network.safetensors"), "{error}");
    }
}

/// A duplicate shares no storage: changing one network leaves the other unchanged.
#[test]
fn duplicates_share_no_storage() {
    let first = network(Version::V1, true);
    let second = first.duplicate().unwrap();
    let parameter = &first.parameters()[0].tensor;
    parameter.slice_set(&parameter.zeros_like().unwrap(), 0, 0).unwrap();
    let sum = second.parameters()[0].tensor.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(sum > 0.0);
}
