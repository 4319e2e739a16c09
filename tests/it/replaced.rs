//! Files that somebody replaces, deletes or writes to under the running daemon.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rusqlite::Connection;

use crate::support::s3::S3Server;
use crate::support::scene::{COUNTER, Scene};
use crate::support::{
    Daemon, content, count_up, create_database, insert, number, open, run, wait_for, wait_for_restored,
};

/// A database that nobody has open but the daemon, with one count in storage.
fn followed() -> (Scene, Daemon) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 100, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    (scene, daemon)
}

/// Waits for a sync that says everything is confirmed; the thread may just be taking the database up again.
fn sync(database: &Path) {
    wait_for("a sync", || run(["sync", database.to_str().unwrap()]).status.success().then_some(()));
}

/// The file at the path is replaced under the running daemon.
#[test]
fn a_file_replaced_under_the_daemon() {
    let (scene, daemon) = followed();
    let other = create_database(&scene.path("other.db"), 20, "");
    other.execute_batch("UPDATE counter SET n = 77; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    drop(other);
    for suffix in ["-wal", "-shm"] {
        std::fs::remove_file(scene.path(&format!("app.db{suffix}"))).ok();
    }
    std::fs::rename(scene.path("other.db"), scene.database()).unwrap();
    scene.wait_for(77);
    assert!(scene.log().contains("was replaced or removed"), "{}", scene.log());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
}

/// Writes until it is told to stop.
fn write_on(database: PathBuf, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let application = open(&database);
        while !stop.load(Ordering::SeqCst) {
            count_up(&application);
            std::thread::sleep(Duration::from_millis(50));
        }
    })
}

/// The application goes on writing to the new file, or to the old one with another `-shm`, without a pause: who asks for a sync then
/// gets none for what is not there any more.
#[test]
fn files_replaced_under_the_daemon_and_written_to() {
    for is_other_database in [true, false] {
        let (scene, daemon) = followed();
        if is_other_database {
            let other = create_database(&scene.path("other.db"), 20, "");
            other.execute_batch("UPDATE counter SET n = 77; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
            drop(other);
            std::fs::remove_file(scene.path("app.db-wal")).unwrap();
        }
        std::fs::remove_file(scene.path("app.db-shm")).unwrap();
        if is_other_database {
            std::fs::rename(scene.path("other.db"), scene.database()).unwrap();
        }
        let stop = Arc::new(AtomicBool::new(false));
        let writer = write_on(scene.database(), stop.clone());
        std::thread::sleep(Duration::from_millis(400));
        let written = number(&open(&scene.database()), COUNTER);
        sync(&scene.database());
        let restored = number(&open(&scene.restored(&scene.replica(), &[])), COUNTER);
        assert!(restored >= written, "{restored} of {written}, {}", scene.log());
        assert!(scene.log().contains("was replaced or removed"), "{}", scene.log());
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(content(&scene.database()), content(&scene.restored(&scene.replica(), &[])));
    }
}

/// The database is deleted while its last transactions wait for storage: they are shipped when that answers, and a stop before says
/// that they are not.
#[test]
fn a_database_that_is_deleted_is_shipped_to_its_end() {
    for is_stopped_before in [false, true] {
        let (scene, server) = (Scene::new(), S3Server::start());
        let application = create_database(&scene.database(), 100, "");
        let replica = server.url("app");
        let config = scene.path("waltrail.toml");
        let text = format!(
            "shutdown-timeout = \"1s\"\n[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n",
            scene.database().display()
        );
        std::fs::write(&config, text).unwrap();
        let daemon = scene.start_with(&["--config", config.to_str().unwrap()]);
        sync(&scene.database());
        server.refuse(503);
        for _ in 0..3 {
            count_up(&application);
        }
        drop(application);
        for suffix in ["", "-wal", "-shm"] {
            std::fs::remove_file(scene.path(&format!("app.db{suffix}"))).unwrap();
        }
        std::thread::sleep(Duration::from_secs(3));
        if is_stopped_before {
            scene.expect_error("stopped with transactions not confirmed");
            assert_eq!(daemon.terminate(), Some(15), "{}", scene.log());
            continue;
        }
        server.refuse(0);
        wait_for_restored(&replica, scene.directory.path(), COUNTER, 3);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    }
}

/// An operator puts an older copy in the database's place with `cp`, which keeps the inode. SQLite does not notice, and takes it for
/// the database that its WAL belongs to, because all of that stands in the main file. What the WAL holds must not come back over it:
/// not from us, and not from SQLite, which would recover it for who opens the database as the first one.
#[test]
fn a_database_that_is_written_over_in_place() {
    for (is_held_open, changed) in
        [(false, "id % 2 = 0"), (true, "id % 2 = 0"), (false, "id < 400"), (true, "id < 400")]
    {
        let scene = Scene::new();
        let application = create_database(&scene.database(), 3000, "");
        application.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        drop(application);
        scene.copy("app.db", "backup.db");
        let daemon = scene.start();
        let application = open(&scene.database());
        application.execute_batch(&format!("UPDATE item SET body = 'gone ' || body WHERE {changed}")).unwrap();
        count_up(&application);
        sync(&scene.database());
        // What is quiet is checkpointed by then.
        std::thread::sleep(Duration::from_secs(2));
        let held = is_held_open.then_some(application);
        scene.copy("backup.db", "app.db");
        wait_for(&format!("it to be noticed {is_held_open} {changed}"), || {
            scene.log().contains("by something else than SQLite").then_some(())
        });
        let application = open(&scene.database());
        count_up(&application);
        sync(&scene.database());
        let is_right = |database: &Connection| {
            let gone = number(database, "SELECT count(*) FROM item WHERE body LIKE 'gone %'");
            let sound: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            (number(database, COUNTER), gone, sound) == (1, 0, "ok".to_owned())
        };
        assert!(is_right(&application), "{is_held_open} {changed} {}", scene.log());
        assert!(is_right(&open(&scene.restored(&scene.replica(), &[]))), "{is_held_open} {changed} {}", scene.log());
        drop(held);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        let daemon = scene.start();
        count_up(&application);
        sync(&scene.database());
        assert_eq!(scene.restored_content(&[]), content(&scene.database()), "{}", scene.log());
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    }
}

/// As deployments do that switch a link from one release to the next: of the link itself, or of a directory above.
#[test]
fn a_link_that_is_pointed_elsewhere() {
    for is_above in [false, true] {
        let scene = Scene::new();
        for release in ["one", "two"] {
            std::fs::create_dir(scene.path(release)).unwrap();
            let application = create_database(&scene.path(release).join("app.db"), 50, "");
            application.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        }
        let point_to = |release: &str| {
            let (link, target) = match is_above {
                true => (scene.path("current"), scene.path(release)),
                false => (scene.path("app.db"), scene.path(release).join("app.db")),
            };
            std::fs::remove_file(&link).ok();
            symlink(target, link).unwrap();
        };
        point_to("one");
        let database = if is_above { scene.path("current").join("app.db") } else { scene.database() };
        let daemon = scene.start_with(&[database.to_str().unwrap(), &scene.replica()]);
        sync(&database);
        point_to("two");
        let application = open(&scene.path("two/app.db"));
        application.execute_batch("UPDATE counter SET n = 77").unwrap();
        if is_above {
            // The daemon's socket is beside the first one.
            scene.wait_for(77);
        } else {
            sync(&database);
        }
        let restored = scene.restored(&scene.replica(), &[]);
        assert_eq!(number(&open(&restored), COUNTER), 77, "{}", scene.log());
        insert(&application, 20);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(scene.restored_content(&[]), content(&scene.path("two/app.db")));
    }
}
