//! The affine map and activation after a convolution, `φ(scale·z + shift)`, computed row by row on
//! the CPU.

use crate::check::Check;
use crate::cpu::{read_ahead, simd};
use crate::elements::{Element, Nearest, Sink};
use crate::tile::tiled;
use crate::work::{Written, write_tiles};
use crate::{Activation, Result, clamp};
use candle_core::Tensor;
use quant_core::Grid;
use std::mem::MaybeUninit;

/// The map `φ(scale·z + shift)` with a `scale` and `shift` for each channel, rounded to the values
/// of a grid if there is one.
pub(crate) struct AffineActivation {
    scale: Vec<f32>,
    shift: Vec<f32>,
    bounds: (f32, f32),
    grid: Option<Grid>,
}

impl AffineActivation {
    /// Creates the map for `c` channels from `scale` and `shift` of shape `[c]`, without a grid.
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

    /// Returns the same map with its results rounded to `grid`, if there is one.
    pub(crate) fn on(self, grid: Option<Grid>) -> Self {
        Self { grid, ..self }
    }

    pub(crate) fn grid(&self) -> Option<Grid> {
        self.grid
    }

    /// Returns scale and shift, repeated over the rows of a tile. Each has at least one element per
    /// channel.
    pub(crate) fn coefficients(&self) -> [&[f32]; 2] {
        [&self.scale, &self.shift]
    }

    /// Returns the bounds of the activation.
    pub(crate) fn bounds(&self) -> (f32, f32) {
        self.bounds
    }

    /// Writes the map of `z`, which must consist of whole rows.
    pub(crate) fn write<'y, Z: Element, Y: Element>(&self, z: &[Z], y: Sink<'y, Y>) -> Written<'y> {
        match self.grid {
            None => write(z, &self.scale, &self.shift, self.bounds, y),
            Some(grid) => write_on_grid(z, &self.scale, &self.shift, self.bounds, grid, y),
        }
    }

    /// Writes the map's grid levels minus the zero point. These integers have at most 8 bits, so
    /// `bf16` holds them exactly.
    pub(crate) fn whole_numbers<'y, T: Element>(
        &self,
        z: &[T],
        grid: Grid,
        y: &'y mut [MaybeUninit<T>],
    ) -> Written<'y> {
        whole_numbers(z, &self.scale, &self.shift, self.bounds, grid, y)
    }
}

/// Returns the function from a position in a piece of a tile to `f(φ(scale·z + shift))`.
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
