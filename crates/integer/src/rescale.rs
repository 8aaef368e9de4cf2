//! Fixed-point conversion of the integers of one lattice to those of another.

use crate::{Error, Result};

/// The number of bits of the largest multiplier of a sum, without its sign. It has more if the
/// smallest one would have fewer than 16.
pub const MULTIPLIER_BITS: u32 = 31;

/// The number of bits that the smallest multiplier of a sum has, if there is room for them.
const LEAST_BITS: u32 = 16;

/// The largest number of fractional bits of a multiplier and of the bias. If ratios are so small
/// that 31 significant bits would need more, they have fewer significant bits.
const MOST_SHIFT: u32 = 40;

/// The factors of a sum of `N` kinds of integers.
///
/// `(Σ multipliers[i]·sums[i] + bias) >> shift`, in 64 bits, rounds `Σ ratios[i]·sums[i] + added`
/// to the nearest integer, halves up. If ratios are so large that the shift is negative, the sum is
/// shifted to the left and saturates. This happens if the outputs of a dead layer have almost no
/// range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rescale<const N: usize> {
    multipliers: [i64; N],
    /// The added term, plus one half if the shift goes to the right.
    bias: i64,
    shift: i32,
}

impl<const N: usize> Rescale<N> {
    /// Returns the factors for `ratios` and `added`.
    ///
    /// `most[i]` is a bound of the absolute value of `sums[i]`. `place` is the name of the node.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn new(ratios: [f64; N], added: f64, most: [f64; N], place: &str) -> Result<Self> {
        let sizes = || ratios.iter().map(|ratio| ratio.abs()).filter(|size| *size > 0.0);
        let (largest, smallest) = (sizes().fold(0.0, f64::max), sizes().fold(f64::INFINITY, f64::min));
        let shift_for = |bits: u32, ratio: f64| f64::from(bits - 1) - ratio.log2().floor();
        let bits = shift_for(MULTIPLIER_BITS, largest).max(shift_for(LEAST_BITS, smallest));
        // The whole sum, with the added term, must fit in 64 bits.
        let whole =
            ratios.iter().zip(most).map(|(ratio, most)| ratio.abs() * most).sum::<f64>() + added.abs();
        if !whole.is_finite() {
            return Err(Error::Range { place: place.into() });
        }
        let room = 60.0 - (whole + 1.0).log2().ceil();
        // If all ratios are 0, the logarithm is infinite.
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

/// Returns `sum` shifted to the left, saturated at the bounds of `i64`.
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
                // Half a unit of rounding, and the error of the ratio's 31 bits.
                let tolerance = 0.5 + exact.abs() * 2f64.powi(-30) + 1e-3;
                assert!((found - exact).abs() <= tolerance, "{ratio} × {sum}: {found} for {exact}");
            }
        }
        let two = Rescale::new([0.5, -0.25], 0.0, [1e6; 2], "here").unwrap();
        // Halves are rounded up.
        assert_eq!(
            [two.apply([1, 0]), two.apply([-1, 0]), two.apply([3, 4]), two.apply([0, 0])],
            [1, 0, 1, 0]
        );
        assert_eq!(Rescale::new([0.0], 3.0, [1e9], "here").unwrap().apply([5]), 3);
        assert_eq!(Rescale::new([0.0], 1e9, [1e9], "here").unwrap().apply([5]), 1_000_000_000);
        // The smaller of two very different ratios matters if its sum is large.
        for large in [1.0, 2048.0, 4096.0] {
            let apart = Rescale::new([large, 2f64.powi(-20)], 0.0, [15.0, 2f64.powi(31)], "here").unwrap();
            assert_eq!([apart.apply([0, 5 << 20]), apart.apply([3, 1 << 19])], [5, 3 * large as i64 + 1]);
        }
        assert!(Rescale::new([f64::NAN], 0.0, [1.0], "here").is_err());
        assert!(Rescale::new([f64::INFINITY], 0.0, [1.0], "here").is_err());
    }

    /// If almost no range is left after a layer, every sum except 0 is beyond it.
    #[test]
    fn what_is_too_large_saturates() {
        for ratio in [1e12, 1e25, 1e60, 1e300] {
            let rescale = Rescale::new([ratio], 0.0, [1e6], "here").unwrap();
            let found = [-1_000_000, -1, 0, 1, 1_000_000].map(|sum| rescale.apply([sum]));
            assert!(found[0] < -1 << 31 && found[1] < -1 << 31, "{ratio}: {found:?}");
            assert!(found[2] == 0 && found[3] > 1 << 31 && found[4] > 1 << 31, "{ratio}: {found:?}");
        }
        // The added term decides, or the difference of both.
        let rescale = Rescale::new([1e25], -3e25, [1e6], "here").unwrap();
        let found = [2, 3, 4].map(|sum| rescale.apply([sum]));
        assert!(found[0] < -1 << 31 && found[2] > 1 << 31, "{found:?}");
        assert!(found[1].unsigned_abs() < (1e25 * 2f64.powi(-25)) as u64, "{found:?}");
        assert!(Rescale::new([1.0], 1e25, [1e9], "here").unwrap().apply([-1_000_000_000]) > 1 << 40);
    }
}
