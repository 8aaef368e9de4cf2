//! Integer evaluation compared with the float simulation, for every method, fold and grid.

#[path = "../../models/tests/networks/mod.rs"]
mod networks;

use candle_core::{Device, Tensor};
use integer::{Engine, Error};
use models::{Fold, Input, Method, MobileNet, Network, Quantization, Version, WeightGrid};
use networks::{images, random, settings};
use quant_core::Precision;

fn network(version: Version, settings: &Quantization, capped: bool) -> Network {
    networks::network(version, Some(settings), (8, 8), capped)
}

/// Returns the largest difference of each image's logits, relative to the largest logit, in
/// ascending order.
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

/// Compares the logits with the simulation.
///
/// If a float lies within rounding of the middle between two levels, the levels may differ, and
/// later values differ accordingly. A wrong zero point, offset, step or shift changes every logit
/// of every image.
#[test]
fn logits_are_those_of_the_simulation() {
    let uniform = settings(4, Method::Uniform);
    let mut cases: Vec<(Version, Quantization)> =
        Method::ALL.iter().map(|method| (Version::V2, settings(4, *method))).collect();
    for fold in [Fold::Frozen, Fold::BatchStatistics, Fold::FloatStatistics] {
        cases.push((Version::V2, Quantization { fold, ..uniform }));
    }
    let channels = Quantization { weight_grid: WeightGrid::Channel, ..uniform };
    cases.push((Version::V2, channels));
    cases.push((
        Version::V2,
        Quantization { linear: Some(settings(8, Method::Uniform).activations), ..uniform },
    ));
    cases.push((Version::V1, Quantization { fold: Fold::Frozen, ..channels }));
    cases.push((Version::V2, settings(8, Method::Uniform)));
    let frozen = Quantization { fold: Fold::Frozen, ..uniform };
    let with_caps = [
        (Version::V1, frozen),
        (Version::V2, frozen),
        (Version::V2, uniform),
        (Version::V2, settings(4, Method::Pact)),
    ];
    let cases = cases.into_iter().map(|case| (case, false));
    for ((version, settings), capped) in cases.chain(with_caps.map(|case| (case, true))) {
        let Quantization { activations, method, fold, weight_grid, .. } = settings;
        let caps = if capped { " with caps" } else { "" };
        let name = format!("{version:?} {} {fold:?} {weight_grid:?} A{activations}{caps}", method.name());
        let differences = differences(&network(version, &settings, capped));
        let (half, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
        println!("{name}: {half:e} half, {most:e} at most");
        // The error is the logits' own resolution, 2⁻¹⁶, and float32 rounding. With DSQ, a filter
        // that is constant because its γ is 0 lies in the middle between two levels.
        let expected = if method == Method::Dsq { 0.01 } else { 1e-4 };
        assert!(half < expected, "{name}: half of the images differ by {half} or more");
        assert!(most < 0.1, "{name}: an image differs by {most}");
    }
}

/// Weight decay leaves layers whose outputs have almost no range, so that the convolution's output
/// exceeds it many times. It is clamped, as in the simulation.
#[test]
fn dead_layers_saturate() {
    for highest in [1e-12, 1e-30] {
        let mut network = network(Version::V2, &settings(4, Method::Uniform), false);
        let unit = network.units_mut().find(|unit| unit.name == "blocks.3.depthwise").unwrap();
        unit.output_quantizer.as_mut().unwrap().set_range(0.0, highest).unwrap();
        let differences = differences(&network);
        let (half, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
        assert!(half < 1e-4 && most < 0.1, "{highest}: {half:e} half, {most:e} at most");
    }
}

/// A file may describe a network whose logits are quantized too.
#[test]
fn quantized_logits_are_levels() {
    let mut network = network(Version::V2, &settings(4, Method::Uniform), false);
    let largest = network.forward(&images(20, &network)).unwrap().abs().unwrap().max_all().unwrap();
    let largest = largest.to_scalar::<f32>().unwrap();
    let mut quantizer = network.units().find_map(|unit| unit.output_quantizer.clone()).unwrap();
    quantizer.set_range(-largest, largest).unwrap();
    let last = network.last();
    *network.nodes[last].quantizer_mut() = Some(quantizer);
    let differences = differences(&network);
    assert!(differences[differences.len() / 2] < 1e-4, "{differences:?}");
}

#[test]
fn what_is_float_is_named() {
    let float = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    let mut float = float.init(0, &Device::Cpu).unwrap();
    assert!(Engine::new(&float).unwrap_err().to_string().starts_with("input: the image is not quantized"));
    let eight = Precision::try_from(8).unwrap();
    let activations = Quantization { activations: eight, first_layer: eight, ..Quantization::default() };
    float.quantize(&activations).unwrap();
    // Even the ranges are not set yet.
    assert!(matches!(Engine::new(&float).unwrap_err(), Error::Float { place, .. } if place == "input"));
    let whole = network(Version::V1, &settings(8, Method::Uniform), false);
    let error = Engine::new(&whole).unwrap().logits(&random(0, &[1, 31, 32, 3], 0.0, 1.0)).unwrap_err();
    assert!(error.to_string().contains("[1, 31, 32, 3]: expected [N, 32, 32, 3]"), "{error}");
}
