//! Claiming an epoch: how a writer makes sure that it is the only one of its epoch, and says what it goes on from.
//!
//! On a store that honours `If-None-Match: *` the record is put under the epoch's plain name, once. A store that accepts the
//! condition and ignores it (they exist) is found out by asking it to create the marker, which is known to be there: an
//! honest store refuses, the other one overwrites it with the same bytes. There a claim is put first, under a name that holds the
//! writer's id, and then the epoch's claims are listed. Only who finds itself alone puts the record. Of two, the one whose claim
//! was put later lists after both were there, and gives up; so there are never two records of one epoch.

use std::time::Duration;

use bytes::Bytes;

use crate::clock::{Clock, jitter_below};
use crate::format::key::{
    EPOCHS_PREFIX, EpochKey, MARKER_KEY, SegmentKey, SnapshotKey, Span, log_prefix, snapshot_prefix,
};
use crate::format::record::{EpochRecord, RECORD_LIMIT, ReplicaMarker};
use crate::format::{FORMAT_VERSION, FormatError, Position};
use crate::restore::RestoreError;
use crate::restore::history::{History, highest_epoch_of_objects};
use crate::restore::plan::{Target, plan};
use crate::store::{PutMode, SharedStore, StoreError, StoreErrorKind};

/// Claims that were lost to others in a row, before something must be wrong.
const CLAIM_ATTEMPTS: usize = 20;
/// Who lost a claim waits for up to so long, in milliseconds.
const GIVE_WAY_MS: u64 = 500;

/// Why an epoch could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object can't be read.
    #[error("{key} in {location}: {source}")]
    Format {
        /// The store.
        location: String,
        /// The object.
        key: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Others claimed every epoch that was tried.
    #[error("other writers keep claiming epochs in {0}")]
    Contended(String),
    /// The operating system has no randomness.
    #[error("the operating system has no random numbers: {0}")]
    Randomness(#[from] getrandom::Error),
}

/// A replica that was opened for writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenReplica {
    /// Its id.
    pub id: String,
    /// Whether the store honours conditional puts.
    pub has_conditional_puts: bool,
}

/// What this writer can prove to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuing {
    /// The replica's id.
    pub replica: String,
    /// The writer that claimed the epoch.
    pub writer: String,
    /// The last captured transaction.
    pub captured: Position,
    /// Whether the database was restored to there: what came after in that epoch was undone.
    pub is_restored: bool,
}

impl Continuing {
    /// Whether it was left in this epoch by this writer.
    #[must_use]
    pub fn is_of(&self, claimed: &Claimed) -> bool {
        !self.is_restored
            && self.replica == claimed.replica
            && self.writer == claimed.record.writer
            && self.captured.epoch == claimed.record.epoch
    }
}

/// An epoch that was claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Its record.
    pub record: EpochRecord,
    /// The replica's id.
    pub replica: String,
    /// Whether the store honours conditional puts.
    pub has_conditional_puts: bool,
    /// No transaction gets an earlier time, in milliseconds since 1970.
    pub time_floor_ms: u64,
}

