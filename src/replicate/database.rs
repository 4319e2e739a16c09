//! A database's thread: wakes, captures, cuts segments, checkpoints, reads snapshots. It never waits for storage.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};

use super::capture::Capture;
use super::claim::{Claimed, Continuing};
use super::ledger::{FOLD_AT_ENTRIES, Ledger};
use super::record::{Ignore, RecordError, Recorder, Start};
use super::scan::{SnapshotScan, Step, is_as_known};
use super::ship::{Job, Piece, Progress};
use super::spool::{self, Spool};
use super::state::{LocalState, StateDirectory, wal_field};
use super::wake::{Event, Mailbox};
use crate::clock::Clock;
use crate::format::Position;
use crate::sqlite::SqliteError;
use crate::sqlite::header::{HEADER_LEN, schema_cookie};
use crate::sqlite::live::LiveDatabase;

/// Under load, wakes are not answered more often.
const BUSY_WAKE_INTERVAL: Duration = Duration::from_millis(10);
/// Otherwise they are: an application's RESTART or TRUNCATE checkpoint waits for two answers, and the waits in SQLite's busy
/// handler grow quickly.
const WAKE_INTERVAL: Duration = Duration::from_millis(2);
/// So many looks in a row that captured something are a load.
const BUSY_AFTER_LOOKS: u32 = 5;
/// A writer publishes a commit after the write that woke us, and a checkpointer its progress after its fsync, neither with an
/// event of its own: so we look again, this soon at first, then at doubling intervals.
const FIRST_LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How soon a snapshot is read on when the store was not ready for more.
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(4);
/// A segment is cut when it has so many bytes of page images, whatever the time.
const SEGMENT_RAW_LIMIT: u64 = 32 << 20;
/// After a database has not been written to for so long, what is left in the WAL is checkpointed.
const QUIET_AFTER: Duration = Duration::from_secs(1);
/// A checkpoint of a quiet database that others hold up is tried again after this.
const QUIET_RETRY: Duration = Duration::from_secs(60);
/// A barrier that was not to be had is tried again after this at first, then at doubling intervals.
const FIRST_BARRIER_RETRY: Duration = Duration::from_millis(10);
const LAST_BARRIER_RETRY: Duration = Duration::from_millis(320);
/// A snapshot that could not be stored is read again after this.
const SNAPSHOT_RETRY: Duration = Duration::from_secs(30);
/// At a stop, a claim that is not answered yet is waited for, and a snapshot read on, for so long.
const STOP_PATIENCE: Duration = Duration::from_secs(4);
/// So many extents are read before commits are looked after again.
const EXTENTS_A_STEP: usize = 4;
/// So many extents may wait for the store.
const PIECES_IN_FLIGHT: usize = 8;

/// How one database is followed.
#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    /// The database.
    pub path: PathBuf,
    /// Under load, a segment is cut this often.
    pub sync_interval: Duration,
    /// The WAL is looked at this often even when no event tells of a change.
    pub poll_interval: Duration,
    /// The WAL is made to begin anew when this many bytes of it are captured.
    pub checkpoint_threshold_bytes: u64,
    /// No more bytes of segments than this wait on the local disk.
    pub spool_limit_bytes: u64,
}

/// Why following a database ended.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// From SQLite or its files.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// From the local state: ledger, spool, state file.
    #[error("the local state directory failed: {0}")]
    Local(#[from] io::Error),
    /// More waits to be shipped than may.
    #[error("{waiting_bytes} bytes wait to be shipped, more than the spool's limit")]
    SpoolFull {
        /// How many bytes.
        waiting_bytes: u64,
    },
}

impl From<RecordError> for DatabaseError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Sqlite(error) => Self::Sqlite(error),
            RecordError::Local(error) => Self::Local(error),
        }
    }
}

