//! Products with the matrix tiles of AMX, which multiply pairs of `bf16` values (`TDPBF16PS`) and
//! groups of four bytes (`TDPBUSD`).
//!
//! A tile has 16 rows of 64 bytes. An instruction multiplies a tile of the left-hand operand (16
//! rows by 16 factors) by a tile of the right-hand operand (16 factors by 16 columns, in the layout
//! of [`super::Panels`] and [`super::IntegerPanels`]) and adds the product to a tile of sums. Two
//! by two tiles of sums are computed at once, so that each loaded tile is used twice.
//!
//! Operands are copied into whole tiles that follow each other, filled up with zeros. On a
//! fourth-generation Xeon, a multiplication takes 16 cycles, however much of the depth a tile
//! holds. Loading a tile takes 8 cycles, but 40 if each of its rows crosses a cache line.
//! Configuring tiles of other sizes takes 200. Sums are stored in a buffer that stays in the
//! first-level cache, and vector stores copy them to the result. Rust has no stable functions for
//! tiles, so this module uses assembly.

use super::level_product::LevelProduct;
use super::{Line, Pair};
use crate::ProductSizes;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// The number of rows of a tile, and of factors in a row.
pub(super) const SIDE: usize = 16;

/// The number of bytes of a row.
const ROW: usize = 64;

/// Returns whether this machine has tiles for both kinds of factors and the kernel lets this
/// process use them.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        let wanted = BF16 | TILES | INT8;
        let has = is_x86_feature_detected!("avx512bw") && __cpuid_count(7, 0).edx & wanted == wanted;
        has && permitted()
    })
}

/// Asks the kernel for permission to use the tile state, which a process does not have by default.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call changes only the permissions of this process.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) };
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The tile configuration in memory, which uses all rows and bytes of each tile.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (ROW as u16, SIDE as u8);
        tile += 1;
    }
    Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Two by two tiles of sums.
#[repr(C, align(64))]
struct Sums<S>([[S; 2 * SIDE]; 2 * SIDE]);

