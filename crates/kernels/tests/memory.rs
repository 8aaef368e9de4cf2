//! What [`kernels::memory::keep_pages`] asks of the system for the heap of a process: without the test harness, as tests of its
//! run in threads that have heaps of their own.

/// The flags of the mapping that an address lies in, by `/proc/self/smaps`.
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

/// Large tensors lie where huge pages are asked for. (Compilers leave out what is allocated and freed unused, and so did the
/// block that was to bring this about.)
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
