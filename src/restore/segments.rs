//! The part of a restore that works segments off, oldest first: what a transaction changed in a page is told by what the page was
//! before. Those that follow are fetched meanwhile.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::RestoreError;
use super::execute::Execution;
use super::pages::{Open, RunReader, Since};
use super::run::PlannedSegment;
use super::tail::{check_footer, read_table};
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader};
use crate::format::key::SegmentKey;
use crate::format::segment::{Run, SegmentFooter, Table, check_segment_header};
use crate::store::SharedStore;

/// A segment up to this size is fetched whole, with one request: what a minute under load comes to.
const WHOLE_LEN: u64 = 12 << 20;
/// Segments that are fetched whole and not worked off yet, the one at work included, have no more bytes than this together.
const WHOLE_TOGETHER_LEN: u64 = 2 * WHOLE_LEN;
/// So many segments' tables, or whole segments, are fetched at a time.
const HEADS_IN_FLIGHT: usize = 6;
/// The pages of larger ones are fetched in pieces of so many bytes,
const PIECE_LEN: u64 = 8 << 20;
/// so many at a time.
const PIECES_IN_FLIGHT: usize = 2;

/// A segment's table, and, of one that is fetched whole, everything.
struct Head {
    planned: PlannedSegment,
    footer: SegmentFooter,
    table: Table,
    whole: Option<Bytes>,
    /// What it has of [`WHOLE_TOGETHER_LEN`], until it is worked off.
    _room: Option<OwnedSemaphorePermit>,
}

/// Works all segments off, on top of what the snapshot's extents hold.
pub(super) async fn apply(execution: &Arc<Execution>) -> Result<(), RestoreError> {
    let mut since = Since { txid: execution.plan.snapshot.key.txid, size_pages: u32::MAX };
    let admitted = admitted(execution.plan.segments.clone());
    let heads = admitted.map(|(planned, room)| head(execution, planned, room)).buffered(HEADS_IN_FLIGHT);
    let mut heads = pin!(heads);
    while let Some(next) = heads.next().await {
        let Head { planned, footer, table, whole, _room } = next?;
        let key = planned.stored.key;
        let segment = Arc::new(Open { key, table, since, last_txid: planned.last_txid });
        match whole {
            Some(bytes) => apply_whole(execution, &segment, bytes).await?,
            None => apply_in_pieces(execution, &segment, &footer).await?,
        }
        execution.image.progress.note_done(planned.stored.len_bytes);
        since = segment.since_after();
    }
    Ok(())
}

/// Each segment as soon as there is room for it; one that is fetched in pieces needs none. Room is given in the order of `segments`,
/// before any of their bytes is asked for: a later one can't hold what the next one waits for.
fn admitted(
    segments: Vec<PlannedSegment>,
) -> impl Stream<Item = (PlannedSegment, Option<OwnedSemaphorePermit>)> + Send {
    let room = Arc::new(Semaphore::new(WHOLE_TOGETHER_LEN as usize));
    stream::iter(segments).then(move |planned| {
        let len_bytes = planned.stored.len_bytes;
        let wanted = if len_bytes <= WHOLE_LEN { len_bytes as u32 } else { 0 };
        let room = room.clone();
        async move { (planned, room.acquire_many_owned(wanted).await.ok()) }
    })
}

async fn head(
    execution: &Arc<Execution>,
    planned: PlannedSegment,
    room: Option<OwnedSemaphorePermit>,
) -> Result<Head, RestoreError> {
    let (store, location, stored) = (&execution.store, execution.plan.location.as_str(), planned.stored);
    let page_size = execution.plan.page_size;
    if stored.len_bytes > WHOLE_LEN {
        let (footer, table) = read_table(store, location, &stored).await?;
        check_segment(&footer, &stored.key, location, page_size)?;
        return Ok(Head { planned, footer, table, whole: None, _room: room });
    }
    let whole = store.get(&stored.key.to_string(), WHOLE_LEN).await;
    let whole = whole.map_err(RestoreError::object(location, &stored.key))?;
    let bad = || RestoreError::format(location, &stored.key);
    let footer = SegmentFooter::decode(&whole, whole.len() as u64).map_err(bad())?;
    check_segment(&footer, &stored.key, location, page_size)?;
    check_segment_header(&whole, &footer).map_err(bad())?;
    // The footer's lengths add up to the object's, so these are inside.
    let table = footer.table_offset() as usize..footer.table_offset() as usize + footer.table_len as usize;
    let table = footer.decode_table(&whole[table]).map_err(bad())?;
    Ok(Head { planned, footer, table, whole: Some(whole), _room: room })
}

