//! The elements of feature maps as CPU kernels read and write them: here levels and `bf16` become floats, and floats these.
//!
//! Kernels are compiled for each [`Element`], which is that of all maps and gradients of a pass ([`by_element!`] chooses).

use crate::cpu::simd;
use crate::product::Factor;
use crate::work::{Progress, Written, append, write_tiles, write_with};
use candle_core::WithDType;
use half::bf16;
use quant_core::Grid;
use std::borrow::Cow;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A number in memory that stands for a float: a float itself, or its upper half.
pub(crate) trait Element: WithDType + Default {
    /// What products of such elements multiply ([`crate::product`]).
    type Factor: Factor<Element = Self>;

    /// How many floats a kernel computes at once at most, if it can choose: of those that are rounded then, so many as stay in
    /// the first-level cache.
    const AT_ONCE: usize;

    fn float(self) -> f32;

    /// The nearest one; of two the even one, as IEEE 754 rounds.
    fn nearest(x: f32) -> Self;

    /// [`Element::nearest`] of each.
    fn all_nearest(x: &[f32]) -> Cow<'_, [Self]>;

    /// Has `write` compute the next `len` floats of a block, stores them, and returns what they have become; `floats`
    /// is scratch memory for them.
    fn next_floats<'a>(
        block: &'a mut Progress<'_, Self>,
        len: usize,
        floats: &'a mut Vec<f32>,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<f32>]) -> Written<'b>,
    ) -> &'a [f32];

    /// The floats of elements; `floats` is scratch memory for them.
    fn floats<'a>(elements: &'a [Self], floats: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    type Factor = Self;

    const AT_ONCE: usize = usize::MAX;

    #[inline(always)]
    fn float(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        x
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
    type Factor = crate::product::Pair;

    const AT_ONCE: usize = 8 * 1024;

    #[inline(always)]
    fn float(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// In a few vector instructions, unlike `bf16::from_f32`.
    #[inline(always)]
    fn nearest(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A NaN whose bits are all below would become infinite.
        let nan = bits >> 16 | 0x40;
        Self::from_bits(if x.is_nan() { nan } else { rounded } as u16)
    }

    fn all_nearest(x: &[f32]) -> Cow<'_, [Self]> {
        let mut halves = Vec::new();
        append(&mut halves, x.len(), |y| nearest(x, y));
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
        block.next(len, |y| round(floats, y));
        floats
    }

    fn floats<'a>(elements: &'a [Self], floats: &'a mut Vec<f32>) -> &'a [f32] {
        floats.clear();
        append(floats, elements.len(), |y| widen(elements, y))
    }
}

simd! {
    /// Writes the halves nearest to some floats, and makes the floats what these stand for.
    fn round<'y>(x: &mut [f32], y: &'y mut [MaybeUninit<bf16>]) -> Written<'y> {
        let x = Cell::from_mut(&mut x[..y.len()]).as_slice_of_cells();
        let one = |x: &Cell<f32>| {
            let half = bf16::nearest(x.get());
            x.set(half.float());
            half
        };
        write_with(y, |i| one(&x[i])).into()
    }
}

simd! {
    fn nearest<'y>(x: &[f32], y: &'y mut [MaybeUninit<bf16>]) -> Written<'y> {
        let x = &x[..y.len()];
        write_with(y, |i| bf16::nearest(x[i])).into()
    }
}

simd! {
    fn widen<'y>(x: &[bf16], y: &'y mut [MaybeUninit<f32>]) -> Written<'y> {
        let x = &x[..y.len()];
        write_with(y, |i| x[i].float()).into()
    }
}

/// Evaluates an expression with the [`Element`] of a dtype as a type. Tensors of any other dtype are refused where they
/// are opened.
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

/// Elements in memory.
#[derive(Clone, Copy)]
pub(crate) enum Stored<'a, T> {
    Floats(&'a [T]),
    /// The numbers of a grid's levels.
    Levels(&'a [u8], Grid),
}

impl<'a, T: Element> Stored<'a, T> {
    /// Some of the elements.
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
    /// Writes elements as elements of a map.
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
    /// Writes levels less their zero point, which are exact in 8 bits.
    pub(crate) fn whole_numbers<'y, T: Element>(
        q: &[u8],
        grid: &Grid,
        y: &'y mut [MaybeUninit<T>],
    ) -> Written<'y> {
        let (q, zero_point) = (&q[..y.len()], grid.zero_point());
        write_with(y, |i| T::nearest(f32::from(q[i]) - zero_point)).into()
    }
}

/// Memory for the elements of a feature map that a kernel writes.
pub(crate) enum Sink<'a, T> {
    Floats(&'a mut [MaybeUninit<T>]),
    /// The numbers of a grid's levels.
    Levels(&'a mut [MaybeUninit<u8>], Grid),
}

impl<'a, T: Element> Sink<'a, T> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Floats(y) => y.len(),
            Self::Levels(y, _) => y.len(),
        }
    }

    /// Writes `f(i)` as the element `i`.
    #[inline(always)]
    pub(crate) fn write_with(self, f: impl Fn(usize) -> f32) -> Written<'a> {
        match self {
            Self::Floats(y) => write_with(y, |i| T::nearest(f(i))).into(),
            Self::Levels(y, grid) => write_with(y, |i| byte(grid.level(f(i)))).into(),
        }
    }

    /// As [`Sink::write_with`], tile by tile; see [`write_tiles`].
    #[inline(always)]
    pub(crate) fn write_tiles<F: Fn(usize) -> f32>(
        self,
        tile: usize,
        of_tile: impl Fn(usize, usize) -> F,
    ) -> Written<'a> {
        match self {
            Self::Floats(y) => write_tiles(y, tile, of_tile, T::nearest).into(),
            Self::Levels(y, grid) => write_tiles(y, tile, of_tile, |x| byte(grid.level(x))).into(),
        }
    }
}

/// The byte of a level, which is a whole number from 0 to 255: the last byte of its sum with 2²³, where floats are
/// whole numbers. (A conversion would look for numbers that do not fit, in several instructions.)
#[inline(always)]
fn byte(level: f32) -> u8 {
    (level + 8_388_608.0).to_bits() as u8
}

simd! {
    /// Writes the levels of some floats less their zero points, which must fit a signed byte; where each channel has a
    /// grid, of whole rows.
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

    /// Every sign and exponent, on both sides of the middle between two halves and at it, and what is no number.
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
}
