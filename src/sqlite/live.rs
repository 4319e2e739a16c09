//! A database that applications have open: our connections to it, the pin, and the descriptors we read by.
//!
//! # The pin
//!
//! A read transaction in WAL mode holds a read mark. With a mark ≥ 1 the WAL can't be restarted, so no frame is
//! overwritten; with mark 0 (all of the WAL was in the main file when the transaction began) the WAL may be restarted
//! once, but nothing new can be copied into the main file, so the new frames can't be overwritten in their turn
//! (`walRestartLog`, `walCheckpoint` in SQLite's `wal.c`). A pin is held at every moment:
//! [`LiveDatabase::advance_pin`] begins the new one before it ends the old one.
//!
//! # Checkpoints
//!
//! Each of ours checks, with the checkpoint lock held and before the first page is written, that the three files at
//! the paths are those that are open, and that nobody but SQLite wrote to the main file ([`super::checkpoint`]).
//! While another process has the database open they are PASSIVE. Only when none has, [`LiveDatabase::empty_wal`]
//! does what SQLite does when the last connection closes (`sqlite3WalClose`).
//!
//! # Descriptors
//!
//! POSIX locks belong to a process and a file: closing *any* descriptor of a file drops all locks that the process holds
//! on it, SQLite's own too. The next application to close its last connection would then take us for gone and delete
//! the WAL. So the main file and the `-shm` file are opened once in the process ([`SharedFile`]), kept as long as the connections
//! live, and closed after them. (`-wal` carries no locks.)

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::wal::CheckpointMode;
use rusqlite::{Connection, OpenFlags};

use super::checkpoint::{self, Checkpointed, Guard, Writers, Written};
use super::descriptors::{Beside, SharedFile};
use super::header::{DatabaseHeader, HEADER_LEN};
use super::wal_index::{Backfill, WAL_INDEX_LEN, WalIndex};
use super::{SqliteError, locks, sidecar};

/// A database that is locked is tried to be opened so often, so soon after another.
const OPEN_ATTEMPTS: u32 = 50;
const OPEN_ATTEMPT_INTERVAL: Duration = Duration::from_millis(10);
/// Between two attempts to take the write lock.
const LOCK_ATTEMPT_INTERVAL: Duration = Duration::from_micros(30);

/// For another one's checkpoint to end it is waited so often, so long each time, with the write lock held.
const CHECKPOINT_ATTEMPTS: u32 = 60;
const CHECKPOINT_ATTEMPT_INTERVAL: Duration = Duration::from_micros(300);

/// What tells one state of a file from another without reading it. Times in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    len_bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl FileIdentity {
    /// The identity of the file at `path`.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from_metadata(&fs::metadata(path)?))
    }

    fn from_metadata(metadata: &fs::Metadata) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len_bytes: metadata.len(),
            modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The file's length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether what was last written to it lies further back than `age`; `now_ms` is the machine's time in milliseconds since 1970.
    #[must_use]
    pub fn is_older_than(&self, age: Duration, now_ms: u64) -> bool {
        self.modified_ns < (i128::from(now_ms) - age.as_millis() as i128) * 1_000_000
    }

    /// The inode.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// How long until what was last written lies further back than `age`, as in [`FileIdentity::is_older_than`].
    #[must_use]
    pub fn until_older_than(&self, age: Duration, now_ms: u64) -> Duration {
        let left_ns = self.modified_ns + age.as_nanos() as i128 - i128::from(now_ms) * 1_000_000;
        // The clock counts whole milliseconds.
        Duration::from_nanos(u64::try_from(left_ns.max(0)).unwrap_or(u64::MAX)) + Duration::from_millis(2)
    }

    /// Whether something was written to the file between this look at it and a `later` one.
    #[must_use]
    pub fn was_written_before(&self, later: &Self) -> bool {
        (self.len_bytes, self.modified_ns) != (later.len_bytes, later.modified_ns)
    }

    /// Whether both are the same file, in whatever state.
    #[must_use]
    pub fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// The descriptors that pages, frames and the wal-index are read by.
#[derive(Debug)]
pub struct Files {
    /// As it was given; may lead over symbolic links.
    given: PathBuf,
    /// Where that led to when it was opened.
    path: PathBuf,
    main: SharedFile,
    wal: File,
    shm: SharedFile,
    /// Page size of the database in bytes.
    pub page_size: u32,
}

