//! The depthwise 3×3 convolution with padding 1 and a stride `s` of 1 or 2.
//!
//! `y[n,oh,ow,c] = Σ_{kh,kw} w[kh,kw,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`, where `x` is 0
//! outside the image and `Ho = (H − 1)/s + 1`. So
//! `∂x[n,ih,iw,c] = Σ_{kh,kw} w[kh,kw,c] · ∂y[n, (ih + 1 − kh)/s, (iw + 1 − kw)/s, c]` over the terms
//! whose divisions leave no remainder, and
//! `∂w[kh,kw,c] = Σ_{n,oh,ow} ∂y[n,oh,ow,c] · x[n, oh·s + kh − 1, ow·s + kw − 1, c]`.
//!
//! The kernels visit the positions of a map in memory order, and at each position the channels in
//! blocks whose sums stay in registers. The taps that reach a position are a product of row taps
//! and column taps, which are found once per call, so the inner loops treat borders, strides and
//! both directions alike. The gradient of the weight has nine sums for each channel, so its kernel
//! takes 16 channels of some rows at a time. Rows that must first be computed, of a normalized
//! input or of `∂z`, are held in a window that stays in cache.
//!
//! On a GPU a thread goes down some columns of a map and holds the rows of its window in registers
//! (depthwise.cu).

mod gpu;

use crate::affine::AffineActivation;
use crate::blockwise::{self, Blockwise};
use crate::check::Check;
use crate::cpu::{self, open, prefetch, simd};
use crate::elements::{Element, Stored, by_element};
use crate::feature::Operand;
use crate::norm::{
    self, DeferredGradient, Epilogue, GradientAccumulator, GradientSums, MapGradient, OpenEpilogue,
    OpenGradient, Stats,
};
use crate::work::{CHECKED, CHUNK, Progress, Written, append, parts, parts_writing, poison};
use crate::{Activation, FeatureMap, Quantizer, Result, clamp, profiler};
use candle_core::Tensor;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Computes `z[N, Ho, Wo, C]` from `x[N, H, W, C]` and `w[3, 3, C]`.
pub fn forward(x: impl Into<FeatureMap>, w: &Tensor, stride: usize) -> Result<Tensor> {
    fn of(x: &FeatureMap, w: &Tensor, stride: usize) -> Result<Tensor> {
        let check = Check("depthwise::forward");
        if crate::gpu::runs(w.device()) {
            return gpu::forward(&check, x, w, stride);
        }
        by_element!(x.dtype(), T => with_gather::<T, _>(&check, x, w, stride, |gather| blockwise::plain(gather)))
    }
    of(&x.into(), w, stride)
}

/// Computes [`forward`] and the statistics of `z`.
pub fn forward_stats(x: impl Into<FeatureMap>, w: &Tensor, stride: usize) -> Result<(Tensor, Stats)> {
    fn of(x: &FeatureMap, w: &Tensor, stride: usize) -> Result<(Tensor, Stats)> {
        let check = Check("depthwise::forward_stats");
        if crate::gpu::runs(w.device()) {
            return gpu::forward_stats(&check, x, w, stride);
        }
        by_element!(x.dtype(), T => {
            with_gather::<T, _>(&check, x, w, stride, |gather| blockwise::with_stats(gather))
        })
    }
    of(&x.into(), w, stride)
}

/// Computes `Q(φ(scale·z + shift))`, with `scale` and `shift` of shape `[C]`.
pub fn forward_normalized(
    x: impl Into<FeatureMap>,
    w: &Tensor,
    stride: usize,
    affine: (&Tensor, &Tensor),
    act: Activation,
    quant: Option<Quantizer<'_>>,
) -> Result<FeatureMap> {
    fn of(
        x: &FeatureMap,
        w: &Tensor,
        stride: usize,
        (scale, shift): (&Tensor, &Tensor),
        act: Activation,
        quant: Option<Quantizer<'_>>,
    ) -> Result<FeatureMap> {
        let check = Check("depthwise::forward_normalized");
        if crate::gpu::runs(w.device()) {
            return norm::forward(&gpu::forward(&check, x, w, stride)?, scale, shift, act, quant);
        }
        check.quantizer(quant)?;
        by_element!(x.dtype(), T => with_gather::<T, _>(&check, x, w, stride, |gather| {
            let affine = AffineActivation::new(&check, gather.dims[3], scale, shift, act)?;
            blockwise::normalized(gather, &affine, quant)
        }))
    }
    of(&x.into(), w, stride, affine, act, quant)
}

