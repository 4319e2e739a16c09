//! Objects that this program can't write yet, or only from a database too large for a test; made by hand as docs/FORMAT.md says.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use waltrail::format::block::BlockWriter;
use waltrail::format::change::Content;
use waltrail::format::key::{EpochKey, MARKER_KEY, SegmentKey, SnapshotKey};
use waltrail::format::record::{EpochRecord, ReplicaMarker};
use waltrail::format::segment::{SegmentFooter, SegmentWriter, TransactionInfo};
use waltrail::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotInfo, SnapshotWriter};
use waltrail::format::{FormatError, page_hash};
use waltrail::restore::RestoreError;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::plan::{Target, plan};
use waltrail::store::memory::MemoryStore;
use waltrail::store::metered::Metered;
use waltrail::store::{PutMode, SharedStore};

use crate::support::oracle::Numbers;

async fn put(store: &SharedStore, key: &impl ToString, bytes: Vec<u8>) {
    store.put(&key.to_string(), Bytes::from(bytes), PutMode::IfAbsent).await.unwrap();
}

/// A replica whose only epoch has nothing in it yet.
async fn replica() -> SharedStore {
    let store: SharedStore = Arc::new(MemoryStore::new());
    put(&store, &MARKER_KEY, ReplicaMarker { format: 1, replica: "7".repeat(32) }.encode()).await;
    let record = EpochRecord {
        format: 1,
        epoch: 1,
        writer: "8".repeat(32),
        claimed_ms: 1,
        first_txid: 1,
        continues: false,
        parent: None,
        program: "test".into(),
        host: "test".into(),
    };
    put(&store, &EpochKey { epoch: 1, writer: None }, record.encode()).await;
    store
}

async fn restore(store: &SharedStore) -> Result<std::fs::File, RestoreError> {
    let history = History::load(store).await?;
    let plan = plan(store, &history, Target::Latest, None).await?;
    let file = tempfile::tempfile().unwrap();
    execute(store, &plan, file.try_clone().unwrap(), Path::new("scratch")).await?;
    Ok(file)
}

fn fingerprint(pages: &[Vec<u8>]) -> u64 {
    (1..).zip(pages).fold(0, |sum, (number, page)| sum ^ page_hash(number, page))
}

fn segment(
    page_size: u32,
    txid: u64,
    size_pages: u32,
    fingerprint: u64,
    pages: &[(u32, &[u8])],
) -> (SegmentKey, Vec<u8>) {
    let mut writer = SegmentWriter::new(Vec::new(), page_size).unwrap();
    let info = TransactionInfo {
        time_ms: txid,
        size_pages,
        schema_cookie: 1,
        fingerprint: Some(fingerprint),
        coalesced: false,
        schema_changed: false,
    };
    writer.begin_transaction(&info, &pages.iter().map(|(number, _)| *number).collect::<Vec<_>>()).unwrap();
    pages.iter().for_each(|(_, page)| writer.push(Content::Image(page)).unwrap());
    let (bytes, key) = writer.finish(1, txid).unwrap();
    (key, bytes)
}

fn snapshot_info(txid: u64, size_pages: u32, fingerprint: u64) -> SnapshotInfo {
    let key = SnapshotKey { epoch: 1, txid, time_ms: txid };
    SnapshotInfo { key, last_txid: txid, time_ms: txid, size_pages, schema_cookie: 1, fingerprint }
}

