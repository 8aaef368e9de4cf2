//! The depthwise 3×3 convolution with padding 1, stride `s` of 1 or 2.
//!
//! `y[n,oh,ow,c] = Σ_{kh,kw} w[kh,kw,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`, where `x` is 0 outside
//! the image, and `Ho = (H − 1)/s + 1`. So
//! `∂x[n,ih,iw,c] = Σ_{kh,kw} w[kh,kw,c] · ∂y[n, (ih + 1 − kh)/s, (iw + 1 − kw)/s, c]` over the terms
//! whose divisions leave no remainder, and
//! `∂w[kh,kw,c] = Σ_{n,oh,ow} ∂y[n,oh,ow,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`.
//!
//! The kernels work on bands of rows of an image and 16 channels at a time: they first copy that block,
//! with a border of zeros, to scratch memory that stays in the first-level cache; so neither the image's
//! borders nor channel counts that are no multiple of 16 complicate the inner loops.

use crate::Result;
use crate::cpu::{self, CHUNK, Check, simd};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use std::ops::Range;

/// `y[N, Ho, Wo, C]` of `x[N, H, W, C]` and `w[3, 3, C]`.
pub fn forward(x: &Tensor, w: &Tensor, stride: usize) -> Result<Tensor> {
    let check = Check("depthwise::forward");
    let (_, height, width, c) = check.map("x", x)?;
    let w = check.dims("w", w, &[3, 3, c])?;
    let geometry = Geometry::new(&check, height, width, c, stride)?;
    Ok(check.float("x", x)?.apply_op2_no_bwd(&w, &Forward(geometry))?)
}

/// The gradient of the input, `[N, h, w, C]`, from that of the output; `size` is the `(h, w)` of the
/// input.
pub fn grad_input(gy: &Tensor, w: &Tensor, stride: usize, size: (usize, usize)) -> Result<Tensor> {
    let check = Check("depthwise::grad_input");
    let (n, _, _, c) = check.map("gy", gy)?;
    let w = check.dims("w", w, &[3, 3, c])?;
    let geometry = Geometry::new(&check, size.0, size.1, c, stride)?;
    let gy = check.dims("gy", gy, &[n, geometry.ho, geometry.wo, c])?;
    Ok(gy.apply_op2_no_bwd(&w, &GradInput(geometry))?)
}

/// The gradient of the weight, `[3, 3, C]`.
pub fn grad_weight(x: &Tensor, gy: &Tensor, stride: usize) -> Result<Tensor> {
    let check = Check("depthwise::grad_weight");
    let (n, height, width, c) = check.map("x", x)?;
    let geometry = Geometry::new(&check, height, width, c, stride)?;
    let gy = check.dims("gy", gy, &[n, geometry.ho, geometry.wo, c])?;
    Ok(check.float("x", x)?.apply_op2_no_bwd(&gy, &GradWeight(geometry))?)
}

/// The sizes of one convolution.
#[derive(Clone, Copy)]
struct Geometry {
    h: usize,
    w: usize,
    ho: usize,
    wo: usize,
    c: usize,
    stride: usize,
}

impl Geometry {
    fn new(check: &Check, h: usize, w: usize, c: usize, stride: usize) -> Result<Self> {
        if !(1..=2).contains(&stride) || h == 0 || w == 0 {
            return Err(check.setting(format!("stride {stride} of a {h}×{w} map: the stride must be 1 or 2")));
        }
        Ok(Self { h, w, ho: (h - 1) / stride + 1, wo: (w - 1) / stride + 1, c, stride })
    }

    /// Blocks of [`LANES`] channels.
    fn blocks(&self) -> usize {
        self.c.div_ceil(LANES)
    }
}

const LANES: usize = 16;

/// Neighbouring channels at one position.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

const ZERO: Lanes = Lanes([0.0; LANES]);

impl Lanes {
    /// The channels of a slice, those missing being 0.
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        match from.first_chunk() {
            Some(all) => Self(*all),
            None => {
                let mut lanes = ZERO;
                lanes.0[..from.len()].copy_from_slice(from);
                lanes
            }
        }
    }

    #[inline(always)]
    fn store(&self, to: &mut [f32]) {
        match to.first_chunk_mut() {
            Some(all) => *all = self.0,
            None => to.copy_from_slice(&self.0[..to.len()]),
        }
    }

    /// `self + a·b`.
    #[inline(always)]
    fn add_product(mut self, a: &Self, b: &Self) -> Self {
        for i in 0..LANES {
            self.0[i] = a.0[i].mul_add(b.0[i], self.0[i]);
        }
        self
    }
}

