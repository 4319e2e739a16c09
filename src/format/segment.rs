//! Segments: consecutive transactions with their pages. Written from front to back, read from the tail.
//!
//! Layout: header (32 bytes), page blocks, table blocks, footer (100 bytes). `docs/FORMAT.md` has the fields.

use std::io::{self, Write};

use super::block::{BLOCK_HEADER_LEN, BLOCK_RAW_LIMIT, BlockReader, BlockWriter, Window, read_section};
use super::key::{SegmentKey, Span};
use super::{
    FOOTER_LEN, Fields, FormatError, HEADER_LEN, decode_footer, decode_header, encode_footer, encode_header,
    is_page_size, lock_page,
};

const HEADER_MAGIC: &[u8; 8] = b"WALTSEG1";
const FOOTER_MAGIC: &[u8; 8] = b"WALTSEGE";

/// Length of a transaction's record in the table, without its page numbers.
const RECORD_LEN: u64 = 32;
/// No table is longer than this, in bytes: a reader keeps all of it in memory. It is enough for 67 million pages, of
/// which 512 bytes each make 34 GB.
pub const TABLE_RAW_LIMIT: u64 = 256 << 20;

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

/// Writes a segment to `sink`, which it never seeks in.
#[derive(Debug)]
pub struct SegmentWriter<W> {
    sink: W,
    page_size: u32,
    pages: BlockWriter,
    table: Vec<u8>,
    transaction_count: u32,
    page_count: u64,
    pages_due: usize,
    last_time_ms: u64,
}

