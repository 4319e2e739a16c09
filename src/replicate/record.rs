//! The recorder: takes captured transactions into the ledger and into the segment that is being written.

use std::io;
use std::sync::Arc;

use super::capture::Sink;
use super::ledger::Ledger;
use super::open_segment::{OpenSegment, SegmentMemory};
use super::spool::{Spool, Spooled};
use crate::clock::Clock;
use crate::format::segment::TransactionInfo;
use crate::format::{Position, lock_page, page_hash};
use crate::sqlite::SqliteError;
use crate::sqlite::follow::{Images, PageImage, WalTransaction};
use crate::sqlite::header::schema_cookie;

/// A clock that is behind by more than this is worth a line in the log.
const CLOCK_JUMP_MS: u64 = 1000;

/// Why a transaction could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// From the capture.
    #[error(transparent)]
    Sqlite(#[from] SqliteError),
    /// From the local state: ledger or spool.
    #[error("the local state directory failed: {0}")]
    Local(#[from] io::Error),
}

/// Where an epoch begins.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// The last transaction before the first to be recorded, or, in an epoch that does not continue its parent, the state
    /// found. The epoch may be 0 as long as none is claimed.
    pub position: Position,
    /// No transaction gets an earlier time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The schema cookie at the start.
    pub schema_cookie: u32,
}

/// Takes transactions in.
pub struct Recorder {
    spool: Spool,
    clock: Arc<dyn Clock>,
    /// The hashes of all pages.
    pub ledger: Ledger,
    page_size: u32,
    segment: Option<OpenSegment>,
    /// What the last segment's images were put in order in: new memory for each costs more than to write to it.
    memory: SegmentMemory,
    last: Start,
    /// Whether the log has said that the clock is behind.
    has_warned: bool,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Recorder").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Recorder {
    /// A recorder whose next transaction follows `start`.
    #[must_use]
    pub fn new(spool: Spool, clock: Arc<dyn Clock>, ledger: Ledger, page_size: u32, start: Start) -> Self {
        Self {
            spool,
            clock,
            ledger,
            page_size,
            segment: None,
            memory: SegmentMemory::default(),
            last: start,
            has_warned: false,
        }
    }

    /// The last transaction that was recorded, its time, and the schema cookie after it.
    #[must_use]
    pub fn last(&self) -> Start {
        self.last
    }

    /// The epoch has been claimed.
    pub fn set_epoch(&mut self, epoch: u32) {
        self.last.position.epoch = epoch;
    }

    /// Bytes of page images in the segment that is being written; `None` when it holds no transaction.
    #[must_use]
    pub fn open_len_bytes(&self) -> Option<u64> {
        self.segment.as_ref().map(OpenSegment::raw_len_bytes)
    }

    /// Makes room for what is captured while the write lock is held: see [`OpenSegment::make_room`].
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn make_room(&mut self) -> io::Result<()> {
        self.segment.as_mut().map_or(Ok(()), OpenSegment::make_room)
    }

    /// Whether [`Recorder::cut`] takes no long wait; under load it is a while from the first question to a yes.
    ///
    /// # Errors
    /// As the operating system answers; the recorder is then not to be used any more.
    pub fn is_ready_to_cut(&mut self) -> io::Result<bool> {
        self.segment.as_mut().map_or(Ok(true), OpenSegment::is_ready_to_end)
    }

    /// Ends the segment that is being written and puts it into the spool; `None` when there is none.
    ///
    /// # Errors
    /// As the operating system answers; the recorder is then not to be used any more.
    pub fn cut(&mut self) -> io::Result<Option<Spooled>> {
        let Some(segment) = self.segment.take() else { return Ok(None) };
        let Position { epoch, txid } = self.last.position;
        let first_txid = txid + 1 - segment.transaction_count();
        let key;
        (key, self.memory) = segment.finish(epoch, first_txid)?;
        self.spool.accept(key).map(Some)
    }

    /// Lets go of memory that is of use only while the database is written to.
    pub fn release_memory(&mut self) {
        self.memory = SegmentMemory::default();
    }