/// Defines a function that sums up two by two tiles with one multiplication instruction. It has
/// assembly for each number of tiles. Tiles 0 to 3 hold sums (by rows), 4 and 5 the left-hand
/// operand, 6 and 7 the right-hand operand.
macro_rules! sums {
    ($name:ident, $multiply:literal, $sum:ty) => {
        /// Sums up `steps` tiles that follow each other at each `a` (rows) and `b` (columns). If
        /// `two_rows` or `two_columns` is false, the second `a` or `b` is not read and its sums do
        /// not change.
        ///
        /// # Safety
        /// The machine must have tiles, they must be configured, and each operand must have `steps`
        /// tiles, at least one.
        #[inline]
        #[allow(unsafe_code)]
        unsafe fn $name(
            [a, a1]: [*const u8; 2],
            [b, b1]: [*const u8; 2],
            steps: usize,
            (two_rows, two_columns): (bool, bool),
            sums: &mut Sums<$sum>,
        ) {
            // SAFETY: the caller guarantees the tiles and the operands.
            unsafe {
                match (two_rows, two_columns) {
                    (true, true) => sums!(@run (a, a1, b, b1, steps, sums), {
                        ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
                        ["tileloadd tmm4, [{a} + {row}]", "tileloadd tmm6, [{b} + {row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), "tileloadd tmm7, [{b1} + {row}]",
                         concat!($multiply, " tmm1, tmm4, tmm7"), "tileloadd tmm5, [{a1} + {row}]",
                         concat!($multiply, " tmm2, tmm5, tmm6"), concat!($multiply, " tmm3, tmm5, tmm7")],
                        ["tilestored [{c} + 2*{row}], tmm0", "tilestored [{c} + 2*{row} + 64], tmm1",
                         "tilestored [{c} + 2*{row} + 2048], tmm2", "tilestored [{c} + 2*{row} + 2112], tmm3"]
                    }),
                    (true, false) => sums!(@run (a, a1, b, b1, steps, sums), {
                        ["tilezero tmm0", "tilezero tmm2"],
                        ["tileloadd tmm4, [{a} + {row}]", "tileloadd tmm6, [{b} + {row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), "tileloadd tmm5, [{a1} + {row}]",
                         concat!($multiply, " tmm2, tmm5, tmm6")],
                        ["tilestored [{c} + 2*{row}], tmm0", "tilestored [{c} + 2*{row} + 2048], tmm2"]
                    }),
                    (false, true) => sums!(@run (a, a1, b, b1, steps, sums), {
                        ["tilezero tmm0", "tilezero tmm1"],
                        ["tileloadd tmm4, [{a} + {row}]", "tileloadd tmm6, [{b} + {row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), "tileloadd tmm7, [{b1} + {row}]",
                         concat!($multiply, " tmm1, tmm4, tmm7")],
                        ["tilestored [{c} + 2*{row}], tmm0", "tilestored [{c} + 2*{row} + 64], tmm1"]
                    }),
                    (false, false) => sums!(@run (a, a1, b, b1, steps, sums), {
                        ["tilezero tmm0"],
                        ["tileloadd tmm4, [{a} + {row}]", "tileloadd tmm6, [{b} + {row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6")],
                        ["tilestored [{c} + 2*{row}], tmm0"]
                    }),
                }
            }
        }
    };
    (@run ($a:ident, $a1:ident, $b:ident, $b1:ident, $steps:ident, $sums:ident), {
        [$($zero:expr),*], [$($step:expr),*], [$($store:expr),*]
    }) => {
        asm!(
            $($zero,)*
            "2: // Where a second is not used: {a1}, {b1}.",
            $($step,)*
            "add {a}, 1024",
            "add {a1}, 1024",
            "add {b}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            $($store,)*
            a = inout(reg) $a => _,
            a1 = inout(reg) $a1 => _,
            b = inout(reg) $b => _,
            b1 = inout(reg) $b1 => _,
            c = in(reg) $sums,
            row = in(reg) ROW,
            steps = inout(reg) $steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

sums!(sum_of_halves, "tdpbf16ps", f32);
sums!(sum_of_bytes, "tdpbusd", i32);

/// Returns the address of an operand's tiles at `index` along its rows (for a right-hand operand,
/// its columns), where `steps` tiles along the depth follow each other.
fn tile<F>(lines: &[Line<F>], index: usize, steps: usize) -> *const u8 {
    lines[index * steps * SIDE..][..steps * SIDE].as_ptr().cast()
}

/// Sums up all tiles of a product, and calls `write(row, column, sums)` for each two by two of
/// them.
///
/// # Safety
/// Tiles must be [`available`], and `sum` must be a function that `sums!` defines.
#[inline(always)]
#[allow(unsafe_code, clippy::type_complexity)]
unsafe fn sum_up<L, R, S: Copy + Default>(
    (left, right): (&[Line<L>], &[Line<R>]),
    ProductSizes { rows, columns, depth: steps }: ProductSizes,
    sum: unsafe fn([*const u8; 2], [*const u8; 2], usize, (bool, bool), &mut Sums<S>),
    mut write: impl FnMut(usize, usize, &Sums<S>),
) {
    assert!(steps > 0, "a product over nothing");
    let mut sums = Sums([[S::default(); 2 * SIDE]; 2 * SIDE]);
    let both =
        |of: usize, at: usize| if at + SIDE < of { [at / SIDE, at / SIDE + 1] } else { [at / SIDE; 2] };
    // SAFETY: the caller guarantees the tiles, the assertion the steps, and the slices in `tile`
    // check the sizes of the operands.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly));
        for i in (0..rows).step_by(2 * SIDE) {
            for j in (0..columns).step_by(2 * SIDE) {
                let a = both(rows, i).map(|i| tile(left, i, steps));
                let b = both(columns, j).map(|j| tile(right, j, steps));
                sum(a, b, steps, (i + SIDE < rows, j + SIDE < columns), &mut sums);
                write(i, j, &sums);
            }
        }
        // The tiles are released because the kernel would otherwise save their 8 KiB at each switch
        // of the thread.
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Returns the lanes of a vector at column `start` that lie within `columns`.
fn lanes(columns: usize, start: usize) -> __mmask16 {
    ((1u32 << columns.saturating_sub(start).min(SIDE)) - 1) as __mmask16
}

/// Calls `vector(sums, c, lanes, column)` to write each vector of two by two tiles of sums to rows
/// of `columns`.
///
/// # Safety
/// `vector` must write only to the lanes.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn write<S>(
    (i, j): (usize, usize),
    sums: &Sums<S>,
    columns: usize,
    c: &mut [MaybeUninit<f32>],
    vector: impl Fn(*const S, *mut f32, __mmask16, usize),
) {
    for (row, c) in sums.0.iter().zip(c[i * columns..].chunks_exact_mut(columns)) {
        for (half, row) in row.chunks_exact(SIDE).enumerate() {
            let column = j + half * SIDE;
            if column < columns {
                vector(row.as_ptr(), c[column..].as_mut_ptr().cast(), lanes(columns, column), column);
            }
        }
    }
}

/// Computes `c = a·b` for `a[rows, depth]`, with `tiles` as scratch memory; see [`super::set`].
///
/// # Safety
/// Tiles must be [`available`], and the machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(unsafe_code)]
pub(super) unsafe fn set(
    a: &[bf16],
    b: &[Line<Pair>],
    ProductSizes { rows, columns, depth }: ProductSizes,
    tiles: &mut Vec<Line<Pair>>,
    c: &mut [MaybeUninit<f32>],
) {
    assert!(a.len() == rows * depth && c.len() == rows * columns);
    if depth == 0 {
        c.fill(MaybeUninit::new(0.0));
        return;
    }
    let steps = (2 * depth).div_ceil(ROW);
    // SAFETY: the caller guarantees the instructions, and each store is masked to the lanes of a
    // row.
    unsafe {
        pack_rows(a, depth, tiles);
        let sizes = ProductSizes { rows, columns, depth: steps };
        sum_up((tiles, b), sizes, sum_of_halves, |i, j, sums| {
            write((i, j), sums, columns, c, |sums, c, lanes, _| {
                _mm512_mask_storeu_ps(c, lanes, _mm512_load_ps(sums));
            });
        });
    }
}

/// Computes `c += aᵀ·b` for `a[depth, rows]` and `b[depth, columns]`, with `left` and `right` as
/// scratch memory.
///
/// # Safety
/// Tiles must be [`available`], and the machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(unsafe_code)]
pub(super) unsafe fn add_transposed(
    (a, b): (&[bf16], &[bf16]),
    ProductSizes { rows, columns, depth }: ProductSizes,
    (left, right): (&mut Vec<Line<Pair>>, &mut Vec<Line<Pair>>),
    c: &mut [f32],
) {
    assert!(a.len() == depth * rows && b.len() == depth * columns && c.len() == rows * columns);
    // SAFETY: the caller guarantees the instructions. Only floats are written to `c`, and each
    // store is masked to the lanes of a row.
    unsafe {
        pack_columns::<true>(a, rows, left);
        pack_columns::<false>(b, columns, right);
        let c = std::slice::from_raw_parts_mut(c.as_mut_ptr().cast(), c.len());
        let sizes = ProductSizes { rows, columns, depth: depth.div_ceil(2 * SIDE) };
        sum_up((left, right), sizes, sum_of_halves, |i, j, sums| {
            write((i, j), sums, columns, c, |sums, c, lanes, _| {
                let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, c), _mm512_load_ps(sums));
                _mm512_mask_storeu_ps(c, lanes, sum);
            });
        });
    }
}