/// The channels of block `b` at one position.
#[inline(always)]
fn lanes_of(c: usize, b: usize) -> Range<usize> {
    b * LANES..c.min((b + 1) * LANES)
}

/// The weights as 9 taps for each block of channels.
fn taps(w: &[f32], c: usize) -> Vec<[Lanes; 9]> {
    (0..c.div_ceil(LANES))
        .map(|b| std::array::from_fn(|tap| Lanes::load(&w[tap * c..][lanes_of(c, b)])))
        .collect()
}

/// Copies one block of channels of `rows` rows of an image `[h, w, c]` from row `first` on (which may be
/// −1, and the last one `h`) to `block[rows][w + 2]`, with zeros around the image.
#[inline(always)]
fn pack(block: &mut Vec<Lanes>, image: &[f32], w: usize, c: usize, b: usize, first: isize, rows: usize) {
    block.resize(rows * (w + 2), ZERO);
    let h = (image.len() / (w * c)) as isize;
    for (row, out) in (first..).zip(block.chunks_exact_mut(w + 2)) {
        if row < 0 || row >= h {
            out.fill(ZERO);
            continue;
        }
        out[0] = ZERO;
        out[w + 1] = ZERO;
        let row = &image[row as usize * w * c..][..w * c];
        for (out, position) in out[1..=w].iter_mut().zip(row.chunks_exact(c)) {
            *out = Lanes::load(&position[lanes_of(c, b)]);
        }
    }
}

/// Cuts rows `rows` of the maps of a batch, `height` rows each, in bands of at most `most` that do not
/// cross images: `(image, first row in it, rows)`.
fn bands(rows: Range<usize>, height: usize, most: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut next = rows.start;
    std::iter::from_fn(move || {
        let (image, row) = (next / height, next % height);
        let len = most.min(height - row).min(rows.end - next);
        next += len;
        (len > 0).then_some((image, row, len))
    })
}

/// Rows of output in a band: what they read fits in a first-level cache, 16 channels wide.
fn band_rows(w: usize, stride: usize) -> usize {
    (CHUNK / 4 / (LANES * (w + 2) * stride)).max(2)
}

/// Rows per chunk of a map, a whole number of images where they are small.
fn rows_per_chunk(height: usize, row: usize) -> usize {
    let rows = (CHUNK / row).max(1);
    if rows > height { rows / height * height } else { rows }
}

simd! {
    /// Rows of the output, `[rows][wo][c]`, from `oh` on, of one image.
    fn convolve(
        image: &[f32],
        taps: &[[Lanes; 9]],
        y: &mut [f32],
        geometry: &Geometry,
        oh: usize,
        block: &mut Vec<Lanes>,
    ) {
        let &Geometry { w, wo, c, stride, .. } = geometry;
        let rows = y.len() / (wo * c);
        for (b, taps) in taps.iter().enumerate() {
            pack(block, image, w, c, b, (oh * stride) as isize - 1, (rows - 1) * stride + 3);
            for (row, y) in y.chunks_exact_mut(wo * c).enumerate() {
                let x = &block[row * stride * (w + 2)..];
                let (x0, x1, x2) = (&x[..w + 2], &x[w + 2..][..w + 2], &x[2 * (w + 2)..][..w + 2]);
                for (ow, y) in y.chunks_exact_mut(c).enumerate() {
                    let at = ow * stride;
                    let (x0, x1, x2) = (&x0[at..at + 3], &x1[at..at + 3], &x2[at..at + 3]);
                    let mut sum = ZERO;
                    for kw in 0..3 {
                        sum = sum.add_product(&x0[kw], &taps[kw]);
                        sum = sum.add_product(&x1[kw], &taps[3 + kw]);
                        sum = sum.add_product(&x2[kw], &taps[6 + kw]);
                    }
                    sum.store(&mut y[lanes_of(c, b)]);
                }
            }
        }
    }
}

