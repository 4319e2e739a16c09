//! Capture: every transaction out of the WAL, under a pin that keeps moving.

use std::time::Duration;

use crate::clock::Clock;
use crate::format::page_hash;
use crate::sqlite::SqliteError;
use crate::sqlite::checkpoint::Checkpointed;
use crate::sqlite::follow::{Follower, Images, WalPosition, WalTransaction};
use crate::sqlite::live::{FileIdentity, Files, LiveDatabase, Restart};

/// How often a read of the WAL is begun again when the WAL changes under it.
const SETTLE_ATTEMPTS: usize = 20;

/// So often a barrier begins again with what came in while it asked for the write lock.
const BARRIER_ROUNDS: usize = 6;
/// So often the write lock is asked for in a round, a few dozen microseconds apart.
const LOCK_ATTEMPTS: u32 = 200;

/// Limit of the sync time before the write lock is taken, for each [`SYNC_BYTES`] of the WAL. A
/// sync under the lock would take as long, and every commit would wait for it. On a slower disk the
/// restart is postponed: a longer WAL has a higher limit.
const LOCKED_SYNC_LIMIT: Duration = Duration::from_millis(100);
const SYNC_BYTES: u64 = 4 << 20;
/// Limit of the factor, and so of the wait of a commit to one second, however long the WAL is.
const LARGEST_FACTOR: u64 = 10;

/// Outcome of an attempt to restart the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Barrier {
    /// All of the WAL is in the main file, and the next writer restarts it.
    Done,
    /// A writer or reader was in the way.
    Blocked,
    /// A sync took this long: the write lock was not taken.
    SlowDisk(Duration),
}

/// Outcome of an attempt to do what SQLite does when the last connection closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastClose {
    /// Another process has the database open.
    OpenElsewhere,
    /// A writer or reader was in the way.
    Blocked,
    /// The main file is complete, and the WAL is empty.
    Emptied,
}

/// Takes in transactions, one after another.
pub trait Sink {
    /// What can go wrong with it.
    type Error: From<SqliteError>;
    /// Takes in one transaction.
    ///
    /// # Errors
    /// An error ends the capture; the sink must not be used any more.
    fn take(&mut self, transaction: &WalTransaction<'_>, images: &mut Images<'_>) -> Result<(), Self::Error>;
}

/// What there is to do.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Transactions are published that were not captured.
    pub is_behind: bool,
    /// All of the WAL is in the main file, and the pin still protects frames: a RESTART or TRUNCATE checkpoint may wait for it to move.
    pub holds_up_a_checkpoint: bool,
}

/// A database and a place in its WAL.
#[derive(Debug)]
pub struct Capture {
    live: LiveDatabase,
    follower: Follower,
    /// Whether the pin began when all of the WAL was in the main file: then it has mark 0 and holds up nobody.
    pin_is_at_zero: bool,
    /// A checkpoint failed since the copied pages were last compared: see [`Capture::retry_checkpoint`].
    is_suspect: bool,
}

impl Capture {
    /// Takes up `live` at `left_at`, if the WAL still has that place, or else as it is now. The second value tells whether
    /// it does: see [`Follower::attach`].
    ///
    /// # Errors
    /// What SQLite or the operating system answers.
    pub fn attach(
        live: LiveDatabase,
        left_at: Option<WalPosition>,
        main_is_whole: bool,
    ) -> Result<(Self, bool), SqliteError> {
        let (follower, continues) = Follower::attach(&live.files, page_hash, left_at, main_is_whole)?;
        Ok((Self { live, follower, pin_is_at_zero: false, is_suspect: false }, continues))
    }

    /// The open files.
    #[must_use]
    pub fn files(&self) -> &Files {
        &self.live.files
    }

    /// The place in the WAL.
    #[must_use]
    pub fn follower(&self) -> &Follower {
        &self.follower
    }

    /// What an [`Capture::advance`] would do.
    ///
    /// # Errors
    /// As the operating system answers; see [`LiveDatabase::check_main`].
    pub fn work(&mut self) -> Result<Work, SqliteError> {
        let index = self.live.files.wal_index()?;
        self.live.check_main(&index)?;
        Ok(Work {
            is_behind: self.follower.is_behind(&index),
            holds_up_a_checkpoint: index.is_checkpointed() && !self.pin_is_at_zero,
        })
    }

