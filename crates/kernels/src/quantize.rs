//! Fake quantization of a tensor, and the estimation of its range.
//!
//! With the [`Grid`] over the range `(lo, hi)`, `y = Q(x)` is the grid's value nearest to `x`. The
//! straight-through gradient is `∂x = ∂y` if `x` rounds to one of the levels without being clamped,
//! and 0 otherwise. There is one grid for the whole tensor or, for weights, one for each output
//! channel.

pub(crate) mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, read_ahead, simd};
use crate::elements::{Element, by_element};
use crate::work::{fill, parts, whole_rows};
use crate::{Quantizer, Result, profiler};
use candle_core::Tensor;
use quant_core::Grid;

/// Computes `Q(x)`, of the shape of `x`.
pub fn forward(x: &Tensor, quant: Quantizer<'_>) -> Result<Tensor> {
    let check = Check("quantize::forward");
    let _note = profiler::note(check.0, 0, 2 * x.dtype().size_in_bytes() * x.elem_count());
    check.grids(x, quant)?;
    let x = check.map_float("x", x)?;
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, quant);
    }
    let grids = cpu::grids(quant)?;
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        let y = fill(x.len(), whole_rows(grids.len()), |part, y| fake(&x[part], y, &grids));
        cpu::tensor(y, opened.dims())
    })
}

/// Computes the straight-through gradient: `gy` where the quantizer does not clamp `x`, and 0
/// elsewhere.
pub fn backward(x: &Tensor, gy: &Tensor, quant: Quantizer<'_>) -> Result<Tensor> {
    let check = Check("quantize::backward");
    check.grids(x, quant)?;
    let _note = profiler::note(check.0, 0, 3 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, gy) = (check.map_float("x", x)?, check.map_of("gy", gy, x)?);
    if crate::gpu::runs(x.device()) {
        return gpu::backward(&x, &gy, quant);
    }
    let grids = cpu::grids(quant)?;
    by_element!(x.dtype(), T => {
        let (opened, gy) = (open(&x), open(&gy));
        let (x, gy): (&[T], _) = (opened.elements()?, gy.elements()?);
        let gx = fill(x.len(), whole_rows(grids.len()), |part, gx| {
            mask(&x[part.clone()], &gy[part], gx, &grids);
        });
        cpu::tensor(gx, opened.dims())
    })
}

/// Returns the smallest and the largest element, `[2]`.
pub fn min_max(x: &Tensor) -> Result<Tensor> {
    let check = Check("quantize::min_max");
    if x.elem_count() == 0 {
        return Err(check.shape("x", x, "at least one element"));
    }
    let _note = profiler::note(check.0, 0, x.dtype().size_in_bytes() * x.elem_count());
    let x = check.map_float("x", x)?;
    if crate::gpu::runs(x.device()) {
        return gpu::min_max(&x);
    }
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        let (lo, hi) = parts(x.len(), 1, |part| extremes(&x[part]))
            .into_iter()
            .fold((f32::INFINITY, f32::NEG_INFINITY), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        cpu::tensor(vec![lo, hi], 2)
    })
}

/// Moves a range towards that of a batch, in place: `range += momentum · (batch − range)`. A
/// momentum of 1 replaces the range, rounded to the precision of the difference.
pub fn update_range(range: &Tensor, batch: &Tensor, momentum: f64) -> Result<()> {
    let check = Check("quantize::update_range");
    check.dims("range", range, &[2])?;
    let batch = check.dims("batch", batch, &[2])?;
    if crate::gpu::runs(range.device()) {
        return gpu::update_range(range, &batch, momentum as f32);
    }
    cpu::update(&check, "range", range, [&batch], |range, [batch]| {
        for (range, batch) in range.iter_mut().zip(batch) {
            *range += momentum as f32 * (batch - *range);
        }
    })
}

simd! {
    /// Quantizes elements with one grid, or whole rows with one grid for each channel.
    pub(crate) fn fake<T: Element>(x: &[T], y: &mut [T], grids: &[Grid]) {
        if let [grid] = *grids {
            for (y, x) in y.iter_mut().zip(x) {
                *y = T::nearest(grid.fake(x.float()));
            }
        } else {
            let c = grids.len();
            for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                for ((y, x), grid) in y.iter_mut().zip(x).zip(grids) {
                    *y = T::nearest(grid.fake(x.float()));
                }
            }
        }
    }
}

