//! The NCCL functions that are used: sums of floats over the processes of a group. The processes
//! communicate through a Unix socket, whose path is the group's name.
//!
//! The first rank receives the values of the others, adds them in the order of the ranks, and sends
//! the sums back.

// These are functions of a C library, which take pointers from the caller.
#![allow(unsafe_code)]

use crate::Error;
use crate::device::touch;
use crate::driver::{functions, give};
use crate::graphs;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The path of a group's socket, padded with zeros.
#[derive(Clone, Copy)]
#[repr(C)]
struct Id([u8; 128]);

impl Id {
    fn path(&self) -> PathBuf {
        let text: Vec<u8> = self.0.into_iter().take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&text).into_owned().into()
    }
}

/// The sockets of groups that have a name and that their first ranks have not joined yet.
static NAMED: Mutex<Vec<(PathBuf, UnixListener)>> = Mutex::new(Vec::new());

/// A process as a member of a group.
struct Group {
    /// In the first rank, the connections to the other ranks in order; in any other, the one to the
    /// first rank.
    others: Vec<UnixStream>,
    is_first: bool,
    /// Whether the connection to another process has failed.
    failed: AtomicBool,
}

/// NCCL's `ncclFloat32`, `ncclSum` and `ncclRemoteError`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const REMOTE_ERROR: c_int = 6;

fn failed(error: io::Error) -> Error {
    Error::Call(format!("the other processes: {error}"))
}

fn named(id: &mut Id) -> io::Result<()> {
    static NUMBER: Mutex<u32> = Mutex::new(0);
    let mut number = NUMBER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *number += 1;
    let path = std::env::temp_dir().join(format!("software-nccl-{}-{number}", std::process::id()));
    let bytes = path.as_os_str().as_encoded_bytes();
    let Some(place) = id.0.get_mut(..bytes.len()) else {
        return Err(io::Error::other(format!("{}: longer than 128 bytes; see TMPDIR", path.display())));
    };
    place.copy_from_slice(bytes);
    // A killed process with the same id may have left a file.
    std::fs::remove_file(&path).ok();
    let listener = UnixListener::bind(&path)?;
    NAMED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((path, listener));
    Ok(())
}

fn join(path: PathBuf, rank: usize, size: usize) -> io::Result<Group> {
    if rank > 0 {
        let mut first = UnixStream::connect(&path)?;
        first.write_all(&(rank as u64).to_le_bytes())?;
        return Ok(Group { others: vec![first], is_first: false, failed: AtomicBool::new(false) });
    }
    let mut named = NAMED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let place = named.iter().position(|(name, _)| *name == path);
    let (_, listener) = named.swap_remove(place.ok_or(io::ErrorKind::NotFound)?);
    drop(named);
    let mut others = Vec::with_capacity(size - 1);
    for _ in 1..size {
        let (mut other, _) = listener.accept()?;
        let mut rank = [0; 8];
        other.read_exact(&mut rank)?;
        others.push((u64::from_le_bytes(rank), other));
    }
    std::fs::remove_file(&path)?;
    others.sort_by_key(|(rank, _)| *rank);
    let others = others.into_iter().map(|(_, other)| other).collect();
    Ok(Group { others, is_first: true, failed: AtomicBool::new(false) })
}

impl Group {
    fn sum(&self, values: &[f32]) -> io::Result<Vec<f32>> {
        let bytes =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
        let receive = |mut from: &UnixStream| -> io::Result<Vec<f32>> {
            let mut bytes = vec![0; 4 * values.len()];
            from.read_exact(&mut bytes)?;
            Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        if !self.is_first {
            (&self.others[0]).write_all(&bytes(values))?;
            return receive(&self.others[0]);
        }
        let mut sums = values.to_vec();
        for other in &self.others {
            sums.iter_mut().zip(receive(other)?).for_each(|(sum, value)| *sum += value);
        }
        let bytes = bytes(&sums);
        self.others.iter().try_for_each(|mut other| other.write_all(&bytes))?;
        Ok(sums)
    }
}

/// Returns the group of a handle.
fn group(handle: *const c_void) -> &'static Group {
    // SAFETY: the handle comes from `ncclCommInitRank`.
    unsafe { &*handle.cast::<Group>() }
}