impl DatabaseError {
    /// Whether the local state must not be used at the next start, because what it says may be wrong.
    #[must_use]
    pub fn disproves_state(&self) -> bool {
        matches!(
            self,
            Self::SpoolFull { .. }
                | Self::Local(_)
                | Self::Sqlite(
                    SqliteError::Gap { .. } | SqliteError::PageChanged { .. } | SqliteError::Replaced { .. }
                )
        )
    }
}

/// What a database's thread works with.
pub struct Surroundings {
    /// Settings.
    pub settings: DatabaseSettings,
    /// Where wakes and events arrive.
    pub mailbox: Arc<Mailbox>,
    /// Where jobs for storage go.
    pub jobs: mpsc::UnboundedSender<Job>,
    /// What both sides see.
    pub progress: Arc<Progress>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

/// Follows a database until told to stop; returns the last captured transaction, if an epoch was claimed.
///
/// # Errors
/// See [`DatabaseError`]. What was captured before is in the spool, and the next call carries on.
pub fn follow(around: Surroundings, directory: &StateDirectory) -> Result<Option<Position>, DatabaseError> {
    let live = LiveDatabase::open(&around.settings.path)?;
    if live.was_switched_to_wal {
        tracing::info!(database = %around.settings.path.display(), "switched to WAL mode");
    }
    let mut following = Following::begin(around, directory, live)?;
    following.run()?;
    following.end()
}

/// A snapshot on its way.
struct ActiveScan {
    scan: SnapshotScan,
    pieces: mpsc::Sender<Piece>,
    /// What the store was not ready to take.
    pending: Option<Piece>,
}

struct Following<'a> {
    around: Surroundings,
    directory: &'a StateDirectory,
    spool: Spool,
    capture: Capture,
    recorder: Option<Recorder>,
    claimed: Option<Claimed>,
    scan: Option<ActiveScan>,
    scan_due: Option<Duration>,
    has_snapshot: bool,
    last_cut: Option<Duration>,
    last_commit: Duration,
    last_look: Duration,
    busy_looks: u32,
    look_again: Option<Duration>,
    quiet_checkpoint_due: Option<Duration>,
    barrier_retry: Duration,
    barrier_due: Duration,
}

impl<'a> Following<'a> {
    fn begin(around: Surroundings, directory: &'a StateDirectory, live: LiveDatabase) -> Result<Self, DatabaseError> {
        let spool = Spool::new(directory.spool_path());
        let saved = directory.load().filter(|(state, _)| state.page_size == live.files.page_size);
        let left_at = saved.as_ref().and_then(|(state, _)| state.wal_position());
        let (capture, continues) = Capture::attach(live, left_at)?;
        let now = around.clock.monotonic();
        let mut following = Self {
            around,
            directory,
            spool,
            capture,
            recorder: None,
            claimed: None,
            scan: None,
            scan_due: None,
            has_snapshot: false,
            last_cut: None,
            last_commit: now,
            last_look: now,
            busy_looks: 0,
            look_again: None,
            quiet_checkpoint_due: Some(now + QUIET_AFTER),
            barrier_retry: FIRST_BARRIER_RETRY,
            barrier_due: now,
        };
        let continuing = match saved {
            Some((state, overlay)) => {
                let ledger = Ledger::open(
                    &directory.ledger_path(),
                    state.page_size,
                    state.size_pages,
                    state.fingerprint,
                    overlay,
                );
                following.resume(&state, ledger, continues)?
            }
            None => None,
        };
        let leftovers = following.spool.waiting()?;
        following.send(Job::Claim { continuing, leftovers });
        Ok(following)
    }

