//! The affine map and the activation behind a convolution, `φ(scale·z + shift)`, row by row on the CPU.

use crate::check::Check;
use crate::cpu::{read_ahead, simd};
use crate::elements::{Element, Nearest, Sink};
use crate::tile::tiled;
use crate::work::{Written, write_tiles};
use crate::{Activation, Result, clamp};
use candle_core::Tensor;
use quant_core::Grid;
use std::mem::MaybeUninit;

/// `φ(scale·z + shift)` with `scale` and `shift` of each channel, or the grid's values nearest to it.
pub(crate) struct AffineActivation {
    scale: Vec<f32>,
    shift: Vec<f32>,
    bounds: (f32, f32),
    grid: Option<Grid>,
}

impl AffineActivation {
    /// Of `c` channels, with `scale` and `shift` `[c]`.
    pub(crate) fn new(
        check: &Check,
        c: usize,
        scale: &Tensor,
        shift: &Tensor,
        act: Activation,
    ) -> Result<Self> {
        let (scale, shift) = (check.dims("scale", scale, &[c])?, check.dims("shift", shift, &[c])?);
        Ok(Self { scale: tiled(&scale)?, shift: tiled(&shift)?, bounds: act.bounds(), grid: None })
    }

    /// The same on a grid, if there is one.
    pub(crate) fn on(self, grid: Option<Grid>) -> Self {
        Self { grid, ..self }
    }

    pub(crate) fn grid(&self) -> Option<Grid> {
        self.grid
    }

    /// Scale and shift, each of at least as many elements as there are channels.
    pub(crate) fn coefficients(&self) -> [&[f32]; 2] {
        [&self.scale, &self.shift]
    }

    /// The bounds of the activation.
    pub(crate) fn bounds(&self) -> (f32, f32) {
        self.bounds
    }

    /// Writes the map of whole rows `z`.
    pub(crate) fn write<'y, Z: Element, Y: Element>(&self, z: &[Z], y: Sink<'y, Y>) -> Written<'y> {
        match self.grid {
            None => write(z, &self.scale, &self.shift, self.bounds, y),
            Some(grid) => write_on_grid(z, &self.scale, &self.shift, self.bounds, grid, y),
        }
    }

    /// Writes the grid's levels less their zero point, which are exact in 8 bits.
    pub(crate) fn whole_numbers<'y, T: Element>(
        &self,
        z: &[T],
        grid: Grid,
        y: &'y mut [MaybeUninit<T>],
    ) -> Written<'y> {
        whole_numbers(z, &self.scale, &self.shift, self.bounds, grid, y)
    }
}

/// `f(φ(scale·z + shift))` of a piece of a tile, by the position in it.
#[inline(always)]
fn piece<'z, Z: Element>(
    (z, scale, shift): (&'z [Z], &'z [f32], &'z [f32]),
    bounds: (f32, f32),
    f: impl Fn(f32) -> f32,
    [start, at]: [usize; 2],
    len: usize,
) -> impl Fn(usize) -> f32 {
    read_ahead(z, start, len);
    let (z, scale, shift) = (&z[start..][..len], &scale[at..][..len], &shift[at..][..len]);
    move |i| f(clamp(z[i].float().mul_add(scale[i], shift[i]), bounds))
}

simd! {
    fn write<'y, Z: Element, Y: Element>(
        z: &[Z],
        scale: &[f32],
        shift: &[f32],
        bounds: (f32, f32),
        y: Sink<'y, Y>,
    ) -> Written<'y> {
        assert_eq!(z.len(), y.len());
        y.write_tiles(scale.len(), |at, len| piece((z, scale, shift), bounds, |u| u, at, len))
    }
}

simd! {
    fn write_on_grid<'y, Z: Element, Y: Element>(
        z: &[Z],
        scale: &[f32],
        shift: &[f32],
        bounds: (f32, f32),
        grid: Grid,
        y: Sink<'y, Y>,
    ) -> Written<'y> {
        assert_eq!(z.len(), y.len());
        let fake = move |u| grid.fake(u);
        y.write_tiles(scale.len(), |at, len| piece((z, scale, shift), bounds, fake, at, len))
    }
}

simd! {
    fn whole_numbers<'y, T: Element>(
        z: &[T],
        scale: &[f32],
        shift: &[f32],
        bounds: (f32, f32),
        grid: Grid,
        y: &'y mut [MaybeUninit<T>],
    ) -> Written<'y> {
        assert_eq!(z.len(), y.len());
        let whole = move |u| grid.level(u) - grid.zero_point();
        let of_piece = |at, len| piece((z, scale, shift), bounds, whole, at, len);
        write_tiles(y, scale.len(), of_piece, Nearest).into()
    }
}
