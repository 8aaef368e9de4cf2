use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A time limit for training: an epoch that would end after it is not started.
///
/// An epoch is expected to take as long as the last one of this process, in this or another run.
/// The durations in a checkpoint are not used because they may come from another machine. The first
/// epoch of a process is always started, so that a run that is started again and again makes
/// progress however short its limit is.
#[derive(Debug)]
pub struct TimeLimit {
    end: Instant,
    epoch: Mutex<Option<Duration>>,
}

impl TimeLimit {
    /// Creates a limit that ends `time` from now.
    pub fn after(time: Duration) -> Self {
        Self { end: Instant::now() + time, epoch: Mutex::new(None) }
    }

    /// Returns whether an epoch may start: it is the first one, or it ends in time if it takes as
    /// long as the last one.
    pub fn allows_an_epoch(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let epoch = *self.epoch.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        epoch.is_none_or(|epoch| now + epoch <= self.end)
    }

    /// Records how long an epoch took.
    pub(crate) fn note(&self, epoch: Duration) {
        *self.epoch.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_too_late_is_not_begun() {
        let limit = TimeLimit::after(Duration::from_secs(600));
        let start = limit.end - Duration::from_secs(600);
        let check = |seconds: u64, allowed: bool| {
            let found = limit.allows_at(start + Duration::from_secs(seconds));
            assert_eq!(found, allowed, "{seconds} s, epochs of {:?}", limit.epoch);
        };
        // The first epoch is always allowed.
        check(0, true);
        check(900, true);
        limit.note(Duration::from_secs(100));
        check(500, true);
        check(501, false);
        // The last duration counts.
        limit.note(Duration::from_secs(20));
        check(501, true);
        check(581, false);
        limit.note(Duration::from_secs(700));
        check(0, false);
    }
}
