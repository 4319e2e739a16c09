//! A machine under our thumb: real SQLite, the real parts of the daemon, a store in memory, and a clock that only moves when
//! it is told to. The daemon takes its turns in the test's own thread, so it can be crashed between any two of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use waltrail::clock::Clock;
use waltrail::format::Position;
use waltrail::format::key::SnapshotKey;
use waltrail::replicate::claim::{list_claims, records};
use waltrail::replicate::control::State;
use waltrail::replicate::database::{DatabaseError, DatabaseSettings, Following, Surroundings};
use waltrail::replicate::forget;
use waltrail::replicate::handover::{Handover, Restored};
use waltrail::replicate::merge::MergeSettings;
use waltrail::replicate::merger::Merger;
use waltrail::replicate::neighbours::Neighbourhoods;
use waltrail::replicate::rest::{Openings, Rested};
use waltrail::replicate::ship::{Progress, ShipError, Shipper};
use waltrail::replicate::snapshots::SnapshotNote;
use waltrail::replicate::spool::Spool;
use waltrail::replicate::state::StateDirectory;
use waltrail::replicate::status::{Board, Status};
use waltrail::replicate::wake::{Event, Mailbox};
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::install::{Incoming, Manner};
use waltrail::restore::plan::{Plan, Target, plan};
use waltrail::restore::tail::read_snapshot_tail;
use waltrail::retain::marks::set_mark;
use waltrail::retain::prune::{Outcome, prune};
use waltrail::retain::tails::TailCache;
use waltrail::retain::{Now, RetainError, RetentionSettings};
use waltrail::sqlite::SqliteError;
use waltrail::store::memory::MemoryStore;
use waltrail::store::{ObjectInfo, PutMode, SharedStore};

use super::gate::Gate;

/// When files that nobody writes to were last written, in seconds since 1970.
const DATED_BACK_S: u64 = 1_000_000_000;
const BEGINNING_MS: u64 = 1_790_000_000_000;

/// Time in milliseconds since the machine was made; names in the order in which they are asked for.
#[derive(Debug, Default)]
pub struct ManualClock {
    passed_ms: AtomicU64,
    /// How far the wall clock is ahead of the true time.
    ahead_ms: AtomicI64,
    latest_ms: AtomicU64,
    names: AtomicU64,
    boots: AtomicU64,
}

impl ManualClock {
    pub fn advance(&self, time: Duration) {
        self.passed_ms.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }

    /// What the time is everywhere else.
    pub fn true_ms(&self) -> u64 {
        BEGINNING_MS + self.passed_ms.load(Ordering::SeqCst)
    }

    /// The latest time that anybody was told.
    pub fn latest_ms(&self) -> u64 {
        self.latest_ms.load(Ordering::SeqCst).max(self.now_ms())
    }

    /// The machine boots again: what was not synced may be lost.
    pub fn reboot(&self) {
        self.boots.fetch_add(1, Ordering::SeqCst);
    }

    /// Somebody sets the clock.
    pub fn jump(&self, ms: i64) {
        self.ahead_ms.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> u64 {
        let now_ms = self.true_ms().saturating_add_signed(self.ahead_ms.load(Ordering::SeqCst));
        self.latest_ms.fetch_max(now_ms, Ordering::SeqCst);
        now_ms
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.passed_ms.load(Ordering::SeqCst))
    }

    /// Files are dated by the real clock, which no seed rules. Only those that [`Machine::rest`] dates back lie before this.
    fn file_time_ms(&self) -> u64 {
        DATED_BACK_S * 1000 + 1000
    }

    fn random_id(&self) -> Result<[u8; 16], getrandom::Error> {
        Ok(u128::from(self.names.fetch_add(1, Ordering::SeqCst)).to_be_bytes())
    }

    fn boot_id(&self) -> Option<String> {
        Some(format!("boot {}", self.boots.load(Ordering::SeqCst)))
    }
}

/// The daemon's parts, as `waltrail replicate` puts them together.
struct Daemon {
    /// `None` while it rests.
    following: Option<Following>,
    rested: Option<Box<Rested>>,
    around: Box<dyn Fn() -> Surroundings>,
    directory: Arc<StateDirectory>,
    mailbox: Arc<Mailbox>,
    confirmed: watch::Receiver<u64>,
    board: Arc<Board>,
    shipping: JoinHandle<Result<(), ShipError>>,
    runtime: Runtime,
}

