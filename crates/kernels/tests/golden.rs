//! Tests of the operations against values of PyTorch, which `golden/make_golden.py` writes.
//!
//! PyTorch sums in another order (and in NCHW), so sums of up to a few hundred products of order 1
//! agree to a few 1e-6 of their size, within [`SUMS`]. Single roundings agree within [`ROUNDING`].

use candle_core::{DType, Device, Tensor};
use kernels::{Activation, Quantizer, depthwise, im2col, loss, norm, pointwise, quantize, sgd};
use quant_core::Bits;
use std::collections::HashMap;

const SUMS: f64 = 1e-5;
const ROUNDING: f64 = 1e-6;

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn load() -> Self {
        let bytes = include_bytes!("golden/golden.safetensors");
        Self(candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap())
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.0[name]
    }

    /// Asserts that `found` agrees with the golden value within `tolerance` times its largest
    /// element.
    #[track_caller]
    fn check(&self, name: &str, found: &Tensor, tolerance: f64) {
        let expected = self.get(name);
        assert_eq!(found.dims(), expected.dims(), "{name}");
        let elements = |tensor: &Tensor| -> Vec<f64> {
            tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let (found, expected) = (elements(found), elements(expected));
        let scale = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference <= tolerance * scale, "{name}: {found} and not {expected} at {i}");
        }
    }
}

#[test]
fn stem() {
    let golden = Golden::load();
    for stride in [1, 2] {
        let of = |what: &str| format!("stem{stride}.{what}");
        let patches = im2col::forward(golden.get(&of("x")), 3, stride).unwrap();
        let y = pointwise::forward(&patches, golden.get(&of("w"))).unwrap();
        golden.check(&of("y"), &y, SUMS);
        let gw = pointwise::grad_weight(&patches, golden.get(&of("gy"))).unwrap();
        golden.check(&of("gw"), &gw, SUMS);
    }
}

#[test]
fn depthwise_convolutions() {
    let golden = Golden::load();
    for stride in [1, 2] {
        let of = |what: &str| format!("depthwise{stride}.{what}");
        let [x, w, gy] = ["x", "w", "gy"].map(|what| golden.get(&of(what)));
        golden.check(&of("y"), &depthwise::forward(x, w, stride).unwrap(), SUMS);
        golden.check(&of("gx"), &depthwise::grad_input(gy, w, stride, (7, 6)).unwrap(), SUMS);
        golden.check(&of("gw"), &depthwise::grad_weight(x, gy, stride).unwrap(), SUMS);
    }
}

#[test]
fn pointwise_convolution() {
    let golden = Golden::load();
    let [x, w, gy] = ["pointwise.x", "pointwise.w", "pointwise.gy"].map(|name| golden.get(name));
    golden.check("pointwise.y", &pointwise::forward(x, w).unwrap(), SUMS);
    golden.check("pointwise.gx", &pointwise::grad_input(gy, w).unwrap(), SUMS);
    golden.check("pointwise.gw", &pointwise::grad_weight(x, gy).unwrap(), SUMS);
}

/// Channels with almost no variance, and their rounding errors, are scaled by up to `γ/√ε ≈ 1000`
/// here.
#[test]
fn batch_normalization() {
    let golden = Golden::load();
    let [z, gy] = ["norm.z", "norm.gy"].map(|name| golden.get(name));
    let [gamma, beta] = ["norm.gamma", "norm.beta"].map(|name| golden.get(name));
    let act = Activation::Relu6;
    let stats = norm::channel_stats(z).unwrap();
    let of_batch = norm::BatchNormalization::new(&stats, gamma, beta, 1e-5).unwrap();
    let y = norm::forward(z, &of_batch.scale, &of_batch.shift, act, None).unwrap();
    golden.check("norm.y", &y.to_float().unwrap(), 1e-4);
    let epilogue = norm::Epilogue::batch(z, &of_batch, act, None).unwrap();
    let grads = epilogue.backward(&gy.clone().into()).unwrap();
    golden.check("norm.gz", &grads.z.tensor().unwrap(), 1e-4);
    golden.check("norm.ggamma", &grads.gamma.unwrap(), SUMS);
    golden.check("norm.gbeta", &grads.shift, SUMS);
    // PyTorch's running statistics begin at 0 and 1, and take the unbiased variance.
    let rows = (z.elem_count() / stats.mean.elem_count()) as f64;
    golden.check("norm.running_mean", &(&stats.mean * 0.1).unwrap(), ROUNDING);
    let unbiased = (&stats.variance * (rows / (rows - 1.0))).unwrap();
    golden.check("norm.running_var", &((unbiased * 0.1).unwrap() + 0.9).unwrap(), ROUNDING);
}

/// The levels are the same, because the grid multiplies by the reciprocal of the step as PyTorch
/// does.
#[test]
fn fake_quantization() {
    let golden = Golden::load();
    for (name, bits) in [("unsigned", 4), ("affine", 5)] {
        let of = |what: &str| format!("{name}.{what}");
        let [x, gy, range] = ["x", "gy", "range"].map(|what| golden.get(&of(what)));
        let quant = Quantizer { range, bits: Bits::new(bits).unwrap() };
        golden.check(&of("y"), &quantize::forward(x, quant).unwrap(), ROUNDING);
        golden.check(&of("gx"), &quantize::backward(x, gy, quant).unwrap(), 0.0);
    }
}

#[test]
fn cross_entropy() {
    let golden = Golden::load();
    for (name, smoothing) in [("hard", 0.0), ("smooth", 0.1)] {
        let of = |what: &str| format!("{name}.{what}");
        let labels = golden.get(&of("labels")).to_dtype(DType::U32).unwrap();
        let found = loss::softmax_cross_entropy(golden.get(&of("logits")), &labels, smoothing).unwrap();
        golden.check(&of("loss"), &found.loss, ROUNDING);
        golden.check(&of("grad"), &found.grad, ROUNDING);
    }
}

#[test]
fn stochastic_gradient_descent() {
    let golden = Golden::load();
    let param = golden.get("sgd.start").copy().unwrap();
    let velocity = param.zeros_like().unwrap();
    for step in 0..4 {
        let grad = golden.get(&format!("sgd.grad{step}"));
        sgd::step(&param, grad, &velocity, 0.1, 0.9, 4e-3).unwrap();
        golden.check(&format!("sgd.param{step}"), &param, ROUNDING);
    }
}