impl Files {
    /// The database's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The wal-index as it is now.
    ///
    /// # Errors
    /// [`SqliteError::Unsettled`] when a writer was in the middle of changing it each time we looked.
    pub fn wal_index(&self) -> Result<WalIndex, SqliteError> {
        let mut bytes = [0; WAL_INDEX_LEN];
        for attempt in 0..100 {
            self.shm.read_exact_at(&mut bytes, 0).map_err(SqliteError::io(&self.path, "read the wal-index of"))?;
            if let Some(index) = WalIndex::parse(&bytes) {
                return Ok(index);
            }
            if attempt > 10 {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Err(SqliteError::Unsettled { path: self.path.clone() })
    }

    /// Reads from the WAL at `offset`; fewer bytes than asked for only where the file ends.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn read_wal(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, SqliteError> {
        read_at_most(&self.wal, offset, buffer).map_err(SqliteError::io(&self.path, "read the WAL of"))
    }

    /// Reads consecutive pages of the main file from `first_page` on. What lies behind its end is zeros.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn read_main_pages(&self, first_page: u32, pages: &mut [u8]) -> Result<(), SqliteError> {
        let offset = u64::from(first_page - 1) * u64::from(self.page_size);
        let read = read_at_most(&self.main, offset, pages).map_err(SqliteError::io(&self.path, "read"))?;
        pages[read..].fill(0);
        Ok(())
    }

    /// The main file's length in pages.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn main_size_pages(&self) -> Result<u32, SqliteError> {
        let len_bytes = self.main.metadata().map_err(SqliteError::io(&self.path, "look at"))?.len();
        // SQLite's limit is 2^32 - 2 pages.
        Ok(u32::try_from(len_bytes / u64::from(self.page_size)).unwrap_or(u32::MAX))
    }

    /// What state the main file is in.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn main_identity(&self) -> Result<FileIdentity, SqliteError> {
        let metadata = self.main.metadata().map_err(SqliteError::io(&self.path, "look at"))?;
        Ok(FileIdentity::from_metadata(&metadata))
    }

    /// Length of the WAL file in bytes.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn wal_len_bytes(&self) -> Result<u64, SqliteError> {
        Ok(self.wal.metadata().map_err(SqliteError::io(&self.path, "look at the WAL of"))?.len())
    }

    /// Inode of the WAL file that is open.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn wal_inode(&self) -> Result<u64, SqliteError> {
        Ok(self.wal.metadata().map_err(SqliteError::io(&self.path, "look at the WAL of"))?.ino())
    }

    /// Returns whether another process has the database open.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn is_open_elsewhere(&self) -> Result<bool, SqliteError> {
        locks::is_open_elsewhere(&self.main, Some(&self.shm)).map_err(SqliteError::io(&self.path, "ask for locks on"))
    }

    /// Returns whether another process wants the database for itself: see [`locks::is_exclusive_wanted`].
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn is_exclusive_wanted(&self) -> Result<bool, SqliteError> {
        locks::is_exclusive_wanted(&self.main).map_err(SqliteError::io(&self.path, "ask for locks on"))
    }

    /// Returns whether a read transaction that begins now may get a mark of 1 or more although all of the WAL is in
    /// the main file: see [`locks::is_read_mark_zero_taken`].
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn is_read_mark_zero_taken(&self) -> Result<bool, SqliteError> {
        locks::is_read_mark_zero_taken(&self.shm).map_err(SqliteError::io(&self.path, "ask for locks on"))
    }

    /// Makes durable what was written to the WAL and the main file. Blocks for as long as the disk takes.
    ///
    /// # Errors
    /// [`SqliteError::CheckpointFailed`]: what was copied into the main file before may not be on the disk.
    pub fn sync(&self) -> Result<(), SqliteError> {
        self.wal.sync_data().and_then(|()| self.main.sync_data()).map_err(|error| SqliteError::CheckpointFailed {
            path: self.path.clone(),
            source: rusqlite::Error::SqliteFailure(
                rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR_FSYNC),
                Some(error.to_string()),
            ),
        })
    }

    /// Whether the files at the paths are still those that are open, and the path that was given still leads to them.
    ///
    /// # Errors
    /// [`SqliteError::Replaced`] when not; as the operating system answers when that can't be seen.
    pub fn check_still_there(&self) -> Result<(), SqliteError> {
        if followed(&self.given)?.is_none_or(|there| there != self.path) {
            return Err(SqliteError::Replaced { path: self.given.clone() });
        }
        let (wal, shm) = (sidecar(&self.path, "-wal"), sidecar(&self.path, "-shm"));
        for (path, file) in [(self.path.clone(), &*self.main), (wal, &self.wal), (shm, &*self.shm)] {
            let open = file.metadata().map_err(SqliteError::io(&path, "look at"))?;
            let is_same = match fs::metadata(&path) {
                Ok(there) => (there.dev(), there.ino()) == (open.dev(), open.ino()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                // Who may not look does not know; what was captured stays true.
                Err(error) => return Err(SqliteError::io(&path, "look at")(error)),
            };
            if !is_same {
                return Err(SqliteError::Replaced { path: self.path.clone() });
            }
        }
        Ok(())
    }
}

