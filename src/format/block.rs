//! Compressed blocks: what pages, tables and indexes are kept in.
//!
//! A section is a row of blocks. A block: raw length u32, compressed length u32, CRC-32 of the compressed bytes u32, the bytes.
//! All little-endian. The bytes of all blocks, one after another, are a zstd stream: each block is a frame that tells its
//! content's size, so that neither who writes nor who reads needs a window beside the block itself. (Earlier builds wrote one frame
//! for all blocks of a section, flushed at the end of each.)

use std::io::{self, Write};

use zstd::bulk::Compressor;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::{DParameter, compress_bound};

use super::{Fields, FormatError};

/// Length of a block's header in bytes.
pub const BLOCK_HEADER_LEN: usize = 12;
/// No block holds more raw bytes than this.
pub const BLOCK_RAW_LIMIT: usize = 8 << 20;
/// The largest window of zstd's, as the power of two of its bytes, that a reader has to bear: 8 MiB.
const WINDOW_LOG_LIMIT: u32 = 23;

/// The header of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// Length of the content in bytes.
    pub raw_len: usize,
    /// Length of the compressed bytes that follow.
    pub compressed_len: usize,
    crc32: u32,
}

impl BlockHeader {
    /// Reads a block's header.
    ///
    /// # Errors
    /// When there are too few bytes or a length is beyond the format's limit.
    pub fn decode(bytes: &[u8], what: &'static str) -> Result<Self, FormatError> {
        let mut fields = Fields::new(bytes, what);
        let (raw_len, compressed_len, crc32) = (fields.u32()? as usize, fields.u32()? as usize, fields.u32()?);
        // zstd never grows data by more than this.
        if raw_len > BLOCK_RAW_LIMIT || compressed_len > BLOCK_RAW_LIMIT + BLOCK_RAW_LIMIT / 128 + 1024 {
            return Err(FormatError::Inconsistent(format!(
                "{what} has a block of {raw_len} bytes, more than the limit"
            )));
        }
        Ok(Self { raw_len, compressed_len, crc32 })
    }

    /// Whether `compressed` are the bytes that the header is of.
    #[must_use]
    pub fn has_checksum_of(&self, compressed: &[u8]) -> bool {
        compressed.len() == self.compressed_len && crc32fast::hash(compressed) == self.crc32
    }
}

/// How a section is compressed: what it costs to write, and to read.
///
/// What changed in pages is written in the order of their numbers, so what is alike stands close together: small blocks hold it. A
/// block takes its memory in the writer and in the reader, of which a merge has many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Tables and indexes, of which there is one an object.
    #[default]
    Table,
    /// The pages of a segment that is shipped as soon as it is there: there may be a load, and most will be merged.
    FreshPages,
    /// The pages of a segment that others were merged into.
    MergedPages,
}

impl Compression {
    fn level(self) -> i32 {
        match self {
            Self::Table => 3,
            Self::FreshPages => 1,
            Self::MergedPages => 2,
        }
    }

    /// How many raw bytes go into a block.
    fn block_raw_len(self) -> usize {
        match self {
            Self::Table => 4 << 20,
            Self::FreshPages | Self::MergedPages => 128 << 10,
        }
    }
}

/// Writes a section of blocks to `sink`.
///
/// Memory: the content of one block, raw and compressed, and nothing of zstd's before the first block is full.
#[derive(Default)]
pub struct BlockWriter {
    compression: Compression,
    raw: Vec<u8>,
    compressed: Vec<u8>,
    compressor: Option<Compressor<'static>>,
    /// Number of blocks written.
    pub block_count: u32,
    /// Bytes written, headers included.
    pub len_bytes: u64,
}

impl std::fmt::Debug for BlockWriter {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("BlockWriter").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl BlockWriter {
    /// A writer that compresses so.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        Self { compression, ..Self::default() }
    }

