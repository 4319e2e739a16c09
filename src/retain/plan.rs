//! The plan of what goes and what stays: a value that names every object, each with why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::RetentionSettings;
use super::select::Selection;
use super::tails::Tail;
use crate::clock::format_time;
use crate::format::Position;
use crate::format::key::{EpochKey, SegmentKey, SnapshotKey};
use crate::format::record::MarkRecord;
use crate::restore::RestoreError;
use crate::restore::history::{Epoch, History};

/// An object that retention decides about. Ordered by kind, epoch and transaction.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectKey {
    /// A snapshot.
    Snapshot(SnapshotKey),
    /// A segment.
    Segment(SegmentKey),
    /// An epoch's record, or a claim to it.
    Epoch(EpochKey),
}

impl ObjectKey {
    /// The epoch that it belongs to.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        match self {
            Self::Snapshot(key) => key.epoch,
            Self::Segment(key) => key.0.epoch,
            Self::Epoch(key) => key.epoch,
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(key) => key.fmt(out),
            Self::Segment(key) => key.fmt(out),
            Self::Epoch(key) => key.fmt(out),
        }
    }
}

/// Why an object goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GoesBecause {
    /// No state that is kept needs it.
    NotNeeded,
    /// A larger segment holds the same transactions.
    Superseded,
    /// It is the record of an epoch of which nothing is left, nor of any before it, and that was not claimed lately.
    EmptyEpoch,
}

impl fmt::Display for GoesBecause {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::NotNeeded => "no state that is kept needs it",
            Self::Superseded => "larger segments hold the same transactions",
            Self::EmptyEpoch => "nothing is left of this epoch, nor of those before it",
        })
    }
}

/// Why an object stays. An object can have several reasons.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum StaysBecause {
    /// States inside the window need it, on the line that ends in this epoch.
    Window {
        /// The epoch.
        line: u32,
    },
    /// The daily, weekly or monthly state of this day, week or month needs it.
    Period(String),
    /// The state of a mark needs it.
    Mark(String),
    /// A snapshot that stays holds extents in it.
    SourceOf(SnapshotKey),
    /// The next snapshot is based on it.
    Newest,
    /// It tells where the epoch ends.
    EndOfEpoch,
    /// Larger segments hold the same transactions, but not for long: a restore that is under way may read it.
    RecentlySuperseded,
    /// It can't be read, so nobody knows what it is for: in words.
    Damaged(String),
    /// It holds other transactions than those of its epoch.
    NotUnderstood,
    /// It is the record of an epoch that is not the oldest, of which something is left, or that was claimed inside the window.
    EpochStays,
    /// Retention is off.
    RetentionOff,
}

impl fmt::Display for StaysBecause {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window { line } => write!(out, "states inside the window, line of epoch {line}"),
            Self::Period(name) => write!(out, "state of {name}"),
            Self::Mark(name) => write!(out, "mark '{name}'"),
            Self::SourceOf(key) => write!(out, "holds extents of {key}"),
            Self::Newest => out.write_str("the next snapshot is based on it"),
            Self::EndOfEpoch => out.write_str("tells where its epoch ends"),
            Self::RecentlySuperseded => out.write_str("superseded only lately"),
            Self::Damaged(what) => write!(out, "can't be read: {what}"),
            Self::NotUnderstood => out.write_str("holds other transactions than those of its epoch"),
            Self::EpochStays => out.write_str("its epoch, or one before it, stays"),
            Self::RetentionOff => out.write_str("retention is off"),
        }
    }
}

/// An object that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Going {
    /// The object.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Why.
    pub why: GoesBecause,
    /// The snapshot objects that it needs, itself not: they go after it.
    pub sources: Vec<SnapshotKey>,
}

/// An object that stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staying {
    /// The object.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Why; there is at least one reason.
    pub why: BTreeSet<StaysBecause>,
}

