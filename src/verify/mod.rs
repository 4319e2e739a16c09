//! Whether what is stored can be restored: what objects say of each other, what they hold, and real restores.
//!
//! A daemon ships, merges and prunes while we look. So nothing counts as damage that only one listing tells of: what was found is
//! looked for again with a new one. And a store that can't be reached is an error, never a verdict.

pub mod against;
mod budget;
mod data;
mod drill;
mod freshness;
mod lines;
mod points;
mod random;
pub mod report;
mod structure;
mod survey;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use self::against::{Compared, Live, compare};
use self::budget::Budget;
use self::data::{Damage, Need};
use self::drill::{Drilled, Integrity, check_integrity};
use self::lines::{Needs, Range, View};
use self::random::Numbers;
use self::report::{Check, Finding, Newest, Report, Verdict};
use self::structure::Found;
use self::survey::{Known, Look, Survey};
use crate::clock::Clock;
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::plan::{Target, plan};
use crate::retain::RetentionSettings;
use crate::retain::tails::Tail;
use crate::store::SharedStore;
use crate::store::metered::{Meter, Metered, Traffic};

/// So often a replica is looked at until two looks agree.
const LOOKS: usize = 5;
/// Between two looks: whoever is in the middle of something gets on with it.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

const BLOCKS: &str = "blocks of segments";
const EXTENTS: &str = "extents of snapshots";
const COMPARISON: &str = "comparison with the live database";
const FRESHNESS: &str = "freshness";

/// How deep a verification goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// What the objects say of each other: listings, records, tables and indexes
    Structure,
    /// The structure; and every block and extent is read
    Data,
    /// The structure; and some states are restored, and checked by SQLite
    Drill,
}

/// What to verify.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How deep to go.
    pub depth: Depth,
    /// How many states are restored.
    pub points: u32,
    /// The share of blocks and extents that is read, from 0 to 1.
    pub share: f64,
    /// What makes random choices repeatable.
    pub seed: u64,
    /// What is not begun by then is not reached.
    pub max_duration: Option<Duration>,
    /// Where databases are restored to.
    pub scratch: PathBuf,
    /// Whether SQLite checks what is restored.
    pub checks_integrity: bool,
    /// How old the newest transaction may be.
    pub max_lag: Option<Duration>,
    /// What the replica should hold, where that is known.
    pub retention: Option<RetentionSettings>,
    /// The live database to compare with.
    pub live: Option<Live>,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The store, the replica or the scratch file.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The live database can't be read.
    #[error("{} can't be read: {what}", path.display())]
    Live {
        /// The database.
        path: PathBuf,
        /// What SQLite says.
        what: String,
    },
}

/// Verifies a replica.
///
/// # Errors
/// When the store fails, there is no replica, or nothing is in it yet; when a local file fails. Damage is in the report.
pub async fn verify(store: SharedStore, settings: &Settings, clock: Arc<dyn Clock>) -> Result<Report, VerifyError> {
    let (metered, meter) = Metered::new(store);
    let store: SharedStore = Arc::new(metered);
    let mut verifier = Verifier {
        meter,
        settings,
        report: Report::new(store.location(), settings.depth, settings.seed),
        budget: Budget::new(clock.clone(), settings.max_duration),
        numbers: Numbers::new(settings.seed),
        known: Known::default(),
        now_ms: clock.now_ms(),
        store,
        clock,
    };
    let begun = verifier.begin();
    verifier.run().await?;
    let Verifier { mut report, meter, clock, .. } = verifier;
    let traffic = meter.traffic();
    report.requests = traffic.requests;
    report.received_bytes = traffic.received_bytes;
    report.seconds = (clock.monotonic() - begun.at).as_secs_f64();
    report.settle();
    Ok(report)
}

/// Where the clock and the meter stood.
struct Begun {
    at: Duration,
    traffic: Traffic,
}

struct Verifier<'a> {
    store: SharedStore,
    meter: Meter,
    clock: Arc<dyn Clock>,
    settings: &'a Settings,
    budget: Budget,
    numbers: Numbers,
    known: Known,
    report: Report,
    now_ms: u64,
}

