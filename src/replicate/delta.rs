//! What differs between a database as it is and as it was left: found at a start whose WAL does not prove that nothing
//! happened, by reading all of it once, under one pin.

use super::capture::Capture;
use super::ledger::Ledger;
use super::record::{RecordError, Recorder};
use super::scan::read_extent;
use crate::format::{extent_count, extent_pages, lock_page, page_hash};

/// The pages that are not as the ledger knows them.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// Size of the database in pages, as it is.
    pub size_pages: u32,
    /// The pages, ascending, and the hashes that they have.
    pub pages: Vec<(u32, u64)>,
}

impl Difference {
    /// Reads the database, as of the last captured transaction, and holds every page against `ledger`. `None` when more than
    /// `most_pages` differ.
    ///
    /// # Errors
    /// What SQLite or the operating system answers.
    pub fn find(capture: &Capture, ledger: &Ledger, most_pages: usize) -> Result<Option<Self>, RecordError> {
        let page_size = capture.files().page_size;
        let size_pages = capture.follower().size_pages();
        let mut pages = Vec::new();
        for extent in 0..extent_count(size_pages, page_size) {
            let (first_page, page_count) = extent_pages(extent, size_pages, page_size);
            let content = read_extent(capture, first_page, page_count)?;
            let known_count = ledger.size_pages().saturating_sub(first_page - 1).min(page_count);
            let known = ledger.hashes(first_page, known_count)?;
            for (at, image) in content.chunks_exact(page_size as usize).enumerate() {
                let page_number = first_page + at as u32;
                let hash = page_hash(page_number, image);
                if page_number != lock_page(page_size) && known.get(at) != Some(&hash) {
                    pages.push((page_number, hash));
                }
            }
            if pages.len() > most_pages {
                return Ok(None);
            }
        }
        Ok(Some(Self { size_pages, pages }))
    }

    /// Whether the database is what the ledger knows, page for page.
    #[must_use]
    pub fn is_nothing(&self, ledger: &Ledger) -> bool {
        self.pages.is_empty() && self.size_pages == ledger.size_pages()
    }

    /// Records the difference as one transaction, which stands for all that nobody saw.
    ///
    /// # Errors
    /// When a page is not any more what was read; what SQLite or the operating system answers.
    pub fn record(&self, capture: &Capture, recorder: &mut Recorder) -> Result<(), RecordError> {
        recorder.take_difference(self.size_pages, &self.pages, |page_number| read_extent(capture, page_number, 1))
    }
}
