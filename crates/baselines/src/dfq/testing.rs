//! Networks and data for the tests.

use candle_core::{Device, Tensor};
use kernels::Activation;
use models::{
    BatchNorm, Fold, Head, Input, Kernel, MobileNet, Network, Norm, Quantization, Step, Unit, Version,
};
use quant_core::{Bits, Precision};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Everything at `bits` bits.
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

/// A network of hand-written units; see [`chain`].
pub(crate) struct Chain {
    pub(crate) network: Network,
}

/// A network whose unit `i` has the given kernel, activation and weights, batch normalization that
/// changes (nearly) nothing, and whose logits are the pooled features.
pub(crate) fn chain(input_channels: usize, units: &[(Kernel, Activation)], weights: &[&[f32]]) -> Chain {
    let device = &Device::Cpu;
    let mut channels = input_channels;
    let mut built = Vec::new();
    for (i, ((kernel, activation), weight)) in units.iter().zip(weights).enumerate() {
        let filters = weight.len() / kernel.taps() / if kernel.is_depthwise() { 1 } else { channels };
        let shape = kernel.weight_dims(channels, filters);
        channels = filters;
        let fill = |value: f32| Tensor::full(value, channels, device).unwrap();
        built.push(Unit {
            name: format!("unit{i}"),
            kernel: *kernel,
            weight: Tensor::from_slice(weight, shape, device).unwrap(),
            weight_quantizer: None,
            norm: Norm::Batch(BatchNorm {
                gamma: fill(1.0),
                beta: fill(0.0),
                mean: fill(0.0),
                variance: fill(1.0),
            }),
            activation: *activation,
            output_quantizer: None,
        });
    }
    let head = Head {
        input_quantizer: None,
        weight: Tensor::eye(channels, candle_core::DType::F32, device).unwrap(),
        weight_quantizer: None,
        bias: Tensor::zeros(channels, candle_core::DType::F32, device).unwrap(),
    };
    let network = Network {
        name: "chain".into(),
        input: [6, 6, input_channels],
        input_quantizer: None,
        units: built,
        residuals: Vec::new(),
        head,
        epsilon: 1e-5,
    };
    network.validate().unwrap();
    Chain { network }
}

impl Chain {
    /// Gives unit `i` the batch normalization `[γ, β, μ, V]` of each channel.
    pub(crate) fn norm(mut self, i: usize, channels: &[[f32; 4]]) -> Self {
        let field =
            |k: usize| Tensor::from_iter(channels.iter().map(|channel| channel[k]), &Device::Cpu).unwrap();
        self.network.units[i].norm =
            Norm::Batch(BatchNorm { gamma: field(0), beta: field(1), mean: field(2), variance: field(3) });
        self
    }
}

/// Nearly normal numbers from a seed.
pub(crate) struct Gaussian(ChaCha8Rng);

impl Gaussian {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn next(&mut self) -> f32 {
        (0..12).map(|_| self.0.random::<f32>()).sum::<f32>() - 6.0
    }
}

/// Images `[count, H, W, C]` of independent normal pixels.
pub(crate) fn gaussian_images(count: usize, network: &Network) -> Tensor {
    let [h, w, c] = network.input;
    let mut gaussian = Gaussian::new(7);
    let pixels: Vec<f32> = (0..count * h * w * c).map(|_| gaussian.next()).collect();
    Tensor::from_vec(pixels, (count, h, w, c), network.device()).unwrap()
}

/// A MobileNet of width ¼ whose γ spread over two orders of magnitude, some negative and some 0, with
/// random β and with the running statistics of [`gaussian_images`].
pub(crate) fn mobilenet(version: Version, activation: Activation) -> Network {
    let config = MobileNet { width: 0.25, activation, ..MobileNet::new(version, Input::Cifar, 10) };
    let mut network = config.init(3, &Device::Cpu).unwrap();
    let mut gaussian = Gaussian::new(11);
    for unit in &mut network.units {
        let filters = unit.filters();
        let gamma: Vec<f32> = (0..filters)
            .map(|j| match gaussian.next().exp() {
                _ if zero_gamma(j) => 0.0,
                gamma if j % 16 == 9 => -gamma,
                gamma => gamma,
            })
            .collect();
        let beta: Vec<f32> = (0..filters).map(|_| gaussian.next()).collect();
        let Norm::Batch(norm) = &mut unit.norm else { unreachable!() };
        norm.gamma = Tensor::new(gamma, &Device::Cpu).unwrap();
        norm.beta = Tensor::new(beta, &Device::Cpu).unwrap();
    }
    let images = gaussian_images(16, &network);
    for _ in 0..40 {
        network.forward_train(&images, Step { range_momentum: 0.1 }).unwrap();
    }
    network
}

/// The channels of [`mobilenet`] whose γ is 0.
pub(crate) fn zero_gamma(channel: usize) -> bool {
    channel % 16 == 5
}

/// Multiplies the outputs of unit `first`, a channel each, and divides the weights that read them, so
/// that a ReLU network's outputs stay the same.
pub(crate) fn unbalance(network: &mut Network, first: usize, mut factor: impl FnMut(usize) -> f32) {
    let factors: Vec<f32> = (0..network.units[first].filters()).map(&mut factor).collect();
    let factors = Tensor::new(factors, network.device()).unwrap();
    let Norm::Batch(norm) = &mut network.units[first].norm else { unreachable!() };
    norm.gamma = (&norm.gamma * &factors).unwrap();
    norm.beta = (&norm.beta * &factors).unwrap();
    let reader = &mut network.units[first + 1];
    reader.weight = reader.kernel.scale_inputs(&reader.weight, &factors.recip().unwrap()).unwrap();
}

/// The largest difference, as a share of the largest |value|.
pub(crate) fn relative_difference(want: &Tensor, got: &Tensor) -> f32 {
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest(&(want - got).unwrap()) / largest(want)
}

/// The mean of every channel of every unit before its activation, of a folded network.
pub(crate) fn channel_means(network: &Network, images: &Tensor) -> Vec<Vec<f32>> {
    let mut means = Vec::new();
    network
        .forward_observed(images, &mut |i, z, _| {
            let Norm::Bias(bias) = &network.units[i].norm else { unreachable!() };
            means.push((z.mean((0, 1, 2))? + bias)?.to_vec1()?);
            Ok(())
        })
        .unwrap();
    means
}
