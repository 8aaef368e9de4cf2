//! The GPU side of the operations: launches of CUDA kernels over tensors.
//!
//! Each operation has its kernels in a `.cu` file and the code that launches them in a `gpu.rs`, in a folder of its
//! name; definitions and derivatives stand with the operation. A `Launch` names a kernel, its grid and its block,
//! and lists the arguments once. It runs
//!
//! * on a CUDA device, through Candle's backend (feature `cuda`, `gpu/cuda.rs`): the kernels are compiled to PTX by
//!   `build.rs`, and for the GPU at hand by its driver when first used;
//! * on the CPU, in tests (feature `emulation`, `gpu/emulation.rs`): the same sources compiled by the system's C++
//!   compiler, run thread by thread over the same grid.
//!
//! Grids, blocks and the order of sums depend on the shapes alone, so results are the same on every run, and no
//! kernel adds floats atomically. Nothing here waits for the device: what a kernel finds stays in tensors.
//!
//! Feature maps are `f32` or `bf16`; parameters, statistics, ranges and sums are `f32` (or wider) always.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulation")]
pub mod emulation;
mod graph;
#[cfg(feature = "cuda")]
pub mod nccl;
pub(crate) mod product;

pub use graph::Graph;
pub use product::set_tf32;

use crate::{Error, Quantizer, Result};
use candle_core::{CpuStorage, CudaStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor};
use std::cell::Cell;

/// Spares a GPU's events: two for each tensor, by which the driver's binding would put the streams of several in order. All work
/// on a device is in one.
pub fn expect_one_stream(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        cuda::expect_one_stream(device);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// Writes the elements of a tensor over those of another of its shape and dtype, both contiguous and on one device.
pub fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    if (to.shape(), to.dtype()) != (from.shape(), from.dtype()) || !to.device().same_device(from.device()) {
        let message = format!("{from:?} is to be written over {to:?}: expected its shape, dtype and device");
        return Err(Error::Setting { op: "gpu::overwrite", message });
    }
    match to.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let bytes = to.elem_count() * to.dtype().size_in_bytes();
            Ok(cuda::copy(device, address_mut(to)?, address(from)?, bytes)?)
        }
        _ => Ok(to.slice_set(from, 0, 0)?),
    }
}

/// Whether an operation on this device runs the kernels of this module.
pub(crate) fn runs(device: &Device) -> bool {
    device.is_cuda() || emulated()
}

#[cfg(feature = "emulation")]
fn emulated() -> bool {
    emulation::order().is_some()
}

#[cfg(not(feature = "emulation"))]
const fn emulated() -> bool {
    false
}

/// Threads of a block, which the kernels rely on as the most (`THREADS` in common.cuh).
pub(crate) const THREADS: usize = 256;

/// Blocks that a kernel with sums is cut into, about: some for each multiprocessor of a large GPU, in any case.
pub(crate) const BLOCKS: usize = 1024;

/// The kernels of an operation: the file `NAME/NAME.cu`, by [`module!`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    /// The file's name without its ending, with which the names of its kernels begin.
    pub(crate) name: &'static str,
    /// Its text, for the emulation.
    #[cfg(feature = "emulation")]
    pub(crate) source: &'static str,
    /// Its PTX, which the driver compiles for its GPU when the module is first used.
    #[cfg(feature = "cuda")]
    pub(crate) ptx: &'static str,
}

/// The [`Module`] in the folder of the file that calls this; `build.rs` has compiled all there are.
macro_rules! module {
    ($name:literal) => {
        $crate::gpu::Module {
            name: $name,
            #[cfg(feature = "emulation")]
            source: include_str!(concat!($name, ".cu")),
            #[cfg(feature = "cuda")]
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
        }
    };
}
pub(crate) use module;

/// A kernel with its grid and its arguments, which are added in the order of the fields of its struct.
// Without either there is nothing to launch on, and nothing reads a launch.
#[cfg_attr(not(any(feature = "cuda", feature = "emulation")), allow(dead_code))]
pub(crate) struct Launch {
    module: Module,
    kernel: String,
    /// Blocks, and threads of a block, along x and y.
    grid: [u32; 2],
    block: [u32; 2],
    arguments: Arguments,
    /// Where the tensors are.
    device: Option<Device>,
}

