//! The pace of looks at a database's WAL: how soon after a change, and how soon again.

use std::time::Duration;

use super::wake::Changed;

/// Under load looks are so far apart that each finds about this much of the WAL: the faster it grows, the sooner the next one.
const LOOK_BYTES: u64 = 400 << 10;
/// But no closer than this: where a writer is as fast as SQLite goes, more looks are more barriers, and slow it down.
const SHORTEST_BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// And no further apart than this,
const LONGEST_BUSY_INTERVAL: Duration = Duration::from_millis(100);
/// nor than this, where an application was seen waiting for the pin: its RESTART or TRUNCATE checkpoint holds the write lock, and until
/// the pin has caught up no event tells of it.
const LONGEST_HEEDFUL_INTERVAL: Duration = Duration::from_millis(40);
/// Without a load a change of the WAL is answered this soon, and one of the main file always at once: such a checkpoint waits for two
/// answers, and the waits in SQLite's busy handler grow quickly.
const INTERVAL: Duration = Duration::from_millis(2);
/// So many looks that captured something, none later than this after the one before, are a load.
const BUSY_AFTER_LOOKS: u32 = 5;
const BUSY_GAP: Duration = Duration::from_millis(130);
/// A writer publishes a commit after the write that woke us, and a checkpointer its progress after its fsync, neither with an
/// event of its own: so we look again, this soon at first, then at doubling intervals.
const FIRST_LOOK_AGAIN: Duration = Duration::from_millis(1);
/// After so long without a commit a database is polled no more often than this, as long as events come.
const IDLE_AFTER: Duration = Duration::from_secs(5);
const IDLE_POLL_INTERVAL: Duration = Duration::from_secs(10);

/// What the last looks found, and when. Times are of the monotonic clock.
#[derive(Debug)]
pub struct Pace {
    /// The WAL is looked at this often even when no event tells of a change.
    poll_interval: Duration,
    /// What is captured is to be shipped this often: looks that are further apart would make it less often.
    sync_interval: Duration,
    advanced: Duration,
    committed: Duration,
    busy_looks: u32,
    /// How fast the WAL grew before the last look, in bytes a second.
    bytes_per_s: u64,
    /// Whether the application was seen waiting for the pin.
    meets_checkpoints: bool,
    look_again: Option<Duration>,
    /// Whether polling has found what no event told of: some file systems tell nothing.
    misses_events: bool,
}

impl Pace {
    /// That of a database whose following begins `now`.
    #[must_use]
    pub fn new(poll_interval: Duration, sync_interval: Duration, now: Duration) -> Self {
        Self {
            poll_interval,
            sync_interval,
            advanced: now,
            committed: now,
            busy_looks: 0,
            bytes_per_s: 0,
            meets_checkpoints: false,
            look_again: None,
            misses_events: false,
        }
    }

