//! Watching over one database: it is followed again and again, whatever happens, until told to stop or until going on makes no
//! sense.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::control::Place;
use super::database::{DatabaseError, DatabaseSettings, Ended, Surroundings, follow};
use super::merger::Merger;
use super::presence::Presence;
use super::pruner::Pruner;
use super::rest::{LOOK_INTERVAL, Rested, Seen};
use super::ship::{self, Progress, ShipError, Shipper};
use super::spool::{self, Spool, Spooled};
use super::state::{StateDirectory, StateDirectoryError};
use super::status::{Link, Phase};
use super::wake::{Event, Mailbox, Stirring};
use super::{Ending, Job, ReplicateError, Replication};
use crate::clock::Clock;
use crate::format::Position;
use crate::sqlite::SqliteError;
use crate::store::retry::RetryPolicy;

/// How a database that fails is taken up again.
const RESTART: RetryPolicy = RetryPolicy { attempts: u32::MAX, base_ms: 1000, max_ms: 30_000 };

/// Shortest pause before a database is attached again.
const RESTART_MIN: Duration = Duration::from_secs(1);
/// Longest pause before it is looked again whether another process still uses removed files.
const SPLIT_WAIT: Duration = Duration::from_secs(5);

/// What was captured of a file that was replaced may take so long to be shipped until the new one is taken up; what is left then is
/// shipped when that is done.
const REPLACED_PATIENCE: Duration = Duration::from_secs(5);

/// After a rest it is tried so often, so long apart, to lock the state directory.
const LOCK_LOOKS: u32 = 100;
const LOCK_LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Follows a database, again and again, until told to end or until going on makes no sense.
pub async fn supervise(job: &Job, shared: &Replication, ending: &Ending) -> Result<(), ReplicateError> {
    let (clock, stop) = (&shared.clock, &ending.let_go);
    let mut local = LocalPlace::open(job, shared, stop).await?;
    let path = job.settings.path.clone();
    let database = path.display().to_string();
    let mut failures = 0;
    let mut is_waiting = false;
    let mut panicked = None;
    let mut waits = job.board.retry_signal().waits();
    let out_of_time = out_of_time(ending.hurry.clone(), shared.shutdown_timeout);
    loop {
        let begun = clock.monotonic();
        waits.begin_attempt();
        // Serves a stop that came before. A later stop is served by the next attempt, if this one fails.
        let is_last_try = stop.is_cancelled();
        // It may have been replaced while nothing was followed: no failure of this attempt.
        if let Err(replaced @ StateDirectoryError::Replaced(_)) = local.directory.check() {
            let error = replaced.into();
            report(&database, &error, Duration::ZERO);
            local = local.reopen(job, shared, stop).await?;
            forget(&local.directory, &error);
        }
        let attempt = Attempt {
            directory: &local.directory,
            has_control: local.control.is_some(),
            is_last: is_last_try,
            out_of_time: out_of_time.clone(),
        };
        match follow_once(job, shared, ending, attempt).await? {
            None => break,
            Some(DatabaseError::Sqlite(SqliteError::NotThere { .. })) => {
                if !is_waiting {
                    tracing::info!(database, "not there yet; waiting for the application to make it");
                }
                job.board.enter(Phase::Waiting, None, clock.now_ms());
                shared.standing.send(job.state_dir.clone()).ok();
                is_waiting = true;
                failures = 0;
                // An application that makes it and ends at once would otherwise be stopped before anybody has looked.
                if !is_last_try {
                    waits.pause(job.settings.poll_interval).await;
                    continue;
                }
                if let Some(what) = left_in_spool(&local.directory) {
                    return Err(ReplicateError::NotConfirmed { database: path, what });
                }
                break;
            }
            Some(error) => {
                is_waiting = false;
                if clock.monotonic().saturating_sub(begun) > Duration::from_secs(60) {
                    failures = 0;
                }
                // What was replaced is no failure of this database: what is there now is attached soon, however often.
                let is_replacement = is_replaced(&error) || is_state_replaced(&error);
                let wait = match &error {
                    _ if is_replacement => RESTART_MIN,
                    // It ends when a process does, which is not our failure either.
                    DatabaseError::Sqlite(SqliteError::Split { .. }) => {
                        RESTART.wait(failures).clamp(RESTART_MIN, SPLIT_WAIT)
                    }
                    _ => RESTART.wait(failures).max(RESTART_MIN),
                };
                failures += u32::from(!is_replacement);
                let error = local.explain(error);
                report(&database, &error, wait);
                job.board.enter(Phase::Failing, Some(error.to_string()), clock.now_ms());
                if is_state_replaced(&error) || !local.directory.is_locked() {
                    local = local.reopen(job, shared, stop).await?;
                }
                if is_state_replaced(&error) || error.disproves_state() {
                    forget(&local.directory, &error);
                }
                if let DatabaseError::Panicked(what) = &error {
                    panicked = Some(what.clone());
                }
                // What it holds may not be captured: that is no clean end.
                if is_last_try {
                    return Err(ReplicateError::Database { database: path, source: error });
                }
                waits.pause(wait).await;
            }
        }
    }
    // It went on after that; but somebody should hear of it.
    match panicked {
        None => Ok(()),
        Some(what) => Err(ReplicateError::Panicked { database: path, what }),
    }
}

