//! Capture: every transaction out of the WAL, under a pin that keeps moving.

use crate::format::page_hash;
use crate::sqlite::SqliteError;
use crate::sqlite::follow::{Follower, Images, WalPosition, WalTransaction};
use crate::sqlite::live::{FileIdentity, Files, LiveDatabase};
use crate::sqlite::wal_index::WalIndex;

/// How often a read of the WAL is begun again when the WAL changes under it.
const SETTLE_ATTEMPTS: usize = 20;

/// So often a barrier begins again with what came in while it asked for the write lock.
const BARRIER_ROUNDS: usize = 6;
/// So often the write lock is asked for in a round, a few dozen microseconds apart.
const LOCK_ATTEMPTS: u32 = 200;

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
    /// The main file as it was seen with all of the WAL in it.
    at_ease: Option<(WalIndex, FileIdentity)>,
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
        Ok((Self { live, follower, pin_is_at_zero: false, at_ease: None }, continues))
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
    /// As the operating system answers; [`SqliteError::WrittenTo`].
    pub fn work(&mut self) -> Result<Work, SqliteError> {
        let index = self.live.files.wal_index()?;
        self.check_main(&index)?;
        Ok(Work {
            is_behind: self.follower.is_behind(&index),
            holds_up_a_checkpoint: index.is_checkpointed() && !self.pin_is_at_zero,
        })
    }

    /// Finds out a file that was written over in place, as `cp` does. SQLite does not notice that, and neither does anything else here:
    /// the path, the WAL and its index are as they were, and what is captured from then on is right on top of pages that are not.
    ///
    /// Only a checkpoint writes to the main file, and only as long as frames are left that are not in it; it says that none are when
    /// all is written. So between two looks at the same index without such frames nobody may have written.
    fn check_main(&mut self, index: &WalIndex) -> Result<(), SqliteError> {
        let before = self.at_ease.take().filter(|(before, _)| before == index);
        if !index.is_checkpointed() {
            return Ok(());
        }
        let main = self.live.files.main_identity()?;
        if before.is_some_and(|(_, before)| before.was_written_before(&main)) {
            // Between the look at the index and the one at the file there may have been a commit and a checkpoint.
            if self.live.files.wal_index()? != *index {
                return Ok(());
            }
            self.live.drop_backfilled_wal()?;
            return Err(SqliteError::WrittenTo { path: self.live.files.path().to_owned() });
        }
        self.at_ease = Some((*index, main));
        Ok(())
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
        // Looked at before the new pin begins: what was in the main file then still is when it has begun.
        let index = self.live.files.wal_index()?;
        let before = self.follower.position();
        let follower = &mut self.follower;
        let captured = self.live.advance_pin(|files| read_settled(follower, files, sink))?;
        self.follower.note_pinned(&index);
        self.pin_is_at_zero = index.is_checkpointed() && self.follower.position() == before;
        Ok(captured)
    }

    /// Copies frames into the main file without waiting for anybody; tells whether all are there now.
    ///
    /// # Errors
    /// What SQLite answers.
    pub fn passive_checkpoint(&mut self) -> Result<bool, SqliteError> {
        Ok(self.live.passive_checkpoint()?.is_some_and(|done| done.backfilled_frames >= done.frame_count))
    }

    /// Lets the WAL be begun anew, under any load: checkpoint, capture until little is left, take the write lock, capture
    /// and checkpoint the rest, begin the pin again at mark 0. `Ok(false)` when a writer or reader was in the way: try again
    /// later, the application comes first. `others_move` as in [`LiveDatabase::barrier`].
    ///
    /// # Errors
    /// What the sink answers, SQLite, or the operating system.
    pub fn barrier<S: Sink>(&mut self, sink: &mut S, others_move: impl Fn() -> bool) -> Result<bool, S::Error> {
        let mut unread_before_bytes = u64::MAX;
        for _ in 0..BARRIER_ROUNDS {
            // The long copy and its fsync happen here, with no lock held; what is left for the lock is what came in meanwhile.
            self.live.passive_checkpoint()?;
            self.advance(sink)?;
            let follower = &mut self.follower;
            let capture = |files: &Files| -> Result<bool, S::Error> {
                let (unread_bytes, wal_len_bytes) = follower.unread_bytes(&files.wal_index()?);
                if !is_short(unread_bytes, wal_len_bytes, unread_before_bytes) {
                    unread_before_bytes = unread_bytes;
                    return Ok(false);
                }
                read_settled(follower, files, sink).map(|_| true)
            };
            let done = self.live.barrier(LOCK_ATTEMPTS, capture, &others_move)?;
            if let Some(is_checkpointed) = done {
                self.pin_is_at_zero = is_checkpointed;
                return Ok(is_checkpointed);
            }
        }
        Ok(false)
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
