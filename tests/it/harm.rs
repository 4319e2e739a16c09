//! The daemon never harms the application's database. Each test runs an application in its own
//! process and does only what is safe without a daemon. Where that is not obvious, a control round
//! without a daemon runs first.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::Connection;

use crate::support::application::Application;
use crate::support::scene::{Scene, now_ms};
use crate::support::syscalls::{Call, Verdict};
use crate::support::{Daemon, content, number, open, run, stderr, wait_for};

const ROWS: i64 = 2000;

/// A database with an index, all of it in the main file, and nothing beside it.
fn create(path: &Path) {
    let connection = Connection::open(path).unwrap();
    connection
        .execute_batch(
            "PRAGMA journal_mode=WAL;
             CREATE TABLE item(id INTEGER PRIMARY KEY, body BLOB, version INT DEFAULT 0);
             CREATE INDEX item_body ON item(body);
             CREATE TABLE counter(n INT);
             INSERT INTO counter VALUES(0);",
        )
        .unwrap();
    let rows = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
                INSERT INTO item(body) SELECT randomblob(300) FROM c";
    connection.execute(rows, [ROWS]).unwrap();
    drop(connection);
    assert!(!sidecar(path, "-wal").exists());
}

fn sidecar(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len())
}

fn integrity(path: &Path) -> String {
    open(path).query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).unwrap_or_else(|error| error.to_string())
}

fn sync(database: &Path) {
    wait_for("a sync", || run(["sync", database.to_str().unwrap()]).status.success().then_some(()));
}

/// A scene with a database, and a daemon unless it is the control.
fn scene(has_daemon: bool) -> (Scene, Option<Daemon>) {
    let scene = Scene::new();
    create(&scene.database());
    let daemon = has_daemon.then(|| {
        let daemon = scene.start();
        sync(&scene.database());
        daemon
    });
    (scene, daemon)
}

fn end(scene: &Scene, daemon: Option<Daemon>) {
    if let Some(daemon) = daemon {
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(content(&scene.database()), scene.restored_content(&[]), "{}", scene.log());
    }
}