/// Computes [`super::set_levels`], with `tiles` as scratch memory.
///
/// # Safety
/// Tiles must be [`available`], and the machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(unsafe_code)]
pub(super) unsafe fn set_levels(
    product: &LevelProduct<'_>,
    rows: usize,
    tiles: &mut Vec<Line<[u8; 4]>>,
    c: &mut [MaybeUninit<f32>],
) {
    let LevelProduct { x, depth, w, shift, scale, .. } = *product;
    let columns = w.columns;
    assert!(depth > 0 && x.len() == rows * depth && c.len() == rows * columns);
    assert!(shift.len() >= columns.next_multiple_of(SIDE) && scale.len() >= columns.next_multiple_of(SIDE));
    // SAFETY: the caller guarantees the instructions. Shifts and scales fill whole vectors, and
    // each store is masked to the lanes of a row.
    unsafe {
        pack_rows(x, depth, tiles);
        let sizes = ProductSizes { rows, columns, depth: depth.div_ceil(ROW) };
        sum_up((tiles, &w.lines), sizes, sum_of_bytes, |i, j, sums| {
            write((i, j), sums, columns, c, |sums, c, lanes, column| {
                let shift = _mm512_loadu_si512(shift.as_ptr().add(column).cast());
                let sum = _mm512_add_epi32(_mm512_load_si512(sums.cast()), shift);
                let scale = _mm512_loadu_ps(scale.as_ptr().add(column));
                _mm512_mask_storeu_ps(c, lanes, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
            });
        });
    }
}

/// Makes room for `count` tiles, all of which the caller must write.
fn reserve<F>(tiles: &mut Vec<Line<F>>, count: usize) -> *mut Line<F> {
    tiles.clear();
    tiles.reserve(count * SIDE);
    tiles.as_mut_ptr()
}

/// Packs `rows[…, depth]` of `bf16` values or bytes as a left-hand operand.
///
/// # Safety
/// The machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(unsafe_code)]
unsafe fn pack_rows<T, F>(rows: &[T], depth: usize, tiles: &mut Vec<Line<F>>) {
    let (count, bytes) = (rows.len() / depth, depth * size_of::<T>());
    let (steps, rest) = (bytes.div_ceil(ROW), (bytes - 1) % ROW + 1);
    let last = u64::MAX >> (ROW - rest);
    let lines = reserve(tiles, count.div_ceil(SIDE) * steps);
    // SAFETY: `bytes` bytes of each row are read, and each line of all tiles is written.
    unsafe {
        for i in 0..count.next_multiple_of(SIDE) {
            let to = lines.add(i / SIDE * steps * SIDE + i % SIDE).cast::<__m512i>();
            if i < count {
                let from = rows.as_ptr().add(i * depth).cast::<i8>();
                for step in 0..steps - 1 {
                    *to.add(step * SIDE) = _mm512_loadu_si512(from.add(step * ROW).cast());
                }
                *to.add((steps - 1) * SIDE) = _mm512_maskz_loadu_epi8(last, from.add((steps - 1) * ROW));
            } else {
                for step in 0..steps {
                    *to.add(step * SIDE) = _mm512_setzero_si512();
                }
            }
        }
        tiles.set_len(count.div_ceil(SIDE) * steps * SIDE);
    }
}

/// Packs the columns of `rows[depth, columns]` as an operand with the same depth: as a left-hand
/// operand if `TURNED`, otherwise as a right-hand operand.
///
/// # Safety
/// The machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(unsafe_code)]
unsafe fn pack_columns<const TURNED: bool>(rows: &[bf16], columns: usize, tiles: &mut Vec<Line<Pair>>) {
    let depth = rows.len() / columns;
    let steps = depth.div_ceil(2 * SIDE);
    let panels = columns.div_ceil(SIDE);
    let lines = reserve(tiles, panels * steps);
    // SAFETY: only the lanes within a row are read, and each line of all tiles is written.
    unsafe {
        // This order pairs the `bf16` values of two rows that lie one after the other in a vector.
        let order: [i16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * SIDE) as i16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for step in 0..steps {
            for panel in 0..panels {
                let (first, column) = (2 * SIDE * step, SIDE * panel);
                let mask = lanes(columns, column);
                let row = |p: usize| {
                    let mask = if p < depth { mask } else { 0 };
                    _mm256_maskz_loadu_epi16(mask, rows.as_ptr().wrapping_add(p * columns + column).cast())
                };
                let mut pairs = [_mm512_setzero_si512(); SIDE];
                for (p, pair) in pairs.iter_mut().enumerate() {
                    let p = first + 2 * p;
                    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(row(p)), row(p + 1));
                    *pair = _mm512_permutexvar_epi16(order, both);
                }
                if TURNED {
                    pairs = turn(pairs);
                }
                let to = lines.add((panel * steps + step) * SIDE).cast::<__m512i>();
                for (line, pair) in pairs.into_iter().enumerate() {
                    *to.add(line) = pair;
                }
            }
        }
        tiles.set_len(panels * steps * SIDE);
    }
}

