//! Carrying a plan out. After a crash between any two deletions everything that is kept can be restored, and nothing looks
//! damaged: snapshots go before the objects that they have extents in, then segments, the newest first, so that what is left before
//! a snapshot is a beginning; then the records of epochs of which nothing is left, the oldest first.

use std::collections::{BTreeMap, BTreeSet};

use super::marks::load_marks;
use super::plan::{Going, ObjectKey, RetentionPlan, plan};
use super::tails::TailCache;
use super::{Now, RetainError, RetentionSettings};
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
    now: Now,
    cache: &mut TailCache,
    is_dry_run: bool,
) -> Result<Outcome, RetainError> {
    let history = History::load(store).await?;
    let tails = cache.read(store, &history).await?;
    // Last, so that none is overlooked that was set meanwhile.
    let marks = load_marks(store).await?;
    let plan = plan(&history, &tails, &marks, settings, now.resolve(&history))?;
    let mut pruning = Pruning::new(store);
    if !is_dry_run {
        pruning.carry_out(&plan).await?;
    }
    let Pruning { deleted_objects, deleted_bytes, refused, undeleted, .. } = pruning;
    Ok(Outcome { plan, deleted_objects, deleted_bytes, refused, undeleted })
}

struct Pruning<'a> {
    store: &'a SharedStore,
    /// The errors of deletions that were not checked yet, by key.
    failures: BTreeMap<String, StoreError>,
    /// What a whole request failed with.
    stopped_by: Option<StoreError>,
    /// What was to go and is still there.
    left: BTreeSet<ObjectKey>,
    deleted_objects: u64,
    deleted_bytes: u64,
    refused: Refused,
    undeleted: Undeleted,
}

impl<'a> Pruning<'a> {
    fn new(store: &'a SharedStore) -> Self {
        Self {
            store,
            failures: BTreeMap::new(),
            stopped_by: None,
            left: BTreeSet::new(),
            deleted_objects: 0,
            deleted_bytes: 0,
            refused: Refused::default(),
            undeleted: Undeleted::default(),
        }
    }

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
    /// everything of its epoch is gone, because what belongs to no epoch is never looked at again. The claims
    /// to an epoch go before its record: without it nobody would look at them.
    async fn delete_records(&mut self, records: &[&Going]) -> Result<(), RetainError> {
        let mut tried = Vec::new();
        for going in in_order_of_deletion(records) {
            let is_empty = self.left.iter().all(|key| key.epoch() != going.key.epoch());
            if !is_empty || !self.failures.is_empty() {
                break;
            }
            self.delete(&[going]).await;
            tried.push(going);
        }
        self.check(&tried, |_| EPOCHS_PREFIX.to_owned()).await
    }

    /// Asks for deletions. When the store can't be reached no other request is made: it would fail, too.
    async fn delete(&mut self, batch: &[&Going]) {
        let keys: Vec<String> = batch.iter().map(|going| going.key.to_string()).collect();
        let answer = match (&self.stopped_by, keys.as_slice()) {
            (Some(error), _) => Err(error.clone()),
            (None, [only]) => self.store.delete(only).await.map(|()| Vec::new()),
            (None, keys) => self.store.delete_many(keys).await,
        };
        match answer {
            Ok(failures) => self.failures.extend(failures),
            Err(error) => {
                self.failures.extend(keys.into_iter().map(|key| (key, error.clone())));
                if error.is_retryable() {
                    self.stopped_by = Some(error);
                }
            }
        }
    }

    /// Lists again: not every store that answers has deleted, and a deletion that failed may have been carried out.
    async fn check(&mut self, tried: &[&Going], prefix_of: fn(u32) -> String) -> Result<(), RetainError> {
        let prefixes: BTreeSet<String> = tried.iter().map(|going| prefix_of(going.key.epoch())).collect();
        let mut there = BTreeSet::new();
        for prefix in prefixes {
            there.extend(self.store.list(&prefix, None).await?.into_iter().map(|object| object.key));
        }
        for going in tried {
            let key = going.key.to_string();
            let failure = self.failures.remove(&key);
            if !there.contains(&key) {
                self.deleted_objects += 1;
                self.deleted_bytes += going.len_bytes;
                continue;
            }
            self.left.insert(going.key.clone());
            match failure {
                Some(error) => {
                    self.refused.objects += 1;
                    self.refused.example.get_or_insert(error);
                }
                None => {
                    self.undeleted.objects += 1;
                    self.undeleted.example.get_or_insert(key);
                }
            }
        }
        Ok(())
    }
}

/// Epoch by epoch, the oldest first; of the claims to one epoch the record last.
fn in_order_of_deletion<'g>(records: &[&'g Going]) -> Vec<&'g Going> {
    let epochs = records.chunk_by(|left, right| left.key.epoch() == right.key.epoch());
    epochs.flat_map(|claims| claims.iter().rev().copied()).collect()
}
