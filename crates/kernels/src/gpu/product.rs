//! Matrix products on a GPU, with cuBLAS.
//!
//! Sums are `f32` for operands of any dtype. Products of `f32` are as exact as on the CPU, unless
//! [`set_tf32`] allows tensor cores to round their operands to 10 bits.

use super::{Factor, empty};
use crate::{ProductSizes, Result};
use candle_core::{DType, Device, Tensor};

/// Sets whether products of `f32` may round their operands to TF32 (10 bits of precision), on GPUs
/// that have it.
///
/// The setting applies to the whole program and is off at first. It has no effect on the CPU.
pub fn set_tf32(on: bool) {
    candle_core::cuda::set_gemm_reduced_precision_f32(on);
}

/// Returns whether a device has products of `bf16`. GPUs have them from compute capability 8.0 on.
pub(crate) fn multiplies_bf16(device: &Device) -> Result<bool> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(super::cuda::multiplies_bf16(device)?),
        _ => Ok(true),
    }
}

/// Returns `alpha·a·b` in dtype `out`. Both operands are contiguous and have the same dtype, `f32`
/// or `bf16`.
///
/// `alpha` is a tensor `[alpha, 0]`, because its value follows from quantization ranges, which are
/// on the device. Without it the factor is 1.
pub(crate) fn product(a: Factor<'_>, b: Factor<'_>, alpha: Option<&Tensor>, out: DType) -> Result<Tensor> {
    let ((rows, depth), (_, columns)) = (a.size()?, b.size()?);
    let sizes = ProductSizes { rows, columns, depth };
    let device = a.tensor().device();
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device_of_cuda) => {
            let c = empty((rows, columns), out, device)?;
            super::cuda::product(device_of_cuda, a, b, alpha, &c, sizes)?;
            Ok(c)
        }
        // The emulation uses Candle, whose sums are f32 too.
        _ => {
            let _ = sizes;
            let matrix = |factor: Factor<'_>| {
                let matrix = factor.tensor().to_dtype(DType::F32)?;
                match factor {
                    Factor::Plain(_) => Ok(matrix),
                    Factor::Transposed(_) => matrix.t()?.contiguous(),
                }
            };
            let c = matrix(a)?.matmul(&matrix(b)?)?;
            let c = match alpha {
                Some(alpha) => c.broadcast_mul(&alpha.narrow(0, 0, 1)?)?,
                None => c,
            };
            let written = empty((rows, columns), out, device)?;
            written.slice_set(&c.to_dtype(out)?, 0, 0)?;
            Ok(written)
        }
    }
}
