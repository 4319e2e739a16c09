//! Segments: consecutive transactions with their pages. Written from front to back, read from the tail.
//!
//! Layout: header (32 bytes), runs of page blocks, table blocks, footer (100 bytes). `docs/FORMAT.md` has the fields.
//!
//! A run holds what some transactions made of their pages (see [`super::change`]) by ascending page number, and what they made of one
//! page by age: so what is alike stands side by side, where compression finds it in a small window.

use std::io::{self, Write};
use std::ops::Range;

use super::block::{
    BLOCK_HEADER_LEN, BLOCK_RAW_LIMIT, BlockReader, BlockWriter, Compression, most_compressed, read_section,
};
use super::change::{Content, ENTRY_HEADER_LEN};
use super::key::{SegmentKey, Span};
use super::run::RunBuffer;
use super::{
    FOOTER_LEN, Fields, FormatError, HEADER_LEN, decode_footer, decode_header, encode_footer, encode_header,
    is_page_size, lock_page,
};

const HEADER_MAGIC: &[u8; 8] = b"WALTSEG2";
const FOOTER_MAGIC: &[u8; 8] = b"WALTSEGE";

/// Length of a transaction's record in the table, without its page numbers.
const RECORD_LEN: u64 = 32;
/// Length of a run's record in the table.
const RUN_LEN: u64 = 16;
/// No table is longer than this, in bytes: a reader keeps all of it in memory. It is enough for 67 million pages, of
/// which 512 bytes each make 34 GB.
pub const TABLE_RAW_LIMIT: u64 = 256 << 20;
/// All blocks of a table but the last hold at least so many raw bytes (those that this program writes more than 3 MiB): a reader fetches
/// a table whole, and this bounds how long it can be.
const TABLE_BLOCK_RAW_LEAST: u64 = 4096;

const FLAG_FINGERPRINT: u32 = 1;
const FLAG_COALESCED: u32 = 2;
const FLAG_SCHEMA_CHANGED: u32 = 4;

/// What a segment says of one transaction, besides its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionInfo {
    /// When the commit was seen, in milliseconds since 1970. Never less than that of the transaction before.
    pub time_ms: u64,
    /// Size of the database after it, in pages.
    pub size_pages: u32,
    /// The schema cookie after it.
    pub schema_cookie: u32,
    /// Fingerprint of the database after it; not known while the first snapshot of an epoch is being read.
    pub fingerprint: Option<u64>,
    /// Whether it stands for several transactions that were not seen one by one.
    pub coalesced: bool,
    /// Whether the schema cookie is another than before.
    pub schema_changed: bool,
}

/// One transaction of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// Its number.
    pub txid: u64,
    /// What is known of it.
    pub info: TransactionInfo,
    /// Its pages, ascending.
    pub page_numbers: Vec<u32>,
}

impl Transaction {
    /// As a writer takes it.
    #[must_use]
    pub fn parts(&self) -> (&TransactionInfo, &[u32]) {
        (&self.info, &self.page_numbers)
    }
}

/// Writes a segment to `sink`, which it never seeks in. Memory: the table, and one run.
#[derive(Debug)]
pub struct SegmentWriter<W> {
    sink: W,
    page_size: u32,
    compression: Compression,
    /// Transactions that are collected here.
    run: RunBuffer,
    /// The run whose entries come in its order.
    ordered: Option<OrderedRun>,
    /// Records of the runs that are written.
    runs: Vec<u8>,
    run_count: u32,
    pages_len: u64,
    page_block_count: u32,
    /// Records of the transactions.
    table: Vec<u8>,
    transaction_count: u32,
    page_count: u64,
    last_time_ms: u64,
}

#[derive(Debug)]
struct OrderedRun {
    transaction_count: u32,
    pages_due: usize,
    blocks: BlockWriter,
}

