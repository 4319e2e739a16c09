//! What a run of transactions makes of the pages that are there: of each page in turn, oldest transaction first.

use super::RestoreError;
use super::execute::Execution;
use super::image::Image;
use crate::format::FormatError;
use crate::format::change::Content;
use crate::format::key::SegmentKey;
use crate::format::segment::{PageStream, Run, Table, Transaction};

/// Neighbours are written together up to so many bytes.
const WRITE_LEN: usize = 256 << 10;

/// How far what is there already is.
///
/// Extents are read one after another, so they hold some of the transactions after the snapshot's key, too. To apply those again does no
/// harm: changes are bytes at places, so after the last transaction each byte is what its last writer made of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Since {
    /// All transactions up to this one are in it.
    pub(super) txid: u64,
    /// The database's size after it, as far as it is known.
    pub(super) size_pages: u32,
}

/// A segment that is worked off.
pub(super) struct Open {
    pub(super) key: SegmentKey,
    pub(super) table: Table,
    pub(super) since: Since,
    /// The last transaction of it that counts.
    pub(super) last_txid: u64,
}

impl Open {
    fn counts(&self, transaction: &Transaction) -> bool {
        transaction.txid > self.since.txid && transaction.txid <= self.last_txid
    }

    /// The runs with transactions that count; they follow each other.
    pub(super) fn wanted_runs(&self) -> impl Iterator<Item = &Run> {
        self.table.runs.iter().filter(|run| self.transactions(run).iter().any(|transaction| self.counts(transaction)))
    }

    fn transactions(&self, run: &Run) -> &[Transaction] {
        &self.table.transactions[run.transactions.clone()]
    }

    /// What is there when it is worked off.
    pub(super) fn since_after(&self) -> Since {
        let last = self.table.transactions.iter().rfind(|transaction| self.counts(transaction));
        let size_pages = last.map_or(self.since.size_pages, |last| last.info.size_pages);
        Since { txid: self.last_txid.max(self.since.txid), size_pages }
    }

    /// The transactions of a run that made the database smaller.
    fn cuts(&self, run: &Run) -> Vec<Cut> {
        let before = run.transactions.start.checked_sub(1).map(|before| &self.table.transactions[before]);
        let mut size_pages =
            before.filter(|before| self.counts(before)).map_or(self.since.size_pages, |before| before.info.size_pages);
        let mut cuts = Vec::new();
        for transaction in self.transactions(run).iter().filter(|transaction| self.counts(transaction)) {
            if transaction.info.size_pages < size_pages {
                cuts.push(Cut { txid: transaction.txid, size_pages: transaction.info.size_pages });
            }
            size_pages = transaction.info.size_pages;
        }
        cuts
    }
}

/// A transaction that made the database smaller: what stood behind is gone, and zeros if the database grows again.
#[derive(Debug, Clone, Copy)]
struct Cut {
    txid: u64,
    size_pages: u32,
}

/// Reads a run, block by block.
pub(super) struct RunReader {
    key: SegmentKey,
    pages: PageStream,
    first_txid: u64,
    /// For each transaction of the run the number of the first image that is not its own any more.
    ends: Vec<usize>,
    cuts: Vec<Cut>,
    /// The smallest size after any of them.
    smallest_size_pages: Option<u32>,
    /// Pages behind that, of which the run has a content.
    behind_cuts: Vec<u32>,
    current: Current,
    neighbours: Neighbours,
}

/// The page whose contents come now.
#[derive(Default)]
struct Current {
    page_number: u32,
    page: Vec<u8>,
    /// Whether `page` is the page; it is read when it is needed.
    is_loaded: bool,
    is_changed: bool,
    /// The last transaction that is in it.
    txid: u64,
}

impl RunReader {
    /// Before the first block of a run.
    pub(super) fn new(execution: &Execution, segment: &Open, run: &Run) -> Result<Self, RestoreError> {
        let pages = PageStream::new(execution.image.page_size, segment.table.places(run));
        let pages = pages.map_err(RestoreError::format(&execution.plan.location, &segment.key))?;
        let transactions = segment.transactions(run);
        let mut end = run.first_image;
        let mut end_of = |transaction: &Transaction| {
            end += transaction.page_numbers.len();
            end
        };
        let cuts = segment.cuts(run);
        Ok(Self {
            key: segment.key,
            pages,
            first_txid: transactions.first().map_or(0, |first| first.txid),
            ends: transactions.iter().map(&mut end_of).collect(),
            smallest_size_pages: cuts.iter().map(|cut| cut.size_pages).min(),
            cuts,
            behind_cuts: Vec::new(),
            current: Current { page: vec![0; execution.image.page_size as usize], ..Current::default() },
            neighbours: Neighbours::default(),
        })
    }