/// One state that was confirmed.
#[derive(Debug, Clone)]
pub struct Known {
    /// When it was committed, by the machine's clock.
    pub committed_ms: u64,
    pub bytes: Arc<Vec<u8>>,
}

pub struct Machine {
    pub directory: tempfile::TempDir,
    pub clock: Arc<ManualClock>,
    /// What the store holds, without faults.
    pub memory: SharedStore,
    bare: Arc<MemoryStore>,
    /// What the daemon sees of it.
    pub store: SharedStore,
    pub gate: Arc<Gate>,
    pub application: Option<Connection>,
    pub settings: DatabaseSettings,
    pub merge: MergeSettings,
    daemon: Option<Daemon>,
    /// Every state that was confirmed and whose number is known.
    pub states: BTreeMap<Position, Known>,
    pub newest: Option<Position>,
    /// Images and times of the commits since the last sync, while the daemon sees each of them.
    commits: Vec<Known>,
    pub sees_all: bool,
    /// Whether a start may have left the newest state's line.
    started_since_sync: bool,
    /// States that have a name in the replica.
    pub marked: BTreeSet<Position>,
    /// Objects are pruned to this window.
    pub window: Duration,
    /// The epoch that its daemon claimed last.
    epoch: u32,
    /// How often its spool was full.
    pub spools_dropped: u32,
    /// How often its daemon ended because another one had taken over.
    pub replaced: u32,
}

/// What several machines can share.
struct Storage {
    store: SharedStore,
    gate: Arc<Gate>,
    memory: SharedStore,
    bare: Arc<MemoryStore>,
    clock: Arc<ManualClock>,
}

impl Machine {
    fn of(directory: tempfile::TempDir, settings: DatabaseSettings, merge: MergeSettings, storage: Storage) -> Self {
        let Storage { store, gate, memory, bare, clock } = storage;
        Self {
            directory,
            clock,
            memory,
            bare,
            store,
            gate,
            application: None,
            settings,
            merge,
            daemon: None,
            states: BTreeMap::new(),
            newest: None,
            commits: Vec::new(),
            sees_all: false,
            started_since_sync: false,
            marked: BTreeSet::new(),
            window: Duration::from_secs(2 * 86_400),
            epoch: 0,
            spools_dropped: 0,
            replaced: 0,
        }
    }

    pub fn new(pragmas: &str, stack: impl Fn(SharedStore) -> SharedStore) -> Self {
        let directory = scratch();
        let bare = Arc::new(MemoryStore::new());
        bare.set_now_ms(BEGINNING_MS);
        let memory: SharedStore = bare.clone();
        let path = directory.path().join("app.db");
        let settings = DatabaseSettings {
            path,
            sync_interval: Duration::from_secs(1),
            poll_interval: Duration::from_secs(1),
            checkpoint_threshold_bytes: 64 << 10,
            spool_limit_bytes: 4 << 20,
            snapshot_interval: Duration::from_secs(86_400),
        };
        let windows = vec![Duration::from_secs(60), Duration::from_secs(3600)];
        let merge = MergeSettings { windows, kept_limit_bytes: 1 << 20 };
        let gate = Gate::new(stack(memory.clone()));
        let store: SharedStore = gate.clone();
        let mut machine =
            Self::of(directory, settings, merge, Storage { store, gate, memory, bare, clock: Arc::default() });
        machine.open_application();
        let setup =
            format!("{pragmas}; PRAGMA journal_mode=WAL; CREATE TABLE item(id INTEGER PRIMARY KEY, body BLOB, n INT)");
        machine.application().execute_batch(&setup).unwrap();
        machine
    }

    /// What a cloned virtual machine is: the same files, the same state, the same store and time. The daemon is not running there.
    pub fn cloned(&self) -> Self {
        let directory = scratch();
        let path = directory.path().join("app.db");
        for suffix in ["", "-wal"] {
            let from = format!("{}{suffix}", self.database().display());
            if Path::new(&from).exists() {
                std::fs::copy(from, format!("{}{suffix}", path.display())).unwrap();
            }
        }
        if self.state_dir().exists() {
            let copied = Command::new("cp").arg("-r").arg(self.state_dir()).arg(directory.path()).status().unwrap();
            assert!(copied.success());
        }
        let settings = DatabaseSettings { path, ..self.settings.clone() };
        let (store, memory, bare) = (self.store.clone(), self.memory.clone(), self.bare.clone());
        let storage = Storage { store, gate: self.gate.clone(), memory, bare, clock: self.clock.clone() };
        let mut clone = Self::of(directory, settings, self.merge.clone(), storage);
        clone.window = self.window;
        clone.open_application();
        clone
    }

