//! The quantized weights of DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160), which PACT uses too.
//!
//! With `M = max|tanh w|` over the tensor, `t = tanh(w)/2M + ½` lies in [0, 1], `q` is the nearest
//! of the `2^b` levels `0, 1/(2^b − 1), …, 1`, and `y = 2q − 1`. So `y` spans [−1, 1] for weights
//! of any size, and the next layer must normalize. Zero is not a level.
//!
//! Rounding has a straight-through gradient, and `M` is held constant: `∂w = ∂y·(1 − tanh²w)/M`.
//! (Differentiating `M` too would change only the gradient of the largest weight.)

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::tanh::tanh;
use crate::work::{CHUNK, fill};
use crate::{Result, profiler, quantize};
use candle_core::Tensor;
use quant_core::Bits;

/// Quantizes the weights.
pub fn forward(weight: &Tensor, bits: Bits) -> Result<Tensor> {
    let check = Check("dorefa::forward");
    let _note = profiler::note(check.0, 0, 8 * weight.elem_count());
    let weight = check.float("weight", weight)?;
    if crate::gpu::runs(weight.device()) {
        return gpu::forward(&weight, bits);
    }
    let maximum = maximum(&weight)?;
    let opened = open(&weight);
    let w = opened.floats()?;
    let (half, steps) = (0.5 / maximum, bits.max_level() as f32);
    cpu::tensor(fill(w.len(), CHUNK, |part, y| levels(&w[part], y, half, steps)), opened.dims())
}

/// Computes the gradient of the weights, which does not depend on the bit width.
pub fn backward(weight: &Tensor, gy: &Tensor) -> Result<Tensor> {
    let check = Check("dorefa::backward");
    let _note = profiler::note(check.0, 0, 12 * weight.elem_count());
    let weight = check.float("weight", weight)?;
    let gy = check.dims("gy", gy, weight.dims())?;
    if crate::gpu::runs(weight.device()) {
        return gpu::backward(&weight, &gy);
    }
    let maximum = maximum(&weight)?;
    let (opened, gy) = (open(&weight), open(&gy));
    let (w, gy) = (opened.floats()?, gy.floats()?);
    let scale = 1.0 / maximum;
    let gw = fill(w.len(), CHUNK, |part, gw| slopes(&w[part.clone()], &gy[part], gw, scale));
    cpu::tensor(gw, opened.dims())
}

/// Returns `M = max|tanh w|`, from the extremes of the weights because tanh is monotone.
fn maximum(weight: &Tensor) -> Result<f32> {
    let ends = cpu::values(&quantize::min_max(weight)?)?;
    // The reciprocal of a value below the smallest normal number would overflow.
    Ok(tanh(ends[0]).abs().max(tanh(ends[1]).abs()).max(f32::MIN_POSITIVE))
}

simd! {
    fn levels(w: &[f32], y: &mut [f32], half: f32, steps: f32) {
        for (y, w) in y.iter_mut().zip(w) {
            let level = (tanh(*w).mul_add(half, 0.5) * steps).round_ties_even();
            let level = if level > 0.0 { level } else { 0.0 };
            let level = if level < steps { level } else { steps };
            // All values before the division are whole numbers, so opposite levels differ only in
            // the sign bit.
            *y = (2.0 * level - steps) / steps;
        }
    }
}

simd! {
    fn slopes(w: &[f32], gy: &[f32], gw: &mut [f32], scale: f32) {
        for ((gw, gy), w) in gw.iter_mut().zip(gy).zip(w) {
            let t = tanh(*w);
            *gw = gy * ((1.0 - t * t) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use std::collections::BTreeSet;

    fn bits(bits: u32) -> Bits {
        Bits::new(bits).unwrap()
    }

    /// Checks two bits: levels −1, −⅓, ⅓, 1. The largest weight has tanh(ln 3) = 4/5, tanh(ln 2) =
    /// 3/5, tanh(½ ln 2) = ⅓, so t is 0, (1 − ¾)/2 = 1/8, ½ ∓ 5/24, 7/8.
    #[test]
    fn hand_worked() {
        let (two, three) = (2f32.ln(), 3f32.ln());
        let w = tensor(&[-three, -two, -0.5 * two, 0.5 * two, two]);
        let y = forward(&w, bits(2)).unwrap();
        let third = f64::from(1.0f32 / 3.0);
        // 3t is 0, 0.375, 0.875, 2.125, 2.625.
        assert_eq!(elements(&y), [-1.0, -1.0, -third, third, 1.0]);
        let gw = backward(&w, &tensor(&[1.0, 1.0, 1.0, 10.0, -1.0])).unwrap();
        // (1 − tanh²)/M.
        let expected = [0.36 / 0.8, 0.64 / 0.8, (8.0 / 9.0) / 0.8, 10.0 * (8.0 / 9.0) / 0.8, -0.64 / 0.8];
        assert_close(&gw, &tensor(&expected.map(|x: f64| x as f32)), 1e-6, "∂w");
    }

    /// Checks the gradients of the function without its rounding and with a constant maximum, with
    /// plain Candle's autograd and with finite differences.
    #[test]
    fn gradients_are_those_of_the_tanh() {
        let (w, gy) = ((random(1, &[9, 14]) * 2.0).unwrap(), random(2, &[9, 14]));
        let maximum = elements(&w).iter().fold(0.0, |a: f64, w| a.max(w.tanh().abs()));
        let reference = |inputs: &[Tensor]| inputs[0].tanh()? / maximum;
        assert_gradients(&[&w], &gy, reference, &[&backward(&w, &gy).unwrap()], "DoReFa");
    }

    #[test]
    fn levels_span_minus_one_to_one_whatever_the_size() {
        for scale in [1e-6, 0.01, 1.0, 30.0] {
            let w = (random(1, &[4000]) * scale).unwrap();
            for b in 2..=8 {
                let y = elements(&forward(&w, bits(b)).unwrap());
                let levels: BTreeSet<u64> = y.iter().map(|y| y.to_bits()).collect();
                // Large weights are all near the ends.
                let least = if scale > 1.0 { 2 } else { 1 << b };
                assert!((least..=1 << b).contains(&levels.len()), "{} levels at {b} bits", levels.len());
                // Only one of the two ends must occur.
                let largest = y.iter().fold(0.0, |a: f64, y| a.max(y.abs()));
                assert_eq!(largest, 1.0, "{b} bits at scale {scale}");
            }
        }
    }

    #[test]
    fn weights_that_are_all_zero_stay_finite() {
        let zeros = random(1, &[7]).zeros_like().unwrap();
        let y = elements(&forward(&zeros, bits(4)).unwrap());
        assert!(y.iter().all(|y| (y.abs() - 1.0 / 15.0).abs() < 1e-7), "{y:?}");
        assert!(backward(&zeros, &zeros).is_ok());
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let message = backward(&random(1, &[4]), &random(2, &[5])).unwrap_err().to_string();
        assert!(message.contains("dorefa::backward") && message.contains("gy"), "{message}");
        assert!(forward(&random(1, &[0]), bits(4)).is_err());
    }

    #[test]
    fn same_bits_everywhere() {
        let (w, gy) = (random(1, &[300_001]), random(2, &[300_001]));
        assert_same_everywhere(|| vec![forward(&w, bits(4)).unwrap(), backward(&w, &gy).unwrap()]);
    }
}
