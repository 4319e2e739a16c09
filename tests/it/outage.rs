//! Storage is away for an hour of simulated time, while the application writes every few seconds.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use waltrail::format::Position;
use waltrail::replicate::control::State;
use waltrail::replicate::spool::Spool;
use waltrail::replicate::status::Phase;
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::{Operation, SharedStore, StoreErrorKind};

use crate::support::machine::Machine;
use crate::support::quirks::{Quirk, Quirky};
use crate::support::wait_for;

const SPOOL_LIMIT_BYTES: u64 = 2 << 20;
const STEP: Duration = Duration::from_secs(6);
const STEPS: u32 = 600;

fn len_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries
        .map(|entry| if entry.path().is_dir() { len_below(&entry.path()) } else { entry.metadata().unwrap().len() })
        .sum()
}

/// What is known after the hour: the machine, the last state before it, and the largest spool and WAL in it, and how many files waited.
fn an_hour_away(row_len: u32, spool_limit_bytes: u64) -> (Machine, Position, u64, u64, usize) {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.settings.spool_limit_bytes = spool_limit_bytes;
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    let before = machine.sync();
    machine.gate.set_open(false);
    let (mut spool_bytes, mut wal_bytes, mut files) = (0, 0, 0);
    let wal = machine.database().with_extension("db-wal");
    for step in 0..STEPS {
        machine.commit(&format!(
            "INSERT OR REPLACE INTO item(id, body, n) VALUES({}, randomblob({row_len}), {step})",
            step % 50
        ));
        machine.pass(STEP);
        machine.turns(2);
        spool_bytes = spool_bytes.max(len_below(&machine.state_dir().join("spool")));
        files = files.max(std::fs::read_dir(machine.state_dir().join("spool")).unwrap().count());
        wal_bytes = wal_bytes.max(std::fs::metadata(&wal).unwrap().len());
    }
    machine.gate.set_open(true);
    machine.sync();
    (machine, before, spool_bytes, wal_bytes, files)
}

/// All of it fits the spool: not one transaction is lost. When some hundred files wait, not every transaction makes another one.
#[test]
fn an_hour_without_storage_that_the_spool_outlasts() {
    let (machine, before, spool_bytes, wal_bytes, files) = an_hour_away(300, 8 << 20);
    assert!((256..480).contains(&files), "{files} files for {STEPS} transactions");
    assert!(spool_bytes > 300_000 && machine.spools_dropped == 0, "{spool_bytes}");
    assert!(wal_bytes < 3 * machine.settings.checkpoint_threshold_bytes, "{wal_bytes}");
    let last = machine.newest.unwrap();
    assert_eq!((last.epoch, last.txid), (before.epoch, before.txid + u64::from(STEPS)));
    assert_eq!(machine.states.len(), 1 + STEPS as usize);
    machine.states.keys().for_each(|&position| machine.check(position));
}

/// More than the spool may hold: it is dropped, a new epoch begins, and what was confirmed before stays as it is.
#[test]
fn an_hour_without_storage_that_the_spool_does_not_outlast() {
    let (machine, before, spool_bytes, wal_bytes, _) = an_hour_away(30_000, SPOOL_LIMIT_BYTES);
    // Once: what follows is not recorded before an epoch can be claimed.
    assert_eq!(machine.spools_dropped, 1);
    assert!(spool_bytes < SPOOL_LIMIT_BYTES, "{spool_bytes}");
    // While it is taken up again, SQLite's own threshold of 1,000 pages holds.
    assert!(wal_bytes < 8 << 20, "{wal_bytes}");
    assert!(machine.newest.unwrap().epoch > before.epoch);
    machine.states.keys().for_each(|&position| machine.check(position));
}

