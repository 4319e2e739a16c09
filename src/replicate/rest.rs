//! Databases at rest: of many databases, those that nobody writes to hold no thread, no connection and no descriptor of the
//! database.
//!
//! Nothing is lost by that, because a rest is a clean stop without an end: the local state says what was captured, and what
//! happens until the database is opened again is found out as at any start (see [`super::start`]). But no pin stands: an
//! application that writes more than its WAL holds between two checkpoints, or closes the database, before we are awake (some
//! milliseconds) may have begun the WAL anew. Then what it did is recorded as one transaction. So the first few databases, as many
//! as are held open anyway, never rest.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::claim::Claimed;
use super::control::State;
use super::snapshots::Snapshots;
use crate::clock::Clock;
use crate::sqlite::live::FileIdentity;
use crate::sqlite::sidecar;

/// So many databases are taken up at a time, and are held open beyond those that may be: each takes a quarter of a megabyte.
const STARTS_AT_A_TIME: usize = 32;
/// A database that was written to is held open for so long after the last commit.
pub const RESTS_AFTER: Duration = Duration::from_secs(10);
/// A larger database is not put to rest: to find out what happened meanwhile may mean to read it all.
pub const LARGEST_AT_REST_BYTES: u64 = 256 << 20;
/// File times tell two writes apart when so much lies between them: the kernel's clock for them ticks every few milliseconds.
const SETTLED_AFTER: Duration = Duration::from_millis(100);
/// One at rest is looked at this often, for the case that an event got lost.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// How many databases of the process are held open, and are being taken up.
#[derive(Debug)]
pub struct Openings {
    open: AtomicUsize,
    at_ease: usize,
    starts: Arc<Semaphore>,
}

impl Openings {
    /// Up to `at_ease` databases are held open, whether anybody writes to them or not.
    #[must_use]
    pub fn new(at_ease: usize) -> Self {
        Self { open: AtomicUsize::new(0), at_ease, starts: Arc::new(Semaphore::new(STARTS_AT_A_TIME)) }
    }

    /// Waits for a place among those that are taken up. `None` never comes: the semaphore is not closed.
    pub async fn start(&self) -> Option<OwnedSemaphorePermit> {
        self.starts.clone().acquire_owned().await.ok()
    }

    /// Counts a database as open until the value is dropped; `can_rest` tells whether it would be woken.
    #[must_use]
    pub fn open(self: &Arc<Self>, can_rest: bool) -> Opening {
        self.open.fetch_add(1, Ordering::Relaxed);
        Opening { openings: self.clone(), can_rest }
    }
}

/// A database that is held open.
#[derive(Debug)]
pub struct Opening {
    openings: Arc<Openings>,
    can_rest: bool,
}

impl Opening {
    /// Whether it should rest when nobody writes to it: more are open than are at ease.
    #[must_use]
    pub fn should_rest(&self) -> bool {
        self.can_rest && self.openings.open.load(Ordering::Relaxed) > self.openings.at_ease
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.openings.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is kept of a database at rest; the rest is in its state directory.
#[derive(Debug)]
pub struct Rested {
    /// Its epoch.
    pub claimed: Claimed,
    /// Its snapshots; none is on its way.
    pub snapshots: Snapshots,
    /// Its last state.
    pub captured: State,
    /// Its files when it went to rest.
    pub files: Seen,
    /// Something is to be done then, whether anybody writes or not.
    pub due_in: Option<Duration>,
}

/// Whether a write to a file from now on makes its time another one.
#[must_use]
pub fn is_settled(file: FileIdentity, clock: &dyn Clock) -> bool {
    file.is_older_than(SETTLED_AFTER, clock.file_time_ms())
}

/// How long until [`is_settled`] holds, if nothing is written any more.
#[must_use]
pub fn until_settled(file: FileIdentity, clock: &dyn Clock) -> Duration {
    file.until_older_than(SETTLED_AFTER, clock.file_time_ms())
}

/// What the main file and the WAL looked like; `None` for one that was not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    main: Option<FileIdentity>,
    wal: Option<FileIdentity>,
}

impl Seen {
    /// Looks at the files of the database that `path` leads to.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn now(path: &Path) -> io::Result<Self> {
        let look = |path: &Path| match FileIdentity::of(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        };
        let file = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Ok(Self { main: look(&file)?, wal: look(&sidecar(&file, "-wal"))? })
    }

    /// Whether a write from now on would be seen in the files' times, and the main file is there and not too large.
    #[must_use]
    pub fn may_rest(&self, clock: &dyn Clock) -> bool {
        let is_settled = |file| is_settled(file, clock);
        self.main.is_some_and(|main| is_settled(main) && main.len_bytes() <= LARGEST_AT_REST_BYTES)
            && self.wal.is_none_or(is_settled)
    }
}
