//! The segment that is being written. While a full run is compressed, on a thread of its own, the next one is collected: so the
//! thread that follows the database goes on reading the WAL, which would grow otherwise.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::thread::JoinHandle;

use crate::format::change::Content;
use crate::format::key::SegmentKey;
use crate::format::run::RunBuffer;
use crate::format::segment::{SegmentWriter, TransactionInfo};

/// A run that is shorter than this is compressed while the thread that follows the database waits: for a few milliseconds.
const SHORT_RUN_LEN: usize = 2 << 20;
/// Where compression does not keep up, a segment that is to end gets so many more runs before it is waited for.
const RUNS_BEFORE_END: u32 = 4;

type FileWriter = SegmentWriter<BufWriter<File>>;

/// A segment that transactions are added to.
#[derive(Debug)]
pub struct OpenSegment {
    writer: Writer,
    page_size: u32,
    run: RunBuffer,
    /// The other run's memory, as long as no run is compressed.
    spare: RunBuffer,
    /// Whether pages go to the writer itself, because their transaction has a run for itself.
    is_ordered: bool,
    /// The changes of the page that is being added.
    changes: Vec<u8>,
    transaction_count: u64,
    raw_len_bytes: u64,
    /// How many runs were begun to be compressed since the segment was to end.
    runs_since_due: u32,
}

/// Who has the writer. Its memory, which the runs take, is given back with it.
#[derive(Debug)]
enum Writer {
    Here(Box<FileWriter>),
    Compressing(JoinHandle<io::Result<(Box<FileWriter>, RunBuffer)>>),
    Failed,
}

/// Memory that one segment leaves to the next.
#[derive(Debug, Default)]
pub struct SegmentMemory(RunBuffer, RunBuffer);

impl OpenSegment {
    /// Begins a segment in a new file at `path`.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn create(path: &Path, page_size: u32, memory: SegmentMemory) -> io::Result<Self> {
        let writer = SegmentWriter::new(BufWriter::with_capacity(64 * 1024, File::create(path)?), page_size)?;
        let SegmentMemory(mut run, spare) = memory;
        run.reset(page_size);
        Ok(Self {
            writer: Writer::Here(Box::new(writer)),
            page_size,
            run,
            spare,
            is_ordered: false,
            changes: Vec::new(),
            transaction_count: 0,
            raw_len_bytes: 0,
            runs_since_due: 0,
        })
    }

    /// Bytes of page images so far.
    #[must_use]
    pub fn raw_len_bytes(&self) -> u64 {
        self.raw_len_bytes
    }

    /// Number of transactions so far.
    #[must_use]
    pub fn transaction_count(&self) -> u64 {
        self.transaction_count
    }

    /// Begins the next transaction; the pages of `page_numbers` must follow.
    ///
    /// # Errors
    /// As [`SegmentWriter::begin_transaction`], and those of the transactions before.
    pub fn begin_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) -> io::Result<()> {
        self.transaction_count += 1;
        self.raw_len_bytes += page_numbers.len() as u64 * u64::from(self.page_size);
        self.is_ordered = self.run.is_too_large(page_numbers.len());
        if self.is_ordered {
            self.write_run()?;
            return self.writer()?.begin_run([(info, page_numbers)]);
        }
        if self.run.is_full_for(page_numbers.len()) {
            self.compress_run()?;
        }
        self.run.begin_transaction(info, page_numbers);
        Ok(())
    }

    /// Adds the next page, `former` being the page as the transaction found it, if that is known.
    ///
    /// # Errors
    /// As [`SegmentWriter::push`].
    pub fn push_page(&mut self, image: &[u8], former: Option<&[u8]>) -> io::Result<()> {
        let mut changes = std::mem::take(&mut self.changes);
        let content = Content::of(image, former, &mut changes);
        match self.is_ordered {
            true => self.writer()?.push(content)?,
            false => self.run.push(content)?,
        }
        self.changes = changes;
        Ok(())
    }

    /// Makes room for what is captured while the write lock is held: waiting for the other thread then would be the application's wait.
    ///
    /// # Errors
    /// Those of the transactions before.
    pub fn make_room(&mut self) -> io::Result<()> {
        match self.run.is_half_full() {
            true => self.compress_run(),
            false => Ok(()),
        }
    }

    /// Whether the segment, which is to end, can do so without a long wait; has what stands in the way compressed meanwhile.
    ///
    /// # Errors
    /// Those of the transactions before.
    pub fn is_ready_to_end(&mut self) -> io::Result<bool> {
        if matches!(&self.writer, Writer::Compressing(thread) if !thread.is_finished()) {
            return Ok(self.runs_since_due >= RUNS_BEFORE_END);
        }
        if self.run.len_bytes() <= SHORT_RUN_LEN || self.runs_since_due >= RUNS_BEFORE_END {
            return Ok(true);
        }
        self.runs_since_due += 1;
        self.compress_run()?;
        Ok(false)
    }

    /// Ends the segment.
    ///
    /// # Errors
    /// As [`SegmentWriter::finish`].
    pub fn finish(mut self, epoch: u32, first_txid: u64) -> io::Result<(SegmentKey, SegmentMemory)> {
        self.write_run()?;
        self.writer()?;
        let Writer::Here(writer) = std::mem::replace(&mut self.writer, Writer::Failed) else { return Err(failed()) };
        let (_, key) = writer.finish(epoch, first_txid)?;
        Ok((key, SegmentMemory(std::mem::take(&mut self.run), std::mem::take(&mut self.spare))))
    }

    /// The writer, as soon as it is here.
    fn writer(&mut self) -> io::Result<&mut FileWriter> {
        if let Writer::Compressing(_) = self.writer
            && let Writer::Compressing(thread) = std::mem::replace(&mut self.writer, Writer::Failed)
        {
            let (writer, run) = thread.join().map_err(|_| failed())??;
            (self.writer, self.spare) = (Writer::Here(writer), run);
        }
        match &mut self.writer {
            Writer::Here(writer) => Ok(writer),
            _ => Err(failed()),
        }
    }

    /// Writes the run that is collected.
    fn write_run(&mut self) -> io::Result<()> {
        self.writer()?;
        if let Writer::Here(writer) = &mut self.writer
            && !self.run.is_empty()
        {
            writer.write_run(&self.run)?;
            self.run.reset(self.page_size);
        }
        Ok(())
    }

    /// Has the run that is collected written by another thread.
    fn compress_run(&mut self) -> io::Result<()> {
        self.writer()?;
        let Writer::Here(mut writer) = std::mem::replace(&mut self.writer, Writer::Failed) else {
            return Err(failed());
        };
        self.spare.reset(self.page_size);
        let run = std::mem::replace(&mut self.run, std::mem::take(&mut self.spare));
        let compress = move || writer.write_run(&run).map(|()| (writer, run));
        self.writer = Writer::Compressing(std::thread::Builder::new().name("compress".into()).spawn(compress)?);
        Ok(())
    }
}

