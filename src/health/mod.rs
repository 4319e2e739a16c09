//! Telling others how replication is: over HTTP, to systemd, and to whoever misses a heartbeat.

pub mod drill;
pub mod heartbeat;
pub mod metrics;
pub mod server;
pub mod systemd;

use std::time::Duration;

use crate::replicate::status::{Phase, Status};

/// What is confirmed later than this after its capture is reported as unhealthy, unless told otherwise.
pub const DEFAULT_HEALTHY_LAG: Duration = Duration::from_secs(300);

/// Whether everything that is written to any of the databases from now on is captured.
#[must_use]
pub fn is_ready(statuses: &[Status]) -> bool {
    statuses.iter().all(|status| matches!(status.phase, Phase::Following | Phase::Waiting))
}

/// What a person should look at, a line each.
#[must_use]
pub fn troubles(statuses: &[Status], now_ms: u64, limit: Duration) -> Vec<String> {
    let trouble = |status: &Status| Some(format!("{}: {}", status.database.display(), status.trouble(now_ms, limit)?));
    statuses.iter().filter_map(trouble).collect()
}

/// All databases in a sentence.
#[must_use]
pub fn summary(statuses: &[Status], now_ms: u64) -> String {
    let count = |phase| statuses.iter().filter(|status| status.phase == phase).count();
    let lag = statuses.iter().map(|status| status.lag(now_ms)).max().unwrap_or_default();
    let mut text = format!("{} of {} databases followed", count(Phase::Following), statuses.len());
    let stopped = count(Phase::Stopped);
    let failing = statuses.iter().filter(|status| status.is_failing()).count() - stopped;
    for (count, word) in [(count(Phase::Waiting), "not there yet"), (failing, "failing"), (stopped, "stopped")] {
        if count > 0 {
            text.push_str(&format!(", {count} {word}"));
        }
    }
    match lag.as_secs() {
        0 => text.push_str("; all is confirmed"),
        seconds => text.push_str(&format!("; up to {seconds} s not confirmed")),
    }
    text
}
