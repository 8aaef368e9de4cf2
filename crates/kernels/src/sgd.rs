//! Stochastic gradient descent with momentum and weight decay, in place, in PyTorch's convention:
//! `v ← m·v + (g + λ·p)`, then `p ← p − lr·v`.

mod gpu;

use crate::check::Check;
use crate::work::change;
use crate::{Result, cpu, profiler};
use candle_core::Tensor;

/// The settings of a step that all parameters share.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// The learning rate.
    pub lr: Rate<'a>,
    /// The momentum `m`, 0 … 1.
    pub momentum: f64,
}

/// A learning rate.
#[derive(Clone, Copy, Debug)]
pub enum Rate<'a> {
    /// A number that the host knows.
    Number(f64),
    /// A tensor, `f32` `[1]`, whose value is read when the step runs. A recorded step reads it on
    /// each replay.
    At(&'a Tensor),
}

impl Rate<'_> {
    fn read(self) -> Result<f32> {
        match self {
            Self::Number(rate) => Ok(rate as f32),
            Self::At(tensor) => Ok(tensor.to_vec1::<f32>()?[0]),
        }
    }
}

/// A parameter with its gradient and velocity, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The parameter; changed in place.
    pub param: &'a Tensor,
    /// The gradient of the loss.
    pub grad: &'a Tensor,
    /// The velocity, initially zeros; changed in place.
    pub velocity: &'a Tensor,
    /// The weight decay `λ`.
    pub weight_decay: f64,
}

/// Makes one step for one parameter; all three tensors have its shape. Changes `velocity`
/// (initially zeros) and `param` in place.
pub fn step(
    param: &Tensor,
    grad: &Tensor,
    velocity: &Tensor,
    lr: f64,
    momentum: f64,
    weight_decay: f64,
) -> Result<()> {
    step_all(&[Update { param, grad, velocity, weight_decay }], Rule { lr: Rate::Number(lr), momentum })
}

/// Makes one step for many parameters, on a GPU in a few launches.
pub fn step_all(updates: &[Update<'_>], rule: Rule<'_>) -> Result<()> {
    let check = Check("sgd::step");
    if let Rate::At(rate) = rule.lr {
        check.dims("rate", rate, &[1])?;
    }
    let _note = profiler::note(check.0, 0, 28 * updates.iter().map(|u| u.param.elem_count()).sum::<usize>());
    let mut grads = Vec::with_capacity(updates.len());
    for Update { param, grad, velocity, .. } in updates {
        grads.push(check.dims("grad", grad, param.dims())?);
        for (argument, tensor) in [("param", param), ("velocity", velocity)] {
            check.dims(argument, tensor, param.dims())?;
            if !tensor.is_contiguous() {
                return Err(check.setting(format!("{argument} is changed in place and must be contiguous")));
            }
        }
    }
    let updates: Vec<Update<'_>> =
        updates.iter().zip(&grads).map(|(update, grad)| Update { grad, ..*update }).collect();
    if updates.first().is_some_and(|update| crate::gpu::runs(update.param.device())) {
        return gpu::step(&updates, rule);
    }
    let lr = rule.lr.read()?;
    for Update { param, grad, velocity, weight_decay } in updates {
        let (momentum, decay) = (rule.momentum as f32, weight_decay as f32);
        cpu::update(&check, "velocity", velocity, [grad, param], |velocity, [grad, param]| {
            change(velocity, &|part, velocity| {
                for ((v, g), p) in velocity.iter_mut().zip(&grad[part.clone()]).zip(&param[part]) {
                    *v = momentum * *v + (g + decay * p);
                }
            });
        })?;
        cpu::update(&check, "param", param, [velocity], |param, [velocity]| {
            change(param, &|part, param| {
                for (p, v) in param.iter_mut().zip(&velocity[part]) {
                    *p -= lr * v;
                }
            });
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn matches_plain_candle_over_several_steps() {
        // Sizes below and above the one from which threads are used.
        for dims in [&[3, 3, 7][..], &[300, 123]] {
            let (param, velocity) = (random(1, dims), random(2, dims).zeros_like().unwrap());
            let (mut p, mut v) = (param.copy().unwrap(), velocity.copy().unwrap());
            for seed in 10..14 {
                let grad = random(seed, dims);
                step(&param, &grad, &velocity, 0.1, 0.9, 4e-3).unwrap();
                v = ((v * 0.9).unwrap() + (&grad + (&p * 4e-3).unwrap()).unwrap()).unwrap();
                p = (p - (&v * 0.1).unwrap()).unwrap();
            }
            assert_close(&param, &p, 1e-6, "param");
            assert_close(&velocity, &v, 1e-6, "velocity");
        }
    }

    #[test]
    fn arguments_that_cannot_be_changed_in_place_are_errors() {
        let (a, b) = (random(1, &[4, 3]), random(2, &[4, 3]));
        assert!(step(&a, &b, &random(3, &[3, 4]), 0.1, 0.9, 0.0).is_err());
        let message = step(&a, &b, &random(3, &[3, 4]).t().unwrap(), 0.1, 0.9, 0.0).unwrap_err().to_string();
        assert!(message.contains("velocity is changed in place"), "{message}");
        // One tensor as parameter and velocity.
        assert!(step(&a, &b, &a, 0.1, 0.9, 0.0).is_err());
    }

    #[test]
    fn threads_do_not_change_the_result() {
        assert_same_on_threads(|| {
            let (param, velocity) = (random(1, &[100_003]), random(2, &[100_003]));
            step(&param, &random(3, &[100_003]), &velocity, 0.1, 0.9, 1e-4).unwrap();
            vec![param, velocity]
        });
    }
}
