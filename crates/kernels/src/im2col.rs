//! Patches of images as rows, for the stem: they make a `k×k` convolution a matrix product
//! ([`crate::pointwise`]).
//!
//! `y[n,oh,ow,(kh·k + kw)·C + c] = x[n, oh·s + kh − p, ow·s + kw − p, c]`, which is 0 outside the
//! image. The weight is a matrix `[k·k·C, Cout]` with its rows in that order. There is no input
//! gradient, because the input is the image, which is not trained. The gradient of the weight is
//! `pointwise::grad_weight` of the patches.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open};
use crate::elements::by_element;
use crate::work::{CHUNK, fill};
use crate::{Result, profiler};
use candle_core::Tensor;

/// Returns the `kernel × kernel` patches of `x[N, H, W, C]`, `[N, Ho, Wo, kernel·kernel·C]`, with
/// `Ho = (H + 2·padding − kernel) / stride + 1` and a padding of `(kernel − 1)/2`.
pub fn forward(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let check = Check("im2col::forward");
    let (n, h, w, c) = check.map("x", x.dims())?;
    let padding = kernel.saturating_sub(1) / 2;
    if kernel == 0 || stride == 0 || h + 2 * padding < kernel || w + 2 * padding < kernel {
        return Err(
            check.setting(format!("a kernel of {kernel} with stride {stride} does not fit {h}×{w} images"))
        );
    }
    let bytes = x.dtype().size_in_bytes() * (1 + kernel * kernel / (stride * stride)) * x.elem_count();
    let _note = profiler::note(check.0, 0, bytes);
    let x = check.map_float("x", x)?;
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, kernel, stride, padding);
    }
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        let out = |size: usize| (size + 2 * padding - kernel) / stride + 1;
        let (ho, wo, patch) = (out(h), out(w), kernel * kernel * c);
        let row_len = wo * patch;
        let y = fill(n * ho * row_len, (CHUNK / row_len).max(1) * row_len, |range, rows| {
            for (row, y) in (range.start / row_len..).zip(rows.chunks_exact_mut(row_len)) {
                let (image, oh) = (row / ho, row % ho);
                for (ow, y) in y.chunks_exact_mut(patch).enumerate() {
                    // The columns of the patch that lie in the image are contiguous in the image
                    // and in the patch.
                    let first = (ow * stride).max(padding);
                    let end = (ow * stride + kernel).min(w + padding);
                    let skipped = first - ow * stride;
                    let len = (end - first) * c;
                    for (kh, y) in y.chunks_exact_mut(kernel * c).enumerate() {
                        let ih = oh * stride + kh;
                        if ih < padding || ih >= h + padding {
                            continue;
                        }
                        let start = ((image * h + ih - padding) * w + first - padding) * c;
                        y[skipped * c..][..len].copy_from_slice(&x[start..][..len]);
                    }
                }
            }
        });
        cpu::tensor(y, (n, ho, wo, patch))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    /// Computes the convolution with Candle, which uses NCHW and a weight of shape
    /// `[Cout, C, k, k]`.
    fn convolution(x: &Tensor, w: &Tensor, kernel: usize, stride: usize) -> Tensor {
        let (c, outputs) = (x.dims()[3], w.dims()[1]);
        let w = w.reshape((kernel, kernel, c, outputs)).unwrap().permute((3, 2, 0, 1)).unwrap();
        let x = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        x.conv2d(&w.contiguous().unwrap(), (kernel - 1) / 2, stride, 1, 1)
            .unwrap()
            .permute((0, 2, 3, 1))
            .unwrap()
    }

    #[test]
    fn product_with_the_patches_is_convolution() {
        for (n, h, w) in [(1, 3, 3), (2, 5, 8), (1, 9, 4), (3, 33, 30)] {
            for (kernel, stride) in [(3, 1), (3, 2), (1, 1), (2, 2), (3, 3), (5, 1)] {
                for c in [1, 3, 7] {
                    let context = format!("{n}×{h}×{w}×{c}, kernel {kernel}, stride {stride}");
                    let (x, weight) = (random(1, &[n, h, w, c]), random(2, &[kernel * kernel * c, 5]));
                    let patches = forward(&x, kernel, stride).unwrap();
                    let y = crate::pointwise::forward(&patches, &weight).unwrap();
                    assert_close(&y, &convolution(&x, &weight, kernel, stride), 1e-5, &context);
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let x = random(1, &[6, 41, 40, 3]);
        assert_same_on_threads(|| vec![forward(&x, 3, 2).unwrap()]);
    }

    #[test]
    fn kernels_that_do_not_fit_are_errors() {
        let message = forward(&random(1, &[1, 1, 2, 3]), 4, 1).unwrap_err().to_string();
        assert!(message.contains("does not fit 1×2 images"), "{message}");
    }
}
