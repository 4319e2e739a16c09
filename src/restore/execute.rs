//! Carrying a plan out: each page is written once, newest first, into a file that has no name anybody looks at; then its
//! fingerprint is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};

use super::RestoreError;
use super::plan::Plan;
use super::run::PlannedSegment;
use super::tail::{check_footer, read_table};
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader};
use crate::format::key::SegmentKey;
use crate::format::segment::{PageStream, Segment, SegmentFooter, Transaction};
use crate::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotIndex, check_snapshot_header, decode_extent};
use crate::format::{HEADER_LEN, extent_pages, lock_page, page_hash};
use crate::store::SharedStore;

/// A segment up to this size is fetched whole.
pub(crate) const SMALL_SEGMENT: u64 = 1 << 20;
/// So many small segments are fetched at a time.
const SEGMENTS_IN_FLIGHT: usize = 8;
/// Neighbouring extents are fetched together up to this many bytes.
const EXTENT_BATCH_LEN: u64 = 4 << 20;
/// Extents that lie no further apart are fetched together: bytes that nobody wants cost less than another request.
const EXTENT_GAP_LEN: u64 = 256 << 10;
/// So many batches of extents are fetched at a time.
const BATCHES_IN_FLIGHT: usize = 4;

/// What a restore has learnt.
#[derive(Debug)]
pub struct Restored {
    /// The hashes of all pages, 8 bytes each, little-endian, page 1 first; zeros for the lock page.
    pub page_hashes: File,
    /// Length in bytes of all extents of the snapshot, wherever they are.
    pub extents_len_bytes: u64,
}

/// The pages of the database that is being restored.
struct Image {
    file: File,
    /// 8 bytes a page.
    page_hashes: File,
    page_size: u32,
    size_pages: u32,
    /// One bit a page.
    written: Vec<u64>,
    /// The smallest size, in pages, after any of the transactions looked at so far, newest first: what stood behind it
    /// earlier was cut off, and is zeros unless one of them wrote it again.
    reach_pages: u32,
    fingerprint: u64,
}

impl Image {
    fn new(file: File, plan: &Plan, directory: &Path) -> io::Result<Self> {
        file.set_len(plan.database_len_bytes())?;
        let page_hashes = tempfile::tempfile_in(directory)?;
        page_hashes.set_len(u64::from(plan.size_pages) * 8)?;
        let words = plan.size_pages as usize / 64 + 1;
        let (page_size, size_pages) = (plan.page_size, plan.size_pages);
        let (written, reach_pages) = (vec![0; words], size_pages);
        Ok(Self { file, page_hashes, page_size, size_pages, written, reach_pages, fingerprint: 0 })
    }

    /// Whether an older image of a page counts: it is still to be written, and nothing cut it off since.
    fn wants(&self, page_number: u32) -> bool {
        page_number <= self.reach_pages && self.is_blank(page_number)
    }

    /// Whether no image of a page of the database was written.
    fn is_blank(&self, page_number: u32) -> bool {
        page_number >= 1
            && page_number <= self.size_pages
            && page_number != lock_page(self.page_size)
            && self.written[page_number as usize / 64] & (1 << (page_number % 64)) == 0
    }

    /// Takes a page as spoken for: its image is about to be written.
    fn claim(&mut self, page_number: u32) {
        self.written[page_number as usize / 64] |= 1 << (page_number % 64);
    }

    /// Writes consecutive pages.
    fn write(&mut self, first_page: u32, images: &[u8]) -> io::Result<()> {
        let hashed = (first_page..).zip(images.chunks_exact(self.page_size as usize));
        let hashes: Vec<u64> = hashed.map(|(page_number, image)| page_hash(page_number, image)).collect();
        self.fingerprint ^= hashes.iter().fold(0, |sum, hash| sum ^ hash);
        let bytes: Vec<u8> = hashes.into_iter().flat_map(u64::to_le_bytes).collect();
        self.page_hashes.write_all_at(&bytes, u64::from(first_page - 1) * 8)?;
        self.file.write_all_at(images, u64::from(first_page - 1) * u64::from(self.page_size))
    }

    /// Writes those pages of an extent that are wanted, neighbours together.
    fn write_extent(&mut self, first_page: u32, content: &[u8]) -> io::Result<()> {
        let page_size = self.page_size as usize;
        let page_count = (content.len() / page_size) as u32;
        let mut next = 0;
        while next < page_count {
            let start = next;
            while next < page_count && self.wants(first_page + next) {
                self.claim(first_page + next);
                next += 1;
            }
            if start == next {
                next += 1;
            } else {
                self.write(first_page + start, &content[start as usize * page_size..next as usize * page_size])?;
            }
        }
        Ok(())
    }

