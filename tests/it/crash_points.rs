//! The daemon is killed before each system call that changes a file or sends something, one after another, in a scenario that has all it
//! does: first snapshot, segments, checkpoints, another snapshot, merges, the stop. The application writes on, the daemon is started
//! again; then every state that was ever confirmed is restored and compared with what the application had.
//!
//! `cargo test` tries a few calls, `WALTRAIL_CRASH_POINTS=n` so many, spread over all, `WALTRAIL_CRASH_POINTS=all` every one,
//! and `WALTRAIL_CRASH_POINT=n` only the n-th.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use waltrail::clock::{Clock, SystemClock};
use waltrail::format::Position;
use waltrail::format::key::SegmentKey;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::plan::{Target, plan};
use waltrail::store::SharedStore;
use waltrail::store::directory::DirectoryStore;
use waltrail::verify::Depth;

use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::syscalls::{CHANGES, Call, Verdict};
use crate::support::{Daemon, content, open, run, stderr, wait_for};
use crate::verify::check_sound;

/// Scenarios that run at the same time: they mostly wait.
const AT_A_TIME: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Replica {
    Directory,
    S3,
}

pub struct Play {
    pub scene: Scene,
    server: Option<S3Server>,
    replica: String,
    application: Connection,
    n: i64,
    /// What the application had at each commit since the last sync.
    pub commits: Vec<Vec<String>>,
    /// Whether the daemon has seen each of them as one.
    pub sees_all: bool,
    pub confirmed: BTreeMap<Position, Vec<String>>,
}

impl Play {
    pub fn new(replica: Replica) -> Self {
        let scene = Scene::new();
        let server = (replica == Replica::S3).then(S3Server::start);
        let replica = server.as_ref().map_or_else(|| scene.replica(), |server| server.url("app"));
        let text = format!(
            "[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\nsync-interval = \"10ms\"\npoll-interval = \"50ms\"\n\
             checkpoint-threshold = \"60KB\"\nmerge = [\"150ms\", \"600ms\"]\n",
            scene.database().display(),
        );
        std::fs::write(scene.path("waltrail.toml"), text).unwrap();
        let application = open(&scene.database());
        application
            .execute_batch(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0;
                 CREATE TABLE item(id INTEGER PRIMARY KEY, body TEXT, hash TEXT);
                 CREATE INDEX item_hash ON item(hash);",
            )
            .unwrap();
        let (commits, confirmed) = (Vec::new(), BTreeMap::new());
        Self { scene, server, replica, application, n: 0, commits, sees_all: false, confirmed }
    }

    pub fn arguments(&self) -> [String; 2] {
        ["--config".into(), self.scene.path("waltrail.toml").display().to_string()]
    }

    /// One transaction, whose content follows from its number.
    pub fn commit(&mut self) {
        self.n += 1;
        let n = self.n;
        let delete = if n % 5 == 0 { "DELETE FROM item WHERE id % 3 = 0;" } else { "" };
        let sql = format!(
            "BEGIN; {delete}
             INSERT OR REPLACE INTO item SELECT value % 60, printf('%.400c', char(65 + {n} % 26)) || {n}, value * 7919 % 1000 || '-{n}'
                FROM (WITH RECURSIVE c(value) AS (SELECT {n} * 11 UNION ALL SELECT value + 1 FROM c WHERE value < {n} * 11 + 9)
                      SELECT value FROM c);
             COMMIT"
        );
        self.change(&sql);
    }

    pub fn change(&mut self, sql: &str) {
        self.application.execute_batch(sql).unwrap();
        self.note();
    }

    fn note(&mut self) {
        self.commits.push(content(&self.scene.database()));
    }

