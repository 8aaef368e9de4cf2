//! Tests of every operation's GPU side against its CPU twin, on a GPU (`cuda.rs`) or emulated
//! (`emulation.rs`).

use candle_core::{DType, Device, Tensor};
use kernels::augment::{self, Views};
use kernels::norm::{BatchNormalization, Epilogue, Running};
use kernels::sgd::{Rate, Rule, Update};
use kernels::{Activation, FeatureMap, Quantizer, Weight};
use kernels::{
    bias, cap, depthwise, dorefa, dsq, im2col, loss, lsq, norm, pact, pointwise, pool, quantize, residual,
    sgd,
};
use quant_core::Bits;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Calls a macro with the names of the tests in this file whose maps may be of either dtype.
macro_rules! of_maps {
    ($of_each:ident) => {
        $of_each! {
            convolutions
            products
            normalization
            quantizers
            learned_quantizers
            caps
            residuals_and_pooling
            patches
        }
    };
}
pub(crate) use of_maps;

/// Calls a macro with the names of all tests in this file.
macro_rules! all {
    ($of_each:ident) => {
        twin::of_maps!($of_each);
        $of_each! {
            statistics_at_every_scale
            losses
            biases
            descent
            augmentation
            finite_differences
        }
    };
}
pub(crate) use all;

/// The place where the other twin runs.
pub trait Other {
    /// Returns a copy of a tensor there.
    fn to(&self, tensor: &Tensor) -> Tensor;

    /// Returns the results of an operation there.
    fn run(&self, operation: &dyn Fn() -> Vec<Tensor>) -> Vec<Tensor>;

    /// Returns whether this is the CPU itself, on which `f32` results need no comparison.
    fn is_the_cpu(&self) -> bool {
        false
    }
}

/// Odd maps, a single position, and small batches.
const MAPS: [[usize; 3]; 6] = [[1, 1, 1], [2, 1, 5], [1, 6, 1], [3, 4, 4], [2, 5, 8], [1, 9, 6]];

/// Numbers of channels: less than a vector, odd, whole vectors, and more than one block takes.
const CHANNELS: [usize; 6] = [1, 3, 4, 16, 33, 48];

/// Maps that take several blocks along rows and along channels, and several strips.
const LARGE: [[usize; 4]; 4] = [[6, 41, 40, 33], [2, 33, 19, 132], [5, 7, 7, 700], [3, 18, 17, 24]];

const ACTIVATIONS: [Activation; 3] = [Activation::Identity, Activation::Relu, Activation::Relu6];

/// The tolerance of results that must be equal.
const SAME: f64 = 0.0;

/// The tolerance of sums in another order.
const SUMS: f64 = 2e-6;

/// The tolerance of results that are stored in bf16, computed from sums of bf16.
const BF16: f64 = 8e-3;

fn shapes() -> Vec<[usize; 4]> {
    let small = MAPS.into_iter().flat_map(|[n, h, w]| CHANNELS.map(|c| [n, h, w, c]));
    small.chain(LARGE).collect()
}

/// Returns values in [−1, 1).
fn random(seed: u64, dims: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn bits(bits: u32) -> Bits {
    Bits::new(bits).unwrap()
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

/// Compares the results of `operation(maps, others)` on the CPU and there, where `maps` are stored
/// in `dtype`.
///
/// `tolerance` has the allowed difference of each result, relative to its largest element (or 1, if
/// that is smaller).
#[track_caller]
fn check_as(
    other: &dyn Other,
    dtype: DType,
    context: &str,
    maps: &[&Tensor],
    others: &[&Tensor],
    tolerance: &[f64],
    operation: impl Fn(&[Tensor], &[Tensor]) -> kernels::Result<Vec<Tensor>>,
) {
    if other.is_the_cpu() && dtype == DType::F32 {
        return;
    }
    let context = format!("{context}, {dtype:?}");
    // The CPU gets the same values, as `f32`.
    let cpu: Vec<Tensor> =
        maps.iter().map(|map| map.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()).collect();
    let there: Vec<Tensor> = maps.iter().map(|map| other.to(&map.to_dtype(dtype).unwrap())).collect();
    let others_cpu: Vec<Tensor> = others.iter().map(|tensor| tensor.copy().unwrap()).collect();
    let expected = operation(&cpu, &others_cpu).unwrap_or_else(|e| panic!("{context}: on the CPU: {e}"));
    let found = other.run(&|| {
        // Copies, because operations may work in place and be run more than once.
        let others: Vec<Tensor> = others.iter().map(|tensor| other.to(tensor)).collect();
        operation(&there, &others).unwrap_or_else(|e| panic!("{context}: {e}"))
    });
    assert_eq!((found.len(), expected.len()), (tolerance.len(), tolerance.len()), "{context}");
    for (k, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found.dims(), expected.dims(), "{context}: result {k}");
        let (found, expected) = (elements(found), elements(expected));
        let scale = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let close =
                (found - expected).abs() <= tolerance[k] * scale || found.is_nan() && expected.is_nan();
            assert!(close, "{context}: {found} and not {expected} at {i} of result {k}");
        }
    }
}

