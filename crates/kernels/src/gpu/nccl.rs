//! Sums over the GPUs of several processes, by NVIDIA's NCCL.
//!
//! The library, `libnccl.so.2`, is looked for when the first process joins, so that programs are built and run without it. (cudarc
//! has a binding of it, which would be linked as Candle has cudarc link everything: when a program is built.)

// The functions of a C library.
#![allow(unsafe_code)]

use super::{address, address_mut, empty};
use crate::check::Check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

const CHECK: Check = Check("nccl");

/// What names a group of processes: the first one makes it, and tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Id(pub [u8; 128]);

/// `ncclResult_t`.
type Status = c_int;
/// `ncclComm_t`.
type Handle = *mut c_void;

/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The functions that are called, which all versions 2 of the library declare so.
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
        // SAFETY: NCCL does nothing when it is loaded, and its functions have these arguments. It is never unloaded.
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

    /// An error unless a call has succeeded.
    fn done(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library gives a text of its own for any status.
        let meaning = unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy();
        Err(CHECK
            .setting(format!("{call}: {meaning} ({status}); with NCCL_DEBUG=WARN the library says more")))
    }
}

impl Id {
    /// One that no other group has.
    ///
    /// # Errors
    /// Where the library is not there, or can't make one.
    pub fn new() -> Result<Self> {
        let (library, mut id) = (Library::get()?, Self([0; 128]));
        // SAFETY: the library writes as many bytes.
        library.done("ncclGetUniqueId", unsafe { (library.unique_id)(&raw mut id) })?;
        Ok(id)
    }
}

/// This process among those of a group, each of which has a GPU of its own.
pub struct Communicator {
    library: &'static Library,
    handle: Handle,
    device: Device,
}

// SAFETY: the handle is of no thread, and `failure`, which alone other threads call, may be called while another call goes on.
unsafe impl Send for Communicator {}
// SAFETY: likewise.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Joins a group of `size` processes as number `rank`, with the GPU `device`; waits until all have joined.
    ///
    /// # Errors
    /// Where the library is not there or can't connect the GPUs; two processes on one GPU are refused.
    pub fn join(id: Id, rank: usize, size: usize, device: &Device) -> Result<Self> {
        // The thread's context, in which the library works, is that of the last device that was used.
        device.synchronize()?;
        let (library, mut handle) = (Library::get()?, std::ptr::null_mut());
        // SAFETY: a place for the handle, and the group's name by value.
        let status = unsafe { (library.init_rank)(&raw mut handle, size as c_int, id, rank as c_int) };
        library.done("ncclCommInitRank", status)?;
        Ok(Self { library, handle, device: device.clone() })
    }

    /// The library's version, as 22703 for 2.27.3.
    pub fn version(&self) -> usize {
        let mut version = 0;
        // SAFETY: a place for a number.
        unsafe { (self.library.version)(&raw mut version) };
        version as usize
    }

    /// The sums of a tensor over all processes, each of which gives one of as many elements: `f32`, contiguous, on the GPU. Waits
    /// neither for the device nor for the others; what reads the sums comes behind them in the device's stream.
    ///
    /// # Errors
    /// Another tensor, or what the library finds wrong at once. What it finds later, [`Communicator::failure`] tells.
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
        // SAFETY: both tensors have that many floats on the device, and outlive the call in the order of its stream.
        let status = unsafe {
            let (from, to) = (from as *const c_void, to as *mut c_void);
            (self.library.all_reduce)(from, to, count, FLOAT32, SUM, self.handle, stream.cast())
        };
        self.library.done("ncclAllReduce", status)?;
        Ok(sums)
    }

    /// What has gone wrong since, if anything: sums that were begun will not come then. Any thread may ask.
    pub fn failure(&self) -> Option<Error> {
        let mut found = 0;
        // SAFETY: a place for a status.
        let status = unsafe { (self.library.async_error)(self.handle, &raw mut found) };
        let all = [("ncclCommGetAsyncError", status), ("the sum of the GPUs", found)];
        // Of a call that does not wait, that it goes on.
        const IN_PROGRESS: Status = 7;
        let failed = all.into_iter().filter(|(_, status)| *status != IN_PROGRESS);
        failed.map(|(call, status)| self.library.done(call, status)).find_map(Result::err)
    }
}

impl Drop for Communicator {
    /// Waits for nobody, as others may be lost.
    fn drop(&mut self) {
        // SAFETY: of `ncclCommInitRank`, and nothing uses it any more.
        unsafe { (self.library.abort)(self.handle) };
    }
}
