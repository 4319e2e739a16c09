//! What must stay, and why.
//!
//! - A state is valid from its commit until the next state of its line; the last one of a line that was left until the next
//!   epoch was claimed (by the clock of its writer or of the store, whichever says later). **Every state that was valid at the window's start or later stays restorable**, on every line whose end is
//!   inside the window. For each part of such a line that has no gap in it (a *run*) that takes the newest usable snapshot whose
//!   state is not later than the window's start, all later snapshots, and every segment after the first one's beginning.
//! - A run was valid until the *next* run's first state can be restored: an epoch whose first snapshot is not there yet takes
//!   nothing away.
//! - The states of marks, and those of the last days, weeks and months that are asked for: a snapshot and the segments up to the
//!   state.
//! - Whatever a snapshot that stays holds extents in.
//! - The newest snapshot, because the next one is based on it; the segment with the last transaction of an epoch whose
//!   end is inside the window, because it alone tells how far the epoch went.
//! - Segments that others supersede stay until those have been there for a while.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::plan::{ObjectKey, StaysBecause, unservable, window_start_ms};
use super::tails::Tail;
use super::{GRACE_MS, RetentionSettings};
use crate::format::key::{SegmentKey, SnapshotKey};
use crate::format::record::MarkRecord;
use crate::format::snapshot::SnapshotInfo;
use crate::restore::RestoreError;
use crate::restore::history::{Epoch, History, Stored};
use crate::restore::run::{PlannedSnapshot, Run, runs};

/// Every object that stays, with its reasons.
pub(super) type Reasons = BTreeMap<ObjectKey, BTreeSet<StaysBecause>>;

/// What must stay of a replica, while it is being found out.
pub(super) struct Selection<'a> {
    history: &'a History,
    tails: &'a BTreeMap<SnapshotKey, Tail>,
    now_ms: u64,
    reasons: Reasons,
    superseded: BTreeSet<SegmentKey>,
    notes: Vec<String>,
}

impl<'a> Selection<'a> {
    /// What stays, which of the rest are superseded segments, and notes.
    pub(super) fn make(
        history: &'a History,
        tails: &'a BTreeMap<SnapshotKey, Tail>,
        marks: &[MarkRecord],
        settings: &RetentionSettings,
        now_ms: u64,
    ) -> Result<(Reasons, BTreeSet<SegmentKey>, Vec<String>), RestoreError> {
        let (reasons, superseded, notes) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let mut selection = Self { history, tails, now_ms, reasons, superseded, notes };
        match settings.window_ms {
            Some(window_ms) => {
                selection.check_newest_line()?;
                selection.keep_window(window_start_ms(window_ms, now_ms))?;
                selection.keep_periods(settings)?;
                selection.keep_marks(marks)?;
                selection.keep_newest_snapshot();
            }
            None => selection.keep_everything(),
        }
        selection.keep_damaged();
        selection.keep_sources();
        selection.judge_overlapping();
        Ok((selection.reasons, selection.superseded, selection.notes))
    }

    fn keep(&mut self, key: ObjectKey, why: &StaysBecause) {
        self.reasons.entry(key).or_default().insert(why.clone());
    }

    fn stays(&self, key: &SegmentKey) -> bool {
        self.reasons.contains_key(&ObjectKey::Segment(*key))
    }

    /// Retention is off: all but the segments that a restore would pass over.
    fn keep_everything(&mut self) {
        for epoch in self.history.epochs.values() {
            for stored in &epoch.snapshots {
                self.keep(ObjectKey::Snapshot(stored.key), &StaysBecause::RetentionOff);
            }
            for stored in chosen(epoch) {
                self.keep(ObjectKey::Segment(stored.key), &StaysBecause::RetentionOff);
            }
        }
    }

    /// Where the newest epoch's record was lost, the epoch before it looks like the newest one; what the lost line stands on would go.
    fn check_newest_line(&self) -> Result<(), RestoreError> {
        match self.history.line(None) {
            Ok(_) | Err(RestoreError::NothingYet { .. }) => Ok(()),
            Err(damage) => Err(damage),
        }
    }

    fn keep_window(&mut self, start_ms: u64) -> Result<(), RestoreError> {
        let history = self.history;
        let ends_ms = ends_ms(history);
        let inside = ends_ms.iter().filter(|(_, end_ms)| **end_ms >= start_ms);
        for (&number, _) in inside {
            self.keep_end(&history.epochs[&number]);
            if !is_continued_from_its_end(history, number) {
                self.keep_line(number, &ends_ms, start_ms)?;
            }
        }
        Ok(())
    }

