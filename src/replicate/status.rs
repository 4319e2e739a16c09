//! What is known of a database's replication, for whoever asks: `waltrail status`, the health check, the metrics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::control::State;
use super::locked;
use super::wake::Mailbox;
use crate::store::probe::{Finding, Weight};
use crate::store::retry::RetrySignal;

/// A database that failed has recovered when it has been followed for so long without a break.
const STEADY: Duration = Duration::from_secs(60);

/// How far a database's replication is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The database is looked at, and an epoch is claimed.
    #[default]
    Starting,
    /// The database is not there yet.
    Waiting,
    /// Everything that is committed is captured.
    Following,
    /// The database can't be followed; it is tried again.
    Failing,
    /// It is not replicated any more: by a stop, or by an error that trying again does not mend.
    Stopped,
}

/// Why checkpoints fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointProblem {
    /// The error of the last one.
    pub error: String,
    /// When the first of them failed, in milliseconds since 1970.
    pub since_ms: u64,
}

/// One database's replication at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Status {
    /// The database.
    pub database: PathBuf,
    /// Where it goes, without parameters and secrets.
    pub replica: String,
    /// The same for a program: a URL with its parameters, without secrets, or a path.
    pub replica_url: String,
    /// How far it is.
    pub phase: Phase,
    /// When the phase was entered, in milliseconds since 1970.
    pub phase_since_ms: u64,
    /// Since when it has failed, again and again, in milliseconds since 1970. A try that follows it for a moment does not end this: see
    /// [`Status::failing_for`].
    pub failing_since_ms: Option<u64>,
    /// The last state that was captured.
    pub captured: Option<State>,
    /// The last state that is confirmed in storage.
    pub confirmed: Option<State>,
    /// Since when there is something that is captured and not confirmed, in milliseconds since 1970.
    pub unconfirmed_since_ms: Option<u64>,
    /// When the last confirmed snapshot was begun, in milliseconds since 1970. Without one nothing of this epoch can be
    /// restored.
    pub snapshot_ms: Option<u64>,
    /// When the replica was last restored and found right, in milliseconds since 1970.
    pub verified_ms: Option<u64>,
    /// Why the last try to do that failed.
    pub verify_trouble: Option<String>,
    /// Bytes of segments that wait to be shipped.
    pub waiting_bytes: u64,
    /// Transactions that were captured since the process started.
    pub transactions: u64,
    /// Segments that were confirmed since the process started.
    pub segments: u64,
    /// Their bytes.
    pub segments_len_bytes: u64,
    /// Snapshots that were confirmed since the process started.
    pub snapshots: u64,
    /// Set while checkpoints fail. The WAL grows meanwhile.
    #[serde(default)]
    pub checkpoint_problem: Option<CheckpointProblem>,
    /// What is wrong just now, in a sentence.
    pub error: Option<String>,
    /// What was found of the store that is otherwise than it should be, by what was looked at; see [`crate::store::probe`].
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
}

impl Status {
    /// For how long something that is captured has not been confirmed.
    #[must_use]
    pub fn lag(&self, now_ms: u64) -> Duration {
        Duration::from_millis(self.unconfirmed_since_ms.map_or(0, |since_ms| now_ms.saturating_sub(since_ms)))
    }

    /// Whether it can't be followed, or is not replicated any more. A start that storage refuses is tried again and again without an
    /// end, and counts, too.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        match self.phase {
            Phase::Failing | Phase::Stopped => true,
            Phase::Starting => self.error.is_some(),
            Phase::Waiting | Phase::Following => false,
        }
    }

    /// For how long it has failed, again and again; `None` when it has not, or has been followed for a minute since.
    #[must_use]
    pub fn failing_for(&self, now_ms: u64) -> Option<Duration> {
        let has_recovered = self.phase == Phase::Following && self.in_phase(now_ms) > STEADY;
        let since_ms = self.failing_since_ms.filter(|_| !has_recovered)?;
        Some(Duration::from_millis(now_ms.saturating_sub(since_ms)))
    }

    fn in_phase(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms.saturating_sub(self.phase_since_ms))
    }

    /// Why a person should look: a sentence; `None` when all is well or has not been otherwise for longer than `limit`.
    #[must_use]
    pub fn trouble(&self, now_ms: u64, limit: Duration) -> Option<String> {
        let because = || self.error.as_ref().map_or(String::new(), |error| format!(": {error}"));
        let since_ms = self.checkpoint_problem.as_ref().map_or(now_ms, |problem| problem.since_ms);
        let checkpoints_failing = Duration::from_millis(now_ms.saturating_sub(since_ms));
        let (in_phase, failing) = (self.in_phase(now_ms), self.failing_for(now_ms).unwrap_or_default());
        match self.phase {
            Phase::Stopped => Some(format!("it is not replicated any more{}", because())),
            Phase::Failing | Phase::Starting if in_phase > limit => {
                Some(format!("it has not been followed for {} s{}", in_phase.as_secs(), because()))
            }
            Phase::Failing | Phase::Following if failing > limit => {
                Some(format!("it has failed again and again for {} s{}", failing.as_secs(), because()))
            }
            Phase::Following if self.lag(now_ms) > limit => {
                Some(format!("what was committed {} s ago is not confirmed{}", self.lag(now_ms).as_secs(), because()))
            }
            Phase::Following if self.snapshot_ms.is_none() && in_phase > limit => {
                Some(format!("there has been no snapshot for {} s{}", in_phase.as_secs(), because()))
            }
            Phase::Following if checkpoints_failing > limit => {
                Some(format!("checkpoints have failed for {} s{}", checkpoints_failing.as_secs(), because()))
            }
            _ => self.verify_trouble.as_ref().map(|trouble| format!("it could not be verified: {trouble}")),
        }
    }
}

