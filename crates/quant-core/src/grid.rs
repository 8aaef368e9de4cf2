use crate::{Bits, Error};

/// The uniform quantization grid `{(q − z)·step : q = 0 … 2^b − 1}` of method section 7.
///
/// The zero point `z` is an integer level, so that zero is represented exactly: padding and ReLU
/// need this. A range that begins at 0 has `z = 0` (unsigned, after ReLU). A range with negative
/// values has the affine grid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    step: f32,
    /// `1 / step`, because a multiplication is much faster than a division. If `x` lies within
    /// rounding of the border between two levels, this choice decides its level, as in PyTorch.
    per_step: f32,
    zero_point: f32,
    max_level: f32,
}

impl Grid {
    /// Returns the grid over `[lo, hi]`, widened to contain zero.
    ///
    /// The step is `(hi − lo) / (2^b − 1)`. The zero point is `−lo / step` rounded to the nearest
    /// level, so the grid may be shifted against the range by up to half a step. A range that is
    /// all zero gives a grid of values next to zero, below 1e-35.
    ///
    /// # Errors
    /// If a bound is not finite or `lo > hi`.
    pub fn new(lo: f32, hi: f32, bits: Bits) -> Result<Self, Error> {
        if !(lo.is_finite() && hi.is_finite() && lo <= hi) {
            return Err(Error::Range { lo, hi });
        }
        Ok(Self::spanning(lo, hi, bits))
    }

    /// Returns the grid of [`Grid::new`], for kernels, which can't report a bad range.
    ///
    /// An infinite bound shows as NaN in the result. A NaN bound counts as 0.
    pub fn spanning(lo: f32, hi: f32, bits: Bits) -> Self {
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        let max_level = bits.max_level() as f32;
        // Below the smallest normal number the reciprocal of the step would overflow.
        let step = ((hi - lo) / max_level).max(f32::MIN_POSITIVE);
        let zero_point = (-lo / step).round_ties_even().clamp(0.0, max_level);
        Self { step, per_step: 1.0 / step, zero_point, max_level }
    }

    /// Returns the grid of `2^b − 1` values from `−bound` to `bound`, with zero in the middle.
    ///
    /// A bound of 0 or less gives a grid of values next to zero, below 1e-35. A bound that is not
    /// finite shows as NaN in the result.
    pub fn symmetric(bound: f32, bits: Bits) -> Self {
        let half = (bits.max_level() / 2) as f32;
        // The least step keeps the reciprocal finite, as in `spanning`.
        let step = if bound < half * f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { bound / half };
        Self { step, per_step: 1.0 / step, zero_point: half, max_level: 2.0 * half }
    }

    /// Returns the distance between neighbouring values.
    pub fn step(&self) -> f32 {
        self.step
    }

    /// Returns the level that represents zero, 0 … `max_level`.
    pub fn zero_point(&self) -> f32 {
        self.zero_point
    }

    /// Returns the largest level, `2^b − 1`, or `2^b − 2` for a symmetric grid.
    pub fn max_level(&self) -> f32 {
        self.max_level
    }

    /// Returns the level of `x` before clamping, `round(x / step) + z`, ties to even.
    #[inline(always)]
    fn unclamped(&self, x: f32) -> f32 {
        (x * self.per_step).round_ties_even() + self.zero_point
    }

    /// Returns the integer level of `x`, 0 … `max_level`, as a float that holds it exactly.
    #[inline(always)]
    pub fn level(&self, x: f32) -> f32 {
        // Each comparison is one vector instruction. A NaN gets level 0.
        let level = self.unclamped(x);
        let level = if level > 0.0 { level } else { 0.0 };
        if level < self.max_level { level } else { self.max_level }
    }

    /// Returns the value of a level.
    #[inline(always)]
    pub fn value(&self, level: f32) -> f32 {
        (level - self.zero_point) * self.step
    }

    /// Returns the value of the grid that is nearest to `x` (fake quantization).
    #[inline(always)]
    pub fn fake(&self, x: f32) -> f32 {
        self.value(self.level(x))
    }

