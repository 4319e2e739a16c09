//! The part of a restore that writes segments' pages. Which image of a page counts is decided from the segments' tables, one
//! segment after another, newest first; fetching, decoding and writing them goes on at the same time.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::task::JoinSet;

use super::RestoreError;
use super::execute::Execution;
use super::run::PlannedSegment;
use super::tail::{check_footer, read_table};
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader};
use crate::format::key::SegmentKey;
use crate::format::segment::{PageStream, Segment, SegmentFooter, Transaction};
use crate::store::SharedStore;

/// A segment up to this size is fetched whole.
pub(crate) const SMALL_SEGMENT: u64 = 1 << 20;
/// So many segments' tables, or whole small segments, are fetched at a time.
const HEADS_IN_FLIGHT: usize = 8;
/// The pages of larger ones are fetched in pieces of so many bytes,
const PIECE_LEN: u64 = 4 << 20;
/// so many at a time,
const PIECES_IN_FLIGHT: usize = 3;
/// of so many segments at a time: each decoder may need a window of 32 MiB.
const LARGE_AT_A_TIME: usize = 2;

/// What is needed to choose a segment's pages, and, of a small one, everything.
struct Head {
    planned: PlannedSegment,
    footer: SegmentFooter,
    transactions: Vec<Transaction>,
    whole: Option<Bytes>,
}

/// Writes all segments' pages.
pub(super) async fn apply(execution: &Arc<Execution>) -> Result<(), RestoreError> {
    let newest_first = execution.plan.segments.iter().rev().copied();
    let mut heads = stream::iter(newest_first).map(|planned| head(execution, planned)).buffered(HEADS_IN_FLIGHT);
    let mut writing = JoinSet::new();
    while let Some(next) = heads.next().await {
        let Head { planned, footer, transactions, whole } = next?;
        let selected = execution.image.select(&transactions, planned.last_txid);
        // Nothing behind the last image that is wanted need be read.
        let Some(last_wanted) = selected.iter().rposition(|&is_wanted| is_wanted) else { continue };
        let at_a_time = if whole.is_some() { execution.decoders } else { LARGE_AT_A_TIME };
        while writing.len() >= at_a_time {
            finished(writing.join_next().await)?;
        }
        let (execution, key) = (execution.clone(), planned.stored.key);
        match whole {
            Some(bytes) => drop(writing.spawn(async move { write_whole(&execution, key, bytes, selected).await })),
            None => {
                let page_numbers = transactions.into_iter().flat_map(|transaction| transaction.page_numbers);
                let due = page_numbers.zip(selected).take(last_wanted + 1).collect();
                drop(writing.spawn(async move { write_in_pieces(&execution, key, &footer, due).await }));
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
        let (footer, transactions) = read_table(store, location, &stored).await?;
        check_segment(&footer, &stored.key, location, page_size)?;
        return Ok(Head { planned, footer, transactions, whole: None });
    }
    let whole = store.get(&stored.key.to_string(), SMALL_SEGMENT).await;
    let whole = whole.map_err(RestoreError::object(location, &stored.key))?;
    let bad = || RestoreError::format(location, &stored.key);
    let footer = SegmentFooter::decode(&whole, whole.len() as u64).map_err(bad())?;
    check_segment(&footer, &stored.key, location, page_size)?;
    // The footer's lengths add up to the object's, so these are inside.
    let table = footer.table_offset() as usize..footer.table_offset() as usize + footer.table_len as usize;
    let transactions = footer.decode_table(&whole[table]).map_err(bad())?;
    Ok(Head { planned, footer, transactions, whole: Some(whole) })
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
    selected: Vec<bool>,
) -> Result<(), RestoreError> {
    let write = move |execution: &Execution| {
        let mut selected = selected.into_iter();
        let mut written = Ok(());
        let decoded = Segment::decode(&bytes, |_, page_number, page| {
            if selected.next() == Some(true) && written.is_ok() {
                written = execution.image.write(page_number, page);
            }
        });
        decoded.map_err(RestoreError::format(&execution.plan.location, &key))?;
        written
    };
    execution.blocking(write).await
}

/// Block by block: a single transaction can be larger than memory. `due` are the numbers of the pages, in the order of the
/// blocks, and whether they are wanted.
async fn write_in_pieces(
    execution: &Arc<Execution>,
    key: SegmentKey,
    footer: &SegmentFooter,
    due: Vec<(u32, bool)>,
) -> Result<(), RestoreError> {
    let location = &execution.plan.location;
    let mut blocks = Blocks::of(&execution.store, location, key, footer);
    let mut pages = PageStream::new(footer).map_err(RestoreError::format(location, &key))?;
    let mut due = due.into_iter();
    while due.len() > 0 {
        let Some(block) = blocks.next().await? else {
            return Err(RestoreError::damaged(location, &key, &"it has fewer pages than its table"));
        };
        let write = move |execution: &Execution| {
            let (images, _) = pages.read_block(&block).map_err(RestoreError::format(&execution.plan.location, &key))?;
            for image in images {
                // Behind the last one that is wanted there may be more.
                let Some((page_number, is_wanted)) = due.next() else { break };
                if is_wanted {
                    execution.image.write(page_number, image)?;
                }
            }
            Ok((pages, due))
        };
        (pages, due) = execution.blocking(write).await?;
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
    /// Bytes of blocks that are not handed out yet.
    left: u64,
}

impl<'a> Blocks<'a> {
    pub(crate) fn of(store: &'a SharedStore, location: &'a str, key: SegmentKey, footer: &SegmentFooter) -> Self {
        let (from, to) = (footer.pages_offset, footer.table_offset());
        let ranges = (from..to).step_by(PIECE_LEN as usize).map(move |at| (at, PIECE_LEN.min(to - at)));
        let fetch = move |(at, len_bytes)| async move {
            let piece = store.get_range(&key.to_string(), at, len_bytes).await;
            piece.map_err(RestoreError::object(location, &key))
        };
        let pieces = stream::iter(ranges).map(fetch).buffered(PIECES_IN_FLIGHT).boxed();
        Self { location, key, pieces, unread: BytesMut::new(), left: to - from }
    }

    /// The next block, with its header; `None` after the last one.
    ///
    /// # Errors
    /// When the store fails, or a block's header can't be right.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RestoreError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.read_ahead(BLOCK_HEADER_LEN).await?;
        let header = BlockHeader::decode(&self.unread, "the segment's pages")
            .map_err(RestoreError::format(self.location, &self.key))?;
        let len = BLOCK_HEADER_LEN + header.compressed_len;
        self.read_ahead(len).await?;
        if self.unread.len() < len {
            return Err(RestoreError::damaged(self.location, &self.key, &"a block runs into its table"));
        }
        self.left -= len as u64;
        Ok(Some(self.unread.split_to(len).freeze()))
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
