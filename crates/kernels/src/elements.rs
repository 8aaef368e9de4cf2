//! The elements of feature maps as CPU kernels read and write them: here floats become levels and levels floats.

use crate::cpu::simd;
use crate::work::{Written, write_tiles, write_with};
use quant_core::Grid;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements in memory.
#[derive(Clone, Copy)]
pub(crate) enum Stored<'a> {
    Float(&'a [f32]),
    /// The numbers of a grid's levels.
    Levels(&'a [u8], Grid),
}

impl<'a> Stored<'a> {
    /// Some of the elements.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::Float(x) => Self::Float(&x[range]),
            Self::Levels(q, grid) => Self::Levels(&q[range], grid),
        }
    }

    pub(crate) fn len(self) -> usize {
        match self {
            Self::Float(x) => x.len(),
            Self::Levels(q, _) => q.len(),
        }
    }
}

simd! {
    /// The floats of some elements.
    pub(crate) fn to_floats<'y>(x: Stored<'_>, y: &'y mut [MaybeUninit<f32>]) -> Written<'y> {
        assert_eq!(x.len(), y.len());
        match x {
            Stored::Float(x) => y.write_copy_of_slice(x).into(),
            Stored::Levels(q, grid) => write_with(y, |i| grid.value(f32::from(q[i]))).into(),
        }
    }
}

/// Memory for the elements of a feature map that a kernel writes.
pub(crate) enum Sink<'a> {
    Float(&'a mut [MaybeUninit<f32>]),
    /// The numbers of a grid's levels.
    Levels(&'a mut [MaybeUninit<u8>], Grid),
}

impl<'a> Sink<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Float(y) => y.len(),
            Self::Levels(y, _) => y.len(),
        }
    }

    /// Writes `f(i)` as the element `i`.
    #[inline(always)]
    pub(crate) fn write_with(self, f: impl Fn(usize) -> f32) -> Written<'a> {
        match self {
            Self::Float(y) => write_with(y, f).into(),
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
            Self::Float(y) => write_tiles(y, tile, of_tile).into(),
            Self::Levels(y, grid) => {
                let of_tile = |start, len| {
                    let f = of_tile(start, len);
                    move |i| byte(grid.level(f(i)))
                };
                write_tiles(y, tile, of_tile).into()
            }
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
    /// Writes some floats as elements of a feature map.
    pub(crate) fn store<'y>(x: &[f32], y: Sink<'y>) -> Written<'y> {
        let x = &x[..y.len()];
        y.write_with(|i| x[i])
    }
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
