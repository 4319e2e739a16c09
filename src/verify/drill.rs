//! Real restores, into a file that is thrown away; SQLite checks each.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use tempfile::NamedTempFile;

use super::survey::damage;
use crate::format::Position;
use crate::restore::RestoreError;
use crate::restore::execute::execute;
use crate::restore::history::History;
use crate::restore::plan::{Plan, Target, plan};
use crate::store::SharedStore;

/// So often a restore is begun anew when objects went while it was under way.
const ATTEMPTS: usize = 5;
/// SQLite tells so many faults of a database.
const FAULTS_AT_MOST: usize = 5;
/// What stands for itself in the path of a `file:` URI.
const PATH: AsciiSet = NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.');

/// What became of a restore.
pub(super) enum Drilled {
    /// It is there, and its fingerprint is right.
    Restored(Box<Plan>, NamedTempFile),
    /// It can't be: the object to blame, if it is one, and why.
    Damaged(Option<String>, String),
    /// It can't be any more: it was let go meanwhile, or was never there.
    NotThere(String),
    /// Objects went each time that it was tried.
    Unsettled,
}

/// Restores a state on the line of `epoch` (of the newest one, if not given) into a file in `scratch`. What one listing told may
/// be gone when it is read, because a daemon merges and prunes: so only what two histories agree on is damage.
pub(super) async fn restore(
    store: &SharedStore,
    scratch: &Path,
    target: Target,
    epoch: Option<u32>,
) -> Result<Drilled, RestoreError> {
    let mut before = None;
    for _ in 0..ATTEMPTS {
        let error = match attempt(store, scratch, target, epoch).await {
            Ok((plan, file)) => return Ok(Drilled::Restored(Box::new(plan), file)),
            Err(error) => error,
        };
        let found = match error {
            RestoreError::OutOfRange { .. } | RestoreError::NothingYet { .. } | RestoreError::NoSuchEpoch { .. } => {
                (None, error.to_string(), false)
            }
            RestoreError::Damaged { ref object, .. } => (Some(object.clone()), damage(error)?, true),
            error => (None, damage(error)?, true),
        };
        if before.as_ref() == Some(&found) {
            let (object, what, is_damage) = found;
            return Ok(if is_damage { Drilled::Damaged(object, what) } else { Drilled::NotThere(what) });
        }
        before = Some(found);
    }
    Ok(Drilled::Unsettled)
}

async fn attempt(
    store: &SharedStore,
    scratch: &Path,
    target: Target,
    epoch: Option<u32>,
) -> Result<(Plan, NamedTempFile), RestoreError> {
    let history = History::load(store).await?;
    let plan = plan(store, &history, target, epoch).await?;
    let file = scratch_file(scratch)?;
    let handle = file.as_file().try_clone().map_err(RestoreError::io(scratch, "restore into"))?;
    execute(store, &plan, handle, file.path()).await?;
    Ok((plan, file))
}

/// A file that is gone when it is dropped.
pub(super) fn scratch_file(directory: &Path) -> Result<NamedTempFile, RestoreError> {
    let made = tempfile::Builder::new().prefix("waltrail-verify-").suffix(".db").tempfile_in(directory);
    made.map_err(RestoreError::io(directory, "make a file in"))
}

/// What SQLite says of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Integrity {
    Sound,
    /// It is damaged: in SQLite's words.
    Corrupt(String),
    /// SQLite can't tell, because it lacks something that the application has.
    Unknown(String),
}

/// Has SQLite check a restored database, which nobody else knows of.
pub(super) fn check_integrity(path: &Path) -> Integrity {
    match faults(path) {
        Ok(faults) if faults == ["ok"] => Integrity::Sound,
        Ok(faults) => Integrity::Corrupt(faults.join("; ")),
        Err(error) => match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Integrity::Corrupt(error.to_string()),
            _ => Integrity::Unknown(error.to_string()),
        },
    }
}

fn faults(path: &Path) -> rusqlite::Result<Vec<String>> {
    let connection = open_immutable(path)?;
    let mut statement = connection.prepare(&format!("PRAGMA integrity_check({FAULTS_AT_MOST})"))?;
    statement.query_map([], |row| row.get(0))?.collect()
}

/// Opens a file that nobody writes: without a WAL, without locks.
pub(super) fn open_immutable(path: &Path) -> rusqlite::Result<Connection> {
    let uri = format!("file:{}?immutable=1", percent_encode(path.as_os_str().as_bytes(), &PATH));
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(uri, flags)
}

/// What the report calls the restore of a state.
pub(super) fn name(position: Position) -> String {
    format!("restore of {position}")
}
