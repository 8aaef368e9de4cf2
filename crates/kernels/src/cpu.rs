//! What the CPU kernels share: argument checks, slices of tensors, fixed chunks over threads, and
//! run-time choice of the vector instructions.

use crate::{Error, Quantizer, Result};
use candle_core::{CpuStorage, DType, Layout, Shape, Storage, Tensor};
use quant_core::Grid;
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};

/// Elements per chunk: half of a small L2 cache, and enough work to be worth a task.
pub(crate) const CHUNK: usize = 32 * 1024;

/// The most parts that a reduction is cut in, whatever its size, and the elements of a part at least: each
/// part leaves sums to add up in order.
pub(crate) const MAX_PARTS: usize = 32;
const MIN_PART: usize = 4 * CHUNK;

/// The vector instructions that [`simd!`] compiles for, from the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// What every machine of the architecture has.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The level whose registers hold a tile of 8 rows by 3 vectors of a product.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const WIDE: Self = Self::Avx512;
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) const WIDE: Self = Self::Portable;

    /// The best level of this machine. (Detection is cached by the standard library.)
    #[inline]
    pub(crate) fn of_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("bmi2") {
                let avx512 = has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw");
                return if avx512 { Self::Avx512 } else { Self::Avx2 };
            }
        }
        Self::Portable
    }

    /// The level to use: in tests, one below the machine's can be chosen.
    #[cfg(not(test))]
    #[inline]
    pub(crate) fn current() -> Self {
        Self::of_machine()
    }

    #[cfg(test)]
    pub(crate) fn current() -> Self {
        crate::testing::level_limit().min(Self::of_machine())
    }
}