    /// Takes up recording where the state says, if it can be proven that nothing was missed: the WAL goes on from there, and
    /// the main file was not touched, or holds, page for page, what the ledger knows.
    fn resume(
        &mut self,
        state: &LocalState,
        ledger: io::Result<Ledger>,
        wal_continues: bool,
    ) -> Result<Option<Continuing>, DatabaseError> {
        let database = self.around.settings.path.display().to_string();
        let Ok(ledger) = ledger else { return Ok(None) };
        let is_untouched = self.capture.files().main_identity()? == state.main;
        let start = Start { position: state.captured, time_ms: state.time_ms, schema_cookie: state.schema_cookie };
        let clock = self.around.clock.clone();
        let mut recorder = Recorder::new(self.spool.clone(), clock, ledger, state.page_size, start);
        // The epoch to come is not known yet.
        recorder.set_epoch(0);
        if wal_continues {
            self.capture.advance(&mut recorder)?;
        }
        let is_proven = (wal_continues && is_untouched) || is_as_known(&self.capture, &recorder.ledger)?;
        if !is_proven {
            tracing::warn!(database, "changed while it was not followed; a new snapshot is needed");
            return Ok(None);
        }
        tracing::info!(database, txid = state.captured.txid, wal_continues, is_untouched, "nothing was missed");
        self.recorder = Some(recorder);
        self.has_snapshot = state.has_snapshot;
        let (replica, writer) = (state.replica.clone(), state.writer.clone());
        Ok(Some(Continuing { replica, writer, captured: state.captured }))
    }

    fn now(&self) -> Duration {
        self.around.clock.monotonic()
    }

    /// The other side ends only after this one, or when it has failed, and then says Stop.
    fn send(&self, job: Job) {
        if self.around.jobs.send(job).is_err() {
            tracing::debug!("nobody ships any more");
        }
    }

    fn run(&mut self) -> Result<(), DatabaseError> {
        loop {
            let (is_woken, events) = self.around.mailbox.wait(self.time_to_wait()?);
            if is_woken {
                self.coalesce();
                self.look_again = Some(FIRST_LOOK_AGAIN);
            }
            let mut is_stopping = false;
            for event in events {
                is_stopping |= self.handle(event)?;
            }
            self.look()?;
            if is_stopping {
                let until = self.now() + STOP_PATIENCE;
                self.await_claim(until)?;
                return self.finish_snapshot(until);
            }
            self.read_snapshot()?;
            self.cut_if_due()?;
            self.checkpoint_if_due()?;
        }
    }

    /// Many events are one wake.
    fn coalesce(&self) {
        let since = self.now().saturating_sub(self.last_look);
        let interval = if self.busy_looks >= BUSY_AFTER_LOOKS { BUSY_WAKE_INTERVAL } else { WAKE_INTERVAL };
        if let Some(early) = interval.checked_sub(since) {
            std::thread::sleep(early);
        }
    }

    fn time_to_wait(&self) -> Result<Duration, DatabaseError> {
        if self.scan.as_ref().is_some_and(|active| active.pending.is_none()) {
            return Ok(Duration::ZERO);
        }
        let now = self.now();
        let mut wait = self.around.settings.poll_interval;
        let cut_due = self.recorder.as_ref().and_then(Recorder::open_len_bytes).and(self.last_cut);
        let cut_due = cut_due.filter(|_| self.claimed.is_some()).map(|last| last + self.around.settings.sync_interval);
        let barrier_due = self.is_barrier_wanted().then_some(self.barrier_due);
        let pending_due = self.scan.is_some().then_some(now + SNAPSHOT_PAUSE);
        for due in [cut_due, barrier_due, pending_due, self.quiet_checkpoint_due, self.scan_due].into_iter().flatten() {
            wait = wait.min(due.saturating_sub(now));
        }
        Ok(wait.min(self.look_again.unwrap_or(wait)))
    }

    /// Captures, if there is anything to capture or to let go of.
    fn look(&mut self) -> Result<(), DatabaseError> {
        self.last_look = self.now();
        self.look_again =
            self.look_again.map(|wait| wait * 2).filter(|&wait| wait < self.around.settings.poll_interval);
        if self.look_again.is_none() {
            self.capture.files().check_still_there()?;
        }
        let captured = match self.capture.has_work()? {
            true => self.advance()?,
            false => 0,
        };
        self.busy_looks = if captured > 0 { self.busy_looks.saturating_add(1) } else { 0 };
        if captured > 0 {
            self.note_commits();
        }
        Ok(())
    }

