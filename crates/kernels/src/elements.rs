//! The elements of feature maps as CPU kernels read and write them, with the conversions between
//! floats, `bf16` and levels.
//!
//! Kernels are compiled for each [`Element`] type. All maps and gradients of a pass have the same
//! type, which [`by_element!`] selects.

use crate::cpu::simd;
use crate::work::{Progress, Writer, Written, append, write_tiles, write_with};
use candle_core::WithDType;
use half::bf16;
use quant_core::Grid;
use std::borrow::Cow;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A number in memory that represents a float: an `f32`, or a `bf16`, which is the upper half of
/// one.
pub(crate) trait Element: WithDType + Default {
    /// The largest number of floats that a kernel should compute at once, if it can choose. Floats
    /// that will be rounded should stay in the first-level cache.
    const AT_ONCE: usize;

    fn float(self) -> f32;

    /// Returns the element nearest to `x`; ties go to the even one, as in IEEE 754.
    fn nearest(x: f32) -> Self;

    /// The largest number of elements that [`Element::write`] writes at once.
    const PIECE: usize;

    /// Writes the element nearest to `f(i)` as element `i` of a piece.
    fn write(piece: &mut [MaybeUninit<Self>], f: impl Fn(usize) -> f32) -> &mut [Self];

    /// Returns [`Element::nearest`] of each float.
    fn all_nearest(x: &[f32]) -> Cow<'_, [Self]>;

    /// Computes the next `len` floats of a block with `write`, stores them as elements, and returns
    /// the floats that these elements represent. `floats` is scratch memory.
    fn next_floats<'a>(
        block: &'a mut Progress<'_, Self>,
        len: usize,
        floats: &'a mut Vec<f32>,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<f32>]) -> Written<'b>,
    ) -> &'a [f32];

    /// Returns elements as floats; `floats` is scratch memory.
    fn floats<'a>(elements: &'a [Self], floats: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    const AT_ONCE: usize = usize::MAX;

    const PIECE: usize = usize::MAX;

    #[inline(always)]
    fn float(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn write(piece: &mut [MaybeUninit<Self>], f: impl Fn(usize) -> f32) -> &mut [Self] {
        write_with(piece, f)
    }

    fn all_nearest(x: &[f32]) -> Cow<'_, [Self]> {
        x.into()
    }

    fn next_floats<'a>(
        block: &'a mut Progress<'_, Self>,
        len: usize,
        _: &'a mut Vec<f32>,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<f32>]) -> Written<'b>,
    ) -> &'a [f32] {
        block.next(len, write)
    }

    fn floats<'a>(elements: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        elements
    }
}

impl Element for bf16 {
    const AT_ONCE: usize = 8 * 1024;

    const PIECE: usize = 256;

    #[inline(always)]
    fn float(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Rounds in a few vector instructions, unlike `bf16::from_f32`.
    #[inline(always)]
    fn nearest(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Without the bit 0x40, a NaN would become infinite if its mantissa bits are all in the
        // lower half.
        let nan = bits >> 16 | 0x40;
        Self::from_bits(if x.is_nan() { nan } else { rounded } as u16)
    }

    /// Computes floats in the first-level cache and then rounds them, because some machines have a
    /// vector instruction for the rounding.
    #[inline(always)]
    fn write(piece: &mut [MaybeUninit<Self>], f: impl Fn(usize) -> f32) -> &mut [Self] {
        let mut floats = [MaybeUninit::uninit(); Self::PIECE];
        round_to(write_with(&mut floats[..piece.len()], f), piece)
    }

    fn all_nearest(x: &[f32]) -> Cow<'_, [Self]> {
        let mut halves = Vec::new();
        append(&mut halves, x.len(), |y| round_to(x, y).into());
        halves.into()
    }

    fn next_floats<'a>(
        block: &'a mut Progress<'_, Self>,
        len: usize,
        floats: &'a mut Vec<f32>,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<f32>]) -> Written<'b>,
    ) -> &'a [f32] {
        floats.clear();
        append(floats, len, write);
        block.next(len, |y| round(floats, y).into());
        floats
    }

    fn floats<'a>(elements: &'a [Self], floats: &'a mut Vec<f32>) -> &'a [f32] {
        floats.clear();
        append(floats, elements.len(), |y| widen(elements, y))
    }
}

