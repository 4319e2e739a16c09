//! A database's thread: wakes, captures, cuts segments, checkpoints, reads snapshots. It never waits for storage.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::capture::{Barrier, Capture, LastClose};
use super::checkpoints::{Checkpoint, Checkpoints};
use super::claim::{Claimed, Continuing};
use super::control::State;
use super::delta::Difference;
use super::foreign_wal::{self, Pair, Wal};
use super::ledger::{FOLD_AT_ENTRIES, Ledger};
use super::neighbours::Neighbour;
use super::pace::Pace;
use super::record::{Ignore, RecordError, Recorder, Start};
use super::rest::{Opening, RESTS_AFTER, Rested, Seen, is_settled, until_settled};
use super::ship::{Job, Progress};
use super::snapshots::{Advance, Snapshots};
use super::spool::{self, Spool, Spooled};
use super::start::{Started, start};
use super::state::{LocalState, StateDirectory, StateDirectoryError, wal_field};
use super::wake::{Changed, Event, Mailbox};
use crate::clock::Clock;
use crate::format::Position;
use crate::format::key::Span;
use crate::sqlite::SqliteError;
use crate::sqlite::header::{HEADER_LEN, schema_cookie};
use crate::sqlite::live::LiveDatabase;
use crate::sqlite::sidecar;

/// It is seen this often whether the files are still those at the path, and whether too much waits for an epoch.
const FILES_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Of page images no more than this are recorded for an epoch that is not claimed: their numbers are in memory.
const UNCLAIMED_RAW_LIMIT: u64 = 4 << 30;
/// Delay between the application's last close and emptying the WAL. Short, so that no person can
/// replace the database file before; long enough for an application that reconnects at once.
const LAST_CLOSE_AFTER: Duration = Duration::from_millis(2);
/// Minimum pause between two attempts to empty the WAL: some programs open and close the database
/// for each request.
const LAST_CLOSE_INTERVAL: Duration = Duration::from_millis(250);
/// On stop: limit of the wait until a later write is sure to change the main file's times.
const SETTLE_LIMIT: Duration = Duration::from_millis(250);
/// A pin that protects frames does not stand longer than this, if the thread is awake.
const PIN_MOVES_AFTER: Duration = Duration::from_millis(500);
/// How soon a snapshot is read on when the store was not ready for more.
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(4);
/// How soon a snapshot that is due asks again whether it may be read: so many are read at a time.
const SNAPSHOT_PERMIT_RETRY: Duration = Duration::from_millis(50);
/// A database that can't be restored yet makes others wait for no longer than this to be taken up.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// A segment is cut when it has so many bytes of page images, whatever the time.
const SEGMENT_RAW_LIMIT: u64 = 256 << 20;
/// When more bytes than this wait to be shipped, segments are to have more bytes of page images than this,
const BACKLOG_BYTES: u64 = 1 << 20;
/// or are cut this often: of a few small transactions each, a long outage would make as many files as it has seconds.
const BACKLOG_INTERVAL: Duration = Duration::from_secs(10);
/// How soon a segment that is due is asked again whether it can be cut without a long wait.
const CUT_RETRY: Duration = Duration::from_millis(2);
/// At a stop, a claim that is not answered yet is waited for, and a snapshot read on, for so long.
const STOP_PATIENCE: Duration = Duration::from_secs(4);
/// At its end what is committed is captured; so often it is tried, so long apart.
const END_ATTEMPTS: u32 = 10;
const END_ATTEMPT_INTERVAL: Duration = Duration::from_millis(5);
/// Of the spool's limit, one part of so many is for segments that are confirmed and kept for merging.
pub const KEPT_SHARE: u64 = 4;

/// How one database is followed.
#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    /// The database.
    pub path: PathBuf,
    /// Under load, a segment is cut this often.
    pub sync_interval: Duration,
    /// The WAL is looked at this often even when no event tells of a change.
    pub poll_interval: Duration,
    /// The WAL is made to begin anew before more bytes of it than this are captured.
    pub checkpoint_threshold_bytes: u64,
    /// No more bytes of segments than this stand on the local disk, those that wait and those that are kept for merging.
    pub spool_limit_bytes: u64,
    /// A snapshot is made this often, if anything was written.
    pub snapshot_interval: Duration,
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
    /// The local state can't be read just now.
    #[error(transparent)]
    State(#[from] StateDirectoryError),
    /// A mistake in this program ended the thread or the task that followed it.
    #[error("an internal error: {0}")]
    Panicked(String),
    /// No epoch could be claimed, and more than may waits for one.
    #[error("storage was not reached, and {recorded_bytes} bytes that wait for it are more than the spool's limit")]
    NotClaimed {
        /// How many bytes were recorded meanwhile.
        recorded_bytes: u64,
    },
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
                | Self::NotClaimed { .. }
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
    /// Who may read a snapshot.
    pub snapshot_permits: Arc<Semaphore>,
    /// Tells whether it should rest.
    pub opening: Opening,
    /// Who else follows it.
    pub neighbour: Arc<Neighbour>,
}

/// How following ended.
#[derive(Debug)]
pub enum Ended {
    /// As told, with this transaction captured last, if an epoch was claimed.
    Stopped(Option<Position>),
    /// Nobody writes, and others want to be held open.
    AtRest(Box<Rested>),
}

/// Follows a database until told to stop, or until it may rest. `rested` is what an earlier call gave, `start` the place among those
/// that are taken up.
///
/// # Errors
/// See [`DatabaseError`]. What was captured before is in the spool, and the next call carries on.
pub fn follow(
    around: Surroundings,
    directory: Arc<StateDirectory>,
    rested: Option<Box<Rested>>,
    mut start: Option<OwnedSemaphorePermit>,
) -> Result<Ended, DatabaseError> {
    // The place is let go of at the end, when the files are closed.
    Following::begin(around, directory, rested)?.run(&mut start)
}

