//! A network with branches that no MobileNet has, compared with plain Candle and its autograd:
//! projections on a shortcut, activations after sums, an output with three readers, caps of
//! channels.

use candle_core::{D, DType, Device, Tensor, Var};
use kernels::{Activation, loss::softmax_cross_entropy};
use models::{
    BatchNorm, Extras, Kernel, Method, Network, Node, Norm, Quantization, Quantizer, Step, Sum, Unit,
};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

const STEP: Step = Step::alone(0.1);

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn images() -> Tensor {
    random(&[6, 9, 9, 3], 1)
}

/// Adds a unit that reads `input` and returns its index.
fn unit(
    network: &mut Network,
    name: &str,
    input: usize,
    kernel: Kernel,
    filters: usize,
    act: Activation,
) -> usize {
    let seed = 10 * network.nodes.len() as u64;
    let dims = kernel.weight_dims(network.shapes()[input][2], filters);
    let mut norm = BatchNorm::init(filters, &Device::Cpu).unwrap();
    norm.gamma = ((random(&[filters], seed) * 0.4).unwrap() + 0.8).unwrap();
    norm.beta = (random(&[filters], seed + 1) * 0.5).unwrap();
    network.push_unit(name, kernel, random(&dims, seed + 2), Norm::Batch(norm), act);
    let last = network.last();
    network.nodes[last].unit_mut().unwrap().input = input;
    last
}

fn sum(network: &mut Network, name: &str, inputs: [usize; 2], activation: Activation) -> usize {
    network.nodes.push(Node::Sum(Sum { name: name.into(), inputs, activation, quantizer: None }));
    network.last()
}

fn network() -> Network {
    use Activation::{Identity, Relu, Relu6};
    use Kernel::{Depthwise, Full, Pointwise};
    let mut n = Network::of_image("branches", [9, 9, 3]);
    let stem = unit(&mut n, "stem", 0, Full { size: 3, stride: 1 }, 8, Relu);
    // The shortcut is the identity, and an activation follows the sum.
    let expand = unit(&mut n, "a.expand", stem, Pointwise, 12, Relu6);
    let depthwise_of_a = unit(&mut n, "a.depthwise", expand, Depthwise { stride: 1 }, 12, Relu6);
    let project = unit(&mut n, "a.project", depthwise_of_a, Pointwise, 8, Identity);
    let a = sum(&mut n, "a", [stem, project], Relu);
    // The shortcut has a projection.
    let depthwise = unit(&mut n, "b.depthwise", a, Depthwise { stride: 2 }, 8, Relu);
    let project = unit(&mut n, "b.project", depthwise, Pointwise, 16, Identity);
    let narrow = unit(&mut n, "b.narrow", a, Depthwise { stride: 2 }, 8, Identity);
    let shortcut = unit(&mut n, "b.shortcut", narrow, Pointwise, 16, Identity);
    let b = sum(&mut n, "b", [shortcut, project], Relu);
    // Two branches begin at the same node. One ends in a sum without an activation, which the
    // other's sum reads.
    let first = unit(&mut n, "c.first", b, Pointwise, 16, Relu);
    let first = sum(&mut n, "c", [first, b], Identity);
    let second = unit(&mut n, "d.second", b, Pointwise, 16, Identity);
    sum(&mut n, "d", [first, second], Relu6);
    n.push_head(random(&[16, 5], 3), random(&[5], 4));
    // Some values exceed the caps, also where a sum reads them.
    for node in [depthwise_of_a, shortcut, second] {
        let unit = n.nodes[node].unit_mut().unwrap();
        unit.cap = Some(((random(&[unit.filters()], node as u64) * 0.5).unwrap() + 0.7).unwrap());
    }
    n.validate().unwrap();
    n
}

fn labels() -> Tensor {
    Tensor::new(&[0u32, 1, 2, 3, 4, 0], &Device::Cpu).unwrap()
}

/// The network in float64 and NCHW, with variables as its parameters.
struct Reference<'a> {
    network: &'a Network,
    variables: HashMap<String, Var>,
}