/// How to reach a database's thread while it is followed.
#[derive(Debug, Clone)]
pub struct Link {
    /// Its mailbox.
    pub mailbox: Arc<Mailbox>,
    /// The last transaction of the epoch that is confirmed.
    pub confirmed: watch::Receiver<u64>,
}

/// Where a database's status is written down: by its thread, by what ships for it, and by what watches over both.
#[derive(Debug, Default)]
pub struct Board {
    status: Mutex<Status>,
    link: watch::Sender<Option<Link>>,
    retry_signal: Arc<RetrySignal>,
}

/// The boards of all databases that the process follows, or should.
#[derive(Debug, Default)]
pub struct Boards {
    /// By their state directories.
    boards: Mutex<BTreeMap<PathBuf, Arc<Board>>>,
    /// What can't be looked at where databases are looked for, a sentence each, and since when, in milliseconds since 1970.
    unseen_since_ms: Mutex<BTreeMap<String, u64>>,
}

impl Boards {
    /// A database is followed from now on.
    pub fn insert(&self, state_dir: PathBuf, board: Arc<Board>) {
        locked(&self.boards).insert(state_dir, board);
    }

    /// A database was let go of.
    pub fn remove(&self, state_dir: &Path) {
        locked(&self.boards).remove(state_dir);
    }

    /// What is known of all of them now.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        locked(&self.boards).values().map(|board| board.status()).collect()
    }

    /// Databases were looked for, and these troubles were met.
    pub fn note_search(&self, troubles: &[String], now_ms: u64) {
        let mut unseen_since_ms = locked(&self.unseen_since_ms);
        unseen_since_ms.retain(|trouble, _| troubles.contains(trouble));
        for trouble in troubles {
            unseen_since_ms.entry(trouble.clone()).or_insert(now_ms);
        }
    }

    /// What could not be looked at for longer than `limit`, a sentence each: databases may be there that nobody replicates.
    #[must_use]
    pub fn search_troubles(&self, now_ms: u64, limit: Duration) -> Vec<String> {
        let is_long = |since_ms: u64| Duration::from_millis(now_ms.saturating_sub(since_ms)) > limit;
        let unseen_since_ms = locked(&self.unseen_since_ms);
        let long = unseen_since_ms.iter().filter(|(_, since_ms)| is_long(**since_ms));
        long.map(|(trouble, _)| format!("while looking for databases: {trouble}")).collect()
    }
}

impl Board {
    /// For a database and where it goes, for people and as a URL.
    #[must_use]
    pub fn new(database: PathBuf, replica: String, replica_url: String, now_ms: u64) -> Self {
        let status = Status { database, replica, replica_url, phase_since_ms: now_ms, ..Status::default() };
        Self { status: Mutex::new(status), ..Self::default() }
    }

    /// What is known now.
    #[must_use]
    pub fn status(&self) -> Status {
        locked(&self.status).clone()
    }

    /// Returns the link to the database's thread, `None` while there is no thread. Each attempt to
    /// follow the database is a change, also one that fails at once.
    #[must_use]
    pub fn links(&self) -> watch::Receiver<Option<Link>> {
        self.link.subscribe()
    }

    /// The database's thread begins or ends.
    pub fn set_link(&self, link: Option<Link>) {
        self.link.send_replace(link);
    }

    /// Returns what ends the waits of this database's retries early.
    #[must_use]
    pub fn retry_signal(&self) -> &Arc<RetrySignal> {
        &self.retry_signal
    }