/// The file that a path leads to over all symbolic links, where SQLite keeps `-wal` and `-shm`; `None` while it leads nowhere.
///
/// # Errors
/// As the operating system answers.
fn followed(given: &Path) -> Result<Option<PathBuf>, SqliteError> {
    match fs::canonicalize(given) {
        Ok(path) => Ok(Some(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(SqliteError::io(given, "follow")(error)),
    }
}

fn read_at_most(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Outcome of [`LiveDatabase::barrier`].
#[derive(Debug)]
pub enum Restart {
    /// The write lock was not available, or too much was left to be read.
    NotTried,
    /// Another reader or checkpointer is in the way.
    Held,
    /// The next writer restarts the WAL.
    Ready,
    /// The checkpoint failed or was refused; the pin stays at the newest frame.
    Failed(SqliteError),
}

/// Our connections to a database, with a pin standing, and its open files.
///
/// Fields are dropped in the order of their declaration: the connections first, then the descriptors (see the module).
#[derive(Debug)]
pub struct LiveDatabase {
    pins: [Connection; 2],
    pinned: usize,
    control: Connection,
    /// The main file as it was when frames were copied so far: see [`LiveDatabase::check_main`].
    main_seen: Option<(Backfill, FileIdentity)>,
    /// The open files.
    pub files: Arc<Files>,
    /// Whether the database was in another journal mode and has been switched to WAL by this call.
    pub was_switched_to_wal: bool,
}

impl LiveDatabase {
    /// Opens the database at `path`, switches it to WAL mode if it is in another, and sets the pin.
    ///
    /// # Errors
    /// [`SqliteError::NotThere`] while there is no file or an empty one; [`SqliteError::NotWal`] when it can't be
    /// switched; otherwise what SQLite or the operating system answers.
    pub fn open(path: &Path) -> Result<Self, SqliteError> {
        for _ in 1..OPEN_ATTEMPTS {
            match Self::open_once(path) {
                // An application that closes its last connection locks everybody out while it checkpoints the WAL, for which SQLite
                // calls no busy handler, and deletes it, perhaps just after we have opened it.
                Err(error)
                    if error.is_busy()
                        || matches!(
                            error,
                            SqliteError::Locked { .. } | SqliteError::Replaced { .. } | SqliteError::Split { .. }
                        ) =>
                {
                    std::thread::sleep(OPEN_ATTEMPT_INTERVAL);
                }
                other => return other,
            }
        }
        Self::open_once(path)
    }

    fn open_once(given: &Path) -> Result<Self, SqliteError> {
        let path = &followed(given)?.ok_or_else(|| SqliteError::NotThere { path: given.to_owned() })?;
        let main = open_main(path)?;
        let header = read_header(path, &main)?;
        let (wal, shm) = (sidecar(path, "-wal"), sidecar(path, "-shm"));
        let opening = main.opening();
        let _opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
        // SQLite joins the wal-index that this process has open for the main file (`unixOpenSharedMemory`), whatever
        // file is at the path by now.
        if main.beside().is_some_and(|open| Beside::at(&wal, &shm) != Some(open)) {
            return Err(SqliteError::Replaced { path: path.clone() });
        }
        // Declared before the connections, so that an error drops them after those: see the module. A `-shm` file that is
        // there is counted before SQLite locks it, so that no other user can close it.
        let _counted = SharedFile::open(&shm).ok();
        let shm_file;
        let files;
        if header.is_wal && is_split(path, &main, &shm)? {
            return Err(SqliteError::Split { path: path.clone() });
        }
        let control = connect(path)?;
        let was_switched_to_wal = ensure_wal_mode(path, &control)?;
        let pins = [connect(path)?, connect(path)?];
        // The first read transaction makes `-wal` and `-shm` if they are not there.
        begin_read(path, &pins[0])?;
        let beside = Beside::at(&wal, &shm);
        shm_file = SharedFile::open(&shm).map_err(SqliteError::io(&shm, "open"))?;
        let wal = File::open(&wal).map_err(SqliteError::io(&wal, "open"))?;
        if !beside.is_some_and(|beside| main.note_beside(beside)) {
            return Err(SqliteError::Replaced { path: path.clone() });
        }
        let (given, page_size) = (given.to_owned(), header.page_size);
        files = Arc::new(Files { given, path: path.clone(), main, wal, shm: shm_file, page_size });
        files.check_still_there()?;
        Ok(Self { pins, pinned: 0, control, main_seen: None, files, was_switched_to_wal })
    }

    /// Detects a main file that was overwritten in place, as `cp` does; returns the file's state.
    /// Path, WAL and wal-index do not change then, so SQLite does not notice it.
    ///
    /// In WAL mode only a checkpoint writes to the main file. It stores `nBackfillAttempted` before
    /// it writes the first page, and `nBackfill` after the last one (`walCheckpoint`). If both are
    /// equal and unchanged since the last call, a change of the file did not come from SQLite.
    ///
    /// # Errors
    /// [`SqliteError::Replaced`] if another file is at the path. [`SqliteError::WrittenTo`] if the
    /// length or modification time changed: the caller compares the pages, because the file may
    /// only have been touched.
    pub fn check_main(&mut self, index: &WalIndex) -> Result<FileIdentity, SqliteError> {
        let backfill = index.backfill();
        let before = self.main_seen.take().filter(|(before, _)| Some(*before) == backfill);
        let main = self.files.main_identity()?;
        let Some(backfill) = backfill else { return Ok(main) };
        // Between the look at the index and the one at the file there may have been a checkpoint.
        if self.files.wal_index()?.backfill() != Some(backfill) {
            return Ok(main);
        }
        // Also if it was changed: what is written while the pages are compared must be noticed, too.
        self.main_seen = Some((backfill, main));
        if before.is_some_and(|(_, before)| before.was_written_before(&main)) {
            self.files.check_still_there()?;
            return Err(SqliteError::WrittenTo { path: self.files.path().to_owned() });
        }
        Ok(main)
    }

    /// Begins a new pin, runs `capture`, and ends the old pin. If `capture` fails the old pin stays instead, because
    /// what it protects has not been read.
    ///
    /// # Errors
    /// What `capture` answers, or SQLite.
    pub fn advance_pin<T, E: From<SqliteError>>(
        &mut self,
        capture: impl FnOnce(&Files) -> Result<T, E>,
    ) -> Result<T, E> {
        let spare = 1 - self.pinned;
        begin_read(&self.files.path, &self.pins[spare])?;
        let captured = capture(&self.files);
        let (ended, kept) = if captured.is_ok() { (self.pinned, spare) } else { (spare, self.pinned) };
        self.pinned = kept;
        end_read(&self.files.path, &self.pins[ended])?;
        captured
    }

    /// Copies into the main file what readers allow, ourselves among them, and waits for nobody. `None` when another
    /// checkpoint is running.
    ///
    /// Durable: our connections run with `synchronous=FULL`, and what is copied is synced before it counts as copied.
    ///
    /// # Errors
    /// See [`LiveDatabase::check_main`] and [`checkpoint::run`].
    pub fn passive_checkpoint(&mut self) -> Result<Option<Checkpointed>, SqliteError> {
        let spare = &self.pins[1 - self.pinned];
        let (done, left) = self.checkpoint(spare, CheckpointMode::PASSIVE, Writers::MayCommit)?;
        self.note_left(done, left)?;
        Ok(done)
    }

    /// Runs a checkpoint that writes only if, at the last moment, the files are those that are open, and the main file
    /// is as SQLite left it. The second value is the main file as the checkpoint has left it, if it wrote to it.
    fn checkpoint(
        &self,
        connection: &Connection,
        mode: CheckpointMode,
        writers: Writers,
    ) -> Result<(Option<Checkpointed>, Option<FileIdentity>), SqliteError> {
        // Proves something only as long as no other process has begun to copy frames since.
        let backfill = self.files.wal_index()?.backfill();
        let seen = self.main_seen.filter(|(seen, _)| Some(*seen) == backfill);
        let guard = MainGuard { files: &self.files, seen, left: Cell::new(None) };
        let done = checkpoint::run(self.files.path(), connection, mode, &guard, writers)?;
        Ok((done, guard.left.get()))
    }

    /// Notes the main file as our checkpoint has left it, whatever was done to it since.
    fn note_left(&mut self, done: Option<Checkpointed>, left: Option<FileIdentity>) -> Result<(), SqliteError> {
        let index = self.files.wal_index()?;
        if let (Some(done), Some(left)) = (done, left) {
            // Unless another process has copied more since.
            let is_ours = index.backfilled_frames == done.backfilled_frames;
            self.main_seen = index.backfill().filter(|_| is_ours).map(|backfill| (backfill, left));
        }
        self.check_main(&index).map(drop)
    }

    /// Empties a WAL of which everything is in the main file, as SQLite does when the last connection closes. The pin
    /// has mark 0: if another process commits meanwhile, its frames can't be copied, and nothing happens
    /// (`walCheckpoint` needs read mark 0 for that). Returns whether the WAL is empty.
    ///
    /// Only to be called when no other process has the database open: a TRUNCATE checkpoint takes the write lock.
    ///
    /// # Errors
    /// See [`LiveDatabase::passive_checkpoint`].
    pub fn empty_wal(&mut self) -> Result<bool, SqliteError> {
        self.files.check_still_there()?;
        let (done, left) = self.checkpoint(&self.control, CheckpointMode::TRUNCATE, Writers::MayCommit)?;
        // The WAL's generation is another one, but nothing was copied.
        let left = left.or(self.main_seen.map(|(_, seen)| seen));
        self.note_left(done, left)?;
        Ok(done.is_some())
    }

    /// Closes the connections as SQLite closes the last one: an empty WAL and the wal-index are removed
    /// (`sqlite3WalClose`), if no other process has the database open by now.
    ///
    /// # Errors
    /// [`SqliteError::Replaced`]: then the files are closed and left alone.
    pub fn close_as_last(self) -> Result<(), SqliteError> {
        self.files.check_still_there()?;
        let Self { pins, control, files, .. } = self;
        drop(pins);
        let set = control.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false);
        drop(control);
        set.map(drop).map_err(SqliteError::sqlite(files.path(), "close"))
    }

    /// Prepares a WAL restart with the write lock held, so that no process commits meanwhile: runs
    /// `capture`, moves the pin to the newest frame, checkpoints, and moves the pin to mark 0. The
    /// next writer then restarts the WAL. Writes nothing into the WAL.
    ///
    /// `capture` returns whether it has read every frame. `others_move` moves the pins of sibling
    /// replicas of this database, and returns whether all of them moved.
    ///
    /// # Errors
    /// An error of `capture` or of SQLite.
    pub fn barrier<E: From<SqliteError>>(
        &mut self,
        lock_attempts: u32,
        capture: impl FnOnce(&Files) -> Result<bool, E>,
        others_move: impl Fn() -> bool,
    ) -> Result<Restart, E> {
        let path = self.files.path.clone();
        if !self.take_write_lock(lock_attempts)? {
            return Ok(Restart::NotTried);
        }
        let done = self.barrier_locked(capture, others_move);
        let released = self.control.prepare_cached("ROLLBACK").and_then(|mut rollback| rollback.execute([]));
        let restart = done?;
        released.map_err(SqliteError::sqlite(&path, "release the write lock"))?;
        Ok(restart)
    }

    /// Asks again and again, because a busy writer leaves the lock free only for moments; while we ask, nobody waits for us.
    fn take_write_lock(&self, attempts: u32) -> Result<bool, SqliteError> {
        for _ in 0..attempts {
            let begun = self.control.prepare_cached("BEGIN IMMEDIATE").and_then(|mut begin| begin.execute([]));
            match begun.map_err(SqliteError::sqlite(&self.files.path, "take the write lock")) {
                Ok(_) => return Ok(true),
                Err(error) if error.is_busy() => std::thread::sleep(LOCK_ATTEMPT_INTERVAL),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn barrier_locked<E: From<SqliteError>>(
        &mut self,
        capture: impl FnOnce(&Files) -> Result<bool, E>,
        others_move: impl Fn() -> bool,
    ) -> Result<Restart, E> {
        if !capture(&self.files)? {
            return Ok(Restart::NotTried);
        }
        if !others_move() {
            return Ok(Restart::Held);
        }
        // The new pin's mark is the newest frame, which holds up nothing. So a pin is held whatever the checkpoint answers.
        let (path, free) = (self.files.path().to_owned(), self.pinned);
        begin_read(&path, &self.pins[1 - free])?;
        self.pinned = 1 - free;
        end_read(&path, &self.pins[free])?;
        let done = match self.checkpoint_after_others(&self.pins[free]) {
            Ok((done, left)) => self.note_left(done, left).map(|()| done),
            Err(error) => Err(error),
        };
        match done {
            Ok(Some(done)) if done.is_complete() => {}
            Ok(_) => return Ok(Restart::Held),
            Err(error) => return Ok(Restart::Failed(error)),
        }
        begin_read(&path, &self.pins[free])?;
        self.pinned = free;
        end_read(&path, &self.pins[1 - free])?;
        // Moves the sibling replicas' pins to mark 0, too. A pin that does not move in time
        // prevents only this restart of the WAL.
        others_move();
        Ok(Restart::Ready)
    }

    /// Runs a PASSIVE checkpoint; waits and tries again while another process runs one. An
    /// application above its autocheckpoint limit checkpoints after each commit, after it released
    /// the write lock. So its checkpoint is often running when we get the lock, and leaves few
    /// frames. Without the wait, a forced WAL restart would rarely succeed under load, and the WAL
    /// would grow.
    fn checkpoint_after_others(
        &self,
        connection: &Connection,
    ) -> Result<(Option<Checkpointed>, Option<FileIdentity>), SqliteError> {
        for _ in 0..CHECKPOINT_ATTEMPTS {
            match self.checkpoint(connection, CheckpointMode::PASSIVE, Writers::AreLockedOut)? {
                (None, _) => std::thread::sleep(CHECKPOINT_ATTEMPT_INTERVAL),
                done => return Ok(done),
            }
        }
        Ok((None, None))
    }
}

/// Keeps a checkpoint from files that were replaced or overwritten.
struct MainGuard<'a> {
    files: &'a Files,
    /// See [`LiveDatabase::check_main`].
    seen: Option<(Backfill, FileIdentity)>,
    /// The main file as the checkpoint has left it so far.
    left: Cell<Option<FileIdentity>>,
}

impl MainGuard<'_> {
    fn overwritten(&self) -> SqliteError {
        SqliteError::WrittenTo { path: self.files.path().to_owned() }
    }
}

impl Guard for MainGuard<'_> {
    fn check(&self) -> Result<(), SqliteError> {
        self.files.check_still_there()?;
        let Some((backfill, before)) = self.seen else { return Ok(()) };
        // The checkpoint lock is held: if frames were copied since the last look, it was before.
        let is_as_seen = self.files.wal_index()?.is_backfilled_as(backfill);
        if is_as_seen && before.was_written_before(&self.files.main_identity()?) {
            return Err(self.overwritten());
        }
        Ok(())
    }

    fn note_written(&self, written: Written) -> Result<(), SqliteError> {
        let main = self.files.main_identity()?;
        let before = self.left.replace(Some(main));
        let is_other = before.is_some_and(|before| before.was_written_before(&main));
        if written == Written::NothingSince && is_other { Err(self.overwritten()) } else { Ok(()) }
    }
}

/// See [`locks::is_split`].
fn is_split(path: &Path, main: &File, shm: &Path) -> Result<bool, SqliteError> {
    let shm = match SharedFile::open(shm) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.map_err(SqliteError::io(shm, "open"))?),
    };
    locks::is_split(main, shm.as_deref()).map_err(SqliteError::io(path, "ask for locks on"))
}

