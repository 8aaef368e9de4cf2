//! PACT, the clipped activation with a learned bound of Choi et al. 2018 (arXiv:1805.06085).
//!
//! The unsigned form, for the output of a ReLU, is `ỹ = clip(x, 0, α) = ½(|x| − |x − α| + α)`, and
//! `y` is the nearest of the `2^b` levels `α·q/(2^b − 1)`. Rounding has a straight-through
//! gradient: `∂x = ∂y·[0 < x < α]`, `∂α = Σ ∂y·[x ≥ α]`.
//!
//! The paper does not cover values of both signs, such as the output of a linear bottleneck. For
//! them this module uses the symmetric extension: `ỹ = clip(x, −α, α)` on the `2^b − 1` levels
//! `α·q/(2^(b−1) − 1)`, `|q| < 2^(b−1)`, one of which is 0. Its gradients are `∂x = ∂y·[|x| < α]`
//! and `∂α = Σ ∂y·([x ≥ α] − [x ≤ −α])`.
//!
//! An `α` below 0 counts as 0. Then `|y|` is at most `2^b − 1` times the smallest normal number,
//! which is the grid's step.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::elements::{Element, by_element};
use crate::learned::{LANES, Lanes, map_and_sum};
use crate::quantize::fake;
use crate::work::{CHUNK, fill};
use crate::{Result, profiler};
use candle_core::Tensor;
use quant_core::{Bits, Grid};

/// The gradients of [`forward`].
pub struct Gradients {
    /// The gradient of the input, of its shape.
    pub x: Tensor,
    /// The gradient of `α`, `[1]`.
    pub alpha: Tensor,
}

/// Clips `x` to `[0, α]`, or to `[−α, α]` if `signed`, and rounds it to the levels; `alpha` is
/// `[1]`.
pub fn forward(x: &Tensor, alpha: &Tensor, bits: Bits, signed: bool) -> Result<Tensor> {
    let check = Check("pact::forward");
    let _note = profiler::note(check.0, 0, 2 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, alpha) = (check.map_float("x", x)?, check.dims("alpha", alpha, &[1])?);
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, &alpha, bits, signed);
    }
    let alpha = bound(&alpha)?;
    let grid = if signed { Grid::symmetric(alpha, bits) } else { Grid::spanning(0.0, alpha, bits) };
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        cpu::tensor(fill(x.len(), CHUNK, |part, y| fake(&x[part], y, &[grid])), opened.dims())
    })
}

/// Computes the gradients of `x` and of `α`, which do not depend on the bit width.
pub fn backward(x: &Tensor, gy: &Tensor, alpha: &Tensor, signed: bool) -> Result<Gradients> {
    let check = Check("pact::backward");
    let _note = profiler::note(check.0, 0, 3 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, alpha) = (check.map_float("x", x)?, check.dims("alpha", alpha, &[1])?);
    let gy = check.map_of("gy", gy, &x)?;
    if crate::gpu::runs(x.device()) {
        return gpu::backward(&x, &gy, &alpha, signed);
    }
    let alpha = bound(&alpha)?;
    let low = if signed { -alpha } else { 0.0 };
    by_element!(x.dtype(), T => {
        let (opened, gy) = (open(&x), open(&gy));
        let (x, gy): (&[T], _) = (opened.elements()?, gy.elements()?);
        let (gx, [sum]) =
            map_and_sum(x.len(), |part, gx| [pass(&x[part.clone()], &gy[part], gx, low, alpha, signed)]);
        Ok(Gradients { x: cpu::tensor(gx, opened.dims())?, alpha: cpu::tensor(vec![sum as f32], 1)? })
    })
}

/// Returns the value of `α`, with negative values as 0; NaN stays NaN.
fn bound(alpha: &Tensor) -> Result<f32> {
    let alpha = cpu::values(alpha)?[0];
    Ok(if alpha < 0.0 { 0.0 } else { alpha })
}

