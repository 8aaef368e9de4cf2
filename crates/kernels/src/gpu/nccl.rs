//! Sums over the GPUs of several processes, with NVIDIA's NCCL.
//!
//! The library `libnccl.so.2` is loaded at its first use, so that programs can be built and run
//! without it. (cudarc has a binding of NCCL, but Candle makes cudarc link all its libraries when a
//! program is built.)

// This module calls the functions of a C library.
#![allow(unsafe_code)]

use super::{address, address_mut, empty};
use crate::check::Check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

const CHECK: Check = Check("nccl");

/// The name of a group of processes. The first process makes it and sends it to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Id(pub [u8; 128]);

/// NCCL's `ncclResult_t`.
type Status = c_int;
/// NCCL's `ncclComm_t`.
type Handle = *mut c_void;

/// NCCL's `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The functions that are called. Their declarations are the same in all 2.x versions of the
/// library.
struct Library {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    unique_id: unsafe extern "C" fn(*mut Id) -> Status,
    init_rank: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> Status,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status,
    async_error: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    abort: unsafe extern "C" fn(Handle) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
}

impl Library {
    fn load() -> std::result::Result<Self, libloading::Error> {
        // SAFETY: loading NCCL has no side effects, and its functions have these signatures. It is
        // never unloaded.
        unsafe {
            let library = Box::leak(Box::new(libloading::Library::new("libnccl.so.2")?));
            Ok(Self {
                version: *library.get(b"ncclGetVersion")?,
                unique_id: *library.get(b"ncclGetUniqueId")?,
                init_rank: *library.get(b"ncclCommInitRank")?,
                all_reduce: *library.get(b"ncclAllReduce")?,
                async_error: *library.get(b"ncclCommGetAsyncError")?,
                abort: *library.get(b"ncclCommAbort")?,
                error_string: *library.get(b"ncclGetErrorString")?,
            })
        }
    }

    fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let found = LIBRARY.get_or_init(|| Self::load().map_err(|error| error.to_string()));
        found.as_ref().map_err(|error| {
            CHECK.setting(format!(
                "NCCL can't be loaded ({error}): expected libnccl.so.2, of NVIDIA's package libnccl2, where the system \
                 looks for libraries (LD_LIBRARY_PATH)"
            ))
        })
    }

    /// Returns an error if a call has failed.
    fn done(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library returns a static string for any status.
        let meaning = unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy();
        Err(CHECK
            .setting(format!("{call}: {meaning} ({status}); with NCCL_DEBUG=WARN the library says more")))
    }
}

impl Id {
    /// Makes a name that no other group has.
    ///
    /// # Errors
    /// Returns an error if the library cannot be loaded or cannot make a name.
    pub fn new() -> Result<Self> {
        let (library, mut id) = (Library::get()?, Self([0; 128]));
        // SAFETY: `id` has the 128 bytes that the library writes.
        library.done("ncclGetUniqueId", unsafe { (library.unique_id)(&raw mut id) })?;
        Ok(id)
    }
}

/// This process as a member of a group in which each process has a GPU of its own.
pub struct Communicator {
    library: &'static Library,
    handle: Handle,
    device: Device,
}

// SAFETY: the handle is not bound to a thread. Other threads call only `failure`, which NCCL allows
// during another call.
unsafe impl Send for Communicator {}
// SAFETY: other threads call only `failure`, as for `Send`.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Joins a group of `size` processes as number `rank`, with the GPU `device`. Waits until all
    /// processes have joined.
    ///
    /// # Errors
    /// Returns an error if the library cannot be loaded or cannot connect the GPUs. It refuses two
    /// processes on one GPU.
    pub fn join(id: Id, rank: usize, size: usize, device: &Device) -> Result<Self> {
        // The library uses the thread's current context. This call makes it the context of
        // `device`.
        device.synchronize()?;
        let (library, mut handle) = (Library::get()?, std::ptr::null_mut());
        // SAFETY: `handle` is a place for the result, and the group's name is passed by value.
        let status = unsafe { (library.init_rank)(&raw mut handle, size as c_int, id, rank as c_int) };
        library.done("ncclCommInitRank", status)?;
        Ok(Self { library, handle, device: device.clone() })
    }

    /// Returns the library's version, for example 22703 for 2.27.3.
    pub fn version(&self) -> usize {
        let mut version = 0;
        // SAFETY: `version` is a place for the result.
        unsafe { (self.library.version)(&raw mut version) };
        version as usize
    }

    /// Returns the sums of a tensor over all processes.
    ///
    /// Each process gives a contiguous `f32` tensor with the same number of elements, on its GPU.
    /// The call waits neither for the device nor for the other processes: the sums are ordered in
    /// the device's stream before any later work that reads them.
    ///
    /// # Errors
    /// Returns an error for any other tensor, and for a problem that the library detects at once.
    /// [`Communicator::failure`] reports what the library detects later.
    pub fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        let Device::Cuda(device) = tensor.device() else {
            return Err(CHECK.setting(format!("a tensor on {:?}: expected a GPU", tensor.device())));
        };
        if !tensor.device().same_device(&self.device) || tensor.dtype() != DType::F32 {
            let (found, on) = (tensor.dtype(), tensor.device());
            return Err(CHECK.setting(format!("{found:?} on {on:?}: expected F32 on {:?}", self.device)));
        }
        let sums = empty(tensor.shape(), DType::F32, tensor.device())?;
        let (from, to, count) = (address(tensor)?, address_mut(&sums)?, tensor.elem_count());
        let stream = device.cuda_stream().cu_stream();
        // SAFETY: both tensors have `count` floats on the device; memory is freed in the order of
        // its stream, so they outlive the call.
        let status = unsafe {
            let (from, to) = (from as *const c_void, to as *mut c_void);
            (self.library.all_reduce)(from, to, count, FLOAT32, SUM, self.handle, stream.cast())
        };
        self.library.done("ncclAllReduce", status)?;
        Ok(sums)
    }

    /// Returns an error if something has failed since: sums that were started will then not arrive.
    /// Any thread may call this.
    pub fn failure(&self) -> Option<Error> {
        let mut found = 0;
        // SAFETY: `found` is a place for the result.
        let status = unsafe { (self.library.async_error)(self.handle, &raw mut found) };
        let all = [("ncclCommGetAsyncError", status), ("the sum of the GPUs", found)];
        // The status of an asynchronous call that is still running.
        const IN_PROGRESS: Status = 7;
        let failed = all.into_iter().filter(|(_, status)| *status != IN_PROGRESS);
        failed.map(|(call, status)| self.library.done(call, status)).find_map(Result::err)
    }
}

impl Drop for Communicator {
    /// Aborts instead of waiting for the other processes, because they may be lost.
    fn drop(&mut self) {
        // SAFETY: the handle comes from `ncclCommInitRank`, and nothing uses it any more.
        unsafe { (self.library.abort)(self.handle) };
    }
}
