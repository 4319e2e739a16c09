//! Getting a database back: the history of a replica, the plan of a restore (a value), and its execution.

pub mod execute;
pub(crate) mod extents;
pub mod history;
mod image;
pub mod install;
mod pages;
pub mod plan;
pub mod progress;
pub mod run;
pub(crate) mod segments;
pub mod tail;

use std::io;
use std::path::{Path, PathBuf};

use crate::format::{FORMAT_VERSION, FormatError, Position};
use crate::store::{StoreError, StoreErrorKind};

/// Why a database could not be restored. Nothing that was there before is harmed by any of these.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no replica at that place.
    #[error("there is no backup in {location}")]
    NoReplica {
        /// The place.
        location: String,
    },
    /// There is a replica, but nothing in it can be restored yet.
    #[error("nothing can be restored from {location} yet: its first snapshot is not there")]
    NothingYet {
        /// The place.
        location: String,
    },
    /// An epoch that is not there was asked for.
    #[error("there is no epoch {epoch} in {location}; there are {first} to {last}")]
    NoSuchEpoch {
        /// The place.
        location: String,
        /// The epoch that was asked for.
        epoch: u32,
        /// The oldest that is there.
        first: u32,
        /// The newest that is there.
        last: u32,
    },
    /// What was asked for is outside of what can be restored.
    #[error("{asked} can't be restored from {location}; what can be: {range}")]
    OutOfRange {
        /// The place.
        location: String,
        /// What was asked for, in words.
        asked: String,
        /// What there is, in words.
        range: String,
    },
    /// An object is missing, damaged, or not what its name says.
    #[error("{object} in {location} is damaged: {what}")]
    Damaged {
        /// The place.
        location: String,
        /// The object's key.
        object: String,
        /// What is wrong.
        what: String,
    },
    /// An object was written by a newer program.
    #[error("{object} in {location} has format version {found}; this program reads version {FORMAT_VERSION}")]
    NewerFormat {
        /// The place.
        location: String,
        /// The object's key.
        object: String,
        /// The version it has.
        found: u32,
    },
    /// Transactions are missing in the middle of the history.
    #[error(
        "transactions {first_missing} to {last_missing} are missing in {location}; {}",
        newest_before(*newest)
    )]
    Gap {
        /// The place.
        location: String,
        /// The first that is missing.
        first_missing: u64,
        /// The last that is missing.
        last_missing: u64,
        /// The newest one before them that can be restored, if there is one.
        newest: Option<u64>,
    },
    /// The restored pages are not those that the writer had.
    #[error(
        "the restored database is not what it was: its fingerprint is {found:016x}, that of {position} is {expected:016x}"
    )]
    FingerprintMismatch {
        /// The state that was to be restored.
        position: Position,
        /// Its recorded fingerprint.
        expected: u64,
        /// That of the restored pages.
        found: u64,
    },
    /// The target is there already.
    #[error("{} is there already", .0.display())]
    TargetExists(PathBuf),
    /// Somebody uses the target.
    #[error("{} is open in another process", .0.display())]
    TargetInUse(PathBuf),
    /// A mistake in this program.
    #[error("an internal error ended the restore: {0}")]
    Internal(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A local file could not be written or read.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

fn newest_before(newest: Option<u64>) -> String {
    match newest {
        Some(txid) => format!("the newest one before them that can be restored is {txid}"),
        None => "nothing before them can be restored".into(),
    }
}

impl RestoreError {
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), doing, source }
    }

    pub(crate) fn damaged(location: &str, object: &impl ToString, what: &impl ToString) -> Self {
        Self::Damaged { location: location.to_owned(), object: object.to_string(), what: what.to_string() }
    }

    pub(crate) fn format(location: &str, object: &impl ToString) -> impl FnOnce(FormatError) -> Self {
        move |error| match error {
            FormatError::UnknownVersion { found } => {
                Self::NewerFormat { location: location.to_owned(), object: object.to_string(), found }
            }
            other => Self::damaged(location, object, &other),
        }
    }

    /// An object that a plan needs: that it is missing or too short is damage, not a state of the store.
    pub(crate) fn object(location: &str, object: &impl ToString) -> impl FnOnce(StoreError) -> Self {
        move |error| match error.kind {
            StoreErrorKind::NotFound => Self::damaged(location, object, &"it is missing"),
            StoreErrorKind::WrongSize => Self::damaged(location, object, &error.message),
            _ => Self::Store(error),
        }
    }
}
