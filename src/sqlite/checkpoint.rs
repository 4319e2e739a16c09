//! A checkpoint that refuses replaced files, and counts no frame as copied before its page is on the disk.
//!
//! A process that holds a read transaction all the time needs three things that SQLite's checkpoint
//! does not do:
//!
//! - Sync a partial checkpoint. `walCheckpoint` syncs the main file only if it copies *all* frames,
//!   but always stores `nBackfill`. With a pin, nearly every checkpoint under load is partial. If
//!   the disk loses one of these pages and reports that once (fsync(2)), no later checkpoint copies
//!   the page again, and the restarted WAL overwrites its only copy. So the main file is synced
//!   before `nBackfill` is stored. If the sync fails, `nBackfill` is set to 0 before read mark 0 is
//!   released, as `walIndexRecover` does. The next checkpoint then copies every frame again.
//! - Check the files. SQLite does not check that its open files are still those at the paths. So
//!   the caller's [`Guard::check`] runs with the locks held, before the first page is written, and
//!   can refuse.
//! - Detect writes of other processes to the main file. So the caller records the file's state
//!   right after the last page is written ([`Guard::note_written`]).
//!
//! [`hook`] replaces methods of the connection's main file (`sqlite3_io_methods`) that
//! `walCheckpoint` calls, in this order: `SQLITE_FCNTL_CKPT_START`, `xFileSize`, the page writes,
//! `SQLITE_FCNTL_CKPT_DONE`, `xTruncate` and `xSync` (only if all frames were copied), the store of
//! `nBackfill`, and `xShmLock`, which releases read mark 0. All `unsafe` calls into SQLite are in
//! this file.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rusqlite::wal::CheckpointMode;
use rusqlite::{Connection, ffi};

use super::SqliteError;

/// `WAL_READ_LOCK(0)`.
const READ_LOCK_ZERO: c_int = 3;
/// Length of the first region of the wal-index (`WALINDEX_PGSZ`).
const WAL_INDEX_REGION_LEN: c_int = 32_768;
/// Where `mxFrame`, `nBackfill` and `nBackfillAttempted` are in it (`WalIndexHdr`, `WalCkptInfo`).
const FRAME_COUNT_OFFSET: usize = 16;
const BACKFILL_OFFSET: usize = 96;
const BACKFILL_ATTEMPTED_OFFSET: usize = 128;

/// Who can commit while a checkpoint runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writers {
    /// Other connections may.
    MayCommit,
    /// No connection can commit, because this process holds the write lock. If the checkpoint
    /// copies all frames, SQLite itself syncs the main file before it stores `nBackfill`. The hook
    /// then omits its own sync, which would only lengthen the time under the lock.
    AreLockedOut,
}

/// Frames in the WAL, and how many of them are in the main file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpointed {
    /// Frames in the WAL.
    pub frame_count: u32,
    /// Frames of them that are in the main file now.
    pub backfilled_frames: u32,
    /// Whether frames were copied, so that WAL and main file were synced.
    pub has_copied: bool,
}

impl Checkpointed {
    /// Whether all frames are in the main file.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.backfilled_frames >= self.frame_count
    }
}

/// Checks that the caller adds to a checkpoint.
pub trait Guard {
    /// Returns an error if the checkpoint must not write. Called before the first page is written,
    /// with the checkpoint lock held, so that no other process copies frames meanwhile.
    ///
    /// # Errors
    /// The reason for the refusal. The checkpoint writes nothing.
    fn check(&self) -> Result<(), SqliteError>;
    /// Records the state of the main file after our own writes ([`Written::Now`]), so that a later
    /// write by another process is detected. Before the file is truncated, compares the state with
    /// the last record instead ([`Written::NothingSince`]).
    ///
    /// # Errors
    /// Another process has written to the main file since the last record. The checkpoint stops.
    fn note_written(&self, written: Written) -> Result<(), SqliteError>;
}

/// When [`Guard::note_written`] is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The checkpoint has just written the last page, or has just truncated the file.
    Now,
    /// The checkpoint has written nothing since the last record: any change is another process's.
    NothingSince,
}

/// State of the checkpoint that this thread runs.
struct Running<'a> {
    guard: &'a dyn Guard,
    writers: Writers,
    is_begun: bool,
    refused: Option<SqliteError>,
    /// What was copied must not count as copied.
    must_reset: bool,
    /// SQLite's code for the sync that failed.
    sync_failed: Option<c_int>,
}

thread_local! {
    /// The checkpoint that this thread runs. The pointer is valid while it is set: see [`run`].
    static RUNNING: RefCell<Option<ptr::NonNull<Running<'static>>>> = const { RefCell::new(None) };
}

/// The methods of the operating system's files, and the same with ours in front.
struct Methods {
    /// `sqlite3_io_methods` are static in SQLite.
    original: &'static ffi::sqlite3_io_methods,
    hooked: ffi::sqlite3_io_methods,
}

static METHODS: OnceLock<Methods> = OnceLock::new();

