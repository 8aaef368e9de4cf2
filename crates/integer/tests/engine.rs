//! Networks in whole numbers beside the simulation with floats, for every method, fold and grid.

use candle_core::{Device, Tensor};
use integer::{Engine, Error};
use models::{Fold, Input, Method, MobileNet, Network, Norm, Quantization, Step, Version, WeightGrid};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64, shape: &[usize], lo: f32, hi: f32) -> Tensor {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(lo..hi)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Images with smooth and coarse parts, so that channels differ.
fn images(count: usize, network: &Network) -> Tensor {
    let [h, w, c] = network.input;
    let pixels = random(7, &[count, h, w, c], -2.0, 2.0);
    pixels.broadcast_add(&random(8, &[count, 1, 1, c], -1.0, 1.0)).unwrap()
}

/// A narrow network, quantized so, with γ and β of every sort, γ below 0 and equal to 0 among them, and ranges of images.
fn network(version: Version, settings: &Quantization) -> Network {
    let config = MobileNet { width: 0.1, ..MobileNet::new(version, Input::Cifar, 10) };
    let mut network = config.init(3, &Device::Cpu).unwrap();
    for (i, unit) in network.units_mut().enumerate() {
        let filters = unit.filters();
        let Norm::Batch(norm) = &mut unit.norm else {
            // As small as it begins, the classifier would give logits that tell nothing.
            unit.weight = (&unit.weight * 30.0).unwrap();
            continue;
        };
        let mut gamma = random(100 + i as u64, &[filters], 0.5, 1.5).to_vec1::<f32>().unwrap();
        gamma[filters / 2] *= -1.0;
        gamma[filters / 3] = 0.0;
        norm.gamma = Tensor::new(gamma, &Device::Cpu).unwrap();
        norm.beta = random(200 + i as u64, &[filters], -0.5, 0.5);
    }
    let batch = images(8, &network);
    let train = |network: &mut Network| {
        for _ in 0..8 {
            network.forward_train(&batch, Step { range_momentum: 0.1 }).unwrap();
        }
    };
    train(&mut network);
    network.quantize(settings).unwrap();
    train(&mut network);
    network
}

fn settings(bits: u32, method: Method) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    let (activations, ends) = (precision(bits), precision(8));
    let quantization = Quantization { first_layer: ends, last_layer: ends, ..Quantization::default() };
    Quantization { activations, weights: activations, method, ..quantization }
}

/// For each image the largest difference of its logits, as a part of the largest logit, ascending.
fn differences(network: &Network) -> Vec<f32> {
    let images = images(20, network);
    let (simulated, whole) =
        (network.forward(&images).unwrap(), Engine::new(network).unwrap().logits(&images).unwrap());
    let rows = |logits: &Tensor| logits.to_vec2::<f32>().unwrap();
    let largest = rows(&simulated).concat().iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let mut all: Vec<f32> = rows(&simulated)
        .iter()
        .zip(rows(&whole))
        .map(|(a, b)| a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest)
        .collect();
    all.sort_by(f32::total_cmp);
    all
}

/// Where a float lies within rounding of the middle between two levels, the level may be the other one, and what follows differs by
/// that level's share. A wrong zero point, offset, step or shift changes every logit of every image.
#[test]
fn logits_are_those_of_the_simulation() {
    let uniform = settings(4, Method::Uniform);
    let mut cases: Vec<(Version, Quantization)> =
        Method::ALL.iter().map(|method| (Version::V2, settings(4, *method))).collect();
    for fold in [Fold::Frozen, Fold::BatchStatistics] {
        cases.push((Version::V2, Quantization { fold, ..uniform }));
    }
    let channels = Quantization { weight_grid: WeightGrid::Channel, ..uniform };
    cases.push((Version::V2, channels));
    cases.push((Version::V1, Quantization { fold: Fold::Frozen, ..channels }));
    cases.push((Version::V2, settings(8, Method::Uniform)));
    for (version, settings) in cases {
        let Quantization { activations, method, fold, weight_grid, .. } = settings;
        let name = format!("{version:?} {} {fold:?} {weight_grid:?} A{activations}", method.name());
        let differences = differences(&network(version, &settings));
        let (half, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
        println!("{name}: {half:e} half, {most:e} at most");
        // The logits' own grid, 2⁻¹⁶, and float32. With DSQ a filter that is constant, as its γ is 0, lies in the middle of two
        // levels.
        let expected = if method == Method::Dsq { 0.01 } else { 1e-4 };
        assert!(half < expected, "{name}: half of the images differ by {half} or more");
        assert!(most < 0.1, "{name}: an image differs by {most}");
    }
}

#[test]
fn what_is_float_is_named() {
    let float = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    let mut float = float.init(0, &Device::Cpu).unwrap();
    assert!(Engine::new(&float).unwrap_err().to_string().starts_with("input: the output is not quantized"));
    let eight = Precision::try_from(8).unwrap();
    let activations = Quantization { activations: eight, first_layer: eight, ..Quantization::default() };
    float.quantize(&activations).unwrap();
    // Not even the ranges have been set.
    assert!(matches!(Engine::new(&float).unwrap_err(), Error::Float { place, .. } if place == "input"));
    let whole = network(Version::V1, &settings(8, Method::Uniform));
    let error = Engine::new(&whole).unwrap().logits(&random(0, &[1, 31, 32, 3], 0.0, 1.0)).unwrap_err();
    assert!(error.to_string().contains("[1, 31, 32, 3]: expected [N, 32, 32, 3]"), "{error}");
}
