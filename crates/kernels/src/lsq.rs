//! Learned step size quantization: LSQ (Esser et al. 2020, arXiv:1902.08153), and LSQ+ (Bhalgat et
//! al. 2020, arXiv:2004.09576), which adds a learned offset.
//!
//! With the step `s`, the offset `β` (0 in LSQ) and the levels from `−Q_N` to `Q_P`, the position
//! of a value is `p = (x − β)/s` and its quantized value is `y = s·clip(round(p), −Q_N, Q_P) + β`.
//! Unsigned levels, for the output of a ReLU and for LSQ+, have `Q_N = 0` and `Q_P = 2^b − 1`;
//! signed levels, for weights, have `Q_N = 2^(b−1)` and `Q_P = 2^(b−1) − 1`. Rounding has a
//! straight-through gradient, and everything else is differentiated:
//!
//! | where | `∂y/∂x` | `∂y/∂s` | `∂y/∂β` |
//! |---|---|---|---|
//! | `p ≤ −Q_N` | 0 | `−Q_N` | 1 |
//! | between | 1 | `round(p) − p` | 0 |
//! | `p ≥ Q_P` | 0 | `Q_P` | 1 |
//!
//! The gradients of `s` and `β` are multiplied by `g = 1/√(N·Q_P)`, so that their size relative to
//! `s` is about that of the weights' gradients relative to the weights (section 2.2 of LSQ). `N` is
//! the number of weights or, for activations, of features. Here it counts the features of one
//! image, so that `g` does not depend on the batch size; most public implementations count the
//! whole batch. LSQ+ does not say how it scales the gradient of `β`; here it gets the same `g`, as
//! in public code.
//!
//! The initial `s` is `2·mean|x|/√Q_P` ([`initial_step`]). With an offset, the initial levels span
//! the extremes instead ([`initial_step_and_offset`]). This is the plain initialization that LSQ+
//! states before its search for the least squared error, with room of 2⁻¹⁰ of a step on both sides,
//! so that rounding does not decide whether the extremes count as clipped. A step below
//! [`MIN_STEP`] counts as [`MIN_STEP`].

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open, simd};
use crate::elements::{Element, by_element};
use crate::learned::{LANES, Lanes, map_and_sum};
use crate::work::{CHUNK, fill, parts};
use crate::{Result, clamp, profiler, quantize};
use candle_core::Tensor;
use quant_core::Bits;

/// The smallest step, the same as in PyTorch's own learned quantizer. Its reciprocal is finite.
pub const MIN_STEP: f32 = f32::EPSILON;

/// A quantizer: its learned parameters and its levels.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// `s`, `[1]`.
    pub step: &'a Tensor,
    /// `β`, `[1]`; `None` for LSQ.
    pub offset: Option<&'a Tensor>,
    /// The bit width.
    pub bits: Bits,
    /// Whether the levels are signed.
    pub signed: bool,
}

/// The gradients; those of the step and the offset are multiplied by `g`.
pub struct Gradients {
    /// The gradient of the input, of its shape.
    pub x: Tensor,
    /// The gradient of `s`, `[1]`.
    pub step: Tensor,
    /// The gradient of `β`, `[1]`, if there is an offset.
    pub offset: Option<Tensor>,
}

/// Quantizes `x`.
pub fn forward(x: &Tensor, params: Params<'_>) -> Result<Tensor> {
    let check = Check("lsq::forward");
    let _note = profiler::note(check.0, 0, 2 * x.dtype().size_in_bytes() * x.elem_count());
    let x = check.map_float("x", x)?;
    params.check(&check)?;
    if crate::gpu::runs(x.device()) {
        return gpu::forward(&x, params);
    }
    let scale = Scale::of(params)?;
    by_element!(x.dtype(), T => {
        let opened = open(&x);
        let x: &[T] = opened.elements()?;
        cpu::tensor(fill(x.len(), CHUNK, |part, y| quantize(&x[part], y, &scale)), opened.dims())
    })
}

