//! POSIX locks belong to the process: who closes any descriptor of a file drops all locks that the process has on it, those of SQLite's
//! connections, too. Then the next application to close its last connection deletes the WAL under the daemon.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::scene::Scene;
use crate::support::syscalls::{CLOSES, Call, Verdict};
use crate::support::{Daemon, content, count_up, create_database, insert, open, run, stderr, wait_for};

/// What was closed, of the files that carry locks.
type Closed = Arc<Mutex<Vec<PathBuf>>>;

fn start_watched(scene: &Scene) -> (Daemon, Closed) {
    let closed = Closed::default();
    let locked = [scene.database(), scene.path("app.db-shm")];
    let noted = closed.clone();
    let decide = move |call: &Call| {
        noted.lock().unwrap().extend(call.paths().into_iter().filter(|path| locked.contains(path)));
        Verdict::Goes
    };
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nsync-interval = \"20ms\"\ncheckpoint-threshold = \"100KB\"\n\
         merge = [\"200ms\"]\nsnapshot-interval = \"2s\"\nverify-interval = \"500ms\"\npresence-interval = \"300ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(scene.path("waltrail.toml"), text).unwrap();
    let config = scene.path("waltrail.toml").display().to_string();
    (Daemon::start_under(&["--config", &config], &scene.path("daemon.log"), CLOSES, decide), closed)
}

#[test]
fn no_descriptor_of_the_database_is_closed_while_connections_live() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 200, "");
    let database = scene.database().display().to_string();
    let config = scene.path("waltrail.toml").display().to_string();
    let (daemon, closed) = start_watched(&scene);
    wait_for("the daemon", || run(["sync", &database]).status.success().then_some(()));
    let count_closed = || closed.lock().unwrap().len();
    let at_start = count_closed();
    let check = |what: &str| {
        assert_eq!(count_closed(), at_start, "{what}: {:?}\n{}", closed.lock().unwrap(), scene.log());
        for name in ["app.db", "app.db-shm"] {
            let is_held = daemon.holds_lock_on(&scene.path(name));
            assert!(is_held, "{what}: the lock on {name} is gone\n{}", scene.log());
        }
    };
    check("the start");
    for mode in ["PASSIVE", "FULL", "RESTART", "TRUNCATE"] {
        count_up(&application);
        application.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(())).unwrap();
        check(mode);
    }
    // More than the threshold, again and again: our own barriers.
    for _ in 0..30 {
        insert(&application, 100);
        std::thread::sleep(Duration::from_millis(10));
    }
    check("barriers");
    application.execute_batch("DELETE FROM item WHERE id % 3; VACUUM").unwrap();
    check("VACUUM");
    let beside: &[&[&str]] = &[
        &["sync", &database],
        &["snapshot", &database],
        &["status", &database],
        &["verify", &scene.replica(), "--against", &database],
        &["doctor", "--config", &config],
        &["log", &scene.replica()],
        &["mark", "here", "--config", &config],
        &["prune", "--config", &config],
    ];
    for arguments in beside {
        let done = run(*arguments);
        assert!(done.status.success(), "{arguments:?}: {}{}", stderr(&done), String::from_utf8_lossy(&done.stdout));
        count_up(&application);
        check(arguments[0]);
    }
    // Other connections come and go.
    for _ in 0..5 {
        count_up(&open(&scene.database()));
    }
    // A quiet database is checkpointed after a second; a drill, a snapshot and merges come by themselves.
    std::thread::sleep(Duration::from_millis(2500));
    check("quiet");
    // The application's last connection: SQLite would take the WAL away if the daemon's lock were gone.
    drop(application);
    assert!(scene.wal_len() > 0, "the WAL was deleted under the daemon");
    check("the application's end");
    count_up(&open(&scene.database()));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    // At the stop they are closed: so the test sees it when it happens.
    assert!(count_closed() > at_start, "closing is not seen");
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
}
