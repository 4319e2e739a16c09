//! When the WAL is checkpointed: before it is longer than it may be, and when nobody writes any more.

use std::time::Duration;

/// After a database has not been written to for so long, what is left in the WAL is checkpointed.
const QUIET_AFTER: Duration = Duration::from_secs(1);
/// A checkpoint of a quiet database that others hold up is tried again after this.
const QUIET_RETRY: Duration = Duration::from_secs(60);
/// A barrier that was not to be had is tried again after this at first, then at doubling intervals:
const FIRST_BARRIER_RETRY: Duration = Duration::from_millis(10);
/// as long as the WAL grows, no longer ones than this;
const LAST_BARRIER_RETRY: Duration = Duration::from_millis(80);
/// and no longer than this when it does not: a reader that stands for hours is not to cost more than it must.
const LAST_QUIET_BARRIER_RETRY: Duration = Duration::from_secs(1);

/// After a failed checkpoint: the pause before each further attempt doubles up to this.
const LAST_FAILED_RETRY: Duration = Duration::from_secs(60);
/// On a slow disk: the pause before the next attempt to restart the WAL doubles from the first to the last.
const FIRST_SLOW_RETRY: Duration = Duration::from_secs(1);
const LAST_SLOW_RETRY: Duration = Duration::from_secs(30);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoint {
    /// The WAL is made to begin anew, under any load.
    Barrier,
    /// What can be copied into the main file without waiting for anybody is copied.
    Passive,
    /// A checkpoint failed: another attempt, whose result is compared with what was captured.
    Retry,
}

/// What was tried, and when. Times are of the monotonic clock.
#[derive(Debug)]
pub struct Checkpoints {
    threshold_bytes: u64,
    barrier_tried: Duration,
    /// No barrier is tried for so long after that.
    barrier_retry: Duration,
    passive_due: Option<Duration>,
    /// Since a checkpoint failed: how many have, and when the next attempt is due.
    failed: Option<(u32, Duration)>,
    /// Attempts to restart the WAL that a slow disk prevented, one after another.
    slow: u32,
}

impl Checkpoints {
    /// Those of a database whose following begins `now`, and whose WAL is to have no more than `threshold_bytes`.
    #[must_use]
    pub fn new(threshold_bytes: u64, now: Duration) -> Self {
        Self {
            threshold_bytes,
            barrier_tried: now,
            barrier_retry: FIRST_BARRIER_RETRY,
            passive_due: Some(now + QUIET_AFTER),
            failed: None,
            slow: 0,
        }
    }

    /// What is due next, and when: a barrier, if the next look would find the WAL beyond the threshold. A WAL that is not to be
    /// had for a barrier is not checkpointed otherwise either.
    #[must_use]
    pub fn next(&self, wal_len_bytes: u64, next_look_bytes: u64) -> Option<(Checkpoint, Duration)> {
        if let Some((_, due)) = self.failed {
            return Some((Checkpoint::Retry, due));
        }
        let foreseen_bytes = wal_len_bytes + next_look_bytes.min(self.threshold_bytes / 4);
        if foreseen_bytes > self.threshold_bytes {
            return Some((Checkpoint::Barrier, self.barrier_tried + self.barrier_retry));
        }
        self.passive_due.map(|due| (Checkpoint::Passive, due))
    }

    /// Commits were captured.
    pub fn note_commits(&mut self, now: Duration) {
        self.passive_due = Some(now + QUIET_AFTER);
        if self.slow == 0 {
            self.barrier_retry = self.barrier_retry.min(LAST_BARRIER_RETRY);
        }
    }

    /// A barrier was tried.
    pub fn note_barrier(&mut self, now: Duration, is_done: bool) {
        let doubled = (self.barrier_retry * 2).min(LAST_QUIET_BARRIER_RETRY);
        self.barrier_retry = if is_done { FIRST_BARRIER_RETRY } else { doubled };
        self.barrier_tried = now;
        self.slow = 0;
    }

    /// The disk is too slow to sync with the write lock held. Returns whether it was not before.
    pub fn note_slow_disk(&mut self, now: Duration) -> bool {
        self.barrier_retry = doubled(FIRST_SLOW_RETRY, self.slow, LAST_SLOW_RETRY);
        self.slow = self.slow.saturating_add(1);
        self.barrier_tried = now;
        self.slow == 1
    }

    /// A checkpoint failed. Returns whether it is the first since one succeeded. The first attempt after it is made at
    /// once, because what is copied is not known to be on the disk.
    pub fn note_failed(&mut self, now: Duration) -> bool {
        let attempts = self.failed.map_or(0, |(attempts, _)| attempts);
        let pause =
            attempts.checked_sub(1).map(|doublings| doubled(Duration::from_secs(1), doublings, LAST_FAILED_RETRY));
        self.failed = Some((attempts.saturating_add(1), now + pause.unwrap_or_default()));
        attempts == 0
    }