    /// Without it nobody would know the number of the epoch's last state.
    fn keep_end(&mut self, epoch: &Epoch) {
        if let Some(last) = chosen(epoch).last() {
            self.keep(ObjectKey::Segment(last.key), &StaysBecause::EndOfEpoch);
        }
    }

    /// The line of an epoch whose end is inside the window.
    fn keep_line(&mut self, number: u32, ends_ms: &BTreeMap<u32, u64>, start_ms: u64) -> Result<(), RestoreError> {
        let line = self.history.line(Some(number))?;
        let mut valid_until_ms = ends_ms[&number];
        for run in runs(&line) {
            if valid_until_ms < start_ms {
                break;
            }
            self.keep_run(&run, start_ms, &StaysBecause::Window { line: number });
            if let Some(first_ms) = self.usable(&run).map(|(_, info)| info.time_ms).min() {
                let parent = self.history.epochs.get(&run.first_epoch()).and_then(|epoch| epoch.record.parent);
                let left_ms = parent.and_then(|parent| ends_ms.get(&parent.epoch)).copied();
                valid_until_ms = left_ms.unwrap_or(0).max(first_ms);
            }
        }
        Ok(())
    }

    /// Everything that the states of `run` that were valid at `start_ms` or later need.
    fn keep_run(&mut self, run: &Run<'_>, start_ms: u64, why: &StaysBecause) {
        let base = self.usable(run).find(|(_, info)| info.time_ms <= start_ms).map(|(planned, _)| planned.stored.key);
        // Newest first: all down to the base, or all there are.
        let is_on_line = |planned: &&PlannedSnapshot| self.info(planned).is_some_and(|info| is_on_line(planned, info));
        let on_line = run.snapshots.iter().filter(is_on_line).map(|planned| planned.stored.key);
        let mut snapshots: Vec<SnapshotKey> = on_line.collect();
        if let Some(at) = snapshots.iter().position(|key| Some(*key) == base) {
            snapshots.truncate(at + 1);
        }
        for key in snapshots {
            self.keep(ObjectKey::Snapshot(key), why);
        }
        for planned in run.segments_between(base.map_or(0, |base| base.txid), u64::MAX) {
            self.keep(ObjectKey::Segment(planned.stored.key), why);
        }
    }

    /// The state after `txid` alone: the newest snapshot that serves it, and the segments up to it. Whether there is one.
    fn keep_state(&mut self, run: &Run<'_>, txid: u64, why: &StaysBecause) -> bool {
        let serves = |(planned, info): &(&PlannedSnapshot, &SnapshotInfo)| {
            info.last_txid <= txid && run.missing_between(planned.stored.key.txid, txid).is_none()
        };
        let base = self.usable(run).find(serves).map(|(planned, _)| planned.stored.key);
        // One whose end can't be read now may be the one that serves it.
        let is_unread = |key: &SnapshotKey| key.txid <= txid && matches!(self.tails.get(key), Some(Tail::Damaged(_)));
        let unread = run.snapshots.iter().map(|planned| planned.stored.key).find(is_unread);
        let Some(first) = base.or(unread) else { return false };
        self.keep(ObjectKey::Snapshot(first), why);
        // And the segment that the state is in, even where it is not needed: it tells that the epoch went so far.
        let needed = run.segments_between(first.txid.min(txid.saturating_sub(1)), txid);
        for planned in needed {
            self.keep(ObjectKey::Segment(planned.stored.key), why);
        }
        base.is_some()
    }