/// Computes the gradient of the input, `[N, h, w, C]`, from the gradient of the output; `size` is
/// the `(h, w)` of the input.
pub fn grad_input(gz: &Tensor, w: &Tensor, stride: usize, size: (usize, usize)) -> Result<Tensor> {
    let check = Check("depthwise::grad_input");
    let (n, _, _, c) = check.map("gz", gz.dims())?;
    let w = check.dims("w", w, &[3, 3, c])?;
    let geometry = Geometry::new(&check, size.0, size.1, c, stride)?;
    geometry.check_output(&check, n, gz)?;
    let Geometry { h, w: width, ho, wo, .. } = geometry;
    let gz = check.map_float("gz", gz)?;
    let bytes = gz.dtype().size_in_bytes() * n * c * (ho * wo + h * width);
    let _note = profiler::note(check.0, 18 * n * ho * wo * c, bytes);
    if crate::gpu::runs(gz.device()) {
        return gpu::grad_input(&gz, &w, stride, size);
    }
    let dtype = gz.dtype();
    let (gz, w) = (open(&gz), open(&w));
    let to = (h, width, c);
    by_element!(dtype, T => {
        let x = Operand::Stored(Stored::<T>::Floats(gz.elements()?));
        blockwise::plain(&Gather::new(x, w.floats()?, Direction::Backward, stride, n, (ho, wo), to))
    })
}

/// Computes the gradient of the weight, `[3, 3, C]`.
pub fn grad_weight(x: impl Into<FeatureMap>, gz: &Tensor, stride: usize) -> Result<Tensor> {
    fn of(x: &FeatureMap, gz: &Tensor, stride: usize) -> Result<Tensor> {
        let check = Check("depthwise::grad_weight");
        let (n, height, width, c) = check.map("x", x.dims())?;
        let geometry = Geometry::new(&check, height, width, c, stride)?;
        let bytes = x.bytes() + gz.dtype().size_in_bytes() * gz.elem_count();
        let _note = profiler::note(check.0, 18 * gz.elem_count(), bytes);
        geometry.check_output(&check, n, gz)?;
        let gz = check.dtype("gz", gz, x.dtype())?;
        if crate::gpu::runs(gz.device()) {
            return gpu::grad_weight(&check, x, &gz, stride);
        }
        let gw = by_element!(x.dtype(), T => {
            x.read::<T, _>(&check, "x", |x| Ok(weight_gradient(x, open(&gz).elements()?, n, &geometry)))?
        });
        cpu::tensor(gw, (3, 3, c))
    }
    of(&x.into(), gz, stride)
}

/// Computes [`grad_weight`] and [`grad_input`] from the gradient `∂z` of the output:
/// `([3, 3, C], [N, H, W, C])`.
///
/// `below` is the epilogue that made `x`, as in [`crate::pointwise::backward`].
pub fn backward(
    x: impl Into<FeatureMap>,
    w: &Tensor,
    gz: &DeferredGradient,
    stride: usize,
    below: Option<&Epilogue>,
) -> Result<(Tensor, MapGradient)> {
    fn of(
        x: &FeatureMap,
        w: &Tensor,
        gz: &DeferredGradient,
        stride: usize,
        below: Option<&Epilogue>,
    ) -> Result<(Tensor, MapGradient)> {
        let check = Check("depthwise::backward");
        let dims = x.dims();
        let (n, height, width, c) = check.map("x", dims)?;
        if crate::gpu::runs(w.device()) {
            let gz = gz.tensor()?;
            return Ok((grad_weight(x, &gz, stride)?, grad_input(&gz, w, stride, (height, width))?.into()));
        }
        let geometry = Geometry::new(&check, height, width, c, stride)?;
        let outputs = gz.z().elem_count();
        let size = gz.z().dtype().size_in_bytes();
        let bytes = norm::bytes_with(x, below) + size * (n * height * width * c + 2 * outputs);
        let _note = profiler::note(check.0, 36 * outputs, bytes);
        geometry.check_output(&check, n, gz.z())?;
        let w = check.dims("w", w, &[3, 3, c])?;
        let w = open(&w);
        let w = w.floats()?;
        by_element!(x.dtype(), T => {
            let (gw, gx, sums) = x.read::<T, _>(&check, "x", |x| {
                gz.read::<T, _>(|gz| {
                    Epilogue::read_below(below, &check, dims, |below| {
                        Ok(gradients(x, w, gz, below, n, &geometry))
                    })
                })
            })?;
            Ok((cpu::tensor(gw, (3, 3, c))?, MapGradient { tensor: cpu::tensor(gx, dims)?, sums }))
        })
    }
    of(&x.into(), w, gz, stride, below)
}

