//! The matrix products behind [`crate::pointwise`]: of floats, of `bf16` values, and of
//! quantization levels.
//!
//! A feature map has many rows and few channels, so a product is computed for a block of rows that
//! stays in cache, and the other work on these rows follows at once. Within a block, a tile of
//! several rows by several vectors of columns is summed up in registers along the depth. Each
//! element is summed in the order of the depth with fused multiply–add, so the bits do not depend
//! on the block, the tile or the vector instructions. The left-hand operand is read one element at
//! a time, the right-hand operand by vectors. Weights are packed into [`Panels`] first; feature
//! maps are read in place, unless both are wide ([`add_transposed`]).
//!
//! Processors with matrix tiles or a fast `VDPBF16PS` of AVX512-BF16 multiply `bf16` values in
//! [`pairs`], and their sums may differ from those of other processors in the last bits. Elsewhere,
//! `bf16` values become floats when operands are packed, and are multiplied as floats.

use crate::ProductSizes;
use crate::cpu::{Instructions, prefetch, simd};
use crate::elements::Element;
use crate::work::{fill, poison};
use half::bf16;
use std::mem::MaybeUninit;

#[cfg(target_arch = "x86_64")]
mod amx;
mod level_product;
mod levels;
#[cfg(target_arch = "x86_64")]
mod pairs;

pub(crate) use level_product::IntegerPanels;
pub(crate) use levels::set_levels;

/// The number of columns of a vector: one register of AVX-512, two of AVX2.
pub(crate) const LANES: usize = 16;

/// The number of products that an integer vector adds up in one lane.
const GROUP: usize = 4;

/// The number of rows of a tile.
const ROWS: usize = 8;

/// The approximate number of factors along the depth that tiles sum up at once.
///
/// For 3 vectors of columns this is 27 KiB, which stays in the first-level cache while the rows
/// pass. The next step continues from the sums in the result, so the bits are the same.
const DEPTH: usize = 144;

