//! From the numbers of one lattice to those of another, in fixed point.

use crate::{Error, Result};

/// The bits of a multiplier, with its sign one more.
pub const MULTIPLIER_BITS: u32 = 31;

/// The most fractional bits of a multiplier and of what is added. Where ratios are so small that 31 significant bits would need
/// more, they have fewer.
pub const MOST_SHIFT: u32 = 40;

/// What a sum of `N` kinds of whole numbers is multiplied by: `(Σ multipliers[i]·sums[i] + bias) >> shift`, in 64 bits, rounds
/// `Σ ratios[i]·sums[i] + added` to the nearest whole number, halves up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rescale<const N: usize> {
    multipliers: [i64; N],
    /// What is added, and a half.
    bias: i64,
    shift: u32,
}

impl<const N: usize> Rescale<N> {
    /// `most[i]` bounds the absolute value of `sums[i]`; `place` names the node.
    ///
    /// # Errors
    /// When 64 bits may not do.
    pub fn new(ratios: [f64; N], added: f64, most: [f64; N], place: &str) -> Result<Self> {
        let largest = ratios.iter().fold(0.0, |largest: f64, ratio| largest.max(ratio.abs()));
        let bits = f64::from(MULTIPLIER_BITS - 1) - largest.log2().floor();
        // Without any ratio but 0 the logarithm is infinite. What is added has to fit too.
        let room = 60.0 - (added.abs() + 1.0).log2().ceil();
        let shift = bits.min(room).clamp(1.0, f64::from(MOST_SHIFT)) as u32;
        let one = 2f64.powi(shift as i32);
        let fixed = |value: f64| (value * one).round();
        let half = one / 2.0;
        let bound: f64 = ratios.iter().zip(most).map(|(&ratio, most)| fixed(ratio).abs() * most).sum();
        let most = bound + fixed(added).abs() + half;
        if most.is_nan() || most >= 2f64.powi(62) {
            return Err(Error::Range { place: place.into(), bits: 62 });
        }
        Ok(Self {
            multipliers: ratios.map(|ratio| fixed(ratio) as i64),
            bias: (fixed(added) + half) as i64,
            shift,
        })
    }

    #[inline(always)]
    pub fn apply(&self, sums: [i64; N]) -> i64 {
        let products = self.multipliers.iter().zip(sums).map(|(multiplier, sum)| multiplier * sum);
        (products.sum::<i64>() + self.bias) >> self.shift
    }
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
        assert!(Rescale::new([1.0], 1e25, [1e9], "here").is_err());
        assert!(Rescale::new([f64::NAN], 0.0, [1.0], "here").is_err());
    }
}