    /// A checkpoint succeeded, and what it copied is right. Returns whether any had failed.
    pub fn note_succeeded(&mut self) -> bool {
        self.failed.take().is_some()
    }

    /// Whether a checkpoint failed and none has succeeded since.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failed.is_some()
    }

    /// A PASSIVE checkpoint was tried, or there was nothing to checkpoint.
    pub fn note_passive(&mut self, now: Duration, is_done: bool) {
        self.passive_due = (!is_done).then_some(now + QUIET_RETRY);
    }
}

/// A pause that doubles with each attempt, from `first` to `last`.
fn doubled(first: Duration, attempts: u32, last: Duration) -> Duration {
    (first * 2_u32.pow(attempts.min(16))).min(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_barrier_comes_before_the_wal_is_too_long() {
        let now = ms(1_000_000);
        let checkpoints = Checkpoints::new(4 * MIB, now);
        assert_eq!(checkpoints.next(3 * MIB, MIB), Some((Checkpoint::Passive, now + QUIET_AFTER)));
        assert_eq!(checkpoints.next(3 * MIB + 1, MIB), Some((Checkpoint::Barrier, now + FIRST_BARRIER_RETRY)));
        // Where a look finds more than it can follow, its size tells nothing of the right moment.
        assert_eq!(checkpoints.next(3 * MIB, 50 * MIB), Some((Checkpoint::Passive, now + QUIET_AFTER)));
        assert_eq!(checkpoints.next(4 * MIB + 1, 0), Some((Checkpoint::Barrier, now + FIRST_BARRIER_RETRY)));
    }

    /// A reader that stands holds up every barrier: nothing else is due meanwhile, so nobody is woken for it.
    #[test]
    fn a_barrier_that_is_not_to_be_had_is_asked_for_less_and_less() {
        let mut now = ms(1_000_000);
        let mut checkpoints = Checkpoints::new(4 * MIB, now);
        let mut try_again = |checkpoints: &mut Checkpoints, grows: bool| {
            checkpoints.note_barrier(now, false);
            if grows {
                checkpoints.note_commits(now);
            }
            let (next, due) = checkpoints.next(5 * MIB, 0).unwrap();
            assert_eq!(next, Checkpoint::Barrier);
            let waited = due - now;
            now = due;
            waited.as_millis()
        };
        let under_load: Vec<_> = (0..5).map(|_| try_again(&mut checkpoints, true)).collect();
        assert_eq!(under_load, [20, 40, 80, 80, 80]);
        let quiet: Vec<_> = (0..6).map(|_| try_again(&mut checkpoints, false)).collect();
        assert_eq!(quiet, [160, 320, 640, 1000, 1000, 1000]);
        assert_eq!(try_again(&mut checkpoints, true), 80, "as soon as it grows again");
        checkpoints.note_barrier(now, true);
        assert_eq!(checkpoints.next(5 * MIB, 0), Some((Checkpoint::Barrier, now + FIRST_BARRIER_RETRY)));
    }

    #[test]
    fn what_is_quiet_is_checkpointed_once() {
        let now = ms(1_000_000);
        let mut checkpoints = Checkpoints::new(4 * MIB, now);
        checkpoints.note_passive(now, false);
        assert_eq!(checkpoints.next(MIB, 0), Some((Checkpoint::Passive, now + QUIET_RETRY)));
        checkpoints.note_passive(now, true);
        assert_eq!(checkpoints.next(MIB, 0), None);
        checkpoints.note_commits(now);
        assert_eq!(checkpoints.next(MIB, 0), Some((Checkpoint::Passive, now + QUIET_AFTER)));
    }

    #[test]
    fn failed_checkpoint_is_retried_at_once_then_with_growing_pauses() {
        let mut now = ms(1_000_000);
        let mut checkpoints = Checkpoints::new(4 * MIB, now);
        let mut pauses = Vec::new();
        for attempt in 0..9 {
            assert_eq!(checkpoints.note_failed(now), attempt == 0);
            let (next, due) = checkpoints.next(50 * MIB, 0).unwrap();
            assert_eq!(next, Checkpoint::Retry);
            pauses.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(checkpoints.note_succeeded() && !checkpoints.note_succeeded());
        assert_eq!(checkpoints.next(50 * MIB, 0).unwrap().0, Checkpoint::Barrier);
    }

    #[test]
    fn slow_disk_delays_restarts_under_load() {
        let mut now = ms(1_000_000);
        let mut checkpoints = Checkpoints::new(4 * MIB, now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            checkpoints.note_slow_disk(now);
            checkpoints.note_commits(now);
            let due = checkpoints.next(50 * MIB, 0).unwrap().1;
            pauses.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }
}
