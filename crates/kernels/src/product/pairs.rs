//! Products of `bf16` values in pairs of neighbours in the depth, with AVX512-BF16 or matrix tiles.

use super::{Factor, FactorOf, LANES, Left, Multiply, Packed, Pair, Right, Scratch, Target, amx, sum_up};
use crate::ProductSizes;
use crate::cpu::{Instructions, simd};
use half::bf16;
use std::arch::x86_64::*;
use std::mem::{MaybeUninit, transmute};
use std::sync::OnceLock;

impl Factor for Pair {
    const ELEMENTS: usize = 2;
    const STEP: usize = 2 * LANES;

    fn are_multiplied() -> bool {
        Instructions::current().have_bf16() && (has_tiles() || dot_is_fast())
    }

    fn product(a: Left<Self>, b: Right<Self>, sizes: ProductSizes, c: Target<'_>, most: usize) {
        assert!(Instructions::of_machine().have_bf16(), "pairs are made where they are multiplied");
        // SAFETY: the assertion shows that the machine has the instructions.
        #[allow(unsafe_code)]
        unsafe {
            product(a, b, sizes, c, most)
        }
    }
}

impl FactorOf<bf16> for Pair {
    fn of_rows<'a>(rows: &'a [bf16], depth: usize, factors: &'a mut Vec<Self>) -> &'a [Self] {
        if depth.is_multiple_of(2) {
            // SAFETY: a pair is two `bf16` values, and `rows.len() / 2` pairs lie in `rows`.
            #[allow(unsafe_code)]
            return unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len() / 2) };
        }
        factors.clear();
        let pair = |pair: &[bf16]| Self([pair[0], pair.get(1).copied().unwrap_or_default()]);
        rows.chunks_exact(depth).for_each(|row| factors.extend(row.chunks(2).map(pair)));
        factors
    }

    fn of_columns<'a>(
        rows: &'a [bf16],
        columns: usize,
        left_over: usize,
        factors: &'a mut Vec<Self>,
    ) -> &'a [Self] {
        factors.clear();
        interleave(&rows[..rows.len() - left_over], columns, factors);
        factors.extend(std::iter::repeat_n(Self::default(), left_over));
        factors
    }

    fn set_by_tiles(
        a: &[bf16],
        b: &Packed<Self, LANES>,
        sizes: ProductSizes,
        scratch: &mut Scratch<Self>,
        c: &mut [MaybeUninit<f32>],
    ) -> bool {
        let has = has_tiles();
        if has {
            // SAFETY: `has_tiles` shows that the machine has AVX-512 and tiles.
            #[allow(unsafe_code)]
            unsafe {
                amx::set(a, &b.lines, sizes, &mut scratch.left.lines, c)
            };
        }
        has
    }

    fn add_transposed_by_tiles(
        a: &[bf16],
        b: &[bf16],
        sizes: ProductSizes,
        scratch: &mut Scratch<Self>,
        c: &mut [f32],
    ) -> bool {
        let has = has_tiles();
        if has {
            let Scratch { left, right, .. } = scratch;
            // SAFETY: `has_tiles` shows that the machine has AVX-512 and tiles.
            #[allow(unsafe_code)]
            unsafe {
                amx::add_transposed((a, b), sizes, (&mut left.lines, &mut right.lines), c)
            };
        }
        has
    }
}

/// Returns whether matrix tiles can be used.
fn has_tiles() -> bool {
    Instructions::current() >= Instructions::WIDE && amx::available()
}

/// Returns whether `VDPBF16PS` multiplies faster than the fused multiply–add of floats.
///
/// On Intel's processors since the fourth generation of Xeon, which leave such products to their
/// tiles, it does not: an instruction takes two cycles (0.75 ns, measured on a fifth-generation
/// Xeon), in which four fused multiply–adds do twice as many multiplications. Hypervisors can hide
/// the tiles. These processors are the ones of Intel that have AVX512-FP16.
fn dot_is_fast() -> bool {
    static FAST: OnceLock<bool> = OnceLock::new();
    *FAST.get_or_init(|| {
        let vendor = __cpuid(0);
        let is_intel = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel";
        !(is_intel && is_x86_feature_detected!("avx512fp16"))
    })
}

simd! {
    /// Appends the pairs of each two rows that follow each other; a missing second row counts as
    /// zeros.
    fn interleave(rows: &[bf16], columns: usize, pairs: &mut Vec<Pair>) {
        for rows in rows.chunks(2 * columns) {
            let (first, second) = rows.split_at(columns);
            match second.len() {
                0 => pairs.extend(first.iter().map(|first| Pair([*first, bf16::ZERO]))),
                _ => pairs.extend(first.iter().zip(second).map(|(first, second)| Pair([*first, *second]))),
            }
        }
    }
}

/// Computes [`Factor::product`] of pairs.
///
/// # Safety
/// The machine must have the target features of this function.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi2,avx512bf16")]
#[allow(unsafe_code)]
unsafe fn product(a: Left<Pair>, b: Right<Pair>, sizes: ProductSizes, c: Target<'_>, most: usize) {
    sum_up::<Pair, Dot>(a, b, sizes, c, most);
}

/// Multiplication with `VDPBF16PS`, for which [`product`] is compiled.
struct Dot;

impl Multiply<Pair> for Dot {
    #[inline(always)]
    fn add_products(a: Pair, b: &[Pair; LANES], sums: &mut [f32; LANES]) {
        // SAFETY: this is inlined only in `product`, whose caller guarantees the instructions. Each
        // `transmute` is between types of the same size that hold plain numbers.
        #[allow(unsafe_code)]
        unsafe {
            let a = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(transmute::<Pair, i32>(a)));
            let b = transmute::<[Pair; LANES], __m512bh>(*b);
            let sum = _mm512_dpbf16_ps(transmute::<[f32; LANES], __m512>(*sums), a, b);
            *sums = transmute::<__m512, [f32; LANES]>(sum);
        }
    }
}
