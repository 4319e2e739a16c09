//! When a snapshot is due, and the one that is on its way: its base is looked up, it is read between captures, and stored.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;

use super::base::Base;
use super::capture::Capture;
use super::control::State;
use super::ledger::FOLD_AT_ENTRIES;
use super::record::{RecordError, Recorder};
use super::scan::{SnapshotScan, Step, key_of};
use super::ship::Piece;
use crate::format::key::SnapshotKey;
use crate::store::retry::REQUEST_PAUSE;

/// A snapshot that could not be stored is tried again after this.
const RETRY: Duration = Duration::from_secs(30);
/// So many extents are read before commits are looked after again.
const EXTENTS_A_STEP: usize = 4;
/// So many extents that need not be read are looked at before commits are looked after again.
const REFERENCES_A_STEP: usize = 256;
/// So many extents may wait for the store.
const PIECES_IN_FLIGHT: usize = 8;
/// A log up to this size is no reason for a snapshot: it is read in a second or two.
const SMALL_LOG_BYTES: u64 = 128 << 20;

/// What is known of the last snapshot that is confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotNote {
    /// When it was begun, in milliseconds since 1970.
    pub begun_ms: u64,
    /// Length of all its extents in bytes, wherever they are.
    pub extents_len_bytes: u64,
    /// Bytes of segments that were cut since it was begun.
    pub log_len_bytes: u64,
}

impl SnapshotNote {
    /// Whether another one is due: after `interval` if anything was written, and earlier when a restore would read more of the
    /// log than of the database.
    fn is_outdated(&self, interval: Duration, now_ms: u64) -> bool {
        let age_ms = u128::from(now_ms.saturating_sub(self.begun_ms));
        (self.log_len_bytes > 0 && age_ms >= interval.as_millis())
            || self.log_len_bytes > self.extents_len_bytes.max(SMALL_LOG_BYTES)
    }
}

/// The snapshots of one database.
#[derive(Debug)]
pub struct Snapshots {
    interval: Duration,
    /// The last one that is confirmed; `None` when the line of this epoch can't be restored yet.
    confirmed: Option<SnapshotNote>,
    /// When the next one is due whatever the last one says.
    due: Option<Duration>,
    stage: Stage,
    /// Who wants one that begins from now on.
    asked: Vec<oneshot::Sender<State>>,
    /// Who waits for the one that is on its way.
    awaited: Vec<oneshot::Sender<State>>,
}

#[derive(Debug)]
enum Stage {
    Idle,
    /// The newest snapshot in storage is looked up.
    AwaitsBase,
    Reading(Box<Reading>),
    /// Everything is read; the store has the word.
    Storing(SnapshotNote),
}

#[derive(Debug)]
struct Reading {
    scan: SnapshotScan,
    note: SnapshotNote,
    pieces: mpsc::Sender<Piece>,
    /// What the store was not ready to take.
    pending: Option<Piece>,
    /// How long a pin stood at most while it was read, and how large the captured part of the WAL was.
    oldest_pin: Duration,
    largest_wal_bytes: u64,
}

/// What became of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Advance {
    /// There is nothing to read now.
    Nothing,
    /// The store is not ready for more.
    StoreIsBusy,
    /// There is more to read.
    More,
    /// All is read, and the ledger knows every page.
    Complete,
}

impl Snapshots {
    /// With what is known of the last one.
    #[must_use]
    pub fn new(interval: Duration, confirmed: Option<SnapshotNote>) -> Self {
        let (asked, awaited) = (Vec::new(), Vec::new());
        Self { interval, confirmed, due: None, stage: Stage::Idle, asked, awaited }
    }

    /// What is known of the last one that is confirmed.
    #[must_use]
    pub fn confirmed(&self) -> Option<SnapshotNote> {
        self.confirmed
    }