    pub fn checkpoint(&self, mode: &str) {
        self.application.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(())).unwrap();
    }

    fn vacuum(&mut self) {
        self.change("VACUUM");
    }

    /// Asks until it is done, or the daemon is dead: then `None`.
    pub fn sync(&mut self, daemon: &mut Daemon) -> Option<()> {
        let database = self.scene.database().display().to_string();
        let done = loop {
            let done = run(["sync", &database, "--timeout", "20s"]);
            if done.status.success() {
                break done;
            }
            if !daemon.is_running() {
                return None;
            }
            let said = stderr(&done);
            let is_early =
                ["no daemon follows", "broke", "not followed just now"].iter().any(|words| said.contains(words));
            assert!(is_early, "{said}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let said = stderr(&done);
        let numbers: Vec<u64> = said.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        let position = Position { txid: numbers[0], epoch: numbers[1] as u32 };
        let commits = std::mem::take(&mut self.commits);
        let known = if self.sees_all { commits.len() } else { 0 };
        for (before, content) in commits.into_iter().rev().take(known).enumerate() {
            self.confirmed.insert(Position { txid: position.txid - before as u64, ..position }, content);
        }
        // Nothing was written meanwhile.
        self.confirmed.insert(position, content(&self.scene.database()));
        self.sees_all = true;
        Some(())
    }

    /// All that the daemon does; `None` when it has died on the way.
    pub fn act(&mut self, daemon: &mut Daemon) -> Option<()> {
        self.commit();
        self.sync(daemon)?;
        for round in 0..4 {
            self.commit();
            self.commit();
            self.sync(daemon)?;
            if round == 1 {
                self.checkpoint("TRUNCATE");
            }
            // So that windows of merges end.
            std::thread::sleep(Duration::from_millis(60));
        }
        let database = self.scene.database().display().to_string();
        if !run(["snapshot", &database]).status.success() {
            return None;
        }
        // Enough for a barrier.
        for _ in 0..6 {
            self.commit();
        }
        self.sync(daemon)?;
        self.change("DELETE FROM item WHERE id > 20");
        self.vacuum();
        self.sync(daemon)?;
        std::thread::sleep(Duration::from_millis(600));
        self.commit();
        self.sync(daemon)?;
        std::thread::sleep(Duration::from_millis(100));
        Some(())
    }

    /// What the application does while nobody watches, in one of four ways.
    fn write_on(&mut self, way: u64) {
        match way % 4 {
            0 => {}
            1 => self.checkpoint("TRUNCATE"),
            2 => self.vacuum(),
            _ => {
                // The last connection: SQLite takes the WAL away.
                self.application = Connection::open_in_memory().unwrap();
                self.application = open(&self.scene.database());
            }
        }
        self.commit();
        self.commit();
    }

    /// What a start found, from what it logged.
    pub fn start_told(log: &str) -> &'static str {
        let starts = [
            ("nothing was missed", "resume"),
            ("recorded as one transaction", "delta"),
            ("continues=false", "re-anchor"),
        ];
        starts.iter().rev().find(|(words, _)| log.contains(words)).map_or("?", |(_, start)| start)
    }

    pub fn check(&self, case: &str) {
        let log = self.scene.log();
        let root = self.server.as_ref().map_or_else(|| self.scene.path("replica"), |server| server.path("app"));
        let store: SharedStore = Arc::new(DirectoryStore::new(root));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for (position, expected) in &self.confirmed {
            let restored = runtime.block_on(restore(&store, *position, &self.scene.path("state.db")));
            restored.unwrap_or_else(|error| panic!("{case}: {position}: {error}\n{log}"));
            assert!(content(&self.scene.path("state.db")) == *expected, "{case}: {position} is restored wrong\n{log}");
        }
        // Nothing stands behind a gap.
        let mut reached = BTreeMap::<u32, u64>::new();
        for object in runtime.block_on(store.list("log/", None)).unwrap() {
            let Some(SegmentKey(span)) = SegmentKey::parse(&object.key) else { continue };
            let last_txid = reached.entry(span.epoch).or_insert(span.first_txid - 1);
            assert!(span.first_txid <= *last_txid + 1, "{case}: {} stands behind a gap\n{log}", object.key);
            *last_txid = span.last_txid.max(*last_txid);
        }
        let now_ms = SystemClock::new().now_ms();
        let sound = runtime.block_on(check_sound(&store, Depth::Drill, 1, now_ms));
        sound.unwrap_or_else(|found| panic!("{case}: {found}\n{log}"));
        let newest = content(&self.scene.restored(&self.replica, &[]));
        assert!(newest == content(&self.scene.database()), "{case}: the newest state is restored wrong\n{log}");
    }
}

/// A segment has its name in the spool, and the state that tells of it is not saved: it was never shipped. It is captured again, and
/// the epoch goes on as if it had not been.
#[test]
fn a_segment_that_the_state_does_not_tell_of() {
    let mut play = Play::new(Replica::Directory);
    let is_armed = Arc::new(AtomicBool::new(false));
    let kills = is_armed.clone();
    let arguments = play.arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start_under(&arguments, &play.scene.path("daemon.log"), CHANGES, move |call| {
        let saves = kills.load(Ordering::SeqCst) && call.creates() && call.paths()[0].ends_with("state.new");
        if saves { Verdict::Kills } else { Verdict::Goes }
    });
    play.commit();
    play.sync(&mut daemon).unwrap();
    is_armed.store(true, Ordering::SeqCst);
    play.commit();
    wait_for("the crash", || (!daemon.is_running()).then_some(()));
    play.sees_all = false;
    let spool = play.scene.path(".app.db-waltrail/spool");
    let waits =
        || std::fs::read_dir(&spool).unwrap().any(|it| it.unwrap().file_name().to_string_lossy().starts_with("log."));
    assert!(waits(), "it was killed elsewhere\n{}", play.scene.log());
    let mut daemon = play.scene.start_with(&arguments);
    play.sync(&mut daemon).unwrap();
    play.commit();
    play.sync(&mut daemon).unwrap();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    let claims: Vec<bool> = play
        .scene
        .log()
        .lines()
        .filter(|line| line.contains("epoch claimed"))
        .map(|line| line.contains("continues=true"))
        .collect();
    assert_eq!(claims, [false, true], "{}", play.scene.log());
    play.check("a segment that the state does not tell of");
}

