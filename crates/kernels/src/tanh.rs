//! The hyperbolic tangent in a form that vectorizes.
//!
//! The standard library's `tanh` is a function call for every element and gives different bits on
//! other systems.

use crate::clamp;
use std::f32::consts::LOG2_E;

/// The bound from which on `tanh(x)` rounds to 1.
const LIMIT: f32 = 9.1;

/// The coefficients of the Taylor series of `2^r − 1` divided by `r`: `ln2^k / k!`, the highest
/// power first. For `|r| ≤ ½` the remainder is below 6e-9 of the value.
const SERIES: [f32; 7] = {
    let (mut series, mut term, mut k) = ([0.0; 7], 1.0f64, 0);
    while k < 7 {
        term *= std::f64::consts::LN_2 / (k + 1) as f64;
        series[6 - k] = term as f32;
        k += 1;
    }
    series
};

/// Computes `tanh(x)` with a relative error of at most 3e-7; NaN stays NaN.
///
/// With `2x·log₂e = n + r` and an integer `n`, `e^2x − 1 = 2^n·(2^r − 1) + (2^n − 1)`, which keeps
/// its precision near 0, and `tanh x = (e^2x − 1)/(e^2x + 1)`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let scaled = clamp(x, (-LIMIT, LIMIT)) * (2.0 * LOG2_E);
    let whole = scaled.round_ties_even();
    let rest = scaled - whole;
    let mut series = SERIES[0];
    for coefficient in &SERIES[1..] {
        series = series.mul_add(rest, *coefficient);
    }
    // This is 2^n: the last bits of the sum with 2²³, where floats are integers, are the biased
    // exponent.
    let power = f32::from_bits((whole + (8_388_608.0 + 127.0)).to_bits() << 23);
    let less_one = power.mul_add(series * rest, power - 1.0);
    less_one / (less_one + 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_that_of_double_precision() {
        for i in -60_000..=60_000 {
            let x = (i as f32 / 5000.0) * if i % 2 == 0 { 1.0 } else { 1e-3 };
            let (found, expected) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!(
                (found - expected).abs() <= 3e-7 * expected.abs(),
                "tanh({x}) = {found} and not {expected}"
            );
        }
        assert_eq!([0.0, 1e30, -1e30, f32::INFINITY].map(tanh), [0.0, 1.0, -1.0, 1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }
}
