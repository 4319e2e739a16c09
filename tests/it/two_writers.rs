//! Two daemons that replicate to one place: a cloned virtual machine, a container that outlived its replacement. On a store that
//! honours conditional puts, and on one that accepts the condition and ignores it.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use waltrail::clock::SystemClock;
use waltrail::format::key::{SegmentKey, Span};
use waltrail::replicate::claim::{claim, open_replica};
use waltrail::replicate::ship::ShipError;
use waltrail::restore::history::History;
use waltrail::store::SharedStore;
use waltrail::store::memory::MemoryStore;

use crate::support::clock::Clock;
use crate::support::machine::Machine;
use crate::support::quirks::{Quirk, Quirky};
use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, insert, open, run, stderr, wait_for, waltrail};

const INSERT: &str = "INSERT INTO item(body, n) VALUES(randomblob(200), random())";

/// Both write on, each on its own line; everything that was confirmed to either is restored, and the one that was replaced ends
/// with an error that names its successor.
fn both_write_on(stack: impl Fn(SharedStore) -> SharedStore) {
    let mut first = Machine::new("PRAGMA page_size=4096", stack);
    first.start();
    first.commit(INSERT);
    first.sync();
    first.snapshot();
    let mut second = first.cloned();
    second.start();
    let taken_over = second.sync();
    for _ in 0..3 {
        first.commit(INSERT);
        second.commit(INSERT);
        let (of_first, of_second) = (first.sync(), second.sync());
        assert!(of_first.epoch < of_second.epoch, "{of_first} {of_second}");
        first.pass(Duration::from_secs(70));
    }
    second.snapshot();
    for machine in [&first, &second] {
        for &position in machine.states.keys() {
            machine.check(position);
        }
    }
    // The newest line is that of the one that came last.
    first.pass(Duration::from_secs(3601));
    first.commit(INSERT);
    match first.shipping_error() {
        ShipError::Replaced { epoch, .. } => assert_eq!(epoch, taken_over.epoch),
        other => panic!("{other}"),
    }
    second.commit(INSERT);
    let newest = second.sync();
    for machine in [&first, &second] {
        for &position in machine.states.keys() {
            machine.check(position);
        }
    }
    second.check(newest);
    // Started again, it takes over in turn, on its own database.
    first.start();
    let again = first.sync();
    assert!(again.epoch > newest.epoch);
    first.check(again);
    second.check(newest);
}

/// The successor's snapshot has extents in the object of the one that was replaced. Asked for a snapshot, that one would make an object
/// of the same name, with other extents.
#[test]
fn who_was_replaced_makes_no_snapshot() {
    let mut first = Machine::new("PRAGMA page_size=4096", |store| store);
    first.application().execute_batch("INSERT INTO item(body) VALUES(randomblob(3000000))").unwrap();
    first.start();
    first.commit(INSERT);
    first.sync();
    first.snapshot();
    let objects = |machine: &Machine| -> Vec<_> {
        let stored = machine.stored().into_iter().filter(|object| object.key.starts_with("snap/"));
        stored.map(|object| (object.key.clone(), machine.object(&object))).collect()
    };
    let before = objects(&first);
    let mut second = first.cloned();
    second.start();
    second.commit(INSERT);
    second.sync();
    second.snapshot();
    let newest = second.sync();
    assert!(second.sources(&second.plan(newest)).len() > 1, "it has extents in the first one's object");
    first.snapshot();
    assert_eq!((first.replaced, first.is_running()), (1, false));
    assert!(before.iter().all(|object| objects(&first).contains(object)));
    second.check(newest);
}

#[test]
fn of_two_writers_the_replaced_one_ends_and_nothing_is_lost() {
    both_write_on(|store| store);
}

#[test]
fn so_too_on_a_store_that_ignores_conditions() {
    both_write_on(|store| Quirky::shared(store, Quirk::IgnoresConditions));
}

/// A real daemon on one of two machines: the second one's files are a copy of the first one's.
struct Writer {
    scene: Scene,
    clock: Clock,
    application: Connection,
    config: String,
    /// What was confirmed to it: epoch, transaction, content.
    confirmed: Vec<(String, String, Vec<String>)>,
}

impl Writer {
    fn new(application: Connection, scene: Scene, replica: &str) -> Self {
        let config = scene.path("waltrail.toml").display().to_string();
        let text =
            format!("[[database]]\npath = \"{}\"\nsync-interval = \"20ms\"\n{replica}", scene.database().display());
        std::fs::write(&config, text).unwrap();
        Self { scene, clock: Clock::new(), application, config, confirmed: Vec::new() }
    }

    fn clone_to_another_machine(&self, replica: &str) -> Self {
        let scene = Scene::new();
        for name in ["app.db", "app.db-wal", ".app.db-waltrail"] {
            let copied =
                Command::new("cp").arg("-r").arg(self.scene.path(name)).arg(scene.path(name)).status().unwrap();
            assert!(copied.success());
        }
        Self::new(open(&scene.database()), scene, replica)
    }

    fn start(&self) -> Daemon {
        let log = self.scene.path("daemon.log");
        Daemon::start_with_clock(&["--config", &self.config], &log, &self.clock)
    }

    fn sync(&self) {
        let config = &self.config;
        wait_for("a sync", || run(["sync", "--config", config, "--timeout", "60s"]).status.success().then_some(()));
    }

