//! The task that lets a database's old history go, every hour that something is shipped in. A database that nobody writes to
//! causes no request: what it could let go goes with the next write, or with `waltrail prune`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::status::Board;
use crate::clock::{Clock, jitter_below};
use crate::retain::prune::{Outcome, prune};
use crate::retain::tails::TailCache;
use crate::retain::{Now, RetentionSettings};
use crate::store::SharedStore;
use crate::store::probe::{Finding, Weight};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(3600);
/// Before the first look: a process that is never up for an hour prunes, too.
const FIRST_AFTER: Duration = Duration::from_secs(300);

/// Lets one database's old history go.
pub struct Pruner {
    /// The replica.
    pub store: SharedStore,
    /// What is kept.
    pub settings: RetentionSettings,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The last transaction that is confirmed.
    pub confirmed: watch::Receiver<u64>,
    /// Where it is written down what the store keeps.
    pub board: Arc<Board>,
    /// So many look at a time, of all databases.
    pub permits: Arc<Semaphore>,
}

impl Pruner {
    /// Looks again and again, until nothing is shipped any more. That nothing can be let go is no failure of replication: it is
    /// logged.
    pub async fn run(mut self) {
        let mut cache = TailCache::default();
        let mut complaint = None;
        // So that many databases that were started together do not look together.
        let mut wait = FIRST_AFTER + Duration::from_millis(jitter_below(FIRST_AFTER.as_millis() as u64));
        while self.confirmed.changed().await.is_ok() {
            tokio::time::sleep(wait).await;
            wait = INTERVAL;
            self.confirmed.mark_unchanged();
            let Ok(_permit) = self.permits.acquire().await else { return };
            let now = Now::NotFarBeyondStored(self.clock.now_ms());
            let found = match prune(&self.store, &self.settings, now, &mut cache, false).await {
                Ok(outcome) => {
                    report(&outcome);
                    note_deletions(&self.board, &outcome)
                }
                Err(error) => Some(format!("nothing is let go: {error}")),
            };
            // Once, and again when it is something else.
            if found != complaint
                && let Some(what) = &found
            {
                tracing::warn!(replica = self.store.location(), "{what}; replication goes on, and storage grows");
            }
            complaint = found;
        }
    }
}

/// Writes down whether the store deletes: what was to be gone tells more than a probe would. Gives what a person should know.
pub fn note_deletions(board: &Board, outcome: &Outcome) -> Option<String> {
    let complaint = complaint_of(outcome);
    let weight = if complaint.is_some() { Weight::Note } else { Weight::Good };
    board.note_store(&Finding::new("delete", weight, complaint.as_deref().unwrap_or_default()));
    complaint
}

fn report(outcome: &Outcome) {
    let (objects, bytes) = (outcome.deleted_objects, outcome.deleted_bytes);
    if objects > 0 {
        tracing::info!(replica = outcome.plan.location, objects, bytes, "old history was let go");
    }
    for note in &outcome.plan.notes {
        tracing::warn!(replica = outcome.plan.location, "{note}");
    }
}

/// What a person should know of deletions that did not happen. The same words for the same reason, whatever the object.
#[must_use]
pub fn complaint_of(outcome: &Outcome) -> Option<String> {
    if let Some(error) = &outcome.refused.example {
        return Some(format!("the store refuses to delete old history: {}", error.message));
    }
    let is_undeleted = outcome.undeleted.objects > 0;
    is_undeleted
        .then(|| "the store answers that it deletes old history, and keeps it (a bucket with a lock?)".to_owned())
}