impl<'a> Reference<'a> {
    fn new(network: &'a Network) -> Self {
        let variable = |p: models::Parameter| {
            (p.name, Var::from_tensor(&p.tensor.to_dtype(DType::F64).unwrap()).unwrap())
        };
        Self { network, variables: network.parameters().into_iter().map(variable).collect() }
    }

    fn get(&self, unit: &Unit, field: &str) -> &Tensor {
        &self.variables[&format!("{}.{field}", unit.name)]
    }

    /// Returns the output of a convolution, normalized with the batch's statistics, or with its
    /// bias added.
    fn unit(&self, unit: &Unit, x: &Tensor) -> candle_core::Result<Tensor> {
        let weight = self.get(unit, "weight");
        let (side, filters) = (unit.kernel.side(), unit.filters());
        if let Norm::Bias(_) = unit.norm {
            return x.matmul(weight)?.broadcast_add(self.get(unit, "bias"));
        }
        let groups = if unit.kernel.is_depthwise() { filters } else { 1 };
        let inputs = unit.input_channels() / groups;
        let weight = weight.reshape((side, side, inputs, filters))?.permute((3, 2, 0, 1))?.contiguous()?;
        let z = x.conv2d(&weight, (side - 1) / 2, unit.kernel.stride(), 1, groups)?;
        let centred = z.broadcast_sub(&z.mean_keepdim((0, 2, 3))?)?;
        let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
        let normalized = centred.broadcast_div(&(variance + self.network.epsilon)?.sqrt()?)?;
        let [gamma, beta] = ["gamma", "beta"].map(|field| self.get(unit, field).reshape((1, filters, 1, 1)));
        normalized.broadcast_mul(&gamma?)?.broadcast_add(&beta?)
    }

    fn logits(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let mut outputs: Vec<Tensor> = Vec::new();
        for node in &self.network.nodes {
            let y = match node {
                Node::Image(_) => images.to_dtype(DType::F64)?.permute((0, 3, 1, 2))?.contiguous()?,
                Node::Unit(unit) => self.unit(unit, &outputs[unit.input])?,
                Node::Sum(sum) => (&outputs[sum.inputs[0]] + &outputs[sum.inputs[1]])?,
                Node::Pool(pool) => outputs[pool.input].mean((2, 3))?,
            };
            let y = match node.activation() {
                Activation::Identity => y,
                Activation::Relu => y.relu()?,
                Activation::Relu6 => (y.relu()? - (y - 6.0)?.relu()?)?,
            };
            let y = match node.unit().and_then(|unit| unit.cap.as_ref()) {
                Some(cap) => {
                    let above =
                        y.broadcast_sub(&cap.to_dtype(DType::F64)?.reshape((1, (), 1, 1))?)?.relu()?;
                    (y - above)?
                }
                None => y,
            };
            outputs.push(match node.quantizer().and_then(Quantizer::range) {
                Some(range) => fake(&y, range, node.quantizer().unwrap().bits.max_level())?,
                None => y,
            });
        }
        Ok(outputs.pop().unwrap())
    }
}

/// Returns the uniformly quantized values, whose gradient passes where nothing is clamped.
fn fake(y: &Tensor, range: &Tensor, max_level: u32) -> candle_core::Result<Tensor> {
    let range = range.to_vec1::<f32>()?;
    let (lo, hi) = (f64::from(range[0].min(0.0)), f64::from(range[1].max(0.0)));
    let step = (hi - lo) / f64::from(max_level);
    let zero_point = (-lo / step).round_ties_even();
    let level = ((y / step)?.round()? + zero_point)?;
    let clamped = level.clamp(0.0, f64::from(max_level))?;
    let passed = (y * level.eq(&clamped)?.to_dtype(DType::F64)?)?;
    let value = ((clamped - zero_point)? * step)?;
    (value - &passed)?.detach() + &passed
}

/// Returns the distance of two tensors, relative to the second's norm, or to `least` if that is
/// larger.
fn apart(found: &Tensor, expected: &Tensor, least: f64) -> f64 {
    let length = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let found = found.to_dtype(DType::F64).unwrap();
    length((found - expected).unwrap()) / length(expected.clone()).max(least)
}

