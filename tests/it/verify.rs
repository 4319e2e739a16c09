//! Verifying: every kind of damage in every kind of object is found and named, at the depth that can; and nothing that is healthy is
//! called damaged, whatever goes on meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use waltrail::clock::Clock;
use waltrail::format::FOOTER_LEN;
use waltrail::format::key::{PRESENCE_KEY, SegmentKey, SnapshotKey};
use waltrail::format::record::PresenceRecord;
use waltrail::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotWriter, decode_extent};
use waltrail::restore::RestoreError;
use waltrail::restore::plan::Target;
use waltrail::retain::marks::set_mark;
use waltrail::retain::prune::prune;
use waltrail::retain::tails::TailCache;
use waltrail::retain::{Now, RetentionSettings};
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::memory::MemoryStore;
use waltrail::store::{ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};
use waltrail::verify::report::{Report, Verdict};
use waltrail::verify::{Depth, Settings, VerifyError, verify};

use crate::support::oracle::{Oracle, all_kinds};
use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{count_up, create_database, decoded, encoded, insert, run, stderr, wait_for, waltrail};

const HOUR_MS: u64 = 3_600_000;
const DEPTHS: [Depth; 3] = [Depth::Structure, Depth::Data, Depth::Drill];

/// A clock whose time of day stands still.
struct Stopped(u64);

impl Clock for Stopped {
    fn now_ms(&self) -> u64 {
        self.0
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

/// The oracle's databases are noise, which SQLite would call no database.
fn settings(depth: Depth) -> Settings {
    Settings {
        depth,
        points: 4,
        share: 1.0,
        seed: 7,
        max_duration: None,
        scratch: std::env::temp_dir(),
        checks_integrity: false,
        max_lag: None,
        retention: None,
        live: None,
    }
}

async fn verify_with(store: &SharedStore, settings: &Settings, now_ms: u64) -> Result<Report, VerifyError> {
    verify(store.clone(), settings, Arc::new(Stopped(now_ms))).await
}

async fn report(oracle: &Oracle, depth: Depth) -> Report {
    verify_with(&oracle.store, &settings(depth), oracle.now_ms() + 2 * HOUR_MS).await.unwrap()
}

/// What a daemon has made, wherever it was interrupted: nothing of it is called damaged. Gives what is told of it.
pub async fn check_sound(store: &SharedStore, depth: Depth, seed: u64, now_ms: u64) -> Result<Vec<String>, String> {
    let settings = Settings { checks_integrity: true, points: 3, seed, ..settings(depth) };
    let found = match verify_with(store, &settings, now_ms).await {
        Ok(found) => found,
        Err(VerifyError::Restore(RestoreError::NoReplica { .. } | RestoreError::NothingYet { .. })) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error.to_string()),
    };
    // A crash before the first snapshot of an epoch was stored, and then a long time; or in the middle of a prune; a merged
    // segment that arrived after its epoch was let go.
    let may_be = [
        "though the first one was read whole",
        "has no snapshot yet",
        "a prune was not finished",
        "not of this replica, or left over: log/",
    ];
    let is_wrong = |sentence: &str| !may_be.iter().any(|words| sentence.contains(words));
    if found.findings.iter().any(|finding| is_wrong(&finding.sentence)) || !found.not_reached.is_empty() {
        return Err(format!("{depth:?}: {}\n{:?}", sentences(&found), found.not_reached));
    }
    Ok(found.findings.into_iter().map(|finding| finding.sentence).collect())
}

fn sentences(report: &Report) -> String {
    let told = report.findings.iter().map(|finding| format!("{}: {}", finding.verdict.name(), finding.sentence));
    told.collect::<Vec<_>>().join("\n")
}

/// The verdict, and a finding with it that says so.
fn assert_found(report: &Report, verdict: Verdict, says: &[&str], what: &str) {
    let all = sentences(report);
    assert_eq!(report.verdict, verdict, "{what} ({:?}):\n{all}", report.depth);
    let is_said = report
        .findings
        .iter()
        .any(|finding| finding.verdict == verdict && says.iter().all(|words| finding.sentence.contains(words)));
    assert!(verdict == Verdict::Ok || is_said, "{what} ({:?}): {says:?} is not in\n{all}", report.depth);
}

async fn get(store: &SharedStore, key: &str) -> Vec<u8> {
    store.get(key, u64::MAX).await.unwrap().to_vec()
}

async fn put(store: &SharedStore, key: &str, bytes: Vec<u8>) {
    store.put(key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
}

async fn flip(store: &SharedStore, key: &str, at: usize) {
    let mut bytes = get(store, key).await;
    bytes[at] ^= 0x20;
    put(store, key, bytes).await;
}

async fn cut_short(store: &SharedStore, key: &str) {
    let bytes = get(store, key).await;
    put(store, key, bytes[..bytes.len() - 7].to_vec()).await;
}

async fn swap(store: &SharedStore, left: &str, right: &str) {
    let (left_bytes, right_bytes) = (get(store, left).await, get(store, right).await);
    put(store, left, right_bytes).await;
    put(store, right, left_bytes).await;
}

async fn keys(store: &SharedStore, prefix: &str) -> Vec<String> {
    store.list(prefix, None).await.unwrap().into_iter().map(|object| object.key).collect()
}

fn presence(oracle: &Oracle, epoch: u32, txid: u64) -> Vec<u8> {
    let time_ms = oracle.now_ms();
    PresenceRecord { format: 1, epoch, writer: format!("{epoch:032x}"), txid, time_ms, program: "test".into() }.encode()
}

/// Segments one after another behind one snapshot, and one on top that refers to it. Large enough for several extents.
async fn simple() -> (Oracle, Vec<SegmentKey>, [SnapshotKey; 2]) {
    let mut oracle = Oracle::new(65_536, 3).await;
    (oracle.most_pages, oracle.least_pages, oracle.size_limit) = (2, 40, 60);
    oracle.begin_with_snapshot(None, 0).await;
    let first = *oracle_snapshots(&oracle).await.first().unwrap();
    let mut segments = Vec::new();
    for _ in 0..4 {
        segments.push(oracle.commit_and_cut(2).await);
    }
    let txid = oracle.position().txid;
    let second = oracle.snapshot_on(Some(first), txid, txid).await;
    for _ in 0..3 {
        segments.push(oracle.commit_and_cut(2).await);
    }
    (oracle, segments, [first, second])
}

async fn oracle_snapshots(oracle: &Oracle) -> Vec<SnapshotKey> {
    keys(&oracle.store, "snap/").await.iter().map(|key| SnapshotKey::parse(key).unwrap()).collect()
}

#[tokio::test]
async fn healthy_replicas_are_ok() {
    for (page_size, seed) in [(512, 1), (4096, 2), (65_536, 3)] {
        let oracle = all_kinds(page_size, seed).await;
        let marked = Target::Txid(5 + 3);
        set_mark(&oracle.store, "good", marked, None, oracle.now_ms()).await.unwrap();
        let position = oracle.position();
        put(&oracle.store, PRESENCE_KEY, presence(&oracle, position.epoch, position.txid)).await;
        for depth in DEPTHS {
            let found = report(&oracle, depth).await;
            assert_found(&found, Verdict::Ok, &[], "healthy");
            assert!(found.findings.is_empty() && found.not_reached.is_empty(), "{found:?}");
            let newest = found.newest.unwrap();
            assert_eq!((newest.epoch, newest.txid), (position.epoch, position.txid));
            let restores = found.checks.iter().filter(|check| check.name.starts_with("restore of")).count();
            assert_eq!(restores, if depth == Depth::Drill { 4 } else { 0 }, "{:?}", found.checks);
        }
    }
    let (oracle, ..) = simple().await;
    for depth in DEPTHS {
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "healthy, with shared extents");
    }
}

/// Without the marker or an epoch's record nothing can be restored. All that are damaged are named.
#[tokio::test]
async fn damaged_records() {
    let record = "epochs/00000005";
    for key in ["waltrail.json", record, "epochs/00000002"] {
        let oracle = all_kinds(512, 4).await;
        let whole = get(&oracle.store, key).await;
        // A record has no checksum: what is a text stays one when a letter of it changes.
        for at in [0, 1, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            put(&oracle.store, key, bytes).await;
            for depth in DEPTHS {
                assert_found(&report(&oracle, depth).await, Verdict::Failed, &[key, "can't be read"], "flipped");
            }
        }
        put(&oracle.store, key, whole[..whole.len() / 2].to_vec()).await;
        assert_found(&report(&oracle, Depth::Structure).await, Verdict::Failed, &[key], "truncated");
        put(&oracle.store, key, Vec::new()).await;
        flip(&oracle.store, "epochs/00000006", 0).await;
        let found = report(&oracle, Depth::Structure).await;
        assert_found(&found, Verdict::Failed, &[key], "two");
        assert_found(&found, Verdict::Failed, &["epochs/00000006"], "two");
    }
    let oracle = all_kinds(512, 4).await;
    swap(&oracle.store, record, "epochs/00000006").await;
    assert_found(
        &report(&oracle, Depth::Drill).await,
        Verdict::Failed,
        &[record, "record of another epoch"],
        "swapped",
    );
}

#[tokio::test]
async fn missing_records() {
    for (key, verdict, says) in [
        ("waltrail.json", Verdict::Failed, "it is missing"),
        ("epochs/00000005", Verdict::Failed, "the newest line can't be followed"),
        ("epochs/00000007", Verdict::Failed, "the newest states can't be restored"),
        ("epochs/00000003", Verdict::Degraded, "nobody knows any more"),
    ] {
        for depth in DEPTHS {
            let oracle = all_kinds(512, 5).await;
            oracle.store.delete(key).await.unwrap();
            assert_found(&report(&oracle, depth).await, verdict, &[key, says], "missing");
        }
    }
}

/// What the tables and footers of segments tell.
#[tokio::test]
async fn damaged_segments() {
    let needed = "states that should be restorable need it";
    for depth in DEPTHS {
        let (oracle, segments, _) = simple().await;
        let (store, third) = (&oracle.store, segments[2].to_string());
        let whole = get(store, &third).await;
        cut_short(store, &third).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&third, needed], "truncated");
        put(store, &third, Vec::new()).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&third, "too short", needed], "empty");
        put(store, &third, whole.clone()).await;
        flip(store, &third, whole.len() - 50).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&third, "footer", needed], "footer");
        put(store, &third, whole.clone()).await;
        flip(store, &third, whole.len() - 105).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&third, "table", needed], "table");
        put(store, &third, whole.clone()).await;
        let second = segments[1].to_string();
        swap(store, &third, &second).await;
        let found = report(&oracle, depth).await;
        for key in [&second, &third] {
            assert_found(&found, Verdict::Failed, &[key, "it is another segment", needed], "swapped");
        }
    }
}

