//! Letting old history go: which objects are kept and why (a plan, which is a value), carrying it out, and marks.
//!
//! The plan begins with what must stay and takes the rest; never the other way round. See [`select`] for the rules.

pub mod marks;
pub mod plan;
pub mod prune;
pub mod select;
pub mod tails;

use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::store::StoreError;

/// Nothing is let go that was needed so long ago, in milliseconds: a restore that was planned then may still be under way.
pub const GRACE_MS: u64 = 60 * 60 * 1000;
/// Every transaction is kept for so long, in milliseconds, unless told otherwise.
pub const DEFAULT_WINDOW_MS: u64 = 30 * 24 * 60 * 60 * 1000;

/// What is kept of a replica's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionSettings {
    /// Every state of the last so many milliseconds stays restorable; `None` keeps everything for ever.
    pub window_ms: Option<u64>,
    /// Of so many days (UTC) one state each.
    pub keep_daily: u32,
    /// Of so many weeks (ISO, UTC) one state each.
    pub keep_weekly: u32,
    /// Of so many months (UTC) one state each.
    pub keep_monthly: u32,
}

impl Default for RetentionSettings {
    fn default() -> Self {
        Self { window_ms: Some(DEFAULT_WINDOW_MS), keep_daily: 0, keep_weekly: 0, keep_monthly: 0 }
    }
}

impl RetentionSettings {
    /// Whether anything is kept beyond the window by rule.
    #[must_use]
    pub fn keeps_periods(&self) -> bool {
        self.keep_daily > 0 || self.keep_weekly > 0 || self.keep_monthly > 0
    }
}

/// What time it is when history is let go. A clock that runs ahead would let everything go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Now {
    /// A person's word, in milliseconds since 1970.
    Told(u64),
    /// A clock that nobody watches, in milliseconds since 1970, of somebody who has stored something just now: it is at most
    /// [`GRACE_MS`] later than the store's clock was when it took its newest object.
    NotFarBeyondStored(u64),
}

impl Now {
    fn resolve(self, history: &History) -> u64 {
        match self {
            Self::Told(now_ms) => now_ms,
            Self::NotFarBeyondStored(now_ms) => {
                let snapshots =
                    history.epochs.values().flat_map(|epoch| &epoch.snapshots).map(|stored| stored.stored_ms);
                let segments = history.epochs.values().flat_map(|epoch| &epoch.segments).map(|stored| stored.stored_ms);
                // Of an object without a time nobody knows when it was stored.
                let newest_ms = snapshots.chain(segments).filter(|&ms| ms != u64::MAX).max();
                now_ms.min(newest_ms.unwrap_or(0).saturating_add(GRACE_MS))
            }
        }
    }
}

/// Why nothing was deleted, or no mark was set.
#[derive(Debug, thiserror::Error)]
pub enum RetainError {
    /// The history can't be read, or the state can't be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A mark can't be read. What it stands for is not known, so nothing is deleted.
    #[error("the mark {key} in {location} can't be read: {what}")]
    UnreadableMark {
        /// The place.
        location: String,
        /// The mark's key.
        key: String,
        /// What is wrong.
        what: String,
    },
    /// There is a mark of that name.
    #[error("there is a mark '{name}' in {location} already, set {created} on transaction {txid}")]
    MarkExists {
        /// The place.
        location: String,
        /// The name.
        name: String,
        /// When it was set, in words.
        created: String,
        /// The transaction that it names.
        txid: u64,
    },
    /// There is no mark of that name.
    #[error("there is no mark '{name}' in {location}")]
    NoSuchMark {
        /// The place.
        location: String,
        /// The name.
        name: String,
    },
    /// Not a mark's name.
    #[error("'{0}' can't be a mark's name: 1 to 100 of A-Z, a-z, 0-9, '.', '_' and '-', and no dot at its beginning")]
    BadName(String),
    /// The mark is there after it was deleted.
    #[error("the mark '{name}' in {location} is still there: the store answers deletions and does not delete")]
    NotDeleted {
        /// The place.
        location: String,
        /// The name.
        name: String,
    },
}

impl From<StoreError> for RetainError {
    fn from(error: StoreError) -> Self {
        Self::Restore(error.into())
    }
}