    pub fn database(&self) -> PathBuf {
        self.settings.path.clone()
    }

    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    pub fn open_application(&mut self) {
        let connection = Connection::open(self.database()).unwrap();
        connection.busy_timeout(Duration::from_secs(1)).unwrap();
        connection.execute_batch("PRAGMA synchronous=OFF").unwrap();
        self.application = Some(connection);
    }

    pub fn application(&self) -> &Connection {
        self.application.as_ref().unwrap()
    }

    /// What the database is now, byte for byte, as a checkpoint would leave it.
    pub fn image(&self) -> Vec<u8> {
        let scratch = scratch();
        let copy = scratch.path().join("copy.db");
        std::fs::copy(self.database(), &copy).unwrap();
        let wal = format!("{}-wal", self.database().display());
        if Path::new(&wal).exists() {
            std::fs::copy(wal, scratch.path().join("copy.db-wal")).unwrap();
        }
        let connection = Connection::open(&copy).unwrap();
        connection.execute_batch("PRAGMA synchronous=OFF").unwrap();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        drop(connection);
        std::fs::read(copy).unwrap()
    }

    /// One transaction of the application.
    pub fn commit(&mut self, sql: &str) {
        self.application().execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        let bytes = Arc::new(self.image());
        self.commits.push(Known { committed_ms: self.clock.now_ms(), bytes });
    }

    /// Time passes, here and at the store.
    pub fn pass(&self, time: Duration) {
        self.clock.advance(time);
        self.bare.set_now_ms(self.clock.true_ms());
    }

    pub fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    pub fn start(&mut self) {
        assert!(self.daemon.is_none());
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let guard = runtime.enter();
        let directory = Arc::new(StateDirectory::open(&self.state_dir()).unwrap());
        let (mailbox, progress) = (Arc::new(Mailbox::default()), Arc::new(Progress::default()));
        let (jobs, queue) = mpsc::unbounded_channel();
        let spool = Spool::new(directory.spool_path());
        let clock: Arc<dyn Clock> = self.clock.clone();
        let openings = Arc::new(Openings::new(0));
        let (permits, neighbourhoods) = (Arc::new(Semaphore::new(1)), Neighbourhoods::default());
        let (settings, told, seen, time) = (self.settings.clone(), mailbox.clone(), progress.clone(), clock.clone());
        let around = move || Surroundings {
            settings: settings.clone(),
            mailbox: told.clone(),
            jobs: jobs.clone(),
            progress: seen.clone(),
            clock: time.clone(),
            snapshot_permits: permits.clone(),
            opening: openings.open(true),
            neighbour: neighbourhoods.join(&settings.path, &told),
        };
        let (kept, merging) = mpsc::unbounded_channel();
        let merger = Merger {
            store: self.store.clone(),
            spool: spool.clone(),
            settings: self.merge.clone(),
            permits: Arc::new(Semaphore::new(1)),
        };
        runtime.spawn(merger.run(merging));
        let (confirmed, board) = (progress.confirmed.subscribe(), progress.board.clone());
        let (store, told) = (self.store.clone(), mailbox.clone());
        let shipper = Shipper { store, mailbox: told, progress, clock, spool, kept };
        let shipping = runtime.spawn(shipper.run(queue));
        let following = Some(Following::begin(around(), directory.clone(), None).unwrap());
        drop(guard);
        let around = Box::new(around);
        self.daemon =
            Some(Daemon { following, rested: None, around, directory, mailbox, confirmed, board, shipping, runtime });
        self.sees_all = false;
        self.started_since_sync = true;
    }

    /// What the daemon says of itself.
    pub fn status(&self) -> Status {
        self.daemon.as_ref().unwrap().board.status()
    }

    /// Lets the daemon take so many turns, with storage doing what it can in between.
    pub fn turns(&mut self, turns: usize) {
        for _ in 0..turns {
            self.turn();
        }
    }