/// Calls [`check_as`] with `f32` maps and with `bf16` maps, each with its own tolerances.
#[track_caller]
fn check(
    other: &dyn Other,
    context: &str,
    maps: &[&Tensor],
    others: &[&Tensor],
    [float, half]: [&[f64]; 2],
    operation: impl Fn(&[Tensor], &[Tensor]) -> kernels::Result<Vec<Tensor>>,
) {
    check_as(other, DType::F32, context, maps, others, float, &operation);
    check_as(other, DType::BF16, context, maps, others, half, &operation);
}

pub fn convolutions(other: &dyn Other) {
    let range = tensor(&[-0.7, 0.9]);
    for dims in shapes() {
        let [n, h, width, c] = dims;
        let w = random(2, &[3, 3, c]);
        for stride in [1, 2] {
            let context = format!("depthwise {dims:?}, stride {stride}");
            let x = random(1, &dims);
            let gz = random(3, &[n, (h - 1) / stride + 1, (width - 1) / stride + 1, c]);
            // The gradients of the weight are sums over many positions; their tolerance is relative
            // to the sums, not to the terms.
            check(other, &context, &[&x, &gz], &[&w], [&[SUMS; 3], &[BF16, BF16, SUMS]], |maps, others| {
                Ok(vec![
                    depthwise::forward(&maps[0], &others[0], stride)?,
                    depthwise::grad_input(&maps[1], &others[0], stride, (h, width))?,
                    depthwise::grad_weight(&maps[0], &maps[1], stride)?,
                ])
            });
            check_as(other, DType::F32, &context, &[&x], &[&w, &range], &[SUMS; 5], |maps, others| {
                let quant = Quantizer { range: &others[1], bits: bits(4) };
                let levels = FeatureMap::quantize(&maps[0], Some(quant))?;
                let (z, stats) = depthwise::forward_stats(&levels, &others[0], stride)?;
                Ok(vec![z, stats.mean, stats.variance, stats.min, stats.max])
            });
            // In bf16 the sums are of whole numbers, so they are as exact as sums of floats.
            check(other, &context, &[&x, &gz], &[&w, &range], [&[SUMS]; 2], |maps, others| {
                let quant = Quantizer { range: &others[1], bits: bits(4) };
                let levels = FeatureMap::quantize(&maps[0], Some(quant))?;
                Ok(vec![depthwise::grad_weight(&levels, &maps[1], stride)?])
            });
            // The statistics must be those of the stored output.
            let found = other.run(&|| {
                let (x, w) = (other.to(&x.to_dtype(DType::BF16).unwrap()), other.to(&w));
                let (z, stats) = depthwise::forward_stats(&x, &w, stride).unwrap();
                let of_z = norm::channel_stats(&z).unwrap();
                vec![
                    stats.mean,
                    stats.variance,
                    stats.min,
                    stats.max,
                    of_z.mean,
                    of_z.variance,
                    of_z.min,
                    of_z.max,
                ]
            });
            for k in 0..4 {
                for (a, b) in elements(&found[k]).into_iter().zip(elements(&found[k + 4])) {
                    assert!(
                        (a - b).abs() <= 1e-6 * b.abs().max(1.0),
                        "{context}: statistics: {a} and not {b}"
                    );
                }
            }
        }
    }
}