    fn note_commits(&mut self) {
        self.last_commit = self.now();
        self.quiet_checkpoint_due = Some(self.last_commit + QUIET_AFTER);
    }

    fn advance(&mut self) -> Result<u32, DatabaseError> {
        let captured = match &mut self.recorder {
            Some(recorder) => self.capture.advance(recorder),
            None => self.capture.advance(&mut Ignore),
        };
        match captured {
            // Another process recovers the WAL just now, or so. What is not captured stays pinned.
            Err(RecordError::Sqlite(error)) if error.is_busy() => Ok(0),
            other => Ok(other?),
        }
    }

    /// Takes an event in; tells whether it is time to stop.
    fn handle(&mut self, event: Event) -> Result<bool, DatabaseError> {
        match event {
            Event::Claimed(claimed) => self.take_epoch(*claimed)?,
            Event::SnapshotStored => {
                self.has_snapshot = true;
                // Not durably: a power failure costs another snapshot, an fsync here can hold up the application's checkpoint.
                self.save_state(false)?;
            }
            Event::SnapshotFailed => {
                self.scan = None;
                self.scan_due = Some(self.now() + SNAPSHOT_RETRY);
            }
            Event::Stop => return Ok(true),
        }
        Ok(false)
    }

    /// Begins to record for an epoch; one that does not continue starts with the database as it is now.
    fn take_epoch(&mut self, claimed: Claimed) -> Result<(), DatabaseError> {
        let record = &claimed.record;
        tracing::info!(
            database = %self.around.settings.path.display(),
            epoch = record.epoch,
            continues = record.continues,
            first_txid = record.first_txid,
            conditional_puts = claimed.has_conditional_puts,
            "epoch claimed"
        );
        match &mut self.recorder {
            Some(recorder) if record.continues => {
                recorder.set_epoch(record.epoch);
                self.claimed = Some(claimed);
                // An earlier run may have ended before its snapshot was stored.
                self.scan_due = (!self.has_snapshot).then(|| self.now());
                return self.save_state(false);
            }
            _ => {}
        }
        // Until the first snapshot is read nothing could be proven from the local state.
        self.directory.discard()?;
        // What was recorded on a ground that does not hold is dropped with its segment.
        self.recorder = None;
        self.has_snapshot = false;
        spool::remove(&self.spool.open_segment_path())?;
        self.advance()?;
        let start = self.start_at(&claimed)?;
        let page_size = self.capture.files().page_size;
        let ledger = Ledger::create(&self.directory.ledger_path(), page_size, self.capture.follower().size_pages())?;
        let clock = self.around.clock.clone();
        self.recorder = Some(Recorder::new(self.spool.clone(), clock, ledger, page_size, start));
        self.claimed = Some(claimed);
        self.scan_due = Some(self.now());
        Ok(())
    }

    fn start_at(&self, claimed: &Claimed) -> Result<Start, DatabaseError> {
        let record = &claimed.record;
        let mut page_one = vec![0; self.capture.files().page_size as usize];
        self.capture.follower().read_pages(self.capture.files(), 1, &mut page_one)?;
        Ok(Start {
            position: Position { epoch: record.epoch, txid: record.first_txid },
            time_ms: self.around.clock.now_ms().max(claimed.time_floor_ms),
            schema_cookie: schema_cookie(&page_one[..HEADER_LEN]),
        })
    }

