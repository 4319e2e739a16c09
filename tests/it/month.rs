//! More than a month of constant writing, in simulated time: what is stored and what a restore reads stay bounded.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use waltrail::clock::{Clock, SystemClock};
use waltrail::format::key::SegmentKey;
use waltrail::retain::tails::TailCache;
use waltrail::store::metered::{Meter, Metered, Traffic};
use waltrail::store::{Operation, SharedStore};

use crate::support::machine::Machine;
use crate::support::oracle::Numbers;

const DAYS: u64 = 36;
const STEP: Duration = Duration::from_secs(300);
const STEPS_A_DAY: u64 = 86_400 / STEP.as_secs();

/// The same for each `step`.
fn update(step: u64) -> String {
    let mut numbers = Numbers::new(step);
    format!("UPDATE item SET body = randomblob(100), n = {step} WHERE id = {}", 1 + numbers.below(2000))
}

#[test]
fn a_replica_of_any_age_is_read_from_few_objects() {
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.window = Duration::from_secs(30 * 86_400);
    machine.merge.kept_limit_bytes = 16 << 20;
    machine
        .application()
        .execute_batch(
            "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 2000)
             INSERT INTO item(body) SELECT randomblob(100) FROM c",
        )
        .unwrap();
    machine.start();
    machine.sync();
    machine.snapshot();
    let mut cache = TailCache::default();
    let (mut most_stored, mut stored_bytes) = (0, Vec::new());
    for day in 0..DAYS {
        for step in 0..STEPS_A_DAY {
            machine.application().execute_batch(&update(day * STEPS_A_DAY + step)).unwrap();
            machine.pass(STEP);
            machine.ship();
            if step % 12 == 0 {
                assert!(machine.prune(&mut cache).unwrap().is_complete());
            }
        }
        let stored = machine.stored();
        most_stored = most_stored.max(stored.len());
        stored_bytes.push(stored.iter().map(|object| object.len_bytes).sum::<u64>());
    }
    // The worst moment: at the end of an hour, with a commit in each second of it, just before the day's snapshot.
    let now_ms = machine.clock.now_ms();
    machine.pass(Duration::from_millis(3_600_000 - now_ms % 3_600_000));
    for second in 0..3600 {
        machine.application().execute_batch(&update(second)).unwrap();
        machine.ship();
        machine.pass(Duration::from_secs(1));
    }
    let newest = machine.sync();
    machine.check(newest);
    let plan = machine.plan(newest);
    let sources = machine.sources(&plan);
    let read = plan.segments.len() + sources.len();
    println!("a restore reads {read} objects; at most {most_stored} are stored; bytes by day: {stored_bytes:?}");
    assert!((60..200).contains(&read), "{read}: {} segments and {} snapshots", plan.segments.len(), sources.len());
    // An hour's segments become one: 24 a day, those of the hours that are not over, and the snapshots.
    assert!(most_stored < 31 * 26 + 100, "{most_stored}");
    let segments = machine.stored().iter().filter(|object| SegmentKey::parse(&object.key).is_some()).count();
    assert!(segments >= 30 * 24, "and every state of the window is there: {segments}");
    // After the window is full, nothing grows any more.
    let (full, last) = (stored_bytes[31], stored_bytes[DAYS as usize - 1]);
    assert!(last < full + full / 10, "{stored_bytes:?}");
}

/// A database of 20 MB, and a meter of what its replication asks for from now on.
fn metered() -> (Machine, Meter) {
    let meter = RefCell::new(None);
    let stack = |store| {
        let (metered, its_meter) = Metered::new(store);
        *meter.borrow_mut() = Some(its_meter);
        Arc::new(metered) as SharedStore
    };
    let mut machine = Machine::new("PRAGMA page_size=4096", stack);
    machine.window = Duration::from_secs(30 * 86_400);
    // As by default.
    machine.settings.checkpoint_threshold_bytes = 4 << 20;
    machine.settings.spool_limit_bytes = 256 << 20;
    machine.merge.kept_limit_bytes = 64 << 20;
    machine
        .application()
        .execute_batch(
            "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 100000)
             INSERT INTO item(body) SELECT hex(randomblob(80)) FROM c",
        )
        .unwrap();
    machine.start();
    machine.sync();
    machine.snapshot();
    let meter = meter.take().unwrap();
    (machine, meter)
}