/// Checks that the logits of a training step and the gradients of all parameters match autograd.
#[track_caller]
fn check(network: &mut Network, tolerance: f64) {
    let (logits, tape) = network.forward_train(&images(), STEP).unwrap();
    let gradients = network.backward(tape, &softmax_cross_entropy(&logits, &labels(), 0.0).unwrap().grad);
    let gradients = gradients.unwrap();
    let reference = Reference::new(network);
    let expected = reference.logits(&images()).unwrap();
    let off = apart(&logits, &expected, 0.0);
    assert!(off < tolerance, "logits are off by {off:.1e}");
    let log_sum = expected.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap();
    let chosen = expected.gather(&labels().unsqueeze(1).unwrap(), 1).unwrap();
    let expected = (log_sum - chosen).unwrap().mean_all().unwrap().backward().unwrap();
    for parameter in network.parameters() {
        let expected = expected.get(&reference.variables[&parameter.name]).expect("it has a gradient");
        // The gradient of a shift before a normalization is zero except for rounding.
        let off = apart(gradients.of(&parameter).unwrap(), expected, 1e-3);
        assert!(off < tolerance, "the gradient of {} is off by {off:.1e}", parameter.name);
    }
}

/// The tolerance for float32 compared with float64: about 1e-6 for each layer.
const FLOAT: f64 = 1e-4;

#[test]
fn passes_are_those_of_autograd() {
    check(&mut network(), FLOAT);
}

/// A layer with an activation between the pooling and the classifier.
#[test]
fn a_hidden_layer_after_pooling_is_trained_too() {
    let mut network = network();
    let last = network.last();
    let hidden = network.nodes[last].unit_mut().unwrap();
    (hidden.name, hidden.activation) = ("hidden".into(), Activation::Relu);
    let bias = Norm::Bias(random(&[5], 6));
    network.push_unit("classifier", Kernel::Pointwise, random(&[5, 5], 5), bias, Activation::Identity);
    network.validate().unwrap();
    check(&mut network, FLOAT);
}

fn eight_bits(method: Method) -> Quantization {
    let eight = Precision::try_from(8).unwrap();
    Quantization {
        activations: eight,
        first_layer: eight,
        last_layer: eight,
        method,
        ..Quantization::default()
    }
}

/// If float32 and float64 are on different sides of a border between levels, which happens for some
/// of the thousands of values, a value is off by 1/255 of its range. A missing term would show as
/// 0.1 or more.
#[test]
fn passes_with_quantized_activations_are_those_of_autograd() {
    for linear in [None, Some(Precision::Float)] {
        let mut network = network();
        network.quantize(&Quantization { linear, ..eight_bits(Method::Uniform) }).unwrap();
        check(&mut network, 3e-2);
    }
}

/// Bottlenecks and sums have no activation function, unlike the other outputs.
#[test]
fn outputs_without_activation_function_have_their_own_bits() {
    let bits_of = |linear| -> HashMap<String, u32> {
        let mut network = network();
        network.quantize(&Quantization { linear, ..eight_bits(Method::Uniform) }).unwrap();
        network.forward_train(&images(), STEP).unwrap();
        network.ranges().unwrap().into_iter().map(|range| (range.node, range.bits.get())).collect()
    };
    let all = bits_of(None);
    // Only sums read the other linear outputs.
    assert!(all.len() > 6 && all["b.narrow"] == 8, "{all:?}");
    let mut few = all.clone();
    few.insert("b.narrow".into(), 3);
    assert_eq!(bits_of(Some(Precision::try_from(3).unwrap())), few);
    few.remove("b.narrow");
    assert_eq!(bits_of(Some(Precision::Float)), few);
}

/// Outputs that only sums read are not quantized, but the sums are. Learned quantizers are at the
/// same places.
#[test]
fn sums_are_quantized_in_place_of_their_summands() {
    for &method in Method::ALL {
        let mut network = network();
        network.quantize(&eight_bits(method)).unwrap();
        let without: Vec<&str> =
            network.nodes.iter().filter(|n| n.quantizer().is_none()).map(Node::name).collect();
        let summands = ["a.project", "b.project", "b.shortcut", "c.first", "c", "d.second", "head"];
        assert_eq!(without, summands, "{method:?}");
        let (logits, tape) = network.forward_train(&images(), STEP).unwrap();
        network.backward(tape, &logits).unwrap();
    }
}