/// Transposes 16 rows of 16 factors.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    // Quarter `i` of `fours[4·g + k]` holds factor `4·i + k` of each of the four rows of group `g`.
    let mut fours = [_mm512_setzero_si512(); SIDE];
    for g in 0..4 {
        let r = |i: usize| rows[4 * g + i];
        let (low, high) = (_mm512_unpacklo_epi32(r(0), r(1)), _mm512_unpackhi_epi32(r(0), r(1)));
        let (low_2, high_2) = (_mm512_unpacklo_epi32(r(2), r(3)), _mm512_unpackhi_epi32(r(2), r(3)));
        fours[4 * g] = _mm512_unpacklo_epi64(low, low_2);
        fours[4 * g + 1] = _mm512_unpackhi_epi64(low, low_2);
        fours[4 * g + 2] = _mm512_unpacklo_epi64(high, high_2);
        fours[4 * g + 3] = _mm512_unpackhi_epi64(high, high_2);
    }
    let mut turned = [_mm512_setzero_si512(); SIDE];
    for k in 0..4 {
        let [a, b, c, d] = [fours[k], fours[4 + k], fours[8 + k], fours[12 + k]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_2, odd_2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        turned[k] = _mm512_shuffle_i32x4::<0x88>(even, even_2);
        turned[4 + k] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);
        turned[8 + k] = _mm512_shuffle_i32x4::<0xdd>(even, even_2);
        turned[12 + k] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_2);
    }
    turned
}

