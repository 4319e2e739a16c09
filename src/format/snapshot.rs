//! Snapshots: the extents of a database, each compressed on its own, and an index of all.
//!
//! Layout: header (32 bytes), extents, index blocks, sources, footer (100 bytes). An extent may be in an older snapshot's
//! object, a *source*; the index says where. `docs/FORMAT.md` has the fields.

use std::collections::BTreeMap;
use std::io;

use xxhash_rust::xxh3::xxh3_64;

use super::block::{BLOCK_HEADER_LEN, BLOCK_RAW_LIMIT, BlockWriter, most_compressed, read_section};
use super::key::SnapshotKey;
use super::{
    FOOTER_LEN, Fields, FormatError, HEADER_LEN, check_sealed, decode_footer, decode_header, encode_footer,
    encode_header, extent_count, extent_pages, is_page_size, lock_page, page_hash, pages_per_extent, seal,
};

const HEADER_MAGIC: &[u8; 8] = b"WALTSNP1";
const FOOTER_MAGIC: &[u8; 8] = b"WALTSNPE";
const SOURCE_LEN: u64 = 20;
const EXTENT_LEN: usize = 40;
/// A snapshot refers to no more objects than this, itself included: a restore reads from all of them.
pub const SOURCES_LIMIT: u32 = 1024;
/// No index is longer than this, in bytes: a reader keeps all of it in memory. It is enough for 6.7 million extents, a
/// database of 1.7 TB.
pub const INDEX_RAW_LIMIT: u64 = 256 << 20;
/// All blocks of an index but the last hold at least so many raw bytes (those that this program writes nearly 4 MiB): a reader fetches an
/// index whole, and this bounds how long it can be.
const INDEX_BLOCK_RAW_LEAST: u64 = 4096;
const LEVEL: i32 = 3;

/// Where an extent is, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentRecord {
    /// Number of the snapshot object in the index's list of sources; 0 is the object itself.
    pub source: u32,
    /// Where in that object it begins.
    pub offset: u64,
    /// Length of its compressed bytes.
    pub compressed_len: u32,
    /// CRC-32 of its compressed bytes.
    pub crc32: u32,
    /// How many pages it holds.
    pub page_count: u32,
    /// Hash of its content: see [`extent_hash`].
    pub content_hash: u64,
    /// A transaction after which this was its content.
    pub txid: u64,
}

/// The hash of an extent's content, from the hashes of its pages in order; the lock page counts as 0. So what an extent
/// holds is known from the hashes of its pages alone, without reading it.
#[must_use]
pub fn extent_hash(page_hashes: impl IntoIterator<Item = u64>) -> u64 {
    let bytes: Vec<u8> = page_hashes.into_iter().flat_map(u64::to_le_bytes).collect();
    xxh3_64(&bytes)
}

/// The hash of the content of extent `index`: see [`extent_hash`].
#[must_use]
pub fn content_hash(index: u32, content: &[u8], page_size: u32) -> u64 {
    let (first_page, _) = extent_pages(index, u32::MAX, page_size);
    let lock_page = lock_page(page_size);
    extent_hash(
        (first_page..)
            .zip(content.chunks_exact(page_size as usize))
            .map(|(page_number, image)| if page_number == lock_page { 0 } else { page_hash(page_number, image) }),
    )
}

/// What a snapshot is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its key: none of its extents is older than the transaction there.
    pub key: SnapshotKey,
    /// The transaction whose state it serves, with the segments between: none of its extents is newer.
    pub last_txid: u64,
    /// Commit time of that transaction, in milliseconds since 1970.
    pub time_ms: u64,
    /// Size of the database in pages after the last transaction.
    pub size_pages: u32,
    /// The schema cookie after the last transaction.
    pub schema_cookie: u32,
    /// Fingerprint of the database after the last transaction.
    pub fingerprint: u64,
}

/// Writes a snapshot; hands out the bytes to append one after another.
#[derive(Debug)]
pub struct SnapshotWriter {
    page_size: u32,
    offset: u64,
    /// The other objects that extents are in: source 1 and up.
    sources: Vec<SnapshotKey>,
    extents: BTreeMap<u32, ExtentRecord>,
}

impl SnapshotWriter {
    /// Begins a snapshot; the second value is the header, the first bytes to store.
    #[must_use]
    pub fn new(page_size: u32) -> (Self, Vec<u8>) {
        let header = encode_header(HEADER_MAGIC, page_size);
        let offset = header.len() as u64;
        (Self { page_size, offset, sources: Vec::new(), extents: BTreeMap::new() }, header)
    }

