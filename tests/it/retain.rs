//! Letting history go: after every prune each state inside the window is what it was, on every line, and nothing stays for
//! ever that nobody needs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use waltrail::format::Position;
use waltrail::format::key::{EpochKey, SegmentKey, SnapshotKey};
use waltrail::replicate::pruner::note_deletions;
use waltrail::replicate::status::Board;
use waltrail::restore::RestoreError;
use waltrail::restore::plan::Target;
use waltrail::retain::marks::{find_mark, load_marks, remove_mark, set_mark};
use waltrail::retain::plan::GoesBecause;
use waltrail::retain::prune::{Outcome, prune};
use waltrail::retain::tails::TailCache;
use waltrail::retain::{GRACE_MS, Now, RetainError, RetentionSettings};
use waltrail::store::faults::{Fault, Faulty, Request};
use waltrail::store::{Operation, PutMode, SharedStore, StoreErrorKind};
use waltrail::verify::Depth;

use crate::restore::restore;
use crate::support::oracle::{Oracle, all_kinds};
use crate::support::quirks::{Quirk, Quirky};
use crate::verify::check_sound;

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

fn window(window_ms: u64) -> RetentionSettings {
    RetentionSettings { window_ms: Some(window_ms), ..RetentionSettings::default() }
}

async fn prune_at(store: &SharedStore, settings: &RetentionSettings, now_ms: u64) -> Outcome {
    let outcome = prune(store, settings, Now::Told(now_ms), &mut TailCache::default(), false).await.unwrap();
    assert!(outcome.is_complete(), "{:?} {:?}", outcome.refused, outcome.undeleted);
    assert_eq!(outcome.deleted_objects as usize, outcome.plan.going.len());
    outcome
}

async fn keys(store: &SharedStore) -> BTreeSet<String> {
    store.list("", None).await.unwrap().into_iter().map(|object| object.key).collect()
}

/// A larger database, of which transactions change little, so that snapshots share extents.
async fn large_oracle(seed: u64) -> Oracle {
    let mut oracle = Oracle::new(65_536, seed).await;
    (oracle.most_pages, oracle.least_pages, oracle.size_limit) = (2, 9, 16);
    oracle
}

/// Until when the last state of an epoch was the state.
fn end_ms(oracle: &Oracle, epoch: u32) -> u64 {
    oracle.records.get(&(epoch + 1)).map_or(u64::MAX, |next| next.claimed_ms)
}

/// Every moment that something changed at inside the window, on every line that was not left before it.
async fn check_window(oracle: &Oracle, start_ms: u64, now_ms: u64, what: &str) {
    for &epoch in oracle.records.keys().filter(|epoch| end_ms(oracle, **epoch) >= start_ms) {
        let last_ms = end_ms(oracle, epoch).min(now_ms);
        let changes = oracle.line(epoch).into_values().map(|(position, _)| oracle.states[&position].time_ms);
        let mut moments: BTreeSet<u64> = changes.flat_map(|time_ms| [time_ms - 1, time_ms]).collect();
        moments.extend([start_ms, last_ms]);
        for &asked_ms in moments.range(start_ms..=last_ms) {
            let what = format!("{what}: {asked_ms} on the line of epoch {epoch}");
            let expected = oracle.at_time(epoch, asked_ms);
            match restore(&oracle.store, Target::Time(asked_ms), Some(epoch)).await {
                Ok((plan, bytes)) => {
                    assert_eq!(Some(plan.position.txid), expected, "{what}");
                    assert!(bytes == oracle.states[&plan.position].bytes(), "{what}: wrong bytes");
                }
                Err(RestoreError::OutOfRange { .. }) => assert_eq!(expected, None, "{what}"),
                Err(error) => panic!("{what}: {error}"),
            }
        }
        let latest = restore(&oracle.store, Target::Latest, Some(epoch)).await;
        let expected = oracle.at_time(epoch, u64::MAX);
        assert_eq!(latest.ok().map(|(plan, _)| plan.position.txid), expected, "{what}: end of epoch {epoch}");
    }
}