    /// Which images of a segment are to be written: of each page that is still wanted, the last one up to `last_txid`. In the
    /// order of the table. Claims the pages. Segments are looked at newest first.
    fn select(&mut self, transactions: &[Transaction], last_txid: u64) -> Vec<bool> {
        let images = transactions.iter().map(|transaction| transaction.page_numbers.len()).sum();
        let mut selected = vec![false; images];
        let mut at = images;
        for transaction in transactions.iter().rev() {
            let counts = transaction.txid <= last_txid;
            for &page_number in transaction.page_numbers.iter().rev() {
                at -= 1;
                if counts && self.wants(page_number) {
                    self.claim(page_number);
                    selected[at] = true;
                }
            }
            if counts {
                self.reach_pages = self.reach_pages.min(transaction.info.size_pages);
            }
        }
        selected
    }

    /// A page that nobody ever stored, or that was cut off and not written again, is zeros; the file has them already.
    fn finish(&mut self) -> io::Result<u64> {
        let zeros = vec![0; self.page_size as usize];
        for page_number in 1..=self.size_pages {
            if self.is_blank(page_number) {
                let hash = page_hash(page_number, &zeros);
                self.fingerprint ^= hash;
                self.page_hashes.write_all_at(&hash.to_le_bytes(), u64::from(page_number - 1) * 8)?;
            }
        }
        self.file.sync_all()?;
        Ok(self.fingerprint)
    }
}

/// Writes the database that `plan` describes into `file`, at `path`, and checks its fingerprint. Durable when it returns.
///
/// # Errors
/// When an object is missing or damaged, the store or the file fails, or the fingerprint is not the recorded one. What is
/// in the file then is worth nothing.
pub async fn execute(store: &SharedStore, plan: &Plan, file: File, path: &Path) -> Result<Restored, RestoreError> {
    let directory = path.parent().filter(|parent| parent.is_dir()).map_or_else(std::env::temp_dir, Path::to_owned);
    let image = Image::new(file, plan, &directory).map_err(RestoreError::io(path, "write"))?;
    let mut execution = Execution { store, plan, path, image: Some(image) };
    execution.apply_segments().await?;
    let extents_len_bytes = execution.apply_snapshot().await?;
    let finish = |image: &mut Image, path: &Path| {
        let found = image.finish().map_err(RestoreError::io(path, "write"))?;
        Ok((found, image.page_hashes.try_clone().map_err(RestoreError::io(path, "write"))?))
    };
    let (found, page_hashes) = execution.blocking(finish).await?;
    if found == plan.fingerprint {
        Ok(Restored { page_hashes, extents_len_bytes })
    } else {
        Err(RestoreError::FingerprintMismatch { position: plan.position, expected: plan.fingerprint, found })
    }
}

struct Execution<'a> {
    store: &'a SharedStore,
    plan: &'a Plan,
    path: &'a Path,
    /// Away only while a thread works on it.
    image: Option<Image>,
}