/// The output of a convolution of the images `x`, in chunks over all threads.
fn convolve_all(x: &[f32], taps: &[[Lanes; 9]], geometry: &Geometry) -> Vec<f32> {
    let &Geometry { h, w, ho, wo, c, stride } = geometry;
    let images = x.len() / (h * w * c);
    let per_chunk = rows_per_chunk(ho, wo * c);
    let len = images * ho * wo * c;
    cpu::generate(len, 0, per_chunk * wo * c, Vec::new, |block, i, y| {
        let mut rest = y;
        let first = i * per_chunk;
        for (image, oh, rows) in bands(first..first + rest.len() / (wo * c), ho, band_rows(w, stride)) {
            let (y, after) = rest.split_at_mut(rows * wo * c);
            rest = after;
            convolve(&x[image * h * w * c..][..h * w * c], taps, y, geometry, oh, block);
        }
    })
    .0
}

struct Forward(Geometry);

impl CustomOp2 for Forward {
    fn name(&self) -> &'static str {
        "depthwise-forward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Geometry { ho, wo, c, .. } = self.0;
        let taps = taps(cpu::slice(w, w_layout)?, c);
        let y = convolve_all(cpu::slice(x, layout)?, &taps, &self.0);
        cpu::output(y, (layout.dims()[0], ho, wo, c))
    }
}

struct GradInput(Geometry);

simd! {
    /// Rows of the input's gradient, `[rows][w][c]`, from `ih` on, of one image, at stride 2. Rows and
    /// columns with an even index have the middle tap alone; the others the first and the last.
    fn gather(
        image: &[f32],
        taps: &[[Lanes; 9]],
        gx: &mut [f32],
        geometry: &Geometry,
        ih: usize,
        block: &mut Vec<Lanes>,
    ) {
        #[inline(always)]
        fn row<const ROWS: usize>(
            rows: [(&[Lanes], &[Lanes]); ROWS],
            gx: &mut [f32],
            c: usize,
            b: usize,
        ) {
            for (j, gx) in gx.chunks_mut(2 * c).enumerate() {
                let (mut even, mut odd) = (ZERO, ZERO);
                for (g, taps) in rows {
                    // The border of zeros is at index 0, and beyond the last column.
                    let (here, next) = (&g[j + 1], &g[j + 2]);
                    even = even.add_product(here, &taps[1]);
                    odd = odd.add_product(here, &taps[2]).add_product(next, &taps[0]);
                }
                even.store(&mut gx[lanes_of(c, b)]);
                if let Some(gx) = gx.get_mut(c..) && !gx.is_empty() {
                    odd.store(&mut gx[lanes_of(c, b)]);
                }
            }
        }
        let &Geometry { w, wo, c, .. } = geometry;
        let rows = gx.len() / (w * c);
        let first = ih / 2;
        for (b, taps) in taps.iter().enumerate() {
            pack(block, image, wo, c, b, first as isize, (ih + rows) / 2 - first + 1);
            for (ih, gx) in (ih..).zip(gx.chunks_exact_mut(w * c)) {
                let g = |oh: usize| &block[(oh - first) * (wo + 2)..][..wo + 2];
                if ih % 2 == 0 {
                    row([(g(ih / 2), &taps[3..6])], gx, c, b);
                } else {
                    row([(g(ih / 2), &taps[6..9]), (g(ih / 2 + 1), &taps[0..3])], gx, c, b);
                }
            }
        }
    }
}

impl CustomOp2 for GradInput {
    fn name(&self) -> &'static str {
        "depthwise-grad-input"
    }

    fn cpu_fwd(
        &self,
        gy: &CpuStorage,
        layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let geometry = &self.0;
        let &Geometry { h, w: width, ho, wo, c, stride } = geometry;
        let gy = cpu::slice(gy, layout)?;
        let mut taps = taps(cpu::slice(w, w_layout)?, c);
        let images = layout.dims()[0];
        let gx = if stride == 1 {
            // The convolution with the weight turned around.
            taps.iter_mut().for_each(|taps| taps.reverse());
            convolve_all(gy, &taps, geometry)
        } else {
            let per_chunk = rows_per_chunk(h, width * c);
            let len = images * h * width * c;
            cpu::generate(len, 0, per_chunk * width * c, Vec::new, |block, i, gx| {
                let mut rest = gx;
                let first = i * per_chunk;
                for (image, ih, rows) in
                    bands(first..first + rest.len() / (width * c), h, band_rows(width, 1))
                {
                    let (gx, after) = rest.split_at_mut(rows * width * c);
                    rest = after;
                    let image = &gy[image * ho * wo * c..][..ho * wo * c];
                    gather(image, &taps, gx, geometry, ih, block);
                }
            })
            .0
        };
        cpu::output(gx, (images, h, width, c))
    }
}

