//! Networks with every feature that files may describe, for the tests of crates that read them. No
//! trained network has all of these features.

use candle_core::{Device, Tensor};
use models::{Input, Method, MobileNet, Network, Norm, Quantization, Step, Version};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Returns values in [lo, hi).
pub fn random(seed: u64, shape: &[usize], lo: f32, hi: f32) -> Tensor {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(lo..hi)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Returns images of noise and a constant tint, so that channels differ.
pub fn images(count: usize, network: &Network) -> Tensor {
    let [h, w, c] = network.input;
    let pixels = random(7, &[count, h, w, c], -2.0, 2.0);
    let tint = random(8, &[count, 1, 1, c], -1.0, 1.0);
    pixels.broadcast_add(&tint).unwrap()
}

/// Returns a narrow network with a variety of γ and β, including negative and zero γ, and with caps
/// if `capped`.
///
/// Its running statistics come from `passes` passes of a batch of `batch` images. If there are
/// settings, it is quantized, and its ranges come from as many passes again.
pub fn network(
    version: Version,
    settings: Option<&Quantization>,
    (batch, passes): (usize, usize),
    capped: bool,
) -> Network {
    let config = MobileNet { width: 0.1, ..MobileNet::new(version, Input::Cifar, 10) };
    let mut network = config.init(3, &Device::Cpu).unwrap();
    for (i, unit) in network.units_mut().enumerate() {
        let filters = unit.filters();
        let Norm::Batch(norm) = &mut unit.norm else {
            // With its small initial weights, the classifier's logits would be meaningless.
            unit.weight = (&unit.weight * 30.0).unwrap();
            continue;
        };
        let mut gamma = random(100 + i as u64, &[filters], 0.5, 1.5).to_vec1::<f32>().unwrap();
        gamma[filters / 2] *= -1.0;
        gamma[filters / 3] = 0.0;
        norm.gamma = Tensor::new(gamma, &Device::Cpu).unwrap();
        norm.beta = random(200 + i as u64, &[filters], -0.5, 0.5);
        if capped && i % 5 == 2 {
            unit.cap = Some(random(300 + i as u64, &[filters], 0.5, 3.0));
        }
    }
    let batch = images(batch, &network);
    let train = |network: &mut Network| {
        for _ in 0..passes {
            network.forward_train(&batch, Step::alone(0.1)).unwrap();
        }
    };
    train(&mut network);
    if let Some(settings) = settings {
        network.quantize(settings).unwrap();
        train(&mut network);
    }
    network
}

/// Returns settings with `bits` bits, and 8 bits in the first and last layers.
pub fn settings(bits: u32, method: Method) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    let (activations, first) = (precision(bits), precision(8));
    let ends = Quantization { first_layer: first, last_layer: first, ..Quantization::default() };
    Quantization { activations, weights: activations, method, ..ends }
}