/// Whatever is asked for: the right bytes, or the answer that it is not there. Nothing is damaged.
async fn check_nothing_looks_damaged(oracle: &Oracle, what: &str) {
    for &epoch in oracle.records.keys() {
        let line = oracle.line(epoch);
        for (&txid, (position, _)) in &line {
            for target in [Target::Txid(txid), Target::Time(oracle.states[position].time_ms)] {
                let what = format!("{what}: {target:?} on the line of epoch {epoch}");
                match restore(&oracle.store, target, Some(epoch)).await {
                    Ok((plan, bytes)) => {
                        assert!(bytes == oracle.states[&plan.position].bytes(), "{what}: wrong bytes");
                        // Where a run is gone it is as if it had never got its snapshot; of a line that was left only a
                        // part may be there. Both is said.
                        let said = ["no snapshot of it is there", "as far as it is kept"];
                        let is_said = plan.notes.iter().any(|note| said.iter().any(|words| note.contains(words)));
                        let expected = match target {
                            Target::Txid(txid) => Some(txid),
                            _ => oracle.at_time(epoch, oracle.states[position].time_ms),
                        };
                        let found = plan.position.txid;
                        let is_older = expected.is_none_or(|expected| found < expected);
                        assert!(Some(found) == expected || (is_said && is_older), "{what}: {found}");
                    }
                    Err(
                        RestoreError::OutOfRange { .. }
                        | RestoreError::NoSuchEpoch { .. }
                        | RestoreError::NothingYet { .. },
                    ) => {}
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}

/// What a history is made of, one thing after another, with hours and days in between.
async fn live(oracle: &mut Oracle, steps: usize, window_ms: u64) {
    let mut newest_snapshot: Option<SnapshotKey> = None;
    for _ in 0..steps {
        let idle_ms = oracle.numbers.below(20) * HOUR_MS;
        oracle.pass_time(idle_ms);
        let position = oracle.position();
        let first_of_epoch = oracle.records[&position.epoch].first_txid;
        let transactions = 1 + oracle.numbers.below(3) as usize;
        match oracle.numbers.below(14) {
            0..=3 => drop(oracle.commit_and_cut(transactions).await),
            4 => {
                (0..3).for_each(|_| oracle.commit());
                oracle.cut_overlapping().await;
            }
            5 | 6 => {
                // Of the whole epoch or of a part; inside or across what was merged already.
                let own = oracle.states.keys().filter(|state| state.epoch == position.epoch).map(|state| state.txid);
                let own: Vec<u64> = own.filter(|&txid| !is_found(oracle, txid)).collect();
                if !own.is_empty() {
                    let first = own[oracle.numbers.below(own.len() as u64) as usize];
                    let last = first + oracle.numbers.below(position.txid - first + 1);
                    oracle.merge(position.epoch, first, last).await;
                }
            }
            7..=9 if position.txid >= first_of_epoch => {
                // One after another.
                let last_before = oracle.snapshots.last().filter(|(begun, _)| begun.epoch == position.epoch);
                let first_of_epoch = first_of_epoch.max(last_before.map_or(0, |(_, last_txid)| *last_txid));
                let first = first_of_epoch.max(position.txid.saturating_sub(oracle.numbers.below(4)));
                let last = first + oracle.numbers.below(position.txid - first + 1);
                let base = newest_snapshot.filter(|key| key.txid != first || key.epoch != position.epoch);
                let is_new = !oracle.snapshots.iter().any(|(begun, _)| *begun == Position { txid: first, ..position });
                if is_new {
                    newest_snapshot = Some(oracle.snapshot_on(base, first, last).await);
                }
            }
            10 => oracle.begin(Some(position), true).await,
            11 => {
                let meanwhile = oracle.numbers.below(3);
                oracle.begin_with_snapshot(Some(position), meanwhile).await;
                newest_snapshot = None;
            }
            12 => fork(oracle, window_ms).await,
            // Found changed, and its first snapshot does not come for a while.
            _ if oracle.numbers.below(3) == 0 => {
                oracle.begin(Some(position), false).await;
                oracle.commit_and_cut(transactions).await;
            }
            _ => {}
        }
    }
}

/// The state that an epoch was found with is in no segment.
fn is_found(oracle: &Oracle, txid: u64) -> bool {
    let record = &oracle.records[&oracle.position().epoch];
    !record.continues && record.first_txid == txid
}

/// A restore to some state inside the window, from which a new line begins.
async fn fork(oracle: &mut Oracle, window_ms: u64) {
    let newest = oracle.position().epoch;
    let start_ms = oracle.now_ms().saturating_sub(window_ms);
    let line = oracle.line(newest);
    let inside = line.iter().filter(|(txid, (position, _))| {
        oracle.states[position].time_ms >= start_ms && oracle.is_restorable(newest, **txid)
    });
    let inside: Vec<Position> = inside.map(|(_, (position, _))| *position).collect();
    if !inside.is_empty() {
        let to = inside[oracle.numbers.below(inside.len() as u64) as usize];
        oracle.begin(Some(to), true).await;
        oracle.commit_and_cut(2).await;
    }
}

#[tokio::test]
async fn every_state_of_the_window_survives_every_prune() {
    for seed in 0..40 {
        let mut oracle = large_oracle(1000 + seed).await;
        oracle.pass_time(0);
        oracle.begin_with_snapshot(None, 2).await;
        let window_ms = (1 + oracle.numbers.below(6)) * DAY_MS;
        let mut cache = TailCache::default();
        for round in 0..8 {
            live(&mut oracle, 9, window_ms).await;
            let idle_ms = oracle.numbers.below(4) * DAY_MS;
            oracle.pass_time(idle_ms);
            let now_ms = oracle.now_ms();
            let what = format!("seed {seed}, round {round}");
            check_window(&oracle, now_ms - window_ms - GRACE_MS, now_ms, &format!("{what} before")).await;
            let outcome = prune(&oracle.store, &window(window_ms), Now::Told(now_ms), &mut cache, false).await.unwrap();
            assert!(outcome.is_complete(), "{what}");
            println!("{what}: {}\n{:?}", outcome.plan, oracle.records);
            check_window(&oracle, now_ms - window_ms - GRACE_MS, now_ms, &what).await;
            let again = prune_at(&oracle.store, &window(window_ms), now_ms).await;
            assert_eq!(again.plan.going, [], "{what}: all goes at once");
        }
        check_nothing_looks_damaged(&oracle, &format!("seed {seed}")).await;
    }
}

/// When a replica has been quiet for longer than the window, what its last state needs is all there is.
#[tokio::test]
async fn nothing_stays_for_ever() {
    for seed in 0..20 {
        let mut oracle = large_oracle(2000 + seed).await;
        oracle.begin_with_snapshot(None, 2).await;
        live(&mut oracle, 40, DAY_MS).await;
        let parent = oracle.position();
        oracle.begin_with_snapshot(Some(parent), 1).await;
        let first = oracle.position().txid;
        let base = oracle.snapshot(first, first).await;
        let segment = oracle.commit_and_cut(3).await;
        oracle.pass_time(3 * DAY_MS);
        prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
        let expected =
            ["waltrail.json".into(), format!("epochs/{:08x}", base.epoch), base.to_string(), segment.to_string()];
        assert_eq!(keys(&oracle.store).await, BTreeSet::from(expected), "seed {seed}");
        let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
        assert!(bytes == oracle.states[&plan.position].bytes() && plan.position == oracle.position());
    }
}

/// The segments that were put, in order; a snapshot after each of the first `snapshots`.
async fn a_segment_a_day(oracle: &mut Oracle, days: usize, snapshots: &[usize]) -> Vec<SegmentKey> {
    let mut segments = Vec::new();
    for day in 0..days {
        oracle.pass_time(DAY_MS);
        segments.push(oracle.commit_and_cut(2).await);
        if snapshots.contains(&day) {
            oracle.snapshot(oracle.position().txid, oracle.position().txid).await;
        }
    }
    segments
}

#[tokio::test]
async fn what_goes_and_what_stays_is_told() {
    let mut oracle = Oracle::new(512, 60).await;
    oracle.begin_with_snapshot(None, 0).await;
    let segments = a_segment_a_day(&mut oracle, 10, &[3, 7]).await;
    let now_ms = oracle.now_ms();
    let before = keys(&oracle.store).await;
    let mut cache = TailCache::default();
    // The snapshot of the eighth day is as old as the window: a restore planned an hour ago may need the one before.
    let planned = prune(&oracle.store, &window(2 * DAY_MS), Now::Told(now_ms), &mut cache, true).await.unwrap();
    assert_eq!(keys(&oracle.store).await, before, "a dry run does nothing");
    let gone: Vec<String> = planned.plan.going.iter().map(|going| going.key.to_string()).collect();
    let first_snapshot = before.iter().find(|key| key.starts_with("snap/")).unwrap().clone();
    let mut expected = vec![first_snapshot];
    expected.extend(segments[..4].iter().map(ToString::to_string));
    assert_eq!(gone, expected);
    assert!(planned.plan.going.iter().all(|going| going.why == GoesBecause::NotNeeded));
    assert_eq!(planned.plan.going.len() + planned.plan.staying.len(), before.len() - 1, "all but the marker");
    assert!(planned.plan.staying.iter().all(|staying| !staying.why.is_empty()));
    let text = planned.plan.to_string();
    for says in ["goes   snap/", "(4 objects", "no state that is kept needs it", "line of epoch 1", "its epoch, or one"]
    {
        assert!(text.contains(says), "{says}\n{text}");
    }
    prune_at(&oracle.store, &window(2 * DAY_MS - 2 * GRACE_MS), now_ms).await;
    let left = keys(&oracle.store).await;
    assert_eq!(left.iter().filter(|key| key.starts_with("snap/")).count(), 1);
    assert_eq!(left.iter().filter(|key| key.starts_with("log/")).count(), 2);
    // Before the window: what can be restored is said, and nothing is called damaged.
    for target in [Target::Txid(1), Target::Txid(5), Target::Time(now_ms - 5 * DAY_MS)] {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let is_told =
            matches!(&error, RestoreError::OutOfRange { range, .. } if range.starts_with("transactions 17 to 21"));
        assert!(is_told, "{error}");
    }
}

#[tokio::test]
async fn retention_off_keeps_all_but_what_is_superseded() {
    let oracle = all_kinds(512, 61).await;
    let before = keys(&oracle.store).await;
    let settings = RetentionSettings { window_ms: None, ..RetentionSettings::default() };
    let outcome = prune_at(&oracle.store, &settings, oracle.now_ms() + 1000 * DAY_MS).await;
    assert_eq!(outcome.plan.going.len(), 3);
    assert!(outcome.plan.going.iter().all(|going| going.why == GoesBecause::Superseded));
    assert_eq!(keys(&oracle.store).await.len(), before.len() - 3);
    check_window(&oracle, 0, oracle.now_ms(), "off").await;
}

#[tokio::test]
async fn a_segment_is_superseded_when_the_larger_one_is_old() {
    let mut oracle = Oracle::new(512, 62).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.pass_time(HOUR_MS);
    let mut small = BTreeSet::new();
    for _ in 0..4 {
        small.insert(oracle.commit_and_cut(1).await.to_string());
    }
    oracle.pass_time(10 * HOUR_MS);
    let merged_ms = oracle.now_ms();
    oracle.merge(1, 2, 5).await;
    for (after_ms, goes) in [(0, 0), (GRACE_MS, 0), (GRACE_MS + 1, 4)] {
        let outcome = prune_at(&oracle.store, &window(DAY_MS), merged_ms + after_ms).await;
        assert_eq!(outcome.plan.going.len(), goes, "{after_ms}");
    }
    assert!(keys(&oracle.store).await.is_disjoint(&small));
    check_window(&oracle, 0, oracle.now_ms(), "superseded").await;
}

/// An epoch whose first snapshot does not come takes the history before it away from nobody, however long it takes.
#[tokio::test]
async fn an_epoch_without_a_snapshot_takes_nothing_away() {
    let mut oracle = Oracle::new(512, 63).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(3).await;
    let known = oracle.position();
    oracle.begin(Some(known), false).await;
    oracle.commit_and_cut(2).await;
    oracle.pass_time(100 * DAY_MS);
    prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(plan.position == known && bytes == oracle.states[&known].bytes());
}

/// Two writers: the first one has claimed its epoch and shipped nothing yet when the second one takes over. What it ships then must be
/// restorable.
#[tokio::test]
async fn an_epoch_that_was_claimed_lately_stays() {
    let mut oracle = Oracle::new(512, 64).await;
    oracle.pass_time(DAY_MS);
    oracle.begin(None, false).await;
    let record = oracle.records.keys().map(|&epoch| EpochKey { epoch, writer: None }.to_string()).next().unwrap();
    oracle.begin_with_snapshot(Some(oracle.position()), 0).await;
    oracle.commit_and_cut(2).await;
    prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    assert!(keys(&oracle.store).await.contains(&record));
    oracle.pass_time(3 * DAY_MS);
    prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    assert!(!keys(&oracle.store).await.contains(&record));
}

#[tokio::test]
async fn the_newest_snapshot_stays_with_its_sources() {
    let mut oracle = large_oracle(64).await;
    oracle.begin_with_snapshot(None, 0).await;
    let oldest = oracle.snapshots[0].0;
    let parent = oracle.position();
    let oldest = SnapshotKey { epoch: 1, txid: oldest.txid, time_ms: oracle.states[&oldest].time_ms };
    // Unseen changes that were made back: the same extents on another line.
    oracle.begin(Some(parent), true).await;
    oracle.commit_and_cut(1).await;
    let newest = oracle.position().txid;
    let key = oracle.snapshot_on(Some(oldest), newest, newest).await;
    oracle.pass_time(100 * DAY_MS);
    let outcome = prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    let why = |key: SnapshotKey| {
        let staying = outcome.plan.staying.iter().find(|staying| staying.key.to_string() == key.to_string());
        staying.map_or(String::new(), |staying| format!("{:?}", staying.why))
    };
    assert!(why(oldest).contains("SourceOf"), "{}", outcome.plan);
    assert!(why(key).contains("Newest"), "{}", outcome.plan);
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(plan.position == oracle.position() && bytes == oracle.states[&plan.position].bytes());
    // The older one is there for its extents.
    check_nothing_looks_damaged(&oracle, "sources").await;
}

#[tokio::test]
async fn one_state_a_day_a_week_a_month() {
    let mut oracle = Oracle::new(512, 65).await;
    oracle.begin_with_snapshot(None, 0).await;
    let mut states = Vec::new();
    for _ in 0..120 {
        oracle.pass_time(DAY_MS / 2);
        oracle.commit_and_cut(2).await;
        let txid = oracle.position().txid;
        oracle.snapshot(txid - 1, txid).await;
        states.push(txid);
    }
    let settings = RetentionSettings { keep_daily: 5, keep_weekly: 4, keep_monthly: 3, ..window(DAY_MS) };
    oracle.pass_time(DAY_MS);
    let now_ms = oracle.now_ms();
    let outcome = prune_at(&oracle.store, &settings, now_ms).await;
    // The clock begins on 2026-09-21, a Monday; the last state is of 2026-11-20, a Friday.
    let kept: BTreeSet<String> = outcome
        .plan
        .staying
        .iter()
        .flat_map(|staying| staying.why.iter().map(ToString::to_string))
        .filter_map(|why| why.strip_prefix("state of ").map(str::to_owned))
        .collect();
    let expected = [
        "day 2026-11-16",
        "day 2026-11-17",
        "day 2026-11-18",
        "day 2026-11-19",
        "day 2026-11-20",
        "month 2026-09",
        "month 2026-10",
        "month 2026-11",
        "week 2026-W44",
        "week 2026-W45",
        "week 2026-W46",
        "week 2026-W47",
    ];
    assert_eq!(kept, expected.map(str::to_owned).into());
    check_nothing_looks_damaged(&oracle, "periods").await;
    let mut restorable = 0;
    for txid in states {
        restorable += u64::from(restore(&oracle.store, Target::Txid(txid), None).await.is_ok());
    }
    // Days, what the window begins with, weeks and months before the days.
    assert_eq!(restorable, 5 + 1 + 3 + 2);
    assert_eq!(prune_at(&oracle.store, &settings, now_ms).await.plan.going, []);
}

#[tokio::test]
async fn a_mark_keeps_its_state() {
    let mut oracle = Oracle::new(512, 66).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 3, &[0]).await;
    let now_ms = oracle.now_ms();
    let (mark, _) = set_mark(&oracle.store, "before-2.0", Target::Txid(6), None, now_ms).await.unwrap();
    assert_eq!((mark.epoch, mark.txid), (1, 6));
    let (newest, _) = set_mark(&oracle.store, "newest", Target::Latest, None, now_ms).await.unwrap();
    assert_eq!(newest.txid, 7);
    let taken = set_mark(&oracle.store, "newest", Target::Latest, None, now_ms).await.unwrap_err();
    assert!(matches!(taken, RetainError::MarkExists { txid: 7, .. }), "{taken}");
    let nothing = set_mark(&oracle.store, "x", Target::Txid(999), None, now_ms).await.unwrap_err();
    assert!(matches!(nothing, RetainError::Restore(RestoreError::OutOfRange { .. })), "{nothing}");
    assert_eq!(load_marks(&oracle.store).await.unwrap().len(), 2);
    // The line is left, found anew, and much later all of it is outside of the window.
    oracle.begin(Some(Position { epoch: 1, txid: 4 }), true).await;
    oracle.commit_and_cut(2).await;
    oracle.begin_with_snapshot(Some(oracle.position()), 0).await;
    a_segment_a_day(&mut oracle, 3, &[0, 1, 2]).await;
    oracle.pass_time(100 * DAY_MS);
    let now_ms = oracle.now_ms();
    prune_at(&oracle.store, &window(DAY_MS), now_ms).await;
    for name in ["before-2.0", "newest"] {
        let mark = find_mark(&oracle.store, name).await.unwrap();
        let (plan, bytes) = restore(&oracle.store, Target::Txid(mark.txid), Some(mark.epoch)).await.unwrap();
        assert!(plan.position == mark.position() && bytes == oracle.states[&mark.position()].bytes());
    }
    assert!(restore(&oracle.store, Target::Txid(6), Some(2)).await.is_err(), "no line but that of the mark");
    // Without the marks nothing holds it.
    for name in ["before-2.0", "newest"] {
        assert_eq!(remove_mark(&oracle.store, name).await.unwrap().unwrap().name, name);
        assert!(matches!(remove_mark(&oracle.store, name).await, Err(RetainError::NoSuchMark { .. })));
    }
    let outcome = prune_at(&oracle.store, &window(DAY_MS), now_ms).await;
    assert!(outcome.deleted_objects > 0);
    assert_eq!(keys(&oracle.store).await.iter().filter(|key| key.starts_with("epochs/")).count(), 1);
}

/// A daemon that stops before its first snapshot is stored, and goes on in another epoch, stores it there: the state that was found is
/// one of the first epoch, and only the second one's line has a snapshot of it.
#[tokio::test]
async fn a_mark_on_a_state_that_only_the_next_epochs_snapshot_serves() {
    let mut oracle = Oracle::new(512, 75).await;
    oracle.begin(None, false).await;
    let found = oracle.position();
    oracle.begin(Some(found), true).await;
    // It is the last state of one epoch, and the one that the other begins with.
    oracle.states.insert(oracle.position(), oracle.states[&found].clone());
    let snapshot = oracle.snapshot(found.txid, found.txid).await;
    let now_ms = oracle.now_ms();
    let (mark, planned) = set_mark(&oracle.store, "first", Target::Latest, None, now_ms).await.unwrap();
    assert_eq!((planned.position, planned.snapshot.key), (found, snapshot));
    assert_eq!((mark.epoch, mark.txid), (2, found.txid));
    // Much later nothing but the mark keeps it.
    oracle.commit_and_cut(2).await;
    oracle.begin_with_snapshot(Some(oracle.position()), 0).await;
    a_segment_a_day(&mut oracle, 3, &[0, 1, 2]).await;
    oracle.pass_time(100 * DAY_MS);
    assert!(prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await.deleted_objects > 0);
    let left = keys(&oracle.store).await;
    assert!(left.contains(&snapshot.to_string()), "{left:?}");
    let (_, bytes) = restore(&oracle.store, Target::Txid(mark.txid), Some(mark.epoch)).await.unwrap();
    assert!(bytes == oracle.states[&found].bytes());
    check_sound(&oracle.store, Depth::Structure, 1, oracle.now_ms()).await.unwrap();
    // A verification, too, finds it where the mark says, and misses it when it is gone.
    oracle.store.delete(&snapshot.to_string()).await.unwrap();
    let missed = check_sound(&oracle.store, Depth::Structure, 1, oracle.now_ms()).await.unwrap_err();
    assert!(missed.contains("the state of marks/first"), "{missed}");
}

/// What a restore of a marked state can do without is not needed to keep it: a source is read where an index says. And what can't be
/// read at the moment may be what the state needs.
#[tokio::test]
async fn a_mark_keeps_its_state_where_the_end_of_a_snapshot_is_damaged() {
    for damages_source in [true, false] {
        let mut oracle = Oracle::new(65_536, 71).await;
        (oracle.most_pages, oracle.least_pages, oracle.size_limit) = (2, 40, 60);
        oracle.begin_with_snapshot(None, 0).await;
        let first =
            SnapshotKey::parse(&keys(&oracle.store).await.into_iter().find(|key| key.starts_with("snap/")).unwrap());
        oracle.commit_and_cut(2).await;
        let txid = oracle.position().txid;
        let second = oracle.snapshot_on(first, txid, txid).await;
        oracle.commit_and_cut(2).await;
        let marked = oracle.position();
        set_mark(&oracle.store, "early", Target::Txid(marked.txid), None, oracle.now_ms()).await.unwrap();
        oracle.begin_with_snapshot(Some(marked), 0).await;
        a_segment_a_day(&mut oracle, 3, &[0, 1, 2]).await;
        oracle.pass_time(100 * DAY_MS);
        let key = if damages_source { first.unwrap() } else { second }.to_string();
        let whole = oracle.store.get(&key, u64::MAX).await.unwrap();
        let mut damaged = whole.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        oracle.store.put(&key, damaged.into(), PutMode::Overwrite).await.unwrap();
        prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
        if !damages_source {
            // It was the network's doing.
            oracle.store.put(&key, whole, PutMode::Overwrite).await.unwrap();
        }
        let (plan, bytes) = restore(&oracle.store, Target::Txid(marked.txid), Some(marked.epoch)).await.unwrap();
        assert!(plan.position == marked && bytes == oracle.states[&marked].bytes(), "{damages_source}");
    }
}

#[tokio::test]
async fn a_mark_that_cannot_be_read_stops_everything() {
    let mut oracle = Oracle::new(512, 67).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 5, &[3]).await;
    oracle.store.put("marks/odd", Bytes::from_static(b"{}"), PutMode::Overwrite).await.unwrap();
    let before = keys(&oracle.store).await;
    let refused =
        prune(&oracle.store, &window(HOUR_MS), Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await;
    assert!(matches!(refused, Err(RetainError::UnreadableMark { .. })), "{refused:?}");
    assert_eq!(keys(&oracle.store).await, before);
    assert_eq!(remove_mark(&oracle.store, "odd").await.unwrap(), None);
    prune_at(&oracle.store, &window(HOUR_MS), oracle.now_ms()).await;
}

/// Without its record a fork is not seen, and the line that it left looks like the newest one, which does not need what the fork
/// stands on.
#[tokio::test]
async fn nothing_goes_while_the_newest_epochs_record_is_lost() {
    let mut oracle = Oracle::new(512, 74).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 4, &[3]).await;
    oracle.begin(Some(Position { epoch: 1, txid: 3 }), true).await;
    oracle.commit_and_cut(2).await;
    oracle.pass_time(5 * DAY_MS);
    let record = EpochKey { epoch: 2, writer: None }.to_string();
    let bytes = oracle.store.get(&record, u64::MAX).await.unwrap();
    oracle.store.delete(&record).await.unwrap();
    let before = keys(&oracle.store).await;
    for settings in [window(DAY_MS), RetentionSettings { keep_daily: 2, ..window(DAY_MS) }] {
        let now = Now::Told(oracle.now_ms());
        let refused = prune(&oracle.store, &settings, now, &mut TailCache::default(), false).await;
        let is_named = matches!(
            &refused,
            Err(RetainError::Restore(RestoreError::Damaged { object, .. })) if *object == record
        );
        assert!(is_named, "{refused:?}");
        assert_eq!(keys(&oracle.store).await, before);
    }
    oracle.store.put(&record, bytes, PutMode::IfAbsent).await.unwrap();
    check_window(&oracle, 0, oracle.now_ms(), "the record is back").await;
    prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    check_window(&oracle, oracle.now_ms() - DAY_MS, oracle.now_ms(), "pruned").await;
}

#[tokio::test]
async fn a_damaged_snapshot_is_neither_used_nor_deleted() {
    let mut oracle = Oracle::new(512, 68).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 6, &[1, 4]).await;
    let snapshots = oracle.store.list("snap/", None).await.unwrap();
    let newest = &snapshots[2].key;
    oracle.store.put(newest, Bytes::from_static(b"damaged"), PutMode::Overwrite).await.unwrap();
    oracle.pass_time(100 * DAY_MS);
    let outcome = prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    let left = keys(&oracle.store).await;
    // Nobody knows which of the older ones it has extents in.
    assert!(snapshots.iter().all(|snapshot| left.contains(&snapshot.key)), "{left:?}");
    assert!(outcome.plan.notes.iter().any(|note| note.contains(newest)), "{:?}", outcome.plan.notes);
    oracle.store.delete(newest).await.unwrap();
    prune_at(&oracle.store, &window(DAY_MS), oracle.now_ms()).await;
    let left = keys(&oracle.store).await;
    assert!(left.contains(&snapshots[1].key) && !left.contains(&snapshots[0].key), "{left:?}");
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(plan.position == oracle.position() && bytes == oracle.states[&plan.position].bytes());
}

#[tokio::test]
async fn what_is_not_ours_is_not_touched() {
    let mut oracle = Oracle::new(512, 69).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 5, &[3]).await;
    let strangers = [
        "log/zz",
        // As what is older than all records. Of a newer epoch it would tell that a record was lost.
        "log/00000000/0000000000000001-0000000000000002-000000000003",
        "snap/x",
        "epochs/1",
        "marks/.x",
        "else",
    ];
    for key in strangers {
        oracle.store.put(key, Bytes::from_static(b"?"), PutMode::IfAbsent).await.unwrap();
    }
    oracle.pass_time(100 * DAY_MS);
    assert!(prune_at(&oracle.store, &window(HOUR_MS), oracle.now_ms()).await.deleted_objects > 0);
    let left = keys(&oracle.store).await;
    assert!(strangers.iter().all(|key| left.contains(*key)), "{left:?}");
}

