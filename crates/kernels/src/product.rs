//! The matrix products behind [`crate::pointwise`]: of floats, and of quantization levels.
//!
//! A feature map has many rows and few channels, so a product is done for a block of rows that stays in
//! cache, and whatever else is to be done with these rows follows at once. Within a block, a tile of some
//! rows by some vectors of columns is summed up in registers along the whole depth, each element in the
//! order of the depth with fused multiply–add: so the bits do not depend on the block, the tile or the vector
//! instructions. The left operand is read where it lies, one element at a time, transposed or not. The right
//! one is read by vectors: weights are packed into [`Panels`] first.
//!
//! Integer products are exact, so they have the same bits by their nature. AVX-512 VNNI multiplies unsigned by
//! signed bytes and adds up four products at a time.

use crate::cpu::{Level, simd};
use std::mem::MaybeUninit;

/// Columns of a vector: one register of AVX-512, two of AVX2.
pub(crate) const LANES: usize = 16;

/// A matrix that is read by elements: `(i, p)` is at `i·row + p·depth`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) elements: &'a [f32],
    pub(crate) row: usize,
    pub(crate) depth: usize,
}

/// A matrix that is read by vectors: columns `16j…` of depth `p` are at `j·panel + p·depth`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) elements: &'a [f32],
    pub(crate) panel: usize,
    pub(crate) depth: usize,
}

impl<'a> Right<'a> {
    /// Rows of `columns` elements as they lie in memory. The last vector of a row may begin before its end
    /// and end after it, so [`LANES`] elements must follow the last row; what they are has no effect.
    pub(crate) fn rows(elements: &'a [f32], columns: usize) -> Self {
        Self { elements, panel: LANES, depth: columns }
    }
}

/// Weights as the right operand: 16 columns at a time, all of the depth, the columns that are missing 0.
pub(crate) struct Panels {
    elements: Vec<f32>,
    depth: usize,
}

impl Panels {
    /// From `w[depth, columns]`.
    pub(crate) fn new(w: &[f32], depth: usize, columns: usize) -> Self {
        Self::from_elements(depth, columns, |p, j| w[p * columns + j])
    }

    /// From the transpose of `w[columns, depth]`.
    pub(crate) fn transposed(w: &[f32], depth: usize, columns: usize) -> Self {
        Self::from_elements(depth, columns, |p, j| w[j * depth + p])
    }

    fn from_elements(depth: usize, columns: usize, element: impl Fn(usize, usize) -> f32) -> Self {
        let mut elements = vec![0.0; columns.div_ceil(LANES) * depth * LANES];
        for (panel, elements) in elements.chunks_exact_mut(depth * LANES).enumerate() {
            for (p, vector) in elements.chunks_exact_mut(LANES).enumerate() {
                for (j, slot) in (panel * LANES..columns).zip(vector) {
                    *slot = element(p, j);
                }
            }
        }
        Self { elements, depth }
    }

    pub(crate) fn right(&self) -> Right<'_> {
        Right { elements: &self.elements, panel: self.depth * LANES, depth: LANES }
    }
}

/// `c[m, n] = a[m, k]·b[k, n]`, all of `c`.
pub(crate) fn set(a: Left, b: Right, (m, n, k): (usize, usize, usize), c: &mut [MaybeUninit<f32>]) {
    product(a, b, m, n, k, c, false);
}

/// `c[m, n] += a[m, k]·b[k, n]`.
pub(crate) fn add(a: Left, b: Right, (m, n, k): (usize, usize, usize), c: &mut [f32]) {
    // SAFETY: `product` writes numbers only.
    #[allow(unsafe_code)]
    let c = unsafe { std::slice::from_raw_parts_mut(c.as_mut_ptr().cast(), c.len()) };
    product(a, b, m, n, k, c, true);
}

