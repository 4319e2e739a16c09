//! The main job on live databases, with the built program.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::support::s3::S3Server;
use crate::support::scene::{COUNTER, Scene, now_ms};
use crate::support::{
    Daemon, content, count_up, create_database, insert, number, open, run, stderr, wait_for, wait_for_restored,
};

#[test]
fn every_page_size_and_auto_vacuum() {
    for (page_size, auto_vacuum) in [(512, "NONE"), (1024, "FULL"), (4096, "INCREMENTAL"), (65_536, "FULL")] {
        let scene = Scene::new();
        let pragmas = format!("PRAGMA page_size={page_size}; PRAGMA auto_vacuum={auto_vacuum}");
        let application = create_database(&scene.database(), 300, &pragmas);
        assert_eq!(number(&application, "PRAGMA page_size"), page_size);
        let daemon = scene.start();
        scene.wait_for(0);
        insert(&application, 500);
        application.execute_batch("DELETE FROM item WHERE id > 100; PRAGMA incremental_vacuum(20)").unwrap();
        count_up(&application);
        application.execute_batch("VACUUM").unwrap();
        insert(&application, 900);
        count_up(&application);
        // Shrinks and grows in one transaction.
        application.execute_batch("BEGIN; DELETE FROM item; CREATE TABLE more(x); DROP TABLE more").unwrap();
        insert(&application, 400);
        application.execute_batch("COMMIT").unwrap();
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        let restored = scene.restored(&scene.replica(), &[]);
        assert_eq!(content(&scene.database()), content(&restored), "page size {page_size}");
        assert_eq!(number(&open(&restored), "PRAGMA page_size"), page_size);
    }
}

/// Each transaction is a point that can be restored, by its number and by its time, byte for byte.
#[test]
fn every_transaction_byte_for_byte() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let daemon = scene.start();
    scene.wait_for(0);
    let mut oracle = Vec::new();
    for step in 0..12 {
        match step % 4 {
            0 => insert(&application, 30),
            1 => application.execute_batch("DELETE FROM item WHERE id % 3 = 1").unwrap(),
            2 => application.execute_batch(&format!("CREATE TABLE t{step}(x); INSERT INTO t{step} VALUES(1)")).unwrap(),
            _ => application.execute_batch("VACUUM").unwrap(),
        }
        wait_for("the checkpoint", || (number(&application, "PRAGMA wal_checkpoint(TRUNCATE)") == 0).then_some(()));
        let copy = scene.path(&format!("oracle-{step}"));
        assert!(Command::new("cp").arg(scene.database()).arg(&copy).status().unwrap().success());
        std::thread::sleep(Duration::from_millis(60));
        oracle.push((now_ms(), copy));
        std::thread::sleep(Duration::from_millis(60));
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    for (time_ms, copy) in &oracle {
        let at = waltrail::clock::format_time(*time_ms);
        let restored = scene.restored(&scene.replica(), &["--at", &at]);
        assert!(std::fs::read(&restored).unwrap() == std::fs::read(copy).unwrap(), "at {at}");
    }
    let log = run(["log", &scene.replica(), "--transactions", "--format", "json"]);
    let lines: Vec<serde_json::Value> = String::from_utf8(log.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["kind"] == "transaction")
        .collect();
    // Steps 2, 6 and 10 made a table each (two transactions), the VACUUMs move the schema's cookie, too.
    assert_eq!(lines.len(), 15, "{lines:#?}");
    assert!(lines.iter().filter(|line| line["schema_changed"] == true).count() >= 3);
    let mut states = Vec::new();
    for line in &lines {
        let restored = scene.restored(&scene.replica(), &["--txid", &line["txid"].to_string()]);
        states.push(std::fs::read(restored).unwrap());
    }
    for (_, copy) in &oracle {
        assert!(states.contains(&std::fs::read(copy).unwrap()), "{}", copy.display());
    }
}

/// The application's own checkpoints do their work, and nothing is put into its database.
#[test]
fn the_application_comes_first() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 500, "");
    application.busy_timeout(Duration::from_secs(2)).unwrap();
    let tables = "SELECT count(*) FROM sqlite_schema";
    let before = number(&application, tables);
    let daemon = scene.start();
    scene.wait_for(0);
    for (mode, times) in [("PASSIVE", 20), ("FULL", 20), ("RESTART", 20), ("TRUNCATE", 40)] {
        for _ in 0..times {
            count_up(&application);
            checkpoint(&application, mode, &scene);
        }
    }
    assert_eq!(number(&application, tables), before);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
    let transactions = run(["log", &scene.replica(), "--transactions"]);
    let lines = String::from_utf8(transactions.stdout).unwrap().lines().filter(|line| line.contains(" pages ")).count();
    assert_eq!(lines, 100, "each of the 100 transactions is there");
}