impl Drop for OpenSegment {
    /// The next segment's file has the same name: nobody may write to this one any more.
    fn drop(&mut self) {
        if let Writer::Compressing(thread) = std::mem::replace(&mut self.writer, Writer::Failed) {
            thread.join().ok();
        }
    }
}

fn failed() -> io::Error {
    io::Error::other("a segment could not be compressed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::segment::Segment;

    const PAGE_SIZE: u32 = 65_536;
    /// So many pages make a run full.
    const PAGES: u32 = 160;

    fn image(txid: u64, page_number: u32) -> Vec<u8> {
        let mut image = vec![page_number as u8; PAGE_SIZE as usize];
        image[..8].copy_from_slice(&txid.to_le_bytes());
        image
    }

    fn push(segment: &mut OpenSegment, txid: u64, page_numbers: &[u32]) {
        let info = TransactionInfo {
            time_ms: txid,
            size_pages: 1000,
            schema_cookie: 1,
            fingerprint: Some(txid),
            coalesced: false,
            schema_changed: false,
        };
        segment.begin_transaction(&info, page_numbers).unwrap();
        for &page_number in page_numbers {
            segment.push_page(&image(txid, page_number), None).unwrap();
        }
    }

    #[test]
    fn full_runs_and_large_transactions_become_one_segment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("open");
        let mut memory = SegmentMemory::default();
        for _ in 0..2 {
            let mut segment = OpenSegment::create(&path, PAGE_SIZE, memory).unwrap();
            let large: Vec<u32> = (1..=PAGES).collect();
            let mut due = Vec::new();
            for txid in 1..=u64::from(PAGES) * 3 {
                let pages = if txid == 200 { &large[..] } else { &large[txid as usize % PAGES as usize..][..1] };
                push(&mut segment, txid, pages);
                due.extend(pages.iter().map(|&page_number| (txid, page_number)));
            }
            assert_eq!(segment.raw_len_bytes(), due.len() as u64 * u64::from(PAGE_SIZE));
            while !segment.is_ready_to_end().unwrap() {
                std::thread::yield_now();
            }
            memory = segment.finish(1, 1).unwrap().1;
            let mut found = Vec::new();
            let decoded = Segment::decode(&std::fs::read(&path).unwrap(), |index, page_number, page| {
                assert_eq!(page, Content::Image(&image(index as u64 + 1, page_number)));
                found.push((index as u64 + 1, page_number));
            });
            let decoded = decoded.unwrap();
            assert_eq!(decoded.transactions.len(), PAGES as usize * 3);
            assert!(decoded.footer.run_count > 3);
            found.sort_unstable();
            assert_eq!(found, due);
        }
    }

    #[test]
    fn there_is_room_for_a_barrier() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("open");
        let mut segment = OpenSegment::create(&path, PAGE_SIZE, SegmentMemory::default()).unwrap();
        for txid in 1..=u64::from(PAGES) * 2 {
            push(&mut segment, txid, &[txid as u32]);
        }
        assert!(matches!(segment.writer, Writer::Compressing(_)) && segment.run.is_half_full());
        segment.make_room().unwrap();
        assert!(segment.run.is_empty());
        let pages: Vec<u32> = (1..=PAGES / 3).collect();
        push(&mut segment, 1000, &pages);
        assert!(!segment.run.is_empty(), "it waits for nobody");
        segment.make_room().unwrap();
        assert!(!segment.run.is_empty(), "there is room");
    }

    #[test]
    fn one_that_is_dropped_is_not_written_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("open");
        let mut segment = OpenSegment::create(&path, PAGE_SIZE, SegmentMemory::default()).unwrap();
        for txid in 1..=u64::from(PAGES) + 1 {
            push(&mut segment, txid, &[txid as u32]);
        }
        assert!(matches!(segment.writer, Writer::Compressing(_)));
        drop(segment);
        let len_bytes = std::fs::metadata(&path).unwrap().len();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), len_bytes);
    }
}
