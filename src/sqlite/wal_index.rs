//! The header of the wal-index, the `-shm` file ("WAL-mode File Format", section 2.1).
//!
//! It says which frames of the WAL are *published*. A writer that fails between its commit frame and the publication
//! leaves a frame that looks committed and is none: the next writer overwrites it. So capture stops at what is
//! published, however valid the frames after it look.

use super::wal::Salts;

/// How many bytes of the `-shm` file [`WalIndex::parse`] wants: two copies of the header, and the checkpoint's state.
pub const WAL_INDEX_LEN: usize = 136;

const COPY_LEN: usize = 48;

/// What the wal-index says at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalIndex {
    /// Counts commits since the wal-index was made; wraps around.
    pub commit_counter: u32,
    /// Number of published frames. 0 when the WAL is to be begun anew by the next writer.
    pub frame_count: u32,
    /// Size of the database in pages after the last published commit.
    pub size_pages: u32,
    /// The generation of the WAL. Meaningful only where `frame_count` is not 0: until the first frame of a
    /// generation is written, the file may still hold the one before.
    pub salts: Salts,
    /// How many of the published frames are in the main file already (`nBackfill`). A checkpointer stores it after
    /// the last page is written.
    pub backfilled_frames: u32,
    /// How many were to be copied by the last checkpoint (`nBackfillAttempted`). A checkpointer stores it before the
    /// first page is written.
    pub backfill_attempted_frames: u32,
}

/// How far the frames of one generation of the WAL are copied into the main file, and that no checkpoint is on its way
/// or was cut off. As long as it is the same value, SQLite wrote nothing to the main file (`walCheckpoint`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backfill {
    salts: Salts,
    frames: u32,
}

impl WalIndex {
    /// Reads the wal-index. `None` while a writer is between its two copies (try again), or when it is not
    /// initialised yet.
    #[must_use]
    pub fn parse(bytes: &[u8; WAL_INDEX_LEN]) -> Option<Self> {
        let (copy, rest) = bytes.split_at(COPY_LEN);
        let is_initialised = copy[12] != 0;
        // Writers store the second copy first; two equal copies with a right checksum were whole when they were read.
        if copy != &rest[..COPY_LEN] || !is_initialised || !checksum_is_right(copy) {
            return None;
        }
        let mut salts = [0; 8];
        salts.copy_from_slice(&copy[32..40]);
        Some(Self {
            commit_counter: native32(copy, 8),
            frame_count: native32(copy, 16),
            size_pages: native32(copy, 20),
            salts: Salts(salts),
            backfilled_frames: native32(bytes, 96),
            backfill_attempted_frames: native32(bytes, 128),
        })
    }

    /// How far frames are copied; `None` while a checkpoint copies, or when one was cut off.
    #[must_use]
    pub fn backfill(&self) -> Option<Backfill> {
        let is_settled = self.backfill_attempted_frames == self.backfilled_frames;
        is_settled.then_some(Backfill { salts: self.salts, frames: self.backfilled_frames })
    }

    /// Whether a checkpoint other than the one that runs has copied frames since `before`. For the checkpointer itself:
    /// it has stored what it attempts already.
    #[must_use]
    pub fn is_backfilled_as(&self, before: Backfill) -> bool {
        (before.salts, before.frames) == (self.salts, self.backfilled_frames)
    }

    /// Whether all published frames are in the main file.
    #[must_use]
    pub fn is_checkpointed(&self) -> bool {
        self.backfilled_frames >= self.frame_count
    }
}

/// The wal-index is in the machine's own byte order, its checksum as well.
fn checksum_is_right(copy: &[u8]) -> bool {
    let (mut first, mut second) = (0_u32, 0_u32);
    for at in (0..40).step_by(8) {
        first = first.wrapping_add(native32(copy, at)).wrapping_add(second);
        second = second.wrapping_add(native32(copy, at + 4)).wrapping_add(first);
    }
    (first, second) == (native32(copy, 40), native32(copy, 44))
}

fn native32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