simd! {
    fn product(
        a: Left,
        b: Right,
        m: usize,
        n: usize,
        k: usize,
        c: &mut [MaybeUninit<f32>],
        add: bool,
    ) {
        assert_eq!(c.len(), m * n);
        if m == 0 || n == 0 || k == 0 {
            if !add {
                c.fill(MaybeUninit::new(0.0));
            }
            return;
        }
        assert!((m - 1) * a.row + (k - 1) * a.depth < a.elements.len());
        assert!((n - 1) / LANES * b.panel + (k - 1) * b.depth + LANES <= b.elements.len());
        // SAFETY: the assertions.
        #[allow(unsafe_code)]
        unsafe {
            if Level::current() >= Level::WIDE {
                tiles::<3>(a, b, m, n, k, c.as_mut_ptr().cast(), add);
            } else {
                tiles::<1>(a, b, m, n, k, c.as_mut_ptr().cast(), add);
            }
        }
    }
}

/// All tiles of a product, of up to `V` vectors. What is read of the right operand for a column of tiles stays
/// in cache while the rows pass.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn tiles<const V: usize>(a: Left, b: Right, m: usize, n: usize, k: usize, c: *mut f32, add: bool) {
    for j in (0..n).step_by(V * LANES) {
        let columns = (n - j).min(V * LANES);
        let mut i = 0;
        while i < m {
            // SAFETY: the caller's.
            unsafe {
                let tile = Tile {
                    a: a.elements.as_ptr().add(i * a.row),
                    a_steps: (a.row, a.depth),
                    b: b.elements.as_ptr().add(j / LANES * b.panel),
                    b_steps: (b.panel, b.depth),
                    depth: k,
                    c: c.add(i * n + j),
                    n,
                    columns,
                    add,
                };
                i += match (m - i, columns.div_ceil(LANES)) {
                    (8.., 3) if V >= 3 => tile.sum::<8, 3>(),
                    (8.., 2) if V >= 2 => tile.sum::<8, 2>(),
                    (8.., _) if V >= 2 => tile.sum::<8, 1>(),
                    (4.., 3) if V >= 3 => tile.sum::<4, 3>(),
                    (4.., 2) if V >= 2 => tile.sum::<4, 2>(),
                    (4.., _) => tile.sum::<4, 1>(),
                    (_, 3) if V >= 3 => tile.sum::<1, 3>(),
                    (_, 2) if V >= 2 => tile.sum::<1, 2>(),
                    _ => tile.sum::<1, 1>(),
                };
            }
        }
    }
}

/// A tile of the result: where its operands begin, and the steps in them (rows or panels, depth).
struct Tile {
    a: *const f32,
    a_steps: (usize, usize),
    b: *const f32,
    b_steps: (usize, usize),
    depth: usize,
    c: *mut f32,
    /// Columns of the whole result.
    n: usize,
    /// Columns of the tile.
    columns: usize,
    add: bool,
}

impl Tile {
    /// Sums up `R` rows by `V` vectors; gives `R`.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn sum<const R: usize, const V: usize>(&self) -> usize {
        // SAFETY: `c` has `R` rows of `columns`, the buffer `R` rows of `V` vectors.
        unsafe {
            if self.columns == V * LANES {
                self.sum_into::<R, V>(self.c, self.n);
            } else {
                let mut buffer = [[[0.0f32; LANES]; V]; R];
                let (buffer, step) = (buffer.as_mut_ptr().cast::<f32>(), V * LANES);
                if self.add {
                    copy_rows((self.c, self.n), (buffer, step), R, self.columns);
                }
                self.sum_into::<R, V>(buffer, step);
                copy_rows((buffer, step), (self.c, self.n), R, self.columns);
            }
        }
        R
    }

    /// To whole vectors of rows that are `step` apart.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn sum_into<const R: usize, const V: usize>(&self, c: *mut f32, step: usize) {
        // Indices and values, not iterators and references, keep the sums in registers.
        let mut sums = [[[0.0f32; LANES]; V]; R];
        let vector = |i: usize, j: usize| c.wrapping_add(i * step + j * LANES).cast::<[f32; LANES]>();
        // SAFETY: the caller of `tiles` has checked the operands' bounds; the result's are those of the caller.
        unsafe {
            if self.add {
                for i in 0..R {
                    for j in 0..V {
                        sums[i][j] = vector(i, j).read_unaligned();
                    }
                }
            }
            for p in 0..self.depth {
                let mut vectors = [[0.0; LANES]; V];
                for j in 0..V {
                    let b = self.b.add(j * self.b_steps.0 + p * self.b_steps.1);
                    vectors[j] = b.cast::<[f32; LANES]>().read_unaligned();
                }
                for i in 0..R {
                    let a = *self.a.add(i * self.a_steps.0 + p * self.a_steps.1);
                    for j in 0..V {
                        for lane in 0..LANES {
                            sums[i][j][lane] = a.mul_add(vectors[j][lane], sums[i][j][lane]);
                        }
                    }
                }
            }
            for i in 0..R {
                for j in 0..V {
                    vector(i, j).write_unaligned(sums[i][j]);
                }
            }
        }
    }
}