/// Checks the operands, and calls `f` with the forward convolution.
fn with_gather<T: Element, R>(
    check: &Check,
    x: &FeatureMap,
    w: &Tensor,
    stride: usize,
    f: impl FnOnce(&Gather<'_, T>) -> Result<R>,
) -> Result<R> {
    let (n, height, width, c) = check.map("x", x.dims())?;
    let w = check.dims("w", w, &[3, 3, c])?;
    let Geometry { h, w: width, ho, wo, .. } = Geometry::new(check, height, width, c, stride)?;
    let outputs = n * ho * wo * c;
    let _note = profiler::note(check.0, 18 * outputs, x.bytes() + size_of::<T>() * outputs);
    x.read(check, "x", |x| {
        let w = open(&w);
        f(&Gather::new(x, w.floats()?, Direction::Forward, stride, n, (h, width), (ho, wo, c)))
    })
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

    /// Checks that a gradient has the shape of the output of `n` images.
    fn check_output(&self, check: &Check, n: usize, gz: &Tensor) -> Result<()> {
        let expected = [n, self.ho, self.wo, self.c];
        if gz.dims() != expected {
            return Err(check.shape("gz", gz, format!("{expected:?}")));
        }
        Ok(())
    }
}

/// The direction in which taps lead from the positions of one map to those of another, along one
/// dimension.
#[derive(Clone, Copy)]
enum Direction {
    /// From output to input: tap `k` of position `o` is at `o·s + k − 1`.
    Forward,
    /// From input to output: tap `k` of position `i` is at `(i + 1 − k)/s`, if that is an integer.
    Backward,
}

/// One tap: the position that it reads and its position in the weight, both as offsets in memory.
#[derive(Clone, Copy)]
struct Tap {
    source: usize,
    weight: usize,
}

/// Returns, for each of `positions` positions, the taps whose source is one of the `sources` source
/// positions.
///
/// Neighbouring sources are `source_step` elements apart in memory, and neighbouring taps
/// `weight_step`.
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

/// Calls `$block::<L, …>(…, at)` for blocks of `L` channels, starting at `at`, that together cover
/// `$c` channels. The last block may overlap the one before it, so computing a channel twice must
/// do no harm.
macro_rules! cover {
    ($c:expr, [$($lanes:literal),*], $block:ident $constants:tt $arguments:tt) => {{
        let (c, mut at) = ($c, 0);
        $(
            while c - at >= $lanes {
                cover!(@call $block, $lanes, $constants, at, $arguments);
                at += $lanes;
            }
            // One block that repeats some channels is cheaper than several narrow ones.
            if at < c && c >= $lanes && $lanes <= 16 {
                cover!(@call $block, $lanes, $constants, c - $lanes, $arguments);
                at = c;
            }
        )*
        if CHECKED {
            assert_eq!(at, c);
        }
    }};
    (@call $block:ident, $lanes:literal, [$($constant:literal)?], $at:expr, ($($argument:expr),*)) => {
        $block::<_, $lanes $(, $constant)?>($($argument,)* $at)
    };
}

/// Computes `y[at..at + L] = Σ_taps x·w` at one position.
#[inline(always)]
fn single<T: Copy, const L: usize>(
    x: &[T],
    value: impl Fn(T) -> f32,
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
                sum[i] = value(x[i]).mul_add(w[i], sum[i]);
            }
        }
    }
    y[at..at + L].write_copy_of_slice(&sum);
}

