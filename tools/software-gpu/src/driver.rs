//! The functions of the driver (NVIDIA's *CUDA Driver API*, 13.0) for one GPU, whose memory is the
//! host's.
//!
//! Every call is complete when it returns. `streams` tracks which work a GPU would keep in order.
//! It is an error if two streams work on one allocation without an order.

// These are functions of a C library, which take pointers from the caller.
#![allow(unsafe_code)]

use crate::device::{Handle, OF_THIS_THREAD, Pointer, device, new_handle, stream};
use crate::graphs::{self, Graph, set};
use crate::launch::Launch;
use crate::memory::Allocations;
use crate::program::{self, Program};
use crate::ptx::{self, Space};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::panic::AssertUnwindSafe;
use std::sync::{LazyLock, Mutex};

pub(crate) type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const NOT_SUPPORTED: Status = 801;
const LAUNCH_FAILED: Status = 719;
const INVALID_PTX: Status = 218;
const NOT_FOUND: Status = 500;
const UNKNOWN: Status = 999;

/// A loaded module.
struct Module {
    tree: ptx::Module,
    /// The addresses of the module's variables.
    globals: HashMap<String, Pointer>,
    /// The kernels that have been requested so far.
    kernels: Mutex<HashMap<String, &'static Program>>,
}

/// Runs the work of a call and returns its status. Prints an error on stderr, because the status
/// says little.
pub(crate) fn answer(call: &str, work: impl FnOnce() -> Result<()>) -> Status {
    let done = std::panic::catch_unwind(AssertUnwindSafe(work));
    let (problem, status) = match done {
        Ok(Ok(())) => return SUCCESS,
        Ok(Err(problem)) => {
            let status = match problem {
                Error::Ptx { .. } => INVALID_PTX,
                Error::NotSupported(_) => NOT_SUPPORTED,
                Error::NoKernel(_) => NOT_FOUND,
                Error::Launch { .. } => LAUNCH_FAILED,
                Error::Call(_) => INVALID_VALUE,
            };
            (problem.to_string(), status)
        }
        Err(_) => ("a panic".into(), UNKNOWN),
    };
    eprintln!("software-gpu: {call}: {problem}");
    status
}

/// Defines functions of a C library. [`answer`] runs their bodies.
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {
        $(
            #[allow(non_snake_case)]
            #[unsafe(no_mangle)]
            extern "C" fn $name($($argument: $kind),*) -> $crate::driver::Status {
                $crate::driver::answer(stringify!($name), move || $body)
            }
        )*
    };
}
pub(crate) use functions;

/// Writes a result to the caller's pointer.
pub(crate) fn give<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return Err(Error::Call("a null pointer for a result".into()));
    }
    // SAFETY: the API asks for a pointer to a `T`.
    unsafe { to.write(value) };
    Ok(())
}

/// Returns the compute capability that the GPU reports, without the dot.
fn capability() -> c_int {
    std::env::var("SOFTWARE_GPU").ok().and_then(|text| text.parse().ok()).unwrap_or(90)
}

/// Returns whether unordered accesses to memory are errors.
fn looks_for_races() -> bool {
    static ASKED: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("SOFTWARE_GPU_RACES").is_none_or(|asked| asked != "0"));
    *ASKED
}

const NAME: &[u8] = b"a GPU in software\0";

