//! The order of work in streams: which work is certainly done before which.
//!
//! Here all work is done at once, in the order of the calls. On a GPU, work is ordered only within
//! one stream, by events, and by waits of the host. So each stream has a vector clock: how much of
//! every stream's work is done before its own next work.

use std::collections::HashMap;

/// A stream: its handle, and for a thread's own stream also the thread's number (else 0).
pub(crate) type Stream = (u64, u64);

/// The amount of work done in each stream.
type Clock = HashMap<Stream, u64>;

fn merge(into: &mut Clock, other: &Clock) {
    for (&stream, &time) in other {
        let found = into.entry(stream).or_default();
        *found = time.max(*found);
    }
}

/// The clocks of all streams and events.
#[derive(Default)]
pub(crate) struct Streams {
    streams: HashMap<Stream, Clock>,
    events: HashMap<u64, Clock>,
    /// The work that the host has waited for. It is done before anything that the host calls later.
    host: Clock,
}

impl Streams {
    /// Adds work to a stream. Returns the stream and the time, which identify the work.
    pub(crate) fn work(&mut self, stream: Stream) -> (Stream, u64) {
        let clock = self.streams.entry(stream).or_default();
        merge(clock, &self.host);
        let time = clock.entry(stream).or_default();
        *time += 1;
        (stream, *time)
    }

    /// Returns whether some work is done before the next work of a stream.
    pub(crate) fn is_before(&self, (of, time): (Stream, u64), stream: Stream) -> bool {
        let done = |clock: &Clock| clock.get(&of).is_some_and(|&done| done >= time);
        of == stream || done(&self.host) || self.streams.get(&stream).is_some_and(done)
    }

    /// Makes the host wait for a stream.
    pub(crate) fn wait(&mut self, stream: Stream) {
        if let Some(clock) = self.streams.get(&stream) {
            merge(&mut self.host, clock);
        }
    }

    /// Makes the host wait for all streams.
    pub(crate) fn wait_for_all(&mut self) {
        for clock in self.streams.values() {
            merge(&mut self.host, clock);
        }
    }

    /// Records an event after a stream's work so far.
    pub(crate) fn record(&mut self, event: u64, stream: Stream) {
        let clock = self.streams.entry(stream).or_default().clone();
        self.events.insert(event, clock);
    }

    /// Makes a stream wait for an event.
    pub(crate) fn order(&mut self, event: u64, stream: Stream) {
        if let Some(clock) = self.events.get(&event) {
            merge(self.streams.entry(stream).or_default(), clock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_waits_comes_after() {
        let (a, b, mut streams) = ((1, 0), (2, 0), Streams::default());
        let first = streams.work(a);
        assert!(streams.is_before(first, a));
        assert!(!streams.is_before(first, b));
        streams.record(7, a);
        let second = streams.work(a);
        streams.order(7, b);
        assert!(streams.is_before(first, b));
        assert!(!streams.is_before(second, b));
        streams.wait(a);
        assert!(streams.is_before(second, b));
        // The wait does not cover later work.
        let third = streams.work(a);
        assert!(!streams.is_before(third, b));
        streams.wait_for_all();
        assert!(streams.is_before(third, b));
    }
}