/// Compiles a function's body once for each [`Level`] of vector instructions, and calls the best that the
/// machine has. The loops in it vectorize by themselves; helpers must be `#[inline(always)]`.
macro_rules! simd {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi2")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi2")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            // SAFETY: a level is only chosen where the machine has its features.
            #[allow(unsafe_code)]
            match $crate::cpu::Level::current() {
                $crate::cpu::Level::Portable => body($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Level::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(crate) use simd;

/// The arguments of one operation, checked.
pub(crate) struct Check(pub(crate) &'static str);

impl Check {
    /// The tensor, contiguous and `f32`.
    pub(crate) fn float(&self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        self.dtype(argument, tensor, DType::F32)
    }

    /// The tensor, contiguous and of a dtype.
    pub(crate) fn dtype(&self, argument: &'static str, tensor: &Tensor, expected: DType) -> Result<Tensor> {
        if tensor.dtype() != expected {
            return Err(Error::DType { op: self.0, argument, found: tensor.dtype(), expected });
        }
        Ok(tensor.contiguous()?)
    }

    /// A feature map of floats, contiguous: `f32`, on a GPU `bf16` too.
    pub(crate) fn map_float(&self, argument: &'static str, tensor: &Tensor) -> Result<Tensor> {
        let narrow = tensor.dtype() == DType::BF16 && crate::gpu::runs(tensor.device());
        self.dtype(argument, tensor, if narrow { DType::BF16 } else { DType::F32 })
    }

    /// One of the shape and the dtype of another.
    pub(crate) fn map_of(&self, argument: &'static str, tensor: &Tensor, other: &Tensor) -> Result<Tensor> {
        if tensor.dims() != other.dims() {
            return Err(self.shape(argument, tensor, format!("{:?}", other.dims())));
        }
        self.dtype(argument, tensor, other.dtype())
    }

    /// The error of a wrong shape.
    pub(crate) fn shape(&self, argument: &'static str, tensor: &Tensor, expected: impl ToString) -> Error {
        let expected = expected.to_string();
        Error::Shape { op: self.0, argument, found: tensor.shape().clone(), expected }
    }

    /// [`Check::shape`] for what is no tensor.
    pub(crate) fn sizes(&self, argument: &'static str, dims: &[usize], expected: impl ToString) -> Error {
        Error::Shape { op: self.0, argument, found: Shape::from(dims), expected: expected.to_string() }
    }

    /// The error of a setting that the operation does not support.
    pub(crate) fn setting(&self, message: String) -> Error {
        Error::Setting { op: self.0, message }
    }

    /// That a tensor has the given dimensions and is contiguous `f32`.
    pub(crate) fn dims(&self, argument: &'static str, tensor: &Tensor, dims: &[usize]) -> Result<Tensor> {
        if tensor.dims() != dims {
            return Err(self.shape(argument, tensor, format!("{dims:?}")));
        }
        self.float(argument, tensor)
    }

    /// The `[N, H, W, C]` of a feature map.
    pub(crate) fn map(
        &self,
        argument: &'static str,
        tensor: &Tensor,
    ) -> Result<(usize, usize, usize, usize)> {
        self.map_sizes(argument, tensor.dims())
    }

    /// [`Check::map`] for dimensions.
    pub(crate) fn map_sizes(
        &self,
        argument: &'static str,
        dims: &[usize],
    ) -> Result<(usize, usize, usize, usize)> {
        match dims {
            &[n, h, w, c] if !dims.contains(&0) => Ok((n, h, w, c)),
            _ => Err(self.sizes(argument, dims, "[images, height, width, channels], none of them 0")),
        }
    }

    /// The number of rows and channels of a tensor whose last dimension is the channel.
    pub(crate) fn rows(&self, argument: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
        match tensor.dims().last() {
            Some(&c) if tensor.elem_count() > 0 => Ok((tensor.elem_count() / c, c)),
            _ => Err(self.shape(argument, tensor, "[…, channels], not empty")),
        }
    }

    /// That a quantizer's range is `f32`, and `[2]` or, with a column for each channel of `x`, `[2, C]`.
    pub(crate) fn grids(&self, x: &Tensor, quant: Quantizer<'_>) -> Result<()> {
        match (quant.range.dims(), x.dims()) {
            ([2, columns], [.., channels]) if columns == channels => {}
            ([2], _) => {}
            _ => {
                let expected = format!("[2], or [2, C] with C the last of {:?}", x.dims());
                return Err(self.shape("range", quant.range, expected));
            }
        }
        self.float("range", quant.range).map(drop)
    }

    /// That a quantizer's range is `[2]` and `f32`.
    pub(crate) fn quantizer(&self, quant: Option<Quantizer<'_>>) -> Result<()> {
        quant.map_or(Ok(()), |quant| self.dims("range", quant.range, &[2]).map(drop))
    }
}

/// The elements of a contiguous `f32` tensor in a kernel.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("the kernel needs a contiguous tensor, found {layout:?}"),
    }
}

/// A tensor on the CPU, open for reading. (The guard's type is Candle's own affair.)
pub(crate) struct Opened<'a>(Box<dyn Deref<Target = Storage> + Sync + 'a>, &'a Layout);

/// Opens a contiguous tensor on the CPU.
pub(crate) fn open(tensor: &Tensor) -> Opened<'_> {
    let (storage, layout) = tensor.storage_and_layout();
    Opened(Box::new(storage), layout)
}

impl Opened<'_> {
    fn storage(&self) -> candle_core::Result<&CpuStorage> {
        match &**self.0 {
            Storage::Cpu(storage) => Ok(storage),
            _ => candle_core::bail!("the tensors of one operation are on different devices"),
        }
    }

    /// Its dimensions.
    pub(crate) fn dims(&self) -> &[usize] {
        self.1.dims()
    }

    /// Its elements.
    pub(crate) fn floats(&self) -> candle_core::Result<&[f32]> {
        slice(self.storage()?, self.1)
    }

    /// Its elements, of a `u8` tensor.
    pub(crate) fn bytes(&self) -> candle_core::Result<&[u8]> {
        let all = self.storage()?.as_slice::<u8>()?;
        match self.1.contiguous_offsets() {
            Some((start, end)) => Ok(&all[start..end]),
            None => candle_core::bail!("the kernel needs a contiguous tensor, found {:?}", self.1),
        }
    }
}

