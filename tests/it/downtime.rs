//! What happened while nobody watched: never guessed, always restored as it is.

use std::path::Path;

use rusqlite::Connection;

use crate::support::scene::{Scene, now_ms};
use crate::support::{content, count_up, create_database, insert, open};

fn salts(database: &Path) -> Option<Vec<u8>> {
    let wal = std::fs::read(format!("{}-wal", database.display())).ok()?;
    wal.get(16..24).map(<[u8]>::to_vec)
}

/// Updates rows until SQLite has begun the WAL anew `times` times.
fn update_through_restarts(scene: &Scene, connection: &Connection, times: usize) {
    let mut seen = salts(&scene.database());
    let (mut restarts, mut turn) = (0, 0_i64);
    while restarts < times {
        turn += 1;
        assert!(turn < 20_000, "the WAL is not begun anew");
        let values = (turn, 1 + turn % 150);
        connection
            .execute(
                "UPDATE item SET body = printf('%.3000c', 'y') || ?1, hash = hex(randomblob(8)) WHERE id = ?2",
                values,
            )
            .unwrap();
        let now = salts(&scene.database());
        restarts += usize::from(now != seen);
        seen = now;
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stop {
    Terminate,
    Kill,
}

#[derive(Debug, Clone, Copy)]
enum Away {
    Nothing,
    AFewWrites,
    OneRestart,
    ThreeRestarts,
    WalDeletedByClosing,
    Vacuum,
    OlderCopyMovedIn,
    OlderCopyWrittenOver,
    WalDeletedByHand,
    ShrinksAndGrows,
    MadeAnew,
}

fn play(stop: Stop, away: Away, indexed: bool) {
    let scene = Scene::new();
    let mut application = create_database(&scene.database(), 200, "");
    if !indexed {
        application.execute_batch("DROP INDEX item_hash").unwrap();
    }
    application.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    scene.copy("app.db", "older.db");
    let daemon = scene.start();
    for _ in 0..60 {
        count_up(&application);
    }
    insert(&application, 50);
    scene.wait_for(60);
    match stop {
        Stop::Terminate => assert_eq!(daemon.terminate(), Some(0), "{}", scene.log()),
        Stop::Kill => daemon.kill(),
    }
    let snapshots_before = scene.objects("snap").len();
    let before = scene.restored_content(&[]);
    let before_ms = now_ms();
    let reopen = |application: Connection| {
        drop(application);
        open(&scene.database())
    };
    match away {
        Away::Nothing => {}
        Away::AFewWrites => insert(&application, 5),
        Away::OneRestart => update_through_restarts(&scene, &application, 1),
        Away::ThreeRestarts => update_through_restarts(&scene, &application, 3),
        Away::WalDeletedByClosing => {
            insert(&application, 5);
            application = reopen(application);
        }
        Away::Vacuum => application.execute_batch("DELETE FROM item WHERE id % 2; VACUUM").unwrap(),
        Away::OlderCopyMovedIn => {
            drop(application);
            std::fs::rename(scene.path("older.db"), scene.database()).unwrap();
            application = open(&scene.database());
        }
        Away::OlderCopyWrittenOver => {
            drop(application);
            scene.copy("older.db", "app.db");
            application = open(&scene.database());
        }
        Away::WalDeletedByHand => {
            drop(application);
            std::fs::remove_file(scene.path("app.db-wal")).ok();
            std::fs::remove_file(scene.path("app.db-shm")).ok();
            application = open(&scene.database());
            insert(&application, 3);
        }
        Away::ShrinksAndGrows => {
            application.execute_batch("DELETE FROM item; VACUUM").unwrap();
            insert(&application, 700);
        }
        Away::MadeAnew => {
            drop(application);
            for suffix in ["", "-wal", "-shm"] {
                std::fs::remove_file(scene.path(&format!("app.db{suffix}"))).ok();
            }
            application = create_database(&scene.database(), 10, "");
        }
    }
    application.execute_batch("UPDATE counter SET n = 1000").unwrap();
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1001);
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let case = format!("{stop:?} {away:?} indexed {indexed}");
    assert_eq!(content(&scene.database()), scene.restored_content(&[]), "{case}\n{}", scene.log());
    // History before the stop is still what it was, whatever came after.
    let at = waltrail::clock::format_time(before_ms);
    assert_eq!(scene.restored_content(&["--at", &at]), before, "{case} at {at}");
    // What differs is shipped, and nothing else.
    assert_eq!(scene.objects("snap").len(), snapshots_before, "{case}: no snapshot is needed\n{}", scene.log());
}

#[test]
fn nothing_and_a_little() {
    for stop in [Stop::Terminate, Stop::Kill] {
        play(stop, Away::Nothing, true);
        play(stop, Away::AFewWrites, true);
    }
}

#[test]
fn one_restart_of_the_wal() {
    for stop in [Stop::Terminate, Stop::Kill] {
        for indexed in [true, false] {
            play(stop, Away::OneRestart, indexed);
        }
    }
}

#[test]
fn several_restarts_of_the_wal() {
    for stop in [Stop::Terminate, Stop::Kill] {
        play(stop, Away::ThreeRestarts, true);
    }
}

#[test]
fn the_wal_is_gone() {
    for stop in [Stop::Terminate, Stop::Kill] {
        play(stop, Away::WalDeletedByClosing, true);
        play(stop, Away::WalDeletedByHand, true);
    }
}

#[test]
fn vacuum_and_size() {
    for stop in [Stop::Terminate, Stop::Kill] {
        play(stop, Away::Vacuum, true);
        play(stop, Away::ShrinksAndGrows, true);
    }
}

#[test]
fn another_file() {
    for stop in [Stop::Terminate, Stop::Kill] {
        play(stop, Away::OlderCopyMovedIn, true);
        play(stop, Away::OlderCopyWrittenOver, true);
        play(stop, Away::MadeAnew, true);
    }
}

/// The main file is replaced in place, while the WAL that continues stays: the chain of checksums alone would say that
/// nothing was missed.
#[test]
fn a_wal_that_continues_over_another_file() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 500, "");
    application.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    scene.copy("app.db", "older.db");
    application.execute_batch("UPDATE item SET body = 'newer'; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0));
    // The daemon leaves the WAL where it is; the application has crashed.
    std::mem::forget(application);
    scene.copy("older.db", "app.db");
    let daemon = scene.start();
    scene.wait_for(1);
    let log = crate::support::wait_for("the verdict", || {
        let log = scene.log();
        log.contains("changed while it was not followed").then_some(log)
    });
    assert_eq!(daemon.terminate(), Some(0), "{log}");
    scene.copy("app.db", "copy.db");
    scene.copy("app.db-wal", "copy.db-wal");
    assert_eq!(content(&scene.path("copy.db")), scene.restored_content(&[]));
}

/// A restart that can prove that nothing was missed costs one small object.
#[test]
fn a_restart_uploads_one_small_object() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 5000, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0));
    let before = scene.objects("");
    for round in 0..3 {
        let daemon = scene.start();
        crate::support::wait_for("the claim", || (scene.objects("epochs").len() == round + 2).then_some(()));
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    }
    let new: Vec<String> = scene.objects("").into_iter().filter(|object| !before.contains(object)).collect();
    assert_eq!(new.len(), 3, "{new:?}\n{}", scene.log());
    assert!(new.iter().all(|object| object.contains("/epochs/") && std::fs::metadata(object).unwrap().len() < 1000));
    count_up(&application);
    let daemon = scene.start();
    scene.wait_for(2);
    assert_eq!(daemon.terminate(), Some(0));
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
}