fn is_replaced(error: &DatabaseError) -> bool {
    matches!(error, DatabaseError::Sqlite(SqliteError::Replaced { .. }))
}

/// Returns whether the state directory was removed or replaced.
fn is_state_replaced(error: &DatabaseError) -> bool {
    matches!(error, DatabaseError::State(StateDirectoryError::Replaced(_)))
}

/// A database's state directory, and the control socket in it, if it can be made.
struct LocalPlace {
    directory: Arc<StateDirectory>,
    control: Option<Place>,
}

impl LocalPlace {
    async fn open(job: &Job, shared: &Replication, stop: &CancellationToken) -> Result<Self, ReplicateError> {
        let directory = Arc::new(open_state_directory(job, stop, &shared.clock).await?);
        let control = shared.controls.serve(directory.path(), job.board.clone()).inspect_err(|error| {
            let database = job.settings.path.display();
            tracing::warn!(%database, %error, "the control socket can't be made: `sync`, `status` and the like can't ask");
        });
        Ok(Self { directory, control: control.ok() })
    }

    /// Opens what is at the path now, or makes it. Fails if another daemon has locked it.
    async fn reopen(self, job: &Job, shared: &Replication, stop: &CancellationToken) -> Result<Self, ReplicateError> {
        // Released first: the new directory may have the old one's inode number, and its own socket
        // must not refuse it.
        drop(self);
        let mut attempts = 0;
        loop {
            match Self::open(job, shared, stop).await {
                // Another process may have the lock for the moment in which it finds out that it
                // may not.
                Err(ReplicateError::StateDirectory(StateDirectoryError::Locked(_))) if attempts < LOCK_LOOKS => {
                    attempts += 1;
                }
                opened => return opened,
            }
            tokio::time::sleep(LOCK_LOOK_INTERVAL).await;
        }
    }

    /// Returns the cause of an error: where the directory was removed or replaced, whatever was
    /// done in it can have failed.
    fn explain(&self, error: DatabaseError) -> DatabaseError {
        match self.directory.check() {
            Err(replaced @ StateDirectoryError::Replaced(_)) if !matches!(error, DatabaseError::Panicked(_)) => {
                tracing::debug!(%error, "follows from the state directory's replacement");
                replaced.into()
            }
            _ => error,
        }
    }
}

/// Whether there is nothing to be followed at the path any more.
fn is_gone(error: &DatabaseError) -> bool {
    is_replaced(error) || matches!(error, DatabaseError::Sqlite(SqliteError::NotThere { .. }))
}

/// What waits in the spool of a database that is not there, in words; `None` when nothing does.
fn left_in_spool(directory: &StateDirectory) -> Option<String> {
    match Spool::new(directory.spool_path()).waiting() {
        Ok(waiting) if waiting.is_empty() => None,
        Ok(waiting) => Some(format!(
            "{} segments wait in {}; they are shipped when the database is there again",
            waiting.len(),
            directory.spool_path().display()
        )),
        Err(error) => Some(format!("{} can't be looked at: {error}", directory.spool_path().display())),
    }
}

fn report(database: &str, error: &DatabaseError, wait: Duration) {
    let wait_ms = wait.as_millis() as u64;
    match error {
        DatabaseError::Sqlite(
            SqliteError::Unsettled { .. } | SqliteError::Replaced { .. } | SqliteError::WrittenTo { .. },
        ) => {
            tracing::warn!(database, %error, wait_ms, "taking the database up again");
        }
        DatabaseError::State(StateDirectoryError::Replaced(_)) => tracing::warn!(
            database,
            %error,
            wait_ms,
            "opening the state directory anew: nothing in it is believed, a new epoch with a \
             snapshot follows, and transactions that were not confirmed are only in that snapshot"
        ),
        _ => tracing::error!(database, %error, wait_ms, "the database can't be followed; trying again"),
    }
}

