//! Comparing the newest state with the live database.
//!
//! The database is read by SQLite alone, as any reader does it: never through a file of our own, whose closing would drop the
//! locks of every connection of the process. It is copied inside of one read transaction, which blocks no writer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::VerifyError;
use super::drill::{Drilled, restore, scratch_file};
use crate::format::{Position, lock_page};
use crate::replicate::control::{ControlError, Request, State, ask};
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::plan::Target;
use crate::restore::run::{Run, runs};
use crate::store::SharedStore;

/// So often a live database is copied to meet it between two commits.
const ATTEMPTS: usize = 10;
/// A reader that finds the database locked waits so long.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// So often a copy that is held up is gone on with, and after so long each time.
const STEPS_AT_MOST: usize = 500;
const BETWEEN_STEPS: Duration = Duration::from_millis(10);
/// So many bytes are compared at a time.
const CHUNK_LEN: usize = 1 << 20;
/// What a copy by SQLite has of its own in page 1: the file format's versions, the change counter, the schema cookie (which is
/// compared by itself), and two fields that tell who wrote it last.
const OWN_BYTES: [std::ops::Range<usize>; 4] = [18..20, 24..28, 40..44, 92..100];
const SCHEMA_COOKIE: std::ops::Range<usize> = 40..44;

/// The live database.
#[derive(Debug, Clone)]
pub struct Live {
    /// Its path.
    pub database: PathBuf,
    /// Where the daemon that may follow it keeps its state.
    pub state_dir: PathBuf,
    /// How long to wait for that daemon.
    pub patience: Duration,
}

/// What the comparison found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Compared {
    /// They are the same.
    Same(Position, u64),
    /// They are not: a sentence.
    Differs(String),
    /// It could not be found out: a sentence.
    Unknown(String),
}

/// A copy of the live database, and what is known of when it was made.
struct Copied {
    file: tempfile::NamedTempFile,
    schema_cookie: u32,
    /// The state that it is, when the daemon confirmed the same one before and after.
    state: Option<State>,
    /// Whether nobody committed meanwhile.
    is_quiet: bool,
    /// Why no daemon was asked.
    no_daemon: Option<String>,
}

/// Compares the newest state of a replica with the live database, byte for byte.
pub(super) async fn compare(store: &SharedStore, scratch: &Path, live: &Live) -> Result<Compared, VerifyError> {
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let copied = match copy(scratch, live).await? {
            Ok(copied) => copied,
            Err(locked) => return Ok(Compared::Unknown(locked)),
        };
        let compared = match (&copied.state, &copied.no_daemon) {
            (Some(state), _) => {
                let target = Target::Txid(state.position.txid);
                hold_against(store, scratch, &copied, target, Some(state.position.epoch)).await?
            }
            (None, Some(_)) => hold_against(store, scratch, &copied, Target::Latest, None).await?,
            (None, None) => continue,
        };
        match (compared, &copied.no_daemon) {
            // Nobody tells which state the copy is, so one that differs may be another one.
            (Compared::Differs(what), Some(_)) if !copied.is_quiet => last = Some(what),
            (Compared::Differs(what), Some(why)) => return Ok(Compared::Differs(format!("{what}; {why}"))),
            (compared, _) => return Ok(compared),
        }
    }
    let database = live.database.display();
    let last = last.map_or(String::new(), |what| format!("; the last look: {what}"));
    Ok(Compared::Unknown(format!(
        "{database} was written to each of {ATTEMPTS} times that it was copied, so it could not be compared{last}"
    )))
}

