//! Reading every block of segments and every extent of snapshots, or a random share of them.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use tokio::sync::Semaphore;
use xxhash_rust::xxh3::xxh3_64;

use super::budget::Budget;
use super::random::Numbers;
use super::survey::{REQUESTS_IN_FLIGHT, Survey, damage};
use crate::format::key::{SegmentKey, SnapshotKey};
use crate::format::segment::{PageStream, Segment, check_segment_header};
use crate::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotIndex, decode_extent};
use crate::format::{FormatError, HEADER_LEN};
use crate::restore::RestoreError;
use crate::restore::extents::{Batch, batches, read_index};
use crate::restore::history::Stored;
use crate::restore::segments::Blocks;
use crate::restore::tail::{check_footer, read_table};
use crate::retain::tails::Tail;
use crate::store::SharedStore;

/// A segment up to this size is read whole; as many of them at a time as requests are.
const SMALL_SEGMENT: u64 = 4 << 20;
/// Of what takes memory, so many are under way at a time: large segments and snapshots.
const LARGE_AT_A_TIME: usize = 2;
/// So many batches of a snapshot's extents are fetched at a time.
const BATCHES_IN_FLIGHT: usize = 2;

/// What is read as one.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Segment(Stored<SegmentKey>),
    Snapshot(Stored<SnapshotKey>, SnapshotFooter),
}

/// Content that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Damage {
    /// The segment, and what is wrong.
    Segment(SegmentKey, String),
    /// The snapshot whose extent it is, the object that it is in, and what is wrong.
    Extent(SnapshotKey, String, String),
}

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) damages: BTreeSet<Damage>,
    pub(super) segments: u64,
    pub(super) segments_of: u64,
    pub(super) blocks: u64,
    pub(super) snapshots: u64,
    pub(super) snapshots_of: u64,
    pub(super) extents: u64,
    /// Units that there was no time for, by name.
    pub(super) not_reached: Vec<String>,
}

/// What became of a unit.
#[derive(Default)]
struct Done {
    damages: Vec<Damage>,
    blocks: u64,
    extents: u64,
    is_reached: bool,
}

/// Reads a share of all units: first what is needed, then the rest, each in random order.
pub(super) async fn read(
    store: &SharedStore,
    survey: &Survey,
    is_needed: impl Fn(&Need) -> bool,
    share: f64,
    budget: &Budget,
    seed: u64,
) -> Result<Read, RestoreError> {
    let mut numbers = Numbers::new(seed);
    let (mut first, mut rest) = units(survey).into_iter().partition::<Vec<Unit>, _>(|unit| is_needed(&unit.need()));
    let mut read = Read::default();
    for unit in first.iter().chain(&rest) {
        match unit {
            Unit::Segment(_) => read.segments_of += 1,
            Unit::Snapshot(..) => read.snapshots_of += 1,
        }
    }
    let reader = Reader {
        store,
        location: &survey.history.location,
        share,
        budget,
        large: Semaphore::new(LARGE_AT_A_TIME),
        checked: Mutex::default(),
        seed,
    };
    for units in [&mut first, &mut rest] {
        numbers.shuffle(units);
        // Extents are chosen one by one.
        units.retain(|unit| matches!(unit, Unit::Snapshot(..)) || numbers.is_in(share));
        let reader = &reader;
        let check = |unit: Unit| async move { (unit, reader.check(unit).await) };
        let mut answers = stream::iter(std::mem::take(units)).map(check).buffer_unordered(REQUESTS_IN_FLIGHT);
        while let Some((unit, done)) = answers.next().await {
            read.add(unit, done?);
        }
    }
    Ok(read)
}

/// What may be needed: an object that a unit is about.
pub(super) enum Need {
    Segment(SegmentKey),
    Snapshot(SnapshotKey),
}

impl Unit {
    fn need(&self) -> Need {
        match self {
            Self::Segment(stored) => Need::Segment(stored.key),
            Self::Snapshot(stored, _) => Need::Snapshot(stored.key),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Segment(stored) => stored.key.to_string(),
            Self::Snapshot(stored, _) => stored.key.to_string(),
        }
    }
}

