//! Carrying a plan out: the snapshot's extents, then what the segments' transactions changed, oldest first, into a file that has no
//! name anybody looks at; then its fingerprint is checked.

use std::fs::File;
use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;

use futures_util::stream::{StreamExt, TryStreamExt};

use super::RestoreError;
use super::image::Image;
use super::plan::Plan;
use super::progress::{Phase, Progress};
use super::{extents, segments};
use crate::store::SharedStore;

/// Threads that decode and write at a time; at most so many, whatever the machine has: each needs memory.
const MOST_DECODERS: usize = 4;

/// What a restore has learnt.
#[derive(Debug)]
pub struct Restored {
    /// The hashes of all pages, 8 bytes each, little-endian, page 1 first; zeros for the lock page.
    pub page_hashes: File,
    /// Length in bytes of all extents of the snapshot, wherever they are.
    pub extents_len_bytes: u64,
    /// Bytes of the database that were found on the local disk and not fetched.
    pub reused_bytes: u64,
}

/// What a restore can make use of, and who watches it.
#[derive(Debug, Default)]
pub struct Helpers {
    /// A database file that may hold much of what is restored: what is right in it is taken from there.
    pub old: Option<File>,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// A restore that is under way.
pub(super) struct Execution {
    pub(super) store: SharedStore,
    pub(super) plan: Plan,
    pub(super) image: Image,
    /// So many threads decode and write.
    pub(super) decoders: usize,
}

/// Writes the database that `plan` describes into `file`, at `path`, and checks its fingerprint. Durable when it returns.
///
/// # Errors
/// When an object is missing or damaged, the store or the file fails, or the fingerprint is not the recorded one. What is
/// in the file then is worth nothing.
pub async fn execute(store: &SharedStore, plan: &Plan, file: File, path: &Path) -> Result<Restored, RestoreError> {
    execute_with(store, plan, file, path, Helpers::default()).await
}

/// The same, with what is there already: `file` may hold what an earlier attempt left.
///
/// # Errors
/// As [`execute`].
pub async fn execute_with(
    store: &SharedStore,
    plan: &Plan,
    file: File,
    path: &Path,
    helpers: Helpers,
) -> Result<Restored, RestoreError> {
    let Helpers { old, progress } = helpers;
    let is_empty = file.metadata().map_err(RestoreError::io(path, "write"))?.len() == 0;
    let image = Image::new(file, path, plan, progress.clone())?;
    let decoders = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_DECODERS);
    let execution = Arc::new(Execution { store: store.clone(), plan: plan.clone(), image, decoders });
    let index = extents::read_index(store, &plan.location, &plan.snapshot_footer).await?;
    // Before anything is written to it.
    let kept = if is_empty { Vec::new() } else { extents::kept(&execution, &index).await? };
    progress.enter(Phase::Snapshot);
    let reused_bytes = extents::apply(&execution, &index, &kept, old).await?;
    progress.enter(Phase::Segments);
    segments::apply(&execution).await?;
    progress.enter(Phase::Syncing);
    let found = execution.blocking(|execution| execution.image.finish()).await?;
    if found != plan.fingerprint {
        return Err(RestoreError::FingerprintMismatch { position: plan.position, expected: plan.fingerprint, found });
    }
    let page_hashes = execution.image.page_hashes.try_clone().map_err(RestoreError::io(path, "write"))?;
    let extents_len_bytes = index.extents.iter().map(|extent| u64::from(extent.compressed_len)).sum();
    Ok(Restored { page_hashes, extents_len_bytes, reused_bytes })
}

impl Execution {
    /// Works on a thread that may block.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, RestoreError> + Send + 'static,
    ) -> Result<T, RestoreError> {
        let execution = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&execution)).await;
        // It panicked, or the program ends.
        done.unwrap_or_else(|error| Err(RestoreError::Internal(error.to_string())))
    }

    /// Works on all of `items`, in parts, on as many threads as decode; gives the parts' results.
    pub(super) async fn in_parallel<I: Clone + Send + 'static, T: Send + 'static>(
        self: &Arc<Self>,
        items: &[I],
        work: impl Fn(&Self, &[I]) -> Result<T, RestoreError> + Clone + Send + 'static,
    ) -> Result<Vec<T>, RestoreError> {
        let parts: Vec<Vec<I>> = items.chunks(items.len().div_ceil(self.decoders).max(1)).map(<[I]>::to_vec).collect();
        let run = |part: Vec<I>| {
            let work = work.clone();
            async move { self.blocking(move |execution| work(execution, &part)).await }
        };
        futures_util::stream::iter(parts).map(run).buffered(self.decoders).try_collect().await
    }
}