/// Copies rows of `columns` elements.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn copy_rows(
    (from, from_step): (*const f32, usize),
    (to, to_step): (*mut f32, usize),
    rows: usize,
    columns: usize,
) {
    // Eight elements at a time: a call of `memcpy` for so few would cost more than the sums.
    const PIECE: usize = 8;
    for row in 0..rows {
        // SAFETY: the caller's.
        unsafe {
            let (from, to) = (from.add(row * from_step), to.add(row * to_step));
            for at in (0..columns / PIECE * PIECE).step_by(PIECE) {
                let piece = from.add(at).cast::<[f32; PIECE]>().read_unaligned();
                to.add(at).cast::<[f32; PIECE]>().write_unaligned(piece);
            }
            for at in columns / PIECE * PIECE..columns {
                *to.add(at) = *from.add(at);
            }
        }
    }
}

/// Products that an integer vector adds up in one lane.
const GROUP: usize = 4;

/// Integer weights as the right operand: 16 columns at a time, the depth in groups of four, those that are
/// missing 0.
pub(crate) struct IntegerPanels {
    elements: Vec<[[i8; GROUP]; LANES]>,
    groups: usize,
    columns: usize,
    /// The sum of each column.
    sums: Vec<i32>,
}

impl IntegerPanels {
    /// From the levels of `w[depth, columns]`, less the zero point. The differences must fit a signed byte.
    pub(crate) fn new(levels: &[u8], zero_point: u8, depth: usize, columns: usize) -> Self {
        let groups = depth.div_ceil(GROUP);
        let mut elements = vec![[[0; GROUP]; LANES]; columns.div_ceil(LANES) * groups];
        let mut sums = vec![0; columns.next_multiple_of(LANES)];
        for (p, row) in levels.chunks_exact(columns).enumerate() {
            for (panel, (row, sums)) in row.chunks(LANES).zip(sums.chunks_exact_mut(LANES)).enumerate() {
                let vector = &mut elements[panel * groups + p / GROUP];
                for ((slot, level), sum) in vector.iter_mut().zip(row).zip(sums) {
                    let w = level.wrapping_sub(zero_point) as i8;
                    slot[p % GROUP] = w;
                    *sum += i32::from(w);
                }
            }
        }
        Self { elements, groups, columns, sums }
    }
}

/// `c[m, n] = scale · (x[m, k] − zero_point)·w[k, n]`: exact but for the scale and, beyond 2²⁴, the conversion.
pub(crate) fn set_levels(
    x: &[u8],
    k: usize,
    zero_point: i32,
    w: &IntegerPanels,
    scale: f32,
    c: &mut [MaybeUninit<f32>],
) {
    let m = c.len() / w.columns;
    assert!(k.div_ceil(GROUP) == w.groups && x.len() == m * k && c.len() == m * w.columns);
    let shift: Vec<i32> = w.sums.iter().map(|sum| -zero_point * sum).collect();
    let product = LevelProduct { x, k, w, shift: &shift, scale };
    #[cfg(target_arch = "x86_64")]
    if Level::current() >= Level::WIDE && std::arch::is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the machine has the features.
        #[allow(unsafe_code)]
        unsafe {
            return vnni::set(&product, m, c);
        }
    }
    set_levels_plainly(&product, c);
}

/// The operands of [`set_levels`]; `shift` is what each column's sums begin with.
struct LevelProduct<'a> {
    x: &'a [u8],
    k: usize,
    w: &'a IntegerPanels,
    shift: &'a [i32],
    scale: f32,
}

