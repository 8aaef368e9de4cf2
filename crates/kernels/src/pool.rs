//! Global average pooling: `y[n,c] = (Σ_{h,w} x[n,h,w,c]) / (H·W)`, so `∂x[n,h,w,c] = ∂y[n,c] / (H·W)`.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::elements::{Element, Stored, by_element};
use crate::feature::Operand;
use crate::work::{CHUNK, fill, generate};
use crate::{FeatureMap, Result, profiler};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Computes the mean over the positions of `x[N, H, W, C]`, `[N, C]`, in `f32`.
pub fn global_average(x: impl Into<FeatureMap>) -> Result<Tensor> {
    fn of(x: &FeatureMap) -> Result<Tensor> {
        let check = Check("pool::global_average");
        let (n, h, w, c) = check.map("x", x.dims())?;
        let _note = profiler::note(check.0, 0, x.bytes() + 4 * n * c);
        if crate::gpu::runs(x.device()) {
            return gpu::global_average(&check, x);
        }
        let image = h * w * c;
        let images = (CHUNK / image).max(1);
        by_element!(x.dtype(), T => x.read::<T, _>(&check, "x", |x| {
            let mean = |elements: &mut Vec<T>, range: Range<usize>, y: &mut [f32]| {
                for (at, y) in (range.start / c..).zip(y.chunks_exact_mut(c)) {
                    let image = match x.part(at * image..(at + 1) * image) {
                        Operand::Stored(image) => image,
                        deferred => Stored::Floats(deferred.elements(elements)),
                    };
                    mean_rows(image, h * w, y);
                }
            };
            cpu::tensor(generate(n * c, images * c, Vec::new, mean).0, (n, c))
        }))
    }
    of(&x.into())
}

/// Computes the gradient of the input, `[N, h, w, C]`, in `dtype` (`F32` or `BF16`) from the
/// gradient of the means, `[N, C]`.
pub fn backward(gy: &Tensor, h: usize, w: usize, dtype: DType) -> Result<Tensor> {
    let check = Check("pool::backward");
    if gy.rank() != 2 || gy.elem_count() == 0 {
        return Err(check.shape("gy", gy, "[images, channels]"));
    }
    let _note = profiler::note(check.0, 0, gy.elem_count() * (dtype.size_in_bytes() * h * w + 4));
    let gy = check.float("gy", gy)?;
    if crate::gpu::runs(gy.device()) {
        return gpu::backward(&gy, h, w, dtype);
    }
    let (n, c) = gy.dims2()?;
    let opened = open(&gy);
    let gy = opened.floats()?;
    let share = 1.0 / (h * w) as f32;
    by_element!(dtype, T => {
        let gx = fill(n * h * w * c, h * w * c, |range, gx| {
            let gy = &gy[range.start / (h * w)..][..c];
            for gx in gx.chunks_exact_mut(c) {
                for (gx, gy) in gx.iter_mut().zip(gy) {
                    *gx = T::nearest(gy * share);
                }
            }
        });
        cpu::tensor(gx, (n, h, w, c))
    })
}

simd! {
    /// Writes the mean of the rows of `x` to `y`, which must be zeroed.
    fn mean_rows<T: Element>(x: Stored<'_, T>, rows: usize, y: &mut [f32]) {
        match x {
            Stored::Floats(x) => add_rows(x, |x| x.float(), y),
            Stored::Levels(x, grid) => add_rows(x, |q| grid.value(f32::from(q)), y),
        }
        for y in y {
            *y /= rows as f32;
        }
    }
}

#[inline(always)]
fn add_rows<X: Copy>(x: &[X], value: impl Fn(X) -> f32, y: &mut [f32]) {
    for x in x.chunks_exact(y.len()) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += value(*x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn matches_the_reference() {
        for (n, h, w) in MAPS {
            for c in CHANNELS {
                let context = format!("{n}×{h}×{w}×{c}");
                let x = random(1, &[n, h, w, c]);
                let reference = |inputs: &[Tensor]| inputs[0].mean((1, 2));
                let expected = reference(std::slice::from_ref(&x)).unwrap();
                assert_close(&global_average(&x).unwrap(), &expected, 1e-6, &context);
                let gy = random(2, &[n, c]);
                assert_gradients(
                    &[&x],
                    &gy,
                    reference,
                    &[&backward(&gy, h, w, DType::F32).unwrap()],
                    &context,
                );
            }
        }
    }

    #[test]
    fn same_bits_everywhere() {
        for [n, h, w, c] in LARGE {
            let (x, gy) = (random(1, &[n, h, w, c]), random(2, &[n, c]));
            assert_same_everywhere(|| {
                vec![global_average(&x).unwrap(), backward(&gy, h, w, DType::F32).unwrap()]
            });
        }
    }
}