#[cfg(test)]
#[path = "tiles_in_software.rs"]
#[allow(unsafe_code)]
mod tiles_in_software;

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::super::level_product::{IntegerPanels, groups};
    use super::super::levels::set_levels_plainly;
    use super::super::{LANES, Packed};
    use super::*;
    use crate::elements::Element;
    use crate::testing::*;
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Less than a tile, whole tiles, and more than two by two; depths of less than a step, of one
    /// step, and of several steps with a remainder.
    const SIZES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (9, 5, 3),
        (16, 16, 32),
        (32, 32, 64),
        (13, 50, 300),
        (67, 64, 217),
        (33, 17, 47),
        (101, 97, 95),
        (40, 130, 90),
    ];

    fn halves(seed: u64, len: usize) -> Vec<bf16> {
        bf16::all_nearest(&random(seed, &[len]).to_vec1::<f32>().unwrap()).into_owned()
    }

    /// Returns whether tiles are available, in software if the machine has none.
    fn tiles() -> bool {
        let has = is_x86_feature_detected!("avx512bw");
        if !has {
            eprintln!("skipped: products by tiles need AVX-512 beside them");
        }
        has && (available() || tiles_in_software::install())
    }

    #[test]
    fn halves_are_multiplied_as_their_floats() {
        if !tiles() {
            return;
        }
        for (m, n, k) in SIZES {
            let (a, b) = (halves(1, m * k), halves(2, k * n));
            let start: Vec<f32> = random(3, &[m * n]).to_vec1().unwrap();
            let float = |x: &bf16| f64::from(x.float());
            let expected = |at: usize| -> f64 {
                (0..k).map(|p| float(&a[at / n * k + p]) * float(&b[p * n + at % n])).sum()
            };
            let close = |found: &[f32], start: &dyn Fn(usize) -> f64, context: &str| {
                // There are k terms below 1. Each addition has an error of half a last place of a
                // sum below k.
                let bound = f64::from(f32::EPSILON) * (k * k) as f64;
                for (at, found) in found.iter().enumerate() {
                    let expected = start(at) + expected(at);
                    assert!(
                        (f64::from(*found) - expected).abs() <= bound,
                        "{context}, {m} × {n}, depth {k}: {found}, {expected} at {at}"
                    );
                }
            };
            let sizes = ProductSizes { rows: m, columns: n, depth: k };
            let weights: Vec<f32> = b.iter().map(|b| b.float()).collect();
            let panels = Packed::<Pair, LANES>::of_weights::<bf16>(&weights, n);
            let mut c = vec![MaybeUninit::new(f32::NAN); m * n];
            // SAFETY: tiles are available, and `set` writes all of `c`.
            let c = unsafe {
                set(&a, &panels.lines, sizes, &mut Vec::new(), &mut c);
                c.assume_init_ref()
            };
            close(c, &|_| 0.0, "set");

            let turned: Vec<bf16> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
            let mut c = start.clone();
            // SAFETY: tiles are available.
            unsafe { add_transposed((&turned, &b), sizes, (&mut Vec::new(), &mut Vec::new()), &mut c) };
            close(&c, &|at| f64::from(start[at]), "add");
        }
    }

    /// Checks equality to the bit, because the products are exact.
    #[test]
    fn levels_are_multiplied_as_without_tiles() {
        if !tiles() {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (m, n, k) in SIZES {
            let x: Vec<u8> = (0..m * k).map(|_| rng.random()).collect();
            let w: Vec<i8> = (0..k * n).map(|_| rng.random()).collect();
            let w = IntegerPanels::new(&w, k, n);
            assert_eq!(w.groups, groups(k));
            let scale: Vec<f32> = (0..w.sums.len()).map(|_| rng.random()).collect();
            let shift: Vec<i32> = w.sums.iter().map(|sum| -7 * sum).collect();
            let levels = LevelProduct {
                x: &x,
                highest: u32::from(u8::MAX),
                depth: k,
                w: &w,
                shift: &shift,
                scale: &scale,
            };
            let [mut found, mut expected] = [(); 2].map(|()| vec![MaybeUninit::new(f32::NAN); m * n]);
            // SAFETY: tiles are available, and the operands have `m` rows.
            unsafe { set_levels(&levels, m, &mut Vec::new(), &mut found) };
            set_levels_plainly(&levels, &mut expected);
            // SAFETY: both were initialized.
            let bits = |c: &[MaybeUninit<f32>]| -> Vec<u32> {
                c.iter().map(|c| unsafe { c.assume_init() }.to_bits()).collect()
            };
            assert!(bits(&found) == bits(&expected), "{m} × {n}, depth {k}");
        }
    }
}