/// What of a replica goes, and what stays. Each object of its history is in exactly one of the two lists; all else in the
/// place is not touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionPlan {
    /// The replica, for messages.
    pub location: String,
    /// Every state that was valid at this time or later stays restorable, in milliseconds since 1970; `None` when retention
    /// is off.
    pub window_start_ms: Option<u64>,
    /// What goes, in the order of the keys.
    pub going: Vec<Going>,
    /// What stays, in the order of the keys.
    pub staying: Vec<Staying>,
    /// What the person who asked should know.
    pub notes: Vec<String>,
}

impl RetentionPlan {
    /// Bytes of all objects that go.
    #[must_use]
    pub fn going_bytes(&self) -> u64 {
        self.going.iter().map(|going| going.len_bytes).sum()
    }

    /// Bytes of all objects that stay.
    #[must_use]
    pub fn staying_bytes(&self) -> u64 {
        self.staying.iter().map(|staying| staying.len_bytes).sum()
    }
}

impl fmt::Display for RetentionPlan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "replica    {}", self.location)?;
        match self.window_start_ms {
            Some(start_ms) => writeln!(out, "window     every state since {}", format_time(start_ms))?,
            None => writeln!(out, "window     none: retention is off")?,
        }
        let of_staying = |staying: &Staying| {
            let reasons: Vec<String> = staying.why.iter().map(ToString::to_string).collect();
            (staying.key.clone(), staying.len_bytes, reasons.join("; "))
        };
        write_groups(out, "stays", self.staying.iter().map(of_staying))?;
        let of_going = |going: &Going| (going.key.clone(), going.len_bytes, going.why.to_string());
        write_groups(out, "goes", self.going.iter().map(of_going))?;
        writeln!(out, "stays      {} objects, {} bytes", self.staying.len(), self.staying_bytes())?;
        write!(out, "goes       {} objects, {} bytes", self.going.len(), self.going_bytes())
    }
}

/// A line for each row of objects of one kind and epoch that share their reasons.
fn write_groups(
    out: &mut fmt::Formatter<'_>,
    verb: &str,
    objects: impl Iterator<Item = (ObjectKey, u64, String)>,
) -> fmt::Result {
    let mut groups: Vec<(ObjectKey, ObjectKey, usize, u64, String)> = Vec::new();
    for (key, len_bytes, why) in objects {
        let is_alike = |group: &&mut (ObjectKey, ObjectKey, usize, u64, String)| {
            let is_of_kind = std::mem::discriminant(&group.0) == std::mem::discriminant(&key);
            is_of_kind && group.0.epoch() == key.epoch() && group.4 == why
        };
        match groups.last_mut().filter(is_alike) {
            Some((_, last, count, sum_bytes, _)) => {
                (*last, *count, *sum_bytes) = (key, *count + 1, *sum_bytes + len_bytes);
            }
            None => groups.push((key.clone(), key, 1, len_bytes, why)),
        }
    }
    for (first, last, count, len_bytes, why) in groups {
        match count {
            1 => writeln!(out, "{verb:<6} {first} ({len_bytes} bytes): {why}")?,
            _ => writeln!(out, "{verb:<6} {first} to {last} ({count} objects, {len_bytes} bytes): {why}")?,
        }
    }
    Ok(())
}

