//! Products by the matrix tiles of AMX, which multiply pairs of halves (`TDPBF16PS`) and groups of four bytes
//! (`TDPBUSD`).
//!
//! A tile has up to 16 rows of 64 bytes. An instruction adds the product of a tile of the left operand (rows by factors) and
//! one of the right operand (factors by columns, as [`super::Panels`] and [`super::IntegerPanels`] lie) to a tile of sums. Two
//! by two tiles of sums are computed at once, so that each tile that is loaded serves twice. How much of a tile is used is
//! configured: at the edges of a product less. Rust has no stable functions for tiles, hence the assembly.

use super::{Left, LevelProduct, Pair, ProductSizes, Right};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// Rows of a tile, and factors in a row of it.
const SIDE: usize = 16;

/// Bytes of a sum, of a pair of halves and of a group of bytes.
const SIZE: usize = 4;

/// Whether this machine has tiles of both kinds, and the kernel lets this process use them.
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

/// Asks the kernel for the state of the tiles, which no process has unasked.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call changes nothing but what this process may do.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) };
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// How much of each tile is used. Tiles 0 to 3 hold sums (by rows), 4 and 5 the left operand, 6 and 7 the right one.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// For up to two tiles of rows and of columns; tiles that are not needed are not configured.
    fn new(rows: usize, columns: usize, factors: usize) -> Self {
        let halves = |of: usize| [of.min(SIDE), of.saturating_sub(SIDE)];
        let (rows, columns) = (halves(rows), halves(columns));
        let (mut row_bytes, mut tile_rows) = ([0; 16], [0; 16]);
        let mut tile = |at: usize, rows: usize, row: usize| {
            if rows > 0 && row > 0 {
                (tile_rows[at], row_bytes[at]) = (rows as u8, (row * SIZE) as u16);
            }
        };
        for i in 0..2 {
            for j in 0..2 {
                tile(2 * i + j, rows[i], columns[j]);
            }
            tile(4 + i, rows[i], factors);
            tile(6 + i, if columns[i] > 0 { factors } else { 0 }, columns[i]);
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows: tile_rows }
    }
}

/// Where operands and sums of up to two by two tiles begin, and how far apart things are in them, in bytes.
struct Block {
    a: *const u8,
    a_row: usize,
    b: *const u8,
    /// From one factor to the next, and from one panel of columns to the next.
    b_factor: usize,
    b_panel: usize,
    c: *mut u8,
    c_row: usize,
    /// Steps of the depth, of `factors` each.
    steps: usize,
    factors: usize,
    /// Whether the sums begin with what `c` holds.
    add: bool,
}