fn random_id(clock: &dyn Clock) -> Result<String, ClaimError> {
    Ok(clock.random_id()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn bad_object<'a>(store: &'a SharedStore, key: &'a str) -> impl FnOnce(FormatError) -> ClaimError + 'a {
    move |source| ClaimError::Format { location: store.location(), key: key.to_owned(), source }
}

/// Opens a replica for writing; makes it if there is none.
///
/// # Errors
/// When the store fails, or the replica is of a format that this program does not know.
pub async fn open_replica(store: &SharedStore, clock: &dyn Clock) -> Result<OpenReplica, ClaimError> {
    let marker = match store.get(MARKER_KEY, RECORD_LIMIT).await {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind, StoreErrorKind::NotFound) || error.is_of_missing_directory() => {
            let marker = Bytes::from(ReplicaMarker { format: FORMAT_VERSION, replica: random_id(clock)? }.encode());
            match store.put(MARKER_KEY, marker.clone(), PutMode::IfAbsent).await {
                Ok(()) => marker,
                Err(error) if error.kind == StoreErrorKind::AlreadyExists => {
                    store.get(MARKER_KEY, RECORD_LIMIT).await?
                }
                // Two writers that make one replica at the same time: the later marker counts for both.
                Err(error) if error.kind == StoreErrorKind::NotSupported => {
                    store.put(MARKER_KEY, marker, PutMode::Overwrite).await?;
                    store.get(MARKER_KEY, RECORD_LIMIT).await?
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(error) => return Err(error.into()),
    };
    let id = ReplicaMarker::decode(&marker).map_err(bad_object(store, MARKER_KEY))?.replica;
    Ok(OpenReplica { id, has_conditional_puts: honours_conditions(store, &marker).await? })
}

/// Asked twice, because a put whose answer was lost and that was asked again counts as done.
async fn honours_conditions(store: &SharedStore, marker: &Bytes) -> Result<bool, ClaimError> {
    for _ in 0..2 {
        match store.put(MARKER_KEY, marker.clone(), PutMode::IfAbsent).await {
            Ok(()) => {}
            Err(error) if error.kind == StoreErrorKind::AlreadyExists => return Ok(true),
            Err(error) if error.kind == StoreErrorKind::NotSupported => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Claims the next epoch: one that goes on from `continuing`, if the replica knows that writer's epoch, and otherwise one
/// that begins with the database as it was found.
///
/// # Errors
/// When the store fails or a record can't be read.
pub async fn claim(
    store: &SharedStore,
    replica: &OpenReplica,
    continuing: Option<&Continuing>,
    clock: &dyn Clock,
) -> Result<Claimed, ClaimError> {
    let writer = random_id(clock)?;
    for _ in 0..CLAIM_ATTEMPTS {
        let claims = list_claims(store, None).await?;
        // Were a number used again, what is there would be taken for the new epoch's, whatever became of its record.
        let number = claims.last().map_or(0, |key| key.epoch).max(highest_epoch_of_objects(store).await?.unwrap_or(0));
        let newest_known = match records(&claims).next_back() {
            Some(key) => Some(last_stored(store, key).await?),
            None => None,
        };
        let continued = match continuing {
            Some(continuing) if is_known(store, replica, &claims, continuing).await? => Some(continuing.captured),
            _ => None,
        };
        let parent = continued.or(newest_known.map(|(position, _)| position));
        let record = EpochRecord {
            format: FORMAT_VERSION,
            epoch: number.saturating_add(1),
            writer: writer.clone(),
            claimed_ms: clock.now_ms(),
            first_txid: parent.map_or(1, |parent| parent.txid + 1),
            continues: continued.is_some(),
            parent,
            program: concat!("waltrail ", env!("CARGO_PKG_VERSION")).into(),
            host: host_name(),
        };
        if put_claim(store, replica, &record).await? {
            let time_floor_ms = newest_known.map_or(0, |(_, time_ms)| time_ms);
            let (id, has_conditional_puts) = (replica.id.clone(), replica.has_conditional_puts);
            return Ok(Claimed { record, replica: id, has_conditional_puts, time_floor_ms });
        }
        // Those that gave way to each other do not meet again.
        tokio::time::sleep(Duration::from_millis(jitter_below(GIVE_WAY_MS))).await;
    }
    Err(ClaimError::Contended(store.location()))
}

/// The keys of all claims to epochs after `after`, ascending; an epoch's record before other claims to it.
///
/// # Errors
/// When the store fails.
pub async fn list_claims(store: &SharedStore, after: Option<u32>) -> Result<Vec<EpochKey>, StoreError> {
    // `~` sorts after everything that a name of that epoch can hold.
    let start_after = after.map(|epoch| format!("{}~", EpochKey { epoch, writer: None }));
    let listed = store.list(EPOCHS_PREFIX, start_after.as_deref()).await?;
    let mut keys: Vec<EpochKey> = listed.iter().filter_map(|object| EpochKey::parse(&object.key)).collect();
    keys.sort();
    Ok(keys)
}

/// When the record of an epoch was stored, by the store's clock, in milliseconds since 1970.
///
/// # Errors
/// When the store fails.
pub async fn claim_stored_ms(store: &SharedStore, epoch: u32) -> Result<Option<u64>, StoreError> {
    let name = EpochKey { epoch, writer: None }.to_string();
    let listed = store.list(&name, None).await?;
    Ok(listed.into_iter().find(|object| object.key == name).map(|object| object.stored_ms))
}

/// Of claims those that hold: the epochs' records.
pub fn records(claims: &[EpochKey]) -> impl DoubleEndedIterator<Item = &EpochKey> {
    claims.iter().filter(|key| key.writer.is_none())
}

/// Reads an epoch's record.
///
/// # Errors
/// When the store fails or the record can't be read.
pub async fn read_record(store: &SharedStore, key: &EpochKey) -> Result<EpochRecord, ClaimError> {
    let name = key.to_string();
    let bytes = store.get(&name, RECORD_LIMIT).await?;
    EpochRecord::decode(&bytes).map_err(bad_object(store, &name))
}

/// The transactions that an epoch has in storage.
async fn list_spans(store: &SharedStore, epoch: u32) -> Result<Vec<Span>, StoreError> {
    let segments = store.list(&log_prefix(epoch), None).await?;
    Ok(segments.iter().filter_map(|object| SegmentKey::parse(&object.key).map(|key| key.0)).collect())
}

/// The last transaction that an epoch has in storage, and its time (0 where it has none).
fn last_known(record: &EpochRecord, spans: &[Span]) -> (Position, u64) {
    let newest = spans.iter().max_by_key(|span| span.last_txid);
    // An epoch that continues and holds nothing ends where its parent did.
    let (txid, time_ms) = newest.map_or((record.start_txid(), 0), |span| (span.last_txid, span.time_ms));
    (Position { epoch: record.epoch, txid }, time_ms)
}

/// The same, of an epoch whose record has this key.
///
/// # Errors
/// When the store fails or the record can't be read.
pub async fn last_stored(store: &SharedStore, key: &EpochKey) -> Result<(Position, u64), ClaimError> {
    let record = read_record(store, key).await?;
    Ok(last_known(&record, &list_spans(store, record.epoch).await?))
}

/// Whether everything up to `last_txid`, and nothing behind it, is in storage. What waited in the spool may have been lost there, at
/// its end or in its middle; what goes on behind a gap could not be restored. What retention let go leaves no gap: a snapshot
/// was begun behind it.
async fn has_arrived(store: &SharedStore, record: &EpochRecord, last_txid: u64) -> Result<bool, StoreError> {
    let spans = list_spans(store, record.epoch).await?;
    if last_known(record, &spans).0.txid != last_txid {
        return Ok(false);
    }
    let before_txid = before_unbroken(spans, last_txid);
    if before_txid <= record.start_txid() {
        return Ok(true);
    }
    let snapshots = store.list(&snapshot_prefix(record.epoch), None).await?;
    let begun = snapshots.iter().filter_map(|object| SnapshotKey::parse(&object.key)).map(|key| key.txid);
    Ok(begun.into_iter().any(|txid| (before_txid..=last_txid).contains(&txid)))
}

/// The number before the first of those transactions that lead to `last_txid` without a gap.
fn before_unbroken(mut spans: Vec<Span>, last_txid: u64) -> u64 {
    spans.sort_by_key(|span| std::cmp::Reverse(span.last_txid));
    let mut before_txid = last_txid;
    for span in spans {
        if span.last_txid < before_txid {
            break;
        }
        before_txid = before_txid.min(span.first_txid.saturating_sub(1));
    }
    before_txid
}

/// Whether this is the replica that the writer left, its epoch is there, and everything it captured has arrived. After a
/// restore: whether it is the replica that was restored from, and that state can still be restored (what goes on from one that
/// was let go meanwhile could not).
async fn is_known(
    store: &SharedStore,
    replica: &OpenReplica,
    claims: &[EpochKey],
    continuing: &Continuing,
) -> Result<bool, ClaimError> {
    let Some(key) = records(claims).find(|key| key.epoch == continuing.captured.epoch) else { return Ok(false) };
    if continuing.replica != replica.id {
        return Ok(false);
    }
    let record = read_record(store, key).await?;
    if record.writer != continuing.writer {
        return Ok(false);
    }
    match continuing.is_restored {
        true => is_restorable(store, continuing.captured).await,
        false => Ok(has_arrived(store, &record, continuing.captured.txid).await?),
    }
}

async fn is_restorable(store: &SharedStore, state: Position) -> Result<bool, ClaimError> {
    let planned = match History::load(store).await {
        Ok(history) => plan(store, &history, Target::Txid(state.txid), Some(state.epoch)).await,
        Err(error) => Err(error),
    };
    match planned {
        Ok(plan) => Ok(plan.position == state),
        Err(RestoreError::Store(error)) => Err(error.into()),
        Err(error) => {
            tracing::warn!(%error, %state, "what was restored is not there any more; a new epoch begins");
            Ok(false)
        }
    }
}

/// Whether the claim holds.
async fn put_claim(store: &SharedStore, replica: &OpenReplica, record: &EpochRecord) -> Result<bool, ClaimError> {
    let body = Bytes::from(record.encode());
    let name = EpochKey { epoch: record.epoch, writer: None }.to_string();
    if replica.has_conditional_puts {
        return match store.put(&name, body, PutMode::IfAbsent).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind == StoreErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.into()),
        };
    }
    let claim = EpochKey { epoch: record.epoch, writer: Some(record.writer.clone()) };
    store.put(&claim.to_string(), body.clone(), PutMode::Overwrite).await?;
    // A claim to a later epoch was put by somebody who had seen this one: it does not matter here.
    let claims = list_claims(store, record.epoch.checked_sub(1)).await?;
    let is_alone = claims.iter().filter(|key| key.epoch == record.epoch).eq([&claim]);
    if is_alone {
        store.put(&name, body, PutMode::Overwrite).await?;
    }
    Ok(is_alone)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_seen_wherever_it_is() {
        let spans = |spans: &[(u64, u64)]| -> Vec<Span> {
            spans.iter().map(|&(first_txid, last_txid)| Span { epoch: 1, first_txid, last_txid, time_ms: 0 }).collect()
        };
        assert_eq!(before_unbroken(spans(&[(3, 4), (1, 2), (5, 9)]), 9), 0);
        assert_eq!(before_unbroken(spans(&[(1, 2), (4, 9)]), 9), 3);
        assert_eq!(before_unbroken(spans(&[(8, 9)]), 9), 7);
        // Merged ones stand beside the small ones.
        assert_eq!(before_unbroken(spans(&[(1, 6), (1, 2), (3, 4), (7, 7), (8, 9)]), 9), 0);
        assert_eq!(before_unbroken(spans(&[(2, 6), (1, 4)]), 6), 0);
        assert_eq!(before_unbroken(Vec::new(), 5), 5);
    }
}
