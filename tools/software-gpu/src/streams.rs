//! The order of work in streams: what has certainly been done before what.
//!
//! Everything is done at once here, in the order of the calls. On a GPU only what one stream does is in order, and what
//! an event, or the host's waiting, puts in order. So each stream has a clock for every stream (a vector clock): how much
//! of that one's work is done before what it does next.

use std::collections::HashMap;

/// A stream; that of a thread has the thread's number beside it.
pub(crate) type Stream = (u64, u64);

/// How much of each stream's work.
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
    /// What the host has waited for, which is before anything that it calls for later.
    host: Clock,
}

impl Streams {
    /// Some work in a stream; what it is to be known by.
    pub(crate) fn work(&mut self, stream: Stream) -> (Stream, u64) {
        let clock = self.streams.entry(stream).or_default();
        merge(clock, &self.host);
        let time = clock.entry(stream).or_default();
        *time += 1;
        (stream, *time)
    }

    /// Whether some work is done before what a stream does now.
    pub(crate) fn is_before(&self, (of, time): (Stream, u64), stream: Stream) -> bool {
        let done = |clock: &Clock| clock.get(&of).is_some_and(|&done| done >= time);
        of == stream || done(&self.host) || self.streams.get(&stream).is_some_and(done)
    }

    /// The host waits for a stream.
    pub(crate) fn wait(&mut self, stream: Stream) {
        if let Some(clock) = self.streams.get(&stream) {
            merge(&mut self.host, clock);
        }
    }

    /// The host waits for all streams.
    pub(crate) fn wait_for_all(&mut self) {
        for clock in self.streams.values() {
            merge(&mut self.host, clock);
        }
    }

    /// An event behind a stream's work.
    pub(crate) fn record(&mut self, event: u64, stream: Stream) {
        let clock = self.streams.entry(stream).or_default().clone();
        self.events.insert(event, clock);
    }

    /// A stream waits for an event.
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
        // What comes later is not waited for.
        let third = streams.work(a);
        assert!(!streams.is_before(third, b));
        streams.wait_for_all();
        assert!(streams.is_before(third, b));
    }
}
