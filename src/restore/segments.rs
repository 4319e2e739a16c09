//! The part of a restore that writes segments' pages. Which image of a page counts is decided from the segments' tables, one
//! segment after another, newest first; fetching, decoding and writing them goes on at the same time.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::task::JoinSet;

use super::RestoreError;
use super::execute::Execution;
use super::image::Image;
use super::run::PlannedSegment;
use super::tail::{check_footer, read_table};
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader};
use crate::format::key::SegmentKey;
use crate::format::segment::{PageStream, Run, SegmentFooter, Table, check_segment_header};
use crate::store::SharedStore;

/// A segment up to this size is fetched whole.
pub(crate) const SMALL_SEGMENT: u64 = 4 << 20;
/// So many segments' tables, or whole small segments, are fetched at a time.
const HEADS_IN_FLIGHT: usize = 6;
/// The pages of larger ones are fetched in pieces of so many bytes,
const PIECE_LEN: u64 = 8 << 20;
/// so many at a time,
const PIECES_IN_FLIGHT: usize = 2;
/// of so many segments at a time.
const LARGE_AT_A_TIME: usize = 2;

/// What is needed to choose a segment's pages, and, of a small one, everything.
struct Head {
    planned: PlannedSegment,
    footer: SegmentFooter,
    table: Table,
    whole: Option<Bytes>,
}

/// Neighbours are written together up to so many bytes.
const WRITE_LEN: usize = 256 << 10;

/// Writes all segments' pages.
pub(super) async fn apply(execution: &Arc<Execution>) -> Result<(), RestoreError> {
    let newest_first = execution.plan.segments.iter().rev().copied();
    let mut heads = stream::iter(newest_first).map(|planned| head(execution, planned)).buffered(HEADS_IN_FLIGHT);
    let mut writing = JoinSet::new();
    while let Some(next) = heads.next().await {
        let Head { planned, footer, table, whole } = next?;
        let selected = execution.image.select(&table.transactions, planned.last_txid);
        if !selected.contains(&true) {
            continue;
        }
        let at_a_time = if whole.is_some() { execution.decoders } else { LARGE_AT_A_TIME };
        while writing.len() >= at_a_time {
            finished(writing.join_next().await)?;
        }
        let (execution, key) = (execution.clone(), planned.stored.key);
        match whole {
            Some(bytes) => {
                drop(writing.spawn(async move { write_whole(&execution, key, bytes, table, selected).await }))
            }
            None => {
                drop(writing.spawn(async move { write_in_pieces(&execution, key, &footer, table, selected).await }))
            }
        }
    }
    while !writing.is_empty() {
        finished(writing.join_next().await)?;
    }
    Ok(())
}

fn finished(ended: Option<Result<Result<(), RestoreError>, tokio::task::JoinError>>) -> Result<(), RestoreError> {
    match ended {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(RestoreError::Internal(error.to_string())),
    }
}

async fn head(execution: &Arc<Execution>, planned: PlannedSegment) -> Result<Head, RestoreError> {
    let (store, location, stored) = (&execution.store, execution.plan.location.as_str(), planned.stored);
    let page_size = execution.plan.page_size;
    if stored.len_bytes > SMALL_SEGMENT {
        let (footer, table) = read_table(store, location, &stored).await?;
        check_segment(&footer, &stored.key, location, page_size)?;
        return Ok(Head { planned, footer, table, whole: None });
    }
    let whole = store.get(&stored.key.to_string(), SMALL_SEGMENT).await;
    let whole = whole.map_err(RestoreError::object(location, &stored.key))?;
    let bad = || RestoreError::format(location, &stored.key);
    let footer = SegmentFooter::decode(&whole, whole.len() as u64).map_err(bad())?;
    check_segment(&footer, &stored.key, location, page_size)?;
    check_segment_header(&whole, &footer).map_err(bad())?;
    // The footer's lengths add up to the object's, so these are inside.
    let table = footer.table_offset() as usize..footer.table_offset() as usize + footer.table_len as usize;
    let table = footer.decode_table(&whole[table]).map_err(bad())?;
    Ok(Head { planned, footer, table, whole: Some(whole) })
}

