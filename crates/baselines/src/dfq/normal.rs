//! Moments of a clipped normal variable (Nagel et al., appendix C).

/// The mean and variance of a random variable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Moments {
    pub(crate) mean: f64,
    pub(crate) variance: f64,
}

/// Returns the mean and variance of `x ~ N(mean, deviation²)` clamped to `[lo, hi]`, either of
/// which may be infinite.
///
/// After ReLU, the mean is the paper's `γ·N(−β/γ) + β·(1 − Φ(−β/γ))`.
pub(crate) fn clipped(mean: f64, deviation: f64, (lo, hi): (f64, f64)) -> Moments {
    if deviation == 0.0 {
        return Moments { mean: mean.clamp(lo, hi), variance: 0.0 };
    }
    // Both bounds, in deviations from the mean. Beyond 40, N and 1 − Φ are 0 in double precision,
    // so a missing bound is the same as a bound at 40.
    let a = ((lo - mean) / deviation).max(-40.0);
    let b = ((hi - mean) / deviation).min(40.0);
    let (below, above) = (cdf(a), cdf(-b));
    let first = a * below + b * above + pdf(a) - pdf(b);
    let second = a * a * below + b * b * above + (1.0 - below - above).max(0.0) + a * pdf(a) - b * pdf(b);
    Moments {
        mean: mean + deviation * first,
        variance: deviation * deviation * (second - first * first).max(0.0),
    }
}

/// Returns the standard normal density `N`.
fn pdf(x: f64) -> f64 {
    (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

/// Returns the standard normal distribution function `Φ`, which is precise in its lower tail.
fn cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFINITY: f64 = f64::INFINITY;

    /// Compares with the sums of `clamp(x)` and its square over a fine grid, weighted by the
    /// density.
    fn check(mean: f64, deviation: f64, bounds: (f64, f64)) {
        let n = 400_000;
        let width = 24.0 / n as f64;
        let (mut first, mut second) = (0.0, 0.0);
        for i in 0..n {
            let z = -12.0 + (i as f64 + 0.5) * width;
            let (x, p) = ((mean + deviation * z).clamp(bounds.0, bounds.1), pdf(z) * width);
            first += p * x;
            second += p * x * x;
        }
        let got = clipped(mean, deviation, bounds);
        let scale = mean.abs() + deviation;
        let close = |got: f64, want: f64, scale: f64| (got - want).abs() <= 1e-7 * scale;
        let variance = second - first * first;
        assert!(
            close(got.mean, first, scale) && close(got.variance, variance, scale * scale),
            "N({mean}, {deviation}²) in {bounds:?}: {got:?}, integrated {first}, {variance}"
        );
    }

    #[test]
    fn moments_are_the_integrals() {
        for bounds in [(-INFINITY, INFINITY), (0.0, INFINITY), (0.0, 6.0)] {
            for (mean, deviation) in [
                (0.0, 1.0),
                (0.7, 1.3),
                (-2.0, 0.5),
                (5.5, 2.0),
                (9.0, 1.0),
                (-40.0, 3.0),
                (40.0, 3.0),
                (-1e4, 1.0),
            ] {
                check(mean, deviation, bounds);
            }
        }
    }

    #[test]
    fn a_constant_is_clamped() {
        for (mean, clamped) in [(-1.0, 0.0), (2.5, 2.5), (7.0, 6.0)] {
            assert_eq!(clipped(mean, 0.0, (0.0, 6.0)), Moments { mean: clamped, variance: 0.0 });
        }
    }
}