/// Decides what goes. Pure: `tails` are the ends of all snapshots of `history`, `now_ms` is the time now.
///
/// # Errors
/// When an epoch's line can't be followed, because a record is missing or contradicts its parent, or when the newest epoch's record
/// was lost: then nothing is known for certain, and nothing may go.
pub fn plan(
    history: &History,
    tails: &BTreeMap<SnapshotKey, Tail>,
    marks: &[MarkRecord],
    settings: &RetentionSettings,
    now_ms: u64,
) -> Result<RetentionPlan, RestoreError> {
    let (reasons, superseded, notes) = Selection::make(history, tails, marks, settings, now_ms)?;
    let mut plan = RetentionPlan {
        location: history.location.clone(),
        window_start_ms: settings.window_ms.map(|window_ms| window_start_ms(window_ms, now_ms)),
        going: Vec::new(),
        staying: Vec::new(),
        notes,
    };
    let epochs_with_objects: BTreeSet<u32> = reasons.keys().map(ObjectKey::epoch).collect();
    for epoch in history.epochs.values() {
        for (key, len_bytes) in objects(epoch) {
            match reasons.get(&key) {
                Some(why) => plan.staying.push(Staying { key, len_bytes, why: why.clone() }),
                None => {
                    let is_superseded = matches!(&key, ObjectKey::Segment(key) if superseded.contains(key));
                    let why = if is_superseded { GoesBecause::Superseded } else { GoesBecause::NotNeeded };
                    plan.going.push(Going { sources: sources(&key, tails), key, len_bytes, why });
                }
            }
        }
    }
    plan_records(&mut plan, history, &epochs_with_objects);
    plan.going.sort_by(|left, right| left.key.cmp(&right.key));
    plan.staying.sort_by(|left, right| left.key.cmp(&right.key));
    Ok(plan)
}

/// Records go from the oldest on, and only those of epochs of which nothing stays and that were claimed before the window: a writer may
/// have shipped nothing yet, and what it ships is restorable only as long as its record is there. The newest stays in any case: the
/// next epoch's number follows from it. With retention off all stay.
fn plan_records(plan: &mut RetentionPlan, history: &History, epochs_with_objects: &BTreeSet<u32>) {
    let start_ms = plan.window_start_ms.unwrap_or(0);
    let was_claimed_inside = |epoch: &Epoch| epoch.claims.iter().any(|claim| claim.stored_ms >= start_ms);
    let claimed = history.epochs.iter().filter(|(_, epoch)| was_claimed_inside(epoch)).map(|(&number, _)| number);
    let newest = history.epochs.keys().next_back().copied().unwrap_or(0);
    let first_that_stays =
        epochs_with_objects.first().copied().into_iter().chain(claimed).min().unwrap_or(newest).min(newest);
    for (&number, epoch) in &history.epochs {
        let goes = plan.window_start_ms.is_some() && number < first_that_stays;
        for claim in &epoch.claims {
            let (key, len_bytes) = (ObjectKey::Epoch(claim.key.clone()), claim.len_bytes);
            if goes {
                plan.going.push(Going { key, len_bytes, why: GoesBecause::EmptyEpoch, sources: Vec::new() });
            } else {
                plan.staying.push(Staying { key, len_bytes, why: BTreeSet::from([StaysBecause::EpochStays]) });
            }
        }
    }
}

/// A restore that was planned a while ago may still be under way.
pub(super) fn window_start_ms(window_ms: u64, now_ms: u64) -> u64 {
    now_ms.saturating_sub(window_ms).saturating_sub(super::GRACE_MS)
}

fn objects(epoch: &Epoch) -> impl Iterator<Item = (ObjectKey, u64)> {
    let snapshots = epoch.snapshots.iter().map(|stored| (ObjectKey::Snapshot(stored.key), stored.len_bytes));
    let segments = epoch.segments.iter().map(|stored| (ObjectKey::Segment(stored.key), stored.len_bytes));
    snapshots.chain(segments)
}

fn sources(key: &ObjectKey, tails: &BTreeMap<SnapshotKey, Tail>) -> Vec<SnapshotKey> {
    let ObjectKey::Snapshot(own) = key else { return Vec::new() };
    match tails.get(own) {
        Some(Tail::Whole(tail)) => tail.sources.iter().copied().filter(|source| source != own).collect(),
        _ => Vec::new(),
    }
}

/// For messages about marks.
pub(super) fn unservable(mark: &MarkRecord) -> String {
    let position: Position = mark.position();
    format!("nothing that is there restores the state {position} of mark '{}'", mark.name)
}
