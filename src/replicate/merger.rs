//! The task that merges a database's segments: keeps what is confirmed, and makes one of many when it is time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};

use super::merge::{MergeSettings, Step, held_by_others, merge_files, next_step};
use super::spool::{self, Spool, Spooled};
use crate::format::key::SegmentKey;
use crate::store::retry::RetryPolicy;
use crate::store::upload::put_file;
use crate::store::{PutMode, SharedStore, StoreError, StoreErrorKind};

/// A merged segment that the store does not take is tried so often; then the small ones stay as they are.
const PATIENCE: RetryPolicy = RetryPolicy { attempts: 10, base_ms: 1000, max_ms: 60_000 };

/// Merges one database's segments.
pub struct Merger {
    /// The replica.
    pub store: SharedStore,
    /// Where segments are kept.
    pub spool: Spool,
    /// What is merged.
    pub settings: MergeSettings,
    /// So many merges run at a time, of all databases.
    pub permits: Arc<Semaphore>,
}

/// Why a merge came to nothing.
enum Failure {
    /// A file of the spool.
    Local(io::Error),
    /// The store.
    Store(StoreError),
}

impl Merger {
    /// Takes in kept segments until there are no more. That nothing can be merged is no failure of replication: it is logged,
    /// and what was to be merged stays in small pieces.
    pub async fn run(self, mut confirmed: mpsc::UnboundedReceiver<Spooled>) {
        let mut kept = self.left_by_earlier_runs();
        while let Some(spooled) = confirmed.recv().await {
            let newest_ms = spooled.key.0.time_ms;
            if !kept.iter().any(|known| known.key == spooled.key) {
                kept.push(spooled);
            }
            // What waits already is taken in first: so one merge takes all.
            if confirmed.is_empty() {
                kept.sort_by_key(|spooled| spooled.key);
                self.work_off(&mut kept, newest_ms).await;
            }
        }
    }

    fn left_by_earlier_runs(&self) -> Vec<Spooled> {
        let found = self.spool.remove_unfinished_merges().and_then(|()| self.spool.kept());
        let mut kept = found.unwrap_or_else(|error| {
            tracing::warn!(%error, "what is kept for merging can't be listed");
            Vec::new()
        });
        for index in held_by_others(&kept).into_iter().rev() {
            remove(&kept.remove(index));
        }
        kept
    }

    async fn work_off(&self, kept: &mut Vec<Spooled>, newest_ms: u64) {
        loop {
            match next_step(kept, &self.settings, newest_ms) {
                Step::Wait => return,
                Step::LetGo(index) => remove(&kept.remove(index)),
                Step::Merge(range) => {
                    let start = range.start;
                    if let Some(merged) = self.merge_all(kept.drain(range).collect()).await {
                        kept.insert(start, merged);
                    }
                }
                Step::MergeForGood(range) => {
                    if let Some(merged) = self.merge_all(kept.drain(range).collect()).await {
                        remove(&merged);
                    }
                }
            }
        }
    }

    /// Makes these one, and lets go of them: if it fails, they stay in small pieces in storage.
    async fn merge_all(&self, inputs: Vec<Spooled>) -> Option<Spooled> {
        let merged = self.merge(&inputs).await;
        inputs.iter().for_each(remove);
        match merged {
            Ok(merged) => return Some(merged),
            Err(Failure::Local(error)) => tracing::warn!(%error, "segments can't be merged and stay small"),
            Err(Failure::Store(error)) => {
                tracing::warn!(%error, "a merged segment was not stored; the small ones stay")
            }
        }
        None
    }

    /// The small ones' files are needed until the large one is confirmed and kept.
    async fn merge(&self, inputs: &[Spooled]) -> Result<Spooled, Failure> {
        let paths: Vec<PathBuf> = inputs.iter().map(|spooled| spooled.path.clone()).collect();
        // What is merged replaces what was confirmed, so the inputs must be that.
        inputs.iter().try_for_each(|spooled| spooled.open().map(drop)).map_err(Failure::Local)?;
        let output = self.spool.merge_file().map_err(Failure::Local)?;
        let file = output.as_file().try_clone().map_err(Failure::Local)?;
        let permit = self.permits.acquire().await;
        let merged = tokio::task::spawn_blocking(move || merge_files(&paths, file)).await;
        drop(permit);
        let key = merged.map_err(|error| Failure::Local(io::Error::other(error)))?.map_err(Failure::Local)?;
        self.put(key, output.path()).await.map_err(Failure::Store)?;
        let merged = self.spool.keep_merged(output, key).map_err(Failure::Local)?;
        let from_bytes: u64 = inputs.iter().map(|spooled| spooled.len_bytes).sum();
        tracing::debug!(%key, segments = inputs.len(), from_bytes, len_bytes = merged.len_bytes, "merged");
        Ok(merged)
    }

    async fn put(&self, key: SegmentKey, path: &Path) -> Result<(), StoreError> {
        let mut mode = PutMode::IfAbsent;
        let mut attempt = 0;
        loop {
            match put_file(&self.store, &key.to_string(), path, mode).await {
                // An earlier run ended before it had the answer. Only this epoch's writer puts under such names, and only what
                // holds these transactions.
                Err(error) if error.kind == StoreErrorKind::AlreadyExists => return Ok(()),
                Err(error) if error.kind == StoreErrorKind::NotSupported && mode == PutMode::IfAbsent => {
                    mode = PutMode::Overwrite;
                }
                Err(error) if error.is_retryable() && attempt < PATIENCE.attempts => {
                    tokio::time::sleep(PATIENCE.wait(attempt)).await;
                    attempt += 1;
                }
                answer => return answer.map(|_| ()),
            }
        }
    }
}

fn remove(spooled: &Spooled) {
    if let Err(error) = spool::remove(&spooled.path) {
        tracing::warn!(%error, key = %spooled.key, "a kept segment can't be removed");
    }
}