/// The result of a product, `[rows, columns]`, and what happens to the memory that it is in.
pub(crate) enum Target<'c> {
    /// The memory is set to the product.
    Set(&'c mut [MaybeUninit<f32>]),
    /// The product is added to what is there.
    Add(&'c mut [f32]),
}

/// A factor of one multiplication: a float, or a pair of `bf16` values.
pub(crate) trait Factor: Copy + Default + Send + Sync {
    /// The number of elements in a factor, which are neighbours in the depth.
    const ELEMENTS: usize;

    /// The number of elements of the depth that a matrix tile holds.
    const STEP: usize;

    /// Returns whether the machine can multiply these factors.
    fn are_multiplied() -> bool;

    /// Computes `c = a·b` or `c += a·b`, summed up in steps of about `most` of the depth.
    fn product(a: Left<Self>, b: Right<Self>, sizes: ProductSizes, c: Target<'_>, most: usize);
}

/// A factor that is made from elements `T`.
pub(crate) trait FactorOf<T>: Factor {
    /// Converts rows of `depth` elements each to factors. The last factor of a row is filled up
    /// with zeros. `factors` is scratch memory.
    fn of_rows<'a>(rows: &'a [T], depth: usize, factors: &'a mut Vec<Self>) -> &'a [Self];

    /// Converts rows of `columns` elements each to rows of `columns` factors, with `factors` as
    /// scratch memory.
    ///
    /// `left_over` elements follow the last row, and as many factors follow the last row of the
    /// result. Their values have no effect.
    fn of_columns<'a>(
        rows: &'a [T],
        columns: usize,
        left_over: usize,
        factors: &'a mut Vec<Self>,
    ) -> &'a [Self];

    /// Computes [`set`] with matrix tiles; returns `false` and does nothing if the machine has
    /// none.
    fn set_by_tiles(
        _a: &[T],
        _b: &Packed<Self, LANES>,
        _sizes: ProductSizes,
        _scratch: &mut Scratch<Self>,
        _c: &mut [MaybeUninit<f32>],
    ) -> bool {
        false
    }

    /// Computes [`add_transposed`] with matrix tiles; returns `false` and does nothing if the
    /// machine has none.
    fn add_transposed_by_tiles(
        _a: &[T],
        _b: &[T],
        _sizes: ProductSizes,
        _scratch: &mut Scratch<Self>,
        _c: &mut [f32],
    ) -> bool {
        false
    }
}

/// An element type whose maps can be multiplied.
pub(crate) trait Multiplicand: Element {
    /// The factor to multiply if the machine has the instructions; otherwise, floats are
    /// multiplied.
    type Factor: FactorOf<Self>;
}

impl Multiplicand for f32 {
    type Factor = Self;
}

impl Multiplicand for bf16 {
    #[cfg(target_arch = "x86_64")]
    type Factor = Pair;
    #[cfg(not(target_arch = "x86_64"))]
    type Factor = f32;
}

/// Two `bf16` values that are neighbours in the depth.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct Pair([bf16; 2]);

impl Factor for f32 {
    const ELEMENTS: usize = 1;
    const STEP: usize = 1;

    fn are_multiplied() -> bool {
        true
    }

    fn product(a: Left<Self>, b: Right<Self>, sizes: ProductSizes, c: Target<'_>, most: usize) {
        product(a, b, sizes, c, most);
    }
}

/// Every element type converts to floats.
impl<T: Element> FactorOf<T> for f32 {
    fn of_rows<'a>(rows: &'a [T], _: usize, floats: &'a mut Vec<Self>) -> &'a [Self] {
        T::floats(rows, floats)
    }

    fn of_columns<'a>(rows: &'a [T], _: usize, _: usize, floats: &'a mut Vec<Self>) -> &'a [Self] {
        T::floats(rows, floats)
    }
}

/// A left-hand operand, read by factors, 8 rows at a time: `(i, p)` is at
/// `i/8·panel + i%8·row + p·depth`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, F> {
    factors: &'a [F],
    panel: usize,
    row: usize,
    depth: usize,
}

impl<'a, F> Left<'a, F> {
    /// Reads `a[rows, depth]` in place.
    fn rows(factors: &'a [F], depth: usize) -> Self {
        Self { factors, panel: ROWS * depth, row: depth, depth: 1 }
    }

    /// Reads the transpose of `a[depth, rows]` in place.
    fn columns(factors: &'a [F], rows: usize) -> Self {
        Self { factors, panel: ROWS, row: 1, depth: rows }
    }

    #[inline(always)]
    fn position(&self, i: usize, p: usize) -> usize {
        i / ROWS * self.panel + i % ROWS * self.row + p * self.depth
    }
}

/// A right-hand operand, read by vectors: columns `16j…` of depth `p` are at `j·panel + p·depth`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, F> {
    factors: &'a [F],
    panel: usize,
    depth: usize,
}

impl<'a, F> Right<'a, F> {
    /// Reads rows of `columns` factors in place.
    ///
    /// The last vector of a row may extend beyond the row's end, so [`LANES`] factors must follow
    /// the last row. Their values have no effect.
    fn rows(factors: &'a [F], columns: usize) -> Self {
        Self { factors, panel: LANES, depth: columns }
    }

    #[inline(always)]
    fn position(&self, j: usize, p: usize) -> usize {
        j / LANES * self.panel + p * self.depth
    }
}

/// A cache line. Vectors that cross a line take twice as long to read, so packed vectors are
/// aligned to lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<F>([F; LANES]);

/// The columns of a matrix, `W` at a time over the whole depth, with zeros for missing columns.
#[derive(Default)]
pub(crate) struct Packed<F, const W: usize> {
    lines: Vec<Line<F>>,
    depth: usize,
}

