//! The formats against everything that can be done to their bytes.

use std::collections::HashMap;

use proptest::prelude::*;
use waltrail::format::change::Content;
use waltrail::format::key::{EpochKey, SegmentKey, SnapshotKey};
use waltrail::format::record::{EpochRecord, ReplicaMarker};
use waltrail::format::segment::{Segment, SegmentFooter, SegmentWriter, Transaction, TransactionInfo};
use waltrail::format::snapshot::{
    ExtentRecord, SnapshotFooter, SnapshotInfo, SnapshotWriter, check_snapshot_header, decode_extent,
};
use waltrail::format::{extent_count, extent_pages};

/// Pages of a transaction: number and fill.
type Pages = std::collections::BTreeMap<u32, u8>;

fn image(page_size: u32, fill: u8) -> Vec<u8> {
    (0..page_size).map(|at| (at as u8).wrapping_mul(fill).wrapping_add(fill)).collect()
}

/// A segment in which a page that an earlier transaction wrote has only what was changed.
fn segment(page_size: u32, transactions: &[Pages]) -> Vec<u8> {
    let mut found: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut writer = SegmentWriter::new(Vec::new(), page_size).unwrap();
    for (index, pages) in transactions.iter().enumerate() {
        let numbers: Vec<u32> = pages.keys().copied().collect();
        let info = TransactionInfo {
            time_ms: 1000 + index as u64,
            size_pages: 5000,
            schema_cookie: 3,
            fingerprint: (index % 2 == 0).then_some(index as u64),
            coalesced: false,
            schema_changed: index == 1,
        };
        writer.begin_transaction(&info, &numbers).unwrap();
        for (&number, &fill) in pages {
            let image = image(page_size, fill);
            writer.push(Content::of(&image, found.get(&number).map(Vec::as_slice), &mut Vec::new())).unwrap();
            found.insert(number, image);
        }
    }
    writer.finish(7, 100).unwrap().0
}

fn snapshot(page_size: u32, size_pages: u32) -> Vec<u8> {
    let (mut writer, mut bytes) = SnapshotWriter::new(page_size);
    for index in 0..extent_count(size_pages, page_size) {
        let (first_page, page_count) = extent_pages(index, size_pages, page_size);
        let content: Vec<u8> = (first_page..first_page + page_count).flat_map(|n| image(page_size, n as u8)).collect();
        bytes.extend(writer.encode_extent(index, 5 + u64::from(index), &content).unwrap());
    }
    let info = SnapshotInfo {
        key: SnapshotKey { epoch: 2, txid: 5, time_ms: 10 },
        last_txid: 5 + u64::from(extent_count(size_pages, page_size)),
        time_ms: 20,
        size_pages,
        schema_cookie: 1,
        fingerprint: 99,
    };
    bytes.extend(writer.finish(&info).unwrap());
    bytes
}

/// Reads all of a snapshot, as a restore does.
fn read_snapshot(bytes: &[u8]) -> Result<Vec<Vec<u8>>, waltrail::format::FormatError> {
    let footer = SnapshotFooter::decode(bytes, bytes.len() as u64)?;
    check_snapshot_header(bytes, footer.page_size)?;
    let end = footer.index_offset + footer.index_and_sources_len();
    let index = footer.decode_index(&bytes[footer.index_offset as usize..end as usize])?;
    let extent = |(number, record): (u32, &ExtentRecord)| {
        let (start, len) = (record.offset as usize, record.compressed_len as usize);
        let compressed = bytes.get(start..start.saturating_add(len)).unwrap_or_default();
        decode_extent(number, record, compressed, footer.page_size)
    };
    (0..).zip(&index.extents).map(extent).collect()
}

fn transactions() -> impl Strategy<Value = Vec<Pages>> {
    prop::collection::vec(prop::collection::btree_map(1_u32..5000, any::<u8>(), 0..20), 1..12)
}

