//! Following live databases and shipping every transaction.
//!
//! One thread a database that is held open does the blocking file work ([`database`]); one task a database does the storage work
//! ([`ship`]). Between them: a queue of jobs, a mailbox, and the spool on the disk. One database's trouble is its own. Of many
//! databases those that nobody writes to are at rest, without thread or connection ([`rest`]).

pub mod base;
pub mod capture;
pub mod checkpoints;
pub mod claim;
pub mod control;
pub mod database;
pub mod delta;
pub mod foreign_wal;
pub mod handover;
pub mod ledger;
pub mod merge;
pub mod merger;
pub mod neighbours;
pub mod open_segment;
pub mod pace;
pub mod presence;
pub mod pruner;
pub mod record;
pub mod rest;
pub mod scan;
pub mod ship;
pub mod snapshots;
pub mod spool;
pub mod start;
pub mod state;
pub mod status;
mod supervise;
pub mod wake;

use std::collections::HashMap;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::control::ControlServer;
use self::database::{DatabaseError, DatabaseSettings};
use self::merge::MergeSettings;
use self::neighbours::Neighbourhoods;
use self::rest::Openings;
use self::ship::ShipError;
use self::spool::Spool;
use self::state::StateDirectoryError;
use self::status::{Board, Boards, Phase};
pub use self::supervise::forget;
use self::supervise::panic_text;
use self::wake::WatchHub;
use crate::clock::Clock;
use crate::retain::RetentionSettings;
use crate::store::SharedStore;

/// A merge takes a processor.
const MERGES_AT_A_TIME: usize = 1;
/// Old history has time.
const PRUNES_AT_A_TIME: usize = 1;
/// Each reads a database, and holds a few of its extents.
const SNAPSHOTS_AT_A_TIME: usize = 4;

/// One database and where it goes.
#[derive(Debug)]
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

/// What goes on beside a database for as long as it is followed.
pub type Companions = Vec<BoxFuture<'static, ()>>;

/// What is to be followed from now on.
pub enum Order {
    /// Follow a database. One whose state directory is in use, and that was let go of, is taken up when that has ended.
    Follow(Box<Job>, Companions),
    /// Capture what is left of the database with this state directory, ship it, and let go of it.
    LetGo(PathBuf),
    /// Whether to go on when nothing is followed any more, because more may come.
    StayWithout(bool),
}

/// What all databases of the process share.
pub struct Replication {
    /// Watches files.
    pub hub: Arc<WatchHub>,
    /// Where it is written down how each database is.
    pub boards: Arc<Boards>,
    /// Hears of each database, by its state directory, as soon as everything that is written to it from then on is captured;
    /// perhaps nobody listens.
    pub standing: mpsc::UnboundedSender<PathBuf>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// At a stop, shipping what is left may take so long.
    pub shutdown_timeout: Duration,
    /// Who is held open.
    pub openings: Arc<Openings>,
    neighbourhoods: Neighbourhoods,
    controls: ControlServer,
    merges: Arc<Semaphore>,
    prunes: Arc<Semaphore>,
    snapshots: Arc<Semaphore>,
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
    /// A thread or task panicked, which is a mistake in this program; the database was taken up again.
    #[error("{}: an internal error interrupted the replication: {what}", database.display())]
    Panicked {
        /// The database.
        database: PathBuf,
        /// What the panic said.
        what: String,
    },
}

/// Takes a mutex, also after somebody panicked who held it: what these protect is right at every moment.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a database is told to end.
#[derive(Debug, Clone)]
struct Ending {
    /// Capture what is left, ship it, and let go.
    let_go: CancellationToken,
    /// And take no longer than `shutdown_timeout` for that: the process stops, or somebody waits for the state directory. Without
    /// it shipping goes on until storage has everything.
    hurry: CancellationToken,
}

impl Ending {
    fn with(stop: &CancellationToken) -> Self {
        let hurry = stop.child_token();
        Self { let_go: hurry.child_token(), hurry }
    }
}

