//! The depthwise 3×3 convolution with padding 1, stride `s` of 1 or 2.
//!
//! `y[n,oh,ow,c] = Σ_{kh,kw} w[kh,kw,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`, where `x` is 0 outside
//! the image, and `Ho = (H − 1)/s + 1`. So
//! `∂x[n,ih,iw,c] = Σ_{kh,kw} w[kh,kw,c] · ∂y[n, (ih + 1 − kh)/s, (iw + 1 − kw)/s, c]` over the terms
//! whose divisions leave no remainder, and
//! `∂w[kh,kw,c] = Σ_{n,oh,ow} ∂y[n,oh,ow,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`.
//!
//! The kernels visit a map's positions in the order of memory, and at each the channels in blocks whose
//! sums stay in registers. Which taps reach a position is a product of rows and columns, found once per
//! call: so the borders of a map, the stride and the direction are all one to the inner loops. The
//! weight's gradient, which has nine sums for each channel, takes 16 channels of some rows at a time.

use crate::Result;
use crate::cpu::{self, CHUNK, Check, simd};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use std::mem::MaybeUninit;
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
}

/// How taps reach from the positions of one map to those of another, along one dimension.
#[derive(Clone, Copy)]
enum Direction {
    /// From output to input: tap `k` of position `o` is at `o·s + k − 1`.
    Forward,
    /// From input to output: tap `k` of position `i` is at `(i + 1 − k)/s`, where that is whole.
    Backward,
}

/// One tap: where it reads, and its place in the weight, both as offsets in memory.
#[derive(Clone, Copy)]
struct Tap {
    source: usize,
    weight: usize,
}

/// For each of `positions`, the taps that fall on a source of `sources` positions, whose elements are
/// `source_step` and `weight_step` apart in memory.
fn reach(
    direction: Direction,
    stride: usize,
    (positions, sources): (usize, usize),
    (source_step, weight_step): (usize, usize),
) -> Vec<Vec<Tap>> {
    let source = |position: usize, k: usize| match direction {
        Direction::Forward => (position * stride + k).checked_sub(1),
        Direction::Backward => {
            let distance = (position + 1).checked_sub(k)?;
            distance.is_multiple_of(stride).then_some(distance / stride)
        }
    };
    let tap = |position: usize, k: usize| {
        let source = source(position, k).filter(|source| *source < sources)?;
        Some(Tap { source: source * source_step, weight: k * weight_step })
    };
    (0..positions).map(|position| (0..3).filter_map(|k| tap(position, k)).collect()).collect()
}

/// Calls `$block::<L, …>(…, at)` for blocks of `L` channels, from `at` on, that cover `$c` channels. The
/// last block may overlap the one before it: computing a channel twice must do no harm.
macro_rules! cover {
    ($c:expr, [$($lanes:literal),*], $block:ident $constants:tt $arguments:tt) => {{
        let (c, mut at) = ($c, 0);
        $(
            while c - at >= $lanes {
                cover!(@call $block, $lanes, $constants, at, $arguments);
                at += $lanes;
            }
            // Better one block that repeats some channels than several narrow ones.
            if at < c && c >= $lanes && $lanes <= 16 {
                cover!(@call $block, $lanes, $constants, c - $lanes, $arguments);
                at = c;
            }
        )*
        debug_assert_eq!(at, c);
    }};
    (@call $block:ident, $lanes:literal, [$($constant:literal)?], $at:expr, ($($argument:expr),*)) => {
        $block::<$lanes $(, $constant)?>($($argument,)* $at)
    };
}

/// `y[at..at + L] = Σ_taps x·w` at one position.
#[inline(always)]
fn single<const L: usize>(
    x: &[f32],
    w: &[f32],
    y: &mut [MaybeUninit<f32>],
    rows: &[Tap],
    columns: &[Tap],
    at: usize,
) {
    let mut sum = [0.0; L];
    for column in columns {
        for row in rows {
            let x = &x[row.source + column.source + at..][..L];
            let w = &w[row.weight + column.weight + at..][..L];
            for i in 0..L {
                sum[i] = x[i].mul_add(w[i], sum[i]);
            }
        }
    }
    y[at..at + L].write_copy_of_slice(&sum);
}

