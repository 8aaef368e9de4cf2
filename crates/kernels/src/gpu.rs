//! The GPU side of the operations: launches of CUDA kernels over tensors.
//!
//! Each operation has a folder with its kernels in a `.cu` file and the code that launches them in
//! `gpu.rs`. The definitions and derivatives are in the operation's own file. A `Launch` names a
//! kernel, its grid and its block, and lists the arguments once. It runs
//!
//! * on a CUDA device, through Candle's backend (feature `cuda`, `gpu/cuda.rs`): `build.rs`
//!   compiles the kernels to PTX, and the driver compiles the PTX for its GPU at the first use;
//! * on the CPU, in tests (feature `emulation`, `gpu/emulation.rs`): the system's C++ compiler
//!   compiles the same sources, which run thread by thread over the same grid.
//!
//! Grids, blocks and the order of sums depend only on the shapes and on the alignment of the
//! tensors, so results are the same on every run. No kernel adds floats atomically. Nothing here
//! waits for the device: the results of kernels stay in tensors.
//!
//! Feature maps are `f32` or `bf16`; parameters, statistics, ranges and sums are always `f32` or
//! wider.

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

/// Turns off cudarc's event tracking for a GPU, because all work on a device is in one stream.
///
/// The tracking would cost two events for each tensor, which order the work of several streams.
pub fn expect_one_stream(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        cuda::expect_one_stream(device);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
}

/// Overwrites the elements of `to` with those of `from`, which has the same shape, dtype and
/// device. Both are contiguous.
pub fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    if (to.shape(), to.dtype()) != (from.shape(), from.dtype()) || !to.device().same_device(from.device()) {
        let message = format!("{from:?} is to be written over {to:?}: expected its shape, dtype and device");
        return Err(Error::Setting { op: "gpu::overwrite", message });
    }
    match to.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let bytes = to.elem_count() * to.dtype().size_in_bytes();
            // SAFETY: both tensors have this size.
            #[allow(unsafe_code)]
            unsafe {
                Ok(cuda::copy(device, address_mut(to)?, address(from)?, bytes)?)
            }
        }
        _ => Ok(to.slice_set(from, 0, 0)?),
    }
}

/// Returns whether an operation on this device runs the kernels of this module.
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

/// The number of threads of a block, and the maximum that the kernels rely on (`THREADS` in
/// common.cuh).
pub(crate) const THREADS: usize = 256;

/// The approximate number of blocks of a kernel that takes sums: several for each multiprocessor,
/// even of a large GPU.
pub(crate) const BLOCKS: usize = 1024;

/// The kernels of an operation, from the file `NAME/NAME.cu`; made by [`module!`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    /// The file's name without its extension. The names of its kernels begin with it.
    pub(crate) name: &'static str,
    /// The source text, for the emulation.
    #[cfg(feature = "emulation")]
    pub(crate) source: &'static str,
    /// The PTX, which the driver compiles for its GPU when the module is first used.
    #[cfg(feature = "cuda")]
    pub(crate) ptx: &'static str,
}

/// Makes the [`Module`] in the folder of the file that calls this. `build.rs` has compiled all
/// modules.
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

/// A kernel with its grid and its arguments. The arguments are added in the order of the fields of
/// the kernel's struct.
// Without both features there is nothing to launch on, so nothing reads a launch.
#[cfg_attr(not(any(feature = "cuda", feature = "emulation")), allow(dead_code))]
pub(crate) struct Launch {
    module: Module,
    kernel: String,
    /// The number of blocks along x and y.
    grid: [u32; 2],
    /// The number of threads of a block along x and y.
    block: [u32; 2],
    arguments: Arguments,
    /// The device of the tensors.
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

    /// Makes a launch of one thread for each of `count` elements.
    pub(crate) fn each(module: Module, kernel: impl AsRef<str>, count: usize) -> Self {
        Self::new(module, kernel, [count.div_ceil(THREADS), 1], [THREADS, 1])
    }

    /// Makes a launch of threads that share `count` elements; each takes several if there are many.
    pub(crate) fn shared(module: Module, kernel: impl AsRef<str>, count: usize) -> Self {
        Self::new(module, kernel, [count.div_ceil(THREADS).clamp(1, 16 * BLOCKS), 1], [THREADS, 1])
    }

    /// Adds a tensor that the kernel reads.
    pub(crate) fn read(mut self, tensor: &Tensor) -> Result<Self> {
        self.arguments.push(&address(tensor)?.to_ne_bytes());
        self.on(tensor)
    }

    /// Adds a tensor that the kernel reads, or a null pointer.
    pub(crate) fn read_if(mut self, tensor: Option<&Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.read(tensor),
            None => {
                self.arguments.push(&0u64.to_ne_bytes());
                Ok(self)
            }
        }
    }

    /// Adds a tensor that the kernel writes.
    pub(crate) fn write(mut self, tensor: &Tensor) -> Result<Self> {
        self.arguments.push(&address_mut(tensor)?.to_ne_bytes());
        self.on(tensor)
    }

    /// Adds a tensor that the kernel writes, or a null pointer.
    pub(crate) fn write_if(self, tensor: Option<&Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.write(tensor),
            None => self.read_if(None),
        }
    }

    /// Checks that all tensors are on one device.
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

    /// Adds unsigned 32-bit integers.
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

    /// Runs the kernel. On a CUDA device, appends it to the device's stream.
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