fn check_segment(footer: &SegmentFooter, key: &SegmentKey, location: &str, page_size: u32) -> Result<(), RestoreError> {
    check_footer(footer, key, location)?;
    if footer.page_size == page_size {
        Ok(())
    } else {
        Err(RestoreError::damaged(location, key, &"its page size is not that of the snapshot"))
    }
}

async fn apply_whole(execution: &Arc<Execution>, segment: &Arc<Open>, bytes: Bytes) -> Result<(), RestoreError> {
    let segment = segment.clone();
    let apply = move |execution: &Execution| {
        for run in segment.wanted_runs() {
            let mut reader = RunReader::new(execution, &segment, run)?;
            // The runs lie inside, as the footer does.
            reader.take(execution, &segment, &bytes[run.bytes.start as usize..run.bytes.end as usize])?;
            reader.finish(execution, &segment)?;
        }
        Ok(())
    };
    execution.blocking(apply).await
}

/// Piece by piece: a single transaction can be larger than memory. Runs before the first and after the last that is wanted are not
/// fetched.
async fn apply_in_pieces(
    execution: &Arc<Execution>,
    segment: &Arc<Open>,
    footer: &SegmentFooter,
) -> Result<(), RestoreError> {
    let location = &execution.plan.location;
    let wanted: Vec<Run> = segment.wanted_runs().cloned().collect();
    let from = wanted.first().map_or(footer.table_offset(), |run| run.bytes.start);
    let to = wanted.last().map_or(from, |run| run.bytes.end);
    let mut blocks = Blocks::of(&execution.store, location, segment.key, from..to);
    for run in wanted {
        let mut reader = RunReader::new(execution, segment, &run)?;
        let mut left = run.bytes.end - run.bytes.start;
        while left > 0 {
            let Some(some) = blocks.next(left).await? else { break };
            left -= some.len() as u64;
            let segment = segment.clone();
            let take = move |execution: &Execution| reader.take(execution, &segment, &some).map(|()| reader);
            reader = execution.blocking(take).await?;
        }
        let segment = segment.clone();
        execution.blocking(move |execution| reader.finish(execution, &segment)).await?;
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::format::key::Span;
    use crate::restore::history::Stored;

    fn segment(len_bytes: u64) -> PlannedSegment {
        let key = SegmentKey(Span { epoch: 1, first_txid: 2, last_txid: 2, time_ms: 0 });
        PlannedSegment { stored: Stored { key, len_bytes, stored_ms: 0 }, last_txid: 2 }
    }

    #[test]
    fn no_more_is_fetched_ahead_than_there_is_room_for() {
        let lens = [WHOLE_LEN, 1, WHOLE_LEN - 1, WHOLE_LEN + 1, 5, WHOLE_LEN];
        let mut admitted = pin!(admitted(lens.map(segment).to_vec()));
        let mut next = || admitted.next().now_or_never().map(|admitted| admitted.unwrap());
        let held = [next(), next(), next()].map(Option::unwrap);
        let in_pieces = next().unwrap();
        assert!(next().is_none());
        let [first, second, _third] = held;
        drop(second);
        assert!(next().is_none(), "the fifth one needs more");
        drop(first);
        let fifth = next().unwrap();
        assert_eq!((in_pieces.0.stored.len_bytes, fifth.0.stored.len_bytes), (WHOLE_LEN + 1, 5));
        assert!(next().is_none());
        drop(fifth);
        assert_eq!(next().unwrap().0.stored.len_bytes, WHOLE_LEN);
    }
}
