//! The shared parts of the CPU kernels: reading tensors, changing them in place, and the choice of
//! vector instructions at run time.

use crate::check::Check;
use crate::{Quantizer, Result};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use quant_core::Grid;
use std::cell::Cell;

/// The vector instructions that [`simd!`] compiles for, from the least to the most capable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Instructions {
    /// The instructions that every machine of the architecture has.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    /// The instructions whose registers hold a tile of a product of 8 rows by 3 vectors.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const WIDE: Self = Self::Avx512;
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) const WIDE: Self = Self::Portable;

    /// Returns the best instructions of this machine. (The standard library caches the detection.)
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

    /// Returns the instructions to use: the machine's best, unless a test forbids them.
    #[cfg(not(test))]
    #[inline]
    pub(crate) fn current() -> Self {
        Self::of_machine()
    }

    #[cfg(test)]
    pub(crate) fn current() -> Self {
        crate::testing::allowed_instructions().min(Self::of_machine())
    }

    /// Returns whether the machine has AVX512-BF16 in addition to these instructions.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn have_bf16(self) -> bool {
        self >= Self::WIDE && std::arch::is_x86_feature_detected!("avx512bf16")
    }
}

/// Compiles a function's body once for each of the [`Instructions`], and calls the best version
/// that the machine can run. The compiler vectorizes the loops in the body. Closures in the body
/// are compiled for the same instructions; functions that it calls must be `#[inline(always)]`.
macro_rules! simd {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($life:lifetime $(,)?)? $($element:ident: $bound:path),*>)? (
            $($arg:ident: $ty:ty),* $(,)?
        ) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$($life,)? $($element: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            fn portable $(<$($life,)? $($element: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi2")]
            fn avx512 $(<$($life,)? $($element: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi2")]
            fn avx2 $(<$($life,)? $($element: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            // SAFETY: `current` returns only instructions that the machine has.
            #[allow(unsafe_code)]
            match $crate::cpu::Instructions::current() {
                $crate::cpu::Instructions::Portable => portable($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Instructions::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Instructions::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(crate) use simd;

/// Prefetches the cache line at an address.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address is allowed.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The number of bytes between an access and its prefetch.
const AHEAD: usize = 2048;

/// The number of bytes of a cache line.
const LINE: usize = 64;

/// Prefetches the memory 2 KiB beyond the elements `start..start + len` that the caller reads.
///
/// Processors prefetch by themselves, but not well enough. Compilers turn
/// `if passes { gy } else { 0 }` into a masked load, for which an AMD Zen 5 does not prefetch: a
/// loop over maps that are not in cache takes twice as long there without this function. On a Xeon
/// with AMX it takes 1.5 times as long for `bf16` and 1.2 times for floats.
#[inline(always)]
pub(crate) fn read_ahead<T>(elements: &[T], start: usize, len: usize) {
    for at in (start..start + len).step_by(LINE / size_of::<T>()) {
        prefetch(elements.as_ptr().wrapping_add(at + AHEAD / size_of::<T>()));
    }
}

/// Prefetches the cache line 2 KiB beyond `line`, which the caller writes. Without this, a loop
/// that rounds floats to a `bf16` map takes 2.4 times as long on a Xeon with AMX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn write_ahead<T>(line: &[T]) {
    prefetch(line.as_ptr().wrapping_byte_add(AHEAD));
}

/// A CPU tensor that is open for reading.
pub(crate) struct Opened<'a>(StorageRef<'a>, &'a Layout);

/// Opens a contiguous CPU tensor for reading.
pub(crate) fn open(tensor: &Tensor) -> Opened<'_> {
    let (storage, layout) = tensor.storage_and_layout();
    Opened(storage, layout)
}

impl Opened<'_> {
    /// Returns the tensor's dimensions.
    pub(crate) fn dims(&self) -> &[usize] {
        self.1.dims()
    }

    /// Returns the tensor's elements.
    pub(crate) fn elements<T: WithDType>(&self) -> candle_core::Result<&[T]> {
        let Storage::Cpu(storage) = &*self.0 else {
            candle_core::bail!("the tensors of one operation are on different devices");
        };
        let all = storage.as_slice::<T>()?;
        match self.1.contiguous_offsets() {
            Some((start, end)) => Ok(&all[start..end]),
            None => candle_core::bail!("the kernel needs a contiguous tensor, found {:?}", self.1),
        }
    }

    /// Returns the elements of an `f32` tensor.
    pub(crate) fn floats(&self) -> candle_core::Result<&[f32]> {
        self.elements()
    }
}

/// Copies the elements of a small tensor (per-channel values, a range) for a CPU kernel.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(open(tensor).floats()?.to_vec())
}

/// Returns the grid of a whole-tensor quantizer, from its range tensor.
pub(crate) fn grid(quant: Quantizer<'_>) -> Result<Grid> {
    Ok(grids(quant)?[0])
}

/// Returns the grids of a quantizer, from its range tensor: one grid, or one for each channel.
pub(crate) fn grids(quant: Quantizer<'_>) -> Result<Vec<Grid>> {
    let range = values(quant.range)?;
    let (lo, hi) = range.split_at(range.len() / 2);
    Ok(lo.iter().zip(hi).map(|(lo, hi)| Grid::spanning(*lo, *hi, quant.bits)).collect())
}

/// Creates a CPU tensor from elements that a kernel has computed.
pub(crate) fn tensor<T: WithDType>(elements: Vec<T>, dims: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(elements, dims.into(), &Device::Cpu)?)
}

/// Changes a contiguous `f32` tensor on the CPU in place with `f(elements, others)`, where `f`
/// reads the elements of `others`.
///
/// # Errors
/// Returns an error if one of `others` shares memory with `tensor`, or if a tensor is not
/// contiguous `f32`.
pub(crate) fn update<const N: usize>(
    check: &Check,
    argument: &'static str,
    tensor: &Tensor,
    others: [&Tensor; N],
    f: impl FnOnce(&mut [f32], [&[f32]; N]),
) -> Result<()> {
    /// The change as an operation, because Candle gives mutable elements only to operations.
    struct InPlace<F>(Cell<Option<F>>);

    impl<F: FnOnce(&mut [f32])> InplaceOp1 for InPlace<F> {
        fn name(&self) -> &'static str {
            "in-place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let CpuStorage::F32(all) = storage else { candle_core::bail!("the kernel needs an f32 tensor") };
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!("the kernel needs a contiguous tensor, found {layout:?}")
            };
            if let Some(f) = self.0.take() {
                f(&mut all[start..end]);
            }
            Ok(())
        }
    }

    let others = others.map(open);
    let memory = |opened: &Opened<'_>| std::ptr::from_ref::<Storage>(&opened.0);
    if others.iter().any(|other| memory(other) == memory(&open(tensor))) {
        return Err(check
            .setting(format!("{argument} is changed in place and must not share memory with what is read")));
    }
    let mut read = [&[][..]; N];
    for (read, other) in read.iter_mut().zip(&others) {
        *read = other.floats()?;
    }
    Ok(tensor.inplace_op1(&InPlace(Cell::new(Some(|elements: &mut [f32]| f(elements, read)))))?)
}
