//! Limits that are reached: a full disk, a permission that was taken away, storage that is away for long. The daemon goes on living, says
//! what is wrong, and goes on by itself when the trouble is over; the application never notices.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;

use crate::support::scene::Scene;
use crate::support::syscalls::{self, CHANGES, Call, Verdict};
use crate::support::{Daemon, content, count_up, create_database, insert, run, stderr, wait_for, waltrail};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    State,
    Database,
    Replica,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Trouble {
    FullDisk,
    NoPermission,
    BrokenDisk,
}

impl Trouble {
    /// What the operating system answers, if the call is one that meets it.
    fn answer(self, call: &Call) -> Option<libc::c_int> {
        let is_write =
            [libc::SYS_write, libc::SYS_pwrite64, libc::SYS_writev, libc::SYS_ftruncate].contains(&call.number);
        let is_sync = [libc::SYS_fsync, libc::SYS_fdatasync].contains(&call.number);
        match self {
            Self::FullDisk => (is_write || call.creates() || call.number == libc::SYS_mkdirat).then_some(libc::ENOSPC),
            // What is open stays open.
            Self::NoPermission => (!is_write && !is_sync).then_some(libc::EACCES),
            Self::BrokenDisk => Some(libc::EIO),
        }
    }
}

fn start(scene: &Scene, more: &str, decide: impl FnMut(&Call) -> Verdict + Send + 'static) -> Daemon {
    let text = format!(
        "[http]\nhealthy-lag = \"1s\"\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\nsync-interval = \"50ms\"\n{more}",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(scene.path("waltrail.toml"), text).unwrap();
    let config = scene.path("waltrail.toml").display().to_string();
    Daemon::start_under(&["--config", &config], &scene.path("daemon.log"), CHANGES, decide)
}

fn sync(scene: &Scene) {
    let database = scene.database().display().to_string();
    wait_for("a sync", || run(["sync", &database, "--timeout", "60s"]).status.success().then_some(()));
}

/// Restores, with a disk that is full from the `nth` write to anything beside the target on; tells, too, whether it came to that.
fn restore_to_full_disk(scene: &Scene, output: &Path, nth: u64) -> (std::process::Output, bool) {
    let written = Arc::new(AtomicU64::new(0));
    let (count, place) = (written.clone(), output.parent().unwrap().to_owned());
    let decide = move |call: &Call| {
        let answer =
            Trouble::FullDisk.answer(call).filter(|_| call.paths().iter().any(|path| path.starts_with(&place)));
        match answer {
            Some(number) if count.fetch_add(1, Ordering::SeqCst) + 1 >= nth => Verdict::Fails(number),
            _ => Verdict::Goes,
        }
    };
    let mut command = waltrail();
    command.arg("restore").arg(scene.replica()).args(["--force", "--output"]).arg(output);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let done = syscalls::spawn(&mut command, CHANGES, decide).wait_with_output().unwrap();
    (done, written.load(Ordering::SeqCst) >= nth)
}

/// Wherever the disk is full, what was there before stays, whole, until the new database is.
#[test]
fn a_full_disk_at_the_target_of_a_restore() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 2000, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let expected = content(&scene.database());
    std::fs::create_dir(scene.path("target")).unwrap();
    let output = scene.path("target/out.db");
    let before = b"what was there before".as_slice();
    let mut refused = 0;
    for nth in 1.. {
        std::fs::write(&output, before).unwrap();
        let (done, was_full) = restore_to_full_disk(&scene, &output, nth);
        if done.status.code() == Some(0) {
            assert_eq!(content(&output), expected, "full from write {nth} on");
            if !was_full {
                break;
            }
            // All that is left then is what the next start would go on from; it is told that there is none.
            assert!(stderr(&done).contains("takes it as it is then"), "{nth}: {}", stderr(&done));
        } else {
            assert_eq!(done.status.code(), Some(14), "{nth}: {}", stderr(&done));
            assert!(stderr(&done).contains("No space left on device"), "{nth}: {}", stderr(&done));
            assert!(std::fs::read(&output).unwrap() == before, "{nth}: the old file is not as it was");
            refused += 1;
        }
        std::fs::remove_dir_all(scene.path("target")).unwrap();
        std::fs::create_dir(scene.path("target")).unwrap();
    }
    assert!(refused > 3, "{refused}");
}