/// Discards local state that is not to be relied on. A spool that outgrew its limit goes, too.
pub fn forget(directory: &StateDirectory, error: &DatabaseError) {
    let discard = || -> io::Result<()> {
        directory.discard()?;
        spool::remove(&Spool::new(directory.spool_path()).open_segment_path())?;
        if matches!(error, DatabaseError::SpoolFull { .. }) {
            let waiting = Spool::new(directory.spool_path()).waiting()?;
            for spooled in &waiting {
                spool::remove(&spooled.path)?;
            }
            tracing::error!(
                segments = waiting.len(),
                "the spool is full and was dropped: this history is lost; a new snapshot follows when storage is back"
            );
        }
        Ok(())
    };
    if let Err(error) = discard() {
        tracing::error!(%error, "the local state can't be discarded");
    }
}

async fn sleep_or_stop(wait: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(wait) => {}
        () = stop.cancelled() => {}
    }
}

/// The directory of a database that is not there yet may not be there either.
async fn open_state_directory(
    job: &Job,
    stop: &CancellationToken,
    clock: &Arc<dyn Clock>,
) -> Result<StateDirectory, ReplicateError> {
    let mut complained = None;
    loop {
        match StateDirectory::open(&job.state_dir) {
            Ok(directory) => return Ok(directory),
            Err(locked @ StateDirectoryError::Locked(_)) => return Err(locked.into()),
            Err(error) => {
                let now = clock.monotonic();
                if complained.is_none_or(|at| now.saturating_sub(at) > Duration::from_secs(60)) {
                    complained = Some(now);
                    tracing::error!(%error, "waiting for the state directory");
                }
                sleep_or_stop(Duration::from_secs(1), stop).await;
                if stop.is_cancelled() {
                    return Err(error.into());
                }
            }
        }
    }
}

/// Completes when the time for shipping at a stop is over. All attempts share it.
fn out_of_time(hurry: CancellationToken, timeout: Duration) -> Shared<BoxFuture<'static, ()>> {
    let passed = async move {
        hurry.cancelled().await;
        tokio::time::sleep(timeout).await;
    };
    passed.boxed().shared()
}

/// One attempt to follow a database.
struct Attempt<'a> {
    directory: &'a Arc<StateDirectory>,
    /// Whether the control socket answers for the database.
    has_control: bool,
    /// Whether no other attempt follows if this one fails: the stop came before it.
    is_last: bool,
    out_of_time: Shared<BoxFuture<'static, ()>>,
}