    /// Whether there is a load: then every look finds something.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy_looks >= BUSY_AFTER_LOOKS
    }

    fn interval(&self) -> Duration {
        if !self.is_busy() {
            return INTERVAL;
        }
        let longest = if self.meets_checkpoints { LONGEST_HEEDFUL_INTERVAL } else { LONGEST_BUSY_INTERVAL };
        let until_full = Duration::from_millis(LOOK_BYTES * 1000 / self.bytes_per_s.max(1));
        // With a sync interval of 0 what a look finds is shipped at once; looks still have some time between them.
        until_full.max(SHORTEST_BUSY_INTERVAL).min(longest).min(self.sync_interval.max(INTERVAL))
    }

    /// How many bytes of the WAL the next look is going to find; 0 where looks can't follow anyway.
    #[must_use]
    pub fn next_look_bytes(&self) -> u64 {
        let bytes = self.bytes_per_s * self.interval().as_millis() as u64 / 1000;
        if bytes > LOOK_BYTES { 0 } else { bytes }
    }

    /// How long the pin has stood.
    #[must_use]
    pub fn stood(&self, now: Duration) -> Duration {
        now.saturating_sub(self.advanced)
    }

    /// How long a change of the WAL is not answered yet.
    #[must_use]
    pub fn until_next_look(&self, now: Duration) -> Duration {
        self.interval().saturating_sub(self.stood(now))
    }

    /// When a commit was last captured; as long as there was none, when following began.
    #[must_use]
    pub fn committed(&self) -> Duration {
        self.committed
    }

    /// How soon the next look is due, whether anything changes or not. Where events come, a database that nobody writes to, and whose
    /// WAL is empty, is polled seldom.
    #[must_use]
    pub fn next_look(&self, now: Duration, wal_is_empty: bool) -> Duration {
        let is_idle = wal_is_empty && now.saturating_sub(self.committed) > IDLE_AFTER && !self.misses_events;
        let poll_interval = if is_idle { self.poll_interval.max(IDLE_POLL_INTERVAL) } else { self.poll_interval };
        self.look_again.map_or(poll_interval, |again| again.min(poll_interval))
    }

    /// Whether something was told of lately that may have more to it.
    #[must_use]
    pub fn is_stirred(&self) -> bool {
        self.look_again.is_some()
    }

    /// A wait ended. Under load a change of the WAL needs no telling.
    pub fn note_change(&mut self, changed: Changed) {
        self.look_again = match changed {
            Changed::Main => Some(FIRST_LOOK_AGAIN),
            _ if self.is_busy() => Some(self.look_again.unwrap_or(Duration::MAX).min(self.interval())),
            Changed::Wal => Some(FIRST_LOOK_AGAIN),
            Changed::Nothing => self.look_again,
        };
    }

    /// A look begins.
    pub fn begin_look(&mut self) {
        self.look_again = self.look_again.map(|again| again * 2).filter(|&again| again < self.poll_interval);
    }

    /// The look ended, `has_captured` telling whether it found commits; to be called before they are noted.
    pub fn end_look(&mut self, now: Duration, has_captured: bool) {
        let is_close = now.saturating_sub(self.committed) <= BUSY_GAP;
        self.busy_looks = if is_close { self.busy_looks.saturating_add(u32::from(has_captured)) } else { 0 };
    }

    /// The pin moved, and so many bytes of the WAL were captured.
    pub fn note_advance(&mut self, now: Duration, captured_bytes: u64) {
        let stood_ms = self.stood(now).as_millis().max(1) as u64;
        self.bytes_per_s = captured_bytes.saturating_mul(1000) / stood_ms;
        self.advanced = now;
    }

    /// The application may wait for the pin, to end a checkpoint.
    pub fn note_checkpoint(&mut self) {
        if self.is_busy() && !std::mem::replace(&mut self.meets_checkpoints, true) {
            tracing::debug!("a checkpoint waits for the pin; the WAL is looked at more often");
        }
    }

    /// The pin moved in a barrier, after it captured what there was.
    pub fn note_barrier(&mut self, now: Duration) {
        self.advanced = now;
    }

    /// Commits were captured.
    pub fn note_commits(&mut self, now: Duration) {
        self.committed = now;
    }

    /// Commits were captured although nothing told of them.
    pub fn note_missed_event(&mut self) {
        self.misses_events = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: Duration = Duration::from_secs(1);
    const SYNC: Duration = Duration::from_secs(1);
    const WAL_IS_EMPTY: bool = true;

    /// So many looks, each of which captures so many bytes.
    fn look(pace: &mut Pace, now: &mut Duration, looks: u32, interval: Duration, bytes: u64) {
        for _ in 0..looks {
            *now += interval;
            pace.begin_look();
            pace.note_advance(*now, bytes);
            pace.end_look(*now, bytes > 0);
            if bytes > 0 {
                pace.note_commits(*now);
            }
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn under_load_looks_are_as_far_apart_as_the_wal_allows() {
        let mut now = ms(1_000_000);
        let mut pace = Pace::new(POLL, SYNC, now);
        assert_eq!(pace.until_next_look(now), INTERVAL);
        look(&mut pace, &mut now, BUSY_AFTER_LOOKS - 1, ms(20), 10_000);
        assert!(!pace.is_busy());
        look(&mut pace, &mut now, 1, ms(20), 10_000);
        assert_eq!(pace.until_next_look(now), LONGEST_BUSY_INTERVAL);
        assert_eq!(pace.until_next_look(now + ms(30)), LONGEST_BUSY_INTERVAL - ms(30));
        look(&mut pace, &mut now, 1, ms(100), 819_200);
        assert_eq!((pace.until_next_look(now), pace.next_look_bytes()), (ms(50), LOOK_BYTES));
        look(&mut pace, &mut now, 1, ms(50), 50 << 20);
        assert_eq!(pace.until_next_look(now), SHORTEST_BUSY_INTERVAL);
        assert_eq!(pace.next_look_bytes(), 0);
        // A look that finds nothing in time to find something does not end it; later ones do.
        look(&mut pace, &mut now, 1, ms(100), 0);
        assert!(pace.is_busy());
        look(&mut pace, &mut now, 1, ms(100), 0);
        assert!(!pace.is_busy());
    }

    #[test]
    fn looks_are_no_further_apart_than_shipping() {
        let mut now = ms(1_000_000);
        let mut pace = Pace::new(POLL, ms(15), now);
        look(&mut pace, &mut now, BUSY_AFTER_LOOKS, ms(20), 10_000);
        assert_eq!(pace.until_next_look(now), ms(15));
        look(&mut pace, &mut now, 1, ms(15), 50 << 20);
        assert_eq!(pace.until_next_look(now), ms(15));
        let mut pace = Pace::new(POLL, Duration::ZERO, now);
        look(&mut pace, &mut now, BUSY_AFTER_LOOKS, ms(20), 10_000);
        assert_eq!(pace.until_next_look(now), INTERVAL);
    }

    #[test]
    fn who_waits_for_the_pin_under_load_is_heeded_from_then_on() {
        let mut now = ms(1_000_000);
        let mut pace = Pace::new(POLL, SYNC, now);
        pace.note_checkpoint();
        look(&mut pace, &mut now, BUSY_AFTER_LOOKS, ms(20), 10_000);
        assert_eq!(pace.until_next_look(now), LONGEST_BUSY_INTERVAL, "without a load it waits for nothing");
        pace.note_checkpoint();
        assert_eq!(pace.until_next_look(now), LONGEST_HEEDFUL_INTERVAL);
        look(&mut pace, &mut now, 1, ms(50), 50 << 20);
        assert_eq!(pace.until_next_look(now), SHORTEST_BUSY_INTERVAL);
    }

    #[test]
    fn what_changed_is_looked_at_again_at_growing_intervals() {
        let mut now = ms(1_000_000);
        let mut pace = Pace::new(POLL, SYNC, now);
        pace.note_change(Changed::Nothing);
        assert!(!pace.is_stirred());
        pace.note_change(Changed::Wal);
        let mut intervals = Vec::new();
        while pace.is_stirred() {
            intervals.push(pace.next_look(now, !WAL_IS_EMPTY).as_millis());
            pace.begin_look();
        }
        assert_eq!(intervals, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
        // Under load the next look comes anyway, but a change of the main file is looked at again and again until then.
        look(&mut pace, &mut now, BUSY_AFTER_LOOKS, ms(20), 10_000);
        pace.note_change(Changed::Wal);
        assert_eq!(pace.next_look(now, !WAL_IS_EMPTY), LONGEST_BUSY_INTERVAL);
        pace.note_change(Changed::Main);
        for expected in [1, 2, 4, 8, 16, 32, 64, 100] {
            assert_eq!(pace.next_look(now, !WAL_IS_EMPTY), ms(expected));
            pace.begin_look();
            pace.note_change(Changed::Nothing);
        }
    }

    #[test]
    fn a_database_that_nobody_writes_to_is_polled_seldom_where_events_come() {
        let now = ms(1_000_000);
        let mut pace = Pace::new(POLL, SYNC, now);
        assert_eq!(pace.next_look(now, WAL_IS_EMPTY), POLL);
        let later = now + IDLE_AFTER + ms(1);
        assert_eq!(pace.next_look(later, !WAL_IS_EMPTY), POLL);
        assert_eq!(pace.next_look(later, WAL_IS_EMPTY), IDLE_POLL_INTERVAL);
        pace.note_missed_event();
        assert_eq!(pace.next_look(later, WAL_IS_EMPTY), POLL);
    }
}
