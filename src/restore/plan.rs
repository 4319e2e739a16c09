//! The plan of a restore: which state, from which objects. A value that can be printed before anything is done.

use std::fmt;

use super::RestoreError;
use super::history::{Epoch, History, Stored};
use crate::format::key::{SegmentKey, SnapshotKey};
use crate::format::segment::{SegmentFooter, Transaction};
use crate::format::snapshot::SnapshotFooter;
use crate::format::{FOOTER_LEN, Position};
use crate::store::SharedStore;

/// What to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The newest state.
    Latest,
    /// The state at a time, in milliseconds since 1970: after the last transaction whose time is not later.
    Time(u64),
    /// The state after a transaction.
    Txid(u64),
}

/// What a restore will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The replica, for messages.
    pub location: String,
    /// The state that is restored.
    pub position: Position,
    /// The commit time of its transaction, in milliseconds since 1970.
    pub time_ms: u64,
    /// Size of the database in pages.
    pub size_pages: u32,
    /// Page size in bytes.
    pub page_size: u32,
    /// Fingerprint that the restored database must have.
    pub fingerprint: u64,
    /// The snapshot to begin with.
    pub snapshot: Stored<SnapshotKey>,
    /// Its footer.
    pub snapshot_footer: SnapshotFooter,
    /// The segments to apply, oldest first.
    pub segments: Vec<Stored<SegmentKey>>,
    /// What the person who asked should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Bytes of all objects that the plan names. Not all of them need be read.
    #[must_use]
    pub fn objects_len_bytes(&self) -> u64 {
        self.snapshot.len_bytes + self.segments.iter().map(|segment| segment.len_bytes).sum::<u64>()
    }

    /// Size of the restored database in bytes.
    #[must_use]
    pub fn database_len_bytes(&self) -> u64 {
        u64::from(self.size_pages) * u64::from(self.page_size)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "restore    {} from {}", self.position, self.location)?;
        writeln!(
            out,
            "database   {} bytes, {} pages of {}",
            self.database_len_bytes(),
            self.size_pages,
            self.page_size
        )?;
        writeln!(out, "snapshot   {} ({} bytes)", self.snapshot.key, self.snapshot.len_bytes)?;
        let segments_len: u64 = self.segments.iter().map(|segment| segment.len_bytes).sum();
        writeln!(out, "segments   {} ({segments_len} bytes)", self.segments.len())?;
        write!(out, "fingerprint {:016x}", self.fingerprint)
    }
}

/// A run of history without a gap: an epoch that began with a state that was found, and those that continued it.
#[derive(Debug, Clone)]
struct Run<'a> {
    /// The segments in order, without a gap.
    segments: Vec<Stored<SegmentKey>>,
    /// The snapshots on this line, newest first.
    snapshots: Vec<Stored<SnapshotKey>>,
    /// The last transaction up to which nothing is missing.
    last_txid: u64,
    /// If something is missing behind that: the history goes on in storage all the same.
    has_gap: bool,
    /// For each epoch, the last transaction of it that counts.
    epochs: Vec<(&'a Epoch, u64)>,
}

impl Run<'_> {
    fn segments_between(&self, after_txid: u64, last_txid: u64) -> Vec<Stored<SegmentKey>> {
        let is_needed =
            |stored: &&Stored<SegmentKey>| stored.key.0.last_txid > after_txid && stored.key.0.first_txid <= last_txid;
        self.segments.iter().filter(is_needed).copied().collect()
    }

    /// The epoch that a transaction belongs to on this line.
    fn epoch_of(&self, txid: u64) -> u32 {
        let holds = |(_, last_txid): &&(&Epoch, u64)| txid <= *last_txid;
        self.epochs.iter().find(holds).or(self.epochs.last()).map_or(0, |(epoch, _)| epoch.record.epoch)
    }
}

/// The runs of a line, newest first.
fn runs<'a>(line: &[(&'a Epoch, Option<u64>)]) -> Vec<Run<'a>> {
    let mut runs = Vec::new();
    let mut epochs: Vec<(&Epoch, Option<u64>)> = Vec::new();
    for &(epoch, cap) in line {
        epochs.push((epoch, cap));
        if !epoch.record.continues {
            epochs.reverse();
            runs.push(run_of(&std::mem::take(&mut epochs)));
        }
    }
    if !epochs.is_empty() {
        epochs.reverse();
        runs.push(run_of(&epochs));
    }
    runs
}

