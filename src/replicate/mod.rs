//! Following live databases and shipping every transaction.
//!
//! One thread a database does the blocking file work ([`database`]); one task a database does the storage work ([`ship`]).
//! Between them: a queue of jobs, a mailbox, and the spool on the disk. One database's trouble is its own.

pub mod base;
pub mod capture;
pub mod claim;
pub mod control;
pub mod database;
pub mod delta;
pub mod handover;
pub mod ledger;
pub mod merge;
pub mod merger;
pub mod presence;
pub mod pruner;
pub mod record;
pub mod scan;
pub mod ship;
pub mod snapshots;
pub mod spool;
pub mod start;
pub mod state;
pub mod status;
pub mod wake;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::database::{DatabaseError, DatabaseSettings, Surroundings, follow};
use self::merge::MergeSettings;
use self::merger::Merger;
use self::presence::Presence;
use self::pruner::Pruner;
use self::ship::{Progress, ShipError, Shipper};
use self::spool::Spool;
use self::state::{StateDirectory, StateDirectoryError};
use self::status::{Board, Link, Phase};
use self::wake::{Event, Mailbox, WatchHub};
use crate::clock::Clock;
use crate::format::Position;
use crate::retain::RetentionSettings;
use crate::sqlite::SqliteError;
use crate::store::SharedStore;
use crate::store::retry::RetryPolicy;

/// How a database that fails is taken up again.
const RESTART: RetryPolicy = RetryPolicy { attempts: u32::MAX, base_ms: 1000, max_ms: 30_000 };

/// A merge takes a processor.
const MERGES_AT_A_TIME: usize = 1;
/// Old history has time.
const PRUNES_AT_A_TIME: usize = 1;

/// What all databases of the process share.
struct Shared {
    hub: WatchHub,
    /// Who wants to know of databases that stand; perhaps nobody.
    standing: mpsc::UnboundedSender<PathBuf>,
    merges: Arc<Semaphore>,
    prunes: Arc<Semaphore>,
}

/// One database and where it goes.
#[derive(Debug, Clone)]
pub struct Job {
    /// The database.
    pub settings: DatabaseSettings,
    /// Where local state is kept.
    pub state_dir: PathBuf,
    /// Where it goes.
    pub store: SharedStore,
    /// What of its segments is merged.
    pub merge: MergeSettings,
    /// What of its history is kept.
    pub retention: RetentionSettings,
    /// Where it is written down how replication is.
    pub board: Arc<Board>,
    /// How often to say in storage that the daemon is there; `None` for never.
    pub presence_interval: Option<Duration>,
}

/// Why replication ended otherwise than it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ReplicateError {
    /// The local state can't be used.
    #[error(transparent)]
    StateDirectory(#[from] StateDirectoryError),
    /// Shipping can't go on.
    #[error("{}: {source}", database.display())]
    Ship {
        /// The database.
        database: PathBuf,
        /// Why.
        source: ShipError,
    },
    /// Stopped before everything that was captured was confirmed.
    #[error("{}: stopped with transactions not confirmed ({what})", database.display())]
    NotConfirmed {
        /// The database.
        database: PathBuf,
        /// What is missing.
        what: String,
    },
    /// A database could not be captured at the stop.
    #[error("{}: {source}", database.display())]
    Database {
        /// The database.
        database: PathBuf,
        /// Why.
        source: DatabaseError,
    },
    /// A thread or task ended by a panic: a mistake in this program.
    #[error("an internal error ended the replication of {}: {what}", database.display())]
    Panicked {
        /// The database.
        database: PathBuf,
        /// What the panic said.
        what: String,
    },
}