/// Values that lengths and counts are not.
fn lies() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(vec![0; 8]),
        Just(vec![0xff; 8]),
        Just(vec![0; 16]),
        Just(vec![0xff; 16]),
        any::<u32>().prop_map(|value| value.to_le_bytes().to_vec()),
        (0_u32..32).prop_map(|shift| (1_u32 << shift).to_le_bytes().to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segments_come_back(transactions in transactions(), shift in 9_u32..=13) {
        let page_size = 1 << shift;
        let bytes = segment(page_size, &transactions);
        let mut pages = vec![Pages::new(); transactions.len()];
        let mut found: HashMap<u32, Vec<u8>> = HashMap::new();
        let decoded = Segment::decode(&bytes, |index, number, content| {
            let fill = transactions[index][&number];
            let page = found.entry(number).or_insert_with(|| vec![0; page_size as usize]);
            content.apply_to(page).unwrap();
            assert_eq!(page, &image(page_size, fill));
            pages[index].insert(number, fill);
        }).unwrap();
        prop_assert_eq!(&pages, &transactions);
        prop_assert_eq!(decoded.footer.span.first_txid, 100);
        prop_assert_eq!(decoded.footer.span.last_txid, 99 + transactions.len() as u64);
        for (index, transaction) in decoded.transactions.iter().enumerate() {
            prop_assert_eq!(transaction.info.fingerprint, (index % 2 == 0).then_some(index as u64));
            prop_assert_eq!(transaction.info.schema_changed, index == 1);
        }
    }

    #[test]
    fn a_flipped_bit_or_a_cut_is_found(transactions in transactions(), at in any::<prop::sample::Index>()) {
        let bytes = segment(512, &transactions);
        let mut flipped = bytes.clone();
        let bit = at.index(bytes.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Segment::decode(&flipped, |_, _, _| ()).is_err(), "bit {}", bit);
        prop_assert!(Segment::decode(&bytes[..at.index(bytes.len())], |_, _, _| ()).is_err());
        let bytes = snapshot(4096, 200);
        let mut flipped = bytes.clone();
        let bit = at.index(bytes.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read_snapshot(&flipped).is_err(), "bit {}", bit);
        prop_assert!(read_snapshot(&bytes[..at.index(bytes.len())]).is_err());
    }

    /// A liar who knows how to make a checksum: whatever the footer says, nothing panics and nothing large is allocated.
    #[test]
    fn a_lying_footer_is_survived(at in 0_usize..84, lie in lies(), transactions in transactions()) {
        let lying = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            let start = bytes.len() - 100;
            let len = lie.len().min(84 - at);
            bytes[start + at..start + at + len].copy_from_slice(&lie[..len]);
            let mut covered = bytes[start..start + 84].to_vec();
            covered.extend_from_slice(&bytes[start + 88..start + 96]);
            bytes[start + 84..start + 88].copy_from_slice(&crc32fast::hash(&covered).to_le_bytes());
            bytes
        };
        let original = segment(512, &transactions);
        let count = |bytes: &[u8]| {
            let mut pages = Vec::new();
            Segment::decode(bytes, |index, number, page| pages.push((index, number, page.bytes().to_vec()))).map(|_| pages)
        };
        // The numbers of epoch and transactions are the only thing in it that nothing in the object bears out.
        if let Ok(pages) = count(&lying(&original)) {
            prop_assert_eq!(pages, count(&original).unwrap());
        }
        let original = snapshot(4096, 200);
        if let Ok(extents) = read_snapshot(&lying(&original)) {
            prop_assert_eq!(extents, read_snapshot(&original).unwrap());
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000), text in ".*") {
        prop_assert!(Segment::decode(&bytes, |_, _, _| ()).is_err());
        prop_assert!(SegmentFooter::decode(&bytes, bytes.len() as u64).is_err());
        prop_assert!(read_snapshot(&bytes).is_err());
        prop_assert!(EpochRecord::decode(&bytes).is_err());
        prop_assert!(ReplicaMarker::decode(&bytes).is_err());
        prop_assert_eq!(SegmentKey::parse(&text), None);
        prop_assert_eq!(EpochKey::parse(&text), None);
    }
}

#[test]
fn snapshots_come_back() {
    for (page_size, size_pages) in [(512, 1), (512, 2000), (4096, 64), (4096, 65), (65_536, 9)] {
        let extents = read_snapshot(&snapshot(page_size, size_pages)).unwrap();
        let expected: Vec<u8> = (1..=size_pages).flat_map(|number| image(page_size, number as u8)).collect();
        assert_eq!(extents.concat(), expected, "{size_pages} pages of {page_size}");
    }
}

#[test]
fn a_large_segment_has_many_blocks_and_little_memory_is_believed() {
    let transactions: Vec<Pages> = (0..30).map(|seed| (1..200).map(|n| (n, (n as u8) ^ seed)).collect()).collect();
    let bytes = segment(4096, &transactions);
    let mut pages = 0;
    let decoded = Segment::decode(&bytes, |_, _, _| pages += 1).unwrap();
    assert!(decoded.footer.page_block_count > 1);
    assert_eq!(pages, 30 * 199);
    // The versions of a page compress against each other.
    assert!(bytes.len() < 30 * 199 * 4096 / 20, "{} bytes", bytes.len());
}

