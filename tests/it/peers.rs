//! What happens to databases and stores, and what other backup tools are known to fail at, or not to test. Contents are compared, not
//! counts: `integrity_check` sees no stale page.

use std::time::Duration;

use rusqlite::Connection;
use waltrail::clock::Clock;
use waltrail::format::Position;

use crate::support::machine::Machine;
use crate::support::s3::S3Server;
use crate::support::scene::{Scene, now_ms};
use crate::support::{content, count_up, create_database, insert, open, run, wait_for};

fn sync(scene: &Scene) {
    let database = scene.database().display().to_string();
    wait_for("a sync", || run(["sync", &database, "--timeout", "60s"]).status.success().then_some(()));
}

/// Under the daemon SQLite does not let an application leave WAL mode; while it is away the application may, and then
/// what it wrote without a WAL is found.
#[test]
fn an_application_that_leaves_wal_mode() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 200, "");
    let daemon = scene.start();
    count_up(&application);
    sync(&scene);
    application.busy_timeout(Duration::from_millis(200)).unwrap();
    let mode = application.query_row("PRAGMA journal_mode=DELETE", [], |row| row.get::<_, String>(0));
    assert!(mode.as_ref().map_or(true, |mode| mode == "wal"), "{mode:?}");
    insert(&application, 20);
    sync(&scene);
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    let before = scene.restored_content(&[]);
    let before_ms = now_ms();
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let mode: String = application.query_row("PRAGMA journal_mode=DELETE", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "delete");
    application.execute_batch("UPDATE item SET body = 'without a WAL' WHERE id % 3 = 0").unwrap();
    let daemon = scene.start();
    sync(&scene);
    count_up(&application);
    sync(&scene);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    assert_eq!(scene.restored_content(&["--at", &waltrail::clock::format_time(before_ms)]), before);
}

/// A store that refuses everything for a while, with each of the words for "later".
#[test]
fn storms_of_refusals() {
    let (scene, server) = (Scene::new(), S3Server::start());
    let application = create_database(&scene.database(), 50, "");
    let replica = server.url("app");
    let daemon = scene.start_to(&replica);
    count_up(&application);
    sync(&scene);
    for status in [429, 503, 408, 500] {
        server.refuse(status);
        for _ in 0..20 {
            insert(&application, 10);
            count_up(&application);
            std::thread::sleep(Duration::from_millis(30));
        }
        let database = scene.database().display().to_string();
        assert!(!run(["sync", &database, "--timeout", "100ms"]).status.success(), "{status} counts as confirmed");
        server.refuse(0);
        sync(&scene);
        assert_eq!(content(&scene.database()), content(&scene.restored(&replica, &[])), "{status}");
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&replica, &[])));
}

/// SIGTERM while storage is away: what gives ten seconds is kept, what could not be shipped is said, and the next start ships it.
#[test]
fn a_stop_ends_in_time_when_storage_is_away() {
    for away_from_the_start in [true, false] {
        let (scene, server) = (Scene::new(), S3Server::start());
        scene.expect_error("stopped with transactions not confirmed");
        let application = create_database(&scene.database(), 50, "");
        let replica = server.url("app");
        server.refuse(if away_from_the_start { 503 } else { 0 });
        let daemon = scene.start_to(&replica);
        count_up(&application);
        if away_from_the_start {
            wait_for("the complaint", || scene.log().contains("the store fails").then_some(()));
        } else {
            sync(&scene);
            server.refuse(503);
        }
        for _ in 0..10 {
            count_up(&application);
            std::thread::sleep(Duration::from_millis(10));
        }
        let begun_ms = now_ms();
        assert_eq!(daemon.terminate(), Some(15), "{}", scene.log());
        let took_ms = now_ms() - begun_ms;
        assert!(took_ms < 10_000, "{took_ms} ms\n{}", scene.log());
        server.refuse(0);
        let daemon = scene.start_to(&replica);
        sync(&scene);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(content(&scene.database()), content(&scene.restored(&replica, &[])));
    }
}