    /// Lays the daemon to rest, if it is ready for that; the next turn wakes it. Between the two nobody watches the database.
    pub fn rest(&mut self) -> bool {
        self.turn();
        // As if nobody had written for a while.
        let while_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(DATED_BACK_S);
        let files = ["", "-wal"].map(|suffix| {
            let path = format!("{}{suffix}", self.database().display());
            let file = std::fs::File::options().append(true).open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.set_modified(while_ago).unwrap();
            (file, modified)
        });
        let Some(daemon) = &mut self.daemon else { return false };
        let mut rested = daemon.following.as_mut().unwrap().rest();
        if matches!(rested, Err(DatabaseError::Sqlite(SqliteError::WrittenTo { .. }))) {
            // The daemon, which still follows, finds that the file was only touched.
            self.turn();
            let Some(daemon) = &mut self.daemon else { return false };
            rested = daemon.following.as_mut().unwrap().rest();
        }
        let Some(daemon) = &mut self.daemon else { return false };
        daemon.rested = rested.unwrap().map(Box::new);
        if daemon.rested.is_none() {
            // Who goes on watching would see a file that was written over.
            files.iter().for_each(|(file, modified)| file.set_modified(*modified).unwrap());
            return false;
        }
        daemon.following = None;
        self.sees_all = false;
        true
    }

    /// Does nothing where no daemon runs: it may have been replaced.
    fn turn(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        let rested = daemon.rested.take();
        let following = daemon
            .following
            .get_or_insert_with(|| Following::begin((daemon.around)(), daemon.directory.clone(), rested).unwrap());
        let (_, events) = daemon.mailbox.wait(Duration::ZERO);
        if let Err(error) = following.turn(events) {
            return self.take_up_again(&error);
        }
        settle(&daemon.runtime, &self.gate);
        if let Some(captured) = daemon.board.status().captured {
            self.epoch = captured.position.epoch;
        }
        if daemon.shipping.is_finished() {
            let ended = daemon.runtime.block_on(&mut daemon.shipping).unwrap();
            self.note_replaced(ended);
            self.crash();
        }
    }

    /// As the supervisor does it; that there is no room for more is the only reason.
    fn take_up_again(&mut self, error: &DatabaseError) {
        assert!(matches!(error, DatabaseError::SpoolFull { .. } | DatabaseError::NotClaimed { .. }), "{error}");
        let directory = self.daemon.as_ref().unwrap().directory.clone();
        self.crash();
        forget(&directory, error);
        drop(directory);
        self.spools_dropped += 1;
        self.pass(Duration::from_secs(1));
        self.start();
    }

    /// Another machine's daemon is the only reason for shipping to end.
    fn note_replaced(&mut self, ended: Result<(), ShipError>) {
        let is_replaced = matches!(&ended, Err(ShipError::Replaced { epoch, .. }) if *epoch > self.epoch);
        assert!(is_replaced, "{ended:?}");
        self.replaced += 1;
    }

    /// Takes turns until shipping ends by itself, and gives what it ended with.
    pub fn shipping_error(&mut self) -> ShipError {
        for _ in 0..20_000 {
            let daemon = self.daemon.as_mut().unwrap();
            if daemon.shipping.is_finished() {
                let ended = daemon.runtime.block_on(&mut daemon.shipping).unwrap();
                self.crash();
                return ended.unwrap_err();
            }
            let (_, events) = daemon.mailbox.wait(Duration::ZERO);
            daemon.following.as_mut().unwrap().turn(events).unwrap();
            daemon.runtime.block_on(async { tokio::time::sleep(Duration::from_micros(200)).await });
        }
        panic!("shipping does not end");
    }

    /// Takes turns until `done`; `None` when the daemon was replaced before that.
    fn pump<T>(&mut self, what: &str, mut done: impl FnMut(&mut Daemon) -> Option<T>) -> Option<T> {
        for round in 0..20_000 {
            self.turn();
            let daemon = self.daemon.as_mut()?;
            if let Some(answer) = done(daemon) {
                return Some(answer);
            }
            if round > 20 {
                daemon.runtime.block_on(async { tokio::time::sleep(Duration::from_micros(200)).await });
            }
        }
        panic!("waited too long for {what}");
    }

    /// Waits until everything that was committed is confirmed.
    pub fn ship(&mut self) -> Position {
        self.try_ship().expect("replaced")
    }