/// Computes [`single`] at `P` neighbouring positions of `c` channels, where `first` are the column
/// taps of the first position. All positions have all three column taps, and their sources are one
/// position apart, so neighbouring positions share most of what they read.
#[inline(always)]
fn several<T: Copy, const L: usize, const P: usize>(
    x: &[T],
    value: impl Fn(T) -> f32,
    w: &[f32],
    y: &mut [MaybeUninit<f32>],
    c: usize,
    rows: &[Tap],
    first: &[Tap; 3],
    at: usize,
) {
    // In either direction, the leftmost source, and the weights from left to right.
    let source = first[0].source.min(first[2].source);
    let mut weights = first.map(|tap| tap.weight);
    if first[0].source > source {
        weights.reverse();
    }
    let mut sums = [[0.0; L]; P];
    for row in rows {
        let x = &x[row.source + source + at..];
        let mut taps = [[0.0; L]; 3];
        for (tap, weight) in taps.iter_mut().zip(weights) {
            tap.copy_from_slice(&w[row.weight + weight + at..][..L]);
        }
        for column in 0..P + 2 {
            let mut values = [0.0; L];
            for (value_at, x) in values.iter_mut().zip(&x[column * c..][..L]) {
                *value_at = value(*x);
            }
            for p in 0..P {
                // The condition is constant after unrolling.
                if p <= column && column <= p + 2 {
                    let (sum, tap) = (&mut sums[p], &taps[column - p]);
                    for i in 0..L {
                        sum[i] = values[i].mul_add(tap[i], sum[i]);
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
    /// Writes one row of positions, `y[columns][c]`, computed from an image.
    fn gather_row<'y, T: Element>(
        x: Stored<'_, T>,
        w: &[f32],
        y: &'y mut [MaybeUninit<f32>],
        c: usize,
        stride: usize,
        rows: &[Tap],
        columns: &[Vec<Tap>],
    ) -> Written<'y> {
        assert_eq!(y.len(), columns.len() * c);
        poison(y);
        match x {
            Stored::Floats(x) => gather_positions(x, |x| x.float(), w, y, c, stride, rows, columns),
            Stored::Levels(x, grid) => {
                gather_positions(x, |q| grid.value(f32::from(q)), w, y, c, stride, rows, columns);
            }
        }
        // SAFETY: `gather_positions` visits all columns, and `cover!` all channels of each.
        #[allow(unsafe_code)]
        unsafe {
            y.assume_init_ref().into()
        }
    }
}

#[inline(always)]
fn gather_positions<T: Copy>(
    x: &[T],
    value: impl Fn(T) -> f32 + Copy,
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
            cover!(c, [16, 8, 4, 1], several[4](x, value, w, y, c, rows, first));
            position += 4;
        } else if let (Some(first), Some(true)) = (first, next(2).map(full)) {
            cover!(c, [32, 16, 8, 4, 1], several[2](x, value, w, y, c, rows, first));
            position += 2;
        } else {
            cover!(c, [64, 16, 8, 4, 1], single[](x, value, w, y, rows, &columns[position]));
            position += 1;
        }
    }
}

/// The sum over taps at each position of the maps of a batch: the convolution, or the gradient of
/// its input.
struct Gather<'a, T> {
    x: Operand<'a, T>,
    w: &'a [f32],
    stride: usize,
    /// The dimensions `[N, H, W, C]` of the maps that are written.
    dims: [usize; 4],
    /// The number of elements of an image that is read; `from_row` is that of one of its rows.
    from: usize,
    from_row: usize,
    rows: Vec<Vec<Tap>>,
    columns: Vec<Vec<Tap>>,
}

impl<'a, T: Element> Gather<'a, T> {
    fn new(
        x: Operand<'a, T>,
        w: &'a [f32],
        direction: Direction,
        stride: usize,
        n: usize,
        (from_h, from_w): (usize, usize),
        to: (usize, usize, usize),
    ) -> Self {
        let (to_h, to_w, c) = to;
        let rows = reach(direction, stride, (to_h, from_h), (from_w * c, 3 * c));
        let columns = reach(direction, stride, (to_w, from_w), (c, c));
        let from_row = from_w * c;
        Self { x, w, stride, dims: [n, to_h, to_w, c], from: from_h * from_row, from_row, rows, columns }
    }
}

/// Some rows of an image, which are computed when they are first needed.
#[derive(Default)]
struct Window<T> {
    image: usize,
    /// The index of the first row in the window.
    first: usize,
    elements: Vec<T>,
}

