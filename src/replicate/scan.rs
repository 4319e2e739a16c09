//! Reading a database for a snapshot: extent by extent, between captures. What the base holds already is not read where the
//! ledger tells it, and never stored again.

use std::collections::HashSet;
use std::io;

use super::base::Base;
use super::capture::Capture;
use super::ledger::Ledger;
use super::record::{RecordError, Recorder, Start};
use crate::format::key::SnapshotKey;
use crate::format::snapshot::{SnapshotInfo, SnapshotWriter, extent_hash};
use crate::format::{extent_count, extent_pages, lock_page};
use crate::sqlite::SqliteError;

/// A snapshot that is being read.
#[derive(Debug)]
pub struct SnapshotScan {
    key: SnapshotKey,
    writer: SnapshotWriter,
    next_extent: u32,
    base: Option<Base>,
    /// Sources that must not be referred to any more.
    retired: HashSet<SnapshotKey>,
}

/// What a step of a scan gave.
#[derive(Debug)]
pub enum Step {
    /// The extent stands in an older object.
    Referred,
    /// Bytes to append to the object.
    Extent(Vec<u8>),
    /// The last bytes of the object; it is whole.
    Finished(Finished),
}

/// A snapshot that was read to its end.
#[derive(Debug)]
pub struct Finished {
    /// The last bytes.
    pub bytes: Vec<u8>,
    /// What it is of.
    pub info: SnapshotInfo,
    /// Length of all its extents in bytes, wherever they are.
    pub extents_len_bytes: u64,
}

impl SnapshotScan {
    /// Begins a snapshot after the last recorded transaction; the second value is its first bytes.
    ///
    /// # Errors
    /// When the ledger can't be read.
    pub fn new(page_size: u32, recorder: &Recorder, base: Option<Base>) -> io::Result<(Self, Vec<u8>)> {
        let base = base.filter(|base| base.has_page_size(page_size));
        let retired =
            base.as_ref().map_or_else(|| Ok(HashSet::new()), |base| base.retired_sources(&recorder.ledger))?;
        let (writer, header) = SnapshotWriter::new(page_size);
        Ok((Self { key: key_of(recorder), writer, next_extent: 0, base, retired }, header))
    }

    /// The key that it is to be stored under.
    #[must_use]
    pub fn key(&self) -> SnapshotKey {
        self.key
    }

    /// Adds the next extent as of the last captured transaction.
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
        let txid = recorder.last().position.txid;
        let is_known = first_page + page_count - 1 <= recorder.ledger.known_pages();
        if is_known && self.refer(&recorder.ledger, first_page, page_count, txid)? {
            return Ok(Step::Referred);
        }
        let content = read_extent(capture, first_page, page_count)?;
        check_or_learn(capture, &mut recorder.ledger, first_page, &content)?;
        if !is_known && self.refer(&recorder.ledger, first_page, page_count, txid)? {
            return Ok(Step::Referred);
        }
        let bytes = self.writer.encode_extent(self.next_extent, txid, &content)?;
        self.next_extent += 1;
        Ok(Step::Extent(bytes))
    }

    /// Refers to the extent in the base, if it stands there; tells whether it does.
    fn refer(&mut self, ledger: &Ledger, first_page: u32, page_count: u32, txid: u64) -> io::Result<bool> {
        let Some(base) = &self.base else { return Ok(false) };
        let content_hash = extent_hash(ledger.hashes(first_page, page_count)?);
        let found = base.find(self.next_extent, page_count, content_hash);
        let Some((source, record)) = found.filter(|(source, _)| !self.retired.contains(source)) else {
            return Ok(false);
        };
        self.writer.refer_to_extent(self.next_extent, txid, source, record)?;
        self.next_extent += 1;
        Ok(true)
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
        let extents_len_bytes = writer.extents_len_bytes();
        Ok(Step::Finished(Finished { bytes: writer.finish(&info)?, info, extents_len_bytes }))
    }
}

/// The key of a snapshot that begins after the last recorded transaction.
#[must_use]
pub fn key_of(recorder: &Recorder) -> SnapshotKey {
    let Start { position, time_ms, .. } = recorder.last();
    SnapshotKey { epoch: position.epoch, txid: position.txid, time_ms }
}

/// Teaches the ledger pages that it does not know, and checks the others against it.
fn check_or_learn(capture: &Capture, ledger: &mut Ledger, first_page: u32, content: &[u8]) -> Result<(), RecordError> {
    for (page_number, image) in (first_page..).zip(content.chunks_exact(capture.files().page_size as usize)) {
        if page_number > ledger.known_pages() {
            ledger.learn(page_number, image);
        } else if !ledger.matches(page_number, image)? {
            return Err(SqliteError::PageChanged { path: capture.files().path().to_owned(), page_number }.into());
        }
    }
    Ok(())
}

/// Reads consecutive pages; the lock page's bytes are zeros.
///
/// # Errors
/// What SQLite or the operating system answers.
pub fn read_extent(capture: &Capture, first_page: u32, page_count: u32) -> Result<Vec<u8>, RecordError> {
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