/// What `waltrail status` says to be wrong.
fn told(scene: &Scene) -> Option<String> {
    let status = run(["status", scene.database().to_str().unwrap(), "--format", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
    json["error"].as_str().map(str::to_owned)
}

fn place_of(scene: &Scene, place: Place) -> impl Fn(&Path) -> bool + Send + 'static {
    let (state, replica) = (scene.path(".app.db-waltrail"), scene.path("replica"));
    let files = ["app.db", "app.db-wal", "app.db-shm"].map(|name| scene.path(name));
    move |path| match place {
        Place::State => path.starts_with(&state),
        Place::Database => files.iter().any(|file| file == path),
        Place::Replica => path.starts_with(&replica),
    }
}

fn play(place: Place, trouble: Trouble, words: &'static str) {
    let case = format!("{trouble:?} at {place:?}");
    let scene = Scene::new();
    scene.expect_error(words);
    let application = create_database(&scene.database(), 100, "PRAGMA wal_autocheckpoint=0");
    let (is_on, hits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let is_there = place_of(&scene, place);
    let (switch, hit) = (is_on.clone(), hits.clone());
    let mut daemon = start(&scene, "checkpoint-threshold = \"100KB\"\n", move |call| {
        let answer = if switch.load(Ordering::SeqCst) { trouble.answer(call) } else { None };
        match answer.filter(|_| call.paths().iter().any(|path| is_there(path))) {
            Some(errno) => {
                hit.fetch_add(1, Ordering::SeqCst);
                Verdict::Fails(errno)
            }
            None => Verdict::Goes,
        }
    });
    count_up(&application);
    sync(&scene);
    let before = scene.restored_content(&[]);
    let before_ms = crate::support::scene::now_ms();
    std::thread::sleep(Duration::from_millis(20));
    is_on.store(true, Ordering::SeqCst);
    for _ in 0..15 {
        insert(&application, 20);
        count_up(&application);
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut last = None;
    wait_for(&format!("{case}: status to say so, not {last:?}"), || {
        last = told(&scene);
        last.as_ref().is_some_and(|said| said.contains(words)).then_some(())
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(daemon.is_running(), "{case}: died\n{}", scene.log());
    assert!(hits.load(Ordering::SeqCst) > 0, "{case}: nothing failed\n{}", scene.log());
    let errors = scene.log().matches("ERROR").count();
    assert!(errors < 6, "{case}: {errors} errors in two seconds\n{}", scene.log());
    is_on.store(false, Ordering::SeqCst);
    count_up(&application);
    sync(&scene);
    wait_for(&format!("{case}: that nothing is wrong"), || told(&scene).is_none().then_some(()));
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0), "{case}\n{}", scene.log());
    assert!(scene.restored_content(&[]) == content(&scene.database()), "{case}: restored wrong\n{}", scene.log());
    let at = waltrail::clock::format_time(before_ms);
    assert!(scene.restored_content(&["--at", &at]) == before, "{case}: what was confirmed before is wrong");
    let verified = run(["verify", &scene.replica()]);
    assert_eq!(verified.status.code(), Some(0), "{case}: {}", String::from_utf8_lossy(&verified.stdout));
}

#[test]
fn a_full_disk() {
    play(Place::State, Trouble::FullDisk, "No space left");
    play(Place::Replica, Trouble::FullDisk, "No space left");
    play(Place::Database, Trouble::FullDisk, "database or disk is full");
}

#[test]
fn a_permission_that_was_taken_away() {
    play(Place::State, Trouble::NoPermission, "Permission denied");
    play(Place::Replica, Trouble::NoPermission, "Permission denied");
}

#[test]
fn a_disk_that_fails() {
    play(Place::State, Trouble::BrokenDisk, "Input/output error");
    play(Place::Replica, Trouble::BrokenDisk, "Input/output error");
    play(Place::Database, Trouble::BrokenDisk, "disk I/O error");
}

/// Permissions of the database itself: what is open stays open, so of the files nothing is noticed; a directory that can't be searched any
/// more is said, and so is a file that can't be opened at a start. Everything goes on where it was left when they are back.
#[test]
fn a_permission_on_the_database_that_was_taken_away() {
    let (scene, elsewhere) = (Scene::new(), Scene::new());
    elsewhere.expect_error("Permission denied");
    let application = create_database(&scene.database(), 100, "");
    let config = elsewhere.path("waltrail.toml").display().to_string();
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nstate-dir = \"{}\"\nsync-interval = \"50ms\"\npoll-interval = \"100ms\"\n",
        scene.database().display(),
        elsewhere.replica(),
        elsewhere.path("state").display(),
    );
    std::fs::write(&config, text).unwrap();
    let start = || Daemon::start_bound_by_permissions(&["--config", &config], &elsewhere.path("daemon.log"));
    let sync =
        || wait_for("a sync", || run(["sync", "--config", &config, "--timeout", "60s"]).status.success().then_some(()));
    let status = || -> Option<serde_json::Value> {
        serde_json::from_slice(&run(["status", "--config", &config, "--format", "json"]).stdout).ok()
    };
    let said = |words: &str| {
        wait_for(words, || status()?["error"].as_str().is_some_and(|said| said.contains(words)).then_some(()));
    };
    let check = |what: &str| {
        let restored = content(&elsewhere.restored(&elsewhere.replica(), &[]));
        assert!(restored == content(&scene.database()), "{what}\n{}", elsewhere.log());
    };
    let set_files = |mode: u32| {
        for name in ["app.db", "app.db-wal", "app.db-shm"] {
            std::fs::set_permissions(scene.path(name), Permissions::from_mode(mode)).unwrap();
        }
    };
    let set_directory =
        |mode: u32| std::fs::set_permissions(scene.directory.path(), Permissions::from_mode(mode)).unwrap();
    let write = || {
        for _ in 0..5 {
            insert(&application, 20);
            count_up(&application);
        }
    };
    let daemon = start();
    write();
    sync();
    set_files(0);
    write();
    sync();
    assert!(status().unwrap()["error"].is_null(), "{}", elsewhere.log());
    set_files(0o600);
    check("the files could not be opened");
    set_directory(0);
    said("Permission denied");
    write();
    set_directory(0o700);
    sync();
    check("the directory could not be searched");
    daemon.kill();
    set_files(0);
    let daemon = start();
    said("Permission denied");
    write();
    set_files(0o600);
    sync();
    check("the files could not be opened at the start");
    assert_eq!(daemon.terminate(), Some(0), "{}", elsewhere.log());
    // The first epoch begins with the database; each of the others goes on from the one before.
    let log = elsewhere.log();
    let claims: Vec<&str> = log.lines().filter(|line| line.contains("epoch claimed")).collect();
    assert!(claims.len() >= 3 && claims[1..].iter().all(|claim| claim.contains("continues=true")), "{log}");
}

/// Resident memory in KiB.
fn memory_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn len_below(directory: &Path) -> u64 {
    let mut len_bytes = 0;
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let metadata = entry.metadata();
        len_bytes +=
            if entry.path().is_dir() { len_below(&entry.path()) } else { metadata.map_or(0, |found| found.len()) };
    }
    len_bytes
}

fn write_much(application: &Connection, kib: i64) {
    application
        .execute(
            "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
             INSERT OR REPLACE INTO item(id, body) SELECT abs(random()) % 2000, hex(randomblob(512)) FROM c",
            [kib],
        )
        .unwrap();
}

/// Storage is away while the application writes a hundred times what the spool may hold.
#[test]
fn storage_that_is_away_for_long_fills_nothing() {
    const SPOOL_LIMIT_BYTES: u64 = 2 << 20;
    const THRESHOLD_BYTES: u64 = 256 << 10;
    let scene = Scene::new();
    scene.expect_error("more than the spool's limit");
    scene.expect_error("the spool is full and was dropped");
    let application = create_database(&scene.database(), 100, "");
    let more = format!(
        "spool-limit = \"{}KiB\"\ncheckpoint-threshold = \"{}KiB\"\n",
        SPOOL_LIMIT_BYTES >> 10,
        THRESHOLD_BYTES >> 10
    );
    let is_away = Arc::new(AtomicBool::new(false));
    let (switch, is_there) = (is_away.clone(), place_of(&scene, Place::Replica));
    let mut daemon = start(&scene, &more, move |call| {
        let fails = switch.load(Ordering::SeqCst) && call.paths().iter().any(|path| is_there(path));
        if fails { Verdict::Fails(libc::EIO) } else { Verdict::Goes }
    });
    write_much(&application, 500);
    sync(&scene);
    let (before, before_ms) = (scene.restored_content(&[]), crate::support::scene::now_ms());
    std::thread::sleep(Duration::from_millis(20));
    let memory_before_kib = memory_kib(&daemon);
    is_away.store(true, Ordering::SeqCst);
    let (mut largest_spool, mut largest_wal, mut largest_memory_kib, mut dropped) = (0, 0, 0, 0);
    // 50 MB, in transactions of 50 kB.
    for _ in 0..1000 {
        write_much(&application, 50);
        std::thread::sleep(Duration::from_millis(4));
        largest_spool = largest_spool.max(len_below(&scene.path(".app.db-waltrail/spool")));
        largest_wal = largest_wal.max(scene.wal_len());
        largest_memory_kib = largest_memory_kib.max(memory_kib(&daemon));
        dropped = scene.log().matches("the spool is full and was dropped").count();
    }
    let log = scene.log();
    println!(
        "spool {largest_spool} bytes, WAL {largest_wal} bytes, memory {memory_before_kib} to {largest_memory_kib} KiB, dropped {dropped} times"
    );
    assert!(daemon.is_running(), "{log}");
    // One segment more may be on its way, of what was written in a second: more, where the disk is busy. Without a bound it would be all.
    assert!(largest_spool < 2 * SPOOL_LIMIT_BYTES, "{largest_spool} bytes in the spool\n{log}");
    assert!(
        largest_memory_kib < memory_before_kib + (24 << 10),
        "{memory_before_kib} to {largest_memory_kib} KiB\n{log}"
    );
    assert!(dropped > 0, "{log}");
    let waiting = told(&scene).unwrap_or_default();
    assert!(waiting.contains("Input/output error") || waiting.contains("spool"), "{waiting}");
    is_away.store(false, Ordering::SeqCst);
    count_up(&application);
    sync(&scene);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert!(scene.restored_content(&[]) == content(&scene.database()), "restored wrong\n{}", scene.log());
    let at = waltrail::clock::format_time(before_ms);
    assert!(scene.restored_content(&["--at", &at]) == before, "what was confirmed before is wrong");
    let verified = run(["verify", &scene.replica()]);
    assert_eq!(verified.status.code(), Some(0), "{}{}", String::from_utf8_lossy(&verified.stdout), stderr(&verified));
    // While a database is taken up again after its spool was dropped, SQLite's own threshold holds: 4 MB, more where the machine is
    // so busy that this takes long. Without bounds it would be all that was written, 50 MB.
    assert!(largest_wal < 20 << 20, "the WAL grew to {largest_wal} bytes\n{}", scene.log());
}