    /// Returns whether the straight-through gradient passes at `x`.
    ///
    /// It passes if `x` rounds to a level of the grid without being clamped. The gradient of fake
    /// quantization is 1 there and 0 elsewhere.
    #[inline(always)]
    pub fn passes(&self, x: f32) -> bool {
        let level = self.unclamped(x);
        level >= 0.0 && level <= self.max_level
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn grid(lo: f32, hi: f32, bits: u32) -> Grid {
        Grid::new(lo, hi, Bits::new(bits).unwrap()).unwrap()
    }

    /// Returns values from well below to well above the range.
    fn sweep(lo: f32, hi: f32) -> impl Iterator<Item = f32> {
        let width = (hi - lo).max(1.0);
        (-2000..=2000).map(move |i| lo + width * (0.5 + i as f32 / 1500.0))
    }

    #[test]
    fn levels_zero_and_idempotence_at_every_width() {
        for bits in 2..=8 {
            for (lo, hi) in [(0.0, 6.0), (-1.3, 2.9), (-0.01, 5.0), (-4.0, 0.0), (0.0, 1e-3), (0.0, 0.0)] {
                let g = grid(lo, hi, bits);
                assert_eq!(g.fake(0.0), 0.0, "zero must be exact: {g:?}");
                let mut values = BTreeSet::new();
                for x in sweep(lo, hi) {
                    let y = g.fake(x);
                    assert_eq!(g.fake(y).to_bits(), y.to_bits(), "not idempotent at {x}: {g:?}");
                    assert_eq!(g.level(x).fract(), 0.0);
                    values.insert(y.to_bits());
                }
                // −0.0 and 0.0 count as one value.
                values.remove(&(-0.0f32).to_bits());
                assert!(values.len() <= 1 << bits, "{} values at {bits} bits: {g:?}", values.len());
            }
        }
    }

    #[test]
    fn error_is_at_most_half_a_step_where_the_gradient_passes() {
        let g = grid(-1.0, 3.0, 4);
        for x in sweep(-1.0, 3.0) {
            if g.passes(x) {
                assert!((g.fake(x) - x).abs() <= 0.5 * g.step() * 1.0001, "x = {x}");
            } else {
                assert!(!(-1.0..=3.0).contains(&x), "blocked inside the range at {x}");
            }
        }
    }

    #[test]
    fn hand_worked_two_bits() {
        // Levels 0..3 over [0, 3]: step 1.
        let g = grid(0.0, 3.0, 2);
        let got: Vec<f32> = [-1.0, 0.4, 0.5, 0.6, 1.5, 2.7, 3.4, 9.0].map(|x| g.fake(x)).to_vec();
        assert_eq!(got, [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0]);
        let passes: Vec<bool> = [-0.6, -0.4, 0.0, 3.4, 3.6].map(|x| g.passes(x)).to_vec();
        assert_eq!(passes, [false, true, true, true, false]);
    }

    #[test]
    fn hand_worked_symmetric() {
        // Three bits: −3 … 3, step 2.
        let g = Grid::symmetric(6.0, Bits::new(3).unwrap());
        let got: Vec<f32> = [-9.0, -5.1, -2.9, -0.9, 0.0, 1.1, 4.9, 9.0].map(|x| g.fake(x)).to_vec();
        assert_eq!(got, [-6.0, -6.0, -2.0, 0.0, 0.0, 2.0, 4.0, 6.0]);
        let zero = Grid::symmetric(0.0, Bits::new(3).unwrap());
        assert!([-1.0, 0.0, 1.0].map(|x| zero.fake(x)).iter().all(|y| y.abs() < 1e-37));
    }

    #[test]
    fn bad_ranges_are_errors() {
        let bits = Bits::new(4).unwrap();
        for (lo, hi) in [(1.0, 0.0), (f32::NAN, 1.0), (0.0, f32::INFINITY)] {
            assert!(Grid::new(lo, hi, bits).is_err(), "[{lo}, {hi}]");
        }
    }
}
