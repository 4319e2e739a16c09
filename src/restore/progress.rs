//! How far a restore is, for whoever waits for it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What a restore is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// What is there already is looked at.
    Comparing,
    /// The snapshot's extents are fetched and written.
    Snapshot,
    /// Segments are fetched, and what they changed is written.
    Segments,
    /// Everything is written; it is made durable.
    Syncing,
}

impl Phase {
    /// In a word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Comparing => "comparing",
            Self::Segments => "segments",
            Self::Snapshot => "snapshot",
            Self::Syncing => "syncing",
        }
    }
}

/// Written by a restore, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    done_bytes: AtomicU64,
}

impl Progress {
    /// What it is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Comparing,
            1 => Phase::Snapshot,
            2 => Phase::Segments,
            _ => Phase::Syncing,
        }
    }

    /// Bytes of the snapshot's part of the database that are written, and of segments that were worked off: see
    /// [`super::plan::Plan::work_len_bytes`].
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn note_done(&self, len_bytes: u64) {
        self.done_bytes.fetch_add(len_bytes, Ordering::Relaxed);
    }
}
