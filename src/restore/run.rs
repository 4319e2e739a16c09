//! What of a replica lies on one line, as its names tell: which segments in which order, up to which transaction of each, and
//! what is missing between them. Pure: names in, values out.

use super::history::{Epoch, Stored};
use crate::format::key::{SegmentKey, SnapshotKey};

/// A segment, and how much of it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedSegment {
    /// The segment.
    pub stored: Stored<SegmentKey>,
    /// The last transaction of it that counts. Those after it, if any, are on a line that was left: the next epoch goes on from
    /// here and uses their numbers again.
    pub last_txid: u64,
}

/// A snapshot, and the last transaction of its epoch that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlannedSnapshot {
    pub(crate) stored: Stored<SnapshotKey>,
    /// A snapshot that serves a later state than this holds extents of a line that was left.
    pub(crate) last_txid: u64,
}

/// Transactions that no segment holds: the first and the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) first_txid: u64,
    pub(crate) last_txid: u64,
}

/// A part of a line within which every change is known: an epoch that began with a state that was found, and those that
/// continued it.
#[derive(Debug, Clone)]
pub(crate) struct Run<'a> {
    /// The number of its first state.
    pub(crate) first_txid: u64,
    /// The number of its last state.
    pub(crate) last_txid: u64,
    /// The segments in order.
    pub(crate) segments: Vec<PlannedSegment>,
    /// What is missing between them, in order.
    pub(crate) missing: Vec<Missing>,
    /// The snapshots, newest first.
    pub(crate) snapshots: Vec<PlannedSnapshot>,
    /// For each epoch, the last transaction of it that counts.
    epochs: Vec<(&'a Epoch, u64)>,
    /// The first of those that were lost at its end.
    lost_from_txid: Option<u64>,
}