/// Replicates `databases` until `stop` is cancelled; then captures what is left and ships it within `shutdown_timeout`.
/// `standing` hears of each database as soon as everything that is written to it from then on is captured.
/// Returns what went wrong, a database each; nothing when all ended as told with everything confirmed.
pub async fn run(
    databases: Vec<Job>,
    stop: CancellationToken,
    shutdown_timeout: Duration,
    clock: Arc<dyn Clock>,
    standing: mpsc::UnboundedSender<PathBuf>,
) -> Vec<ReplicateError> {
    let shared = Arc::new(Shared {
        hub: WatchHub::new(),
        standing,
        merges: Arc::new(Semaphore::new(MERGES_AT_A_TIME)),
        prunes: Arc::new(Semaphore::new(PRUNES_AT_A_TIME)),
    });
    let mut running = JoinSet::new();
    for job in databases {
        let (shared, stop, clock) = (shared.clone(), stop.clone(), clock.clone());
        running.spawn(async move {
            let database = job.settings.path.clone();
            let board = job.board.clone();
            let ended = supervise(job, &shared, stop, shutdown_timeout, clock.clone()).await;
            if let Err(error) = &ended {
                tracing::error!(%error, database = %database.display(), "not replicated any more");
            }
            board.set_link(None);
            board.enter(Phase::Stopped, ended.as_ref().err().map(ToString::to_string), clock.now_ms());
            ended
        });
    }
    let mut failed = Vec::new();
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed.push(error),
            Err(panic) => {
                failed.push(ReplicateError::Panicked { database: PathBuf::new(), what: panic.to_string() });
            }
        }
    }
    failed
}

/// Follows a database, again and again, until told to stop or until going on makes no sense.
async fn supervise(
    job: Job,
    shared: &Shared,
    stop: CancellationToken,
    shutdown_timeout: Duration,
    clock: Arc<dyn Clock>,
) -> Result<(), ReplicateError> {
    let directory = Arc::new(open_state_directory(&job, &stop, &clock).await?);
    let database = job.settings.path.display().to_string();
    // It ends with this function.
    let mut beside = JoinSet::new();
    match control::listen(directory.path()) {
        Ok(listener) => drop(beside.spawn(control::serve(listener, job.board.clone()))),
        Err(error) => {
            tracing::warn!(%error, "the control socket can't be made: `sync`, `status` and the like can't ask");
        }
    }
    let mut failures = 0;
    let mut is_waiting = false;
    loop {
        let begun = clock.monotonic();
        let is_last_try = stop.is_cancelled();
        match follow_once(&job, &directory, shared, &stop, shutdown_timeout, &clock).await? {
            None => return Ok(()),
            Some(DatabaseError::Sqlite(SqliteError::NotThere { .. })) => {
                if !is_waiting {
                    tracing::info!(database, "not there yet; waiting for the application to make it");
                }
                job.board.enter(Phase::Waiting, None, clock.now_ms());
                shared.standing.send(job.settings.path.clone()).ok();
                is_waiting = true;
                failures = 0;
                sleep_or_stop(job.settings.poll_interval, &stop).await;
                // An application that makes it and ends at once would otherwise be stopped before anybody has looked.
                if !is_last_try {
                    continue;
                }
            }
            Some(error) => {
                is_waiting = false;
                if clock.monotonic().saturating_sub(begun) > Duration::from_secs(60) {
                    failures = 0;
                }
                let wait = RESTART.wait(failures).max(Duration::from_secs(1));
                failures += 1;
                report(&database, &error, wait);
                job.board.enter(Phase::Failing, Some(error.to_string()), clock.now_ms());
                if error.disproves_state() {
                    forget(&directory, &error);
                }
                sleep_or_stop(wait, &stop).await;
                if stop.is_cancelled() {
                    // What it holds may not be captured: that is no clean end.
                    return Err(ReplicateError::Database { database: job.settings.path, source: error });
                }
            }
        }
        if stop.is_cancelled() {
            return Ok(());
        }
    }
}

fn report(database: &str, error: &DatabaseError, wait: Duration) {
    let wait_ms = wait.as_millis() as u64;
    match error {
        DatabaseError::Sqlite(SqliteError::Unsettled { .. } | SqliteError::Replaced { .. }) => {
            tracing::warn!(database, %error, wait_ms, "taking the database up again");
        }
        _ => tracing::error!(database, %error, wait_ms, "the database can't be followed; trying again"),
    }
}