/// What only the pages tell is not claimed to be found by looking at the ends.
#[tokio::test]
async fn damaged_pages() {
    let (oracle, segments, _) = simple().await;
    // The last one: a restore of the newest state needs it.
    let last = segments.last().unwrap().to_string();
    let whole = get(&oracle.store, &last).await;
    for (at, says) in
        [(40, "the segment's pages"), (5, "the segment's header"), (whole.len() / 3, "the segment's pages")]
    {
        flip(&oracle.store, &last, at).await;
        assert_found(&report(&oracle, Depth::Structure).await, Verdict::Ok, &[], "pages");
        for depth in [Depth::Data, Depth::Drill] {
            assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&last, says], "pages");
        }
        put(&oracle.store, &last, whole.clone()).await;
    }
}

#[tokio::test]
async fn a_large_segment_is_read_block_by_block() {
    let mut oracle = Oracle::new(4096, 3).await;
    (oracle.is_noise, oracle.most_pages, oracle.least_pages, oracle.size_limit) = (true, 900, 800, 1000);
    oracle.begin_with_snapshot(None, 0).await;
    let key = oracle.commit_and_cut(4).await.to_string();
    let len = get(&oracle.store, &key).await.len();
    assert!(len > 3 << 20, "{len}");
    for depth in DEPTHS {
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "large");
    }
    for (at, says) in [(3, "header"), (len / 2, "checksum"), (len - 200_000, "checksum")] {
        flip(&oracle.store, &key, at).await;
        assert_found(&report(&oracle, Depth::Structure).await, Verdict::Ok, &[], "large");
        assert_found(&report(&oracle, Depth::Data).await, Verdict::Failed, &[&key, says], "large");
        flip(&oracle.store, &key, at).await;
    }
}