struct GradWeight(Geometry);

simd! {
    /// Adds what rows `gy[rows][wo][c]`, from `oh` on, of one image give to the weight's gradient.
    fn correlate(
        image: &[f32],
        gy: &[f32],
        taps: &mut [[Lanes; 9]],
        geometry: &Geometry,
        oh: usize,
        block: &mut Vec<Lanes>,
    ) {
        let &Geometry { w, wo, c, stride, .. } = geometry;
        let rows = gy.len() / (wo * c);
        for (b, taps) in taps.iter_mut().enumerate() {
            pack(block, image, w, c, b, (oh * stride) as isize - 1, (rows - 1) * stride + 3);
            let mut sums = [ZERO; 9];
            for (row, gy) in gy.chunks_exact(wo * c).enumerate() {
                let x = &block[row * stride * (w + 2)..];
                let (x0, x1, x2) = (&x[..w + 2], &x[w + 2..][..w + 2], &x[2 * (w + 2)..][..w + 2]);
                for (ow, gy) in gy.chunks_exact(c).enumerate() {
                    let at = ow * stride;
                    let (x0, x1, x2) = (&x0[at..at + 3], &x1[at..at + 3], &x2[at..at + 3]);
                    let gy = Lanes::load(&gy[lanes_of(c, b)]);
                    for kw in 0..3 {
                        sums[kw] = sums[kw].add_product(&x0[kw], &gy);
                        sums[3 + kw] = sums[3 + kw].add_product(&x1[kw], &gy);
                        sums[6 + kw] = sums[6 + kw].add_product(&x2[kw], &gy);
                    }
                }
            }
            for (tap, sum) in taps.iter_mut().zip(&sums) {
                for (tap, sum) in tap.0.iter_mut().zip(&sum.0) {
                    *tap += sum;
                }
            }
        }
    }
}