/// Runs that a merge writes: the images come in the run's order, and are found again under their transactions.
#[test]
fn a_run_of_images_that_are_in_order_already() {
    let transactions: Vec<Pages> =
        vec![[(2, 1), (9, 2)].into(), Pages::new(), [(1, 3), (9, 4)].into(), [(3, 5)].into()];
    let original = Segment::decode(&segment(512, &transactions), |_, _, _| ()).unwrap();
    let mut writer = SegmentWriter::new(Vec::new(), 512).unwrap();
    assert!(writer.push(Content::Image(&image(512, 0))).is_err());
    writer.begin_run(original.transactions[..3].iter().map(Transaction::parts)).unwrap();
    for fill in [3, 1, 2, 4] {
        writer.push(Content::Image(&image(512, fill))).unwrap();
    }
    writer.begin_run(original.transactions[3..].iter().map(Transaction::parts)).unwrap();
    writer.push(Content::Image(&image(512, 5))).unwrap();
    let bytes = writer.finish(7, 100).unwrap().0;
    let mut pages = vec![Pages::new(); transactions.len()];
    let decoded = Segment::decode(&bytes, |index, number, page| {
        assert_eq!(page, Content::Image(&image(512, transactions[index][&number])));
        pages[index].insert(number, transactions[index][&number]);
    });
    assert_eq!(decoded.unwrap().transactions, original.transactions);
    assert_eq!(pages, transactions);
}

/// What docs/FORMAT.md quotes. zstd may compress otherwise one day; what was written once must be read for ever.
#[test]
fn the_vectors_are_read() {
    let segment = hex(include_str!("../vectors/segment.hex"));
    let mut contents = Vec::new();
    let keep = |index, number, content: Content<'_>| contents.push((index, number, content.bytes().to_vec()));
    let decoded = Segment::decode(&segment, keep).unwrap();
    let changes = [&[5, 0, 1, 0, 99][..], &[38, 1, 10, 0], &[0; 10]].concat();
    let due = [(0, 1, image(512, 1)), (1, 2, image(512, 3)), (0, 3, image(512, 2)), (2, 3, changes)];
    assert_eq!(contents, due);
    assert_eq!((decoded.footer.page_size, decoded.footer.span.epoch, decoded.footer.span.first_txid), (512, 7, 100));
    let snapshot = hex(include_str!("../vectors/snapshot.hex"));
    let extents = read_snapshot(&snapshot).unwrap();
    assert_eq!(extents, [[image(512, 1), image(512, 2), image(512, 3)].concat()]);
    let footer = SnapshotFooter::decode(&snapshot, snapshot.len() as u64).unwrap();
    assert_eq!((footer.info.size_pages, footer.info.fingerprint, footer.info.last_txid), (3, 99, 6));
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    digits.chunks(2).map(|pair| digit(pair[0]) * 16 + digit(pair[1])).collect()
}

/// Found by fuzzing: as many transactions as there are numbers, in a footer whose checksum is right.
#[test]
fn a_footer_with_all_the_numbers() {
    let mut bytes = segment(512, &[Pages::from([(1, 1)])]);
    let at = bytes.len() - 100;
    bytes[at + 32..at + 40].fill(0);
    bytes[at + 40..at + 48].fill(0xff);
    bytes[at + 68..at + 72].fill(0);
    let crc32 = crc32fast::hash(&[&bytes[at..at + 84], b"WALTSEGE"].concat());
    bytes[at + 84..at + 88].copy_from_slice(&crc32.to_le_bytes());
    assert!(Segment::decode(&bytes, |_, _, _| ()).is_err());
}

