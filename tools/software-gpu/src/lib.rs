//! A GPU in software, for tests: a library that stands in for NVIDIA's driver (`libcuda`), cuBLAS, cuRAND and NCCL, and runs
//! PTX on the CPU.
//!
//! Loaded before NVIDIA's libraries, it answers the calls of a program that was built for CUDA:
//!
//! ```sh
//! LD_PRELOAD=target/software-gpu/debug/libsoftware_gpu.so target/debug/table3 --device cuda --profile quick --data synthetic
//! ```
//!
//! So the whole of such a program runs on a machine without a GPU: its calls of the driver, the kernels as nvcc compiled
//! them (Candle's as well as our own), the launches, the products. It is stricter than a GPU: every access to memory is
//! checked for its allocation, its alignment and its order with those of other threads, new memory holds what is no
//! number, and work on one piece of memory in two streams that nothing orders is an error. What it can't show: how fast
//! anything is, and how tensor cores round.
//!
//! It knows the calls and the instructions that this project's programs use; of others it says so. `SOFTWARE_GPU=90`
//! is the compute capability that it claims to have (the default), without its point. With `SOFTWARE_GPU_RACES=0` it
//! does not look for races between threads (`races`), and takes half of the time.
//!
//! `ptx` reads the text of a module, `program` makes a kernel of it ready, `launch` runs it with the operations of `ops`;
//! `driver`, `blas`, `rand` and `nccl` are the libraries' functions, `device` the GPU with its memory, `streams` the order that it
//! would keep, `graphs` what is recorded to be done later.

mod blas;
mod device;
mod driver;
mod graphs;
mod launch;
mod memory;
mod nccl;
mod ops;
mod program;
mod ptx;
mod races;
mod rand;
mod streams;

use thiserror::Error as ThisError;

type Result<T> = std::result::Result<T, Error>;

/// Why something can't be run.
#[derive(Debug, ThisError)]
enum Error {
    #[error("line {line} of the PTX: {message}")]
    Ptx { line: usize, message: String },
    #[error("{0} is not known here; see tools/software-gpu")]
    NotSupported(String),
    #[error("the module has no kernel {0}")]
    NoKernel(String),
    #[error("{kernel}, line {line} of its PTX: {message}")]
    Launch { kernel: String, line: usize, message: String },
    #[error("{0}")]
    Call(String),
}

impl Error {
    fn ptx(line: usize, message: impl Into<String>) -> Self {
        Self::Ptx { line, message: message.into() }
    }

    /// With the instruction that it is about, unless one is named.
    fn at(self, instruction: &ptx::Instruction) -> Self {
        match self {
            Self::NotSupported(what) => {
                let opcode = instruction.opcode.join(".");
                Self::ptx(instruction.line, format!("{opcode}: {what} is not known here"))
            }
            other => other,
        }
    }
}