fn open_main(path: &Path) -> Result<SharedFile, SqliteError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > 0 => SharedFile::open(path).map_err(SqliteError::io(path, "open")),
        Ok(_) => Err(SqliteError::NotThere { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(SqliteError::NotThere { path: path.to_owned() }),
        Err(error) => Err(SqliteError::io(path, "look at")(error)),
    }
}

fn read_header(path: &Path, main: &File) -> Result<DatabaseHeader, SqliteError> {
    let mut bytes = [0; HEADER_LEN];
    let read = read_at_most(main, 0, &mut bytes).map_err(SqliteError::io(path, "read"))?;
    DatabaseHeader::parse(&bytes[..read]).map_err(|source| SqliteError::NotADatabase { path: path.to_owned(), source })
}

fn connect(path: &Path) -> Result<Connection, SqliteError> {
    let open = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(Duration::ZERO)?;
        // If ours is the last connection to close, the WAL stays: it is what proves at the next start that nothing
        // was missed.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.execute_batch("PRAGMA synchronous=FULL; PRAGMA mmap_size=0; PRAGMA cache_size=-64")?;
        Ok(connection)
    };
    let connection = open().map_err(|error| explain(path, error))?;
    checkpoint::hook(path, &connection)?;
    Ok(connection)
}

/// What stands in the way of using the database at all, and what to do about it.
fn explain(path: &Path, error: rusqlite::Error) -> SqliteError {
    let not_wal = |why: &str| SqliteError::NotWal { path: path.to_owned(), why: why.into() };
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            SqliteError::Locked { path: path.to_owned() }
        }
        Some(rusqlite::ErrorCode::ReadOnly | rusqlite::ErrorCode::CannotOpen) => {
            not_wal("it is read-only for this user; give waltrail write access to the file and its directory")
        }
        _ => SqliteError::sqlite(path, "open")(error),
    }
}