    /// Takes whole blocks.
    pub(super) fn take(
        &mut self,
        execution: &Execution,
        segment: &Open,
        mut blocks: &[u8],
    ) -> Result<(), RestoreError> {
        let (location, key, image) = (&execution.plan.location, self.key, &execution.image);
        while !blocks.is_empty() {
            let len = self.pages.read_block(blocks).map_err(RestoreError::format(location, &key))?;
            blocks = &blocks[len..];
            while let Some(place) = self.pages.next_place().filter(|_| self.pages.has_content()) {
                if place.page_number != self.current.page_number {
                    self.leave_page(image)?;
                    self.current.enter(place.page_number, segment.since.txid);
                }
                let txid = self.first_txid + self.ends.partition_point(|end| *end <= place.image as usize) as u64;
                let Some((_, content)) = self.pages.next_content() else { break };
                let counts = txid > self.current.txid && txid <= segment.last_txid;
                if counts && image.is_stored(place.page_number) {
                    let is_cut = is_cut_between(&self.cuts, place.page_number, self.current.txid, txid);
                    let bad = RestoreError::format(location, &key);
                    self.current.apply(image, txid, is_cut, content, bad)?;
                }
            }
        }
        Ok(())
    }

    /// Ends a run whose blocks were all taken.
    pub(super) fn finish(mut self, execution: &Execution, segment: &Open) -> Result<(), RestoreError> {
        let image = &execution.image;
        self.leave_page(image)?;
        self.neighbours.write_out(image)?;
        if self.pages.next_place().is_some() {
            let what = "it has fewer pages than its table";
            return Err(RestoreError::damaged(&execution.plan.location, &self.key, &what));
        }
        self.clear_cut_pages(image, segment.since.txid)
    }

    /// No content of the page follows in this run.
    fn leave_page(&mut self, image: &Image) -> Result<(), RestoreError> {
        let page_number = self.current.page_number;
        if !image.is_stored(page_number) {
            return Ok(());
        }
        if self.smallest_size_pages.is_some_and(|smallest| page_number > smallest) {
            self.behind_cuts.push(page_number);
            if is_cut_between(&self.cuts, page_number, self.current.txid, u64::MAX) {
                self.current.clear();
            }
        }
        match self.current.is_changed {
            true => self.neighbours.push(image, page_number, &self.current.page),
            false => Ok(()),
        }
    }

    /// Pages that were cut off, and of which the run has nothing.
    fn clear_cut_pages(&mut self, image: &Image, since_txid: u64) -> Result<(), RestoreError> {
        let Some(smallest) = self.smallest_size_pages else { return Ok(()) };
        for page_number in smallest.saturating_add(1)..=image.size_pages {
            let is_gone = image.is_stored(page_number)
                && image.is_written(page_number)
                && self.behind_cuts.binary_search(&page_number).is_err()
                && is_cut_between(&self.cuts, page_number, since_txid, u64::MAX);
            if is_gone {
                self.current.clear();
                self.neighbours.push(image, page_number, &self.current.page)?;
            }
        }
        self.neighbours.write_out(image)
    }
}

/// Whether a page was cut off by a transaction after the one and before the other.
fn is_cut_between(cuts: &[Cut], page_number: u32, after_txid: u64, before_txid: u64) -> bool {
    cuts.iter().any(|cut| cut.size_pages < page_number && cut.txid > after_txid && cut.txid < before_txid)
}

impl Current {
    fn enter(&mut self, page_number: u32, since_txid: u64) {
        (self.page_number, self.txid) = (page_number, since_txid);
        (self.is_loaded, self.is_changed) = (false, false);
    }

    fn clear(&mut self) {
        self.page.fill(0);
        (self.is_loaded, self.is_changed) = (true, true);
    }

    /// Makes the page after a transaction of the one before.
    fn apply(
        &mut self,
        image: &Image,
        txid: u64,
        is_cut: bool,
        content: Content<'_>,
        bad: impl FnOnce(FormatError) -> RestoreError,
    ) -> Result<(), RestoreError> {
        if is_cut {
            self.clear();
        } else if !self.is_loaded && matches!(content, Content::Changes(_)) {
            image.read_page(self.page_number, &mut self.page)?;
        }
        (self.is_loaded, self.is_changed, self.txid) = (true, true, txid);
        content.apply_to(&mut self.page).map_err(bad)
    }
}

/// Consecutive pages that go in one write.
#[derive(Default)]
struct Neighbours {
    first_page: u32,
    pages: Vec<u8>,
}

impl Neighbours {
    fn push(&mut self, image: &Image, page_number: u32, page: &[u8]) -> Result<(), RestoreError> {
        let goes_on = self.first_page as usize + self.pages.len() / page.len() == page_number as usize;
        if !goes_on || self.pages.len() >= WRITE_LEN {
            self.write_out(image)?;
            self.first_page = page_number;
        }
        self.pages.extend_from_slice(page);
        Ok(())
    }

    fn write_out(&mut self, image: &Image) -> Result<(), RestoreError> {
        if !self.pages.is_empty() {
            image.write_pages(self.first_page, &self.pages)?;
            self.pages.clear();
        }
        Ok(())
    }
}
