//! Networks with everything that files may say of them, for the tests of what reads them: no trained one has all of it.

use candle_core::{Device, Tensor};
use models::{Input, Method, MobileNet, Network, Norm, Quantization, Step, Version};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values in [lo, hi).
pub fn random(seed: u64, shape: &[usize], lo: f32, hi: f32) -> Tensor {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(lo..hi)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Images with smooth and coarse parts, so that channels differ.
pub fn images(count: usize, network: &Network) -> Tensor {
    let [h, w, c] = network.input;
    let pixels = random(7, &[count, h, w, c], -2.0, 2.0);
    let tint = random(8, &[count, 1, 1, c], -1.0, 1.0);
    pixels.broadcast_add(&tint).unwrap()
}

/// A narrow network with γ and β of every sort, γ below 0 and equal to 0 among them, caps if it is to be `capped`, and the
/// running statistics of so many passes of a batch; quantized, if there are settings, with the ranges of as many.
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
            // As small as it begins, the classifier would give logits that tell nothing.
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

/// So many bits, 8 at the ends.
pub fn settings(bits: u32, method: Method) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    let (activations, first) = (precision(bits), precision(8));
    let ends = Quantization { first_layer: first, last_layer: first, ..Quantization::default() };
    Quantization { activations, weights: activations, method, ..ends }
}