/// Whether the database had to be switched.
fn ensure_wal_mode(path: &Path, control: &Connection) -> Result<bool, SqliteError> {
    let explain = |error| explain(path, error);
    control.busy_timeout(Duration::from_millis(500)).map_err(SqliteError::sqlite(path, "open"))?;
    let mode: String = control.query_row("PRAGMA journal_mode", [], |row| row.get(0)).map_err(explain)?;
    if mode.eq_ignore_ascii_case("wal") {
        control.busy_timeout(Duration::ZERO).map_err(SqliteError::sqlite(path, "open"))?;
        return Ok(false);
    }
    let now: String = control.query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0)).map_err(explain)?;
    if !now.eq_ignore_ascii_case("wal") {
        let why = format!("SQLite leaves it in mode '{now}'; is its file system or device read-only?");
        return Err(SqliteError::NotWal { path: path.to_owned(), why });
    }
    control.busy_timeout(Duration::ZERO).map_err(SqliteError::sqlite(path, "open"))?;
    Ok(true)
}

/// Begins a read transaction. `PRAGMA user_version` reads page 1's header and nothing else: no schema is parsed.
fn begin_read(path: &Path, connection: &Connection) -> Result<(), SqliteError> {
    let begin = || {
        connection.prepare_cached("BEGIN")?.execute([])?;
        let read = connection.prepare_cached("PRAGMA user_version")?.query_row([], |row| row.get::<_, i64>(0));
        if read.is_err() {
            connection.prepare_cached("ROLLBACK")?.execute([])?;
        }
        read.map(|_| ())
    };
    begin().map_err(SqliteError::sqlite(path, "begin a read transaction"))
}

fn end_read(path: &Path, connection: &Connection) -> Result<(), SqliteError> {
    let end = || connection.prepare_cached("COMMIT")?.execute([]).map(|_| ());
    end().map_err(SqliteError::sqlite(path, "end a read transaction"))
}
