//! The write-ahead log's bytes: header, frame headers, checksums (SQLite's "WAL-mode File Format", sections 1 to 3).

/// Length of the WAL's header in bytes.
pub const WAL_HEADER_LEN: usize = 32;
/// Length of the header of each frame in bytes; the page image follows it.
pub const FRAME_HEADER_LEN: usize = 24;

/// Magic of a WAL whose checksums read 32-bit words little-endian; the lowest bit set means big-endian.
const MAGIC: u32 = 0x377f_0682;
/// The only version of the format there has been.
const VERSION: u32 = 3_007_000;

/// Two random numbers that name one generation of a WAL: they change each time that SQLite begins it anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Salts(pub [u8; 8]);

impl Salts {
    /// Returns whether SQLite restarted the WAL exactly once since the generation `earlier`:
    /// `walRestartHdr` adds one to the first salt each time. Not the reverse: after a WAL was
    /// truncated, `walFrames` may take random salts.
    #[must_use]
    pub fn is_next_after(self, earlier: Self) -> bool {
        let restarts = |salts: Self| be32(&salts.0, 0);
        restarts(self) == restarts(earlier).wrapping_add(1)
    }
}

/// The running checksum over a WAL: each frame's continues the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checksum(pub u32, pub u32);

/// Which byte order the checksum reads the data's 32-bit words in. A property of the WAL, not of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// Words are little-endian (WALs begun on x86 and ARM).
    Little,
    /// Words are big-endian.
    Big,
}

impl Checksum {
    /// The checksum continued over `data`, whose length must be a multiple of 8; a rest would be ignored
    /// (section 4.2 of SQLite's file format: s0 += x(i) + s1; s1 += x(i+1) + s0).
    #[must_use]
    pub fn extended(self, order: ByteOrder, data: &[u8]) -> Self {
        debug_assert_eq!(data.len() % 8, 0);
        match order {
            ByteOrder::Little => self.extended_by(data, u32::from_le_bytes),
            ByteOrder::Big => self.extended_by(data, u32::from_be_bytes),
        }
    }

    #[inline(always)]
    fn extended_by(self, data: &[u8], word: impl Fn([u8; 4]) -> u32) -> Self {
        let Self(mut first, mut second) = self;
        for pair in data.chunks_exact(8) {
            first = first.wrapping_add(word([pair[0], pair[1], pair[2], pair[3]])).wrapping_add(second);
            second = second.wrapping_add(word([pair[4], pair[5], pair[6], pair[7]])).wrapping_add(first);
        }
        Self(first, second)
    }
}

/// The header of a WAL file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// Page size in bytes.
    pub page_size: u32,
    /// The generation.
    pub salts: Salts,
    /// Byte order of all checksums in the file.
    pub order: ByteOrder,
    /// The header's own checksum, which the first frame's continues.
    pub checksum: Checksum,
}

impl WalHeader {
    /// Reads a WAL's header. `None` when its magic, version, page size or checksum is not right: then SQLite ignores
    /// the WAL, too.
    #[must_use]
    pub fn parse(bytes: &[u8; WAL_HEADER_LEN]) -> Option<Self> {
        let order = match be32(bytes, 0) {
            MAGIC => ByteOrder::Little,
            magic if magic == MAGIC | 1 => ByteOrder::Big,
            _ => return None,
        };
        let page_size = be32(bytes, 8);
        let checksum = Checksum::default().extended(order, &bytes[..24]);
        let valid = be32(bytes, 4) == VERSION
            && page_size.is_power_of_two()
            && (512..=65_536).contains(&page_size)
            && checksum == Checksum(be32(bytes, 24), be32(bytes, 28));
        let mut salts = [0; 8];
        salts.copy_from_slice(&bytes[16..24]);
        valid.then_some(Self { page_size, salts: Salts(salts), order, checksum })
    }

