//! The memory of the device. It consists of allocations of the host, and each access to them is
//! checked.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// All allocations at the time of a launch.
#[derive(Default)]
pub(crate) struct Allocations {
    /// The start and the end of each allocation, in ascending order.
    bounds: Vec<(u64, u64)>,
    /// Whether the launch has accessed the allocation.
    touched: Vec<AtomicBool>,
}

impl Allocations {
    pub(crate) fn new(ascending: impl Iterator<Item = (u64, u64)>) -> Self {
        let bounds: Vec<_> = ascending.collect();
        let touched = bounds.iter().map(|_| AtomicBool::new(false)).collect();
        Self { bounds, touched }
    }

    /// Returns the start and the end of the allocation that contains all these bytes, and marks it
    /// as accessed.
    pub(crate) fn find(&self, address: u64, size: usize) -> Option<(u64, u64)> {
        let i = self.bounds.partition_point(|&(start, _)| start <= address).checked_sub(1)?;
        let (start, end) = self.bounds[i];
        if address.checked_add(size as u64)? > end {
            return None;
        }
        self.touched[i].store(true, Ordering::Relaxed);
        Some((start, end))
    }

    /// Returns the start and the size of each allocation that was accessed.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (u64, usize)> {
        let all = self.bounds.iter().zip(&self.touched);
        all.filter(|(_, touched)| touched.load(Ordering::Relaxed))
            .map(|(&(start, end), _)| (start, (end - start) as usize))
    }
}

/// Reads 1, 2, 4 or 8 bytes at an address. Threads may race for them, as on a GPU.
///
/// # Safety
/// The address must be a multiple of `size`, in live memory that only these functions access
/// meanwhile.
#[allow(unsafe_code)]
pub(crate) unsafe fn load(address: u64, size: usize) -> u64 {
    // SAFETY: the caller guarantees a valid and aligned address.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(address as *mut u8).load(Ordering::Relaxed).into(),
            2 => AtomicU16::from_ptr(address as *mut u16).load(Ordering::Relaxed).into(),
            4 => AtomicU32::from_ptr(address as *mut u32).load(Ordering::Relaxed).into(),
            _ => AtomicU64::from_ptr(address as *mut u64).load(Ordering::Relaxed),
        }
    }
}

/// Writes the low 1, 2, 4 or 8 bytes of a value to an address.
///
/// # Safety
/// The conditions are those of [`load`].
#[allow(unsafe_code)]
pub(crate) unsafe fn store(address: u64, size: usize, value: u64) {
    // SAFETY: the caller guarantees a valid and aligned address.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(address as *mut u8).store(value as u8, Ordering::Relaxed),
            2 => AtomicU16::from_ptr(address as *mut u16).store(value as u16, Ordering::Relaxed),
            4 => AtomicU32::from_ptr(address as *mut u32).store(value as u32, Ordering::Relaxed),
            _ => AtomicU64::from_ptr(address as *mut u64).store(value, Ordering::Relaxed),
        }
    }
}