/// A snapshot whose index refers to extents in other objects, byte by byte. `own` are its own bytes between header and index.
fn referring_snapshot(
    info: &SnapshotInfo,
    page_size: u32,
    own: &[u8],
    others: &[SnapshotKey],
    extents: &[ExtentRecord],
) -> Vec<u8> {
    let mut bytes = SnapshotWriter::new(page_size).1;
    bytes.extend_from_slice(own);
    let index_offset = bytes.len() as u64;
    let mut index = BlockWriter::default();
    for extent in extents {
        let long = [extent.offset, extent.content_hash, extent.txid].map(u64::to_le_bytes).concat();
        let short =
            [extent.source, extent.compressed_len, extent.crc32, extent.page_count].map(u32::to_le_bytes).concat();
        index.push(&mut bytes, &[&[long, short].concat()]).unwrap();
    }
    index.finish(&mut bytes).unwrap();
    let mut sources = Vec::new();
    for source in [&info.key].into_iter().chain(others) {
        sources.extend(source.epoch.to_le_bytes());
        sources.extend([source.txid.to_le_bytes(), source.time_ms.to_le_bytes()].concat());
    }
    sources.extend(crc32fast::hash(&sources).to_le_bytes());
    bytes.extend(sources);
    let long = [
        index_offset,
        index.len_bytes,
        info.key.txid,
        info.key.time_ms,
        info.last_txid,
        info.time_ms,
        info.fingerprint,
    ];
    let counts = [index.block_count, 1 + others.len() as u32, extents.len() as u32, info.size_pages];
    let mut footer = long.map(u64::to_le_bytes).concat();
    footer.extend(counts.map(u32::to_le_bytes).concat());
    footer.extend([info.schema_cookie, page_size, info.key.epoch].map(u32::to_le_bytes).concat());
    let crc32 = crc32fast::hash(&[&footer, &b"WALTSNPE"[..]].concat());
    footer.extend_from_slice(&crc32.to_le_bytes());
    footer.extend_from_slice(b"WALTSNPE\0\0\0\0");
    bytes.extend(footer);
    bytes
}

/// Two extents of four pages: the first one changed since the older snapshot, the second one is still in it.
#[tokio::test]
async fn extents_of_older_snapshots_are_read_there() {
    let (store, page_size) = (replica().await, 65_536);
    let mut pages: Vec<Vec<u8>> = (1..=8).map(|fill| vec![fill; page_size as usize]).collect();
    let (mut older, mut bytes) = SnapshotWriter::new(page_size);
    bytes.extend(older.encode_extent(0, 1, &pages[..4].concat()).unwrap());
    bytes.extend(older.encode_extent(1, 1, &pages[4..].concat()).unwrap());
    let older_info = snapshot_info(1, 8, fingerprint(&pages));
    bytes.extend(older.finish(&older_info).unwrap());
    let footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
    let older_extents = footer.decode_index(&bytes[footer.index_offset as usize..bytes.len() - 100]).unwrap().extents;
    put(&store, &older_info.key, bytes).await;

    pages[1].fill(99);
    let (key, bytes) = segment(page_size, 2, 8, fingerprint(&pages), &[(2, &pages[1])]);
    put(&store, &key, bytes).await;
    let (mut newer, mut bytes) = SnapshotWriter::new(page_size);
    bytes.extend(newer.encode_extent(0, 2, &pages[..4].concat()).unwrap());
    newer.refer_to_extent(1, 2, older_info.key, &older_extents[1]).unwrap();
    let info = snapshot_info(2, 8, fingerprint(&pages));
    bytes.extend(newer.finish(&info).unwrap());
    let footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(footer.decode_sources(&bytes[..bytes.len() - 100]).unwrap(), [info.key, older_info.key]);
    put(&store, &info.key, bytes).await;

    let mut restored = Vec::new();
    let mut file = restore(&store).await.unwrap();
    file.rewind().unwrap();
    file.read_to_end(&mut restored).unwrap();
    assert!(restored == pages.concat());
    // The object that is gone is named, not the one that refers to it.
    store.delete(&older_info.key.to_string()).await.unwrap();
    let error = restore(&store).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if *object == older_info.key.to_string()), "{error}");
}

