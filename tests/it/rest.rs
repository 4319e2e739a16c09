//! Databases at rest: nobody watches them, and still nothing is missed.

use std::time::Duration;

use rusqlite::Connection;
use waltrail::format::Position;

use crate::support::machine::Machine;

const INSERT: &str = "INSERT INTO item(body, n) VALUES(randomblob(2000), random())";

/// A machine whose daemon rests, and the state that it rests in.
fn at_rest() -> (Machine, Position) {
    let mut machine = Machine::new("PRAGMA page_size=1024", |store| store);
    machine.start();
    machine.commit(INSERT);
    machine.commit(INSERT);
    machine.sync();
    machine.snapshot();
    machine.pass(Duration::from_secs(11));
    machine.turns(3);
    let position = machine.newest.unwrap();
    assert!(machine.rest());
    (machine, position)
}

fn check_all(machine: &Machine) {
    for position in machine.states.keys() {
        machine.check(*position);
    }
}

#[test]
fn what_is_committed_during_a_rest_is_seen_transaction_by_transaction() {
    let (mut machine, before) = at_rest();
    machine.sees_all = true;
    for _ in 0..5 {
        machine.commit(INSERT);
    }
    let after = machine.sync();
    assert_eq!(after, Position { txid: before.txid + 5, ..before }, "the same epoch, and each commit has its number");
    assert_eq!(machine.states.len(), 6, "each of them can be restored");
    check_all(&machine);
    assert_eq!(machine.stored().iter().filter(|object| object.key.starts_with("epochs/")).count(), 1);
}

#[test]
fn a_wal_that_was_begun_anew_after_all_was_checkpointed_is_read_from_its_beginning() {
    let (mut machine, before) = at_rest();
    let wal =
        || std::fs::read(format!("{}-wal", machine.database().display())).unwrap().get(16..24).map(<[u8]>::to_vec);
    let salts = wal();
    machine.application().execute_batch(INSERT).unwrap();
    assert_ne!(wal(), salts, "the scene is right");
    let after = machine.sync();
    assert_eq!(after.txid, before.txid + 1);
    check_all(&machine);
}

#[test]
fn what_was_checkpointed_during_a_rest_is_one_transaction() {
    for closes in [false, true] {
        let (mut machine, before) = at_rest();
        for _ in 0..3 {
            machine.commit(INSERT);
            match closes {
                true => {
                    machine.application = None;
                    machine.open_application();
                }
                false => {
                    machine.application().query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
                }
            }
        }
        machine.commit(INSERT);
        let after = machine.sync();
        assert_eq!((after.epoch, after.txid), (before.epoch, before.txid + 1));
        machine.check(after);
        machine.check(before);
    }
}

#[test]
fn a_file_that_was_put_in_the_place_of_the_resting_one_is_noticed() {
    let (mut machine, before) = at_rest();
    let older = machine.directory.path().join("older.db");
    let copy = Connection::open(&older).unwrap();
    copy.execute_batch(
        "PRAGMA page_size=1024; PRAGMA journal_mode=WAL; CREATE TABLE other(x); INSERT INTO other VALUES(7)",
    )
    .unwrap();
    drop(copy);
    machine.application = None;
    std::fs::rename(&older, machine.database()).unwrap();
    machine.open_application();
    let after = machine.sync();
    machine.check(after);
    machine.check(before);
}

#[test]
fn a_crash_during_a_rest_costs_nothing() {
    let (mut machine, before) = at_rest();
    machine.commit(INSERT);
    machine.crash();
    machine.commit(INSERT);
    machine.start();
    let after = machine.sync();
    assert_eq!(after.txid, before.txid + 2, "both are there, one by one");
    machine.check(after);
    let snapshots = machine.stored().iter().filter(|object| object.key.starts_with("snap/")).count();
    assert_eq!(snapshots, 1, "and the database was not stored again");
}

#[test]
fn who_has_something_to_do_does_not_rest() {
    let mut machine = Machine::new("PRAGMA page_size=1024", |store| store);
    machine.start();
    machine.commit(INSERT);
    machine.turns(2);
    assert!(!machine.rest(), "no snapshot yet");
    machine.sync();
    machine.snapshot();
    machine.commit(INSERT);
    machine.turns(2);
    assert!(!machine.rest(), "written to just now");
    machine.sync();
    machine.pass(Duration::from_secs(11));
    machine.turns(3);
    assert!(machine.rest());
}

#[test]
fn complete_main_file_is_trusted_within_one_boot_only() {
    for is_rebooted in [false, true] {
        let (mut machine, before) = at_rest();
        machine.crash();
        for _ in 0..2 {
            machine.commit(INSERT);
        }
        if is_rebooted {
            machine.clock.reboot();
        }
        machine.start();
        let after = machine.sync();
        let seen = if is_rebooted { 1 } else { 2 };
        assert_eq!(after.txid, before.txid + seen, "rebooted: {is_rebooted}: what differs is one transaction");
        machine.check(after);
        machine.check(before);
    }
}
