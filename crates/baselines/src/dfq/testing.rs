//! Networks and data for the tests.

use super::Normalization;
use candle_core::{Device, Tensor};
use kernels::Activation;
use models::{
    BatchNorm, Fold, Input, Kernel, MobileNet, Network, Node, Norm, Pool, Quantization, Step, Sum, Unit,
    Version,
};
use quant_core::{Bits, Precision};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Mutex;

pub(crate) const FROZEN: Normalization = Normalization::Frozen;

/// Returns settings that quantize everything to `bits` bits.
pub(crate) fn quantization(bits: u32) -> Quantization {
    let bits = Precision::Quantized(Bits::new(bits).unwrap());
    Quantization {
        activations: bits,
        weights: bits,
        first_layer: bits,
        last_layer: bits,
        fold: Fold::Frozen,
        ..Quantization::default()
    }
}

/// A network of hand-written units, which [`chain`] makes.
pub(crate) struct Chain {
    pub(crate) network: Network,
}

/// Returns a network whose unit `i` has the given kernel, activation and weights.
///
/// Its batch normalization changes (almost) nothing, and its logits are the pooled features.
pub(crate) fn chain(input_channels: usize, units: &[(Kernel, Activation)], weights: &[&[f32]]) -> Chain {
    let device = &Device::Cpu;
    let mut channels = input_channels;
    let mut network = Network::of_image("chain", [6, 6, input_channels]);
    for (i, ((kernel, activation), weight)) in units.iter().zip(weights).enumerate() {
        let filters = match kernel.is_depthwise() {
            true => channels,
            false => weight.len() / (kernel.taps() * channels),
        };
        let weight = Tensor::from_slice(weight, kernel.weight_dims(channels, filters), device).unwrap();
        channels = filters;
        let norm = Norm::Batch(BatchNorm::init(channels, device).unwrap());
        network.push_unit(format!("unit{i}"), *kernel, weight, norm, *activation);
    }
    let dtype = candle_core::DType::F32;
    network.push_head(
        Tensor::eye(channels, dtype, device).unwrap(),
        Tensor::zeros(channels, dtype, device).unwrap(),
    );
    network.validate().unwrap();
    Chain { network }
}

/// Adds the output of node `from` to that of node `to`, for all readers of `to`.
pub(crate) fn insert_sum(network: &mut Network, from: usize, to: usize) {
    for node in &mut network.nodes[to + 1..] {
        match node {
            Node::Unit(Unit { input, .. }) | Node::Pool(Pool { input, .. }) if *input >= to => *input += 1,
            _ => (),
        }
    }
    let (name, activation) = (network.nodes[to].name().into(), Activation::Identity);
    network.nodes.insert(to + 1, Node::Sum(Sum { name, inputs: [from, to], activation, quantizer: None }));
    network.validate().unwrap();
}

impl Chain {
    /// Sets the batch normalization of unit `i` to `[γ, β, μ, V]` of each channel.
    pub(crate) fn norm(mut self, i: usize, channels: &[[f32; 4]]) -> Self {
        let field =
            |k: usize| Tensor::from_iter(channels.iter().map(|channel| channel[k]), &Device::Cpu).unwrap();
        self.network.nodes[1 + i].unit_mut().unwrap().norm =
            Norm::Batch(BatchNorm { gamma: field(0), beta: field(1), mean: field(2), variance: field(3) });
        self
    }
}

/// A generator of nearly normal numbers.
pub(crate) struct Gaussian(ChaCha8Rng);

impl Gaussian {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn next(&mut self) -> f32 {
        (0..12).map(|_| self.0.random::<f32>()).sum::<f32>() - 6.0
    }
}

/// Returns images `[count, H, W, C]` of independent normal pixels.
pub(crate) fn gaussian_images(count: usize, network: &Network) -> Tensor {
    let [h, w, c] = network.input;
    let mut gaussian = Gaussian::new(7);
    let pixels: Vec<f32> = (0..count * h * w * c).map(|_| gaussian.next()).collect();
    Tensor::from_vec(pixels, (count, h, w, c), network.device()).unwrap()
}