/// Evaluation matches training on the same batch, because repeated steps move the running
/// statistics to the batch's. Observing the pass or reading the network from a file does not change
/// the result.
#[test]
fn evaluation_observed_or_not_is_what_a_file_gives_back() {
    for quantized in [false, true] {
        let mut network = network();
        if quantized {
            network.quantize(&eight_bits(Method::Uniform)).unwrap();
        }
        let mut trained = network.forward_train(&images(), STEP).unwrap().0;
        for _ in 0..200 {
            trained = network.forward_train(&images(), STEP).unwrap().0;
        }
        let evaluated = network.forward(&images()).unwrap();
        // The running variance is unbiased: for 25 positions of 6 images, it is larger by 150/149.
        let off = apart(&evaluated, &trained.to_dtype(DType::F64).unwrap(), 0.0);
        assert!(off < 0.05, "evaluation is off by {off:.1e}");

        let mut seen = 0;
        let observed = network.forward_observed(&images(), &mut |i, z, _| {
            assert_eq!((i, z.is_some()), (seen, network.nodes[i].unit().is_some()));
            seen += 1;
            Ok(())
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        network.save(&path, &Extras::default()).unwrap();
        let (read, _) = Network::load(&path, &Device::Cpu).unwrap();
        for other in [
            observed.unwrap(),
            read.forward(&images()).unwrap(),
            network.duplicate().unwrap().forward(&images()).unwrap(),
        ] {
            assert_eq!(other.to_vec2::<f32>().unwrap(), evaluated.to_vec2::<f32>().unwrap());
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).replace('\\', "");
        assert!(
            text.contains(r#""units":[],"residuals":[]"#) && text.contains(r#""nodes":[{"unit":"#),
            "{text:.2000}"
        );
        assert_eq!((read.macs(), read.readers()), (network.macs(), network.readers()));
    }
}

#[test]
fn what_the_passes_cannot_run_is_an_error() {
    let check = |spoil: &dyn Fn(&mut Network), place: &str, problem: &str| {
        let mut network = network();
        spoil(&mut network);
        let message = network.validate().unwrap_err().to_string();
        assert!(message.contains(place) && message.contains(problem), "{message}");
    };
    let unit = |network: &mut Network, name: &str, change: &dyn Fn(&mut Unit)| {
        change(network.units_mut().find(|unit| unit.name == name).unwrap());
    };
    check(&|n| unit(n, "b.project", &|u| u.input = 12), "b.project", "comes later");
    check(&|n| unit(n, "b.project", &|u| u.weight = random(&[7, 16], 1)), "b.project", "7 channels, but 8");
    let unread = |n: &mut Network| {
        let Node::Sum(sum) = &mut n.nodes[14] else { panic!("the last sum") };
        sum.inputs = [12, 12];
    };
    check(&unread, "d.second", "nothing reads");
    check(&|n| unit(n, "b.narrow", &|u| u.kernel = Kernel::Depthwise { stride: 1 }), "b", "[9, 9, 16]");
    check(&|n| unit(n, "a.project", &|u| u.name = "stem".into()), "stem.", "two tensors");
    check(&|n| drop(n.nodes.remove(0)), "stem", "must be the image");
    check(&|n| n.nodes.truncate(13), "c", "classifies");
    check(&|n| unit(n, "a.expand", &|u| u.cap = Some(random(&[3], 1))), "a.expand", "a cap of the shape [3]");
    let full = |u: &mut Unit| {
        u.kernel = Kernel::Full { size: 3, stride: 1 };
        u.weight = random(&[9 * 16, 16], 1);
    };
    check(&|n| unit(n, "c.first", &full), "c.first", "only a convolution of the image");
    check(&|n| n.push_head(random(&[5, 5], 1), random(&[5], 2)), "head", "was pooled before");
    let depthwise = |n: &mut Network| {
        let bias = Norm::Bias(random(&[5], 2));
        n.push_unit(
            "late",
            Kernel::Depthwise { stride: 1 },
            random(&[3, 3, 5], 1),
            bias,
            Activation::Identity,
        );
    };
    check(&depthwise, "late", "only a pointwise convolution may read a pooled map");
}