    /// The last state of each of the last periods of the newest line that have one that a snapshot serves without more.
    fn keep_periods(&mut self, settings: &RetentionSettings) -> Result<(), RestoreError> {
        let kinds: [(u32, PeriodOf); 3] =
            [(settings.keep_daily, day), (settings.keep_weekly, week), (settings.keep_monthly, month)];
        if !settings.keeps_periods() {
            return Ok(());
        }
        let line = self.history.line(None)?;
        let runs = runs(&line);
        for (count, period_of) in kinds {
            // Runs and snapshots come newest first.
            let mut last_of_period: Vec<(String, &Run<'_>, u64)> = Vec::new();
            for run in &runs {
                for (_, info) in self.usable(run) {
                    let Some(period) = period_of(info.time_ms) else { continue };
                    if last_of_period.iter().all(|(known, ..)| *known != period) {
                        last_of_period.push((period, run, info.last_txid));
                    }
                }
            }
            for (period, run, txid) in last_of_period.into_iter().take(count as usize) {
                self.keep_state(run, txid, &StaysBecause::Period(period));
            }
        }
        Ok(())
    }

    fn keep_marks(&mut self, marks: &[MarkRecord]) -> Result<(), RestoreError> {
        for mark in marks {
            let is_kept = match self.history.line(Some(mark.epoch)) {
                Ok(line) => {
                    let holds = |run: &&Run<'_>| (run.first_txid..=run.last_txid).contains(&mark.txid);
                    let why = StaysBecause::Mark(mark.name.clone());
                    runs(&line).iter().find(holds).is_some_and(|run| self.keep_state(run, mark.txid, &why))
                }
                Err(RestoreError::NoSuchEpoch { .. } | RestoreError::NothingYet { .. }) => false,
                Err(damage) => return Err(damage),
            };
            if !is_kept {
                self.notes.push(unservable(mark));
            }
        }
        Ok(())
    }

    fn keep_newest_snapshot(&mut self) {
        let newest_first = self.history.epochs.values().rev().flat_map(|epoch| epoch.snapshots.iter().rev());
        let newest = newest_first.map(|stored| stored.key).find(|key| self.tail_info(key).is_some());
        if let Some(key) = newest {
            self.keep(ObjectKey::Snapshot(key), &StaysBecause::Newest);
        }
    }

    /// Where a snapshot has extents, its end tells; as long as that can't be read, all older ones stay with it.
    fn keep_damaged(&mut self) {
        for (key, tail) in self.tails {
            if let Tail::Damaged(what) = tail {
                self.notes.push(format!(
                    "{key} can't be read; it stays, with all older snapshots, and nothing is based on it: {what}"
                ));
                for (older, _) in self.tails.range(..=key) {
                    self.keep(ObjectKey::Snapshot(*older), &StaysBecause::Damaged(what.clone()));
                }
            }
        }
    }

    /// A list of sources names every object that the snapshot has extents in: what those need in turn does not matter.
    fn keep_sources(&mut self) {
        let mut sources = Vec::new();
        for key in self.reasons.keys() {
            let ObjectKey::Snapshot(key) = key else { continue };
            if let Some(Tail::Whole(tail)) = self.tails.get(key) {
                sources.extend(tail.sources.iter().filter(|source| *source != key).map(|source| (*source, *key)));
            }
        }
        for (source, of) in sources.into_iter().filter(|(source, _)| self.tails.contains_key(source)) {
            self.keep(ObjectKey::Snapshot(source), &StaysBecause::SourceOf(of));
        }
    }

    /// Segments that no restore would choose, because others hold the same transactions.
    fn judge_overlapping(&mut self) {
        for epoch in self.history.epochs.values() {
            let chosen = chosen(epoch);
            let is_chosen: BTreeSet<SegmentKey> = chosen.iter().map(|stored| stored.key).collect();
            for stored in epoch.segments.iter().filter(|stored| !is_chosen.contains(&stored.key)) {
                self.judge(stored, &chosen);
            }
        }
    }

    fn judge(&mut self, stored: &Stored<SegmentKey>, chosen: &[Stored<SegmentKey>]) {
        let span = stored.key.0;
        let from = chosen.partition_point(|other| other.key.0.last_txid < span.first_txid);
        let overlapping = chosen[from..].iter().take_while(|other| other.key.0.first_txid <= span.last_txid);
        let covering: Vec<&Stored<SegmentKey>> = overlapping.collect();
        if !covers(&covering, span.first_txid, span.last_txid) {
            // Where nothing else of its epoch stays it goes with the rest.
            if self.reasons.keys().any(|key| key.epoch() == span.epoch) {
                self.keep(ObjectKey::Segment(stored.key), &StaysBecause::NotUnderstood);
            }
            return;
        }
        let staying = || covering.iter().filter(|other| self.stays(&other.key));
        let is_lately = |other: &&&Stored<SegmentKey>| other.stored_ms.saturating_add(GRACE_MS) >= self.now_ms;
        if staying().any(|other| is_lately(&other)) {
            self.keep(ObjectKey::Segment(stored.key), &StaysBecause::RecentlySuperseded);
        } else if staying().next().is_some() {
            self.superseded.insert(stored.key);
        }
    }

    fn tail_info(&self, key: &SnapshotKey) -> Option<&'a SnapshotInfo> {
        match self.tails.get(key)? {
            Tail::Whole(tail) => Some(&tail.footer.info),
            Tail::Damaged(_) => None,
        }
    }

