//! What a daemon knows of a database when it starts again: the state file beside the database.
//!
//! It is disposable: losing it costs a scan of the database and a snapshot, never data. It is written whole under another
//! name, and renamed. Layout: magic, length and bytes of a JSON object, the ledger's overlay, CRC-32.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::snapshots::SnapshotNote;
use super::{control, locked, spool};
use crate::format::Position;
use crate::sqlite::follow::WalPosition;
use crate::sqlite::live::FileIdentity;
use crate::sqlite::wal::{Checksum, Salts};

const MAGIC: &[u8; 8] = b"WALTSTA1";
/// A larger file is none of ours: an overlay of 80 million pages fits.
const STATE_LIMIT_BYTES: u64 = 1 << 30;

/// What was captured last, and what proves that nothing has happened since.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LocalState {
    /// The replica's id.
    pub replica: String,
    /// The writer that claimed the epoch.
    pub writer: String,
    /// The last transaction that was captured. Everything up to it is confirmed or in the spool.
    pub captured: Position,
    /// Its time, in milliseconds since 1970.
    pub time_ms: u64,
    /// Page size of the database in bytes.
    pub page_size: u32,
    /// Size of the database after it, in pages.
    pub size_pages: u32,
    /// Schema cookie after it.
    pub schema_cookie: u32,
    /// Fingerprint of the database after it.
    pub fingerprint: u64,
    /// The WAL's generation, number of frames and checksum after it; `None` where no frame was ever seen.
    pub wal: Option<([u8; 8], u32, (u32, u32))>,
    /// Inode of the WAL; `None` where none was open.
    #[serde(default)]
    pub wal_inode: Option<u64>,
    /// The main file when the state was written.
    pub main: FileIdentity,
    /// The boot of the machine in which the state was written; `None` if the kernel provides no id.
    pub boot_id: Option<String>,
    /// Whether `main` holds everything that was captured, and a write since would have changed its
    /// times.
    pub is_main_complete: bool,
    /// The last snapshot that is confirmed and that the line of this epoch can be restored from; `None` when there is none.
    pub snapshot: Option<SnapshotNote>,
    /// Whether a restore left this state: then the next start forks an epoch here, whatever came after in the replica.
    pub is_restored: bool,
}

impl LocalState {
    /// The place in the WAL after the last captured transaction.
    #[must_use]
    pub fn wal_position(&self) -> Option<WalPosition> {
        self.wal.map(|(salts, frame_count, (first, second))| WalPosition {
            salts: Salts(salts),
            frame_count,
            checksum: Checksum(first, second),
        })
    }

    /// Returns whether the main file, which is `main` now, is proven to hold what it held when the
    /// state was written. Within one boot an equal identity is the proof. A power failure can lose
    /// or reorder writes that were not synced (`PRAGMA synchronous=OFF`) and leave the identity as
    /// it was: in another boot only the pages themselves are proof.
    #[must_use]
    pub fn is_main_untouched(&self, main: FileIdentity, boot_id: Option<&str>) -> bool {
        boot_id.is_some() && self.boot_id.as_deref() == boot_id && self.main == main
    }
}

/// The form that [`LocalState::wal`] has.
#[must_use]
pub fn wal_field(position: Option<WalPosition>) -> Option<([u8; 8], u32, (u32, u32))> {
    position.map(|at| (at.salts.0, at.frame_count, (at.checksum.0, at.checksum.1)))
}

/// A database's state directory, locked for this process.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    /// The operating system releases it however the process ends. `None` while the database rests.
    lock: Mutex<Option<File>>,
    /// Set when the lock is taken for the first time.
    lock_id: OnceLock<LockId>,
}

/// One lock file, told from a copy of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LockId {
    device: u64,
    inode: u64,
    /// An inode number can be assigned again as soon as no process has the file open. `None` if the
    /// file system does not record it.
    created: Option<SystemTime>,
}

impl LockId {
    fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino(), created: metadata.created().ok() }
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        self.release();
    }
}

/// A saved state, and the ledger's overlay: hashes of pages by number.
pub type Saved = (LocalState, BTreeMap<u32, u64>);

