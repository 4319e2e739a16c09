//! Reading what every depth begins with: the listing, the records, and the ends of all objects.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt};
use tokio::sync::Semaphore;

use super::budget::Budget;
use super::random::Numbers;
use crate::format::key::{
    EPOCHS_PREFIX, LOG_PREFIX, MARKER_KEY, MARKS_PREFIX, MarkKey, PRESENCE_KEY, SNAPSHOTS_PREFIX, SegmentKey,
    SnapshotKey,
};
use crate::format::record::{MarkRecord, PresenceRecord, RECORD_LIMIT};
use crate::format::segment::{SegmentFooter, Transaction};
use crate::format::snapshot::SnapshotIndex;
use crate::restore::RestoreError;
use crate::restore::extents::read_index;
use crate::restore::history::{History, Stored, damaged_records};
use crate::restore::tail::{SnapshotTail, read_table};
use crate::retain::tails::{Tail, TailCache};
use crate::store::{ObjectInfo, SharedStore, StoreErrorKind};

/// So many requests are under way at a time.
pub(super) const REQUESTS_IN_FLIGHT: usize = 8;
/// Indexes can be large: so many are in memory at a time.
const INDEXES_AT_A_TIME: usize = 2;

/// What a segment's table says of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StateFacts {
    pub(super) time_ms: u64,
    pub(super) size_pages: u32,
    pub(super) fingerprint: Option<u64>,
}

/// What is kept of a segment's table.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) page_size: u32,
    /// Of the states that something else tells of, too.
    pub(super) states: BTreeMap<u64, StateFacts>,
}

/// A replica as it was found in one look. What can't be read is in it as a sentence.
pub(super) struct Survey {
    pub(super) history: History,
    pub(super) tails: BTreeMap<SnapshotKey, Tail>,
    /// A segment that there was no time for is not in it.
    pub(super) tables: BTreeMap<SegmentKey, Result<Facts, String>>,
    /// Snapshots whose index is wrong: what it is, and the object to blame.
    pub(super) wrong_indexes: BTreeMap<SnapshotKey, String>,
    /// How many indexes were read.
    pub(super) indexes: u64,
    pub(super) marks: Vec<MarkRecord>,
    pub(super) wrong_marks: Vec<(String, String)>,
    pub(super) presence: Option<Result<PresenceRecord, String>>,
    /// Objects that are none of ours.
    pub(super) strangers: Vec<String>,
}

/// A look at a replica.
pub(super) enum Look {
    Whole(Box<Survey>),
    /// These records keep anybody from reading it.
    Unreadable(Vec<RestoreError>),
}

/// What was read before. Objects never change, so what was right is read once.
#[derive(Default)]
pub(super) struct Known {
    tails: TailCache,
    tables: BTreeMap<SegmentKey, (u64, Facts)>,
    indexes: BTreeSet<(SnapshotKey, u64)>,
}

/// What is wrong with an object, in words; an error that is no damage stays one.
pub(super) fn damage(error: RestoreError) -> Result<String, RestoreError> {
    match error {
        RestoreError::Damaged { object, what, .. } => Ok(format!("{object} is damaged: {what}")),
        RestoreError::NewerFormat { .. } | RestoreError::FingerprintMismatch { .. } | RestoreError::Gap { .. } => {
            Ok(error.to_string())
        }
        other => Err(other),
    }
}

/// Looks at a replica. What there is no time for is left out.
pub(super) async fn look(
    store: &SharedStore,
    known: &mut Known,
    budget: &Budget,
    numbers: &mut Numbers,
) -> Result<Look, RestoreError> {
    // First: what it says to be there has to be in the listing that follows.
    let presence = read_presence(store).await?;
    let history = match History::load(store).await {
        Err(RestoreError::Damaged { .. }) => return damaged_records(store).await.map(Look::Unreadable),
        other => other?,
    };
    let tails = known.tails.read(store, &history).await?;
    let (marks, wrong_marks) = read_marks(store).await?;
    let strangers = strangers(&store.list("", None).await?);
    let tables = known.read_tables(store, &history, &tails, budget, numbers).await?;
    let (wrong_indexes, indexes) = known.check_indexes(store, &history, &tails, budget, numbers).await?;
    Ok(Look::Whole(Box::new(Survey {
        history,
        tails,
        tables,
        wrong_indexes,
        indexes,
        marks,
        wrong_marks,
        presence,
        strangers,
    })))
}

