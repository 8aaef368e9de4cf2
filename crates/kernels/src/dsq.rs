//! Differentiable soft quantization (DSQ, Gong et al. 2019, arXiv:1908.05033).
//!
//! Between the bounds `l` and `u` lie `N = 2^b − 1` intervals of width `Δ = (u − l)/N`; the middle
//! of interval `i` is `m_i = l + (i + ½)Δ`. In each interval, a piece of a hyperbolic tangent
//! replaces the step:
//!
//! * `φ(x) = s·tanh(k(x − m_i))`, with `s = 1/tanh(kΔ/2)`, so that the pieces join;
//! * the soft value is `Q(x) = l + Δ·(i + (φ(x) + 1)/2)` from `l` to `u`, `l` below, `u` above;
//! * the hard value has the sign of `φ` in place of `φ`: it is the nearest of the `2^b` levels
//!   `l + Δq`.
//!
//! The softness `α = 1 − tanh(kΔ/2)` gives `s = 1/(1 − α)` and `k = ln(2/α − 1)/Δ`. At `α = 0` the
//! soft value equals the hard value. `l`, `u` and `α` are learned.
//!
//! [`forward`] returns the hard value. [`backward`] returns all derivatives of the soft value,
//! through `Δ`, `k`, `s` and `m_i`, as in the paper. With `t = (x − l)/Δ`, `f = t − i − ½`,
//! `κ = kΔ`, `T = tanh(κf)`, `q = i + (sT + 1)/2` and the slope `D = ½sκ(1 − T²)`, from `l` to `u`:
//!
//! * `∂Q/∂x = D`, `∂Q/∂u = (q − D·t)/N`, `∂Q/∂l = 1 − D − ∂Q/∂u`;
//! * `∂Q/∂α = ½Δ·(s²T − s(1 − T²)·f·2/(α(2 − α)))`.
//!
//! Below `l`, only `∂Q/∂l = 1` is nonzero; above `u`, only `∂Q/∂u = 1`.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::elements::{Element, by_element};
use crate::learned::{LANES, Lanes, map_and_sum};
use crate::tanh::tanh;
use crate::work::{CHUNK, fill};
use crate::{Result, clamp, profiler};
use candle_core::Tensor;
use quant_core::Bits;

/// The range of `α`. Like the paper's range, it ends at ½; it begins above 0, so that everything
/// stays finite (`κ` is 9.9 at its lower end).
pub const SOFTNESS: (f32, f32) = (1e-4, 0.5);

/// The gradients of the soft function.
pub struct Gradients {
    /// The gradient of the input, of its shape.
    pub x: Tensor,
    /// The gradient of `(l, u)`, `[2]`.
    pub bounds: Tensor,
    /// The gradient of `α`, `[1]`.
    pub softness: Tensor,
}

/// Returns the hard value, the nearest level of each element; `bounds` is `[2] = (l, u)`.
pub fn forward(x: &Tensor, bounds: &Tensor, bits: Bits) -> Result<Tensor> {
    let check = Check("dsq::forward");
    let _note = profiler::note(check.0, 0, 2 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, bounds) = (check.map_float("x", x)?, check.dims("bounds", bounds, &[2])?);
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, &bounds, bits);
    }
    let intervals = Intervals::of(&bounds, bits)?;
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        cpu::tensor(fill(x.len(), CHUNK, |part, y| hard(&x[part], y, &intervals)), opened.dims())
    })
}

/// Returns the gradients of the soft value; `softness` is `[1] = α`, clamped to [`SOFTNESS`].
pub fn backward(
    x: &Tensor,
    gy: &Tensor,
    bounds: &Tensor,
    softness: &Tensor,
    bits: Bits,
) -> Result<Gradients> {
    let check = Check("dsq::backward");
    let _note = profiler::note(check.0, 0, 3 * x.dtype().size_in_bytes() * x.elem_count());
    let (x, bounds) = (check.map_float("x", x)?, check.dims("bounds", bounds, &[2])?);
    let softness = check.dims("softness", softness, &[1])?;
    let gy = check.map_of("gy", gy, &x)?;
    if crate::gpu::runs(x.device()) {
        return gpu::backward(&x, &gy, &bounds, &softness, bits);
    }
    let (intervals, softness) = (Intervals::of(&bounds, bits)?, cpu::values(&softness)?[0]);
    let soft = Soft::new(intervals, softness);
    by_element!(x.dtype(), T => {
        let (opened, gy) = (open(&x), open(&gy));
        let (x, gy): (&[T], _) = (opened.elements()?, gy.elements()?);
        let (gx, sums) = map_and_sum(x.len(), |part, gx| slopes(&x[part.clone()], &gy[part], gx, &soft));
        let [low, high, softness] = sums.map(|sum| sum as f32);
        Ok(Gradients {
            x: cpu::tensor(gx, opened.dims())?,
            bounds: cpu::tensor(vec![low, high], 2)?,
            softness: cpu::tensor(vec![softness], 1)?,
        })
    })
}