    /// Another phase, and what is wrong, if anything.
    pub fn enter(&self, phase: Phase, error: Option<String>, now_ms: u64) {
        let mut status = locked(&self.status);
        status.failing_since_ms = match phase {
            // Each try claims an epoch, and is followed for a moment: that is no recovery.
            Phase::Failing if status.failing_for(now_ms).is_none() => Some(now_ms),
            Phase::Waiting => None,
            _ => status.failing_since_ms,
        };
        if status.phase != phase {
            (status.phase, status.phase_since_ms) = (phase, now_ms);
        }
        status.error = error;
    }

    /// The database that was waited for is there. One that failed counts as failing until its epoch is claimed.
    pub fn note_opened(&self, now_ms: u64) {
        if self.status().phase == Phase::Waiting {
            self.enter(Phase::Starting, None, now_ms);
        }
    }

    /// An epoch was claimed, which begins with this state: it is captured and confirmed.
    pub fn note_claimed(&self, state: State, snapshot_ms: Option<u64>, now_ms: u64) {
        self.enter(Phase::Following, None, now_ms);
        let mut status = locked(&self.status);
        (status.captured, status.confirmed) = (Some(state), Some(state));
        status.unconfirmed_since_ms = None;
        status.snapshot_ms = snapshot_ms;
    }

    /// Transactions were captured, up to this state.
    pub fn note_captured(&self, state: State, now_ms: u64) {
        let mut status = locked(&self.status);
        let before_txid = status.captured.map_or(0, |before| before.position.txid);
        status.transactions += state.position.txid.saturating_sub(before_txid);
        status.captured = Some(state);
        if status.confirmed.is_none_or(|confirmed| confirmed.position.txid < state.position.txid) {
            status.unconfirmed_since_ms.get_or_insert(now_ms);
        }
    }

    /// A segment is confirmed; what it holds ends with this state.
    pub fn note_confirmed(&self, state: State, len_bytes: u64) {
        let mut status = locked(&self.status);
        status.segments += 1;
        status.segments_len_bytes += len_bytes;
        // What an earlier run left is shipped before this run's epoch is claimed.
        if status.phase != Phase::Following {
            return;
        }
        status.error = status.checkpoint_problem.as_ref().map(|problem| problem.error.clone());
        status.confirmed = Some(state);
        let is_all = status.captured.is_none_or(|captured| captured.position.txid <= state.position.txid);
        // What is left was committed after this.
        let since_ms = status.unconfirmed_since_ms.map(|since_ms| since_ms.max(state.time_ms));
        status.unconfirmed_since_ms = since_ms.filter(|_| !is_all);
    }

    /// A snapshot is confirmed that was begun at this time, in milliseconds since 1970.
    pub fn note_snapshot(&self, begun_ms: u64) {
        let mut status = locked(&self.status);
        status.snapshots += 1;
        status.snapshot_ms = Some(begun_ms);
    }

    /// The replica was restored and found right, or not: then why.
    pub fn note_verified(&self, now_ms: u64, trouble: Option<String>) {
        let mut status = locked(&self.status);
        if trouble.is_none() {
            status.verified_ms = Some(now_ms);
        }
        status.verify_trouble = trouble;
    }

    /// Bytes that wait to be shipped.
    pub fn note_waiting(&self, waiting_bytes: u64) {
        locked(&self.status).waiting_bytes = waiting_bytes;
    }

    /// Something was found out about the store. Tells whether it is otherwise than it should be, and was not known.
    pub fn note_store(&self, finding: &Finding) -> bool {
        let mut status = locked(&self.status);
        if finding.weight == Weight::Good {
            status.notes.remove(finding.what);
            return false;
        }
        let before = status.notes.insert(finding.what.to_owned(), finding.text.clone());
        before.as_deref() != Some(finding.text.as_str())
    }

    /// Checkpoints fail, or succeed again (`None`). The problem is shown until then, whatever else succeeds.
    pub fn note_checkpoints(&self, problem: Option<String>, now_ms: u64) {
        let mut status = locked(&self.status);
        if problem.is_none() && status.checkpoint_problem.is_none() {
            return;
        }
        status.error.clone_from(&problem);
        let since_ms = status.checkpoint_problem.as_ref().map_or(now_ms, |problem| problem.since_ms);
        status.checkpoint_problem = problem.map(|error| CheckpointProblem { error, since_ms });
    }