fn run_of<'a>(epochs: &[(&'a Epoch, Option<u64>)]) -> Run<'a> {
    let first_txid = epochs.first().map_or(0, |(epoch, _)| epoch.record.first_txid);
    let mut run =
        Run { segments: Vec::new(), snapshots: Vec::new(), last_txid: first_txid, has_gap: false, epochs: Vec::new() };
    for &(epoch, cap) in epochs {
        run.last_txid = run.last_txid.max(epoch.record.first_txid - u64::from(epoch.record.continues));
        let counts = |txid: u64| cap.is_none_or(|cap| txid <= cap);
        if !run.has_gap {
            extend_chain(&mut run, epoch, cap);
        }
        let on_line =
            epoch.snapshots.iter().filter(|stored| counts(stored.key.txid) && stored.key.txid <= run.last_txid);
        run.snapshots.extend(on_line);
        run.epochs.push((epoch, cap.unwrap_or(u64::MAX).min(run.last_txid)));
        if cap.is_some_and(|cap| cap > run.last_txid) {
            run.has_gap = true;
        }
    }
    run.snapshots.reverse();
    run
}

/// Adds an epoch's segments as far as they go without a gap. Where several hold a transaction, the one that goes furthest is
/// taken.
fn extend_chain(run: &mut Run<'_>, epoch: &Epoch, cap: Option<u64>) {
    let mut rest = epoch.segments.as_slice();
    loop {
        let next_txid = run.last_txid + 1;
        if cap.is_some_and(|cap| next_txid > cap) {
            return;
        }
        let reach = rest.partition_point(|stored| stored.key.0.first_txid <= next_txid);
        let best = rest[..reach].iter().filter(|stored| stored.key.0.last_txid >= next_txid);
        let Some(best) = best.max_by_key(|stored| stored.key.0.last_txid) else {
            run.has_gap |= reach < rest.len();
            return;
        };
        run.segments.push(*best);
        run.last_txid = best.key.0.last_txid.min(cap.unwrap_or(u64::MAX));
        rest = &rest[reach.saturating_sub(1)..];
    }
}

/// Chooses the state and the objects.
///
/// # Errors
/// When what was asked for can't be restored, with what can be; when an object that decides it is damaged.
pub async fn plan(
    store: &SharedStore,
    history: &History,
    target: Target,
    epoch: Option<u32>,
) -> Result<Plan, RestoreError> {
    let line = history.line(epoch)?;
    let planner = Planner { store, location: &history.location, runs: runs(&line) };
    let mut notes = Vec::new();
    for (index, run) in planner.runs.iter().enumerate() {
        let Some(txid) = planner.choose(run, target).await? else { continue };
        if index > 0 && !matches!(target, Target::Txid(_)) {
            notes.push(planner.why_older(index, target).await?);
        }
        if let Some(mut plan) = planner.plan_for(run, txid).await? {
            plan.notes = notes;
            if let Target::Time(asked_ms) = target {
                plan.notes.push(distance(asked_ms, plan.time_ms));
            }
            return Ok(plan);
        }
    }
    Err(planner.out_of_range(target).await?)
}

fn distance(asked_ms: u64, time_ms: u64) -> String {
    let before_ms = asked_ms.saturating_sub(time_ms);
    format!("the chosen transaction is the last one not later than the time asked for, {before_ms} ms before it")
}

struct Planner<'a> {
    store: &'a SharedStore,
    location: &'a str,
    runs: Vec<Run<'a>>,
}

