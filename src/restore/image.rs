//! The file that a database is restored into: each page is written once, newest first, and hashed on the way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::RestoreError;
use super::plan::Plan;
use super::progress::Progress;
use crate::format::segment::Transaction;
use crate::format::{lock_page, page_hash};

/// The pages of the database that is being restored. Shared between threads, each of which writes pages of its own.
pub(super) struct Image {
    file: File,
    path: PathBuf,
    /// 8 bytes a page.
    pub(super) page_hashes: File,
    pub(super) page_size: u32,
    size_pages: u32,
    /// Whether the file held something before: then what is not written is not zeros.
    held_something: bool,
    /// One bit a page.
    claimed: Vec<AtomicU64>,
    /// The smallest size, in pages, after any of the transactions looked at so far, newest first: what stood behind it
    /// earlier was cut off, and is zeros unless one of them wrote it again.
    reach_pages: AtomicU32,
    fingerprint: AtomicU64,
    progress: Arc<Progress>,
}

impl Image {
    pub(super) fn new(file: File, path: &Path, plan: &Plan, progress: Arc<Progress>) -> Result<Self, RestoreError> {
        let directory = path.parent().filter(|parent| parent.is_dir()).map_or_else(std::env::temp_dir, Path::to_owned);
        let failed = || RestoreError::io(path, "write");
        let held_something = file.metadata().map_err(failed())?.len() > 0;
        file.set_len(plan.database_len_bytes()).map_err(failed())?;
        let page_hashes = tempfile::tempfile_in(directory).map_err(failed())?;
        page_hashes.set_len(u64::from(plan.size_pages) * 8).map_err(failed())?;
        let words = plan.size_pages as usize / 64 + 1;
        Ok(Self {
            file,
            path: path.to_owned(),
            page_hashes,
            page_size: plan.page_size,
            size_pages: plan.size_pages,
            held_something,
            claimed: (0..words).map(|_| AtomicU64::new(0)).collect(),
            reach_pages: AtomicU32::new(plan.size_pages),
            fingerprint: AtomicU64::new(0),
            progress,
        })
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> RestoreError {
        RestoreError::io(&self.path, "write")
    }

    /// Whether an older image of a page counts: it is still to be written, and nothing cut it off since.
    pub(super) fn wants(&self, page_number: u32) -> bool {
        page_number <= self.reach_pages.load(Ordering::Relaxed) && self.is_blank(page_number)
    }

    /// Whether no image of a page of the database was written.
    fn is_blank(&self, page_number: u32) -> bool {
        let word = || self.claimed[page_number as usize / 64].load(Ordering::Relaxed);
        page_number >= 1
            && page_number <= self.size_pages
            && page_number != lock_page(self.page_size)
            && word() & (1 << (page_number % 64)) == 0
    }

    /// Takes a page as spoken for: its image is about to be written.
    fn claim(&self, page_number: u32) {
        self.claimed[page_number as usize / 64].fetch_or(1 << (page_number % 64), Ordering::Relaxed);
    }

    /// Writes consecutive pages that were claimed.
    pub(super) fn write(&self, first_page: u32, images: &[u8]) -> Result<(), RestoreError> {
        self.note(first_page, images)?;
        self.file.write_all_at(images, self.offset(first_page)).map_err(self.failed())
    }

    /// Takes consecutive pages that were claimed as written.
    fn note(&self, first_page: u32, images: &[u8]) -> Result<(), RestoreError> {
        let hashed = (first_page..).zip(images.chunks_exact(self.page_size as usize));
        let hashes: Vec<u64> = hashed.map(|(page_number, image)| page_hash(page_number, image)).collect();
        self.fingerprint.fetch_xor(hashes.iter().fold(0, |sum, hash| sum ^ hash), Ordering::Relaxed);
        let bytes: Vec<u8> = hashes.into_iter().flat_map(u64::to_le_bytes).collect();
        self.progress.note_done(images.len() as u64);
        self.page_hashes.write_all_at(&bytes, u64::from(first_page - 1) * 8).map_err(self.failed())
    }

    fn offset(&self, page_number: u32) -> u64 {
        u64::from(page_number - 1) * u64::from(self.page_size)
    }

    /// Writes those pages of an extent that are wanted, neighbours together.
    pub(super) fn write_extent(&self, first_page: u32, content: &[u8]) -> Result<(), RestoreError> {
        self.take_extent(first_page, content, |first_page, images| self.write(first_page, images))
    }

    /// Takes those pages of an extent that are wanted for written, because the file holds the extent already.
    pub(super) fn keep_extent(&self, first_page: u32, content: &[u8]) -> Result<(), RestoreError> {
        self.take_extent(first_page, content, |first_page, images| self.note(first_page, images))
    }

    fn take_extent(
        &self,
        first_page: u32,
        content: &[u8],
        take: impl Fn(u32, &[u8]) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
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
                take(first_page + start, &content[start as usize * page_size..next as usize * page_size])?;
            }
        }
        Ok(())
    }

    /// What the file holds of an extent; `None` where it ends before.
    pub(super) fn read_extent(&self, first_page: u32, page_count: u32) -> Option<Vec<u8>> {
        let mut content = vec![0; page_count as usize * self.page_size as usize];
        self.file.read_exact_at(&mut content, self.offset(first_page)).ok().map(|()| content)
    }

    /// Which images of a segment are to be written: of each page that is still wanted, the last one up to `last_txid`. In the
    /// order of the table. Claims the pages. Segments are looked at newest first, one after another.
    pub(super) fn select(&self, transactions: &[Transaction], last_txid: u64) -> Vec<bool> {
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
                self.reach_pages.fetch_min(transaction.info.size_pages, Ordering::Relaxed);
            }
        }
        selected
    }

    /// A page that nobody ever stored, or that was cut off and not written again, is zeros. Makes the file durable; gives the
    /// fingerprint of all pages.
    pub(super) fn finish(&self) -> Result<u64, RestoreError> {
        let zeros = vec![0; self.page_size as usize];
        let lock_page = lock_page(self.page_size);
        for page_number in 1..=self.size_pages {
            let is_blank = self.is_blank(page_number);
            if is_blank {
                let hash = page_hash(page_number, &zeros);
                self.fingerprint.fetch_xor(hash, Ordering::Relaxed);
                let at = u64::from(page_number - 1) * 8;
                self.page_hashes.write_all_at(&hash.to_le_bytes(), at).map_err(self.failed())?;
            }
            if self.held_something && (is_blank || page_number == lock_page) {
                self.file.write_all_at(&zeros, self.offset(page_number)).map_err(self.failed())?;
            }
        }
        self.file.sync_all().map_err(self.failed())?;
        Ok(self.fingerprint.load(Ordering::Relaxed))
    }
}