/// Computes the gradients; `items` is the `N` of `g`, the number of weights or of the features of
/// one image.
pub fn backward(x: &Tensor, gy: &Tensor, params: Params<'_>, items: usize) -> Result<Gradients> {
    let check = Check("lsq::backward");
    let _note = profiler::note(check.0, 0, 3 * x.dtype().size_in_bytes() * x.elem_count());
    let x = check.map_float("x", x)?;
    let gy = check.map_of("gy", gy, &x)?;
    params.check(&check)?;
    if items == 0 {
        return Err(check.setting("items is 0, expected the number of weights or features".into()));
    }
    let g = 1.0 / (items as f64 * f64::from(params.levels().1)).sqrt();
    if crate::gpu::runs(x.device()) {
        return gpu::backward(&x, &gy, params, g);
    }
    let scale = Scale::of(params)?;
    let sum = |sum: f64| cpu::tensor(vec![(g * sum) as f32], 1);
    by_element!(x.dtype(), T => {
        let (opened, gy) = (open(&x), open(&gy));
        let (x, gy): (&[T], _) = (opened.elements()?, gy.elements()?);
        let (gx, sums) = map_and_sum(x.len(), |part, gx| slopes(&x[part.clone()], &gy[part], gx, &scale));
        Ok(Gradients {
            x: cpu::tensor(gx, opened.dims())?,
            step: sum(sums[0])?,
            offset: params.offset.map(|_| sum(sums[1])).transpose()?,
        })
    })
}

/// Returns the initial step of LSQ, `2·mean|x|/√Q_P`, `[1]`.
pub fn initial_step(x: &Tensor, bits: Bits, signed: bool) -> Result<Tensor> {
    let check = Check("lsq::initial_step");
    let _note = profiler::note(check.0, 0, x.dtype().size_in_bytes() * x.elem_count());
    if x.elem_count() == 0 {
        return Err(check.shape("x", x, "at least one element"));
    }
    let x = check.map_float("x", x)?;
    let total = if crate::gpu::runs(x.device()) {
        gpu::magnitude(&x)?
    } else {
        by_element!(x.dtype(), T => {
            let opened = open(&x);
            let x: &[T] = opened.elements()?;
            let total: f64 = parts(x.len(), 1, |part| magnitude(&x[part])).iter().sum();
            cpu::tensor(vec![total as f32], 1)?
        })
    };
    let high = f64::from(levels(bits, signed).1);
    let step = (total * (2.0 / (x.elem_count() as f64 * high.sqrt())))?;
    project(&step)?;
    Ok(step)
}

/// The distance from each extreme to the outermost level at the start, as a fraction of the step.
const ROOM: f64 = 1.0 / 1024.0;

/// Returns the step and the offset, `[1]` each, with which unsigned levels span the extremes of
/// `x`.
pub fn initial_step_and_offset(x: &Tensor, bits: Bits) -> Result<(Tensor, Tensor)> {
    let extremes = quantize::min_max(x)?;
    let (low, high) = (extremes.narrow(0, 0, 1)?, extremes.narrow(0, 1, 1)?);
    let step = ((high - &low)? * (1.0 / (f64::from(levels(bits, false).1) - 2.0 * ROOM)))?;
    project(&step)?;
    let offset = (low - (&step * ROOM)?)?;
    Ok((step, offset))
}

/// Raises a step `[1]` below [`MIN_STEP`] to [`MIN_STEP`], in place; called before a training step
/// uses what the optimizer left.
pub fn project(step: &Tensor) -> Result<()> {
    let check = Check("lsq::project");
    check.dims("step", step, &[1])?;
    if crate::gpu::runs(step.device()) {
        return gpu::project(step);
    }
    cpu::update(&check, "step", step, [], |step, []| step[0] = positive(step[0]))
}

/// Returns a step, at least [`MIN_STEP`]; NaN stays NaN.
fn positive(step: f32) -> f32 {
    if step < MIN_STEP { MIN_STEP } else { step }
}

/// Returns the lowest and the highest level, `−Q_N` and `Q_P`.
fn levels(bits: Bits, signed: bool) -> (f32, f32) {
    let count = (bits.max_level() + 1) as f32;
    if signed { (-count / 2.0, count / 2.0 - 1.0) } else { (0.0, count - 1.0) }
}