impl Read {
    fn add(&mut self, unit: Unit, done: Done) {
        self.damages.extend(done.damages);
        self.blocks += done.blocks;
        self.extents += done.extents;
        if !done.is_reached {
            self.not_reached.push(unit.name());
            return;
        }
        match unit {
            Unit::Segment(_) => self.segments += 1,
            Unit::Snapshot(..) => self.snapshots += 1,
        }
    }
}

/// Segments whose table, and snapshots whose end and index can be read: what is wrong with the others is told already.
fn units(survey: &Survey) -> Vec<Unit> {
    let mut units = Vec::new();
    for epoch in survey.history.epochs.values() {
        let is_sound = |stored: &&Stored<SegmentKey>| !matches!(survey.tables.get(&stored.key), Some(Err(_)));
        units.extend(epoch.segments.iter().filter(is_sound).map(|stored| Unit::Segment(*stored)));
        for stored in &epoch.snapshots {
            if let Some(Tail::Whole(tail)) = survey.tails.get(&stored.key)
                && !survey.wrong_indexes.contains_key(&stored.key)
            {
                units.push(Unit::Snapshot(*stored, tail.footer));
            }
        }
    }
    units
}

struct Reader<'a> {
    store: &'a SharedStore,
    location: &'a str,
    share: f64,
    budget: &'a Budget,
    large: Semaphore,
    /// Extents that were looked at already, by a hash of where they are and what they hold: snapshots share them.
    checked: Mutex<HashSet<u64>>,
    seed: u64,
}

