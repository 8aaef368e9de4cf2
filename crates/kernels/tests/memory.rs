//! Tests what [`kernels::memory::keep_pages`] requests from the system for the heap of a process.
//! It runs without the test harness, which runs tests in threads with heaps of their own.

/// Returns the flags of the mapping that contains an address, from `/proc/self/smaps`.
fn flags(address: usize) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((first, last)) = line.split(' ').next().and_then(|range| range.split_once('-'))
            && let (Ok(first), Ok(last)) = (usize::from_str_radix(first, 16), usize::from_str_radix(last, 16))
        {
            inside = (first..last).contains(&address);
        } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
            return flags.into();
        }
    }
    panic!("no mapping has the address {address:x}");
}

/// Checks that large allocations lie where huge pages are requested. (Compilers remove an
/// allocation that is freed unused. They once removed the block by which `keep_pages` makes the
/// request.)
fn main() {
    let supported = cfg!(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"));
    if !supported || !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        println!("skipped: there are no transparent huge pages here");
        return;
    }
    kernels::memory::keep_pages();
    let blocks: Vec<Vec<u8>> = [8 << 20, 300 << 20, 2 << 30].map(Vec::with_capacity).into();
    for block in &blocks {
        let middle = block.as_ptr() as usize + block.capacity() / 2;
        assert!(flags(middle).split_whitespace().any(|flag| flag == "hg"), "{}", flags(middle));
    }
}
