//! From the numbers of one lattice to those of another, in fixed point.

use crate::{Error, Result};

/// The bits of a multiplier, with its sign one more.
pub const MULTIPLIER_BITS: u32 = 31;

/// The most fractional bits of a multiplier and of what is added. Where ratios are so small that 31 significant bits would need
/// more, they have fewer.
pub const MOST_SHIFT: u32 = 40;

/// What a sum of `N` kinds of whole numbers is multiplied by: `(Σ multipliers[i]·sums[i] + bias) >> shift`, in 64 bits, rounds
/// `Σ ratios[i]·sums[i] + added` to the nearest whole number, halves up. Where ratios are so large that the shift is negative, as
/// where the outputs of a dead layer have next to no range, it goes to the left and saturates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rescale<const N: usize> {
    multipliers: [i64; N],
    /// What is added, and a half if there is a shift to the right.
    bias: i64,
    shift: i32,
}

impl<const N: usize> Rescale<N> {
    /// `most[i]` bounds the absolute value of `sums[i]`; `place` names the node.
    ///
    /// # Errors
    /// When a number is not finite.
    pub fn new(ratios: [f64; N], added: f64, most: [f64; N], place: &str) -> Result<Self> {
        let largest = ratios.iter().fold(0.0, |largest: f64, ratio| largest.max(ratio.abs()));
        let bits = f64::from(MULTIPLIER_BITS - 1) - largest.log2().floor();
        // The whole sum has to fit, what is added with it.
        let whole =
            ratios.iter().zip(most).map(|(ratio, most)| ratio.abs() * most).sum::<f64>() + added.abs();
        if !whole.is_finite() {
            return Err(Error::Range { place: place.into() });
        }
        let room = 60.0 - (whole + 1.0).log2().ceil();
        // Without any ratio but 0 the logarithm is infinite.
        let shift = bits.min(room).min(f64::from(MOST_SHIFT)) as i32;
        let fixed = |value: f64| (value * 2f64.powi(shift)).round() as i64;
        let half = if shift > 0 { 1 << (shift - 1) } else { 0 };
        Ok(Self { multipliers: ratios.map(fixed), bias: fixed(added) + half, shift })
    }

    #[inline(always)]
    pub fn apply(&self, sums: [i64; N]) -> i64 {
        let products = self.multipliers.iter().zip(sums).map(|(multiplier, sum)| multiplier * sum);
        let sum = products.sum::<i64>() + self.bias;
        if self.shift >= 0 { sum >> self.shift } else { saturated(sum, self.shift.unsigned_abs()) }
    }
}

/// `sum` shifted to the left; the largest or the lowest number where it has no room.
fn saturated(sum: i64, shift: u32) -> i64 {
    let wide = i128::from(sum) << shift.min(64);
    wide.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_kept_to_31_bits_and_rounded_to_the_nearest() {
        for ratio in [1.0, 0.75, -0.3, 1e-3, 2.5e-6, 700.0] {
            let rescale = Rescale::new([ratio], 0.25, [1e8], "here").unwrap();
            for sum in [-99_999_999, -12345, -1, 0, 1, 17, 4096, 99_999_999] {
                let exact = ratio * sum as f64 + 0.25;
                let found = rescale.apply([sum]) as f64;
                // Half a unit of rounding, and what 31 bits of the ratio leave.
                let tolerance = 0.5 + exact.abs() * 2f64.powi(-30) + 1e-3;
                assert!((found - exact).abs() <= tolerance, "{ratio} × {sum}: {found} for {exact}");
            }
        }
        let two = Rescale::new([0.5, -0.25], 0.0, [1e6; 2], "here").unwrap();
        // Halves go up.
        assert_eq!(
            [two.apply([1, 0]), two.apply([-1, 0]), two.apply([3, 4]), two.apply([0, 0])],
            [1, 0, 1, 0]
        );
        assert_eq!(Rescale::new([0.0], 3.0, [1e9], "here").unwrap().apply([5]), 3);
        assert_eq!(Rescale::new([0.0], 1e9, [1e9], "here").unwrap().apply([5]), 1_000_000_000);
        assert!(Rescale::new([f64::NAN], 0.0, [1.0], "here").is_err());
        assert!(Rescale::new([f64::INFINITY], 0.0, [1.0], "here").is_err());
    }

    /// Where next to no range is left behind a layer, every sum but 0 is beyond it.
    #[test]
    fn what_is_too_large_saturates() {
        for ratio in [1e12, 1e25, 1e60, 1e300] {
            let rescale = Rescale::new([ratio], 0.0, [1e6], "here").unwrap();
            let found = [-1_000_000, -1, 0, 1, 1_000_000].map(|sum| rescale.apply([sum]));
            assert!(found[0] < -1 << 31 && found[1] < -1 << 31, "{ratio}: {found:?}");
            assert!(found[2] == 0 && found[3] > 1 << 31 && found[4] > 1 << 31, "{ratio}: {found:?}");
        }
        // What is added decides, or the difference of both.
        let rescale = Rescale::new([1e25], -3e25, [1e6], "here").unwrap();
        let found = [2, 3, 4].map(|sum| rescale.apply([sum]));
        assert!(found[0] < -1 << 31 && found[2] > 1 << 31, "{found:?}");
        assert!(found[1].unsigned_abs() < (1e25 * 2f64.powi(-25)) as u64, "{found:?}");
        assert!(Rescale::new([1.0], 1e25, [1e9], "here").unwrap().apply([-1_000_000_000]) > 1 << 40);
    }
}