/// An index may not point outside of its own object, or to a source that it does not list.
#[test]
fn an_index_that_points_nowhere_is_refused() {
    let extent =
        ExtentRecord { source: 0, offset: 32, compressed_len: 10, crc32: 0, page_count: 1, content_hash: 0, txid: 1 };
    let check = |extent: ExtentRecord| {
        let bytes = referring_snapshot(&snapshot_info(1, 1, 0), 512, &[0; 10], &[], &[extent]);
        let footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
        footer.decode_index(&bytes[footer.index_offset as usize..bytes.len() - 100]).map(|_| ())
    };
    assert_eq!(check(extent), Ok(()));
    for wrong in [
        ExtentRecord { offset: 31, ..extent },
        ExtentRecord { offset: 33, ..extent },
        ExtentRecord { offset: u64::MAX, ..extent },
        ExtentRecord { compressed_len: u32::MAX, ..extent },
        ExtentRecord { source: 1, ..extent },
        ExtentRecord { page_count: 0, ..extent },
        ExtentRecord { page_count: 513, ..extent },
        ExtentRecord { txid: 2, ..extent },
        ExtentRecord { txid: 0, ..extent },
    ] {
        assert!(matches!(check(wrong), Err(FormatError::Inconsistent(_))), "{wrong:?}");
    }
}

/// A database that grew past 1 GiB: its lock page is not stored, not hashed and zeros, as are pages that nobody wrote.
#[tokio::test]
async fn the_lock_page_is_left_out() {
    let (store, page_size, size_pages) = (replica().await, 65_536_u32, 16_390_u32);
    let lock_page = 16_385;
    let (page, zeros) = (vec![5; page_size as usize], vec![0; page_size as usize]);
    let (mut writer, mut bytes) = SnapshotWriter::new(page_size);
    bytes.extend(writer.encode_extent(0, 1, &page).unwrap());
    let info = snapshot_info(1, 1, page_hash(1, &page));
    bytes.extend(writer.finish(&info).unwrap());
    put(&store, &info.key, bytes).await;
    let is_written = |number: u32| [1, 2, lock_page - 1, lock_page + 1, size_pages].contains(&number);
    let hash = |number: u32| page_hash(number, if is_written(number) { &page } else { &zeros });
    let fingerprint = (1..=size_pages).filter(|&number| number != lock_page).fold(0, |sum, number| sum ^ hash(number));
    let written = [2, lock_page - 1, lock_page + 1, size_pages].map(|number| (number, page.as_slice()));
    let (key, bytes) = segment(page_size, 2, size_pages, fingerprint, &written);
    put(&store, &key, bytes).await;
    let mut file = restore(&store).await.unwrap();
    assert_eq!(file.metadata().unwrap().len(), u64::from(size_pages) * u64::from(page_size));
    for number in [1, 2, 3, lock_page - 1, lock_page, lock_page + 1, size_pages] {
        let mut found = vec![1; page_size as usize];
        file.seek(SeekFrom::Start(u64::from(number - 1) * u64::from(page_size))).unwrap();
        file.read_exact(&mut found).unwrap();
        assert!(found == if is_written(number) { page.clone() } else { zeros.clone() }, "page {number}");
    }
    // A segment that holds it was not written by SQLite.
    let (_, bytes) = segment(page_size, 2, size_pages, 0, &[(lock_page, &page)]);
    let footer = SegmentFooter::decode(&bytes, bytes.len() as u64).unwrap();
    let table = &bytes[footer.table_offset() as usize..][..footer.table_len as usize];
    assert!(matches!(footer.decode_table(table), Err(FormatError::Inconsistent(_))));
}