    /// Takes them out of here, for when the database rests.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let confirmed = self.confirmed;
        std::mem::replace(self, Self::new(self.interval, confirmed))
    }

    /// Asks for one: at once, or after the one that is on its way. `reply` hears of it when it is stored.
    pub fn ask(&mut self, now: Duration, reply: oneshot::Sender<State>) {
        self.due = Some(now);
        self.asked.push(reply);
    }

    /// Whether one is due and none is being made.
    #[must_use]
    pub fn is_due(&self, now: Duration, now_ms: u64) -> bool {
        let is_outdated =
            self.due.is_none() && self.confirmed.as_ref().is_none_or(|note| note.is_outdated(self.interval, now_ms));
        matches!(self.stage, Stage::Idle) && (is_outdated || self.due.is_some_and(|due| due <= now))
    }

    /// One that is to be tried again later is due now; tells whether there is such a one.
    pub fn hurry(&mut self, now: Duration) -> bool {
        let is_later = self.due.is_some_and(|due| due > now);
        if is_later {
            self.due = Some(now);
        }
        is_later
    }

    /// A caller waits for the first one: if it failed, it is tried again now, unless it failed less
    /// than a second ago. Requests must not become a busy loop.
    pub fn hurry_for_request(&mut self, now: Duration) {
        let failed_at = self.due.map_or(now, |due| due.saturating_sub(RETRY));
        if self.confirmed.is_none() && now.saturating_sub(failed_at) >= REQUEST_PAUSE {
            self.hurry(now);
        }
    }

    /// Begins the one that is due: its base is to be looked up now.
    pub fn await_base(&mut self) {
        self.due = None;
        self.stage = Stage::AwaitsBase;
    }

    /// Whether one is being made and is not wholly read yet, or none is confirmed and the first one is about to begin.
    #[must_use]
    pub fn has_first_to_read(&self) -> bool {
        self.confirmed.is_none() && !matches!(self.stage, Stage::Storing(_))
    }

    /// Whether one is being made.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        !matches!(self.stage, Stage::Idle)
    }

    /// Whether one is confirmed, and none is being made or asked for.
    #[must_use]
    pub fn may_rest(&self) -> bool {
        self.confirmed.is_some() && !self.is_under_way() && self.due.is_none() && self.asked.is_empty()
    }

    /// How long until the next one is due, if anything was written since the last one.
    #[must_use]
    pub fn due_in(&self, now_ms: u64) -> Option<Duration> {
        let note = self.confirmed.filter(|note| note.log_len_bytes > 0)?;
        Some(self.interval.saturating_sub(Duration::from_millis(now_ms.saturating_sub(note.begun_ms))))
    }

    /// When to come back without being woken.
    #[must_use]
    pub fn next_step(&self, now: Duration, store_pause: Duration) -> Option<Duration> {
        match &self.stage {
            Stage::Reading(reading) if reading.pending.is_none() => Some(now),
            Stage::Reading(_) => Some(now + store_pause),
            Stage::Idle => self.due,
            Stage::AwaitsBase | Stage::Storing(_) => None,
        }
    }

    /// The base is known: begins to read. Gives where it is to be stored, and its pieces. `None` when nothing was written since
    /// the base was begun: then it is the snapshot that was asked for. (Another one would have its name, and put itself in
    /// the place of extents that it refers to.)
    ///
    /// # Errors
    /// When the ledger can't be read.
    pub fn begin(
        &mut self,
        capture: &Capture,
        recorder: &Recorder,
        base: Option<Base>,
        now_ms: u64,
    ) -> Result<Option<(SnapshotKey, mpsc::Receiver<Piece>)>, RecordError> {
        self.awaited.append(&mut self.asked);
        if let Some((key, state, extents_len_bytes)) = base.as_ref().map(Base::summary)
            && key == key_of(recorder)
            && recorder.ledger.fingerprint().is_some()
        {
            self.stage = Stage::Storing(SnapshotNote { begun_ms: now_ms, extents_len_bytes, log_len_bytes: 0 });
            self.note_stored(state);
            return Ok(None);
        }
        let (scan, header) = SnapshotScan::new(capture.files().page_size, recorder, base)?;
        let (pieces, receiver) = mpsc::channel(PIECES_IN_FLIGHT);
        let note = SnapshotNote { begun_ms: now_ms, extents_len_bytes: 0, log_len_bytes: 0 };
        let key = scan.key();
        self.stage = Stage::Reading(Box::new(Reading {
            scan,
            note,
            pieces,
            pending: Some(Piece::Bytes(header)),
            oldest_pin: Duration::ZERO,
            largest_wal_bytes: 0,
        }));
        Ok(Some((key, receiver)))
    }

    /// Reads a few extents.
    ///
    /// # Errors
    /// As [`SnapshotScan::step`].
    pub fn advance(&mut self, capture: &Capture, recorder: &mut Recorder) -> Result<Advance, RecordError> {
        let Stage::Reading(reading) = &mut self.stage else { return Ok(Advance::Nothing) };
        let (mut read, mut referred) = (0, 0);
        while read < EXTENTS_A_STEP && referred < REFERENCES_A_STEP {
            let piece = match reading.pending.take() {
                Some(piece) => piece,
                None => match reading.scan.step(capture, recorder)? {
                    Step::Referred => {
                        referred += 1;
                        fold_while_unknown(recorder)?;
                        continue;
                    }
                    Step::Extent(bytes) => Piece::Bytes(bytes),
                    Step::Finished(finished) => {
                        reading.note.extents_len_bytes = finished.extents_len_bytes;
                        Piece::End(finished)
                    }
                },
            };
            read += 1;
            let is_end = matches!(piece, Piece::End(_));
            match reading.pieces.try_send(piece) {
                Ok(()) if is_end => {
                    let (oldest_pin, largest_wal_bytes) = (reading.oldest_pin, reading.largest_wal_bytes);
                    tracing::info!(key = %reading.scan.key(), ?oldest_pin, largest_wal_bytes, "snapshot read");
                    self.stage = Stage::Storing(reading.note);
                    return Ok(Advance::Complete);
                }
                Ok(()) => fold_while_unknown(recorder)?,
                Err(TrySendError::Full(piece)) => {
                    reading.pending = Some(piece);
                    return Ok(Advance::StoreIsBusy);
                }
                // Storing it has failed; the event that says so is on its way.
                Err(TrySendError::Closed(_)) => {
                    self.stage = Stage::Storing(reading.note);
                    return Ok(Advance::Nothing);
                }
            }
        }
        Ok(Advance::More)
    }

    /// The pin moves: it stood for so long, and protected so many bytes of the WAL. One that protects nothing holds up nobody.
    pub fn note_pin(&mut self, stood: Duration, wal_len_bytes: u64) {
        if let (Stage::Reading(reading), true) = (&mut self.stage, wal_len_bytes > 0) {
            reading.oldest_pin = reading.oldest_pin.max(stood);
            reading.largest_wal_bytes = reading.largest_wal_bytes.max(wal_len_bytes);
        }
    }

    /// A segment was cut.
    pub fn note_cut(&mut self, len_bytes: u64) {
        let on_its_way = match &mut self.stage {
            Stage::Reading(reading) => Some(&mut reading.note),
            Stage::Storing(note) => Some(note),
            Stage::Idle | Stage::AwaitsBase => None,
        };
        for note in self.confirmed.iter_mut().chain(on_its_way) {
            note.log_len_bytes += len_bytes;
        }
    }

    /// The one on its way is confirmed, and serves `state`.
    pub fn note_stored(&mut self, state: State) {
        for reply in self.awaited.drain(..) {
            // Who asked may have left.
            reply.send(state).ok();
        }
        if let Stage::Storing(note) = std::mem::replace(&mut self.stage, Stage::Idle) {
            self.confirmed = Some(note);
        }
    }

    /// The one on its way was not stored, or its base could not be looked up.
    pub fn note_failed(&mut self, now: Duration) {
        // Who waits for it hears that nobody answers any more.
        self.awaited.clear();
        self.asked.clear();
        self.stage = Stage::Idle;
        self.due = Some(now + RETRY);
    }
}