/// Follows a database once. `Ok(None)` when it was told to stop and all is confirmed, `Ok(Some(_))` when it failed in a way
/// that a new try may mend.
async fn follow_once(
    job: &Job,
    shared: &Replication,
    ending: &Ending,
    attempt: Attempt<'_>,
) -> Result<Option<DatabaseError>, ReplicateError> {
    let Attempt { directory, has_control, is_last, mut out_of_time } = attempt;
    let (database, stop) = (job.settings.path.clone(), &ending.let_go);
    // Events come from where SQLite keeps `-wal` and `-shm`: beside the file that a symbolic link leads to.
    let file = std::fs::canonicalize(&database).unwrap_or_else(|_| database.clone());
    let mailbox = Arc::new(Mailbox::default());
    let progress = Arc::new(Progress { board: job.board.clone(), ..Progress::default() });
    let has_events = shared.hub.watch(&file, &mailbox);
    let (jobs, queue) = mpsc::unbounded_channel();
    let spool = Spool::new(directory.spool_path());
    let (kept, kept_queue) = mpsc::unbounded_channel();
    // What runs in there ends with this function, whatever it is doing: a merge or a deletion can be done again.
    let mut beside = JoinSet::new();
    spawn_beside(&mut beside, job, shared, &progress, &spool, kept_queue);
    job.board.set_link(Some(Link { mailbox: mailbox.clone(), confirmed: progress.confirmed.subscribe() }));
    let shipper = Shipper {
        store: job.store.clone(),
        mailbox: mailbox.clone(),
        progress: progress.clone(),
        clock: shared.clock.clone(),
        spool,
        kept,
    };
    let mut shipping = tokio::spawn(shipper.run(queue));
    let follower = Follower {
        settings: job.settings.clone(),
        file,
        directory: directory.clone(),
        mailbox: mailbox.clone(),
        jobs,
        has_events,
        has_control,
    };
    let mut following = std::pin::pin!(follower.run(progress.clone(), shared, stop));
    let mut claimed = progress.confirmed.subscribe();
    let (mut stands, mut is_stopped, mut is_out_of_time) = (false, false, false);
    let (mut shipped, mut panicked) = (None, None);
    let captured = loop {
        tokio::select! {
            () = stop.cancelled(), if !is_stopped => {
                is_stopped = true;
                mailbox.send(Event::Stop);
            }
            () = &mut out_of_time, if !is_out_of_time => is_out_of_time = true,
            Ok(()) = claimed.changed(), if !stands => {
                stands = true;
                shared.standing.send(job.state_dir.clone()).ok();
            }
            ended = &mut following => break ended,
            // It ends with the thread's last job, or before it when it can't go on: then the thread has to end, too.
            ended = &mut shipping, if shipped.is_none() => {
                shipped = Some(ended);
                mailbox.send(Event::Stop);
            }
            Some(Err(panic)) = beside.join_next() => {
                panicked = Some(DatabaseError::Panicked(panic.to_string()));
                mailbox.send(Event::Stop);
            }
        }
    };
    if shipped.is_none() && !is_stopped && captured.as_ref().is_err_and(is_replaced) {
        shipped = tokio::select! {
            ended = &mut shipping => Some(ended),
            () = somebody_waits(&database) => None,
            () = stop.cancelled() => {
                is_stopped = true;
                None
            }
        };
    }
    // Otherwise the next attempt ships what is in the spool.
    let is_the_end = captured.as_ref().map_or_else(|error| is_last || is_gone(error), |_| true);
    if shipped.is_none() && is_stopped && is_the_end {
        shipped = tokio::select! {
            biased;
            ended = &mut shipping => Some(ended),
            () = async { if !is_out_of_time { out_of_time.await } } => None,
        };
    }
    shipping.abort();
    job.board.set_link(None);
    if panicked.is_some() {
        return Ok(panicked);
    }
    let has_shipped = shipped.is_some();
    match shipped {
        Some(Err(panic)) => return Ok(Some(DatabaseError::Panicked(panic.to_string()))),
        Some(Ok(Err(ShipError::Spool(what)))) => return Ok(Some(DatabaseError::Local(io::Error::other(what)))),
        Some(Ok(Err(source))) => return Err(ReplicateError::Ship { database, source }),
        Some(Ok(Ok(()))) | None => {}
    }
    let captured = match captured {
        Err(error) if !is_last || is_gone(&error) || is_state_replaced(&error) => return Ok(Some(error)),
        captured => captured.map_err(|source| ReplicateError::Database { database: database.clone(), source })?,
    };
    let confirmed_txid = *progress.confirmed.borrow();
    match not_confirmed(captured, confirmed_txid, progress.snapshot_is_missing.load(Ordering::Relaxed)) {
        Some(what) => Err(ReplicateError::NotConfirmed { database, what }),
        None if has_shipped => Ok(None),
        None => Err(ReplicateError::NotConfirmed { database, what: "storage did not answer in time".into() }),
    }
}

/// Waits for as long as what was captured of a file that is gone may take to be shipped: until there is another one to be followed,
/// and some time more.
async fn somebody_waits(database: &Path) {
    while !database.exists() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(REPLACED_PATIENCE).await;
}

/// What goes on in storage beside shipping.
fn spawn_beside(
    beside: &mut JoinSet<()>,
    job: &Job,
    shared: &Replication,
    progress: &Progress,
    spool: &Spool,
    kept: mpsc::UnboundedReceiver<Spooled>,
) {
    let merger = Merger {
        store: job.store.clone(),
        spool: spool.clone(),
        settings: job.merge.clone(),
        permits: shared.merges.clone(),
    };
    let pruner = Pruner {
        store: job.store.clone(),
        settings: job.retention,
        clock: shared.clock.clone(),
        confirmed: progress.confirmed.subscribe(),
        board: job.board.clone(),
        permits: shared.prunes.clone(),
    };
    let presence = Presence {
        store: job.store.clone(),
        interval: job.presence_interval,
        clock: shared.clock.clone(),
        claimed: progress.claimed.subscribe(),
        confirmed: progress.confirmed.subscribe(),
    };
    beside.spawn(merger.run(kept));
    beside.spawn(pruner.run());
    beside.spawn(presence.run());
}

/// Follows a database on a thread, and watches it without one while it rests.
struct Follower {
    settings: DatabaseSettings,
    /// Where the path led to at the beginning.
    file: PathBuf,
    directory: Arc<StateDirectory>,
    mailbox: Arc<Mailbox>,
    /// Dropped at the end: then shipping ends, too.
    jobs: mpsc::UnboundedSender<ship::Job>,
    /// Without events nobody would wake a database that rests.
    has_events: bool,
    /// Without a control socket nothing but the lock keeps others away.
    has_control: bool,
}

