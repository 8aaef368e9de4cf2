//! Whole training steps and evaluation with the GPU kernels compared with the CPU kernels:
//! emulated, and on a GPU if there is one. Maps of `bf16` on either are compared with floats.

use candle_core::{DType, Device, Tensor};
use kernels::gpu::emulation::{self, Order};
use kernels::loss::softmax_cross_entropy;
use kernels::sgd::{Rate, Rule, Update, step_all};
use models::{Fold, Input, Method, MobileNet, Network, Quantization, Step, Version, WeightGrid};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn quantization(activations: u32, weights: u32, fold: Fold) -> Quantization {
    let precision = |bits| Precision::try_from(bits).unwrap();
    let (first_layer, last_layer) = (precision(8), precision(8));
    Quantization {
        activations: precision(activations),
        weights: precision(weights),
        first_layer,
        last_layer,
        fold,
        ..Quantization::default()
    }
}

/// The results of some training steps, on the CPU.
struct Outcome {
    /// The loss of every step.
    losses: Vec<f64>,
    /// The gradients of the first step, by the parameters' names.
    gradients: Vec<(String, Vec<f64>)>,
    /// Every tensor of the network at the end.
    tensors: Vec<(String, Vec<f64>)>,
    /// The logits of the final network, with its running statistics.
    logits: Vec<f64>,
}

fn elements(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_device(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// Trains a network for some steps on `device`, on random images of a seed, with feature maps in
/// `dtype`.
fn train(network: &Network, device: &Device, dtype: DType, steps: usize, seed: u64) -> Outcome {
    let mut network = network.to_device(device).unwrap();
    // The side 14 becomes odd, 7, at the first stride of 2.
    let images = random(&[4, 14, 14, 3], seed).to_device(device).unwrap().to_dtype(dtype).unwrap();
    let labels = Tensor::new(&[3u32, 1, 4, 1], device).unwrap();
    let velocities: Vec<Tensor> =
        network.parameters().iter().map(|parameter| parameter.tensor.zeros_like().unwrap()).collect();
    let (mut losses, mut first) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let (logits, tape) = network.forward_train(&images, Step::alone(0.1)).unwrap();
        let result = softmax_cross_entropy(&logits, &labels, 0.1).unwrap();
        let gradients = network.backward(tape, &result.grad).unwrap();
        let parameters = network.parameters();
        if first.is_empty() {
            first = parameters
                .iter()
                .map(|p| (p.name.clone(), elements(gradients.of(p).unwrap())))
                .collect::<Vec<_>>();
        }
        let updates: Vec<Update<'_>> = parameters
            .iter()
            .zip(&velocities)
            .map(|(p, velocity)| {
                let grad = gradients.of(p).unwrap();
                Update { param: &p.tensor, grad, velocity, weight_decay: 1e-4 }
            })
            .collect();
        step_all(&updates, Rule { lr: Rate::Number(0.02), momentum: 0.9 }).unwrap();
        losses.push(elements(&result.loss)[0]);
    }
    let logits = elements(&network.forward(&images).unwrap());
    let tensors = network.tensors().into_iter().map(|(name, tensor)| (name, elements(tensor))).collect();
    Outcome { losses, gradients: first, tensors, logits }
}

/// Returns the distance of two vectors, relative to the second's norm.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = length(&mut a.iter().zip(b).map(|(a, b)| a - b));
    assert!(difference.is_finite(), "not a number");
    difference / length(&mut b.iter().copied()).max(1e-6)
}

fn all(named: &[(String, Vec<f64>)]) -> Vec<f64> {
    named.iter().flat_map(|(_, values)| values.iter().copied()).collect()
}

/// The relative tolerances between two implementations. `parameter` is for each gradient of the
/// first step, `gradients` for all of them together, and `tensors` for the tensors after the last
/// step. At least one of `batches` batches must be within the tolerances.
struct Tolerance {
    batches: u64,
    loss: f64,
    parameter: f64,
    gradients: f64,
    tensors: f64,
}

/// The tolerances for float maps: sums are in another order, which some 50 layers and channels of
/// little variance amplify.
const FLOAT: Tolerance =
    Tolerance { batches: 1, loss: 1e-4, parameter: 1e-2, gradients: 1e-3, tensors: 1e-3 };