/// Installs the hooks on the connection's main file. The caller calls it once, right after open.
///
/// # Errors
/// SQLite does not return the file, or the file has another VFS's methods than the first one. The
/// caller must not use the connection.
pub fn hook(path: &Path, connection: &Connection) -> Result<(), SqliteError> {
    let failed = |code| SqliteError::sqlite(path, "open")(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None));
    let mut file: *mut ffi::sqlite3_file = ptr::null_mut();
    // SAFETY: the handle is open as long as the connection; the operation stores a pointer to the connection's file.
    let code = unsafe {
        let op = ffi::SQLITE_FCNTL_FILE_POINTER;
        ffi::sqlite3_file_control(connection.handle(), c"main".as_ptr(), op, (&raw mut file).cast())
    };
    if code != ffi::SQLITE_OK || file.is_null() {
        return Err(failed(code.max(ffi::SQLITE_ERROR)));
    }
    // SAFETY: the file is open, so its methods are set; those of the operating system's files are static.
    let found = unsafe { (*file).pMethods.as_ref() }.ok_or_else(|| failed(ffi::SQLITE_ERROR))?;
    let methods = METHODS.get_or_init(|| {
        // SAFETY: a plain structure of a number and pointers to functions.
        let mut hooked = unsafe { ptr::read(found) };
        hooked.xFileControl = Some(file_control);
        hooked.xFileSize = Some(file_size);
        hooked.xTruncate = Some(truncate);
        hooked.xSync = Some(sync);
        hooked.xShmLock = Some(shm_lock);
        Methods { original: found, hooked }
    });
    if !ptr::eq(methods.original, found) {
        return Err(failed(ffi::SQLITE_MISUSE));
    }
    // SAFETY: this thread alone uses the connection, and `hooked` is static.
    unsafe { (*file).pMethods = &raw const methods.hooked };
    Ok(())
}

/// Runs a checkpoint on a connection that has the hooks. Returns `None` if another checkpoint is
/// running or, in a mode other than PASSIVE, if a reader or writer blocks it.
///
/// # Errors
/// - An error of `guard`. If [`Guard::check`] returned it, the checkpoint wrote nothing.
/// - [`SqliteError::CheckpointFailed`]: `nBackfill` has not grown, or is 0 after a failed sync. The
///   caller keeps the frames pinned and tries again.
pub fn run(
    path: &Path,
    connection: &Connection,
    mode: CheckpointMode,
    guard: &dyn Guard,
    writers: Writers,
) -> Result<Option<Checkpointed>, SqliteError> {
    let mut running = Running { guard, writers, is_begun: false, refused: None, must_reset: false, sync_failed: None };
    let done = {
        let _unset = Unset;
        let running = ptr::NonNull::from(&mut running).cast();
        RUNNING.with(|slot| *slot.borrow_mut() = Some(running));
        connection.wal_checkpoint_v2(Some(rusqlite::MAIN_DB), mode)
    };
    if let Some(refused) = running.refused {
        return Err(refused);
    }
    let failed = |source| SqliteError::CheckpointFailed { path: path.to_owned(), source };
    if let Some(code) = running.sync_failed {
        return Err(failed(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)));
    }
    match done {
        Ok((frames, backfilled)) => Ok(Some(Checkpointed {
            frame_count: u32::try_from(frames).unwrap_or(0),
            backfilled_frames: u32::try_from(backfilled).unwrap_or(0),
            has_copied: running.is_begun,
        })),
        Err(error) => {
            let is_busy = SqliteError::sqlite(path, "checkpoint")(error);
            match is_busy {
                busy if busy.is_busy() => Ok(None),
                SqliteError::Sqlite { source, .. } => Err(failed(source)),
                other => Err(other),
            }
        }
    }
}

/// Ends the validity of the pointer, also when a panic passes.
struct Unset;

impl Drop for Unset {
    fn drop(&mut self) {
        RUNNING.with(|slot| *slot.borrow_mut() = None);
    }
}

/// Lets `act` use the checkpoint that this thread runs, if it does.
fn with_running<T>(act: impl FnOnce(&mut Running<'_>) -> T) -> Option<T> {
    let running = RUNNING.with(|slot| *slot.borrow());
    // SAFETY: set only while `run` is on this thread's stack, which does not touch the value meanwhile; the hooks do
    // not call each other while they use it.
    running.map(|mut running| act(unsafe { running.as_mut() }))
}

fn original() -> Option<&'static ffi::sqlite3_io_methods> {
    METHODS.get().map(|methods| methods.original)
}