    /// Something does not work, and is tried again.
    pub fn note_error(&self, error: String) {
        locked(&self.status).error = Some(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Position;

    const LIMIT: Duration = Duration::from_secs(60);

    fn state(txid: u64, time_ms: u64) -> State {
        State { position: Position { epoch: 1, txid }, time_ms }
    }

    fn following() -> Board {
        let board = Board::new("/app.db".into(), "s3://b/app".into(), "s3://b/app".into(), 0);
        board.note_claimed(state(5, 1000), Some(500), 1000);
        board
    }

    #[test]
    fn what_is_not_confirmed_for_long_is_trouble() {
        let board = following();
        assert_eq!((board.status().lag(900_000), board.status().trouble(900_000, LIMIT)), (Duration::ZERO, None));
        board.note_captured(state(7, 900_000), 900_000);
        board.note_captured(state(9, 930_000), 930_000);
        assert_eq!(board.status().trouble(960_000, LIMIT), None);
        board.note_error("the store fails".into());
        let trouble = board.status().trouble(960_001, LIMIT).unwrap();
        assert_eq!(trouble, "what was committed 60 s ago is not confirmed: the store fails");
        // The first of two segments: what is left is younger.
        board.note_confirmed(state(7, 900_500), 10);
        assert_eq!(board.status().lag(960_500), LIMIT);
        board.note_confirmed(state(9, 930_000), 10);
        assert_eq!(board.status().lag(990_000), Duration::ZERO);
        assert_eq!((board.status().transactions, board.status().segments), (4, 2));
    }

    /// A try that succeeds claims an epoch, and begins a phase anew.
    #[test]
    fn what_fails_again_and_again_is_trouble() {
        let board = following();
        let mut now_ms = 100_000;
        let mut fail_and_claim = |board: &Board| {
            board.enter(Phase::Failing, Some("the disk fails".into()), now_ms);
            let failed = board.status().trouble(now_ms, LIMIT);
            board.note_claimed(state(5, 1000), Some(500), now_ms + 30_000);
            let claimed = board.status().trouble(now_ms + 30_000, LIMIT);
            now_ms += 40_000;
            (failed, claimed)
        };
        assert_eq!(fail_and_claim(&board), (None, None));
        let (failed, claimed) = fail_and_claim(&board);
        assert_eq!((failed, claimed.as_deref()), (None, Some("it has failed again and again for 70 s")));
        let (failed, _) = fail_and_claim(&board);
        assert_eq!(failed.as_deref(), Some("it has failed again and again for 80 s: the disk fails"));
        // Followed since 210,000: after a minute that counts as recovered, and the next failure begins to count anew.
        assert!(board.status().trouble(270_000, LIMIT).unwrap().contains("for 170 s"));
        assert_eq!(board.status().trouble(270_001, LIMIT), None);
        board.enter(Phase::Failing, Some("the disk fails".into()), 280_000);
        assert_eq!(board.status().failing_for(281_000), Some(Duration::from_secs(1)));
        assert_eq!(board.status().trouble(281_000, LIMIT), None);
        board.enter(Phase::Waiting, None, 282_000);
        assert_eq!(board.status().failing_for(900_000), None, "nothing is there that could fail");
    }

    #[test]
    fn what_can_not_be_looked_at_for_long_is_trouble() {
        let boards = Boards::default();
        let (one, other) = ("/data/eu can't be read".to_owned(), "/data/us can't be read".to_owned());
        boards.note_search(std::slice::from_ref(&one), 1000);
        boards.note_search(&[one.clone(), other.clone()], 31_000);
        assert!(boards.search_troubles(61_000, LIMIT).is_empty());
        assert_eq!(boards.search_troubles(61_001, LIMIT), ["while looking for databases: /data/eu can't be read"]);
        boards.note_search(&[other], 62_000);
        assert!(boards.search_troubles(91_000, LIMIT).is_empty());
        boards.note_search(&[], 92_000);
        assert!(boards.search_troubles(900_000, LIMIT).is_empty());
    }

    #[test]
    fn what_is_not_followed_is_trouble() {
        let board = following();
        board.enter(Phase::Failing, Some("locked".into()), 5000);
        board.enter(Phase::Failing, Some("locked again".into()), 6000);
        assert_eq!(board.status().trouble(65_000, LIMIT), None);
        let trouble = board.status().trouble(65_001, LIMIT).unwrap();
        assert_eq!(trouble, "it has not been followed for 60 s: locked again");
        board.note_verified(66_000, Some("a gap".into()));
        board.enter(Phase::Waiting, None, 70_000);
        assert_eq!(board.status().trouble(70_000, LIMIT).as_deref(), Some("it could not be verified: a gap"));
        board.note_verified(67_000, None);
        assert_eq!(board.status().verified_ms, Some(67_000));
        assert_eq!(board.status().trouble(900_000, LIMIT), None, "nothing is there to be lost");
        board.enter(Phase::Stopped, Some("replaced".into()), 70_000);
        assert!(board.status().trouble(70_000, LIMIT).unwrap().contains("replaced"));
        let young = Board::new("/app.db".into(), "s3://b/app".into(), "s3://b/app".into(), 0);
        young.note_claimed(state(1, 0), None, 0);
        assert!(young.status().trouble(61_000, LIMIT).unwrap().contains("no snapshot"));
    }
}
