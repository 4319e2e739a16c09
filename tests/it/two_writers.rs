//! Two daemons that replicate to one place: a cloned virtual machine, a container that outlived its replacement. On a store that
//! honours conditional puts, and on one that accepts the condition and ignores it.

use std::sync::Arc;
use std::time::Duration;

use waltrail::clock::{Clock, SystemClock};
use waltrail::format::key::{SegmentKey, Span};
use waltrail::replicate::claim::{claim, open_replica};
use waltrail::replicate::ship::ShipError;
use waltrail::restore::history::History;
use waltrail::store::SharedStore;
use waltrail::store::memory::MemoryStore;

use crate::support::machine::Machine;
use crate::support::quirks::{Quirk, Quirky};

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
    first.snapshot();
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

#[test]
fn of_two_writers_the_replaced_one_ends_and_nothing_is_lost() {
    both_write_on(|store| store);
}

#[test]
fn so_too_on_a_store_that_ignores_conditions() {
    both_write_on(|store| Quirky::shared(store, Quirk::IgnoresConditions));
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
        let txid = before.txid + 1;
        let span = Span { epoch: before.epoch, first_txid: txid, last_txid: txid, time_ms: machine.clock.now_ms() };
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