simd! {
    /// Writes the gradient of `x`, and returns the gradient of `α`.
    fn pass<T: Element>(x: &[T], gy: &[T], gx: &mut [T], low: f32, high: f32, signed: bool) -> f64 {
        let below = if signed { -1.0 } else { 0.0 };
        let mut sums: Lanes = [0.0; LANES];
        for ((x, gy), gx) in x.chunks(LANES).zip(gy.chunks(LANES)).zip(gx.chunks_mut(LANES)) {
            for (((sum, x), gy), gx) in sums.iter_mut().zip(x).zip(gy).zip(gx) {
                let x = x.float();
                *gx = if x > low && x < high { *gy } else { T::default() };
                let gy = gy.float();
                let low_share = if x <= low { below * gy } else { 0.0 };
                let share = if x >= high { gy } else { low_share };
                *sum += f64::from(share);
            }
        }
        sums.iter().sum()
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

    #[track_caller]
    fn check(signed: bool, x: &[f32], y: &[f64], gx: &[f64], galpha: f64) {
        // Two bits over α = 3. The gradients of y are 1, 2, 4, …, so that every sum shows its terms.
        let (x, alpha) = (tensor(x), tensor(&[3.0]));
        let gy: Vec<f32> = (0..x.elem_count()).map(|i| (1 << i) as f32).collect();
        assert_eq!(elements(&forward(&x, &alpha, bits(2), signed).unwrap()), y);
        let grads = backward(&x, &tensor(&gy), &alpha, signed).unwrap();
        assert_eq!(elements(&grads.x), gx);
        assert_eq!(elements(&grads.alpha), [galpha]);
    }

    #[test]
    fn hand_worked_unsigned() {
        // Levels 0, 1, 2, 3.
        check(
            false,
            &[-1.0, 0.0, 0.4, 1.6, 2.9, 3.0, 7.0],
            &[0.0, 0.0, 0.0, 2.0, 3.0, 3.0, 3.0],
            &[0.0, 0.0, 4.0, 8.0, 16.0, 0.0, 0.0],
            32.0 + 64.0,
        );
    }

    #[test]
    fn hand_worked_signed() {
        // Levels −3, 0, 3.
        check(
            true,
            &[-5.0, -3.0, -1.6, -1.4, 1.4, 2.0, 3.0, 9.0],
            &[-3.0, -3.0, -3.0, 0.0, 0.0, 3.0, 3.0, 3.0],
            &[0.0, 0.0, 4.0, 8.0, 16.0, 32.0, 0.0, 0.0],
            64.0 + 128.0 - 1.0 - 2.0,
        );
    }

    /// Checks the gradient of the clip before the rounding, with plain Candle's autograd and with
    /// finite differences.
    #[test]
    fn gradients_are_those_of_the_clip() {
        for signed in [false, true] {
            let (x, gy, alpha) = (random(1, &[3, 7, 5]), random(2, &[3, 7, 5]), tensor(&[0.6]));
            let grads = backward(&x, &gy, &alpha, signed).unwrap();
            // ½(|x − l| − |x − α| + l + α), with l = 0 or −α.
            let reference = |inputs: &[Tensor]| {
                let alpha = inputs[1].broadcast_as(inputs[0].shape())?;
                let low = (&alpha * if signed { -1.0 } else { 0.0 })?;
                let clip = ((&inputs[0] - &low)?.abs()? - (&inputs[0] - &alpha)?.abs()?)?;
                ((clip + low)? + alpha)? * 0.5
            };
            let found = [&grads.x, &grads.alpha];
            assert_gradients(&[&x, &alpha], &gy, reference, &found, &format!("signed: {signed}"));
        }
    }

    #[test]
    fn levels_zero_and_idempotence() {
        let (x, alpha) = (random(1, &[5000]), tensor(&[0.77]));
        for b in 2..=8 {
            for signed in [false, true] {
                let y = forward(&x, &alpha, bits(b), signed).unwrap();
                let levels: BTreeSet<u64> = elements(&y).iter().map(|y| (y + 0.0).to_bits()).collect();
                assert_eq!(levels.len(), if signed { (1 << b) - 1 } else { 1 << b });
                assert!(levels.contains(&0.0f64.to_bits()));
                assert_eq!(elements(&forward(&y, &alpha, bits(b), signed).unwrap()), elements(&y));
            }
        }
    }

    #[test]
    fn a_bound_of_zero_or_less_gives_zero_and_can_grow_again() {
        for alpha in [0.0, -0.5] {
            let (x, gy, alpha) = (tensor(&[-1.0, 0.5, 2.0]), tensor(&[1.0, 2.0, 4.0]), tensor(&[alpha]));
            // The grid's step is the smallest normal number, not 0.
            let y = elements(&forward(&x, &alpha, bits(4), false).unwrap());
            assert!(y.iter().all(|y| (0.0..1e-36).contains(y)), "{y:?}");
            let grads = backward(&x, &gy, &alpha, false).unwrap();
            assert_eq!((elements(&grads.x), elements(&grads.alpha)), (vec![0.0; 3], vec![6.0]));
        }
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let (x, alpha) = (random(1, &[4]), tensor(&[1.0]));
        let message = forward(&x, &tensor(&[0.0, 1.0]), bits(4), false).unwrap_err().to_string();
        assert!(message.contains("pact::forward") && message.contains("alpha"), "{message}");
        let message = backward(&x, &random(2, &[5]), &alpha, false).err().unwrap().to_string();
        assert!(message.contains("pact::backward") && message.contains("gy"), "{message}");
    }

    #[test]
    fn same_bits_everywhere() {
        let (x, gy, alpha) = (random(1, &[300_001]), random(2, &[300_001]), tensor(&[0.4]));
        assert_same_everywhere(|| {
            let mut all = Vec::new();
            for signed in [false, true] {
                let grads = backward(&x, &gy, &alpha, signed).unwrap();
                all.extend([forward(&x, &alpha, bits(4), signed).unwrap(), grads.x, grads.alpha]);
            }
            all
        });
    }
}