/// A checkpoint that meets another one, be it ours or that of another connection of the application, is told so at once, without
/// a wait (SQLite, `sqlite3_wal_checkpoint_v2`: the busy handler is not invoked); asked again it must succeed. One that waits
/// out the busy timeout was held up.
fn checkpoint(application: &rusqlite::Connection, mode: &str, scene: &Scene) {
    for _ in 0..3 {
        let begun_ms = now_ms();
        if number(application, &format!("PRAGMA wal_checkpoint({mode})")) == 0 {
            return;
        }
        assert!(now_ms() - begun_ms < 1000, "{mode} was held up\n{}", scene.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("{mode} met another checkpoint three times\n{}", scene.log());
}

/// Under a load that never pauses the WAL stays small: without the barrier it would hold everything that is written here,
/// about 200 MB. (The bound is wide because other tests use the same disk.)
#[test]
fn the_wal_stays_small_under_load() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 2000, "");
    // Nobody else checkpoints.
    application.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    let daemon = scene.start();
    scene.wait_for(0);
    let mut largest = 0;
    let sql = "UPDATE item SET body = hex(randomblob(150)) WHERE id % 200 = ?1";
    for turn in 0..4000 {
        application.execute_batch("BEGIN").unwrap();
        application.execute(sql, [turn % 200]).unwrap();
        count_up(&application);
        application.execute_batch("COMMIT").unwrap();
        largest = largest.max(scene.wal_len());
        std::thread::sleep(Duration::from_micros(500));
    }
    assert!(largest < 64 << 20, "the WAL grew to {largest} bytes");
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// A quiet database's WAL is brought into its main file.
#[test]
fn a_quiet_database_is_checkpointed() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 100, "");
    application.execute_batch("PRAGMA wal_autocheckpoint=0; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let daemon = scene.start();
    scene.wait_for(0);
    let before = std::fs::metadata(scene.database()).unwrap().len();
    insert(&application, 2000);
    wait_for("the checkpoint", || {
        (std::fs::metadata(scene.database()).unwrap().len() > before + 500_000).then_some(())
    });
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// CPU time in milliseconds, of which the kernel counts whole hundredths of a second.
fn cpu_ms(daemon: &Daemon) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum()
}