/// An object after `change` was made to its footer, under a checksum that is right.
fn with_footer(bytes: &[u8], magic: &[u8; 8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = bytes.len() - 100;
    change(&mut bytes[at..at + 84]);
    let crc32 = crc32fast::hash(&[&bytes[at..at + 84], magic].concat());
    bytes[at + 84..at + 88].copy_from_slice(&crc32.to_le_bytes());
    bytes
}

/// Who reads a table fetches it whole: that it has many blocks is not believed, if they would hold next to nothing.
#[test]
fn a_table_is_no_longer_than_what_it_holds() {
    let bytes = segment(512, &[Pages::from([(1, 1)])]);
    let true_footer = SegmentFooter::decode(&bytes, bytes.len() as u64).unwrap();
    assert_eq!((true_footer.table_raw_len, true_footer.table_block_count), (52, 1));
    let claiming = |block_count: u32, table_len: u64| {
        let lying = with_footer(&bytes, b"WALTSEGE", |fields| {
            fields[8..16].copy_from_slice(&table_len.to_le_bytes());
            fields[64..68].copy_from_slice(&block_count.to_le_bytes());
        });
        SegmentFooter::decode(&lying, bytes.len() as u64 - true_footer.table_len + table_len)
    };
    assert_eq!(claiming(1, true_footer.table_len), Ok(true_footer));
    assert!(claiming(1, 52 + 1024).is_ok(), "there is room for what zstd may add");
    for (block_count, table_len) in [(1, 52 + 1025), (2, 52 + 1024), (2, 24), (400_000, 400_000 * 1024)] {
        assert!(claiming(block_count, table_len).is_err(), "{block_count} blocks of {table_len} bytes");
    }
}

/// The same for a snapshot's index.
#[test]
fn an_index_is_no_longer_than_what_it_holds() {
    // 2,051 pages of 512 bytes are five extents, and so many of 64 KiB are 513.
    for (page_size, size_pages, most_blocks) in
        [(512_u32, 2051_u32, 1_u32), (65_536, 2051, 6), (65_536, 26_843_540, 65_536)]
    {
        let bytes = snapshot(512, 1);
        let true_footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
        let raw_len = u64::from(extent_count(size_pages, page_size)) * 40;
        let claiming = |block_count: u32, index_len: u64| {
            let lying = with_footer(&bytes, b"WALTSNPE", |fields| {
                fields[8..16].copy_from_slice(&index_len.to_le_bytes());
                for (at, value) in
                    [(56, block_count), (64, extent_count(size_pages, page_size)), (68, size_pages), (76, page_size)]
                {
                    fields[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
            });
            SnapshotFooter::decode(&lying, bytes.len() as u64 - true_footer.index_len + index_len)
        };
        assert!(claiming(1, raw_len).is_ok() && claiming(most_blocks, raw_len).is_ok(), "{raw_len}");
        let limit = raw_len + raw_len / 128 + u64::from(most_blocks) * 1024;
        assert!(claiming(most_blocks, limit).is_ok() && claiming(most_blocks, limit + 1).is_err(), "{raw_len}");
        assert!(claiming(most_blocks + 1, raw_len).is_err(), "{raw_len}");
        let extents = extent_count(size_pages, page_size);
        assert!(claiming(extents, raw_len + u64::from(extents) * 1024).is_err(), "{raw_len}: a block for each extent");
    }
}

/// What the writers make of large tables and indexes is within those bounds.
#[test]
fn large_tables_and_indexes_have_few_blocks() {
    let info = TransactionInfo {
        time_ms: 1,
        size_pages: 9,
        schema_cookie: 1,
        fingerprint: None,
        coalesced: false,
        schema_changed: false,
    };
    let mut writer = SegmentWriter::new(Vec::new(), 512).unwrap();
    for _ in 0..300_000 {
        writer.begin_transaction(&info, &[]).unwrap();
    }
    let bytes = writer.finish(7, 100).unwrap().0;
    let decoded = Segment::decode(&bytes, |_, _, _| ()).unwrap();
    assert_eq!(decoded.transactions.len(), 300_000);
    assert_eq!((decoded.footer.table_raw_len, decoded.footer.table_block_count), (16 + 300_000 * 32, 3));

    // All of its extents are in another object, so they are soon named.
    let extents = 250_000;
    let (mut writer, mut bytes) = SnapshotWriter::new(65_536);
    let elsewhere = SnapshotKey { epoch: 1, txid: 1, time_ms: 1 };
    let record =
        ExtentRecord { source: 0, offset: 32, compressed_len: 9, crc32: 0, page_count: 4, content_hash: 0, txid: 1 };
    for index in 0..extents {
        writer.refer_to_extent(index, 5, elsewhere, &record).unwrap();
    }
    let info = SnapshotInfo {
        key: SnapshotKey { epoch: 2, txid: 5, time_ms: 10 },
        last_txid: 5,
        time_ms: 20,
        size_pages: extents * 4,
        schema_cookie: 1,
        fingerprint: 99,
    };
    bytes.extend(writer.finish(&info).unwrap());
    let footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
    let index = footer.decode_index(&bytes[footer.index_offset as usize..bytes.len() - 100]).unwrap();
    assert_eq!((index.extents.len(), footer.index_block_count), (250_000, 3));
}