/// Every checksum is right, and the content is not what the writer had: only a restore tells.
#[tokio::test]
async fn content_of_another_history() {
    let (oracle, segments, _) = simple().await;
    let last = segments.last().unwrap();
    let bytes = get(&oracle.store, &last.to_string()).await;
    let forged = crate::cli::forged(&bytes);
    put(&oracle.store, &last.to_string(), forged).await;
    for depth in [Depth::Structure, Depth::Data] {
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "forged");
    }
    let found = report(&oracle, Depth::Drill).await;
    assert_found(&found, Verdict::Failed, &["restore of the newest state fails", "its fingerprint is"], "forged");
}

/// The same segment, of a history in which its last transaction left another state.
fn of_another_history(segment: &[u8]) -> Vec<u8> {
    let (mut whole, contents) = decoded(segment);
    let last = whole.transactions.last_mut().unwrap();
    last.info.fingerprint = last.info.fingerprint.map(|fingerprint| fingerprint ^ 1);
    encoded(&whole.footer, &whole.transactions, &contents).0
}

/// An old version of an object in place, whole in itself: what others say of the same state gives it away.
#[tokio::test]
async fn stale_objects() {
    for depth in DEPTHS {
        let (mut oracle, segments, [_, second]) = simple().await;
        let stale = segments[1].to_string();
        let whole = get(&oracle.store, &stale).await;
        put(&oracle.store, &stale, of_another_history(&whole)).await;
        oracle.merge(1, segments[1].0.first_txid, segments[2].0.last_txid).await;
        let says = [stale.as_str(), "contradict each other about transaction 5"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "segments");
        put(&oracle.store, &stale, whole).await;
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "mended");
        // Segment and snapshot.
        let stale = segments[3].to_string();
        put(&oracle.store, &stale, of_another_history(&get(&oracle.store, &stale).await)).await;
        let says = [stale.as_str(), &second.to_string(), "contradict each other about transaction 9"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "segment and snapshot");
    }
}

#[tokio::test]
async fn missing_segments() {
    for depth in DEPTHS {
        let (oracle, segments, [_, second]) = simple().await;
        // In the middle, with no snapshot behind it.
        oracle.store.delete(&segments[5].to_string()).await.unwrap();
        let found = report(&oracle, depth).await;
        assert_found(&found, Verdict::Failed, &["transactions 12 to 13 of epoch 1 are missing", "gap"], "gap");
        assert_found(&found, Verdict::Failed, &["the newest state", "the last one that can be is 11"], "gap");

        // Before a snapshot, as retention would leave it, but not where it would begin.
        let (oracle, segments, _) = simple().await;
        oracle.store.delete(&segments[3].to_string()).await.unwrap();
        let found = report(&oracle, depth).await;
        assert_found(&found, Verdict::Degraded, &["transactions 8 to 9", "lost, or a prune was not finished"], "gap");

        // The last one: a snapshot has seen it.
        let (oracle, segments, _) = simple().await;
        for segment in &segments[3..] {
            oracle.store.delete(&segment.to_string()).await.unwrap();
        }
        let says = ["transactions 8 to 9", &second.to_string(), "has seen"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "end");

        // The last one: the daemon had confirmed it.
        let (oracle, segments, _) = simple().await;
        put(&oracle.store, PRESENCE_KEY, presence(&oracle, 1, 15)).await;
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "presence");
        oracle.store.delete(&segments[6].to_string()).await.unwrap();
        let says = ["transactions 14 to 15 of epoch 1 are missing, which the daemon confirmed"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "end");
        put(&oracle.store, PRESENCE_KEY, presence(&oracle, 2, 15)).await;
        let says = ["epochs/00000002 is missing: its daemon confirmed"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "epoch");
        put(&oracle.store, PRESENCE_KEY, b"{".to_vec()).await;
        assert_found(&report(&oracle, depth).await, Verdict::Degraded, &["presence is damaged"], "presence");
    }
}

/// With the retention known, a gap inside of the window is told of; without, it may be what retention left.
#[tokio::test]
async fn a_gap_inside_of_the_window() {
    let (oracle, segments, _) = simple().await;
    for segment in &segments[..4] {
        oracle.store.delete(&segment.to_string()).await.unwrap();
    }
    let now_ms = oracle.now_ms() + HOUR_MS;
    let mut settings = settings(Depth::Structure);
    let found = verify_with(&oracle.store, &settings, now_ms).await.unwrap();
    assert_found(&found, Verdict::Ok, &[], "unknown");
    assert!(found.notes.iter().any(|note| note.contains("transactions 2 to 9")), "{:?}", found.notes);
    settings.retention = Some(RetentionSettings { window_ms: Some(24 * HOUR_MS), ..RetentionSettings::default() });
    let found = verify_with(&oracle.store, &settings, now_ms).await.unwrap();
    assert_found(&found, Verdict::Degraded, &["transactions 2 to 9", "the configuration keeps"], "known");
    settings.retention = Some(RetentionSettings { window_ms: Some(60_000), ..RetentionSettings::default() });
    let found = verify_with(&oracle.store, &settings, now_ms).await.unwrap();
    assert_found(&found, Verdict::Ok, &[], "short");
}