/// Writes the `bf16` values nearest to `x`, and replaces each float in `x` by its rounded value.
fn round<'y>(x: &mut [f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::Instructions::current().have_bf16() {
        // SAFETY: `have_bf16` shows that the machine has the instruction.
        #[allow(unsafe_code)]
        return unsafe { conversion::round(x, y) };
    }
    round_plainly(x, y)
}

/// Writes the `bf16` values nearest to `x`.
fn round_to<'y>(x: &[f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::Instructions::current().have_bf16() {
        // SAFETY: `have_bf16` shows that the machine has the instruction.
        #[allow(unsafe_code)]
        return unsafe { conversion::round_to(x, y) };
    }
    round_to_plainly(x, y)
}

simd! {
    fn round_plainly<'y>(x: &mut [f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
        let x = Cell::from_mut(&mut x[..y.len()]).as_slice_of_cells();
        let one = |x: &Cell<f32>| {
            let half = bf16::nearest(x.get());
            x.set(half.float());
            half
        };
        write_with(y, |i| one(&x[i]))
    }
}

simd! {
    fn round_to_plainly<'y>(x: &[f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
        let x = &x[..y.len()];
        write_with(y, |i| bf16::nearest(x[i]))
    }
}

/// Rounding with `VCVTNEPS2BF16` of AVX512-BF16.
///
/// It rounds like [`Element::nearest`] but treats numbers below the smallest normal one (1.2e-38)
/// as zeros, as products of `bf16` values do.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod conversion {
    use crate::cpu::write_ahead;
    use half::bf16;
    use std::arch::x86_64::*;
    use std::mem::{MaybeUninit, transmute};

    const LANES: usize = 16;

    /// Computes [`super::round`].
    ///
    /// # Safety
    /// The machine must have AVX512-BF16 and the other target features of this function.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn round<'y>(x: &mut [f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
        assert_eq!(x.len(), y.len());
        // SAFETY: `x` has as many floats as `y` has elements, and each store is masked to the lanes
        // of its vector.
        unsafe {
            all(x.as_mut_ptr(), y, |x, lanes, halves| {
                let floats = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves));
                _mm512_mask_storeu_ps(x, lanes, _mm512_castsi512_ps(floats));
            })
        }
    }

    /// Computes [`super::round_to`].
    ///
    /// # Safety
    /// The machine must have AVX512-BF16 and the other target features of this function.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn round_to<'y>(x: &[f32], y: &'y mut [MaybeUninit<bf16>]) -> &'y mut [bf16] {
        assert_eq!(x.len(), y.len());
        // SAFETY: `x` has as many floats as `y` has elements, and nothing is written to them.
        unsafe { all(x.as_ptr().cast_mut(), y, |_, _, _| ()) }
    }

    /// Writes the `bf16` values nearest to the floats at `x`, and calls
    /// `then(floats, lanes, halves)` for each vector.
    ///
    /// # Safety
    /// The machine must have the target features of this function, and `x` must point to `y.len()`
    /// floats.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn all(
        x: *mut f32,
        y: &mut [MaybeUninit<bf16>],
        then: impl Fn(*mut f32, __mmask16, __m256i),
    ) -> &mut [bf16] {
        // SAFETY: the lanes lie within `y`, and there are as many floats at `x`.
        let vector = |start: usize, lanes: __mmask16, to: *mut i16| unsafe {
            let x = x.add(start);
            let halves = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x)));
            _mm256_mask_storeu_epi16(to, lanes, halves);
            then(x, lanes, halves);
        };
        let mut start = 0;
        let mut lines = y.chunks_exact_mut(2 * LANES);
        for line in &mut lines {
            write_ahead(line);
            let to = line.as_mut_ptr().cast::<i16>();
            vector(start, u16::MAX, to);
            vector(start + LANES, u16::MAX, to.wrapping_add(LANES));
            start += 2 * LANES;
        }
        for rest in lines.into_remainder().chunks_mut(LANES) {
            vector(start, u16::MAX >> (LANES - rest.len()), rest.as_mut_ptr().cast());
            start += LANES;
        }
        // SAFETY: the vectors have written all elements of `y`.
        unsafe { y.assume_init_mut() }
    }
}