/// After a crash of the application a start script removes `-shm`; the application starts again within the second,
/// commits and checkpoints. The checkpoint changes the main file, and the wal-index that the daemon has open, which is
/// not the one at the path any more, says nothing of it.
#[test]
fn wal_index_removed_after_a_crash_damages_nothing() {
    for has_daemon in [false, true] {
        let (scene, daemon) = scene(has_daemon);
        let mut committed = 0;
        for round in 0..6 {
            let mut application = Application::open(&scene.database());
            application.run("PRAGMA wal_autocheckpoint=0");
            assert_eq!(application.number("SELECT n FROM counter"), committed, "round {round}");
            for burst in [6, 6, 21] {
                for _ in 0..burst {
                    application.run(
                        "BEGIN IMMEDIATE; INSERT INTO item(body) VALUES(randomblob(700));
                         UPDATE counter SET n = n + 1; COMMIT",
                    );
                    committed += 1;
                }
                for _ in 0..20 {
                    application.run("PRAGMA wal_checkpoint(PASSIVE)");
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            std::thread::sleep(Duration::from_millis([0, 50, 200, 500][round % 4]));
            application.kill();
            std::fs::remove_file(sidecar(&scene.database(), "-shm")).ok();
        }
        let mut application = Application::open(&scene.database());
        assert_eq!(application.number("SELECT n FROM counter"), committed);
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok");
        application.close();
        end(&scene, daemon);
    }
}

/// `-shm` is removed, or the database is renamed over, while the application runs: it goes on alone with the file that it
/// has open, which is safe as long as nobody connects by the path. The daemon leaves, says so, and comes back when the
/// application has ended.
#[test]
fn database_that_an_application_uses_by_removed_files_is_left_alone() {
    for is_renamed_over in [false, true] {
        let (scene, daemon) = scene(true);
        scene.expect_error("with a file that was removed or replaced since");
        scene.allow_error("it was set aside");
        let mut application = Application::open(&scene.database());
        application.run("UPDATE counter SET n = 1");
        sync(&scene.database());
        if is_renamed_over {
            create(&scene.path("new.db"));
            std::fs::rename(scene.path("new.db"), scene.database()).unwrap();
        } else {
            std::fs::remove_file(sidecar(&scene.database(), "-shm")).unwrap();
        }
        let bytes = std::fs::read(scene.database()).unwrap();
        wait_for("an ERROR", || scene.log().contains("with a file that was removed").then_some(()));
        for _ in 0..100 {
            application.run("UPDATE counter SET n = n + 1; INSERT INTO item(body) VALUES(randomblob(3000))");
        }
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok");
        if is_renamed_over {
            assert!(std::fs::read(scene.database()).unwrap() == bytes, "the new database was written to");
        }
        application.close();
        let expected = if is_renamed_over { 0 } else { 101 };
        sync(&scene.database());
        assert_eq!(number(&open(&scene.database()), "SELECT n FROM counter"), expected, "{}", scene.log());
        assert_eq!(integrity(&scene.database()), "ok");
        end(&scene, daemon);
    }
}

/// After a crash a start script removes `-wal` and `-shm`, "stale files", and starts the application again. That costs
/// the commits of the WAL; the daemon must not checkpoint them into the file that the application goes on with.
#[test]
fn wal_and_index_removed_after_a_crash_damage_nothing() {
    for round in 0..4_u64 {
        let (scene, daemon) = scene(true);
        std::thread::sleep(Duration::from_millis(900 + 130 * round));
        let mut application = Application::open(&scene.database());
        application.run(
            "BEGIN; DELETE FROM item WHERE id % 3 = 0;
             INSERT INTO item(body) SELECT randomblob(500) FROM item LIMIT 900; COMMIT",
        );
        std::thread::sleep(Duration::from_millis(400));
        application.kill();
        for suffix in ["-wal", "-shm"] {
            std::fs::remove_file(sidecar(&scene.database(), suffix)).ok();
        }
        let mut application = Application::open(&scene.database());
        let rows = application.number("SELECT count(*) FROM item");
        for _ in 0..40 {
            application.run("INSERT INTO item(body) VALUES(randomblob(400))");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(application.number("SELECT count(*) FROM item"), rows + 40);
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok", "{}", scene.log());
        application.close();
        end(&scene, daemon);
    }
}

/// After a crash `-wal` alone is removed. Without a daemon the wal-index dies with the application, and is made anew; one
/// that a daemon keeps says that there are frames, which are not there.
#[test]
fn wal_removed_after_a_crash_fails_no_statement() {
    for has_daemon in [false, true] {
        let (scene, daemon) = scene(has_daemon);
        let mut application = Application::open(&scene.database());
        application.run("UPDATE item SET body = randomblob(300) WHERE id < 200");
        application.kill();
        std::fs::remove_file(sidecar(&scene.database(), "-wal")).ok();
        std::thread::sleep(Duration::from_millis(200));
        let mut application = Application::open(&scene.database());
        for _ in 0..20 {
            let done = application.try_run("INSERT INTO item(body) VALUES(randomblob(400))");
            assert_eq!(done, Ok(String::new()), "with a daemon: {has_daemon}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok");
        application.close();
        end(&scene, daemon);
    }
}

/// The application ends cleanly, an operator renames another database over it, and the application starts again.
#[test]
fn database_renamed_into_place_after_a_clean_stop_stays_as_it_is() {
    for (quiet_ms, until_start_ms) in [(2500, 3000), (100, 0), (100, 1500)] {
        let (scene, daemon) = scene(true);
        create(&scene.path("new.db"));
        let new = content(&scene.path("new.db"));
        let bytes = std::fs::read(scene.path("new.db")).unwrap();
        let mut application = Application::open(&scene.database());
        application.run("UPDATE item SET body = randomblob(300) WHERE id < 400");
        application.close();
        std::thread::sleep(Duration::from_millis(quiet_ms));
        std::fs::rename(scene.path("new.db"), scene.database()).unwrap();
        std::thread::sleep(Duration::from_millis(until_start_ms));
        let case = format!("{quiet_ms} {until_start_ms}\n{}", scene.log());
        assert!(std::fs::read(scene.database()).unwrap() == bytes, "written to before anybody opened it: {case}");
        let case = format!("{case}\n{} bytes of WAL", scene.wal_len());
        let mut application = Application::open(&scene.database());
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok", "{case}");
        application.run("UPDATE counter SET n = 77");
        sync(&scene.database());
        assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), "SELECT n FROM counter"), 77, "{case}");
        application.run("UPDATE counter SET n = 0");
        application.close();
        assert_eq!(content(&scene.database()), new, "{case}");
        end(&scene, daemon);
    }
}

/// The application ends cleanly, and an operator copies a backup over the database, which keeps its inode.
#[test]
fn backup_copied_into_place_after_a_clean_stop_is_what_the_application_finds() {
    for pause_ms in [50, 150, 700, 2500] {
        let (scene, daemon) = scene(true);
        std::thread::sleep(Duration::from_millis(1200));
        scene.copy("app.db", "backup.db");
        let backup = content(&scene.path("backup.db"));
        let mut application = Application::open(&scene.database());
        application.run("UPDATE item SET body = randomblob(300) WHERE id < 400");
        application.close();
        std::thread::sleep(Duration::from_millis(pause_ms));
        scene.allow_error("it was set aside");
        scene.copy("backup.db", "app.db");
        std::thread::sleep(Duration::from_millis(1500));
        let mut application = Application::open(&scene.database());
        assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok", "{pause_ms}\n{}", scene.log());
        application.close();
        assert_eq!(content(&scene.database()), backup, "{pause_ms}\n{}", scene.log());
        end(&scene, daemon);
    }
}

/// Application and daemon end, in whatever order: the main file alone is the whole database, as after any last close.
#[test]
fn main_file_alone_is_complete_after_the_last_close() {
    for ends_first in ["application", "daemon", "application killed"] {
        let (scene, daemon) = scene(true);
        let mut application = Application::open(&scene.database());
        application.run("PRAGMA synchronous=NORMAL; CREATE TABLE late(n); INSERT INTO late VALUES(1)");
        match ends_first {
            "application" => application.close(),
            "daemon" => {
                assert_eq!(daemon.unwrap().terminate(), Some(0), "{}", scene.log());
                application.close();
                assert!(!sidecar(&scene.database(), "-wal").exists());
                continue;
            }
            _ => application.kill(),
        }
        // The daemon that goes on does what the last close would have done.
        wait_for("an empty WAL", || (scene.wal_len() == 0).then_some(()));
        scene.copy("app.db", "alone.db");
        assert_eq!(number(&open(&scene.path("alone.db")), "SELECT n FROM late"), 1);
        let mut application = Application::open(&scene.database());
        application.run("INSERT INTO late VALUES(2)");
        application.close();
        assert_eq!(daemon.unwrap().terminate(), Some(0), "{}", scene.log());
        assert!(!sidecar(&scene.database(), "-wal").exists() && !sidecar(&scene.database(), "-shm").exists());
        scene.copy("app.db", "alone.db");
        assert_eq!(number(&open(&scene.path("alone.db")), "SELECT sum(n) FROM late"), 3);
        // A start after it has nothing to compare and nothing to upload.
        let (before, said) = (scene.objects("log"), scene.log().len());
        let daemon = scene.start();
        sync(&scene.database());
        assert_eq!(scene.objects("log"), before);
        assert!(scene.log()[said..].contains("is_untouched=true"), "{}", scene.log());
        end(&scene, Some(daemon));
    }
}

/// Daemon and application are killed, and another database is renamed over the old one, whose WAL is left. The WAL goes
/// aside. A copy of the database together with its WAL has another inode, too, and keeps it.
#[test]
fn wal_of_a_replaced_database_is_set_aside_and_that_of_a_copy_is_not() {
    for is_copy in [false, true] {
        let (scene, daemon) = scene(true);
        let mut application = Application::open(&scene.database());
        application.run("UPDATE item SET body = randomblob(300) WHERE id < 400; UPDATE counter SET n = 5");
        sync(&scene.database());
        daemon.unwrap().kill();
        application.run("UPDATE counter SET n = 6");
        application.kill();
        assert!(scene.wal_len() > 0);
        if is_copy {
            scene.copy("app.db", "new.db");
        } else {
            create(&scene.path("new.db"));
            scene.expect_error("it was set aside");
        }
        let bytes = std::fs::read(scene.path("new.db")).unwrap();
        std::fs::rename(scene.path("new.db"), scene.database()).unwrap();
        std::fs::remove_file(sidecar(&scene.database(), "-shm")).ok();
        let daemon = scene.start();
        sync(&scene.database());
        assert_eq!(sidecar(&scene.database(), "-wal.set-aside-1").exists(), !is_copy, "{}", scene.log());
        assert_eq!(std::fs::read(scene.database()).unwrap() == bytes, !is_copy);
        assert_eq!(integrity(&scene.database()), "ok");
        let expected = if is_copy { 6 } else { 0 };
        assert_eq!(number(&open(&scene.database()), "SELECT n FROM counter"), expected, "{}", scene.log());
        end(&scene, Some(daemon));
    }
}

/// Calls of the daemon that a checkpoint makes.
const CHECKPOINT_CALLS: &[libc::c_long] = &[libc::SYS_pwrite64, libc::SYS_fsync, libc::SYS_fdatasync];

fn is_of(call: &Call, path: &Path) -> bool {
    call.paths().iter().any(|found| found == path)
}

/// Updates rows for a while, each commit a new version above those of earlier rounds; returns the rows with their versions.
fn update_rows(application: &mut Application, until: Duration, round: i64) -> Vec<(i64, i64)> {
    let (begun_ms, mut version, mut expected) = (now_ms(), round * 1_000_000, vec![0; ROWS as usize + 1]);
    while now_ms() - begun_ms < until.as_millis() as u64 {
        version += 1;
        let id = 1 + version * 797 % ROWS;
        application.run(&format!("UPDATE item SET version = {version}, body = randomblob(300) WHERE id = {id}"));
        expected[id as usize] = version;
    }
    let rows = expected.into_iter().enumerate().map(|(id, version)| (id as i64, version));
    rows.filter(|(_, version)| *version > 0).collect()
}

/// The newer versions of both.
fn merged(before: Vec<(i64, i64)>, after: Vec<(i64, i64)>) -> Vec<(i64, i64)> {
    let mut versions: std::collections::BTreeMap<i64, i64> = before.into_iter().collect();
    versions.extend(after);
    versions.into_iter().collect()
}

fn wrong_rows(path: &Path, expected: &[(i64, i64)]) -> usize {
    let database = open(path);
    let mut query = database.prepare("SELECT version FROM item WHERE id = ?1").unwrap();
    let mut version = |id: i64| query.query_row([id], |row| row.get::<_, i64>(0)).unwrap();
    expected.iter().filter(|(id, expected)| version(*id) != *expected).count()
}

/// A disk loses what was written to the main file, and says so once, as Linux does (fsync(2)): all writes to it vanish from
/// some moment on, and the first sync after that fails. SQLite alone would copy all of it again.
#[test]
fn sync_that_fails_once_loses_no_commit() {
    let scene = Scene::new();
    create(&scene.database());
    scene.expect_error("the WAL is kept until a checkpoint succeeds");
    let (loses, has_failed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (main, is_losing, failed) = (scene.database(), loses.clone(), has_failed.clone());
    let arguments = [scene.database().display().to_string(), scene.replica()];
    let arguments = [arguments[0].as_str(), arguments[1].as_str()];
    let decide = move |call: &Call| match call.number {
        _ if !is_losing.load(Ordering::SeqCst) || !is_of(call, &main) => Verdict::Goes,
        libc::SYS_pwrite64 => Verdict::Pretends(call.arguments[2] as i64),
        _ => {
            is_losing.store(false, Ordering::SeqCst);
            failed.store(true, Ordering::SeqCst);
            Verdict::Fails(libc::EIO)
        }
    };
    let daemon = Daemon::start_under(&arguments, &scene.path("daemon.log"), CHECKPOINT_CALLS, decide);
    sync(&scene.database());
    let mut application = Application::open(&scene.database());
    application.run("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=10");
    let before = update_rows(&mut application, Duration::from_millis(500), 0);
    loses.store(true, Ordering::SeqCst);
    let expected = merged(before, update_rows(&mut application, Duration::from_secs(3), 1));
    assert!(has_failed.load(Ordering::SeqCst), "no sync was seen");
    assert_eq!(application.run("PRAGMA integrity_check(1)"), "ok");
    wait_for("a checkpoint", || scene.log().contains("checkpoints succeed again").then_some(()));
    application.close();
    wait_for("an empty WAL", || (scene.wal_len() == 0).then_some(()));
    scene.copy("app.db", "alone.db");
    assert_eq!(integrity(&scene.path("alone.db")), "ok");
    assert_eq!(wrong_rows(&scene.path("alone.db"), &expected), 0, "of {}", expected.len());
    assert_eq!(scene.objects("epochs").len(), 1, "following went on");
    end(&scene, Some(daemon));
}

/// Each write and each sync of the main file and of the WAL fails once, with an I/O error or a full disk.
#[test]
fn checkpoint_that_fails_keeps_the_wal_and_the_epoch() {
    let every = [
        (libc::SYS_pwrite64, "", libc::EIO),
        (libc::SYS_pwrite64, "", libc::ENOSPC),
        (libc::SYS_fdatasync, "", libc::EIO),
        (libc::SYS_fdatasync, "-wal", libc::EIO),
    ];
    for ((number, suffix, error), skipped) in every.into_iter().flat_map(|point| [0, 1, 7].map(|nth| (point, nth))) {
        let scene = Scene::new();
        create(&scene.database());
        scene.allow_error("the WAL is kept until a checkpoint succeeds");
        let (is_armed, left) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(skipped)));
        let (file, armed, counted) = (sidecar(&scene.database(), suffix), is_armed.clone(), left.clone());
        let arguments = [scene.database().display().to_string(), scene.replica()];
        let arguments = [arguments[0].as_str(), arguments[1].as_str()];
        let is_sync = |number| number == libc::SYS_fsync || number == libc::SYS_fdatasync;
        let decide = move |call: &Call| {
            let is_it = call.number == number || is_sync(call.number) && is_sync(number);
            if !armed.load(Ordering::SeqCst) || !is_it || !is_of(call, &file) {
                return Verdict::Goes;
            }
            match counted.load(Ordering::SeqCst) {
                0 => {
                    armed.store(false, Ordering::SeqCst);
                    Verdict::Fails(error)
                }
                more => {
                    counted.store(more - 1, Ordering::SeqCst);
                    Verdict::Goes
                }
            }
        };
        let daemon = Daemon::start_under(&arguments, &scene.path("daemon.log"), CHECKPOINT_CALLS, decide);
        sync(&scene.database());
        let mut application = Application::open(&scene.database());
        application.run("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0");
        is_armed.store(true, Ordering::SeqCst);
        let mut expected = Vec::new();
        for round in 0.. {
            assert!(round < 40, "no call to fail\n{}", scene.log());
            let more = update_rows(&mut application, Duration::from_millis(700), round);
            expected = merged(expected, more);
            if !is_armed.load(Ordering::SeqCst) {
                break;
            }
            // A database that nobody writes to is checkpointed.
            std::thread::sleep(Duration::from_millis(1200));
        }
        sync(&scene.database());
        wait_for("a checkpoint", || scene.log().contains("checkpoints succeed again").then_some(()));
        let case = format!("{number} {suffix} {error} {skipped}\n{}", scene.log());
        assert_eq!(scene.objects("epochs").len(), 1, "{case}");
        application.close();
        wait_for("an empty WAL", || (scene.wal_len() == 0).then_some(()));
        assert_eq!(wrong_rows(&scene.database(), &expected), 0, "{case}");
        end(&scene, Some(daemon));
    }
}