/// A store that keeps what it is told to delete.
#[tokio::test]
async fn refused_deletions() {
    let (mut oracle, ..) = simple().await;
    let mut settings = settings(Depth::Structure);
    settings.retention = Some(RetentionSettings { window_ms: Some(HOUR_MS), ..RetentionSettings::default() });
    for _ in 0..30 {
        oracle.pass_time(2 * HOUR_MS);
        oracle.commit_and_cut(1).await;
    }
    let txid = oracle.position().txid;
    oracle.snapshot(txid, txid).await;
    let retention = settings.retention.unwrap();
    prune(&oracle.store, &retention, Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await.unwrap();
    let says = ["should have been let go more than a day ago", "are deletions refused?"];
    for hour in 0..40 {
        oracle.pass_time(HOUR_MS);
        oracle.commit_and_cut(1).await;
        let found = verify_with(&oracle.store, &settings, oracle.now_ms()).await.unwrap();
        // From a day after that snapshot on, nobody needs what was before it.
        let expected = if hour < 25 { Verdict::Ok } else { Verdict::Degraded };
        if !(24..=27).contains(&hour) {
            assert_found(&found, expected, if hour < 25 { &[] } else { &says }, &format!("hour {hour}"));
        }
    }
    // One that was stopped had no time to.
    oracle.pass_time(40 * HOUR_MS);
    oracle.commit_and_cut(1).await;
    let found = verify_with(&oracle.store, &settings, oracle.now_ms()).await.unwrap();
    assert_found(&found, Verdict::Ok, &[], "stopped");
    prune(&oracle.store, &retention, Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await.unwrap();
    let found = verify_with(&oracle.store, &settings, oracle.now_ms()).await.unwrap();
    assert_found(&found, Verdict::Ok, &[], "pruned");
}

#[tokio::test]
async fn damaged_snapshots() {
    let needed = "states that should be restorable need it";
    for depth in DEPTHS {
        let (oracle, _, snapshots) = simple().await;
        let (store, [first, second]) = (&oracle.store, snapshots.map(|key| key.to_string()));
        let whole = get(store, &second).await;
        cut_short(store, &second).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&second, needed], "truncated");
        put(store, &second, whole.clone()).await;
        flip(store, &second, whole.len() - 60).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&second, "footer", needed], "footer");
        put(store, &second, whole.clone()).await;
        flip(store, &second, whole.len() - 110).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&second, "list of sources", needed], "sources");
        put(store, &second, whole.clone()).await;
        flip(store, &second, whole.len() - 150).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&second, "index", needed], "index");
        put(store, &second, whole.clone()).await;
        flip(store, &second, 9).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&second, "header", needed], "header");
        put(store, &second, whole.clone()).await;
        swap(store, &first, &second).await;
        let says = [&second, "it is another snapshot", needed];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "swapped");
        swap(store, &first, &second).await;
        store.delete(&first).await.unwrap();
        let says = [&first, "is missing: extents of", second.as_str()];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "source");
    }
}

/// The same snapshot, with what `change` makes of the records of extents that are in `source`.
fn indexed_otherwise(
    snapshot: &[u8],
    source: SnapshotKey,
    change: impl Fn(ExtentRecord) -> ExtentRecord,
) -> (usize, Vec<u8>) {
    let footer = SnapshotFooter::decode(snapshot, snapshot.len() as u64).unwrap();
    let index = &snapshot[footer.index_offset as usize..snapshot.len() - FOOTER_LEN];
    let index = footer.decode_index(index).unwrap();
    let (mut writer, mut bytes) = SnapshotWriter::new(footer.page_size);
    let mut changed = 0;
    for (number, extent) in (0..).zip(index.extents) {
        if extent.source == 0 {
            let compressed = &snapshot[extent.offset as usize..][..extent.compressed_len as usize];
            let content = decode_extent(number, &extent, compressed, footer.page_size).unwrap();
            bytes.extend(writer.encode_extent(number, extent.txid, &content).unwrap());
        } else {
            assert_eq!(index.sources[extent.source as usize], source);
            writer.refer_to_extent(number, extent.txid, source, &change(extent)).unwrap();
            changed += 1;
        }
    }
    bytes.extend(writer.finish(&footer.info).unwrap());
    (changed, bytes)
}

/// An index that points to where there is no extent, or to another one.
#[tokio::test]
async fn a_wrong_index() {
    let (oracle, _, [first, second]) = simple().await;
    let (store, key) = (&oracle.store, second.to_string());
    let whole = get(store, &key).await;
    let (shared, same) = indexed_otherwise(&whole, first, |extent| extent);
    assert!(shared > 1 && same == whole, "{shared}");
    let (_, outside) = indexed_otherwise(&whole, first, |extent| ExtentRecord { offset: 1 << 30, ..extent });
    put(store, &key, outside).await;
    for depth in DEPTHS {
        let says = [key.as_str(), "in its index lies behind the extents of", &first.to_string()];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "outside");
    }
    // Inside, but not what is said to be there.
    let shifted = |extent: ExtentRecord| ExtentRecord {
        offset: extent.offset + 1,
        compressed_len: extent.compressed_len - 1,
        ..extent
    };
    let (_, other) = indexed_otherwise(&whole, first, shifted);
    put(store, &key, other).await;
    assert_found(&report(&oracle, Depth::Structure).await, Verdict::Ok, &[], "other");
    for depth in [Depth::Data, Depth::Drill] {
        let says = [first.to_string(), "the checksum of an extent".into()];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says.each_ref().map(String::as_str), "other");
    }
}

/// Extents are read where they are: the object that they are in is named.
#[tokio::test]
async fn damaged_extents() {
    let (oracle, _, snapshots) = simple().await;
    let (store, [first, second]) = (&oracle.store, snapshots.map(|key| key.to_string()));
    for (key, at) in [(&second, 40), (&first, 40)] {
        flip(store, key, at).await;
        assert_found(&report(&oracle, Depth::Structure).await, Verdict::Ok, &[], "extent");
        let says = [key, "the checksum of an extent", "states that should be restorable need it"];
        assert_found(&report(&oracle, Depth::Data).await, Verdict::Failed, &says, "extent");
        flip(store, key, at).await;
    }
    assert_found(&report(&oracle, Depth::Data).await, Verdict::Ok, &[], "mended");
}