/// The elements of a contiguous `f32` tensor that a kernel changes in place.
pub(crate) fn slice_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    let CpuStorage::F32(all) = storage else { candle_core::bail!("the kernel needs an f32 tensor") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut all[start..end]),
        None => candle_core::bail!("the kernel needs a contiguous tensor, found {layout:?}"),
    }
}

/// The elements of a small tensor (per-channel values, a range) that a CPU kernel reads.
pub(crate) fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    Ok(open(tensor).floats()?.to_vec())
}

/// The grid of a quantizer of the whole tensor, from its range tensor.
pub(crate) fn grid(quant: Quantizer<'_>) -> candle_core::Result<Grid> {
    Ok(grids(quant)?[0])
}

/// The grids of a quantizer, from its range tensor: one, or one of each channel.
pub(crate) fn grids(quant: Quantizer<'_>) -> candle_core::Result<Vec<Grid>> {
    let range = values(quant.range)?;
    let (lo, hi) = range.split_at(range.len() / 2);
    Ok(lo.iter().zip(hi).map(|(lo, hi)| Grid::spanning(*lo, *hi, quant.bits)).collect())
}

/// What a kernel returns: its elements and their shape.
pub(crate) fn output(
    elements: Vec<f32>,
    shape: impl Into<Shape>,
) -> candle_core::Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(elements), shape.into()))
}

/// `len` elements, computed in chunks of `chunk` (the last may be shorter) on all threads, and what
/// `f(state, index of the chunk, chunk)` returns for each, in order. `state` is scratch memory made by
/// `init`, reused from chunk to chunk. The chunks come zeroed. The vector has room for `spare` more.
pub(crate) fn generate<S, R: Send>(
    len: usize,
    spare: usize,
    chunk: usize,
    init: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, usize, &mut [f32]) -> R + Sync + Send,
) -> (Vec<f32>, Vec<R>) {
    let mut elements = Vec::with_capacity(len + spare);
    let run = |state: &mut S, (i, chunk): (usize, &mut [MaybeUninit<f32>])| {
        // Zeroing here, while the chunk is about to be in cache anyway, is what makes the slice safe to
        // hand out, and costs much less than a pass of its own over the whole vector.
        for element in chunk.iter_mut() {
            element.write(0.0);
        }
        // SAFETY: all elements were just written.
        #[allow(unsafe_code)]
        let chunk = unsafe { chunk.assume_init_mut() };
        f(state, i, chunk)
    };
    let chunks = &mut elements.spare_capacity_mut()[..len];
    let results = if len <= CHUNK {
        let mut state = init();
        chunks.chunks_mut(chunk.max(1)).enumerate().map(|part| run(&mut state, part)).collect()
    } else {
        chunks.par_chunks_mut(chunk.max(1)).enumerate().map_init(init, run).collect()
    };
    // SAFETY: every one of the first `len` elements is in one of the chunks, which were all initialized.
    #[allow(unsafe_code)]
    unsafe {
        elements.set_len(len);
    }
    (elements, results)
}

/// `len` elements computed in chunks by `f(index of the chunk, chunk)`; see [`generate`].
pub(crate) fn fill(len: usize, chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) -> Vec<f32> {
    generate(len, 0, chunk, || (), |(), i, chunk| f(i, chunk)).0
}