impl Launch {
    pub(crate) fn new(module: Module, kernel: impl AsRef<str>, grid: [usize; 2], block: [usize; 2]) -> Self {
        let kernel = format!("{}_{}", module.name, kernel.as_ref());
        Self {
            module,
            kernel,
            grid: grid.map(|n| n as u32),
            block: block.map(|n| n as u32),
            arguments: Arguments::default(),
            device: None,
        }
    }

    /// One thread for each of `count` elements.
    pub(crate) fn each(module: Module, kernel: impl AsRef<str>, count: usize) -> Self {
        Self::new(module, kernel, [count.div_ceil(THREADS), 1], [THREADS, 1])
    }

    /// Threads that share `count` elements, several each where there are many.
    pub(crate) fn shared(module: Module, kernel: impl AsRef<str>, count: usize) -> Self {
        Self::new(module, kernel, [count.div_ceil(THREADS).clamp(1, 16 * BLOCKS), 1], [THREADS, 1])
    }

    /// A tensor that the kernel reads.
    pub(crate) fn read(mut self, tensor: &Tensor) -> Result<Self> {
        self.arguments.push(&address(tensor)?.to_ne_bytes());
        self.on(tensor)
    }

    /// A tensor that the kernel reads, or a null pointer.
    pub(crate) fn read_if(mut self, tensor: Option<&Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.read(tensor),
            None => {
                self.arguments.push(&0u64.to_ne_bytes());
                Ok(self)
            }
        }
    }

    /// A tensor that the kernel writes.
    pub(crate) fn write(mut self, tensor: &Tensor) -> Result<Self> {
        self.arguments.push(&address_mut(tensor)?.to_ne_bytes());
        self.on(tensor)
    }

    /// A tensor that the kernel writes, or a null pointer.
    pub(crate) fn write_if(self, tensor: Option<&Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.write(tensor),
            None => self.read_if(None),
        }
    }

    /// That all tensors are on one device.
    fn on(mut self, tensor: &Tensor) -> Result<Self> {
        match &self.device {
            None => self.device = Some(tensor.device().clone()),
            Some(device) if device.same_device(tensor.device()) => {}
            Some(device) => {
                return Err(Error::Setting {
                    op: self.module.name,
                    message: format!(
                        "tensors on {device:?} and on {:?}; move all to one device",
                        tensor.device()
                    ),
                });
            }
        }
        Ok(self)
    }

    /// Whole numbers of 32 bits without sign.
    pub(crate) fn sizes<const N: usize>(mut self, sizes: [usize; N]) -> Result<Self> {
        for size in sizes {
            let size = u32::try_from(size).map_err(|_| Error::Setting {
                op: self.module.name,
                message: format!("a size of {size} is too large for a GPU; use smaller batches"),
            })?;
            self.arguments.push(&size.to_ne_bytes());
        }
        Ok(self)
    }

    pub(crate) fn floats<const N: usize>(mut self, floats: [f32; N]) -> Self {
        floats.into_iter().for_each(|float| self.arguments.push(&float.to_ne_bytes()));
        self
    }

    pub(crate) fn doubles<const N: usize>(mut self, doubles: [f64; N]) -> Self {
        doubles.into_iter().for_each(|double| self.arguments.push(&double.to_ne_bytes()));
        self
    }

    /// Runs the kernel; on a CUDA device, puts it at the end of the device's stream.
    pub(crate) fn run(mut self) -> Result<()> {
        self.arguments.finish();
        let fail = |message| Err(Error::Setting { op: self.module.name, message });
        if self.grid[1] > MOST_BLOCKS_Y {
            return fail(format!("{} blocks are too many for a GPU; use smaller batches", self.grid[1]));
        }
        match &self.device {
            #[cfg(feature = "cuda")]
            Some(Device::Cuda(device)) => Ok(cuda::launch(&self, device)?),
            #[cfg(feature = "emulation")]
            Some(Device::Cpu) => emulation::launch(&self),
            device => fail(format!("this build has no kernels for {device:?}; build with --features cuda")),
        }
    }
}