/// Snapshots that are not there: what is left may be all that there ever was, or not.
#[tokio::test]
async fn missing_snapshots() {
    for depth in DEPTHS {
        let oracle = all_kinds(512, 6).await;
        for key in keys(&oracle.store, "snap/00000007/").await {
            oracle.store.delete(&key).await.unwrap();
        }
        // Just now: the first snapshot may be under way. Older states are there.
        let soon = verify_with(&oracle.store, &settings(depth), oracle.now_ms()).await.unwrap();
        assert_found(&soon, Verdict::Degraded, &["epoch 7", "has no snapshot yet"], "soon");
        let late = report(&oracle, depth).await;
        assert_found(&late, Verdict::Failed, &["the newest state", "no snapshot serves it"], "late");
        for key in keys(&oracle.store, "snap/").await {
            oracle.store.delete(&key).await.unwrap();
        }
        let soon = verify_with(&oracle.store, &settings(depth), oracle.now_ms()).await;
        assert!(matches!(soon, Err(VerifyError::Restore(RestoreError::NothingYet { .. }))), "{soon:?}");
        let late = report(&oracle, depth).await;
        assert_found(&late, Verdict::Failed, &["the newest state", "no snapshot serves it"], "none");
    }
}

/// What only a line that was left needs, and what nobody needs, is no failure.
#[tokio::test]
async fn damage_that_nobody_needs() {
    let harmless = "no state that should be restorable needs it";
    for depth in DEPTHS {
        let oracle = all_kinds(512, 7).await;
        let left = keys(&oracle.store, "log/00000004/").await.pop().unwrap();
        cut_short(&oracle.store, &left).await;
        assert_found(&report(&oracle, depth).await, Verdict::Degraded, &[&left, harmless], "left");
        let snapshot = keys(&oracle.store, "snap/00000004/").await.pop().unwrap();
        cut_short(&oracle.store, &snapshot).await;
        assert_found(&report(&oracle, depth).await, Verdict::Degraded, &[&snapshot, harmless], "left");

        let (mut oracle, segments, _) = simple().await;
        oracle.merge(1, segments[0].0.first_txid, segments[2].0.last_txid).await;
        let superseded = segments[1].to_string();
        cut_short(&oracle.store, &superseded).await;
        assert_found(&report(&oracle, depth).await, Verdict::Degraded, &[&superseded, harmless], "superseded");
    }
    let (mut oracle, segments, _) = simple().await;
    oracle.merge(1, segments[0].0.first_txid, segments[2].0.last_txid).await;
    let superseded = segments[1].to_string();
    flip(&oracle.store, &superseded, 40).await;
    assert_found(&report(&oracle, Depth::Data).await, Verdict::Degraded, &[&superseded, harmless], "superseded");
    for depth in [Depth::Structure, Depth::Drill] {
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "superseded");
    }
}

#[tokio::test]
async fn marks_and_their_states() {
    for depth in DEPTHS {
        let (oracle, segments, _) = simple().await;
        let (store, now_ms) = (&oracle.store, oracle.now_ms());
        set_mark(store, "early", Target::Txid(4), None, now_ms).await.unwrap();
        set_mark(store, "other", Target::Txid(6), None, now_ms).await.unwrap();
        assert_found(&report(&oracle, depth).await, Verdict::Ok, &[], "marks");
        swap(store, "marks/early", "marks/other").await;
        let says = ["marks/early is damaged", "that of another name"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "swapped");
        swap(store, "marks/early", "marks/other").await;
        flip(store, "marks/other", 0).await;
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &["marks/other is damaged"], "flipped");
        store.delete("marks/other").await.unwrap();
        // What the mark needs is gone, as if retention had let it go.
        store.delete(&segments[0].to_string()).await.unwrap();
        let says = ["the state of marks/early, transaction 4 of epoch 1, can't be restored"];
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &says, "gone");
    }
    // On a line that was left: what the mark needs counts.
    let oracle = all_kinds(512, 8).await;
    let position = *oracle.states.keys().rfind(|position| position.epoch == 4).unwrap();
    let target = Target::Txid(position.txid);
    set_mark(&oracle.store, "left", target, Some(4), oracle.now_ms()).await.unwrap();
    let last = keys(&oracle.store, "log/00000004/").await.pop().unwrap();
    cut_short(&oracle.store, &last).await;
    for depth in DEPTHS {
        assert_found(&report(&oracle, depth).await, Verdict::Failed, &[&last, "should be restorable"], "left");
    }
}

#[tokio::test]
async fn strangers() {
    let oracle = all_kinds(512, 9).await;
    let strangers = ["notes.txt", "log/00000001/readme", "snap/x", "marks/.hidden", "epochs/x", "log/00000001x/1"];
    for key in strangers {
        put(&oracle.store, key, b"x".to_vec()).await;
    }
    let found = report(&oracle, Depth::Structure).await;
    assert_found(&found, Verdict::Degraded, &["and 1 more", "epochs/x", "notes.txt"], "strangers");
    for key in strangers {
        oracle.store.delete(key).await.unwrap();
    }
    // Where conditions are ignored each record has its claim, and writers that gave way to each other leave theirs.
    let record = get(&oracle.store, "epochs/00000007").await;
    for epoch in [7, 8] {
        put(&oracle.store, &format!("epochs/{epoch:08x}-{}", "f".repeat(32)), record.clone()).await;
    }
    assert_found(&report(&oracle, Depth::Structure).await, Verdict::Ok, &[], "claims");
}

#[tokio::test]
async fn freshness() {
    let (oracle, ..) = simple().await;
    let now_ms = oracle.now_ms() + 2 * HOUR_MS;
    let mut settings = settings(Depth::Structure);
    settings.max_lag = Some(Duration::from_secs(900));
    let found = verify_with(&oracle.store, &settings, now_ms).await.unwrap();
    assert_found(&found, Verdict::Degraded, &["is 2 hours old", "presence-interval"], "no presence");
    assert_found(&verify_with(&oracle.store, &settings, oracle.now_ms()).await.unwrap(), Verdict::Ok, &[], "fresh");
    let record = |time_ms| PresenceRecord {
        format: 1,
        epoch: 1,
        writer: "7".repeat(32),
        txid: oracle.position().txid,
        time_ms,
        program: "test".into(),
    };
    put(&oracle.store, PRESENCE_KEY, record(now_ms - 60_000).encode()).await;
    assert_found(&verify_with(&oracle.store, &settings, now_ms).await.unwrap(), Verdict::Ok, &[], "idle");
    put(&oracle.store, PRESENCE_KEY, record(now_ms - HOUR_MS).encode()).await;
    let found = verify_with(&oracle.store, &settings, now_ms).await.unwrap();
    assert_found(&found, Verdict::Degraded, &["the daemon was last there at"], "stopped");
}