/// The disk takes a second for a sync. The application, which does not sync itself, waits for none of them.
#[test]
fn slow_disk_does_not_hold_up_commits() {
    let scene = Scene::new();
    create(&scene.database());
    let is_slow = Arc::new(AtomicBool::new(false));
    let (slow, main, wal) = (is_slow.clone(), scene.database(), sidecar(&scene.database(), "-wal"));
    let arguments = [scene.database().display().to_string(), scene.replica()];
    let arguments = [arguments[0].as_str(), arguments[1].as_str()];
    let calls = &[libc::SYS_fsync, libc::SYS_fdatasync];
    let decide = move |call: &Call| {
        if slow.load(Ordering::SeqCst) && (is_of(call, &main) || is_of(call, &wal)) {
            std::thread::sleep(Duration::from_secs(1));
        }
        Verdict::Goes
    };
    let daemon = Daemon::start_under(&arguments, &scene.path("daemon.log"), calls, decide);
    sync(&scene.database());
    let mut application = Application::open(&scene.database());
    application.run("PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0");
    is_slow.store(true, Ordering::SeqCst);
    let (mut slowest_ms, begun_ms) = (0, now_ms());
    while now_ms() - begun_ms < 8000 {
        let before_ms = now_ms();
        application.run("UPDATE item SET body = randomblob(300) WHERE id % 100 = abs(random()) % 100");
        slowest_ms = slowest_ms.max(now_ms() - before_ms);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(scene.wal_len() > 4 << 20, "{}", scene.wal_len());
    assert!(slowest_ms < 800, "a commit took {slowest_ms} ms\n{}", scene.log());
    is_slow.store(false, Ordering::SeqCst);
    application.close();
    wait_for("an empty WAL", || (scene.wal_len() == 0).then_some(()));
    end(&scene, Some(daemon));
}

/// A TRUNCATE checkpoint stores its progress before it releases read mark 0. The pin that begins in between gets a mark
/// for which the checkpoint waits, and has to move once more.
#[test]
fn pin_taken_during_a_checkpoint_moves_again() {
    let (scene, daemon) = scene(true);
    let daemon = daemon.unwrap();
    let mut application = Application::open_with(&scene.database(), Duration::from_secs(3));
    application.run("PRAGMA wal_autocheckpoint=0; UPDATE counter SET n = 1");
    sync(&scene.database());
    daemon.signal(libc::SIGSTOP);
    application.run("PRAGMA wal_checkpoint(PASSIVE)");
    let mut locker = Application::open(&scene.database());
    // UNIX_SHM_BASE + WAL_READ_LOCK(0)
    locker.lock_byte(&sidecar(&scene.database(), "-shm"), 123);
    daemon.signal(libc::SIGCONT);
    std::thread::sleep(Duration::from_millis(600));
    locker.kill();
    let begun_ms = now_ms();
    assert_eq!(application.number("PRAGMA wal_checkpoint(TRUNCATE)"), 0, "{}", scene.log());
    assert!(now_ms() - begun_ms < 1000, "{} ms", now_ms() - begun_ms);
    application.close();
    end(&scene, Some(daemon));
}

/// An application that wants the database for itself, and says so by SQLite's PENDING lock while it waits, gets it.
#[test]
fn application_that_waits_for_exclusive_access_gets_it() {
    const PENDING_BYTE: i64 = 0x4000_0000;
    let (scene, daemon) = scene(true);
    scene.expect_error("another process has it locked");
    let mut waiting = Application::open(&scene.database());
    let shared = format!(".lock {} {}", PENDING_BYTE + 2, scene.database().display());
    assert!(waiting.try_run(&shared).is_err(), "the daemon has it open");
    waiting.lock_byte(&scene.database(), PENDING_BYTE);
    wait_for("the daemon to leave", || waiting.try_run(&shared).ok());
    waiting.kill();
    let mut application = Application::open(&scene.database());
    application.run("UPDATE counter SET n = 3");
    sync(&scene.database());
    assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), "SELECT n FROM counter"), 3);
    application.close();
    end(&scene, daemon);
}

