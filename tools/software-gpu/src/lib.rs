//! A GPU in software, for tests. This library replaces NVIDIA's driver (`libcuda`), cuBLAS, cuRAND
//! and NCCL, and runs PTX on the CPU.
//!
//! Loaded before NVIDIA's libraries, it handles the calls of a program that was built for CUDA:
//!
//! ```sh
//! LD_PRELOAD=target/software-gpu/debug/libsoftware_gpu.so \
//!     target/debug/table3 --device cuda --profile quick --data synthetic
//! ```
//!
//! So the whole program runs on a machine without a GPU: its calls of the driver, the kernels as
//! nvcc compiled them (Candle's as well as ours), the launches and the products. The library is
//! stricter than a GPU. It checks the allocation, the alignment and the order of every access to
//! memory, it fills new memory with NaN, and it reports an error if two streams use the same memory
//! without an order. It cannot test speed, or how tensor cores round.
//!
//! The library supports the calls and instructions that this project's programs use, and reports
//! any other as an error. `SOFTWARE_GPU` sets the compute capability that it reports, without the
//! dot (default: 90). With `SOFTWARE_GPU_RACES=0` it does not look for races between threads
//! (`races`), and takes half the time.
//!
//! `ptx` parses the text of a module, `program` prepares a kernel, and `launch` runs it with the
//! operations of `ops`. `driver`, `blas`, `rand` and `nccl` contain the functions of the libraries,
//! `device` the GPU and its memory, `streams` the order of work on a GPU, and `graphs` recorded
//! work.

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

/// The reason why something cannot be run.
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

    /// Adds the instruction that caused the error, unless the error already names one.
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
