//! Global average pooling: `y[n,c] = (Σ_{h,w} x[n,h,w,c]) / (H·W)`, so `∂x[n,h,w,c] = ∂y[n,c] / (H·W)`.

use crate::Result;
use crate::cpu::{self, CHUNK, Check, simd};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

/// The mean over the positions of `x[N, H, W, C]`, `[N, C]`.
pub fn global_average(x: &Tensor) -> Result<Tensor> {
    let check = Check("pool::global_average");
    check.map("x", x)?;
    Ok(check.float("x", x)?.apply_op1_no_bwd(&Forward)?)
}

/// The gradient of the input, `[N, h, w, C]`, from that of the means, `[N, C]`.
pub fn backward(gy: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let check = Check("pool::backward");
    if gy.rank() != 2 || gy.elem_count() == 0 {
        return Err(check.shape("gy", gy, "[images, channels]"));
    }
    Ok(check.float("gy", gy)?.apply_op1_no_bwd(&Backward { h, w })?)
}

struct Forward;

simd! {
    /// The mean of the rows of `x` into `y`.
    fn mean_rows(x: &[f32], y: &mut [f32]) {
        let rows = x.len() / y.len();
        for x in x.chunks_exact(y.len()) {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        }
        for y in y {
            *y /= rows as f32;
        }
    }
}

impl CustomOp1 for Forward {
    fn name(&self) -> &'static str {
        "global-average-forward"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (n, h, w, c) = layout.shape().dims4()?;
        let x = cpu::slice(x, layout)?;
        let image = h * w * c;
        let images = (CHUNK / image).max(1);
        let means = |i: usize, y: &mut [f32]| {
            for (y, x) in y.chunks_exact_mut(c).zip(x[i * images * image..].chunks_exact(image)) {
                mean_rows(x, y);
            }
        };
        cpu::output(cpu::fill(n * c, images * c, means), (n, c))
    }
}

struct Backward {
    h: usize,
    w: usize,
}

impl CustomOp1 for Backward {
    fn name(&self) -> &'static str {
        "global-average-backward"
    }

    fn cpu_fwd(&self, gy: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let &Self { h, w } = self;
        let (n, c) = layout.shape().dims2()?;
        let gy = cpu::slice(gy, layout)?;
        let share = 1.0 / (h * w) as f32;
        let gx = cpu::fill(n * h * w * c, h * w * c, |i, gx| {
            for gx in gx.chunks_exact_mut(c) {
                for (gx, gy) in gx.iter_mut().zip(&gy[i * c..]) {
                    *gx = gy * share;
                }
            }
        });
        cpu::output(gx, (n, h, w, c))
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
                assert_gradients(&[&x], &gy, reference, &[&backward(&gy, h, w).unwrap()], &context);
            }
        }
    }

    #[test]
    fn same_bits_everywhere() {
        for [n, h, w, c] in LARGE {
            let (x, gy) = (random(1, &[n, h, w, c]), random(2, &[n, c]));
            assert_same_everywhere(|| vec![global_average(&x).unwrap(), backward(&gy, h, w).unwrap()]);
        }
    }
}
