//! The CUDA kernels on the CPU, for tests.
//!
//! The system's C++ compiler compiles the same sources as nvcc to shared libraries next to the test
//! program. The header `host.h` replaces CUDA's execution model. Inside of [`run`], the operations
//! of this crate make the same launches for CPU tensors as for tensors on a GPU.
//!
//! The emulation tests the kernels' arithmetic, indices, barriers and arguments, and the launch
//! configurations. It cannot test the speed, cuBLAS, or what nvcc and a GPU make of the same
//! sources.
//!
//! With `KERNELS_SANITIZE=1` the kernels are compiled with AddressSanitizer, which must be loaded
//! first:
//!
//! ```sh
//! LD_PRELOAD=$(c++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
//!     KERNELS_SANITIZE=1 cargo test -p kernels
//! ```
//!
//! It warns once that it ignores a jump, because it does not know the stacks of the fibers.

use super::{Launch, Module, address_mut};
use crate::Error;
use crate::work::lock;
use candle_core::Tensor;
use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

/// The order in which the threads of a block run up to the next barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first thread to the last.
    Forward,
    /// From the last to the first. A kernel that lacks a barrier then gives other results.
    Reverse,
}

thread_local! {
    static ORDER: Cell<Option<Order>> = const { Cell::new(None) };
}

/// Returns the order of the emulation that is active on this thread, if any.
pub(super) fn order() -> Option<Order> {
    ORDER.get()
}

/// Runs `f`; every operation on CPU tensors on this thread uses the emulated kernels.
pub fn run<R>(order: Order, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Order>);
    impl Drop for Restore {
        fn drop(&mut self) {
            ORDER.set(self.0);
        }
    }
    let _restore = Restore(ORDER.replace(Some(order)));
    f()
}

/// Returns `Ok` if there is a C++ compiler for the emulation, else a message for the user.
pub fn available() -> Result<(), String> {
    compiler().as_ref().map(drop).map_err(Clone::clone)
}

/// Fills a tensor with bytes 0xff, NaN as floats, so that tests notice what a kernel does not
/// write.
#[allow(unsafe_code)]
pub(super) fn spoil(tensor: &Tensor) -> crate::Result<()> {
    let (address, bytes) = (address_mut(tensor)?, tensor.elem_count() * tensor.dtype().size_in_bytes());
    // SAFETY: the address is that of the tensor's elements, for which any bytes are valid.
    unsafe { (address as *mut u8).write_bytes(0xff, bytes) };
    Ok(())
}

fn compiler() -> &'static Result<PathBuf, String> {
    static COMPILER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    COMPILER.get_or_init(|| {
        let named = std::env::var_os("CXX").map(PathBuf::from);
        let usual = ["c++", "g++", "clang++"].map(PathBuf::from);
        let works = |compiler: &PathBuf| {
            Command::new(compiler).arg("--version").output().is_ok_and(|output| output.status.success())
        };
        named.into_iter().chain(usual).find(works).ok_or_else(|| {
            "no C++ compiler (CXX, c++, g++, clang++) was found, so the CUDA kernels are not emulated".into()
        })
    })
}

/// The headers that modules include.
const HEADERS: [(&str, &str); 4] = [
    ("host.h", include_str!("host.h")),
    ("common.cuh", include_str!("common.cuh")),
    ("learned.cuh", include_str!("learned.cuh")),
    ("moments.cuh", include_str!("moments.cuh")),
];