/// A history with everything, most of it outside of a window of two days.
async fn a_long_history(seed: u64) -> Oracle {
    let mut oracle = large_oracle(seed).await;
    oracle.size_limit = 10;
    oracle.begin_with_snapshot(None, 1).await;
    live(&mut oracle, 30, 30 * DAY_MS).await;
    let position = oracle.position();
    oracle.begin_with_snapshot(Some(position), 1).await;
    live(&mut oracle, 6, 2 * DAY_MS).await;
    oracle
}

#[tokio::test]
async fn a_prune_that_is_cut_off_anywhere_harms_nothing() {
    let settings = RetentionSettings { keep_weekly: 2, ..window(2 * DAY_MS) };
    for seed in 0..3 {
        let make = async || a_long_history(3000 + seed).await;
        let whole = make().await;
        let (now_ms, start_ms) = (whole.now_ms(), whole.now_ms() - 2 * DAY_MS - GRACE_MS);
        let deletions = prune_at(&whole.store, &settings, now_ms).await.deleted_objects;
        assert!(deletions > 20, "{deletions}");
        let expected = keys(&whole.store).await;
        for cut_off_after in 0..deletions {
            let oracle = make().await;
            let deleted = AtomicU64::new(0);
            let hook = move |request: Request<'_>| match request.operation {
                Operation::Delete if deleted.fetch_add(1, Ordering::SeqCst) >= cut_off_after => {
                    Fault::Before(StoreErrorKind::Unavailable)
                }
                _ => Fault::None,
            };
            let faulty: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), hook));
            let store = Quirky::shared(faulty, Quirk::DeletesKeyByKey);
            let outcome = prune(&store, &settings, Now::Told(now_ms), &mut TailCache::default(), false).await.unwrap();
            assert_eq!(outcome.deleted_objects, cut_off_after);
            let what = format!("seed {seed}, cut off after {cut_off_after}");
            check_window(&oracle, start_ms, now_ms, &what).await;
            check_nothing_looks_damaged(&oracle, &what).await;
            // The next one ends the work.
            prune_at(&oracle.store, &settings, now_ms).await;
            assert_eq!(keys(&oracle.store).await, expected, "{what}");
        }
    }
}