impl Params<'_> {
    fn levels(&self) -> (f32, f32) {
        levels(self.bits, self.signed)
    }

    fn check(&self, check: &Check) -> Result<()> {
        check.dims("step", self.step, &[1])?;
        self.offset.map_or(Ok(()), |offset| check.dims("offset", offset, &[1]).map(drop))
    }
}

/// The numbers of a quantizer, as the kernels need them.
#[derive(Clone, Copy)]
struct Scale {
    step: f32,
    per_step: f32,
    offset: f32,
    /// `−Q_N` and `Q_P`.
    levels: (f32, f32),
}

impl Scale {
    fn of(params: Params<'_>) -> Result<Self> {
        let step = positive(cpu::values(params.step)?[0]);
        let offset = match params.offset {
            Some(offset) => cpu::values(offset)?[0],
            None => 0.0,
        };
        Ok(Self { step, per_step: 1.0 / step, offset, levels: params.levels() })
    }

    /// Returns `p`.
    #[inline(always)]
    fn position(&self, x: f32) -> f32 {
        (x - self.offset) * self.per_step
    }
}

simd! {
    fn quantize<T: Element>(x: &[T], y: &mut [T], scale: &Scale) {
        let scale = *scale;
        for (y, x) in y.iter_mut().zip(x) {
            let level = clamp(scale.position(x.float()).round_ties_even(), scale.levels);
            *y = T::nearest(level.mul_add(scale.step, scale.offset));
        }
    }
}

simd! {
    /// Writes the gradient of `x`, and returns the sums of the gradients of `s` and `β`.
    fn slopes<T: Element>(x: &[T], gy: &[T], gx: &mut [T], scale: &Scale) -> [f64; 2] {
        let scale = *scale;
        let (low, high) = scale.levels;
        let mut sums: [Lanes; 2] = [[0.0; LANES]; 2];
        let [by_step, by_offset] = &mut sums;
        for ((x, gy), gx) in x.chunks(LANES).zip(gy.chunks(LANES)).zip(gx.chunks_mut(LANES)) {
            let sums = by_step.iter_mut().zip(by_offset.iter_mut());
            for ((((by_step, by_offset), x), gy), gx) in sums.zip(x).zip(gy).zip(gx) {
                let position = scale.position(x.float());
                let slope = position.round_ties_even() - position;
                let slope = if position <= low { low } else { slope };
                let slope = if position >= high { high } else { slope };
                let clipped = position <= low || position >= high;
                *gx = if clipped { T::default() } else { *gy };
                let gy = gy.float();
                *by_step += f64::from(gy * slope);
                *by_offset += f64::from(if clipped { gy } else { 0.0 });
            }
        }
        sums.map(|lanes| lanes.iter().sum())
    }
}

