//! Reading a whole database: in pieces between captures, for an epoch's first snapshot; and at one stretch, to prove at a
//! start that nothing has changed.

use std::io;

use super::capture::Capture;
use super::ledger::Ledger;
use super::record::{RecordError, Recorder, Start};
use crate::format::key::SnapshotKey;
use crate::format::snapshot::{SnapshotInfo, SnapshotWriter};
use crate::format::{extent_count, extent_pages, lock_page};

/// A snapshot that is being read.
#[derive(Debug)]
pub struct SnapshotScan {
    key: SnapshotKey,
    writer: SnapshotWriter,
    next_extent: u32,
}

/// What a step of a scan gave.
#[derive(Debug)]
pub enum Step {
    /// Bytes to append to the object.
    Extent(Vec<u8>),
    /// The last bytes of the object; it is whole.
    Finished(Vec<u8>, SnapshotInfo),
}

impl SnapshotScan {
    /// Begins a snapshot after the transaction `last`; the second value is its first bytes.
    #[must_use]
    pub fn new(page_size: u32, last: &Start) -> (Self, Vec<u8>) {
        let (writer, header) = SnapshotWriter::new(page_size);
        let key = SnapshotKey { epoch: last.position.epoch, txid: last.position.txid, time_ms: last.time_ms };
        (Self { key, writer, next_extent: 0 }, header)
    }

    /// The key that it is to be stored under.
    #[must_use]
    pub fn key(&self) -> SnapshotKey {
        self.key
    }

    /// Reads the next extent as of the last captured transaction. Teaches the ledger pages that it does not know, and
    /// checks the others against it.
    ///
    /// # Errors
    /// When a page is not what the ledger knows: then something wrote to the file behind SQLite's back.
    pub fn step(&mut self, capture: &Capture, recorder: &mut Recorder) -> Result<Step, RecordError> {
        let page_size = capture.files().page_size;
        let size_pages = recorder.ledger.size_pages();
        if self.next_extent >= extent_count(size_pages, page_size) {
            return self.finish(recorder).map_err(RecordError::from);
        }
        let (first_page, page_count) = extent_pages(self.next_extent, size_pages, page_size);
        let content = read_extent(capture, first_page, page_count)?;
        for (page_number, image) in (first_page..).zip(content.chunks_exact(page_size as usize)) {
            if page_number > recorder.ledger.known_pages() {
                recorder.ledger.learn(page_number, image);
            } else if !recorder.ledger.matches(page_number, image)? {
                let path = capture.files().path().to_owned();
                return Err(crate::sqlite::SqliteError::PageChanged { path, page_number }.into());
            }
        }
        let bytes = self.writer.encode_extent(self.next_extent, recorder.last().position.txid, &content)?;
        self.next_extent += 1;
        Ok(Step::Extent(bytes))
    }

    fn finish(&mut self, recorder: &Recorder) -> io::Result<Step> {
        let last = recorder.last();
        let size_pages = recorder.ledger.size_pages();
        let fingerprint = recorder.ledger.fingerprint().ok_or_else(|| io::Error::other("pages are not known yet"))?;
        let info = SnapshotInfo {
            key: self.key,
            last_txid: last.position.txid,
            time_ms: last.time_ms,
            size_pages,
            schema_cookie: last.schema_cookie,
            fingerprint,
        };
        let (spent, _) = SnapshotWriter::new(0);
        let writer = std::mem::replace(&mut self.writer, spent);
        Ok(Step::Finished(writer.finish(&info)?, info))
    }
}

/// Reads consecutive pages; the lock page's bytes are zeros.
fn read_extent(capture: &Capture, first_page: u32, page_count: u32) -> Result<Vec<u8>, RecordError> {
    let page_size = capture.files().page_size as usize;
    let mut content = vec![0; page_count as usize * page_size];
    capture.follower().read_pages(capture.files(), first_page, &mut content)?;
    let lock_page = lock_page(capture.files().page_size);
    if let Some(image) =
        lock_page.checked_sub(first_page).and_then(|at| content.chunks_exact_mut(page_size).nth(at as usize))
    {
        image.fill(0);
    }
    Ok(content)
}

/// Whether the database, as of the last captured transaction, is what `ledger` knows, page for page. Reads all of it, under
/// one pin: only done at a start that can't prove by less that nothing has happened.
///
/// # Errors
/// What SQLite or the operating system answers.
pub fn is_as_known(capture: &Capture, ledger: &Ledger) -> Result<bool, RecordError> {
    let page_size = capture.files().page_size;
    let size_pages = capture.follower().size_pages();
    if size_pages != ledger.size_pages() {
        return Ok(false);
    }
    for extent in 0..extent_count(size_pages, page_size) {
        let (first_page, page_count) = extent_pages(extent, size_pages, page_size);
        let content = read_extent(capture, first_page, page_count)?;
        for (page_number, image) in (first_page..).zip(content.chunks_exact(page_size as usize)) {
            if !ledger.matches(page_number, image)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
