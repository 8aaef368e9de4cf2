//! Graphs: work that a stream records instead of doing it, and does as often as the graph is launched.
//!
//! Memory that is taken while a stream records is the graph's, at the same address in every launch, and must be given back
//! before the recording ends. A launch makes it hold no number when it is taken and when it is given back, so what is read too
//! early or too late shows. What a GPU could not record, or would do wrong when it does it again, is an error.

use crate::device::{Handle, Pointer, device, stream};
use crate::streams::Stream;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{LazyLock, Mutex, MutexGuard};

/// Some work of a stream, which is told it.
type Work = Box<dyn Fn(Handle) -> Result<()> + Send>;

/// What a stream has recorded.
#[derive(Default)]
pub(crate) struct Graph {
    work: Vec<Work>,
    /// Sizes of the memory that it takes, by address, and whether it has given it back.
    memory: BTreeMap<Pointer, (usize, bool)>,
    /// What was forbidden, if anything was.
    problem: Option<String>,
}

/// What the streams record that do.
fn recordings() -> MutexGuard<'static, HashMap<Stream, Graph>> {
    static RECORDINGS: LazyLock<Mutex<HashMap<Stream, Graph>>> = LazyLock::new(Mutex::default);
    RECORDINGS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Whether a stream records.
pub(crate) fn records(handle: Handle) -> bool {
    recordings().contains_key(&stream(handle))
}

/// Does some work of a stream, or records it.
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
        // SAFETY: all of an allocation: `touch`.
        #[allow(unsafe_code)]
        unsafe { (address as *mut u8).write_bytes(value, size) };
        Ok(())
    })
}

/// An error where a stream records, of what can't be recorded.
pub(crate) fn forbid(handle: Handle, what: &str) -> Result<()> {
    match recordings().get_mut(&stream(handle)) {
        None => Ok(()),
        Some(graph) => Err(Error::Call(graph.problem.insert(format!("{what} is not for a graph")).clone())),
    }
}

/// A stream begins to record.
pub(crate) fn begin(handle: Handle) -> Result<()> {
    if handle == 0 {
        return Err(Error::Call("the default stream can't record".into()));
    }
    forbid(handle, "another recording")?;
    recordings().insert(stream(handle), Graph::default());
    Ok(())
}

/// What the stream has recorded.
pub(crate) fn end(handle: Handle) -> Result<Graph> {
    let graph = recordings().remove(&stream(handle));
    let graph = graph.ok_or_else(|| Error::Call("the stream does not record".into()))?;
    let kept = graph.memory.iter().find(|(_, (_, given_back))| !given_back);
    let kept = kept.map(|(address, (size, _))| format!("{size} bytes at {address:#x} are not given back"));
    match graph.problem.clone().or(kept) {
        None => Ok(graph),
        Some(problem) => {
            graph.free()?;
            Err(Error::Call(problem))
        }
    }
}

/// Memory that a recorded graph takes.
pub(crate) fn allocate(size: usize, handle: Handle) -> Result<Pointer> {
    let address = device().allocate(size)?;
    if let Some(graph) = recordings().get_mut(&stream(handle)) {
        graph.memory.insert(address, (size, false));
    }
    spoil(address, size, handle)?;
    Ok(address)
}

/// Memory that a recorded graph gives back.
pub(crate) fn free(address: Pointer, handle: Handle) -> Result<()> {
    let mut recordings = recordings();
    let Some(graph) = recordings.get_mut(&stream(handle)) else { return Ok(()) };
    match graph.memory.get_mut(&address) {
        Some((size, given_back @ false)) => {
            *given_back = true;
            let size = *size;
            drop(recordings);
            spoil(address, size, handle)
        }
        _ => {
            let problem = format!("memory at {address:#x} is given back that is not the graph's");
            Err(Error::Call(graph.problem.insert(problem).clone()))
        }
    }
}

/// Fills memory with what is no number.
fn spoil(address: Pointer, size: usize, handle: Handle) -> Result<()> {
    set(address, 0xff, size, handle)
}

impl Graph {
    /// Does all of it, in a stream.
    pub(crate) fn run(&self, handle: Handle) -> Result<()> {
        forbid(handle, "another graph")?;
        self.work.iter().try_for_each(|work| work(handle))
    }

    /// Gives its memory back to the host.
    pub(crate) fn free(self) -> Result<()> {
        let mut device = device();
        self.memory.into_keys().try_for_each(|address| device.free(address))
    }
}