    /// Adds content; writes a block each time that one is full. `unit`, in parts, is never split between blocks.
    ///
    /// # Errors
    /// When the sink or zstd fails.
    pub fn push(&mut self, sink: &mut impl Write, unit: &[&[u8]]) -> io::Result<()> {
        let len: usize = unit.iter().map(|part| part.len()).sum();
        if !self.raw.is_empty() && self.raw.len() + len > self.compression.block_raw_len() {
            self.write_block(sink)?;
        }
        unit.iter().for_each(|part| self.raw.extend_from_slice(part));
        Ok(())
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// When the sink or zstd fails.
    pub fn finish(&mut self, sink: &mut impl Write) -> io::Result<()> {
        if !self.raw.is_empty() {
            self.write_block(sink)?;
        }
        self.compressor = None;
        Ok(())
    }

    fn write_block(&mut self, sink: &mut impl Write) -> io::Result<()> {
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(self.compression.level())?),
        };
        self.compressed.clear();
        self.compressed.reserve(compress_bound(self.raw.len()));
        compressor.compress_to_buffer(&self.raw, &mut self.compressed)?;
        let mut header = Vec::with_capacity(BLOCK_HEADER_LEN);
        for field in [self.raw.len() as u32, self.compressed.len() as u32, crc32fast::hash(&self.compressed)] {
            header.extend_from_slice(&field.to_le_bytes());
        }
        sink.write_all(&header)?;
        sink.write_all(&self.compressed)?;
        self.block_count += 1;
        self.len_bytes += (header.len() + self.compressed.len()) as u64;
        self.raw.clear();
        Ok(())
    }
}

/// Reads a section of blocks, one after another.
pub struct BlockReader {
    decoder: Decoder<'static>,
    what: &'static str,
}

impl BlockReader {
    /// A reader at the start of a section; `what` names the section in errors.
    ///
    /// # Errors
    /// When zstd can't be set up.
    pub fn new(what: &'static str) -> Result<Self, FormatError> {
        let bad = |_| FormatError::BadCompression { what };
        let mut decoder = Decoder::new().map_err(bad)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_LIMIT)).map_err(bad)?;
        Ok(Self { decoder, what })
    }

    /// Reads the block at the start of `bytes` into `raw`, and tells how many bytes it took.
    ///
    /// # Errors
    /// When the block is cut short, its checksum is wrong, or it does not decompress to the length it gives.
    pub fn read(&mut self, bytes: &[u8], raw: &mut Vec<u8>) -> Result<usize, FormatError> {
        let what = self.what;
        let header = BlockHeader::decode(bytes, what)?;
        let end = BLOCK_HEADER_LEN + header.compressed_len;
        let compressed = bytes.get(BLOCK_HEADER_LEN..end).ok_or(FormatError::TooShort { what })?;
        if !header.has_checksum_of(compressed) {
            return Err(FormatError::BadChecksum { what });
        }
        self.decompress(compressed, header.raw_len, raw)?;
        Ok(end)
    }

    fn decompress(&mut self, compressed: &[u8], raw_len: usize, raw: &mut Vec<u8>) -> Result<(), FormatError> {
        let what = self.what;
        raw.clear();
        raw.resize(raw_len, 0);
        let mut input = InBuffer::around(compressed);
        let mut written = 0;
        // Each round takes input or gives output, or the block is not what its header says.
        while written < raw_len || input.pos() < compressed.len() {
            let before = (input.pos(), written);
            let mut output = OutBuffer::around_pos(raw.as_mut_slice(), written);
            self.decoder.run(&mut input, &mut output).map_err(|_| FormatError::BadCompression { what })?;
            written = output.pos();
            if (input.pos(), written) == before {
                return Err(FormatError::Inconsistent(format!("a block of {what} has not the length it gives")));
            }
        }
        Ok(())
    }
}

/// zstd never makes more of raw bytes than this, headers included.
pub(super) fn most_compressed(raw_len_bytes: u64, block_count: u32) -> u64 {
    raw_len_bytes + raw_len_bytes / 128 + u64::from(block_count) * 1024
}

/// Reads a whole section that is in memory. Believes `raw_len` only as the blocks bear it out.
pub(crate) fn read_section(
    bytes: &[u8],
    block_count: u32,
    raw_len: u64,
    what: &'static str,
) -> Result<Vec<u8>, FormatError> {
    let mut reader = BlockReader::new(what)?;
    let (mut at, mut content, mut raw) = (0, Vec::new(), Vec::new());
    for _ in 0..block_count {
        at += reader.read(bytes.get(at..).unwrap_or_default(), &mut raw)?;
        content.extend_from_slice(&raw);
        if content.len() as u64 > raw_len {
            break;
        }
    }
    if at == bytes.len() && content.len() as u64 == raw_len {
        Ok(content)
    } else {
        Err(FormatError::Inconsistent(format!("{what} has not the length that the footer gives")))
    }
}