/// A reader that stands for hours holds up every checkpoint of a WAL that is too long already. That keeps nobody busy; and when it
/// is gone, what it held up is done.
#[test]
fn a_reader_that_stands_keeps_nobody_busy() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 100, "");
    application.execute_batch("PRAGMA wal_autocheckpoint=0; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let daemon = scene.start();
    scene.wait_for(0);
    let before = std::fs::metadata(scene.database()).unwrap().len();
    let reader = open(&scene.database());
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(number(&reader, COUNTER), 0);
    for _ in 0..20 {
        insert(&application, 2000);
        count_up(&application);
    }
    assert!(scene.wal_len() > 5 << 20, "{}", scene.wal_len());
    scene.wait_for(20);
    // Asked for again at doubling intervals, the barrier is down to once a second after three.
    std::thread::sleep(Duration::from_secs(4));
    let used_before_ms = cpu_ms(&daemon);
    std::thread::sleep(Duration::from_secs(2));
    let used_ms = cpu_ms(&daemon) - used_before_ms;
    assert!(used_ms < 200, "{used_ms} ms in two seconds");
    reader.execute_batch("COMMIT").unwrap();
    wait_for("the checkpoint", || {
        (std::fs::metadata(scene.database()).unwrap().len() > before + 5_000_000).then_some(())
    });
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// Killed at many moments under load, each time nothing that was confirmed is lost, and nothing is wrong.
#[test]
fn killed_again_and_again() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let mut confirmed = 0;
    for round in 0..8 {
        let daemon = scene.start();
        for turn in 0..80 + round * 17 {
            insert(&application, 1 + turn % 3);
            count_up(&application);
            std::thread::sleep(Duration::from_micros(500));
        }
        daemon.kill();
        let done = run(["restore", &scene.replica(), "--force", "--output", scene.path("out.db").to_str().unwrap()]);
        if done.status.success() {
            let restored = number(&open(&scene.path("out.db")), COUNTER);
            assert!(restored >= confirmed, "round {round}: {restored} after {confirmed}\n{}", scene.log());
            confirmed = restored;
            content(&scene.path("out.db"));
        } else {
            assert_eq!(done.status.code(), Some(12), "{}", stderr(&done));
        }
    }
    let daemon = scene.start();
    scene.wait_for(number(&application, COUNTER));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// A database that is not there, that is empty, that has another journal mode.
#[test]
fn databases_that_are_not_ready() {
    let scene = Scene::new();
    let daemon = scene.start();
    wait_for("the log", || {
        scene.path("daemon.log").exists().then(|| scene.log()).filter(|log| log.contains("not there yet"))
    });
    std::fs::write(scene.database(), b"").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let application = open(&scene.database());
    application
        .execute_batch("PRAGMA journal_mode=DELETE; CREATE TABLE counter(n); INSERT INTO counter VALUES(7)")
        .unwrap();
    scene.wait_for(7);
    assert_eq!(number(&application, COUNTER), 7);
    let mode: String = application.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
    assert!(scene.log().contains("switched to WAL mode"), "{}", scene.log());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

#[test]
fn a_locked_database_gives_a_clear_error_and_is_tried_again() {
    let scene = Scene::new();
    scene.expect_error("another process has it locked");
    let application = open(&scene.database());
    application
        .execute_batch(
            "PRAGMA locking_mode=EXCLUSIVE; CREATE TABLE counter(n); INSERT INTO counter VALUES(5); BEGIN EXCLUSIVE",
        )
        .unwrap();
    let daemon = scene.start();
    wait_for("the complaint", || {
        scene
            .path("daemon.log")
            .exists()
            .then(|| scene.log())
            .filter(|log| log.contains("another process has it locked"))
    });
    drop(application);
    scene.wait_for(5);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// After a power failure the WAL's end is lost, and the application goes on from an earlier commit with the same salts: where the
/// daemon was lies inside of another transaction then.
#[test]
fn a_wal_that_lost_its_end_and_went_on() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 100, "");
    application.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    application.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    let daemon = scene.start();
    scene.wait_for(0);
    count_up(&application);
    scene.wait_for(1);
    let kept_len = scene.wal_len();
    for _ in 0..10 {
        count_up(&application);
    }
    scene.wait_for(11);
    daemon.kill();
    drop(application);
    std::fs::File::options().write(true).open(scene.path("app.db-wal")).unwrap().set_len(kept_len).unwrap();
    std::fs::remove_file(scene.path("app.db-shm")).unwrap();
    let application = open(&scene.database());
    application.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    assert_eq!(number(&application, COUNTER), 1);
    application.execute_batch("UPDATE counter SET n = 50").unwrap();
    insert(&application, 2000);
    assert!(scene.wal_len() > kept_len + 11 * 4200, "beyond the place that was left");
    let daemon = scene.start();
    scene.wait_for(50);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

#[test]
fn a_second_daemon_is_refused_at_once() {
    let scene = Scene::new();
    let _application = create_database(&scene.database(), 10, "");
    let daemon = scene.start();
    scene.wait_for(0);
    let second = run(["replicate", scene.database().to_str().unwrap(), &scene.replica()]);
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another waltrail works with"), "{}", stderr(&second));
    assert_eq!(daemon.terminate(), Some(0));
}

/// Storage is away at the stop: the exit code says so, and the next start ships the rest.
#[test]
fn a_stop_that_can_not_confirm_says_so() {
    let scene = Scene::new();
    scene.allow_error("the replica's directory is not there");
    scene.expect_error("stopped with transactions not confirmed");
    let application = create_database(&scene.database(), 100, "");
    let daemon = scene.start();
    scene.wait_for(0);
    count_up(&application);
    scene.wait_for(1);
    // A disk that is unmounted: its directory must not be made again in the place where it was mounted.
    std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
    count_up(&application);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(daemon.terminate(), Some(15), "{}", scene.log());
    assert!(scene.log().contains("the next start ships the rest"), "{}", scene.log());
    assert!(!scene.path("replica").exists());
    std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
    let daemon = scene.start();
    scene.wait_for(2);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let log = run(["log", &scene.replica(), "--format", "json"]);
    let snapshots = String::from_utf8(log.stdout).unwrap().matches("\"snapshot\"").count();
    assert_eq!(snapshots, 1, "the second start continued");
}

/// To a bucket, with a snapshot large enough for several parts, and a stop in the middle of a burst.
fn config_with(scene: &Scene, settings: &str) -> String {
    let config = scene.path("waltrail.toml");
    let (path, replica) = (scene.database(), scene.replica());
    let text = format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n{settings}\n", path.display());
    std::fs::write(&config, text).unwrap();
    config.display().to_string()
}

/// While the spool is made durable at the stop, what is in it is confirmed and moved away.
#[test]
fn a_stop_while_a_backlog_is_shipped() {
    let scene = Scene::new();
    scene.allow_error("the replica's directory is not there");
    let application = create_database(&scene.database(), 100, "");
    let config = config_with(&scene, "sync-interval = \"20ms\"");
    for round in 1..=5 {
        let daemon = scene.start_with(&["--config", &config]);
        let database = scene.database().display().to_string();
        wait_for("a sync", || run(["sync", &database]).status.success().then_some(()));
        std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
        for _ in 0..30 {
            count_up(&application);
            std::thread::sleep(Duration::from_millis(40));
        }
        std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
        // The waits between two attempts are seconds by now; what comes after the first success goes fast.
        let spool = scene.path(".app.db-waltrail/spool");
        let waiting = || std::fs::read_dir(&spool).unwrap().count();
        let before = waiting();
        wait_for("the first one to be shipped", || (waiting() < before).then_some(()));
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), COUNTER), 30 * round);
    }
}

