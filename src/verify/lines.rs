//! What of a replica should be restorable, and which objects that needs. Pure: from the listing, the epoch records, and the
//! ends of all snapshots.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::Position;
use crate::format::key::{SegmentKey, SnapshotKey};
use crate::format::record::MarkRecord;
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::run::{PlannedSnapshot, Run, runs};
use crate::restore::tail::SnapshotTail;
use crate::retain::tails::Tail;

/// A history and the ends of its snapshots.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) history: &'a History,
    pub(super) tails: &'a BTreeMap<SnapshotKey, Tail>,
}

/// States of a run that can be restored: from the first to the last, without a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first_txid: u64,
    pub(super) last_txid: u64,
}

/// The objects that states which should be restorable need.
#[derive(Debug, Default)]
pub(super) struct Needs {
    pub(super) segments: BTreeSet<SegmentKey>,
    /// Snapshots that a restore begins with, or stumbles over.
    pub(super) snapshots: BTreeSet<SnapshotKey>,
}

impl<'a> View<'a> {
    /// The runs of the line that ends in `epoch`, newest first; of the newest line, if not given.
    pub(super) fn runs(self, epoch: Option<u32>) -> Result<Vec<Run<'a>>, RestoreError> {
        Ok(runs(&self.history.line(epoch)?))
    }

    pub(super) fn tail(self, key: &SnapshotKey) -> Option<&'a SnapshotTail> {
        match self.tails.get(key) {
            Some(Tail::Whole(tail)) => Some(tail),
            _ => None,
        }
    }

    /// Why the end of a snapshot can't be read.
    pub(super) fn damage(self, key: &SnapshotKey) -> Option<&'a str> {
        match self.tails.get(key) {
            Some(Tail::Damaged(what)) => Some(what),
            _ => None,
        }
    }

    /// A snapshot object that another one has extents in, and that is not there.
    pub(super) fn missing_source(self, tail: &SnapshotTail) -> Option<SnapshotKey> {
        tail.sources.iter().find(|source| !self.history.has_snapshot(source)).copied()
    }

    /// Whether a snapshot is there only because a newer one has extents in it: then what it needs itself may be gone.
    pub(super) fn is_source(self, key: SnapshotKey) -> bool {
        let newer = self.tails.range(key..).filter(|(other, _)| **other != key);
        newer.into_iter().any(|(_, tail)| matches!(tail, Tail::Whole(tail) if tail.sources.contains(&key)))
    }

    /// The end of a snapshot, if a restore on this line can begin with it.
    pub(super) fn usable(self, run: &Run<'_>, planned: &PlannedSnapshot) -> Option<&'a SnapshotTail> {
        let tail = self.tail(&planned.stored.key)?;
        let is_usable = tail.footer.info.last_txid <= planned.last_txid
            && run.missing_between(planned.stored.key.txid, tail.footer.info.last_txid).is_none()
            && self.missing_source(tail).is_none();
        is_usable.then_some(tail)
    }

    /// What of a run can be restored, oldest first.
    pub(super) fn ranges(self, run: &Run<'_>) -> Vec<Range> {
        let (mut ranges, mut known_to_txid): (Vec<Range>, Option<u64>) = (Vec::new(), None);
        for tail in run.snapshots.iter().rev().filter_map(|planned| self.usable(run, planned)) {
            let first_txid = tail.footer.info.last_txid;
            if known_to_txid.is_some_and(|known| first_txid <= known) {
                continue;
            }
            let gap = run.missing_between(first_txid, u64::MAX);
            let last_txid = gap.map_or(run.last_txid, |gap| gap.first_txid - 1).max(first_txid);
            known_to_txid = Some(last_txid);
            ranges.push(Range { first_txid, last_txid });
        }
        ranges
    }

    /// What a restore of a state begins with, and the run that it is in.
    fn serving(self, runs: &[Run<'_>], txid: u64) -> Option<(usize, SnapshotKey)> {
        let is_in = |run: &&Run<'_>| (run.first_txid..=run.last_txid).contains(&txid);
        let index = runs.iter().position(|run| is_in(&run))?;
        let run = &runs[index];
        let serves = |planned: &&PlannedSnapshot| {
            let tail = self.usable(run, planned);
            tail.is_some_and(|tail| tail.footer.info.last_txid <= txid)
                && run.missing_between(planned.stored.key.txid, txid).is_none()
        };
        run.snapshots.iter().find(serves).map(|planned| (index, planned.stored.key))
    }

    /// Whether the state of a mark can be restored.
    pub(super) fn is_restorable(self, position: Position) -> bool {
        self.runs(Some(position.epoch)).is_ok_and(|runs| self.serving(&runs, position.txid).is_some())
    }

    /// The objects that the newest line and the marks need.
    pub(super) fn needs(self, marks: &[MarkRecord]) -> Needs {
        let mut needs = Needs::default();
        for run in self.runs(None).iter().flatten() {
            self.add_run(&mut needs, run);
        }
        for mark in marks {
            self.add_mark(&mut needs, mark);
        }
        needs
    }

    fn add_run(self, needs: &mut Needs, run: &Run<'_>) {
        let usable = |planned: &&PlannedSnapshot| self.usable(run, planned).is_some();
        // A restore looks at each snapshot until one serves, so it fails at one that can't be read.
        let is_looked_at = |planned: &&PlannedSnapshot| usable(planned) || self.damage(&planned.stored.key).is_some();
        needs.snapshots.extend(run.snapshots.iter().filter(is_looked_at).map(|planned| planned.stored.key));
        if let Some(oldest) = run.snapshots.iter().rev().find(usable) {
            let segments = run.segments_between(oldest.stored.key.txid, run.last_txid);
            needs.segments.extend(segments.iter().map(|planned| planned.stored.key));
        }
    }

    fn add_mark(self, needs: &mut Needs, mark: &MarkRecord) {
        let Ok(runs) = self.runs(Some(mark.epoch)) else { return };
        if let Some((index, snapshot)) = self.serving(&runs, mark.txid) {
            needs.snapshots.insert(snapshot);
            let segments = runs[index].segments_between(snapshot.txid, mark.txid);
            needs.segments.extend(segments.iter().map(|planned| planned.stored.key));
        }
    }

    /// Epochs of which something is off the newest line: they end lines that were left.
    pub(super) fn left_epochs(self) -> Vec<u32> {
        let line = self.history.line(None).unwrap_or_default();
        let caps: BTreeMap<u32, Option<u64>> = line.iter().map(|(epoch, cap)| (epoch.record.epoch, *cap)).collect();
        let is_left = |(number, epoch): &(&u32, &crate::restore::history::Epoch)| match caps.get(number) {
            None => true,
            Some(None) => false,
            Some(Some(cap)) => {
                let last_txid = epoch.segments.iter().map(|stored| stored.key.0.last_txid).max();
                let last_begun = epoch.snapshots.iter().map(|stored| stored.key.txid).max();
                last_txid.max(last_begun).is_some_and(|last| last > *cap)
            }
        };
        self.history.epochs.iter().filter(is_left).map(|(number, _)| *number).collect()
    }

    /// Of each epoch on the newest line the last transaction that counts there.
    pub(super) fn newest_caps(self) -> BTreeMap<u32, u64> {
        let line = self.history.line(None).unwrap_or_default();
        line.iter().map(|(epoch, cap)| (epoch.record.epoch, cap.unwrap_or(u64::MAX))).collect()
    }
}
