//! Whether the newest state is as new as it should be. Pure.

use std::time::Duration;

use super::report::Newest;
use crate::clock::format_time;
use crate::format::record::PresenceRecord;

/// A sentence that says why it is not known to be; `None` when it is. An idle database has nothing new to ship: that it is
/// idle is known when a daemon was there a short while ago and had confirmed nothing newer. `epoch` is the newest one: it may have
/// no transaction of its own.
pub(super) fn staleness(
    newest: &Newest,
    epoch: u32,
    presence: Option<&PresenceRecord>,
    most: Duration,
    now_ms: u64,
) -> Option<String> {
    let most_ms = most.as_millis() as u64;
    let is_young = |time_ms: u64| now_ms.saturating_sub(time_ms) <= most_ms;
    if is_young(newest.time_ms) {
        return None;
    }
    let age = age(newest.time_ms, now_ms);
    let told = format!("the newest transaction, {} of epoch {}, is {age} old", newest.txid, newest.epoch);
    match presence {
        None => Some(format!(
            "{told}; an idle database can't be told from a stopped daemon: presence-interval in the daemon's configuration helps"
        )),
        Some(presence) if presence.epoch != epoch && is_young(presence.time_ms) => Some(format!(
            "{told}; the daemon that was there last, at {}, writes epoch {}: do two daemons run?",
            format_time(presence.time_ms),
            presence.epoch
        )),
        // What it confirmed is what is there; more than that is damage, and told of as such.
        Some(presence) if is_young(presence.time_ms) && presence.txid >= newest.txid => None,
        Some(presence) if is_young(presence.time_ms) => Some(format!(
            "{told}; the daemon was there at {}, and had confirmed only transaction {}",
            format_time(presence.time_ms),
            presence.txid
        )),
        Some(presence) => Some(format!("{told}, and the daemon was last there at {}", format_time(presence.time_ms))),
    }
}

/// How long ago, in the largest unit that tells.
fn age(time_ms: u64, now_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(time_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} seconds"),
        120..7200 => format!("{} minutes", seconds / 60),
        7200..172_800 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_790_000_000_000;
    const MINUTE_MS: u64 = 60_000;

    fn presence(epoch: u32, txid: u64, minutes_ago: u64) -> PresenceRecord {
        let time_ms = NOW_MS - minutes_ago * MINUTE_MS;
        PresenceRecord { format: 1, epoch, writer: "7".repeat(32), txid, time_ms, program: "test".into() }
    }

    #[test]
    fn an_idle_database_is_told_from_a_stopped_daemon() {
        let most = Duration::from_secs(15 * 60);
        let newest = |minutes_ago: u64| Newest { epoch: 2, txid: 9, time_ms: NOW_MS - minutes_ago * MINUTE_MS };
        let stale =
            |minutes_ago, presence: Option<&PresenceRecord>| staleness(&newest(minutes_ago), 2, presence, most, NOW_MS);
        assert_eq!(stale(15, None), None);
        assert_eq!(stale(90, Some(&presence(2, 9, 3))), None);
        for (found, says) in [
            (stale(16, None), "is 16 minutes old; an idle database can't be told"),
            (stale(90, None), "presence-interval"),
            (stale(90, Some(&presence(2, 9, 16))), "is 90 minutes old, and the daemon was last there at"),
            (stale(90, Some(&presence(1, 9, 3))), "do two daemons run?"),
            (stale(90, Some(&presence(2, 8, 3))), "had confirmed only transaction 8"),
            (stale(60 * 24 * 3, None), "3 days"),
        ] {
            assert!(found.as_ref().is_some_and(|found| found.contains(says)), "{found:?}");
        }
        // A new epoch that has no transaction yet.
        assert_eq!(staleness(&newest(90), 3, Some(&presence(3, 9, 3)), most, NOW_MS), None);
        let ahead = Newest { time_ms: NOW_MS + 1, ..newest(0) };
        assert_eq!(staleness(&ahead, 2, None, most, NOW_MS), None, "a clock that is behind");
    }
}
