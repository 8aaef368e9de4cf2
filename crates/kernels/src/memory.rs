//! Settings that keep the memory of a training step for the next step, which allocates the same
//! again. They apply to the whole process and change only its speed.

/// Makes glibc's allocator keep its pages and use huge ones.
///
/// Otherwise, fresh zeroed pages for each tensor take a tenth of the time of a step. Call this
/// before anything else runs. With another C library or 32-bit addresses it does nothing.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
#[allow(unsafe_code)]
pub fn keep_pages() {
    // SAFETY: mallopt takes plain numbers. The addresses passed to madvise lie in malloc's block,
    // which is freed once, and madvise is only a hint.
    unsafe {
        // Large blocks get no separate mapping, the end of the heap is not given back, and all
        // threads use one heap. The heaps of other threads would be given back as soon as they are
        // empty.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // The first block reserves addresses and asks for huge pages there. Only the addresses that
        // are used take memory. When the block is freed, it becomes the end of the heap, from which
        // all other blocks come.
        let block = libc::malloc(RESERVED);
        if !block.is_null() {
            let start = (block as usize).next_multiple_of(HUGE_PAGE);
            let len = block as usize + RESERVED - start;
            libc::madvise(start as *mut libc::c_void, len, libc::MADV_HUGEPAGE);
            libc::free(block);
        }
    }
}

/// The number of bytes of addresses reserved for the heap: several times what training the paper's
/// networks takes.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const RESERVED: usize = 4 << 30;

/// The size of a huge page on x86-64, and of the smaller huge pages elsewhere.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const HUGE_PAGE: usize = 2 << 20;

/// Does nothing, because this platform has no such setting.
#[cfg(not(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")))]
pub fn keep_pages() {}

/// Makes the driver keep the GPU memory that a step frees. By default, this memory goes back to the
/// system whenever the host waits for the device.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub fn keep_gpu_memory(context: &candle_core::cuda::cudarc::driver::CudaContext) {
    use candle_core::cuda::cudarc::driver::{result, sys};
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's, its default pool lives as long as the process, and the
    // attribute is a u64 that is read before the call returns.
    unsafe {
        if let Ok(pool) = result::device::get_default_mem_pool(context.cu_device()) {
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).ok();
        }
    }
}