/// [`single`] at `T` neighbouring positions of `c` channels, `first` being the column taps of the first
/// of them. They have all three columns, a position apart, so most of what one position reads the others
/// need too.
#[inline(always)]
fn several<const L: usize, const T: usize>(
    x: &[f32],
    w: &[f32],
    y: &mut [MaybeUninit<f32>],
    c: usize,
    rows: &[Tap],
    first: &[Tap; 3],
    at: usize,
) {
    // In either direction: the leftmost source, and the weights from left to right.
    let source = first[0].source.min(first[2].source);
    let mut weights = first.map(|tap| tap.weight);
    if first[0].source > source {
        weights.reverse();
    }
    let mut sums = [[0.0; L]; T];
    for row in rows {
        let x = &x[row.source + source + at..];
        let mut taps = [[0.0; L]; 3];
        for (tap, weight) in taps.iter_mut().zip(weights) {
            tap.copy_from_slice(&w[row.weight + weight + at..][..L]);
        }
        for column in 0..T + 2 {
            let x = &x[column * c..][..L];
            for t in 0..T {
                // Constant after unrolling.
                if t <= column && column <= t + 2 {
                    let (sum, tap) = (&mut sums[t], &taps[column - t]);
                    for i in 0..L {
                        sum[i] = x[i].mul_add(tap[i], sum[i]);
                    }
                }
            }
        }
    }
    for (y, sum) in y.chunks_exact_mut(c).zip(&sums) {
        y[at..at + L].write_copy_of_slice(sum);
    }
}

simd! {
    /// One row of positions, `y[columns][c]`, from an image.
    fn gather_row(
        x: &[f32],
        w: &[f32],
        y: &mut [MaybeUninit<f32>],
        c: usize,
        stride: usize,
        rows: &[Tap],
        columns: &[Vec<Tap>],
    ) {
        let mut position = 0;
        while position < columns.len() {
            let y = &mut y[position * c..];
            let full = |columns: &[Vec<Tap>]| stride == 1 && columns.iter().all(|taps| taps.len() == 3);
            let first = columns[position].as_array::<3>();
            let next = |count: usize| columns.get(position..position + count);
            if let (Some(first), Some(true)) = (first, next(4).map(full)) {
                cover!(c, [16, 8, 4, 1], several[4](x, w, y, c, rows, first));
                position += 4;
            } else if let (Some(first), Some(true)) = (first, next(2).map(full)) {
                cover!(c, [32, 16, 8, 4, 1], several[2](x, w, y, c, rows, first));
                position += 2;
            } else {
                cover!(c, [64, 16, 8, 4, 1], single[](x, w, y, rows, &columns[position]));
                position += 1;
            }
        }
    }
}

/// What the taps gather for each position of the maps of a batch, from `x[N, h, w, C]`.
fn gather(
    x: &[f32],
    w: &[f32],
    direction: Direction,
    stride: usize,
    (from_h, from_w): (usize, usize),
    (to_h, to_w): (usize, usize),
    c: usize,
) -> Vec<f32> {
    let rows = reach(direction, stride, (to_h, from_h), (from_w * c, 3 * c));
    let columns = reach(direction, stride, (to_w, from_w), (c, c));
    let (from, to) = (from_h * from_w * c, to_w * c);
    let per_chunk = (CHUNK / to).max(1);
    let positions = x.len() / from * to_h;
    // SAFETY: a chunk is whole rows of `to` elements, and `gather_row` writes all columns of a row, and by
    // `cover!` all channels of a column.
    #[allow(unsafe_code)]
    unsafe {
        cpu::fill_uninit(positions * to, per_chunk * to, |i, y| {
            for (row, y) in (i * per_chunk..).zip(y.chunks_exact_mut(to)) {
                let x = &x[row / to_h * from..][..from];
                gather_row(x, w, y, c, stride, &rows[row % to_h], &columns);
            }
        })
    }
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
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Geometry { h, w, ho, wo, c, stride } = self.0;
        let (x, weight) = (cpu::slice(x, layout)?, cpu::slice(weight, weight_layout)?);
        let y = gather(x, weight, Direction::Forward, stride, (h, w), (ho, wo), c);
        cpu::output(y, (layout.dims()[0], ho, wo, c))
    }
}

struct GradInput(Geometry);

impl CustomOp2 for GradInput {
    fn name(&self) -> &'static str {
        "depthwise-grad-input"
    }

    fn cpu_fwd(
        &self,
        gy: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Geometry { h, w, ho, wo, c, stride } = self.0;
        let (gy, weight) = (cpu::slice(gy, layout)?, cpu::slice(weight, weight_layout)?);
        let gx = gather(gy, weight, Direction::Backward, stride, (ho, wo), (h, w), c);
        cpu::output(gx, (layout.dims()[0], h, w, c))
    }
}

struct GradWeight(Geometry);

const LANES: usize = 16;

/// Neighbouring channels at one position, on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

const ZERO: Lanes = Lanes([0.0; LANES]);
const ONE: Lanes = Lanes([1.0; LANES]);