pub fn products(other: &dyn Other) {
    let (x_range, w_range) = (tensor(&[-0.7, 0.9]), tensor(&[-0.8, 0.6]));
    for (dims, outputs) in [([1, 1, 1, 3], 1), ([2, 5, 8, 7], 16), ([3, 4, 4, 33], 48), ([2, 9, 6, 24], 100)]
    {
        let (x, w) = (random(1, &dims), random(2, &[dims[3], outputs]));
        let gz = random(3, &[dims[0], dims[1], dims[2], outputs]);
        let context = format!("pointwise {dims:?} to {outputs}");
        check(other, &context, &[&x, &gz], &[&w], [&[SUMS; 3], &[BF16, BF16, SUMS]], |maps, others| {
            Ok(vec![
                pointwise::forward(&maps[0], &others[0])?,
                pointwise::grad_input(&maps[1], &others[0])?,
                pointwise::grad_weight(&maps[0], &maps[1])?,
            ])
        });
        // Products of levels are exact, and stored exactly in f32; products with 8-bit weights are
        // computed in floats.
        let ends = [(random(6, &[outputs]) - 0.5).unwrap(), (random(7, &[outputs]) + 0.5).unwrap()];
        let of_channels = Tensor::stack(&ends, 0).unwrap();
        let cases = [(4, 4, true), (8, 7, true), (3, 2, true), (4, 8, false)];
        for ((x_bits, w_bits, exact), w_range) in
            cases.into_iter().flat_map(|case| [(case, &w_range), (case, &of_channels)])
        {
            let context = format!("{context}, {x_bits} by {w_bits} bits, range {:?}", w_range.dims());
            let tolerance = [if exact { SAME } else { SUMS }, SUMS];
            check(
                other,
                &context,
                &[&x, &gz],
                &[&w, &x_range, w_range],
                [&tolerance, &[BF16, SUMS]],
                |maps, others| {
                    let quant = Quantizer { range: &others[1], bits: bits(x_bits) };
                    let levels = FeatureMap::quantize(&maps[0], Some(quant))?;
                    let quant = Quantizer { range: &others[2], bits: bits(w_bits) };
                    let value = quantize::forward(&others[0], quant)?;
                    let weight = Weight { value: &value, quantized: Some((&others[0], quant)) };
                    Ok(vec![pointwise::forward(&levels, weight)?, pointwise::grad_weight(&levels, &maps[1])?])
                },
            );
        }
        let (gamma, beta) = ((random(4, &[outputs]) + 1.5).unwrap(), random(5, &[outputs]));
        check_as(
            other,
            DType::F32,
            &context,
            &[&x, &gz],
            &[&w, &gamma, &beta],
            &[1e-5, 1e-5, 1e-5],
            |maps, others| {
                let (z, stats) = pointwise::forward_stats(&maps[0], &others[0])?;
                // With one row the gradient of the normalization is nothing but rounding error.
                let epsilon = if dims[0] * dims[1] * dims[2] == 1 { 1.0 } else { 1e-2 };
                let of_batch = BatchNormalization::new(&stats, &others[1], &others[2], epsilon)?;
                let epilogue = Epilogue::batch(&z, &of_batch, Activation::Identity, None)?;
                let gz = epilogue.backward(&maps[1].clone().into())?.z;
                let (gw, gx) = pointwise::backward(&maps[0], &others[0], &gz, None)?;
                let affine = (&of_batch.scale, &of_batch.shift);
                let y = pointwise::forward_normalized(&maps[0], &others[0], affine, Activation::Relu6, None)?;
                Ok(vec![gw, gx.tensor, y.to_float()?])
            },
        );
    }
}

pub fn normalization(other: &dyn Other) {
    let range = tensor(&[-0.5, 2.5]);
    for dims in shapes() {
        let (c, rows) = (dims[3], dims[0] * dims[1] * dims[2]);
        let (z, gy) = (random(1, &dims), random(2, &dims));
        let (gamma, beta) = ((random(3, &[c]) + 2.0).unwrap(), (random(4, &[c]) + 1.0).unwrap());
        let (old_mean, old_variance) = (random(5, &[c]), (random(6, &[c]) + 1.5).unwrap());
        let context = format!("norm {dims:?}");
        check(other, &context, &[&z], &[], [&[SUMS, SUMS, SAME, SAME]; 2], |maps, _| {
            let stats = norm::channel_stats(&maps[0])?;
            Ok(vec![stats.mean, stats.variance, stats.min, stats.max])
        });
        // With given statistics, because the twins' own sums already differ.
        let stats = norm::channel_stats(&z).unwrap();
        let fixed =
            [&stats.mean, &stats.variance, &stats.min, &stats.max, &gamma, &beta, &old_mean, &old_variance];
        check_as(other, DType::F32, &context, &[], &fixed, &[SAME; 6], |_, others| {
            let [mean, variance, min, max] = std::array::from_fn(|i| others[i].clone());
            let stats = norm::Stats { mean, variance, min, max };
            let running = Running { mean: others[6].clone(), variance: others[7].clone() };
            let norm = norm::prepare(&stats, &others[4], &others[5], 1e-5, &running, 0.1, rows)?;
            let range = norm::output_range(&stats, &norm.scale, &norm.shift, Activation::Relu6)?;
            Ok(vec![norm.inv_std, norm.scale, norm.shift, running.mean, running.variance, range])
        });
        let of_batch = BatchNormalization::new(&stats, &gamma, &beta, 1e-2).unwrap();
        let BatchNormalization { mean, inv_std, scale, shift } = &of_batch;
        for act in ACTIVATIONS {
            for quantized in [false, true] {
                let context = format!("{context}, {act:?}, quantized: {quantized}");
                let others = [mean, inv_std, scale, shift, &range];
                // Floats are rounded when they are stored; levels must be equal.
                let stored = if quantized { SAME } else { BF16 };
                let gradients = [stored, BF16, SUMS, SUMS, BF16, SUMS];
                let float = [SAME, 1e-5, SUMS, SUMS, 1e-5, SUMS];
                check(other, &context, &[&z, &gy], &others, [&float, &gradients], |maps, others| {
                    let quant = quantized.then(|| Quantizer { range: &others[4], bits: bits(4) });
                    let [mean, inv_std, scale, shift] = std::array::from_fn(|i| others[i].clone());
                    let y = norm::forward(&maps[0], &scale, &shift, act, quant)?;
                    let y = match &y {
                        FeatureMap::Levels(levels) => levels.levels.clone(),
                        y => y.to_float()?,
                    };
                    let of_batch =
                        BatchNormalization { mean, inv_std, scale: scale.clone(), shift: shift.clone() };
                    let gy = maps[1].clone().into();
                    let batch = Epilogue::batch(&maps[0], &of_batch, act, quant)?.backward(&gy)?;
                    let affine = Epilogue::affine(&maps[0], &scale, &shift, act, quant)?.backward(&gy)?;
                    let gamma = batch.gamma.expect("statistics of the batch");
                    Ok(vec![y, batch.z.tensor()?, gamma, batch.shift, affine.z.tensor()?, affine.shift])
                });
            }
        }
    }
}