/// Returns a MobileNet of width ¼ with random β and the running statistics of [`gaussian_images`].
///
/// Its γ spread over two orders of magnitude; some are negative and some are 0. Each is made once,
/// as its statistics take many passes.
pub(crate) fn mobilenet(version: Version, activation: Activation) -> Network {
    static MADE: Mutex<Vec<(Version, Activation, Network)>> = Mutex::new(Vec::new());
    let mut made = MADE.lock().unwrap();
    let found = made.iter().position(|of| (of.0, of.1) == (version, activation));
    let place = found.unwrap_or_else(|| {
        made.push((version, activation, settled(version, activation)));
        made.len() - 1
    });
    made[place].2.duplicate().unwrap()
}

fn settled(version: Version, activation: Activation) -> Network {
    let config = MobileNet { width: 0.25, activation, ..MobileNet::new(version, Input::Cifar, 10) };
    let mut network = config.init(3, &Device::Cpu).unwrap();
    let mut gaussian = Gaussian::new(11);
    for unit in network.units_mut() {
        let filters = unit.filters();
        let gamma: Vec<f32> = (0..filters)
            .map(|j| match gaussian.next().exp() {
                _ if zero_gamma(j) => 0.0,
                gamma if j % 16 == 9 => -gamma,
                gamma => gamma,
            })
            .collect();
        let beta: Vec<f32> = (0..filters).map(|_| gaussian.next()).collect();
        // The classifier has no normalization.
        let Norm::Batch(norm) = &mut unit.norm else { continue };
        norm.gamma = Tensor::new(gamma, &Device::Cpu).unwrap();
        norm.beta = Tensor::new(beta, &Device::Cpu).unwrap();
    }
    let images = gaussian_images(16, &network);
    for _ in 0..40 {
        network.forward_train(&images, Step::alone(0.1)).unwrap();
    }
    network
}

/// Returns whether the γ of this channel of [`mobilenet`] is 0.
pub(crate) fn zero_gamma(channel: usize) -> bool {
    channel % 16 == 5
}

/// Multiplies each output channel of a pair's first unit by a factor, and divides the weights that
/// read it, so that a ReLU network's outputs stay the same.
pub(crate) fn unbalance(
    network: &mut Network,
    [maker, reader]: [usize; 2],
    mut factor: impl FnMut(usize) -> f32,
) {
    let maker = network.nodes[maker].unit_mut().unwrap();
    let factors: Vec<f32> = (0..maker.filters()).map(&mut factor).collect();
    let factors = Tensor::new(factors, maker.weight.device()).unwrap();
    let Norm::Batch(norm) = &mut maker.norm else { unreachable!() };
    norm.gamma = (&norm.gamma * &factors).unwrap();
    norm.beta = (&norm.beta * &factors).unwrap();
    let reader = network.nodes[reader].unit_mut().unwrap();
    reader.weight = reader.kernel.scale_inputs(&reader.weight, &factors.recip().unwrap()).unwrap();
}

/// Returns the largest difference, relative to the largest |value|.
pub(crate) fn relative_difference(want: &Tensor, got: &Tensor) -> f32 {
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest(&(want - got).unwrap()) / largest(want)
}

/// Returns the mean of every channel of every unit before its activation, for a folded network. The
/// entry is empty for other nodes and for the classifier.
pub(crate) fn channel_means(network: &Network, images: &Tensor) -> Vec<Vec<f32>> {
    let mut means = vec![Vec::new(); network.nodes.len()];
    network
        .forward_observed(images, &mut |i, z, _| {
            if let (Some(Unit { norm: Norm::Bias(bias), .. }), Some(z)) = (network.nodes[i].unit(), z)
                && i != network.last()
            {
                means[i] = (z.mean((0, 1, 2))? + bias)?.to_vec1()?;
            }
            Ok(())
        })
        .unwrap();
    means
}