impl<W: Write> SegmentWriter<W> {
    /// Begins a segment.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn new(sink: W, page_size: u32) -> io::Result<Self> {
        Self::with_compression(sink, page_size, Compression::FreshPages)
    }

    /// Begins a segment whose pages are compressed so.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn with_compression(mut sink: W, page_size: u32, compression: Compression) -> io::Result<Self> {
        sink.write_all(&encode_header(HEADER_MAGIC, page_size))?;
        let mut run = RunBuffer::default();
        run.reset(page_size);
        Ok(Self {
            sink,
            page_size,
            compression,
            run,
            ordered: None,
            runs: Vec::new(),
            run_count: 0,
            pages_len: 0,
            page_block_count: 0,
            table: Vec::new(),
            transaction_count: 0,
            page_count: 0,
            last_time_ms: 0,
        })
    }

    /// Begins the next transaction; the contents of `page_numbers` (strictly ascending) must follow.
    ///
    /// # Errors
    /// When the transaction before still wants pages, or the numbers do not ascend: a mistake of the caller that must not
    /// reach storage. When the table would outgrow [`TABLE_RAW_LIMIT`], or the sink fails.
    pub fn begin_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) -> io::Result<()> {
        if self.run.pages_due() != 0 || !ascends(page_numbers) {
            return Err(io::Error::other("a transaction was not handed over as it must be"));
        }
        if self.run.is_too_large(page_numbers.len()) {
            return self.begin_run([(info, page_numbers)]);
        }
        if self.ordered.is_some() || self.run.is_full_for(page_numbers.len()) {
            self.end_run()?;
        }
        self.run.begin_transaction(info, page_numbers);
        Ok(())
    }

    /// Begins a run of transactions (what is said of each, and the numbers of its pages) whose pages' contents follow in the run's
    /// order, as [`Run::places`] gives it. They are not kept in memory.
    ///
    /// # Errors
    /// As [`SegmentWriter::begin_transaction`].
    pub fn begin_run<'a>(
        &mut self,
        transactions: impl IntoIterator<Item = (&'a TransactionInfo, &'a [u32])>,
    ) -> io::Result<()> {
        self.end_run()?;
        let mut run = OrderedRun { transaction_count: 0, pages_due: 0, blocks: BlockWriter::new(self.compression) };
        for (info, page_numbers) in transactions {
            self.note_transaction(info, page_numbers)?;
            run.transaction_count += 1;
            run.pages_due += page_numbers.len();
        }
        self.ordered = Some(run);
        Ok(())
    }

    /// Writes a run that was collected elsewhere.
    ///
    /// # Errors
    /// As [`SegmentWriter::begin_transaction`].
    pub fn write_run(&mut self, run: &RunBuffer) -> io::Result<()> {
        self.end_run()?;
        let mut transaction_count = 0;
        for (info, page_numbers) in run.transactions() {
            self.note_transaction(info, page_numbers)?;
            transaction_count += 1;
        }
        let mut blocks = BlockWriter::new(self.compression);
        run.for_each_entry(|entry| blocks.push(&mut self.sink, &[entry]))?;
        self.note_run(transaction_count, blocks)
    }

    fn note_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) -> io::Result<()> {
        if !ascends(page_numbers) {
            return Err(io::Error::other("a transaction was not handed over as it must be"));
        }
        let flags = flag(info.fingerprint.is_some(), FLAG_FINGERPRINT)
            | flag(info.coalesced, FLAG_COALESCED)
            | flag(info.schema_changed, FLAG_SCHEMA_CHANGED);
        let page_count = u32::try_from(page_numbers.len()).map_err(io::Error::other)?;
        // The run that it is in needs a record, too.
        let table_len = self.table.len() as u64 + RECORD_LEN + u64::from(page_count) * 4;
        if table_len + u64::from(self.run_count + 1) * RUN_LEN > TABLE_RAW_LIMIT {
            return Err(io::Error::other("a segment has more transactions and pages than its table can hold"));
        }
        self.table.extend_from_slice(&info.time_ms.to_le_bytes());
        self.table.extend_from_slice(&info.fingerprint.unwrap_or(0).to_le_bytes());
        for field in [info.size_pages, info.schema_cookie, page_count, flags].iter().chain(page_numbers) {
            self.table.extend_from_slice(&field.to_le_bytes());
        }
        self.page_count += u64::from(page_count);
        self.transaction_count += 1;
        self.last_time_ms = info.time_ms;
        Ok(())
    }

    /// Adds the content of the next page: the transaction's, or the run's.
    ///
    /// # Errors
    /// When no page is due or it can't be the content of a page; when the sink fails.
    pub fn push(&mut self, content: Content<'_>) -> io::Result<()> {
        let Some(run) = &mut self.ordered else { return self.run.push(content) };
        if run.pages_due == 0 || !content.is_of(self.page_size as usize) {
            return Err(io::Error::other("a page was not handed over as it must be"));
        }
        run.pages_due -= 1;
        run.blocks.push(&mut self.sink, &[&content.header(), content.bytes()])
    }

    /// Writes what is left of the run that was begun or collected here.
    fn end_run(&mut self) -> io::Result<()> {
        if let Some(run) = self.ordered.take() {
            if run.pages_due != 0 {
                return Err(io::Error::other("a run was ended before it was whole"));
            }
            self.note_run(run.transaction_count, run.blocks)?;
        }
        if !self.run.is_empty() {
            let mut run = std::mem::take(&mut self.run);
            self.write_run(&run)?;
            run.reset(self.page_size);
            self.run = run;
        }
        Ok(())
    }

    /// Writes what is left of a run's blocks, and its record.
    fn note_run(&mut self, transaction_count: u32, mut blocks: BlockWriter) -> io::Result<()> {
        blocks.finish(&mut self.sink)?;
        self.runs.extend_from_slice(&blocks.len_bytes.to_le_bytes());
        for field in [transaction_count, blocks.block_count] {
            self.runs.extend_from_slice(&field.to_le_bytes());
        }
        self.run_count += 1;
        self.pages_len += blocks.len_bytes;
        self.page_block_count += blocks.block_count;
        Ok(())
    }

    /// Ends the segment. The sink is flushed, not synced.
    ///
    /// # Errors
    /// When there is no transaction, or pages are missing; when the sink fails.
    pub fn finish(mut self, epoch: u32, first_txid: u64) -> io::Result<(W, SegmentKey)> {
        self.end_run()?;
        if self.transaction_count == 0 {
            return Err(io::Error::other("a segment was ended before it was whole"));
        }
        let mut table = BlockWriter::default();
        for part in self.runs.chunks(1 << 20).chain(self.table.chunks(1 << 20)) {
            table.push(&mut self.sink, &[part])?;
        }
        table.finish(&mut self.sink)?;
        let footer = SegmentFooter {
            page_size: self.page_size,
            pages_offset: HEADER_LEN as u64,
            pages_len: self.pages_len,
            page_block_count: self.page_block_count,
            table_len: table.len_bytes,
            table_raw_len: (self.runs.len() + self.table.len()) as u64,
            table_block_count: table.block_count,
            transaction_count: self.transaction_count,
            page_count: self.page_count,
            run_count: self.run_count,
            span: Span {
                epoch,
                first_txid,
                last_txid: first_txid + u64::from(self.transaction_count) - 1,
                time_ms: self.last_time_ms,
            },
        };
        self.sink.write_all(&footer.encode())?;
        self.sink.flush()?;
        Ok((self.sink, SegmentKey(footer.span)))
    }
}