    fn try_ship(&mut self) -> Option<Position> {
        let (reply, mut replied) = oneshot::channel();
        self.daemon.as_ref().unwrap().mailbox.send(Event::SyncWanted(reply));
        let State { position, .. } = self.pump("a sync", |_| replied.try_recv().ok())?;
        self.pump("confirmation", |daemon| (*daemon.confirmed.borrow() >= position.txid).then_some(()))?;
        Some(position)
    }

    /// The same, and notes which state is which.
    pub fn sync(&mut self) -> Position {
        self.try_sync().expect("replaced")
    }

    /// The same; `None` when the daemon was replaced before it was done.
    pub fn try_sync(&mut self) -> Option<Position> {
        let position = self.try_ship()?;
        let commits = std::mem::take(&mut self.commits);
        // Each commit was seen, so each has its number; otherwise only the last one is known.
        let known = if self.sees_all { commits.len() } else { 0 };
        let last_ms = commits.last().map_or(0, |known| known.committed_ms);
        for (index, known) in commits.into_iter().rev().take(known).enumerate() {
            let position = Position { txid: position.txid - index as u64, ..position };
            self.states.insert(position, known);
        }
        if !self.states.contains_key(&position) {
            let bytes = Arc::new(self.image());
            self.states.insert(position, Known { committed_ms: last_ms, bytes });
        }
        self.newest = Some(position);
        self.sees_all = true;
        self.started_since_sync = false;
        Some(position)
    }

    /// Has a snapshot made, to its confirmation.
    pub fn snapshot(&mut self) {
        let mut replied = self.ask_snapshot();
        self.pump("a snapshot", |_| match replied.try_recv() {
            Ok(_) => Some(()),
            Err(oneshot::error::TryRecvError::Closed) => Some(()),
            Err(oneshot::error::TryRecvError::Empty) => None,
        });
    }

    fn ask_snapshot(&self) -> oneshot::Receiver<State> {
        let (reply, replied) = oneshot::channel();
        self.daemon.as_ref().unwrap().mailbox.send(Event::SnapshotWanted(reply));
        replied
    }

