//! Helpers that the tests of the operations share.

use crate::cpu::Instructions;
use crate::norm::{self, BatchNormalization, Epilogue, MapGradient};
use crate::work::lock;
use crate::{Activation, Quantizer};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

/// The numbers of channels that tests use: less than a vector, odd, one vector, and more than two.
pub(crate) const CHANNELS: [usize; 5] = [1, 3, 7, 16, 33];

/// The feature map sizes `(images, height, width)` that tests use.
pub(crate) const MAPS: [(usize, usize, usize); 6] =
    [(1, 1, 1), (2, 1, 5), (1, 6, 1), (3, 4, 4), (2, 5, 8), (1, 9, 6)];

/// Maps that take several chunks and several parts of a reduction, with few channels and with many.
pub(crate) const LARGE: [[usize; 4]; 2] = [[6, 41, 40, 33], [70, 3, 4, 700]];

/// Returns values in [−1, 1), the same for the same seed.
pub(crate) fn random(seed: u64, dims: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// Returns a tensor of the given values.
pub(crate) fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// Returns the elements.
pub(crate) fn elements(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that two tensors agree within `tolerance` times the largest expected element (or 1, if
/// that is smaller).
#[track_caller]
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, context: &str) {
    assert_eq!(found.dims(), expected.dims(), "{context}: shapes");
    let (found, expected) = (elements(found), elements(expected));
    let scale = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let difference = (found - expected).abs();
        assert!(difference <= tolerance * scale, "{context}: {found} and not {expected} at {i}");
    }
}

/// Asserts that gradients are those of `reference`, a function of plain Candle operations.
///
/// They are compared with Candle's autograd in `f64`, and at some coordinates with central
/// differences. `found` holds a gradient of `Σ gy·reference(inputs)` for each input.
#[track_caller]
pub(crate) fn assert_gradients(
    inputs: &[&Tensor],
    gy: &Tensor,
    reference: impl Fn(&[Tensor]) -> Result<Tensor>,
    found: &[&Tensor],
    context: &str,
) {
    let gy = gy.to_dtype(DType::F64).unwrap();
    let vars: Vec<Var> =
        inputs.iter().map(|input| Var::from_tensor(&input.to_dtype(DType::F64).unwrap()).unwrap()).collect();
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let value = |inputs: &[Tensor]| (reference(inputs).unwrap() * &gy).unwrap().sum_all().unwrap();
    let gradients = value(&inputs).backward().unwrap();
    for (k, found) in found.iter().enumerate() {
        let context = format!("{context}, gradient {k}");
        let zero = inputs[k].zeros_like().unwrap();
        let expected = gradients.get(&inputs[k]).unwrap_or(&zero);
        assert_close(found, expected, 1e-4, &context);

        const STEP: f64 = 1e-6;
        let (found, start) = (elements(found), elements(&inputs[k]));
        let scale = found.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
        for at in (0..start.len()).step_by((start.len() / 5).max(1)) {
            let moved = |by: f64| {
                let mut values = start.clone();
                values[at] += by;
                let mut inputs: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
                inputs[k] = Tensor::from_vec(values, inputs[k].shape(), &Device::Cpu).unwrap();
                value(&inputs).to_scalar::<f64>().unwrap()
            };
            let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let difference = (found[at] - expected).abs();
            assert!(difference <= 1e-4 * scale, "{context}: {} and not {expected} at {at}", found[at]);
        }
    }
}

/// Returns an epilogue that could have made a map of dimensions `dims`.
pub(crate) fn epilogue(dims: &[usize], quant: Option<Quantizer<'_>>) -> Epilogue {
    let c = dims[dims.len() - 1];
    let (z, gamma, beta) = (random(91, dims), (random(92, &[c]) + 1.5).unwrap(), random(93, &[c]));
    let stats = norm::channel_stats(&z).unwrap();
    let of_batch = BatchNormalization::new(&stats, &gamma, &beta, 1e-5).unwrap();
    Epilogue::batch(&z, &of_batch, Activation::Relu6, quant).unwrap()
}

/// Asserts that a gradient comes with its sums, and that they agree with the gradient within 1e-5,
/// because the rows are summed in another order.
#[track_caller]
pub(crate) fn assert_sums(below: &Epilogue, gradient: &MapGradient, context: &str) {
    assert!(gradient.sums.is_some(), "{context}: sums");
    let found = below.backward(gradient).unwrap();
    let expected = below.backward(&gradient.tensor.clone().into()).unwrap();
    assert_close(&found.shift, &expected.shift, 1e-5, context);
    assert_close(&found.gamma.unwrap(), &expected.gamma.unwrap(), 1e-5, context);
}

static ALLOWED: AtomicU8 = AtomicU8::new(u8::MAX);

/// Returns the best vector instructions that the running test allows.
pub(crate) fn allowed_instructions() -> Instructions {
    match ALLOWED.load(Ordering::Relaxed) {
        0 => Instructions::Portable,
        #[cfg(target_arch = "x86_64")]
        1 => Instructions::Avx2,
        _ => Instructions::of_machine(),
    }
}

/// Asserts that an operation gives the same bits on one, two and five threads.
#[track_caller]
pub(crate) fn assert_same_on_threads(operation: impl Fn() -> Vec<Tensor> + Sync) -> Vec<Vec<u32>> {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let bits = |tensor: Tensor| -> Vec<u32> {
            tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
        };
        pool.install(&operation).into_iter().map(bits).collect::<Vec<_>>()
    };
    let one = run(1);
    for threads in [2, 5] {
        assert!(one == run(threads), "{threads} threads give other bits than one");
    }
    one
}

/// Runs `f` with vector instructions of at most the level `allowed`, where 0 is the lowest.
///
/// The limit is global, so other tests may run with lower instructions meanwhile; they must pass
/// with any.
pub(crate) fn with_instructions<R>(allowed: u8, f: impl FnOnce() -> R) -> R {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = lock(&ONE_AT_A_TIME);
    ALLOWED.store(allowed, Ordering::Relaxed);
    let found = f();
    ALLOWED.store(u8::MAX, Ordering::Relaxed);
    found
}

/// Asserts that an operation gives the same bits for every number of threads and all vector
/// instructions.
#[track_caller]
pub(crate) fn assert_same_everywhere(operation: impl Fn() -> Vec<Tensor> + Sync) {
    let best = with_instructions(u8::MAX, || assert_same_on_threads(&operation));
    for allowed in [0, 1] {
        let found = with_instructions(allowed, || assert_same_on_threads(&operation));
        assert!(found == best, "vector instructions {allowed} give other bits");
    }
}
