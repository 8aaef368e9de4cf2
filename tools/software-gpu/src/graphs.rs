//! Graphs: work that a stream records instead of running it. Each launch of the graph runs it.
//!
//! Memory that is allocated while a stream records belongs to the graph. It has the same address in
//! every launch and must be freed before the recording ends. A launch fills it with NaN when it is
//! allocated and when it is freed, so that reads that are too early or too late are noticed. Work
//! that a GPU cannot record, or would repeat incorrectly, is an error.

use crate::device::{Handle, Pointer, device, stream};
use crate::streams::Stream;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{LazyLock, Mutex, MutexGuard};

/// A piece of work. It is called with the stream that it runs in.
type Work = Box<dyn Fn(Handle) -> Result<()> + Send>;

/// The work that a stream has recorded.
#[derive(Default)]
pub(crate) struct Graph {
    work: Vec<Work>,
    /// The graph's allocations by address: the size of each, and whether the graph has freed it.
    memory: BTreeMap<Pointer, (usize, bool)>,
    /// The forbidden operation, if there was one.
    problem: Option<String>,
}

/// Returns the graphs that are being recorded, by stream.
fn recordings() -> MutexGuard<'static, HashMap<Stream, Graph>> {
    static RECORDINGS: LazyLock<Mutex<HashMap<Stream, Graph>>> = LazyLock::new(Mutex::default);
    RECORDINGS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Returns whether a stream is recording.
pub(crate) fn records(handle: Handle) -> bool {
    recordings().contains_key(&stream(handle))
}

/// Runs work in a stream, or records it if the stream is recording.
pub(crate) fn put(handle: Handle, work: impl Fn(Handle) -> Result<()> + Send + 'static) -> Result<()> {
    if let Some(graph) = recordings().get_mut(&stream(handle)) {
        graph.work.push(Box::new(work));
        return Ok(());
    }
    work(handle)
}

/// Fills memory with a byte, in a stream.
pub(crate) fn set(address: Pointer, value: u8, size: usize, handle: Handle) -> Result<()> {
    put(handle, move |handle| {
        device().touch(handle, [(address, size)])?;
        // SAFETY: `touch` has checked that these bytes are within an allocation.
        #[allow(unsafe_code)]
        unsafe {
            (address as *mut u8).write_bytes(value, size)
        };
        Ok(())
    })
}

/// Returns an error if a stream is recording, because `what` cannot be recorded. The recording then
/// fails when it ends.
pub(crate) fn forbid(handle: Handle, what: &str) -> Result<()> {
    match recordings().get_mut(&stream(handle)) {
        None => Ok(()),
        Some(graph) => Err(Error::Call(graph.problem.insert(format!("{what} is not for a graph")).clone())),
    }
}

/// Starts a recording in a stream.
pub(crate) fn begin(handle: Handle) -> Result<()> {
    if handle == 0 {
        return Err(Error::Call("the default stream can't record".into()));
    }
    forbid(handle, "another recording")?;
    recordings().insert(stream(handle), Graph::default());
    Ok(())
}

/// Ends a stream's recording and returns it.
pub(crate) fn end(handle: Handle) -> Result<Graph> {
    let graph = recordings().remove(&stream(handle));
    let graph = graph.ok_or_else(|| Error::Call("the stream does not record".into()))?;
    let kept = graph.memory.iter().find(|(_, (_, freed))| !freed);
    let kept = kept.map(|(address, (size, _))| format!("{size} bytes at {address:#x} are not freed"));
    match graph.problem.clone().or(kept) {
        None => Ok(graph),
        Some(problem) => {
            graph.free()?;
            Err(Error::Call(problem))
        }
    }
}

/// Allocates memory in a recording.
pub(crate) fn allocate(size: usize, handle: Handle) -> Result<Pointer> {
    let address = device().allocate(size)?;
    if let Some(graph) = recordings().get_mut(&stream(handle)) {
        graph.memory.insert(address, (size, false));
    }
    spoil(address, size, handle)?;
    Ok(address)
}

/// Frees memory in a recording.
pub(crate) fn free(address: Pointer, handle: Handle) -> Result<()> {
    let mut recordings = recordings();
    let Some(graph) = recordings.get_mut(&stream(handle)) else { return Ok(()) };
    match graph.memory.get_mut(&address) {
        Some((size, freed @ false)) => {
            *freed = true;
            let size = *size;
            drop(recordings);
            spoil(address, size, handle)
        }
        _ => {
            let problem = format!("memory at {address:#x} is freed that is not the graph's");
            Err(Error::Call(graph.problem.insert(problem).clone()))
        }
    }
}

/// Fills memory with bytes 0xff, which are NaN as floats.
fn spoil(address: Pointer, size: usize, handle: Handle) -> Result<()> {
    set(address, 0xff, size, handle)
}

impl Graph {
    /// Runs all of the graph's work in a stream.
    pub(crate) fn run(&self, handle: Handle) -> Result<()> {
        forbid(handle, "another graph")?;
        self.work.iter().try_for_each(|work| work(handle))
    }

    /// Returns the graph's memory to the host.
    pub(crate) fn free(self) -> Result<()> {
        let mut device = device();
        self.memory.into_keys().try_for_each(|address| device.free(address))
    }
}