impl Follower {
    /// Until it is told to stop: gives the last captured transaction, if an epoch was claimed.
    async fn run(
        self,
        progress: Arc<Progress>,
        shared: &Replication,
        stop: &CancellationToken,
    ) -> Result<Option<Position>, DatabaseError> {
        let mut rested: Option<Box<Rested>> = None;
        let mut start = tokio::select! {
            permit = shared.openings.start() => permit,
            // There is no time left to wait for others.
            () = stop.cancelled() => None,
        };
        loop {
            let around = Surroundings {
                settings: self.settings.clone(),
                mailbox: self.mailbox.clone(),
                jobs: self.jobs.clone(),
                progress: progress.clone(),
                clock: shared.clock.clone(),
                snapshot_permits: shared.snapshots.clone(),
                opening: shared.openings.open(self.has_events),
                neighbour: shared.neighbourhoods.join(&self.file, &self.mailbox),
            };
            let (directory, start, was_at_rest) = (self.directory.clone(), start.take(), rested.take());
            let name = self.settings.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match on_thread(name, move || follow(around, directory, was_at_rest, start)).await? {
                Ended::Stopped(captured) => return Ok(captured),
                Ended::AtRest(at_rest) => {
                    if self.has_control {
                        self.directory.release();
                    }
                    if self.is_told_to_stop_while(&at_rest).await? {
                        return Ok(Some(at_rest.captured.position));
                    }
                    self.take_directory().await?;
                    rested = Some(at_rest);
                }
            }
        }
    }

    /// Locks the state directory again after a rest. Somebody may have the lock for a moment, who then learns that we are there.
    async fn take_directory(&self) -> Result<(), DatabaseError> {
        let mut looks = 0;
        loop {
            match self.directory.take() {
                Err(StateDirectoryError::Locked(_)) if looks < LOCK_LOOKS => looks += 1,
                taken => return taken.map_err(DatabaseError::State),
            }
            tokio::time::sleep(LOCK_LOOK_INTERVAL).await;
        }
    }

    /// Waits until something is to be done for a database at rest; tells whether it was told to stop and nothing is.
    async fn is_told_to_stop_while(&self, rested: &Rested) -> Result<bool, DatabaseError> {
        let mut left = rested.due_in;
        loop {
            let wait = left.map_or(LOOK_INTERVAL, |left| left.min(LOOK_INTERVAL));
            self.mailbox.stirred(wait).await;
            // Cleared before the files are looked at: what is written after the look wakes again.
            let stirring = self.mailbox.take_wake();
            let path = &self.settings.path;
            // What can't be looked at now says nothing against the state.
            let seen = Seen::now(path).map_err(SqliteError::io(path, "look at"))?;
            let is_as_it_was = seen == rested.files;
            match stirring {
                Stirring::Stop if is_as_it_was => return Ok(true),
                // By a directory that was replaced nobody could ask, and no other daemon is kept
                // away.
                Stirring::Nothing if is_as_it_was => self.directory.check()?,
                _ => return Ok(false),
            }
            left = left.map(|left| left.saturating_sub(wait));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
        }
    }
}

/// Does work that blocks, for as long as it likes, on a thread of its own; a panic in it is an error like others.
async fn on_thread<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> Result<T, DatabaseError> + Send + 'static,
) -> Result<T, DatabaseError> {
    let (sender, done) = oneshot::channel();
    std::thread::Builder::new().name(name).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        let result = result.unwrap_or_else(|panic| Err(DatabaseError::Panicked(panic_text(panic))));
        sender.send(result).ok();
    })?;
    done.await.unwrap_or_else(|_| Err(DatabaseError::Panicked("its thread was lost".into())))
}

/// What a panic said.
pub fn panic_text(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

/// What is missing when the time for shipping is over, in words; `None` when nothing is.
fn not_confirmed(captured: Option<Position>, confirmed_txid: u64, snapshot_is_missing: bool) -> Option<String> {
    match captured {
        None => Some("storage could not be reached".into()),
        Some(Position { txid, .. }) if txid > confirmed_txid => {
            Some(format!("captured up to {txid}, confirmed up to {confirmed_txid}; the next start ships the rest"))
        }
        Some(_) if snapshot_is_missing => {
            Some("the first snapshot is not stored yet; the next start begins it again".into())
        }
        Some(_) => None,
    }
}