/// Why a state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirectoryError {
    /// Another process holds the lock.
    #[error("another waltrail works with {}", .0.display())]
    Locked(PathBuf),
    /// The directory at the path is not the one that was locked, or there is none.
    #[error("the state directory {} was removed or replaced while it was in use", .0.display())]
    Replaced(PathBuf),
    /// The operating system answered an error.
    #[error("the state directory {} can't be used: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl StateDirectory {
    /// Makes the directory if it is not there, private to the user, and locks it. A link on the way to it that is pointed elsewhere later
    /// does not change which one it is.
    ///
    /// # Errors
    /// [`StateDirectoryError::Locked`] when another process works with it.
    pub fn open(path: &Path) -> Result<Self, StateDirectoryError> {
        let failed = |source| StateDirectoryError::Io { path: path.to_owned(), source };
        // What has to be made on the way to it is the application's, too.
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        DirBuilder::new().recursive(true).mode(0o700).create(path.join("spool/kept")).map_err(failed)?;
        let path_followed = fs::canonicalize(path).map_err(failed)?;
        let directory = Self { path: path_followed, lock: Mutex::default(), lock_id: OnceLock::new() };
        directory.take()?;
        // Who lets a database rest holds no lock, but goes on listening. It is asked with the lock held, so that of two who ask
        // only one can go on.
        if control::listening_process(path).is_some_and(|process| process != std::process::id()) {
            return Err(StateDirectoryError::Locked(path.to_owned()));
        }
        Ok(directory)
    }

    /// Locks the directory again after [`Self::release`].
    ///
    /// # Errors
    /// [`StateDirectoryError::Locked`] when another process has it, be it for the moment in which
    /// it finds out that it may not; [`StateDirectoryError::Replaced`] if it is not the directory
    /// that was locked before.
    pub fn take(&self) -> Result<(), StateDirectoryError> {
        let failed = |source| StateDirectoryError::Io { path: self.path.clone(), source };
        let is_first = self.lock_id.get().is_none();
        if !is_first {
            self.check()?;
        }
        let mut options = File::options();
        options.write(true).create(is_first).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let lock = options.open(self.lock_path()).map_err(failed)?;
        let metadata = lock.metadata().map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StateDirectoryError::Locked(self.path.clone())),
            Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        self.lock_id.get_or_init(|| LockId::of(&metadata));
        *locked(&self.lock) = Some(lock);
        // Between opening and locking it the directory may have been replaced, and another process
        // have locked the new one.
        self.check().inspect_err(|_| self.release())
    }

    /// Checks that the directory at the path is still the one that was locked. As long as it is
    /// not, nothing in it may be believed or changed: another process may have locked it.
    ///
    /// # Errors
    /// [`StateDirectoryError::Replaced`] if not; [`StateDirectoryError::Io`] if that can't be seen.
    pub fn check(&self) -> Result<(), StateDirectoryError> {
        let is_held = locked(&self.lock).is_some();
        let is_same = |there: LockId, known: LockId| match is_held {
            // Its inode number belongs to nobody else meanwhile.
            true => (there.device, there.inode) == (known.device, known.inode),
            false => there == known,
        };
        match fs::symlink_metadata(self.lock_path()) {
            Ok(there) if self.lock_id.get().is_some_and(|&known| is_same(LockId::of(&there), known)) => Ok(()),
            Err(source) if !is_missing(&source) => Err(StateDirectoryError::Io { path: self.path.clone(), source }),
            _ => Err(StateDirectoryError::Replaced(self.path.clone())),
        }
    }

    /// Returns whether the lock is held.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        locked(&self.lock).is_some()
    }

    /// Lets go of the lock, for as long as nothing in the directory is used. Only where a control socket answers for the database:
    /// it refuses others meanwhile.
    pub fn release(&self) {
        let Some(lock) = locked(&self.lock).take() else { return };
        // Closing would not do: a command that this process starts at the moment has the descriptor, too, until its `exec`, and
        // with it the lock (flock(2)). Who opens the directory anew meanwhile would be told of another waltrail.
        if let Err(error) = lock.unlock() {
            tracing::debug!(path = %self.path.display(), %error, "the state directory's lock is left to be closed");
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the ledger's base is.
    #[must_use]
    pub fn ledger_path(&self) -> PathBuf {
        self.path.join("ledger")
    }

    /// Where segments wait until they are confirmed.
    #[must_use]
    pub fn spool_path(&self) -> PathBuf {
        self.path.join("spool")
    }

    fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    fn state_path(&self) -> PathBuf {
        self.path.join("state")
    }

    /// The saved state and the ledger's overlay; `None` when there is none, or none that is whole.
    ///
    /// # Errors
    /// [`StateDirectoryError::Io`] when the file can't be read: that says nothing of what is in it.
    pub fn load(&self) -> Result<Option<Saved>, StateDirectoryError> {
        let path = self.state_path();
        let failed = |source| StateDirectoryError::Io { path: path.clone(), source };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let is_possible = file.metadata().map_err(failed)?.len() <= STATE_LIMIT_BYTES;
        let mut bytes = Vec::new();
        let read = match file.take(STATE_LIMIT_BYTES).read_to_end(&mut bytes) {
            Err(error) if !spool::is_lost(&error) => return Err(failed(error)),
            read => read.is_ok(),
        };
        let decoded = if is_possible && read { decode(&bytes) } else { None };
        if decoded.is_none() {
            tracing::warn!(path = %path.display(), "the local state is damaged and is not used");
        }
        Ok(decoded)
    }

    /// Replaces the saved state; `durably`, so that it outlives a power failure.
    ///
    /// # Errors
    /// As the operating system answers; what was saved before is still there.
    pub fn save(&self, state: &LocalState, overlay: &BTreeMap<u32, u64>, durably: bool) -> io::Result<()> {
        let incoming = self.path.join("state.new");
        // Anew: what a crash has left may be another user's, and what somebody has put there may lead elsewhere.
        spool::remove(&incoming)?;
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&incoming)?;
        file.write_all(&encode(state, overlay)?)?;
        if durably {
            file.sync_all()?;
        }
        fs::rename(incoming, self.state_path())?;
        if durably { File::open(&self.path)?.sync_all() } else { Ok(()) }
    }

    /// Discards the saved state: from here on nothing is known.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn discard(&self) -> io::Result<()> {
        spool::remove(&self.state_path())
    }
}