fn check_segment(footer: &SegmentFooter, key: &SegmentKey, location: &str, page_size: u32) -> Result<(), RestoreError> {
    check_footer(footer, key, location)?;
    if footer.page_size == page_size {
        Ok(())
    } else {
        Err(RestoreError::damaged(location, key, &"its page size is not that of the snapshot"))
    }
}

async fn write_whole(
    execution: &Arc<Execution>,
    key: SegmentKey,
    bytes: Bytes,
    table: Table,
    selected: Vec<bool>,
) -> Result<(), RestoreError> {
    let write = move |execution: &Execution| {
        for run in &table.runs {
            let mut writer = RunWriter::new(execution, key, &table, run)?;
            // The runs lie inside, as the footer does.
            writer.take(execution, &bytes[run.bytes.start as usize..run.bytes.end as usize], &selected)?;
            writer.finish(execution)?;
        }
        Ok(())
    };
    execution.blocking(write).await
}

/// Piece by piece: a single transaction can be larger than memory. Runs of which nothing is wanted are not decoded; those before
/// the first and after the last that is wanted are not fetched.
async fn write_in_pieces(
    execution: &Arc<Execution>,
    key: SegmentKey,
    footer: &SegmentFooter,
    table: Table,
    selected: Vec<bool>,
) -> Result<(), RestoreError> {
    let location = &execution.plan.location;
    let is_wanted = |run: &&Run| selected[run.first_image..run.first_image + run.page_count].contains(&true);
    let wanted: Vec<Run> = table.runs.iter().filter(is_wanted).cloned().collect();
    let from = wanted.first().map_or(footer.table_offset(), |run| run.bytes.start);
    let to = wanted.last().map_or(from, |run| run.bytes.end);
    let mut blocks = Blocks::of(&execution.store, location, key, from..to);
    let selected = Arc::new(selected);
    for run in wanted {
        blocks.skip_to(run.bytes.start).await?;
        let mut writer = RunWriter::new(execution, key, &table, &run)?;
        let mut left = run.bytes.end - run.bytes.start;
        while left > 0 {
            let Some(some) = blocks.next(left).await? else { break };
            left -= some.len() as u64;
            let selected = selected.clone();
            let write = move |execution: &Execution| writer.take(execution, &some, &selected).map(|()| writer);
            writer = execution.blocking(write).await?;
        }
        execution.blocking(move |execution| writer.finish(execution)).await?;
    }
    Ok(())
}

/// Writes those images of a run that are selected. They come in the order of their pages, so neighbours go in one write.
struct RunWriter {
    key: SegmentKey,
    pages: PageStream,
    first_page: u32,
    neighbours: Vec<u8>,
}

impl RunWriter {
    fn new(execution: &Execution, key: SegmentKey, table: &Table, run: &Run) -> Result<Self, RestoreError> {
        let pages = PageStream::new(execution.image.page_size, table.places(run));
        let pages = pages.map_err(RestoreError::format(&execution.plan.location, &key))?;
        Ok(Self { key, pages, first_page: 0, neighbours: Vec::new() })
    }

    /// Takes whole blocks.
    fn take(&mut self, execution: &Execution, mut blocks: &[u8], selected: &[bool]) -> Result<(), RestoreError> {
        while !blocks.is_empty() {
            let len = self.pages.read_block(blocks);
            blocks = &blocks[len.map_err(RestoreError::format(&execution.plan.location, &self.key))?..];
            while let Some((place, image)) = self.pages.next_image() {
                if !selected[place.image as usize] {
                    continue;
                }
                let goes_on =
                    self.first_page as usize + self.neighbours.len() / image.len() == place.page_number as usize;
                if !goes_on || self.neighbours.len() >= WRITE_LEN {
                    write_out(&execution.image, self.first_page, &mut self.neighbours)?;
                    self.first_page = place.page_number;
                }
                self.neighbours.extend_from_slice(image);
            }
        }
        Ok(())
    }

