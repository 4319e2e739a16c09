//! Drills: the daemon itself restores what it has stored, every so often, and has SQLite check it. A backup that nobody ever tried
//! to restore is a hope.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::clock::{Clock, jitter_below, random_bytes};
use crate::replicate::status::Board;
use crate::retain::RetentionSettings;
use crate::store::SharedStore;
use crate::verify::report::{Report, Verdict};
use crate::verify::{Depth, Settings, verify};

/// The first drill comes so soon, or after the interval, if that is shorter: a process that never lives for an interval drills, too.
const FIRST_AFTER: Duration = Duration::from_secs(600);
/// Until there is something to restore, it is looked for this often.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is left free on the disk that the scratch file is on, besides the database's size.
const SPARE_BYTES: u64 = 256 << 20;

/// Drills one database's replica.
pub struct Driller {
    /// The replica.
    pub store: SharedStore,
    /// The database.
    pub database: PathBuf,
    /// How often.
    pub interval: Duration,
    /// What should be there.
    pub retention: RetentionSettings,
    /// Where it is written down.
    pub board: Arc<Board>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// So many drills at a time, of all databases.
    pub permits: Arc<Semaphore>,
}

impl Driller {
    /// Drills again and again.
    pub async fn run(self) {
        while self.board.status().snapshot_ms.is_none() {
            tokio::time::sleep(PATIENCE).await;
        }
        let first_after = self.interval.min(FIRST_AFTER);
        let mut wait = first_after + Duration::from_millis(jitter_below(first_after.as_millis() as u64 / 2));
        loop {
            tokio::time::sleep(wait).await;
            wait = self.interval;
            let Ok(_permit) = self.permits.acquire().await else { return };
            let trouble = match self.drill().await {
                Ok(report) => judge(&report),
                Err(why) => Some(why),
            };
            if let Some(trouble) = &trouble {
                tracing::error!(database = %self.database.display(), trouble, "the replica could not be verified");
            }
            self.board.note_verified(self.clock.now_ms(), trouble);
        }
    }

    async fn drill(&self) -> Result<Report, String> {
        let scratch = std::env::temp_dir();
        let len_bytes = std::fs::metadata(&self.database).map_or(0, |found| found.len());
        let free = free_bytes(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
        if free < len_bytes + SPARE_BYTES {
            return Err(format!(
                "{} has {free} bytes free; a drill needs the database's {len_bytes} and some (TMPDIR names another place)",
                scratch.display()
            ));
        }
        let settings = Settings {
            depth: Depth::Drill,
            points: 1,
            share: 1.0,
            seed: random_bytes::<8>().map_or(0, u64::from_le_bytes),
            max_duration: Some(self.interval),
            scratch,
            checks_integrity: true,
            max_lag: None,
            retention: Some(self.retention),
            live: None,
        };
        let report = verify(self.store.clone(), &settings, self.clock.clone()).await;
        report.map_err(|error| error.to_string())
    }
}

/// What a person should know of a report; `None` when all is well.
fn judge(report: &Report) -> Option<String> {
    let of = |verdict| report.findings.iter().filter(move |finding| finding.verdict == verdict);
    for finding in of(Verdict::Degraded) {
        tracing::warn!(replica = report.location, check = finding.check, "{}", finding.sentence);
    }
    if report.verdict == Verdict::Failed {
        return Some(of(Verdict::Failed).next().map_or("failed".to_owned(), |finding| finding.sentence.clone()));
    }
    if let Some(first) = report.not_reached.first() {
        return Some(format!("not everything could be checked: {first}"));
    }
    let (requests, seconds) = (report.requests, report.seconds);
    tracing::info!(replica = report.location, requests, seconds, "restored and checked");
    None
}

/// Bytes that this user may still write on the file system of `path`.
fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in a zero byte, and `found` outlives the call.
    match unsafe { libc::statvfs(path.as_ptr(), &raw mut found) } {
        0 => Ok(found.f_bavail.saturating_mul(found.f_frsize)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_looked_at_is_not_verified() {
        let mut report = Report::new("file:///backup".into(), Depth::Drill, 1);
        assert_eq!(judge(&report), None);
        report.not_reached.push("the newest state: there was no time".into());
        assert!(judge(&report).is_some_and(|what| what.contains("there was no time")));
    }
}