    /// Length of one frame, header and page, in bytes.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_LEN + self.page_size as usize
    }

    /// Byte offset of frame `index`, counted from 0.
    #[must_use]
    pub fn frame_offset(&self, index: u32) -> u64 {
        WAL_HEADER_LEN as u64 + u64::from(index) * self.frame_len() as u64
    }

    /// Checks `frame` (header and page) as the one that follows a frame with checksum `previous` in this WAL.
    /// `None` when the salts are another generation's, the checksum does not continue, or the page number is 0:
    /// the frame was not written yet, or not wholly.
    #[must_use]
    pub fn check_frame(&self, previous: Checksum, frame: &[u8]) -> Option<Frame> {
        let header: &[u8; FRAME_HEADER_LEN] = frame.first_chunk()?;
        if frame.len() != self.frame_len() || header[8..16] != self.salts.0 {
            return None;
        }
        let checksum = previous.extended(self.order, &header[..8]).extended(self.order, &frame[FRAME_HEADER_LEN..]);
        let page_number = be32(header, 0);
        let valid = page_number != 0 && checksum == Checksum(be32(header, 16), be32(header, 20));
        valid.then_some(Frame { page_number, commit_size_pages: be32(header, 4), checksum })
    }
}

/// What a frame's header says, once it has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The page whose image the frame holds.
    pub page_number: u32,
    /// For the last frame of a transaction the size of the database after it, in pages; otherwise 0.
    pub commit_size_pages: u32,
    /// The running checksum up to and including this frame.
    pub checksum: Checksum,
}

/// Returns whether a frame with this header is the last one of a transaction.
#[must_use]
pub fn is_commit_frame(header: &[u8; FRAME_HEADER_LEN]) -> bool {
    be32(header, 4) != 0
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header as SQLite would write it.
    pub(crate) fn header_bytes(order: ByteOrder, page_size: u32, salts: [u8; 8]) -> [u8; WAL_HEADER_LEN] {
        let mut bytes = [0; WAL_HEADER_LEN];
        let magic = if order == ByteOrder::Big { MAGIC | 1 } else { MAGIC };
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_be_bytes());
        bytes[8..12].copy_from_slice(&page_size.to_be_bytes());
        bytes[16..24].copy_from_slice(&salts);
        let sum = Checksum::default().extended(order, &bytes[..24]);
        bytes[24..28].copy_from_slice(&sum.0.to_be_bytes());
        bytes[28..].copy_from_slice(&sum.1.to_be_bytes());
        bytes
    }

    #[test]
    fn header_of_both_byte_orders() {
        for order in [ByteOrder::Little, ByteOrder::Big] {
            let bytes = header_bytes(order, 4096, *b"saltsalt");
            let header = WalHeader::parse(&bytes).unwrap();
            assert_eq!((header.order, header.page_size, header.salts), (order, 4096, Salts(*b"saltsalt")));
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes;
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(WalHeader::parse(&flipped), None, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_frame_must_continue_its_chain() {
        for order in [ByteOrder::Little, ByteOrder::Big] {
            let header = WalHeader::parse(&header_bytes(order, 512, *b"saltsalt")).unwrap();
            let mut frame = vec![0x5a; header.frame_len()];
            frame[..4].copy_from_slice(&9_u32.to_be_bytes());
            frame[4..8].copy_from_slice(&11_u32.to_be_bytes());
            frame[8..16].copy_from_slice(b"saltsalt");
            let sum = header.checksum.extended(order, &frame[..8]).extended(order, &frame[24..]);
            frame[16..20].copy_from_slice(&sum.0.to_be_bytes());
            frame[20..24].copy_from_slice(&sum.1.to_be_bytes());
            let checked = header.check_frame(header.checksum, &frame).unwrap();
            assert_eq!((checked.page_number, checked.commit_size_pages), (9, 11));
            assert_eq!(header.check_frame(Checksum(1, 2), &frame), None);
            for at in [0, 5, 9, 17, 24, 535] {
                let mut torn = frame.clone();
                torn[at] ^= 1;
                assert_eq!(header.check_frame(header.checksum, &torn), None, "byte {at}");
            }
        }
    }
}