impl<W: Write> SegmentWriter<W> {
    /// Begins a segment.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn new(sink: W, page_size: u32) -> io::Result<Self> {
        Self::with_window(sink, page_size, Window::Usual)
    }

    /// Begins a segment that is compressed with such a window.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn with_window(mut sink: W, page_size: u32, window: Window) -> io::Result<Self> {
        sink.write_all(&encode_header(HEADER_MAGIC, page_size))?;
        Ok(Self {
            sink,
            page_size,
            pages: BlockWriter::with_window(window),
            table: Vec::new(),
            transaction_count: 0,
            page_count: 0,
            pages_due: 0,
            last_time_ms: 0,
        })
    }

    /// Begins the next transaction; the images of `page_numbers` (strictly ascending) must follow.
    ///
    /// # Errors
    /// When the transaction before still wants pages, or the numbers do not ascend: a mistake of the caller that must not
    /// reach storage. When the table would outgrow [`TABLE_RAW_LIMIT`].
    pub fn begin_transaction(&mut self, info: &TransactionInfo, page_numbers: &[u32]) -> io::Result<()> {
        let ascends = page_numbers.is_sorted_by(|before, after| before < after);
        if self.pages_due != 0 || !ascends {
            return Err(io::Error::other("a transaction was not handed over as it must be"));
        }
        let flags = flag(info.fingerprint.is_some(), FLAG_FINGERPRINT)
            | flag(info.coalesced, FLAG_COALESCED)
            | flag(info.schema_changed, FLAG_SCHEMA_CHANGED);
        let page_count = u32::try_from(page_numbers.len()).map_err(io::Error::other)?;
        if self.table.len() as u64 + RECORD_LEN + u64::from(page_count) * 4 > TABLE_RAW_LIMIT {
            return Err(io::Error::other("a segment has more transactions and pages than its table can hold"));
        }
        self.table.extend_from_slice(&info.time_ms.to_le_bytes());
        self.table.extend_from_slice(&info.fingerprint.unwrap_or(0).to_le_bytes());
        for field in [info.size_pages, info.schema_cookie, page_count, flags].iter().chain(page_numbers) {
            self.table.extend_from_slice(&field.to_le_bytes());
        }
        self.pages_due = page_numbers.len();
        self.page_count += u64::from(page_count);
        self.transaction_count += 1;
        self.last_time_ms = info.time_ms;
        Ok(())
    }

    /// Adds the image of the transaction's next page.
    ///
    /// # Errors
    /// When no page is due or the image has not the page size; when the sink fails.
    pub fn push_page(&mut self, image: &[u8]) -> io::Result<()> {
        if self.pages_due == 0 || image.len() != self.page_size as usize {
            return Err(io::Error::other("a page was not handed over as it must be"));
        }
        self.pages_due -= 1;
        self.pages.push(&mut self.sink, image)
    }

    /// Raw bytes of page images so far.
    #[must_use]
    pub fn raw_len_bytes(&self) -> u64 {
        self.pages.raw_len_bytes
    }

    /// Number of transactions so far.
    #[must_use]
    pub fn transaction_count(&self) -> u32 {
        self.transaction_count
    }

    /// Ends the segment. The sink is flushed, not synced.
    ///
    /// # Errors
    /// When there is no transaction, or pages are missing; when the sink fails.
    pub fn finish(mut self, epoch: u32, first_txid: u64) -> io::Result<(W, SegmentKey)> {
        if self.transaction_count == 0 || self.pages_due != 0 {
            return Err(io::Error::other("a segment was ended before it was whole"));
        }
        self.pages.finish(&mut self.sink)?;
        let mut table = BlockWriter::default();
        for part in self.table.chunks(1 << 20) {
            table.push(&mut self.sink, part)?;
        }
        table.finish(&mut self.sink)?;
        let footer = SegmentFooter {
            page_size: self.page_size,
            pages_offset: HEADER_LEN as u64,
            pages_len: self.pages.len_bytes,
            page_block_count: self.pages.block_count,
            table_len: table.len_bytes,
            table_raw_len: self.table.len() as u64,
            table_block_count: table.block_count,
            transaction_count: self.transaction_count,
            page_count: self.page_count,
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

/// Whether so many blocks fit the bytes that they are said to take.
fn has_room_for(len_bytes: u64, block_count: u32) -> bool {
    u64::from(block_count) * BLOCK_HEADER_LEN as u64 <= len_bytes
}

/// zstd never makes more of raw bytes than this, headers included.
fn most_compressed(raw_len_bytes: u64, block_count: u32) -> u64 {
    raw_len_bytes + raw_len_bytes / 128 + u64::from(block_count) * 1024
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
    /// Number of page images.
    pub page_count: u64,
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
        for field in
            [self.page_size, self.page_block_count, self.table_block_count, self.transaction_count, self.span.epoch]
        {
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
        let (transaction_count, epoch) = (fields.u32()?, fields.u32()?);
        let expected_len = [HEADER_LEN as u64, pages_len, table_len, FOOTER_LEN as u64]
            .iter()
            .try_fold(0_u64, |sum, &part| sum.checked_add(part));
        let table_raw_due = (u64::from(transaction_count) * RECORD_LEN).saturating_add(page_count.saturating_mul(4));
        let is_consistent = expected_len == Some(object_len)
            && is_page_size(page_size)
            && transaction_count >= 1
            && last_txid.checked_sub(first_txid) == Some(u64::from(transaction_count) - 1)
            && table_raw_len == table_raw_due
            && table_raw_len <= TABLE_RAW_LIMIT
            && page_count.saturating_mul(u64::from(page_size)) <= u64::from(page_block_count) * BLOCK_RAW_LIMIT as u64
            && has_room_for(pages_len, page_block_count)
            && has_room_for(table_len, table_block_count)
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
    pub fn decode_table(&self, blocks: &[u8]) -> Result<Vec<Transaction>, FormatError> {
        let what = "the segment's table";
        let raw = read_section(blocks, self.table_block_count, self.table_raw_len, what)?;
        let mut fields = Fields::new(&raw, what);
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
        Ok(transactions)
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

/// Hands out page images, block by block, in the order of the table.
pub struct PageStream {
    blocks: BlockReader,
    page_size: usize,
    raw: Vec<u8>,
}

impl PageStream {
    /// At the first block.
    ///
    /// # Errors
    /// When zstd can't be set up.
    pub fn new(footer: &SegmentFooter) -> Result<Self, FormatError> {
        let blocks = BlockReader::new("the segment's pages")?;
        Ok(Self { blocks, page_size: footer.page_size as usize, raw: Vec::new() })
    }

    /// Reads the block at the start of `bytes`; gives the images in it, and how many bytes it took.
    ///
    /// # Errors
    /// When the block is damaged or holds no whole pages.
    pub fn read_block(&mut self, bytes: &[u8]) -> Result<(std::slice::ChunksExact<'_, u8>, usize), FormatError> {
        let taken = self.blocks.read(bytes, &mut self.raw)?;
        if self.raw.is_empty() || !self.raw.len().is_multiple_of(self.page_size) {
            return Err(FormatError::Inconsistent("a block of the segment's pages holds no whole pages".into()));
        }
        Ok((self.raw.chunks_exact(self.page_size), taken))
    }
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
    /// Reads a segment and hands each page's image to `page` with the index of its transaction and its number.
    ///
    /// # Errors
    /// When any byte of it is not as it was written.
    pub fn decode(bytes: &[u8], mut page: impl FnMut(usize, u32, &[u8])) -> Result<Self, FormatError> {
        let footer = SegmentFooter::decode(bytes, bytes.len() as u64)?;
        check_segment_header(bytes, &footer)?;
        // The footer's lengths add up to the object's, so these are inside.
        let (blocks, rest) = bytes[HEADER_LEN..].split_at(footer.pages_len as usize);
        let transactions = footer.decode_table(&rest[..footer.table_len as usize])?;
        let mut expected = transactions
            .iter()
            .enumerate()
            .flat_map(|(index, transaction)| transaction.page_numbers.iter().map(move |&number| (index, number)));
        let mut stream = PageStream::new(&footer)?;
        let mut at = 0;
        for _ in 0..footer.page_block_count {
            let (images, taken) = stream.read_block(blocks.get(at..).unwrap_or_default())?;
            at += taken;
            for image in images {
                let (index, number) = expected.next().ok_or_else(too_many)?;
                page(index, number, image);
            }
        }
        if expected.next().is_some() || at != blocks.len() {
            return Err(too_many());
        }
        drop(expected);
        Ok(Self { footer, transactions })
    }
}

fn too_many() -> FormatError {
    FormatError::Inconsistent("the segment's pages and table contradict each other".into())
}
