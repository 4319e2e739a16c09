//! Carrying a plan out. After a crash between any two deletions everything that is kept can be restored, and nothing looks
//! damaged: snapshots go before the objects that they have extents in, then segments, the newest first, so that what is left before
//! a snapshot is a beginning; then the records of epochs of which nothing is left, the oldest first.

use std::collections::BTreeSet;

use super::marks::load_marks;
use super::plan::{Going, ObjectKey, RetentionPlan, plan};
use super::tails::SourcesCache;
use super::{RetainError, RetentionSettings};
use crate::format::key::{EPOCHS_PREFIX, log_prefix, snapshot_prefix};
use crate::restore::history::History;
use crate::store::{DELETE_MANY_LIMIT, SharedStore, StoreError};

/// What became of a plan.
#[derive(Debug)]
pub struct Outcome {
    /// The plan.
    pub plan: RetentionPlan,
    /// Objects that were deleted.
    pub deleted_objects: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Objects that the store refused to delete.
    pub refused: Refused,
    /// Objects that are still there after the store answered that they were deleted.
    pub undeleted: Undeleted,
}

/// What the store refused.
#[derive(Debug, Default)]
pub struct Refused {
    /// How many objects.
    pub objects: u64,
    /// The first error.
    pub example: Option<StoreError>,
}

/// What the store said it deleted, and did not.
#[derive(Debug, Default)]
pub struct Undeleted {
    /// How many objects.
    pub objects: u64,
    /// The first key.
    pub example: Option<String>,
}

impl Outcome {
    /// Whether every object that was to go is gone.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.refused.objects == 0 && self.undeleted.objects == 0
    }
}

/// Plans what of a replica goes and, unless `is_dry_run`, deletes it. Deletions that are refused are in the outcome and no error:
/// the next time they are tried again.
///
/// # Errors
/// When the history, the end of a snapshot or a mark can't be read: then nothing is deleted. When the listing that checks
/// deletions fails: then no more is deleted.
pub async fn prune(
    store: &SharedStore,
    settings: &RetentionSettings,
    now_ms: u64,
    cache: &mut SourcesCache,
    is_dry_run: bool,
) -> Result<Outcome, RetainError> {
    let history = History::load(store).await?;
    let tails = cache.read(store, &history).await?;
    // Last, so that none is overlooked that was set meanwhile.
    let marks = load_marks(store).await?;
    let plan = plan(&history, &tails, &marks, settings, now_ms)?;
    let mut pruning = Pruning {
        store,
        left: BTreeSet::new(),
        deleted: (0, 0),
        refused: Refused::default(),
        undeleted: Undeleted::default(),
    };
    if !is_dry_run {
        pruning.carry_out(&plan).await?;
    }
    let Pruning { deleted: (deleted_objects, deleted_bytes), refused, undeleted, .. } = pruning;
    Ok(Outcome { plan, deleted_objects, deleted_bytes, refused, undeleted })
}

struct Pruning<'a> {
    store: &'a SharedStore,
    /// What was to go and is still there.
    left: BTreeSet<ObjectKey>,
    /// How many objects are gone, and their bytes.
    deleted: (u64, u64),
    refused: Refused,
    undeleted: Undeleted,
}