/// A sample is a share, a seed repeats it, and what there is no time for is told.
#[tokio::test]
async fn samples_and_bounds() {
    let mut oracle = Oracle::new(512, 3).await;
    oracle.begin_with_snapshot(None, 0).await;
    for _ in 0..200 {
        oracle.commit_and_cut(1).await;
    }
    let mut settings = settings(Depth::Data);
    settings.share = 0.1;
    let read = async |settings: &Settings| {
        let found = verify_with(&oracle.store, settings, oracle.now_ms()).await.unwrap();
        let check = found.checks.iter().find(|check| check.name == "blocks of segments").unwrap();
        (check.checked, check.of, found)
    };
    let (checked, of, _) = read(&settings).await;
    assert!(of == 200 && (5..=45).contains(&checked), "{checked} of {of}");
    // Sooner or later a damaged one is in the sample, and the same seed finds it again.
    flip(&oracle.store, &keys(&oracle.store, "log/").await[50], 40).await;
    let mut finders = Vec::new();
    for seed in 0..60 {
        settings.seed = seed;
        if read(&settings).await.2.verdict == Verdict::Failed {
            finders.push(seed);
        }
    }
    assert!((1..=20).contains(&finders.len()), "{finders:?}");
    settings.seed = finders[0];
    assert_eq!(read(&settings).await.2.verdict, Verdict::Failed);
    for depth in DEPTHS {
        let bounded = Settings { max_duration: Some(Duration::ZERO), depth, ..settings.clone() };
        let found = verify_with(&oracle.store, &bounded, oracle.now_ms()).await.unwrap();
        let expected = if depth == Depth::Drill { Verdict::Degraded } else { Verdict::Ok };
        assert_found(&found, expected, &["the newest state was not restored"], "no time");
        assert!(
            found.not_reached.iter().any(|what| what.contains("200 tables of segments")),
            "{:?}",
            found.not_reached
        );
    }
}

/// A store in which, before each request from a certain one on, something happens: an object is put, or goes.
#[derive(Debug)]
struct Meddled {
    inner: Arc<MemoryStore>,
    /// Requests that pass before it begins, and how many things happen before each one from then on.
    state: Mutex<(u64, usize, VecDeque<Change>)>,
}

#[derive(Debug, Clone)]
enum Change {
    Put(String, Bytes),
    Delete(String),
}

impl Meddled {
    async fn meddle(&self) {
        let due: Vec<Change> = {
            let mut state = self.state.lock().unwrap();
            let (waits, at_once, changes) = &mut *state;
            if *waits > 0 {
                *waits -= 1;
                return;
            }
            let count = changes.len().min(*at_once);
            changes.drain(..count).collect()
        };
        for change in due {
            match change {
                Change::Put(key, bytes) => self.inner.put(&key, bytes, PutMode::Overwrite).await.unwrap(),
                Change::Delete(key) => self.inner.delete(&key).await.unwrap(),
            }
        }
    }
}

#[async_trait]
impl ObjectStore for Meddled {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, _: Bytes, _: PutMode) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.meddle().await;
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.meddle().await;
        self.inner.get_range(key, offset, len_bytes).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.meddle().await;
        self.inner.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        panic!("{key}: a verification deletes nothing");
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn put_part(&self, key: &str, _: &str, _: u32, _: u64, _: Bytes) -> Result<PartTag, StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn complete_multipart(&self, key: &str, _: &str, _: &[PartTag]) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn abort_multipart(&self, key: &str, _: &str) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }
}

/// A replica, and what a daemon does to it then: ships, merges, makes a snapshot and prunes.
async fn life() -> (BTreeMap<String, Bytes>, Vec<Change>, u64) {
    let (mut oracle, mut segments, _) = simple().await;
    let objects = async |oracle: &Oracle| {
        let mut objects = BTreeMap::new();
        for key in keys(&oracle.store, "").await {
            objects.insert(key.clone(), Bytes::from(get(&oracle.store, &key).await));
        }
        objects
    };
    let before = objects(&oracle).await;
    let mut known = before.clone();
    let mut changes = Vec::new();
    let mut note = |known: &mut BTreeMap<String, Bytes>, now: BTreeMap<String, Bytes>| {
        let new = now.iter().filter(|(key, _)| !known.contains_key(*key));
        changes.extend(new.map(|(key, bytes)| Change::Put(key.clone(), bytes.clone())));
        // As a prune does it: snapshots first, then segments, the newest first.
        let gone: Vec<&String> = known.keys().filter(|key| !now.contains_key(*key)).collect();
        changes.extend(gone.into_iter().rev().map(|key| Change::Delete(key.clone())));
        *known = now;
    };
    oracle.pass_time(10 * HOUR_MS);
    for _ in 0..4 {
        segments.push(oracle.commit_and_cut(2).await);
        note(&mut known, objects(&oracle).await);
    }
    let txid = oracle.position().txid;
    oracle.snapshot(txid - 3, txid).await;
    note(&mut known, objects(&oracle).await);
    for pair in segments.chunks(2) {
        oracle.merge(1, pair[0].0.first_txid, pair.last().unwrap().0.last_txid).await;
        note(&mut known, objects(&oracle).await);
    }
    oracle.commit_and_cut(1).await;
    note(&mut known, objects(&oracle).await);
    oracle.pass_time(3 * HOUR_MS);
    let settings = RetentionSettings { window_ms: Some(HOUR_MS / 2), ..RetentionSettings::default() };
    let outcome = prune(&oracle.store, &settings, Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await;
    assert!(outcome.unwrap().deleted_objects > 5);
    note(&mut known, objects(&oracle).await);
    (before, changes, oracle.now_ms())
}

/// Objects come and go between any two requests: nothing that is healthy is called anything else.
#[tokio::test]
async fn a_daemon_that_ships_merges_and_prunes_meanwhile() {
    let (before, changes, now_ms) = life().await;
    let mut undisturbed = 0;
    for at_once in [1, 3, changes.len()] {
        for depth in DEPTHS {
            // In larger steps later on, where one request is like the other.
            let waits = (0..30).chain((30..140).step_by(7));
            for waits in waits {
                let inner = Arc::new(MemoryStore::new());
                for (key, bytes) in &before {
                    inner.put(key, bytes.clone(), PutMode::Overwrite).await.unwrap();
                }
                let state = Mutex::new((waits, at_once, changes.clone().into()));
                let meddled = Arc::new(Meddled { inner, state });
                let store: SharedStore = meddled.clone();
                let what = format!("{at_once} at once after {waits} requests");
                let found = verify_with(&store, &settings(depth), now_ms).await;
                let found = found.unwrap_or_else(|error| panic!("{what} ({depth:?}): {error}"));
                assert_ne!(found.verdict, Verdict::Failed, "{what} ({depth:?}):\n{}", sentences(&found));
                // When it is over, a second look finds nothing to complain of.
                if meddled.state.lock().unwrap().2.is_empty() {
                    assert_found(&found, Verdict::Ok, &[], &what);
                    undisturbed += 1;
                }
            }
        }
    }
    assert!(undisturbed > 100, "{undisturbed}");
}

/// A store that fails is an error, at whatever request; never a verdict.
#[tokio::test]
async fn a_store_that_fails_is_no_damage() {
    let (oracle, ..) = simple().await;
    for depth in DEPTHS {
        for failing in 0..40 {
            let hook = move |request: waltrail::store::faults::Request<'_>| match request.number >= failing {
                true => Fault::Before(StoreErrorKind::Denied),
                false => Fault::None,
            };
            let store: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), hook));
            match verify_with(&store, &settings(depth), oracle.now_ms()).await {
                Err(VerifyError::Restore(RestoreError::Store(error))) => assert_eq!(error.kind, StoreErrorKind::Denied),
                Ok(found) => assert_found(&found, Verdict::Ok, &[], "it needed fewer requests"),
                Err(error) => panic!("{failing}: {error}"),
            }
        }
    }
}

