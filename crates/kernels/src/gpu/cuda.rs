//! Launches on CUDA devices, through Candle's backend.

use super::{Factor, Launch, start};
use crate::ProductSizes;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::result::memcpy_dtod_async;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{DType, Error, Layout, Result, Tensor};
use std::ffi::c_void;

/// Appends a kernel to the device's stream.
pub(super) fn launch(launch: &Launch, device: &CudaDevice) -> Result<()> {
    // The prefix avoids a clash with the names of Candle's modules.
    let module = format!("pfq-{}", launch.module.name);
    let function = device.get_or_load_custom_func(&launch.kernel, &module, launch.module.ptx)?;
    let config = LaunchConfig {
        grid_dim: (launch.grid[0], launch.grid[1], 1),
        block_dim: (launch.block[0], launch.block[1], 1),
        shared_mem_bytes: 0,
    };
    let mut builder = function.builder();
    // The driver copies as many bytes from this address as the kernel's struct has.
    builder.arg(&launch.arguments.words[0]);
    // SAFETY: the launch lists the fields of the kernel's struct, and its grid fits the sizes of
    // the tensors. The emulation checks both in tests.
    #[allow(unsafe_code)]
    let launched = unsafe { builder.launch(config) };
    launched.w()?;
    Ok(())
}

/// Returns the device address of a contiguous tensor's first element. All work on the device is in
/// one stream, so no use needs to be recorded for other streams.
pub(super) fn address(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let (start, stream) = (start(layout)?, storage.device.cuda_stream());
    macro_rules! address {
        ($slice:expr, $size:expr) => {
            $slice.device_ptr(&stream).0 + (start * $size) as u64
        };
    }
    Ok(match &storage.slice {
        CudaStorageSlice::U8(slice) => address!(slice, 1),
        CudaStorageSlice::U32(slice) => address!(slice, 4),
        CudaStorageSlice::BF16(slice) => address!(slice, 2),
        CudaStorageSlice::F32(slice) => address!(slice, 4),
        CudaStorageSlice::F64(slice) => address!(slice, 8),
        _ => candle_core::bail!("a GPU kernel cannot read this dtype"),
    })
}

/// See [`super::expect_one_stream`].
pub(super) fn expect_one_stream(device: &CudaDevice) {
    // SAFETY: all work on the device is in one stream, because nothing here makes another one, so
    // there are no streams to synchronize.
    #[allow(unsafe_code)]
    unsafe {
        device.disable_event_tracking();
    }
}

/// Copies bytes between two addresses on the device, for any dtype. Candle copies `bf16` with
/// kernels that it leaves out of builds for GPUs before compute capability 8.0.
///
/// # Safety
/// There must be memory of this size at both addresses. Memory is freed in the order of the stream,
/// so it may be freed before the copy has run.
#[allow(unsafe_code)]
pub(super) unsafe fn copy(device: &CudaDevice, to: u64, from: u64, bytes: usize) -> Result<()> {
    let stream = device.cuda_stream();
    // SAFETY: the caller guarantees the memory.
    unsafe { memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.w()
}

/// See [`super::Graph::record`].
pub(super) fn record<E: From<Error>>(
    device: &CudaDevice,
    work: impl FnOnce() -> std::result::Result<(), E>,
) -> std::result::Result<CudaGraph, E> {
    let stream = device.cuda_stream();
    // Calls by other threads do not affect the capture.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let done = work();
    // Dropping tensors can leave an error that the next call would return. It is taken here,
    // because the next call must end the capture in any case.
    let dropped = stream.context().check_err();
    // Memory that a library allocates during the capture and never frees is freed when the graph is
    // launched again.
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    done?;
    dropped.w()?;
    Ok(graph.w()?.ok_or_else(|| Error::Msg("the driver gave no graph".into()).bt())?)
}

/// See [`super::Graph::launch`].
pub(super) fn replay(graph: &CudaGraph) -> Result<()> {
    graph.launch().w()
}

/// Returns whether cuBLAS has products of `bf16` on this GPU.
pub(super) fn multiplies_bf16(device: &CudaDevice) -> Result<bool> {
    let (major, _) = device.cuda_stream().context().compute_capability().w()?;
    Ok(major >= 8)
}

/// Computes `c = alpha·a·b` with cuBLAS. See [`super::product::product`].
pub(super) fn product(
    device: &CudaDevice,
    a: Factor<'_>,
    b: Factor<'_>,
    alpha: Option<&Tensor>,
    c: &Tensor,
    ProductSizes { rows, columns, depth }: ProductSizes,
) -> crate::Result<()> {
    let operation = |factor: &Factor<'_>| match factor {
        Factor::Plain(_) => sys::cublasOperation_t::CUBLAS_OP_N,
        Factor::Transposed(_) => sys::cublasOperation_t::CUBLAS_OP_T,
    };
    let kind = |tensor: &Tensor| match tensor.dtype() {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let (a_stored, b_stored) = (a.tensor(), b.tensor());
    let tf32 = a_stored.dtype() == DType::F32 && candle_core::cuda::gemm_reduced_precision_f32();
    let compute = if tf32 {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    let (one, zero) = (1f32, 0f32);
    let on_device = alpha.is_some();
    let (alpha, beta): (*const c_void, *const c_void) = match alpha {
        Some(factors) => {
            let address = super::address(factors)?;
            (address as *const c_void, (address + 4) as *const c_void)
        }
        None => ((&raw const one).cast(), (&raw const zero).cast()),
    };
    let [m, n, k] = [rows, columns, depth].map(|size| size as i32);
    let [a_row, b_row] = [a_stored, b_stored].map(|tensor| tensor.dims()[1] as i32);
    let (a_at, b_at, c_at) = (super::address(a_stored)?, super::address(b_stored)?, super::address_mut(c)?);
    let blas = device.cublas_handle();
    let handle = *blas.handle();
    // SAFETY: cuBLAS is column-major and sees our row-major matrices transposed, so the call
    // computes `cᵀ=bᵀ·aᵀ`. The tensors are on this device and have these sizes; memory is freed in
    // the order of the stream, so they outlive the call.
    #[allow(unsafe_code)]
    unsafe {
        if on_device {
            sys::cublasSetPointerMode_v2(handle, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE)
                .result()
                .w()?;
        }
        let done = result::gemm_ex(
            handle,
            operation(&b),
            operation(&a),
            n,
            m,
            k,
            alpha,
            b_at as *const c_void,
            kind(b_stored),
            b_row,
            a_at as *const c_void,
            kind(a_stored),
            a_row,
            beta,
            c_at as *mut c_void,
            kind(c),
            n,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        );
        if on_device {
            // Candle's own products expect their factors on the host.
            sys::cublasSetPointerMode_v2(handle, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_HOST)
                .result()
                .w()?;
        }
        done.w()?;
    }
    Ok(())
}
