//! The file that a database is restored into. First the snapshot's extents are written, then what later transactions made of their
//! pages; in the end the hashes of all pages give the fingerprint.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::RestoreError;
use super::plan::Plan;
use super::progress::Progress;
use crate::format::{lock_page, page_hash};

/// At the end, the hashes of so many pages are looked at together.
const HASHED_TOGETHER: u32 = 4096;

/// The pages of the database that is being restored. Shared between threads, each of which writes pages of its own.
pub(super) struct Image {
    file: File,
    path: PathBuf,
    /// 8 bytes a page.
    pub(super) page_hashes: File,
    pub(super) page_size: u32,
    pub(super) size_pages: u32,
    /// Whether the file held something before: then what is not written is not zeros.
    held_something: bool,
    written: Bits,
    /// Pages whose hash is not known since a segment wrote them.
    changed: Bits,
    pub(super) progress: Arc<Progress>,
}

/// One bit a page.
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(size_pages: u32) -> Self {
        Self((0..=size_pages / 64).map(|_| AtomicU64::new(0)).collect())
    }

    fn has(&self, page_number: u32) -> bool {
        self.0[page_number as usize / 64].load(Ordering::Relaxed) & (1 << (page_number % 64)) != 0
    }

    fn add(&self, first_page: u32, page_count: u32) {
        for page_number in first_page..first_page + page_count {
            self.0[page_number as usize / 64].fetch_or(1 << (page_number % 64), Ordering::Relaxed);
        }
    }
}

impl Image {
    pub(super) fn new(file: File, path: &Path, plan: &Plan, progress: Arc<Progress>) -> Result<Self, RestoreError> {
        let directory = path.parent().filter(|parent| parent.is_dir()).map_or_else(std::env::temp_dir, Path::to_owned);
        let failed = || RestoreError::io(path, "write");
        let held_something = file.metadata().map_err(failed())?.len() > 0;
        file.set_len(plan.database_len_bytes()).map_err(failed())?;
        let page_hashes = tempfile::tempfile_in(directory).map_err(failed())?;
        page_hashes.set_len(u64::from(plan.size_pages) * 8).map_err(failed())?;
        Ok(Self {
            file,
            path: path.to_owned(),
            page_hashes,
            page_size: plan.page_size,
            size_pages: plan.size_pages,
            held_something,
            written: Bits::new(plan.size_pages),
            changed: Bits::new(plan.size_pages),
            progress,
        })
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> RestoreError {
        RestoreError::io(&self.path, "write")
    }

    fn offset(&self, page_number: u32) -> u64 {
        u64::from(page_number - 1) * u64::from(self.page_size)
    }

    /// Whether a page is one of the restored database's, and ever stored.
    pub(super) fn is_stored(&self, page_number: u32) -> bool {
        (1..=self.size_pages).contains(&page_number) && page_number != lock_page(self.page_size)
    }

    /// Whether a page was written.
    pub(super) fn is_written(&self, page_number: u32) -> bool {
        self.written.has(page_number)
    }

    /// What of an extent's content is in the restored database.
    fn part_inside<'a>(&self, first_page: u32, content: &'a [u8]) -> &'a [u8] {
        let page_count = (self.size_pages + 1).saturating_sub(first_page) as usize;
        &content[..content.len().min(page_count * self.page_size as usize)]
    }

    /// Writes an extent.
    pub(super) fn write_extent(&self, first_page: u32, content: &[u8]) -> Result<(), RestoreError> {
        let content = self.part_inside(first_page, content);
        self.file.write_all_at(content, self.offset(first_page)).map_err(self.failed())?;
        self.keep_extent(first_page, content)
    }

    /// Takes an extent for written, because the file holds it already.
    pub(super) fn keep_extent(&self, first_page: u32, content: &[u8]) -> Result<(), RestoreError> {
        let content = self.part_inside(first_page, content);
        let pages = (first_page..).zip(content.chunks_exact(self.page_size as usize));
        let lock_page = lock_page(self.page_size);
        let hash = |(page_number, image)| if page_number == lock_page { 0 } else { page_hash(page_number, image) };
        let hashes: Vec<u8> = pages.map(hash).flat_map(u64::to_le_bytes).collect();
        self.page_hashes.write_all_at(&hashes, u64::from(first_page - 1) * 8).map_err(self.failed())?;
        self.written.add(first_page, (content.len() / self.page_size as usize) as u32);
        self.progress.note_done(content.len() as u64);
        Ok(())
    }

    /// What the file holds of an extent; `None` where it ends before.
    pub(super) fn read_extent(&self, first_page: u32, page_count: u32) -> Option<Vec<u8>> {
        let mut content = vec![0; page_count as usize * self.page_size as usize];
        self.file.read_exact_at(&mut content, self.offset(first_page)).ok().map(|()| content)
    }

    /// Reads a page as it was written last; zeros, if it was not written.
    pub(super) fn read_page(&self, page_number: u32, page: &mut [u8]) -> Result<(), RestoreError> {
        if !self.written.has(page_number) {
            page.fill(0);
            return Ok(());
        }
        self.file.read_exact_at(page, self.offset(page_number)).map_err(RestoreError::io(&self.path, "read"))
    }

    /// Writes consecutive pages that transactions after the extents' made.
    pub(super) fn write_pages(&self, first_page: u32, pages: &[u8]) -> Result<(), RestoreError> {
        self.file.write_all_at(pages, self.offset(first_page)).map_err(self.failed())?;
        let page_count = (pages.len() / self.page_size as usize) as u32;
        self.written.add(first_page, page_count);
        self.changed.add(first_page, page_count);
        Ok(())
    }

    /// A page that nobody ever stored is zeros. Makes the file durable; gives the fingerprint of all pages.
    pub(super) fn finish(&self) -> Result<u64, RestoreError> {
        let mut fingerprint = 0;
        for first_page in (1..=self.size_pages).step_by(HASHED_TOGETHER as usize) {
            let page_count = HASHED_TOGETHER.min(self.size_pages - first_page + 1);
            fingerprint ^= self.finish_pages(first_page, page_count)?;
        }
        self.file.sync_all().map_err(self.failed())?;
        Ok(fingerprint)
    }

    /// Finds out the hashes that are not known; gives the XOR of all.
    fn finish_pages(&self, first_page: u32, page_count: u32) -> Result<u64, RestoreError> {
        let mut bytes = vec![0; page_count as usize * 8];
        let at = u64::from(first_page - 1) * 8;
        self.page_hashes.read_exact_at(&mut bytes, at).map_err(self.failed())?;
        let mut page = vec![0; self.page_size as usize];
        let lock_page = lock_page(self.page_size);
        let mut fingerprint = 0;
        for (page_number, hash) in (first_page..).zip(bytes.as_chunks_mut::<8>().0) {
            let is_blank = !self.written.has(page_number);
            if self.held_something && (is_blank || page_number == lock_page) {
                page.fill(0);
                self.file.write_all_at(&page, self.offset(page_number)).map_err(self.failed())?;
            }
            if page_number != lock_page && (is_blank || self.changed.has(page_number)) {
                self.read_page(page_number, &mut page)?;
                *hash = page_hash(page_number, &page).to_le_bytes();
            }
            fingerprint ^= u64::from_le_bytes(*hash);
        }
        self.page_hashes.write_all_at(&bytes, at).map_err(self.failed())?;
        Ok(fingerprint)
    }
}
