//! The part of a restore that writes segments' pages. Which image of a page counts is decided from the segments' tables, one
//! segment after another, newest first; fetching, decoding and writing them goes on at the same time.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
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
const SMALL_SEGMENT: u64 = 1 << 20;
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

/// Piece by piece: a single transaction can be larger than memory. `due` are the numbers of the pages, in the order of the
/// blocks, and whether they are wanted.
async fn write_in_pieces(
    execution: &Arc<Execution>,
    key: SegmentKey,
    footer: &SegmentFooter,
    due: Vec<(u32, bool)>,
) -> Result<(), RestoreError> {
    let location = &execution.plan.location;
    let (store, from, to) = (&execution.store, footer.pages_offset, footer.table_offset());
    let ranges = (from..to).step_by(PIECE_LEN as usize).map(|at| (at, PIECE_LEN.min(to - at)));
    let fetch = |(at, len_bytes)| fetch(store, location, key, at, len_bytes);
    let mut pieces = stream::iter(ranges).map(fetch).buffered(PIECES_IN_FLIGHT);
    let mut state = Writing {
        key,
        pages: PageStream::new(footer).map_err(RestoreError::format(location, &key))?,
        due: due.into_iter(),
        unread: BytesMut::new(),
    };
    while state.due.len() > 0 {
        let Some(piece) = pieces.next().await else {
            return Err(RestoreError::damaged(location, &key, &"it has fewer pages than its table"));
        };
        state.unread.extend_from_slice(&piece?);
        let write = move |execution: &Execution| state.write_blocks(execution).map(|()| state);
        state = execution.blocking(write).await?;
    }
    Ok(())
}

async fn fetch(
    store: &SharedStore,
    location: &str,
    key: SegmentKey,
    at: u64,
    len_bytes: u64,
) -> Result<Bytes, RestoreError> {
    store.get_range(&key.to_string(), at, len_bytes).await.map_err(RestoreError::object(location, &key))
}

/// A large segment that is being written.
struct Writing {
    key: SegmentKey,
    pages: PageStream,
    due: std::vec::IntoIter<(u32, bool)>,
    /// What is fetched and not decoded: less than a block, between two pieces.
    unread: BytesMut,
}

impl Writing {
    /// Writes the blocks that are there whole.
    fn write_blocks(&mut self, execution: &Execution) -> Result<(), RestoreError> {
        let location = &execution.plan.location;
        let bad = || RestoreError::format(location, &self.key);
        while self.due.len() > 0 && self.unread.len() >= BLOCK_HEADER_LEN {
            let header = BlockHeader::decode(&self.unread, "the segment's pages").map_err(bad())?;
            if self.unread.len() < BLOCK_HEADER_LEN + header.compressed_len {
                break;
            }
            let (images, taken) = self.pages.read_block(&self.unread).map_err(bad())?;
            for image in images {
                // Behind the last one that is wanted there may be more.
                let Some((page_number, is_wanted)) = self.due.next() else { break };
                if is_wanted {
                    execution.image.write(page_number, image)?;
                }
            }
            self.unread.advance(taken);
        }
        Ok(())
    }
}