    /// Reads a few extents of the snapshot that is due or under way.
    fn read_snapshot(&mut self) -> Result<(), DatabaseError> {
        if self.scan.is_none() && self.scan_due.is_some_and(|due| due <= self.now()) {
            self.begin_snapshot();
        }
        let (Some(active), Some(recorder)) = (&mut self.scan, &mut self.recorder) else { return Ok(()) };
        for _ in 0..EXTENTS_A_STEP {
            let piece = match active.pending.take() {
                Some(piece) => piece,
                None => match active.scan.step(&self.capture, recorder)? {
                    Step::Extent(bytes) => Piece::Bytes(bytes),
                    Step::Finished(bytes, info) => Piece::End(bytes, info),
                },
            };
            let is_last = matches!(piece, Piece::End(..));
            match active.pieces.try_send(piece) {
                Ok(()) if is_last => {
                    self.scan = None;
                    return self.finish_ledger();
                }
                // As long as the ledger is not complete no state relies on it.
                Ok(()) => {
                    if recorder.ledger.overlay().len() >= FOLD_AT_ENTRIES && recorder.ledger.fingerprint().is_none() {
                        recorder.ledger.fold()?;
                    }
                }
                // The store is slower than the disk.
                Err(TrySendError::Full(piece)) => {
                    active.pending = Some(piece);
                    return Ok(());
                }
                // It has failed; the event that says so is on its way.
                Err(TrySendError::Closed(_)) => {
                    self.scan = None;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A process that is stopped as soon as it has started waits for its epoch: without one nothing can be shipped. Ends at
    /// once when nobody claims any more.
    fn await_claim(&mut self, until: Duration) -> Result<(), DatabaseError> {
        while self.claimed.is_none() && !self.around.jobs.is_closed() && self.now() < until {
            let (_, events) = self.around.mailbox.wait(until.saturating_sub(self.now()));
            for event in events {
                self.handle(event)?;
            }
        }
        Ok(())
    }

    /// A short-lived process should leave something to restore from: a snapshot that is being read at the stop is read to
    /// its end, if that is near. The store's part has its own limit.
    fn finish_snapshot(&mut self, until: Duration) -> Result<(), DatabaseError> {
        while (self.scan.is_some() || self.scan_due.is_some_and(|due| due <= self.now())) && self.now() < until {
            self.read_snapshot()?;
            if self.scan.as_ref().is_some_and(|active| active.pending.is_some()) {
                std::thread::sleep(SNAPSHOT_PAUSE);
            }
        }
        Ok(())
    }

    fn begin_snapshot(&mut self) {
        let Some(recorder) = &self.recorder else { return };
        self.scan_due = None;
        let (scan, header) = SnapshotScan::new(self.capture.files().page_size, &recorder.last());
        let (pieces, receiver) = mpsc::channel(PIECES_IN_FLIGHT);
        self.send(Job::Snapshot { key: scan.key(), pieces: receiver });
        self.scan = Some(ActiveScan { scan, pieces, pending: Some(Piece::Bytes(header)) });
    }

    /// Every page is known: from here on the local state proves something.
    fn finish_ledger(&mut self) -> Result<(), DatabaseError> {
        if let Some(recorder) = &mut self.recorder {
            recorder.ledger.fold()?;
            recorder.ledger.sync()?;
        }
        self.cut()?;
        self.save_state(true)
    }

    fn cut_if_due(&mut self) -> Result<(), DatabaseError> {
        let Some(open_len_bytes) = self.recorder.as_ref().and_then(Recorder::open_len_bytes) else { return Ok(()) };
        let interval = self.around.settings.sync_interval;
        let is_due = self.last_cut.is_none_or(|last| self.now().saturating_sub(last) >= interval);
        if self.claimed.is_some() && (is_due || open_len_bytes >= SEGMENT_RAW_LIMIT) {
            self.cut()?;
        }
        Ok(())
    }

    /// Ends the segment that is being written: first the local state says that it is captured, then it is shipped. So
    /// nothing is ever confirmed that the next start doesn't know of.
    fn cut(&mut self) -> Result<(), DatabaseError> {
        let (Some(recorder), true) = (&mut self.recorder, self.claimed.is_some()) else { return Ok(()) };
        let Some(spooled) = recorder.cut()? else { return Ok(()) };
        self.last_cut = Some(self.now());
        self.save_state(false)?;
        let waiting = &self.around.progress.waiting_bytes;
        let waiting_bytes = waiting.fetch_add(spooled.len_bytes, Ordering::Relaxed) + spooled.len_bytes;
        // One segment alone may be larger: a single transaction can be.
        if waiting_bytes > self.around.settings.spool_limit_bytes.max(spooled.len_bytes) {
            return Err(DatabaseError::SpoolFull { waiting_bytes });
        }
        self.send(Job::Ship(spooled));
        Ok(())
    }

    /// Saves what the next start needs, if there is anything to prove by it.
    fn save_state(&mut self, durably: bool) -> Result<(), DatabaseError> {
        let (Some(recorder), Some(claimed)) = (&mut self.recorder, &self.claimed) else { return Ok(()) };
        let Some(fingerprint) = recorder.ledger.fingerprint() else { return Ok(()) };
        let last = recorder.last();
        if recorder.open_len_bytes().is_some() {
            // Transactions that are in no segment are not captured yet, as far as the state goes: it stays at the last cut.
            return Ok(());
        }
        let state = LocalState {
            replica: claimed.replica.clone(),
            writer: claimed.record.writer.clone(),
            captured: last.position,
            time_ms: last.time_ms,
            page_size: self.capture.files().page_size,
            size_pages: recorder.ledger.size_pages(),
            schema_cookie: last.schema_cookie,
            fingerprint,
            wal: wal_field(self.capture.follower().position()),
            main: self.capture.files().main_identity()?,
            has_snapshot: self.has_snapshot,
        };
        let must_fold = recorder.ledger.overlay().len() >= FOLD_AT_ENTRIES;
        self.directory.save(&state, recorder.ledger.overlay(), durably || must_fold)?;
        if must_fold {
            recorder.ledger.fold()?;
            recorder.ledger.sync()?;
            self.directory.save(&state, recorder.ledger.overlay(), true)?;
        }
        Ok(())
    }

    fn is_barrier_wanted(&self) -> bool {
        self.capture.wal_len_bytes() > self.around.settings.checkpoint_threshold_bytes
    }

    fn checkpoint_if_due(&mut self) -> Result<(), DatabaseError> {
        let now = self.now();
        if self.is_barrier_wanted() {
            if now >= self.barrier_due {
                let is_done = self.barrier()?;
                self.barrier_retry =
                    if is_done { FIRST_BARRIER_RETRY } else { (self.barrier_retry * 2).min(LAST_BARRIER_RETRY) };
                self.barrier_due = self.now() + self.barrier_retry;
            }
        } else if self.quiet_checkpoint_due.is_some_and(|due| due <= now) {
            self.quiet_checkpoint_due = None;
            if self.capture.has_frames_to_checkpoint()? {
                let is_done = self.capture.passive_checkpoint()?;
                // Lets the pin go to mark 0, so that the next writer begins the WAL anew.
                self.advance()?;
                self.quiet_checkpoint_due = (!is_done).then_some(now + QUIET_RETRY);
            }
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<bool, DatabaseError> {
        let attempt = |captured: Result<bool, RecordError>| -> Result<bool, DatabaseError> {
            match captured {
                Err(RecordError::Sqlite(error)) if error.is_busy() => Ok(false),
                other => Ok(other?),
            }
        };
        let before = self.recorder.as_ref().map(|recorder| recorder.last().position.txid);
        let (begun, wal_len_bytes) = (self.now(), self.capture.wal_len_bytes());
        let is_done = match &mut self.recorder {
            Some(recorder) => attempt(self.capture.barrier(recorder))?,
            None => attempt(self.capture.barrier(&mut Ignore))?,
        };
        tracing::debug!(is_done, wal_len_bytes, took = ?self.now().saturating_sub(begun), "barrier");
        if self.recorder.as_ref().map(|recorder| recorder.last().position.txid) != before {
            self.note_commits();
        }
        Ok(is_done)
    }

    /// Captures and cuts what is left, and records a clean stop.
    fn end(mut self) -> Result<Option<Position>, DatabaseError> {
        self.advance()?;
        self.cut()?;
        self.spool.sync()?;
        self.save_state(true)?;
        Ok(self.claimed.as_ref().and(self.recorder.as_ref()).map(|recorder| recorder.last().position))
    }
}
