//! Descriptors of files that SQLite locks.
//!
//! POSIX locks belong to a process and a file: closing *any* descriptor of a file drops all locks that the process holds on it,
//! those of SQLite's connections as well (fcntl_locking(2), "Advisory record locking"). A process may follow one database twice,
//! for two replicas. So each such file is open once in the process, for all who use it, and is closed when the last of them has
//! ended, his connections first.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Device and inode.
type FileId = (u64, u64);

/// The `-wal` and the `-shm` file that SQLite's connections of this process have open beside a main file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beside {
    wal: FileId,
    shm: FileId,
}

impl Beside {
    /// Those that are at these paths; `None` where one is missing.
    #[must_use]
    pub fn at(wal: &Path, shm: &Path) -> Option<Self> {
        let id = |path: &Path| fs::metadata(path).ok().map(|metadata| id_of(&metadata));
        Some(Self { wal: id(wal)?, shm: id(shm)? })
    }
}

struct Open {
    file: Arc<File>,
    /// Of a main file, once connections to it are open.
    beside: Option<Beside>,
    /// Opened by the way, when a path came to lead to a file that was open already; they must not be closed before it.
    others: Vec<File>,
    users: usize,
}

impl Open {
    fn join(&mut self, id: FileId) -> SharedFile {
        self.users += 1;
        SharedFile { file: self.file.clone(), user: User(id) }
    }
}

/// Files are opened and closed with this held: whoever opens one is counted before another one's end could close it.
static OPEN: Mutex<BTreeMap<FileId, Open>> = Mutex::new(BTreeMap::new());

fn open_files() -> MutexGuard<'static, BTreeMap<FileId, Open>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn id_of(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// A file that is open once in the process.
///
/// Fields are dropped in the order of their declaration: when the last user goes, only the table holds the file still.
#[derive(Debug)]
pub struct SharedFile {
    file: Arc<File>,
    user: User,
}

/// One of those who have a file open.
#[derive(Debug)]
struct User(FileId);

impl SharedFile {
    /// Opens the file at `path` to read it, or joins those who have it open.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut open = open_files();
        if let Some(id) = fs::metadata(path).map(|metadata| id_of(&metadata)).ok()
            && let Some(known) = open.get_mut(&id)
        {
            return Ok(known.join(id));
        }
        let file = File::open(path)?;
        let id = id_of(&file.metadata()?);
        match open.entry(id) {
            Entry::Occupied(mut known) => {
                known.get_mut().others.push(file);
                Ok(known.get_mut().join(id))
            }
            Entry::Vacant(entry) => {
                Ok(entry.insert(Open { file: Arc::new(file), beside: None, others: Vec::new(), users: 0 }).join(id))
            }
        }
    }
}

impl SharedFile {
    /// The files that connections of this process have open beside this main file; `None` while none are open.
    #[must_use]
    pub fn beside(&self) -> Option<Beside> {
        open_files().get(&self.user.0).and_then(|known| known.beside)
    }

    /// Records which files connections have open beside this main file. Returns whether they are those of all others
    /// that use it: as long as one of them is open, SQLite joins it to the same wal-index.
    #[must_use]
    pub fn note_beside(&self, beside: Beside) -> bool {
        let mut open = open_files();
        let Some(known) = open.get_mut(&self.user.0) else { return false };
        *known.beside.get_or_insert(beside) == beside
    }
}

impl Deref for SharedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut open = open_files();
        let Some(known) = open.get_mut(&self.0) else { return };
        known.users -= 1;
        if known.users == 0 {
            // Closed before anybody can open it anew.
            drop(open.remove(&self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn is_open(id: FileId) -> bool {
        open_files().contains_key(&id)
    }

    #[test]
    fn a_file_is_open_once_until_the_last_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&path, "one").unwrap();
        fs::hard_link(&path, &link).unwrap();
        let first = SharedFile::open(&path).unwrap();
        let second = SharedFile::open(&link).unwrap();
        let id = id_of(&first.metadata().unwrap());
        assert_eq!(first.as_raw_fd(), second.as_raw_fd());
        drop(first);
        assert!(is_open(id));
        assert_eq!(second.metadata().unwrap().len(), 3);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        let other = SharedFile::open(&path).unwrap();
        let other_id = id_of(&other.metadata().unwrap());
        assert_ne!(other_id, id);
        drop(second);
        assert!(!is_open(id) && is_open(other_id));
    }
}