impl<F: Factor, const W: usize> Packed<F, W> {
    /// Packs the columns of `rows[depth, columns]`.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn pack(&mut self, rows: &[F], columns: usize) {
        self.depth = rows.len() / columns;
        let panels = columns.div_ceil(W);
        let lines = (panels * self.depth * W).div_ceil(LANES);
        self.lines.clear();
        self.lines.reserve(lines);
        let packed = self.lines.as_mut_ptr().cast::<[F; W]>();
        // Several rows are packed at a time, so that whole cache lines are read and written.
        for (at, rows) in rows.chunks(ROWS * columns).enumerate() {
            for panel in 0..panels {
                let first = panel * W;
                let vectors = packed.wrapping_add(panel * self.depth + at * ROWS);
                for (p, row) in rows.chunks_exact(columns).enumerate() {
                    // SAFETY: `packed` has room for `panels · depth` vectors, and each row has
                    // `columns` factors.
                    unsafe {
                        if first + W <= columns {
                            *vectors.add(p) = *row.as_ptr().add(first).cast();
                        } else {
                            let mut vector = [F::default(); W];
                            vector[..columns - first].copy_from_slice(&row[first..]);
                            *vectors.add(p) = vector;
                        }
                    }
                }
            }
        }
        // SAFETY: all vectors were written, and the half line that may be left over after the last
        // one is written here.
        unsafe {
            if panels * self.depth * W < lines * LANES {
                packed.add(panels * self.depth).write([F::default(); W]);
            }
            self.lines.set_len(lines);
        }
    }

    #[allow(unsafe_code)]
    fn factors(&self) -> &[F] {
        // SAFETY: a line consists of `LANES` factors.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LANES) }
    }
}

impl<F: Factor> Packed<F, ROWS> {
    fn left(&self) -> Left<'_, F> {
        Left { factors: self.factors(), panel: self.depth * ROWS, row: 1, depth: ROWS }
    }
}

impl<F: Factor> Packed<F, LANES> {
    fn right(&self) -> Right<'_, F> {
        Right { factors: self.factors(), panel: self.depth * LANES, depth: LANES }
    }
}

/// Weights as the right-hand operand for maps of elements `T`, packed as factors if the machine
/// multiplies these, or else as floats.
pub(crate) enum Panels<T: Multiplicand> {
    Factors(Packed<T::Factor, LANES>),
    Floats(Packed<f32, LANES>),
}

impl<T: Multiplicand> Panels<T> {
    /// Packs `w[depth, columns]`.
    pub(crate) fn new(w: &[f32], columns: usize) -> Self {
        if T::Factor::are_multiplied() {
            Self::Factors(Packed::of_weights::<T>(w, columns))
        } else {
            Self::Floats(Packed::of_weights::<T>(w, columns))
        }
    }

    /// Packs the transpose of `w[columns, depth]`.
    pub(crate) fn transposed(w: &[f32], depth: usize) -> Self {
        let columns = w.len() / depth;
        let rows =
            fill(w.len(), LANES * columns, |part, rows| transpose(w, depth, part.start / columns, rows));
        Self::new(&rows, columns)
    }
}

impl<F: Factor> Packed<F, LANES> {
    /// Packs `w[depth, columns]`, rounded to elements. The depth is filled up with zeros to a
    /// multiple of [`Factor::STEP`].
    fn of_weights<T: Multiplicand>(w: &[f32], columns: usize) -> Self
    where
        F: FactorOf<T>,
    {
        let (mut packed, mut factors) = (Self::default(), Vec::new());
        let (mut w, depth) = (T::all_nearest(w), w.len() / columns);
        let filled = depth.next_multiple_of(F::STEP);
        if filled > depth {
            w.to_mut().resize(filled * columns, T::default());
        }
        packed.pack(F::of_columns(&w, columns, 0, &mut factors), columns);
        packed
    }
}

