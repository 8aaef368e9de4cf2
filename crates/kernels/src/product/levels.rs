//! Products of quantization levels: integer products of bytes and signed bytes.
//!
//! They are exact, so they have the same bits with all instructions. Matrix tiles and AVX-512 VNNI
//! add up four products at a time. AVX2 adds up two, in 16 bits, which hold the sums of many
//! products of few bits.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::level_product::{IntegerPanels, LevelProduct, groups};
use super::{GROUP, LANES, Line, Multiplicand, Operands};
use crate::cpu::{Instructions, simd};
use crate::work::{Written, poison};
use quant_core::Grid;
use std::mem::MaybeUninit;

/// Writes `c = scale · (x − zero_point)·w`, where `x[rows, depth]` are level numbers of a grid.
///
/// The result is exact except for the rounding by the scale and, beyond 2²⁴, by the conversion to
/// float. `scale` has one element for each column, including the columns that fill up the last
/// vector.
pub(crate) fn set_levels<'c, T: Multiplicand>(
    x: &[u8],
    depth: usize,
    grid: &Grid,
    w: &IntegerPanels,
    scale: &[f32],
    operands: &mut Operands<T>,
    c: &'c mut [MaybeUninit<f32>],
) -> Written<'c> {
    let rows = c.len() / w.columns;
    assert!(groups(depth) == w.groups && x.len() == rows * depth && c.len() == rows * w.columns);
    assert_eq!(scale.len(), w.sums.len());
    let zero_point = grid.zero_point() as i32;
    let shift: Vec<i32> = w.sums.iter().map(|sum| -zero_point * sum).collect();
    let product = LevelProduct { x, highest: grid.max_level() as u32, depth, w, shift: &shift, scale };
    poison(c);
    set(&product, rows, &mut operands.levels, c);
    // SAFETY: `set` has written all columns of all rows.
    #[allow(unsafe_code)]
    unsafe {
        c.assume_init_ref().into()
    }
}

/// Writes all of `c`, which has `rows` rows, with the best instructions of the machine.
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
fn set(product: &LevelProduct, rows: usize, tiles: &mut Vec<Line<[u8; GROUP]>>, c: &mut [MaybeUninit<f32>]) {
    #[cfg(target_arch = "x86_64")]
    if Instructions::current() >= Instructions::WIDE {
        // SAFETY: the machine has the instructions, and the operands have `rows` rows.
        #[allow(unsafe_code)]
        if amx::available() {
            return unsafe { amx::set_levels(product, rows, tiles, c) };
        } else if is_x86_feature_detected!("avx512vnni") {
            return unsafe { vnni::set(product, rows, c) };
        }
    }
    #[cfg(target_arch = "x86_64")]
    if Instructions::current() >= Instructions::Avx2 && product.groups_in_16_bits() > 0 {
        // SAFETY: the machine has the instructions, and the operands have `rows` rows.
        #[allow(unsafe_code)]
        return unsafe { avx2::set(product, rows, c) };
    }
    set_levels_plainly(product, c);
}

simd! {
    pub(super) fn set_levels_plainly(product: &LevelProduct<'_>, c: &mut [MaybeUninit<f32>]) {
        let LevelProduct { x, depth, w, shift, scale, .. } = *product;
        for (x, c) in x.chunks_exact(depth).zip(c.chunks_exact_mut(w.columns)) {
            let columns = shift.chunks_exact(LANES).zip(scale.chunks_exact(LANES));
            let panels = w.lines.chunks_exact(w.groups).zip(columns);
            for ((panel, (shift, scale)), c) in panels.zip(c.chunks_mut(LANES)) {
                let mut sums = [0i32; LANES];
                sums.copy_from_slice(shift);
                for (x, Line(vector)) in x.chunks(GROUP).zip(panel) {
                    for (t, x) in x.iter().enumerate() {
                        let x = i32::from(*x);
                        for (sum, w) in sums.iter_mut().zip(vector) {
                            *sum += x * i32::from(w[t]);
                        }
                    }
                }
                for ((c, sum), scale) in c.iter_mut().zip(&sums).zip(scale) {
                    c.write(*sum as f32 * scale);
                }
            }
        }
    }
}

