//! Starts that cost what changed.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use waltrail::format::Position;
use waltrail::replicate::state::{LocalState, StateDirectory};
use waltrail::sqlite::live::FileIdentity;
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::{Operation, SharedStore, StoreErrorKind};

use crate::support::machine::Machine;
use crate::support::scene::{COUNTER, Scene, now_ms};
use crate::support::{Daemon, content, count_up, create_database, insert, number, open, run, stderr, wait_for};

fn len_bytes(objects: &[String]) -> u64 {
    objects.iter().map(|object| std::fs::metadata(object).unwrap().len()).sum()
}

fn new_objects(scene: &Scene, before: &[String]) -> Vec<String> {
    scene.objects("").into_iter().filter(|object| !before.contains(object)).collect()
}

fn wait_for_snapshots(scene: &Scene, count: usize) {
    wait_for("a snapshot", || (scene.objects("snap").len() == count).then_some(()));
}

/// A scene whose database of some megabytes is replicated, with the daemon stopped.
fn replicated() -> (Scene, rusqlite::Connection) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 8000, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    (scene, application)
}

/// The application goes on while the daemon is away, until the WAL it left is gone: what differs is one transaction.
#[test]
fn what_differs_is_shipped_as_one_transaction() {
    let (scene, application) = replicated();
    let before = scene.objects("");
    for id in 0..50 {
        application.execute("UPDATE item SET hash = 'away' WHERE id = 1 + ?1 * 100", [id]).unwrap();
    }
    application.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    count_up(&application);
    let daemon = scene.start();
    scene.wait_for(2);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let new = new_objects(&scene, &before);
    assert!(new.iter().all(|object| !object.contains("/snap/")), "{new:?}\n{}", scene.log());
    assert!(len_bytes(&new) < 600_000, "{} bytes\n{}", len_bytes(&new), scene.log());
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    let log = String::from_utf8(run(["log", &scene.replica(), "--transactions"]).stdout).unwrap();
    assert_eq!(log.matches("coalesced").count(), 1, "{log}");
}

/// The local state is lost: the database is read, and what stands in storage is not stored again.
#[test]
fn a_lost_state_directory_costs_an_index() {
    let (scene, application) = replicated();
    let before = scene.objects("");
    std::fs::remove_dir_all(scene.path(".app.db-waltrail")).unwrap();
    count_up(&application);
    let daemon = scene.start();
    wait_for_snapshots(&scene, 2);
    insert(&application, 10);
    count_up(&application);
    scene.wait_for(3);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let new = new_objects(&scene, &before);
    // Two extents or three hold what changed; the database has a dozen.
    assert!(len_bytes(&new) * 3 < len_bytes(&before), "{} of {}", len_bytes(&new), len_bytes(&before));
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
}

/// Somebody deleted the first snapshot, which the second one has extents in, and the local state is lost, too: what is gone is
/// not referred to again.
#[test]
fn a_snapshot_does_not_rely_on_what_is_gone() {
    let (scene, application) = replicated();
    let first = scene.objects("snap").remove(0);
    let daemon = scene.start();
    count_up(&application);
    let database = scene.database().display().to_string();
    wait_for("a snapshot", || run(["snapshot", &database]).status.success().then_some(()));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    std::fs::remove_file(&first).unwrap();
    let done = run(["restore", &scene.replica(), "--output", scene.path("x.db").to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(13), "{}", stderr(&done));
    assert!(stderr(&done).contains("is missing"), "{}", stderr(&done));
    std::fs::remove_dir_all(scene.path(".app.db-waltrail")).unwrap();
    count_up(&application);
    let daemon = scene.start();
    scene.wait_for(3);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
}

/// While the first snapshot is read, segments are not taken by the store any more: a snapshot that needs them is not there before
/// them.
#[test]
fn a_snapshot_is_not_there_before_what_it_needs() {
    let (looks, is_away) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, away) = (looks.clone(), is_away.clone());
    let stack = move |store: SharedStore| -> SharedStore {
        let (looks, away) = (count.clone(), away.clone());
        Arc::new(Faulty::new(store, move |request| {
            if request.operation == Operation::List && request.key == "snap/" {
                looks.fetch_add(1, Ordering::SeqCst);
            }
            let is_segment = request.operation == Operation::Put && request.key.starts_with("log/");
            match is_segment && away.load(Ordering::SeqCst) {
                true => Fault::Before(StoreErrorKind::Unavailable),
                false => Fault::None,
            }
        }))
    };
    let mut machine = Machine::new("PRAGMA page_size=4096", stack);
    // Many extents, so that it is read in many turns.
    let fill = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 4000)
                INSERT INTO item(body) SELECT randomblob(4000) FROM c";
    machine.application().execute_batch(fill).unwrap();
    machine.start();
    wait_for("the beginning of the snapshot", || {
        machine.turns(1);
        // The claim looks there, too.
        (looks.load(Ordering::SeqCst) == 2).then_some(())
    });
    machine.turns(3);
    is_away.store(true, Ordering::SeqCst);
    machine.commit("INSERT INTO item(body) VALUES(randomblob(100))");
    let snapshots = |machine: &Machine| machine.stored().iter().any(|object| object.key.starts_with("snap/"));
    for _ in 0..100 {
        machine.turns(10);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(!snapshots(&machine));
    is_away.store(false, Ordering::SeqCst);
    let newest = machine.sync();
    machine.check(newest);
}