/// A database that is being followed, turn by turn.
pub struct Following {
    around: Surroundings,
    directory: Arc<StateDirectory>,
    spool: Spool,
    capture: Capture,
    recorder: Option<Recorder>,
    claimed: Option<Claimed>,
    snapshots: Snapshots,
    /// Held while a snapshot is being made.
    snapshot_permit: Option<OwnedSemaphorePermit>,
    syncs_wanted: Vec<oneshot::Sender<State>>,
    last_cut: Option<Duration>,
    /// The transaction and the length of the largest segment of a single one that was cut and may still wait.
    large: Option<(u64, u64)>,
    /// Not before then is asked again whether a segment can be cut.
    cut_retry: Duration,
    pace: Pace,
    has_commits: bool,
    files_checked: Duration,
    /// Whether the main file was written to by ourselves since the last wait.
    has_checkpointed: bool,
    checkpoints: Checkpoints,
    /// When to look whether the database is to be closed as SQLite closes the last connection.
    last_close_due: Option<Duration>,
    last_close_tried: Option<Duration>,
    /// When to note that the main file is complete, after the WAL was emptied.
    note_complete_due: Option<Duration>,
}

impl Following {
    /// Opens the database, finds out what can be proven of the time when nobody watched, and asks for an epoch, unless it goes on
    /// in the one that it rested in.
    ///
    /// # Errors
    /// See [`DatabaseError`].
    pub fn begin(
        around: Surroundings,
        directory: Arc<StateDirectory>,
        rested: Option<Box<Rested>>,
    ) -> Result<Self, DatabaseError> {
        let wal = set_foreign_wal_aside(&around.settings.path, &directory);
        refuse_foreign_wal(&around.settings.path, &wal)?;
        let live = LiveDatabase::open(&around.settings.path)?;
        if live.was_switched_to_wal {
            tracing::info!(database = %around.settings.path.display(), "switched to WAL mode");
        }
        let spool = Spool::new(directory.spool_path());
        // What an earlier run recorded and did not cut is captured again, if it is still to be had.
        spool::remove(&spool.open_segment_path())?;
        let Started { capture, resumed } = start(live, &around.settings, &directory, &spool, &around.clock)?;
        let (recorder, snapshot, continuing) = match resumed {
            Some(resumed) => (Some(resumed.recorder), resumed.snapshot, Some(resumed.continuing)),
            None => (None, None, None),
        };
        let now = around.clock.monotonic();
        let pace = Pace::new(around.settings.poll_interval, around.settings.sync_interval, now);
        let checkpoints = Checkpoints::new(around.settings.checkpoint_threshold_bytes, now);
        // What failed in an earlier attempt was the checkpoint of other connections.
        around.progress.board.note_checkpoints(None, around.clock.now_ms());
        let mut following = Self {
            snapshots: Snapshots::new(around.settings.snapshot_interval, snapshot),
            around,
            directory,
            spool,
            capture,
            recorder,
            claimed: None,
            snapshot_permit: None,
            syncs_wanted: Vec::new(),
            last_cut: None,
            large: None,
            cut_retry: now,
            pace,
            has_commits: false,
            files_checked: now,
            has_checkpointed: false,
            checkpoints,
            last_close_due: None,
            last_close_tried: None,
            note_complete_due: None,
        };
        let rested = rested.filter(|rested| continuing.as_ref().is_some_and(|left| left.is_of(&rested.claimed)));
        match (&mut following.recorder, rested) {
            (Some(recorder), Some(rested)) => {
                recorder.set_epoch(rested.claimed.record.epoch);
                following.snapshots = rested.snapshots;
                following.claimed = Some(rested.claimed);
                following.has_commits = recorder.last().position != rested.captured.position;
                following.note_captured();
            }
            _ => {
                following.around.progress.board.note_opened(following.around.clock.now_ms());
                let path = following.directory.spool_path();
                let unread = |source| StateDirectoryError::Io { path, source };
                let leftovers = following.leftovers(continuing.as_ref()).map_err(unread)?;
                following.send(Job::Claim { continuing, leftovers });
            }
        }
        Ok(following)
    }

