//! Descriptors of files that SQLite locks.
//!
//! POSIX locks belong to a process and a file: closing *any* descriptor of a file drops all locks that the process holds on it,
//! those of SQLite's connections as well (fcntl_locking(2), "Advisory record locking"). A process may follow one database twice,
//! for two replicas. So each such file is open once in the process, for all who use it, and is closed when the last of them has
//! ended, his connections first.
//!
//! Files are told apart by device and inode: a link or a bind mount is another path to the same
//! file. Code of a process that follows databases reads any other file that may be a database with
//! [`read_start`], never with [`File::open`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
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
    /// Of a main file: see [`SharedFile::opening`].
    opening: Arc<Mutex<()>>,
    /// By which it was opened.
    path: PathBuf,
    /// Opened by the way, when a path came to lead to a file that was open already; they must not be closed before it.
    others: Vec<File>,
    users: usize,
}

impl Open {
    fn join(&mut self, id: FileId, path: &Path) -> io::Result<SharedFile> {
        if self.path != path {
            let what = format!(
                "it is the same file as {}, which is open: one of the two names has to go",
                self.path.display()
            );
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        self.users += 1;
        Ok(SharedFile { file: self.file.clone(), user: User(id) })
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
    /// Opens the file at `path` to read it, or joins those who have it open. Callers give the path
    /// without symbolic links.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if the file is open by another path: SQLite names `-wal`
    /// after the path, but shares one `-shm` between all connections of a process to one file, so
    /// two paths would mix up two WALs. Otherwise as the operating system answers.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut open = open_files();
        if let Some(id) = id_at(path)
            && let Some(known) = open.get_mut(&id)
        {
            return known.join(id, path);
        }
        let file = File::open(path)?;
        let id = id_of(&file.metadata()?);
        match open.entry(id) {
            Entry::Occupied(mut known) => {
                known.get_mut().others.push(file);
                known.get_mut().join(id, path)
            }
            Entry::Vacant(entry) => {
                let opened = Open {
                    file: Arc::new(file),
                    path: path.to_owned(),
                    beside: None,
                    opening: Arc::default(),
                    others: Vec::new(),
                    users: 0,
                };
                entry.insert(opened).join(id, path)
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

    /// Lock for everything that opens or closes files beside this main file. SQLite locks the `-shm` file as soon as a
    /// connection is open, some time before the file is counted here: if another thread opened and closed it
    /// meanwhile, these locks would be dropped.
    #[must_use]
    pub fn opening(&self) -> Arc<Mutex<()>> {
        open_files().get(&self.user.0).map(|known| known.opening.clone()).unwrap_or_default()
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

/// Fills `buffer` with the first bytes of the file at `path`, and drops no lock that the process
/// holds on it: a file that is open as a [`SharedFile`] is read by that descriptor.
///
/// The table is locked until the file is closed again, so that no other thread can open and lock it
/// in between.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if the file is shorter; otherwise as the operating system
/// answers.
pub fn read_start(path: &Path, buffer: &mut [u8]) -> io::Result<()> {
    let mut open = open_files();
    if let Some(known) = id_at(path).and_then(|id| open.get(&id)) {
        return known.file.read_exact_at(buffer, 0);
    }
    // A pipe that took the file's place would hold up every other file.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata().map(|metadata| open.get_mut(&id_of(&metadata))) {
        Ok(None) => file.read_exact_at(buffer, 0),
        // The path came to lead to a file that is open.
        Ok(Some(known)) => {
            known.others.push(file);
            known.file.read_exact_at(buffer, 0)
        }
        Err(error) => {
            // Closing it could drop locks: better one descriptor too many.
            std::mem::forget(file);
            Err(error)
        }
    }
}

/// The file that `path` leads to.
fn id_at(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().map(|metadata| id_of(&metadata))
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
    fn file_stays_open_once_until_last_user_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        fs::write(&path, "one").unwrap();
        let first = SharedFile::open(&path).unwrap();
        let second = SharedFile::open(&path).unwrap();
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

    #[test]
    fn open_of_file_open_by_other_path_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("a"), directory.path().join("b"));
        fs::write(&path, "one").unwrap();
        fs::hard_link(&path, &link).unwrap();
        let first = SharedFile::open(&path).unwrap();
        let refused = SharedFile::open(&link).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        assert!(refused.to_string().contains(&path.display().to_string()), "{refused}");
        drop(first);
        SharedFile::open(&link).unwrap();
    }

    /// Returns whether this process holds a POSIX lock on the file.
    fn is_locked(path: &Path) -> bool {
        let inode = format!(":{}", fs::metadata(path).unwrap().ino());
        let process = std::process::id().to_string();
        let is_ours = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.len() > 5 && words[1] == "POSIX" && words[4] == process && words[5].ends_with(&inode)
        };
        // The kernel lists locks while others come and go: one listing may miss one.
        (0..50).any(|_| fs::read_to_string("/proc/locks").unwrap().lines().any(is_ours))
    }

    #[test]
    fn read_start_by_any_path_keeps_locks() {
        let directory = tempfile::tempdir().unwrap();
        let (path, hard, soft) = (directory.path().join("a"), directory.path().join("b"), directory.path().join("c"));
        fs::write(&path, "one").unwrap();
        fs::hard_link(&path, &hard).unwrap();
        std::os::unix::fs::symlink(&path, &soft).unwrap();
        let shared = SharedFile::open(&path).unwrap();
        // SAFETY: a plain structure of integers, for which all zeros is a value: the whole file.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_RDLCK as libc::c_short;
        // SAFETY: the descriptor is open, and `lock` outlives the call.
        assert_eq!(unsafe { libc::fcntl(shared.as_raw_fd(), libc::F_SETLK, &raw const lock) }, 0);
        for name in [&path, &hard, &soft] {
            let mut bytes = [0; 3];
            read_start(name, &mut bytes).unwrap();
            assert_eq!(&bytes, b"one");
            assert_eq!(read_start(name, &mut [0; 4]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        assert!(is_locked(&path));
        drop(File::open(&hard).unwrap());
        assert!(!is_locked(&path), "what this protects from is not seen");
    }
}
