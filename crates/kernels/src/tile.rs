//! Tiles: the rows that per-channel loops take at once.
//!
//! Small numbers of channels are repeated over several rows, so that the inner loops are long whatever `C` is.

use crate::work::CHUNK;
use crate::{Result, cpu};
use candle_core::Tensor;

/// Elements of a tile, at least.
const TILE: usize = 256;

/// After so many tiles, sums in `f32` are added to those in `f64`.
pub(crate) const TILES: usize = 32;

/// The rows of a tile of `c` channels.
pub(crate) fn tile_rows(c: usize) -> usize {
    TILE.div_ceil(c)
}

/// The rows of a block of about [`CHUNK`] elements: whole tiles.
pub(crate) fn block_rows(c: usize) -> usize {
    let rows = tile_rows(c);
    (CHUNK / (rows * c)).max(1) * rows
}

/// Per-channel values, repeated over the rows of a tile.
pub(crate) fn tiled(channels: &Tensor) -> Result<Vec<f32>> {
    let channels = cpu::values(channels)?;
    Ok(channels.repeat(tile_rows(channels.len())))
}

/// Adds the sums over a tile's rows to those of the channels, and sets the tile's sums back to 0.
#[inline(always)]
pub(crate) fn fold(tile: &mut [f32], channels: &mut [f64]) {
    for row in tile.chunks_mut(channels.len()) {
        for (channel, sum) in channels.iter_mut().zip(row) {
            *channel += f64::from(*sum);
            *sum = 0.0;
        }
    }
}
