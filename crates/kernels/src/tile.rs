//! Tiles: the rows that per-channel loops process at once.
//!
//! If there are few channels, their values are repeated over several rows, so that the inner loops
//! are long for every `C`.

use crate::work::CHUNK;
use crate::{Result, cpu};
use candle_core::Tensor;

/// The smallest number of elements of a tile.
const TILE: usize = 256;

/// The number of tiles after which sums in `f32` are added to those in `f64`.
pub(crate) const TILES: usize = 32;

/// Returns the number of rows of a tile of `c` channels.
pub(crate) fn tile_rows(c: usize) -> usize {
    TILE.div_ceil(c)
}

/// Returns the number of rows of a block of about [`CHUNK`] elements, in whole tiles.
pub(crate) fn block_rows(c: usize) -> usize {
    let rows = tile_rows(c);
    (CHUNK / (rows * c)).max(1) * rows
}

/// Returns per-channel values, repeated over the rows of a tile.
pub(crate) fn tiled(channels: &Tensor) -> Result<Vec<f32>> {
    let channels = cpu::values(channels)?;
    Ok(channels.repeat(tile_rows(channels.len())))
}

/// Adds the sums of a tile's rows to the sums of the channels, and resets the tile's sums to 0.
#[inline(always)]
pub(crate) fn fold(tile: &mut [f32], channels: &mut [f64]) {
    for row in tile.chunks_mut(channels.len()) {
        for (channel, sum) in channels.iter_mut().zip(row) {
            *channel += f64::from(*sum);
            *sum = 0.0;
        }
    }
}