    fn write(&mut self) {
        insert(&self.application, 20);
        count_up(&self.application);
        self.sync();
        let status = run(["status", "--config", &self.config, "--format", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        let position = &status["confirmed"]["position"];
        let (epoch, txid) = (position["epoch"].to_string(), position["txid"].to_string());
        self.confirmed.push((epoch, txid, content(&self.scene.database())));
    }

    fn check(&self) {
        let (database, output) = (self.scene.database(), self.scene.path("out.db"));
        for (epoch, txid, right) in &self.confirmed {
            let done = waltrail()
                .args(["restore", "--config", &self.config, "--force", "--epoch", epoch, "--txid", txid, "--output"])
                .args([&output, &database])
                .output()
                .unwrap();
            assert!(done.status.success(), "{}", stderr(&done));
            assert!(content(&output) == *right, "transaction {txid} of epoch {epoch} is restored wrong");
        }
    }
}

/// Two real daemons on one place, each on files of its own. `replica` is what the configuration says of the place; `at_once`: whether they
/// are started in the same moment, too.
pub fn two_daemons(replica: &str, at_once: bool) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 200, "");
    let mut first = Writer::new(application, scene, replica);
    let mut daemon = first.start();
    first.write();
    let mut second = first.clone_to_another_machine(replica);
    let successor = second.start();
    for _ in 0..3 {
        second.write();
        first.write();
    }
    let epochs = [&first, &second].map(|writer| writer.confirmed.last().unwrap().0.clone());
    assert_ne!(epochs[0], epochs[1]);
    // The hour is over in which the first one did not look.
    first.clock.set(0, 3700);
    count_up(&first.application);
    wait_for("the end of the one that was replaced", || {
        // What is captured is shipped only after the look.
        count_up(&first.application);
        (!daemon.is_running()).then_some(())
    });
    assert_eq!(daemon.terminate(), Some(16), "{}", first.scene.log());
    let says = format!("(epoch {})", epochs[1]);
    assert!(
        first.scene.log().contains("was taken over by") && first.scene.log().contains(&says),
        "{}",
        first.scene.log()
    );
    first.scene.expect_error("was taken over by");
    second.write();
    // Started again it takes over in turn, on its own database; both lines are whole.
    let daemon = first.start();
    first.write();
    assert_eq!((daemon.terminate(), successor.terminate()), (Some(0), Some(0)), "{}", first.scene.log());
    // Each gets an epoch of its own.
    let daemon = first.start();
    if !at_once {
        first.sync();
    }
    let both = [daemon, second.start()];
    first.write();
    second.write();
    let epochs = [&first, &second].map(|writer| writer.confirmed.last().unwrap().0.clone());
    assert_ne!(epochs[0], epochs[1]);
    both.into_iter().for_each(|daemon| assert_eq!(daemon.terminate(), Some(0)));
    first.check();
    second.check();
    let verified = run(["verify", "--config", &first.config, "--depth", "data"]);
    assert_eq!(verified.status.code(), Some(0), "{}{}", String::from_utf8_lossy(&verified.stdout), stderr(&verified));
}

#[test]
fn two_real_daemons_on_one_place() {
    let server = S3Server::start();
    // Not at once: this server looks whether an object is there and then writes it, so two conditional puts in one moment may both
    // succeed. What Amazon S3 promises is tried in `many_claims_in_one_moment`.
    two_daemons(&format!("replica = \"{}\"\n", server.url("app")), false);
}

/// Writers that start in the same moment: each gets an epoch of its own.
#[tokio::test]
async fn many_claims_in_one_moment() {
    for honours in [true, false] {
        let memory: SharedStore = Arc::new(MemoryStore::new());
        let store: SharedStore = if honours { memory } else { Quirky::shared(memory, Quirk::IgnoresConditions) };
        let store = Quirky::shared(store, Quirk::Interleaves);
        let clock = SystemClock::new();
        let replica = open_replica(&store, &clock).await.unwrap();
        assert_eq!(replica.has_conditional_puts, honours);
        let claims = (0..6).map(|_| claim(&store, &replica, None, &clock));
        let claimed = futures_util::future::join_all(claims).await;
        let mut epochs: Vec<u32> = claimed.iter().map(|claimed| claimed.as_ref().unwrap().record.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        assert_eq!(epochs.len(), 6, "{epochs:?}");
        // What is read is what each of them believes.
        let history = History::load(&store).await.unwrap();
        assert_eq!(history.epochs.len(), 6);
        for claimed in claimed {
            let record = claimed.unwrap().record;
            assert_eq!(history.epochs[&record.epoch].record, record);
        }
    }
}

/// An object stands where the next segment belongs, and it is not what a put of ours with a lost answer would have left.
#[test]
fn somebody_elses_object_is_not_taken_for_ours() {
    for ours in [true, false] {
        let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
        machine.start();
        machine.commit(INSERT);
        let before = machine.sync();
        machine.pass(Duration::from_secs(2));
        // The time stands still, so the next segment's name is known.
        let (txid, now_ms) = (before.txid + 1, waltrail::clock::Clock::now_ms(&*machine.clock));
        let span = Span { epoch: before.epoch, first_txid: txid, last_txid: txid, time_ms: now_ms };
        let key = SegmentKey(span).to_string();
        machine.commit(INSERT);
        if ours {
            let after = machine.sync();
            assert!(machine.stored().iter().any(|object| object.key == key), "{key} is not the name");
            machine.check(after);
            continue;
        }
        machine.put(&key, b"somebody else's");
        match machine.shipping_error() {
            ShipError::Foreign { key: named, .. } => assert_eq!(named, key),
            other => panic!("{other}"),
        }
        machine.check(before);
    }
}