async fn read_presence(store: &SharedStore) -> Result<Option<Result<PresenceRecord, String>>, RestoreError> {
    let bytes = match store.get(PRESENCE_KEY, RECORD_LIMIT).await {
        Err(error) if error.is_not_found() => return Ok(None),
        // What keeps us from all objects is told of by the next request. S3 may answer that it is forbidden where it is not there.
        Err(error) if matches!(error.kind, StoreErrorKind::NoSuchBucket | StoreErrorKind::Denied) => return Ok(None),
        other => other.map_err(RestoreError::object(&store.location(), &PRESENCE_KEY)),
    };
    let read = bytes.and_then(|bytes| {
        PresenceRecord::decode(&bytes).map_err(RestoreError::format(&store.location(), &PRESENCE_KEY))
    });
    match read {
        Ok(record) => Ok(Some(Ok(record))),
        Err(error) => damage(error).map(|what| Some(Err(what))),
    }
}

/// All marks, and those that can't be read: their keys, and what is wrong.
async fn read_marks(store: &SharedStore) -> Result<(Vec<MarkRecord>, Vec<(String, String)>), RestoreError> {
    let listed = store.list(MARKS_PREFIX, None).await?;
    let keys: Vec<MarkKey> = listed.iter().filter_map(|object| MarkKey::parse(&object.key)).collect();
    let read = |key: MarkKey| async move {
        let bytes = store.get(&key.to_string(), RECORD_LIMIT).await;
        (key, bytes)
    };
    let (mut marks, mut wrong) = (Vec::new(), Vec::new());
    let mut answers = stream::iter(keys).map(read).buffered(REQUESTS_IN_FLIGHT);
    while let Some((key, answer)) = answers.next().await {
        let location = store.location();
        let decoded = match answer {
            // Taken away since the listing.
            Err(error) if error.is_not_found() => continue,
            Err(error) => Err(RestoreError::object(&location, &key)(error)),
            Ok(bytes) => MarkRecord::decode(&bytes).map_err(RestoreError::format(&location, &key)),
        };
        match decoded {
            Ok(mark) if mark.name == key.name() => marks.push(mark),
            Ok(_) => wrong.push((key.to_string(), format!("{key} is damaged: it is that of another name"))),
            Err(error) => wrong.push((key.to_string(), damage(error)?)),
        }
    }
    Ok((marks, wrong))
}

/// What is beside the objects that a listing of their own is made of.
fn strangers(listed: &[ObjectInfo]) -> Vec<String> {
    let is_known = |key: &str| {
        let has_listing = [EPOCHS_PREFIX, LOG_PREFIX, SNAPSHOTS_PREFIX].iter().any(|prefix| key.starts_with(prefix));
        key == MARKER_KEY || key == PRESENCE_KEY || has_listing || MarkKey::parse(key).is_some()
    };
    listed.iter().map(|object| object.key.clone()).filter(|key| !is_known(key)).collect()
}

impl Known {
    /// The table of every segment.
    async fn read_tables(
        &mut self,
        store: &SharedStore,
        history: &History,
        tails: &BTreeMap<SnapshotKey, Tail>,
        budget: &Budget,
        numbers: &mut Numbers,
    ) -> Result<BTreeMap<SegmentKey, Result<Facts, String>>, RestoreError> {
        let wanted = wanted_states(history, tails);
        let (mut tables, mut unknown) = (BTreeMap::new(), Vec::new());
        for stored in history.epochs.values().flat_map(|epoch| &epoch.segments) {
            match self.tables.get(&stored.key) {
                Some((len_bytes, facts)) if *len_bytes == stored.len_bytes => {
                    tables.insert(stored.key, Ok(facts.clone()));
                }
                _ => unknown.push(*stored),
            }
        }
        numbers.shuffle(&mut unknown);
        let read = |stored: Stored<SegmentKey>| async move {
            if budget.is_over() {
                return None;
            }
            Some((stored, read_table(store, &history.location, &stored).await))
        };
        let mut answers = stream::iter(unknown).map(read).buffer_unordered(REQUESTS_IN_FLIGHT);
        while let Some(answer) = answers.next().await {
            let Some((stored, read)) = answer else { continue };
            let found = match read {
                Ok((footer, table)) => Ok(facts(&footer, &table.transactions, wanted.get(&stored.key.0.epoch))),
                Err(error) => Err(damage(error)?),
            };
            if let Ok(facts) = &found {
                self.tables.insert(stored.key, (stored.len_bytes, facts.clone()));
            }
            tables.insert(stored.key, found);
        }
        self.tables.retain(|key, _| tables.contains_key(key));
        Ok(tables)
    }

