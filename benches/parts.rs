//! The parts that replication and restores spend their time in, each alone: `cargo bench --bench parts`.
//!
//! Pages are those of a table of short texts. Each transaction changes a row in each of a few of them, so the versions of a page
//! are alike, as they are in real databases.

use std::collections::HashMap;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use waltrail::format::change::Content;
use waltrail::format::key::{EpochKey, MARKER_KEY, SegmentKey, SnapshotKey};
use waltrail::format::page_hash;
use waltrail::format::record::{EpochRecord, ReplicaMarker};
use waltrail::format::segment::{Segment, SegmentWriter, TransactionInfo};
use waltrail::format::snapshot::{SnapshotInfo, SnapshotWriter};
use waltrail::replicate::merge::merge_files;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::plan::{Target, plan};
use waltrail::sqlite::wal::{ByteOrder, Checksum, FRAME_HEADER_LEN, WAL_HEADER_LEN, WalHeader};
use waltrail::store::memory::MemoryStore;
use waltrail::store::{PutMode, SharedStore};

const PAGE_SIZE: u32 = 4096;
/// Rows of so many bytes: number and words.
const ROW_LEN: usize = 256;
/// As many as the peer comparison writes in a second.
const TRANSACTIONS: u64 = 100;
const PAGES_A_TRANSACTION: u64 = 10;
/// Of so many pages of the database.
const PAGES: u64 = 4000;

/// Numbers that look like chance and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn row(&mut self) -> Vec<u8> {
        const WORDS: [&str; 8] = ["order", "customer", "invoice", "address", "paid", "shipped", "quantity", "note"];
        let mut row = format!("{:016x}", self.next() << 31 ^ self.next()).into_bytes();
        while row.len() < ROW_LEN {
            row.extend_from_slice(WORDS[self.next() as usize % WORDS.len()].as_bytes());
            row.push(b' ');
        }
        row.truncate(ROW_LEN);
        row
    }
}

/// A database that is written to.
struct Database {
    numbers: Numbers,
    pages: Vec<Vec<u8>>,
}

impl Database {
    fn new() -> Self {
        let mut numbers = Numbers(1);
        let rows = PAGE_SIZE as usize / ROW_LEN;
        let pages = (0..PAGES).map(|_| (0..rows).flat_map(|_| numbers.row()).collect()).collect();
        Self { numbers, pages }
    }

    fn fingerprint(&self) -> u64 {
        (1..).zip(&self.pages).fold(0, |sum, (number, page)| sum ^ page_hash(number, page))
    }

    /// Changes some pages: their numbers, ascending, and new images. Half of the changes are in a tenth of the pages.
    fn commit(&mut self) -> (Vec<u32>, Vec<Vec<u8>>) {
        let mut touched = std::collections::BTreeSet::new();
        for turn in 0..PAGES_A_TRANSACTION {
            let index = self.numbers.next() % if turn % 2 == 0 { PAGES / 10 } else { PAGES };
            let at = (self.numbers.next() as usize % (PAGE_SIZE as usize / ROW_LEN)) * ROW_LEN;
            let row = self.numbers.row();
            self.pages[index as usize][at..at + ROW_LEN].copy_from_slice(&row);
            touched.insert(index);
        }
        touched.iter().map(|&index| (index as u32 + 1, self.pages[index as usize].clone())).unzip()
    }

    /// A second of transactions, the first of which is `first_txid`, each with its fingerprint, as a segment.
    fn segment(&mut self, first_txid: u64) -> (SegmentKey, Vec<u8>) {
        let commits: Vec<_> = (0..TRANSACTIONS).map(|_| self.commit()).collect();
        let (bytes, key) = encode(&commits, self.fingerprint(), first_txid);
        (key, bytes)
    }
}

fn encode(commits: &[(Vec<u32>, Vec<Vec<u8>>)], fingerprint: u64, first_txid: u64) -> (Vec<u8>, SegmentKey) {
    let mut writer = SegmentWriter::new(Vec::new(), PAGE_SIZE).unwrap();
    let (mut found, mut changes) = (HashMap::new(), Vec::new());
    for (txid, (numbers, images)) in (first_txid..).zip(commits) {
        let info = TransactionInfo {
            time_ms: txid,
            size_pages: PAGES as u32,
            schema_cookie: 1,
            fingerprint: Some(fingerprint),
            coalesced: false,
            schema_changed: false,
        };
        writer.begin_transaction(&info, numbers).unwrap();
        for (number, image) in numbers.iter().zip(images) {
            let former = found.get(number).map(Vec::as_slice);
            writer.push(Content::of(image, former, &mut changes)).unwrap();
            found.insert(*number, image.clone());
        }
    }
    writer.finish(1, first_txid).unwrap()
}

fn raw_len(commits: &[(Vec<u32>, Vec<Vec<u8>>)]) -> u64 {
    commits.iter().map(|(numbers, _)| numbers.len() as u64 * u64::from(PAGE_SIZE)).sum()
}

