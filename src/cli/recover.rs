//! Restoring a planned state into a file: what `restore` and `run` share.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::exit_code::Failure;
use crate::clock::SystemClock;
use crate::replicate::control::somebody_listens;
use crate::replicate::handover::{Handover, Restored};
use crate::replicate::snapshots::SnapshotNote;
use crate::restore::RestoreError;
use crate::restore::execute::{Helpers, execute_with};
use crate::restore::history::History;
use crate::restore::install::{Incoming, Manner, is_there};
use crate::restore::plan::Plan;
use crate::restore::progress::Progress;
use crate::store::SharedStore;

/// A state, and where it goes.
pub(super) struct Recovery<'a> {
    /// Where it is.
    pub store: &'a SharedStore,
    /// What it is chosen from.
    pub history: &'a History,
    /// What is restored.
    pub plan: &'a Plan,
    /// Where the database goes.
    pub output: &'a Path,
    /// Where the next `replicate` looks for what it can go on from.
    pub state_dir: &'a Path,
    /// How what is there is treated.
    pub manner: Manner,
    /// Who watches.
    pub progress: Arc<Progress>,
}

/// What a restore came to.
pub(super) struct Recovered {
    /// What the user should know.
    pub notes: Vec<String>,
    /// Bytes of the database that were on the local disk already.
    pub reused_bytes: u64,
}

impl Recovery<'_> {
    /// Restores beside the output, and puts the file in its place.
    ///
    /// # Errors
    /// See [`RestoreError`]; what was there is still there then.
    pub async fn carry_out(self) -> Result<Recovered, RestoreError> {
        let is_there = is_there(self.output)?;
        let incoming = Incoming::create(self.output, self.manner)?;
        // A daemon that lets the old database rest has no file of it open. One that waits for a database may be given it.
        if is_there && somebody_listens(self.state_dir) {
            return Err(RestoreError::TargetInUse(self.output.to_owned()));
        }
        let helpers = Helpers { old: incoming.old(), progress: self.progress.clone() };
        let done = execute_with(self.store, self.plan, incoming.handle()?, incoming.path(), helpers).await?;
        // What the old database's state says must not outlive it.
        let handover = Handover::begin(self.state_dir);
        let mut notes = incoming.install()?;
        let left = match handover {
            Ok(handover) => {
                let restored = self.restored(done.extents_len_bytes);
                handover
                    .complete(&restored, done.page_hashes, self.output, &SystemClock::new())
                    .map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match left {
            Ok(note) => {
                let state_dir = self.state_dir.display();
                notes.push(format!("{state_dir} is what the next `waltrail replicate` of it goes on from"));
                notes.extend(note);
            }
            Err(error) => notes.push(format!("the next `waltrail replicate` of it takes it as it is then ({error})")),
        }
        Ok(Recovered { notes, reused_bytes: done.reused_bytes })
    }

    fn restored(&self, extents_len_bytes: u64) -> Restored {
        let plan = self.plan;
        let writer = self.history.epochs.get(&plan.position.epoch).map(|epoch| epoch.record.writer.clone());
        Restored {
            replica: self.history.replica.clone(),
            writer: writer.unwrap_or_default(),
            position: plan.position,
            time_ms: plan.time_ms,
            page_size: plan.page_size,
            size_pages: plan.size_pages,
            fingerprint: plan.fingerprint,
            snapshot: SnapshotNote {
                begun_ms: plan.snapshot.key.time_ms,
                extents_len_bytes,
                log_len_bytes: plan.segments_len_bytes(),
            },
        }
    }
}

/// Restores to standard output, through a file without a name: pages come in no order, and change again with later transactions, and
/// nothing may be written before all of it is checked.
pub(super) async fn to_stdout(store: &SharedStore, plan: &Plan, progress: Arc<Progress>) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't write to standard output: {error}"));
    let made = tempfile::tempfile().and_then(|file| Ok((file.try_clone()?, file)));
    let (handle, mut file) = made.map_err(|source| RestoreError::Io {
        path: std::env::temp_dir(),
        doing: "make a temporary file in (TMPDIR names another place)",
        source,
    })?;
    let path = PathBuf::from("the temporary file in TMPDIR");
    execute_with(store, plan, handle, &path, Helpers { old: None, progress }).await?;
    let copy = move || {
        io::Seek::rewind(&mut file)?;
        let mut out = io::stdout().lock();
        io::copy(&mut file, &mut out)?;
        io::Write::flush(&mut out)
    };
    let copied = tokio::task::spawn_blocking(copy).await;
    copied.map_err(|error| Failure::other(error.to_string()))?.map_err(failed)
}
