//! The plan of a restore: which state, from which objects. A value that can be printed before anything is done.

use std::fmt;

use super::RestoreError;
use super::history::{History, Stored};
use super::run::{Missing, PlannedSegment, PlannedSnapshot, Run, runs};
use super::tail::{SnapshotTail, read_snapshot_tail, read_table};
use crate::clock::format_time;
use crate::format::Position;
use crate::format::key::{SNAPSHOTS_PREFIX, SegmentKey, SnapshotKey};
use crate::format::segment::Transaction;
use crate::format::snapshot::{SnapshotFooter, SnapshotInfo};
use crate::store::SharedStore;

/// A first snapshot that is wholly read is stored within this time, in milliseconds, where anything is stored at all.
const FIRST_SNAPSHOT_WITHIN_MS: u64 = 60 * 60 * 1000;

/// What to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The newest state.
    Latest,
    /// The state at a time, in milliseconds since 1970: after the last transaction whose time is not later.
    Time(u64),
    /// The state after a transaction.
    Txid(u64),
    /// The state that the last transaction found that changed the schema.
    BeforeSchemaChange,
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
    pub segments: Vec<PlannedSegment>,
    /// What the person who asked should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Bytes of all objects that the plan names. Not all of them need be read.
    #[must_use]
    pub fn objects_len_bytes(&self) -> u64 {
        self.snapshot.len_bytes + self.segments_len_bytes()
    }

    /// Bytes of all segments that it names.
    #[must_use]
    pub fn segments_len_bytes(&self) -> u64 {
        self.segments.iter().map(|planned| planned.stored.len_bytes).sum()
    }

    /// What a restore has to do, in bytes: the database is written, and segments are worked off.
    #[must_use]
    pub fn work_len_bytes(&self) -> u64 {
        self.database_len_bytes() + self.segments_len_bytes()
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
        writeln!(out, "segments   {} ({} bytes)", self.segments.len(), self.segments_len_bytes())?;
        write!(out, "fingerprint {:016x}", self.fingerprint)
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
    let planner = Planner::new(store, history, epoch).await?;
    let (index, mut plan) = planner.chosen(target).await?;
    plan.notes = planner.notes(index, target, &plan).await?;
    Ok(plan)
}

fn distance(asked_ms: u64, time_ms: u64) -> String {
    let before_ms = asked_ms.saturating_sub(time_ms);
    let in_units = |unit_ms: u64, unit: &str| format!("{:.1} {unit}", before_ms as f64 / unit_ms as f64);
    let shown = match before_ms {
        0..1000 => format!("{before_ms} ms"),
        1000..60_000 => in_units(1000, "s"),
        60_000..3_600_000 => in_units(60_000, "min"),
        3_600_000..86_400_000 => in_units(3_600_000, "h"),
        _ => in_units(86_400_000, "d"),
    };
    format!("the chosen transaction is the last one not later than the time asked for, {shown} before it")
}

struct Planner<'a> {
    store: &'a SharedStore,
    history: &'a History,
    location: &'a str,
    /// The epoch that the line ends in.
    line: u32,
    runs: Vec<Run<'a>>,
    /// The end of the newest snapshot of the newest epoch, which is read for each plan.
    newest_tail: Option<SnapshotTail>,
}

/// A state whose schema is known.
#[derive(Debug, Clone, Copy)]
struct SchemaState {
    txid: u64,
    cookie: u32,
    /// Whether its transaction changed it.
    is_changed: bool,
}

/// What a walk back through the states of a line has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SchemaWalk {
    GoesOn,
    /// The last change of the schema found this state.
    Found(u64),
    /// There was a change, and nobody knows where.
    Unknown,
}

impl SchemaState {
    fn after(transaction: &Transaction) -> Self {
        let info = transaction.info;
        Self { txid: transaction.txid, cookie: info.schema_cookie, is_changed: info.schema_changed }
    }