    /// Returns the state of the main file, if only SQLite has written to it.
    ///
    /// # Errors
    /// See [`LiveDatabase::check_main`].
    pub fn main_identity(&mut self) -> Result<FileIdentity, SqliteError> {
        let index = self.live.files.wal_index()?;
        self.live.check_main(&index)
    }

    /// Whether all that was captured, and nothing else, stands in the main file.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn is_all_in_main(&self) -> Result<bool, SqliteError> {
        let index = self.live.files.wal_index()?;
        Ok(index.is_checkpointed() && !self.follower.is_behind(&index))
    }

    /// Whether frames stand in the WAL that are not in the main file.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn has_frames_to_checkpoint(&self) -> Result<bool, SqliteError> {
        Ok(!self.live.files.wal_index()?.is_checkpointed())
    }

    /// Bytes of the WAL that were read and that the next writer can't overwrite yet.
    #[must_use]
    pub fn wal_len_bytes(&self) -> u64 {
        if self.pin_is_at_zero { 0 } else { self.follower.wal_len_bytes() }
    }

    /// Moves the pin up and captures every published transaction; returns how many.
    ///
    /// # Errors
    /// What the sink answers, SQLite, or the operating system. What was not captured stays pinned.
    pub fn advance<S: Sink>(&mut self, sink: &mut S) -> Result<u32, S::Error> {
        // Read before the new pin begins: what was in the main file then still is when it has begun.
        let index = self.live.files.wal_index()?;
        if self.is_suspect && index.is_checkpointed() && !self.is_confirmed()? {
            // A new pin would have mark 0, and let the WAL be overwritten. Under the old one everything can be read.
            return read_settled(&mut self.follower, &self.live.files, sink);
        }
        // The checkpointer of another process stores its progress before it releases read mark 0; until then a new pin
        // gets a mark of 1 or more, for which a RESTART or TRUNCATE checkpoint waits (`walTryBeginRead`).
        let zero_is_free = index.is_checkpointed() && !self.live.files.is_read_mark_zero_taken()?;
        let before = self.follower.position();
        let follower = &mut self.follower;
        let captured = self.live.advance_pin(|files| read_settled(follower, files, sink))?;
        self.follower.note_pinned(&index);
        self.pin_is_at_zero = zero_is_free && self.follower.position() == before;
        Ok(captured)
    }

    /// Copies frames into the main file and waits for no other connection. `None` when another checkpoint runs.
    ///
    /// # Errors
    /// See [`LiveDatabase::passive_checkpoint`]. After [`SqliteError::CheckpointFailed`] the pin stays, and
    /// [`Capture::retry_checkpoint`] is the next to be called.
    pub fn passive_checkpoint(&mut self) -> Result<Option<Checkpointed>, SqliteError> {
        let index = self.live.files.wal_index()?;
        self.live.check_main(&index)?;
        let done = self.live.passive_checkpoint();
        self.is_suspect |= matches!(done, Err(SqliteError::CheckpointFailed { .. }));
        done
    }

    /// Checkpoints after a failure. What is copied then is compared with what was captured, because a disk that failed
    /// once may have lost frames of the WAL as well. Returns whether all is well again.
    ///
    /// # Errors
    /// As [`Capture::passive_checkpoint`]; [`SqliteError::PageChanged`] when a page of the main file is wrong: the WAL
    /// may hold the only right one, and stays pinned.
    pub fn retry_checkpoint(&mut self) -> Result<bool, SqliteError> {
        self.passive_checkpoint()?;
        // Also where there was nothing to copy: then no sync has succeeded yet.
        self.live.files.sync()?;
        self.confirm_copied()
    }

    /// Returns whether the pages that count as copied are those that were captured.
    ///
    /// # Errors
    /// See [`Follower::check_copied`].
    pub fn check_copied(&self) -> Result<bool, SqliteError> {
        self.follower.check_copied(&self.live.files, &self.live.files.wal_index()?)
    }

    /// The same as a question: a page that is wrong is reported by the next [`Capture::retry_checkpoint`].
    fn is_confirmed(&mut self) -> Result<bool, SqliteError> {
        match self.confirm_copied() {
            Err(SqliteError::PageChanged { .. }) => Ok(false),
            other => other,
        }
    }

    /// Compares the pages that count as copied with what was captured, and ends the suspicion if they are right.
    fn confirm_copied(&mut self) -> Result<bool, SqliteError> {
        let is_right = self.check_copied()?;
        self.is_suspect &= !is_right;
        Ok(is_right)
    }

    /// Returns whether a checkpoint failed and none has succeeded since.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.is_suspect
    }

    /// Returns whether the WAL still has content although no other process has the database open: SQLite would have
    /// emptied it at the last close.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn is_left_by_last_close(&self) -> Result<bool, SqliteError> {
        Ok(self.live.files.wal_len_bytes()? > 0 && !self.live.files.is_open_elsewhere()?)
    }

    /// Does what SQLite does when the last connection closes (`sqlite3WalClose`): captures, copies all frames into the
    /// main file, and empties the WAL. Only when no other process has the database open.
    ///
    /// # Errors
    /// As [`Capture::barrier`].
    pub fn close_as_last<S: Sink>(
        &mut self,
        sink: &mut S,
        others_move: impl Fn() -> bool,
    ) -> Result<LastClose, S::Error> {
        if self.live.files.wal_len_bytes()? == 0 {
            return Ok(LastClose::Emptied);
        }
        if self.live.files.is_open_elsewhere()? {
            return Ok(LastClose::OpenElsewhere);
        }
        // A pin of ours at an older place would hold up the checkpoint.
        self.advance(sink)?;
        self.passive_checkpoint()?;
        let mut unread_before_bytes = u64::MAX;
        if self.barrier_round(sink, &others_move, &mut unread_before_bytes)? != Some(true) {
            return Ok(LastClose::Blocked);
        }
        if self.live.files.is_open_elsewhere()? {
            return Ok(LastClose::OpenElsewhere);
        }
        Ok(if self.live.empty_wal()? { LastClose::Emptied } else { LastClose::Blocked })
    }

    /// Empties a WAL whose frames are all in the main file that was overwritten, when no other process has the
    /// database open: the next one to open it would recover them over the new file. Returns whether it is empty.
    ///
    /// # Errors
    /// What SQLite answers.
    pub fn drop_copied_wal(&mut self) -> Result<bool, SqliteError> {
        if self.live.files.is_open_elsewhere()? || !self.live.files.wal_index()?.is_checkpointed() {
            return Ok(false);
        }
        self.live.empty_wal()
    }

    /// Closes the database as SQLite closes the last connection: see [`LiveDatabase::close_as_last`].
    ///
    /// # Errors
    /// As [`LiveDatabase::close_as_last`].
    pub fn close(self) -> Result<(), SqliteError> {
        self.live.close_as_last()
    }

    /// Lets the next writer restart the WAL, under any load: checkpoint, capture until little is left, take the write
    /// lock, capture and checkpoint the rest, begin the pin again at mark 0. Where it does not succeed, try again
    /// later: the application comes first. `others_move` as in [`LiveDatabase::barrier`].
    ///
    /// # Errors
    /// What the sink answers, SQLite, or the operating system. After [`SqliteError::CheckpointFailed`] as
    /// [`Capture::passive_checkpoint`].
    pub fn barrier<S: Sink>(
        &mut self,
        sink: &mut S,
        others_move: impl Fn() -> bool,
        clock: &dyn Clock,
    ) -> Result<Barrier, S::Error> {
        let mut unread_before_bytes = u64::MAX;
        for _ in 0..BARRIER_ROUNDS {
            // The long copy and its syncs happen here, with no lock held; what is left for the lock is what came in meanwhile.
            let begun = clock.monotonic();
            let has_synced = self.passive_checkpoint()?.is_some_and(|done| done.has_copied);
            let worth = (self.follower.wal_len_bytes() / SYNC_BYTES).clamp(1, LARGEST_FACTOR);
            let is_slow = |begun| clock.monotonic().saturating_sub(begun) > LOCKED_SYNC_LIMIT * worth as u32;
            let may_be_slow = !has_synced || is_slow(begun);
            self.advance(sink)?;
            if may_be_slow {
                // Little is left to sync now: the disk takes as long in a moment, with the write lock held.
                let begun = clock.monotonic();
                let synced = self.live.files.sync();
                self.is_suspect |= synced.is_err();
                synced?;
                if is_slow(begun) {
                    return Ok(Barrier::SlowDisk(clock.monotonic().saturating_sub(begun)));
                }
            }
            match self.barrier_round(sink, &others_move, &mut unread_before_bytes)? {
                Some(true) => return Ok(Barrier::Done),
                Some(false) => return Ok(Barrier::Blocked),
                None => {}
            }
        }
        Ok(Barrier::Blocked)
    }

    /// One attempt with the write lock held; `None` when it was not available, or too much was left to be read.
    fn barrier_round<S: Sink>(
        &mut self,
        sink: &mut S,
        others_move: &impl Fn() -> bool,
        unread_before_bytes: &mut u64,
    ) -> Result<Option<bool>, S::Error> {
        let index = self.live.files.wal_index()?;
        self.live.check_main(&index)?;
        let follower = &mut self.follower;
        let capture = |files: &Files| -> Result<bool, S::Error> {
            let (unread_bytes, wal_len_bytes) = follower.unread_bytes(&files.wal_index()?);
            if !is_short(unread_bytes, wal_len_bytes, *unread_before_bytes) {
                *unread_before_bytes = unread_bytes;
                return Ok(false);
            }
            read_settled(follower, files, sink).map(|_| true)
        };
        // Unknown until the pin has moved, also if that fails.
        let was_at_zero = std::mem::take(&mut self.pin_is_at_zero);
        let restart = self.live.barrier(LOCK_ATTEMPTS, capture, others_move)?;
        self.is_suspect |= matches!(restart, Restart::Failed(SqliteError::CheckpointFailed { .. }));
        match restart {
            Restart::NotTried => {
                self.pin_is_at_zero = was_at_zero;
                Ok(None)
            }
            Restart::Ready => {
                self.pin_is_at_zero = true;
                Ok(Some(true))
            }
            Restart::Held => Ok(Some(false)),
            Restart::Failed(error) => Err(error.into()),
        }
    }
}