/// A large segment costs its table and a request for each 8 MiB, another one a request. What is in the snapshot already is not fetched
/// from segments.
#[tokio::test]
async fn no_more_is_fetched_than_is_needed() {
    let (inner, page_size, size_pages) = (replica().await, 65_536_u32, 200_u32);
    let mut numbers = Numbers::new(1);
    let mut noise = || -> Vec<Vec<u8>> {
        let mut page = || (0..page_size / 8).flat_map(|_| numbers.next().to_le_bytes()).collect();
        (0..size_pages).map(|_| page()).collect()
    };
    let found = noise();
    let (mut writer, mut bytes) = SnapshotWriter::new(page_size);
    for (index, extent) in (0..).zip(found.chunks(4)) {
        bytes.extend(writer.encode_extent(index, 1, &extent.concat()).unwrap());
    }
    let info = snapshot_info(1, size_pages, fingerprint(&found));
    bytes.extend(writer.finish(&info).unwrap());
    put(&inner, &info.key, bytes).await;
    let (mut pages, mut lens, mut pieces) = (found, Vec::new(), Vec::new());
    for (txid, changed) in [(1, 200), (2, 200), (3, 200), (4, 150)] {
        pages.splice(..changed, noise().into_iter().take(changed));
        let some: Vec<(u32, &[u8])> = (1..).zip(pages[..changed].iter().map(Vec::as_slice)).collect();
        let (key, bytes) = segment(page_size, txid, size_pages, fingerprint(&pages), &some);
        lens.push(bytes.len() as u64);
        pieces.push(SegmentFooter::decode(&bytes, bytes.len() as u64).unwrap().pages_len.div_ceil(8 << 20));
        put(&inner, &key, bytes).await;
    }
    assert_eq!(pieces[1..], [2, 2, 2]);
    let (metered, meter) = Metered::new(inner);
    let store: SharedStore = Arc::new(metered);
    let plan = plan(&store, &History::load(&store).await.unwrap(), Target::Latest, None).await.unwrap();
    let before = meter.traffic();
    execute(&store, &plan, tempfile::tempfile().unwrap(), Path::new("scratch")).await.unwrap();
    let after = meter.traffic();
    // Two segments of more than 12 MiB: table and pieces; one of less. The snapshot: header, index, and two requests for its extents.
    assert!(lens[2] > 12 << 20 && lens[3] < 12 << 20, "{lens:?}");
    assert_eq!(after.requests - before.requests, 2 * (1 + 2) + 1 + 2 + 2);
    assert!(after.received_bytes - before.received_bytes < 3 * lens[2] + lens[3] + 100_000);
}

/// The same limit as for a segment's table: an index that expands without end is refused by its footer alone.
#[test]
fn an_index_larger_than_its_limit_is_refused() {
    // What the footer of a database of 2^30 extents says; its index would be 40 GiB, of a few megabytes.
    let info = snapshot_info(1, u32::MAX - 1, 0);
    let refused = footer_of(&info, 65_536, (u32::MAX - 1).div_ceil(4));
    assert!(matches!(refused, Err(FormatError::Inconsistent(_))), "{refused:?}");
    // Up to the limit, 40 bytes an extent of 4 pages, all is well; and nobody writes what can't be read.
    let most_extents = (256 << 20) / 40;
    for (extent_count, is_possible) in [(most_extents, true), (most_extents + 1, false)] {
        let info = snapshot_info(1, extent_count * 4, 0);
        assert_eq!(footer_of(&info, 65_536, extent_count).is_ok(), is_possible, "{extent_count}");
        let written = SnapshotWriter::new(65_536).0.encode_extent(extent_count - 1, 1, &[0; 65_536]);
        assert_eq!(written.is_ok(), is_possible, "{extent_count}");
    }
}

/// Reads a footer with nothing but its numbers behind it.
fn footer_of(info: &SnapshotInfo, page_size: u32, extent_count: u32) -> Result<SnapshotFooter, FormatError> {
    let mut footer = [32_u64, 120_000, info.key.txid, info.key.time_ms, info.last_txid, info.time_ms, info.fingerprint]
        .map(u64::to_le_bytes)
        .concat();
    let short = [10_000, 1, extent_count, info.size_pages, info.schema_cookie, page_size, info.key.epoch];
    footer.extend(short.map(u32::to_le_bytes).concat());
    let crc32 = crc32fast::hash(&[&footer, &b"WALTSNPE"[..]].concat());
    footer.extend_from_slice(&crc32.to_le_bytes());
    footer.extend_from_slice(b"WALTSNPE\0\0\0\0");
    SnapshotFooter::decode(&footer, 32 + 120_000 + 24 + 100)
}