/// Each single deletion that is refused leaves everything in order, and nothing that belongs to no epoch.
#[tokio::test]
async fn a_single_object_that_can_not_be_deleted() {
    let settings = window(2 * DAY_MS);
    let whole = a_long_history(3100).await;
    let (now_ms, start_ms) = (whole.now_ms(), whole.now_ms() - 2 * DAY_MS - GRACE_MS);
    let plan = prune_at(&whole.store, &settings, now_ms).await.plan;
    for going in &plan.going {
        let oracle = a_long_history(3100).await;
        let key = going.key.to_string();
        let locked = key.clone();
        let hook = move |request: Request<'_>| match request.operation {
            Operation::Delete if request.key == locked => Fault::Before(StoreErrorKind::Denied),
            _ => Fault::None,
        };
        let faulty: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), hook));
        let store = Quirky::shared(faulty, Quirk::DeletesKeyByKey);
        let outcome = prune(&store, &settings, Now::Told(now_ms), &mut TailCache::default(), false).await.unwrap();
        assert_eq!((outcome.refused.objects, outcome.undeleted.objects), (1, 0), "{key}");
        check_window(&oracle, start_ms, now_ms, &key).await;
        check_nothing_looks_damaged(&oracle, &key).await;
        prune_at(&oracle.store, &settings, now_ms).await;
        assert_eq!(keys(&oracle.store).await, keys(&whole.store).await, "{key}");
    }
}