/// Runs the command; its exit code must be this one.
fn verified(code: i32, arguments: &[&str]) -> Output {
    let done = run([&["verify"], arguments].concat());
    let told = format!("{}\n{}", stdout(&done), stderr(&done));
    assert_eq!(done.status.code(), Some(code), "{arguments:?}\n{told}");
    done
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A scene whose daemon has shipped so many transactions and stopped.
fn shipped(transactions: i64) -> Scene {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    scene.wait_for(0);
    for _ in 0..transactions {
        count_up(&application);
    }
    scene.wait_for(transactions);
    drop(application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    scene
}

fn only_below(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Every tag that is opened is closed, and what is in quotes is escaped. Gives how often each tag is there.
fn check_xml(text: &str) -> BTreeMap<String, usize> {
    let (mut open, mut counts) = (Vec::new(), BTreeMap::new());
    let mut rest = text.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").unwrap();
    while let Some(at) = rest.find('<') {
        let between = &rest[..at];
        assert!(!between.contains('>'), "{between}");
        let end = rest[at..].find('>').unwrap() + at;
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "{tag}");
        let name = tag.trim_matches('/').split(' ').next().unwrap().to_owned();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_ref(), Some(&name), "{text}");
        } else {
            *counts.entry(name.clone()).or_insert(0) += 1;
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?}");
    for (at, _) in text.match_indices('&') {
        let entity = text[at..].split(';').next().unwrap();
        assert!(["&amp", "&lt", "&gt", "&quot", "&apos", "&#10", "&#9"].contains(&entity), "{entity}");
    }
    counts
}

#[test]
fn verdicts_and_formats_of_the_command() {
    let scene = shipped(5);
    let replica = scene.replica();
    let scratch = scene.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let scratch_name = scratch.to_str().unwrap();
    for depth in ["structure", "data", "drill"] {
        let done = verified(0, &[&replica, "--depth", depth, "--scratch", scratch_name]);
        assert!(stdout(&done).contains("verdict    ok"), "{}", stdout(&done));
    }
    let found = stdout(&verified(0, &[&replica, "--format", "json", "--seed", "5"]));
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!((found["verdict"].as_str(), found["seed"].as_u64()), (Some("ok"), Some(5)), "{found}");
    assert!(found["newest"]["txid"].as_u64() >= Some(2), "{found}");
    let tags = check_xml(&stdout(&verified(0, &[&replica, "--format", "junit"])));
    assert_eq!((tags["testsuite"], tags.get("failure")), (1, None), "{tags:?}");

    std::fs::write(Path::new(&replica).join("a & \"b\" <c>"), "x").unwrap();
    let done = verified(1, &[&replica]);
    assert!(stdout(&done).contains("degraded   not of this replica, or left over: a & \"b\" <c>"), "{}", stdout(&done));
    let tags = check_xml(&stdout(&verified(1, &[&replica, "--format", "junit"])));
    assert_eq!(tags["failure"], 1, "{tags:?}");
    let snapshot = only_below(&Path::new(&replica).join("snap/00000001")).remove(0);
    let whole = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, &whole[..whole.len() - 1]).unwrap();
    let done = verified(2, &[&replica]);
    assert!(stdout(&done).contains("failed     snap/00000001/"), "{}", stdout(&done));
    // Several: one's trouble does not stop the next; the gravest counts.
    let nothing = scene.path("nothing");
    let away = "s3://b/a?endpoint=http://127.0.0.1:1&region=x";
    verified(12, &[&format!("file://{}", nothing.display())]);
    let done = verified(2, &[away, &replica, "--format", "json"]);
    let lines: Vec<serde_json::Value> = stdout(&done).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines[0]["exit_code"].as_u64(), lines[1]["verdict"].as_str()), (Some(11), Some("failed")));
    std::fs::write(&snapshot, &whole).unwrap();
    let done = verified(11, &[&format!("file://{}", nothing.display()), away, &replica, "--format", "junit"]);
    let tags = check_xml(&stdout(&done));
    assert_eq!((tags["testsuite"], tags["error"]), (3, 2), "{tags:?}");
    assert!(only_below(&scratch).is_empty());
    // For a job's page.
    let summary = scene.path("summary.md");
    let done = waltrail().args(["verify", &replica]).env("GITHUB_STEP_SUMMARY", &summary).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    let summary = std::fs::read_to_string(summary).unwrap();
    assert!(summary.contains("| degraded |") && summary.contains("**degraded** not of this replica"), "{summary}");
    for wrong in
        [["--sample", "5"], ["--points", "0"], ["--depth", "deep"], ["--scratch", "/no/such"], ["--max-lag", "x"]]
    {
        verified(10, &[&[replica.as_str()], &wrong[..]].concat());
    }
    verified(10, &["no-such-replica"]);
}