simd! {
    fn set_levels_plainly(product: &LevelProduct<'_>, c: &mut [MaybeUninit<f32>]) {
        let LevelProduct { x, k, w, shift, scale } = *product;
        for (x, c) in x.chunks_exact(k).zip(c.chunks_exact_mut(w.columns)) {
            let panels = w.elements.chunks_exact(w.groups).zip(shift.chunks_exact(LANES));
            for ((panel, shift), c) in panels.zip(c.chunks_mut(LANES)) {
                let mut sums = [0i32; LANES];
                sums.copy_from_slice(shift);
                for (x, vector) in x.chunks(GROUP).zip(panel) {
                    for (t, x) in x.iter().enumerate() {
                        let x = i32::from(*x);
                        for (sum, w) in sums.iter_mut().zip(vector) {
                            *sum += x * i32::from(w[t]);
                        }
                    }
                }
                for (c, sum) in c.iter_mut().zip(&sums) {
                    c.write(*sum as f32 * scale);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use super::{GROUP, LANES, LevelProduct};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// # Safety
    /// The machine must have the features, and `c` be `m` rows of `product.w.columns`.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    #[allow(unsafe_code)]
    pub(super) unsafe fn set(product: &LevelProduct<'_>, m: usize, c: &mut [MaybeUninit<f32>]) {
        let panels = product.w.columns.div_ceil(LANES);
        for panel in (0..panels).step_by(3) {
            let mut i = 0;
            while i < m {
                // SAFETY: the tile lies in the result.
                unsafe {
                    i += match (m - i, panels - panel) {
                        (6.., 3..) => tile::<6, 3>(product, i, panel, c),
                        (6.., 2) => tile::<6, 2>(product, i, panel, c),
                        (6.., _) => tile::<6, 1>(product, i, panel, c),
                        (_, 3..) => tile::<1, 3>(product, i, panel, c),
                        (_, 2) => tile::<1, 2>(product, i, panel, c),
                        _ => tile::<1, 1>(product, i, panel, c),
                    };
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    #[allow(unsafe_code)]
    unsafe fn tile<const R: usize, const V: usize>(
        product: &LevelProduct<'_>,
        row: usize,
        panel: usize,
        c: &mut [MaybeUninit<f32>],
    ) -> usize {
        let LevelProduct { x, k, w, shift, scale } = *product;
        // SAFETY: rows `row..row + R` and panels `panel..panel + V` exist; a row's last group is read byte by
        // byte where it is not whole.
        unsafe {
            let x = x.as_ptr().add(row * k);
            let vectors = w.elements.as_ptr().add(panel * w.groups);
            let mut sums = [[_mm512_setzero_si512(); V]; R];
            for sums in &mut sums {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_si512(shift.as_ptr().add((panel + j) * LANES).cast());
                }
            }
            let mut step = |group: usize, x: [i32; R]| {
                let vectors: [__m512i; V] =
                    std::array::from_fn(|j| _mm512_loadu_si512(vectors.add(j * w.groups + group).cast()));
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x = _mm512_set1_epi32(x);
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = _mm512_dpbusd_epi32(*sum, x, vector);
                    }
                }
            };
            let whole = k / GROUP;
            for group in 0..whole {
                step(
                    group,
                    std::array::from_fn(|i| x.add(i * k + group * GROUP).cast::<i32>().read_unaligned()),
                );
            }
            if whole < w.groups {
                let mut rest = [[0; GROUP]; R];
                for (i, rest) in rest.iter_mut().enumerate() {
                    for (t, byte) in rest.iter_mut().take(k - whole * GROUP).enumerate() {
                        *byte = *x.add(i * k + whole * GROUP + t);
                    }
                }
                step(whole, rest.map(i32::from_ne_bytes));
            }
            let scale = _mm512_set1_ps(scale);
            let n = w.columns;
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let column = (panel + j) * LANES;
                    let mask = ((1u32 << (n - column).min(LANES)) - 1) as __mmask16;
                    let c = c.as_mut_ptr().add((row + i) * n + column).cast();
                    _mm512_mask_storeu_ps(c, mask, _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), scale));
                }
            }
        }
        R
    }
}