/// Copies the live database between two questions to the daemon. A sentence, if somebody keeps it locked.
async fn copy(scratch: &Path, live: &Live) -> Result<Result<Copied, String>, VerifyError> {
    let (before, no_daemon) = match sync(live).await {
        Ok(state) => (Some(state), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let file = scratch_file(scratch)?;
    let (database, to) = (live.database.clone(), file.path().to_owned());
    let failed = |what: String| VerifyError::Live { path: live.database.clone(), what };
    let copied = tokio::task::spawn_blocking(move || copy_pages(&database, &to)).await;
    let copied = copied.map_err(|error| failed(error.to_string()))?;
    let (schema_cookie, is_quiet) = match copied {
        Err(error) if is_locked(&error) => {
            return Ok(Err(format!("{} could not be compared: {error}", live.database.display())));
        }
        other => other.map_err(|error| failed(error.to_string()))?,
    };
    let after = match before {
        Some(_) => sync(live).await.ok(),
        None => None,
    };
    let state = before.filter(|before| after.is_some_and(|after| after.position == before.position));
    Ok(Ok(Copied { file, schema_cookie, state, is_quiet, no_daemon }))
}

fn is_locked(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

async fn sync(live: &Live) -> Result<State, ControlError> {
    ask(&live.database, &live.state_dir, Request::Sync, live.patience).await
}

/// Copies all pages inside of one read transaction; gives the schema cookie, and whether nobody committed meanwhile.
fn copy_pages(from: &Path, to: &Path) -> rusqlite::Result<(u32, bool)> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let source = Connection::open_with_flags(from, flags)?;
    source.busy_timeout(BUSY_TIMEOUT)?;
    // If ours is the last connection to close, the WAL stays as it is.
    source.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let version = |connection: &Connection| connection.query_row("PRAGMA data_version", [], |row| row.get::<_, i64>(0));
    source.execute_batch("BEGIN; SELECT 1 FROM sqlite_schema LIMIT 1")?;
    let before = version(&source)?;
    let schema_cookie = source.query_row("PRAGMA schema_version", [], |row| row.get(0))?;
    let mut target = Connection::open(to)?;
    // A crash of the machine leaves nothing of it anyway.
    target.execute_batch("PRAGMA synchronous=OFF")?;
    {
        let backup = Backup::new(&source, &mut target)?;
        // Our read transaction stands, so nobody is in the way but for a moment.
        let mut is_done = false;
        for _ in 0..STEPS_AT_MOST {
            is_done = backup.step(-1)? == StepResult::Done;
            if is_done {
                break;
            }
            std::thread::sleep(BETWEEN_STEPS);
        }
        if !is_done {
            let busy = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
            return Err(rusqlite::Error::SqliteFailure(busy, None));
        }
    }
    source.execute_batch("COMMIT")?;
    // Into the file itself, whatever the journal mode that was copied.
    target.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    target.query_row("PRAGMA journal_mode=DELETE", [], |_| Ok(()))?;
    target.close().map_err(|(_, error)| error)?;
    let after = version(&source)?;
    Ok((schema_cookie, before == after))
}

/// Restores a state and compares it with a copy.
async fn hold_against(
    store: &SharedStore,
    scratch: &Path,
    copied: &Copied,
    target: Target,
    epoch: Option<u32>,
) -> Result<Compared, VerifyError> {
    let (plan, restored) = match restore(store, scratch, target, epoch).await? {
        Drilled::Restored(plan, restored) => (plan, restored),
        Drilled::Damaged(_, what) => {
            return Ok(Compared::Differs(format!("the newest state can't be restored: {what}")));
        }
        Drilled::NotThere(what) => return not_there(store, target, epoch, what).await,
        Drilled::Unsettled => return Ok(Compared::Unknown("objects went each time that it was restored".into())),
    };
    let handle = |file: &tempfile::NamedTempFile| file.reopen().map_err(RestoreError::io(file.path(), "read"));
    let (left, right) = (handle(&restored)?, handle(&copied.file)?);
    let (page_size, cookie) = (plan.page_size, copied.schema_cookie);
    let compared = tokio::task::spawn_blocking(move || differences(&left, &right, page_size, cookie)).await;
    let path = restored.path();
    let lost = |error: tokio::task::JoinError| RestoreError::io(path, "compare")(io::Error::other(error.to_string()));
    let found = compared.map_err(lost)?.map_err(RestoreError::io(path, "compare"))?;
    Ok(match found {
        None => Compared::Same(plan.position, plan.database_len_bytes()),
        Some(Difference { pages: 1, first }) => {
            Compared::Differs(format!("the live database and {} differ in one page, page {first}", plan.position))
        }
        Some(Difference { pages, first }) => Compared::Differs(format!(
            "the live database and {} differ in {pages} pages; the first one is page {first}",
            plan.position
        )),
    })
}

/// What it means that a state can't be restored: before the first snapshot of its epoch is stored, nothing bad.
async fn not_there(
    store: &SharedStore,
    target: Target,
    epoch: Option<u32>,
    what: String,
) -> Result<Compared, VerifyError> {
    let history = History::load(store).await?;
    let line = history.line(epoch).unwrap_or_default();
    let is_in = |run: &Run<'_>| match target {
        Target::Txid(txid) => (run.first_txid..=run.last_txid).contains(&txid),
        _ => true,
    };
    Ok(match runs(&line).iter().any(is_in) {
        true => Compared::Unknown(format!("the state of the live database can't be restored yet: {what}")),
        false => Compared::Differs(format!("the daemon confirmed a state that is not in this replica: {what}")),
    })
}

/// Pages that are not the same.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    pages: u64,
    first: u64,
}

fn differences(restored: &File, live: &File, page_size: u32, live_cookie: u32) -> io::Result<Option<Difference>> {
    let (restored_len, live_len) = (restored.metadata()?.len(), live.metadata()?.len());
    let page_len = u64::from(page_size);
    let mut found: Option<Difference> = None;
    let mut note = |page: u64| match &mut found {
        None => found = Some(Difference { pages: 1, first: page }),
        Some(found) => found.pages += 1,
    };
    let common = restored_len.min(live_len);
    let chunk_len = CHUNK_LEN.max(page_size as usize);
    let mut at = 0;
    while at < common {
        let len = (common - at).min(chunk_len as u64) as usize;
        let (mut left, mut right) = (vec![0; len], vec![0; len]);
        restored.read_exact_at(&mut left, at)?;
        live.read_exact_at(&mut right, at)?;
        if at == 0 {
            mask(&mut left, &mut right, live_cookie);
        }
        let pages = left.chunks(page_size as usize).zip(right.chunks(page_size as usize));
        for (number, (left, right)) in (at / page_len + 1..).zip(pages) {
            // SQLite's copy leaves the lock page out, too.
            if left != right && number != u64::from(lock_page(page_size)) {
                note(number);
            }
        }
        at += len as u64;
    }
    for number in common.div_ceil(page_len) + 1..=restored_len.max(live_len).div_ceil(page_len) {
        note(number);
    }
    Ok(found)
}

/// Leaves what a copy has of its own in page 1 out of the comparison.
fn mask(restored: &mut [u8], copied: &mut [u8], live_cookie: u32) {
    let has_header = restored.len() >= 100 && copied.len() >= 100;
    if !has_header {
        return;
    }
    let cookie: Vec<u8> = restored[SCHEMA_COOKIE].to_vec();
    for range in OWN_BYTES {
        restored[range.clone()].fill(0);
        copied[range].fill(0);
    }
    restored[SCHEMA_COOKIE].copy_from_slice(&cookie);
    copied[SCHEMA_COOKIE].copy_from_slice(&live_cookie.to_be_bytes());
}
