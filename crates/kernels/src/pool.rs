//! Global average pooling: `y[n,c] = (Σ_{h,w} x[n,h,w,c]) / (H·W)`, so `∂x[n,h,w,c] = ∂y[n,c] / (H·W)`.

mod gpu;

use crate::cpu::{self, CHUNK, Check, simd};
use crate::feature::Source;
use crate::{Input, Result, profile};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

/// The mean over the positions of `x[N, H, W, C]`, `[N, C]`, in `f32`.
pub fn global_average<'a>(x: impl Into<Input<'a>>) -> Result<Tensor> {
    let check = Check("pool::global_average");
    let x = x.into();
    let (n, h, w, c) = check.map_sizes("x", x.dims())?;
    let _note = profile::note(check.0, 0, x.bytes() + 4 * n * c);
    if crate::gpu::runs(x.device()) {
        return gpu::global_average(&check, x);
    }
    let x = x.open(&check, "x")?;
    let x = x.opened();
    let x = Source::new(&x)?;
    let image = h * w * c;
    let images = (CHUNK / image).max(1);
    let fill = |floats: &mut Vec<f32>, i: usize, y: &mut [f32]| {
        for (image_at, y) in (i * images..).zip(y.chunks_exact_mut(c)) {
            mean_rows(x.part(image_at * image..(image_at + 1) * image).floats(floats), h * w, y);
        }
    };
    let (means, _) = cpu::generate(n * c, 0, images * c, Vec::new, fill);
    Ok(Tensor::from_vec(means, (n, c), &Device::Cpu)?)
}

/// The gradient of the input, `[N, h, w, C]`, from that of the means, `[N, C]`.
pub fn backward(gy: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    backward_as(gy, h, w, DType::F32)
}

/// [`backward`] in a given dtype: `F32`, on a GPU also `BF16`.
pub fn backward_as(gy: &Tensor, h: usize, w: usize, dtype: DType) -> Result<Tensor> {
    let check = Check("pool::backward");
    if gy.rank() != 2 || gy.elem_count() == 0 {
        return Err(check.shape("gy", gy, "[images, channels]"));
    }
    let _note = profile::note(check.0, 0, 4 * gy.elem_count() * (h * w + 1));
    let gy = check.float("gy", gy)?;
    if crate::gpu::runs(gy.device()) {
        return gpu::backward(&gy, h, w, dtype);
    }
    if dtype != DType::F32 {
        return Err(check.setting(format!("a gradient in {dtype:?} on the CPU, which has F32")));
    }
    Ok(gy.apply_op1_no_bwd(&Backward { h, w })?)
}

simd! {
    /// The mean of the rows of `x` into `y`, which comes zeroed.
    fn mean_rows(x: &[f32], rows: usize, y: &mut [f32]) {
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
