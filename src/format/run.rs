//! What a run holds while it is collected.

use std::io;

use super::change::Content;
use super::segment::{Place, TransactionInfo, places};

/// So many bytes of images and changes make a run full. A second one is collected while the first is compressed.
const MEMORY_LIMIT: usize = 8 << 20;
/// So many bytes of pages, however little changed in them, do: a reader puts all entries of a run in order.
const RAW_LIMIT: usize = 256 << 20;
/// A transaction of more bytes of pages is written by itself.
const TRANSACTION_LIMIT: usize = 4 << 20;

/// Transactions whose entries are put in order when the run is full.
#[derive(Debug, Default)]
pub struct RunBuffer {
    page_size: usize,
    transactions: Vec<(TransactionInfo, usize)>,
    /// Of all entries.
    page_numbers: Vec<u32>,
    /// The entries, one after another, as a segment has them.
    entries: Vec<u8>,
    /// Where in it each one begins.
    starts: Vec<usize>,
}

impl RunBuffer {
    /// Before the first transaction of a run with pages of this size. The memory of the run before is used again.
    pub fn reset(&mut self, page_size: u32) {
        self.page_size = page_size as usize;
        self.transactions.clear();
        self.page_numbers.clear();
        self.entries.clear();
        self.starts.clear();
    }

    /// Whether a transaction with so many pages is too large for any run with others.
    #[must_use]
    pub fn is_too_large(&self, page_count: usize) -> bool {
        page_count * self.page_size > TRANSACTION_LIMIT
    }

    /// Whether a transaction with so many pages has no room any more.
    #[must_use]
    pub fn is_full_for(&self, page_count: usize) -> bool {
        let len = page_count * self.page_size;
        !self.is_empty() && (self.len_bytes() + len > MEMORY_LIMIT || self.raw_len() + len > RAW_LIMIT)
    }

    /// Whether less than half of the room is left.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        self.len_bytes() > MEMORY_LIMIT / 2 || self.raw_len() > RAW_LIMIT / 2
    }

    /// Whether there is no transaction.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// Bytes of all entries: what there is to compress.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of the pages that the entries are of.
    fn raw_len(&self) -> usize {
        self.page_numbers.len() * self.page_size
    }

    /// How many pages' contents are still to be pushed.
    #[must_use]
    pub fn pages_due(&self) -> usize {
        self.page_numbers.len() - self.starts.len()
    }

    /// Begins the next transaction; the contents of `page_numbers` must follow.
    pub fn begin_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) {
        self.transactions.push((*info, page_numbers.len()));
        self.page_numbers.extend_from_slice(page_numbers);
    }

    /// Adds the content of the next page.
    ///
    /// # Errors
    /// When no page is due or it can't be the content of a page.
    pub fn push(&mut self, content: Content<'_>) -> io::Result<()> {
        if self.pages_due() == 0 || !content.is_of(self.page_size) {
            return Err(io::Error::other("a page was not handed over as it must be"));
        }
        self.starts.push(self.entries.len());
        self.entries.extend_from_slice(&content.header());
        self.entries.extend_from_slice(content.bytes());
        Ok(())
    }

    /// The transactions, with the numbers of their pages.
    pub fn transactions(&self) -> impl Iterator<Item = (&TransactionInfo, &[u32])> {
        let mut rest = self.page_numbers.as_slice();
        self.transactions.iter().map(move |(info, page_count)| {
            let (page_numbers, others) = rest.split_at(*page_count);
            rest = others;
            (info, page_numbers)
        })
    }

    /// Hands out all entries in a run's order.
    ///
    /// # Errors
    /// What `take` answers; when some are missing.
    pub fn for_each_entry(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.pages_due() != 0 {
            return Err(io::Error::other("a run was ended before it was whole"));
        }
        places(self.page_numbers.iter().copied(), 0).into_iter().try_for_each(|place| take(self.entry(place)))
    }

    fn entry(&self, place: Place) -> &[u8] {
        let index = place.image as usize;
        let end = self.starts.get(index + 1).copied().unwrap_or(self.entries.len());
        &self.entries[self.starts[index]..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: TransactionInfo = TransactionInfo {
        time_ms: 1,
        size_pages: 9,
        schema_cookie: 1,
        fingerprint: None,
        coalesced: false,
        schema_changed: false,
    };

    #[test]
    fn entries_come_in_the_order_of_pages_and_then_of_age() {
        let image = vec![9; 512];
        let contents = [
            (4, Content::Image(&image)),
            (2, Content::Changes(&[1, 2, 3])),
            (4, Content::Changes(&[])),
            (2, Content::Changes(&[4])),
            (4, Content::Changes(&[5, 6])),
        ];
        let mut run = RunBuffer::default();
        for _ in 0..2 {
            run.reset(512);
            for (page_number, content) in contents {
                run.begin_transaction(&INFO, &[page_number]);
                run.push(content).unwrap();
            }
            assert!(run.push(contents[0].1).is_err(), "no page is due");
            let mut entries = Vec::new();
            let keep = |entry: &[u8]| {
                entries.push(entry.to_vec());
                Ok(())
            };
            run.for_each_entry(keep).unwrap();
            let lens: Vec<u8> = entries.iter().map(|entry| entry[0]).collect();
            assert_eq!(lens, [3, 1, 0, 0, 2]);
            assert_eq!((&entries[1][4..], &entries[2][..4]), (&[4][..], &512_u32.to_le_bytes()[..]));
            assert_eq!(run.transactions().map(|(_, pages)| pages[0]).collect::<Vec<_>>(), [4, 2, 4, 2, 4]);
        }
        run.begin_transaction(&INFO, &[1]);
        assert!(run.push(Content::Changes(&[0; 512])).is_err(), "changes are shorter than the page");
        assert!(run.push(Content::Image(&[0; 511])).is_err());
    }

    #[test]
    fn is_full_by_memory_or_by_what_readers_bear() {
        const PAGE_SIZE: u32 = 65_536;
        let image = vec![0; PAGE_SIZE as usize];
        let mut run = RunBuffer::default();
        run.reset(PAGE_SIZE);
        assert!(!run.is_full_for(1000), "a run has at least one transaction");
        while !run.is_full_for(1) {
            run.begin_transaction(&INFO, &[1]);
            run.push(Content::Changes(&[])).unwrap();
        }
        assert_eq!(run.raw_len(), RAW_LIMIT);
        run.reset(PAGE_SIZE);
        for page_number in 1.. {
            if run.is_full_for(1) {
                break;
            }
            run.begin_transaction(&INFO, &[page_number]);
            run.push(Content::Image(&image)).unwrap();
        }
        assert!(run.len_bytes() <= MEMORY_LIMIT && run.len_bytes() + 2 * image.len() > MEMORY_LIMIT);
    }
}
