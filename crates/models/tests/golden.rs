//! A whole network compared with PyTorch: outputs, gradients, three steps of training, evaluation.
//!
//! `golden/make_golden.py` defines the network independently (NCHW, float64, autograd) and writes
//! its results. Here, everything is float32 in NHWC. No value of the golden runs is so close to a
//! kink or to the border between two quantization levels that rounding could move it across. The
//! remaining differences are those of sums of up to some hundred products in another order and
//! precision.

use candle_core::{DType, Device, Tensor};
use kernels::{Activation, loss::softmax_cross_entropy, sgd};
use models::{BatchNorm, Fold, Kernel, Method, Network, Norm, Quantization, Step, WeightGrid};
use quant_core::Precision;
use std::collections::{HashMap, HashSet};

/// The tolerance between float32 and float64, relative to a tensor's largest element.
///
/// The rounding of a sum of `n` terms of order 1 is about `√n · 6e-8`, up to 1e-6 here, if its
/// terms cancel. 3e-7 was found in outputs, gradients and parameters; the rest is for machines that
/// sum in another order. A wrong term shows as 1e-3 or more.
const TOLERANCE: f64 = 4e-6;
/// The tolerance for DSQ. Its slopes multiply the rounding of positions of up to 15 steps, and the
/// gradients of its bounds are sums over a whole map that cancel (4.4e-6 was found).
const SOFT_TOLERANCE: f64 = 2e-5;
/// The smallest scale for relative differences. The gradient of a shift before a normalization is
/// zero except for the rounding of its terms (1e-8 was found). Other gradients are of order 0.1.
const SMALLEST: f64 = 1e-2;

/// The settings of `make_golden.py`.
const STEPS: usize = 3;
const RANGE_MOMENTUM: f64 = 0.1;
const RATE: f64 = 0.1;
const MOMENTUM: f64 = 0.9;
const DECAY: f64 = 4e-3;
const SMOOTHING: f64 = 0.1;

/// The values of one case.
struct Golden {
    case: &'static str,
    tolerance: f64,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn load(case: &'static str) -> Self {
        let bytes = include_bytes!("golden/golden.safetensors");
        let all = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap();
        let own = |(name, tensor): (String, Tensor)| {
            name.strip_prefix(case)?.strip_prefix('.').map(|name| (name.to_string(), tensor))
        };
        let tolerance = if case == "dsq" { SOFT_TOLERANCE } else { TOLERANCE };
        Self { case, tolerance, tensors: all.into_iter().filter_map(own).collect() }
    }

    fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{} has no {name}", self.case)).clone()
    }

    /// Returns the names after `prefix`.
    fn names(&self, prefix: &str) -> HashSet<String> {
        self.tensors.keys().filter_map(|name| Some(name.strip_prefix(prefix)?.to_string())).collect()
    }

    /// Checks that `found` is the golden value within the case's tolerance.
    #[track_caller]
    fn check(&self, name: &str, found: &Tensor) {
        let expected = self.get(name);
        assert_eq!(found.dims(), expected.dims(), "{}: shape of {name}", self.case);
        let elements = |tensor: &Tensor| -> Vec<f64> {
            tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let (found, expected) = (elements(found), elements(&expected));
        let scale = expected.iter().fold(SMALLEST, |a: f64, b| a.max(b.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(
                difference <= self.tolerance * scale,
                "{}: {name} is {found} and not {expected} at {i}, off by {:.1e} of the largest element",
                self.case,
                difference / scale
            );
        }
    }

    fn push_unit(&self, network: &mut Network, name: &str, kernel: Kernel, activation: Activation) {
        let tensor = |field: &str| self.get(&format!("start.{name}.{field}"));
        let norm = Norm::Batch(BatchNorm {
            gamma: tensor("gamma"),
            beta: tensor("beta"),
            mean: tensor("mean"),
            variance: tensor("variance"),
        });
        network.push_unit(name, kernel, tensor("weight"), norm, activation);
    }

    /// Returns the network at the start, without quantizers.
    fn network(&self) -> Network {
        use Activation::{Identity, Relu, Relu6};
        let images = self.get("images0");
        let [_, height, width, channels] = images.dims() else { panic!("images have four dimensions") };
        let mut network = Network::of_image("tiny", [*height, *width, *channels]);
        let shortcut = 1;
        for (name, kernel, activation) in [
            ("stem", Kernel::Full { size: 3, stride: 1 }, Relu6),
            ("block.expand", Kernel::Pointwise, Relu6),
            ("block.depthwise", Kernel::Depthwise { stride: 1 }, Relu6),
            ("block.project", Kernel::Pointwise, Identity),
            ("down.depthwise", Kernel::Depthwise { stride: 2 }, Relu),
            ("down.project", Kernel::Pointwise, Identity),
            ("last", Kernel::Pointwise, Relu6),
        ] {
            self.push_unit(&mut network, name, kernel, activation);
            if name == "block.project" {
                network.push_sum(shortcut);
            }
        }
        network.push_head(self.get("start.head.weight"), self.get("start.head.bias"));
        network.validate().unwrap();
        network
    }
}

/// Runs a case. `bits` are those of `[activations, weights, first layer, last layer]`, 32 for
/// float.
fn check(case: &'static str, bits: [u32; 4], fold: Fold, decay_norm: bool) {
    check_as(case, bits, decay_norm, Quantization { fold, ..Quantization::default() });
}

/// Runs a case like [`check`], with other settings of the quantization.
fn check_as(case: &'static str, bits: [u32; 4], decay_norm: bool, settings: Quantization) {
    let golden = Golden::load(case);
    let [activations, weights, first_layer, last_layer] = bits.map(|bits| Precision::try_from(bits).unwrap());
    let mut network = golden.network();
    network.quantize(&Quantization { activations, weights, first_layer, last_layer, ..settings }).unwrap();

    let parameters = network.parameters();
    let names: HashSet<_> = parameters.iter().map(|p| p.name.clone()).collect();
    assert_eq!(names, golden.names("gradient."), "{case}: parameters");
    let velocities: Vec<_> = parameters.iter().map(|p| p.tensor.zeros_like().unwrap()).collect();
    for step in 0..STEPS {
        let images = golden.get(&format!("images{step}"));
        let labels = golden.get(&format!("labels{step}")).to_dtype(DType::U32).unwrap();
        let (logits, tape) = network.forward_train(&images, Step::alone(RANGE_MOMENTUM)).unwrap();
        golden.check(&format!("logits{step}"), &logits);
        let result = softmax_cross_entropy(&logits, &labels, SMOOTHING).unwrap();
        golden.check(&format!("loss{step}"), &result.loss);
        let gradients = network.backward(tape, &result.grad).unwrap();
        for (parameter, velocity) in parameters.iter().zip(&velocities) {
            let gradient = gradients.of(parameter).unwrap();
            if step == 0 {
                golden.check(&format!("gradient.{}", parameter.name), gradient);
            }
            let decay = if parameter.role.decays(decay_norm) { DECAY } else { 0.0 };
            sgd::step(&parameter.tensor, gradient, velocity, RATE, MOMENTUM, decay).unwrap();
        }
    }
    let state = network.tensors();
    let names: HashSet<_> = state.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(names, golden.names("end."), "{case}: tensors");
    for (name, tensor) in state {
        golden.check(&format!("end.{name}"), tensor);
    }
    golden.check("evaluated", &network.forward(&golden.get(&format!("images{}", STEPS - 1))).unwrap());
}

#[test]
fn float() {
    check("float", [32; 4], Fold::Unfolded, true);
}

#[test]
fn quantized_activations() {
    check("activations", [4, 32, 5, 6], Fold::Unfolded, true);
}

#[test]
fn quantized_weights_as_they_are() {
    check("unfolded", [4, 4, 5, 6], Fold::Unfolded, false);
}

/// The grid is that of the filters times `γ/√(V+ε)`, while normalization stays live.
#[test]
fn quantized_weights_on_the_folded_grid() {
    check("folded", [4, 4, 5, 6], Fold::BatchStatistics, false);
}

/// Filters are folded with the statistics of a convolution by the float weights, and gradients go
/// through both convolutions.
#[test]
fn quantized_weights_folded_with_float_statistics() {
    check("float_statistics", [4, 4, 5, 6], Fold::FloatStatistics, false);
}

/// Normalization is folded permanently, and biases are learned instead.
#[test]
fn quantized_weights_with_normalization_folded() {
    check("frozen", [4, 4, 5, 6], Fold::Frozen, false);
}

/// Each output channel has its own grid, in the first layer and the classifier, too.
#[test]
fn quantized_weights_by_channels() {
    let settings = Quantization { weight_grid: WeightGrid::Channel, ..Quantization::default() };
    check_as("channels", [4, 4, 5, 6], false, settings);
}

/// α decays like the weights, although γ, β and biases do not decay here.
#[test]
fn pact() {
    check_as("pact", [4, 4, 5, 6], false, Quantization { method: Method::Pact, ..Quantization::default() });
}

/// Bounds and softness do not decay, although γ, β and biases do here.
#[test]
fn dsq() {
    check_as("dsq", [4, 4, 5, 6], true, Quantization { method: Method::Dsq, ..Quantization::default() });
}

/// Steps and offsets do not decay, although γ, β and biases do here.
#[test]
fn lsq() {
    check_as("lsq", [4, 4, 5, 6], true, Quantization { method: Method::Lsq, ..Quantization::default() });
}

/// The cases differ from each other: the grid of the folded filters changes the logits.
#[test]
fn cases_are_told_apart() {
    let golden = Golden::load("folded");
    let mut network = golden.network();
    let precision = |bits: u32| Precision::try_from(bits).unwrap();
    network
        .quantize(&Quantization {
            activations: precision(4),
            weights: precision(4),
            first_layer: precision(5),
            last_layer: precision(6),
            ..Quantization::default()
        })
        .unwrap();
    let (logits, _) = network.forward_train(&golden.get("images0"), Step::alone(RANGE_MOMENTUM)).unwrap();
    let difference = (logits - golden.get("logits0")).unwrap().abs().unwrap().max_all().unwrap();
    assert!(
        difference.to_scalar::<f32>().unwrap() > 1e-2,
        "the grid of the folded filters makes no difference"
    );
}
