//! What SQLite's files are: database header, WAL, wal-index, locks. Knows nothing of storage.
//!
//! - [`header`], [`wal`], [`wal_index`]: bytes, pure.
//! - [`locks`]: locks that other processes hold, found without taking one.
//! - [`checkpoint`]: a checkpoint that refuses replaced files and syncs before it counts pages as copied.
//! - [`live`]: a database that others have open: connections, the pin, descriptors and the rules of their lifetimes.
//! - [`follow`]: reading published transactions out of the WAL, and single pages as of the last one read.

pub mod checkpoint;
pub mod descriptors;
pub mod follow;
pub mod header;
pub mod live;
pub mod locks;
pub mod wal;
pub mod wal_index;

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with a live database.
#[derive(Debug, thiserror::Error)]
pub enum SqliteError {
    /// There is no file at the path, or an empty one: the application has not made its database yet.
    #[error("{} is not there yet", path.display())]
    NotThere {
        /// The database.
        path: PathBuf,
    },
    /// The file is not a database.
    #[error("{} can't be followed: {source}", path.display())]
    NotADatabase {
        /// The database.
        path: PathBuf,
        /// What is wrong with its header.
        source: header::HeaderError,
    },
    /// The database can't be used in WAL mode.
    #[error("{} can't be used in WAL mode: {why}", path.display())]
    NotWal {
        /// The database.
        path: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
    /// Another process has the database locked.
    #[error(
        "{} can't be used in WAL mode: another process has it locked; let the application open it without \
         locking_mode=EXCLUSIVE, or run `PRAGMA journal_mode=WAL` yourself while nothing uses it",
        path.display()
    )]
    Locked {
        /// The database.
        path: PathBuf,
    },
    /// Another process has the database open with a main file, WAL or wal-index that is not at the path any more.
    #[error(
        "another process uses {} with a file that was removed or replaced since (the database, its -wal or its -shm); \
         restart that process: until then its commits are not replicated, and may be lost when it ends",
        path.display()
    )]
    Split {
        /// The database.
        path: PathBuf,
    },
    /// A WAL is beside the database that was beside another file under this name. SQLite would apply it.
    #[error(
        "the WAL beside {} was beside another file that was replaced, and may not belong to this one: it is not opened; \
         move {}-wal away if it is not needed, or start the application",
        path.display(),
        path.display()
    )]
    UnclearWal {
        /// The database.
        path: PathBuf,
    },
    /// Another file stands at the path than the one that is open.
    #[error("{} was replaced or removed while it was followed", path.display())]
    Replaced {
        /// The database.
        path: PathBuf,
    },
    /// Somebody wrote to the main file, and it was not SQLite: no checkpoint had anything to copy into it.
    #[error(
        "{} was touched, or written to, by something else than SQLite while it was followed; was a copy put in its place \
         without removing it first?",
        path.display()
    )]
    WrittenTo {
        /// The database.
        path: PathBuf,
    },
    /// The WAL is being changed while it is read; the same call can succeed a moment later.
    #[error("the WAL of {} changed while it was read", path.display())]
    Unsettled {
        /// The database.
        path: PathBuf,
    },
    /// Transactions went by unseen.
    #[error("the WAL of {} went on without us: {seen} transactions read, {committed} committed", path.display())]
    Gap {
        /// The database.
        path: PathBuf,
        /// How many transactions were read.
        seen: u32,
        /// How many SQLite counted in the same time.
        committed: u32,
    },
    /// A page whose content is known by its hash is neither in the WAL nor in the main file.
    #[error("page {page_number} of {} is not as its last transaction wrote it", path.display())]
    PageChanged {
        /// The database.
        path: PathBuf,
        /// The page.
        page_number: u32,
    },
    /// A checkpoint, or the sync of what it copied, failed. SQLite counts none of its frames as copied.
    #[error("a checkpoint of {} failed: {source}", path.display())]
    CheckpointFailed {
        /// The database.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// SQLite answered an error.
    #[error("{} of {}: {source}", doing, path.display())]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// The operating system answered an error.
    #[error("{} {}: {source}", doing, path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

impl SqliteError {
    /// Returns whether a lock, or another name of the file in this process, is what stands in the
    /// way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
        match self {
            Self::Sqlite { source, .. } => {
                matches!(source.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
            }
            Self::Io { source, .. } => source.kind() == io::ErrorKind::ResourceBusy,
            _ => false,
        }
    }

    /// Turns an error of the operating system into one of ours.
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), doing, source }
    }

    pub(crate) fn sqlite(path: &Path, doing: &'static str) -> impl FnOnce(rusqlite::Error) -> Self {
        move |source| Self::Sqlite { path: path.to_owned(), doing, source }
    }
}

/// `path` with `suffix` appended to its file name: `app.db` and `-wal` give `app.db-wal`.
#[must_use]
pub fn sidecar(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
