//! Tests of the learned quantizers against values of PyTorch, which `golden/make_learned.py`
//! computes in float64.
//!
//! Single values agree to a few roundings of float32 ([`VALUES`]). The gradients of the learned
//! parameters are sums of up to a thousand terms of both signs, and agree to [`SUMS`] times the sum
//! of the terms' magnitudes.

use candle_core::{DType, Device, Tensor};
use kernels::{dorefa, dsq, lsq, pact};
use quant_core::Bits;
use std::collections::HashMap;

const VALUES: f64 = 2e-6;
const SUMS: f64 = 2e-6;

struct Golden(HashMap<String, Tensor>);

fn elements(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

impl Golden {
    fn load() -> Self {
        let bytes = include_bytes!("golden/learned.safetensors");
        Self(candle_core::safetensors::load_buffer(bytes, &Device::Cpu).unwrap())
    }

    fn get<const N: usize>(&self, case: &str, names: [&str; N]) -> [&Tensor; N] {
        names.map(|name| &self.0[&format!("{case}.{name}")])
    }

    /// Asserts that `found` agrees with the golden value within the absolute `tolerance`.
    #[track_caller]
    fn check(&self, case: &str, name: &str, found: &Tensor, tolerance: f64) {
        let [expected] = self.get(case, [name]);
        assert_eq!(found.dims(), expected.dims(), "{case}.{name}");
        for (i, (found, expected)) in elements(found).iter().zip(elements(expected)).enumerate() {
            let difference = (found - expected).abs();
            assert!(difference <= tolerance, "{case}.{name}: {found} and not {expected} at {i}");
        }
    }

    /// Returns the largest magnitude of an element, at least 1.
    fn largest(&self, case: &str, name: &str) -> f64 {
        elements(self.get(case, [name])[0]).iter().fold(1.0, |a, b| a.max(b.abs()))
    }

    /// Returns the sum of the magnitudes of the incoming gradient.
    fn total(&self, case: &str) -> f64 {
        elements(self.get(case, ["gy"])[0]).iter().map(|g| g.abs()).sum()
    }
}

fn bits(bits: u32) -> Bits {
    Bits::new(bits).unwrap()
}

#[test]
fn pact() {
    let golden = Golden::load();
    for (case, b, signed) in [("pact", 4, false), ("pact3", 3, false), ("signed", 4, true)] {
        let [x, gy, alpha] = golden.get(case, ["x", "gy", "alpha"]);
        golden.check(case, "y", &pact::forward(x, alpha, bits(b), signed).unwrap(), VALUES);
        let grads = pact::backward(x, gy, alpha, signed).unwrap();
        // Gradients that pass are not changed.
        golden.check(case, "gx", &grads.x, 0.0);
        golden.check(case, "galpha", &grads.alpha, SUMS * golden.total(case));
    }
}

#[test]
fn dorefa() {
    let golden = Golden::load();
    for (case, b) in [("dorefa", 4), ("dorefa2", 2)] {
        let [w, gy] = golden.get(case, ["w", "gy"]);
        golden.check(case, "y", &dorefa::forward(w, bits(b)).unwrap(), VALUES);
        let largest = golden.largest(case, "gw");
        golden.check(case, "gw", &dorefa::backward(w, gy).unwrap(), VALUES * largest);
    }
}

/// The slope in the middle of an interval, up to `½sκ = 2.2` here, multiplies the rounding errors
/// of positions of up to 15.
#[test]
fn dsq() {
    let golden = Golden::load();
    for (case, b) in [("dsq", 4), ("dsq3", 3), ("dsq2", 2)] {
        let [x, gy, bounds, softness] = golden.get(case, ["x", "gy", "bounds", "softness"]);
        golden.check(case, "y", &dsq::forward(x, bounds, bits(b)).unwrap(), VALUES);
        let grads = dsq::backward(x, gy, bounds, softness, bits(b)).unwrap();
        golden.check(case, "gx", &grads.x, 5.0 * VALUES * golden.largest(case, "gx"));
        golden.check(case, "gbounds", &grads.bounds, SUMS * golden.total(case));
        golden.check(case, "gsoftness", &grads.softness, SUMS * golden.total(case));
    }
}

#[test]
fn lsq() {
    let golden = Golden::load();
    for (case, b, signed, with_offset, items) in [
        ("lsq", 4, false, false, 250),
        ("lsq8", 8, false, false, 1000),
        ("lsqw", 3, true, false, 1000),
        ("lsqw2", 2, true, false, 1000),
        ("lsqplus", 4, false, true, 125),
        ("lsqplus3", 3, false, true, 500),
    ] {
        let [x, gy, step, offset] = golden.get(case, ["x", "gy", "step", "offset"]);
        let params = lsq::Params { step, offset: with_offset.then_some(offset), bits: bits(b), signed };
        golden.check(case, "y", &lsq::forward(x, params).unwrap(), VALUES);
        let grads = lsq::backward(x, gy, params, items).unwrap();
        // Gradients that pass are not changed.
        golden.check(case, "gx", &grads.x, 0.0);
        // Before scaling, a term of the step's gradient is up to the largest level times the
        // gradient of y.
        let high = f64::from(bits(b).max_level());
        let scale = 1.0 / (items as f64).sqrt();
        golden.check(case, "gstep", &grads.step, SUMS * golden.total(case) * scale * high.sqrt());
        if let Some(found) = grads.offset {
            golden.check(case, "goffset", &found, SUMS * golden.total(case) * scale);
        }
        let begin = lsq::initial_step(x, bits(b), signed).unwrap();
        golden.check(case, "begin", &begin, VALUES);
    }
}