impl CustomOp2 for GradWeight {
    fn name(&self) -> &'static str {
        "depthwise-grad-weight"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gy: &CpuStorage,
        gy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let geometry = &self.0;
        let &Geometry { h, w, ho, wo, c, stride } = geometry;
        let (x, gy) = (cpu::slice(x, layout)?, cpu::slice(gy, gy_layout)?);
        let images = layout.dims()[0];
        let parts = cpu::parts(images * ho, wo * c, |rows| {
            let mut block = Vec::new();
            let mut taps = vec![[ZERO; 9]; geometry.blocks()];
            let mut rest = &gy[rows.start * wo * c..rows.end * wo * c];
            for (image, oh, rows) in bands(rows, ho, band_rows(w, stride)) {
                let (gy, after) = rest.split_at(rows * wo * c);
                rest = after;
                correlate(&x[image * h * w * c..][..h * w * c], gy, &mut taps, geometry, oh, &mut block);
            }
            taps
        });
        let mut gw = Vec::with_capacity(9 * c);
        for tap in 0..9 {
            for channel in 0..c {
                let of_part =
                    |part: &Vec<[Lanes; 9]>| f64::from(part[channel / LANES][tap].0[channel % LANES]);
                gw.push(parts.iter().map(of_part).sum::<f64>() as f32);
            }
        }
        cpu::output(gw, (3, 3, c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    /// Every `stride`-th position, beginning at `start`, along a dimension.
    fn strided(
        x: &Tensor,
        dim: usize,
        start: usize,
        len: usize,
        stride: usize,
    ) -> candle_core::Result<Tensor> {
        let indices: Vec<u32> = (0..len).map(|i| (start + i * stride) as u32).collect();
        x.index_select(&Tensor::new(indices, x.device())?, dim)
    }

    fn reference(x: &Tensor, w: &Tensor, stride: usize) -> candle_core::Result<Tensor> {
        let (_, h, width, c) = x.dims4()?;
        let padded = x.contiguous()?.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
        let (ho, wo) = ((h - 1) / stride + 1, (width - 1) / stride + 1);
        let mut y = None;
        for kh in 0..3 {
            for kw in 0..3 {
                let shifted = strided(&strided(&padded, 1, kh, ho, stride)?, 2, kw, wo, stride)?;
                let tap = w.narrow(0, kh, 1)?.narrow(1, kw, 1)?.reshape(c)?;
                let term = shifted.broadcast_mul(&tap)?;
                y = Some(match y {
                    None => term,
                    Some(y) => (y + term)?,
                });
            }
        }
        Ok(y.expect("nine taps"))
    }

    #[test]
    fn forward_and_gradients_match_the_reference() {
        for (n, h, w) in MAPS {
            for (c, stride) in CHANNELS.into_iter().flat_map(|c| [(c, 1), (c, 2)]) {
                let context = format!("{n}×{h}×{w}×{c}, stride {stride}");
                let (x, weight) = (random(1, &[n, h, w, c]), random(2, &[3, 3, c]));
                let expected = reference(&x, &weight, stride).unwrap();
                assert_close(&forward(&x, &weight, stride).unwrap(), &expected, 1e-6, &context);
                let gy = random(3, expected.dims());
                let gx = grad_input(&gy, &weight, stride, (h, w)).unwrap();
                let gw = grad_weight(&x, &gy, stride).unwrap();
                let reference = |inputs: &[Tensor]| reference(&inputs[0], &inputs[1], stride);
                assert_gradients(&[&x, &weight], &gy, reference, &[&gx, &gw], &context);
            }
        }
    }

    #[test]
    fn large_maps_match_the_reference_and_have_the_same_bits_everywhere() {
        for (dims, stride) in LARGE.into_iter().flat_map(|dims| [(dims, 1), (dims, 2)]) {
            let context = format!("{dims:?}, stride {stride}");
            let (x, w) = (random(1, &dims), random(2, &[3, 3, dims[3]]));
            let expected = reference(&x, &w, stride).unwrap();
            let gy = random(3, expected.dims());
            assert_close(&forward(&x, &w, stride).unwrap(), &expected, 1e-6, &context);
            // ⟨∂y, conv(x, w)⟩ is linear in both, so it is ⟨∂x, x⟩ and ⟨∂w, w⟩.
            let dot = |a: &Tensor, b: &Tensor| -> f64 {
                elements(a).iter().zip(elements(b)).map(|(a, b)| a * b).sum()
            };
            let gx = grad_input(&gy, &w, stride, (dims[1], dims[2])).unwrap();
            let gw = grad_weight(&x, &gy, stride).unwrap();
            let expected = dot(&gy, &expected);
            for found in [dot(&gx, &x), dot(&gw, &w)] {
                assert!((found - expected).abs() < 1e-2, "{context}: {found} and not {expected}");
            }
            assert_same_everywhere(|| {
                vec![
                    forward(&x, &w, stride).unwrap(),
                    grad_input(&gy, &w, stride, (dims[1], dims[2])).unwrap(),
                    grad_weight(&x, &gy, stride).unwrap(),
                ]
            });
        }
    }

    #[test]
    fn strided_views_are_read_as_what_they_are() {
        let (x, w) = (random(1, &[2, 7, 5, 4]), random(2, &[3, 3, 7]));
        let view = x.transpose(1, 3).unwrap();
        let expected = reference(&view, &w, 1).unwrap();
        assert_close(&forward(&view, &w, 1).unwrap(), &expected, 1e-6, "transposed");
        let half = x.narrow(0, 1, 1).unwrap();
        let expected = reference(&half, &w.narrow(2, 0, 4).unwrap(), 2).unwrap();
        assert_close(&forward(&half, &w.narrow(2, 0, 4).unwrap(), 2).unwrap(), &expected, 1e-6, "part");
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (x, w) = (random(1, &[2, 4, 4, 3]), random(2, &[3, 3, 5]));
        let message = forward(&x, &w, 1).unwrap_err().to_string();
        assert_eq!(message, "depthwise::forward: w has shape [3, 3, 5], expected [3, 3, 3]");
        let w = random(2, &[3, 3, 3]);
        assert!(forward(&x, &w, 3).unwrap_err().to_string().contains("stride"));
        assert!(grad_input(&x, &w, 2, (4, 4)).unwrap_err().to_string().contains("gy has shape"));
        let double = x.to_dtype(candle_core::DType::F64).unwrap();
        assert!(forward(&double, &w, 1).unwrap_err().to_string().contains("x is F64, expected F32"));
    }
}