simd! {
    /// Writes rows of the transpose of `w[columns, depth]`, starting with row `first`, in squares
    /// that stay in cache.
    fn transpose(w: &[f32], depth: usize, first: usize, rows: &mut [f32]) {
        let columns = w.len() / depth;
        for start in (0..columns).step_by(LANES) {
            for (p, row) in (first..).zip(rows.chunks_exact_mut(columns)) {
                for (row, w) in row[start..].iter_mut().zip(w[start * depth..].chunks_exact(depth)).take(LANES) {
                    *row = w[p];
                }
            }
        }
    }
}

/// Computes `c = a·b` and returns `c`.
pub(crate) fn set<'c, T: Multiplicand>(
    a: &[T],
    b: &Panels<T>,
    sizes: ProductSizes,
    operands: &mut Operands<T>,
    c: &'c mut [MaybeUninit<f32>],
) -> &'c mut [f32] {
    match b {
        Panels::Factors(b) => set_factors(a, b, sizes, &mut operands.factors, c),
        Panels::Floats(b) => set_factors(a, b, sizes, &mut operands.floats, c),
    }
}

/// Computes [`set`] with one kind of factors.
fn set_factors<'c, T, F: FactorOf<T>>(
    a: &[T],
    b: &Packed<F, LANES>,
    sizes: ProductSizes,
    scratch: &mut Scratch<F>,
    c: &'c mut [MaybeUninit<f32>],
) -> &'c mut [f32] {
    if !F::set_by_tiles(a, b, sizes, scratch, c) {
        let depth = sizes.depth.div_ceil(F::ELEMENTS);
        let a = Left::rows(F::of_rows(a, sizes.depth, &mut scratch.left_factors), depth);
        F::product(a, b.right(), ProductSizes { depth, ..sizes }, Target::Set(c), DEPTH);
    }
    // SAFETY: all of `c` is written, by `set_by_tiles` if it returns true and otherwise by
    // `product`.
    #[allow(unsafe_code)]
    unsafe {
        c.assume_init_mut()
    }
}

/// Scratch memory for the operands of products of maps of elements `T`.
pub(crate) struct Operands<T: Multiplicand> {
    factors: Scratch<T::Factor>,
    floats: Scratch<f32>,
    /// The levels of a left-hand operand, in matrix tiles.
    levels: Vec<Line<[u8; GROUP]>>,
}

impl<T: Multiplicand> Default for Operands<T> {
    fn default() -> Self {
        Self { factors: Scratch::default(), floats: Scratch::default(), levels: Vec::new() }
    }
}

/// Scratch memory for operands of one kind of factors.
#[derive(Default)]
pub(crate) struct Scratch<F> {
    left_factors: Vec<F>,
    right_factors: Vec<F>,
    left: Packed<F, ROWS>,
    right: Packed<F, LANES>,
}

/// Computes `c += aᵀ·b` for `a[depth, rows]` and `b[depth, columns]`.
///
/// [`LANES`] elements must follow the last row of `b`. Their values have no effect.
pub(crate) fn add_transposed<T: Multiplicand>(
    a: &[T],
    b: &[T],
    sizes: ProductSizes,
    operands: &mut Operands<T>,
    c: &mut [f32],
) {
    if T::Factor::are_multiplied() {
        add_transposed_factors(a, b, sizes, &mut operands.factors, c);
    } else {
        add_transposed_factors(a, b, sizes, &mut operands.floats, c);
    }
}

