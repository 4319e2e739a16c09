//! What the last migration found: the one that was last, whether it was seen or not, or the answer that nobody knows.

use waltrail::format::key::{SegmentKey, SnapshotKey};
use waltrail::format::{FOOTER_LEN, Position};
use waltrail::restore::RestoreError;
use waltrail::restore::plan::{Plan, Target};
use waltrail::store::PutMode;

use crate::restore::restore;
use crate::support::oracle::Oracle;
use crate::support::{decoded, encoded};

/// The oracle's pages are noise and its schema is always the same one: says in its objects which state has which schema.
async fn set_schemas(oracle: &Oracle, cookie_after: impl Fn(u32, u64) -> u32) {
    for object in oracle.store.list("", None).await.unwrap() {
        let bytes = oracle.store.get(&object.key, u64::MAX).await.unwrap();
        let changed = if let Some(SegmentKey(span)) = SegmentKey::parse(&object.key) {
            let (mut segment, contents) = decoded(&bytes);
            for transaction in &mut segment.transactions {
                let (cookie, txid) = (cookie_after(span.epoch, transaction.txid), transaction.txid);
                transaction.info.schema_cookie = cookie;
                transaction.info.schema_changed = cookie != cookie_after(span.epoch, txid - 1);
            }
            encoded(&segment.footer, &segment.transactions, &contents).0
        } else if let Some(key) = SnapshotKey::parse(&object.key) {
            let mut bytes = bytes.to_vec();
            let at = bytes.len() - FOOTER_LEN;
            let footer = &mut bytes[at..];
            let last_txid = u64::from_le_bytes(footer[32..40].try_into().unwrap());
            footer[72..76].copy_from_slice(&cookie_after(key.epoch, last_txid).to_le_bytes());
            let checksum = crc32fast::hash(&[&footer[..84], &footer[88..96]].concat());
            footer[84..88].copy_from_slice(&checksum.to_le_bytes());
            bytes
        } else {
            continue;
        };
        oracle.store.put(&object.key, changed.into(), PutMode::Overwrite).await.unwrap();
    }
}

/// Three transactions; the second one is a migration, from schema 1 to 2.
async fn with_migration(seed: u64) -> (Oracle, Position) {
    let mut oracle = Oracle::new(512, seed).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(3).await;
    let end = oracle.position();
    (oracle, end)
}

fn first_schema(txid: u64) -> u32 {
    if txid < 3 { 1 } else { 2 }
}

async fn before_schema_change(oracle: &Oracle) -> Result<Plan, RestoreError> {
    let (plan, bytes) = restore(&oracle.store, Target::BeforeSchemaChange, None).await?;
    assert!(bytes == oracle.states[&plan.position].bytes(), "{plan}");
    Ok(plan)
}

async fn assert_unknown(oracle: &Oracle) {
    let error = before_schema_change(oracle).await.unwrap_err();
    assert!(matches!(error, RestoreError::OutOfRange { .. }), "{error}");
}

fn is_said(plan: &Plan, words: &str) -> bool {
    plan.notes.iter().any(|note| note.contains(words))
}

/// The local state was lost, and while nobody followed the database somebody changed its schema.
#[tokio::test]
async fn a_migration_that_nobody_saw() {
    for transactions in [0, 2] {
        for (found_with, expected_txid) in [(3, 4), (2, 2)] {
            let (mut oracle, end) = with_migration(70).await;
            oracle.begin_with_snapshot(Some(end), 0).await;
            if transactions > 0 {
                oracle.commit_and_cut(transactions).await;
            }
            set_schemas(&oracle, |epoch, txid| if epoch == 2 { found_with } else { first_schema(txid) }).await;
            let plan = before_schema_change(&oracle).await.unwrap();
            assert_eq!(plan.position, Position { epoch: 1, txid: expected_txid });
            assert_eq!(is_said(&plan, "changed unseen"), expected_txid == end.txid, "{:?}", plan.notes);
        }
    }
}

/// Nothing tells yet of the database as it was found: what is known before it is given, and that is said.
#[tokio::test]
async fn a_migration_before_an_epoch_of_which_nothing_is_there() {
    let (mut oracle, end) = with_migration(71).await;
    set_schemas(&oracle, |_, txid| first_schema(txid)).await;
    let plan = before_schema_change(&oracle).await.unwrap();
    assert!(plan.position.txid == 2 && plan.notes.is_empty(), "{plan} {:?}", plan.notes);
    oracle.begin(Some(end), false).await;
    let plan = before_schema_change(&oracle).await.unwrap();
    assert_eq!(plan.position.txid, 2);
    assert!(is_said(&plan, "schema epoch 2 began with is not known"), "{:?}", plan.notes);
}

/// What it found can't be restored: that is the answer, and not what an older migration found.
#[tokio::test]
async fn a_migration_while_the_first_snapshot_was_read() {
    let (mut oracle, end) = with_migration(72).await;
    oracle.begin_with_snapshot(Some(end), 3).await;
    let found_txid = end.txid + 1;
    let cookie_after = |epoch, txid| match epoch {
        1 => first_schema(txid),
        _ if txid < found_txid + 2 => 2,
        _ => 3,
    };
    set_schemas(&oracle, cookie_after).await;
    assert_unknown(&oracle).await;
}

/// One migration in each of two segments, and a snapshot behind them.
async fn two_segments(seed: u64, last_cookie: u32) -> (Oracle, SegmentKey, SegmentKey) {
    let mut oracle = Oracle::new(512, seed).await;
    oracle.begin_with_snapshot(None, 0).await;
    let first = oracle.commit_and_cut(2).await;
    let second = oracle.commit_and_cut(2).await;
    oracle.snapshot(5, 5).await;
    oracle.commit_and_cut(2).await;
    set_schemas(&oracle, |_, txid| if txid < 5 { first_schema(txid) } else { last_cookie }).await;
    (oracle, first, second)
}

#[tokio::test]
async fn a_migration_that_was_let_go() {
    let (oracle, first, second) = two_segments(73, 3).await;
    assert_eq!(before_schema_change(&oracle).await.unwrap().position.txid, 4);
    oracle.store.delete(&second.to_string()).await.unwrap();
    assert_unknown(&oracle).await;
    oracle.store.delete(&first.to_string()).await.unwrap();
    assert_unknown(&oracle).await;
    // Where none was among those that are gone, the one before them was the last.
    let (oracle, _, second) = two_segments(74, 2).await;
    oracle.store.delete(&second.to_string()).await.unwrap();
    assert_eq!(before_schema_change(&oracle).await.unwrap().position.txid, 2);
}

/// Nobody knows what was before what a run has left of its transactions.
#[tokio::test]
async fn a_run_that_lost_its_beginning_is_not_gone_past() {
    let (mut oracle, end) = with_migration(75).await;
    oracle.begin_with_snapshot(Some(end), 0).await;
    let lost = oracle.commit_and_cut(2).await;
    oracle.snapshot(oracle.position().txid, oracle.position().txid).await;
    oracle.commit_and_cut(1).await;
    set_schemas(&oracle, |epoch, txid| if epoch == 1 { first_schema(txid) } else { 2 }).await;
    assert_eq!(before_schema_change(&oracle).await.unwrap().position.txid, 2);
    oracle.store.delete(&lost.to_string()).await.unwrap();
    assert_unknown(&oracle).await;
}
