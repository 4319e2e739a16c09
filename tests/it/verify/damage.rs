//! Every kind of damage in every kind of object is found and named, at the depth that can.

use waltrail::format::FOOTER_LEN;
use waltrail::format::key::{PRESENCE_KEY, SnapshotKey};
use waltrail::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotWriter, decode_extent};
use waltrail::restore::RestoreError;
use waltrail::retain::prune::prune;
use waltrail::retain::tails::TailCache;
use waltrail::retain::{Now, RetentionSettings};
use waltrail::verify::report::Verdict;
use waltrail::verify::{Depth, VerifyError};

use super::{
    DEPTHS, HOUR_MS, assert_found, cut_short, flip, get, keys, presence, put, report, settings, simple, swap,
    verify_with,
};
use crate::support::oracle::{Oracle, all_kinds};
use crate::support::{decoded, encoded};

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
        ("epochs/00000007", Verdict::Failed, "the newest line can't be followed"),
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