    /// What an earlier run left to be shipped. What it cut and did not note before it was killed was never shipped: it is captured again.
    fn leftovers(&self, continuing: Option<&Continuing>) -> io::Result<Vec<Spooled>> {
        let is_noted = |spooled: &Spooled| {
            let Span { epoch, first_txid, .. } = spooled.key.0;
            let is_behind = |left: &Continuing| left.captured.epoch == epoch && first_txid > left.captured.txid;
            continuing.is_none_or(|left| left.is_restored || !is_behind(left))
        };
        let (leftovers, unnoted): (Vec<_>, Vec<_>) = self.spool.waiting()?.into_iter().partition(is_noted);
        unnoted.iter().try_for_each(|spooled| spool::remove(&spooled.path))?;
        Ok(leftovers)
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

    fn run(mut self, start: &mut Option<OwnedSemaphorePermit>) -> Result<Ended, DatabaseError> {
        let begun = self.now();
        loop {
            // Once it can be restored and stays open, rests, or does neither soon, the next one is taken up. Were it taken up before this one
            // rests, a thousand that start would all be open at once.
            let is_taken_up = self.snapshots.confirmed().is_some() && self.claimed.is_some();
            if is_taken_up && !self.around.opening.should_rest() || self.now() - begun > START_PATIENCE {
                *start = None;
            }
            // An event that waits woke the database: it is answered before the database is idle again.
            if self.around.opening.should_rest() && !self.around.mailbox.has_events() {
                match self.rest() {
                    Ok(None) => {}
                    Ok(Some(rested)) => return Ok(Ended::AtRest(Box::new(rested))),
                    Err(error) => self.unless_replaced(Err(error))?,
                }
            }
            let (changed, events) = self.await_work()?;
            self.pace.note_change(changed);
            let is_told = changed != Changed::Nothing || !events.is_empty() || self.pace.is_stirred();
            let committed = self.pace.committed();
            let is_stopping = self.turn(events)?;
            if !is_told && self.pace.committed() != committed {
                self.pace.note_missed_event();
            }
            if is_stopping {
                *start = None;
                self.settle(self.now() + STOP_PATIENCE)?;
                return self.end().map(Ended::Stopped);
            }
        }
    }

    /// Lays the database to rest, if nothing is written to it and nothing is to be done: the local state then says all that is to
    /// be known. `None` when it stays open.
    ///
    /// # Errors
    /// See [`DatabaseError`]; this value must not be used any more.
    pub fn rest(&mut self) -> Result<Option<Rested>, DatabaseError> {
        let (now, now_ms) = (self.now(), self.around.clock.now_ms());
        let is_quiet = !self.has_commits || now.saturating_sub(self.pace.committed()) >= RESTS_AFTER;
        let is_idle = self.snapshots.may_rest() && self.syncs_wanted.is_empty();
        let (true, Some(captured)) = (is_quiet && is_idle, self.captured()) else { return Ok(None) };
        let is_confirmed = *self.around.progress.confirmed.borrow() >= captured.position.txid;
        // Looked at first: what is written from here on makes another look of the files.
        let path = &self.around.settings.path;
        let files = Seen::now(path).map_err(SqliteError::io(path, "look at"))?;
        if !is_confirmed || !files.may_rest(self.around.clock.as_ref()) || !self.capture.is_all_in_main()? {
            return Ok(None);
        }
        // Once we are idle, the application's last close removes the WAL. If that close has already
        // happened, this daemon must empty the WAL before it becomes idle.
        if self.capture.is_left_by_last_close()? {
            self.last_close_due.get_or_insert(now);
            return Ok(None);
        }
        self.save_state(true)?;
        // The application may have closed the database meanwhile, and left its WAL because we still have it open.
        if self.around.mailbox.take_notices().is_closed || self.capture.is_left_by_last_close()? {
            self.last_close_due.get_or_insert(now);
            return Ok(None);
        }
        let (Some(claimed), snapshots) = (self.claimed.take(), self.snapshots.take()) else { return Ok(None) };
        let due_in = snapshots.due_in(now_ms);
        Ok(Some(Rested { claimed, snapshots, captured, files, due_in }))
    }

    /// Takes events in, captures what there is, and does what is due; tells whether it is time to stop.
    ///
    /// # Errors
    /// See [`DatabaseError`]. What was captured is in the spool; this value must not be used any more.
    pub fn turn(&mut self, events: impl IntoIterator<Item = Event>) -> Result<bool, DatabaseError> {
        let mut is_stopping = false;
        for event in events {
            is_stopping |= matches!(event, Event::Stop);
            let handled = self.handle(event);
            self.unless_replaced(handled)?;
        }
        let notices = self.around.mailbox.take_notices();
        if notices.is_closed {
            self.plan_last_close(LAST_CLOSE_AFTER);
        }
        let must_check_files = !is_stopping
            && (notices.is_renamed
                || !self.pace.is_stirred()
                || self.now().saturating_sub(self.files_checked) >= FILES_CHECK_INTERVAL);
        let done = self.work(must_check_files, is_stopping);
        self.unless_replaced(done)?;
        Ok(is_stopping)
    }

    /// Captures what there is, and does what is due.
    fn work(&mut self, must_check_files: bool, is_stopping: bool) -> Result<(), DatabaseError> {
        if must_check_files {
            self.check_files()?;
        }
        self.look()?;
        if is_stopping {
            return Ok(());
        }
        self.answer_syncs()?;
        self.read_snapshot()?;
        self.cut_if_due()?;
        self.checkpoint_if_due()?;
        self.close_as_last_if_due()?;
        self.note_complete_if_due()
    }

    /// Handles an error that reports replaced or overwritten files, whichever step found it.
    /// Returns `Ok` if the main file was only touched.
    fn unless_replaced(&mut self, done: Result<(), DatabaseError>) -> Result<(), DatabaseError> {
        match done {
            Err(DatabaseError::Sqlite(replaced @ SqliteError::Replaced { .. })) => {
                // At once, because the next process to connect would apply it.
                let wal = self.set_foreign_wal_aside();
                // After the close no process may be able to read the replaced files.
                self.advance().and_then(|_| self.cut())?;
                // Otherwise the saved state, which knows the WAL, is needed when that process has ended.
                refuse_foreign_wal(&self.around.settings.path, &wal)?;
                Err(replaced.into())
            }
            Err(DatabaseError::Sqlite(overwritten @ SqliteError::WrittenTo { .. })) => {
                self.judge_overwritten(overwritten)
            }
            other => other,
        }
    }

    /// Waits until there may be something to do. Under load every look finds something: to be woken for each would cost more than it does.
    fn await_work(&mut self) -> Result<(Changed, VecDeque<Event>), DatabaseError> {
        let wait = self.time_to_wait()?;
        let heeds_main = !std::mem::take(&mut self.has_checkpointed);
        let mailbox = &self.around.mailbox;
        if self.pace.is_busy() {
            mailbox.pause(wait.min(self.pace.until_next_look(self.now())), heeds_main);
            return Ok(mailbox.wait(Duration::ZERO));
        }
        let (changed, events) = mailbox.wait(wait);
        // Many events are one wake. Whoever tells us something may wait for the answer with the write lock held.
        if changed == Changed::Wal && events.is_empty() {
            mailbox.pause(self.pace.until_next_look(self.now()), true);
        }
        Ok((changed, events))
    }

    fn time_to_wait(&self) -> Result<Duration, DatabaseError> {
        let now = self.now();
        let mut wait = self.pace.next_look(now, self.capture.wal_len_bytes() == 0);
        let open_len_bytes =
            self.recorder.as_ref().and_then(Recorder::open_len_bytes).filter(|_| self.claimed.is_some());
        let cut_due = open_len_bytes.map(|len_bytes| self.cut_due(len_bytes));
        let checkpoint_due = self.next_checkpoint().map(|(_, due)| due);
        let snapshot_due = match self.snapshots.is_due(now, self.around.clock.now_ms()) {
            true => Some(now + SNAPSHOT_PERMIT_RETRY),
            false => self.snapshots.next_step(now, SNAPSHOT_PAUSE),
        };
        let snapshot_due = snapshot_due.filter(|_| self.claimed.is_some());
        let dues = [cut_due, checkpoint_due, snapshot_due, self.last_close_due, self.note_complete_due];
        for due in dues.into_iter().flatten() {
            wait = wait.min(due.saturating_sub(now));
        }
        Ok(wait)
    }

    /// Looks whether the files are still those at the path, and whether what waits for an epoch has room.
    fn check_files(&mut self) -> Result<(), DatabaseError> {
        self.files_checked = self.now();
        // First: what is cut for another reason must not go to another one's spool.
        self.directory.check()?;
        self.capture.files().check_still_there()?;
        let files = self.capture.files();
        if files.is_exclusive_wanted()? {
            // The application comes first: it waits for all others to leave.
            let path = self.around.settings.path.clone();
            self.advance()?;
            self.cut()?;
            return Err(SqliteError::Locked { path }.into());
        }
        if self.capture.is_left_by_last_close()? {
            self.plan_last_close(Duration::ZERO);
        }
        match self.unclaimed_len_bytes()? {
            Some(recorded_bytes) => Err(DatabaseError::NotClaimed { recorded_bytes }),
            None => Ok(()),
        }
    }

    /// Sets the WAL aside when another main file was put beside it: the next one to open it would apply the WAL to it.
    fn set_foreign_wal_aside(&mut self) -> Wal {
        let files = self.capture.files();
        let known = self.capture.follower().position().zip(self.recorder.as_ref());
        let Some((position, recorder)) = known else { return Wal::Left };
        let Ok(main) = files.main_identity() else { return Wal::Left };
        let pair = Pair { main_inode: main.inode(), wal_inode: files.wal_inode().ok(), position };
        let path = &self.around.settings.path;
        report_set_aside(path, foreign_wal::set_aside_if_foreign(path, pair, &recorder.ledger))
    }

    /// The main file was changed, and not by SQLite. Following goes on where it was only touched.
    fn judge_overwritten(&mut self, overwritten: SqliteError) -> Result<(), DatabaseError> {
        let database = self.around.settings.path.display();
        // Without all page hashes nothing is known: what the WAL holds may be of this file.
        let recorder = self.recorder.as_ref().filter(|recorder| recorder.ledger.fingerprint().is_some());
        let Some(recorder) = recorder else { return Err(overwritten.into()) };
        // First the pages that SQLite reads from the main file although the WAL still has them.
        let copied = self.capture.check_copied().map_err(RecordError::Sqlite);
        match copied.and_then(|_| Difference::find(&self.capture, &recorder.ledger, 0)) {
            Ok(Some(found)) if found.is_nothing(&recorder.ledger) => {
                tracing::info!(%database, "the file's time changed, its pages did not");
                return Ok(());
            }
            Ok(_) | Err(RecordError::Sqlite(SqliteError::PageChanged { .. })) => {}
            Err(other) => return Err(other.into()),
        }
        // What the WAL holds is of the file that was.
        if !self.capture.drop_copied_wal()? && !self.capture.files().is_open_elsewhere()? {
            let set_aside = foreign_wal::set_aside(self.capture.files().path()).map(Wal::SetAside);
            report_set_aside(&self.around.settings.path, set_aside);
        }
        Err(overwritten.into())
    }

    /// Looks again after `wait` whether the application closed the database.
    fn plan_last_close(&mut self, wait: Duration) {
        if self.last_close_due.is_none() {
            let earliest = self.last_close_tried.map_or(Duration::ZERO, |tried| tried + LAST_CLOSE_INTERVAL);
            self.last_close_due = Some((self.now() + wait).max(earliest));
        }
    }

    fn close_as_last_if_due(&mut self) -> Result<(), DatabaseError> {
        if self.last_close_due.is_none_or(|due| due > self.now()) {
            return Ok(());
        }
        self.last_close_due = None;
        if self.close_as_last()? == LastClose::Blocked {
            self.plan_last_close(LAST_CLOSE_INTERVAL);
        }
        Ok(())
    }

    /// Does what SQLite's last close does, if no other process has the database open: captures
    /// everything, copies it into the main file, and empties the WAL. Before that, cuts a segment,
    /// so that the transactions are in the spool before their frames disappear. During a backlog no
    /// segment is cut, because each transaction would become a file.
    fn close_as_last(&mut self) -> Result<LastClose, DatabaseError> {
        if self.checkpoints.is_failing() {
            return Ok(LastClose::Blocked);
        }
        let files = self.capture.files();
        if files.wal_len_bytes()? == 0 {
            return Ok(LastClose::Emptied);
        }
        if files.is_open_elsewhere()? {
            return Ok(LastClose::OpenElsewhere);
        }
        self.advance_and_note()?;
        if !self.is_backlog() {
            self.cut()?;
        }
        let neighbour = self.around.neighbour.clone();
        let Some(_turn) = neighbour.barrier() else { return Ok(LastClose::Blocked) };
        let others_move = || neighbour.move_pins();
        let captured = match &mut self.recorder {
            Some(recorder) => {
                recorder.make_room()?;
                self.capture.close_as_last(recorder, others_move)
            }
            None => self.capture.close_as_last(&mut Ignore, others_move),
        };
        let now = self.now();
        self.last_close_tried = Some(now);
        self.has_checkpointed = true;
        let Some(closed) = self.unless_failed(captured)? else { return Ok(LastClose::Blocked) };
        tracing::debug!(?closed, "tried to empty the WAL after the application's last close");
        if closed == LastClose::Emptied {
            self.checkpoints.note_passive(now, true);
            let wait = until_settled(self.capture.files().main_identity()?, self.around.clock.as_ref());
            self.note_complete_due = (wait <= SETTLE_LIMIT).then_some(now + wait);
        }
        Ok(closed)
    }

    /// Saves that the main file is complete, so that the next start has nothing to compare.
    fn note_complete_if_due(&mut self) -> Result<(), DatabaseError> {
        if self.note_complete_due.is_none_or(|due| due > self.now()) {
            return Ok(());
        }
        self.note_complete_due = None;
        self.save_state(false)
    }

    /// The result of a checkpoint; `None` where another connection was in the way, or where it failed: then that is
    /// reported, and following goes on with the WAL pinned.
    fn unless_failed<T>(&mut self, done: Result<T, RecordError>) -> Result<Option<T>, DatabaseError> {
        match done {
            Err(RecordError::Sqlite(error @ SqliteError::CheckpointFailed { .. })) => {
                self.note_checkpoint_failed(&error);
                Ok(None)
            }
            Err(RecordError::Sqlite(error)) if error.is_busy() => Ok(None),
            other => Ok(Some(other?)),
        }
    }

    fn note_checkpoint_failed(&mut self, error: &SqliteError) {
        let database = self.around.settings.path.display().to_string();
        if self.checkpoints.note_failed(self.now()) {
            tracing::error!(
                database,
                %error,
                "the WAL is kept until a checkpoint succeeds, and grows; check the disk and its free space"
            );
        } else {
            tracing::warn!(database, %error, "a checkpoint failed again; the WAL is kept, retrying within a minute");
        }
        self.around.progress.board.note_checkpoints(Some(error.to_string()), self.around.clock.now_ms());
    }

    /// What is recorded for an epoch that could not be claimed yet, if it is more than may wait: nothing can be cut before.
    fn unclaimed_len_bytes(&self) -> Result<Option<u64>, DatabaseError> {
        let Some(raw_len_bytes) = self.recorder.as_ref().and_then(Recorder::open_len_bytes) else { return Ok(None) };
        if self.claimed.is_some() {
            return Ok(None);
        }
        let recorded_bytes = std::fs::metadata(self.spool.open_segment_path())?.len();
        let is_too_much = recorded_bytes > self.waiting_limit_bytes() || raw_len_bytes > UNCLAIMED_RAW_LIMIT;
        Ok(is_too_much.then_some(recorded_bytes))
    }

    /// Captures, if there is anything to capture or to let go of.
    fn look(&mut self) -> Result<(), DatabaseError> {
        self.pace.begin_look();
        // A pin that protects frames moves even when nothing is written: nobody is to find a read transaction that stands long.
        let now = self.now();
        let pin_is_old = self.pace.stood(now) >= PIN_MOVES_AFTER && self.capture.wal_len_bytes() > 0;
        // What was committed has time under load; a checkpoint that waits for the pin has not.
        let is_early = self.pace.is_busy() && !self.pace.until_next_look(now).is_zero();
        let work = self.capture.work()?;
        if work.holds_up_a_checkpoint {
            self.pace.note_checkpoint();
        }
        let is_due = work.holds_up_a_checkpoint || !is_early && (work.is_behind || pin_is_old);
        let captured = if is_due { self.advance()? } else { 0 };
        self.pace.end_look(self.now(), captured > 0);
        if captured > 0 {
            self.note_commits();
        }
        Ok(())
    }

    /// The last state that is captured, if an epoch was claimed.
    fn captured(&self) -> Option<State> {
        let Start { position, time_ms, .. } = self.claimed.as_ref().and(self.recorder.as_ref()).map(Recorder::last)?;
        Some(State { position, time_ms })
    }

    fn note_captured(&self) {
        if let Some(state) = self.captured() {
            self.around.progress.board.note_captured(state, self.around.clock.now_ms());
        }
    }

    fn note_commits(&mut self) {
        self.note_captured();
        self.has_commits = true;
        let now = self.now();
        self.pace.note_commits(now);
        self.checkpoints.note_commits(now);
    }

    /// Captures because somebody asked, outside of a look.
    fn advance_and_note(&mut self) -> Result<(), DatabaseError> {
        if self.advance()? > 0 {
            self.note_commits();
        }
        Ok(())
    }

    fn advance(&mut self) -> Result<u32, DatabaseError> {
        let advanced_at = self.now();
        self.snapshots.note_pin(self.pace.stood(advanced_at), self.capture.wal_len_bytes());
        let before_bytes = self.capture.follower().wal_len_bytes();
        let captured = match &mut self.recorder {
            Some(recorder) => self.capture.advance(recorder),
            None => self.capture.advance(&mut Ignore),
        };
        let after_bytes = self.capture.follower().wal_len_bytes();
        let new_bytes = after_bytes.checked_sub(before_bytes).unwrap_or(after_bytes);
        self.pace.note_advance(advanced_at, new_bytes);
        match captured {
            // Another process recovers the WAL just now, or so. What is not captured stays pinned.
            Err(RecordError::Sqlite(error)) if error.is_busy() => Ok(0),
            other => Ok(other?),
        }
    }

    /// Serves an event.
    fn handle(&mut self, event: Event) -> Result<(), DatabaseError> {
        match event {
            Event::Claimed(claimed) => {
                self.take_epoch(*claimed)?;
                // From here on, not only when it is begun: a stop that comes before has not left anything to restore from.
                let is_missing = self.snapshots.confirmed().is_none();
                self.around.progress.snapshot_is_missing.store(is_missing, Ordering::Relaxed);
                self.note_claimed();
            }
            Event::BaseFound(base) => {
                let Some(recorder) = &self.recorder else { return Ok(()) };
                // Who was replaced stores no snapshot: it might get the name of an object that the other's refer to.
                let base_epoch = base.as_ref().map_or(0, |base| base.summary().0.epoch);
                if base_epoch > recorder.last().position.epoch {
                    self.send(Job::GiveWay { epoch: base_epoch });
                    self.snapshots.note_failed(self.now());
                    return Ok(());
                }
                let now_ms = self.around.clock.now_ms();
                let begun = self.snapshots.begin(&self.capture, recorder, base.map(|base| *base), now_ms)?;
                match begun {
                    Some((key, pieces)) => {
                        let page_size = self.capture.files().page_size;
                        let database_len_bytes = u64::from(self.capture.follower().size_pages()) * u64::from(page_size);
                        self.send(Job::Snapshot { key, database_len_bytes, pieces });
                    }
                    None => {
                        self.around.progress.snapshot_is_missing.store(false, Ordering::Relaxed);
                        self.save_state(false)?;
                    }
                }
            }
            Event::SnapshotStored(state) => {
                self.snapshots.note_stored(state);
                if let Some(note) = self.snapshots.confirmed() {
                    self.around.progress.board.note_snapshot(note.begun_ms);
                }
                // Not durably: a power failure costs another snapshot, an fsync here can hold up the application's checkpoint.
                self.save_state(false)?;
            }
            Event::SnapshotFailed => self.snapshots.note_failed(self.now()),
            Event::SyncWanted(reply) => {
                self.syncs_wanted.push(reply);
                self.snapshots.hurry_for_request(self.now());
                self.answer_syncs()?;
            }
            Event::SnapshotWanted(reply) => self.snapshots.ask(self.now(), reply),
            Event::PinWanted(moved) => {
                self.advance_and_note()?;
                moved.send(()).ok();
            }
            // Served by the caller.
            Event::Stop => {}
        }
        Ok(())
    }

    /// Tells everybody who asked what is captured now: everything that was committed before they asked. As long as there is
    /// no snapshot, nothing that is confirmed can be restored: they have to wait.
    fn answer_syncs(&mut self) -> Result<(), DatabaseError> {
        if self.syncs_wanted.is_empty() || self.claimed.is_none() || self.snapshots.confirmed().is_none() {
            return Ok(());
        }
        // Of another file nothing was captured.
        self.check_files()?;
        // Another process may recover the WAL just now; then the next turn answers.
        self.advance_and_note()?;
        if self.capture.work()?.is_behind {
            return Ok(());
        }
        self.cut()?;
        let Some(state) = self.captured() else { return Ok(()) };
        for reply in self.syncs_wanted.drain(..) {
            // Who asked may have left.
            reply.send(state).ok();
        }
        Ok(())
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
                return self.save_state(false);
            }
            _ => {}
        }
        // Until the first snapshot is read nothing could be proven from the local state.
        self.directory.discard()?;
        // What was recorded on a ground that does not hold is dropped with its segment.
        self.recorder = None;
        self.snapshots = Snapshots::new(self.around.settings.snapshot_interval, None);
        spool::remove(&self.spool.open_segment_path())?;
        self.advance()?;
        let start = self.start_at(&claimed)?;
        let page_size = self.capture.files().page_size;
        let ledger = Ledger::create(&self.directory.ledger_path(), page_size, self.capture.follower().size_pages())?;
        let clock = self.around.clock.clone();
        self.recorder = Some(Recorder::new(self.spool.clone(), clock, ledger, page_size, start));
        self.claimed = Some(claimed);
        Ok(())
    }

    fn note_claimed(&self) {
        let (Some(state), Some(claimed)) = (self.captured(), &self.claimed) else { return };
        let first_txid = claimed.record.first_txid;
        // What was recorded before the claim is not in storage yet; what it goes on from is.
        let confirmed = match claimed.record.continues && state.position.txid >= first_txid {
            true => {
                State { position: Position { txid: first_txid - 1, ..state.position }, time_ms: claimed.time_floor_ms }
            }
            false => state,
        };
        let snapshot_ms = self.snapshots.confirmed().map(|note| note.begun_ms);
        let now_ms = self.around.clock.now_ms();
        self.around.progress.board.note_claimed(confirmed, snapshot_ms, now_ms);
        self.around.progress.board.note_captured(state, now_ms);
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

    /// Begins the snapshot that is due, or reads a few extents of the one under way.
    fn read_snapshot(&mut self) -> Result<Advance, DatabaseError> {
        let (Some(recorder), true) = (&mut self.recorder, self.claimed.is_some()) else { return Ok(Advance::Nothing) };
        if !self.snapshots.is_under_way() {
            self.snapshot_permit = None;
        }
        let clock = &self.around.clock;
        if self.snapshots.is_due(clock.monotonic(), clock.now_ms()) {
            // Of many that are due at once, a few begin.
            if let Ok(permit) = self.around.snapshot_permits.clone().try_acquire_owned() {
                self.snapshot_permit = Some(permit);
                self.snapshots.await_base();
                self.send(Job::FindBase);
            }
            return Ok(Advance::Nothing);
        }
        let advance = self.snapshots.advance(&self.capture, recorder)?;
        if advance == Advance::Complete {
            self.finish_ledger()?;
        }
        Ok(advance)
    }

    /// At a stop: a process that is stopped as soon as it has started waits for its epoch, without which nothing can be shipped;
    /// and so that it leaves something to restore from, a first snapshot is read to its end, if that is near. The store's part
    /// has its own limit. Ends at once when nobody ships any more.
    fn settle(&mut self, until: Duration) -> Result<(), DatabaseError> {
        let mut is_tried_again = false;
        while (self.claimed.is_none() || self.snapshots.has_first_to_read())
            && !self.around.jobs.is_closed()
            && self.now() < until
        {
            if !is_tried_again && !self.snapshots.is_under_way() {
                // One that failed a while ago is not waited for, but tried once more.
                is_tried_again = self.snapshots.hurry(self.now());
            }
            let pause = if self.read_snapshot()? == Advance::More { Duration::ZERO } else { SNAPSHOT_PAUSE };
            let (_, events) = self.around.mailbox.wait(pause);
            // Left in place they would end each wait.
            self.around.mailbox.take_notices();
            for event in events {
                let handled = self.handle(event);
                self.unless_replaced(handled)?;
            }
        }
        Ok(())
    }

    /// Every page is known: from here on the local state proves something.
    fn finish_ledger(&mut self) -> Result<(), DatabaseError> {
        self.cut()?;
        self.save_state_and_fold(true, true)
    }

    /// Whether so much waits for storage that segments are cut seldom.
    fn is_backlog(&self) -> bool {
        self.around.progress.waiting_bytes.load(Ordering::Relaxed) > BACKLOG_BYTES
    }

    /// When the segment that is being written is to be cut.
    fn cut_due(&self, open_len_bytes: u64) -> Duration {
        let is_backlog = self.is_backlog();
        let sync_interval = self.around.settings.sync_interval;
        let interval = match open_len_bytes {
            SEGMENT_RAW_LIMIT.. => Duration::ZERO,
            0..=BACKLOG_BYTES if is_backlog => sync_interval.max(BACKLOG_INTERVAL),
            _ => sync_interval,
        };
        self.last_cut.map_or(Duration::ZERO, |last| last + interval).max(self.cut_retry)
    }

    fn cut_if_due(&mut self) -> Result<(), DatabaseError> {
        let Some(open_len_bytes) = self.recorder.as_ref().and_then(Recorder::open_len_bytes) else { return Ok(()) };
        if self.claimed.is_none() || self.cut_due(open_len_bytes) > self.now() {
            return Ok(());
        }
        let Some(recorder) = &mut self.recorder else { return Ok(()) };
        if !recorder.is_ready_to_cut()? {
            self.cut_retry = self.now() + CUT_RETRY;
            return Ok(());
        }
        self.cut()
    }

    /// Ends the segment that is being written: first the local state says that it is captured, then it is shipped. So
    /// nothing is ever confirmed that the next start doesn't know of.
    fn cut(&mut self) -> Result<(), DatabaseError> {
        let (Some(recorder), true) = (&mut self.recorder, self.claimed.is_some()) else { return Ok(()) };
        if recorder.open_len_bytes().is_some() {
            // By its path, another directory would get the segment and the state.
            self.directory.check()?;
        }
        let Some(spooled) = recorder.cut()? else { return Ok(()) };
        self.last_cut = Some(self.now());
        self.snapshots.note_cut(spooled.len_bytes);
        self.save_state(false)?;
        let (waiting, disk_bytes) = (&self.around.progress.waiting_bytes, spooled.disk_bytes());
        let waiting_bytes = waiting.fetch_add(disk_bytes, Ordering::Relaxed) + disk_bytes;
        self.around.progress.board.note_waiting(waiting_bytes);
        self.note_large(&spooled);
        if waiting_bytes.saturating_sub(self.large_len_bytes()) > self.waiting_limit_bytes() {
            return Err(DatabaseError::SpoolFull { waiting_bytes });
        }
        self.send(Job::Ship(spooled));
        Ok(())
    }

    /// What may wait to be shipped, in bytes.
    fn waiting_limit_bytes(&self) -> u64 {
        let limit_bytes = self.around.settings.spool_limit_bytes;
        limit_bytes - limit_bytes / KEPT_SHARE
    }

    /// A single transaction can be as large as it likes, and takes its time to be shipped: of such segments the largest that waits is not
    /// counted.
    fn note_large(&mut self, spooled: &Spooled) {
        let Span { first_txid, last_txid, .. } = spooled.key.0;
        let is_large = spooled.len_bytes > self.around.settings.spool_limit_bytes / KEPT_SHARE;
        if is_large && first_txid == last_txid && spooled.len_bytes > self.large_len_bytes() {
            self.large = Some((last_txid, spooled.len_bytes));
        }
    }

    /// Its length, as long as it waits.
    fn large_len_bytes(&self) -> u64 {
        let confirmed_txid = *self.around.progress.confirmed.borrow();
        self.large.filter(|&(txid, _)| txid > confirmed_txid).map_or(0, |(_, len_bytes)| len_bytes)
    }

    /// Saves what the next start needs, if there is anything to prove by it.
    fn save_state(&mut self, durably: bool) -> Result<(), DatabaseError> {
        let overlay_len = self.recorder.as_ref().map_or(0, |recorder| recorder.ledger.overlay().len());
        self.save_state_and_fold(durably, overlay_len >= FOLD_AT_ENTRIES)
    }

    /// The same; with `must_fold` the ledger's overlay goes into its file. The state holds it before it is folded: a crash in the middle
    /// costs nothing then.
    fn save_state_and_fold(&mut self, durably: bool, must_fold: bool) -> Result<(), DatabaseError> {
        let (Some(recorder), Some(claimed)) = (&mut self.recorder, &self.claimed) else { return Ok(()) };
        let Some(fingerprint) = recorder.ledger.fingerprint() else { return Ok(()) };
        let last = recorder.last();
        if recorder.open_len_bytes().is_some() {
            // Transactions that are in no segment are not captured yet, as far as the state goes: it stays at the last cut.
            return Ok(());
        }
        self.directory.check()?;
        // Under the pin: SQLite can't have copied into the main file what is not captured.
        let main = self.capture.main_identity()?;
        let is_main_complete = is_settled(main, self.around.clock.as_ref()) && self.capture.is_all_in_main()?;
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
            wal_inode: Some(self.capture.files().wal_inode()?),
            main,
            boot_id: self.around.clock.boot_id(),
            is_main_complete,
            snapshot: self.snapshots.confirmed(),
            is_restored: false,
        };
        self.directory.save(&state, recorder.ledger.overlay(), durably || must_fold)?;
        if must_fold {
            recorder.ledger.fold()?;
            recorder.ledger.sync()?;
            self.directory.save(&state, recorder.ledger.overlay(), true)?;
        }
        Ok(())
    }

    fn next_checkpoint(&self) -> Option<(Checkpoint, Duration)> {
        self.checkpoints.next(self.capture.wal_len_bytes(), self.pace.next_look_bytes())
    }

    fn checkpoint_if_due(&mut self) -> Result<(), DatabaseError> {
        let Some((checkpoint, due)) = self.next_checkpoint() else { return Ok(()) };
        if due > self.now() {
            return Ok(());
        }
        match checkpoint {
            Checkpoint::Barrier => match self.barrier()? {
                Barrier::SlowDisk(took) => {
                    if self.checkpoints.note_slow_disk(self.now()) {
                        let database = self.around.settings.path.display();
                        tracing::warn!(
                            %database,
                            ?took,
                            "the disk is too slow to sync while commits wait: the WAL grows until the application pauses \
                             for a second"
                        );
                    }
                }
                done => self.checkpoints.note_barrier(self.now(), done == Barrier::Done),
            },
            Checkpoint::Passive => {
                let is_done = self.checkpoint_the_rest()?;
                self.checkpoints.note_passive(self.now(), is_done);
            }
            Checkpoint::Retry => self.retry_checkpoint()?,
        }
        Ok(())
    }

    /// Tries again what failed. Until it succeeds the pin keeps the WAL, which may hold the only copy of a page.
    fn retry_checkpoint(&mut self) -> Result<(), DatabaseError> {
        match self.capture.retry_checkpoint() {
            Err(error @ (SqliteError::CheckpointFailed { .. } | SqliteError::PageChanged { .. })) => {
                self.note_checkpoint_failed(&error);
            }
            Err(error) if !error.is_busy() => return Err(error.into()),
            Ok(true) => {
                self.checkpoints.note_succeeded();
                self.around.progress.board.note_checkpoints(None, self.around.clock.now_ms());
                tracing::info!(database = %self.around.settings.path.display(), "checkpoints succeed again");
            }
            // Another checkpoint runs.
            Ok(false) | Err(_) => {
                self.checkpoints.note_failed(self.now());
            }
        }
        Ok(())
    }

    /// Nobody writes any more: tells whether all of the WAL is in the main file now.
    fn checkpoint_the_rest(&mut self) -> Result<bool, DatabaseError> {
        if let Some(recorder) = &mut self.recorder {
            recorder.release_memory();
        }
        if !self.capture.has_frames_to_checkpoint()? {
            return Ok(true);
        }
        let done = self.capture.passive_checkpoint().map_err(RecordError::Sqlite);
        let is_done = self.unless_failed(done)?.flatten().is_some_and(|done| done.is_complete());
        // Lets the pin go to mark 0, so that the next writer begins the WAL anew.
        self.advance()?;
        Ok(is_done)
    }

    fn barrier(&mut self) -> Result<Barrier, DatabaseError> {
        let neighbour = self.around.neighbour.clone();
        let Some(_turn) = neighbour.barrier() else { return Ok(Barrier::Blocked) };
        let others_move = || neighbour.move_pins();
        let before = self.recorder.as_ref().map(|recorder| recorder.last().position.txid);
        let (begun, wal_len_bytes) = (self.now(), self.capture.wal_len_bytes());
        let clock = self.around.clock.clone();
        let done = match &mut self.recorder {
            Some(recorder) => {
                recorder.make_room()?;
                self.capture.barrier(recorder, others_move, clock.as_ref())
            }
            None => self.capture.barrier(&mut Ignore, others_move, clock.as_ref()),
        };
        self.pace.note_barrier(self.now());
        self.has_checkpointed = true;
        let done = self.unless_failed(done)?.unwrap_or(Barrier::Blocked);
        tracing::debug!(?done, wal_len_bytes, took = ?self.now().saturating_sub(begun), "barrier");
        if self.recorder.as_ref().map(|recorder| recorder.last().position.txid) != before {
            self.note_commits();
        }
        Ok(done)
    }

    /// Captures and cuts what is left, and records a clean stop. Gives the last captured transaction, if an epoch was claimed.
    ///
    /// # Errors
    /// See [`DatabaseError`].
    pub fn end(mut self) -> Result<Option<Position>, DatabaseError> {
        self.directory.check()?;
        for _ in 0..END_ATTEMPTS {
            let behind = self.advance().and_then(|_| Ok(self.capture.work()?.is_behind));
            let is_behind = *behind.as_ref().unwrap_or(&true);
            self.unless_replaced(behind.map(drop))?;
            if !is_behind {
                break;
            }
            // Another process recovers the WAL just now, or goes on writing.
            std::thread::sleep(END_ATTEMPT_INTERVAL);
        }
        self.cut()?;
        self.spool.sync()?;
        let mut is_last = self.end_as_last()?;
        let saved = self.save_state(true);
        self.unless_replaced(saved)?;
        if !is_last && !self.capture.files().is_open_elsewhere()? {
            // The application has closed the database meanwhile.
            is_last = self.end_as_last()?;
            let saved = self.save_state(true);
            self.unless_replaced(saved)?;
        }
        let captured = self.claimed.as_ref().and(self.recorder.as_ref()).map(|recorder| recorder.last().position);
        if is_last {
            // SQLite removes the empty WAL and the wal-index.
            self.capture.close()?;
        }
        Ok(captured)
    }

    /// At the end: leaves the database as SQLite's last close does, if no other process has it open; returns whether.
    fn end_as_last(&mut self) -> Result<bool, DatabaseError> {
        for _ in 0..END_ATTEMPTS {
            match self.close_as_last() {
                Ok(LastClose::Emptied) => {
                    self.cut()?;
                    let wait = until_settled(self.capture.files().main_identity()?, self.around.clock.as_ref());
                    if wait <= SETTLE_LIMIT {
                        std::thread::sleep(wait);
                    }
                    return Ok(!self.capture.files().is_open_elsewhere()?);
                }
                Ok(LastClose::OpenElsewhere) => return Ok(false),
                Ok(LastClose::Blocked) => std::thread::sleep(END_ATTEMPT_INTERVAL),
                Err(error) => self.unless_replaced(Err(error))?,
            }
        }
        Ok(false)
    }
}

