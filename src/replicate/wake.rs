//! Waking: file-system events, coalesced into one flag a database, and the mailbox of a database's thread.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::base::Base;
use super::claim::Claimed;
use super::control::State;
use super::locked;
use crate::clock::{Clock, SystemClock};
use crate::sqlite::sidecar;

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
    /// Another one who follows the database wants the pin moved up, and to know when it is.
    PinWanted(SyncSender<()>),
    /// Capture what there is and end.
    Stop,
}

/// Where a database's thread waits. Wakes coalesce; events queue up, and there are only ever a few.
#[derive(Debug, Default)]
pub struct Mailbox {
    inbox: Mutex<Inbox>,
    /// For the thread of a database that is held open.
    changed: Condvar,
    /// For the task of one that is at rest.
    stirred: Notify,
}

#[derive(Debug, Default)]
struct Inbox {
    is_woken: bool,
    /// Whether what changed is the main file: then a checkpoint may wait for us.
    is_urgent: bool,
    /// Whether the thread waits for what is urgent alone: to wake it for anything else would cost more than it does then.
    is_pausing: bool,
    notices: Notices,
    events: VecDeque<Event>,
}

/// What happened to the files beside changes of their content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Notices {
    /// A descriptor of the main file was closed that could write: the application may have closed the database.
    pub is_closed: bool,
    /// The main file, the WAL or the wal-index was made, removed or renamed: the files may be other ones.
    pub is_renamed: bool,
}

impl Notices {
    fn is_any(self) -> bool {
        self.is_closed || self.is_renamed
    }
}

impl Mailbox {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        locked(&self.inbox)
    }

    /// The WAL changed.
    pub fn wake(&self) {
        let mut inbox = self.inbox();
        if !std::mem::replace(&mut inbox.is_woken, true) && !inbox.is_pausing {
            self.changed.notify_one();
            self.stirred.notify_one();
        }
    }

    /// The main file changed: somebody checkpoints, or something happened to the file.
    pub fn wake_at_once(&self) {
        let mut inbox = self.inbox();
        let is_known = inbox.is_woken && inbox.is_urgent;
        (inbox.is_woken, inbox.is_urgent) = (true, true);
        if !is_known {
            self.changed.notify_one();
            self.stirred.notify_one();
        }
    }

    /// A descriptor of the main file was closed. Ends a pause, too: until the WAL is emptied the main file alone is not
    /// complete.
    pub fn note_closed(&self) {
        self.inbox().notices.is_closed = true;
        self.wake_at_once();
    }

    /// One of the files was made, removed or renamed.
    pub fn note_renamed(&self) {
        self.inbox().notices.is_renamed = true;
        self.wake_at_once();
    }

    /// Takes what was noted of the files.
    pub fn take_notices(&self) -> Notices {
        std::mem::take(&mut self.inbox().notices)
    }

    /// Whether events wait to be taken.
    pub fn has_events(&self) -> bool {
        !self.inbox().events.is_empty()
    }

    /// Something was decided elsewhere.
    pub fn send(&self, event: Event) {
        self.inbox().events.push_back(event);
        self.changed.notify_one();
        self.stirred.notify_one();
    }

    /// Waits for an event, and if it `heeds_main` for a change of the main file, at most `timeout`, whatever else files do.
    pub fn pause(&self, timeout: Duration, heeds_main: bool) {
        let mut inbox = self.inbox();
        inbox.is_pausing = true;
        let is_empty = |inbox: &mut Inbox| !(heeds_main && inbox.is_urgent) && inbox.events.is_empty();
        let waited = self.changed.wait_timeout_while(inbox, timeout, is_empty);
        let (mut inbox, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inbox.is_pausing = false;
    }

    /// Waits for a wake or an event, at most `timeout`; tells which file changed, and gives all events.
    pub fn wait(&self, timeout: Duration) -> (Changed, VecDeque<Event>) {
        let is_empty = |inbox: &mut Inbox| !inbox.is_woken && !inbox.notices.is_any() && inbox.events.is_empty();
        let waited = self.changed.wait_timeout_while(self.inbox(), timeout, is_empty);
        let (mut inbox, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let changed = match (std::mem::take(&mut inbox.is_woken), std::mem::take(&mut inbox.is_urgent)) {
            (_, true) => Changed::Main,
            (true, false) => Changed::Wal,
            (false, false) => Changed::Nothing,
        };
        (changed, std::mem::take(&mut inbox.events))
    }
}

/// What a database's thread is woken by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// Time that passed, or an event.
    Nothing,
    /// The WAL.
    Wal,
    /// The main file, and maybe the WAL.
    Main,
}