/// Defines [`Block`]'s sums by one instruction: the lines of assembly for each number of tiles.
macro_rules! sums {
    ($name:ident, $multiply:literal) => {
        /// Sums up so many rows and columns, two tiles of each at most.
        ///
        /// # Safety
        /// The machine must have tiles, and be permitted them; operands and sums must have so many rows, columns and steps.
        #[allow(unsafe_code)]
        unsafe fn $name(block: &Block, rows: usize, columns: usize) {
            let configuration = Configuration::new(rows, columns, block.factors);
            // SAFETY: the caller has made sure of tiles and operands, and tiles outside of them are neither configured nor
            // named.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly));
                match (rows > SIDE, columns > SIDE) {
                    (true, true) => sums!(@run block, {
                        ["tileloadd tmm0, [{c} + {c_row}]", "tileloadd tmm1, [{c} + {c_row} + 64]",
                         "tileloadd tmm2, [{c1} + {c_row}]", "tileloadd tmm3, [{c1} + {c_row} + 64]"],
                        ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
                        ["tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm6, [{b} + {b_factor}]",
                         "tileloadd tmm7, [{b1} + {b_factor}]", "tileloadd tmm5, [{a1} + {a_row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), concat!($multiply, " tmm1, tmm4, tmm7"),
                         concat!($multiply, " tmm2, tmm5, tmm6"), concat!($multiply, " tmm3, tmm5, tmm7")],
                        ["tilestored [{c} + {c_row}], tmm0", "tilestored [{c} + {c_row} + 64], tmm1",
                         "tilestored [{c1} + {c_row}], tmm2", "tilestored [{c1} + {c_row} + 64], tmm3"]
                    }),
                    (true, false) => sums!(@run block, {
                        ["tileloadd tmm0, [{c} + {c_row}]", "tileloadd tmm2, [{c1} + {c_row}]"],
                        ["tilezero tmm0", "tilezero tmm2"],
                        ["tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm6, [{b} + {b_factor}]",
                         "tileloadd tmm5, [{a1} + {a_row}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), concat!($multiply, " tmm2, tmm5, tmm6")],
                        ["tilestored [{c} + {c_row}], tmm0", "tilestored [{c1} + {c_row}], tmm2"]
                    }),
                    (false, true) => sums!(@run block, {
                        ["tileloadd tmm0, [{c} + {c_row}]", "tileloadd tmm1, [{c} + {c_row} + 64]"],
                        ["tilezero tmm0", "tilezero tmm1"],
                        ["tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm6, [{b} + {b_factor}]",
                         "tileloadd tmm7, [{b1} + {b_factor}]",
                         concat!($multiply, " tmm0, tmm4, tmm6"), concat!($multiply, " tmm1, tmm4, tmm7")],
                        ["tilestored [{c} + {c_row}], tmm0", "tilestored [{c} + {c_row} + 64], tmm1"]
                    }),
                    (false, false) => sums!(@run block, {
                        ["tileloadd tmm0, [{c} + {c_row}]"],
                        ["tilezero tmm0"],
                        ["tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm6, [{b} + {b_factor}]",
                         concat!($multiply, " tmm0, tmm4, tmm6")],
                        ["tilestored [{c} + {c_row}], tmm0"]
                    }),
                }
            }
        }
    };
    (@run $block:ident, {
        [$($load:expr),*], [$($zero:expr),*], [$($step:expr),*], [$($store:expr),*]
    }) => {
        asm!(
            "test {add}, {add} // Where there is one tile of rows, without {c1}.",
            "jz 2f",
            $($load,)*
            "jmp 3f",
            "2:",
            $($zero,)*
            "3:",
            $($step,)*
            "add {a}, 64",
            "add {a1}, 64",
            "add {b}, {b_step}",
            "add {b1}, {b_step}",
            "dec {steps}",
            "jnz 3b",
            $($store,)*
            a = inout(reg) $block.a => _,
            a1 = inout(reg) $block.a.wrapping_add(SIDE * $block.a_row) => _,
            a_row = in(reg) $block.a_row,
            b = inout(reg) $block.b => _,
            b1 = inout(reg) $block.b.wrapping_add($block.b_panel) => _,
            b_factor = in(reg) $block.b_factor,
            b_step = in(reg) $block.factors * $block.b_factor,
            c = in(reg) $block.c,
            c1 = in(reg) $block.c.wrapping_add(SIDE * $block.c_row),
            c_row = in(reg) $block.c_row,
            steps = inout(reg) $block.steps => _,
            add = in(reg) usize::from($block.add),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

sums!(sum_of_halves, "tdpbf16ps");
sums!(sum_of_bytes, "tdpbusd");

/// Gives the tiles back: a thread that uses them costs the kernel 8 KiB at each switch.
///
/// # Safety
/// The machine must have tiles, and be permitted them.
#[allow(unsafe_code)]
unsafe fn release() {
    // SAFETY: the caller has made sure of them.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// [`super::product`] of pairs of halves.
///
/// # Safety
/// As of [`available`].
#[target_feature(enable = "avx512f,avx2")]
#[allow(unsafe_code)]
pub(super) unsafe fn product(
    a: Left<Pair>,
    b: Right<Pair>,
    sizes: ProductSizes,
    c: &mut [MaybeUninit<f32>],
    add: bool,
) {
    let ProductSizes { rows, columns, depth } = sizes;
    assert_eq!(c.len(), rows * columns);
    if !add && depth == 0 {
        c.fill(MaybeUninit::new(0.0));
    }
    if rows == 0 || columns == 0 || depth == 0 {
        return;
    }
    assert!(a.position(rows - 1, depth - 1) < a.factors.len());
    assert!(b.position(columns - 1, depth - 1) < b.factors.len());
    // Rows of factors that are neighbours in the depth, of an operand that has neighbours among the rows.
    let mut turned = if a.depth == 1 { Vec::new() } else { vec![Pair::default(); 2 * SIDE * depth] };
    for i in (0..rows).step_by(2 * SIDE) {
        let height = (rows - i).min(2 * SIDE);
        let (left, a_row) = if a.depth == 1 {
            (a.factors[a.position(i, 0)..].as_ptr(), a.row)
        } else {
            // SAFETY: this is compiled for the instructions, and the rows are there.
            unsafe { turn(a, i, height, depth, &mut turned) };
            (turned.as_ptr(), depth)
        };
        for j in (0..columns).step_by(2 * SIDE) {
            let width = (columns - j).min(2 * SIDE);
            // What is no whole step of the depth has a configuration of its own.
            let whole = depth / SIDE * SIDE;
            for (p, steps, factors) in [(0, depth / SIDE, SIDE), (whole, 1, depth - whole)] {
                if steps * factors == 0 {
                    continue;
                }
                let block = Block {
                    a: left.wrapping_add(p).cast(),
                    a_row: a_row * SIZE,
                    b: b.factors.as_ptr().wrapping_add(b.position(j, p)).cast(),
                    b_factor: b.depth * SIZE,
                    b_panel: b.panel * SIZE,
                    c: c.as_mut_ptr().wrapping_add(i * columns + j).cast(),
                    c_row: columns * SIZE,
                    steps,
                    factors,
                    add: add || p > 0,
                };
                // SAFETY: the caller has made sure of the tiles; by the assertions, what is read lies in the operands and
                // what is written in `c`, which has been written up to `p`.
                unsafe { sum_of_halves(&block, height, width) };
            }
        }
    }
    // SAFETY: the caller has made sure of the tiles.
    unsafe { release() };
}

/// Writes rows `i..i + height` of a left operand that has eight neighbours among the rows, each `depth` factors long.
///
/// # Safety
/// The machine must have AVX2, and the operand the rows.
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
unsafe fn turn(a: Left<Pair>, i: usize, height: usize, depth: usize, turned: &mut [Pair]) {
    let mut rows = 0;
    while rows < height {
        let count = (height - rows).min(8);
        let mut p = 0;
        while p < depth {
            let at = a.position(i + rows, p);
            let last = a.position(i + rows, (p + 7).min(depth - 1)) + 8;
            if p + 8 <= depth && count == 8 && last <= a.factors.len() {
                // SAFETY: eight vectors of eight factors lie in the operand, and eight rows of eight in what is written.
                unsafe {
                    let from = a.factors.as_ptr().add(at);
                    let to = turned.as_mut_ptr().add(rows * depth + p);
                    turn_eight((from, a.depth), (to, depth));
                }
                p += 8;
            } else {
                for row in 0..count {
                    turned[(rows + row) * depth + p] = a.factors[a.position(i + rows + row, p)];
                }
                p += 1;
            }
        }
        rows += count;
    }
}

/// Transposes eight rows of eight factors; rows are so many factors apart.
///
/// # Safety
/// The machine must have AVX2, and both be there.
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
unsafe fn turn_eight((from, from_row): (*const Pair, usize), (to, to_row): (*mut Pair, usize)) {
    // SAFETY: the caller has made sure of eight rows of each.
    unsafe {
        let row = |i: usize| _mm256_castsi256_ps(_mm256_loadu_si256(from.add(i * from_row).cast()));
        let low: [__m256; 4] = std::array::from_fn(|i| _mm256_unpacklo_ps(row(2 * i), row(2 * i + 1)));
        let high: [__m256; 4] = std::array::from_fn(|i| _mm256_unpackhi_ps(row(2 * i), row(2 * i + 1)));
        // Of four rows: their factors 0 and 4, 1 and 5, 2 and 6, 3 and 7.
        let quarters = |i: usize| {
            [
                _mm256_shuffle_ps::<0x44>(low[i], low[i + 1]),
                _mm256_shuffle_ps::<0xee>(low[i], low[i + 1]),
                _mm256_shuffle_ps::<0x44>(high[i], high[i + 1]),
                _mm256_shuffle_ps::<0xee>(high[i], high[i + 1]),
            ]
        };
        let (first, second) = (quarters(0), quarters(2));
        for i in 0..4 {
            let halves = [
                _mm256_permute2f128_ps::<0x20>(first[i], second[i]),
                _mm256_permute2f128_ps::<0x31>(first[i], second[i]),
            ];
            for (half, vector) in halves.into_iter().enumerate() {
                _mm256_storeu_si256(to.add((4 * half + i) * to_row).cast(), _mm256_castps_si256(vector));
            }
        }
    }
}

/// [`super::set_levels`], of so many rows.
///
/// # Safety
/// As of [`available`]; `product.x` and `c` must have the rows.
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
pub(super) unsafe fn set_levels(product: &LevelProduct<'_>, rows: usize, c: &mut [MaybeUninit<f32>]) {
    let LevelProduct { x, depth, w, shift, scale } = *product;
    let columns = w.columns;
    assert!(x.len() == rows * depth && c.len() == rows * columns);
    // The last group of the last row may end behind it; what is read there is multiplied by 0.
    let followed;
    let x = if depth.is_multiple_of(SIZE) {
        x
    } else {
        followed = [x, &[0; SIZE]].concat();
        &followed
    };
    let mut sums = [[0i32; 2 * SIDE]; 2 * SIDE];
    for i in (0..rows).step_by(2 * SIDE) {
        let height = (rows - i).min(2 * SIDE);
        for j in (0..columns).step_by(2 * SIDE) {
            let width = (columns - j).min(2 * SIDE);
            let whole = w.groups / SIDE * SIDE;
            for (p, steps, factors) in [(0, w.groups / SIDE, SIDE), (whole, 1, w.groups - whole)] {
                if steps * factors == 0 {
                    continue;
                }
                let block = Block {
                    a: x.as_ptr().wrapping_add(i * depth + p * SIZE),
                    a_row: depth,
                    b: w.elements.as_ptr().wrapping_add(j / SIDE * w.groups + p).cast(),
                    b_factor: SIDE * SIZE,
                    b_panel: w.groups * SIDE * SIZE,
                    c: sums.as_mut_ptr().cast(),
                    c_row: 2 * SIDE * SIZE,
                    steps,
                    factors,
                    add: p > 0,
                };
                // SAFETY: the caller has made sure of the tiles and the rows, and the panels have as many groups and columns.
                unsafe { sum_of_bytes(&block, height, width) };
            }
            for (sums, c) in sums[..height].iter().zip(c[i * columns..].chunks_mut(columns)) {
                let after = shift[j..].iter().zip(&scale[j..]);
                for ((c, sum), (shift, scale)) in c[j..j + width].iter_mut().zip(sums).zip(after) {
                    c.write((sum + shift) as f32 * scale);
                }
            }
        }
    }
    // SAFETY: the caller has made sure of the tiles.
    unsafe { release() };
}

#[cfg(test)]
#[path = "tiles_in_software.rs"]
#[allow(unsafe_code)]
mod tiles_in_software;

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::super::{Factor, GROUP, IntegerPanels, LANES, Operands, Panels, set_levels_plainly};
    use super::*;
    use crate::elements::Element;
    use crate::testing::*;
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Fewer than a tile, whole tiles, more than two by two; depths of no whole step, of one, of several and a rest.
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

    /// Whether tiles can be had; in software where the machine has none.
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
                // Of k terms below 1, each added with half a last place of a sum that stays below k.
                let bound = f64::from(f32::EPSILON) * (k * k) as f64;
                for (at, found) in found.iter().enumerate() {
                    let expected = start(at) + expected(at);
                    assert!(
                        (f64::from(*found) - expected).abs() <= bound,
                        "{context}, {m} × {n}, depth {k}: {found}, {expected} at {at}"
                    );
                }
            };
            let depth = k.div_ceil(2);
            let sizes = ProductSizes { rows: m, columns: n, depth };
            let run = |left: Left<'_, Pair>, right: Right<'_, Pair>, c: &mut Vec<f32>, add: bool| {
                // SAFETY: floats are never less than initialized.
                let c = unsafe { std::slice::from_raw_parts_mut(c.as_mut_ptr().cast(), c.len()) };
                // SAFETY: there are tiles.
                unsafe { product(left, right, sizes, c, add) }
            };

            let panels = Panels::<bf16>::new(&b.iter().map(|b| b.float()).collect::<Vec<_>>(), n);
            let mut factors = Vec::new();
            let left = Left::rows(Pair::of_rows(&a, k, &mut factors), depth);
            let mut c = vec![f32::NAN; m * n];
            run(left, panels.0.right(), &mut c, false);
            close(&c, &|_| 0.0, "set");

            // The transpose, as it lies and packed.
            let turned: Vec<bf16> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
            let followed: Vec<bf16> = b.iter().copied().chain([bf16::NAN; LANES]).collect();
            let (mut of_a, mut of_b, mut of_whole_b) = (Vec::new(), Vec::new(), Vec::new());
            let a = Pair::of_columns(&turned, m, 0, &mut of_a);
            let right = Right::rows(Pair::of_columns(&followed, n, LANES, &mut of_b), n);
            let mut c = start.clone();
            run(Left::columns(a, m), right, &mut c, true);
            close(&c, &|at| f64::from(start[at]), "add");

            let Operands::<bf16> { mut left, mut right, .. } = Operands::default();
            left.pack(a, m);
            right.pack(Pair::of_columns(&b, n, 0, &mut of_whole_b), n);
            let mut c = start.clone();
            run(left.left(), right.right(), &mut c, true);
            close(&c, &|at| f64::from(start[at]), "add packed");
        }
    }

    /// Exact, so to the bit.
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
            assert_eq!(w.groups, k.div_ceil(GROUP));
            let scale: Vec<f32> = (0..w.sums.len()).map(|_| rng.random()).collect();
            let shift: Vec<i32> = w.sums.iter().map(|sum| -7 * sum).collect();
            let levels = LevelProduct { x: &x, depth: k, w: &w, shift: &shift, scale: &scale };
            let [mut found, mut expected] = [(); 2].map(|()| vec![MaybeUninit::new(f32::NAN); m * n]);
            // SAFETY: there are tiles, and so many rows.
            unsafe { set_levels(&levels, m, &mut found) };
            set_levels_plainly(&levels, &mut expected);
            // SAFETY: both were initialized.
            let bits = |c: &[MaybeUninit<f32>]| -> Vec<u32> {
                c.iter().map(|c| unsafe { c.assume_init() }.to_bits()).collect()
            };
            assert!(bits(&found) == bits(&expected), "{m} × {n}, depth {k}");
        }
    }
}