/// Returns whether an error says that no file is at a path: `ESTALE` says so of a directory that an
/// NFS server has deleted.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::StaleNetworkFileHandle
    )
}

fn encode(state: &LocalState, overlay: &BTreeMap<u32, u64>) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(state)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&u32::try_from(json.len()).map_err(io::Error::other)?.to_le_bytes());
    bytes.extend_from_slice(&json);
    for (page_number, hash) in overlay {
        bytes.extend_from_slice(&page_number.to_le_bytes());
        bytes.extend_from_slice(&hash.to_le_bytes());
    }
    let crc32 = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc32.to_le_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Option<Saved> {
    let (content, crc32) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(content) != u32::from_le_bytes(*crc32) {
        return None;
    }
    let (len, rest) = content.strip_prefix(MAGIC.as_slice())?.split_first_chunk::<4>()?;
    let (json, overlay) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    let entries = overlay.chunks_exact(12);
    if !entries.remainder().is_empty() {
        return None;
    }
    let entry = |entry: &[u8]| {
        let (page_number, hash) = entry.split_first_chunk::<4>()?;
        Some((u32::from_le_bytes(*page_number), u64::from_le_bytes(hash.try_into().ok()?)))
    };
    Some((serde_json::from_slice(json).ok()?, entries.map(entry).collect::<Option<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_being_started_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDirectory::open(dir.path()).unwrap();
        assert!(matches!(StateDirectory::open(dir.path()), Err(StateDirectoryError::Locked(_))));
        // What a child has between `fork` and `exec`.
        let of_the_child = locked(&first.lock).as_ref().unwrap().try_clone().unwrap();
        drop(first);
        StateDirectory::open(dir.path()).unwrap();
        drop(of_the_child);
    }

    /// Replaces a directory by a copy of it.
    fn replace_by_copy(path: &Path, was: &Path) {
        fs::rename(path, was).unwrap();
        fs::create_dir_all(path.join("spool/kept")).unwrap();
        fs::copy(was.join("lock"), path.join("lock")).unwrap();
    }

    #[test]
    fn check_of_replaced_directory_fails() {
        let directory = tempfile::tempdir().unwrap();
        let (path, was) = (directory.path().join("state"), directory.path().join("was"));
        let state = StateDirectory::open(&path).unwrap();
        state.check().unwrap();
        replace_by_copy(&path, &was);
        assert!(matches!(state.check(), Err(StateDirectoryError::Replaced(_))));
        let other = StateDirectory::open(&path).unwrap();
        other.check().unwrap();
        fs::remove_dir_all(&path).unwrap();
        assert!(matches!(other.check(), Err(StateDirectoryError::Replaced(_))));
    }

    #[test]
    fn take_of_replaced_directory_fails_and_leaves_it_free() {
        let directory = tempfile::tempdir().unwrap();
        let (path, was) = (directory.path().join("state"), directory.path().join("was"));
        let state = StateDirectory::open(&path).unwrap();
        for _ in 0..2 {
            state.release();
            state.take().unwrap();
        }
        state.release();
        replace_by_copy(&path, &was);
        assert!(matches!(state.take(), Err(StateDirectoryError::Replaced(_))));
        let other = StateDirectory::open(&path).unwrap();
        other.release();
        fs::remove_dir_all(&path).unwrap();
        assert!(matches!(other.take(), Err(StateDirectoryError::Replaced(_))));
        // The inode number of a deleted lock file can be assigned again.
        fs::create_dir_all(path.join("spool/kept")).unwrap();
        fs::write(path.join("lock"), "").unwrap();
        assert!(matches!(other.take(), Err(StateDirectoryError::Replaced(_))));
    }
}
