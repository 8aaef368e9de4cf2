//! The only GPU, with its memory, which is the host's, and its streams.

// Memory is allocated and freed by address.
#![allow(unsafe_code)]

use crate::streams::{Stream, Streams};
use crate::{Error, Result};
use std::alloc::Layout;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};

/// The handle of a stream, an event, a module or a graph: a number, or an address in this library.
pub(crate) type Handle = u64;
pub(crate) type Pointer = u64;

/// The handle that stands for the stream of the calling thread (`CU_STREAM_PER_THREAD`).
pub(crate) const OF_THIS_THREAD: Handle = 2;
/// Allocations begin at multiples of this number, as on a GPU.
const ALIGN: usize = 256;

/// The state of the device.
#[derive(Default)]
pub(crate) struct Device {
    /// The allocations by address.
    allocations: BTreeMap<Pointer, Allocation>,
    pub(crate) streams: Streams,
}

struct Allocation {
    size: usize,
    /// The last work that used the allocation.
    work: Option<(Stream, u64)>,
}

pub(crate) fn device() -> MutexGuard<'static, Device> {
    static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(Mutex::default);
    DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Returns a number that is not yet a handle and has no special meaning in the API.
pub(crate) fn new_handle() -> Handle {
    static NEXT: AtomicU64 = AtomicU64::new(0x1000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns the stream of a handle. It includes the calling thread's number if the handle is that of
/// the thread's own stream.
pub(crate) fn stream(handle: Handle) -> Stream {
    thread_local! {
        static NUMBER: Cell<u64> = Cell::new(new_handle());
    }
    (handle, if handle == OF_THIS_THREAD { NUMBER.get() } else { 0 })
}

impl Device {
    /// Returns the start and the end of each allocation, in ascending order.
    pub(crate) fn bounds(&self) -> impl Iterator<Item = (Pointer, Pointer)> {
        self.allocations.iter().map(|(&start, allocation)| (start, start + allocation.size as u64))
    }

    /// Returns whether an address is in the device's memory. Otherwise it is the host's.
    pub(crate) fn has(&mut self, address: Pointer) -> bool {
        self.allocation(address, 1).is_ok()
    }

    /// Returns the allocation that contains `size` bytes at `address`.
    fn allocation(&mut self, address: Pointer, size: usize) -> Result<&mut Allocation> {
        let found = self.allocations.range_mut(..=address).next_back();
        match found {
            Some((start, allocation)) if address + size as u64 <= start + allocation.size as u64 => {
                Ok(allocation)
            }
            _ => Err(Error::Call(format!("{size} bytes at {address:#x} are of no allocation"))),
        }
    }

    /// Records a stream's use of memory. It is an error if the previous use is not ordered before
    /// it.
    pub(crate) fn touch(
        &mut self,
        handle: Handle,
        memory: impl IntoIterator<Item = (Pointer, usize)>,
    ) -> Result<()> {
        let stream = stream(handle);
        // The default stream waits for all other streams, and they wait for it.
        if handle == 0 {
            self.streams.wait_for_all();
        }
        let work = self.streams.work(stream);
        for (address, size) in memory {
            let before = self.allocation(address, size)?.work.replace(work);
            if before.is_some_and(|before| !self.streams.is_before(before, stream)) {
                return Err(Error::Call(format!(
                    "memory at {address:#x} is used in stream {stream:x?}, and nothing puts that behind the work of \
                     {:x?} on it",
                    before.expect("some").0
                )));
            }
        }
        if handle == 0 {
            self.streams.wait(stream);
        }
        Ok(())
    }

    pub(crate) fn allocate(&mut self, size: usize) -> Result<Pointer> {
        let layout = Layout::from_size_align(size, ALIGN).ok().filter(|_| size > 0);
        let layout = layout.ok_or_else(|| Error::Call(format!("an allocation of {size} bytes")))?;
        // SAFETY: the size of the layout is not 0.
        let address = unsafe { std::alloc::alloc(layout) };
        if address.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        // These bytes are NaN as floats, so that reads of memory that nobody wrote are noticed.
        // SAFETY: the allocation has `size` bytes.
        unsafe { address.write_bytes(0xff, size) };
        self.allocations.insert(address as u64, Allocation { size, work: None });
        Ok(address as u64)
    }

    pub(crate) fn free(&mut self, address: Pointer) -> Result<()> {
        let allocation = self.allocations.remove(&address);
        let allocation =
            allocation.ok_or_else(|| Error::Call(format!("no allocation begins at {address:#x}")))?;
        let layout = Layout::from_size_align(allocation.size, ALIGN).expect("a size");
        // SAFETY: `allocate` has allocated this address with this layout.
        unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        Ok(())
    }
}

/// Records a library's use of memory in a stream.
pub(crate) fn touch(handle: Handle, memory: &[(Pointer, usize)]) -> Result<()> {
    device().touch(handle, memory.iter().copied())
}