simd! {
    fn widen<'y>(x: &[bf16], y: &'y mut [MaybeUninit<f32>]) -> Written<'y> {
        let x = &x[..y.len()];
        write_with(y, |i| x[i].float()).into()
    }
}

/// A [`Writer`] of the elements nearest to the floats.
pub(crate) struct Nearest;

impl<T: Element> Writer<T> for Nearest {
    const MOST: usize = T::PIECE;

    #[inline(always)]
    fn write<'y>(&self, block: &'y mut [MaybeUninit<T>], f: impl Fn(usize) -> f32) -> &'y mut [T] {
        T::write(block, f)
    }
}

/// A [`Writer`] of the numbers of a grid's nearest levels.
struct Level(Grid);

impl Writer<u8> for Level {
    const MOST: usize = usize::MAX;

    #[inline(always)]
    fn write<'y>(&self, block: &'y mut [MaybeUninit<u8>], f: impl Fn(usize) -> f32) -> &'y mut [u8] {
        write_with(block, |i| byte(self.0.level(f(i))))
    }
}

/// Evaluates an expression with a type alias for the [`Element`] of a dtype. Every dtype other than
/// `BF16` gives `f32`; tensors of unsupported dtypes are refused when they are opened.
macro_rules! by_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            _ => {
                type $element = f32;
                $body
            }
        }
    };
}
pub(crate) use by_element;

/// The elements of a feature map that a kernel reads.
#[derive(Clone, Copy)]
pub(crate) enum Stored<'a, T> {
    Floats(&'a [T]),
    /// The level numbers of a grid.
    Levels(&'a [u8], Grid),
}

impl<'a, T: Element> Stored<'a, T> {
    /// Returns the elements in `range`.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Floats(x) => Self::Floats(&x[range]),
            Self::Levels(q, grid) => Self::Levels(&q[range], grid),
        }
    }

    pub(crate) fn len(self) -> usize {
        match self {
            Self::Floats(x) => x.len(),
            Self::Levels(q, _) => q.len(),
        }
    }
}

simd! {
    /// Writes stored elements to a [`Sink`], in the form that the sink needs.
    pub(crate) fn copy<'y, T: Element>(x: Stored<'_, T>, y: Sink<'y, T>) -> Written<'y> {
        assert_eq!(x.len(), y.len());
        match (x, y) {
            (Stored::Floats(x), Sink::Floats(y)) => y.write_copy_of_slice(x).into(),
            (Stored::Floats(x), y) => y.write_with(|i| x[i].float()),
            (Stored::Levels(q, grid), y) => y.write_with(|i| grid.value(f32::from(q[i]))),
        }
    }
}

simd! {
    /// Writes levels minus their zero point. These integers have at most 8 bits, so `bf16` holds
    /// them exactly.
    pub(crate) fn whole_numbers<'y, T: Element>(
        q: &[u8],
        grid: &Grid,
        y: &'y mut [MaybeUninit<T>],
    ) -> Written<'y> {
        let (q, zero_point) = (&q[..y.len()], grid.zero_point());
        write_with(y, |i| T::nearest(f32::from(q[i]) - zero_point)).into()
    }
}

