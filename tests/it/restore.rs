//! Restores of replicas whose every state is known: each transaction, each moment, on every line, byte for byte; and what
//! happens when objects are not as they were.

use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use waltrail::format::Position;
use waltrail::format::key::{MARKER_KEY, SegmentKey};
use waltrail::restore::RestoreError;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::plan::{Plan, Target, plan};
use waltrail::store::memory::MemoryStore;
use waltrail::store::{PutMode, SharedStore};

use crate::support::oracle::{Numbers, Oracle, all_kinds, all_kinds_in};

/// Restores; gives the plan and the database's bytes.
pub async fn restore(store: &SharedStore, target: Target, epoch: Option<u32>) -> Result<(Plan, Vec<u8>), RestoreError> {
    let history = History::load(store).await?;
    let plan = plan(store, &history, target, epoch).await?;
    let mut file = tempfile::tempfile().unwrap();
    execute(store, &plan, file.try_clone().unwrap(), Path::new("scratch")).await?;
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    Ok((plan, bytes))
}

#[tokio::test]
async fn every_transaction_on_every_line() {
    for (page_size, seed) in [(512, 1), (512, 2), (4096, 3), (65_536, 4)] {
        check_every_transaction(&all_kinds(page_size, seed).await).await;
    }
}

/// A page that was cut off and came back without being written is zeros, as the ledger counts it: not what it was before, be
/// that in a segment or in the snapshot.
#[tokio::test]
async fn a_page_that_was_cut_off_does_not_come_back() {
    for seed in 30..50 {
        let mut oracle = Oracle::new(512, seed).await;
        (oracle.leaves_holes, oracle.most_pages) = (true, 20);
        check_every_transaction(&all_kinds_in(oracle).await).await;
    }
}