/// Returns the library of a module. Compiles it unless an earlier test did.
fn build(module: Module) -> Result<PathBuf, String> {
    let compiler = compiler().as_ref()?;
    let sanitize = std::env::var_os("KERNELS_SANITIZE").is_some();
    // With _FORTIFY_SOURCE, a jump to another stack is an error.
    let mut flags = vec![
        "-std=c++17",
        "-O2",
        "-march=native",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-w",
        "-U_FORTIFY_SOURCE",
    ];
    if sanitize {
        flags.extend(["-fsanitize=address", "-g"]);
    }
    // The library's name contains a hash of everything that it was made from.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let texts = HEADERS.map(|(_, text)| text).into_iter().chain([module.source]).chain(flags.iter().copied());
    for byte in texts.flat_map(str::bytes).chain(compiler.to_string_lossy().bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let program = std::env::current_exe().map_err(|e| format!("the program's own path: {e}"))?;
    let folder = program.parent().unwrap_or(Path::new(".")).join("emulation");
    let library = folder.join(format!("{}-{hash:016x}.so", module.name));
    if library.exists() {
        return Ok(library);
    }
    // Other tests may build the same library at the same time, so each uses a folder of its own and
    // moves the finished library to its place.
    let own = folder.join(format!("{}-{}", std::process::id(), module.name));
    let fail = |e: std::io::Error| format!("{}: {e}", own.display());
    std::fs::create_dir_all(&own).map_err(fail)?;
    let main = own.join(format!("{}.cu", module.name));
    for (name, text) in HEADERS {
        std::fs::write(own.join(name), text).map_err(fail)?;
    }
    std::fs::write(&main, module.source).map_err(fail)?;
    let made = own.join("made.so");
    let output =
        Command::new(compiler).args(flags).args(["-x", "c++"]).arg(&main).arg("-o").arg(&made).output();
    let output = output.map_err(fail)?;
    if !output.status.success() {
        return Err(format!(
            "{} does not compile:\n{}",
            main.display(),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    std::fs::rename(&made, &library).map_err(fail)?;
    std::fs::remove_dir_all(&own).map_err(fail)?;
    Ok(library)
}

/// `extern "C" int kernel(arguments, their size, [grid x, grid y, block x, block y], reverse)`.
type Kernel = unsafe extern "C" fn(*const u64, usize, *const u32, i32) -> i32;

/// Returns the library of a module. It stays loaded as long as the program runs.
#[allow(unsafe_code)]
fn library(module: Module) -> Result<&'static libloading::Library, String> {
    static LIBRARIES: Mutex<Option<HashMap<&str, &'static libloading::Library>>> = Mutex::new(None);
    let mut libraries = lock(&LIBRARIES);
    let libraries = libraries.get_or_insert_with(HashMap::new);
    if let Some(library) = libraries.get(module.name) {
        return Ok(library);
    }
    let path = build(module)?;
    // SAFETY: the library is compiled from our sources, and its initialization only sets up
    // thread-local variables.
    let library =
        unsafe { libloading::Library::new(&path) }.map_err(|e| format!("{}: {e}", path.display()))?;
    let library = Box::leak(Box::new(library));
    libraries.insert(module.name, library);
    Ok(library)
}

/// Runs a kernel over its grid.
#[allow(unsafe_code)]
pub(super) fn launch(launch: &Launch) -> crate::Result<()> {
    let fail = |message: String| Error::Setting { op: launch.module.name, message };
    let library = library(launch.module).map_err(fail)?;
    // SAFETY: the macro `KERNEL` defines functions of this type.
    let kernel = unsafe { library.get::<Kernel>(launch.kernel.as_bytes()) };
    let kernel = kernel.map_err(|e| fail(format!("no kernel {}: {e}", launch.kernel)))?;
    let [[x, y], [bx, by]] = [launch.grid, launch.block];
    let reverse = i32::from(order() == Some(Order::Reverse));
    let (arguments, shape) = (&launch.arguments, [x, y, bx, by]);
    // SAFETY: the kernel checks the size of its arguments. It must stay within its tensors, which
    // is what the tests check.
    let status = unsafe { kernel(arguments.words.as_ptr(), arguments.len, shape.as_ptr(), reverse) };
    match status {
        0 => Ok(()),
        1 => Err(fail(format!("{}: its struct does not have {} bytes", launch.kernel, arguments.len))),
        2 => Err(fail(format!("{}: not all threads of a block reach the same barrier", launch.kernel))),
        _ => Err(fail(format!("{}: a block of {bx}×{by} threads", launch.kernel))),
    }
}