impl Lanes {
    /// The channels of a slice, those missing being 0.
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        match from.first_chunk() {
            Some(all) => Self(*all),
            None => {
                let mut lanes = ZERO;
                for (lane, value) in lanes.0.iter_mut().zip(from) {
                    *lane = *value;
                }
                lanes
            }
        }
    }

    /// `self + a·b`. By value, which keeps sums in registers.
    #[inline(always)]
    fn plus(mut self, a: &Self, b: &Self) -> Self {
        for i in 0..LANES {
            self.0[i] = a.0[i].mul_add(b.0[i], self.0[i]);
        }
        self
    }
}

/// Copies one block of channels of rows of an image `[h, w, c]`, from row `first − 1` on, to
/// `block[rows][w + 2]`, with zeros around the image.
#[inline(always)]
fn pack(block: &mut [Lanes], image: &[f32], w: usize, c: usize, channels: &Range<usize>, first: usize) {
    let h = image.len() / (w * c);
    for (row, out) in (first..).zip(block.chunks_exact_mut(w + 2)) {
        if row == 0 || row > h {
            out.fill(ZERO);
            continue;
        }
        out[0] = ZERO;
        out[w + 1] = ZERO;
        let row = &image[(row - 1) * w * c..][..w * c];
        for (out, position) in out[1..=w].iter_mut().zip(row.chunks_exact(c)) {
            *out = Lanes::load(&position[channels.clone()]);
        }
    }
}

simd! {
    /// Adds to the sums of the weight's gradient what rows `gy[rows][wo][c]`, from row `oh` on, of one
    /// image give. One block of channels at a time is copied to `block`, which stays in cache, with a
    /// border of zeros: so all positions have all taps, and their sums stay in registers.
    fn correlate(
        image: &[f32],
        gy: &[f32],
        sums: &mut [[Lanes; 9]],
        geometry: &Geometry,
        oh: usize,
        block: &mut Vec<Lanes>,
    ) {
        let &Geometry { w, wo, c, stride, .. } = geometry;
        let rows = gy.len() / (wo * c);
        block.resize(((rows - 1) * stride + 3) * (w + 2), ZERO);
        for (b, sums) in sums.iter_mut().enumerate() {
            let channels = b * LANES..c.min((b + 1) * LANES);
            pack(block, image, w, c, &channels, oh * stride);
            let mut sum = [ZERO; 9];
            for (row, gy) in gy.chunks_exact(wo * c).enumerate() {
                let x = &block[row * stride * (w + 2)..];
                let (x0, x1, x2) = (&x[..w + 2], &x[w + 2..][..w + 2], &x[2 * (w + 2)..][..w + 2]);
                for (ow, gy) in gy.chunks_exact(c).enumerate() {
                    let at = ow * stride;
                    let (x0, x1, x2) = (&x0[at..at + 3], &x1[at..at + 3], &x2[at..at + 3]);
                    let gy = Lanes::load(&gy[channels.clone()]);
                    for kw in 0..3 {
                        sum[kw] = sum[kw].plus(&x0[kw], &gy);
                        sum[3 + kw] = sum[3 + kw].plus(&x1[kw], &gy);
                        sum[6 + kw] = sum[6 + kw].plus(&x2[kw], &gy);
                    }
                }
            }
            for (total, sum) in sums.iter_mut().zip(&sum) {
                *total = total.plus(sum, &ONE);
            }
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
        // What a block of channels of a band reads fits in a first-level cache.
        let rows_per_band = (CHUNK / 4 / (LANES * (w + 2) * stride)).max(2);
        let parts = cpu::parts(layout.dims()[0] * ho, wo * c, |rows| {
            let mut sums = vec![[ZERO; 9]; c.div_ceil(LANES)];
            let mut block = Vec::new();
            for (image, oh, rows) in bands(rows, ho, rows_per_band) {
                let (x, gy) = (&x[image * h * w * c..][..h * w * c], &gy[(image * ho + oh) * wo * c..]);
                correlate(x, &gy[..rows * wo * c], &mut sums, geometry, oh, &mut block);
            }
            sums
        });
        let sum = |tap: usize, channel: usize| {
            let of_part = |sums: &Vec<[Lanes; 9]>| f64::from(sums[channel / LANES][tap].0[channel % LANES]);
            parts.iter().map(of_part).sum::<f64>() as f32
        };
        let gw = (0..9).flat_map(|tap| (0..c).map(move |channel| (tap, channel)));
        cpu::output(gw.map(|(tap, channel)| sum(tap, channel)).collect(), (3, 3, c))
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
