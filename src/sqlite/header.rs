//! The first 100 bytes of a database file (SQLite file format, section 1.3).

/// Length of the database header in bytes.
pub const HEADER_LEN: usize = 100;

/// What a database begins with ("Database File Format", section 1.3.1).
pub const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// The parts of a database header that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseHeader {
    /// Page size in bytes: a power of two from 512 to 65,536.
    pub page_size: u32,
    /// Whether the file says that its journal is a WAL (offsets 18 and 19).
    pub is_wal: bool,
    /// The schema cookie: changes with every change of the schema (offset 40).
    pub schema_cookie: u32,
}

/// Why bytes are not a database header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Fewer than 100 bytes.
    #[error("it is shorter than a database header ({found} of 100 bytes)")]
    TooShort {
        /// How many bytes there were.
        found: usize,
    },
    /// The file does not begin as SQLite's files do.
    #[error("it is not a SQLite database (or it is encrypted)")]
    NotADatabase,
    /// A page size that SQLite does not know.
    #[error("its header gives an impossible page size ({found})")]
    BadPageSize {
        /// The value of the header's page size field.
        found: u16,
    },
}

impl DatabaseHeader {
    /// Reads the header at the start of a database file, or of page 1.
    ///
    /// # Errors
    /// When the bytes are not those of a SQLite database.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(HeaderError::TooShort { found: bytes.len() })?;
        if header[..16] != MAGIC[..] {
            return Err(HeaderError::NotADatabase);
        }
        let field = u16::from_be_bytes([header[16], header[17]]);
        let page_size = match field {
            1 => 65_536,
            512..=32_768 if field.is_power_of_two() => u32::from(field),
            found => return Err(HeaderError::BadPageSize { found }),
        };
        Ok(Self { page_size, is_wal: header[18] == 2 && header[19] == 2, schema_cookie: schema_cookie(header) })
    }
}

/// The schema cookie of a page 1 (SQLite file format, section 1.3.9: offset 40, big-endian).
#[must_use]
pub fn schema_cookie(page_one: &[u8]) -> u32 {
    page_one.get(40..44).and_then(|field| field.try_into().ok()).map_or(0, u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(page_size_field: u16) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..16].copy_from_slice(MAGIC);
        bytes[16..18].copy_from_slice(&page_size_field.to_be_bytes());
        bytes[40..44].copy_from_slice(&7_u32.to_be_bytes());
        bytes
    }

    #[test]
    fn page_sizes() {
        for (field, size) in [(512, 512), (4096, 4096), (32_768, 32_768), (1, 65_536)] {
            let parsed = DatabaseHeader::parse(&header(field)).unwrap();
            assert_eq!((parsed.page_size, parsed.schema_cookie, parsed.is_wal), (size, 7, false));
        }
        for field in [0, 2, 256, 513, 65_535] {
            assert_eq!(DatabaseHeader::parse(&header(field)), Err(HeaderError::BadPageSize { found: field }));
        }
    }

    #[test]
    fn what_is_no_database() {
        assert_eq!(DatabaseHeader::parse(&[0; 99]), Err(HeaderError::TooShort { found: 99 }));
        assert_eq!(DatabaseHeader::parse(&[0; 100]), Err(HeaderError::NotADatabase));
    }
}