    fn info(&self, planned: &PlannedSnapshot) -> Option<&'a SnapshotInfo> {
        self.tail_info(&planned.stored.key)
    }

    /// The snapshots of a run that a restore can begin with, newest first: on its line, with every transaction that they were
    /// read during, and with every object that they have extents in.
    fn usable<'r>(&self, run: &'r Run<'_>) -> impl Iterator<Item = (&'r PlannedSnapshot, &'a SnapshotInfo)> {
        let with_info = run.snapshots.iter().filter_map(|planned| Some((planned, self.info(planned)?)));
        with_info.filter(|(planned, info)| {
            is_on_line(planned, info)
                && run.missing_between(planned.stored.key.txid, info.last_txid).is_none()
                && self.has_sources(&planned.stored.key)
        })
    }

    fn has_sources(&self, key: &SnapshotKey) -> bool {
        match self.tails.get(key) {
            // As a restore asks: its extents are read where the index says, whatever became of that object's own end.
            Some(Tail::Whole(tail)) => tail.sources.iter().all(|source| self.tails.contains_key(source)),
            _ => false,
        }
    }
}

fn is_on_line(planned: &PlannedSnapshot, info: &SnapshotInfo) -> bool {
    info.last_txid <= planned.last_txid
}

/// The segments of an epoch that a restore would choose, in order.
fn chosen(epoch: &Epoch) -> Vec<Stored<SegmentKey>> {
    let runs = runs(&[(epoch, None)]);
    runs.iter().flat_map(|run| &run.segments).map(|planned| planned.stored).collect()
}

/// Whether `segments`, in order, hold all transactions of a range.
fn covers(segments: &[&Stored<SegmentKey>], first_txid: u64, last_txid: u64) -> bool {
    let mut next_txid = first_txid;
    for span in segments.iter().map(|stored| stored.key.0) {
        if span.first_txid <= next_txid {
            next_txid = next_txid.max(span.last_txid.saturating_add(1));
        }
    }
    next_txid > last_txid
}

/// For each epoch, until when its last state was valid: until the next epoch was claimed or, where a writer went on for a while
/// because it did not know yet, until that one's last transaction. The newest is valid for ever. Clocks of machines differ:
/// a later epoch never ends before an earlier one, and a claim is not older than its record in storage.
fn ends_ms(history: &History) -> BTreeMap<u32, u64> {
    let mut ends_ms = BTreeMap::new();
    let mut latest_ms = 0;
    let mut epochs = history.epochs.iter().peekable();
    while let Some((&number, epoch)) = epochs.next() {
        let claimed_ms = epochs.peek().map_or(u64::MAX, |(_, next)| claimed_ms(next));
        let last_segment_ms = epoch.segments.iter().map(|stored| stored.key.0.time_ms).max().unwrap_or(0);
        latest_ms = latest_ms.max(claimed_ms).max(last_segment_ms);
        ends_ms.insert(number, latest_ms);
    }
    ends_ms
}

/// When an epoch was claimed, by its writer's clock or by the store's, whichever says later: a writer may start before anybody has told
/// its machine the time, and what a restore undid would count as left long ago.
fn claimed_ms(epoch: &Epoch) -> u64 {
    let stored_ms = epoch.claims.first().map(|record| record.stored_ms);
    // The latest time of all stands for a store that does not say.
    epoch.record.claimed_ms.max(stored_ms.filter(|&stored_ms| stored_ms != u64::MAX).unwrap_or(0))
}

/// Whether another epoch goes on from the very end of this one, so that this one's line is a part of that one's.
fn is_continued_from_its_end(history: &History, number: u32) -> bool {
    let Some(epoch) = history.epochs.get(&number) else { return false };
    let last_txid =
        epoch.segments.iter().map(|stored| stored.key.0.last_txid).max().unwrap_or(0).max(epoch.record.start_txid());
    let goes_on =
        |child: &Epoch| child.record.parent.is_some_and(|parent| parent.epoch == number && parent.txid >= last_txid);
    history.epochs.values().any(goes_on)
}

/// The name of the day, week or month that a time is in.
type PeriodOf = fn(u64) -> Option<String>;

fn date(time_ms: u64) -> Option<jiff::civil::Date> {
    let timestamp = Timestamp::from_millisecond(i64::try_from(time_ms).ok()?).ok()?;
    Some(timestamp.to_zoned(TimeZone::UTC).date())
}

fn day(time_ms: u64) -> Option<String> {
    date(time_ms).map(|date| format!("day {date}"))
}

fn week(time_ms: u64) -> Option<String> {
    let week = date(time_ms)?.iso_week_date();
    Some(format!("week {:04}-W{:02}", week.year(), week.week()))
}

fn month(time_ms: u64) -> Option<String> {
    let date = date(time_ms)?;
    Some(format!("month {:04}-{:02}", date.year(), date.month()))
}