/// The maximum number of blocks of a grid along y.
const MOST_BLOCKS_Y: u32 = 65_535;

/// The bytes of a C struct, built field by field. Each field is aligned to its size, and the struct
/// to its largest field.
#[derive(Default)]
struct Arguments {
    /// The bytes are stored in words, because the struct must be aligned.
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

/// Returns the address of a contiguous tensor's first element.
fn address(tensor: &Tensor) -> candle_core::Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => cpu_address(storage, layout),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => cuda::address(storage, layout),
        _ => candle_core::bail!("a GPU kernel cannot read {:?}", tensor.device()),
    }
}

/// Returns the same as [`address`], for writing.
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

/// Returns the index of the first element of a contiguous layout.
fn start(layout: &Layout) -> candle_core::Result<usize> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start),
        None => candle_core::bail!("the kernel needs a contiguous tensor, found {layout:?}"),
    }
}

/// Allocates a tensor for the output of a kernel, which must write all of it.
pub(crate) fn empty(dims: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: any bytes are valid elements, and a kernel writes them before anything reads them.
    #[allow(unsafe_code)]
    let tensor = unsafe { Tensor::empty(dims, dtype, device)? };
    #[cfg(feature = "emulation")]
    if device.is_cpu() {
        emulation::spoil(&tensor)?;
    }
    Ok(tensor)
}

/// Returns the name of a dtype in the names of kernels.
pub(crate) fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::U8 => "u8",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Returns how many elements a thread processes at once.
///
/// This is 4 if such groups are aligned in every tensor and `len` (the number of channels, or of
/// all elements) is a multiple of 4, else 1.
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

/// Returns the name of an elementwise kernel for a dtype, and the number of groups of elements of
/// these tensors of one size that it processes at once.
pub(crate) fn grouped(kernel: &str, of: DType, tensors: &[&Tensor]) -> Result<(String, usize)> {
    let len = tensors[0].elem_count();
    let width = width(len, tensors.iter().copied())?;
    Ok((format!("{kernel}_{}_{width}", name(of)), len / width))
}

/// An operand of a matrix product: a matrix, or a tensor that stores the matrix transposed.
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

    /// Returns the rows and columns of the matrix.
    fn size(&self) -> Result<(usize, usize)> {
        let (rows, columns) = self.tensor().dims2()?;
        Ok(match self {
            Self::Plain(_) => (rows, columns),
            Self::Transposed(_) => (columns, rows),
        })
    }
}

/// The division of the rows and channels of a map among blocks (`Columns` in common.cuh).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Columns {
    rows: usize,
    channels: usize,
    /// The threads of a block: along groups of channels, and along rows.
    block: [usize; 2],
    /// The number of blocks next to each other along the channels.
    slices: usize,
    rows_per_part: usize,
}

/// The maximum number of groups of channels that a block takes. With four floats in a group, a
/// block reads 512 bytes of each row.
const GROUPS: usize = 32;

/// Returns a block's threads, `[groups of channels, rows]`, and the number of blocks along the
/// channels.
pub(crate) fn block_of(channels: usize, width: usize) -> ([usize; 2], usize) {
    let groups = channels.div_ceil(width);
    let slices = groups.div_ceil(GROUPS);
    let x = groups.div_ceil(slices);
    ([x, THREADS / x], slices)
}

impl Columns {
    /// Divides the map for kernels that write as much as they read: each thread takes a few rows.
    pub(crate) fn short(rows: usize, channels: usize, width: usize) -> Self {
        let (block, slices) = block_of(channels, width);
        // A grid has at most 65,535 blocks along y.
        let rows_per_part = (8 * block[1]).max(rows.div_ceil(60_000));
        Self { rows, channels, block, slices, rows_per_part }
    }

    /// Divides the map for kernels whose parts write sums: there are few parts compared to the
    /// rows.
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

    /// Returns the fields of the kernels' struct.
    pub(crate) fn fields(&self) -> [usize; 3] {
        [self.rows, self.channels, self.rows_per_part]
    }
}

/// The block of kernels that add up parts: 8 channels, with 32 threads that share the parts of
/// each.
pub(crate) const OVER_PARTS: [usize; 2] = [8, 32];

/// Returns the sum over the first dimension of `sums[parts, count]` (`f32`), in the shape `dims`.
/// The module must have the kernel `total`.
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

/// Returns the number of a quantizer's grids: 1, or the number of channels.
pub(crate) fn grids(quant: Quantizer<'_>) -> usize {
    quant.range.elem_count() / 2
}

/// Returns the range and the largest level of a quantizer, or `None` and 0.
pub(crate) fn quantizer<'a>(quant: Option<Quantizer<'a>>) -> (Option<&'a Tensor>, f32) {
    match quant {
        Some(quant) => (Some(quant.range), quant.bits.max_level() as f32),
        None => (None, 0.0),
    }
}

/// Returns the first `N` rows `[channels]` of a tensor `[n, channels]`, each contiguous.
pub(crate) fn planes<const N: usize>(all: &Tensor) -> Result<[Tensor; N]> {
    let channels = all.dims()[1];
    let mut planes = Vec::with_capacity(N);
    for i in 0..N {
        planes.push(all.narrow(0, i, 1)?.reshape(channels)?);
    }
    Ok(planes.try_into().expect("as many as asked for"))
}