/// A WAL as SQLite writes it: its header, and frames.
fn wal() -> (WalHeader, Vec<Vec<u8>>) {
    let mut bytes = [0; WAL_HEADER_LEN];
    for (at, field) in [(0, 0x377f_0682), (4, 3_007_000), (8, PAGE_SIZE), (16, 17), (20, 18)] {
        bytes[at..at + 4].copy_from_slice(&field.to_be_bytes());
    }
    let mut sum = Checksum::default().extended(ByteOrder::Little, &bytes[..24]);
    bytes[24..28].copy_from_slice(&sum.0.to_be_bytes());
    bytes[28..].copy_from_slice(&sum.1.to_be_bytes());
    let header = WalHeader::parse(&bytes).unwrap();
    let database = Database::new();
    let frames = (1_u32..).zip(&database.pages[..256]).map(|(number, page)| {
        let mut frame = [number.to_be_bytes(), [0; 4]].concat();
        sum = sum.extended(ByteOrder::Little, &frame).extended(ByteOrder::Little, page);
        frame.extend_from_slice(&header.salts.0);
        frame.extend([sum.0.to_be_bytes(), sum.1.to_be_bytes()].concat());
        assert_eq!(frame.len(), FRAME_HEADER_LEN);
        frame.extend_from_slice(page);
        frame
    });
    (header, frames.collect())
}

fn capture(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("capture");
    let (header, frames) = wal();
    group.throughput(Throughput::Bytes(frames.len() as u64 * u64::from(PAGE_SIZE)));
    group.bench_function("wal: parse and checksum 256 frames", |bencher| {
        bencher.iter(|| {
            let next = |sum, frame: &Vec<u8>| header.check_frame(sum, black_box(frame)).unwrap().checksum;
            frames.iter().fold(header.checksum, next)
        });
    });
    group.bench_function("hash of 256 pages", |bencher| {
        bencher.iter(|| frames.iter().fold(0, |sum, frame| sum ^ page_hash(7, black_box(&frame[FRAME_HEADER_LEN..]))));
    });
    group.finish();
}

fn objects(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("objects");
    group.sample_size(20);
    let mut database = Database::new();
    let commits: Vec<_> = (0..TRANSACTIONS).map(|_| database.commit()).collect();
    group.throughput(Throughput::Bytes(raw_len(&commits)));
    group.bench_function("encode a segment of 100 transactions", |bencher| {
        bencher.iter(|| encode(black_box(&commits), 0, 1));
    });
    let (segment, _) = encode(&commits, 0, 1);
    group.bench_function("decode a segment of 100 transactions", |bencher| {
        bencher.iter(|| Segment::decode(black_box(&segment), |_, _, _| ()).unwrap());
    });
    let directory = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..60)
        .map(|index| {
            let path = directory.path().join(index.to_string());
            std::fs::write(&path, database.segment(1 + index * TRANSACTIONS).1).unwrap();
            path
        })
        .collect();
    group.throughput(Throughput::Bytes(raw_len(&commits) * files.len() as u64));
    group.bench_function("merge a minute of segments", |bencher| {
        let output = || tempfile::tempfile().unwrap();
        bencher.iter_batched(output, |output| merge_files(&files, output).unwrap(), BatchSize::PerIteration);
    });
    let extent = database.pages[..64].concat();
    group.throughput(Throughput::Bytes(extent.len() as u64));
    group.bench_function("encode an extent", |bencher| {
        bencher.iter(|| SnapshotWriter::new(PAGE_SIZE).0.encode_extent(0, 1, black_box(&extent)).unwrap());
    });
    group.finish();
}

/// A replica with a snapshot and ten seconds of transactions.
async fn replica() -> SharedStore {
    let store: SharedStore = Arc::new(MemoryStore::new());
    let put = |key: String, bytes: Vec<u8>| {
        let store = store.clone();
        async move { store.put(&key, Bytes::from(bytes), PutMode::IfAbsent).await.unwrap() }
    };
    put(MARKER_KEY.to_owned(), ReplicaMarker { format: 1, replica: "7".repeat(32) }.encode()).await;
    let record = EpochRecord {
        format: 1,
        epoch: 1,
        writer: "8".repeat(32),
        claimed_ms: 1,
        first_txid: 1,
        continues: false,
        parent: None,
        program: "bench".into(),
        host: "bench".into(),
    };
    put(EpochKey { epoch: 1, writer: None }.to_string(), record.encode()).await;
    let mut database = Database::new();
    let (mut writer, mut bytes) = SnapshotWriter::new(PAGE_SIZE);
    for (index, extent) in (0..).zip(database.pages.chunks(64)) {
        bytes.extend(writer.encode_extent(index, 1, &extent.concat()).unwrap());
    }
    let info = SnapshotInfo {
        key: SnapshotKey { epoch: 1, txid: 1, time_ms: 1 },
        last_txid: 1,
        time_ms: 1,
        size_pages: PAGES as u32,
        schema_cookie: 1,
        fingerprint: database.fingerprint(),
    };
    bytes.extend(writer.finish(&info).unwrap());
    put(info.key.to_string(), bytes).await;
    for second in 0..10 {
        let (key, bytes) = database.segment(2 + second * TRANSACTIONS);
        put(key.to_string(), bytes).await;
    }
    store
}

fn restore(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("restore");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(PAGES * u64::from(PAGE_SIZE)));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = runtime.block_on(replica());
    let apply = async || {
        let history = History::load(&store).await.unwrap();
        let plan = plan(&store, &history, Target::Latest, None).await.unwrap();
        execute(&store, &plan, tempfile::tempfile().unwrap(), Path::new("bench")).await.unwrap()
    };
    group.bench_function("apply a snapshot and ten segments", |bencher| bencher.iter(|| runtime.block_on(apply())));
    group.finish();
}

criterion_group!(benches, capture, objects, restore);
criterion_main!(benches);