/// Computes [`add_transposed`] with one kind of factors.
///
/// Wide operands are packed first, because their columns, read in place, would evict each other
/// from the cache. Packing takes `rows + columns` copies per row for `rows·columns` products, so
/// narrow operands are not packed.
fn add_transposed_factors<T, F: FactorOf<T>>(
    a: &[T],
    b: &[T],
    sizes: ProductSizes,
    scratch: &mut Scratch<F>,
    c: &mut [f32],
) {
    let ProductSizes { rows, columns, depth } = sizes;
    assert!(a.len() == depth * rows && b.len() == depth * columns + LANES);
    if F::add_transposed_by_tiles(a, &b[..depth * columns], sizes, scratch, c) {
        return;
    }
    let Scratch { left_factors, right_factors, left, right } = scratch;
    if rows * columns < PACKED * (rows + columns) {
        let a = F::of_columns(a, rows, 0, left_factors);
        let b = F::of_columns(b, columns, LANES, right_factors);
        let sizes = ProductSizes { depth: depth.div_ceil(F::ELEMENTS), ..sizes };
        F::product(Left::columns(a, rows), Right::rows(b, columns), sizes, Target::Add(c), DEPTH / 2);
        return;
    }
    let step = equal_steps(depth.div_ceil(F::ELEMENTS), PACKED_DEPTH) * F::ELEMENTS;
    for (a, b) in a.chunks(step * rows).zip(b[..depth * columns].chunks(step * columns)) {
        let a = F::of_columns(a, rows, 0, left_factors);
        let b = F::of_columns(b, columns, 0, right_factors);
        pack((a, rows), (b, columns), left, right);
        let sizes = ProductSizes { depth: a.len() / rows, ..sizes };
        F::product(left.left(), right.right(), sizes, Target::Add(c), DEPTH);
    }
}

simd! {
    /// Packs both operands, each given with its number of columns.
    fn pack<F: Factor>(
        a: (&[F], usize),
        b: (&[F], usize),
        left: &mut Packed<F, ROWS>,
        right: &mut Packed<F, LANES>,
    ) {
        left.pack(a.0, a.1);
        right.pack(b.0, b.1);
    }
}

/// The number of products per copy from which on [`add_transposed`] packs its operands.
const PACKED: usize = 40;

/// The value of [`DEPTH`] if the left-hand operand passes through the first-level cache, too.
const PACKED_DEPTH: usize = 96;

/// Returns the length of equal steps that cover `depth`, which is about `step`.
fn equal_steps(depth: usize, step: usize) -> usize {
    depth.div_ceil(((depth + step / 2) / step).max(1))
}

simd! {
    /// Computes [`Factor::product`] of floats.
    fn product(
        a: Left<'_, f32>,
        b: Right<'_, f32>,
        sizes: ProductSizes,
        c: Target<'_>,
        most: usize,
    ) {
        sum_up::<f32, Plain>(a, b, sizes, c, most);
    }
}

/// A way to multiply a factor by a vector of factors and add the products to the sums of the lanes.
trait Multiply<F> {
    fn add_products(a: F, b: &[F; LANES], sums: &mut [f32; LANES]);
}

/// Multiplication lane by lane, which compilers vectorize.
struct Plain;

impl Multiply<f32> for Plain {
    #[inline(always)]
    fn add_products(a: f32, b: &[f32; LANES], sums: &mut [f32; LANES]) {
        for lane in 0..LANES {
            sums[lane] = a.mul_add(b[lane], sums[lane]);
        }
    }
}

/// Computes `c = a·b` or `c += a·b`, summed up in steps of about `most` of the depth.
#[inline(always)]
fn sum_up<F: Factor, M: Multiply<F>>(
    a: Left<F>,
    b: Right<F>,
    sizes: ProductSizes,
    c: Target<'_>,
    most: usize,
) {
    let ProductSizes { rows, columns, depth } = sizes;
    let (len, c, add): (_, *mut f32, _) = match c {
        Target::Set(c) => {
            if depth == 0 {
                c.fill(MaybeUninit::new(0.0));
            } else {
                poison(c);
            }
            (c.len(), c.as_mut_ptr().cast(), false)
        }
        Target::Add(c) => (c.len(), c.as_mut_ptr(), true),
    };
    assert_eq!(len, rows * columns);
    if rows == 0 || columns == 0 || depth == 0 {
        return;
    }
    assert!(a.position(rows - 1, depth - 1) < a.factors.len());
    assert!(b.position(columns - 1, depth - 1) + LANES <= b.factors.len());
    let step = equal_steps(depth, most);
    // SAFETY: by the assertions, all reads lie in the operands and all writes in `c`, which is
    // initialized if `add`.
    #[allow(unsafe_code)]
    unsafe {
        if Instructions::current() >= Instructions::WIDE {
            tiles::<F, M, 3>(a, b, sizes, step, c, add);
        } else {
            tiles::<F, M, 1>(a, b, sizes, step, c, add);
        }
    }
}