#[tokio::test]
async fn stores_that_do_not_delete_are_told() {
    let mut oracle = Oracle::new(512, 70).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 6, &[1, 4]).await;
    oracle.pass_time(100 * DAY_MS);
    let before = keys(&oracle.store).await;
    let denied = |request: Request<'_>| match request.operation {
        Operation::Delete | Operation::DeleteMany => Fault::Before(StoreErrorKind::Denied),
        _ => Fault::None,
    };
    let refusing: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), denied));
    let lying = Quirky::shared(oracle.store.clone(), Quirk::DeletesNothing);
    for (store, is_refusal) in [(refusing, true), (lying, false)] {
        let outcome =
            prune(&store, &window(DAY_MS), Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await.unwrap();
        assert_eq!(keys(&oracle.store).await, before);
        assert!(!outcome.is_complete() && outcome.deleted_objects == 0);
        let going = outcome.plan.going.len() as u64;
        assert_eq!(
            (outcome.refused.objects, outcome.undeleted.objects),
            if is_refusal { (going, 0) } else { (0, going) }
        );
        assert_eq!(outcome.refused.example.is_some(), is_refusal);
        assert_eq!(outcome.undeleted.example.is_some(), !is_refusal);
        let board = Board::default();
        note_deletions(&board, &outcome);
        let told = board.status().notes["delete"].clone();
        assert!(told.contains(if is_refusal { "refuses to delete" } else { "and keeps it" }), "{told}");
    }
    // A listing that fails is an error, and nothing is deleted.
    let unlisted = |request: Request<'_>| match request.operation {
        Operation::List if request.key == "snap/" => Fault::Before(StoreErrorKind::Denied),
        _ => Fault::None,
    };
    let store: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), unlisted));
    let failed = prune(&store, &window(DAY_MS), Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await;
    assert!(matches!(failed, Err(RetainError::Restore(RestoreError::Store(_)))), "{failed:?}");
    assert_eq!(keys(&oracle.store).await, before);
}

