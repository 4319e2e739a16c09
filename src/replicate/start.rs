//! Taking up a database: what can be proven of the time when nobody watched. In this order, the first that holds:
//!
//! - *resume*: the WAL goes on from the place we left, and the main file was not touched, or holds page for page what we know; or
//!   the main file held everything and was not touched, and the WAL was begun anew; that it was not touched is known only within one
//!   boot of the machine;
//! - *delta*: the ledger tells what the database was; what differs now is recorded as one transaction;
//! - *re-anchor*: nothing is known; a new epoch begins with the database as it is.

use std::sync::Arc;

use super::capture::Capture;
use super::claim::Continuing;
use super::database::{DatabaseError, DatabaseSettings};
use super::delta::Difference;
use super::ledger::Ledger;
use super::record::{Recorder, Start};
use super::snapshots::SnapshotNote;
use super::spool::{Spool, is_lost};
use super::state::{LocalState, StateDirectory, StateDirectoryError};
use crate::clock::Clock;
use crate::sqlite::live::LiveDatabase;

/// A database that was taken up.
pub struct Started {
    /// The place in its WAL.
    pub capture: Capture,
    /// What is proven to go on from; `None`: the database is to be taken as it is.
    pub resumed: Option<Resumed>,
}

/// What a start goes on from.
pub struct Resumed {
    /// Records on; its epoch is 0 as long as none is claimed.
    pub recorder: Recorder,
    /// The last snapshot.
    pub snapshot: Option<SnapshotNote>,
    /// What the claim says.
    pub continuing: Continuing,
}

/// Takes up a database that was opened.
///
/// # Errors
/// What SQLite, its files or the local state answer.
pub fn start(
    live: LiveDatabase,
    settings: &DatabaseSettings,
    directory: &StateDirectory,
    spool: &Spool,
    clock: &Arc<dyn Clock>,
) -> Result<Started, DatabaseError> {
    let saved = directory.load()?.filter(|(state, _)| state.page_size == live.files.page_size);
    let left_at = saved.as_ref().and_then(|(state, _)| state.wal_position());
    // The pin stands already: the main file that is looked at here is the one that the WAL belongs to.
    let main = live.files.main_identity()?;
    let boot_id = clock.boot_id();
    let boot_id = boot_id.as_deref();
    let is_whole = |state: &LocalState| state.is_main_complete && state.is_main_untouched(main, boot_id);
    let main_is_whole = saved.as_ref().is_some_and(|(state, _)| is_whole(state));
    let (mut capture, wal_continues) = Capture::attach(live, left_at, main_is_whole)?;
    let Some((state, overlay)) = saved else { return Ok(Started { capture, resumed: None }) };
    let ledger_path = directory.ledger_path();
    let ledger = Ledger::open(&ledger_path, state.page_size, state.size_pages, state.fingerprint, overlay);
    let ledger = match ledger {
        Ok(ledger) => ledger,
        Err(source) if !is_lost(&source) => {
            return Err(StateDirectoryError::Io { path: ledger_path, source }.into());
        }
        Err(error) => {
            tracing::warn!(path = %ledger_path.display(), %error, "the ledger can't be used; a new epoch begins");
            return Ok(Started { capture, resumed: None });
        }
    };
    let at = Start { position: state.captured, time_ms: state.time_ms, schema_cookie: state.schema_cookie };
    let mut recorder = Recorder::new(spool.clone(), clock.clone(), ledger, state.page_size, at);
    // The epoch to come is not known yet.
    recorder.set_epoch(0);
    let is_taken_up = match wal_continues {
        true => resume(&mut capture, &mut recorder, &state, boot_id, settings)?,
        false => catch_up(&capture, &mut recorder, &state, boot_id, settings)?,
    };
    let continuing = Continuing {
        replica: state.replica,
        writer: state.writer,
        captured: state.captured,
        is_restored: state.is_restored,
    };
    let resumed = is_taken_up.then_some(Resumed { recorder, snapshot: state.snapshot, continuing });
    Ok(Started { capture, resumed })
}

/// The WAL goes on from where it was left: captures what there is, and tells whether the main file is the right one for it.
fn resume(
    capture: &mut Capture,
    recorder: &mut Recorder,
    state: &LocalState,
    boot_id: Option<&str>,
    settings: &DatabaseSettings,
) -> Result<bool, DatabaseError> {
    let is_untouched = state.is_main_untouched(capture.files().main_identity()?, boot_id);
    capture.advance(recorder)?;
    let is_proven = is_untouched
        || Difference::find(capture, &recorder.ledger, 0)?.is_some_and(|found| found.is_nothing(&recorder.ledger));
    let database = settings.path.display();
    if is_proven {
        tracing::info!(%database, txid = state.captured.txid, is_untouched, "nothing was missed: the WAL goes on");
    } else {
        // What was recorded just now stood on a main file that is another one.
        tracing::warn!(%database, "changed while it was not followed, behind its WAL; a new epoch begins");
    }
    Ok(is_proven)
}

/// The WAL tells nothing of what happened: what differs from the ledger tells it.
fn catch_up(
    capture: &Capture,
    recorder: &mut Recorder,
    state: &LocalState,
    boot_id: Option<&str>,
    settings: &DatabaseSettings,
) -> Result<bool, DatabaseError> {
    let database = settings.path.display();
    let txid = state.captured.txid;
    let has_no_wal = state.wal.is_none() && capture.follower().position().is_none();
    if has_no_wal && state.is_main_untouched(capture.files().main_identity()?, boot_id) {
        tracing::info!(%database, txid, "nothing was missed: the file was not touched");
        return Ok(true);
    }
    // As one transaction it has to fit the spool.
    let most_pages = usize::try_from(settings.spool_limit_bytes / 2 / u64::from(state.page_size)).unwrap_or(usize::MAX);
    let Some(difference) = Difference::find(capture, &recorder.ledger, most_pages)? else {
        tracing::warn!(%database, "changed too much while it was not followed; a new epoch begins");
        return Ok(false);
    };
    if difference.is_nothing(&recorder.ledger) {
        tracing::info!(%database, txid, "nothing was missed: every page is as it was left");
    } else {
        let pages = difference.pages.len();
        tracing::warn!(
            %database, txid, pages,
            "changed while it was not followed; what differs is recorded as one transaction"
        );
        difference.record(capture, recorder)?;
    }
    Ok(true)
}