    fn of_snapshot(info: &SnapshotInfo) -> Self {
        Self { txid: info.last_txid, cookie: info.schema_cookie, is_changed: false }
    }

    /// With the last state of its run, and the schema of the states behind it, as far as they are known.
    fn step(self, last_txid: u64, cookie_behind: Option<u32>) -> SchemaWalk {
        let is_end = self.txid == last_txid;
        match cookie_behind {
            // The next run began with another schema: it was changed unseen, after this state.
            Some(cookie) if cookie != self.cookie && is_end => SchemaWalk::Found(self.txid),
            Some(cookie) if cookie != self.cookie => SchemaWalk::Unknown,
            None if !is_end => SchemaWalk::Unknown,
            _ if self.is_changed => SchemaWalk::Found(self.txid.saturating_sub(1)),
            _ => SchemaWalk::GoesOn,
        }
    }
}

/// What a state can be restored from.
enum Served {
    By(Stored<SnapshotKey>, SnapshotFooter),
    /// A snapshot would serve, if transactions after it were not missing.
    ButFor(Missing),
    /// The first snapshot would serve, if the second one, which it has extents in, were not missing.
    ButForSource(SnapshotKey, SnapshotKey),
    ByNothing,
}

impl<'a> Planner<'a> {
    async fn new(store: &'a SharedStore, history: &'a History, epoch: Option<u32>) -> Result<Self, RestoreError> {
        let line = history.line(epoch)?;
        let last_epoch = line.first().map_or(0, |(epoch, _)| epoch.record.epoch);
        let (location, runs) = (history.location.as_str(), runs(&line));
        let mut planner = Self { store, history, location, line: last_epoch, runs, newest_tail: None };
        if planner.is_newest_line() {
            planner.extend_to_what_was_seen().await?;
        }
        Ok(planner)
    }

    /// What the newest snapshot has seen was confirmed, whether there are segments that tell of it or not. (Of a line that was left
    /// the end may have been let go, and a snapshot stay for what a newer one has in it.)
    async fn extend_to_what_was_seen(&mut self) -> Result<(), RestoreError> {
        let Some(stored) = self.runs.first().and_then(Run::newest_of_last_epoch) else { return Ok(()) };
        let seen_txid = match self.tail(&stored).await {
            Ok(tail) => self.newest_tail.insert(tail).footer.info.last_txid,
            // Whoever needs its end asks for it again, and is told; an older state does not.
            Err(_) => stored.key.txid,
        };
        if let Some(run) = self.runs.first_mut() {
            run.extend_to(seen_txid);
        }
        Ok(())
    }
}