/// `rows` rows of `width` elements, computed in blocks of `per_block` rows (the last may have fewer) on all
/// threads, and what `f(state, rows, block)` returns for each, in order. `state` is scratch memory made by
/// `init`, reused from block to block. `width` may be 0, for the results alone.
///
/// The blocks come uninitialized: where a kernel is bound by memory and its stores are scattered, zeroing first
/// costs up to 1.4 times; measured so for the depthwise convolution (1.3–1.4) and the normalization (1.1–1.25).
///
/// # Safety
/// `f` must write every element of its block.
#[allow(unsafe_code)]
pub(crate) unsafe fn blocks<T: Send + Copy, S, R: Send>(
    (rows, width): (usize, usize),
    per_block: usize,
    init: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, Range<usize>, &mut [MaybeUninit<T>]) -> R + Sync + Send,
) -> (Vec<T>, Vec<R>) {
    let len = rows * width;
    let mut elements = Vec::with_capacity(len);
    let run = |state: &mut S, (i, block): (usize, &mut [MaybeUninit<T>])| {
        f(state, i * per_block..rows.min((i + 1) * per_block), block)
    };
    let all = &mut elements.spare_capacity_mut()[..len];
    if cfg!(debug_assertions) {
        // NaN, so that tests see what is not written.
        // SAFETY: any bytes are fine for what is uninitialized.
        unsafe { all.as_mut_ptr().write_bytes(0xff, len) };
    }
    let size = per_block * width;
    let results = if width == 0 {
        let count = rows.div_ceil(per_block);
        (0..count)
            .into_par_iter()
            .with_max_len(1)
            .map_init(init, |state, i| run(state, (i, &mut [])))
            .collect()
    } else if len <= CHUNK {
        let mut state = init();
        all.chunks_mut(size).enumerate().map(|block| run(&mut state, block)).collect()
    } else {
        all.par_chunks_mut(size).enumerate().with_max_len(1).map_init(init, run).collect()
    };
    // SAFETY: `f` wrote all of each block, and the blocks cover the first `len` elements.
    unsafe { elements.set_len(len) };
    (elements, results)
}

/// Appends `len` elements; `write` must write all of them.
pub(crate) fn append<T>(elements: &mut Vec<T>, len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) {
    elements.reserve(len);
    write(&mut elements.spare_capacity_mut()[..len]);
    // SAFETY: just written.
    #[allow(unsafe_code)]
    unsafe {
        elements.set_len(elements.len() + len);
    }
}

/// Cuts `rows` rows of `width` elements in parts that depend on these numbers alone, and gives what
/// `f(rows of the part)` finds in each, in order.
pub(crate) fn parts<R: Send>(
    rows: usize,
    width: usize,
    f: impl Fn(Range<usize>) -> R + Sync + Send,
) -> Vec<R> {
    let parts = ranges(rows, width);
    if parts.len() <= 1 {
        parts.into_iter().map(f).collect()
    } else {
        parts.into_par_iter().with_max_len(1).map(f).collect()
    }
}

/// The rows of each of [`parts`].
fn ranges(rows: usize, width: usize) -> Vec<Range<usize>> {
    let per_part = rows.div_ceil(MAX_PARTS).max(MIN_PART.div_ceil(width.max(1)));
    (0..rows).step_by(per_part.max(1)).map(|start| start..rows.min(start + per_part)).collect()
}

/// As [`parts`], where a part of the rows, from `start` on, also writes its share of `len` elements, that from
/// `position(start)` on; with all of these elements.
///
/// # Safety
/// `f` must write every element of its share.
#[allow(unsafe_code)]
pub(crate) unsafe fn parts_writing<R: Send>(
    (rows, width): (usize, usize),
    len: usize,
    position: impl Fn(usize) -> usize,
    f: impl Fn(Range<usize>, &mut [MaybeUninit<f32>]) -> R + Sync + Send,
) -> (Vec<f32>, Vec<R>) {
    let mut elements = Vec::with_capacity(len);
    let mut rest = &mut elements.spare_capacity_mut()[..len];
    if cfg!(debug_assertions) {
        // NaN, so that tests see what is not written.
        rest.fill(MaybeUninit::new(f32::NAN));
    }
    let mut shares = Vec::new();
    for part in ranges(rows, width) {
        let share = position(part.end) - position(part.start);
        let (own, others) = std::mem::take(&mut rest).split_at_mut(share);
        shares.push((part, own));
        rest = others;
    }
    assert!(rest.is_empty(), "the shares of the parts are not all of the elements");
    let results = shares.into_par_iter().with_max_len(1).map(|(part, own)| f(part, own)).collect();
    // SAFETY: `f` wrote all of each share, and the shares cover the elements.
    unsafe { elements.set_len(len) };
    (elements, results)
}

/// Changes elements in place, in chunks over all threads: `f(index of the chunk's first element, chunk)`.
pub(crate) fn change(elements: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    if elements.len() <= CHUNK {
        f(0, elements);
    } else {
        elements.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| f(i * CHUNK, chunk));
    }
}