/// A database that is followed, or is on its way out.
struct Followed {
    path: PathBuf,
    ending: Ending,
    next: Option<(Box<Job>, Companions)>,
}

/// All that are followed.
struct Everyone {
    shared: Arc<Replication>,
    stop: CancellationToken,
    running: JoinSet<(PathBuf, Result<(), ReplicateError>)>,
    /// By their state directories, of which each has one of its own.
    followed: HashMap<PathBuf, Followed>,
    stays_without: bool,
    failed: Vec<ReplicateError>,
}

impl Everyone {
    fn obey(&mut self, order: Order) {
        match order {
            Order::Follow(job, companions) => match self.followed.get_mut(&job.state_dir) {
                Some(before) => {
                    before.ending.hurry.cancel();
                    before.next = Some((job, companions));
                }
                None => self.begin(job, companions),
            },
            Order::LetGo(state_dir) => match self.followed.get_mut(&state_dir) {
                Some(followed) => {
                    followed.ending.let_go.cancel();
                    followed.next = None;
                }
                // It ended by itself; nobody is to be told of that any more.
                None => self.shared.boards.remove(&state_dir),
            },
            Order::StayWithout(stays) => self.stays_without = stays,
        }
    }

    fn begin(&mut self, job: Box<Job>, companions: Companions) {
        let (ending, path, state_dir) = (Ending::with(&self.stop), job.settings.path.clone(), job.state_dir.clone());
        self.running.spawn(follow(job, companions, self.shared.clone(), ending.clone()));
        self.followed.insert(state_dir, Followed { path, ending, next: None });
    }

    fn end(&mut self, state_dir: &Path, ended: Result<(), ReplicateError>) {
        let is_whole = ended.is_ok();
        self.failed.extend(ended.err());
        let Some(Followed { path, ending, next }) = self.followed.remove(state_dir) else { return };
        self.shared.hub.forget(&path);
        if self.stop.is_cancelled() {
            return;
        }
        if let Some((job, companions)) = next {
            self.begin(job, companions);
        } else if ending.let_go.is_cancelled() {
            self.shared.boards.remove(state_dir);
            if is_whole && is_gone(&path) {
                remove(state_dir);
            }
        }
    }
}

impl Replication {
    /// With what is shared with others, the limit of time at a stop, and how many databases are held open.
    #[must_use]
    pub fn new(
        hub: Arc<WatchHub>,
        boards: Arc<Boards>,
        standing: mpsc::UnboundedSender<PathBuf>,
        clock: Arc<dyn Clock>,
        shutdown_timeout: Duration,
        open_databases: usize,
    ) -> Self {
        Self {
            hub,
            boards,
            standing,
            clock,
            shutdown_timeout,
            openings: Arc::new(Openings::new(open_databases)),
            neighbourhoods: Neighbourhoods::default(),
            controls: ControlServer::default(),
            merges: Arc::new(Semaphore::new(MERGES_AT_A_TIME)),
            prunes: Arc::new(Semaphore::new(PRUNES_AT_A_TIME)),
            snapshots: Arc::new(Semaphore::new(SNAPSHOTS_AT_A_TIME)),
        }
    }

    /// Replicates as ordered until `stop` is cancelled; then captures what is left and ships it. Ends by itself when nothing is
    /// followed any more and nothing more may come. Returns what went wrong, a database each; nothing when all ended as told with
    /// everything confirmed.
    pub async fn run(self, mut orders: mpsc::UnboundedReceiver<Order>, stop: CancellationToken) -> Vec<ReplicateError> {
        let mut everyone = Everyone {
            shared: Arc::new(self),
            stop: stop.clone(),
            running: JoinSet::new(),
            followed: HashMap::new(),
            stays_without: true,
            failed: Vec::new(),
        };
        while !everyone.running.is_empty() || (everyone.stays_without && !stop.is_cancelled()) {
            tokio::select! {
                Some(order) = orders.recv(), if !stop.is_cancelled() => everyone.obey(order),
                Some(ended) = everyone.running.join_next() => match ended {
                    Ok((state_dir, ended)) => everyone.end(&state_dir, ended),
                    // Panics of what is followed are caught further in.
                    Err(error) => everyone.failed.push(ReplicateError::Panicked {
                        database: PathBuf::new(),
                        what: error.to_string(),
                    }),
                },
                () = stop.cancelled(), if everyone.running.is_empty() => {}
            }
        }
        everyone.failed
    }
}

