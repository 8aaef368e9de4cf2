//! The bias of a classifier: `y[n,k] = x[n,k] + b[k]`, so `∂b[k] = Σ_n ∂y[n,k]`.
//!
//! On the CPU these are Candle's operations. On a GPU, Candle's operations copy the tensor shapes
//! to the device on each call, and the driver may wait for these copies. So this module has its own
//! kernels.

mod gpu;

use crate::check::Check;
use crate::{Result, profiler};
use candle_core::{D, Tensor};

/// Adds `bias[K]` to each row of `x[N, K]`.
///
/// # Errors
/// Returns an error if a shape is wrong or a dtype is not `F32`.
pub fn add(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let check = Check("bias::add");
    let classes = match x.dims() {
        &[n, k] if n > 0 && k > 0 => k,
        _ => return Err(check.shape("x", x, "[images, classes]")),
    };
    let _note = profiler::note(check.0, 0, 8 * x.elem_count() + 4 * classes);
    let (x, bias) = (check.float("x", x)?, check.dims("bias", bias, &[classes])?);
    if crate::gpu::runs(x.device()) { gpu::add(&x, &bias) } else { Ok(x.broadcast_add(&bias)?) }
}

/// Computes the gradient of the bias, `[K]`, from the gradient of the sums, `[N, K]`.
///
/// # Errors
/// Returns an error if a shape is wrong or a dtype is not `F32`.
pub fn gradient(gy: &Tensor) -> Result<Tensor> {
    let check = Check("bias::gradient");
    if gy.rank() != 2 || gy.elem_count() == 0 {
        return Err(check.shape("gy", gy, "[images, classes]"));
    }
    let _note = profiler::note(check.0, 0, 4 * gy.elem_count() + 4 * gy.dim(D::Minus1)?);
    let gy = check.float("gy", gy)?;
    if crate::gpu::runs(gy.device()) { gpu::gradient(&gy) } else { Ok(gy.sum(0)?) }
}
