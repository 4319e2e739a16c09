//! What a look at a replica tells without reading any page. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::lines::{Needs, View};
use super::report::{Finding, Verdict};
use super::survey::{StateFacts, Survey};
use crate::clock::format_time;
use crate::format::key::{EpochKey, PRESENCE_KEY, SegmentKey, SnapshotKey, epoch_of_object};
use crate::restore::RestoreError;
use crate::restore::run::{Missing, Run};
use crate::retain::plan::plan;
use crate::retain::{GRACE_MS, RetentionSettings};

/// The names of the checks.
pub(super) const RECORDS: &str = "records";
pub(super) const LINES: &str = "lines";
pub(super) const SEGMENTS: &str = "tables of segments";
pub(super) const SNAPSHOTS: &str = "indexes of snapshots";
pub(super) const MARKS: &str = "marks";
pub(super) const STRANGERS: &str = "strangers";

/// What could be let go so long ago, in milliseconds, is gone where a daemon is at work.
const DELETIONS_MAY_TAKE_MS: u64 = 24 * 60 * 60 * 1000;
/// So many keys of one kind are named.
const NAMED_AT_MOST: usize = 5;

/// What was found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) findings: BTreeSet<Finding>,
    /// What is no fault.
    pub(super) notes: Vec<String>,
}

/// What keeps anybody from reading the replica at all.
pub(super) fn unreadable(errors: Vec<RestoreError>) -> BTreeSet<Finding> {
    let finding = |error: RestoreError| match error {
        RestoreError::Damaged { object, what, .. } => {
            let sentence = format!("{object} is damaged: {what}; nothing can be restored without it");
            Finding::failed(RECORDS, object, sentence)
        }
        other => Finding::new(Verdict::Failed, RECORDS, None, other.to_string()),
    };
    errors.into_iter().map(finding).collect()
}

/// Checks what a look has found. `now_ms` is the time now.
pub(super) fn check(survey: &Survey, retention: Option<&RetentionSettings>, now_ms: u64) -> Found {
    let view = View { history: &survey.history, tails: &survey.tails };
    let needs = view.needs(&survey.marks);
    let mut checker = Checker { survey, view, needs, now_ms, found: Found::default() };
    checker.check_records();
    checker.check_newest_line();
    checker.check_left_lines();
    checker.check_snapshots();
    checker.check_segments();
    checker.check_agreement();
    checker.check_marks();
    checker.check_presence();
    checker.check_strangers();
    if let Some(settings) = retention {
        checker.check_window(settings);
        checker.check_deletions(settings);
    }
    checker.found
}

/// How bad the damage of an object is.
pub(super) fn weigh(is_needed: bool) -> (Verdict, &'static str) {
    if is_needed {
        (Verdict::Failed, "states that should be restorable need it")
    } else {
        (Verdict::Degraded, "no state that should be restorable needs it")
    }
}

struct Checker<'a> {
    survey: &'a Survey,
    view: View<'a>,
    needs: Needs,
    now_ms: u64,
    found: Found,
}