/// Computes all tiles of a product, of up to `V` vectors and `step` of the depth. The part of the
/// right-hand operand that a column of tiles reads stays in cache while the rows pass.
///
/// # Safety
/// The operands must hold the elements of their last row and column at the last step of the depth.
/// `c` must point to `rows` rows of `columns` floats, which must be initialized if `add`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn tiles<F: Factor, M: Multiply<F>, const V: usize>(
    a: Left<F>,
    b: Right<F>,
    ProductSizes { rows, columns, depth }: ProductSizes,
    step: usize,
    c: *mut f32,
    add: bool,
) {
    let mut j = 0;
    while j < columns {
        let left = (columns - j).div_ceil(LANES);
        // If one vector would be left over, two narrower tiles are used, because a tile of one
        // vector is bound by its loads.
        let vectors = if left == V + 1 { left.div_ceil(2) } else { left.min(V) };
        let width = (columns - j).min(vectors * LANES);
        // This loop goes over all rows of tiles for each step of the depth.
        let (mut i, mut p) = (0, 0);
        while p < depth {
            // SAFETY: the tile lies within the operands and the result, whose sizes the caller
            // guarantees.
            unsafe {
                let tile = Tile {
                    a: a.factors.as_ptr().add(a.position(i, p)),
                    a_steps: (a.row, a.depth),
                    b: b.factors.as_ptr().add(b.position(j, p)),
                    b_steps: (b.panel, b.depth),
                    depth: step.min(depth - p),
                    c: c.add(i * columns + j),
                    c_step: columns,
                    columns: width,
                    add: add || p > 0,
                };
                i += match (rows - i, width.div_ceil(LANES)) {
                    (ROWS.., 3) if V >= 3 => tile.sum::<M, ROWS, 3>(),
                    (ROWS.., 2) if V >= 2 => tile.sum::<M, ROWS, 2>(),
                    (ROWS.., _) if V >= 2 => tile.sum::<M, ROWS, 1>(),
                    (4.., 3) if V >= 3 => tile.sum::<M, 4, 3>(),
                    (4.., 2) if V >= 2 => tile.sum::<M, 4, 2>(),
                    (4.., _) => tile.sum::<M, 4, 1>(),
                    (_, 3) if V >= 3 => tile.sum::<M, 1, 3>(),
                    (_, 2) if V >= 2 => tile.sum::<M, 1, 2>(),
                    _ => tile.sum::<M, 1, 1>(),
                };
            }
            if i == rows {
                (i, p) = (0, p + step);
            }
        }
        j += width;
    }
}

/// A tile of the result: the starts of the tile and of its operands, and the strides of the
/// operands (rows or panels, depth).
struct Tile<F> {
    a: *const F,
    a_steps: (usize, usize),
    b: *const F,
    b_steps: (usize, usize),
    depth: usize,
    c: *mut f32,
    /// The number of columns of the whole result.
    c_step: usize,
    /// The number of columns of the tile.
    columns: usize,
    add: bool,
}