/// A reader of the application's holds the WAL for long, under heavy writes: it grows, which nobody can help, and is small again
/// soon after. Nothing is lost on the way.
#[test]
fn a_reader_that_pins_the_wal() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    machine.sync();
    let threshold_bytes = machine.settings.checkpoint_threshold_bytes;
    let wal = machine.database().with_extension("db-wal");
    let len = || std::fs::metadata(&wal).unwrap().len();
    let reader = Connection::open(machine.database()).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM item").unwrap();
    for turn in 0..60 {
        machine
            .commit(&format!("INSERT OR REPLACE INTO item(id, body, n) VALUES({}, zeroblob(9000), {turn})", turn % 20));
        machine.pass(Duration::from_millis(400));
        machine.turns(2);
        if turn % 10 == 0 {
            machine.sync();
        }
    }
    machine.sync();
    let grown = len();
    assert!(grown > 4 * threshold_bytes, "the reader holds nothing: {grown}");
    assert_eq!(reader.query_row("SELECT count(*) FROM item", [], |row| row.get::<_, i64>(0)).unwrap(), 1);
    drop(reader);
    // The restarts that were held up come now; the WAL is used from its beginning again, or emptied.
    for turn in 0..30 {
        machine.pass(Duration::from_secs(1));
        machine.turns(2);
        machine.commit(&format!("UPDATE item SET n = {turn} WHERE id = 2"));
    }
    machine.sync();
    assert!(len() <= grown, "the WAL went on growing: {} after {grown}", len());
    for &position in machine.states.keys() {
        machine.check(position);
    }
    assert!(machine.states.len() > 80, "{}", machine.states.len());
}

/// The clock is set back by a day and forward by a year, and back again: every state stays restorable, and no time runs
/// backwards on the line.
#[test]
fn a_clock_that_jumps() {
    const DAY_MS: i64 = 86_400_000;
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.start();
    let mut synced: Vec<Position> = Vec::new();
    for jump_ms in [0, -DAY_MS, 365 * DAY_MS, 0, -400 * DAY_MS, 36 * DAY_MS] {
        machine.clock.jump(jump_ms);
        for turn in 0..3 {
            machine.commit(&format!("INSERT INTO item(body, n) VALUES(zeroblob(300), {turn})"));
            machine.pass(Duration::from_secs(40));
            machine.turns(3);
        }
        synced.push(machine.sync());
        machine.snapshot();
        machine.crash();
        machine.start();
        machine.sync();
        // With a clock that runs ahead nothing may go, and nothing goes that the true window needs.
        machine.prune(&mut waltrail::retain::tails::TailCache::default()).unwrap();
        for &position in machine.states.keys() {
            machine.check(position);
        }
    }
    let times: Vec<u64> = machine.states.keys().map(|&position| machine.plan(position).time_ms).collect();
    assert!(times.is_sorted() && times.len() > 15, "{times:?}");
    assert!(times[times.len() - 1] > machine.clock.true_ms() + 300 * DAY_MS as u64, "the jump was not seen");
    assert!(machine.clock.now_ms() < times[times.len() - 1]);
    assert!(synced.is_sorted());
}

/// One transaction that empties the database, shrinks its file and makes it larger than it was.
#[test]
fn shrinking_and_growing_in_one_transaction() {
    for auto_vacuum in ["FULL", "INCREMENTAL"] {
        let scene = Scene::new();
        let application = create_database(&scene.database(), 800, &format!("PRAGMA auto_vacuum={auto_vacuum}"));
        let daemon = scene.start();
        count_up(&application);
        sync(&scene);
        for rows in [10, 1500, 3, 900] {
            let fill = format!(
                "INSERT INTO item(body, hash) WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {rows})
                 SELECT printf('%.300c', char(65 + i % 26)), i FROM c"
            );
            let sql = format!("BEGIN; DELETE FROM item; PRAGMA incremental_vacuum; {fill}; COMMIT; VACUUM");
            application.execute_batch(&sql).unwrap();
            sync(&scene);
            assert_eq!(content(&scene.database()), scene.restored_content(&[]), "{auto_vacuum}, {rows} rows");
        }
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        drop(application);
        assert_eq!(content(&scene.database()), scene.restored_content(&[]));
        open(&scene.database());
    }
}