#[test]
fn a_replica_in_s3() {
    let server = S3Server::start();
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let replica = server.url("app");
    let daemon = scene.start_to(&replica);
    crate::support::wait_for_restored(&replica, scene.directory.path(), crate::support::scene::COUNTER, 0);
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    for depth in ["structure", "data", "drill"] {
        verified(0, &[&replica, "--depth", depth]);
    }
    // The last transactions are gone without a trace: only the live database tells.
    for segment in only_below(&server.path("app/log/00000001")) {
        std::fs::remove_file(segment).unwrap();
    }
    verified(0, &[&replica]);
    let done = verified(2, &[&replica, "--against", scene.database().to_str().unwrap()]);
    assert!(stdout(&done).contains("the live database and transaction"), "{}", stdout(&done));
}

#[test]
fn storage_that_refuses_is_no_verdict() {
    let server = S3Server::start();
    verified(12, &[&server.url("nothing")]);
    let no_bucket = server.url("nothing").replace("backups", "elsewhere");
    verified(11, &[&no_bucket]);
}

/// The pages are those that were written; what was written is damaged.
#[test]
fn a_database_that_sqlite_calls_corrupt() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    verified(0, &[&scene.replica()]);
    application
        .execute_batch(
            "PRAGMA writable_schema=ON;
             UPDATE sqlite_schema SET sql = 'CREATE INDEX item_hash ON item(body)' WHERE name = 'item_hash';
             PRAGMA writable_schema=OFF;",
        )
        .unwrap();
    drop(application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let done = verified(2, &[&scene.replica(), "--points", "1"]);
    assert!(stdout(&done).contains("SQLite calls the database corrupt, as it was then: "), "{}", stdout(&done));
    verified(0, &[&scene.replica(), "--points", "1", "--no-integrity-check"]);
    verified(0, &[&scene.replica(), "--depth", "data"]);
}

/// While it is written to by an application, followed by a daemon, and after both have stopped.
#[test]
fn against_the_live_database() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    let (replica, database) = (scene.replica(), scene.database().display().to_string());
    let against = [&replica, "--against", database.as_str(), "--points", "1"];
    for _ in 0..3 {
        insert(&application, 20);
        let done = verified(0, &against);
        assert!(stdout(&done).contains("the live database is transaction"), "{}", stdout(&done));
    }
    // Schema changes, a larger cookie, and pages that were cut off.
    application.execute_batch("CREATE TABLE more(x); DELETE FROM item; VACUUM").unwrap();
    verified(0, &against);
    // Another database's daemon has confirmed what is not in this replica.
    let other = shipped(3);
    let done = verified(2, &[&other.replica(), "--against", &database, "--points", "1"]);
    assert!(stdout(&done).contains("failed "), "{}", stdout(&done));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    verified(0, &against);
    // The schema cookie alone, and a page alone.
    application.execute_batch("PRAGMA schema_version = 1000").unwrap();
    let done = verified(2, &against);
    assert!(stdout(&done).contains("differ in one page, page 1;"), "{}", stdout(&done));
    count_up(&application);
    let done = verified(2, &against);
    assert!(stdout(&done).contains("differ in 2 pages; the first one is page 1;"), "{}", stdout(&done));
    insert(&application, 100);
    let done = verified(2, &against);
    let told = stdout(&done);
    assert!(told.contains("pages; the first one is page") && told.contains("no daemon follows"), "{told}");
    assert!(scene.wal_len() > 0, "it left the WAL alone");
    verified(10, &[&replica, "--against", "/no/such.db"]);
    verified(10, &[&replica, &other.replica(), "--against", &database]);
}

#[test]
fn an_application_that_never_stops_writing() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    let (replica, database) = (scene.replica(), scene.database().display().to_string());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let writing = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            count_up(&application);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    for _ in 0..4 {
        verified(0, &[&replica, "--points", "5"]);
        verified(0, &[&replica, "--depth", "data"]);
    }
    let done = run(["verify", &replica, "--against", &database, "--points", "1"]);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.join().unwrap();
    let told = stdout(&done);
    assert!(matches!(done.status.code(), Some(0 | 1)), "{told}");
    assert!(done.status.code() == Some(0) || told.contains("was written to each of"), "{told}");
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// An idle database is known to be idle when its daemon says so.
#[test]
fn presence_of_a_daemon() {
    let scene = Scene::new();
    let config = scene.path("waltrail.toml");
    let application = create_database(&scene.database(), 3, "");
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\npresence-interval = \"200ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let daemon = scene.start_with(&["--config", config]);
    count_up(&application);
    scene.wait_for(1);
    std::thread::sleep(Duration::from_secs(3));
    // All databases of the configuration.
    let done = verified(0, &["--config", config, "--max-lag", "2s"]);
    assert!(stdout(&done).contains("freshness"), "{}", stdout(&done));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    wait_for("a stale replica", || {
        let done = run(["verify", "--config", config, "--max-lag", "2s", "--depth", "structure"]);
        (done.status.code() == Some(1) && stdout(&done).contains("the daemon was last there at")).then_some(())
    });
    drop(application);
    let done = run(["log", &scene.replica()]);
    assert!(!stderr(&done).contains("presence"), "{}", stderr(&done));
}

/// Nothing stays in the scratch directory.
#[test]
fn an_interruption_cleans_up() {
    let scene = shipped(40);
    let scratch = scene.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let mut child = waltrail()
        .args(["verify", &scene.replica(), "--points", "10000", "--scratch", scratch.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..20_000 {
        if !only_below(&scratch).is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(only_below(&scratch).is_empty());
}
