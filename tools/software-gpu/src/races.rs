//! Data races: unordered accesses to memory of which at least one writes. They are by two blocks of
//! a launch, or by two threads of a block without a barrier in between. On a GPU the result depends
//! on which access comes first.
//!
//! A shadow stores, for each byte, who wrote it last and who has read it since the last barrier.
//! Atomic operations are ordered, and are not checked.

/// The thread that accesses memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Who {
    /// The index of the block.
    pub(crate) block: u32,
    /// The index of the thread in the block.
    pub(crate) thread: u32,
    /// How many barriers the block has passed.
    pub(crate) barriers: u32,
}

/// Special values of a block's or thread's index: nobody, and several.
const NOBODY: u32 = u32::MAX;
const SEVERAL: u32 = u32::MAX - 1;

impl Who {
    const NOBODY: Self = Self { block: NOBODY, thread: NOBODY, barriers: 0 };

    /// Returns whether a later access by `other` is not ordered after this one.
    fn races(self, other: Self) -> bool {
        self.block != NOBODY
            && (self.block != other.block || self.thread != other.thread && self.barriers == other.barriers)
    }

    /// Combines these earlier readers with another reader.
    fn and(self, other: Self) -> Self {
        if self.block == NOBODY || self == other {
            return other;
        }
        if self.block != other.block {
            return Self { block: SEVERAL, ..other };
        }
        if self.barriers == other.barriers { Self { thread: SEVERAL, ..other } } else { other }
    }
}

/// The last accesses to a byte.
#[derive(Clone, Copy)]
struct Byte {
    writer: Who,
    reader: Who,
}

/// The accesses to a piece of memory, byte by byte.
pub(crate) struct Shadow(Vec<Byte>);

impl Shadow {
    pub(crate) fn new(size: usize) -> Self {
        Self(vec![Byte { writer: Who::NOBODY, reader: Who::NOBODY }; size])
    }

    /// Records an access to `size` bytes from `at` on. Returns an earlier access that races with
    /// it, if any.
    pub(crate) fn access(&mut self, at: usize, size: usize, who: Who, writes: bool) -> Option<Who> {
        let mut found = None;
        for byte in &mut self.0[at..at + size] {
            let others = if writes { [byte.writer, byte.reader] } else { [byte.writer, Who::NOBODY] };
            found = found.or(others.into_iter().find(|other| other.races(who)));
            if writes {
                byte.writer = who;
            } else {
                byte.reader = byte.reader.and(who);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(block: u32, thread: u32, barriers: u32) -> Who {
        Who { block, thread, barriers }
    }

    #[test]
    fn what_races_and_what_does_not() {
        let mut shadow = Shadow::new(8);
        let (a, b) = (who(0, 0, 0), who(0, 1, 0));
        // All threads may read. A thread may write what only it has read.
        assert_eq!(shadow.access(0, 4, a, false), None);
        assert_eq!(shadow.access(0, 4, b, false), None);
        assert_eq!(shadow.access(4, 4, a, false), None);
        assert_eq!(shadow.access(4, 4, a, true), None);
        // A thread must not write what another has read, or read what another has written.
        assert!(shadow.access(3, 1, a, true).is_some());
        assert_eq!(shadow.access(4, 1, b, false), Some(a));
        // After a barrier these accesses are ordered, but only within the block.
        let (a, b) = (who(0, 0, 1), who(0, 1, 1));
        assert_eq!(shadow.access(0, 4, a, true), None);
        assert_eq!(shadow.access(0, 4, who(0, 1, 2), false), None);
        assert_eq!(shadow.access(0, 4, who(0, 1, 2), true), None);
        assert!(shadow.access(0, 4, who(1, 1, 3), false).is_some());
        assert_eq!(shadow.access(7, 1, b, true), None);
    }

    #[test]
    fn readers_in_two_blocks_keep_a_third_from_writing() {
        let mut shadow = Shadow::new(1);
        for block in [0, 1] {
            assert_eq!(shadow.access(0, 1, who(block, 0, 0), false), None);
        }
        assert!(shadow.access(0, 1, who(1, 0, 5), true).is_some());
    }
}