    /// Those snapshots whose index is wrong, and how many were looked at.
    async fn check_indexes(
        &mut self,
        store: &SharedStore,
        history: &History,
        tails: &BTreeMap<SnapshotKey, Tail>,
        budget: &Budget,
        numbers: &mut Numbers,
    ) -> Result<(BTreeMap<SnapshotKey, String>, u64), RestoreError> {
        let mut checked = 0;
        let mut unknown = Vec::new();
        for stored in history.epochs.values().flat_map(|epoch| &epoch.snapshots) {
            match tails.get(&stored.key) {
                Some(Tail::Whole(_)) if self.indexes.contains(&(stored.key, stored.len_bytes)) => checked += 1,
                Some(Tail::Whole(tail)) => unknown.push((*stored, tail)),
                _ => {}
            }
        }
        numbers.shuffle(&mut unknown);
        let permits = Semaphore::new(INDEXES_AT_A_TIME);
        let permits = &permits;
        let check = |(stored, tail): (Stored<SnapshotKey>, &'_ SnapshotTail)| {
            let footer = tail.footer;
            async move {
                // Never closed, so there is always one.
                let _permit = permits.acquire().await;
                if budget.is_over() {
                    return None;
                }
                let index = read_index(store, &history.location, &footer).await;
                Some((stored, index.map(|index| points_outside(&index, tails))))
            }
        };
        let mut wrong = BTreeMap::new();
        let mut answers = stream::iter(unknown).map(check).buffer_unordered(REQUESTS_IN_FLIGHT);
        while let Some(answer) = answers.next().await {
            let Some((stored, found)) = answer else { continue };
            checked += 1;
            let what = match found {
                Ok(None) => {
                    self.indexes.insert((stored.key, stored.len_bytes));
                    continue;
                }
                Ok(Some(what)) => format!("{} is damaged: {what}", stored.key),
                Err(error) => damage(error)?,
            };
            wrong.insert(stored.key, what);
        }
        Ok((wrong, checked))
    }
}

/// The states of each epoch that more than one object tells of: they have to agree.
fn wanted_states(history: &History, tails: &BTreeMap<SnapshotKey, Tail>) -> BTreeMap<u32, BTreeSet<u64>> {
    let mut wanted: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
    for (number, epoch) in &history.epochs {
        let ends = epoch.segments.iter().map(|stored| stored.key.0.last_txid);
        wanted.entry(*number).or_default().extend(ends);
    }
    for (key, tail) in tails {
        if let Tail::Whole(tail) = tail {
            wanted.entry(key.epoch).or_default().insert(tail.footer.info.last_txid);
        }
    }
    wanted
}

fn facts(footer: &SegmentFooter, transactions: &[Transaction], wanted: Option<&BTreeSet<u64>>) -> Facts {
    let is_wanted = |txid: &u64| wanted.is_some_and(|wanted| wanted.contains(txid));
    let states = transactions.iter().filter(|transaction| is_wanted(&transaction.txid)).map(|transaction| {
        let info = &transaction.info;
        let facts = StateFacts { time_ms: info.time_ms, size_pages: info.size_pages, fingerprint: info.fingerprint };
        (transaction.txid, facts)
    });
    Facts { page_size: footer.page_size, states: states.collect() }
}

/// An extent that is said to be where its object has none. The object's own extents were checked with its index.
fn points_outside(index: &SnapshotIndex, tails: &BTreeMap<SnapshotKey, Tail>) -> Option<String> {
    let ends: Vec<Option<u64>> = index
        .sources
        .iter()
        .map(|source| match tails.get(source) {
            Some(Tail::Whole(tail)) => Some(tail.footer.index_offset),
            _ => None,
        })
        .collect();
    (0_u64..).zip(&index.extents).find_map(|(number, extent)| {
        let end = ends.get(extent.source as usize).copied().flatten()?;
        let is_outside = extent.offset.saturating_add(u64::from(extent.compressed_len)) > end;
        let source = index.sources[extent.source as usize];
        is_outside.then(|| format!("extent {number} in its index lies behind the extents of {source}"))
    })
}