    /// Adds extent `index` with its content as of transaction `txid`; returns the bytes to append.
    ///
    /// # Errors
    /// When zstd fails. When the index would outgrow [`INDEX_RAW_LIMIT`].
    pub fn encode_extent(&mut self, index: u32, txid: u64, content: &[u8]) -> io::Result<Vec<u8>> {
        check_has_room_for(index)?;
        let compressed = zstd::bulk::compress(content, LEVEL)?;
        let record = ExtentRecord {
            source: 0,
            offset: self.offset,
            compressed_len: u32::try_from(compressed.len()).map_err(io::Error::other)?,
            crc32: crc32fast::hash(&compressed),
            page_count: u32::try_from(content.len() / self.page_size as usize).map_err(io::Error::other)?,
            content_hash: content_hash(index, content, self.page_size),
            txid,
        };
        self.offset += compressed.len() as u64;
        self.extents.insert(index, record);
        Ok(compressed)
    }

    /// Adds extent `index`, whose content after transaction `txid` is what `record` describes, which stands in the object
    /// `source` already.
    ///
    /// # Errors
    /// When the index would outgrow [`INDEX_RAW_LIMIT`], or its sources [`SOURCES_LIMIT`].
    pub fn refer_to_extent(
        &mut self,
        index: u32,
        txid: u64,
        source: SnapshotKey,
        record: &ExtentRecord,
    ) -> io::Result<()> {
        check_has_room_for(index)?;
        let known = self.sources.iter().position(|&known| known == source);
        let at = known.unwrap_or_else(|| {
            self.sources.push(source);
            self.sources.len() - 1
        });
        let number = u32::try_from(at).unwrap_or(u32::MAX).saturating_add(1);
        if number >= SOURCES_LIMIT {
            return Err(io::Error::other("a snapshot refers to more objects than its index can hold"));
        }
        self.extents.insert(index, ExtentRecord { source: number, txid, ..*record });
        Ok(())
    }

    /// Bytes handed out so far.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.offset
    }

    /// Length of all extents in bytes, wherever they are: what a restore reads.
    #[must_use]
    pub fn extents_len_bytes(&self) -> u64 {
        self.extents.values().map(|extent| u64::from(extent.compressed_len)).sum()
    }

    /// Ends the snapshot; returns its index, sources and footer, the bytes to append. Extents behind the database's end are
    /// left out: it shrank after they were added.
    ///
    /// # Errors
    /// When an extent is missing, or zstd fails.
    pub fn finish(mut self, info: &SnapshotInfo) -> io::Result<Vec<u8>> {
        let extent_count = extent_count(info.size_pages, self.page_size);
        self.extents.retain(|&index, _| index < extent_count);
        if self.extents.len() != extent_count as usize {
            return Err(io::Error::other("a snapshot was ended before it was whole"));
        }
        let sources = self.renumber_sources(info.key);
        let mut bytes = Vec::new();
        let mut index = BlockWriter::default();
        for extent in self.extents.values() {
            index.push(&mut bytes, &[&encode_extent_record(extent)])?;
        }
        index.finish(&mut bytes)?;
        bytes.extend_from_slice(&encode_sources(&sources));
        let footer = SnapshotFooter {
            info: *info,
            page_size: self.page_size,
            index_offset: self.offset,
            index_len: index.len_bytes,
            index_block_count: index.block_count,
            source_count: u32::try_from(sources.len()).map_err(io::Error::other)?,
            extent_count,
        };
        bytes.extend_from_slice(&footer.encode());
        Ok(bytes)
    }

    /// Leaves sources out that no extent is in any more; gives all that are left, the object itself first.
    fn renumber_sources(&mut self, own: SnapshotKey) -> Vec<SnapshotKey> {
        let mut sources = vec![own];
        let mut numbers = BTreeMap::from([(0, 0)]);
        for extent in self.extents.values_mut() {
            extent.source = *numbers.entry(extent.source).or_insert_with(|| {
                sources.push(self.sources[extent.source as usize - 1]);
                sources.len() as u32 - 1
            });
        }
        sources
    }
}

fn check_has_room_for(extent: u32) -> io::Result<()> {
    if index_raw_len(extent.saturating_add(1)) > INDEX_RAW_LIMIT {
        return Err(io::Error::other("a snapshot has more extents than its index can hold"));
    }
    Ok(())
}

fn index_raw_len(extent_count: u32) -> u64 {
    u64::from(extent_count) * EXTENT_LEN as u64
}