impl Planner<'_> {
    /// The transaction of `run` that the target means; `None` when it is not in it.
    async fn choose(&self, run: &Run<'_>, target: Target) -> Result<Option<u64>, RestoreError> {
        match target {
            Target::Latest if run.has_gap => Err(self.gap(run)),
            Target::Latest => Ok(Some(run.last_txid)),
            Target::Txid(txid) => {
                let first = run.epochs.first().map_or(0, |(epoch, _)| epoch.record.first_txid);
                if txid > run.last_txid
                    && run.has_gap
                    && run
                        .epochs
                        .iter()
                        .any(|(epoch, _)| epoch.segments.iter().any(|stored| stored.key.0.last_txid >= txid))
                {
                    return Err(self.gap(run));
                }
                Ok((first..=run.last_txid).contains(&txid).then_some(txid))
            }
            Target::Time(asked_ms) => self.choose_by_time(run, asked_ms).await,
        }
    }

    fn gap(&self, run: &Run<'_>) -> RestoreError {
        let (location, newest) = (self.location.to_owned(), run.last_txid);
        RestoreError::Gap { location, first_missing: newest + 1, newest }
    }

    async fn choose_by_time(&self, run: &Run<'_>, asked_ms: u64) -> Result<Option<u64>, RestoreError> {
        let later = run.segments.partition_point(|stored| stored.key.0.time_ms <= asked_ms);
        let Some(stored) = run.segments.get(later) else {
            // All that is known is not later; behind a gap there may be more that is not.
            return if run.has_gap { Err(self.gap(run)) } else { self.last_state(run, asked_ms).await };
        };
        let transactions = self.table(stored).await?;
        let inside = transactions.iter().rev().find(|transaction| transaction.info.time_ms <= asked_ms);
        match (inside, later.checked_sub(1)) {
            (Some(transaction), _) => Ok(Some(transaction.txid.min(run.last_txid))),
            (None, Some(before)) => Ok(Some(run.segments[before].key.0.last_txid)),
            (None, None) => self.first_state(run, asked_ms).await,
        }
    }

    /// The run's last state, if it was known by that time: its snapshots may all be later.
    async fn last_state(&self, run: &Run<'_>, asked_ms: u64) -> Result<Option<u64>, RestoreError> {
        if run.segments.is_empty() { self.first_state(run, asked_ms).await } else { Ok(Some(run.last_txid)) }
    }

    /// The state that the run began with, if that was found by the time.
    async fn first_state(&self, run: &Run<'_>, asked_ms: u64) -> Result<Option<u64>, RestoreError> {
        let Some(oldest) = run.snapshots.last() else { return Ok(None) };
        let info = self.footer(oldest).await?.info;
        Ok((info.time_ms <= asked_ms).then_some(info.last_txid))
    }

    /// The plan for the state after `txid`; `None` when no snapshot of the run serves it.
    async fn plan_for(&self, run: &Run<'_>, txid: u64) -> Result<Option<Plan>, RestoreError> {
        for stored in run.snapshots.iter().filter(|stored| stored.key.txid <= txid) {
            let footer = self.footer(stored).await?;
            if footer.info.last_txid > txid {
                continue;
            }
            let segments = run.segments_between(stored.key.txid, txid);
            let (time_ms, size_pages, fingerprint) = if footer.info.last_txid == txid {
                (footer.info.time_ms, footer.info.size_pages, footer.info.fingerprint)
            } else {
                self.state_after(&segments, txid).await?
            };
            return Ok(Some(Plan {
                location: self.location.to_owned(),
                position: Position { epoch: run.epoch_of(txid), txid },
                time_ms,
                size_pages,
                page_size: footer.page_size,
                fingerprint,
                snapshot: *stored,
                snapshot_footer: footer,
                segments,
                notes: Vec::new(),
            }));
        }
        Ok(None)
    }

    /// Time, size and fingerprint after a transaction.
    async fn state_after(&self, segments: &[Stored<SegmentKey>], txid: u64) -> Result<(u64, u32, u64), RestoreError> {
        let holds = |stored: &&Stored<SegmentKey>| (stored.key.0.first_txid..=stored.key.0.last_txid).contains(&txid);
        let missing =
            || RestoreError::Gap { location: self.location.to_owned(), first_missing: txid, newest: txid - 1 };
        let stored = segments.iter().find(holds).ok_or_else(missing)?;
        let transactions = self.table(stored).await?;
        let transaction = transactions.iter().find(|transaction| transaction.txid == txid).ok_or_else(missing)?;
        let unknown =
            || RestoreError::damaged(self.location, &stored.key, &"it lacks a fingerprint that must be there");
        let info = transaction.info;
        Ok((info.time_ms, info.size_pages, info.fingerprint.ok_or_else(unknown)?))
    }

    async fn table(&self, stored: &Stored<SegmentKey>) -> Result<Vec<Transaction>, RestoreError> {
        read_table(self.store, self.location, stored).await.map(|(_, transactions)| transactions)
    }

    async fn footer(&self, stored: &Stored<SnapshotKey>) -> Result<SnapshotFooter, RestoreError> {
        let tail = tail(self.store, self.location, stored, FOOTER_LEN).await?;
        let footer = SnapshotFooter::decode(&tail, stored.len_bytes)
            .map_err(RestoreError::format(self.location, &stored.key))?;
        if footer.info.key == stored.key {
            Ok(footer)
        } else {
            Err(RestoreError::damaged(self.location, &stored.key, &"it is another snapshot"))
        }
    }

    /// Why the newest run did not serve.
    async fn why_older(&self, index: usize, target: Target) -> Result<String, RestoreError> {
        let newer = &self.runs[index - 1];
        let epoch = newer.epochs.first().map_or(0, |(epoch, _)| epoch.record.epoch);
        Ok(match (self.first_restorable(newer).await?, target) {
            (None, _) => format!(
                "epoch {epoch} began with a database that had changed unseen, and its first snapshot is not there yet: \
                 this is the last state known before it"
            ),
            (Some(_), _) => format!(
                "between this state and the start of epoch {epoch} the database may have changed unseen: this is the last \
                 state known before"
            ),
        })
    }

    /// The first state of a run that can be restored: transaction, time.
    async fn first_restorable(&self, run: &Run<'_>) -> Result<Option<(u64, u64)>, RestoreError> {
        let Some(oldest) = run.snapshots.last() else { return Ok(None) };
        let info = self.footer(oldest).await?.info;
        Ok((info.last_txid <= run.last_txid).then_some((info.last_txid, info.time_ms)))
    }

    async fn out_of_range(&self, target: Target) -> Result<RestoreError, RestoreError> {
        let asked = match target {
            Target::Latest => return Ok(RestoreError::NothingYet { location: self.location.to_owned() }),
            Target::Time(asked_ms) => format!("the time {}", crate::clock::format_time(asked_ms)),
            Target::Txid(txid) => format!("transaction {txid}"),
        };
        let mut ranges = Vec::new();
        for run in self.runs.iter().rev() {
            if let Some((first_txid, first_ms)) = self.first_restorable(run).await? {
                let last_ms = run.segments.last().map_or(first_ms, |stored| stored.key.0.time_ms.max(first_ms));
                let (from, to) = (crate::clock::format_time(first_ms), crate::clock::format_time(last_ms));
                ranges.push(format!("transactions {first_txid} to {} ({from} to {to})", run.last_txid));
            }
        }
        let location = self.location.to_owned();
        if ranges.is_empty() {
            return Ok(RestoreError::NothingYet { location });
        }
        Ok(RestoreError::OutOfRange { location, asked, range: ranges.join(", ") })
    }
}