impl Mailbox {
    /// Waits, without a thread, for a wake or an event, at most `timeout`; takes neither.
    pub async fn stirred(&self, timeout: Duration) {
        let is_empty = |inbox: &Inbox| !inbox.is_woken && inbox.events.is_empty();
        let stirs = async {
            while is_empty(&self.inbox()) {
                self.stirred.notified().await;
            }
        };
        tokio::time::timeout(timeout, stirs).await.ok();
    }

    /// Takes the wake, if there is one; events stay, and the answer says what they are.
    pub fn take_wake(&self) -> Stirring {
        let mut inbox = self.inbox();
        (inbox.is_woken, inbox.is_urgent, inbox.notices) = (false, false, Notices::default());
        match inbox.events.iter().all(|event| matches!(event, Event::Stop)) {
            _ if inbox.events.is_empty() => Stirring::Nothing,
            true => Stirring::Stop,
            false => Stirring::Work,
        }
    }
}

/// What a database at rest was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stirring {
    /// Nothing, or that a file changed.
    Nothing,
    /// To end.
    Stop,
    /// Something else.
    Work,
}

/// Files, and whom to wake when one of them changes.
type Mailboxes = HashMap<PathBuf, Vec<Weak<Mailbox>>>;

/// Main files and WALs, and whom to wake when one of them changes; directories, and whom to tell of what comes and goes in them.
#[derive(Debug, Default)]
struct Watched {
    main_files: Mailboxes,
    wals: Mailboxes,
    wal_indexes: Mailboxes,
    directories: HashMap<PathBuf, Weak<Notify>>,
}

impl Watched {
    /// A database's files, and where each belongs.
    fn files_of(&mut self, path: &Path) -> [(&mut Mailboxes, PathBuf); 3] {
        [
            (&mut self.main_files, path.to_owned()),
            (&mut self.wals, sidecar(path, "-wal")),
            (&mut self.wal_indexes, sidecar(path, "-shm")),
        ]
    }
}

fn waiting<'a>(files: &'a Mailboxes, path: &Path) -> impl Iterator<Item = Arc<Mailbox>> + 'a {
    files.get(path).into_iter().flatten().filter_map(Weak::upgrade)
}

/// A commit is a row of writes, one event each. After the first that wakes somebody the watcher waits for so long: meanwhile the
/// kernel makes one event of all that are alike.
const EVENTS_PAUSE: Duration = Duration::from_millis(2);
/// Under load it waits for so long. A database that is written to all the time is not looked at more often either.
const BUSY_EVENTS_PAUSE: Duration = Duration::from_millis(40);
/// So soon after a pause another event is a load.
const BUSY_EVENTS_GAP: Duration = Duration::from_millis(60);
/// What the watcher finds so soon after a pause came during it.
const EVENTS_BATCH: Duration = Duration::from_micros(200);

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
        let watched = Arc::new(Mutex::new(Watched::default()));
        let shared = watched.clone();
        let (clock, mut paused) = (SystemClock::default(), None::<Duration>);
        let handler = move |event: notify::Result<notify::Event>| {
            if let Ok(event) = event
                && (!matches!(event.kind, EventKind::Access(_)) || is_close(event.kind))
                && dispatch(&shared, &event)
                && let since = paused.map_or(Duration::MAX, |paused| clock.monotonic().saturating_sub(paused))
                && since > EVENTS_BATCH
            {
                std::thread::sleep(if since > BUSY_EVENTS_GAP { EVENTS_PAUSE } else { BUSY_EVENTS_PAUSE });
                paused = Some(clock.monotonic());
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

    fn watched(&self) -> MutexGuard<'_, Watched> {
        locked(&self.watched)
    }

    /// Wakes `mailbox` when the database at `path` or its WAL changes, as long as the mailbox lives; tells whether events are to
    /// be had.
    pub fn watch(&self, path: &Path, mailbox: &Arc<Mailbox>) -> bool {
        for (files, file) in self.watched().files_of(path) {
            let mailboxes = files.entry(file).or_default();
            mailboxes.retain(|mailbox| mailbox.strong_count() > 0);
            mailboxes.push(Arc::downgrade(mailbox));
        }
        path.parent().is_some_and(|directory| self.watch_directory(directory))
    }

    /// Lets go of what [`WatchHub::watch`] remembers of a database that is not followed any more.
    pub fn forget(&self, path: &Path) {
        for (files, file) in self.watched().files_of(path) {
            if let Some(mailboxes) = files.get_mut(&file) {
                mailboxes.retain(|mailbox| mailbox.strong_count() > 0);
                if mailboxes.is_empty() {
                    files.remove(&file);
                }
            }
        }
    }

    /// Tells `changed` when something comes into `directory` or goes, as long as it lives.
    pub fn watch_names(&self, directory: &Path, changed: &Arc<Notify>) {
        // Events come under the name that a directory was watched by; a database's is the canonical one.
        let directory = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        self.watched().directories.insert(directory.clone(), Arc::downgrade(changed));
        self.watch_directory(&directory);
    }

    fn watch_directory(&self, directory: &Path) -> bool {
        let Some(watcher) = &self.watcher else { return false };
        let mut watcher = locked(watcher);
        match watcher.watch(directory, RecursiveMode::NonRecursive) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, directory = %directory.display(), "not watched; polled");
                false
            }
        }
    }
}