simd! {
    /// Masks the gradient with one grid, or that of whole rows with one grid for each channel.
    fn mask<T: Element>(x: &[T], gy: &[T], gx: &mut [T], grids: &[Grid]) {
        if let [grid] = *grids {
            const TILE: usize = 256;
            let tiles = gx.chunks_mut(TILE).zip(gy.chunks(TILE)).zip(x.chunks(TILE));
            for (i, ((gx, of_gy), x)) in tiles.enumerate() {
                read_ahead(gy, i * TILE, TILE);
                for ((gx, gy), x) in gx.iter_mut().zip(of_gy).zip(x) {
                    *gx = if grid.passes(x.float()) { *gy } else { T::default() };
                }
            }
        } else {
            let c = grids.len();
            for ((gx, gy), x) in gx.chunks_exact_mut(c).zip(gy.chunks_exact(c)).zip(x.chunks_exact(c)) {
                for (((gx, gy), x), grid) in gx.iter_mut().zip(gy).zip(x).zip(grids) {
                    *gx = if grid.passes(x.float()) { *gy } else { T::default() };
                }
            }
        }
    }
}

simd! {
    fn extremes<T: Element>(x: &[T]) -> (f32, f32) {
        // Independent lanes, so that the loop vectorizes.
        const LANES: usize = 64;
        let (mut lo, mut hi) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        for x in x.chunks(LANES) {
            for ((lo, hi), x) in lo.iter_mut().zip(&mut hi).zip(x) {
                let x = x.float();
                *lo = if x < *lo { x } else { *lo };
                *hi = if x > *hi { x } else { *hi };
            }
        }
        (lo.iter().fold(f32::INFINITY, |a, &b| a.min(b)), hi.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use quant_core::Bits;
    use std::collections::BTreeSet;

    fn bits(bits: u32) -> Bits {
        Bits::new(bits).unwrap()
    }

    /// Quantizes with plain Candle operations.
    fn reference(x: &Tensor, lo: f64, hi: f64, levels: f64) -> candle_core::Result<Tensor> {
        let step = (hi - lo) / levels;
        let zero_point = (-lo / step).round_ties_even();
        let level = ((x / step)?.round()? + zero_point)?.clamp(0.0, levels)?;
        (level - zero_point)? * step
    }

    #[test]
    fn matches_plain_candle_and_the_grid() {
        for (lo, hi) in [(0.0f32, 0.75), (-0.5, 0.25), (-0.9, 0.95)] {
            for b in 2..=8 {
                // More than a chunk, and not a multiple of a vector.
                let x = random(1, &[3, 10_007, 2]);
                let gy = random(2, x.dims());
                let range = tensor(&[lo, hi]);
                let quant = Quantizer { range: &range, bits: bits(b) };
                let grid = Grid::new(lo, hi, bits(b)).unwrap();
                let (y, gx) = (forward(&x, quant).unwrap(), backward(&x, &gy, quant).unwrap());
                let expected = reference(&x, lo.into(), hi.into(), f64::from(bits(b).max_level())).unwrap();
                // If x is halfway between two levels, rounding in another precision may differ.
                let pairs = elements(&y).into_iter().zip(elements(&expected));
                let unequal = pairs.filter(|(a, b)| (a - b).abs() > 1e-6);
                assert!(unequal.count() <= 20, "[{lo}, {hi}] at {b} bits");
                let all = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (x, y, gy, gx) = (all(&x), all(&y), all(&gy), all(&gx));
                for i in 0..x.len() {
                    assert_eq!(y[i].to_bits(), grid.fake(x[i]).to_bits(), "{}", x[i]);
                    assert_eq!(gx[i], if grid.passes(x[i]) { gy[i] } else { 0.0 }, "{}", x[i]);
                }
            }
        }
    }

    #[test]
    fn levels_zero_and_idempotence() {
        let x = random(1, &[5000]);
        let range = tensor(&[-0.3, 0.8]);
        for b in 2..=8 {
            let quant = Quantizer { range: &range, bits: bits(b) };
            let y = forward(&x, quant).unwrap();
            let levels: BTreeSet<u64> = elements(&y).iter().map(|y| (y + 0.0).to_bits()).collect();
            assert_eq!(levels.len(), 1 << b);
            assert!(levels.contains(&0.0f64.to_bits()));
            assert_eq!(elements(&forward(&y, quant).unwrap()), elements(&y));
        }
        let zeros = Tensor::zeros(7, candle_core::DType::F32, x.device()).unwrap();
        let quant = Quantizer { range: &range, bits: bits(3) };
        assert_eq!(elements(&forward(&zeros, quant).unwrap()), [0.0; 7]);
    }

    /// Checks that per-channel grids give the same bits as each channel by itself, with ranges on
    /// either side of zero and ranges of a constant.
    #[test]
    fn grids_of_channels_are_those_of_each_by_itself() {
        for (rows, channels) in [(1, 1), (9, 3), (1, 7), (27, 33), (5000, 70)] {
            let scale = (random(3, &[channels]) * 2.0).unwrap();
            let x = random(1, &[rows, channels]).broadcast_mul(&scale).unwrap();
            let x = x.broadcast_add(&random(4, &[channels])).unwrap();
            let gy = random(2, x.dims());
            let (lo, hi) = (x.min(0).unwrap(), x.max(0).unwrap());
            // Ranges that clamp on both sides.
            let range = (Tensor::stack(&[lo, hi], 0).unwrap() * 0.7).unwrap();
            for b in [2, 4, 8] {
                let quant = Quantizer { range: &range, bits: bits(b) };
                let (y, gx) = (forward(&x, quant).unwrap(), backward(&x, &gy, quant).unwrap());
                for c in 0..channels {
                    let column = |t: &Tensor| t.narrow(1, c, 1).unwrap().contiguous().unwrap();
                    let own = column(&range).flatten_all().unwrap();
                    let quant = Quantizer { range: &own, bits: bits(b) };
                    let expected = forward(&column(&x), quant).unwrap();
                    assert_eq!(elements(&column(&y)), elements(&expected), "channel {c} of {channels}");
                    let expected = backward(&column(&x), &column(&gy), quant).unwrap();
                    assert_eq!(elements(&column(&gx)), elements(&expected), "channel {c} of {channels}");
                }
            }
        }
    }

    #[test]
    fn ranges_of_other_channels_are_errors() {
        let (x, range) = (random(1, &[4, 3]), random(2, &[2, 4]));
        let quant = Quantizer { range: &range, bits: bits(4) };
        let message = forward(&x, quant).unwrap_err().to_string();
        assert_eq!(
            message,
            "quantize::forward: range has shape [2, 4], expected [2], or [2, C] with C the last of [4, 3]"
        );
    }

    #[test]
    fn extremes() {
        for len in [1, 7, 64, 100, 300_000] {
            let x = random(len as u64, &[len]);
            let found = elements(&min_max(&x).unwrap());
            let expected = elements(&x);
            assert_eq!(found[0], expected.iter().copied().fold(f64::INFINITY, f64::min));
            assert_eq!(found[1], expected.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
        assert!(min_max(&random(1, &[0])).is_err());
    }

    #[test]
    fn ranges_move_in_place() {
        let (range, batch) = (tensor(&[0.0, 2.0]), tensor(&[-1.0, 4.0]));
        update_range(&range, &batch, 0.5).unwrap();
        assert_eq!(elements(&range), [-0.5, 3.0]);
        update_range(&range, &batch, 1.0).unwrap();
        assert_eq!(elements(&range), [-1.0, 4.0]);
        assert!(update_range(&tensor(&[1.0]), &batch, 0.5).is_err());
    }

    #[test]
    fn same_bits_everywhere() {
        let (x, gy, range) = (random(1, &[300_001]), random(2, &[300_001]), tensor(&[-0.4, 0.7]));
        let quant = Quantizer { range: &range, bits: bits(4) };
        let rows = |t: &Tensor| t.narrow(0, 0, 300_000).unwrap().reshape((500, 600)).unwrap();
        let ranges = Tensor::stack(&[(random(3, &[600]) - 1.0).unwrap(), random(4, &[600])], 0).unwrap();
        let channels = Quantizer { range: &ranges, bits: bits(4) };
        assert_same_everywhere(|| {
            let whole =
                [forward(&x, quant).unwrap(), backward(&x, &gy, quant).unwrap(), min_max(&x).unwrap()];
            let (x, gy) = (rows(&x), rows(&gy));
            let each = [forward(&x, channels).unwrap(), backward(&x, &gy, channels).unwrap()];
            whole.into_iter().chain(each).collect()
        });
    }
}