/// Whether so much may be read with the write lock held: milliseconds of the few MiB that a WAL has mostly. The lock is often had at
/// the moment when a transaction of many MiB is committed; reading that takes as long as writing it. Where the next round would find as
/// much, because such transactions follow each other without a pause or the writer is faster than we read, it does not help to wait.
fn is_short(unread_bytes: u64, wal_len_bytes: u64, unread_before_bytes: u64) -> bool {
    unread_bytes <= wal_len_bytes / 4 || unread_bytes >= unread_before_bytes
}

/// Reads what is published. A WAL that changes while its header is read is read again; nothing was taken in then.
fn read_settled<S: Sink>(follower: &mut Follower, files: &Files, sink: &mut S) -> Result<u32, S::Error> {
    /// Tells an unsettled WAL from a failed sink, which must not be called again.
    enum Failure<E> {
        Sqlite(SqliteError),
        Sink(E),
    }
    impl<E> From<SqliteError> for Failure<E> {
        fn from(error: SqliteError) -> Self {
            Self::Sqlite(error)
        }
    }
    let mut captured = 0;
    for attempt in 1.. {
        let mut deliver = |transaction: &WalTransaction<'_>, images: &mut Images<'_>| {
            captured += 1;
            sink.take(transaction, images).map_err(Failure::Sink)
        };
        match follower.read_published(files, &mut deliver) {
            Ok(_) => break,
            Err(Failure::Sqlite(SqliteError::Unsettled { .. })) if attempt < SETTLE_ATTEMPTS => {
                std::thread::yield_now();
            }
            Err(Failure::Sqlite(error)) => return Err(error.into()),
            Err(Failure::Sink(error)) => return Err(error),
        }
    }
    Ok(captured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_transaction_is_not_read_with_the_write_lock_held_unless_another_one_follows() {
        const MIB: u64 = 1 << 20;
        assert!(is_short(0, 0, u64::MAX) && is_short(MIB, 4 * MIB, u64::MAX));
        assert!(!is_short(23 * MIB, 27 * MIB, u64::MAX));
        assert!(is_short(2 * MIB, 29 * MIB, 23 * MIB), "it was the only one");
        assert!(is_short(23 * MIB, 50 * MIB, 23 * MIB), "they follow each other");
        assert!(!is_short(15 * MIB, 50 * MIB, 23 * MIB), "we catch up");
    }
}