simd! {
    /// Returns the sum of the absolute values.
    fn magnitude<T: Element>(x: &[T]) -> f64 {
        let mut sums: Lanes = [0.0; LANES];
        for x in x.chunks(LANES) {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += f64::from(x.float().abs());
            }
        }
        sums.iter().sum()
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

    /// Checks a case of two bits with step 2. The gradients of y are 1, 2, 4, …, so that every sum
    /// shows its terms. `by_step` holds the expected slopes of the step; the slopes of the offset
    /// follow from `gx`.
    #[track_caller]
    fn check(signed: bool, offset: Option<f32>, x: &[f32], y: &[f64], inside: &[bool], by_step: &[f64]) {
        let (step, offset) = (tensor(&[2.0]), offset.map(|offset| tensor(&[offset])));
        let params = Params { step: &step, offset: offset.as_ref(), bits: bits(2), signed };
        assert_eq!(elements(&forward(&tensor(x), params).unwrap()), y);
        let gy: Vec<f32> = (0..x.len()).map(|i| (1 << i) as f32).collect();
        // N·Q_P is 36·1 (signed) or 12·3, so g = 1/6.
        let items = if signed { 36 } else { 12 };
        let grads = backward(&tensor(x), &tensor(&gy), params, items).unwrap();
        let gy: Vec<f64> = gy.into_iter().map(f64::from).collect();
        let gx: Vec<f64> =
            gy.iter().zip(inside).map(|(gy, inside)| if *inside { *gy } else { 0.0 }).collect();
        assert_eq!(elements(&grads.x), gx);
        let expected: f64 = gy.iter().zip(by_step).map(|(gy, slope)| gy * slope).sum();
        assert_close(&grads.step, &tensor(&[(expected / 6.0) as f32]), 1e-6, "∂s");
        assert_eq!(grads.offset.is_some(), offset.is_some());
        if let Some(found) = grads.offset {
            let expected: f64 = gy.iter().zip(&gx).map(|(gy, gx)| gy - gx).sum();
            assert_close(&found, &tensor(&[(expected / 6.0) as f32]), 1e-6, "∂β");
        }
    }

    #[test]
    fn hand_worked_unsigned() {
        // Levels 0, 2, 4, 6; the ends count as clipped.
        check(
            false,
            None,
            &[-3.0, 0.0, 0.5, 1.5, 4.5, 6.0, 9.0],
            &[0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 6.0],
            &[false, false, true, true, true, false, false],
            &[0.0, 0.0, -0.25, 0.25, -0.25, 3.0, 3.0],
        );
    }

    #[test]
    fn hand_worked_signed() {
        // Levels −4, −2, 0, 2. A value from −5 to −4 rounds to the lowest level, but counts as
        // clipped.
        check(
            true,
            None,
            &[-9.0, -4.5, -3.5, -0.5, 0.5, 1.5, 2.0, 5.0],
            &[-4.0, -4.0, -4.0, 0.0, 0.0, 2.0, 2.0, 2.0],
            &[false, false, true, true, true, true, false, false],
            &[-2.0, -2.0, -0.25, 0.25, -0.25, 0.25, 1.0, 1.0],
        );
    }

    #[test]
    fn hand_worked_with_an_offset() {
        // Levels −3, −1, 1, 3.
        check(
            false,
            Some(-3.0),
            &[-8.0, -3.0, -2.5, -1.5, 0.5, 3.0, 4.0],
            &[-3.0, -3.0, -3.0, -1.0, 1.0, 3.0, 3.0],
            &[false, false, true, true, true, false, false],
            &[0.0, 0.0, -0.25, 0.25, 0.25, 3.0, 3.0],
        );
    }

    /// Checks all gradients, with plain Candle's autograd and with finite differences, against the
    /// function in which the change of a position by rounding is a constant.
    #[test]
    fn gradients_are_those_of_the_function_with_constant_rounding() {
        for (b, signed, offset) in
            [(2, false, None), (4, false, None), (2, true, None), (3, true, None), (3, false, Some(-0.4))]
        {
            let (x, gy) = (random(1, &[3, 7, 5]), random(2, &[3, 7, 5]));
            let step = tensor(&[1.1 / (1 << b) as f32]);
            let offset_tensor = tensor(&[offset.unwrap_or(0.0)]);
            let params =
                Params { step: &step, offset: offset.map(|_| &offset_tensor), bits: bits(b), signed };
            // One item makes g = 1/√Q_P, which `unscaled` divides out.
            let (low, high) = params.levels();
            let grads = backward(&x, &gy, params, 1).unwrap();
            let unscaled = |grad: &Tensor| (grad * f64::from(high).sqrt()).unwrap();

            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let position = |inputs: &[Tensor]| {
                let [x, step, offset] = inputs else { panic!("x, step and offset") };
                x.broadcast_sub(offset)?.broadcast_div(step)
            };
            let start = position(&[wide(&x), wide(&step), wide(&offset_tensor)]).unwrap();
            let rounding = (start.round().unwrap() - &start).unwrap();
            let reference = |inputs: &[Tensor]| {
                let p = position(inputs)?;
                let (lowest, highest) =
                    ((p.zeros_like()? + f64::from(low))?, (p.zeros_like()? + f64::from(high))?);
                let inside = (&p + &rounding)?;
                let level = start.le(f64::from(low))?.where_cond(&lowest, &inside)?;
                let level = start.ge(f64::from(high))?.where_cond(&highest, &level)?;
                level.broadcast_mul(&inputs[1])?.broadcast_add(&inputs[2])
            };
            let by_step = unscaled(&grads.step);
            let by_offset = grads.offset.as_ref().map(unscaled);
            let mut found = vec![&grads.x, &by_step];
            found.extend(&by_offset);
            let context = format!("{b} bits, signed: {signed}, offset: {offset:?}");
            assert_gradients(&[&x, &step, &offset_tensor], &gy, reference, &found, &context);
        }
    }

    #[test]
    fn levels_and_idempotence_at_every_width() {
        for b in 2..=8 {
            // Levels that all lie between −1 and 1.
            for (signed, offset, span) in [(false, None, 0.9), (true, None, 1.3), (false, Some(-0.7), 1.3)] {
                let (step, offset) =
                    (tensor(&[span / (1 << b) as f32]), offset.map(|offset| tensor(&[offset])));
                let params = Params { step: &step, offset: offset.as_ref(), bits: bits(b), signed };
                // More than a chunk, not a multiple of a vector, and so many values that no level
                // is left out.
                let y = forward(&random(1, &[3, 16_667]), params).unwrap();
                assert_eq!(y.dims(), [3, 16_667]);
                let levels: BTreeSet<u64> = elements(&y).iter().map(|y| (y + 0.0).to_bits()).collect();
                assert_eq!(levels.len(), 1 << b, "{b} bits, signed: {signed}");
                assert_eq!(elements(&forward(&y, params).unwrap()), elements(&y));
            }
        }
    }

    /// Checks small odd sizes, which leave partial vectors: each element by itself gives the same
    /// result.
    #[test]
    fn elements_do_not_depend_on_their_neighbours() {
        let (step, offset) = (tensor(&[0.13]), tensor(&[-0.6]));
        let params = Params { step: &step, offset: Some(&offset), bits: bits(3), signed: false };
        for len in [1, 2, 15, 17, 33] {
            let (x, gy) = (random(1, &[len]), random(2, &[len]));
            let (y, grads) = (forward(&x, params).unwrap(), backward(&x, &gy, params, 1).unwrap());
            let mut sums = [0.0; 2];
            for i in 0..len {
                let one = |t: &Tensor| t.narrow(0, i, 1).unwrap();
                let alone = backward(&one(&x), &one(&gy), params, 1).unwrap();
                assert_eq!(elements(&forward(&one(&x), params).unwrap()), elements(&one(&y)));
                assert_eq!(elements(&alone.x), elements(&one(&grads.x)));
                sums[0] += elements(&alone.step)[0];
                sums[1] += elements(&alone.offset.unwrap())[0];
            }
            assert_close(&grads.step, &tensor(&[sums[0] as f32]), 1e-6, "∂s");
            assert_close(&grads.offset.unwrap(), &tensor(&[sums[1] as f32]), 1e-6, "∂β");
        }
    }

    #[test]
    fn steps_begin_with_the_mean_or_the_extremes() {
        let x = tensor(&[-3.0, 1.0, 2.0, 6.0]);
        // 2·3/√Q_P, with Q_P 7 and 15.
        assert_close(
            &initial_step(&x, bits(4), true).unwrap(),
            &tensor(&[6.0 / 7f32.sqrt()]),
            1e-6,
            "signed",
        );
        assert_close(
            &initial_step(&x, bits(4), false).unwrap(),
            &tensor(&[6.0 / 15f32.sqrt()]),
            1e-6,
            "unsigned",
        );
        let (step, offset) = initial_step_and_offset(&x, bits(2)).unwrap();
        // Three steps, less the room on both sides.
        let expected = 9.0 / (3.0 - 1.0 / 512.0);
        assert_close(&step, &tensor(&[expected]), 1e-6, "step");
        assert_close(&offset, &tensor(&[-3.0 - expected / 1024.0]), 1e-6, "offset");
        let params = Params { step: &step, offset: Some(&offset), bits: bits(2), signed: false };
        assert_eq!(elements(&backward(&x, &x, params, 1).unwrap().x), elements(&x), "nothing is clipped");
        // More than one part of a sum.
        let x = random(1, &[300_001]);
        let mean = elements(&x).iter().map(|x| x.abs()).sum::<f64>() / 300_001.0;
        assert_close(&initial_step(&x, bits(2), true).unwrap(), &tensor(&[2.0 * mean as f32]), 1e-6, "large");
        // Constant values get the smallest step.
        let zeros = x.zeros_like().unwrap();
        assert_eq!(elements(&initial_step(&zeros, bits(4), false).unwrap()), [f64::from(MIN_STEP)]);
        let (step, offset) = initial_step_and_offset(&tensor(&[0.5; 3]), bits(4)).unwrap();
        assert_eq!((elements(&step), elements(&offset)), (vec![f64::from(MIN_STEP)], vec![0.5]));
    }

    #[test]
    fn steps_stay_positive() {
        for (step, expected) in [(0.3, 0.3), (0.0, MIN_STEP), (-2.0, MIN_STEP)] {
            let step = tensor(&[step]);
            project(&step).unwrap();
            assert_eq!(step.to_vec1::<f32>().unwrap(), [expected]);
        }
    }

    /// Checks that a step that has fallen to zero counts as the smallest step, with finite
    /// gradients, and can grow again.
    #[test]
    fn a_step_of_zero_can_grow_again() {
        let (x, gy) = (tensor(&[-1.0, 0.5, 2.0]), tensor(&[1.0, 2.0, -4.0]));
        let step = tensor(&[0.0]);
        let params = Params { step: &step, offset: None, bits: bits(2), signed: false };
        let least = f64::from(MIN_STEP);
        assert_eq!(elements(&forward(&x, params).unwrap()), [0.0, 3.0 * least, 3.0 * least]);
        let grads = backward(&x, &gy, params, 3).unwrap();
        // g = 1/√(3·3).
        assert_close(&grads.step, &tensor(&[(2.0 * 3.0 - 4.0 * 3.0) / 3.0]), 1e-6, "∂s");
    }

    #[test]
    fn what_is_no_number_shows() {
        let (x, step) = (tensor(&[f32::NAN, 1.0]), tensor(&[0.5]));
        let params = Params { step: &step, offset: None, bits: bits(4), signed: false };
        let y = elements(&forward(&x, params).unwrap());
        assert!(y[0].is_nan() && y[1] == 1.0, "{y:?}");
        assert!(elements(&backward(&x, &x, params, 2).unwrap().step)[0].is_nan());
        let step = tensor(&[f32::NAN]);
        project(&step).unwrap();
        let params = Params { step: &step, ..params };
        assert!(elements(&forward(&tensor(&[1.0]), params).unwrap())[0].is_nan());
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let (x, one, two) = (random(1, &[4]), tensor(&[1.0]), tensor(&[0.0, 1.0]));
        let params = Params { step: &one, offset: None, bits: bits(4), signed: true };
        let message = forward(&x, Params { step: &two, ..params }).unwrap_err().to_string();
        assert!(message.contains("lsq::forward") && message.contains("step"), "{message}");
        let message = forward(&x, Params { offset: Some(&two), ..params }).unwrap_err().to_string();
        assert!(message.contains("lsq::forward") && message.contains("offset"), "{message}");
        let message = backward(&x, &random(2, &[5]), params, 4).err().unwrap().to_string();
        assert!(message.contains("lsq::backward") && message.contains("gy"), "{message}");
        let message = backward(&x, &x, params, 0).err().unwrap().to_string();
        assert!(message.contains("lsq::backward") && message.contains("items"), "{message}");
        assert!(initial_step(&random(1, &[0]), bits(4), true).is_err());
    }

    #[test]
    fn same_bits_everywhere() {
        let (x, gy) = (random(1, &[300_001]), random(2, &[300_001]));
        let (step, offset) = (tensor(&[0.11]), tensor(&[-0.4]));
        assert_same_everywhere(|| {
            let mut all = vec![initial_step(&x, bits(4), true).unwrap()];
            for (signed, offset) in [(false, None), (true, None), (false, Some(&offset))] {
                let params = Params { step: &step, offset, bits: bits(4), signed };
                let grads = backward(&x, &gy, params, 300_001).unwrap();
                all.extend([forward(&x, params).unwrap(), grads.x, grads.step]);
                all.extend(grads.offset);
            }
            all
        });
    }
}