impl Checker<'_> {
    fn add(&mut self, finding: Finding) {
        self.found.findings.insert(finding);
    }

    fn add_weighed(&mut self, check: &str, object: impl ToString, what: &str, is_needed: bool) {
        let (verdict, why) = weigh(is_needed);
        self.add(Finding::new(verdict, check, Some(object.to_string()), format!("{what}; {why}")));
    }

    fn newest_epoch(&self) -> u32 {
        self.survey.history.epochs.keys().next_back().copied().unwrap_or(0)
    }

    /// Records that are not there, but for the newest one, without which no newest line is to be had.
    fn check_records(&mut self) {
        let (epochs, given_up) = (&self.survey.history.epochs, &self.survey.history.given_up);
        let Some(&first) = epochs.keys().next() else { return };
        let is_lost = |number: &u32| !epochs.contains_key(number) && !given_up.contains(number);
        for number in (first..=self.newest_epoch()).filter(is_lost) {
            let key = EpochKey { epoch: number, writer: None };
            let sentence = format!("{key} is missing: nobody knows any more which line that epoch was on");
            self.add(Finding::degraded(RECORDS, key, sentence));
        }
    }

    fn check_newest_line(&mut self) {
        let runs = match self.view.runs(None) {
            Ok(runs) => runs,
            Err(RestoreError::Damaged { object, what, .. }) => {
                let sentence = format!("{object} is damaged: {what}; the newest line can't be followed");
                return self.add(Finding::failed(LINES, object, sentence));
            }
            Err(_) => return,
        };
        for run in &runs {
            for &gap in &run.missing {
                self.check_gap(run, gap, true);
            }
        }
        if let Some(run) = runs.first() {
            self.check_end(run, true);
            self.check_newest_state(run, &runs);
        }
    }

    fn check_gap(&mut self, run: &Run<'_>, gap: Missing, is_newest: bool) {
        // Without anything older that can be restored it is no more than a beginning.
        if !self.breaks_something(run, gap) {
            return;
        }
        let what = missing(run, gap);
        let finding = if !self.may_be_let_go(run, gap, is_newest) {
            Finding::failed(LINES, log_of(run, gap), format!("{what}: the line has a gap"))
        } else if self.is_kept_before(run, gap) {
            return self.found.notes.push(format!("{what}, as retention lets them go"));
        } else {
            let sentence = format!("{what}: they were lost, or a prune was not finished, which the next one does then");
            Finding::degraded(LINES, log_of(run, gap), sentence)
        };
        self.add(finding);
    }

    /// Whether states before a gap can be restored, which those in it should follow.
    fn breaks_something(&self, run: &Run<'_>, gap: Missing) -> bool {
        self.view.ranges(run).first().is_some_and(|range| range.first_txid < gap.first_txid)
    }

    /// Whether a gap ends where retention ends one: where a snapshot was begun, where a run ends, or at the segment that tells
    /// where its epoch ends. That of the newest epoch is more than a sign.
    fn may_be_let_go(&self, run: &Run<'_>, gap: Missing, is_newest: bool) -> bool {
        let behind = run.segment_of(gap.last_txid + 1).map(|planned| planned.stored.key);
        let is_sign = behind.is_some_and(|key| {
            let epoch = self.survey.history.epochs.get(&key.0.epoch);
            let ends = epoch.into_iter().flat_map(|epoch| &epoch.segments).map(|stored| stored.key.0.last_txid);
            ends.max() == Some(key.0.last_txid) && !(is_newest && key.0.epoch == self.newest_epoch())
        });
        is_sign || run.is_let_go(gap)
    }

    /// Whether a gap begins where retention begins one: behind the segment with a state that it keeps by itself, which is that of a
    /// snapshot or a mark.
    fn is_kept_before(&self, run: &Run<'_>, gap: Missing) -> bool {
        let usable = run.snapshots.iter().filter_map(|planned| self.view.usable(run, planned));
        let marks = self.survey.marks.iter().map(|mark| mark.txid);
        let mut kept = usable.map(|tail| tail.footer.info.last_txid).chain(marks);
        let end = gap.first_txid - 1;
        kept.any(|txid| end == txid || (txid < end && run.segment_of(txid).is_some_and(|held| held.last_txid == end)))
    }

    /// What a snapshot has seen behind the last segment was lost. Of a line that was left it may have been let go: the newest snapshot
    /// stays as what the next one is based on, whatever line it is of.
    fn check_end(&mut self, run: &Run<'_>, is_newest: bool) {
        let newest = run.snapshots.iter().filter_map(|planned| self.view.tail(&planned.stored.key));
        let newest = newest.filter(|tail| tail.footer.info.key.epoch == run.epoch_of(u64::MAX));
        let Some(tail) = newest.max_by_key(|tail| tail.footer.info.last_txid) else { return };
        let last_txid = tail.footer.info.last_txid;
        if last_txid > run.last_txid {
            let gap = Missing { first_txid: run.last_txid + 1, last_txid };
            let what = format!("{}, which {} has seen", missing(run, gap), tail.footer.info.key);
            match is_newest {
                true => self.add(Finding::failed(LINES, log_of(run, gap), what)),
                false => self.found.notes.push(format!("{what}: the end of a line that was left")),
            }
        }
    }

    /// Whether the newest state of all can be restored.
    fn check_newest_state(&mut self, run: &Run<'_>, runs: &[Run<'_>]) {
        let ranges = self.view.ranges(run);
        if ranges.last().is_some_and(|range| range.last_txid == run.last_txid) {
            return;
        }
        let epoch = run.first_epoch();
        let is_anything_older = runs.iter().skip(1).any(|run| !self.view.ranges(run).is_empty());
        let is_without = run.snapshots.is_empty() && run.missing.is_empty();
        let had_snapshot = is_without && self.had_snapshot(run);
        let may_be_under_way = is_without && !had_snapshot;
        let object = EpochKey { epoch, writer: None };
        let finding = if may_be_under_way && is_anything_older {
            let sentence = format!(
                "epoch {epoch}, which began at {}, has no snapshot yet: until it is stored, only what was before it can be \
                 restored",
                format_time(run.claimed_ms())
            );
            Finding::degraded(LINES, object, sentence)
        } else if may_be_under_way {
            // Nothing at all can be restored: that is an answer of its own.
            return;
        } else {
            let txid = run.last_txid;
            let sentence = match ranges.last() {
                Some(range) => format!(
                    "the newest state, transaction {txid} of epoch {}, can't be restored; the last one that can be is {}",
                    run.epoch_of(txid),
                    range.last_txid
                ),
                None => format!(
                    "the newest state, transaction {txid} of epoch {}, can't be restored: no snapshot serves it{}",
                    run.epoch_of(txid),
                    if had_snapshot { ", though the first one was read whole more than an hour ago" } else { "" }
                ),
            };
            Finding::failed(LINES, object, sentence)
        };
        self.add(finding);
    }

    /// Whether a run without a snapshot must have had one: a fingerprint is known when the first snapshot is wholly read, and then
    /// it is stored in no time.
    fn had_snapshot(&self, run: &Run<'_>) -> bool {
        let tables = run.segments.iter().filter_map(|planned| self.survey.tables.get(&planned.stored.key));
        let states = tables.flatten().flat_map(|facts| facts.states.values());
        let mut known = states.filter(|state| state.fingerprint.is_some());
        known.any(|state| state.time_ms.saturating_add(GRACE_MS) < self.now_ms)
    }

    /// Lines that were left are kept for as long as they are inside of the window; nobody restores them without asking.
    fn check_left_lines(&mut self) {
        let caps = self.view.newest_caps();
        let mut known = BTreeSet::new();
        for epoch in self.view.left_epochs() {
            let runs = match self.view.runs(Some(epoch)) {
                Ok(runs) => runs,
                Err(RestoreError::Damaged { object, what, .. }) => {
                    let sentence = format!(
                        "{object} is damaged: {what}; the line of epoch {epoch}, which was left, can't be followed"
                    );
                    self.add(Finding::degraded(LINES, object, sentence));
                    continue;
                }
                Err(_) => continue,
            };
            for run in &runs {
                for &gap in &run.missing {
                    if !self.breaks_something(run, gap) || self.may_be_let_go(run, gap, false) {
                        continue;
                    }
                    let of = run.epoch_of(gap.first_txid);
                    let is_on_newest = caps.get(&of).is_some_and(|cap| gap.first_txid <= *cap);
                    if !is_on_newest && known.insert((of, gap.first_txid)) {
                        let sentence = format!("{} on a line that was left", missing(run, gap));
                        self.add(Finding::degraded(LINES, log_of(run, gap), sentence));
                    }
                }
            }
            if let Some(run) = runs.first() {
                self.check_end(run, false);
            }
        }
    }

    fn check_snapshots(&mut self) {
        let keys: Vec<SnapshotKey> = self.survey.tails.keys().copied().collect();
        for key in keys {
            let is_needed = self.needs.snapshots.contains(&key);
            if let Some(what) = self.view.damage(&key) {
                let what = without_location(what, &self.survey.history.location);
                self.add_weighed(SNAPSHOTS, key, &what, is_needed);
            }
            if let Some(what) = self.survey.wrong_indexes.get(&key) {
                self.add_weighed(SNAPSHOTS, key, what, is_needed);
            }
            self.check_sources(key);
        }
    }

    fn check_sources(&mut self, key: SnapshotKey) {
        let Some(tail) = self.view.tail(&key) else { return };
        if self.view.is_source(key) {
            return;
        }
        let caps = self.view.newest_caps();
        let is_on_newest = caps.get(&key.epoch).is_some_and(|cap| tail.footer.info.last_txid <= *cap);
        let gone: Vec<SnapshotKey> =
            tail.sources.iter().filter(|source| !self.survey.history.has_snapshot(source)).copied().collect();
        for source in gone {
            let what = format!("{source} is missing: extents of {key} are in it");
            self.add_weighed(SNAPSHOTS, source, &what, is_on_newest);
        }
    }

    fn check_segments(&mut self) {
        let sizes = self.page_sizes();
        for (key, table) in &self.survey.tables {
            let is_needed = self.needs.segments.contains(key);
            match table {
                Err(what) => self.add_weighed(SEGMENTS, key, what, is_needed),
                Ok(facts) => {
                    if let Some(expected) = sizes.get(key).filter(|expected| **expected != facts.page_size) {
                        let found = facts.page_size;
                        let what = format!(
                            "{key} is damaged: its page size is {found}, that of the snapshots on its line is {expected}"
                        );
                        self.add_weighed(SEGMENTS, key, &what, is_needed);
                    }
                }
            }
        }
    }

    /// The page size that a segment on the newest line must have: that of the run's snapshots.
    fn page_sizes(&self) -> BTreeMap<SegmentKey, u32> {
        let mut sizes = BTreeMap::new();
        for run in self.view.runs(None).iter().flatten() {
            let usable = run.snapshots.iter().find_map(|planned| self.view.usable(run, planned));
            if let Some(tail) = usable {
                sizes.extend(run.segments.iter().map(|planned| (planned.stored.key, tail.footer.page_size)));
            }
        }
        sizes
    }

    /// Objects that tell of one state have to tell the same.
    fn check_agreement(&mut self) {
        let mut told: BTreeMap<(u32, u64), Vec<(SegmentKey, StateFacts)>> = BTreeMap::new();
        for (key, table) in &self.survey.tables {
            for (&txid, facts) in table.iter().flat_map(|facts| &facts.states) {
                told.entry((key.0.epoch, txid)).or_default().push((*key, *facts));
            }
        }
        for ((_, txid), facts) in &told {
            let (first, expected) = facts[0];
            for (other, _) in facts[1..].iter().filter(|(_, facts)| !agree(facts, &expected)) {
                let is_needed = self.needs.segments.contains(&first) || self.needs.segments.contains(other);
                let what = format!("{first} and {other} contradict each other about transaction {txid}");
                self.add_weighed(SEGMENTS, other, &what, is_needed);
            }
        }
        for key in self.survey.tails.keys() {
            let Some(info) = self.view.tail(key).map(|tail| tail.footer.info) else { continue };
            let own =
                StateFacts { time_ms: info.time_ms, size_pages: info.size_pages, fingerprint: Some(info.fingerprint) };
            let facts = told.get(&(key.epoch, info.last_txid)).into_iter().flatten();
            if let Some((segment, _)) = facts.into_iter().find(|(_, facts)| !agree(facts, &own)) {
                let txid = info.last_txid;
                let what = format!("{key} and {segment} contradict each other about transaction {txid}");
                let is_needed = self.needs.snapshots.contains(key) || self.needs.segments.contains(segment);
                self.add_weighed(SNAPSHOTS, key, &what, is_needed);
            }
        }
    }

    fn check_marks(&mut self) {
        for (key, what) in &self.survey.wrong_marks {
            let sentence =
                format!("{what}; which state it keeps is not known, and nothing is pruned as long as it is there");
            self.add(Finding::failed(MARKS, key, sentence));
        }
        for mark in &self.survey.marks {
            if !self.view.is_restorable(mark.position()) {
                let key = format!("marks/{}", mark.name);
                let sentence = format!(
                    "the state of {key}, {}, can't be restored: nothing that is there serves it",
                    mark.position()
                );
                self.add(Finding::failed(MARKS, key, sentence));
            }
        }
    }

    /// What the daemon said to have confirmed has to be there.
    fn check_presence(&mut self) {
        let presence = match &self.survey.presence {
            None => return,
            Some(Err(what)) => {
                return self.add(Finding::degraded(RECORDS, PRESENCE_KEY, format!("{what}; no restore needs it")));
            }
            Some(Ok(presence)) => presence,
        };
        let newest = self.newest_epoch();
        if presence.epoch > newest {
            let key = EpochKey { epoch: presence.epoch, writer: None };
            let sentence = format!("{key} is missing: its daemon confirmed {}", presence.position());
            return self.add(Finding::failed(RECORDS, key, sentence));
        }
        let Ok(runs) = self.view.runs(None) else { return };
        if let Some(run) = runs.first().filter(|run| presence.epoch == newest && presence.txid > run.last_txid) {
            let gap = Missing { first_txid: run.last_txid + 1, last_txid: presence.txid };
            let sentence = format!("{}, which the daemon confirmed", missing(run, gap));
            self.add(Finding::failed(LINES, log_of(run, gap), sentence));
        }
    }

    /// Objects that belong to nothing: leftovers, or somebody else's.
    fn check_strangers(&mut self) {
        let newest = self.newest_epoch();
        let is_told = |key: &&String| epoch_of_object(key).is_some_and(|epoch| epoch > newest);
        let strangers = self.survey.history.strangers.iter().filter(|key| !is_told(key));
        let strangers: BTreeSet<&String> = strangers.chain(&self.survey.strangers).collect();
        let Some(first) = strangers.first() else { return };
        let named: Vec<&str> = strangers.iter().take(NAMED_AT_MOST).map(|key| key.as_str()).collect();
        let rest = strangers.len().saturating_sub(NAMED_AT_MOST);
        let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        let sentence = format!("not of this replica, or left over: {}{more}", named.join(", "));
        self.add(Finding::degraded(STRANGERS, first, sentence));
    }

    /// With the retention known, every state of its window should be there; but it may have been shorter before.
    fn check_window(&mut self, settings: &RetentionSettings) {
        let Some(window_ms) = settings.window_ms else { return };
        let start_ms = self.now_ms.saturating_sub(window_ms);
        let Ok(runs) = self.view.runs(None) else { return };
        let mut lost = Vec::new();
        for run in &runs {
            for &gap in run.missing.iter().filter(|gap| run.is_let_go(**gap)) {
                let was_lost = self.end_ms(run, gap).is_some_and(|end_ms| end_ms > start_ms + GRACE_MS);
                if was_lost {
                    lost.push((log_of(run, gap), missing(run, gap)));
                }
            }
        }
        for (object, what) in lost {
            let sentence = format!(
                "{what}, and the configuration keeps every state since {}: they were lost, or less was kept before",
                format_time(start_ms)
            );
            self.add(Finding::degraded(LINES, object, sentence));
        }
    }

    /// What should have been let go long ago is still there, though a daemon was at work: its deletions are refused. One that was
    /// idle or stopped lets nothing go, and that is no fault.
    fn check_deletions(&mut self, settings: &RetentionSettings) {
        let history = &self.survey.history;
        let segments = history.epochs.values().flat_map(|epoch| epoch.segments.iter().map(|stored| stored.stored_ms));
        let stored: BTreeSet<u64> = segments.filter(|stored_ms| *stored_ms != u64::MAX).collect();
        let Some(newest_ms) = stored.last().copied() else { return };
        let day_before_ms = newest_ms.saturating_sub(DELETIONS_MAY_TAKE_MS);
        let was_at_work = stored.range(day_before_ms..=newest_ms.saturating_sub(2 * GRACE_MS)).next().is_some();
        let planned = plan(history, &self.survey.tails, &self.survey.marks, settings, day_before_ms);
        let Some(planned) = planned.ok().filter(|_| was_at_work) else { return };
        let Some(example) = planned.going.first() else { return };
        let sentence = format!(
            "{} objects, {} for one, should have been let go more than a day ago and are still there: are deletions refused?",
            planned.going.len(),
            example.key
        );
        self.add(Finding::degraded(STRANGERS, &example.key, sentence));
    }

    /// Until when the last state of a gap was the state; `None` when nothing tells.
    fn end_ms(&self, run: &Run<'_>, gap: Missing) -> Option<u64> {
        let snapshots = run.snapshots.iter().map(|planned| planned.stored.key);
        let begun = snapshots.filter(|key| key.txid >= gap.last_txid).map(|key| key.time_ms).min();
        let next = run.segment_of(gap.last_txid + 1).map(|planned| planned.stored.key.0.time_ms);
        begun.into_iter().chain(next).min()
    }
}

/// Whether two objects tell the same of a state. A fingerprint that is not known contradicts none.
fn agree(left: &StateFacts, right: &StateFacts) -> bool {
    let same_fingerprint = match (left.fingerprint, right.fingerprint) {
        (Some(left), Some(right)) => left == right,
        _ => true,
    };
    same_fingerprint && left.time_ms == right.time_ms && left.size_pages == right.size_pages
}

fn missing(run: &Run<'_>, gap: Missing) -> String {
    let epoch = run.epoch_of(gap.first_txid);
    match gap.first_txid == gap.last_txid {
        true => format!("transaction {} of epoch {epoch} is missing", gap.first_txid),
        false => format!("transactions {} to {} of epoch {epoch} are missing", gap.first_txid, gap.last_txid),
    }
}

/// Where what is missing would be.
fn log_of(run: &Run<'_>, gap: Missing) -> String {
    format!("log/{:08x}/{:016x}-", run.epoch_of(gap.first_txid), gap.first_txid)
}

/// The whole report is about one place.
fn without_location(what: &str, location: &str) -> String {
    what.replacen(&format!(" in {location}"), "", 1)
}
