//! How memory is kept from one training step for the next, which needs the same again. Both settings are of the whole
//! process; without them all runs as it does, only slower.

/// Makes glibc's allocator keep its pages, huge ones, as getting fresh zeroed pages for each tensor of a step costs a tenth
/// of its time. To be called before anything else runs; with another C library, or short addresses, it does nothing.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
#[allow(unsafe_code)]
pub fn keep_pages() {
    // SAFETY: mallopt takes plain numbers; madvise is a hint about addresses of malloc's block, which is freed once.
    unsafe {
        // No separate mapping for large blocks, no memory given back from the end of the heap, and one heap for
        // all threads: those of others are given back as soon as they are empty.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // The first block reserves addresses, of which only those that are used take memory, and which are asked to lie on
        // huge pages. Freed, they are the end of the heap, which everything else comes from.
        let block = libc::malloc(RESERVED);
        if !block.is_null() {
            let start = (block as usize).next_multiple_of(HUGE_PAGE);
            let len = block as usize + RESERVED - start;
            libc::madvise(start as *mut libc::c_void, len, libc::MADV_HUGEPAGE);
            libc::free(block);
        }
    }
}

/// Addresses reserved for the heap: what training the paper's networks takes, some times over.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const RESERVED: usize = 4 << 30;

/// The size of a huge page on x86-64, and of the smaller ones elsewhere.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
const HUGE_PAGE: usize = 2 << 20;

/// Does nothing: there is no such setting.
#[cfg(not(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")))]
pub fn keep_pages() {}

/// Lets the driver keep a GPU's memory that a step gives back: by default it goes back to the system whenever the host
/// waits for the device.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub fn keep_gpu_memory(context: &candle_core::cuda::cudarc::driver::CudaContext) {
    use candle_core::cuda::cudarc::driver::{result, sys};
    let mut threshold = u64::MAX;
    // SAFETY: the device is one that the context was made for, its default pool lives as long as the process, and the
    // attribute is a u64, which is read before the call returns.
    unsafe {
        if let Ok(pool) = result::device::get_default_mem_pool(context.cu_device()) {
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).ok();
        }
    }
}