impl<F: Factor> Tile<F> {
    /// Sums up `R` rows by `V` vectors, and returns `R`.
    ///
    /// # Safety
    /// The operands and the result must have `R` rows, and `V` vectors must hold the tile's
    /// columns.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn sum<M: Multiply<F>, const R: usize, const V: usize>(&self) -> usize {
        // SAFETY: the caller guarantees `R` rows of `columns` floats in `c`; the buffer has `R`
        // rows of `V` vectors.
        unsafe {
            if self.columns == V * LANES {
                self.sum_into::<M, R, V>(self.c, self.c_step);
            } else {
                let mut buffer = [[[0.0f32; LANES]; V]; R];
                let (buffer, step) = (buffer.as_mut_ptr().cast::<f32>(), V * LANES);
                if self.add {
                    copy_rows((self.c, self.c_step), (buffer, step), R, self.columns);
                }
                self.sum_into::<M, R, V>(buffer, step);
                copy_rows((buffer, step), (self.c, self.c_step), R, self.columns);
            }
        }
        R
    }

    /// Sums up whole vectors in rows of `c` that are `step` apart.
    ///
    /// # Safety
    /// `c` must have `R` such rows of `V` vectors, and the operands must meet the requirements of
    /// [`Tile::sum`].
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn sum_into<M: Multiply<F>, const R: usize, const V: usize>(&self, c: *mut f32, step: usize) {
        // Indices and values, instead of iterators and references, keep the sums in registers.
        let mut sums = [[[0.0f32; LANES]; V]; R];
        let vector = |i: usize, j: usize| c.wrapping_add(i * step + j * LANES).cast::<[f32; LANES]>();
        // SAFETY: the caller guarantees the operands and the result.
        unsafe {
            if self.add {
                for i in 0..R {
                    for j in 0..V {
                        sums[i][j] = vector(i, j).read_unaligned();
                    }
                }
            } else {
                // The result is not in cache. Without the prefetch, its stores would wait for
                // memory (up to half of the time).
                for i in 0..R {
                    for j in 0..=V {
                        prefetch(vector(i, j));
                    }
                }
            }
            for p in 0..self.depth {
                let mut vectors = [[F::default(); LANES]; V];
                for j in 0..V {
                    let b = self.b.add(j * self.b_steps.0 + p * self.b_steps.1);
                    vectors[j] = b.cast::<[F; LANES]>().read_unaligned();
                }
                for i in 0..R {
                    let a = *self.a.add(i * self.a_steps.0 + p * self.a_steps.1);
                    for j in 0..V {
                        M::add_products(a, &vectors[j], &mut sums[i][j]);
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
///
/// # Safety
/// Both pointers must have `rows` rows of `columns` elements, and these must not overlap.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn copy_rows(
    (from, from_step): (*const f32, usize),
    (to, to_step): (*mut f32, usize),
    rows: usize,
    columns: usize,
) {
    // Copies eight elements at a time, because a call of `memcpy` for so few would cost more than
    // the sums.
    const PIECE: usize = 8;
    for row in 0..rows {
        // SAFETY: the caller guarantees both sets of rows.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu;
    use crate::testing::*;
    use crate::work::append;
    use candle_core::Tensor;

    /// Rows, columns and depths near the sizes of tiles and of steps of the depth, for narrow and
    /// wide operands.
    pub(super) const SIZES: &[(usize, usize, usize)] = if cfg!(miri) {
        &[(1, 1, 1), (9, 18, 3)]
    } else {
        &[(1, 1, 1), (9, 5, 3), (13, 50, 300), (67, 64, 217), (16, 160, 144), (101, 97, 95), (250, 130, 90)]
    };

    pub(super) fn values(seed: u64, len: usize) -> Vec<f32> {
        random(seed, &[len]).to_vec1().unwrap()
    }

    /// Checks, to the bit, that sums are in the order of the depth with fused multiply–add for all
    /// blocks, tiles and steps.
    #[test]
    fn sums_are_in_the_order_of_the_depth() {
        for &(m, n, k) in SIZES {
            let (a, b, start) = (values(1, m * k), values(2, k * n), values(3, m * n));
            let plain = |start: &dyn Fn(usize) -> f32| -> Tensor {
                let sum = |at: usize| {
                    (0..k).fold(start(at), |sum, p| a[at / n * k + p].mul_add(b[p * n + at % n], sum))
                };
                cpu::tensor((0..m * n).map(sum).collect(), m * n).unwrap()
            };
            let (set_plainly, added_plainly) = (plain(&|_| 0.0), plain(&|at| start[at]));
            let transposed: Vec<f32> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
            let weights: Vec<f32> = (0..n * k).map(|at| b[at % k * n + at / k]).collect();
            let followed: Vec<f32> = b.iter().copied().chain([f32::NAN; LANES]).collect();
            let sizes = ProductSizes { rows: m, columns: n, depth: k };
            assert_same_everywhere(|| {
                let context = format!("{m} × {n}, depth {k}");
                for panels in [Panels::new(&b, n), Panels::transposed(&weights, k)] {
                    let (mut found, mut operands) = (Vec::new(), Operands::default());
                    append(&mut found, m * n, |c| set(&a, &panels, sizes, &mut operands, c).into());
                    let found = cpu::tensor(found, m * n).unwrap();
                    assert_eq!(elements(&found), elements(&set_plainly), "{context}");
                }
                let mut sums = start.clone();
                add_transposed(&transposed, &followed, sizes, &mut Operands::default(), &mut sums);
                let found = cpu::tensor(sums, m * n).unwrap();
                assert_eq!(elements(&found), elements(&added_plainly), "{context}");
                vec![found]
            });
        }
    }

    /// Checks, for all instructions, that `bf16` values are multiplied as the floats that they
    /// represent, up to the rounding of the sums.
    #[test]
    fn pairs_are_multiplied_as_their_floats() {
        for &(m, n, k) in SIZES {
            let halves = |seed, len| bf16::all_nearest(&values(seed, len)).into_owned();
            let (a, b, start) = (halves(1, m * k), halves(2, k * n), values(3, m * n));
            let float = |x: &bf16| f64::from(x.float());
            let sums = |start: &dyn Fn(usize) -> f64| -> Vec<f64> {
                let product = |at: usize, p: usize| float(&a[at / n * k + p]) * float(&b[p * n + at % n]);
                (0..m * n).map(|at| start(at) + (0..k).map(|p| product(at, p)).sum::<f64>()).collect()
            };
            let (set_plainly, added_plainly) = (sums(&|_| 0.0), sums(&|at| f64::from(start[at])));
            let transposed: Vec<bf16> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
            let followed: Vec<bf16> = b.iter().copied().chain([bf16::NAN; LANES]).collect();
            let weights: Vec<f32> = b.iter().map(|b| b.float()).collect();
            let columns: Vec<f32> = (0..n * k).map(|at| weights[at % k * n + at / k]).collect();
            let sizes = ProductSizes { rows: m, columns: n, depth: k };
            let close = |found: &[f32], expected: &[f64], context: &str| {
                // There are k terms below 1. Each addition has an error of half a last place of a
                // sum below k.
                let bound = f64::from(f32::EPSILON) * (k * k) as f64;
                for (found, expected) in found.iter().zip(expected) {
                    assert!((f64::from(*found) - expected).abs() <= bound, "{context}: {found}, {expected}");
                }
            };
            for allowed in 0..3 {
                with_instructions(allowed, || {
                    let context = format!("{m} × {n}, depth {k}, instructions {allowed}");
                    for panels in [Panels::new(&weights, n), Panels::transposed(&columns, k)] {
                        let (mut found, mut operands) = (Vec::new(), Operands::default());
                        append(&mut found, m * n, |c| set(&a, &panels, sizes, &mut operands, c).into());
                        close(&found, &set_plainly, &context);
                    }
                    let mut sums = start.clone();
                    add_transposed(&transposed, &followed, sizes, &mut Operands::default(), &mut sums);
                    close(&sums, &added_plainly, &context);
                });
            }
        }
    }
}
