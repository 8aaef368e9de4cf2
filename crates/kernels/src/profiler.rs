//! Where the time of a step goes: each operation's calls, seconds, multiplications and memory
//! traffic.
//!
//! The profiler is off until [`start`] is called. Then every operation of this crate records its
//! time, its multiplications and additions, and the bytes that it must at least read and write
//! (each operand once, each result once). Operations are called one after the other, so nothing is
//! counted twice.

use crate::work::lock;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The cost of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// The number of calls.
    pub calls: usize,
    /// The wall time.
    pub time: Duration,
    /// The number of multiplications and additions in products and convolutions; 0 for operations
    /// that are bound by memory.
    pub operations: usize,
    /// The number of bytes that must be moved.
    pub bytes: usize,
}

static ON: AtomicBool = AtomicBool::new(false);
static COSTS: Mutex<BTreeMap<&'static str, Cost>> = Mutex::new(BTreeMap::new());

/// Clears all costs and starts the profiler.
pub fn start() {
    lock(&COSTS).clear();
    ON.store(true, Ordering::Relaxed);
}

/// Stops the profiler and returns the costs by the operations' names.
pub fn stop() -> BTreeMap<&'static str, Cost> {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut *lock(&COSTS))
}

/// A guard that records an operation's cost when it is dropped.
pub(crate) struct Note(Option<(&'static str, Instant, usize, usize)>);

/// Returns a guard that must be held while the operation runs.
pub(crate) fn note(name: &'static str, operations: usize, bytes: usize) -> Note {
    Note(ON.load(Ordering::Relaxed).then(|| (name, Instant::now(), operations, bytes)))
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Some((name, started, operations, bytes)) = self.0 {
            let time = started.elapsed();
            let mut costs = lock(&COSTS);
            let cost = costs.entry(name).or_default();
            cost.calls += 1;
            cost.time += time;
            cost.operations += operations;
            cost.bytes += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pointwise;
    use crate::testing::random;

    #[test]
    fn an_operation_is_counted_while_the_profiler_runs() {
        let (x, w) = (random(1, &[10, 3]), random(2, &[3, 4]));
        start();
        pointwise::grad_input(&pointwise::forward(&x, &w).unwrap(), &w).unwrap();
        let costs = stop();
        pointwise::forward(&x, &w).unwrap();
        // Other tests may run at the same time, so there may be more calls.
        let cost = costs["pointwise::grad_input"];
        assert!(cost.calls >= 1 && cost.operations >= 2 * 10 * 3 * 4, "{cost:?}");
        assert!(cost.bytes >= 4 * (40 + 30 + 12), "{cost:?}");
    }
}