/// Brings `α` back into [`SOFTNESS`] and the bounds back in order, in place; called before a
/// training step uses what the optimizer left.
///
/// Bounds that have crossed both move to their midpoint.
pub fn project(bounds: &Tensor, softness: &Tensor) -> Result<()> {
    let check = Check("dsq::project");
    check.dims("bounds", bounds, &[2])?;
    check.dims("softness", softness, &[1])?;
    if crate::gpu::runs(bounds.device()) {
        return gpu::project(bounds, softness);
    }
    cpu::update(&check, "bounds", bounds, [], |bounds, []| {
        let (low, high) = (bounds[0], bounds[1]);
        if low > high {
            bounds.fill(0.5 * (low + high));
        }
    })?;
    cpu::update(&check, "softness", softness, [], |softness, []| softness[0] = clamp(softness[0], SOFTNESS))
}

/// The intervals between the bounds.
#[derive(Clone, Copy)]
struct Intervals {
    low: f32,
    high: f32,
    /// `N`, as a float.
    count: f32,
    /// `Δ`.
    width: f32,
    /// `1/Δ`.
    per_width: f32,
}

impl Intervals {
    fn of(bounds: &Tensor, bits: Bits) -> Result<Self> {
        let bounds = cpu::values(bounds)?;
        let (low, high) = (bounds[0], bounds[1]);
        let count = bits.max_level() as f32;
        // The reciprocal of a width below the smallest normal number, or of 0 if the bounds meet,
        // would overflow.
        let width = (high - low) / count;
        let width = if width < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { width };
        Ok(Self { low, high, count, width, per_width: 1.0 / width })
    }
}

simd! {
    fn hard<T: Element>(x: &[T], y: &mut [T], intervals: &Intervals) {
        let Intervals { low, count, width, per_width, .. } = *intervals;
        for (y, x) in y.iter_mut().zip(x) {
            // In the middle of an interval φ is 0, and its sign counts as positive.
            let level = ((x.float() - low) * per_width + 0.5).floor();
            let level = if level > 0.0 { level } else { 0.0 };
            let level = if level < count { level } else { count };
            *y = T::nearest(level.mul_add(width, low));
        }
    }
}

/// The coefficients of the soft function.
#[derive(Clone, Copy)]
struct Soft {
    intervals: Intervals,
    /// `1/N`.
    per_count: f32,
    /// `s`.
    scale: f32,
    /// `κ = kΔ`.
    steepness: f32,
    /// `½sκ`, the slope in the middle of an interval.
    slope: f32,
    /// `½Δs²` and `½Δs·2/(α(2 − α))`, the factors in `∂Q/∂α`.
    by_softness: [f32; 2],
}

impl Soft {
    fn new(intervals: Intervals, softness: f32) -> Self {
        // In double precision, because 2/α − 1 and its logarithm are computed only once.
        let alpha = f64::from(clamp(softness, SOFTNESS));
        let (scale, steepness) = (1.0 / (1.0 - alpha), (2.0 / alpha - 1.0).ln());
        let half = 0.5 * f64::from(intervals.width);
        Self {
            intervals,
            per_count: 1.0 / intervals.count,
            scale: scale as f32,
            steepness: steepness as f32,
            slope: (0.5 * scale * steepness) as f32,
            by_softness: [
                (half * scale * scale) as f32,
                (half * scale * 2.0 / (alpha * (2.0 - alpha))) as f32,
            ],
        }
    }