impl<T: Element> Window<T> {
    /// Returns the rows `rows` of an image, of `len` elements each. `append` appends the rows that
    /// the window does not hold yet.
    fn get(
        &mut self,
        image: usize,
        rows: Range<usize>,
        len: usize,
        append: impl FnOnce(Range<usize>, &mut Vec<T>),
    ) -> &[T] {
        let end = self.first + self.elements.len() / len;
        if image != self.image || !(self.first..=end).contains(&rows.start) {
            self.elements.clear();
            self.elements.reserve(2 * CHUNK + rows.len() * len);
            (self.image, self.first) = (image, rows.start);
        }
        let end = self.first + self.elements.len() / len;
        if end < rows.end {
            // Drops rows that are no longer needed only if the window would otherwise outgrow the
            // cache.
            if (rows.end - self.first) * len > 2 * CHUNK {
                self.elements.drain(..(rows.start - self.first) * len);
                self.first = rows.start;
            }
            append(end..rows.end, &mut self.elements);
        }
        &self.elements[(rows.start - self.first) * len..(rows.end - self.first) * len]
    }
}

/// Returns the range of rows, of `len` elements each, that some taps reach.
fn reached(taps: &[Tap], len: usize) -> Range<usize> {
    let rows = || taps.iter().map(|tap| tap.source / len);
    rows().min().unwrap_or(0)..rows().max().map_or(0, |last| last + 1)
}

/// Rebases taps to a slice that begins at row `first` of the image, with rows of `len` elements.
fn from_row(taps: &[Tap], first: usize, len: usize) -> Vec<Tap> {
    taps.iter().map(|tap| Tap { source: tap.source - first * len, ..*tap }).collect()
}

impl<T: Element> Blockwise for Gather<'_, T> {
    type Element = T;
    type Scratch = Window<T>;

    fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Returns the number of positions in whole rows of a map.
    fn rows_per_block(&self) -> usize {
        let [_, _, w, c] = self.dims;
        (CHUNK.min(T::AT_ONCE) / (w * c)).max(1) * w
    }

    fn scratch(&self) -> Window<T> {
        Window::default()
    }

    fn compute<'z>(
        &self,
        window: &mut Window<T>,
        rows: Range<usize>,
        z: &'z mut [MaybeUninit<f32>],
    ) -> Written<'z> {
        let [_, h, w, c] = self.dims;
        let mut z = Progress::new(z);
        for row in rows.start / w..rows.end / w {
            let (image, taps) = (row / h, &self.rows[row % h]);
            match self.x.part(image * self.from..(image + 1) * self.from) {
                Operand::Stored(x) => {
                    z.next(w * c, |z| gather_row(x, self.w, z, c, self.stride, taps, &self.columns));
                }
                x @ Operand::Deferred(..) => {
                    let len = self.from_row;
                    let needed = reached(taps, len);
                    let taps = from_row(taps, needed.start, len);
                    let x = window.get(image, needed, len, |rows, elements| {
                        x.part(rows.start * len..rows.end * len).append_to(elements);
                    });
                    let x = Stored::Floats(x);
                    z.next(w * c, |z| gather_row(x, self.w, z, c, self.stride, &taps, &self.columns));
                }
            }
        }
        z.finish().into()
    }
}

const LANES: usize = 16;

/// Neighbouring channels at one position, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

const ZERO: Lanes = Lanes([0.0; LANES]);
const ONE: Lanes = Lanes([1.0; LANES]);

impl Lanes {
    /// Loads the channels of a slice; missing channels are 0.
    #[inline(always)]
    fn load<T: Copy>(from: &[T], value: impl Fn(usize, T) -> f32) -> Self {
        let mut lanes = ZERO;
        match from.first_chunk::<LANES>() {
            Some(all) => {
                for (i, (lane, x)) in lanes.0.iter_mut().zip(all).enumerate() {
                    *lane = value(i, *x);
                }
            }
            None => {
                for (i, (lane, x)) in lanes.0.iter_mut().zip(from).enumerate() {
                    *lane = value(i, *x);
                }
            }
        }
        lanes
    }