    /// Commit times never run backwards, whatever the clock does.
    fn commit_time_ms(&mut self) -> u64 {
        let now_ms = self.clock.now_ms();
        let behind_ms = self.last.time_ms.saturating_sub(now_ms);
        if behind_ms > CLOCK_JUMP_MS && !self.has_warned {
            tracing::warn!(
                behind_ms,
                "the clock stands behind the last transaction's time; until it has caught up, that time is used"
            );
        }
        self.has_warned = behind_ms > CLOCK_JUMP_MS;
        now_ms.max(self.last.time_ms)
    }

    fn segment(&mut self) -> io::Result<&mut OpenSegment> {
        if self.segment.is_none() {
            let memory = std::mem::take(&mut self.memory);
            self.segment = Some(OpenSegment::create(&self.spool.open_segment_path(), self.page_size, memory)?);
        }
        self.segment.as_mut().ok_or_else(|| io::Error::other("no segment"))
    }
}

impl Recorder {
    /// Takes in what happened unseen: the pages that differ (ascending) with their hashes, whose images `read` gives.
    ///
    /// # Errors
    /// What `read` answers; [`SqliteError::PageChanged`] when an image has not its hash; the operating system's error. The
    /// recorder is then not to be used any more.
    pub fn take_difference(
        &mut self,
        size_pages: u32,
        pages: &[(u32, u64)],
        mut read: impl FnMut(u32) -> Result<Vec<u8>, RecordError>,
    ) -> Result<(), RecordError> {
        self.ledger.apply(size_pages, pages)?;
        let page_numbers: Vec<u32> = pages.iter().map(|&(page_number, _)| page_number).collect();
        let cookie = match page_numbers.first() {
            Some(1) => schema_cookie(&read(1)?),
            _ => self.last.schema_cookie,
        };
        self.begin_transaction(size_pages, cookie, true, &page_numbers)?;
        for &(page_number, hash) in pages {
            let image = read(page_number)?;
            if page_hash(page_number, &image) != hash {
                return Err(SqliteError::PageChanged { path: self.spool.open_segment_path(), page_number }.into());
            }
            // What it was before nobody can tell any more.
            self.segment()?.push_page(&image, None)?;
        }
        Ok(())
    }

    /// Begins the next transaction; the ledger has taken it in already.
    fn begin_transaction(
        &mut self,
        size_pages: u32,
        schema_cookie: u32,
        coalesced: bool,
        page_numbers: &[u32],
    ) -> io::Result<()> {
        let info = TransactionInfo {
            time_ms: self.commit_time_ms(),
            size_pages,
            schema_cookie,
            fingerprint: self.ledger.fingerprint(),
            coalesced,
            schema_changed: schema_cookie != self.last.schema_cookie,
        };
        self.segment()?.begin_transaction(&info, page_numbers)?;
        self.last.position.txid += 1;
        self.last.time_ms = info.time_ms;
        self.last.schema_cookie = schema_cookie;
        Ok(())
    }
}

impl Sink for Recorder {
    type Error = RecordError;

    fn take(&mut self, transaction: &WalTransaction<'_>, images: &mut Images<'_>) -> Result<(), RecordError> {
        let lock_page = lock_page(self.page_size);
        let pages: Vec<&PageImage> = transaction.pages.iter().filter(|page| page.page_number != lock_page).collect();
        let hashes: Vec<(u32, u64)> = pages.iter().map(|page| (page.page_number, page.hash)).collect();
        let former_hashes = self.ledger.apply(transaction.size_pages, &hashes)?;
        let cookie = match pages.first() {
            Some(page) if page.page_number == 1 => schema_cookie(images.get(page)?),
            _ => self.last.schema_cookie,
        };
        let page_numbers: Vec<u32> = pages.iter().map(|page| page.page_number).collect();
        self.begin_transaction(transaction.size_pages, cookie, false, &page_numbers)?;
        for (page, former_hash) in pages.into_iter().zip(former_hashes) {
            let (image, former) = images.get_with_former(page, former_hash)?;
            self.segment()?.push_page(image, former)?;
        }
        Ok(())
    }
}

/// Takes nothing in: follows the WAL while there is no epoch to record for.
#[derive(Debug)]
pub struct Ignore;

impl Sink for Ignore {
    type Error = RecordError;

    fn take(&mut self, _: &WalTransaction<'_>, _: &mut Images<'_>) -> Result<(), RecordError> {
        Ok(())
    }
}