#[test]
fn an_idle_month_costs_nothing() {
    let (mut machine, meter) = metered();
    let before = meter.traffic();
    for _ in 0..30 * 24 {
        machine.pass(Duration::from_secs(3600));
        machine.turns(2);
    }
    assert_eq!(meter.traffic(), before);
}

/// Writes a month's, or a part of it: `transactions` in each `step`, so many steps. Gives requests by price and bytes.
fn cost(name: &str, step: Duration, transactions: u64, steps: u64, months: u64) {
    let (mut machine, meter) = metered();
    let before = meter.traffic();
    let mut cache = TailCache::default();
    let mut pruned = Duration::ZERO;
    for index in 0..steps {
        for transaction in 0..transactions {
            let sql = format!(
                "UPDATE item SET body = hex(randomblob(80)) WHERE id = {}",
                1 + Numbers::new(index * transactions + transaction).below(100_000)
            );
            machine.application().execute_batch(&sql).unwrap();
        }
        machine.ship();
        machine.pass(step);
        let now = machine.clock.monotonic();
        if now - pruned >= Duration::from_secs(3600) {
            pruned = now;
            machine.prune(&mut cache).unwrap();
        }
    }
    let after = meter.traffic();
    let requests = |kinds: &[Operation]| {
        let of = |traffic: &Traffic, kind| traffic.by_operation.get(kind).copied().unwrap_or(0);
        let counted: u64 = kinds.iter().map(|kind| of(&after, kind) - of(&before, kind)).sum();
        counted * months
    };
    use Operation::{CompleteMultipart, CreateMultipart, Delete, DeleteMany, Get, GetRange, List, Put, PutPart};
    let puts = requests(&[Put, CreateMultipart, PutPart, CompleteMultipart]);
    let (lists, gets) = (requests(&[List]), requests(&[Get, GetRange]));
    let deletes = requests(&[Delete, DeleteMany]);
    let sent_mb = (after.sent_bytes - before.sent_bytes) * months / 1_000_000;
    let stored: u64 = machine.stored().iter().map(|object| object.len_bytes).sum();
    let objects = machine.stored().len();
    println!(
        "{name}: {puts} puts, {lists} lists, {gets} gets, {deletes} deletes, {sent_mb} MB sent; {objects} objects, {} MB \
         stored at the end",
        stored / 1_000_000
    );
}

#[test]
#[ignore = "takes minutes; prints what the table in docs/OPERATIONS.md says"]
fn what_a_month_costs() {
    cost("quiet: a transaction every 10 minutes, a month", Duration::from_secs(600), 1, 30 * 144, 1);
    // A day, and thirty times its traffic; what is stored is the day's.
    cost("busy: 5 transactions each second, a day times 30", Duration::from_secs(1), 5, 86_400, 30);
}

#[test]
#[ignore = "takes minutes; prints what docs/PERFORMANCE.md says of restores and history"]
fn what_a_restore_costs_by_history() {
    for (name, minutes) in [("an hour", 60), ("a day", 24 * 60), ("30 days", 30 * 24 * 60)] {
        let (mut machine, _) = metered();
        let mut cache = TailCache::default();
        for minute in 0..minutes {
            let id = 1 + Numbers::new(minute).below(100_000);
            machine
                .application()
                .execute_batch(&format!("UPDATE item SET body = hex(randomblob(80)) WHERE id = {id}"))
                .unwrap();
            machine.ship();
            machine.pass(Duration::from_secs(60));
            if minute % 60 == 59 {
                machine.prune(&mut cache).unwrap();
            }
        }
        let newest = machine.sync();
        let plan = machine.plan(newest);
        let read = plan.segments.len() + machine.sources(&plan).len();
        let clock = SystemClock::default();
        let begun = clock.monotonic();
        machine.check(newest);
        println!(
            "{name}, a transaction a minute: {} objects stored, {read} read; restored in {:?}",
            machine.stored().len(),
            clock.monotonic() - begun
        );
    }
}
