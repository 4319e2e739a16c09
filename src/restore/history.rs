//! What a replica holds, as its listing and its epoch records tell: epochs, segments, snapshots, and the lines that the
//! epochs form.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::RestoreError;
use crate::format::key::{
    EPOCHS_PREFIX, EpochKey, LOG_PREFIX, MARKER_KEY, SNAPSHOTS_PREFIX, SegmentKey, SnapshotKey, epoch_of_folder,
    epoch_of_object,
};
use crate::format::record::{EpochRecord, RECORD_LIMIT, ReplicaMarker};
use crate::store::{ObjectInfo, SharedStore, StoreError};

/// So many epoch records are read at a time.
const RECORDS_IN_FLIGHT: usize = 8;
/// A replica is looked at so often until what was found fits together.
const LOAD_ATTEMPTS: usize = 3;

/// A stored object and its length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored<K> {
    /// Its key.
    pub key: K,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// When it was stored, in milliseconds since 1970 by the store's clock; `u64::MAX` where the store does not say.
    pub stored_ms: u64,
}

impl<K> Stored<K> {
    fn of(key: K, object: &ObjectInfo) -> Self {
        Self { key, len_bytes: object.len_bytes, stored_ms: object.stored_ms }
    }
}

/// One epoch of a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epoch {
    /// Its record.
    pub record: EpochRecord,
    /// The claims to it: first its record.
    pub claims: Vec<Stored<EpochKey>>,
    /// Its segments, by their first transaction.
    pub segments: Vec<Stored<SegmentKey>>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Stored<SnapshotKey>>,
}

/// Everything that a replica holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The replica, for messages.
    pub location: String,
    /// The replica's id.
    pub replica: String,
    /// All epochs by number.
    pub epochs: BTreeMap<u32, Epoch>,
    /// Epochs that were claimed only by writers that gave way to each other: nothing is in them.
    pub given_up: BTreeSet<u32>,
    /// Objects that are none of ours, or that belong to no epoch.
    pub strangers: Vec<String>,
}

impl History {
    /// Lists a replica and reads its epoch records.
    ///
    /// # Errors
    /// [`RestoreError::NoReplica`] when the store was reached and there is none; [`RestoreError::Damaged`] when a record can't
    /// be read.
    pub async fn load(store: &SharedStore) -> Result<Self, RestoreError> {
        for _ in 1..LOAD_ATTEMPTS {
            match Self::load_once(store).await {
                // Between two requests a daemon may have claimed an epoch, and a prune let go of one.
                Ok(history) if history.newest_orphan().is_some() => {}
                Err(RestoreError::Damaged { .. }) => {}
                other => return other,
            }
        }
        Self::load_once(store).await
    }