/// Checks variances of every magnitude, variances that are tiny compared with the mean, and
/// constant channels, as on the CPU.
pub fn statistics_at_every_scale(other: &dyn Other) {
    for (rows, c) in [(1, 3), (7, 16), (1000, 33), (9001, 48), (333, 260), (40_000, 1)] {
        let noise = elements(&random(rows as u64, &[rows, c]));
        let run = |context: &str, f: &dyn Fn(usize, f64) -> f64| {
            let values: Vec<f32> = noise.iter().enumerate().map(|(i, x)| f(i % c, *x) as f32).collect();
            let z = Tensor::from_vec(values.clone(), (rows, c), &Device::Cpu).unwrap();
            let found = other.run(&|| {
                let stats = norm::channel_stats(&other.to(&z)).unwrap();
                vec![stats.mean, stats.variance]
            });
            let (mean, variance) = (elements(&found[0]), elements(&found[1]));
            for i in 0..c {
                let channel = || values.iter().skip(i).step_by(c).map(|z| f64::from(*z));
                let exact_mean = channel().sum::<f64>() / rows as f64;
                let exact = channel().map(|z| (z - exact_mean).powi(2)).sum::<f64>() / rows as f64;
                let context = format!("{rows}×{c}, {context}, channel {i}");
                let off = (mean[i] - exact_mean).abs();
                assert!(off <= 1e-7 * exact_mean.abs() + 1e-6 * exact.sqrt(), "{context}: mean off by {off}");
                let off = (variance[i] - exact).abs();
                assert!(off <= 3e-6 * exact + 1e-45, "{context}: {} and not {exact}", variance[i]);
            }
        };
        run("noise", &|_, x| x);
        run("far from 0", &|channel, x| 1e4 + channel as f64 + 0.05 * x);
        run("small beside 1", &|channel, x| 1.0 + channel as f64 + 1e-5 * x);
        run("tiny", &|channel, x| 10f64.powi(-(channel as i32 % 22)) * x);
        run("every size", &|channel, x| 10f64.powi(15 - channel as i32 % 30) * (x + 0.5));
        run("sparse", &|_, x| if x > 0.99 { x } else { 0.0 });
        run("constant", &|channel, _| 0.1 + channel as f64 * 1.7e-3);
    }
    // The variance of a constant channel is exactly 0.
    let z = Tensor::full(0.1f32, (5003, 6), &Device::Cpu).unwrap();
    let found = other.run(&|| vec![norm::channel_stats(&other.to(&z)).unwrap().variance]);
    assert_eq!(elements(&found[0]), [0.0; 6]);
}

pub fn quantizers(other: &dyn Other) {
    for (lo, hi) in [(0.0f32, 0.75), (-0.5, 0.25), (-0.9, 0.95), (0.0, 0.0), (-1e-3, 2e-3)] {
        for b in [2, 3, 4, 8] {
            for len in [1, 7, 256, 40_001, 100_000] {
                let context = format!("quantize {len} over [{lo}, {hi}] at {b} bits");
                let (x, gy, range) = (random(1, &[len]), random(2, &[len]), tensor(&[lo, hi]));
                check(
                    other,
                    &context,
                    &[&x, &gy],
                    &[&range],
                    [&[SAME; 5], &[SAME, BF16, SAME, SAME, BF16]],
                    |maps, others| {
                        let quant = Quantizer { range: &others[0], bits: bits(b) };
                        let map = FeatureMap::quantize(&maps[0], Some(quant))?;
                        let FeatureMap::Levels(levels) = &map else { panic!("not quantized") };
                        Ok(vec![
                            levels.levels.clone(),
                            map.to_float()?,
                            quantize::backward(&maps[0], &maps[1], quant)?,
                            quantize::min_max(&maps[0])?,
                            quantize::forward(&maps[0], quant)?,
                        ])
                    },
                );
            }
        }
    }
    for (rows, channels) in [(1, 1), (9, 3), (5, 16), (700, 70)] {
        let (x, gy) = (random(1, &[rows, channels]), random(2, &[rows, channels]));
        let ends = [(random(3, &[channels]) - 0.5).unwrap(), (random(4, &[channels]) + 0.5).unwrap()];
        let range = Tensor::stack(&ends, 0).unwrap();
        let context = format!("quantize {rows}×{channels} by channels");
        check(other, &context, &[&x, &gy], &[&range], [&[SAME; 2], &[BF16, SAME]], |maps, others| {
            let quant = Quantizer { range: &others[0], bits: bits(4) };
            Ok(vec![quantize::forward(&maps[0], quant)?, quantize::backward(&maps[0], &maps[1], quant)?])
        });
    }
    let (range, batch) = (tensor(&[-0.3, 2.0]), tensor(&[-1.7, 4.1]));
    check_as(other, DType::F32, "update_range", &[], &[&range, &batch], &[SAME; 2], |_, others| {
        quantize::update_range(&others[0], &others[1], 0.01)?;
        let moved = others[0].copy()?;
        quantize::update_range(&others[0], &others[1], 1.0)?;
        Ok(vec![moved, others[0].copy()?])
    });
}