fn ascends(page_numbers: &[u32]) -> bool {
    page_numbers.is_sorted_by(|before, after| before < after)
}

/// Whether so many blocks fit the bytes that they are said to take.
fn has_room_for(len_bytes: u64, block_count: u32) -> bool {
    u64::from(block_count) * BLOCK_HEADER_LEN as u64 <= len_bytes
}

fn flag(is_set: bool, bit: u32) -> u32 {
    if is_set { bit } else { 0 }
}

/// The last 100 bytes of a segment: where everything is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentFooter {
    /// Page size in bytes.
    pub page_size: u32,
    /// Where the page blocks begin.
    pub pages_offset: u64,
    /// Length of all page blocks in bytes; the table blocks follow.
    pub pages_len: u64,
    /// Number of page blocks.
    pub page_block_count: u32,
    /// Length of all table blocks in bytes; the footer follows.
    pub table_len: u64,
    /// Raw length of the table in bytes.
    pub table_raw_len: u64,
    /// Number of table blocks.
    pub table_block_count: u32,
    /// Number of transactions.
    pub transaction_count: u32,
    /// Number of page images and changes.
    pub page_count: u64,
    /// Number of runs.
    pub run_count: u32,
    /// What its key must say.
    pub span: Span,
}

impl SegmentFooter {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FOOTER_LEN);
        for field in [
            self.pages_len,
            self.table_len,
            self.table_raw_len,
            self.page_count,
            self.span.first_txid,
            self.span.last_txid,
            self.span.time_ms,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for field in [
            self.page_size,
            self.page_block_count,
            self.table_block_count,
            self.transaction_count,
            self.span.epoch,
            self.run_count,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        encode_footer(bytes, FOOTER_MAGIC)
    }

    /// Reads the footer at the end of `tail`, the end of a segment of `object_len` bytes.
    ///
    /// # Errors
    /// When the bytes are not a footer, or not one of a segment of that length.
    pub fn decode(tail: &[u8], object_len: u64) -> Result<Self, FormatError> {
        let what = "the segment's footer";
        let mut fields = decode_footer(tail, FOOTER_MAGIC, what)?;
        let (pages_len, table_len, table_raw_len) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (page_count, first_txid, last_txid, time_ms) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        let (page_size, page_block_count, table_block_count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (transaction_count, epoch, run_count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let expected_len = [HEADER_LEN as u64, pages_len, table_len, FOOTER_LEN as u64]
            .iter()
            .try_fold(0_u64, |sum, &part| sum.checked_add(part));
        let table_raw_due = (u64::from(run_count) * RUN_LEN)
            .saturating_add(u64::from(transaction_count) * RECORD_LEN)
            .saturating_add(page_count.saturating_mul(4));
        let is_consistent = expected_len == Some(object_len)
            && is_page_size(page_size)
            && transaction_count >= 1
            && last_txid.checked_sub(first_txid) == Some(u64::from(transaction_count) - 1)
            && run_count <= transaction_count
            && table_raw_len == table_raw_due
            && table_raw_len <= TABLE_RAW_LIMIT
            && page_count.saturating_mul(ENTRY_HEADER_LEN as u64)
                <= u64::from(page_block_count) * BLOCK_RAW_LIMIT as u64
            && has_room_for(pages_len, page_block_count)
            && has_room_for(table_len, table_block_count)
            && u64::from(table_block_count) <= table_raw_len / TABLE_BLOCK_RAW_LEAST + 1
            && table_len <= most_compressed(table_raw_len, table_block_count);
        if !is_consistent {
            return Err(FormatError::Inconsistent("the segment's footer is not that of this object".into()));
        }
        Ok(Self {
            page_size,
            pages_offset: HEADER_LEN as u64,
            pages_len,
            page_block_count,
            table_len,
            table_raw_len,
            table_block_count,
            transaction_count,
            page_count,
            run_count,
            span: Span { epoch, first_txid, last_txid, time_ms },
        })
    }

    /// Where the table begins.
    #[must_use]
    pub fn table_offset(&self) -> u64 {
        self.pages_offset + self.pages_len
    }

    /// Reads the table from its blocks, `table_len` bytes from [`Self::table_offset`] on.
    ///
    /// # Errors
    /// When the blocks are damaged, or the table contradicts itself or the footer.
    pub fn decode_table(&self, blocks: &[u8]) -> Result<Table, FormatError> {
        let what = "the segment's table";
        let raw = read_section(blocks, self.table_block_count, self.table_raw_len, what)?;
        let mut fields = Fields::new(&raw, what);
        // The footer's lengths bear the number of runs out.
        let runs = (0..self.run_count)
            .map(|_| Ok((fields.u64()?, fields.u32()?, fields.u32()?)))
            .collect::<Result<Vec<_>, FormatError>>()?;
        let mut transactions: Vec<Transaction> = Vec::new();
        let mut page_count = 0;
        for index in 0..u64::from(self.transaction_count) {
            let transaction = self.decode_transaction(self.span.first_txid + index, &mut fields)?;
            if transactions.last().is_some_and(|before| before.info.time_ms > transaction.info.time_ms) {
                return Err(FormatError::Inconsistent("times in the segment's table run backwards".into()));
            }
            page_count += transaction.page_numbers.len() as u64;
            transactions.push(transaction);
        }
        let last_time_ms = transactions.last().map(|last| last.info.time_ms);
        if !fields.rest.is_empty() || page_count != self.page_count || last_time_ms != Some(self.span.time_ms) {
            return Err(FormatError::Inconsistent("the segment's table and footer contradict each other".into()));
        }
        let runs = self.place_runs(&runs, &transactions)?;
        Ok(Table { transactions, runs })
    }

    /// Finds out where the runs lie and what they hold, from their lengths and numbers of transactions and blocks.
    fn place_runs(&self, records: &[(u64, u32, u32)], transactions: &[Transaction]) -> Result<Vec<Run>, FormatError> {
        let wrong = || FormatError::Inconsistent("the runs in the segment's table can't be right".into());
        let mut runs: Vec<Run> = Vec::new();
        let (mut offset, mut first, mut first_image, mut block_count) = (self.pages_offset, 0, 0, 0_u64);
        for &(len_bytes, run_transaction_count, run_block_count) in records {
            let end = first + run_transaction_count as usize;
            let of_run = transactions.get(first..end).filter(|of_run| !of_run.is_empty()).ok_or_else(wrong)?;
            let page_count: usize = of_run.iter().map(|transaction| transaction.page_numbers.len()).sum();
            // What is beyond the sum of all runs is found out at the end.
            let bytes = offset..offset.checked_add(len_bytes).ok_or_else(wrong)?;
            if !has_room_for(len_bytes, run_block_count) {
                return Err(wrong());
            }
            (offset, block_count) = (bytes.end, block_count + u64::from(run_block_count));
            runs.push(Run { bytes, transactions: first..end, first_image, page_count, block_count: run_block_count });
            (first, first_image) = (end, first_image + page_count);
        }
        let is_whole = first == transactions.len()
            && offset == self.table_offset()
            && block_count == u64::from(self.page_block_count);
        if is_whole { Ok(runs) } else { Err(wrong()) }
    }

    fn decode_transaction(&self, txid: u64, fields: &mut Fields<'_>) -> Result<Transaction, FormatError> {
        let (time_ms, fingerprint) = (fields.u64()?, fields.u64()?);
        let (size_pages, schema_cookie, page_count, flags) =
            (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        if page_count as usize > fields.rest.len() / 4 || flags > 7 {
            return Err(FormatError::Inconsistent(format!("transaction {txid} in the segment's table can't be right")));
        }
        let page_numbers = (0..page_count).map(|_| fields.u32()).collect::<Result<Vec<u32>, _>>()?;
        let is_right = page_numbers.is_sorted_by(|before, after| before < after)
            && page_numbers.first() != Some(&0)
            && page_numbers.last().is_none_or(|&last| last <= size_pages)
            && page_numbers.binary_search(&lock_page(self.page_size)).is_err();
        if !is_right {
            return Err(FormatError::Inconsistent(format!("the page numbers of transaction {txid} can't be right")));
        }
        let info = TransactionInfo {
            time_ms,
            size_pages,
            schema_cookie,
            fingerprint: (flags & FLAG_FINGERPRINT != 0).then_some(fingerprint),
            coalesced: flags & FLAG_COALESCED != 0,
            schema_changed: flags & FLAG_SCHEMA_CHANGED != 0,
        };
        Ok(Transaction { txid, info, page_numbers })
    }
}

/// Checks a segment's header against its footer.
///
/// # Errors
/// When it is not the header of such a segment.
pub fn check_segment_header(bytes: &[u8], footer: &SegmentFooter) -> Result<(), FormatError> {
    if decode_header(bytes, HEADER_MAGIC, "the segment's header")? == footer.page_size {
        Ok(())
    } else {
        Err(FormatError::Inconsistent("the segment's header and footer give different page sizes".into()))
    }
}

/// What a segment says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The transactions.
    pub transactions: Vec<Transaction>,
    /// Where their pages are.
    pub runs: Vec<Run>,
}

/// A row of blocks that can be read without those before: the images of some transactions, in the order of [`Run::places`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Where its blocks are in the object.
    pub bytes: Range<u64>,
    /// The transactions, as indexes in the table.
    pub transactions: Range<usize>,
    /// The first of its images, counted through the segment in the order of the table.
    pub first_image: usize,
    /// How many images it holds.
    pub page_count: usize,
    /// How many blocks it has.
    pub block_count: u32,
}

impl Table {
    /// In which order the images of a run stand.
    #[must_use]
    pub fn places(&self, run: &Run) -> Vec<Place> {
        run.places(&self.transactions[run.transactions.clone()])
    }
}

impl Run {
    /// In which order its images stand, of these transactions.
    #[must_use]
    pub fn places(&self, transactions: &[Transaction]) -> Vec<Place> {
        let page_numbers = transactions.iter().flat_map(|transaction| transaction.page_numbers.iter().copied());
        places(page_numbers, self.first_image)
    }
}

/// Which image stands somewhere in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The page.
    pub page_number: u32,
    /// The image, counted in the order of the table.
    pub image: u32,
}