impl Default for WatchHub {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns whether a descriptor that could write was closed.
fn is_close(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(AccessKind::Close(AccessMode::Write)))
}

/// Wakes who waits for a change of these files; tells whether somebody does.
fn dispatch(watched: &Mutex<Watched>, event: &notify::Event) -> bool {
    let watched = locked(watched);
    let is_name =
        matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)));
    let mut is_awaited = false;
    for path in &event.paths {
        if is_name {
            for files in [&watched.main_files, &watched.wals, &watched.wal_indexes] {
                for mailbox in waiting(files, path) {
                    mailbox.note_renamed();
                    is_awaited = true;
                }
            }
        }
        if is_close(event.kind) {
            waiting(&watched.main_files, path).for_each(|mailbox| mailbox.note_closed());
            continue;
        }
        for mailbox in waiting(&watched.main_files, path) {
            mailbox.wake_at_once();
            is_awaited = true;
        }
        for mailbox in waiting(&watched.wals, path) {
            mailbox.wake();
            is_awaited = true;
        }
        let directory = path.parent().filter(|_| is_name).and_then(|directory| watched.directories.get(directory));
        if let Some(changed) = directory.and_then(Weak::upgrade) {
            changed.notify_one();
        }
    }
    is_awaited
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Waits on another thread, begun before `wake`; tells whether it was woken, and not by the time that passed.
    fn is_woken(mailbox: &Arc<Mailbox>, wait: impl Fn(&Mailbox) + Send + 'static, wake: impl Fn(&Mailbox)) -> bool {
        let (ended, has_ended) = std::sync::mpsc::channel();
        let waiting = mailbox.clone();
        let thread = std::thread::spawn(move || {
            wait(&waiting);
            ended.send(()).unwrap();
        });
        std::thread::sleep(Duration::from_millis(30));
        wake(mailbox);
        let is_woken = has_ended.recv_timeout(Duration::from_millis(500)).is_ok();
        mailbox.send(Event::Stop);
        thread.join().unwrap();
        mailbox.wait(Duration::ZERO);
        is_woken
    }

    #[test]
    fn every_wake_ends_a_wait_and_urgent_ones_a_pause() {
        let mailbox = Arc::new(Mailbox::default());
        let wait = |mailbox: &Mailbox| drop(mailbox.wait(LONG));
        let pause = |mailbox: &Mailbox| mailbox.pause(LONG, true);
        for _ in 0..2 {
            assert!(is_woken(&mailbox, wait, Mailbox::wake));
            assert!(is_woken(&mailbox, wait, Mailbox::wake_at_once));
            assert!(is_woken(&mailbox, wait, Mailbox::wake_at_once));
            assert!(!is_woken(&mailbox, pause, Mailbox::wake));
            assert!(is_woken(&mailbox, pause, Mailbox::wake_at_once));
        }
        assert_eq!(mailbox.wait(Duration::ZERO).0, Changed::Nothing);
        mailbox.wake();
        mailbox.pause(Duration::from_millis(1), true);
        assert_eq!(mailbox.wait(LONG).0, Changed::Wal, "what came during a pause is known after it");
        mailbox.wake_at_once();
        mailbox.pause(LONG, true);
        assert_eq!(mailbox.wait(LONG).0, Changed::Main);
    }
}