impl Execution<'_> {
    /// Decodes and writes on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Image, &Path) -> Result<T, RestoreError> + Send + 'static,
    ) -> Result<T, RestoreError> {
        let lost = || RestoreError::io(self.path, "write")(io::Error::other("an internal error ended the restore"));
        let mut image = self.image.take().ok_or_else(lost)?;
        let path = self.path.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut image, &path);
            (image, result)
        })
        .await;
        let (image, result) = done.map_err(|_| lost())?;
        self.image = Some(image);
        result
    }

    /// Newest first.
    async fn apply_segments(&mut self) -> Result<(), RestoreError> {
        let (store, location) = (self.store, self.plan.location.as_str());
        let fetch = |planned: PlannedSegment| async move {
            let key = planned.stored.key;
            if planned.stored.len_bytes > SMALL_SEGMENT {
                return Ok((planned, None));
            }
            let whole = store.get(&key.to_string(), SMALL_SEGMENT).await;
            whole.map(|bytes| (planned, Some(bytes))).map_err(RestoreError::object(location, &key))
        };
        let newest_first = self.plan.segments.iter().rev().copied();
        let mut fetched = stream::iter(newest_first).map(fetch).buffered(SEGMENTS_IN_FLIGHT);
        while let Some(next) = fetched.next().await {
            match next? {
                (planned, Some(bytes)) => self.apply_small(planned, bytes).await?,
                (planned, None) => self.apply_large(planned).await?,
            }
        }
        Ok(())
    }

    async fn apply_small(&mut self, planned: PlannedSegment, bytes: Bytes) -> Result<(), RestoreError> {
        let PlannedSegment { stored, last_txid } = planned;
        let (location, page_size) = (self.plan.location.clone(), self.plan.page_size);
        self.blocking(move |image, path| {
            let bad = || RestoreError::format(&location, &stored.key);
            let footer = SegmentFooter::decode(&bytes, bytes.len() as u64).map_err(bad())?;
            check_segment(&footer, &stored.key, &location, page_size)?;
            // Everything is checked before anything of it is written.
            let segment = Segment::decode(&bytes, |_, _, _| {}).map_err(bad())?;
            let selected = image.select(&segment.transactions, last_txid);
            if !selected.contains(&true) {
                return Ok(());
            }
            let mut selected = selected.into_iter();
            let mut written = Ok(());
            Segment::decode(&bytes, |_, page_number, page| {
                if selected.next() == Some(true) && written.is_ok() {
                    written = image.write(page_number, page);
                }
            })
            .map_err(bad())?;
            written.map_err(RestoreError::io(path, "write"))
        })
        .await
    }

    /// Block by block: a single transaction can be larger than memory.
    async fn apply_large(&mut self, planned: PlannedSegment) -> Result<(), RestoreError> {
        let PlannedSegment { stored, last_txid } = planned;
        let location = self.plan.location.clone();
        let (footer, transactions) = read_table(self.store, &location, &stored).await?;
        check_segment(&footer, &stored.key, &location, self.plan.page_size)?;
        let page_numbers: Vec<u32> =
            transactions.iter().flat_map(|transaction| transaction.page_numbers.iter().copied()).collect();
        let selected = self.blocking(move |image, _| Ok(image.select(&transactions, last_txid))).await?;
        // Nothing behind the last image that is wanted need be read.
        let Some(last_wanted) = selected.iter().rposition(|&is_wanted| is_wanted) else { return Ok(()) };
        let bad = || RestoreError::format(&location, &stored.key);
        let mut blocks = Blocks::of(self.store, &location, stored.key, &footer);
        let mut pages = PageStream::new(&footer).map_err(bad())?;
        let mut due = page_numbers.into_iter().zip(selected).collect::<Vec<_>>().into_iter();
        let mut seen = 0;
        while seen <= last_wanted
            && let Some(block) = blocks.next().await?
        {
            let key = stored.key;
            let place = location.clone();
            (pages, due, seen) = self
                .blocking(move |image, path| {
                    let (images, _) = pages.read_block(&block).map_err(RestoreError::format(&place, &key))?;
                    for page in images {
                        let too_many = || RestoreError::damaged(&place, &key, &"it has more pages than its table");
                        let (page_number, is_wanted) = due.next().ok_or_else(too_many)?;
                        if is_wanted {
                            image.write(page_number, page).map_err(RestoreError::io(path, "write"))?;
                        }
                        seen += 1;
                    }
                    Ok((pages, due, seen))
                })
                .await?;
        }
        if seen > last_wanted {
            Ok(())
        } else {
            Err(RestoreError::damaged(&location, &stored.key, &"it has fewer pages than its table"))
        }
    }

    /// Gives the length of all extents.
    async fn apply_snapshot(&mut self) -> Result<u64, RestoreError> {
        let (store, location) = (self.store, self.plan.location.clone());
        let index = self.snapshot_index().await?;
        let extents_len_bytes = index.extents.iter().map(|extent| u64::from(extent.compressed_len)).sum();
        let batches = self.image.as_ref().map(|image| batches(&index, image)).unwrap_or_default();
        let (sources, place) = (&index.sources, location.as_str());
        let fetch = |batch: Batch| async move {
            let key = sources[batch.source as usize];
            let range = store.get_range(&key.to_string(), batch.offset, batch.len_bytes).await;
            range.map(|bytes| (key, batch, bytes)).map_err(RestoreError::object(place, &key))
        };
        let mut fetched = stream::iter(batches).map(fetch).buffered(BATCHES_IN_FLIGHT);
        while let Some(next) = fetched.next().await {
            let (key, batch, bytes) = next?;
            let place = location.clone();
            self.blocking(move |image, path| {
                for (number, extent) in &batch.extents {
                    let at = (extent.offset - batch.offset) as usize;
                    let compressed = &bytes[at..at + extent.compressed_len as usize];
                    let content = decode_extent(*number, extent, compressed, image.page_size);
                    let content = content.map_err(RestoreError::format(&place, &key))?;
                    let (first_page, _) = extent_pages(*number, u32::MAX, image.page_size);
                    image.write_extent(first_page, &content).map_err(RestoreError::io(path, "write"))?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(extents_len_bytes)
    }

    async fn snapshot_index(&self) -> Result<SnapshotIndex, RestoreError> {
        read_index(self.store, &self.plan.location, &self.plan.snapshot_footer).await
    }
}

/// Reads a snapshot's header and index.
///
/// # Errors
/// When the store fails, or one of the two is damaged.
pub(crate) async fn read_index(
    store: &SharedStore,
    location: &str,
    footer: &SnapshotFooter,
) -> Result<SnapshotIndex, RestoreError> {
    let key = &footer.info.key;
    let header = store.get_range(&key.to_string(), 0, HEADER_LEN as u64).await;
    let header = header.map_err(RestoreError::object(location, key))?;
    check_snapshot_header(&header, footer.page_size).map_err(RestoreError::format(location, key))?;
    let blocks = store.get_range(&key.to_string(), footer.index_offset, footer.index_and_sources_len()).await;
    let blocks = blocks.map_err(RestoreError::object(location, key))?;
    footer.decode_index(&blocks).map_err(RestoreError::format(location, key))
}

/// The page blocks of a large segment, fetched one after another, each with the header of the next one.
pub(crate) struct Blocks<'a> {
    store: &'a SharedStore,
    location: &'a str,
    key: SegmentKey,
    at: u64,
    end: u64,
    /// The header of the next block; empty before the first.
    header: Bytes,
}

impl<'a> Blocks<'a> {
    pub(crate) fn of(store: &'a SharedStore, location: &'a str, key: SegmentKey, footer: &SegmentFooter) -> Self {
        Self { store, location, key, at: footer.pages_offset, end: footer.table_offset(), header: Bytes::new() }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RestoreError> {
        let left = self.end - self.at;
        if left == 0 {
            return Ok(None);
        }
        if self.header.is_empty() {
            self.header = self.fetch(left.min(BLOCK_HEADER_LEN as u64)).await?;
        }
        let header = BlockHeader::decode(&self.header, "the segment's pages")
            .map_err(RestoreError::format(self.location, &self.key))?;
        let len = BLOCK_HEADER_LEN + header.compressed_len;
        if len as u64 > left {
            return Err(RestoreError::damaged(self.location, &self.key, &"a block runs into its table"));
        }
        let mut block = self.fetch(left.min((len + BLOCK_HEADER_LEN) as u64)).await?;
        self.header = block.split_off(len);
        self.at += len as u64;
        Ok(Some(block))
    }

    async fn fetch(&self, len: u64) -> Result<Bytes, RestoreError> {
        let range = self.store.get_range(&self.key.to_string(), self.at, len).await;
        range.map_err(RestoreError::object(self.location, &self.key))
    }
}

fn check_segment(footer: &SegmentFooter, key: &SegmentKey, location: &str, page_size: u32) -> Result<(), RestoreError> {
    check_footer(footer, key, location)?;
    if footer.page_size == page_size {
        Ok(())
    } else {
        Err(RestoreError::damaged(location, key, &"its page size is not that of the snapshot"))
    }
}

/// Extents that one request fetches.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Number of the object in the index's list of sources.
    pub(crate) source: u32,
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    /// Each with its number in the index.
    pub(crate) extents: Vec<(u32, ExtentRecord)>,
}

/// The extents that hold pages still wanted.
fn batches(index: &SnapshotIndex, image: &Image) -> Vec<Batch> {
    let is_wanted = |&(number, extent): &(u32, ExtentRecord)| {
        let (first_page, _) = extent_pages(number, u32::MAX, image.page_size);
        (first_page..first_page.saturating_add(extent.page_count)).any(|page_number| image.wants(page_number))
    };
    batches_of((0..).zip(index.extents.iter().copied()).filter(is_wanted).collect())
}

/// Neighbours in an object together, in whatever order they lie there.
pub(crate) fn batches_of(mut extents: Vec<(u32, ExtentRecord)>) -> Vec<Batch> {
    extents.sort_by_key(|(_, extent)| (extent.source, extent.offset));
    let mut batches: Vec<Batch> = Vec::new();
    for (number, extent) in extents {
        let end = extent.offset + u64::from(extent.compressed_len);
        match batches.last_mut() {
            Some(batch)
                if batch.source == extent.source
                    && extent.offset - (batch.offset + batch.len_bytes).min(extent.offset) <= EXTENT_GAP_LEN
                    && end - batch.offset <= EXTENT_BATCH_LEN =>
            {
                batch.len_bytes = batch.len_bytes.max(end - batch.offset);
                batch.extents.push((number, extent));
            }
            _ => batches.push(Batch {
                source: extent.source,
                offset: extent.offset,
                len_bytes: end - extent.offset,
                extents: vec![(number, extent)],
            }),
        }
    }
    batches
}