impl Planner<'_> {
    /// The plan of the state that the target means, without notes, and the number of its run.
    async fn chosen(&self, target: Target) -> Result<(usize, Plan), RestoreError> {
        if target == Target::BeforeSchemaChange {
            return self.chosen_before_schema_change().await;
        }
        for (index, run) in self.runs.iter().enumerate() {
            if let Some(txid) = self.choose(run, target).await?
                && let Some(plan) = self.plan_for(run, txid, target).await?
            {
                return Ok((index, plan));
            }
            // What an older run ended with was not the state at that time, when the state was in this one and was let go.
            if let Target::Time(asked_ms) = target
                && asked_ms >= run.claimed_ms()
                && self.has_lost_beginning(run).await?
            {
                break;
            }
        }
        Err(self.out_of_range(target).await?)
    }

    /// Where what the last change of the schema found can't be restored, an older change is no answer.
    async fn chosen_before_schema_change(&self) -> Result<(usize, Plan), RestoreError> {
        let target = Target::BeforeSchemaChange;
        if let Some((index, txid)) = self.before_schema_change().await?
            && let Some(plan) = self.plan_for(&self.runs[index], txid, target).await?
        {
            return Ok((index, plan));
        }
        Err(self.out_of_range(target).await?)
    }

    /// Whether the line is the one that is restored by default.
    fn is_newest_line(&self) -> bool {
        self.history.epochs.keys().next_back() == Some(&self.line)
    }

    /// The state of `run` that the target means, if it is in it. Whether it can be restored is another question. What a change of the
    /// schema found is looked for over all runs.
    async fn choose(&self, run: &Run<'_>, target: Target) -> Result<Option<u64>, RestoreError> {
        match target {
            Target::Latest => Ok(Some(run.last_txid)),
            Target::Txid(txid) => Ok((run.first_txid..=run.last_txid).contains(&txid).then_some(txid)),
            Target::BeforeSchemaChange => Ok(None),
            Target::Time(asked_ms) => {
                let mut known = match self.last_transaction_at(run, asked_ms).await? {
                    None => self
                        .first_restorable(run)
                        .await?
                        .filter(|info| info.time_ms <= asked_ms)
                        .map(|info| info.last_txid),
                    known => known,
                };
                // Where those that follow are missing, snapshots behind them may tell when they were.
                while let Some(txid) = known
                    && let Some(gap) = run.missing_between(txid, txid.saturating_add(1))
                {
                    let behind = self.snapshots_behind(run, txid).await?;
                    match behind.iter().find(|info| info.time_ms <= asked_ms) {
                        Some(info) => known = Some(info.last_txid),
                        None if behind.iter().any(|info| info.last_txid == gap.first_txid) => break,
                        // Nobody knows: this transaction can't be restored, and that is the answer.
                        None => return Ok(Some(gap.first_txid)),
                    }
                }
                Ok(known)
            }
        }
    }

    /// What the snapshots of `run` after a transaction are of, newest first.
    async fn snapshots_behind(&self, run: &Run<'_>, txid: u64) -> Result<Vec<SnapshotInfo>, RestoreError> {
        let mut behind = Vec::new();
        for planned in run.snapshots.iter().take_while(|planned| planned.stored.key.txid > txid) {
            behind.extend(self.usable(run, planned).await?);
        }
        Ok(behind)
    }

    /// The state that the last change of the schema found, with the number of its run; `None` when nothing proves which one that is.
    async fn before_schema_change(&self) -> Result<Option<(usize, u64)>, RestoreError> {
        let mut cookie_behind = None;
        for (index, run) in self.runs.iter().enumerate() {
            match self.walk_schemas(run, &mut cookie_behind).await? {
                SchemaWalk::GoesOn => {}
                SchemaWalk::Found(txid) => return Ok(Some((index, txid))),
                SchemaWalk::Unknown => return Ok(None),
            }
            // A change may be among what was let go.
            if run.has_lost_beginning() {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// Walks back through the states of a run whose schema is known: those after transactions that are there and, where some are
    /// missing, those of snapshots.
    async fn walk_schemas(&self, run: &Run<'_>, cookie_behind: &mut Option<u32>) -> Result<SchemaWalk, RestoreError> {
        let is_whole = run.missing.is_empty() && !run.segments.is_empty();
        let snapshots = if is_whole { Vec::new() } else { self.snapshots_behind(run, 0).await? };
        let mut snapshots = snapshots.into_iter().peekable();
        for planned in run.segments.iter().rev().map(Some).chain([None]) {
            let mut states = Vec::new();
            let after_txid = planned.map_or(0, |planned| planned.last_txid);
            while let Some(info) = snapshots.next_if(|info| info.last_txid > after_txid) {
                states.push(SchemaState::of_snapshot(&info));
            }
            if let Some(planned) = planned {
                let transactions = self.table(&planned.stored).await?;
                let counting = transactions.iter().rev().filter(|transaction| transaction.txid <= planned.last_txid);
                states.extend(counting.map(SchemaState::after));
            }
            for state in states {
                match state.step(run.last_txid, *cookie_behind) {
                    SchemaWalk::GoesOn => *cookie_behind = Some(state.cookie),
                    ended => return Ok(ended),
                }
            }
        }
        Ok(SchemaWalk::GoesOn)
    }

    /// The last transaction in a segment of `run` that is not later.
    async fn last_transaction_at(&self, run: &Run<'_>, asked_ms: u64) -> Result<Option<u64>, RestoreError> {
        let later = run.segments.partition_point(|planned| planned.stored.key.0.time_ms <= asked_ms);
        let mut last = later.checked_sub(1).map(|before| run.segments[before].last_txid);
        // The time in a segment's name can be that of a transaction that does not count, so the next one is asked as well.
        for planned in &run.segments[later..] {
            let transactions = self.table(&planned.stored).await?;
            let counts = |transaction: &&Transaction| {
                transaction.txid <= planned.last_txid && transaction.info.time_ms <= asked_ms
            };
            let Some(found) = transactions.iter().rev().find(counts) else { break };
            last = Some(found.txid);
            if found.txid < planned.last_txid {
                break;
            }
        }
        Ok(last)
    }

    /// What the state after `txid` can be restored from: the newest snapshot that is not newer.
    async fn served(&self, run: &Run<'_>, txid: u64) -> Result<Served, RestoreError> {
        let mut served = Served::ByNothing;
        for planned in run.snapshots.iter().filter(|planned| planned.stored.key.txid <= txid) {
            let SnapshotTail { footer, sources } = self.tail(&planned.stored).await?;
            if footer.info.last_txid > txid.min(planned.last_txid) {
                continue;
            }
            if let Some(source) = self.missing_source(&sources) {
                served = Served::ButForSource(planned.stored.key, source);
                continue;
            }
            // An older snapshot would need what is missing, too.
            return Ok(match run.missing_between(planned.stored.key.txid, txid) {
                Some(gap) => Served::ButFor(gap),
                None => Served::By(planned.stored, footer),
            });
        }
        Ok(served)
    }

    fn missing_source(&self, sources: &[SnapshotKey]) -> Option<SnapshotKey> {
        sources.iter().find(|source| !self.history.has_snapshot(source)).copied()
    }

    /// Whether a snapshot is there only because a newer one has extents in it: then what it needs itself may be gone.
    async fn is_only_source(&self, key: SnapshotKey) -> Result<bool, RestoreError> {
        let snapshots = self.history.epochs.values().flat_map(|epoch| &epoch.snapshots);
        for stored in snapshots.filter(|stored| stored.key > key) {
            if self.tail(stored).await?.sources.contains(&key) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The plan for the state after `txid`; `None` when no snapshot of the run serves it.
    async fn plan_for(&self, run: &Run<'_>, txid: u64, target: Target) -> Result<Option<Plan>, RestoreError> {
        let (snapshot, footer) = match self.served(run, txid).await? {
            Served::By(snapshot, footer) => (snapshot, footer),
            // The newest state is never let go.
            Served::ButFor(gap) if run.is_let_go(gap) && !(target == Target::Latest && self.is_newest_line()) => {
                return Err(self.out_of_range(target).await?);
            }
            Served::ButFor(gap) => return Err(self.gap(run, gap).await?),
            Served::ButForSource(of, source) if !self.is_only_source(of).await? => {
                return Err(RestoreError::damaged(self.location, &source, &"it is missing"));
            }
            Served::ButForSource(..) | Served::ByNothing => return Ok(None),
        };
        let (time_ms, size_pages, fingerprint) = if footer.info.last_txid == txid {
            (footer.info.time_ms, footer.info.size_pages, footer.info.fingerprint)
        } else {
            self.state_after(run, txid).await?
        };
        Ok(Some(Plan {
            location: self.location.to_owned(),
            position: Position { epoch: run.epoch_of(txid), txid },
            time_ms,
            size_pages,
            page_size: footer.page_size,
            fingerprint,
            snapshot,
            snapshot_footer: footer,
            segments: run.segments_between(snapshot.key.txid, txid),
            notes: Vec::new(),
        }))
    }

    /// The error that names what is missing, and the newest state before it.
    async fn gap(&self, run: &Run<'_>, gap: Missing) -> Result<RestoreError, RestoreError> {
        let mut before = gap;
        let newest = loop {
            let txid = before.first_txid - 1;
            match self.served(run, txid).await? {
                Served::By(..) => break Some(txid),
                Served::ButFor(earlier) => before = earlier,
                Served::ButForSource(..) | Served::ByNothing => break None,
            }
        };
        let location = self.location.to_owned();
        Ok(RestoreError::Gap { location, first_missing: gap.first_txid, last_missing: gap.last_txid, newest })
    }

    /// Time, size and fingerprint after a transaction.
    async fn state_after(&self, run: &Run<'_>, txid: u64) -> Result<(u64, u32, u64), RestoreError> {
        let Some(planned) = run.segment_of(txid) else {
            return Err(self.gap(run, Missing { first_txid: txid, last_txid: txid }).await?);
        };
        let key = &planned.stored.key;
        let transactions = self.table(&planned.stored).await?;
        let transaction = transactions.iter().find(|transaction| transaction.txid == txid);
        let lacks =
            |what: &str| RestoreError::damaged(self.location, key, &format!("it lacks {what} of transaction {txid}"));
        let info = transaction.ok_or_else(|| lacks("the pages"))?.info;
        Ok((info.time_ms, info.size_pages, info.fingerprint.ok_or_else(|| lacks("the fingerprint"))?))
    }

    async fn table(&self, stored: &Stored<SegmentKey>) -> Result<Vec<Transaction>, RestoreError> {
        read_table(self.store, self.location, stored).await.map(|(_, table)| table.transactions)
    }

    async fn tail(&self, stored: &Stored<SnapshotKey>) -> Result<SnapshotTail, RestoreError> {
        let known = self.newest_tail.as_ref().filter(|tail| tail.footer.info.key == stored.key);
        match known {
            Some(tail) => Ok(tail.clone()),
            None => read_snapshot_tail(self.store, self.location, stored).await,
        }
    }

    /// What the person who asked should know of the state that was chosen, in run number `index`.
    async fn notes(&self, index: usize, target: Target, plan: &Plan) -> Result<Vec<String>, RestoreError> {
        let mut notes = Vec::new();
        let is_end_of_run = self.runs.get(index).is_some_and(|run| run.last_txid == plan.position.txid);
        let is_asked_for = matches!(target, Target::Txid(_));
        if is_end_of_run && !is_asked_for {
            // A time is before the start of all but the next run, or the newest of them would have served it; and the schema was changed
            // before the next one.
            let newer =
                if target == Target::Latest { &self.runs[..index] } else { &self.runs[index.saturating_sub(1)..index] };
            for run in newer {
                notes.push(self.why_not(run).await?);
            }
        }
        if is_end_of_run && index == 0 && !self.is_newest_line() && !is_asked_for {
            notes.push(format!("the line of epoch {} was left; this is its end as far as it is kept", self.line));
        }
        if target == Target::BeforeSchemaChange {
            for run in &self.runs[..index] {
                if run.segments.is_empty() && self.first_restorable(run).await?.is_none() {
                    let epoch = run.first_epoch();
                    notes.push(format!("what schema epoch {epoch} began with is not known: nothing of it is there"));
                }
            }
        }
        if let Target::Time(asked_ms) = target {
            notes.push(distance(asked_ms, plan.time_ms));
            notes.extend(self.left_since(asked_ms, plan).await?);
        }
        Ok(notes)
    }

    /// If the database had another state at that time, on a line that a restore has left since: where that one is.
    async fn left_since(&self, asked_ms: u64, plan: &Plan) -> Result<Option<String>, RestoreError> {
        let mut newest_first = self.history.epochs.iter().rev();
        let Some((&then, _)) = newest_first.find(|(_, epoch)| epoch.record.claimed_ms <= asked_ms) else {
            return Ok(None);
        };
        // What is on both lines is the same on both.
        let is_other = match self.runs.iter().find_map(|run| run.end_of(then)) {
            Some(end_txid) => then != self.line && end_txid == plan.position.txid,
            None => self.is_newest_line(),
        };
        if !is_other {
            return Ok(None);
        }
        let other = Planner::new(self.store, self.history, Some(then)).await;
        let chosen = match other {
            Ok(other) => other.chosen(Target::Time(asked_ms)).await,
            Err(error) => Err(error),
        };
        match chosen {
            Ok((_, other)) if other.position != plan.position => Ok(Some(format!(
                "at that time the database was on the line of epoch {then}, which was left since: --epoch {then} gives what it \
                 held, {}",
                other.position
            ))),
            Ok(_)
            | Err(
                RestoreError::OutOfRange { .. } | RestoreError::NothingYet { .. } | RestoreError::NoSuchEpoch { .. },
            ) => Ok(None),
            // A note is no reason to refuse what was asked for.
            Err(error) => Ok(Some(format!(
                "at that time the database was on the line of epoch {then}, which was left since; what it held can't be found \
                 out: {error}"
            ))),
        }
    }

    /// Why a newer run did not serve.
    async fn why_not(&self, newer: &Run<'_>) -> Result<String, RestoreError> {
        let epoch = newer.first_epoch();
        Ok(match self.first_restorable(newer).await? {
            None => format!(
                "epoch {epoch} began with a database that had changed unseen, and no snapshot of it is there: this is the \
                 last state known before it"
            ),
            Some(_) => format!(
                "between this state and the start of epoch {epoch} the database may have changed unseen: this is the last \
                 state known before"
            ),
        })
    }

    /// The first state of a run that can be restored: that of its oldest snapshot that is whole.
    async fn first_restorable(&self, run: &Run<'_>) -> Result<Option<SnapshotInfo>, RestoreError> {
        for planned in run.snapshots.iter().rev() {
            if let Some(info) = self.usable(run, planned).await? {
                return Ok(Some(info));
            }
        }
        Ok(None)
    }

    /// What a snapshot is of, if a restore can begin with it.
    async fn usable(&self, run: &Run<'_>, planned: &PlannedSnapshot) -> Result<Option<SnapshotInfo>, RestoreError> {
        let SnapshotTail { footer: SnapshotFooter { info, .. }, sources } = self.tail(&planned.stored).await?;
        let is_usable = info.last_txid <= planned.last_txid
            && run.missing_between(planned.stored.key.txid, info.last_txid).is_none()
            && self.missing_source(&sources).is_none();
        Ok(is_usable.then_some(info))
    }

    /// Whether the run may have begun with states that were let go: then it is not known whether one of them was asked for.
    async fn has_lost_beginning(&self, run: &Run<'_>) -> Result<bool, RestoreError> {
        let first = self.first_restorable(run).await?;
        Ok(run.has_lost_beginning() || first.is_some_and(|first| first.key.txid > run.first_txid))
    }

    async fn out_of_range(&self, target: Target) -> Result<RestoreError, RestoreError> {
        let asked = match target {
            Target::Latest => "the newest state".to_owned(),
            Target::BeforeSchemaChange => "a state before a change of the schema".to_owned(),
            Target::Time(asked_ms) => format!("the time {}", format_time(asked_ms)),
            Target::Txid(txid) => format!("transaction {txid}"),
        };
        let mut ranges = Vec::new();
        for run in self.runs.iter().rev() {
            ranges.extend(self.ranges(run).await?);
        }
        if ranges.is_empty() {
            return self.nothing().await;
        }
        Ok(RestoreError::OutOfRange { location: self.location.to_owned(), asked, range: ranges.join("; ") })
    }

    /// Why nothing can be restored: the first snapshot is not there yet, or all were lost.
    async fn nothing(&self) -> Result<RestoreError, RestoreError> {
        // Those of a line that was left are let go.
        if self.is_newest_line() {
            for run in &self.runs {
                if let Some(proof) = self.proof_of_snapshot(run).await? {
                    let what = "every snapshot that a restore could begin with is missing, or was never stored, though";
                    return Ok(RestoreError::damaged(self.location, &SNAPSHOTS_PREFIX, &format!("{what} {proof}")));
                }
            }
        }
        Ok(RestoreError::NothingYet { location: self.location.to_owned() })
    }

    /// What proves that a run had a snapshot. No clock is asked: what is restored somewhere else may be old.
    async fn proof_of_snapshot(&self, run: &Run<'_>) -> Result<Option<String>, RestoreError> {
        let epoch = run.first_epoch();
        if run.had_snapshot() {
            return Ok(Some(format!("what epoch {epoch} began with was let go, and one stays where that is done")));
        }
        let is_read = self.was_read_whole(run).await?;
        Ok(is_read.then(|| {
            format!(
                "the first one was read whole more than an hour before the last transaction since epoch {epoch} began"
            )
        }))
    }

    /// Whether the first snapshot of a run was read whole long before its last transaction: from then on fingerprints are known.
    async fn was_read_whole(&self, run: &Run<'_>) -> Result<bool, RestoreError> {
        let last_ms = run.segments.last().map_or(0, |planned| planned.stored.key.0.time_ms);
        let Some(long_before_ms) = last_ms.checked_sub(FIRST_SNAPSHOT_WITHIN_MS + 1) else { return Ok(false) };
        let Some(txid) = self.last_transaction_at(run, long_before_ms).await? else { return Ok(false) };
        let Some(planned) = run.segment_of(txid) else { return Ok(false) };
        let transactions = self.table(&planned.stored).await?;
        Ok(transactions.iter().any(|transaction| transaction.txid <= txid && transaction.info.fingerprint.is_some()))
    }

    /// What of a run can be restored, in words: from a snapshot on up to the next gap, and again from a snapshot behind it.
    async fn ranges(&self, run: &Run<'_>) -> Result<Vec<String>, RestoreError> {
        let (mut ranges, mut known_to_txid) = (Vec::new(), 0);
        for planned in run.snapshots.iter().rev() {
            let Some(first) = self.usable(run, planned).await?.filter(|first| first.last_txid > known_to_txid) else {
                continue;
            };
            let gap = run.missing_between(first.last_txid, u64::MAX);
            known_to_txid = gap.map_or(run.last_txid, |gap| gap.first_txid - 1);
            ranges.push(self.range(run, &first, known_to_txid).await?);
        }
        Ok(ranges)
    }

    async fn range(&self, run: &Run<'_>, first: &SnapshotInfo, last_txid: u64) -> Result<String, RestoreError> {
        let last_ms = match run.segment_of(last_txid) {
            Some(planned) if planned.last_txid < planned.stored.key.0.last_txid => {
                self.state_after(run, last_txid).await?.0
            }
            Some(planned) => planned.stored.key.0.time_ms.max(first.time_ms),
            None => first.time_ms,
        };
        let (from, to) = (format_time(first.time_ms), format_time(last_ms));
        Ok(format!("transactions {} to {last_txid} ({from} to {to})", first.last_txid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_schema_is_found_by_what_was_before_it() {
        let step = |txid, cookie, is_changed, behind| SchemaState { txid, cookie, is_changed }.step(9, behind);
        assert_eq!(step(9, 5, false, None), SchemaWalk::GoesOn, "the newest state");
        assert_eq!(step(8, 5, false, None), SchemaWalk::Unknown, "not the newest one");
        assert_eq!(step(9, 5, true, None), SchemaWalk::Found(8));
        assert_eq!(step(7, 5, false, Some(5)), SchemaWalk::GoesOn);
        assert_eq!(step(7, 5, true, Some(5)), SchemaWalk::Found(6));
        assert_eq!(step(7, 4, true, Some(5)), SchemaWalk::Unknown, "changed again, among those that are missing");
        assert_eq!(step(9, 4, true, Some(5)), SchemaWalk::Found(9), "changed again, unseen, before the next run");
    }
}