async fn check_every_transaction(oracle: &Oracle) {
    for &epoch in oracle.records.keys() {
        let line = oracle.line(epoch);
        let newest = *line.keys().next_back().unwrap();
        for txid in 0..=newest + 2 {
            let what = format!("transaction {txid} on the line of epoch {epoch}, page size {}", oracle.page_size);
            match restore(&oracle.store, Target::Txid(txid), Some(epoch)).await {
                Ok((plan, bytes)) => {
                    assert!(oracle.is_restorable(epoch, txid), "{what}");
                    let position = line[&txid].0;
                    assert_eq!(plan.position, position, "{what}");
                    assert!(bytes == oracle.states[&position].bytes(), "{what}: wrong bytes");
                    assert_eq!(plan.time_ms, oracle.states[&position].time_ms, "{what}");
                }
                Err(RestoreError::OutOfRange { .. }) => assert!(!oracle.is_restorable(epoch, txid), "{what}"),
                Err(error) => panic!("{what}: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn every_moment_on_every_line() {
    for (page_size, seed) in [(512, 5), (4096, 6)] {
        let oracle = all_kinds(page_size, seed).await;
        let times: Vec<u64> = oracle.states.values().map(|state| state.time_ms).collect();
        for &epoch in oracle.records.keys() {
            for asked_ms in times.iter().flat_map(|&time_ms| [time_ms - 1, time_ms, time_ms + 1]) {
                let what = format!("{asked_ms} on the line of epoch {epoch}, page size {page_size}");
                match restore(&oracle.store, Target::Time(asked_ms), Some(epoch)).await {
                    Ok((plan, bytes)) => {
                        assert_eq!(Some(plan.position.txid), oracle.at_time(epoch, asked_ms), "{what}");
                        assert_eq!(plan.position, oracle.line(epoch)[&plan.position.txid].0, "{what}");
                        assert!(plan.time_ms <= asked_ms, "{what}");
                        assert!(bytes == oracle.states[&plan.position].bytes(), "{what}: wrong bytes");
                    }
                    Err(RestoreError::OutOfRange { range, .. }) => {
                        assert_eq!(oracle.at_time(epoch, asked_ms), None, "{what}");
                        assert!(range.contains("transactions "), "{what}: {range}");
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn the_newest_state_and_what_is_said_of_it() {
    let oracle = all_kinds(512, 7).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert_eq!(plan.position, oracle.position());
    assert!(bytes == oracle.states[&oracle.position()].bytes());
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
    // Epoch 3 never got its snapshot: what was known before it is restored, and that is said.
    let (plan, bytes) = restore(&oracle.store, Target::Latest, Some(3)).await.unwrap();
    assert_eq!(plan.position.epoch, 2);
    assert!(bytes == oracle.states[&plan.position].bytes());
    assert!(plan.notes.iter().any(|note| note.contains("epoch 3")), "{:?}", plan.notes);
}

#[tokio::test]
async fn a_note_is_given_only_where_it_is_true() {
    let mut oracle = Oracle::new(512, 8).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(9).await;
    let end = oracle.position();
    oracle.begin_with_snapshot(Some(end), 0).await;
    let unseen = |plan: &Plan| plan.notes.iter().any(|note| note.contains("unseen"));
    let end_ms = oracle.states[&end].time_ms;
    let (plan, _) = restore(&oracle.store, Target::Time(end_ms + 5), None).await.unwrap();
    assert!(plan.position == end && unseen(&plan), "{:?}", plan.notes);
    // In the middle of the older history nothing is unknown.
    let (middle, state) = oracle.states.iter().rev().find(|(_, state)| state.time_ms < end_ms).unwrap();
    let (plan, _) = restore(&oracle.store, Target::Time(state.time_ms), None).await.unwrap();
    assert!(plan.position == *middle && !unseen(&plan), "{:?}", plan.notes);
}

/// A restore has left a line: what was the state on it at a time is not what the new line tells of that time.
#[tokio::test]
async fn what_a_restore_has_left_is_said() {
    const MINUTE_MS: u64 = 60_000;
    let mut oracle = Oracle::new(512, 30).await;
    oracle.begin_with_snapshot(None, 0).await;
    let mut times_ms = vec![oracle.now_ms()];
    for _ in 0..4 {
        oracle.pass_time(MINUTE_MS);
        oracle.commit_and_cut(1).await;
        times_ms.push(oracle.now_ms());
    }
    let (middle, end) = (Position { epoch: 1, txid: 2 }, oracle.position());
    oracle.pass_time(MINUTE_MS);
    oracle.begin(Some(middle), true).await;
    let forked_ms = oracle.now_ms();
    oracle.pass_time(MINUTE_MS);
    oracle.commit_and_cut(1).await;
    let is_said = |plan: &Plan, epoch: u32, held: Position| {
        let words = format!("line of epoch {epoch}, which was left since: --epoch {epoch} gives what it held, {held}");
        plan.notes.iter().any(|note| note.contains(&words))
    };
    let is_left = |plan: &Plan| plan.notes.iter().any(|note| note.contains("which was left"));
    for asked_ms in [times_ms[2], times_ms[4], forked_ms - 1] {
        let (plan, _) = restore(&oracle.store, Target::Time(asked_ms), None).await.unwrap();
        let (there, bytes) = restore(&oracle.store, Target::Time(asked_ms), Some(1)).await.unwrap();
        assert_eq!(plan.position, middle, "{asked_ms}");
        assert!(is_said(&plan, 1, there.position), "{asked_ms}: {:?}", plan.notes);
        assert!(!is_left(&there) && bytes == oracle.states[&there.position].bytes(), "{:?}", there.notes);
    }
    assert_eq!(restore(&oracle.store, Target::Time(forked_ms - 1), Some(1)).await.unwrap().0.position, end);
    // Before what was undone, and since the fork, there was no other state.
    for asked_ms in [times_ms[0], times_ms[1], times_ms[2] - 1, forked_ms, oracle.now_ms()] {
        let (plan, _) = restore(&oracle.store, Target::Time(asked_ms), None).await.unwrap();
        assert!(!is_left(&plan), "{asked_ms}: {:?}", plan.notes);
    }
    // Another one goes back to where the first line ended: then the second one is off the line.
    let second = oracle.position();
    oracle.pass_time(MINUTE_MS);
    oracle.begin(Some(end), true).await;
    let (plan, _) = restore(&oracle.store, Target::Time(oracle.now_ms() - 1), None).await.unwrap();
    assert_eq!(plan.position, end);
    assert!(is_said(&plan, 2, second), "{:?}", plan.notes);
}

/// Starts that go on from where the one before ended leave nothing.
#[tokio::test]
async fn where_nothing_was_left_nothing_is_said() {
    let mut oracle = Oracle::new(512, 31).await;
    oracle.begin_with_snapshot(None, 0).await;
    for _ in 0..3 {
        oracle.pass_time(1000);
        oracle.commit_and_cut(2).await;
        oracle.begin(Some(oracle.position()), true).await;
    }
    for state in oracle.states.values() {
        for asked_ms in [state.time_ms, state.time_ms + 1] {
            let (plan, _) = restore(&oracle.store, Target::Time(asked_ms), None).await.unwrap();
            assert!(!plan.notes.iter().any(|note| note.contains("left")), "{:?}", plan.notes);
        }
    }
}

#[tokio::test]
async fn a_gap_is_named_and_never_stepped_over() {
    let mut oracle = Oracle::new(512, 9).await;
    oracle.begin_with_snapshot(None, 2).await;
    let before = oracle.commit_and_cut(3).await.0;
    let lost = oracle.commit_and_cut(3).await;
    oracle.commit_and_cut(3).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    let SegmentKey(lost) = lost;
    let is_the_gap = |error: RestoreError| match error {
        RestoreError::Gap { first_missing, last_missing, newest, .. } => {
            assert_eq!((first_missing, last_missing), (lost.first_txid, lost.last_txid));
            assert_eq!(newest, Some(before.last_txid));
        }
        other => panic!("{other}"),
    };
    is_the_gap(restore(&oracle.store, Target::Latest, None).await.unwrap_err());
    for txid in lost.first_txid..=oracle.position().txid {
        is_the_gap(restore(&oracle.store, Target::Txid(txid), None).await.unwrap_err());
    }
    // Those that are missing may have been in that very millisecond.
    let before_ms = oracle.states[&Position { epoch: 1, txid: before.last_txid }].time_ms;
    is_the_gap(restore(&oracle.store, Target::Time(before_ms), None).await.unwrap_err());
    let far_ms = oracle.states[&oracle.position()].time_ms + 1000;
    is_the_gap(restore(&oracle.store, Target::Time(far_ms), None).await.unwrap_err());
    for txid in before.first_txid..=before.last_txid {
        let (plan, bytes) = restore(&oracle.store, Target::Txid(txid), None).await.unwrap();
        assert!(bytes == oracle.states[&plan.position].bytes());
    }
    // Beyond everything that was ever stored there is no gap, only nothing.
    let beyond = restore(&oracle.store, Target::Txid(oracle.position().txid + 1), None).await.unwrap_err();
    assert!(matches!(beyond, RestoreError::OutOfRange { .. }), "{beyond}");
    // A snapshot behind the gap makes what follows it restorable.
    oracle.commit_and_cut(2).await;
    oracle.snapshot(oracle.position().txid - 1, oracle.position().txid).await;
    let first_again = oracle.position().txid;
    oracle.commit_and_cut(2).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert_eq!(plan.position, oracle.position());
    assert!(bytes == oracle.states[&plan.position].bytes());
    is_the_gap(restore(&oracle.store, Target::Txid(first_again - 1), None).await.unwrap_err());
}

/// A snapshot is there only when all that it has seen is confirmed: if the last segments are not there, they were lost, and an older
/// state is not the newest one.
#[tokio::test]
async fn a_newest_state_that_a_snapshot_holds_alone() {
    let mut oracle = Oracle::new(512, 27).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.pass_time(1000);
    oracle.commit_and_cut(2).await;
    let known = oracle.position();
    oracle.pass_time(1000);
    let lost = oracle.commit_and_cut(3).await;
    let newest = oracle.position();
    oracle.snapshot(newest.txid, newest.txid).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    let known_ms = oracle.states[&known].time_ms;
    let newest_ms = oracle.states[&newest].time_ms;
    for target in [Target::Latest, Target::Txid(newest.txid), Target::Time(newest_ms), Target::Time(newest_ms + 9)] {
        let (plan, bytes) = restore(&oracle.store, target, None).await.unwrap();
        assert!(plan.position == newest && plan.segments.is_empty(), "{target:?}: {plan}");
        assert!(bytes == oracle.states[&newest].bytes(), "{target:?}");
    }
    // What was before those that are lost is there as before; they themselves, and the moments that may have been theirs, are not.
    for (&position, state) in oracle.states.iter().filter(|(position, _)| position.txid <= known.txid) {
        let (plan, bytes) = restore(&oracle.store, Target::Txid(position.txid), None).await.unwrap();
        assert!(plan.position == position && bytes == state.bytes());
    }
    let first_ms = oracle.states[&Position { epoch: 1, txid: 1 }].time_ms;
    let (plan, _) = restore(&oracle.store, Target::Time(first_ms), None).await.unwrap();
    assert!(plan.time_ms == first_ms, "{plan}");
    for target in [Target::Txid(lost.0.first_txid), Target::Time(known_ms + 500)] {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let newest_before = |error: &RestoreError| match *error {
            RestoreError::Gap { first_missing, newest, .. } if first_missing == lost.0.first_txid => newest,
            _ => None,
        };
        assert_eq!(newest_before(&error), Some(known.txid), "{target:?}: {error}");
    }
    // The next epoch goes on from it.
    oracle.begin(Some(newest), true).await;
    oracle.commit_and_cut(2).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(plan.position == oracle.position() && bytes == oracle.states[&plan.position].bytes());
}

/// The same where a single transaction is lost: up to the very moment of it the one before was the state.
#[tokio::test]
async fn a_last_transaction_that_a_snapshot_holds_alone() {
    let mut oracle = Oracle::new(512, 28).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(4).await;
    let known = oracle.position();
    oracle.pass_time(1000);
    let lost = oracle.commit_and_cut(1).await;
    let newest = oracle.position();
    oracle.snapshot(newest.txid, newest.txid).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    let newest_ms = oracle.states[&newest].time_ms;
    for (asked_ms, expected) in [(newest_ms - 1, known), (newest_ms, newest)] {
        let (plan, bytes) = restore(&oracle.store, Target::Time(asked_ms), None).await.unwrap();
        assert!(plan.position == expected && bytes == oracle.states[&expected].bytes(), "{asked_ms}: {plan}");
    }
}

/// One that was read while transactions came needs them: without them there is no newest state, and no older one is taken for it.
#[tokio::test]
async fn a_snapshot_that_needs_what_is_lost_is_a_gap() {
    for is_first in [false, true] {
        let mut oracle = Oracle::new(512, 29).await;
        oracle.begin_with_snapshot(None, 0).await;
        oracle.commit_and_cut(2).await;
        let known = oracle.position();
        let newest_known = if is_first {
            oracle.begin(Some(known), false).await;
            None
        } else {
            Some(known.txid)
        };
        let begun = oracle.position().txid;
        let lost = oracle.commit_and_cut(3).await;
        oracle.snapshot(begun, oracle.position().txid).await;
        oracle.store.delete(&lost.to_string()).await.unwrap();
        let far_ms = oracle.now_ms() + 1000;
        for target in [Target::Latest, Target::Txid(lost.0.last_txid), Target::Time(far_ms)] {
            match restore(&oracle.store, target, None).await.unwrap_err() {
                RestoreError::Gap { first_missing, last_missing, newest, .. } => {
                    assert_eq!((first_missing, last_missing), (lost.0.first_txid, lost.0.last_txid), "{target:?}");
                    assert_eq!(newest, newest_known, "{target:?}");
                }
                // Which moments were those of what is lost nobody knows where nothing of the epoch is left.
                RestoreError::OutOfRange { .. } if is_first && matches!(target, Target::Time(_)) => {}
                error => panic!("{target:?}: {error}"),
            }
        }
        let (plan, bytes) = restore(&oracle.store, Target::Txid(known.txid), None).await.unwrap();
        assert!(plan.position == known && bytes == oracle.states[&known].bytes());
    }
}

#[tokio::test]
async fn transactions_missing_at_a_parents_end_are_a_gap() {
    let mut oracle = Oracle::new(512, 10).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(3).await;
    let lost = oracle.commit_and_cut(2).await;
    oracle.begin(Some(oracle.position()), true).await;
    oracle.commit_and_cut(3).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    for target in [Target::Latest, Target::Txid(lost.0.first_txid), Target::Txid(oracle.position().txid)] {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let is_gap = matches!(error, RestoreError::Gap { first_missing, .. } if first_missing == lost.0.first_txid);
        assert!(is_gap, "{target:?}: {error}");
    }
}

/// Makes an object other than it was.
async fn damage(store: &SharedStore, key: &str, how: usize, numbers: &mut Numbers) {
    let good = store.get(key, u64::MAX).await.unwrap();
    let mut bytes = good.to_vec();
    match how {
        0 => return store.delete(key).await.unwrap(),
        1 => bytes.truncate(numbers.below(good.len() as u64) as usize),
        2 => bytes.clear(),
        3 => bytes.extend_from_slice(&good),
        4 => {
            // What is under another key of the same kind.
            let kind = key.split_inclusive('/').next().unwrap();
            let all = store.list(kind, None).await.unwrap();
            let other = &all[numbers.below(all.len() as u64) as usize];
            bytes = store.get(&other.key, u64::MAX).await.unwrap().to_vec();
        }
        _ => {
            let bit = numbers.below(good.len() as u64 * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
    store.put(key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
}

/// Whatever is done to whichever object: an error, or exactly the bytes of the state that the plan names.
async fn damage_everything(oracle: &Oracle, ways: usize) -> (usize, usize) {
    let mut numbers = Numbers::new(99);
    let newest = oracle.position();
    let (mut refused, mut right) = (0, 0);
    for object in oracle.store.list("", None).await.unwrap() {
        let good = oracle.store.get(&object.key, u64::MAX).await.unwrap();
        for how in 0..ways {
            damage(&oracle.store, &object.key, how, &mut numbers).await;
            let some_txid = 1 + numbers.below(newest.txid);
            let some_epoch = 1 + numbers.below(newest.epoch.into()) as u32;
            for (target, epoch) in [(Target::Latest, None), (Target::Txid(some_txid), Some(some_epoch))] {
                let Ok((plan, bytes)) = restore(&oracle.store, target, epoch).await else {
                    refused += 1;
                    continue;
                };
                right += 1;
                assert!(target == Target::Latest || target == Target::Txid(plan.position.txid));
                assert!(
                    bytes == oracle.states[&plan.position].bytes(),
                    "{}, damage {how}: wrong bytes for {}",
                    object.key,
                    plan.position
                );
            }
            oracle.store.put(&object.key, good.clone(), PutMode::Overwrite).await.unwrap();
        }
    }
    (refused, right)
}

#[tokio::test]
async fn damage_never_gives_wrong_bytes() {
    let oracle = all_kinds(512, 11).await;
    let (refused, right) = damage_everything(&oracle, 25).await;
    assert!(refused > 100 && right > 100, "{refused} refused, {right} right");
}

/// The object that is wrong is named, so that a person can act.
#[tokio::test]
async fn an_object_under_anothers_name_is_named() {
    let mut oracle = Oracle::new(512, 23).await;
    oracle.begin_with_snapshot(None, 0).await;
    let first = oracle.commit_and_cut(2).await.to_string();
    let second = oracle.commit_and_cut(2).await.to_string();
    oracle.commit_and_cut(2).await;
    let bytes = oracle.store.get(&first, u64::MAX).await.unwrap();
    oracle.store.put(&second, bytes, PutMode::Overwrite).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if *object == second), "{error}");
    oracle.store.delete(&second).await.unwrap();
    let error = restore(&oracle.store, Target::Txid(4), None).await.unwrap_err();
    assert!(matches!(error, RestoreError::Gap { first_missing: 4, last_missing: 5, newest: Some(3), .. }), "{error}");
}

/// Segments so large that they are read block by block.
async fn large(seed: u64) -> Oracle {
    let mut oracle = Oracle::new(4096, seed).await;
    (oracle.is_noise, oracle.most_pages, oracle.size_limit) = (true, 400, 3000);
    oracle.begin_with_snapshot(None, 3).await;
    oracle.commit_and_cut(2).await;
    oracle.commit_and_cut(12).await;
    oracle.commit_and_cut(8).await;
    oracle
}

#[tokio::test]
async fn large_segments() {
    let oracle = large(12).await;
    let segments = oracle.store.list("log/", None).await.unwrap();
    assert!(segments.iter().any(|segment| segment.len_bytes > 6 << 20), "{segments:?}");
    for txid in 4..=oracle.position().txid {
        let (plan, bytes) = restore(&oracle.store, Target::Txid(txid), None).await.unwrap();
        assert!(bytes == oracle.states[&plan.position].bytes(), "{txid}");
    }
    let (refused, right) = damage_everything(&oracle, 12).await;
    assert!(refused > 10 && right > 10, "{refused} refused, {right} right");
}

#[tokio::test]
async fn what_is_not_a_replica() {
    let oracle = all_kinds(512, 13).await;
    let newer = Bytes::from_static(br#"{"format":2,"replica":{"id":7}}"#);
    oracle.store.put(MARKER_KEY, newer, PutMode::Overwrite).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err().to_string();
    assert!(error.contains("format version 2"), "{error}");
    // A replica that lost its marker is damaged; only a place where nothing is has no backup.
    oracle.store.delete(MARKER_KEY).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(error, RestoreError::Damaged { .. }), "{error}");
    let nothing: SharedStore = Arc::new(MemoryStore::new());
    let error = restore(&nothing, Target::Latest, None).await.unwrap_err();
    assert!(matches!(error, RestoreError::NoReplica { .. }), "{error}");
    let mut empty = Oracle::new(512, 14).await;
    empty.begin(None, false).await;
    empty.commit_and_cut(2).await;
    for target in [Target::Latest, Target::Txid(1), Target::Time(u64::MAX)] {
        let error = restore(&empty.store, target, None).await.unwrap_err();
        assert!(matches!(error, RestoreError::NothingYet { .. }), "{error}");
    }
    let error = restore(&empty.store, Target::Latest, Some(2)).await.unwrap_err();
    assert!(matches!(error, RestoreError::NoSuchEpoch { epoch: 2, .. }), "{error}");
}

async fn lose_snapshots(oracle: &Oracle, prefix: &str) {
    for snapshot in oracle.store.list(prefix, None).await.unwrap() {
        oracle.store.delete(&snapshot.key).await.unwrap();
    }
}

/// A place whose first snapshot is not there yet may begin with nothing; one that has lost all that it had may not.
#[tokio::test]
async fn a_replica_that_lost_its_snapshots_is_no_new_one() {
    const HOUR_MS: u64 = 3_600_000;
    let targets = [Target::Latest, Target::Txid(1), Target::Txid(99), Target::Time(u64::MAX)];
    // The first one is read for long, and then just was read.
    let mut oracle = Oracle::new(512, 24).await;
    oracle.begin(None, false).await;
    oracle.knows_fingerprints = false;
    oracle.commit_and_cut(2).await;
    oracle.pass_time(5 * HOUR_MS);
    oracle.commit_and_cut(2).await;
    oracle.knows_fingerprints = true;
    oracle.commit_and_cut(2).await;
    oracle.pass_time(HOUR_MS / 2);
    oracle.commit_and_cut(1).await;
    for target in targets {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        assert!(matches!(error, RestoreError::NothingYet { .. }), "{target:?}: {error}");
    }
    // For so long nobody needs to store what was read.
    oracle.pass_time(HOUR_MS);
    oracle.commit_and_cut(1).await;
    for target in targets {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let is_told = matches!(&error, RestoreError::Damaged { object, .. } if object == "snap/");
        assert!(is_told && error.to_string().contains("read whole more than an hour"), "{target:?}: {error}");
    }
    // Where something was let go there was one, however young the rest is.
    let mut oracle = Oracle::new(512, 25).await;
    oracle.begin_with_snapshot(None, 0).await;
    let first = oracle.commit_and_cut(2).await;
    oracle.snapshot(oracle.position().txid, oracle.position().txid).await;
    oracle.commit_and_cut(2).await;
    oracle.store.delete(&first.to_string()).await.unwrap();
    assert!(restore(&oracle.store, Target::Latest, None).await.is_ok());
    lose_snapshots(&oracle, "snap/").await;
    for target in targets {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let is_told = matches!(&error, RestoreError::Damaged { object, .. } if object == "snap/");
        assert!(is_told && error.to_string().contains("let go"), "{target:?}: {error}");
    }
}

/// What only a prune would excuse is no excuse for the newest state: nobody begins with nothing because of it.
#[tokio::test]
async fn the_end_of_the_newest_line_is_never_let_go() {
    let mut oracle = Oracle::new(512, 26).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(2).await;
    let lost = oracle.commit_and_cut(2).await;
    oracle.begin(Some(oracle.position()), true).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(error, RestoreError::Gap { first_missing: 4, last_missing: 5, newest: Some(3), .. }), "{error}");
}

#[tokio::test]
async fn a_record_that_contradicts_its_parent() {
    let mut oracle = Oracle::new(512, 22).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(5).await;
    oracle.begin(Some(oracle.position()), true).await;
    oracle.commit_and_cut(2).await;
    let mut record = oracle.records[&2].clone();
    // The second epoch began with transaction 7, on top of 6.
    for (txid, is_possible) in [(5, false), (6, true), (7, true)] {
        (record.epoch, record.parent, record.first_txid) = (3, Some(Position { epoch: 2, txid }), txid + 1);
        oracle.store.put("epochs/00000003", Bytes::from(record.encode()), PutMode::Overwrite).await.unwrap();
        match restore(&oracle.store, Target::Latest, None).await {
            Ok((plan, bytes)) => {
                assert!(is_possible && plan.position.txid == txid);
                assert!(bytes == oracle.states[&plan.position].bytes());
            }
            Err(RestoreError::Damaged { object, .. }) => assert!(!is_possible && object == "epochs/00000003"),
            Err(error) => panic!("{txid}: {error}"),
        }
    }
    oracle.store.delete("epochs/00000002").await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if object == "epochs/00000002"), "{error}");
}

#[tokio::test]
async fn strangers_are_listed_and_harm_nothing() {
    let oracle = all_kinds(512, 15).await;
    for key in [
        "log/zz",
        "log/00000001/1-2-3",
        "log/00000000/0000000000000001-0000000000000002-000000000003",
        "snap/x",
        "epochs/1",
    ] {
        oracle.store.put(key, Bytes::from_static(b"?"), PutMode::IfAbsent).await.unwrap();
    }
    let history = History::load(&oracle.store).await.unwrap();
    assert_eq!(history.strangers.len(), 5, "{:?}", history.strangers);
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(bytes == oracle.states[&plan.position].bytes());
}

/// What an epoch shipped whose record was lost is newer than what can be restored: nobody gets that for the newest state, unless
/// they ask for that epoch.
#[tokio::test]
async fn without_its_record_an_epoch_is_not_passed_over() {
    let mut oracle = Oracle::new(512, 23).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(5).await;
    let before = oracle.position();
    oracle.begin_with_snapshot(Some(before), 0).await;
    oracle.commit_and_cut(2).await;
    oracle.store.delete("epochs/00000002").await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if object == "epochs/00000002"), "{error}");
    let (plan, bytes) = restore(&oracle.store, Target::Latest, Some(1)).await.unwrap();
    assert_eq!(plan.position, before);
    assert!(bytes == oracle.states[&before].bytes());
    oracle.store.delete("epochs/00000001").await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if object == "epochs/00000002"), "{error}");
    oracle.store.delete(MARKER_KEY).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if object == MARKER_KEY), "{error}");
}
