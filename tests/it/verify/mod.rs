//! Verifying: every kind of damage in every kind of object is found and named, at the depth that can; and nothing that is healthy is
//! called damaged, whatever goes on meanwhile.

mod command;
mod damage;
mod meanwhile;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use waltrail::clock::Clock;
use waltrail::format::key::{PRESENCE_KEY, SegmentKey, SnapshotKey};
use waltrail::format::record::PresenceRecord;
use waltrail::restore::RestoreError;
use waltrail::restore::plan::Target;
use waltrail::retain::marks::set_mark;
use waltrail::store::{PutMode, SharedStore};
use waltrail::verify::against::Live;
use waltrail::verify::report::{Report, Verdict};
use waltrail::verify::{Depth, Settings, VerifyError, verify};

use crate::support::oracle::{Oracle, all_kinds};

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

/// The live database was named: that it was not compared is no clean verdict.
#[tokio::test]
async fn a_comparison_that_there_was_no_time_for() {
    let (oracle, ..) = simple().await;
    let live = Live { database: "/no/such.db".into(), state_dir: "/no/such".into(), patience: Duration::ZERO };
    for depth in DEPTHS {
        let bounded = Settings { max_duration: Some(Duration::ZERO), live: Some(live.clone()), ..settings(depth) };
        let found = verify_with(&oracle.store, &bounded, oracle.now_ms()).await.unwrap();
        assert_found(&found, Verdict::Degraded, &["the live database was not compared"], "no time");
        assert!(found.not_reached.iter().any(|what| what.contains("live database")), "{:?}", found.not_reached);
    }
}