    /// Returns `self + a·b`. It takes `self` by value, which keeps sums in registers.
    #[inline(always)]
    fn plus(mut self, a: &Self, b: &Self) -> Self {
        for i in 0..LANES {
            self.0[i] = a.0[i].mul_add(b.0[i], self.0[i]);
        }
        self
    }
}

/// Copies one block of channels of rows of an image `[h, w, c]`, starting at row `first − 1`, to
/// `block[rows][w + 2]`, with zeros around the image.
#[inline(always)]
fn pack<T: Copy>(
    block: &mut [Lanes],
    image: &[T],
    value: impl Fn(usize, T) -> f32 + Copy,
    w: usize,
    c: usize,
    channels: &Range<usize>,
    first: usize,
) {
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
            // Prefetches the same channels one row below, because hardware prefetchers do not
            // follow accesses that are this far apart.
            prefetch(position[channels.start..].as_ptr().wrapping_add(w * c));
            *out = Lanes::load(&position[channels.clone()], value);
        }
    }
}

simd! {
    /// Adds the contributions of rows `gy[rows][wo][c]` of one image, starting at row `oh`, to the
    /// sums of the weight's gradient.
    ///
    /// One block of channels at a time is copied to `block`, which stays in cache, with a border of
    /// zeros. So every position has all nine taps, and the sums stay in registers.
    fn correlate<T: Element>(
        image: Operand<'_, T>,
        gy: &[T],
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
            match image {
                Operand::Stored(Stored::Floats(image)) => {
                    pack(block, image, |_, x| x.float(), w, c, &channels, oh * stride);
                }
                Operand::Stored(Stored::Levels(image, grid)) => {
                    pack(block, image, |_, q| grid.value(f32::from(q)), w, c, &channels, oh * stride);
                }
                Operand::Deferred(image, affine) => {
                    let [scale, shift] =
                        affine.coefficients().map(|all| Lanes::load(&all[channels.clone()], |_, x| x).0);
                    let bounds = affine.bounds();
                    let value = |i: usize, z: T| clamp(z.float().mul_add(scale[i], shift[i]), bounds);
                    match affine.grid() {
                        None => pack(block, image, value, w, c, &channels, oh * stride),
                        Some(grid) => {
                            let value = |i, z| grid.fake(value(i, z));
                            pack(block, image, value, w, c, &channels, oh * stride);
                        }
                    }
                }
            }
            let mut sum = [ZERO; 9];
            for (row, gy) in gy.chunks_exact(wo * c).enumerate() {
                let x = &block[row * stride * (w + 2)..];
                let (x0, x1, x2) = (&x[..w + 2], &x[w + 2..][..w + 2], &x[2 * (w + 2)..][..w + 2]);
                for (ow, gy) in gy.chunks_exact(c).enumerate() {
                    let at = ow * stride;
                    let (x0, x1, x2) = (&x0[at..at + 3], &x1[at..at + 3], &x2[at..at + 3]);
                    let gy = Lanes::load(&gy[channels.clone()], |_, gy| gy.float());
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

/// Cuts the rows `rows` of a batch of maps with `height` rows each into bands of at most `most`
/// rows that do not cross images.
///
/// The items are `(image, first row in it, number of rows)`.
fn bands(rows: Range<usize>, height: usize, most: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut next = rows.start;
    std::iter::from_fn(move || {
        let (image, row) = (next / height, next % height);
        let len = most.min(height - row).min(rows.end - next);
        next += len;
        (len > 0).then_some((image, row, len))
    })
}

impl Geometry {
    /// Returns the number of rows of a band, chosen so that what one block of channels reads fits
    /// in a first-level cache.
    fn rows_per_band(&self) -> usize {
        (CHUNK / 4 / (LANES * (self.w + 2) * self.stride)).max(2)
    }

    /// Returns the range of elements of one image of an input.
    fn image(&self, image: usize) -> Range<usize> {
        let len = self.h * self.w * self.c;
        image * len..(image + 1) * len
    }
}

/// Computes the gradient of the weight from a batch of `n` images.
fn weight_gradient<T: Element>(x: Operand<'_, T>, gz: &[T], n: usize, geometry: &Geometry) -> Vec<f32> {
    let &Geometry { ho, wo, c, .. } = geometry;
    let sums = parts(n * ho, wo * c, |rows| {
        let mut sums = vec![[ZERO; 9]; c.div_ceil(LANES)];
        let mut block = Vec::new();
        for (image, oh, rows) in bands(rows, ho, geometry.rows_per_band()) {
            let gz = &gz[(image * ho + oh) * wo * c..];
            correlate(
                x.part(geometry.image(image)),
                &gz[..rows * wo * c],
                &mut sums,
                geometry,
                oh,
                &mut block,
            );
        }
        sums
    });
    sum_of_parts(&sums, c)
}

/// Computes both gradients from a batch of `n` images, and the sums for the epilogue that made the
/// input. Each row of `∂z` is computed once, and used while it is in cache.
fn gradients<T: Element>(
    x: Operand<'_, T>,
    w: &[f32],
    gz: &OpenGradient<'_, T>,
    below: Option<&OpenEpilogue<'_, T>>,
    n: usize,
    geometry: &Geometry,
) -> (Vec<f32>, Vec<T>, Option<GradientSums>) {
    let &Geometry { h, w: width, ho, wo, c, stride } = geometry;
    let len = wo * c;
    let row_taps = reach(Direction::Backward, stride, (h, ho), (len, 3 * c));
    let column_taps = reach(Direction::Backward, stride, (width, wo), (c, c));
    // The first element of the input rows that belong to the output rows from `row` on.
    let inputs = |row: usize| (row / ho * h + (row % ho * stride).min(h)) * width * c;
    let (gx, parts) = parts_writing((n * ho, len), inputs, |rows, gx| {
        let mut sums = vec![[ZERO; 9]; c.div_ceil(LANES)];
        let mut sums_below = below.map(GradientAccumulator::new);
        let (mut block, mut window, mut floats) = (Vec::new(), Window::default(), Vec::new());
        let mut gx = Progress::new(gx);
        for (image, oh, rows) in bands(rows, ho, geometry.rows_per_band()) {
            // The output rows next to the band also contribute to the gradients of its inputs.
            let first = oh.saturating_sub(1);
            let gz = window.get(image, first..(oh + rows + 1).min(ho), len, |rows, elements| {
                let row = image * ho * wo;
                append(elements, rows.len() * len, |block| {
                    gz.rows(row + rows.start * wo..row + rows.end * wo, block)
                });
            });
            let of_band = &gz[(oh - first) * len..][..rows * len];
            correlate(x.part(geometry.image(image)), of_band, &mut sums, geometry, oh, &mut block);
            let last = if oh + rows == ho { h } else { (oh + rows) * stride };
            for ih in oh * stride..last {
                let taps = from_row(&row_taps[ih], first, len);
                let gz = Stored::Floats(gz);
                let row = T::next_floats(&mut gx, width * c, &mut floats, |row| {
                    gather_row(gz, w, row, c, stride, &taps, &column_taps)
                });
                if let Some(sums) = &mut sums_below {
                    sums.add((image * h + ih) * width, row);
                }
            }
        }
        (gx.finish().into(), (sums, sums_below.map(GradientAccumulator::finish)))
    });
    let (of_weight, of_below): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    (sum_of_parts(&of_weight, c), gx, GradientSums::of_parts(of_below.into_iter().flatten()))
}

/// Adds up the weight gradients of the parts of a batch, `[3, 3, C]`.
fn sum_of_parts(parts: &[Vec<[Lanes; 9]>], c: usize) -> Vec<f32> {
    let sum = |tap: usize, channel: usize| {
        let of_part = |sums: &Vec<[Lanes; 9]>| f64::from(sums[channel / LANES][tap].0[channel % LANES]);
        parts.iter().map(of_part).sum::<f64>() as f32
    };
    (0..9)
        .flat_map(|tap| (0..c).map(move |channel| (tap, channel)))
        .map(|(tap, channel)| sum(tap, channel))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    /// Selects every `stride`-th position along a dimension, beginning at `start`.
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
            // ⟨∂y, conv(x, w)⟩ is linear in x and in w, so it equals both ⟨∂x, x⟩ and ⟨∂w, w⟩.
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
    fn levels_give_the_bits_of_the_floats_that_they_stand_for() {
        let range = tensor(&[-0.7, 0.9]);
        let quant = Quantizer { range: &range, bits: quant_core::Bits::new(4).unwrap() };
        let out_range = tensor(&[0.0, 1.5]);
        let out = Quantizer { range: &out_range, bits: quant_core::Bits::new(3).unwrap() };
        for (dims, stride) in LARGE.into_iter().chain([[2, 5, 8, 7]]).flat_map(|dims| [(dims, 1), (dims, 2)])
        {
            let levels = FeatureMap::quantize(&random(1, &dims), Some(quant)).unwrap();
            let (x, w) = (levels.to_float().unwrap(), random(2, &[3, 3, dims[3]]));
            let (scale, shift) = (random(3, &[dims[3]]), random(4, &[dims[3]]));
            let z = forward(&x, &w, stride).unwrap();
            let gz = random(5, z.dims());
            assert_eq!(elements(&forward(&levels, &w, stride).unwrap()), elements(&z));
            let (found, stats) = forward_stats(&levels, &w, stride).unwrap();
            assert_eq!(elements(&found), elements(&z));
            let expected = norm::channel_stats(&z).unwrap();
            assert_close(&stats.mean, &expected.mean, 1e-6, "mean");
            assert_close(&stats.variance, &expected.variance, 1e-6, "variance");
            let gw = grad_weight(&levels, &gz, stride).unwrap();
            assert_eq!(elements(&gw), elements(&grad_weight(&x, &gz, stride).unwrap()));
            for quant in [None, Some(out)] {
                let affine = (&scale, &shift);
                let y = forward_normalized(&levels, &w, stride, affine, Activation::Relu6, quant).unwrap();
                let expected = norm::forward(&z, &scale, &shift, Activation::Relu6, quant).unwrap();
                assert_eq!(elements(&y.to_float().unwrap()), elements(&expected.to_float().unwrap()));
            }
        }
    }

    /// Checks that one pass over the bands of a batch gives the same bits as two passes over all of
    /// `∂z`.
    #[test]
    fn both_gradients_are_those_of_the_single_operations() {
        let maps = MAPS.iter().flat_map(|&(n, h, w)| CHANNELS.map(|c| [n, h, w, c])).chain(LARGE);
        for ([n, h, w, c], stride) in maps.flat_map(|dims| [(dims, 1), (dims, 2)]) {
            let context = format!("{n}×{h}×{w}×{c}, stride {stride}");
            let (x, weight) = (random(1, &[n, h, w, c]), random(2, &[3, 3, c]));
            let (gamma, beta) = (random(3, &[c]), random(4, &[c]));
            let deferred = norm::deferred(&x, &gamma, &beta, Activation::Relu).unwrap();
            let z = forward(&x, &weight, stride).unwrap();
            let stats = norm::channel_stats(&z).unwrap();
            let of_batch = norm::BatchNormalization::new(&stats, &gamma, &beta, 1e-5).unwrap();
            let gy = random(5, z.dims());
            let of_z = Epilogue::batch(&z, &of_batch, Activation::Relu6, None).unwrap();
            let gz = of_z.backward(&gy.into()).unwrap().z;
            let below = epilogue(x.dims(), None);
            let whole = gz.tensor().unwrap();
            let gx = elements(&grad_input(&whole, &weight, stride, (h, w)).unwrap());
            for x in [&FeatureMap::Float(x), &deferred] {
                let found = backward(x, &weight, &gz, stride, Some(&below)).unwrap();
                assert_sums(&below, &found.1, &context);
                assert_eq!(
                    elements(&found.0),
                    elements(&grad_weight(x, &whole, stride).unwrap()),
                    "{context}"
                );
                assert_eq!(elements(&found.1.tensor), gx, "{context}");
            }
            if n > 3 {
                assert_same_everywhere(|| {
                    let (gw, gx) = backward(&deferred, &weight, &gz, stride, Some(&below)).unwrap();
                    let of_below = below.backward(&gx).unwrap();
                    vec![gw, gx.tensor, of_below.gamma.unwrap(), of_below.shift]
                });
            }
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
        assert!(grad_input(&x, &w, 2, (4, 4)).unwrap_err().to_string().contains("gz has shape"));
        let double = x.to_dtype(candle_core::DType::F64).unwrap();
        assert!(forward(&double, &w, 1).unwrap_err().to_string().contains("x is F64, expected F32"));
    }
}