/// The tolerances for levels. A value on the border between two levels may fall to either side, and
/// later values follow it. (On six batches at A8/W8, gradients were within 1e-4 on five, and off by
/// 0.3 on one.)
const LEVELS: Tolerance =
    Tolerance { batches: 3, loss: 2e-2, parameter: 0.6, gradients: 0.15, tensors: 2e-2 };

/// The tolerances for feature maps with 8 bits of precision.
const HALF: Tolerance = Tolerance { batches: 1, loss: 5e-2, parameter: 1.0, gradients: 0.25, tensors: 5e-2 };

/// The tolerances for levels and `bf16`: rounding moves values to other levels in every layer
/// (losses were off by 0.06, gradients by 0.55). Unrelated gradients would be off by 1.4, so the
/// gradient as a whole is still that of the same function.
const HALF_LEVELS: Tolerance =
    Tolerance { batches: 1, loss: 0.15, parameter: f64::INFINITY, gradients: 0.8, tensors: 5e-2 };

fn deep() -> Network {
    let config = MobileNet { width: 0.25, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    config.init(1, &Device::Cpu).unwrap()
}

/// Returns a network of the stem and three blocks. Each normalization of a few untrained images
/// amplifies rounding. After fifty normalizations, no bits of the gradients are left in half
/// precision.
fn shallow() -> Network {
    let config = MobileNet { width: 0.25, ..MobileNet::new(Version::V1, Input::Cifar, 10) };
    let mut network = config.init(1, &Device::Cpu).unwrap();
    // The image, the stem and the three blocks.
    network.nodes.truncate(1 + 7);
    let channels = network.units().last().unwrap().filters();
    network.push_head(random(&[channels, 10], 2), random(&[10], 3));
    network
}

fn check(
    name: &str,
    mut network: Network,
    prepare: impl Fn(&mut Network),
    dtype: DType,
    steps: usize,
    tolerance: &Tolerance,
) {
    prepare(&mut network);
    let compare = |place: &str, seed: u64, found: Outcome| -> Result<(), String> {
        let expected = train(&network, &Device::Cpu, DType::F32, steps, seed);
        let context = format!("{name}, {dtype:?}, {place}, batch {seed}");
        let loss = found.losses.iter().zip(&expected.losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let gradients = apart(&all(&found.gradients), &all(&expected.gradients));
        let tensors = apart(&all(&found.tensors), &all(&expected.tensors));
        let logits = apart(&found.logits, &expected.logits);
        eprintln!(
            "{context}: loss {loss:.1e}, gradients {gradients:.1e}, tensors {tensors:.1e}, logits {logits:.1e}"
        );
        let check = |what: &str, off: f64, most: f64| {
            if off <= most { Ok(()) } else { Err(format!("{context}: {what} off by {off:.2e}")) }
        };
        // Parameters whose shift a normalization removes have gradients of only rounding errors.
        let size = all(&expected.gradients).iter().map(|x| x * x).sum::<f64>().sqrt();
        for ((name, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
            let own = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            if own > 1e-3 * size {
                check(&format!("the gradient of {name}"), apart(found, expected), tolerance.parameter)?;
            }
        }
        check("losses", loss, tolerance.loss)?;
        check("gradients", gradients, tolerance.gradients)?;
        check("the trained network", tensors, tolerance.tensors)
    };
    let check = |place: &str, run: &dyn Fn(u64) -> Outcome| {
        let mut errors = Vec::new();
        for seed in 7..7 + tolerance.batches {
            match compare(place, seed, run(seed)) {
                Ok(()) => return,
                Err(message) => errors.push(message),
            }
        }
        panic!("{}", errors.join("\n"));
    };
    if dtype == DType::BF16 {
        check("on the CPU", &|seed| train(&network, &Device::Cpu, dtype, steps, seed));
    }
    match emulation::available() {
        Ok(()) => check("emulated", &|seed| {
            emulation::run(Order::Forward, || train(&network, &Device::Cpu, dtype, steps, seed))
        }),
        Err(message) => eprintln!("skipped: {message}"),
    }
    #[cfg(feature = "cuda")]
    match Device::new_cuda(0) {
        Ok(device) => check("on the GPU", &|seed| train(&network, &device, dtype, steps, seed)),
        Err(error) => eprintln!("skipped: no GPU answers: {error}"),
    }
}

#[test]
fn float_steps() {
    check("float", deep(), |_| (), DType::F32, 2, &FLOAT);
}

#[test]
fn quantized_steps() {
    let settings = quantization(4, 4, Fold::Unfolded);
    check("A4/W4", deep(), |network| network.quantize(&settings).unwrap(), DType::F32, 1, &LEVELS);
}

#[test]
fn quantized_steps_of_activations_alone() {
    let settings = quantization(4, 32, Fold::Unfolded);
    check("A4", deep(), |network| network.quantize(&settings).unwrap(), DType::F32, 1, &LEVELS);
}

#[test]
fn quantized_steps_with_folded_weights() {
    let settings = quantization(8, 8, Fold::BatchStatistics);
    check(
        "A8/W8, batch statistics",
        deep(),
        |network| network.quantize(&settings).unwrap(),
        DType::F32,
        1,
        &LEVELS,
    );
}

/// There are few layers, because rounding differences in a batch's statistics also move weights to
/// other levels.
#[test]
fn quantized_steps_folded_with_float_statistics() {
    let settings = quantization(8, 8, Fold::FloatStatistics);
    check(
        "A8/W8, float statistics",
        shallow(),
        |network| network.quantize(&settings).unwrap(),
        DType::F32,
        1,
        &LEVELS,
    );
}

#[test]
fn quantized_steps_with_grids_of_channels() {
    let settings = Quantization { weight_grid: WeightGrid::Channel, ..quantization(4, 4, Fold::Unfolded) };
    let quantize = |network: &mut Network| network.quantize(&settings).unwrap();
    check("A4/W4, grids of channels", deep(), quantize, DType::F32, 1, &LEVELS);
    check("A4/W4, grids of channels", shallow(), quantize, DType::BF16, 1, &HALF_LEVELS);
}

#[test]
fn steps_with_learned_quantizers() {
    for method in Method::learned() {
        let quantize = |network: &mut Network| {
            network.quantize(&Quantization { method, ..quantization(4, 4, Fold::Unfolded) }).unwrap();
            // The first batch sets the bounds.
            network.forward_train(&random(&[4, 14, 14, 3], 1), Step::alone(0.1)).unwrap();
        };
        check(&format!("{method:?}"), deep(), quantize, DType::F32, 1, &LEVELS);
        check(&format!("{method:?}"), shallow(), quantize, DType::BF16, 1, &HALF_LEVELS);
    }
}

#[test]
fn steps_with_a_bias() {
    let fold = |network: &mut Network| {
        // Statistics of images keep activations in range.
        for seed in 0..30 {
            network.forward_train(&random(&[4, 14, 14, 3], seed), Step::alone(0.1)).unwrap();
        }
        network.fold().unwrap();
    };
    check("bias", deep(), fold, DType::F32, 1, &FLOAT);
}

/// The GPU and the CPU kernels round at the same places, so they are closer to each other than to
/// float computations.
#[test]
fn half_precision_is_rounded_alike() {
    if let Err(message) = emulation::available() {
        return eprintln!("skipped: {message}");
    }
    let network = shallow();
    let here = || train(&network, &Device::Cpu, DType::BF16, 2, 7);
    let [floats, cpu, gpu] =
        [train(&network, &Device::Cpu, DType::F32, 2, 7), here(), emulation::run(Order::Forward, here)];
    let off = |a: &Outcome, b: &Outcome| apart(&all(&a.gradients), &all(&b.gradients));
    let (twins, rounding) = (off(&gpu, &cpu), off(&cpu, &floats));
    assert!(twins < 0.3 * rounding, "the twins are {twins:.1e} apart, and floats {rounding:.1e}");
}

#[test]
fn half_precision_has_the_same_bits_on_any_number_of_threads() {
    let mut network = shallow();
    for quantized in [false, true] {
        if quantized {
            network.quantize(&quantization(4, 4, Fold::Unfolded)).unwrap();
        }
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let outcome = pool.install(|| train(&network, &Device::Cpu, DType::BF16, 2, 7));
            (outcome.losses, outcome.gradients, outcome.tensors, outcome.logits)
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "quantized: {quantized}");
    }
}

#[test]
fn half_precision_maps() {
    check("float", shallow(), |_| (), DType::BF16, 2, &HALF);
    let settings = quantization(4, 4, Fold::Unfolded);
    check("A4/W4", shallow(), |network| network.quantize(&settings).unwrap(), DType::BF16, 1, &HALF_LEVELS);
}
