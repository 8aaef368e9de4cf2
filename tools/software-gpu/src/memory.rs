//! The memory of the device: allocations of the host, each access to which is checked.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// All allocations at the time of a launch.
#[derive(Default)]
pub(crate) struct Allocations {
    /// Where each begins and ends, in ascending order.
    bounds: Vec<(u64, u64)>,
    /// Whether the launch has accessed it.
    touched: Vec<AtomicBool>,
}

impl Allocations {
    pub(crate) fn new(ascending: impl Iterator<Item = (u64, u64)>) -> Self {
        let bounds: Vec<_> = ascending.collect();
        let touched = bounds.iter().map(|_| AtomicBool::new(false)).collect();
        Self { bounds, touched }
    }

    /// The allocation that all these bytes are of, which is accessed then.
    pub(crate) fn find(&self, address: u64, size: usize) -> Option<(u64, u64)> {
        let i = self.bounds.partition_point(|&(start, _)| start <= address).checked_sub(1)?;
        let (start, end) = self.bounds[i];
        if address.checked_add(size as u64)? > end {
            return None;
        }
        self.touched[i].store(true, Ordering::Relaxed);
        Some((start, end))
    }

    /// Those that were accessed: where each begins, and its size.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (u64, usize)> {
        let all = self.bounds.iter().zip(&self.touched);
        all.filter(|(_, touched)| touched.load(Ordering::Relaxed))
            .map(|(&(start, end), _)| (start, (end - start) as usize))
    }
}

/// What lies at an address, in 1, 2, 4 or 8 bytes. Threads may race for it as they may on a GPU.
///
/// # Safety
/// The address is aligned, and of memory that lives and is accessed by these functions alone meanwhile.
#[allow(unsafe_code)]
pub(crate) unsafe fn load(address: u64, size: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(address as *mut u8).load(Ordering::Relaxed).into(),
            2 => AtomicU16::from_ptr(address as *mut u16).load(Ordering::Relaxed).into(),
            4 => AtomicU32::from_ptr(address as *mut u32).load(Ordering::Relaxed).into(),
            _ => AtomicU64::from_ptr(address as *mut u64).load(Ordering::Relaxed),
        }
    }
}

/// Puts the low 1, 2, 4 or 8 bytes of a value to an address.
///
/// # Safety
/// As of [`load`].
#[allow(unsafe_code)]
pub(crate) unsafe fn store(address: u64, size: usize, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(address as *mut u8).store(value as u8, Ordering::Relaxed),
            2 => AtomicU16::from_ptr(address as *mut u16).store(value as u16, Ordering::Relaxed),
            4 => AtomicU32::from_ptr(address as *mut u32).store(value as u32, Ordering::Relaxed),
            _ => AtomicU64::from_ptr(address as *mut u64).store(value, Ordering::Relaxed),
        }
    }
}