/// As long as the ledger is not complete no state relies on it.
fn fold_while_unknown(recorder: &mut Recorder) -> Result<(), RecordError> {
    if recorder.ledger.overlay().len() >= FOLD_AT_ENTRIES && recorder.ledger.fingerprint().is_none() {
        recorder.ledger.fold()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_due_when_a_restore_would_read_more_log_than_database() {
        let day = Duration::from_secs(86_400);
        let note = SnapshotNote { begun_ms: 1000, extents_len_bytes: 1 << 30, log_len_bytes: 0 };
        let after_a_day_ms = 1000 + 86_400_000;
        assert!(!note.is_outdated(day, after_a_day_ms), "nothing was written");
        let written = SnapshotNote { log_len_bytes: 1, ..note };
        assert!(!written.is_outdated(day, after_a_day_ms - 1));
        assert!(written.is_outdated(day, after_a_day_ms));
        assert!(!written.is_outdated(day, 0), "the clock was set back");
        let grown = SnapshotNote { log_len_bytes: 1 << 30, ..note };
        assert!(!grown.is_outdated(day, 2000));
        assert!(SnapshotNote { log_len_bytes: (1 << 30) + 1, ..note }.is_outdated(day, 2000));
        let small = SnapshotNote { extents_len_bytes: 1, log_len_bytes: SMALL_LOG_BYTES, ..note };
        assert!(!small.is_outdated(day, 2000));
    }
}