/// What the daemon does every hour: listings, and no snapshot is read twice.
#[tokio::test]
async fn a_prune_with_nothing_to_do_is_cheap() {
    let oracle = all_kinds(512, 71).await;
    let (store, meter) = waltrail::store::metered::Metered::new(oracle.store.clone());
    let store: SharedStore = Arc::new(store);
    let mut cache = TailCache::default();
    let settings = RetentionSettings { window_ms: None, ..RetentionSettings::default() };
    prune(&store, &settings, Now::Told(oracle.now_ms()), &mut cache, false).await.unwrap();
    let before = meter.traffic();
    prune(&store, &settings, Now::Told(oracle.now_ms()), &mut cache, false).await.unwrap();
    let after = meter.traffic();
    let requests = |operation| after.by_operation[&operation] - before.by_operation[&operation];
    // The marker and the epochs' records; epochs, segments, snapshots, marks.
    assert_eq!(requests(Operation::Get), 1 + oracle.records.len() as u64);
    assert_eq!((requests(Operation::GetRange), requests(Operation::List)), (0, 4));
}

/// What the daemon goes by: its own clock, but not where that is far from what the store's clock was a moment ago.
#[tokio::test]
async fn a_clock_that_runs_ahead_lets_nothing_go() {
    let mut oracle = Oracle::new(512, 72).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 6, &[1, 4]).await;
    let before = keys(&oracle.store).await;
    let a_year_later = oracle.now_ms() + 365 * DAY_MS;
    let prune = async |now: Now| {
        prune(&oracle.store, &window(10 * DAY_MS), now, &mut TailCache::default(), false).await.unwrap().deleted_objects
    };
    assert_eq!(prune(Now::NotFarBeyondStored(a_year_later)).await, 0);
    assert_eq!(keys(&oracle.store).await, before);
    assert!(prune(Now::Told(a_year_later)).await > 0, "a person's word counts");
}

/// Prunes as soon as a mark is put: the worst moment.
#[tokio::test]
async fn a_mark_on_a_state_that_goes_in_the_same_moment_is_refused() {
    let mut oracle = Oracle::new(512, 73).await;
    oracle.begin_with_snapshot(None, 0).await;
    a_segment_a_day(&mut oracle, 10, &[3, 7]).await;
    let inner = oracle.store.clone();
    let now_ms = oracle.now_ms();
    // The hook can't wait; the deletions of that moment are those of a prune that was planned before.
    let settings = window(DAY_MS);
    let planned = prune(&inner, &settings, Now::Told(now_ms), &mut TailCache::default(), true).await.unwrap().plan;
    let doomed: Vec<String> = planned.going.iter().map(|going| going.key.to_string()).collect();
    assert!(!doomed.is_empty());
    let store = Quirky::shared(inner.clone(), Quirk::LosesAtPut(doomed));
    let refused = set_mark(&store, "late", Target::Txid(4), None, now_ms).await.unwrap_err();
    assert!(matches!(refused, RetainError::Restore(RestoreError::OutOfRange { .. })), "{refused}");
    assert_eq!(load_marks(&inner).await.unwrap(), [], "no mark stands for what is gone");
}