functions! {
    fn cuInit(_flags: c_uint) { Ok(()) }

    fn cuDeviceGetCount(count: *mut c_int) { give(count, 1) }

    fn cuDeviceGet(device: *mut c_int, number: c_int) {
        if number != 0 {
            return Err(Error::Call(format!("there is no GPU {number}")));
        }
        give(device, 0)
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
        let count = NAME.len().min(len as usize);
        // SAFETY: the caller's buffer has `len` bytes.
        unsafe { name.copy_from_nonoverlapping(NAME.as_ptr().cast(), count) };
        Ok(())
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        give(value, match attribute {
            // The compute capability, and whether the device has memory pools.
            75 => capability() / 10,
            76 => capability() % 10,
            115 => 1,
            _ => return Err(Error::NotSupported(format!("the attribute {attribute}"))),
        })
    }

    fn cuDevicePrimaryCtxRetain(context: *mut Handle, _device: c_int) { give(context, 1) }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { Ok(()) }
    fn cuCtxSetCurrent(_context: Handle) { Ok(()) }
    fn cuCtxGetCurrent(context: *mut Handle) { give(context, 1) }

    fn cuStreamDestroy_v2(_stream: Handle) { Ok(()) }
    fn cuStreamIsCapturing(handle: Handle, status: *mut c_uint) { give(status, graphs::records(handle).into()) }

    fn cuStreamBeginCapture_v2(handle: Handle, _mode: c_uint) { graphs::begin(handle) }
    fn cuStreamEndCapture(handle: Handle, graph: *mut *mut Graph) {
        give(graph, Box::into_raw(Box::new(graphs::end(handle)?)))
    }
    // The executable graph is the graph itself.
    fn cuGraphInstantiateWithFlags(runs: *mut *mut Graph, graph: *mut Graph, _flags: u64) { give(runs, graph) }
    fn cuGraphExecDestroy(_runs: *mut Graph) { Ok(()) }
    fn cuGraphLaunch(graph: *mut Graph, handle: Handle) {
        // SAFETY: the graph comes from `cuStreamEndCapture` and has not been destroyed.
        unsafe { &*graph }.run(handle)
    }
    fn cuGraphDestroy(graph: *mut Graph) {
        // SAFETY: the graph comes from `cuStreamEndCapture` and has not been destroyed.
        unsafe { Box::from_raw(graph) }.free()
    }

    fn cuStreamSynchronize(handle: Handle) {
        graphs::forbid(handle, "waiting for the stream")?;
        device().streams.wait(stream(handle));
        Ok(())
    }

    fn cuStreamWaitEvent(handle: Handle, event: Handle, _flags: c_uint) {
        graphs::forbid(handle, "an event")?;
        device().streams.order(event, stream(handle));
        Ok(())
    }

    fn cuEventCreate(event: *mut Handle, _flags: c_uint) { give(event, new_handle()) }

    fn cuEventRecord(event: Handle, handle: Handle) {
        graphs::forbid(handle, "an event")?;
        device().streams.record(event, stream(handle));
        Ok(())
    }

    fn cuEventDestroy_v2(_event: Handle) { Ok(()) }

    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, _device: c_int) { give(pool, 1) }
    fn cuMemPoolSetAttribute(_pool: Handle, _attribute: c_int, _value: *mut c_void) { Ok(()) }

    fn cuMemAlloc_v2(address: *mut Pointer, size: usize) { give(address, device().allocate(size)?) }

    fn cuMemAllocAsync(address: *mut Pointer, size: usize, handle: Handle) {
        if graphs::records(handle) {
            return give(address, graphs::allocate(size, handle)?);
        }
        let mut device = device();
        let made = device.allocate(size)?;
        device.touch(handle, [(made, size)])?;
        give(address, made)
    }

    fn cuMemFree_v2(address: Pointer) {
        if address == 0 {
            return Ok(());
        }
        let mut device = device();
        device.streams.wait_for_all();
        device.free(address)
    }

    fn cuMemFreeAsync(address: Pointer, handle: Handle) {
        if address == 0 {
            return Ok(());
        }
        if graphs::records(handle) {
            return graphs::free(address, handle);
        }
        let mut device = device();
        device.touch(handle, [(address, 0)])?;
        device.free(address)
    }

    fn cuMemsetD8Async(address: Pointer, value: u8, size: usize, handle: Handle) { set(address, value, size, handle) }
    fn cuMemcpyHtoDAsync_v2(to: Pointer, from: *const c_void, size: usize, handle: Handle) {
        graphs::forbid(handle, "a copy from the host")?;
        copy(to, from as u64, size, handle)
    }
    // A copy to pageable host memory waits for the stream.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: Pointer, size: usize, handle: Handle) {
        graphs::forbid(handle, "a copy to the host")?;
        copy(to as u64, from, size, handle)?;
        device().streams.wait(stream(handle));
        Ok(())
    }
    fn cuMemcpyDtoDAsync_v2(to: Pointer, from: Pointer, size: usize, handle: Handle) { copy(to, from, size, handle) }

    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) {
        graphs::forbid(OF_THIS_THREAD, "loading a module")?;
        // SAFETY: PTX ends with a zero byte.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_str();
        let text = text.map_err(|_| Error::Call("the module is no text; only PTX is known here".into()))?;
        let tree = ptx::parse(text)?;
        let mut globals = HashMap::new();
        for variable in tree.globals.iter().filter(|variable| variable.space == Space::Global) {
            let size = variable.size.unwrap_or(0);
            let address = device().allocate(size)?;
            // SAFETY: the allocation has `size` bytes, and no more are copied.
            unsafe {
                (address as *mut u8).write_bytes(0, size);
                (address as *mut u8).copy_from_nonoverlapping(variable.init.as_ptr(), variable.init.len().min(size));
            }
            globals.insert(variable.name.clone(), address);
        }
        let loaded: &'static Module = Box::leak(Box::new(Module { tree, globals, kernels: Mutex::default() }));
        give(module, std::ptr::from_ref(loaded) as Handle)
    }

    fn cuModuleUnload(_module: Handle) { Ok(()) }

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        // SAFETY: the handle comes from `cuModuleLoadData`, and the name ends with a zero byte.
        let (module, name) = unsafe { (&*(module as *const Module), CStr::from_ptr(name)) };
        let name = name.to_string_lossy();
        let mut kernels = module.kernels.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let program = match kernels.get(&*name) {
            Some(program) => *program,
            None => {
                let program: &'static Program = Box::leak(Box::new(program::link(&module.tree, &module.globals, &name)?));
                kernels.insert(name.into_owned(), program);
                program
            }
        };
        give(function, std::ptr::from_ref(program) as Handle)
    }

    fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        handle: Handle,
        arguments: *const *const u8,
        _extra: *const c_void
    ) {
        // SAFETY: the handle comes from `cuModuleGetFunction`.
        let program = unsafe { &*(function as *const Program) };
        let end = program.parameters.last().map_or(0, |&(start, size)| start + size);
        let mut parameters = vec![0u64; end.div_ceil(8)];
        for (i, &(start, size)) in program.parameters.iter().enumerate() {
            // SAFETY: the API asks for one argument for each parameter of the kernel, of the
            // declared size.
            unsafe {
                let to = parameters.as_mut_ptr().cast::<u8>().add(start);
                to.copy_from_nonoverlapping(*arguments.add(i), size);
            }
        }
        graphs::put(handle, move |handle| {
            let mut device = device();
            let allocations = Allocations::new(device.bounds());
            Launch {
                program,
                grid: [grid_x, grid_y, grid_z],
                block: [block_x, block_y, block_z],
                dynamic: shared as usize,
                parameters: &parameters,
                allocations: &allocations,
                races: looks_for_races(),
            }
            .run()?;
            device.touch(handle, allocations.touched())
        })
    }
}

