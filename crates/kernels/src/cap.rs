//! Upper bounds of channels after an activation: `y[…,c] = min(x[…,c], cap[c])`.
//!
//! Equalization by a factor `s` of each channel turns ReLU6 into `min(max(x, 0), 6/s)`, whereas
//! [`crate::Activation`] has one bound for all channels. The gradient is `∂x = ∂y·[y < cap]`: 0 at
//! the kink, as for the activations. The caps are not learned.
//!
//! This is a separate pass over the map, because only a baseline needs it.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, read_ahead, simd};
use crate::elements::{Element, by_element};
use crate::work::{fill, whole_rows};
use crate::{Result, profiler};
use candle_core::Tensor;

/// Computes `min(x, cap)`, with `x[…, C]` and `cap[C]`.
///
/// # Errors
/// Returns an error for wrong shapes and dtypes.
pub fn forward(x: &Tensor, cap: &Tensor) -> Result<Tensor> {
    let check = Check("cap::forward");
    let (_, c) = check.rows("x", x)?;
    let _note = profiler::note(check.0, 0, 2 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, cap) = (check.map_float("x", x)?, check.dims("cap", cap, &[c])?);
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, &cap);
    }
    by_element!(x.dtype(), T => {
        let (opened, cap) = (open(&x), cpu::values(&cap)?);
        let x: &[T] = opened.elements()?;
        cpu::tensor(fill(x.len(), whole_rows(c), |part, y| lower(&x[part], &cap, y)), opened.dims())
    })
}

/// Computes the gradient of the input of [`forward`] from the gradient of its output `y`, both
/// `[…, C]`.
///
/// # Errors
/// Returns an error for wrong shapes and dtypes.
pub fn backward(y: &Tensor, gy: &Tensor, cap: &Tensor) -> Result<Tensor> {
    let check = Check("cap::backward");
    let (_, c) = check.rows("y", y)?;
    let _note = profiler::note(check.0, 0, 3 * y.dtype().size_in_bytes() * y.elem_count());
    let (y, cap) = (check.map_float("y", y)?, check.dims("cap", cap, &[c])?);
    let gy = check.map_of("gy", gy, &y)?;
    if crate::gpu::runs(y.device()) {
        return gpu::backward(&y, &gy, &cap);
    }
    by_element!(y.dtype(), T => {
        let (opened, gy, cap) = (open(&y), open(&gy), cpu::values(&cap)?);
        let (y, gy): (&[T], _) = (opened.elements()?, gy.elements()?);
        let gate = |part: std::ops::Range<usize>, gx: &mut [T]| pass(&y[part.clone()], &gy[part], &cap, gx);
        cpu::tensor(fill(y.len(), whole_rows(c), gate), opened.dims())
    })
}

simd! {
    fn lower<T: Element>(x: &[T], cap: &[f32], y: &mut [T]) {
        for (y, x) in y.chunks_mut(cap.len()).zip(x.chunks(cap.len())) {
            for ((y, x), cap) in y.iter_mut().zip(x).zip(cap) {
                // NaN stays NaN.
                *y = if x.float() > *cap { T::nearest(*cap) } else { *x };
            }
        }
    }
}

simd! {
    fn pass<T: Element>(y: &[T], gy: &[T], cap: &[f32], gx: &mut [T]) {
        let c = cap.len();
        for (i, ((gx, y), of_gy)) in gx.chunks_mut(c).zip(y.chunks(c)).zip(gy.chunks(c)).enumerate() {
            read_ahead(gy, i * c, c);
            for (((gx, y), gy), cap) in gx.iter_mut().zip(y).zip(of_gy).zip(cap) {
                // Compares with the stored cap, which is rounded to the element type.
                *gx = if y.float() < T::nearest(*cap).float() { *gy } else { T::default() };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn hand_worked() {
        let x = tensor(&[1.0, -3.0, 2.0, 5.0, 4.0, 0.5]).reshape((3, 2)).unwrap();
        let gy = tensor(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape((3, 2)).unwrap();
        let cap = tensor(&[2.0, 0.5]);
        let y = forward(&x, &cap).unwrap();
        assert_eq!(elements(&y), [1.0, -3.0, 2.0, 0.5, 2.0, 0.5]);
        assert_eq!(elements(&backward(&y, &gy, &cap).unwrap()), [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    }

    /// Compares with Candle's operations, for several chunks and for channels that do not fill
    /// whole vectors.
    #[test]
    fn agrees_with_candle() {
        for dims in LARGE {
            let (x, gy, cap) = (random(1, &dims), random(2, &dims), random(3, &dims[3..]));
            let y = forward(&x, &cap).unwrap();
            assert_eq!(elements(&y), elements(&x.broadcast_minimum(&cap).unwrap()));
            let below = x.broadcast_lt(&cap).unwrap().to_dtype(candle_core::DType::F32).unwrap();
            let expected = (below * &gy).unwrap();
            assert_eq!(elements(&backward(&y, &gy, &cap).unwrap()), elements(&expected));
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let (x, cap) = (random(1, &[2, 3]), random(2, &[2]));
        for error in [forward(&x, &cap), backward(&x, &x, &cap)] {
            assert!(error.unwrap_err().to_string().contains("cap has shape [2], expected [3]"));
        }
    }
}