    async fn load_once(store: &SharedStore) -> Result<Self, RestoreError> {
        let location = store.location();
        let replica = read_marker(store, &location).await?.replica;
        let mut strangers = Vec::new();
        let (claims, given_up) = claims(&store.list(EPOCHS_PREFIX, None).await?, &mut strangers);
        let location_of = &location;
        let epochs = stream::iter(claims)
            .map(|claims| async move { read_epoch(store, location_of, claims).await })
            .buffered(RECORDS_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut history = Self { location, replica, epochs, given_up, strangers };
        // Before the segments: a snapshot is there only when all that it has seen is confirmed, so what they lack then was lost.
        for object in store.list(SNAPSHOTS_PREFIX, None).await? {
            let key = SnapshotKey::parse(&object.key);
            let epoch = key.and_then(|key| Some((key, history.epochs.get_mut(&key.epoch)?)));
            match epoch {
                Some((key, epoch)) => epoch.snapshots.push(Stored::of(key, &object)),
                None => history.strangers.push(object.key),
            }
        }
        for object in store.list(LOG_PREFIX, None).await? {
            let key = SegmentKey::parse(&object.key);
            let epoch = key.and_then(|key| Some((key, history.epochs.get_mut(&key.0.epoch)?)));
            match epoch {
                Some((key, epoch)) => epoch.segments.push(Stored::of(key, &object)),
                None => history.strangers.push(object.key),
            }
        }
        Ok(history)
    }

    /// Whether a snapshot is there.
    #[must_use]
    pub fn has_snapshot(&self, key: &SnapshotKey) -> bool {
        let epoch = self.epochs.get(&key.epoch);
        epoch.is_some_and(|epoch| epoch.snapshots.iter().any(|stored| stored.key == *key))
    }

    /// A segment or a snapshot of the newest epoch, where that one's record was lost.
    fn newest_orphan(&self) -> Option<(u32, &str)> {
        let known = self.epochs.keys().next_back().copied().unwrap_or(0);
        let orphans = self.strangers.iter().filter_map(|key| Some((epoch_of_object(key)?, key.as_str())));
        orphans.filter(|&(epoch, _)| epoch > known).max()
    }

    /// The line that ends in `epoch` (the newest one, if not given): its epochs newest first, each with the last transaction
    /// that counts on this line (`None` for all that are there). It ends where history was let go: epoch records are deleted
    /// from the oldest on, so one that is missing behind the oldest that is there was lost.
    ///
    /// # Errors
    /// [`RestoreError::NoSuchEpoch`]; [`RestoreError::Damaged`] when a parent's record was lost, or that of the newest epoch: what
    /// came before is not the newest state, and nobody is to take it for that.
    pub fn line(&self, epoch: Option<u32>) -> Result<Vec<(&Epoch, Option<u64>)>, RestoreError> {
        if let (None, Some((number, orphan))) = (epoch, self.newest_orphan()) {
            let key = EpochKey { epoch: number, writer: None };
            let what = format!("it is missing, and there is {orphan}");
            return Err(RestoreError::damaged(&self.location, &key, &what));
        }
        let (Some(&first), Some(&last)) = (self.epochs.keys().next(), self.epochs.keys().next_back()) else {
            return Err(RestoreError::NothingYet { location: self.location.clone() });
        };
        let asked = epoch.unwrap_or(last);
        let no_such = || RestoreError::NoSuchEpoch { location: self.location.clone(), epoch: asked, first, last };
        let mut line = vec![(self.epochs.get(&asked).ok_or_else(no_such)?, None)];
        // A record's parent has a lower number, so this ends.
        while let Some((epoch, _)) = line.last().copied() {
            let Some(parent) = epoch.record.parent.filter(|parent| parent.epoch >= first) else { break };
            let parent_key = EpochKey { epoch: parent.epoch, writer: None };
            let missing = || RestoreError::damaged(&self.location, &parent_key, &"it is missing");
            let of_parent = self.epochs.get(&parent.epoch).ok_or_else(missing)?;
            if parent.txid < of_parent.record.start_txid() {
                let key = EpochKey { epoch: epoch.record.epoch, writer: None };
                let what = format!("it goes on from {parent}, which that epoch never had");
                return Err(RestoreError::damaged(&self.location, &key, &what));
            }
            line.push((of_parent, Some(parent.txid)));
        }
        Ok(line)
    }
}

/// Every record that keeps [`History::load`] from reading a replica, not only the first one.
///
/// # Errors
/// As [`History::load`], for all that is no damage.
pub(crate) async fn damaged_records(store: &SharedStore) -> Result<Vec<RestoreError>, RestoreError> {
    let location = store.location();
    let mut damaged = Vec::new();
    let mut note = |error: RestoreError| match error {
        RestoreError::Damaged { .. } => {
            damaged.push(error);
            Ok(())
        }
        other => Err(other),
    };
    read_marker(store, &location).await.map(|_| ()).or_else(&mut note)?;
    let (claims, _) = claims(&store.list(EPOCHS_PREFIX, None).await?, &mut Vec::new());
    let place = location.as_str();
    let read = |claims: Vec<Stored<EpochKey>>| async move { read_record(store, place, &claims[0].key).await };
    let mut answers = stream::iter(claims).map(read).buffered(RECORDS_IN_FLIGHT);
    while let Some(answer) = answers.next().await {
        answer.map(|_| ()).or_else(&mut note)?;
    }
    drop(answers);
    Ok(damaged)
}

async fn read_marker(store: &SharedStore, location: &str) -> Result<ReplicaMarker, RestoreError> {
    let bytes = match store.get(MARKER_KEY, RECORD_LIMIT).await {
        Err(error) if error.is_not_found() => {
            // Some servers answer the same when the bucket is not there; a listing tells. And a replica that has lost its
            // marker, perhaps with all that is as old, is no place without a backup.
            return Err(match is_empty(store).await? {
                true => RestoreError::NoReplica { location: location.to_owned() },
                false => RestoreError::damaged(location, &MARKER_KEY, &"it is missing"),
            });
        }
        // A replica's directory is made by the first put. A bucket that is not there is another thing: a mistake.
        Err(error) if error.is_of_missing_directory() => {
            return Err(RestoreError::NoReplica { location: location.to_owned() });
        }
        other => other.map_err(RestoreError::object(location, &MARKER_KEY))?,
    };
    ReplicaMarker::decode(&bytes).map_err(RestoreError::format(location, &MARKER_KEY))
}

/// Whether nothing is there that a replica is made of.
async fn is_empty(store: &SharedStore) -> Result<bool, RestoreError> {
    Ok(store.list(EPOCHS_PREFIX, None).await?.is_empty() && highest_epoch_of_objects(store).await?.is_none())
}

/// The highest number of an epoch that segments or snapshots are listed of, whether it has a record or not.
///
/// # Errors
/// When the store fails.
pub async fn highest_epoch_of_objects(store: &SharedStore) -> Result<Option<u32>, StoreError> {
    let mut highest = None;
    for prefix in [LOG_PREFIX, SNAPSHOTS_PREFIX] {
        let folders = store.folders(prefix).await?;
        highest = folders.iter().filter_map(|name| epoch_of_folder(name)).max().max(highest);
    }
    Ok(highest)
}

/// The claims to each epoch that has a record, the record first; and the numbers of those that have none.
fn claims(listed: &[ObjectInfo], strangers: &mut Vec<String>) -> (Vec<Vec<Stored<EpochKey>>>, BTreeSet<u32>) {
    let mut claims: BTreeMap<u32, Vec<Stored<EpochKey>>> = BTreeMap::new();
    for object in listed {
        match EpochKey::parse(&object.key) {
            Some(key) => claims.entry(key.epoch).or_default().push(Stored::of(key, object)),
            None => strangers.push(object.key.clone()),
        }
    }
    let record_first = |mut claims: Vec<Stored<EpochKey>>| {
        claims.sort_by(|left, right| left.key.cmp(&right.key));
        claims
    };
    let has_record = |claims: &Vec<Stored<EpochKey>>| claims[0].key.writer.is_none();
    let (held, given_up): (Vec<_>, Vec<_>) = claims.into_values().map(record_first).partition(has_record);
    (held, given_up.iter().map(|claims| claims[0].key.epoch).collect())
}

/// An epoch, without its objects.
async fn read_epoch(
    store: &SharedStore,
    location: &str,
    claims: Vec<Stored<EpochKey>>,
) -> Result<(u32, Epoch), RestoreError> {
    let key = &claims[0].key;
    let record = read_record(store, location, key).await?;
    Ok((key.epoch, Epoch { record, claims, segments: Vec::new(), snapshots: Vec::new() }))
}

async fn read_record(store: &SharedStore, location: &str, key: &EpochKey) -> Result<EpochRecord, RestoreError> {
    let name = key.to_string();
    let bytes = store.get(&name, RECORD_LIMIT).await.map_err(RestoreError::object(location, key))?;
    let record = EpochRecord::decode(&bytes).map_err(RestoreError::format(location, key))?;
    if record.epoch == key.epoch {
        Ok(record)
    } else {
        Err(RestoreError::damaged(location, key, &"it is the record of another epoch"))
    }
}