    /// Returns `∂Q/∂x`, `∂Q/∂l`, `∂Q/∂u`, `∂Q/∂α`.
    #[inline(always)]
    fn slopes(&self, x: f32) -> [f32; 4] {
        let Intervals { low, high, count, per_width, .. } = self.intervals;
        let at = (x - low) * per_width;
        let interval = clamp(at.floor(), (0.0, count - 1.0));
        let from_middle = at - interval - 0.5;
        let t = tanh(self.steepness * from_middle);
        let rest = 1.0 - t * t;
        let slope = self.slope * rest;
        let level = interval + 0.5 * self.scale.mul_add(t, 1.0);
        let by_high = (level - slope * at) * self.per_count;
        let by_softness = self.by_softness[0] * t - self.by_softness[1] * (rest * from_middle);
        // Selections vectorize, and cost less than branches.
        let (below, above) = (x < low, x > high);
        let inside = |slope: f32| if below || above { 0.0 } else { slope };
        [
            inside(slope),
            if below { 1.0 } else { inside(1.0 - slope - by_high) },
            if above { 1.0 } else { inside(by_high) },
            inside(by_softness),
        ]
    }
}

simd! {
    /// Writes the gradient of `x`, and returns the gradients of `l`, `u` and `α`.
    fn slopes<T: Element>(x: &[T], gy: &[T], gx: &mut [T], soft: &Soft) -> [f64; 3] {
        let soft = *soft;
        let mut sums: [Lanes; 3] = [[0.0; LANES]; 3];
        for ((x, gy), gx) in x.chunks(LANES).zip(gy.chunks(LANES)).zip(gx.chunks_mut(LANES)) {
            // Copies each chunk to full arrays, so that the loops over lanes have a constant
            // length. Only the last chunk may have fewer elements.
            let (mut all_x, mut all_gy, mut shares) = ([0.0; LANES], [0.0; LANES], [[0.0; LANES]; 4]);
            all_x.iter_mut().zip(x).for_each(|(lane, x)| *lane = x.float());
            all_gy.iter_mut().zip(gy).for_each(|(lane, gy)| *lane = gy.float());
            for lane in 0..LANES {
                let slopes = soft.slopes(all_x[lane]);
                for (shares, slope) in shares.iter_mut().zip(slopes) {
                    shares[lane] = all_gy[lane] * slope;
                }
            }
            gx.iter_mut().zip(&shares[0]).for_each(|(gx, share)| *gx = T::nearest(*share));
            for (sums, shares) in sums.iter_mut().zip(&shares[1..]) {
                for (sum, share) in sums.iter_mut().zip(shares) {
                    *sum += f64::from(*share);
                }
            }
        }
        sums.map(|lanes| lanes.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use candle_core::DType;
    use std::collections::BTreeSet;

    fn bits(bits: u32) -> Bits {
        Bits::new(bits).unwrap()
    }

    /// Computes the soft function of the module documentation with plain Candle; `inputs` are `x`,
    /// `(l, u)` and `α`.
    fn soft(inputs: &[Tensor], bits: Bits) -> candle_core::Result<Tensor> {
        let [x, bounds, alpha] = inputs else { panic!("x, bounds and softness") };
        let wide = |t: Tensor| t.broadcast_as(x.shape());
        let (low, high) = (wide(bounds.narrow(0, 0, 1)?)?, wide(bounds.narrow(0, 1, 1)?)?);
        let alpha = wide(alpha.clone())?;
        let count = f64::from(bits.max_level());
        let width = ((&high - &low)? / count)?;
        let scale = (alpha.affine(-1.0, 1.0))?.recip()?;
        let k = ((alpha.recip()? * 2.0)? - 1.0)?.log()?.div(&width)?;
        // The indices of the intervals are constants.
        let interval = ((x - &low)? / &width)?.floor()?.clamp(0.0, count - 1.0)?.detach();
        let middle = (&low + ((&interval + 0.5)? * &width)?)?;
        let phi = (scale * (k * (x - middle)?)?.tanh()?)?;
        let inside = (&low + (width * (interval + ((phi + 1.0)? * 0.5)?)?)?)?;
        x.lt(&low)?.where_cond(&low, &x.gt(&high)?.where_cond(&high, &inside)?)
    }

    #[track_caller]
    fn check_close(found: &Tensor, expected: &[f64], what: &str) {
        let expected: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
        assert_close(found, &tensor(&expected), 1e-6, what);
    }

    /// Checks two bits from 1 to 7: Δ = 2, middles 2, 4, 6, levels 1, 3, 5, 7.
    #[test]
    fn hand_worked_levels() {
        let x = tensor(&[-9.0, 1.0, 1.9, 2.0, 3.0, 3.9, 4.1, 5.9, 6.1, 7.0, 8.0]);
        let y = forward(&x, &tensor(&[1.0, 7.0]), bits(2)).unwrap();
        assert_eq!(elements(&y), [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 5.0, 5.0, 7.0, 7.0, 7.0]);
    }

    /// Checks the same intervals at α = 0.2: s = 5/4, κ = ln 9 = 2 ln 3. In the middle of an
    /// interval T = 0; at a quarter of it, f = −¼ and T = −tanh(½ ln 3) = −½.
    #[test]
    fn hand_worked_slopes() {
        let kappa = 9f64.ln();
        let middle = 0.5 * 1.25 * kappa;
        let quarter = middle * 0.75;
        // The tuples are x, D, q, t and ∂Q/∂α.
        // α(2 − α)/2 is 0.18, so ∂Q/∂α is ½Δs² T − ½Δs(1 − T²)f/0.18.
        let at_quarter = 1.5625 * -0.5 + 1.25 * 0.75 * 0.25 / 0.18;
        for (x, slope, level, at, by_softness) in [
            (4.0, middle, 1.5, 1.5, 0.0),
            (1.5, quarter, 0.5 * (1.0 - 1.25 * 0.5), 0.25, at_quarter),
            (5.5, quarter, 2.0 + 0.5 * (1.0 - 1.25 * 0.5), 2.25, at_quarter),
            (6.5, quarter, 2.0 + 0.5 * (1.0 + 1.25 * 0.5), 2.75, -at_quarter),
        ] {
            let (x, gy) = (tensor(&[x]), tensor(&[3.0]));
            let grads = backward(&x, &gy, &tensor(&[1.0, 7.0]), &tensor(&[0.2]), bits(2)).unwrap();
            let by_high = (level - slope * at) / 3.0;
            check_close(&grads.x, &[3.0 * slope], "∂x");
            check_close(&grads.bounds, &[3.0 * (1.0 - slope - by_high), 3.0 * by_high], "∂l, ∂u");
            check_close(&grads.softness, &[3.0 * by_softness], "∂α");
        }
        // Outside the bounds, only the bounds have gradients.
        let grads = backward(
            &tensor(&[0.0, 8.0, 0.5]),
            &tensor(&[1.0, 2.0, 4.0]),
            &tensor(&[1.0, 7.0]),
            &tensor(&[0.2]),
            bits(2),
        )
        .unwrap();
        assert_eq!(elements(&grads.x), [0.0; 3]);
        assert_eq!(elements(&grads.bounds), [5.0, 2.0]);
        assert_eq!(elements(&grads.softness), [0.0]);
    }

    /// Checks all gradients against those of the soft function by Candle's autograd and by finite
    /// differences.
    #[test]
    fn gradients_are_those_of_the_soft_function() {
        for b in [2, 4] {
            for softness in [0.01, 0.2, 0.45] {
                let (x, gy) = (random(1, &[3, 7, 5]), random(2, &[3, 7, 5]));
                let (bounds, alpha) = (tensor(&[-0.63, 0.71]), tensor(&[softness]));
                let grads = backward(&x, &gy, &bounds, &alpha, bits(b)).unwrap();
                let found = [&grads.x, &grads.bounds, &grads.softness];
                let reference = |inputs: &[Tensor]| soft(inputs, bits(b));
                assert_gradients(
                    &[&x, &bounds, &alpha],
                    &gy,
                    reference,
                    &found,
                    &format!("{b} bits, softness {softness}"),
                );
            }
        }
    }

    /// Checks that the soft and the hard value lie on the same side of every middle, and that they
    /// agree as the softness goes to 0.
    #[test]
    fn soft_values_become_hard_ones() {
        let (x, bounds) = (random(1, &[2000]), tensor(&[-0.8, 0.6]));
        let hard = elements(&forward(&x, &bounds, bits(3)).unwrap());
        let half = 0.5 * 1.4 / 7.0;
        let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let mut before = f64::INFINITY;
        for softness in [0.5, 0.2, 0.01, 1e-4] {
            let inputs = [double(&x), double(&bounds), double(&tensor(&[softness]))];
            let soft = elements(&soft(&inputs, bits(3)).unwrap());
            let errors = || hard.iter().zip(&soft).map(|(hard, soft)| (hard - soft).abs());
            assert!(errors().all(|error| error <= half + 1e-6), "softness {softness}");
            let mean = errors().sum::<f64>() / hard.len() as f64;
            assert!(mean < 0.9 * before, "softness {softness}: {mean} after {before}");
            before = mean;
        }
        assert!(before < 0.1 * half, "{before}");
    }

    #[test]
    fn levels_and_idempotence() {
        // So many values that none of the up to 256 levels is left out.
        let x = random(1, &[50_000]);
        for (low, high) in [(-0.3, 0.8), (0.11, 0.73), (-0.9, -0.2)] {
            let bounds = tensor(&[low, high]);
            for b in 2..=8 {
                let y = forward(&x, &bounds, bits(b)).unwrap();
                let levels: BTreeSet<u64> = elements(&y).iter().map(|y| y.to_bits()).collect();
                assert_eq!(levels.len(), 1 << b, "[{low}, {high}] at {b} bits");
                assert_eq!(elements(&forward(&y, &bounds, bits(b)).unwrap()), elements(&y));
            }
        }
    }

    /// Checks that a shift of `x` and both bounds shifts the value by the same amount:
    /// `∂x + ∂l + ∂u = ∂y`.
    #[test]
    fn gradients_of_a_shift_add_up() {
        let (x, gy) = (random(1, &[40_000]), random(2, &[40_000]));
        let grads = backward(&x, &gy, &tensor(&[-0.5, 0.7]), &tensor(&[0.3]), bits(4)).unwrap();
        let sum = |t: &Tensor| elements(t).iter().sum::<f64>();
        let (found, expected) = (sum(&grads.x) + sum(&grads.bounds), sum(&gy));
        assert!((found - expected).abs() < 1e-2, "{found} and not {expected}");
    }

    #[test]
    fn parameters_are_brought_back_in_place() {
        for (bounds, softness, expected) in [
            ([-1.0, 2.0], 0.3, ([-1.0, 2.0], 0.3)),
            ([2.0, 1.0], 0.7, ([1.5, 1.5], 0.5)),
            ([0.0, 0.0], -0.1, ([0.0, 0.0], 1e-4)),
        ] {
            let (bounds, softness) = (tensor(&bounds), tensor(&[softness]));
            project(&bounds, &softness).unwrap();
            assert_eq!(bounds.to_vec1::<f32>().unwrap(), expected.0);
            assert_eq!(softness.to_vec1::<f32>().unwrap(), [expected.1]);
        }
    }

    /// Checks that bounds that have met give one value and finite gradients, which part the bounds
    /// again.
    #[test]
    fn bounds_that_have_met_can_part_again() {
        let (x, gy) = (tensor(&[-1.0, 0.5, 2.0]), tensor(&[1.0, 2.0, 4.0]));
        let bounds = tensor(&[0.5, 0.5]);
        assert_eq!(elements(&forward(&x, &bounds, bits(4)).unwrap()), [0.5; 3]);
        let grads = backward(&x, &gy, &bounds, &tensor(&[0.2]), bits(4)).unwrap();
        let found = elements(&grads.bounds);
        assert!(found.iter().chain(&elements(&grads.softness)).all(|g| g.is_finite()), "{found:?}");
        assert!(found[1] >= 4.0, "{found:?}");
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let (x, bounds, softness) = (random(1, &[4]), tensor(&[0.0, 1.0]), tensor(&[0.2]));
        let message = forward(&x, &softness, bits(4)).unwrap_err().to_string();
        assert!(message.contains("dsq::forward") && message.contains("bounds"), "{message}");
        let message = backward(&x, &x, &bounds, &bounds, bits(4)).err().unwrap().to_string();
        assert!(message.contains("dsq::backward") && message.contains("softness"), "{message}");
    }

    #[test]
    fn same_bits_everywhere() {
        let (x, gy) = (random(1, &[300_001]), random(2, &[300_001]));
        let (bounds, softness) = (tensor(&[-0.4, 0.7]), tensor(&[0.2]));
        assert_same_everywhere(|| {
            let grads = backward(&x, &gy, &bounds, &softness, bits(4)).unwrap();
            vec![forward(&x, &bounds, bits(4)).unwrap(), grads.x, grads.bounds, grads.softness]
        });
    }
}