/// The last `len` bytes of an object.
async fn tail<K: ToString + Copy>(
    store: &SharedStore,
    location: &str,
    stored: &Stored<K>,
    len: usize,
) -> Result<bytes::Bytes, RestoreError> {
    let Some(offset) = stored.len_bytes.checked_sub(len as u64) else {
        return Err(RestoreError::damaged(location, &stored.key, &"it is too short"));
    };
    let name = stored.key.to_string();
    store.get_range(&name, offset, len as u64).await.map_err(RestoreError::object(location, &stored.key))
}

/// A table longer than this is not believed, in bytes: 32 MiB of page images hold no more.
const TABLE_LIMIT: u64 = 512 << 20;
/// What is read of a segment at first, to find its footer and, mostly, its table.
const TAIL_GUESS: u64 = 32 * 1024;

/// Reads a segment's footer and table.
///
/// # Errors
/// When the store fails, or the object is not the segment that its name says.
pub async fn read_table(
    store: &SharedStore,
    location: &str,
    stored: &Stored<SegmentKey>,
) -> Result<(SegmentFooter, Vec<Transaction>), RestoreError> {
    let damaged = |what: &str| RestoreError::damaged(location, &stored.key, &what);
    let guess = stored.len_bytes.min(TAIL_GUESS).max(FOOTER_LEN as u64);
    let end = tail(store, location, stored, guess as usize).await?;
    let footer = SegmentFooter::decode(&end, stored.len_bytes).map_err(RestoreError::format(location, &stored.key))?;
    check_footer(&footer, &stored.key, location)?;
    if footer.table_len > TABLE_LIMIT {
        return Err(damaged("its table is too long"));
    }
    let wanted = footer.table_len as usize + FOOTER_LEN;
    let table = match end.len().checked_sub(wanted) {
        Some(at) => end.slice(at..at + footer.table_len as usize),
        None => {
            let name = stored.key.to_string();
            let range = store.get_range(&name, footer.table_offset(), footer.table_len).await;
            range.map_err(RestoreError::object(location, &stored.key))?
        }
    };
    let transactions = footer.decode_table(&table).map_err(RestoreError::format(location, &stored.key))?;
    Ok((footer, transactions))
}

/// An object under another's name is found out here.
///
/// # Errors
/// [`RestoreError::Damaged`].
pub fn check_footer(footer: &SegmentFooter, key: &SegmentKey, location: &str) -> Result<(), RestoreError> {
    if footer.span == key.0 { Ok(()) } else { Err(RestoreError::damaged(location, key, &"it is another segment")) }
}