/// A restore, days go by, and what was restored is let go before the next start: what would go on from it could not be restored.
#[test]
fn a_restored_state_that_was_let_go_is_nothing_to_go_on_from() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    let a_day = std::time::Duration::from_secs(86_400);
    machine.start();
    machine.commit("INSERT INTO item(body) VALUES(randomblob(100))");
    let old = machine.sync();
    for _ in 0..3 {
        machine.pass(a_day);
        machine.commit("INSERT INTO item(body) VALUES(randomblob(100))");
        machine.snapshot();
    }
    machine.sync();
    machine.stop();
    machine.restore(old, true);
    machine.pass(4 * a_day);
    let outcome = machine.prune(&mut Default::default()).unwrap();
    assert!(outcome.deleted_objects > 0);
    machine.start();
    let newest = machine.sync();
    machine.check(newest);
    machine.commit("INSERT INTO item(body) VALUES(randomblob(100))");
    let newest = machine.sync();
    machine.check(newest);
}

/// After a restore the next start forks an epoch at the restored transaction, and uploads its record alone. What was undone
/// stays.
#[test]
fn after_a_restore_a_start_uploads_its_record() {
    let (scene, application) = replicated();
    let middle = scene.restored_content(&[]);
    let middle_ms = now_ms();
    let daemon = scene.start();
    insert(&application, 20);
    count_up(&application);
    scene.wait_for(2);
    assert_eq!(daemon.terminate(), Some(0));
    drop(application);
    let undone = content(&scene.database());
    let at = waltrail::clock::format_time(middle_ms);
    let database = scene.database();
    let done = run(["restore", &scene.replica(), "--force", "--at", &at, "--output", database.to_str().unwrap()]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(stderr(&done).contains("goes on from"), "{}", stderr(&done));
    let before = scene.objects("");
    let daemon = scene.start();
    wait_for("the claim", || (scene.objects("epochs").len() == 3).then_some(()));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let new = new_objects(&scene, &before);
    assert_eq!(new.len(), 1, "{new:?}\n{}", scene.log());
    assert!(new[0].contains("/epochs/00000003"), "{new:?}");
    let application = open(&database);
    assert_eq!(number(&application, COUNTER), 1);
    application.execute_batch("UPDATE counter SET n = 50").unwrap();
    scene.wait_for(50);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert!(new_objects(&scene, &before).iter().all(|object| !object.contains("/snap/")), "{}", scene.log());
    assert_eq!(content(&database), scene.restored_content(&[]));
    assert_eq!(scene.restored_content(&["--epoch", "2"]), undone);
    assert_eq!(scene.restored_content(&["--at", &at]), middle);
}

/// An application that writes between the restore and the start: what it wrote is one transaction of the new epoch.
#[test]
fn a_restored_database_that_was_written_before_the_start() {
    let (scene, application) = replicated();
    drop(application);
    let database = scene.database();
    let done = run(["restore", &scene.replica(), "--force", "--output", database.to_str().unwrap()]);
    assert!(done.status.success(), "{}", stderr(&done));
    let application = open(&database);
    insert(&application, 5);
    application.execute_batch("UPDATE counter SET n = 7").unwrap();
    let snapshots = scene.objects("snap");
    let daemon = scene.start();
    scene.wait_for(7);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(scene.objects("snap"), snapshots, "{}", scene.log());
    assert_eq!(content(&database), scene.restored_content(&[]));
}

/// A snapshot uploads what changed since the one before it; when little of that one is still needed, all of it.
#[test]
fn a_snapshot_costs_what_changed() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 20_000, "");
    let config = scene.path("waltrail.toml");
    let text = "[[database]]\npath = \"DB\"\nreplica = \"REPLICA\"\nsnapshot-interval = \"1ms\"\n";
    let text = text.replace("DB", scene.database().to_str().unwrap()).replace("REPLICA", &scene.replica());
    std::fs::write(&config, text).unwrap();
    let daemon = scene.start_with(&["--config", config.to_str().unwrap()]);
    wait_for_snapshots(&scene, 1);
    let snapshot_len = |number: usize| Path::new(&scene.objects("snap")[number]).metadata().unwrap().len();
    let full = snapshot_len(0);
    application.execute_batch("UPDATE item SET hash = 'changed' WHERE id IN (5, 19000)").unwrap();
    wait_for_snapshots(&scene, 2);
    let second = snapshot_len(1);
    assert!(second * 4 < full, "{second} of {full}");
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    // Most of the first one is replaced: what is left of it is taken over, and nothing refers to it any more.
    application.execute_batch("UPDATE item SET body = hex(randomblob(150)) WHERE id > 4000").unwrap();
    wait_for_snapshots(&scene, 3);
    std::fs::remove_file(&scene.objects("snap")[0]).unwrap();
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// `sync` and `snapshot` ask the daemon; without one they say so.
#[test]
fn asking_the_daemon() {
    let scene = Scene::new();
    let database = scene.database();
    let name = database.to_str().unwrap();
    let application = create_database(&database, 3000, "");
    let nobody = run(["sync", name]);
    assert_eq!(nobody.status.code(), Some(1), "{}", stderr(&nobody));
    assert!(stderr(&nobody).contains("no daemon follows"), "{}", stderr(&nobody));
    let daemon = scene.start();
    wait_for("the socket", || run(["sync", name]).status.success().then_some(()));
    for n in 1..20 {
        count_up(&application);
        let done = run(["sync", name]);
        assert!(done.status.success(), "{}", stderr(&done));
        // What was confirmed is what a restore finds, at once.
        let restored = scene.restored(&scene.replica(), &[]);
        assert_eq!(number(&open(&restored), COUNTER), n);
    }
    let before = scene.objects("snap").len();
    let done = run(["snapshot", name]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(scene.objects("snap").len(), before + 1);
    // A dead daemon leaves a socket that nobody listens at.
    daemon.kill();
    assert!(stderr(&run(["snapshot", name])).contains("no daemon follows"));
    let daemon = scene.start();
    wait_for("the socket", || run(["sync", name]).status.success().then_some(()));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// What can't be read at a start is neither damaged nor gone: nothing is discarded, and it is tried again.
#[test]
fn a_file_of_the_local_state_that_can_not_be_read_for_a_while() {
    for is_of_the_spool in [false, true] {
        let scene = Scene::new();
        scene.allow_error("the replica's directory is not there");
        scene.expect_error("Permission denied");
        let application = create_database(&scene.database(), 100, "");
        let daemon = scene.start();
        count_up(&application);
        scene.wait_for(1);
        std::fs::rename(scene.path("replica"), scene.path("unmounted")).unwrap();
        count_up(&application);
        let state = scene.path(".app.db-waltrail");
        let waiting = wait_for("a segment that waits", || {
            let entries = std::fs::read_dir(state.join("spool")).unwrap().map(|entry| entry.unwrap().path());
            entries.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("log"))
        });
        std::thread::sleep(Duration::from_millis(200));
        daemon.kill();
        std::fs::rename(scene.path("unmounted"), scene.path("replica")).unwrap();
        let unreadable = if is_of_the_spool { waiting } else { state.join("state") };
        let allow = |mode| std::fs::set_permissions(&unreadable, std::fs::Permissions::from_mode(mode)).unwrap();
        allow(0);
        let arguments = [scene.database().display().to_string(), scene.replica()];
        let arguments = [arguments[0].as_str(), arguments[1].as_str()];
        let daemon = Daemon::start_bound_by_permissions(&arguments, &scene.path("daemon.log"));
        wait_for("the failure", || scene.log().contains("Permission denied").then_some(()));
        std::thread::sleep(Duration::from_secs(2));
        assert!(unreadable.exists(), "{}", scene.log());
        allow(0o600);
        scene.wait_for(2);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(scene.objects("snap").len(), 1, "it went on: {}", scene.log());
    }
}

/// Overwrites a few bytes of a page of the main file, and gives the saved state the identity that
/// the file has then: what a power failure does to a file that is not synced. Another process
/// writes, because to close the file here would drop SQLite's locks.
fn change_page_unseen(machine: &Machine, page_number: u64) {
    let offset = page_number * 4096 - 8;
    let database = machine.database();
    let change = format!("head -c 8 /dev/urandom | dd of='{}' bs=1 seek={offset} conv=notrunc", database.display());
    assert!(Command::new("sh").args(["-c", &change]).output().unwrap().status.success());
    let directory = StateDirectory::open(&machine.state_dir()).unwrap();
    let (state, overlay) = directory.load().unwrap().unwrap();
    let state = LocalState { main: FileIdentity::of(&database).unwrap(), is_main_complete: true, ..state };
    directory.save(&state, &overlay, true).unwrap();
}

fn snapshot_count(machine: &Machine) -> usize {
    machine.stored().iter().filter(|object| object.key.starts_with("snap/")).count()
}

/// A machine with a database of 50 pages, of which the WAL holds a few.
fn machine_with_pages() -> (Machine, Position) {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.start();
    machine.commit("INSERT INTO item(body) VALUES(zeroblob(200000))");
    machine.sync();
    machine.application().query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).unwrap();
    machine.turns(2);
    machine.commit("INSERT INTO item(n) VALUES(1)");
    let position = machine.sync();
    machine.stop();
    let directory = StateDirectory::open(&machine.state_dir()).unwrap();
    let (state, _) = directory.load().unwrap().unwrap();
    assert!(state.wal_position().unwrap().frame_count < 10, "the WAL was restarted");
    (machine, position)
}