/// The most blocks of a grid along y.
const MOST_BLOCKS_Y: u32 = 65_535;

/// The bytes of a C struct, field by field: each is aligned to its size, the whole to 8 bytes if a field has as many.
#[derive(Default)]
struct Arguments {
    /// In words, as the struct must be aligned.
    words: Vec<u64>,
    len: usize,
    align: usize,
}

impl Arguments {
    fn push(&mut self, field: &[u8]) {
        let start = self.len.next_multiple_of(field.len());
        self.len = start + field.len();
        self.align = self.align.max(field.len());
        self.words.resize(self.len.div_ceil(8), 0);
        let (word, shift) = (start / 8, start % 8);
        let mut bytes = self.words[word].to_ne_bytes();
        bytes[shift..shift + field.len()].copy_from_slice(field);
        self.words[word] = u64::from_ne_bytes(bytes);
    }

    fn finish(&mut self) {
        self.len = self.len.next_multiple_of(self.align.max(1));
        self.words.resize(self.len.div_ceil(8).max(1), 0);
    }
}

/// Where a contiguous tensor's elements lie.
fn address(tensor: &Tensor) -> candle_core::Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => cpu_address(storage, layout),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => cuda::address(storage, layout),
        _ => candle_core::bail!("a GPU kernel cannot read {:?}", tensor.device()),
    }
}

/// [`address`], to write there.
fn address_mut(tensor: &Tensor) -> candle_core::Result<u64> {
    struct Take(Cell<u64>);
    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "gpu-address"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            self.0.set(cpu_address(storage, layout)?);
            Ok(())
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
            #[cfg(feature = "cuda")]
            self.0.set(cuda::address(storage, layout)?);
            #[cfg(not(feature = "cuda"))]
            let _ = (storage, layout);
            Ok(())
        }
    }
    let take = Take(Cell::new(0));
    tensor.inplace_op1(&take)?;
    Ok(take.0.get())
}

fn cpu_address(storage: &CpuStorage, layout: &Layout) -> candle_core::Result<u64> {
    let start = start(layout)?;
    Ok(match storage {
        CpuStorage::U8(all) => all[start..].as_ptr() as u64,
        CpuStorage::U32(all) => all[start..].as_ptr() as u64,
        CpuStorage::BF16(all) => all[start..].as_ptr() as u64,
        CpuStorage::F32(all) => all[start..].as_ptr() as u64,
        CpuStorage::F64(all) => all[start..].as_ptr() as u64,
        _ => candle_core::bail!("a GPU kernel cannot read this dtype"),
    })
}

/// The first element of a contiguous layout.
fn start(layout: &Layout) -> candle_core::Result<usize> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start),
        None => candle_core::bail!("the kernel needs a contiguous tensor, found {layout:?}"),
    }
}

/// Memory for what a kernel writes, which must be all of it.
pub(crate) fn empty(dims: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: any bytes are fine elements, and a kernel writes them before anything reads them.
    #[allow(unsafe_code)]
    let tensor = unsafe { Tensor::empty(dims, dtype, device)? };
    #[cfg(feature = "emulation")]
    if device.is_cpu() {
        emulation::spoil(&tensor, address_mut(&tensor)?);
    }
    Ok(tensor)
}

/// The name of a dtype in the names of kernels.
pub(crate) fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::U8 => "u8",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// How many elements a thread takes at once: 4 if they are aligned in every tensor and `len` (the channels, or all
/// elements) is a multiple of 4, else 1.
pub(crate) fn width<'a>(len: usize, tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<usize> {
    if !len.is_multiple_of(4) {
        return Ok(1);
    }
    for tensor in tensors {
        if !address(tensor)?.is_multiple_of(4 * tensor.dtype().size_in_bytes() as u64) {
            return Ok(1);
        }
    }
    Ok(4)
}

/// A factor of a product: a matrix, or one that is stored transposed.
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a> {
    Plain(&'a Tensor),
    Transposed(&'a Tensor),
}

impl Factor<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Plain(tensor) | Self::Transposed(tensor) => tensor,
        }
    }

    /// Rows and columns of the matrix.
    fn size(&self) -> Result<(usize, usize)> {
        let (rows, columns) = self.tensor().dims2()?;
        Ok(match self {
            Self::Plain(_) => (rows, columns),
            Self::Transposed(_) => (columns, rows),
        })
    }
}