/// The memory to which a kernel writes the elements of a feature map.
pub(crate) enum Sink<'a, T> {
    Floats(&'a mut [MaybeUninit<T>]),
    /// The level numbers of a grid.
    Levels(&'a mut [MaybeUninit<u8>], Grid),
}

impl<'a, T: Element> Sink<'a, T> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Floats(y) => y.len(),
            Self::Levels(y, _) => y.len(),
        }
    }

    /// Writes `f(i)` as element `i`.
    #[inline(always)]
    pub(crate) fn write_with(self, f: impl Fn(usize) -> f32) -> Written<'a> {
        match self {
            Self::Floats(y) => write_with(y, |i| T::nearest(f(i))).into(),
            Self::Levels(y, grid) => Level(grid).write(y, f).into(),
        }
    }

    /// Does the same as [`Sink::write_with`], tile by tile; see [`write_tiles`].
    #[inline(always)]
    pub(crate) fn write_tiles<F: Fn(usize) -> f32>(
        self,
        tile: usize,
        of_piece: impl Fn([usize; 2], usize) -> F,
    ) -> Written<'a> {
        match self {
            Self::Floats(y) => write_tiles(y, tile, of_piece, Nearest).into(),
            Self::Levels(y, grid) => write_tiles(y, tile, of_piece, Level(grid)).into(),
        }
    }
}

/// Converts a level, an integer from 0 to 255, to a byte.
///
/// The byte is the last one of the level's sum with 2²³, where floats are integers. (A conversion
/// would take several instructions to check for numbers that do not fit.)
#[inline(always)]
fn byte(level: f32) -> u8 {
    (level + 8_388_608.0).to_bits() as u8
}

simd! {
    /// Writes the levels of floats minus their zero points, which must fit in a signed byte. With
    /// one grid per channel, `x` must consist of whole rows.
    pub(crate) fn signed_levels(x: &[f32], levels: &mut [i8], grids: &[Grid]) {
        #[inline(always)]
        fn signed(grid: &Grid, x: f32) -> i8 {
            byte(grid.level(x)).wrapping_sub(byte(grid.zero_point())) as i8
        }
        if let [grid] = *grids {
            for (level, x) in levels.iter_mut().zip(x) {
                *level = signed(&grid, *x);
            }
        } else {
            let c = grids.len();
            for (levels, x) in levels.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                for ((level, x), grid) in levels.iter_mut().zip(x).zip(grids) {
                    *level = signed(grid, *x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests NaN and every sign and exponent, with values at, just below and just above the
    /// midpoint between two `bf16` values.
    #[test]
    fn halves_are_rounded_as_ieee_754_says() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (found, expected) = (bf16::nearest(x), bf16::from_f32(x));
                let same = found.to_bits() == expected.to_bits() || x.is_nan() && found.is_nan();
                assert!(same, "{found:?} and not {expected:?} of {x}");
                let half = bf16::from_bits(upper);
                let same = half.float() == half.to_f32() || half.is_nan() && half.float().is_nan();
                assert!(same, "{half:?}");
            }
        }
    }

    /// Tests whole vectors with and without a remainder. An instruction that rounds may differ only
    /// for numbers below the smallest normal one, which become zeros of the same sign.
    #[test]
    fn slices_are_rounded_as_single_numbers() {
        let upper = (0..=u16::MAX)
            .flat_map(|upper| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|lower| (upper, lower)));
        let all: Vec<f32> =
            upper.map(|(upper, lower)| f32::from_bits(u32::from(upper) << 16 | lower)).collect();
        for x in [1, 15, 16, 17, 31, 32, 33, 47, 300]
            .map(|len| &all[99_990..][..len])
            .into_iter()
            .chain([&all[..]])
        {
            let mut floats = x.to_vec();
            let mut rounded = vec![MaybeUninit::uninit(); x.len()];
            let rounded = round(&mut floats, &mut rounded);
            let same_bits = |a: &[bf16], b: &[bf16]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same_bits(rounded, &bf16::all_nearest(x)));
            for ((x, found), float) in x.iter().zip(&*rounded).zip(floats) {
                let expected = bf16::nearest(*x);
                let flushed = x.is_subnormal() && found.to_bits() == (x.to_bits() >> 16) as u16 & 0x8000;
                let same = found.to_bits() == expected.to_bits() || x.is_nan() && found.is_nan() || flushed;
                assert!(same, "{found:?} and not {expected:?} of {x}");
                assert_eq!(float.to_bits(), found.float().to_bits());
            }
        }
    }
}
