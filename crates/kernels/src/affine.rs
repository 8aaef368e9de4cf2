//! The affine map and the activation behind a convolution, `φ(scale·z + shift)`, row by row on the CPU.

use crate::check::Check;
use crate::cpu::simd;
use crate::elements::{Element, Sink};
use crate::tile::tiled;
use crate::work::Written;
use crate::{Activation, Result, clamp};
use candle_core::Tensor;

/// `φ(scale·z + shift)` with `scale` and `shift` of each channel.
pub(crate) struct AffineActivation {
    scale: Vec<f32>,
    shift: Vec<f32>,
    bounds: (f32, f32),
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
        Ok(Self { scale: tiled(&scale)?, shift: tiled(&shift)?, bounds: act.bounds() })
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
        write(z, &self.scale, &self.shift, self.bounds, y)
    }
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
        y.write_tiles(scale.len(), |start, len| {
            let (z, scale, shift) = (&z[start..][..len], &scale[..len], &shift[..len]);
            move |i| clamp(z[i].float().mul_add(scale[i], shift[i]), bounds)
        })
    }
}