/// How the rows and channels of a map are cut (`Columns` in common.cuh).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Columns {
    rows: usize,
    channels: usize,
    /// Threads of a block: along groups of channels, along rows.
    block: [usize; 2],
    /// Blocks beside each other.
    slices: usize,
    rows_per_part: usize,
}

/// Groups of channels that a block takes, at most: with four floats each, a row's part is 512 bytes.
const GROUPS: usize = 32;

/// A block's threads for groups of channels, `[groups, rows]`, and how many blocks are beside each other.
pub(crate) fn block_of(channels: usize, width: usize) -> ([usize; 2], usize) {
    let groups = channels.div_ceil(width);
    let slices = groups.div_ceil(GROUPS);
    let x = groups.div_ceil(slices);
    ([x, THREADS / x], slices)
}

impl Columns {
    /// For kernels that write as much as they read: each thread takes a few rows.
    pub(crate) fn short(rows: usize, channels: usize, width: usize) -> Self {
        let (block, slices) = block_of(channels, width);
        // A grid has at most 65,535 blocks along y.
        let rows_per_part = (8 * block[1]).max(rows.div_ceil(60_000));
        Self { rows, channels, block, slices, rows_per_part }
    }

    /// For kernels whose parts leave sums, of which there are to be few beside the rows.
    pub(crate) fn long(rows: usize, channels: usize, width: usize) -> Self {
        let (block, slices) = block_of(channels, width);
        let parts = (BLOCKS / slices).max(1);
        let rows_per_part = rows.div_ceil(parts).max(16 * block[1]).next_multiple_of(block[1]);
        Self { rows, channels, block, slices, rows_per_part }
    }

    pub(crate) fn parts(&self) -> usize {
        self.rows.div_ceil(self.rows_per_part)
    }

    pub(crate) fn grid(&self) -> [usize; 2] {
        [self.slices, self.parts()]
    }

    pub(crate) fn launch(&self, module: Module, kernel: impl AsRef<str>) -> Launch {
        Launch::new(module, kernel, self.grid(), self.block)
    }

    /// The fields of the struct.
    pub(crate) fn fields(&self) -> [usize; 3] {
        [self.rows, self.channels, self.rows_per_part]
    }
}

/// The block of kernels that add up parts: 8 channels, and 32 threads that share the parts of each.
pub(crate) const OVER_PARTS: [usize; 2] = [8, 32];

/// The sum over the first dimension of `sums[parts, count]`, `f32`, in the shape `dims`; by the kernel `total` of a module
/// that has it.
pub(crate) fn total(module: Module, sums: &Tensor, dims: impl Into<Shape>) -> Result<Tensor> {
    let (parts, count) = sums.dims2()?;
    let total = empty(dims, DType::F32, sums.device())?;
    Launch::new(module, "total", [count.div_ceil(OVER_PARTS[0]), 1], OVER_PARTS)
        .read(sums)?
        .write(&total)?
        .sizes([parts, count])?
        .run()?;
    Ok(total)
}

/// The number of a quantizer's grids: 1, or that of the channels.
pub(crate) fn grids(quant: Quantizer<'_>) -> usize {
    quant.range.elem_count() / 2
}

/// The range and the largest level of a quantizer, or none.
pub(crate) fn quantizer<'a>(quant: Option<Quantizer<'a>>) -> (Option<&'a Tensor>, f32) {
    match quant {
        Some(quant) => (Some(quant.range), quant.bits.max_level() as f32),
        None => (None, 0.0),
    }
}

/// The contiguous parts `[channels]` of a tensor `[n, channels]`.
pub(crate) fn planes<const N: usize>(all: &Tensor) -> Result<[Tensor; N]> {
    let channels = all.dims()[1];
    let mut planes = Vec::with_capacity(N);
    for i in 0..N {
        planes.push(all.narrow(0, i, 1)?.reshape(channels)?);
    }
    Ok(planes.try_into().expect("as many as asked for"))
}
