//! Waking: file-system events, coalesced into one flag a database, and the mailbox of a database's thread.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::base::Base;
use super::claim::Claimed;
use super::control::State;

/// What a database's thread is told.
#[derive(Debug)]
pub enum Event {
    /// The epoch to record for.
    Claimed(Box<Claimed>),
    /// The newest snapshot in storage was looked up: what the next one is based on.
    BaseFound(Option<Box<Base>>),
    /// The snapshot is stored: the database can be restored to this state.
    SnapshotStored(State),
    /// The snapshot could not be stored, or its base not be looked up.
    SnapshotFailed,
    /// Somebody wants to know the last transaction, captured and on its way to storage.
    SyncWanted(oneshot::Sender<State>),
    /// Somebody wants a snapshot, and to know the state that it serves when it is stored.
    SnapshotWanted(oneshot::Sender<State>),
    /// Capture what there is and end.
    Stop,
}

/// Where a database's thread waits. Wakes coalesce; events queue up, and there are only ever a few.
#[derive(Debug, Default)]
pub struct Mailbox {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    is_woken: bool,
    events: VecDeque<Event>,
}

impl Mailbox {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file changed.
    pub fn wake(&self) {
        let mut inbox = self.inbox();
        if !inbox.is_woken {
            inbox.is_woken = true;
            self.changed.notify_one();
        }
    }

    /// Something was decided elsewhere.
    pub fn send(&self, event: Event) {
        self.inbox().events.push_back(event);
        self.changed.notify_one();
    }

    /// Waits for a wake or an event, at most `timeout`; tells whether a file changed, and gives all events.
    pub fn wait(&self, timeout: Duration) -> (bool, VecDeque<Event>) {
        let is_empty = |inbox: &mut Inbox| !inbox.is_woken && inbox.events.is_empty();
        let waited = self.changed.wait_timeout_while(self.inbox(), timeout, is_empty);
        let (mut inbox, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut inbox.is_woken), std::mem::take(&mut inbox.events))
    }
}

/// Names in a directory, and whom to wake when one of them changes.
type Watched = HashMap<PathBuf, Vec<(OsString, Weak<Mailbox>)>>;

/// The process's one watcher: the number of inotify instances a user may have is small.
#[derive(Debug)]
pub struct WatchHub {
    watched: Arc<Mutex<Watched>>,
    watcher: Option<Mutex<RecommendedWatcher>>,
}

impl WatchHub {
    /// Starts watching. Where the operating system gives no events, polling alone has to do; the log says so.
    #[must_use]
    pub fn new() -> Self {
        let watched = Arc::new(Mutex::new(Watched::new()));
        let shared = watched.clone();
        let handler = move |event: notify::Result<notify::Event>| {
            if let Ok(event) = event
                && !matches!(event.kind, EventKind::Access(_))
            {
                dispatch(&shared, &event.paths);
            }
        };
        let watcher = match notify::recommended_watcher(handler) {
            Ok(watcher) => Some(Mutex::new(watcher)),
            Err(error) => {
                tracing::warn!(%error, "no file-system events are to be had; databases are polled");
                None
            }
        };
        Self { watched, watcher }
    }

    /// Wakes `mailbox` when the database at `path` or its WAL changes, as long as the mailbox lives.
    pub fn watch(&self, path: &Path, mailbox: &Arc<Mailbox>) {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return };
        let mut wal = name.to_owned();
        wal.push("-wal");
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = watched.entry(directory.to_owned()).or_default();
        entries.retain(|(_, mailbox)| mailbox.strong_count() > 0);
        entries.extend([name.to_owned(), wal].map(|name| (name, Arc::downgrade(mailbox))));
        drop(watched);
        let Some(watcher) = &self.watcher else { return };
        let mut watcher = watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
            tracing::debug!(%error, directory = %directory.display(), "not watched; polled");
        }
    }
}

impl Default for WatchHub {
    fn default() -> Self {
        Self::new()
    }
}

fn dispatch(watched: &Mutex<Watched>, paths: &[PathBuf]) {
    let watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    for path in paths {
        let Some(entries) = path.parent().and_then(|directory| watched.get(directory)) else { continue };
        for (name, mailbox) in entries {
            if path.file_name() == Some(name)
                && let Some(mailbox) = mailbox.upgrade()
            {
                mailbox.wake();
            }
        }
    }
}
