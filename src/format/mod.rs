//! What our objects are: keys, segments, snapshots, records. Bytes in, bytes out; no I/O.
//!
//! `docs/FORMAT.md` describes the same byte for byte.

pub mod block;
pub mod change;
pub mod key;
pub mod record;
pub mod run;
pub mod segment;
pub mod snapshot;

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The version of the storage layout that this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// A state of a database: what it was after transaction `txid` of epoch `epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// The epoch, counted from 1.
    pub epoch: u32,
    /// The transaction.
    pub txid: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "transaction {} of epoch {}", self.txid, self.epoch)
    }
}

/// What is wrong with the bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The object or a part of it ends too early.
    #[error("{what} is cut short")]
    TooShort {
        /// The part.
        what: &'static str,
    },
    /// Magic bytes are not there: it is not such an object.
    #[error("{what} does not begin or end as it must")]
    BadMagic {
        /// The part.
        what: &'static str,
    },
    /// A checksum does not match.
    #[error("the checksum of {what} does not match")]
    BadChecksum {
        /// The part.
        what: &'static str,
    },
    /// The object was written by a newer program.
    #[error("it has format version {found}; this program reads version {FORMAT_VERSION}")]
    UnknownVersion {
        /// The version it has.
        found: u32,
    },
    /// Compressed data can't be decompressed.
    #[error("{what} can't be decompressed")]
    BadCompression {
        /// The part.
        what: &'static str,
    },
    /// Parts contradict each other.
    #[error("{0}")]
    Inconsistent(String),
}

/// The hash of one page's image: XXH3 (64 bits) of its bytes, seeded with its number.
#[must_use]
pub fn page_hash(page_number: u32, image: &[u8]) -> u64 {
    xxh3_64_with_seed(image, u64::from(page_number))
}

/// The page that holds byte 2^30, which SQLite uses for locks alone and never reads or writes (file format, section 1.4).
#[must_use]
pub fn lock_page(page_size: u32) -> u32 {
    (1 << 30) / page_size + 1
}

/// How many pages an extent holds: about 256 KiB.
#[must_use]
pub fn pages_per_extent(page_size: u32) -> u32 {
    (256 * 1024 / page_size).max(1)
}

/// How many extents a database of `size_pages` pages has.
#[must_use]
pub fn extent_count(size_pages: u32, page_size: u32) -> u32 {
    size_pages.div_ceil(pages_per_extent(page_size))
}

/// Extent `index` of a database of `size_pages` pages: its first page, and how many pages it has.
#[must_use]
pub fn extent_pages(index: u32, size_pages: u32, page_size: u32) -> (u32, u32) {
    let per_extent = pages_per_extent(page_size);
    let before = index.saturating_mul(per_extent);
    (before.saturating_add(1), size_pages.saturating_sub(before).min(per_extent))
}

/// Whether `page_size` is one that SQLite knows.
pub(crate) fn is_page_size(page_size: u32) -> bool {
    page_size.is_power_of_two() && (512..=65_536).contains(&page_size)
}

/// Reads fixed-size little-endian fields one after another. Reading past the end gives an error, never a default.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or(FormatError::TooShort { what: self.what })?;
        self.rest = rest;
        Ok(*field)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.take().map(u64::from_le_bytes)
    }

    /// The `magic` must come next.
    pub(crate) fn magic(&mut self, magic: &[u8; 8]) -> Result<(), FormatError> {
        let found: [u8; 8] = self.take()?;
        if found == *magic { Ok(()) } else { Err(FormatError::BadMagic { what: self.what }) }
    }
}

/// Appends the CRC-32 of all that `bytes` holds.
pub(crate) fn seal(bytes: &mut Vec<u8>) {
    let crc32 = crc32fast::hash(bytes);
    bytes.extend_from_slice(&crc32.to_le_bytes());
}

/// The header of a segment or snapshot: magic, version, page size, reserved zeros, CRC-32; 32 bytes.
pub const HEADER_LEN: usize = 32;

pub(crate) fn encode_header(magic: &[u8; 8], page_size: u32) -> Vec<u8> {
    let mut header = magic.to_vec();
    header.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    header.extend_from_slice(&page_size.to_le_bytes());
    header.resize(HEADER_LEN - 4, 0);
    seal(&mut header);
    header
}

/// Checks an object's header and gives its page size.
pub(crate) fn decode_header(bytes: &[u8], magic: &[u8; 8], what: &'static str) -> Result<u32, FormatError> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(FormatError::TooShort { what })?;
    let mut fields = Fields::new(header, what);
    fields.magic(magic)?;
    check_sealed(header, what)?;
    let found = fields.u32()?;
    if found != FORMAT_VERSION {
        return Err(FormatError::UnknownVersion { found });
    }
    let page_size = fields.u32()?;
    if !is_page_size(page_size) {
        return Err(FormatError::Inconsistent(format!("{what} gives an impossible page size ({page_size})")));
    }
    Ok(page_size)
}

/// Length of the footer of a segment or snapshot in bytes: 84 of fields, CRC-32 (of the fields and the magic), magic, zeros.
pub const FOOTER_LEN: usize = 100;
const FOOTER_FIELDS_LEN: usize = 84;

pub(crate) fn encode_footer(mut fields: Vec<u8>, magic: &[u8; 8]) -> Vec<u8> {
    fields.resize(FOOTER_FIELDS_LEN, 0);
    let crc32 = crc32fast::hash(&[&fields, &magic[..]].concat());
    fields.extend_from_slice(&crc32.to_le_bytes());
    fields.extend_from_slice(magic);
    fields.resize(FOOTER_LEN, 0);
    fields
}

/// Checks the footer at the end of `tail` and gives its fields.
pub(crate) fn decode_footer<'a>(
    tail: &'a [u8],
    magic: &[u8; 8],
    what: &'static str,
) -> Result<Fields<'a>, FormatError> {
    let footer: &[u8; FOOTER_LEN] = tail.last_chunk().ok_or(FormatError::TooShort { what })?;
    let (fields, seal) = footer.split_at(FOOTER_FIELDS_LEN);
    let mut seal = Fields::new(seal, what);
    let crc32 = seal.u32()?;
    seal.magic(magic)?;
    if crc32fast::hash(&[fields, &magic[..]].concat()) != crc32 || seal.u32()? != 0 {
        return Err(FormatError::BadChecksum { what });
    }
    Ok(Fields::new(fields, what))
}

/// Checks that the last four bytes are the CRC-32 of those before.
pub(crate) fn check_sealed(bytes: &[u8], what: &'static str) -> Result<(), FormatError> {
    let (content, crc32) = bytes.split_last_chunk::<4>().ok_or(FormatError::TooShort { what })?;
    if crc32fast::hash(content) == u32::from_le_bytes(*crc32) { Ok(()) } else { Err(FormatError::BadChecksum { what }) }
}