pub fn learned_quantizers(other: &dyn Other) {
    for (b, len) in [(2, 1), (3, 7), (4, 256), (8, 256), (4, 40_001)] {
        pact_quantizer(other, b, len, &[0.6, 0.0, -0.5, 2.0]);
        dsq_quantizer(other, b, len, &[[-0.7, 0.8], [0.0, 0.5], [0.3, 0.3]], &[0.2, 1e-9, 0.9]);
        lsq_quantizer(other, b, len, &[0.3 / b as f32, 1e-3, 0.0]);
        let (w, gy) = (random(1, &[len]), random(2, &[len]));
        let context = format!("dorefa {len} at {b} bits");
        check_as(other, DType::F32, &context, &[], &[&w, &gy], &[SAME; 2], |_, others| {
            let y = dorefa::forward(&others[0], bits(b))?;
            Ok(vec![y, dorefa::backward(&others[0], &others[1])?])
        });
    }
    // Sums with more shares than a block has threads.
    pact_quantizer(other, 4, 600_001, &[0.6]);
    dsq_quantizer(other, 4, 200_001, &[[-0.7, 0.8]], &[0.2]);
    lsq_quantizer(other, 4, 600_001, &[0.1]);
    for (bounds, softness) in [([0.5, -0.1], 0.7), ([-1.0, 2.0], 0.3), ([0.0, 0.0], -1.0)] {
        let (bounds, softness) = (tensor(&bounds), tensor(&[softness]));
        check_as(other, DType::F32, "dsq::project", &[], &[&bounds, &softness], &[SAME; 2], |_, others| {
            dsq::project(&others[0], &others[1])?;
            Ok(vec![others[0].clone(), others[1].clone()])
        });
    }
}

/// Returns the tolerance of the gradients of learned parameters, which are sums of `len` terms of
/// both signs.
fn of_terms(len: usize) -> f64 {
    1e-6 * (len as f64).sqrt()
}

fn pact_quantizer(other: &dyn Other, b: u32, len: usize, alphas: &[f32]) {
    let (x, gy) = (random(1, &[len]), random(2, &[len]));
    for alpha in alphas {
        for signed in [false, true] {
            let context = format!("pact {len} up to {alpha} at {b} bits, signed: {signed}");
            let (float, half) = ([SAME, SAME, of_terms(len)], [BF16, SAME, of_terms(len)]);
            let alpha = tensor(&[*alpha]);
            check(other, &context, &[&x, &gy], &[&alpha], [&float, &half], |maps, others| {
                let grads = pact::backward(&maps[0], &maps[1], &others[0], signed)?;
                Ok(vec![pact::forward(&maps[0], &others[0], bits(b), signed)?, grads.x, grads.alpha])
            });
        }
    }
}

fn dsq_quantizer(other: &dyn Other, b: u32, len: usize, bounds: &[[f32; 2]], softness: &[f32]) {
    let (x, gy) = (random(1, &[len]), random(2, &[len]));
    for bounds in bounds {
        for softness in softness {
            let context = format!("dsq {len} over {bounds:?} at {b} bits, softness {softness}");
            let learned = [&tensor(bounds), &tensor(&[*softness])];
            let float = [SAME, SAME, of_terms(len), of_terms(len)];
            let half = [BF16, BF16, of_terms(len), of_terms(len)];
            check(other, &context, &[&x, &gy], &learned, [&float, &half], |maps, others| {
                let grads = dsq::backward(&maps[0], &maps[1], &others[0], &others[1], bits(b))?;
                let y = dsq::forward(&maps[0], &others[0], bits(b))?;
                Ok(vec![y, grads.x, grads.bounds, grads.softness])
            });
        }
    }
}