/// Copies from or to the host, or within the device.
fn copy(to: Pointer, from: Pointer, size: usize, handle: Handle) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    graphs::put(handle, move |handle| copy_now(to, from, size, handle))
}

fn copy_now(to: Pointer, from: Pointer, size: usize, handle: Handle) -> Result<()> {
    let mut device = device();
    // One of the addresses may be the host's.
    let of_device = [to, from].into_iter().filter(|address| device.has(*address));
    let memory: Vec<(Pointer, usize)> = of_device.map(|address| (address, size)).collect();
    if memory.is_empty() {
        return Err(Error::Call(format!("neither {to:#x} nor {from:#x} is memory of the device")));
    }
    device.touch(handle, memory)?;
    // SAFETY: `touch` has checked that bytes on the device are within an allocation; on the host,
    // the caller gives a buffer of this size.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) };
    Ok(())
}

/// Returns a description of a status for the user.
fn meaning(status: Status) -> &'static CStr {
    match status {
        SUCCESS => c"no error",
        INVALID_VALUE => c"an argument is wrong (software-gpu says which on stderr)",
        NOT_SUPPORTED => c"not supported by software-gpu, which says more on stderr",
        LAUNCH_FAILED => c"a kernel failed (software-gpu says how on stderr)",
        INVALID_PTX => c"PTX that software-gpu can't read, which says more on stderr",
        NOT_FOUND => c"not found",
        _ => c"an error (software-gpu says which on stderr)",
    }
}

functions! {
    fn cuGetErrorString(status: Status, text: *mut *const c_char) { give(text, meaning(status).as_ptr()) }
}