/// Whether there is nothing at `path`; not whether that can't be known.
pub(crate) fn is_gone(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Removes the local state of a database that was deleted. It stays where segments wait in its spool: a database that went while
/// storage was away, or just after it was written to, may have left the only copy of its last transactions there.
fn remove(state_dir: &Path) {
    let shown = state_dir.display();
    let removed = match Spool::new(state_dir.join("spool")).waiting() {
        Ok(waiting) if !waiting.is_empty() => {
            let segments = waiting.len();
            tracing::warn!(segments, state_dir = %shown, "a database was deleted before all of it was shipped; what waits stays here");
            return;
        }
        Ok(_) => std::fs::remove_dir_all(state_dir),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(%error, state_dir = %shown, "what was left of a deleted database can't be removed");
    }
}

/// Follows a database until it is told to end, and says how it ended.
async fn follow(
    job: Box<Job>,
    companions: Companions,
    shared: Arc<Replication>,
    ending: Ending,
) -> (PathBuf, Result<(), ReplicateError>) {
    // They end with this function.
    let mut beside: JoinSet<()> = companions.into_iter().collect();
    let (path, state_dir, board) = (job.settings.path.clone(), job.state_dir.clone(), job.board.clone());
    shared.boards.insert(state_dir.clone(), board.clone());
    let supervised = AssertUnwindSafe(supervise::supervise(&job, &shared, &ending)).catch_unwind();
    let mut supervised = std::pin::pin!(supervised);
    let (mut panicked, mut is_stopping) = (None, false);
    let ended = loop {
        tokio::select! {
            () = ending.let_go.cancelled(), if !is_stopping => {
                is_stopping = true;
                board.retry_signal().note_stop();
            }
            ended = &mut supervised => break match ended {
                Ok(ended) => ended,
                Err(panic) => Err(panicked_here(&path, panic_text(panic))),
            },
            Some(Err(panic)) = beside.join_next() => {
                tracing::error!(error = %panic, database = %path.display(), "what checks the backup ended; it is back after a restart");
                // Lasting, unlike an error of shipping, which is over when a segment is confirmed.
                let trouble = format!("an internal error ended what checks the backup, until the next start: {panic}");
                board.note_verified(shared.clock.now_ms(), Some(trouble));
                panicked = Some(panicked_here(&path, panic.to_string()));
            }
        }
    };
    let ended = ended.and(panicked.map_or(Ok(()), Err));
    if let Err(error) = &ended {
        tracing::error!(%error, database = %path.display(), "not replicated any more");
    }
    board.set_link(None);
    board.enter(Phase::Stopped, ended.as_ref().err().map(ToString::to_string), shared.clock.now_ms());
    (state_dir, ended)
}

fn panicked_here(database: &Path, what: String) -> ReplicateError {
    ReplicateError::Panicked { database: database.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::key::{SegmentKey, Span};

    #[test]
    fn what_waits_for_storage_outlives_its_database() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("state");
        std::fs::create_dir_all(state_dir.join("spool/kept")).unwrap();
        let spool = Spool::new(state_dir.join("spool"));
        std::fs::write(spool.open_segment_path(), "a segment").unwrap();
        let waiting = spool.accept(SegmentKey(Span { epoch: 1, first_txid: 2, last_txid: 3, time_ms: 4 })).unwrap();
        remove(&state_dir);
        assert!(waiting.path.exists());
        std::fs::remove_file(waiting.path).unwrap();
        remove(&state_dir);
        assert!(!state_dir.exists());
    }
}