/// Storage is away before the daemon starts, so it has no epoch to ship for: what it records goes on from what it left, and may not
/// fill the disk either.
#[test]
fn a_start_without_storage_fills_nothing() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.settings.spool_limit_bytes = 4 * SPOOL_LIMIT_BYTES;
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    let before = machine.sync();
    machine.stop();
    machine.gate.set_open(false);
    machine.start();
    let spool = machine.state_dir().join("spool");
    let mut spool_bytes = 0;
    for step in 0..300 {
        machine.commit(&format!("INSERT OR REPLACE INTO item(id, body) VALUES({}, randomblob(60000))", step % 5));
        machine.pass(STEP);
        machine.turns(2);
        spool_bytes = spool_bytes.max(len_below(&spool));
    }
    // A run of 8 MiB is written at a time.
    let most = 4 * SPOOL_LIMIT_BYTES + (9 << 20);
    assert!(spool_bytes > SPOOL_LIMIT_BYTES && spool_bytes < most, "{spool_bytes}");
    assert_eq!((machine.spools_dropped, len_below(&spool)), (1, 0));
    machine.gate.set_open(true);
    assert!(machine.sync().epoch > before.epoch);
    machine.states.keys().for_each(|&position| machine.check(position));
}

/// The same for a while that the spool outlasts: nothing is lost, and what is not in storage yet counts as unconfirmed.
#[test]
fn what_was_recorded_before_the_claim_is_confirmed_after_it() {
    let is_away = Arc::new(AtomicBool::new(false));
    let away = is_away.clone();
    let stack = move |store: SharedStore| -> SharedStore {
        let away = away.clone();
        Arc::new(Faulty::new(store, move |request| {
            let is_segment = request.operation == Operation::Put && request.key.starts_with("log/");
            match is_segment && away.load(Ordering::SeqCst) {
                true => Fault::Before(StoreErrorKind::Unavailable),
                false => Fault::None,
            }
        }))
    };
    let mut machine = Machine::new("PRAGMA page_size=4096", stack);
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    let before = machine.sync();
    machine.stop();
    machine.commit("INSERT INTO item(id, body) VALUES(2, zeroblob(100))");
    is_away.store(true, Ordering::SeqCst);
    machine.start();
    wait_for("the claim", || {
        machine.turns(1);
        (machine.status().phase == Phase::Following).then_some(())
    });
    machine.turns(20);
    let status = machine.status();
    let txid = |state: Option<State>| state.unwrap().position.txid;
    assert_eq!((txid(status.captured), txid(status.confirmed)), (before.txid + 1, before.txid));
    assert!(status.unconfirmed_since_ms.is_some());
    is_away.store(false, Ordering::SeqCst);
    assert_eq!(machine.sync().txid, before.txid + 1);
    let status = machine.status();
    assert_eq!((txid(status.confirmed), status.unconfirmed_since_ms), (before.txid + 1, None));
    machine.states.keys().for_each(|&position| machine.check(position));
}

/// A single transaction may be as large as it likes. What comes behind it while it is shipped does not fill the spool.
#[test]
fn what_waits_behind_a_large_transaction() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.settings.spool_limit_bytes = SPOOL_LIMIT_BYTES;
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    machine.sync();
    for len in [SPOOL_LIMIT_BYTES * 7 / 10, SPOOL_LIMIT_BYTES * 2] {
        machine.gate.set_open(false);
        machine.commit(&format!("INSERT INTO item(body) VALUES(randomblob({len}))"));
        for step in 0..5 {
            machine.pass(STEP);
            machine.turns(2);
            machine.commit(&format!("UPDATE item SET body = randomblob(20000), n = {step} WHERE id = 1"));
        }
        machine.turns(2);
        machine.gate.set_open(true);
        machine.sync();
    }
    assert_eq!((machine.spools_dropped, machine.states.len()), (0, 13));
    machine.states.keys().for_each(|&position| machine.check(position));
}

/// The claim tells whether a store knows conditions; what an earlier run left is shipped before it.
#[test]
fn leftovers_for_a_store_without_conditions() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| Quirky::shared(store, Quirk::RefusesConditions));
    machine.start();
    machine.commit("INSERT INTO item(id, body) VALUES(1, zeroblob(100))");
    let before = machine.sync();
    machine.gate.set_open(false);
    machine.commit("INSERT INTO item(id, body) VALUES(2, zeroblob(100))");
    let spool = Spool::new(machine.state_dir().join("spool"));
    wait_for("a segment that waits", || {
        machine.pass(STEP);
        machine.turns(2);
        (!spool.waiting().unwrap().is_empty()).then_some(())
    });
    machine.crash();
    machine.gate.set_open(true);
    machine.start();
    assert_eq!(machine.sync().txid, before.txid + 1);
    machine.states.keys().for_each(|&position| machine.check(position));
}
