//! Stochastic gradient descent with momentum and weight decay, in place, by PyTorch's convention:
//! `v ← m·v + (g + λ·p)`, then `p ← p − lr·v`.

mod gpu;

use crate::cpu::{self, Check};
use crate::{Result, profile};
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor};

/// What a step does to every parameter.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Learning rate.
    pub lr: f64,
    /// Momentum `m`, 0 … 1.
    pub momentum: f64,
}

/// A parameter with its gradient, all three of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Changed in place.
    pub param: &'a Tensor,
    /// Of the loss.
    pub grad: &'a Tensor,
    /// Changed in place; begins as zeros.
    pub velocity: &'a Tensor,
    /// Weight decay `λ`.
    pub weight_decay: f64,
}

/// One step for one parameter; all three tensors have its shape. Changes `velocity` (which begins as
/// zeros) and `param` in place.
pub fn step(
    param: &Tensor,
    grad: &Tensor,
    velocity: &Tensor,
    lr: f64,
    momentum: f64,
    weight_decay: f64,
) -> Result<()> {
    step_all(&[Update { param, grad, velocity, weight_decay }], Rule { lr, momentum })
}

/// One step for many parameters: on a GPU in a few launches.
pub fn step_all(updates: &[Update<'_>], rule: Rule) -> Result<()> {
    let check = Check("sgd::step");
    let _note = profile::note(check.0, 0, 28 * updates.iter().map(|u| u.param.elem_count()).sum::<usize>());
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
    for Update { param, grad, velocity, weight_decay } in updates {
        let accumulate = Accumulate { momentum: rule.momentum as f32, weight_decay: weight_decay as f32 };
        velocity.inplace_op3(grad, param, &accumulate)?;
        param.inplace_op2(velocity, &Descend { lr: rule.lr as f32 })?;
    }
    Ok(())
}

/// `v ← m·v + (g + λ·p)`.
struct Accumulate {
    momentum: f32,
    weight_decay: f32,
}

impl InplaceOp3 for Accumulate {
    fn name(&self) -> &'static str {
        "sgd-accumulate"
    }

    fn cpu_fwd(
        &self,
        velocity: &mut CpuStorage,
        velocity_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
        param: &CpuStorage,
        param_layout: &Layout,
    ) -> candle_core::Result<()> {
        let velocity = cpu::slice_mut(velocity, velocity_layout)?;
        let (grad, param) = (cpu::slice(grad, grad_layout)?, cpu::slice(param, param_layout)?);
        cpu::change(velocity, |start, velocity| {
            for ((v, g), p) in velocity.iter_mut().zip(&grad[start..]).zip(&param[start..]) {
                *v = self.momentum * *v + (g + self.weight_decay * p);
            }
        });
        Ok(())
    }
}

/// `p ← p − lr·v`.
struct Descend {
    lr: f32,
}

impl InplaceOp2 for Descend {
    fn name(&self) -> &'static str {
        "sgd-descend"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        velocity: &CpuStorage,
        velocity_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (param, velocity) =
            (cpu::slice_mut(param, param_layout)?, cpu::slice(velocity, velocity_layout)?);
        cpu::change(param, |start, param| {
            for (p, v) in param.iter_mut().zip(&velocity[start..]) {
                *p -= self.lr * v;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn matches_plain_candle_over_several_steps() {
        // Below and above the size where threads are used.
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
        // One tensor as both.
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