functions! {
    fn ncclGetVersion(version: *mut c_int) {
        give(version, 20_000)
    }

    fn ncclGetUniqueId(id: *mut Id) {
        let mut made = Id([0; 128]);
        named(&mut made).map_err(failed)?;
        give(id, made)
    }

    fn ncclCommInitRank(handle: *mut *mut c_void, size: c_int, id: Id, rank: c_int) {
        let group = join(id.path(), rank as usize, size as usize).map_err(failed)?;
        give(handle, Box::into_raw(Box::new(group)).cast())
    }

    fn ncclAllReduce(
        from: *const f32,
        to: *mut f32,
        count: usize,
        kind: c_int,
        operation: c_int,
        handle: *const c_void,
        stream: u64
    ) {
        if (kind, operation) != (FLOAT32, SUM) {
            return Err(Error::NotSupported(format!("the operation {operation} on the type {kind}")));
        }
        graphs::forbid(stream, "a sum over processes")?;
        touch(stream, &[(from as u64, 4 * count), (to as u64, 4 * count)])?;
        let group = group(handle);
        // SAFETY: `touch` has checked that these floats are within an allocation.
        let sums = group.sum(unsafe { std::slice::from_raw_parts(from, count) });
        let sums = sums.inspect_err(|_| group.failed.store(true, Ordering::Relaxed)).map_err(failed)?;
        // SAFETY: `touch` has checked that these floats are within an allocation.
        unsafe { to.copy_from_nonoverlapping(sums.as_ptr(), count) };
        Ok(())
    }

    fn ncclCommGetAsyncError(handle: *const c_void, status: *mut c_int) {
        let failed = group(handle).failed.load(Ordering::Relaxed);
        give(status, if failed { REMOTE_ERROR } else { 0 })
    }

    fn ncclCommAbort(handle: *mut c_void) {
        // SAFETY: the handle comes from `ncclCommInitRank`, and nothing uses it any more.
        drop(unsafe { Box::from_raw(handle.cast::<Group>()) });
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(_status: c_int) -> *const c_char {
    const MEANING: &CStr = c"an error (software-gpu says which on stderr)";
    MEANING.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{allocated, alone, upload};

    /// Runs three ranks as threads, each with its own stream; then one is lost.
    #[test]
    fn sums_of_three_ranks() {
        let _alone = alone();
        let mut id = Id([0; 128]);
        assert_eq!(ncclGetUniqueId(&raw mut id), 0);
        let run = |rank: c_int| {
            let mut handle = std::ptr::null_mut();
            assert_eq!(ncclCommInitRank(&raw mut handle, 3, id, rank), 0);
            let (own, sums) = (upload(&[rank as f32, 0.5, 1e8]), upload(&[0.0; 3]));
            let stream = 0x10_0000 + rank as u64;
            let sum = |count| {
                ncclAllReduce(own as *const f32, sums as *mut f32, count, FLOAT32, SUM, handle, stream)
            };
            assert_eq!(sum(2), 0);
            assert_eq!(allocated(sums, 3), [3.0, 1.5, 0.0]);
            assert_ne!(sum(4), 0, "more than there is");
            let mut status = -1;
            let mut state = || {
                assert_eq!(ncclCommGetAsyncError(handle, &raw mut status), 0);
                status
            };
            assert_eq!(state(), 0);
            if rank < 2 {
                assert_ne!(sum(3), 0, "without the third");
                assert_eq!(state(), REMOTE_ERROR);
            }
            assert_eq!(ncclCommAbort(handle), 0);
        };
        std::thread::scope(|scope| (0..3).for_each(|rank| drop(scope.spawn(move || run(rank)))));
        assert!(!id.path().exists());
    }
}
