use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A time by which training is to stop, at a checkpoint: what would end later is not begun.
///
/// How long an epoch takes is taken from the last one of this process, of whatever run: that of a checkpoint may come
/// from another machine. The first epoch of a process is always begun, so that a run that is called again and again
/// gets on, however short its limit.
#[derive(Debug)]
pub struct TimeLimit {
    end: Instant,
    epoch: Mutex<Option<Duration>>,
}

impl TimeLimit {
    /// From now on.
    pub fn after(time: Duration) -> Self {
        Self { end: Instant::now() + time, epoch: Mutex::new(None) }
    }

    /// Whether an epoch may begin: the first, or one that ends in time if it takes as long as the last one.
    pub fn allows_an_epoch(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let epoch = *self.epoch.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        epoch.is_none_or(|epoch| now + epoch <= self.end)
    }

    /// Notes how long an epoch took.
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
        // The first.
        check(0, true);
        check(900, true);
        limit.note(Duration::from_secs(100));
        check(500, true);
        check(501, false);
        // The last one counts.
        limit.note(Duration::from_secs(20));
        check(501, true);
        check(581, false);
        limit.note(Duration::from_secs(700));
        check(0, false);
    }
}