#[test]
fn to_s3_and_back() {
    let server = S3Server::start();
    let scene = Scene::new();
    let application = create_database(&scene.database(), 70_000, "");
    let replica = server.url("tenants/a");
    let database = scene.database();
    let daemon = scene.start_with(&[database.to_str().unwrap(), &replica, "--log-level", "trace"]);
    for _ in 0..50 {
        insert(&application, 20);
        count_up(&application);
    }
    wait_for_restored(&replica, scene.directory.path(), COUNTER, 50);
    // Where it goes, and on which server, the daemon tells.
    let listed = run(["log", database.to_str().unwrap()]);
    assert!(listed.status.success(), "{}", stderr(&listed));
    insert(&application, 200);
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&replica, &[])));
    assert!(
        scene.log().contains("TRACE put{key=\"epochs/00000001\"") && !scene.log().contains("testtest"),
        "no secret at any level"
    );
    let snapshot = server.path("tenants/a/snap/00000001");
    let entry = std::fs::read_dir(snapshot).unwrap().next().unwrap().unwrap();
    assert!(entry.metadata().unwrap().len() > 9 << 20, "several parts");
}

/// One transaction much larger than what is held in memory.
#[test]
fn a_large_transaction() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 10, "PRAGMA cache_size=-2000");
    let daemon = scene.start();
    scene.wait_for(0);
    application.execute_batch("PRAGMA cache_size=-2000; BEGIN").unwrap();
    insert(&application, 150_000);
    // Spilled pages are written again: several images of one page in one transaction.
    application.execute_batch("UPDATE item SET body = body || 'x' WHERE id % 7 = 0").unwrap();
    count_up(&application);
    application.execute_batch("COMMIT").unwrap();
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// A WAL begun on a big-endian machine has its checksums in the other byte order, and goes on so.
#[test]
fn a_wal_with_big_endian_checksums() {
    use waltrail::sqlite::wal::{ByteOrder, Checksum, WAL_HEADER_LEN, WalHeader};
    let scene = Scene::new();
    let application = create_database(&scene.path("made.db"), 20, "");
    application.execute_batch("PRAGMA wal_autocheckpoint=0; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    insert(&application, 30);
    for suffix in ["", "-wal"] {
        let (from, to) = (scene.path(&format!("made.db{suffix}")), scene.path(&format!("app.db{suffix}")));
        assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
    }
    drop(application);
    let mut wal = std::fs::read(scene.path("app.db-wal")).unwrap();
    let frame_len = WalHeader::parse(wal.first_chunk().unwrap()).unwrap().frame_len();
    wal[3] |= 1;
    let put = |wal: &mut [u8], at: usize, sum: Checksum| {
        wal[at..at + 4].copy_from_slice(&sum.0.to_be_bytes());
        wal[at + 4..at + 8].copy_from_slice(&sum.1.to_be_bytes());
    };
    let mut sum = Checksum::default().extended(ByteOrder::Big, &wal[..24]);
    put(&mut wal, 24, sum);
    let mut at = WAL_HEADER_LEN;
    while at < wal.len() {
        sum = sum.extended(ByteOrder::Big, &wal[at..at + 8]).extended(ByteOrder::Big, &wal[at + 24..at + frame_len]);
        put(&mut wal, at + 16, sum);
        at += frame_len;
    }
    std::fs::write(scene.path("app.db-wal"), &wal).unwrap();
    let application = open(&scene.database());
    application.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    assert_eq!(number(&application, "SELECT count(*) FROM item"), 50);
    let daemon = scene.start();
    scene.wait_for(0);
    for _ in 0..10 {
        insert(&application, 5);
        count_up(&application);
    }
    scene.wait_for(10);
    assert_eq!(std::fs::read(scene.path("app.db-wal")).unwrap()[3] & 1, 1, "still big-endian");
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// Two replicas of one database's file, an application with the distribution's own sqlite3, if it is there.
#[test]
fn with_another_sqlite() {
    let sqlite3 = |path: &PathBuf, sql: &str| {
        let done = Command::new("sqlite3").arg(path).arg(sql).output().ok()?;
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Some(String::from_utf8(done.stdout).unwrap())
    };
    let scene = Scene::new();
    let create = "PRAGMA journal_mode=WAL; CREATE TABLE counter(n); INSERT INTO counter VALUES(0);";
    if sqlite3(&scene.database(), create).is_none() {
        eprintln!("no sqlite3 here; .ci/run installs it");
        return;
    }
    let daemon = scene.start();
    for _ in 0..20 {
        // Each opens the database, writes, and closes it.
        sqlite3(&scene.database(), "PRAGMA busy_timeout=2000; UPDATE counter SET n = n + 1;").unwrap();
    }
    scene.wait_for(20);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let restored = scene.restored(&scene.replica(), &[]);
    assert_eq!(sqlite3(&restored, "PRAGMA integrity_check; SELECT n FROM counter;").unwrap(), "ok\n20\n");
}

/// A writer that fails between its commit frame and the publication leaves a frame that looks committed and is none. The next
/// writer overwrites it.
#[test]
fn a_frame_that_only_looks_committed() {
    use std::os::unix::fs::FileExt;
    use waltrail::sqlite::wal::{Checksum, WAL_HEADER_LEN, WalHeader};
    let scene = Scene::new();
    let application = create_database(&scene.database(), 20, "");
    let daemon = scene.start();
    scene.wait_for(0);
    count_up(&application);
    scene.wait_for(1);
    let path = scene.path("app.db-wal");
    let wal = std::fs::read(&path).unwrap();
    let header = WalHeader::parse(wal.first_chunk().unwrap()).unwrap();
    let mut checksum = header.checksum;
    let mut end = WAL_HEADER_LEN;
    let mut last = None;
    while let Some(frame) = wal.get(end..end + header.frame_len()) {
        let Some(checked) = header.check_frame(checksum, frame) else { break };
        checksum = checked.checksum;
        last = Some(frame.to_vec());
        end += header.frame_len();
    }
    // The last frame again, with other content, and checksums that continue the chain.
    let mut forged = last.unwrap();
    forged[24 + 100..24 + 200].fill(0xee);
    let Checksum(first, second) = checksum.extended(header.order, &forged[..8]).extended(header.order, &forged[24..]);
    forged[16..20].copy_from_slice(&first.to_be_bytes());
    forged[20..24].copy_from_slice(&second.to_be_bytes());
    assert!(header.check_frame(checksum, &forged).is_some_and(|frame| frame.commit_size_pages != 0));
    // `-wal` carries no locks: opening and closing it here harms nobody.
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&forged, end as u64).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    for n in 2..5 {
        count_up(&application);
        scene.wait_for(n);
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
    let log = run(["log", &scene.replica(), "--format", "json"]);
    assert_eq!(String::from_utf8(log.stdout).unwrap().matches("\"epoch\",").count(), 1, "{}", scene.log());
}

/// Storage is away for longer than the spool lasts: the disk is not filled, the log says what is lost, and when storage is back
/// the database is backed up again.
#[test]
fn a_spool_that_is_full() {
    let scene = Scene::new();
    scene.allow_error("the replica's directory is not there");
    scene.expect_error("more than the spool's limit");
    scene.expect_error("the spool is full and was dropped");
    let application = create_database(&scene.database(), 50, "");
    let config = scene.path("waltrail.toml");
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nspool-limit = \"100KB\"\nsync-interval = \"50ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let daemon = Daemon::start(&["--config", config.to_str().unwrap()], &scene.path("daemon.log"));
    scene.wait_for(0);
    count_up(&application);
    scene.wait_for(1);
    std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
    let spool = scene.path(".app.db-waltrail/spool");
    let spooled = || -> u64 {
        let entries = std::fs::read_dir(&spool).unwrap();
        entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|found| found.len()).sum()
    };
    let mut largest = 0;
    wait_for("the spool to be dropped", || {
        insert(&application, 100);
        std::thread::sleep(Duration::from_millis(20));
        largest = largest.max(spooled());
        scene.log().contains("the spool is full and was dropped").then_some(())
    });
    assert!(largest < 300_000, "{largest} bytes in the spool");
    std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
    count_up(&application);
    scene.wait_for(2);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
    assert!(scene.wal_len() < 16 << 20);
}

/// Several databases in one configuration: one that can't be followed is complained of, the others go on.
#[test]
fn one_broken_database_does_not_stop_the_others() {
    let scene = Scene::new();
    scene.expect_error("it is not a SQLite database");
    let application = create_database(&scene.database(), 30, "");
    let other = create_database(&scene.path("other.db"), 30, "");
    std::fs::write(scene.path("broken.db"), vec![1; 9000]).unwrap();
    let mut text = String::new();
    for (name, replica) in [("broken.db", "replica-broken"), ("app.db", "replica"), ("other.db", "replica-other")] {
        let (path, replica) = (scene.path(name), scene.path(replica));
        text += &format!("[[database]]\npath = \"{}\"\nreplica = \"{}\"\n", path.display(), replica.display());
    }
    let config = scene.path("waltrail.toml");
    std::fs::write(&config, text).unwrap();
    let daemon = Daemon::start(&["--config", config.to_str().unwrap()], &scene.path("daemon.log"));
    let other_replica = scene.path("replica-other").display().to_string();
    for n in 1..4 {
        count_up(&application);
        count_up(&other);
        scene.wait_for(n);
        wait_for_restored(&other_replica, scene.directory.path(), COUNTER, n);
    }
    assert!(scene.log().contains("broken.db can't be followed: it is not a SQLite database"), "{}", scene.log());
    assert_eq!(daemon.terminate(), Some(1), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// The first signal stops in an orderly way; the second one at once.
#[test]
fn a_second_signal_ends_it_at_once() {
    let scene = Scene::new();
    scene.allow_error("the replica's directory is not there");
    let application = create_database(&scene.database(), 30, "");
    let daemon = scene.start();
    scene.wait_for(0);
    std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
    count_up(&application);
    daemon.signal(libc::SIGINT);
    wait_for("the first to be heard", || scene.log().contains("stopping").then_some(()));
    // What comes with the first one is not a second one.
    std::thread::sleep(Duration::from_millis(600));
    let begun = std::time::SystemTime::UNIX_EPOCH + Duration::from_millis(now_ms());
    assert_eq!(daemon.terminate(), Some(15), "{}", scene.log());
    assert!(begun.elapsed().unwrap() < Duration::from_secs(4), "not after the whole shutdown-timeout");
    assert!(scene.log().contains("stopped at once"), "{}", scene.log());
    // What was not confirmed is shipped by the next start.
    std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
    let daemon = scene.start();
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// As when a process and its group are signalled.
#[test]
fn two_signals_at_once_are_one_request() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 30, "");
    let daemon = scene.start();
    scene.wait_for(0);
    count_up(&application);
    daemon.signal(libc::SIGTERM);
    // Of the same kind the system would make one of them.
    daemon.signal(libc::SIGINT);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert!(scene.log().contains("everything is confirmed"), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// The path is a symbolic link, as it often is in a container.
#[test]
fn by_a_symbolic_link() {
    let scene = Scene::new();
    std::fs::create_dir(scene.path("volume")).unwrap();
    let application = create_database(&scene.path("volume/real.db"), 30, "");
    std::os::unix::fs::symlink(scene.path("volume/real.db"), scene.database()).unwrap();
    let daemon = scene.start();
    for n in 1..4 {
        count_up(&application);
        scene.wait_for(n);
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}