impl<'a> Run<'a> {
    /// Of epochs of which each but the first continues the one before, each with the last transaction that counts.
    fn new(epochs: &[(&'a Epoch, Option<u64>)]) -> Self {
        let first_txid = epochs.first().map_or(0, |(epoch, _)| epoch.record.start_txid());
        let mut run = Self {
            first_txid,
            last_txid: first_txid,
            segments: Vec::new(),
            missing: Vec::new(),
            snapshots: Vec::new(),
            epochs: Vec::new(),
            lost_from_txid: None,
        };
        for &(epoch, cap) in epochs {
            run.extend(epoch, cap);
            let last_txid = cap.unwrap_or(run.last_txid);
            let planned = |stored: &Stored<SnapshotKey>| PlannedSnapshot { stored: *stored, last_txid };
            run.snapshots.extend(epoch.snapshots.iter().map(planned));
            run.epochs.push((epoch, last_txid));
        }
        run.snapshots.reverse();
        run
    }

    /// Adds an epoch's segments up to `cap`. Where several hold a transaction, the one that goes furthest is taken.
    fn extend(&mut self, epoch: &Epoch, cap: Option<u64>) {
        let end = cap.unwrap_or(u64::MAX);
        let mut rest = epoch.segments.as_slice();
        while self.last_txid < end {
            let next_txid = self.last_txid + 1;
            let reach = rest.partition_point(|stored| stored.key.0.first_txid <= next_txid);
            let best = rest[..reach].iter().max_by_key(|stored| stored.key.0.last_txid);
            match best.filter(|stored| stored.key.0.last_txid >= next_txid) {
                Some(stored) => {
                    self.last_txid = stored.key.0.last_txid.min(end);
                    self.segments.push(PlannedSegment { stored: *stored, last_txid: self.last_txid });
                }
                None => {
                    // Nothing holds the next transaction: it is missing if the history is known to go on behind it.
                    let Some(goes_on_at) = rest.get(reach).map(|stored| stored.key.0.first_txid).or(cap) else {
                        return;
                    };
                    let is_cap = reach == rest.len();
                    self.last_txid = if is_cap { end } else { (goes_on_at - 1).min(end) };
                    self.missing.push(Missing { first_txid: next_txid, last_txid: self.last_txid });
                }
            }
            rest = &rest[reach..];
        }
    }

    /// The newest snapshot of the epoch that the run ends with.
    pub(crate) fn newest_of_last_epoch(&self) -> Option<Stored<SnapshotKey>> {
        let number = self.epochs.last()?.0.record.epoch;
        self.snapshots.first().map(|planned| planned.stored).filter(|stored| stored.key.epoch == number)
    }

    /// A transaction was confirmed in the epoch that the run ends with. What no segment holds up to it was lost: nothing that comes
    /// behind the last segment is ever let go.
    pub(crate) fn extend_to(&mut self, confirmed_txid: u64) {
        if confirmed_txid <= self.last_txid {
            return;
        }
        let first_txid = self.last_txid + 1;
        self.missing.push(Missing { first_txid, last_txid: confirmed_txid });
        (self.last_txid, self.lost_from_txid) = (confirmed_txid, Some(first_txid));
        let Some((epoch, last_txid)) = self.epochs.last_mut() else { return };
        *last_txid = confirmed_txid;
        let number = epoch.record.epoch;
        for planned in self.snapshots.iter_mut().filter(|planned| planned.stored.key.epoch == number) {
            planned.last_txid = confirmed_txid;
        }
    }

    /// The first transactions after `after_txid` and up to `last_txid` that no segment holds.
    pub(crate) fn missing_between(&self, after_txid: u64, last_txid: u64) -> Option<Missing> {
        self.missing.iter().find(|gap| gap.last_txid > after_txid && gap.first_txid <= last_txid).copied()
    }

    /// Whether a gap is as retention leaves one: it reaches up to where a snapshot was begun (segments are let go whole, so
    /// the one with that transaction may be there), or to the end of a run that another one followed.
    pub(crate) fn is_let_go(&self, gap: Missing) -> bool {
        let mut last_txid = gap.last_txid;
        for next in self.missing.iter().filter(|next| next.first_txid > gap.last_txid) {
            if next.first_txid == last_txid + 1 {
                last_txid = next.last_txid;
            }
        }
        if self.lost_from_txid.is_some_and(|lost_from_txid| lost_from_txid <= last_txid) {
            return false;
        }
        let behind = self.segment_of(last_txid + 1).map_or(last_txid, |planned| planned.last_txid);
        let is_between = |txid: u64| gap.first_txid <= txid && txid <= behind;
        last_txid == self.last_txid || self.snapshots.iter().any(|planned| is_between(planned.stored.key.txid))
    }

    /// Whether the run's first transactions are not there: they were let go.
    pub(crate) fn has_lost_beginning(&self) -> bool {
        self.is_part() || self.has_lost_first()
    }

    /// Whether what is not there was let go, which is done only behind a snapshot. An epoch whose parent had nothing but the state
    /// that it was found with may have lost that one's record without any.
    pub(crate) fn had_snapshot(&self) -> bool {
        self.has_lost_first() || (self.is_part() && self.first_txid > 1)
    }

    /// Whether the record of the epoch that it began with is gone.
    fn is_part(&self) -> bool {
        self.epochs.first().is_some_and(|(epoch, _)| epoch.record.continues)
    }

    /// Whether the first transaction of those that could be there is missing.
    fn has_lost_first(&self) -> bool {
        self.missing.first().is_some_and(|gap| gap.first_txid == self.first_txid + 1)
    }

    /// When the run began, in milliseconds since 1970.
    pub(crate) fn claimed_ms(&self) -> u64 {
        self.epochs.first().map_or(0, |(epoch, _)| epoch.record.claimed_ms)
    }

    /// The segments with the transactions after `after_txid` and up to `last_txid`.
    pub(crate) fn segments_between(&self, after_txid: u64, last_txid: u64) -> Vec<PlannedSegment> {
        let is_needed =
            |planned: &&PlannedSegment| planned.last_txid > after_txid && planned.stored.key.0.first_txid <= last_txid;
        let up_to =
            |planned: &PlannedSegment| PlannedSegment { last_txid: planned.last_txid.min(last_txid), ..*planned };
        self.segments.iter().filter(is_needed).map(up_to).collect()
    }

    /// The segment that holds a transaction of this run.
    pub(crate) fn segment_of(&self, txid: u64) -> Option<&PlannedSegment> {
        let at = self.segments.partition_point(|planned| planned.last_txid < txid);
        self.segments.get(at).filter(|planned| planned.stored.key.0.first_txid <= txid)
    }

    /// The epoch that a state of this run belongs to.
    pub(crate) fn epoch_of(&self, txid: u64) -> u32 {
        let holds = |(_, last_txid): &&(&Epoch, u64)| txid <= *last_txid;
        self.epochs.iter().find(holds).or(self.epochs.last()).map_or(0, |(epoch, _)| epoch.record.epoch)
    }

    /// The last transaction of an epoch of this run that counts.
    pub(crate) fn end_of(&self, number: u32) -> Option<u64> {
        let found = self.epochs.iter().find(|(epoch, _)| epoch.record.epoch == number);
        found.map(|(_, last_txid)| *last_txid)
    }

    /// The epoch that the run began with.
    pub(crate) fn first_epoch(&self) -> u32 {
        self.epochs.first().map_or(0, |(epoch, _)| epoch.record.epoch)
    }
}

/// The runs of a line, newest first.
pub(crate) fn runs<'a>(line: &[(&'a Epoch, Option<u64>)]) -> Vec<Run<'a>> {
    let is_last_of_run = |(epoch, _): &(&Epoch, Option<u64>)| !epoch.record.continues;
    let oldest_first = |epochs: &[(&'a Epoch, Option<u64>)]| epochs.iter().rev().copied().collect::<Vec<_>>();
    line.split_inclusive(is_last_of_run).map(|epochs| Run::new(&oldest_first(epochs))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::key::Span;
    use crate::format::record::EpochRecord;
    use crate::format::{FORMAT_VERSION, Position};

    fn epoch(number: u32, parent: Option<Position>, continues: bool, segments: &[(u64, u64)]) -> Epoch {
        let record = EpochRecord {
            format: FORMAT_VERSION,
            epoch: number,
            writer: String::new(),
            claimed_ms: 0,
            first_txid: parent.map_or(1, |parent| parent.txid + 1),
            continues,
            parent,
            program: String::new(),
            host: String::new(),
        };
        let stored = |&(first_txid, last_txid): &(u64, u64)| Stored {
            key: SegmentKey(Span { epoch: number, first_txid, last_txid, time_ms: last_txid }),
            len_bytes: 0,
            stored_ms: 0,
        };
        Epoch { record, claims: Vec::new(), segments: segments.iter().map(stored).collect(), snapshots: Vec::new() }
    }

    /// The segments that a run takes: epoch, first transaction, last one that counts.
    fn taken(run: &Run<'_>) -> Vec<(u32, u64, u64)> {
        let of =
            |planned: &PlannedSegment| (planned.stored.key.0.epoch, planned.stored.key.0.first_txid, planned.last_txid);
        run.segments.iter().map(of).collect()
    }

    fn gaps(run: &Run<'_>) -> Vec<(u64, u64)> {
        run.missing.iter().map(|gap| (gap.first_txid, gap.last_txid)).collect()
    }

    #[test]
    fn the_segment_that_goes_furthest_is_taken() {
        let first = epoch(1, None, false, &[(2, 3), (2, 9), (3, 4), (4, 12), (10, 11), (13, 13)]);
        let run = &runs(&[(&first, None)])[0];
        assert_eq!(taken(run), [(1, 2, 9), (1, 4, 12), (1, 13, 13)]);
        assert_eq!((run.first_txid, run.last_txid, gaps(run)), (1, 13, vec![]));
        assert_eq!(run.segment_of(9).unwrap().stored.key.0.first_txid, 2);
        assert_eq!(run.segment_of(10).unwrap().stored.key.0.first_txid, 4);
        assert!(run.segment_of(1).is_none() && run.segment_of(14).is_none());
    }

    #[test]
    fn what_is_missing_is_known() {
        let first = epoch(1, None, false, &[(3, 4), (7, 8), (8, 9)]);
        let second = epoch(2, Some(Position { epoch: 1, txid: 12 }), true, &[(15, 16)]);
        let run = &runs(&[(&second, None), (&first, Some(12))])[0];
        assert_eq!(gaps(run), [(2, 2), (5, 6), (10, 12), (13, 14)]);
        assert_eq!(run.last_txid, 16);
        assert_eq!(run.missing_between(6, 9), None);
        assert_eq!(run.missing_between(5, 9), Some(Missing { first_txid: 5, last_txid: 6 }));
        assert_eq!(run.missing_between(6, 10), Some(Missing { first_txid: 10, last_txid: 12 }));
    }

    #[test]
    fn what_was_confirmed_behind_the_last_segment_was_lost() {
        let snapshot =
            |epoch, txid| Stored { key: SnapshotKey { epoch, txid, time_ms: txid }, len_bytes: 0, stored_ms: 0 };
        let mut first = epoch(1, None, false, &[(2, 3)]);
        first.snapshots = vec![snapshot(1, 1)];
        let mut second = epoch(2, Some(Position { epoch: 1, txid: 3 }), true, &[(4, 5)]);
        second.snapshots = vec![snapshot(2, 3), snapshot(2, 7)];
        let mut run = runs(&[(&second, None), (&first, Some(3))]).remove(0);
        assert_eq!(run.newest_of_last_epoch(), Some(snapshot(2, 7)));
        for known_txid in [3, 5] {
            run.extend_to(known_txid);
            assert_eq!((run.last_txid, gaps(&run)), (5, vec![]));
        }
        run.extend_to(7);
        assert_eq!((run.last_txid, gaps(&run), run.epoch_of(7)), (7, vec![(6, 7)], 2));
        let caps: Vec<u64> = run.snapshots.iter().map(|planned| planned.last_txid).collect();
        assert_eq!(caps, [7, 7, 3]);
        // A snapshot was begun in it, and the run ends with it: that excuses what retention leaves, and not this.
        assert!(!run.is_let_go(run.missing[0]));
        let none = epoch(3, Some(Position { epoch: 2, txid: 5 }), true, &[]);
        assert_eq!(runs(&[(&none, None), (&second, Some(5)), (&first, Some(3))])[0].newest_of_last_epoch(), None);
    }

    #[test]
    fn what_was_let_go_proves_a_snapshot() {
        let had_snapshot = |parent: Option<u64>, segments: &[(u64, u64)]| {
            let parent = parent.map(|txid| Position { epoch: 1, txid });
            let last = epoch(2, parent, parent.is_some(), segments);
            runs(&[(&last, None)])[0].had_snapshot()
        };
        assert!(!had_snapshot(None, &[]) && !had_snapshot(None, &[(2, 3), (5, 6)]));
        assert!(had_snapshot(None, &[(3, 4)]), "the first transactions");
        assert!(had_snapshot(Some(7), &[(8, 9)]), "the epoch that it continues");
        assert!(!had_snapshot(Some(1), &[(2, 3)]), "which had nothing");
    }

    #[test]
    fn a_fork_leaves_the_rest_of_a_segment_out() {
        let first = epoch(1, None, false, &[(2, 5), (6, 10), (11, 20)]);
        let second = epoch(2, Some(Position { epoch: 1, txid: 8 }), true, &[(9, 15)]);
        let run = &runs(&[(&second, None), (&first, Some(8))])[0];
        assert_eq!(taken(run), [(1, 2, 5), (1, 6, 8), (2, 9, 15)]);
        assert_eq!((run.epoch_of(8), run.epoch_of(9)), (1, 2));
        assert_eq!((run.end_of(1), run.end_of(2), run.end_of(3)), (Some(8), Some(15), None));
        assert_eq!(run.segment_of(9).unwrap().stored.key.0.epoch, 2);
        let needed: Vec<u64> = run.segments_between(5, 7).iter().map(|planned| planned.last_txid).collect();
        assert_eq!(needed, [7]);
    }

    #[test]
    fn a_state_that_was_found_begins_a_run() {
        let first = epoch(1, None, false, &[(2, 5)]);
        let second = epoch(2, Some(Position { epoch: 1, txid: 5 }), false, &[(7, 8)]);
        let third = epoch(3, Some(Position { epoch: 2, txid: 8 }), true, &[(9, 9)]);
        let runs = runs(&[(&third, None), (&second, Some(8)), (&first, Some(5))]);
        let states: Vec<(u64, u64)> = runs.iter().map(|run| (run.first_txid, run.last_txid)).collect();
        assert_eq!(states, [(6, 9), (1, 5)]);
        assert!(runs.iter().all(|run| run.missing.is_empty()));
    }
}
