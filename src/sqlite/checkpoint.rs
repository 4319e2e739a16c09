//! A checkpoint that refuses replaced files, and counts no frame as copied before its page is on the disk.
//!
//! Three things are missing in SQLite's own checkpoint for a process that holds a read transaction all the time:
//!
//! - `walCheckpoint` syncs the main file only if it copies *all* of the WAL, but stores `nBackfill` in any case. With
//!   a pin nearly every checkpoint under load is partial. If the disk then loses one of these pages and reports it
//!   once (fsync(2)), no later checkpoint copies the page again, and the WAL is restarted over its only copy. So the
//!   main file is synced before `nBackfill` is stored; if that fails, `nBackfill` becomes 0 again before anybody
//!   can rely on it, as in `walIndexRecover`: every frame is still in the WAL, and the next checkpoint copies all.
//! - SQLite does not check that the files at its paths still are those that it has open. So the caller's check runs
//!   after the locks are taken and before the first page is written, and can refuse.
//!
//! - What others write to the main file meanwhile goes unnoticed. So its state is noted right after the last page.
//!
//! All hook into the methods of the main file (`sqlite3_io_methods`) of a connection of ours, at the calls that
//! `walCheckpoint` makes: `SQLITE_FCNTL_CKPT_START`, `xFileSize`, the writes, `SQLITE_FCNTL_CKPT_DONE`, the store, and
//! the release of read mark 0. All `unsafe` code about SQLite is in this file.

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
/// Where `nBackfill` is in it (`WalCkptInfo`).
const BACKFILL_OFFSET: usize = 96;

/// Frames in the WAL, and how many of them are in the main file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpointed {
    /// Frames in the WAL.
    pub frame_count: u32,
    /// Frames of them that are in the main file now.
    pub backfilled_frames: u32,
}

impl Checkpointed {
    /// Whether all frames are in the main file.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.backfilled_frames >= self.frame_count
    }
}

/// What the caller contributes to a checkpoint.
pub trait Guard {
    /// Refuses to write. Called before the first page is written, with the checkpoint lock held: nobody else copies
    /// frames then.
    ///
    /// # Errors
    /// Why nothing may be written.
    fn check(&self) -> Result<(), SqliteError>;
    /// Notes the main file as it is after the last page was written, before the sync that can take long; once more
    /// after the file got its length, and before that the same in order to refuse.
    ///
    /// # Errors
    /// That somebody else has written to it since the last note.
    fn note_written(&self, written: Written) -> Result<(), SqliteError>;
}

/// When [`Guard::note_written`] is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// After the last page, and again after the file got its length.
    Now,
    /// Nothing was written since the last time.
    NothingSince,
}

/// What a checkpoint of this thread has come to.
struct Running<'a> {
    guard: &'a dyn Guard,
    is_begun: bool,
    refused: Option<SqliteError>,
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

/// Puts the hooks before the methods of the connection's main file. To be called once, right after it is opened.
///
/// # Errors
/// When SQLite does not give the file, or one of another kind than before: then it must not be used.
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

/// Runs a checkpoint on a connection that has the hooks. `None` when another checkpoint runs, or, in other modes than
/// PASSIVE, when a reader or writer is in the way.
///
/// # Errors
/// What `guard` answers: then no frame counts as copied that did not before. [`SqliteError::CheckpointFailed`]: no frame counts as copied that did
/// not before; keep the frames pinned, and try again.
pub fn run(
    path: &Path,
    connection: &Connection,
    mode: CheckpointMode,
    guard: &dyn Guard,
) -> Result<Option<Checkpointed>, SqliteError> {
    let mut running = Running { guard, is_begun: false, refused: None, sync_failed: None };
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

/// `xShmLock`: after a failed sync `nBackfill` is taken back before read mark 0 is released.
unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, offset: c_int, n: c_int, flags: c_int) -> c_int {
    let Some(original) = original() else { return ffi::SQLITE_IOERR };
    let is_release = offset == READ_LOCK_ZERO && flags == ffi::SQLITE_SHM_UNLOCK | ffi::SQLITE_SHM_EXCLUSIVE;
    if is_release && with_running(|running| running.sync_failed.is_some()) == Some(true) {
        let mut region: *mut c_void = ptr::null_mut();
        // SAFETY: SQLite's own method; the first region is mapped, because the checkpoint that runs has read it. The
        // checkpoint lock is held: nobody else stores `nBackfill`. A writer that restarts the WAL stores 0, too.
        unsafe {
            let map = original.xShmMap.map(|map| map(file, 0, WAL_INDEX_REGION_LEN, 0, &raw mut region));
            if map == Some(ffi::SQLITE_OK) && !region.is_null() {
                let backfill = AtomicU32::from_ptr(region.cast::<u8>().add(BACKFILL_OFFSET).cast());
                backfill.store(0, Ordering::SeqCst);
            }
        }
    }
    // SAFETY: as above.
    original.xShmLock.map_or(ffi::SQLITE_IOERR, |lock| unsafe { lock(file, offset, n, flags) })
}