impl Verifier<'_> {
    async fn run(&mut self) -> Result<(), VerifyError> {
        let Some((survey, found)) = self.structure().await? else { return Ok(()) };
        self.take_over(&survey, found);
        self.find_newest(&survey).await?;
        match self.settings.depth {
            Depth::Structure => {}
            Depth::Data => self.data(&survey).await?,
            Depth::Drill => self.drill(&survey).await?,
        }
        self.freshness(&survey);
        self.comparison().await
    }

    fn begin(&self) -> Begun {
        Begun { at: self.clock.monotonic(), traffic: self.meter.traffic() }
    }

    /// Notes what was checked since `begun`.
    fn end(&mut self, begun: &Begun, name: &str, unit: &'static str, checked: u64, of: u64) {
        let traffic = self.meter.traffic();
        self.report.checks.push(Check {
            name: name.to_owned(),
            checked,
            of,
            unit,
            requests: traffic.requests - begun.traffic.requests,
            received_bytes: traffic.received_bytes - begun.traffic.received_bytes,
            seconds: (self.clock.monotonic() - begun.at).as_secs_f64(),
        });
    }

    /// Looks until two looks in a row agree on what is wrong, or nothing is. `None` when the replica can't be read at all, which is
    /// in the report then.
    async fn structure(&mut self) -> Result<Option<(Box<Survey>, Found)>, VerifyError> {
        let begun = self.begin();
        let mut before: Option<Found> = None;
        for look in 1.. {
            let (survey, mut found) =
                match survey::look(&self.store, &mut self.known, &self.budget, &mut self.numbers).await? {
                    Look::Whole(survey) => {
                        let found = structure::check(&survey, self.settings.retention.as_ref(), self.now_ms);
                        (Some(survey), found)
                    }
                    Look::Unreadable(errors) => {
                        (None, Found { findings: structure::unreadable(errors), notes: Vec::new() })
                    }
                };
            let is_settled = match &before {
                None => found.findings.is_empty() && survey.is_some(),
                Some(before) => found.findings.is_subset(&before.findings),
            };
            if !is_settled && look < LOOKS {
                before = Some(found);
                tokio::time::sleep(BETWEEN_LOOKS).await;
                continue;
            }
            if let Some(before) = before.filter(|_| !is_settled) {
                found.findings.retain(|finding| before.findings.contains(finding));
            }
            let Some(survey) = survey else {
                self.report.findings.extend(found.findings);
                self.end(&begun, structure::RECORDS, "records", 0, 0);
                return Ok(None);
            };
            self.note_structure(&begun, &survey);
            return Ok(Some((survey, found)));
        }
        Ok(None)
    }

    /// What the looks have cost is one sum: they read one thing beside the other.
    fn note_structure(&mut self, begun: &Begun, survey: &Survey) {
        let history = &survey.history;
        let segments = history.epochs.values().map(|epoch| epoch.segments.len() as u64).sum();
        let snapshots = history.epochs.values().map(|epoch| epoch.snapshots.len() as u64).sum();
        let records = history.epochs.len() as u64 + 1;
        self.end(begun, structure::RECORDS, "records", records, records);
        let rest = self.begin();
        let tables = survey.tables.len() as u64;
        let damaged = survey.tails.len() as u64 - survey.tails.values().filter(|tail| is_whole(tail)).count() as u64;
        self.end(&rest, structure::LINES, "epochs", history.epochs.len() as u64, history.epochs.len() as u64);
        self.end(&rest, structure::SEGMENTS, "segments", tables, segments);
        self.end(&rest, structure::SNAPSHOTS, "snapshots", survey.indexes + damaged, snapshots);
        let marks = (survey.marks.len() + survey.wrong_marks.len()) as u64;
        self.end(&rest, structure::MARKS, "marks", marks, marks);
        self.end(&rest, structure::STRANGERS, "objects", 0, 0);
        for (what, left) in
            [("tables of segments", segments - tables), ("indexes of snapshots", snapshots - damaged - survey.indexes)]
        {
            if left > 0 {
                self.report.not_reached.push(format!("{left} {what}"));
            }
        }
    }

    fn take_over(&mut self, survey: &Survey, found: Found) {
        self.report.replica = Some(survey.history.replica.clone());
        self.report.findings.extend(found.findings);
        self.report.notes.extend(found.notes);
    }

    /// What a restore would restore, by its own rules.
    async fn find_newest(&mut self, survey: &Survey) -> Result<(), VerifyError> {
        let mut before = None;
        for _ in 0..LOOKS {
            let history = History::load(&self.store).await;
            let planned = match history {
                Ok(history) => plan(&self.store, &history, Target::Latest, None).await,
                Err(error) => Err(error),
            };
            let error = match planned {
                Ok(plan) => {
                    let position = plan.position;
                    self.report.newest =
                        Some(Newest { epoch: position.epoch, txid: position.txid, time_ms: plan.time_ms });
                    return Ok(());
                }
                Err(error) => error,
            };
            let what = match &error {
                RestoreError::NothingYet { .. } => {
                    let what = error.to_string();
                    if before.as_ref() == Some(&what) && !has_failed(&self.report) {
                        return Err(error.into());
                    }
                    what
                }
                _ => survey::damage(error)?,
            };
            if before.as_ref() == Some(&what) {
                // The reasons are told already, if they are known.
                if !has_failed(&self.report) {
                    let sentence = format!("the newest state can't be restored: {what}");
                    let finding = Finding::failed(structure::LINES, &survey.history.location, sentence);
                    self.report.findings.push(finding);
                }
                return Ok(());
            }
            before = Some(what);
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        // Nor is it drilled then: that is no clean verdict.
        let why = "objects went each time that it was looked at";
        self.report.not_reached.push(format!("the newest state: {why}"));
        let sentence = format!("whether the newest state can be restored was not found out: {why}");
        self.report.findings.push(Finding::new(Verdict::Degraded, structure::LINES, None, sentence));
        Ok(())
    }

    async fn data(&mut self, survey: &Survey) -> Result<(), VerifyError> {
        let begun = self.begin();
        let share = self.settings.share;
        self.report.sample = Some(share);
        let needs = needs(survey);
        let is_needed = |need: &Need| match need {
            Need::Segment(key) => needs.segments.contains(key),
            Need::Snapshot(key) => needs.snapshots.contains(key),
        };
        let read = data::read(&self.store, survey, is_needed, share, &self.budget, self.settings.seed).await?;
        self.end(&begun, BLOCKS, "segments", read.segments, read.segments_of);
        let rest = self.begin();
        self.end(&rest, EXTENTS, "snapshots", read.snapshots, read.snapshots_of);
        if let Some(first) = read.not_reached.first() {
            let count = read.not_reached.len();
            self.report.not_reached.push(format!("the content of {count} objects, {first} for one"));
        }
        if !read.damages.is_empty() {
            self.confirm(read.damages).await?;
        }
        self.report.notes.push(format!("{} blocks and {} extents were read", read.blocks, read.extents));
        Ok(())
    }

    /// Damage counts if the object is still there: one that went while it was read was not damaged. How bad it is depends on what
    /// is there now.
    async fn confirm(&mut self, damages: BTreeSet<Damage>) -> Result<(), VerifyError> {
        self.report.findings.clear();
        self.report.notes.clear();
        let checks = std::mem::take(&mut self.report.checks);
        let not_reached = self.report.not_reached.clone();
        let again = self.structure().await?;
        self.report.checks = checks;
        self.report.not_reached = not_reached;
        let Some((survey, found)) = again else { return Ok(()) };
        self.take_over(&survey, found);
        self.find_newest(&survey).await?;
        let needs = needs(&survey);
        for damage in damages {
            let (check, object, what, is_needed, is_there) = match damage {
                Damage::Segment(key, what) => {
                    let epoch = survey.history.epochs.get(&key.0.epoch);
                    let is_there = epoch.is_some_and(|epoch| epoch.segments.iter().any(|stored| stored.key == key));
                    (BLOCKS, key.to_string(), what, needs.segments.contains(&key), is_there)
                }
                Damage::Extent(snapshot, object, what) => {
                    let is_there = survey.history.has_snapshot(&snapshot);
                    (EXTENTS, object, what, needs.snapshots.contains(&snapshot), is_there)
                }
            };
            // That it is missing is told by the look, if it is.
            if is_there {
                let (verdict, why) = structure::weigh(is_needed);
                let finding = Finding::new(verdict, check, Some(object), format!("{what}; {why}"));
                self.report.findings.push(finding);
            }
        }
        Ok(())
    }

    async fn drill(&mut self, survey: &Survey) -> Result<(), VerifyError> {
        if self.report.newest.is_some() {
            self.restore(Target::Latest, None).await?;
        }
        let ranges = ranges(survey);
        let newest_txid = self.report.newest.map(|newest| newest.txid);
        // Anew, because nobody knows how often was looked before.
        let mut numbers = Numbers::new(self.settings.seed);
        let mut points = points::choose(&ranges, newest_txid, self.settings.points, &mut numbers);
        numbers.shuffle(&mut points);
        let mut points = points.into_iter();
        while let Some(txid) = points.next() {
            if self.budget.is_over() {
                let left = points.len() + 1;
                self.report.not_reached.push(format!("{left} restores, that of transaction {txid} for one"));
                break;
            }
            self.restore(Target::Txid(txid), None).await?;
        }
        Ok(())
    }

    async fn restore(&mut self, target: Target, epoch: Option<u32>) -> Result<(), VerifyError> {
        let begun = self.begin();
        let shown = match target {
            Target::Txid(txid) => format!("restore of transaction {txid}"),
            _ => "restore of the newest state".to_owned(),
        };
        let restored = drill::restore(&self.store, &self.settings.scratch, target, epoch);
        let drilled = match self.budget.within(restored).await {
            None => {
                self.not_restored(target, &shown, "there was no time");
                return Ok(());
            }
            Some(drilled) => drilled?,
        };
        match drilled {
            Drilled::Restored(plan, file) => {
                let name = drill::name(plan.position);
                if self.settings.checks_integrity {
                    let path = file.path().to_owned();
                    let checked = tokio::task::spawn_blocking(move || check_integrity(&path));
                    match self.budget.within(checked).await {
                        Some(Ok(integrity)) => self.note_integrity(&name, integrity),
                        _ => self.report.not_reached.push(format!("SQLite's own check of {}", plan.position)),
                    }
                }
                self.end(&begun, &name, "states", 1, 1);
            }
            Drilled::Damaged(object, what) => {
                let sentence = format!("{shown} fails: {what}");
                self.report.findings.push(Finding::new(Verdict::Failed, &shown, object, sentence));
                self.end(&begun, &shown, "states", 1, 1);
            }
            Drilled::NotThere(what) if target == Target::Latest => {
                let sentence = format!("{shown} fails: {what}");
                self.report.findings.push(Finding::new(Verdict::Failed, &shown, None, sentence));
            }
            // It was let go since it was chosen.
            Drilled::NotThere(what) => self.report.notes.push(format!("{shown} was left out: {what}")),
            Drilled::Unsettled => self.not_restored(target, &shown, "objects went each time that it was tried"),
        }
        Ok(())
    }

    /// A drill that does not restore the newest state proves little: that is no clean verdict.
    fn not_restored(&mut self, target: Target, shown: &str, why: &str) {
        self.report.not_reached.push(format!("{shown}: {why}"));
        if target == Target::Latest {
            let sentence = format!("the newest state was not restored: {why}");
            self.report.findings.push(Finding::new(Verdict::Degraded, shown, None, sentence));
        }
    }

    fn note_integrity(&mut self, name: &str, integrity: Integrity) {
        let (verdict, sentence) = match integrity {
            Integrity::Sound => return,
            Integrity::Corrupt(what) => {
                let sentence = format!(
                    "{name} gives the pages that were written, and SQLite calls the database corrupt, as it was then: {what}"
                );
                (Verdict::Failed, sentence)
            }
            Integrity::Unknown(what) => (
                Verdict::Degraded,
                format!("{name} gives the pages that were written, and SQLite can't check them: {what}"),
            ),
        };
        self.report.findings.push(Finding::new(verdict, name, None, sentence));
    }

    fn freshness(&mut self, survey: &Survey) {
        let (Some(most), Some(newest)) = (self.settings.max_lag, self.report.newest) else { return };
        let begun = self.begin();
        let presence = match &survey.presence {
            Some(Ok(presence)) => Some(presence),
            _ => None,
        };
        let epoch = survey.history.epochs.keys().next_back().copied().unwrap_or(newest.epoch);
        if let Some(sentence) = freshness::staleness(&newest, epoch, presence, most, self.now_ms) {
            self.report.findings.push(Finding::new(Verdict::Degraded, FRESHNESS, None, sentence));
        }
        self.end(&begun, FRESHNESS, "states", 1, 1);
    }

    async fn comparison(&mut self) -> Result<(), VerifyError> {
        let Some(live) = &self.settings.live else { return Ok(()) };
        let begun = self.begin();
        let compared = self.budget.within(compare(&self.store, &self.settings.scratch, live)).await;
        match compared {
            None => {
                self.report.not_reached.push(COMPARISON.into());
                let sentence = "the live database was not compared: there was no time".to_owned();
                self.report.findings.push(Finding::new(Verdict::Degraded, COMPARISON, None, sentence));
            }
            Some(compared) => {
                match compared? {
                    Compared::Same(position, len_bytes) => {
                        let note = format!("the live database is {position}, in all its {len_bytes} bytes");
                        self.report.notes.push(note);
                    }
                    Compared::Differs(what) => {
                        self.report.findings.push(Finding::new(Verdict::Failed, COMPARISON, None, what));
                    }
                    Compared::Unknown(what) => {
                        self.report.findings.push(Finding::new(Verdict::Degraded, COMPARISON, None, what));
                    }
                }
                self.end(&begun, COMPARISON, "databases", 1, 1);
            }
        }
        Ok(())
    }
}

fn has_failed(report: &Report) -> bool {
    report.findings.iter().any(|finding| finding.verdict == Verdict::Failed)
}

fn is_whole(tail: &Tail) -> bool {
    matches!(tail, Tail::Whole(_))
}

fn needs(survey: &Survey) -> Needs {
    View { history: &survey.history, tails: &survey.tails }.needs(&survey.marks)
}

/// What of the newest line can be restored, oldest first.
fn ranges(survey: &Survey) -> Vec<Range> {
    let view = View { history: &survey.history, tails: &survey.tails };
    view.runs(None).iter().flatten().rev().flat_map(|run| view.ranges(run)).collect()
}
