//! The 1×1 convolution: in NHWC a matrix product, done by the `gemm` crate on the CPU and by cuBLAS on CUDA.
//!
//! With the rows `m` running over all positions of all images, `y[m,o] = Σ_i x[m,i]·w[i,o]`, so
//! `∂x[m,i] = Σ_o ∂y[m,o]·w[i,o]` and `∂w[i,o] = Σ_m x[m,i]·∂y[m,o]`. Linear layers are the same
//! operation.

use crate::Result;
use crate::cpu::{self, Check};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

/// `x[…, Cin] · w[Cin, Cout]`, of shape `[…, Cout]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::forward");
    let (rows, inputs) = check.rows("x", x)?;
    let outputs = outputs(&check, w, inputs)?;
    let y = matmul(&check.float("x", x)?.reshape((rows, inputs))?, &check.float("w", w)?)?;
    Ok(y.reshape(with_channels(x, outputs))?)
}

/// The gradient of the input: `∂y[…, Cout] · wᵀ`, of shape `[…, Cin]`.
pub fn grad_input(gy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::grad_input");
    let (rows, outputs) = check.rows("gy", gy)?;
    let inputs = match w.dims() {
        &[inputs, found] if found == outputs => inputs,
        _ => return Err(check.shape("w", w, format!("[input channels, {outputs}]"))),
    };
    let gx = matmul(&check.float("gy", gy)?.reshape((rows, outputs))?, &check.float("w", w)?.t()?)?;
    Ok(gx.reshape(with_channels(gy, inputs))?)
}

/// The gradient of the weight: `xᵀ · ∂y`, of shape `[Cin, Cout]`.
pub fn grad_weight(x: &Tensor, gy: &Tensor) -> Result<Tensor> {
    let check = Check("pointwise::grad_weight");
    let (rows, inputs) = check.rows("x", x)?;
    let (found, outputs) = check.rows("gy", gy)?;
    if found != rows {
        return Err(check.shape("gy", gy, format!("{rows} rows")));
    }
    let x = check.float("x", x)?.reshape((rows, inputs))?;
    let gy = check.float("gy", gy)?.reshape((rows, outputs))?;
    matmul(&x.t()?, &gy)
}

/// `a[m, k] · b[k, n]`; transposed views are read as they are.
fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { Ok(a.apply_op2_no_bwd(b, &MatMul)?) } else { Ok(a.matmul(b)?) }
}

/// What Candle's product does on the CPU, but for the result's memory: Candle zeroes it first, on one
/// thread, which took a seventh of a training step.
struct MatMul;

impl CustomOp2 for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((m, k), (inner, n)) = (a_layout.shape().dims2()?, b_layout.shape().dims2()?);
        if k != inner {
            candle_core::bail!("matmul: {:?} by {:?}", a_layout.shape(), b_layout.shape());
        }
        let (a, b) = (
            &a.as_slice::<f32>()?[a_layout.start_offset()..],
            &b.as_slice::<f32>()?[b_layout.start_offset()..],
        );
        let stride = |layout: &Layout, dim: usize| layout.stride()[dim] as isize;
        let mut y: Vec<f32> = Vec::with_capacity(m * n);
        // As many as Candle uses.
        let threads = gemm::Parallelism::Rayon(candle_core::utils::get_num_threads());
        // SAFETY: the layouts are those of valid tensors over these slices, so every element that the
        // product reads is in bounds. It writes all m·n elements of `y`, and reads none (`false`).
        #[allow(unsafe_code)]
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                stride(a_layout, 1),
                stride(a_layout, 0),
                b.as_ptr(),
                stride(b_layout, 1),
                stride(b_layout, 0),
                0.0,
                1.0,
                false,
                false,
                false,
                threads,
            );
            y.set_len(m * n);
        }
        cpu::output(y, (m, n))
    }
}

fn outputs(check: &Check, w: &Tensor, inputs: usize) -> Result<usize> {
    match w.dims() {
        &[found, outputs] if found == inputs => Ok(outputs),
        _ => Err(check.shape("w", w, format!("[{inputs}, output channels]"))),
    }
}

/// The dimensions of a tensor with another number of channels.
fn with_channels(x: &Tensor, channels: usize) -> Vec<usize> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = channels;
    }
    dims
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn forward_and_gradients_match_the_reference() {
        for (n, h, w) in MAPS {
            for (inputs, outputs) in [(1, 3), (7, 1), (16, 33), (33, 7)] {
                let context = format!("{n}×{h}×{w}, {inputs} to {outputs}");
                let (x, weight) = (random(1, &[n, h, w, inputs]), random(2, &[inputs, outputs]));
                let reference = |inputs: &[Tensor]| inputs[0].broadcast_matmul(&inputs[1]);
                let expected = reference(&[x.clone(), weight.clone()]).unwrap();
                assert_close(&forward(&x, &weight).unwrap(), &expected, 1e-6, &context);
                let gy = random(3, expected.dims());
                let (gx, gw) = (grad_input(&gy, &weight).unwrap(), grad_weight(&x, &gy).unwrap());
                assert_gradients(&[&x, &weight], &gy, reference, &[&gx, &gw], &context);
            }
        }
    }

    /// Candle cuts a product for all of the machine's cores, whatever the pool, so this varies only who
    /// computes a piece. (gemm never splits the sum over `k`, so the cut does not matter either.)
    #[test]
    fn threads_do_not_change_the_result() {
        for (rows, inputs, outputs) in [(20_000, 24, 33), (1000, 160, 320)] {
            let (x, w, gy) =
                (random(1, &[rows, inputs]), random(2, &[inputs, outputs]), random(3, &[rows, outputs]));
            assert_same_on_threads(|| {
                vec![forward(&x, &w).unwrap(), grad_input(&gy, &w).unwrap(), grad_weight(&x, &gy).unwrap()]
            });
        }
    }

    #[test]
    fn wrong_shapes_are_errors_that_name_the_argument() {
        let (x, w) = (random(1, &[2, 3, 5]), random(2, &[4, 6]));
        let message = forward(&x, &w).unwrap_err().to_string();
        assert_eq!(message, "pointwise::forward: w has shape [4, 6], expected [5, output channels]");
        assert!(grad_input(&x, &w).is_err());
        assert!(grad_weight(&x, &random(3, &[5, 4])).is_err());
    }
}