fn lsq_quantizer(other: &dyn Other, b: u32, len: usize, steps: &[f32]) {
    let (x, gy) = (random(1, &[len]), random(2, &[len]));
    // There are `len` items, so the sums, whose terms are up to Q_P·∂y, are scaled by 1/√(len·Q_P).
    let of_terms = of_terms(len) * (f64::from(1 << b) / len as f64).sqrt();
    for step in steps {
        for (signed, offset) in [(false, None), (true, None), (false, Some(-0.7))] {
            let context = format!("lsq {len} by {step} at {b} bits, signed: {signed}, offset: {offset:?}");
            let learned = [&tensor(&[*step]), &tensor(&[offset.unwrap_or(0.0)])];
            let [float, half] = [SAME, BF16].map(|y| [y, SAME, of_terms, of_terms, SUMS, SAME, SUMS, SAME]);
            check(other, &context, &[&x, &gy], &learned, [&float, &half], |maps, others| {
                let params = lsq::Params {
                    step: &others[0],
                    offset: offset.map(|_| &others[1]),
                    bits: bits(b),
                    signed,
                };
                let (y, grads) =
                    (lsq::forward(&maps[0], params)?, lsq::backward(&maps[0], &maps[1], params, len)?);
                let by_offset = grads.offset.unwrap_or_else(|| others[1].clone());
                let begin = lsq::initial_step(&maps[0], bits(b), signed)?;
                let (step, offset) = lsq::initial_step_and_offset(&maps[0], bits(b))?;
                lsq::project(&others[0])?;
                Ok(vec![y, grads.x, grads.step, by_offset, begin, others[0].clone(), step, offset])
            });
        }
    }
}

pub fn caps(other: &dyn Other) {
    for dims in shapes() {
        let (x, gy) = (random(1, &dims), random(2, &dims));
        // Caps that are exact in bf16, so that comparisons with them are the same in either dtype.
        let cap = random(3, &[dims[3]]).to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        let context = format!("caps {dims:?}");
        check(other, &context, &[&x, &gy], &[&cap], [&[SAME; 2]; 2], |maps, others| {
            let y = cap::forward(&maps[0], &others[0])?;
            let gx = cap::backward(&y, &maps[1], &others[0])?;
            Ok(vec![y, gx])
        });
    }
}

pub fn residuals_and_pooling(other: &dyn Other) {
    let (range, shortcut_range) = (tensor(&[-0.7, 1.1]), tensor(&[-0.8, 0.9]));
    for dims in shapes() {
        let [n, h, w, c] = dims;
        let (a, b, gy) = (random(1, &dims), random(2, &dims), random(3, &[n, c]));
        let (scale, shift) = (random(4, &[c]), random(5, &[c]));
        let others = [&range, &shortcut_range, &scale, &shift];
        for levels in [false, true] {
            let context = format!("residual {dims:?}, shortcut of levels: {levels}");
            // In bf16 the sums are rounded when they are stored; the levels are computed before
            // that, so they must be equal.
            let half = [SAME, BF16, BF16, BF16];
            check(other, &context, &[&a, &b], &others, [&[SAME; 4], &half], |maps, others| {
                let quant = levels.then(|| Quantizer { range: &others[1], bits: bits(4) });
                let b = FeatureMap::quantize(&maps[1], quant)?;
                let quant = Quantizer { range: &others[0], bits: bits(5) };
                let FeatureMap::Levels(y) = residual::add_quantize(&maps[0], &b, Some(quant))? else {
                    panic!("not quantized")
                };
                let (sum, extremes) = residual::add_normalized(&maps[0], &others[2], &others[3], &b)?;
                Ok(vec![y.levels, residual::add(&maps[0], &b)?, sum, extremes])
            });
        }
        let context = format!("pool {dims:?}");
        check(other, &context, &[&a], &[&gy, &range], [&[SAME; 3], &[SAME, SAME, BF16]], |maps, others| {
            let quant = Quantizer { range: &others[1], bits: bits(4) };
            let levels = FeatureMap::quantize(&maps[0], Some(quant))?;
            Ok(vec![
                pool::global_average(&maps[0])?,
                pool::global_average(&levels)?,
                pool::backward(&others[0], h, w, maps[0].dtype())?,
            ])
        });
    }
}