    /// As SIGTERM does it.
    pub fn stop(&mut self) {
        self.turn();
        let Some(Daemon { following, around, shipping, runtime, .. }) = self.daemon.take() else { return };
        following.unwrap().end().unwrap();
        // With it goes the last one who could give orders.
        drop(around);
        let ended = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), shipping).await });
        let ended = ended.expect("shipping ends").unwrap();
        if ended.is_err() {
            self.note_replaced(ended);
        }
        self.sees_all = false;
    }

    /// As kill -9 does it.
    pub fn crash(&mut self) {
        drop(self.daemon.take());
        self.sees_all = false;
    }

    /// The same, with requests under way, carried out or not: which ones follows from the number.
    pub fn crash_in_requests(&mut self, number: u64) {
        self.gate.set_hanging(Some(number));
        self.turn();
        self.crash();
        self.gate.set_hanging(None);
    }

    pub fn lose_state(&mut self) {
        assert!(self.daemon.is_none());
        std::fs::remove_dir_all(self.state_dir()).ok();
    }

    async fn plan_in(store: &SharedStore, position: Position) -> Plan {
        let history = History::load(store).await.unwrap();
        let target = Target::Txid(position.txid);
        plan(store, &history, target, Some(position.epoch)).await.unwrap_or_else(|error| panic!("{position}: {error}"))
    }

    /// The states that must be restorable: those that came in the window, the newest one if it still was the newest in it, and
    /// those with a mark.
    pub fn kept(&self) -> Vec<Position> {
        // What was let go when the clock stood later does not come back.
        let start_ms = self.clock.latest_ms() - self.window.as_millis() as u64;
        let claims = block_on(list_claims(&self.memory, None)).unwrap();
        // By another machine.
        let is_superseded = records(&claims).next_back().is_some_and(|newest| newest.epoch > self.epoch);
        let is_kept = |(position, known): &(&Position, &Known)| {
            let is_newest = self.newest == Some(**position) && !self.started_since_sync && !is_superseded;
            let is_newest = is_newest && self.commits.first().is_none_or(|next| next.committed_ms >= start_ms);
            known.committed_ms >= start_ms || is_newest || self.marked.contains(position)
        };
        self.states.iter().filter(is_kept).map(|(position, _)| *position).collect()
    }

    /// Gives a state a name, or says why not.
    pub fn mark(&mut self, name: &str, position: Position) -> Result<(), RetainError> {
        let target = Target::Txid(position.txid);
        block_on(set_mark(&self.store, name, target, Some(position.epoch), self.clock.now_ms()))?;
        self.marked.insert(position);
        Ok(())
    }

    /// Lets go what is older than the window.
    pub fn prune(&self, cache: &mut TailCache) -> Result<Outcome, RetainError> {
        let settings =
            RetentionSettings { window_ms: Some(self.window.as_millis() as u64), ..RetentionSettings::default() };
        let now = Now::NotFarBeyondStored(self.clock.now_ms());
        block_on(prune(&self.store, &settings, now, cache, false))
    }

    /// What is in the store.
    pub fn stored(&self) -> Vec<ObjectInfo> {
        block_on(self.memory.list("", None)).unwrap()
    }

    /// Puts an object past the daemon.
    pub fn put(&self, key: &str, body: &'static [u8]) {
        block_on(self.memory.put(key, body.into(), PutMode::Overwrite)).unwrap();
    }

    /// An object's bytes.
    pub fn object(&self, object: &ObjectInfo) -> Vec<u8> {
        block_on(self.memory.get(&object.key, object.len_bytes)).unwrap().to_vec()
    }

    /// The snapshot objects that a restore reads from.
    pub fn sources(&self, plan: &Plan) -> Vec<SnapshotKey> {
        block_on(read_snapshot_tail(&self.memory, &plan.location, &plan.snapshot)).unwrap().sources
    }

    /// The plan of a restore of a state, on the line of its epoch.
    pub fn plan(&self, position: Position) -> Plan {
        block_on(Self::plan_in(&self.memory, position))
    }

    /// Restores a state and compares it, byte for byte.
    pub fn check(&self, position: Position) {
        let known = &self.states[&position];
        let restored = block_on(async {
            let plan = Self::plan_in(&self.memory, position).await;
            let file = tempfile::NamedTempFile::new().unwrap();
            execute(&self.memory, &plan, file.reopen().unwrap(), file.path()).await.unwrap();
            std::fs::read(file.path()).unwrap()
        });
        assert!(restored == *known.bytes, "{position} is restored wrong");
    }

    /// Puts an earlier state in the database's place, as `waltrail restore --force` does, with or without leaving what the next
    /// start goes on from.
    pub fn restore(&mut self, position: Position, leaves_state: bool) {
        assert!(self.daemon.is_none());
        self.application = None;
        let database = self.database();
        block_on(async {
            let history = History::load(&self.memory).await.unwrap();
            let target = Target::Txid(position.txid);
            let plan = plan(&self.memory, &history, target, Some(position.epoch)).await.unwrap();
            let incoming = Incoming::create(&database, Manner { forces: true, ..Manner::default() }).unwrap();
            let done = execute(&self.memory, &plan, incoming.handle().unwrap(), incoming.path()).await.unwrap();
            let handover = Handover::begin(&self.state_dir()).unwrap();
            incoming.install().unwrap();
            if leaves_state {
                let restored = Restored {
                    replica: history.replica.clone(),
                    writer: history.epochs[&plan.position.epoch].record.writer.clone(),
                    position: plan.position,
                    time_ms: plan.time_ms,
                    page_size: plan.page_size,
                    size_pages: plan.size_pages,
                    fingerprint: plan.fingerprint,
                    snapshot: SnapshotNote { begun_ms: plan.time_ms, extents_len_bytes: 0, log_len_bytes: 0 },
                };
                handover.complete(&restored, done.page_hashes, &database, self.clock.as_ref()).unwrap();
            }
        });
        // What was committed since the sync may be in storage, too.
        self.newest = None;
        self.commits.clear();
        self.open_application();
    }
}

/// In memory where that is to be had: nobody waits for a disk then, and no power is cut here.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Lets storage, merges and what else goes on beside the daemon's thread come as far as they come.
fn settle(runtime: &Runtime, gate: &Gate) {
    // More steps than lie between any two requests: reading a file is several of them.
    const STILL_ROUNDS: u32 = 12;
    let mut still = 0;
    while still < STILL_ROUNDS {
        runtime.block_on(async {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            // There is one thread for what blocks, and it takes one after another: what was begun before is done.
            tokio::task::spawn_blocking(|| ()).await.unwrap();
        });
        still = if gate.is_still() { still + 1 } else { 0 };
        if still == 0 {
            // A request is about to be asked again.
            runtime.block_on(async { tokio::time::sleep(Duration::from_micros(200)).await });
        }
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}