/// Refuses a database with a WAL that must not be applied to it.
fn refuse_foreign_wal(path: &Path, wal: &Wal) -> Result<(), SqliteError> {
    let path = path.to_owned();
    match wal {
        Wal::Left | Wal::SetAside(_) => Ok(()),
        Wal::InUse => Err(SqliteError::Split { path }),
        Wal::Unclear => Err(SqliteError::UnclearWal { path }),
    }
}

/// Before the database is opened: sets a WAL aside that the saved state knows to be another file's.
fn set_foreign_wal_aside(path: &Path, directory: &StateDirectory) -> Wal {
    let has_wal = std::fs::canonicalize(path)
        .and_then(|file| std::fs::metadata(sidecar(&file, "-wal")))
        .is_ok_and(|found| found.len() > 0);
    // What can't be loaded proves nothing; the start reports it.
    let Some((state, overlay)) = has_wal.then(|| directory.load().ok().flatten()).flatten() else { return Wal::Left };
    let Some(position) = state.wal_position() else { return Wal::Left };
    let known = Ledger::open(&directory.ledger_path(), state.page_size, state.size_pages, state.fingerprint, overlay);
    let Ok(known) = known else { return Wal::Left };
    let pair = Pair { main_inode: state.main.inode(), wal_inode: state.wal_inode, position };
    report_set_aside(path, foreign_wal::set_aside_if_foreign(path, pair, &known))
}

fn report_set_aside(path: &Path, set_aside: io::Result<Wal>) -> Wal {
    let database = path.display();
    set_aside
        .inspect(|wal| {
            if let Wal::SetAside(name) = wal {
                tracing::error!(
                    %database,
                    wal = %name.display(),
                    "the WAL beside the database belongs to the file that was there before; it was set aside, \
                     so that SQLite does not apply it to the new file; delete it, or, if the new file is a \
                     mistake, stop the application, put the old file back and rename the WAL to its old name"
                );
            }
        })
        .unwrap_or_else(|error| {
            tracing::error!(
                %database,
                %error,
                "the WAL beside the database could not be checked or set aside, and stays in place; \
                 if another file was put in the database's place, stop the application and move \
                 the WAL away"
            );
            Wal::Left
        })
}