/// Puts images, the first of which is number `first_image`, in a run's order: by page number, and those of one page by age.
pub(super) fn places(page_numbers: impl IntoIterator<Item = u32>, first_image: usize) -> Vec<Place> {
    // A table has room for less than 2^26 images.
    let images = first_image as u32..;
    let mut places: Vec<Place> =
        page_numbers.into_iter().zip(images).map(|(page_number, image)| Place { page_number, image }).collect();
    places.sort_unstable();
    places
}

/// Reads what a run holds, block by block.
pub struct PageStream {
    blocks: BlockReader,
    page_size: usize,
    raw: Vec<u8>,
    /// Bytes of `raw` that were handed out.
    taken: usize,
    places: std::vec::IntoIter<Place>,
}

impl PageStream {
    /// Before the first block of a run whose entries stand so.
    ///
    /// # Errors
    /// When zstd can't be set up.
    pub fn new(page_size: u32, places: Vec<Place>) -> Result<Self, FormatError> {
        let blocks = BlockReader::new("the segment's pages")?;
        Ok(Self { blocks, page_size: page_size as usize, raw: Vec::new(), taken: 0, places: places.into_iter() })
    }

    /// Reads the block at the start of `bytes`, and tells how many bytes it took. Its entries are handed out from now on.
    ///
    /// # Errors
    /// When the block is damaged, holds no whole entries, or more than are due.
    pub fn read_block(&mut self, bytes: &[u8]) -> Result<usize, FormatError> {
        let len = self.blocks.read(bytes, &mut self.raw)?;
        self.taken = 0;
        let (mut count, mut rest) = (0, self.raw.as_slice());
        while let Some((entry, others)) = split_entry(rest).filter(|(entry, _)| entry.len() <= self.page_size) {
            count += 1;
            // An entry is checked where it is read first, so that a damaged one is found by whoever only reads.
            if let changes @ Content::Changes(_) = Content::decode(entry, self.page_size) {
                changes.check(self.page_size)?;
            }
            rest = others;
        }
        if self.raw.is_empty() || !rest.is_empty() {
            return Err(FormatError::Inconsistent("a block of the segment's pages holds no whole pages".into()));
        }
        if count > self.places.len() { Err(contradicts_table()) } else { Ok(len) }
    }

