//! Locks that other processes hold on a database, found without taking one.
//!
//! `F_GETLK` reports a conflicting lock of *another* process (fcntl(2)); it opens and closes nothing, so
//! it drops none of ours. The byte ranges are those of SQLite's `os_unix.c`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// First byte of the main file's lock range (`PENDING_BYTE` in `os.h`).
const PENDING_BYTE: i64 = 0x4000_0000;
/// Bytes of that range: PENDING, RESERVED and the 510 of SHARED.
const LOCK_RANGE_LEN: i64 = 512;
/// First byte of SHARED, and its length (`SHARED_FIRST`, `SHARED_SIZE`). Every connection in WAL mode
/// holds a read lock on it for as long as it is open.
const SHARED: (i64, i64) = (PENDING_BYTE + 2, 510);
/// The lock on read mark 0 in `-shm` (`UNIX_SHM_BASE` + `WAL_READ_LOCK(0)`).
const READ_MARK_ZERO: (i64, i64) = (123, 1);
/// The "dead man's switch" in `-shm` (`UNIX_SHM_DMS`): every process that has the wal-index open
/// holds a read lock on it.
const DEAD_MANS_SWITCH: (i64, i64) = (128, 1);

/// Returns whether another process has the database open: it holds SHARED on the main file, or the
/// dead man's switch of the `-shm` file.
///
/// # Errors
/// The I/O error of the operating system. The caller must assume that another process has the
/// database open.
pub fn is_open_elsewhere(main: &File, shm: Option<&File>) -> io::Result<bool> {
    if conflicts(main, libc::F_WRLCK, SHARED)? {
        return Ok(true);
    }
    shm.map_or(Ok(false), |shm| conflicts(shm, libc::F_WRLCK, DEAD_MANS_SWITCH))
}

/// Returns whether other processes have only one of the main file and the `-shm` file open. Such a
/// process uses a main file or a wal-index that was removed or replaced since. A new connection by
/// the path would share the WAL with it, but not the wal-index or the main file.
///
/// # Errors
/// As the operating system answers.
pub fn is_split(main: &File, shm: Option<&File>) -> io::Result<bool> {
    if conflicts(main, libc::F_RDLCK, SHARED)? {
        // An EXCLUSIVE lock: `locking_mode=EXCLUSIVE` needs no `-shm` file, and lets nobody else in.
        return Ok(false);
    }
    let has_main = conflicts(main, libc::F_WRLCK, SHARED)?;
    let has_index = shm.map_or(Ok(false), |shm| conflicts(shm, libc::F_WRLCK, DEAD_MANS_SWITCH))?;
    Ok(has_main != has_index)
}

/// Returns whether another process has any lock on the main file, that of a rollback journal included.
///
/// # Errors
/// As the operating system answers.
pub fn is_locked_elsewhere(main: &File) -> io::Result<bool> {
    conflicts(main, libc::F_WRLCK, (PENDING_BYTE, LOCK_RANGE_LEN))
}

/// Returns whether another process waits for an EXCLUSIVE lock: it holds PENDING (`unixLock`). In WAL
/// mode that is an application that wants `locking_mode=EXCLUSIVE` or leaves WAL mode.
///
/// # Errors
/// As the operating system answers.
pub fn is_exclusive_wanted(main: &File) -> io::Result<bool> {
    conflicts(main, libc::F_RDLCK, (PENDING_BYTE, 1))
}

/// Returns whether another process copies frames into the main file right now, or has done so and not
/// yet released read mark 0 (`walCheckpoint`). A read transaction that begins meanwhile gets a mark
/// of 1 or more.
///
/// # Errors
/// As the operating system answers.
pub fn is_read_mark_zero_taken(shm: &File) -> io::Result<bool> {
    conflicts(shm, libc::F_RDLCK, READ_MARK_ZERO)
}

/// Returns whether a lock of this kind on these bytes would conflict with one of another process.
fn conflicts(file: &File, kind: libc::c_int, (start, len): (i64, i64)) -> io::Result<bool> {
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    // SAFETY: the descriptor is open, and `lock` outlives the call.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    if answer == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