#[test]
fn untouched_main_file_is_trusted_within_one_boot_only() {
    let (mut machine, before) = machine_with_pages();
    change_page_unseen(&machine, 20);
    machine.start();
    let same_boot = machine.ship();
    assert_eq!((same_boot.txid, snapshot_count(&machine)), (before.txid, 1), "no page was compared");
    machine.stop();
    machine.clock.reboot();
    machine.start();
    let next_boot = machine.sync();
    assert_eq!(next_boot.txid, before.txid + 1, "what differs is one transaction");
    machine.check(next_boot);
    machine.check(before);
    // The comparison is made once in a boot.
    machine.stop();
    change_page_unseen(&machine, 21);
    machine.start();
    assert_eq!(machine.ship().txid, next_boot.txid, "no page was compared");
    machine.stop();
    machine.clock.reboot();
    machine.start();
    let last_boot = machine.sync();
    assert_eq!(last_boot.txid, next_boot.txid + 1);
    machine.check(last_boot);
}

#[test]
fn unchanged_database_resumes_after_a_reboot() {
    let (mut machine, before) = machine_with_pages();
    machine.clock.reboot();
    machine.start();
    machine.commit("INSERT INTO item(n) VALUES(2)");
    let after = machine.sync();
    assert_eq!((after.txid, snapshot_count(&machine)), (before.txid + 1, 1), "the epoch continues");
    machine.check(after);
}

#[test]
fn restored_main_file_is_trusted_within_one_boot_only() {
    for is_rebooted in [false, true] {
        let (mut machine, before) = machine_with_pages();
        machine.restore(before, true);
        change_page_unseen(&machine, 20);
        if is_rebooted {
            machine.clock.reboot();
        }
        machine.start();
        let after = machine.ship();
        let difference = u64::from(is_rebooted);
        assert_eq!(after.txid, before.txid + difference, "rebooted: {is_rebooted}: what differs is one transaction");
        assert_eq!(snapshot_count(&machine), 1);
        if is_rebooted {
            let after = machine.sync();
            machine.check(after);
        }
        machine.check(before);
    }
}