    /// The next content of the block that was read, and whose it is; `None` when another block must be read, or all were.
    pub fn next_content(&mut self) -> Option<(Place, Content<'_>)> {
        let (entry, _) = split_entry(&self.raw[self.taken..])?;
        self.taken += ENTRY_HEADER_LEN + entry.len();
        Some((self.places.next()?, Content::decode(entry, self.page_size)))
    }

    /// Whose the next content is, of whatever block; `None` after the last one.
    #[must_use]
    pub fn next_place(&self) -> Option<Place> {
        self.places.as_slice().first().copied()
    }

    /// Whether the block that was read has another one.
    #[must_use]
    pub fn has_content(&self) -> bool {
        self.taken < self.raw.len()
    }
}

/// The bytes of the first entry, and what follows it.
fn split_entry(raw: &[u8]) -> Option<(&[u8], &[u8])> {
    let (header, rest) = raw.split_first_chunk::<ENTRY_HEADER_LEN>()?;
    rest.split_at_checked(u32::from_le_bytes(*header) as usize)
}

/// A segment that is wholly in memory, with everything checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where everything is.
    pub footer: SegmentFooter,
    /// The transactions.
    pub transactions: Vec<Transaction>,
}

impl Segment {
    /// Reads a segment and hands what it holds of each page to `page` with the index of the transaction and the page's number: run
    /// after run, in the order in which they stand there.
    ///
    /// # Errors
    /// When any byte of it is not as it was written.
    pub fn decode(bytes: &[u8], mut page: impl FnMut(usize, u32, Content<'_>)) -> Result<Self, FormatError> {
        let footer = SegmentFooter::decode(bytes, bytes.len() as u64)?;
        check_segment_header(bytes, &footer)?;
        // The footer's lengths add up to the object's, so these are inside; and so are the runs'.
        let table = footer.table_offset() as usize..footer.table_offset() as usize + footer.table_len as usize;
        let table = footer.decode_table(&bytes[table])?;
        for run in &table.runs {
            let of_run = run.transactions.clone().zip(&table.transactions[run.transactions.clone()]);
            let owners: Vec<usize> =
                of_run.flat_map(|(index, transaction)| transaction.page_numbers.iter().map(move |_| index)).collect();
            let mut blocks = &bytes[run.bytes.start as usize..run.bytes.end as usize];
            let mut pages = PageStream::new(footer.page_size, table.places(run))?;
            for _ in 0..run.block_count {
                let len = pages.read_block(blocks)?;
                blocks = &blocks[len..];
                while let Some((place, content)) = pages.next_content() {
                    page(owners[place.image as usize - run.first_image], place.page_number, content);
                }
            }
            if pages.next_place().is_some() || !blocks.is_empty() {
                return Err(contradicts_table());
            }
        }
        Ok(Self { footer, transactions: table.transactions })
    }
}

fn contradicts_table() -> FormatError {
    FormatError::Inconsistent("the segment's pages and table contradict each other".into())
}