/// `xFileControl`: a checkpoint begins to write, or has written its last page.
unsafe extern "C" fn file_control(file: *mut ffi::sqlite3_file, op: c_int, argument: *mut c_void) -> c_int {
    let Some(original) = original() else { return ffi::SQLITE_NOTFOUND };
    with_running(|running| match op {
        ffi::SQLITE_FCNTL_CKPT_START => running.is_begun = true,
        ffi::SQLITE_FCNTL_CKPT_DONE if running.is_begun && running.refused.is_none() => {
            running.refused = running.guard.note_written(Written::Now).err();
            running.must_reset |= running.refused.is_some();
            if running.writers == Writers::AreLockedOut && copies_all(original, file) {
                return;
            }
            // SAFETY: SQLite's own method, on the file that it gave us.
            let sync = original.xSync.map(|sync| unsafe { sync(file, ffi::SQLITE_SYNC_NORMAL) });
            running.sync_failed = sync.filter(|&code| code != ffi::SQLITE_OK);
        }
        _ => {}
    });
    // SAFETY: as above.
    original.xFileControl.map_or(ffi::SQLITE_NOTFOUND, |control| unsafe { control(file, op, argument) })
}

/// `xFileSize`: `walCheckpoint` asks for it between the start and the first write, and ends if it fails.
unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut ffi::sqlite3_int64) -> c_int {
    let is_refused = with_running(|running| {
        if running.is_begun && running.refused.is_none() {
            running.refused = running.guard.check().err();
        }
        running.refused.is_some()
    });
    if is_refused == Some(true) {
        return ffi::SQLITE_ABORT;
    }
    let size_of = original().and_then(|original| original.xFileSize);
    // SAFETY: SQLite's own method, on the file and the place that it gave us.
    size_of.map_or(ffi::SQLITE_IOERR, |size_of| unsafe { size_of(file, size) })
}

/// `xTruncate`: the main file gets its length when all of the WAL is copied.
unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    let note = |written| {
        let refused = with_running(|running| {
            if running.is_begun && running.refused.is_none() {
                running.refused = running.guard.note_written(written).err();
            }
            running.refused.is_some()
        });
        refused == Some(true)
    };
    if note(Written::NothingSince) {
        return ffi::SQLITE_ABORT;
    }
    let truncate = original().and_then(|original| original.xTruncate);
    // SAFETY: SQLite's own method, on the file that it gave us.
    let code = truncate.map_or(ffi::SQLITE_IOERR, |truncate| unsafe { truncate(file, size) });
    if note(Written::Now) { ffi::SQLITE_ABORT } else { code }
}

/// `xSync`: the main file is synced by SQLite when all of the WAL is copied.
unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, flags: c_int) -> c_int {
    let sync = original().and_then(|original| original.xSync);
    // SAFETY: SQLite's own method, on the file that it gave us.
    let code = sync.map_or(ffi::SQLITE_IOERR, |sync| unsafe { sync(file, flags) });
    if code != ffi::SQLITE_OK {
        with_running(|running| running.sync_failed = Some(code));
    }
    code
}

/// The first region of the wal-index that the connection has mapped.
fn wal_index(original: &ffi::sqlite3_io_methods, file: *mut ffi::sqlite3_file) -> Option<ptr::NonNull<u8>> {
    let mut region: *mut c_void = ptr::null_mut();
    // SAFETY: SQLite's own method, on the file that it gave us; it only stores a pointer.
    let code = original.xShmMap.map(|map| unsafe { map(file, 0, WAL_INDEX_REGION_LEN, 0, &raw mut region) });
    ptr::NonNull::new(region.cast()).filter(|_| code == Some(ffi::SQLITE_OK))
}

/// A field of the wal-index, which other processes read and store meanwhile.
///
/// # Safety
/// The region is mapped for as long as the value is used.
unsafe fn field<'a>(region: ptr::NonNull<u8>, offset: usize) -> &'a AtomicU32 {
    // SAFETY: inside of the region, and aligned as the region, which begins a page of memory.
    unsafe { AtomicU32::from_ptr(region.add(offset).cast().as_ptr()) }
}

/// Whether the checkpoint that runs copies all published frames. Exact only while nobody can commit.
fn copies_all(original: &ffi::sqlite3_io_methods, file: *mut ffi::sqlite3_file) -> bool {
    // SAFETY: the checkpoint that runs keeps the region mapped.
    wal_index(original, file).is_some_and(|region| unsafe {
        let load = |offset| field(region, offset).load(Ordering::SeqCst);
        load(BACKFILL_ATTEMPTED_OFFSET) == load(FRAME_COUNT_OFFSET)
    })
}

/// `xShmLock`: after a failed sync `nBackfill` is taken back before read mark 0 is released.
unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, offset: c_int, n: c_int, flags: c_int) -> c_int {
    let Some(original) = original() else { return ffi::SQLITE_IOERR };
    let is_release = offset == READ_LOCK_ZERO && flags == ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_EXCLUSIVE;
    let must_reset =
        is_release && with_running(|running| running.must_reset || running.sync_failed.is_some()) == Some(true);
    if must_reset && let Some(region) = wal_index(original, file) {
        // SAFETY: the checkpoint that runs keeps the region mapped. It holds the checkpoint lock: no other process
        // stores `nBackfill`, but for a writer that restarts the WAL, which stores 0, too.
        unsafe { field(region, BACKFILL_OFFSET) }.store(0, Ordering::SeqCst);
    }
    // SAFETY: as above.
    original.xShmLock.map_or(ffi::SQLITE_IOERR, |lock| unsafe { lock(file, offset, n, flags) })
}