/// Returns the last group of a row of `depth` bytes, which is incomplete, filled up with zeros.
///
/// # Safety
/// The row must have `depth` bytes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn rest_of_row(row: *const u8, depth: usize) -> i32 {
    let mut bytes = [0; GROUP];
    for (byte, p) in bytes.iter_mut().zip(depth / GROUP * GROUP..depth) {
        // SAFETY: `p` is less than `depth`.
        *byte = unsafe { *row.add(p) };
    }
    i32::from_ne_bytes(bytes)
}

/// Products of levels of few bits. `VPMADDUBSW` adds up the products of two neighbours in 16 bits,
/// and the sums stay there for as many groups as fit.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{LevelProduct, rest_of_row};
    use crate::product::{GROUP, LANES};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// The number of registers for the columns of a panel.
    const V: usize = 2;

    /// Writes all of `c`.
    ///
    /// # Safety
    /// The machine must have the target features of this function, `product.x` and `c` must have
    /// `rows` rows, and the sums of a group must fit in 16 bits.
    #[target_feature(enable = "avx2,fma,bmi2")]
    #[allow(unsafe_code)]
    pub(super) unsafe fn set(product: &LevelProduct<'_>, rows: usize, c: &mut [MaybeUninit<f32>]) {
        for panel in 0..product.w.columns.div_ceil(LANES) {
            let mut i = 0;
            while i < rows {
                // SAFETY: at least as many rows are left as the tile has.
                unsafe {
                    i += match rows - i {
                        6.. => tile::<6>(product, i, panel, c),
                        2.. => tile::<2>(product, i, panel, c),
                        _ => tile::<1>(product, i, panel, c),
                    };
                }
            }
        }
    }

    /// Writes `R` rows of a panel, and returns `R`.
    ///
    /// # Safety
    /// The caller must meet the requirements of [`set`], and the rows and the panel must exist.
    #[inline]
    #[target_feature(enable = "avx2,fma,bmi2")]
    #[allow(unsafe_code)]
    unsafe fn tile<const R: usize>(
        product: &LevelProduct<'_>,
        row: usize,
        panel: usize,
        c: &mut [MaybeUninit<f32>],
    ) -> usize {
        let LevelProduct { x, depth, w, shift, scale, .. } = *product;
        let (whole, groups, most) = (depth / GROUP, depth.div_ceil(GROUP), product.groups_in_16_bits());
        // SAFETY: the caller guarantees rows `row..row + R` and the panel. Only the columns that
        // exist are stored, and an incomplete last group of a row is read byte by byte.
        unsafe {
            let x = x.as_ptr().add(row * depth);
            let vectors = w.lines.as_ptr().add(panel * w.groups).cast::<[__m256i; V]>();
            let of_panel = |values: *const __m256i| -> [__m256i; V] {
                std::array::from_fn(|j| _mm256_loadu_si256(values.add(panel * V + j)))
            };
            let mut sums = [of_panel(shift.as_ptr().cast()); R];
            let mut first = 0;
            while first < groups {
                let end = groups.min(first.saturating_add(most));
                let mut short = [[_mm256_setzero_si256(); V]; R];
                let mut add = |group: usize, x: [i32; R]| {
                    let vectors = &*vectors.add(group);
                    for i in 0..R {
                        let x = _mm256_set1_epi32(x[i]);
                        for j in 0..V {
                            let products = _mm256_maddubs_epi16(x, vectors[j]);
                            short[i][j] = _mm256_add_epi16(short[i][j], products);
                        }
                    }
                };
                for group in first..end.min(whole) {
                    let group_of = |i| x.add(i * depth + group * GROUP).cast::<i32>().read_unaligned();
                    add(group, std::array::from_fn(group_of));
                }
                if end > whole {
                    add(whole, std::array::from_fn(|i| rest_of_row(x.add(i * depth), depth)));
                }
                let one = _mm256_set1_epi16(1);
                for i in 0..R {
                    for j in 0..V {
                        sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(short[i][j], one));
                    }
                }
                first = end;
            }
            let scale = of_panel(scale.as_ptr().cast());
            let columns = (w.columns - panel * LANES).min(LANES);
            for i in 0..R {
                let c = &mut c[(row + i) * w.columns + panel * LANES..][..columns];
                let mut scaled = [_mm256_setzero_ps(); V];
                for j in 0..V {
                    scaled[j] = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][j]), _mm256_castsi256_ps(scale[j]));
                }
                let scaled: [MaybeUninit<f32>; LANES] = std::mem::transmute(scaled);
                c.copy_from_slice(&scaled[..columns]);
            }
        }
        R
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use super::{LevelProduct, rest_of_row};
    use crate::product::{GROUP, LANES};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// Writes all of `c`.
    ///
    /// # Safety
    /// The machine must have the target features of this function, and `product.x` and `c` must
    /// have `rows` rows.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    #[allow(unsafe_code)]
    pub(super) unsafe fn set(product: &LevelProduct<'_>, rows: usize, c: &mut [MaybeUninit<f32>]) {
        let panels = product.w.columns.div_ceil(LANES);
        for panel in (0..panels).step_by(3) {
            let mut i = 0;
            while i < rows {
                // SAFETY: at least as many rows and panels are left as the tile has.
                unsafe {
                    i += match (rows - i, panels - panel) {
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

    /// Writes `R` rows of `V` panels, and returns `R`.
    ///
    /// # Safety
    /// The caller must meet the requirements of [`set`], and the rows and the panels must exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    #[allow(unsafe_code)]
    unsafe fn tile<const R: usize, const V: usize>(
        product: &LevelProduct<'_>,
        row: usize,
        panel: usize,
        c: &mut [MaybeUninit<f32>],
    ) -> usize {
        let LevelProduct { x, depth, w, shift, scale, .. } = *product;
        // SAFETY: the caller guarantees rows `row..row + R` and panels `panel..panel + V`. An
        // incomplete last group of a row is read byte by byte, and stores to an incomplete panel
        // are masked.
        unsafe {
            let x = x.as_ptr().add(row * depth);
            let vectors = w.lines.as_ptr().add(panel * w.groups);
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
            let whole = depth / GROUP;
            for group in 0..whole {
                step(
                    group,
                    std::array::from_fn(|i| x.add(i * depth + group * GROUP).cast::<i32>().read_unaligned()),
                );
            }
            if !depth.is_multiple_of(GROUP) {
                step(whole, std::array::from_fn(|i| rest_of_row(x.add(i * depth), depth)));
            }
            let scales: [__m512; V] =
                std::array::from_fn(|j| _mm512_loadu_ps(scale.as_ptr().add((panel + j) * LANES)));
            let n = w.columns;
            for (i, sums) in sums.iter().enumerate() {
                for (j, (sum, scale)) in sums.iter().zip(scales).enumerate() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product::tests::{SIZES, values};
    use crate::testing::with_instructions;
    use crate::work::append;
    use quant_core::Bits;

    /// Checks exact equality for few to many bits of both operands, with random levels and with the
    /// largest levels everywhere, for which sums in 16 bits would overflow first.
    #[test]
    fn levels_are_multiplied_exactly() {
        for &(m, n, k) in SIZES {
            for (x_bits, largest) in [(2, 1), (3, 7), (4, 15), (8, 15), (8, 64), (8, 127)] {
                let grid = Grid::new(-1.0, 2.0, Bits::new(x_bits).unwrap()).unwrap();
                let highest = grid.max_level();
                let zero_point = i64::from(grid.zero_point() as i32);
                for random in [false, true] {
                    let draw = |seed, len| if random { values(seed, len) } else { vec![1.0; len] };
                    let x: Vec<u8> =
                        draw(1, m * k).iter().map(|x| (x.abs().min(1.0) * highest) as u8).collect();
                    let signed = |w: &f32| (w.clamp(-1.0, 1.0) * largest as f32) as i8;
                    let w: Vec<i8> = draw(2, k * n).iter().map(signed).collect();
                    let panels = IntegerPanels::new(&w, k, n);
                    let scale = vec![0.5; panels.sums.len()];
                    let term = |i: usize, j: usize, p: usize| {
                        (i64::from(x[i * k + p]) - zero_point) * i64::from(w[p * n + j])
                    };
                    let sum = |at: usize| (0..k).map(|p| term(at / n, at % n, p)).sum::<i64>();
                    let expected: Vec<f32> = (0..m * n).map(|at| sum(at) as f32 * 0.5).collect();
                    for allowed in 0..3 {
                        with_instructions(allowed, || {
                            let (mut found, mut operands) = (Vec::new(), Operands::<f32>::default());
                            append(&mut found, m * n, |c| {
                                set_levels(&x, k, &grid, &panels, &scale, &mut operands, c)
                            });
                            let context =
                                format!("{m} × {n}, depth {k}, up to {highest} · {largest}, {allowed}");
                            assert!(found == expected, "{context}");
                        });
                    }
                }
            }
        }
    }
}