    fn finish(mut self, execution: &Execution) -> Result<(), RestoreError> {
        write_out(&execution.image, self.first_page, &mut self.neighbours)?;
        match self.pages.next_place() {
            None => Ok(()),
            Some(_) => {
                let what = "it has fewer pages than its table";
                Err(RestoreError::damaged(&execution.plan.location, &self.key, &what))
            }
        }
    }
}

fn write_out(image: &Image, first_page: u32, images: &mut Vec<u8>) -> Result<(), RestoreError> {
    if !images.is_empty() {
        image.write(first_page, images)?;
        images.clear();
    }
    Ok(())
}

/// The page blocks of a large segment, one after another, fetched in pieces ahead of the reader.
pub(crate) struct Blocks<'a> {
    location: &'a str,
    key: SegmentKey,
    pieces: BoxStream<'a, Result<Bytes, RestoreError>>,
    /// What is fetched and not handed out.
    unread: BytesMut,
    /// Where in the object the first of them was.
    at: u64,
    end: u64,
}

impl<'a> Blocks<'a> {
    pub(crate) fn of(store: &'a SharedStore, location: &'a str, key: SegmentKey, bytes: Range<u64>) -> Self {
        let (from, to) = (bytes.start, bytes.end);
        let ranges = (from..to).step_by(PIECE_LEN as usize).map(move |at| (at, PIECE_LEN.min(to - at)));
        let fetch = move |(at, len_bytes)| async move {
            let piece = store.get_range(&key.to_string(), at, len_bytes).await;
            piece.map_err(RestoreError::object(location, &key))
        };
        let pieces = stream::iter(ranges).map(fetch).buffered(PIECES_IN_FLIGHT).boxed();
        Self { location, key, pieces, unread: BytesMut::new(), at: from, end: to }
    }

    /// The next block, with its header, and those that are there already, `limit_bytes` at most; `None` after the last one.
    ///
    /// # Errors
    /// When the store fails, or a block's header can't be right.
    pub(crate) async fn next(&mut self, limit_bytes: u64) -> Result<Option<Bytes>, RestoreError> {
        if self.at == self.end {
            return Ok(None);
        }
        let first = self.block_len(0).await?;
        self.read_ahead(first).await?;
        if self.unread.len() < first || first as u64 > limit_bytes {
            return Err(RestoreError::damaged(self.location, &self.key, &"a block runs into what follows"));
        }
        let mut len = first;
        while self.unread.len() >= len + BLOCK_HEADER_LEN {
            let next = len + self.block_len(len).await?;
            if next > self.unread.len() || next as u64 > limit_bytes {
                break;
            }
            len = next;
        }
        self.at += len as u64;
        Ok(Some(self.unread.split_to(len).freeze()))
    }

    /// Length, with its header, of the block that begins `at` bytes from here.
    async fn block_len(&mut self, at: usize) -> Result<usize, RestoreError> {
        self.read_ahead(at + BLOCK_HEADER_LEN).await?;
        let header = BlockHeader::decode(self.unread.get(at..).unwrap_or_default(), "the segment's pages")
            .map_err(RestoreError::format(self.location, &self.key))?;
        Ok(BLOCK_HEADER_LEN + header.compressed_len)
    }

    /// Passes over what lies before an offset in the object.
    async fn skip_to(&mut self, offset: u64) -> Result<(), RestoreError> {
        while self.at < offset {
            self.read_ahead(1).await?;
            let len = self.unread.len().min((offset - self.at) as usize);
            if len == 0 {
                return Err(RestoreError::damaged(self.location, &self.key, &"a run is not where its table says"));
            }
            drop(self.unread.split_to(len));
            self.at += len as u64;
        }
        Ok(())
    }

    /// Until so many bytes are there, or all are.
    async fn read_ahead(&mut self, len: usize) -> Result<(), RestoreError> {
        while self.unread.len() < len
            && let Some(piece) = self.pieces.next().await
        {
            self.unread.extend_from_slice(&piece?);
        }
        Ok(())
    }
}