async fn restore(store: &SharedStore, position: Position, path: &Path) -> Result<(), waltrail::restore::RestoreError> {
    let history = History::load(store).await?;
    let plan = plan(store, &history, Target::Txid(position.txid), Some(position.epoch)).await?;
    let file = std::fs::File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
    execute(store, &plan, file, path).await.map(drop)
}

/// Whether it is one of the calls that are counted: files of the scene, and connections.
fn counts(call: &Call, scene: &Path) -> bool {
    let is_opened_for_reading = call.number == libc::SYS_openat && !call.creates();
    let is_ours = |path: &Path| {
        (path.starts_with(scene) && path.file_name().is_some_and(|name| name != "daemon.log"))
            || path.display().to_string().starts_with("socket:")
    };
    !is_opened_for_reading && call.paths().iter().any(|path| is_ours(path))
}

/// How it went.
struct Told {
    /// So many calls were counted.
    calls: u64,
    /// Whether it was killed: a point near the end may not be reached every time.
    is_killed: bool,
    /// What the second start found.
    start: &'static str,
}

/// Plays it, with the daemon killed before its `kill_at`-th call, or not at all.
fn play(replica: Replica, kill_at: Option<u64>) -> Told {
    let case = format!("{replica:?}, killed before call {kill_at:?}");
    let mut play = Play::new(replica);
    let (arguments, log) = (play.arguments(), play.scene.path("daemon.log"));
    let arguments = [arguments[0].as_str(), arguments[1].as_str()];
    let (calls, root) = (Arc::new(AtomicU64::new(0)), play.scene.directory.path().to_owned());
    let counted = calls.clone();
    let decide = move |call: &Call| {
        if !counts(call, &root) {
            return Verdict::Goes;
        }
        let is_due = Some(counted.fetch_add(1, Ordering::SeqCst) + 1) == kill_at;
        if is_due { Verdict::Kills } else { Verdict::Goes }
    };
    let mut daemon = Daemon::start_under(&arguments, &log, CHANGES, decide);
    let has_acted = play.act(&mut daemon).is_some();
    let code = daemon.terminate();
    match kill_at {
        None => assert!(has_acted && code == Some(0), "{case}: {code:?}\n{}", play.scene.log()),
        Some(_) => assert!(code.is_none() || (has_acted && code == Some(0)), "{case}: {code:?}\n{}", play.scene.log()),
    }
    let said_before = play.scene.log().len();
    play.sees_all = false;
    play.write_on(kill_at.unwrap_or(0));
    let mut daemon = Daemon::start(&arguments, &log);
    play.sync(&mut daemon).unwrap_or_else(|| panic!("{case}: died\n{}", play.scene.log()));
    play.commit();
    play.sync(&mut daemon).unwrap_or_else(|| panic!("{case}: died\n{}", play.scene.log()));
    assert_eq!(daemon.terminate(), Some(0), "{case}\n{}", play.scene.log());
    play.check(&case);
    let said = play.scene.log().split_off(said_before);
    let start = Play::start_told(&said);
    Told { calls: calls.load(Ordering::SeqCst), is_killed: code.is_none(), start }
}

fn play_all(replica: Replica, usual: u64) {
    let variable = |name: &str| std::env::var(name).ok();
    if let Some(point) = variable("WALTRAIL_CRASH_POINT") {
        play(replica, Some(point.parse().unwrap()));
        return;
    }
    let whole = play(replica, None).calls;
    let count = match variable("WALTRAIL_CRASH_POINTS").as_deref() {
        Some("all") => whole,
        Some(count) => count.parse().unwrap(),
        None => usual,
    };
    // In the middle of as many equal parts.
    let points: Vec<u64> = (0..count).map(|index| 1 + (2 * index + 1) * whole / (2 * count)).collect();
    let (next, kills, starts) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(BTreeMap::<&str, u32>::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(&point) = points.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let told = play(replica, Some(point));
                    kills.fetch_add(u64::from(told.is_killed), Ordering::SeqCst);
                    *starts.lock().unwrap_or_else(PoisonError::into_inner).entry(told.start).or_default() += 1;
                }
            });
        }
    });
    let starts = starts.into_inner().unwrap_or_else(PoisonError::into_inner);
    let kills = kills.into_inner();
    println!("{replica:?}: {kills} kills, at {count} of {whole} calls; the starts after it: {starts:?}");
    assert!(whole > 100 && kills * 2 > count, "too few calls are counted, or too few are reached");
}

#[test]
fn killed_before_any_file_operation() {
    play_all(Replica::Directory, 12);
}

#[test]
fn killed_before_any_request() {
    play_all(Replica::S3, 8);
}