impl Reader<'_> {
    async fn check(&self, unit: Unit) -> Result<Done, RestoreError> {
        if self.budget.is_over() {
            return Ok(Done::default());
        }
        match unit {
            Unit::Segment(stored) => {
                let mut done = Done { is_reached: true, ..Done::default() };
                let Some(checked) = self.budget.within(self.segment(&stored)).await else { return Ok(Done::default()) };
                match checked {
                    Ok(blocks) => done.blocks = blocks,
                    Err(error) => done.damages.push(Damage::Segment(stored.key, damage(error)?)),
                }
                Ok(done)
            }
            Unit::Snapshot(stored, footer) => {
                let _permit = self.large.acquire().await;
                let checked = self.budget.within(self.snapshot(&stored, &footer)).await;
                checked.unwrap_or_else(|| Ok(Done::default()))
            }
        }
    }

    /// Checks all blocks of a segment; gives how many there are.
    async fn segment(&self, stored: &Stored<SegmentKey>) -> Result<u64, RestoreError> {
        if stored.len_bytes > SMALL_SEGMENT {
            let _permit = self.large.acquire().await;
            return self.large_segment(stored).await;
        }
        let key = stored.key;
        let bytes = self.store.get(&key.to_string(), SMALL_SEGMENT).await;
        let bytes = bytes.map_err(RestoreError::object(self.location, &key))?;
        let decoded = blocking(move || Segment::decode(&bytes, |_, _, _| {})).await?;
        let segment = decoded.map_err(RestoreError::format(self.location, &key))?;
        check_footer(&segment.footer, &key, self.location)?;
        Ok(u64::from(segment.footer.page_block_count))
    }

    /// Block by block: a single transaction can be larger than memory.
    async fn large_segment(&self, stored: &Stored<SegmentKey>) -> Result<u64, RestoreError> {
        let (key, location) = (stored.key, self.location);
        let bad = || RestoreError::format(location, &key);
        let (footer, table) = read_table(self.store, location, stored).await?;
        let header = self.store.get_range(&key.to_string(), 0, HEADER_LEN as u64).await;
        let header = header.map_err(RestoreError::object(location, &key))?;
        check_segment_header(&header, &footer).map_err(bad())?;
        let mut blocks = Blocks::of(self.store, location, key, footer.pages_offset..footer.table_offset());
        for run in &table.runs {
            let mut pages = PageStream::new(footer.page_size, table.places(run)).map_err(bad())?;
            let mut left = run.bytes.end - run.bytes.start;
            let mut count = 0;
            while left > 0 {
                let Some(some) = blocks.next(left).await? else { break };
                left -= some.len() as u64;
                let read = blocking(move || read_blocks(pages, &some)).await?;
                let block_count;
                (pages, block_count) = read.map_err(bad())?;
                count += block_count;
            }
            if left > 0 || pages.next_place().is_some() || count != run.block_count {
                return Err(RestoreError::damaged(location, &key, &"its pages and its table contradict each other"));
            }
        }
        Ok(u64::from(footer.page_block_count))
    }

    /// Checks the extents of a snapshot, wherever they are.
    async fn snapshot(&self, stored: &Stored<SnapshotKey>, footer: &SnapshotFooter) -> Result<Done, RestoreError> {
        let mut done = Done { is_reached: true, ..Done::default() };
        let index = match read_index(self.store, self.location, footer).await {
            Ok(index) => index,
            Err(error) => {
                done.damages.push(Damage::Extent(stored.key, stored.key.to_string(), damage(error)?));
                return Ok(done);
            }
        };
        let batches = batches(self.choose(&index));
        let sources = &index.sources;
        let fetch = |batch: Batch| async move {
            let key = sources[batch.source as usize];
            let bytes = self.store.get_range(&key.to_string(), batch.offset, batch.len_bytes).await;
            (key, batch, bytes)
        };
        let mut fetched = stream::iter(batches).map(fetch).buffered(BATCHES_IN_FLIGHT);
        while let Some((key, batch, bytes)) = fetched.next().await {
            let count = batch.extents.len() as u64;
            let checked = match bytes {
                Ok(bytes) => {
                    let page_size = footer.page_size;
                    blocking(move || check_batch(&batch, &bytes, page_size))
                        .await?
                        .map_err(RestoreError::format(self.location, &key))
                }
                Err(error) => Err(RestoreError::object(self.location, &key)(error)),
            };
            done.extents += count;
            if let Err(error) = checked {
                done.damages.push(Damage::Extent(stored.key, key.to_string(), damage(error)?));
            }
        }
        Ok(done)
    }

    /// The extents that are read: of those that were not looked at before a random share. Whether one is in it depends on nothing
    /// but the seed and the extent, so that a seed repeats the choice in whatever order answers come.
    fn choose(&self, index: &SnapshotIndex) -> Vec<(u32, ExtentRecord)> {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_chosen = |(number, extent): &(u32, ExtentRecord)| {
            let identity = identity(*number, extent, index.sources[extent.source as usize]);
            checked.insert(identity) && Numbers::new(self.seed ^ identity).is_in(self.share)
        };
        (0..).zip(index.extents.iter().copied()).filter(|extent| is_chosen(extent)).collect()
    }
}

/// Reads whole blocks of a run; gives how many there were.
fn read_blocks(mut pages: PageStream, mut blocks: &[u8]) -> Result<(PageStream, u32), FormatError> {
    let mut count = 0;
    while !blocks.is_empty() {
        let len = pages.read_block(blocks)?;
        while pages.next_content().is_some() {}
        blocks = &blocks[len..];
        count += 1;
    }
    Ok((pages, count))
}

fn check_batch(batch: &Batch, bytes: &Bytes, page_size: u32) -> Result<(), FormatError> {
    for (number, extent) in &batch.extents {
        let at = (extent.offset - batch.offset) as usize;
        decode_extent(*number, extent, &bytes[at..at + extent.compressed_len as usize], page_size)?;
    }
    Ok(())
}

/// What tells one extent from another.
fn identity(number: u32, extent: &ExtentRecord, source: SnapshotKey) -> u64 {
    let long = [source.txid, source.time_ms, extent.offset, extent.content_hash].map(u64::to_le_bytes).concat();
    let short =
        [source.epoch, number, extent.compressed_len, extent.crc32, extent.page_count].map(u32::to_le_bytes).concat();
    xxh3_64(&[long, short].concat())
}

/// Does what takes a processor on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RestoreError> {
    let lost = |_| {
        let place = std::env::temp_dir();
        RestoreError::io(&place, "check")(io::Error::other("an internal error ended the check"))
    };
    tokio::task::spawn_blocking(work).await.map_err(lost)
}