/// Discards local state that is not to be relied on. A spool that outgrew its limit goes, too.
fn forget(directory: &StateDirectory, error: &DatabaseError) {
    let discard = || -> io::Result<()> {
        directory.discard()?;
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

/// Follows a database once. `Ok(None)` when it was told to stop and all is confirmed, `Ok(Some(_))` when it failed in a way
/// that a new try may mend.
async fn follow_once(
    job: &Job,
    directory: &Arc<StateDirectory>,
    shared: &Shared,
    stop: &CancellationToken,
    shutdown_timeout: Duration,
    clock: &Arc<dyn Clock>,
) -> Result<Option<DatabaseError>, ReplicateError> {
    let database = job.settings.path.clone();
    // SQLite keeps `-wal` and `-shm` beside the file that a symbolic link leads to, and events come from there.
    let mut settings = job.settings.clone();
    settings.path = std::fs::canonicalize(&database).unwrap_or(settings.path);
    let mailbox = Arc::new(Mailbox::default());
    let progress = Arc::new(Progress { board: job.board.clone(), ..Progress::default() });
    shared.hub.watch(&settings.path, &mailbox);
    let (jobs, queue) = mpsc::unbounded_channel();
    let around =
        Surroundings { settings, mailbox: mailbox.clone(), jobs, progress: progress.clone(), clock: clock.clone() };
    let spool = Spool::new(directory.spool_path());
    let (kept, confirmed) = mpsc::unbounded_channel();
    let merger = Merger {
        store: job.store.clone(),
        spool: spool.clone(),
        settings: job.merge.clone(),
        permits: shared.merges.clone(),
    };
    let pruner = Pruner {
        store: job.store.clone(),
        settings: job.retention,
        clock: clock.clone(),
        confirmed: progress.confirmed.subscribe(),
        permits: shared.prunes.clone(),
    };
    let presence = Presence {
        store: job.store.clone(),
        interval: job.presence_interval,
        clock: clock.clone(),
        claimed: progress.claimed.subscribe(),
        confirmed: progress.confirmed.subscribe(),
    };
    // What runs in there ends with this function, whatever it is doing: a merge or a deletion can be done again.
    let mut beside = JoinSet::new();
    beside.spawn(merger.run(confirmed));
    beside.spawn(pruner.run());
    job.board.set_link(Some(Link { mailbox: mailbox.clone(), confirmed: progress.confirmed.subscribe() }));
    beside.spawn(presence.run());
    let shipper = Shipper {
        store: job.store.clone(),
        mailbox: mailbox.clone(),
        progress: progress.clone(),
        clock: clock.clone(),
        spool,
        kept,
    };
    let mut shipping = tokio::spawn(shipper.run(queue));
    let thread_directory = directory.clone();
    let mut following = tokio::task::spawn_blocking(move || follow(around, thread_directory));
    let panicked = |panic: tokio::task::JoinError| ReplicateError::Panicked {
        database: database.clone(),
        what: panic.to_string(),
    };
    let mut claimed = progress.confirmed.subscribe();
    let mut stands = false;
    let mut stopped_at = None;
    let mut shipped = None;
    let captured = loop {
        tokio::select! {
            () = stop.cancelled(), if stopped_at.is_none() => {
                stopped_at = Some(clock.monotonic());
                mailbox.send(Event::Stop);
            }
            Ok(()) = claimed.changed(), if !stands => {
                stands = true;
                shared.standing.send(job.settings.path.clone()).ok();
            }
            ended = &mut following => break ended.map_err(panicked)?,
            // It ends with the thread's last job, or before it when it can't go on: then the thread has to end, too.
            ended = &mut shipping, if shipped.is_none() => {
                shipped = Some(ended.map_err(panicked)?);
                mailbox.send(Event::Stop);
            }
        }
    };
    if let (None, Some(stopped_at)) = (&shipped, stopped_at) {
        let used = clock.monotonic().saturating_sub(stopped_at);
        let in_time = tokio::time::timeout(shutdown_timeout.saturating_sub(used), &mut shipping).await;
        shipped = in_time.ok().transpose().map_err(panicked)?;
    }
    shipping.abort();
    job.board.set_link(None);
    match shipped {
        Some(Err(ShipError::Spool(what))) => return Ok(Some(DatabaseError::Local(io::Error::other(what)))),
        Some(Err(source)) => return Err(ReplicateError::Ship { database, source }),
        Some(Ok(())) | None => {}
    }
    let captured = match captured {
        Err(error) if stopped_at.is_none() => return Ok(Some(error)),
        Err(DatabaseError::Sqlite(SqliteError::NotThere { .. })) => return Ok(None),
        captured => captured.map_err(|source| ReplicateError::Database { database: database.clone(), source })?,
    };
    let confirmed_txid = *progress.confirmed.borrow();
    match not_confirmed(captured, confirmed_txid, progress.snapshot_is_missing.load(Ordering::Relaxed)) {
        Some(what) => Err(ReplicateError::NotConfirmed { database, what }),
        None if shipped.is_some() => Ok(None),
        None => Err(ReplicateError::NotConfirmed { database, what: "storage did not answer in time".into() }),
    }
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