impl Pruning<'_> {
    async fn carry_out(&mut self, plan: &RetentionPlan) -> Result<(), RetainError> {
        let of_kind = |is_kind: fn(&ObjectKey) -> bool| {
            plan.going.iter().filter(move |going| is_kind(&going.key)).collect::<Vec<&Going>>()
        };
        self.delete_snapshots(of_kind(|key| matches!(key, ObjectKey::Snapshot(_)))).await?;
        let mut segments = of_kind(|key| matches!(key, ObjectKey::Segment(_)));
        segments.reverse();
        for batch in segments.chunks(DELETE_MANY_LIMIT) {
            self.delete(batch).await;
        }
        self.check(&segments, log_prefix).await?;
        self.delete_records(&of_kind(|key| matches!(key, ObjectKey::Epoch(_)))).await
    }

    /// In rounds: those that no other one that is still there has extents in. One that could not be deleted keeps its sources.
    async fn delete_snapshots(&mut self, mut waiting: Vec<&Going>) -> Result<(), RetainError> {
        while !waiting.is_empty() {
            let needed: BTreeSet<ObjectKey> = waiting
                .iter()
                .flat_map(|going| going.sources.iter().map(|source| ObjectKey::Snapshot(*source)))
                .collect();
            let (later, mut now): (Vec<&Going>, Vec<&Going>) =
                waiting.iter().partition(|going| needed.contains(&going.key));
            if now.is_empty() {
                // Sources are older than what refers to them, so this can't be; if it is, nobody knows what is safe.
                return Ok(());
            }
            now.reverse();
            for batch in now.chunks(DELETE_MANY_LIMIT) {
                self.delete(batch).await;
            }
            self.check(&now, snapshot_prefix).await?;
            let held: BTreeSet<ObjectKey> = now
                .iter()
                .filter(|going| self.left.contains(&going.key))
                .flat_map(|going| going.sources.iter().map(|source| ObjectKey::Snapshot(*source)))
                .collect();
            let (held, free): (Vec<&Going>, Vec<&Going>) =
                later.into_iter().partition(|going| held.contains(&going.key));
            self.left.extend(held.iter().map(|going| going.key.clone()));
            waiting = self.without_sources_of(held, free);
        }
        Ok(())
    }

    /// What is held back holds its own sources back.
    fn without_sources_of<'g>(&mut self, mut held: Vec<&'g Going>, mut free: Vec<&'g Going>) -> Vec<&'g Going> {
        while let Some(going) = held.pop() {
            let is_source =
                |other: &&Going| matches!(&other.key, ObjectKey::Snapshot(key) if going.sources.contains(key));
            let (more, rest): (Vec<&Going>, Vec<&Going>) = free.into_iter().partition(is_source);
            self.left.extend(more.iter().map(|going| going.key.clone()));
            held.extend(more);
            free = rest;
        }
        free
    }

    /// One by one, because a record that is missing behind one that is there would be damage; and no record goes before
    /// everything of its epoch is gone, because what belongs to no epoch is never looked at again. A claim that lost would count
    /// if it were left behind, so those of one epoch go from the last on.
    async fn delete_records(&mut self, records: &[&Going]) -> Result<(), RetainError> {
        let mut tried = Vec::new();
        for epoch in records.chunk_by(|left, right| left.key.epoch() == right.key.epoch()) {
            let is_left = |key: &ObjectKey| epoch.iter().any(|going| going.key.epoch() == key.epoch());
            if self.left.iter().any(is_left) {
                break;
            }
            for going in epoch.iter().rev() {
                self.delete(std::slice::from_ref(going)).await;
                tried.push(*going);
                if !self.left.is_empty() && self.left.contains(&going.key) {
                    return self.check(&tried, |_| EPOCHS_PREFIX.to_owned()).await;
                }
            }
        }
        self.check(&tried, |_| EPOCHS_PREFIX.to_owned()).await
    }

    /// Deletes; what was refused is left.
    async fn delete(&mut self, batch: &[&Going]) {
        let keys: Vec<String> = batch.iter().map(|going| going.key.to_string()).collect();
        let answer = match keys.as_slice() {
            [only] => match self.store.delete(only).await {
                Ok(()) => Vec::new(),
                Err(error) => vec![(only.clone(), error)],
            },
            _ => match self.store.delete_many(&keys).await {
                Ok(failures) => failures,
                Err(error) => keys.iter().map(|key| (key.clone(), error.clone())).collect(),
            },
        };
        for (key, error) in answer {
            self.refused.objects += 1;
            self.refused.example.get_or_insert(error);
            self.left.extend(batch.iter().find(|going| going.key.to_string() == key).map(|going| going.key.clone()));
        }
    }

    /// Lists again: not every store that answers has deleted.
    async fn check(&mut self, tried: &[&Going], prefix_of: fn(u32) -> String) -> Result<(), RetainError> {
        let prefixes: BTreeSet<String> = tried.iter().map(|going| prefix_of(going.key.epoch())).collect();
        let mut there = BTreeSet::new();
        for prefix in prefixes {
            there.extend(self.store.list(&prefix, None).await?.into_iter().map(|object| object.key));
        }
        for going in tried {
            let key = going.key.to_string();
            if there.contains(&key) {
                if self.left.insert(going.key.clone()) {
                    self.undeleted.objects += 1;
                    self.undeleted.example.get_or_insert(key);
                }
            } else {
                // A deletion whose answer was an error may have been carried out.
                self.left.remove(&going.key);
                self.deleted.0 += 1;
                self.deleted.1 += going.len_bytes;
            }
        }
        Ok(())
    }
}