pub fn losses(other: &dyn Other) {
    for (n, k) in [(1, 2), (1, 100), (5, 3), (200, 100), (64, 1000)] {
        for smoothing in [0.0, 0.1] {
            let logits = (random(1, &[n, k]) * 5.0).unwrap();
            let labels: Vec<u32> = (0..n).map(|i| (i * 7 % k) as u32).collect();
            let labels = Tensor::new(labels, &Device::Cpu).unwrap();
            let context = format!("loss {n}×{k}, smoothing {smoothing}");
            check_as(
                other,
                DType::F32,
                &context,
                &[],
                &[&logits, &labels],
                &[1e-6, 1e-7, SAME],
                |_, others| {
                    let found = loss::softmax_cross_entropy(&others[0], &others[1], smoothing)?;
                    Ok(vec![found.loss.reshape(1)?, found.grad, found.correct.reshape(1)?])
                },
            );
        }
    }
    let logits = Tensor::new(&[[3e38f32, -3e38, 0.0], [1.0, 1.0, 0.0]], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    check_as(other, DType::F32, "ties", &[], &[&logits, &labels], &[1e-6, 1e-7, SAME], |_, others| {
        let found = loss::softmax_cross_entropy(&others[0], &others[1], 0.0)?;
        Ok(vec![found.loss.reshape(1)?, found.grad, found.correct.reshape(1)?])
    });
    // Nothing waits for a GPU to report a wrong label, so the label must show in the result.
    let found = other.run(&|| {
        let labels = other.to(&Tensor::new(&[0u32, 3], &Device::Cpu).unwrap());
        vec![loss::softmax_cross_entropy(&other.to(&logits), &labels, 0.0).unwrap().loss.reshape(1).unwrap()]
    });
    assert!(elements(&found[0])[0].is_nan(), "a label outside the classes must show as NaN");
}

pub fn biases(other: &dyn Other) {
    for (n, k) in [(1, 1), (1, 100), (7, 33), (128, 100), (300, 65)] {
        let (x, bias) = (random(1, &[n, k]), random(2, &[k]));
        let context = format!("bias {n}×{k}");
        // Sums of up to 300 numbers, on the CPU in single precision.
        check_as(other, DType::F32, &context, &[], &[&x, &bias], &[SAME, 1e-6], |_, others| {
            Ok(vec![bias::add(&others[0], &others[1])?, bias::gradient(&others[0])?])
        });
    }
}

pub fn descent(other: &dyn Other) {
    // More parameters than one launch takes, some of them larger than one block takes.
    let dims: Vec<Vec<usize>> =
        (0..150).map(|i| if i % 37 == 5 { vec![9, 1200 + i] } else { vec![1 + i * 7 % 90] }).collect();
    let all = |seed: u64| -> Vec<Tensor> {
        dims.iter().enumerate().map(|(i, dims)| random(seed + i as u64, dims)).collect()
    };
    let (params, grads, velocities) = (all(0), all(1000), all(2000));
    let others: Vec<&Tensor> = params.iter().chain(&grads).chain(&velocities).collect();
    let n = dims.len();
    check_as(other, DType::F32, "sgd", &[], &others, &vec![SAME; 2 * n], |_, others| {
        let updates: Vec<Update<'_>> = (0..n)
            .map(|i| Update {
                param: &others[i],
                grad: &others[n + i],
                velocity: &others[2 * n + i],
                weight_decay: if i % 2 == 0 { 1e-2 } else { 0.0 },
            })
            .collect();
        let at = Tensor::full(0.1f32, 1, others[0].device())?;
        for lr in [Rate::Number(0.1), Rate::At(&at)] {
            sgd::step_all(&updates, Rule { lr, momentum: 0.9 })?;
        }
        Ok((0..n).chain(2 * n..3 * n).map(|i| others[i].clone()).collect())
    });
}

pub fn patches(other: &dyn Other) {
    for [n, h, w] in [[1, 3, 3], [2, 5, 8], [1, 9, 4], [3, 33, 30]] {
        for (kernel, stride) in [(3, 1), (3, 2), (1, 1), (2, 2), (3, 3), (5, 1)] {
            for c in [1, 3, 4] {
                let x = random(1, &[n, h, w, c]);
                let context = format!("im2col {n}×{h}×{w}×{c}, {kernel}, {stride}");
                check(other, &context, &[&x], &[], [&[SAME]; 2], |maps, _| {
                    Ok(vec![im2col::forward(&maps[0], kernel, stride)?])
                });
            }
        }
    }
}

pub fn augmentation(other: &dyn Other) {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for ([count, h, w, c], pad) in [([5, 8, 9, 3], 4), ([3, 32, 32, 3], 0), ([2, 5, 1, 1], 1)] {
        let bytes: Vec<u8> = (0..count * h * w * c).map(|_| rng.random_range(0..=255)).collect();
        let images = Tensor::from_vec(bytes, (count, h, w, c), &Device::Cpu).unwrap();
        let b = 7;
        let index: Vec<u32> = (0..b).map(|_| rng.random_range(0..count as u32)).collect();
        let corners: Vec<u32> = (0..2 * b).map(|_| rng.random_range(0..=2 * pad as u32)).collect();
        let flip: Vec<u8> = (0..b).map(|i| (i % 2) as u8).collect();
        let index = Tensor::new(index, &Device::Cpu).unwrap();
        let corners = Tensor::from_vec(corners, (b, 2), &Device::Cpu).unwrap();
        let flip = Tensor::new(flip, &Device::Cpu).unwrap();
        let mean = (random(2, &[c]) + 0.5).unwrap();
        let std = ((random(3, &[c]) * 0.1).unwrap() + 0.3).unwrap();
        let others = [&images, &index, &corners, &flip, &mean, &std];
        let context = format!("augment {count}×{h}×{w}×{c}, {pad}");
        check_as(other, DType::F32, &context, &[], &others, &[SAME], |_, others| {
            let views = Views { index: &others[1], corners: &others[2], flip: &others[3], pad };
            Ok(vec![augment::batch(&others[0], views, &others[4], &others[5], DType::F32)?])
        });
    }
}

/// Compares the backward passes, along a random direction, with central differences of the forward
/// passes, both computed there. The functions are linear, or smooth with a known curvature, so that
/// the step can be large.
pub fn finite_differences(other: &dyn Other) {
    let dot = |a: &Tensor, b: &Tensor| elements(a).iter().zip(elements(b)).map(|(a, b)| a * b).sum::<f64>();
    let one = |f: &dyn Fn() -> Tensor| other.run(&|| vec![f()]).remove(0).to_device(&Device::Cpu).unwrap();
    let compare = |context: &str, found: f64, expected: f64, tolerance: f64| {
        let off = (found - expected).abs();
        assert!(off <= tolerance * expected.abs().max(1.0), "{context}: {found} and not {expected}");
    };
    for dims in [[2, 5, 8, 7], [1, 9, 6, 16], [2, 18, 17, 33]] {
        let [n, h, width, c] = dims;
        let (x, direction) = (random(1, &dims), random(2, &dims));
        for stride in [1, 2] {
            let (w, w_direction) = (random(3, &[3, 3, c]), random(4, &[3, 3, c]));
            let gz = random(5, &[n, (h - 1) / stride + 1, (width - 1) / stride + 1, c]);
            let gx =
                one(&|| depthwise::grad_input(&other.to(&gz), &other.to(&w), stride, (h, width)).unwrap());
            let gw = one(&|| depthwise::grad_weight(&other.to(&x), &other.to(&gz), stride).unwrap());
            // The convolution is linear in both operands, so its difference is the same for any
            // step.
            let along = |x: &Tensor, w: &Tensor| {
                dot(&gz, &one(&|| depthwise::forward(&other.to(x), &other.to(w), stride).unwrap()))
            };
            let context = format!("depthwise {dims:?}, stride {stride}");
            compare(&context, dot(&gx, &direction), along(&direction, &w), 1e-4);
            compare(&context, dot(&gw, &w_direction), along(&x, &w_direction), 1e-4);
        }
        let (w, gz) = (random(6, &[c, 9]), random(7, &[n, h, width, 9]));
        let gx = one(&|| pointwise::grad_input(&other.to(&gz), &other.to(&w)).unwrap());
        let gw = one(&|| pointwise::grad_weight(&other.to(&x), &other.to(&gz)).unwrap());
        let along = |x: &Tensor, w: &Tensor| {
            dot(&gz, &one(&|| pointwise::forward(&other.to(x), &other.to(w)).unwrap()))
        };
        let w_direction = random(8, &[c, 9]);
        compare("pointwise", dot(&gx, &direction), along(&direction, &w), 1e-4);
        compare("pointwise", dot(&gw, &w_direction), along(&x, &w_direction), 1e-4);

        // The curvature of batch normalization leaves an error of about the square of the step.
        let (gamma, beta, gy) = ((random(9, &[c]) + 1.5).unwrap(), random(10, &[c]), random(11, &dims));
        let normalized = |z: &Tensor, gamma: &Tensor, beta: &Tensor| {
            dot(
                &gy,
                &one(&|| {
                    let (z, gamma, beta) = (other.to(z), other.to(gamma), other.to(beta));
                    let stats = norm::channel_stats(&z).unwrap();
                    let norm = BatchNormalization::new(&stats, &gamma, &beta, 1e-5).unwrap();
                    let y = norm::forward(&z, &norm.scale, &norm.shift, Activation::Identity, None);
                    y.unwrap().to_float().unwrap()
                }),
            )
        };
        let grads = other.run(&|| {
            let (z, gy) = (other.to(&x), other.to(&gy));
            let stats = norm::channel_stats(&z).unwrap();
            let norm = BatchNormalization::new(&stats, &other.to(&gamma), &other.to(&beta), 1e-5).unwrap();
            let epilogue = Epilogue::batch(&z, &norm, Activation::Identity, None).unwrap();
            let grads = epilogue.backward(&gy.into()).unwrap();
            vec![grads.z.tensor().unwrap(), grads.gamma.unwrap(), grads.shift]
        });
        const STEP: f64 = 5e-3;
        let context = format!("norm {dims:?}");
        let moved = |from: &Tensor, by: &Tensor, sign: f64| (from + (by * (sign * STEP)).unwrap()).unwrap();
        let slope = |f: &dyn Fn(f64) -> f64| (f(1.0) - f(-1.0)) / (2.0 * STEP);
        let of_z = slope(&|sign| normalized(&moved(&x, &direction, sign), &gamma, &beta));
        compare(&context, dot(&grads[0], &direction), of_z, 3e-3);
        let along = random(12, &[c]);
        let of_gamma = slope(&|sign| normalized(&x, &moved(&gamma, &along, sign), &beta));
        compare(&context, dot(&grads[1], &along), of_gamma, 1e-3);
        let of_beta = slope(&|sign| normalized(&x, &gamma, &moved(&beta, &along, sign)));
        compare(&context, dot(&grads[2], &along), of_beta, 1e-3);
    }
}