/// Two replicas of one database: after `-shm` was removed both go on with the one that is at the path then.
#[test]
fn two_replicas_join_no_removed_wal_index() {
    let scene = Scene::new();
    create(&scene.database());
    let config = scene.path("waltrail.toml");
    let second = scene.path("second").display().to_string();
    let of =
        |replica: &str| format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n", scene.database().display());
    std::fs::write(&config, of(&scene.replica()) + &of(&second)).unwrap();
    let synced = || {
        let database = scene.database();
        let all = ["sync", "--config", config.to_str().unwrap(), database.to_str().unwrap()];
        wait_for("a sync", || run(all).status.success().then_some(()));
    };
    let daemon = scene.start_with(&["--config", config.to_str().unwrap()]);
    synced();
    for round in 0..5 {
        let mut application = Application::open(&scene.database());
        application.run("UPDATE counter SET n = n + 1");
        application.kill();
        std::fs::remove_file(sidecar(&scene.database(), "-shm")).unwrap();
        let mut application = Application::open(&scene.database());
        application.run("UPDATE counter SET n = n + 1");
        std::thread::sleep(Duration::from_millis(300 * round));
        synced();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.id())).unwrap();
        let stale: Vec<_> = maps.lines().filter(|line| line.contains("app.db-shm (deleted)")).collect();
        assert!(stale.is_empty(), "{stale:?}\n{}", scene.log());
        application.close();
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let live = content(&scene.database());
    assert_eq!(scene.restored_content(&[]), live);
    assert_eq!(content(&scene.restored(&second, &[])), live);
}

/// Programs that open the database for each request close it all the time. Each of their commits is recorded, and each
/// statement succeeds, with a busy timeout as they have it.
#[test]
fn connection_for_each_request_meets_no_error() {
    let (scene, daemon) = scene(true);
    let (errors, database) = (Mutex::new(Vec::new()), scene.database());
    std::thread::scope(|threads| {
        for _ in 0..3 {
            threads.spawn(|| {
                for _ in 0..60 {
                    let output = std::process::Command::new("sqlite3")
                        .args([database.to_str().unwrap(), ".timeout 5000", "UPDATE counter SET n = n + 1"])
                        .output()
                        .unwrap();
                    if !output.status.success() {
                        errors.lock().unwrap().push(stderr(&output));
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap();
    assert!(errors.is_empty(), "{errors:?}\n{}", scene.log());
    sync(&scene.database());
    assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), "SELECT n FROM counter"), 180);
    wait_for("an empty WAL", || (scene.wal_len() == 0).then_some(()));
    assert_eq!(len(&sidecar(&scene.database(), "-wal")), 0);
    end(&scene, daemon);
}