fn encode_sources(sources: &[SnapshotKey]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for key in sources {
        bytes.extend_from_slice(&key.epoch.to_le_bytes());
        bytes.extend_from_slice(&key.txid.to_le_bytes());
        bytes.extend_from_slice(&key.time_ms.to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

fn encode_extent_record(extent: &ExtentRecord) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(EXTENT_LEN);
    for field in [extent.offset, extent.content_hash, extent.txid] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    for field in [extent.source, extent.compressed_len, extent.crc32, extent.page_count] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

/// The last 100 bytes of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotFooter {
    /// What it is of.
    pub info: SnapshotInfo,
    /// Page size in bytes.
    pub page_size: u32,
    /// Where the index begins.
    pub index_offset: u64,
    /// Length of the index's blocks in bytes; the sources and the footer follow.
    pub index_len: u64,
    /// Number of the index's blocks.
    pub index_block_count: u32,
    /// Number of snapshot objects that extents are in, this one included.
    pub source_count: u32,
    /// Number of extents.
    pub extent_count: u32,
}

impl SnapshotFooter {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FOOTER_LEN);
        let SnapshotInfo { key, last_txid, time_ms, size_pages, schema_cookie, fingerprint } = self.info;
        for field in [self.index_offset, self.index_len, key.txid, key.time_ms, last_txid, time_ms, fingerprint] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for field in [
            self.index_block_count,
            self.source_count,
            self.extent_count,
            size_pages,
            schema_cookie,
            self.page_size,
            key.epoch,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        encode_footer(bytes, FOOTER_MAGIC)
    }

    /// Reads the footer at the end of `tail`, the end of a snapshot of `object_len` bytes.
    ///
    /// # Errors
    /// When the bytes are not a footer, or not one of a snapshot of that length.
    pub fn decode(tail: &[u8], object_len: u64) -> Result<Self, FormatError> {
        let what = "the snapshot's footer";
        let mut fields = decode_footer(tail, FOOTER_MAGIC, what)?;
        let (index_offset, index_len) = (fields.u64()?, fields.u64()?);
        let (txid, key_time_ms, last_txid) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (time_ms, fingerprint) = (fields.u64()?, fields.u64()?);
        let (index_block_count, source_count, extent_count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (size_pages, schema_cookie, page_size, epoch) =
            (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let tail_len = sources_len(source_count) + FOOTER_LEN as u64;
        let end = index_offset.checked_add(index_len).and_then(|end| end.checked_add(tail_len));
        let is_consistent = end == Some(object_len)
            && index_offset >= HEADER_LEN as u64
            && is_page_size(page_size)
            && txid <= last_txid
            && (1..=extent_count.saturating_add(1).min(SOURCES_LIMIT)).contains(&source_count)
            && u64::from(index_block_count) * BLOCK_HEADER_LEN as u64 <= index_len
            && index_raw_len(extent_count) <= INDEX_RAW_LIMIT
            && u64::from(index_block_count) <= index_raw_len(extent_count) / INDEX_BLOCK_RAW_LEAST + 1
            && index_len <= most_compressed(index_raw_len(extent_count), index_block_count)
            && extent_count == super::extent_count(size_pages, page_size);
        if !is_consistent {
            return Err(FormatError::Inconsistent("the snapshot's footer is not that of this object".into()));
        }
        let key = SnapshotKey { epoch, txid, time_ms: key_time_ms };
        Ok(Self {
            info: SnapshotInfo { key, last_txid, time_ms, size_pages, schema_cookie, fingerprint },
            page_size,
            index_offset,
            index_len,
            index_block_count,
            source_count,
            extent_count,
        })
    }

    /// Length of index and sources together, in bytes: from [`Self::index_offset`] to the footer.
    #[must_use]
    pub fn index_and_sources_len(&self) -> u64 {
        self.index_len + sources_len(self.source_count)
    }

    /// How much of an object's end holds its footer and its sources, in bytes.
    #[must_use]
    pub fn sources_and_footer_len(&self) -> u64 {
        sources_len(self.source_count) + FOOTER_LEN as u64
    }

    /// Reads the sources from `tail`, which ends before the footer.
    ///
    /// # Errors
    /// When they are damaged, or not those of this object.
    pub fn decode_sources(&self, tail: &[u8]) -> Result<Vec<SnapshotKey>, FormatError> {
        let what = "the snapshot's list of sources";
        let start = tail.len().checked_sub(sources_len(self.source_count) as usize);
        let bytes = &tail[start.ok_or(FormatError::TooShort { what })?..];
        check_sealed(bytes, what)?;
        let mut fields = Fields::new(bytes, what);
        let sources = (0..self.source_count).map(|_| decode_source(&mut fields)).collect::<Result<Vec<_>, _>>()?;
        if sources.first() == Some(&self.info.key) {
            Ok(sources)
        } else {
            Err(FormatError::Inconsistent("the snapshot's list of sources is not that of this object".into()))
        }
    }

    /// Reads the index from its blocks and the sources behind them: [`Self::index_and_sources_len`] bytes from
    /// `index_offset` on.
    ///
    /// # Errors
    /// When they are damaged, or contradict themselves or the footer.
    pub fn decode_index(&self, bytes: &[u8]) -> Result<SnapshotIndex, FormatError> {
        let what = "the snapshot's index";
        let blocks = bytes.get(..self.index_len as usize).ok_or(FormatError::TooShort { what })?;
        let sources = self.decode_sources(&bytes[blocks.len()..])?;
        let raw = read_section(blocks, self.index_block_count, index_raw_len(self.extent_count), what)?;
        let mut fields = Fields::new(&raw, what);
        let mut index = SnapshotIndex { sources, extents: Vec::new() };
        for number in 0..self.extent_count {
            let extent = decode_extent_record(&mut fields)?;
            self.check_extent(number, &extent)?;
            index.extents.push(extent);
        }
        Ok(index)
    }

    /// In this object an extent stands between the header and the index; of another one only that it ends somewhere is known.
    fn has_place_for(&self, extent: &ExtentRecord) -> bool {
        let end = extent.offset.checked_add(u64::from(extent.compressed_len));
        let limit = if extent.source == 0 { self.index_offset } else { u64::MAX };
        extent.offset >= HEADER_LEN as u64 && end.is_some_and(|end| end <= limit)
    }

    fn check_extent(&self, number: u32, extent: &ExtentRecord) -> Result<(), FormatError> {
        // The database may have grown after the last extent was read: then that extent has fewer pages than fit now.
        let (_, most_pages) = extent_pages(number, u32::MAX, self.page_size);
        let is_right = extent.source < self.source_count
            && (1..=most_pages).contains(&extent.page_count)
            && extent.compressed_len as usize <= BLOCK_RAW_LIMIT
            && self.has_place_for(extent)
            && (self.info.key.txid..=self.info.last_txid).contains(&extent.txid);
        if is_right {
            Ok(())
        } else {
            Err(FormatError::Inconsistent(format!("extent {number} in the snapshot's index can't be right")))
        }
    }
}

/// Length of the list of sources and its checksum, in bytes.
fn sources_len(source_count: u32) -> u64 {
    u64::from(source_count) * SOURCE_LEN + 4
}

fn decode_source(fields: &mut Fields<'_>) -> Result<SnapshotKey, FormatError> {
    Ok(SnapshotKey { epoch: fields.u32()?, txid: fields.u64()?, time_ms: fields.u64()? })
}

fn decode_extent_record(fields: &mut Fields<'_>) -> Result<ExtentRecord, FormatError> {
    let (offset, content_hash, txid) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (source, compressed_len, crc32, page_count) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    Ok(ExtentRecord { source, offset, compressed_len, crc32, page_count, content_hash, txid })
}

/// Where every extent of a database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotIndex {
    /// The snapshot objects that extents are in.
    pub sources: Vec<SnapshotKey>,
    /// All extents of the database, in order.
    pub extents: Vec<ExtentRecord>,
}

/// Checks a snapshot's header against its footer.
///
/// # Errors
/// When it is not the header of such a snapshot.
pub fn check_snapshot_header(bytes: &[u8], page_size: u32) -> Result<(), FormatError> {
    if decode_header(bytes, HEADER_MAGIC, "the snapshot's header")? == page_size {
        Ok(())
    } else {
        Err(FormatError::Inconsistent("the snapshot's header and footer give different page sizes".into()))
    }
}

/// Reads the content of extent `index` from its compressed bytes.
///
/// # Errors
/// When they are not those that `record` describes.
pub fn decode_extent(index: u32, record: &ExtentRecord, bytes: &[u8], page_size: u32) -> Result<Vec<u8>, FormatError> {
    let what = "an extent";
    if bytes.len() != record.compressed_len as usize {
        return Err(FormatError::TooShort { what });
    }
    if crc32fast::hash(bytes) != record.crc32 {
        return Err(FormatError::BadChecksum { what });
    }
    let limit = pages_per_extent(page_size) as usize * page_size as usize;
    let content = zstd::bulk::decompress(bytes, limit).map_err(|_| FormatError::BadCompression { what })?;
    let has_right_len = content.len() == record.page_count as usize * page_size as usize;
    if has_right_len && content_hash(index, &content, page_size) == record.content_hash {
        Ok(content)
    } else {
        Err(FormatError::BadChecksum { what: "an extent's content" })
    }
}