/// Locks the device for a test. The tests share it, and a wait of one test would order the streams
/// of all.
#[cfg(test)]
pub(crate) fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Returns a new allocation with these floats.
#[cfg(test)]
pub(crate) fn upload(values: &[f32]) -> Pointer {
    let size = size_of_val(values);
    let address = device().allocate(size).unwrap();
    assert_eq!(cuMemcpyHtoDAsync_v2(address, values.as_ptr().cast(), size, 0), SUCCESS);
    address
}

/// Returns the first floats of an allocation.
#[cfg(test)]
pub(crate) fn allocated(address: Pointer, count: usize) -> Vec<f32> {
    let mut values = vec![0f32; count];
    assert_eq!(cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), address, 4 * count, 0), SUCCESS);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: &CStr = c".version 9.0\n.target sm_75\n.address_size 64
        .visible .entry double_all(.param .u64 x, .param .u32 count) {
        .reg .pred %p<2>; .reg .b32 %r<6>; .reg .b64 %rd<4>; .reg .f32 %f<3>;
        ld.param.u64 %rd1, [x]; ld.param.u32 %r1, [count]; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
        mov.u32 %r4, %tid.x; mad.lo.s32 %r5, %r2, %r3, %r4; setp.ge.u32 %p1, %r5, %r1; @%p1 bra $end;
        mul.wide.u32 %rd2, %r5, 4; add.s64 %rd3, %rd1, %rd2; ld.global.f32 %f1, [%rd3]; add.f32 %f2, %f1, %f1;
        st.global.f32 [%rd3], %f2; $end: ret; }";

    fn kernel() -> Handle {
        let (mut module, mut function) = (0, 0);
        assert_eq!(cuModuleLoadData(&raw mut module, DOUBLE.as_ptr().cast()), SUCCESS);
        assert_eq!(cuModuleGetFunction(&raw mut function, module, c"no_such".as_ptr()), NOT_FOUND);
        assert_eq!(cuModuleGetFunction(&raw mut function, module, c"double_all".as_ptr()), SUCCESS);
        function
    }

    fn launch(function: Handle, x: Pointer, count: u32, stream: Handle) -> Status {
        let arguments = [(&raw const x).cast(), (&raw const count).cast::<u8>()];
        let blocks = count.div_ceil(32);
        cuLaunchKernel(function, blocks, 1, 1, 32, 1, 1, 0, stream, arguments.as_ptr(), std::ptr::null())
    }

    #[test]
    fn a_kernel_from_its_text_to_its_result() {
        let _alone = alone();
        let (function, x) = (kernel(), upload(&[1.0; 70]));
        assert_eq!(launch(function, x, 69, 0), SUCCESS);
        let found = allocated(x, 70);
        assert!(found[..69].iter().all(|&x| x == 2.0) && found[69] == 1.0);
        // This is one element more than the allocation has.
        assert_eq!(launch(function, x, 71, 0), LAUNCH_FAILED);
        assert_eq!(cuMemFree_v2(x), SUCCESS);
        assert_eq!(launch(function, x, 1, 0), LAUNCH_FAILED);
        assert_eq!(cuMemFree_v2(x), INVALID_VALUE);
    }

    #[test]
    fn streams_that_nothing_orders() {
        let _alone = alone();
        let (function, x) = (kernel(), upload(&[1.0; 4]));
        let (a, b, mut event) = (new_handle(), new_handle(), 0);
        assert_eq!(cuEventCreate(&raw mut event, 0), SUCCESS);
        assert_eq!(launch(function, x, 4, a), SUCCESS);
        assert_eq!(launch(function, x, 4, b), INVALID_VALUE);
        assert_eq!(launch(function, x, 4, a), INVALID_VALUE);
        assert_eq!(cuStreamSynchronize(a), SUCCESS);
        assert_eq!(cuStreamSynchronize(b), SUCCESS);
        assert_eq!(launch(function, x, 4, a), SUCCESS);
        assert_eq!(cuEventRecord(event, a), SUCCESS);
        assert_eq!(cuStreamWaitEvent(b, event, 0), SUCCESS);
        assert_eq!(launch(function, x, 4, b), SUCCESS);
        // Each thread has its own stream behind the same handle.
        assert_eq!(cuStreamSynchronize(b), SUCCESS);
        assert_eq!(launch(function, x, 4, OF_THIS_THREAD), SUCCESS);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(launch(function, x, 4, OF_THIS_THREAD), INVALID_VALUE));
        });
    }

    /// Returns a stream that is recording.
    fn recording() -> Handle {
        let stream = new_handle();
        assert_eq!(cuStreamBeginCapture_v2(stream, 0), SUCCESS);
        stream
    }

    fn recorded(stream: Handle) -> Option<*mut Graph> {
        let mut graph = std::ptr::null_mut();
        (cuStreamEndCapture(stream, &raw mut graph) == SUCCESS).then_some(graph)
    }

    #[test]
    fn a_graph_does_what_was_recorded() {
        let _alone = alone();
        let (function, x) = (kernel(), upload(&[1.0; 4]));
        let (stream, mut status, mut y) = (recording(), 0, 0);
        assert_eq!(cuStreamIsCapturing(stream, &raw mut status), SUCCESS);
        assert_eq!(status, 1);
        // Copy x to y, double y, and copy it back to x.
        assert_eq!(cuMemAllocAsync(&raw mut y, 16, stream), SUCCESS);
        assert_eq!(cuMemcpyDtoDAsync_v2(y, x, 16, stream), SUCCESS);
        assert_eq!(launch(function, y, 4, stream), SUCCESS);
        assert_eq!(cuMemcpyDtoDAsync_v2(x, y, 16, stream), SUCCESS);
        assert_eq!(cuMemFreeAsync(y, stream), SUCCESS);
        let graph = recorded(stream).unwrap();
        assert_eq!(allocated(x, 4), [1.0; 4], "nothing is done while it is recorded");
        let mut runs = std::ptr::null_mut();
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut runs, graph, 0), SUCCESS);
        for expected in [2.0, 4.0] {
            assert_eq!(cuGraphLaunch(runs, stream), SUCCESS);
            assert_eq!(allocated(x, 4), [expected; 4]);
            assert!(allocated(y, 4).iter().all(|y| y.is_nan()), "freed");
        }
        assert_eq!(cuGraphExecDestroy(runs), SUCCESS);
        assert_eq!(cuGraphDestroy(graph), SUCCESS);
        assert_eq!(launch(function, y, 1, stream), LAUNCH_FAILED);
    }

    #[test]
    fn what_a_graph_cannot_have() {
        let _alone = alone();
        let (x, mut value, mut y) = (upload(&[1.0; 4]), 0f32, 0);
        let host = (&raw mut value).cast();
        let forbidden: [&dyn Fn(Handle) -> Status; 5] = [
            &|stream| cuStreamSynchronize(stream),
            &|stream| cuMemcpyHtoDAsync_v2(x, host, 4, stream),
            &|stream| cuMemcpyDtoHAsync_v2(host, x, 4, stream),
            &|stream| cuMemFreeAsync(x, stream),
            &|stream| cuStreamBeginCapture_v2(stream, 0),
        ];
        for (i, call) in forbidden.iter().enumerate() {
            let stream = recording();
            assert_eq!(call(stream), INVALID_VALUE, "{i}");
            assert!(recorded(stream).is_none(), "{i}");
            assert_eq!(cuStreamSynchronize(stream), SUCCESS);
        }
        // Memory that the recording does not free is an error.
        let stream = recording();
        assert_eq!(cuMemAllocAsync(&raw mut y, 16, stream), SUCCESS);
        assert!(recorded(stream).is_none());
        assert!(recorded(stream).is_none(), "it does not record");
    }

    #[test]
    fn new_memory_is_no_number() {
        let _alone = alone();
        let mut address = 0;
        assert_eq!(cuMemAlloc_v2(&raw mut address, 12), SUCCESS);
        assert!(allocated(address, 3).iter().all(|x| x.is_nan()));
        assert_eq!(cuMemsetD8Async(address, 0, 8, 0), SUCCESS);
        assert_eq!(allocated(address, 2), [0.0, 0.0]);
        assert_eq!(cuMemsetD8Async(address, 0, 13, 0), INVALID_VALUE);
        assert_eq!(cuMemAlloc_v2(&raw mut address, 0), INVALID_VALUE);
    }
}
