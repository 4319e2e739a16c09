//! Metrics, in Prometheus' text format (<https://prometheus.io/docs/instrumenting/exposition_formats/>). Their names, units and
//! labels are documented in `docs/OPERATIONS.md`, and stay.

use std::fmt::Write;

use crate::replicate::control::State;
use crate::replicate::status::{Phase, Status};

/// A metric of each database.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// `None` where there is nothing to tell yet.
    value: fn(&Status, u64) -> Option<f64>,
}

const METRICS: [Metric; 16] = [
    Metric {
        name: "waltrail_following",
        kind: "gauge",
        help: "1 if everything that is committed to the database is captured.",
        value: |status, _| Some(f64::from(u8::from(status.phase == Phase::Following))),
    },
    Metric {
        name: "waltrail_failing",
        kind: "gauge",
        help: "1 if the database can't be followed, storage that refuses at the start included, or is not replicated any more.",
        value: |status, _| Some(f64::from(u8::from(status.is_failing()))),
    },
    Metric {
        name: "waltrail_lag_seconds",
        kind: "gauge",
        help: "For how long something that is captured has not been confirmed in storage; 0 when everything is.",
        value: |status, now_ms| Some(status.lag(now_ms).as_secs_f64()),
    },
    Metric {
        name: "waltrail_epoch",
        kind: "gauge",
        help: "The epoch that the database is recorded in.",
        value: |status, _| status.captured.map(|State { position, .. }| f64::from(position.epoch)),
    },
    Metric {
        name: "waltrail_captured_transaction",
        kind: "gauge",
        help: "The number of the last transaction that is captured.",
        value: |status, _| status.captured.map(|State { position, .. }| position.txid as f64),
    },
    Metric {
        name: "waltrail_confirmed_transaction",
        kind: "gauge",
        help: "The number of the last transaction that is confirmed in storage.",
        value: |status, _| status.confirmed.map(|State { position, .. }| position.txid as f64),
    },
    Metric {
        name: "waltrail_captured_timestamp_seconds",
        kind: "gauge",
        help: "Time of the last transaction that is captured, in seconds since 1970.",
        value: |status, _| status.captured.map(|State { time_ms, .. }| seconds(time_ms)),
    },
    Metric {
        name: "waltrail_confirmed_timestamp_seconds",
        kind: "gauge",
        help: "Time of the last transaction that is confirmed in storage, in seconds since 1970.",
        value: |status, _| status.confirmed.map(|State { time_ms, .. }| seconds(time_ms)),
    },
    Metric {
        name: "waltrail_snapshot_timestamp_seconds",
        kind: "gauge",
        help: "When the last confirmed snapshot was begun, in seconds since 1970.",
        value: |status, _| status.snapshot_ms.map(seconds),
    },
    Metric {
        name: "waltrail_verified_timestamp_seconds",
        kind: "gauge",
        help: "When the replica was last restored by the daemon and found right, in seconds since 1970.",
        value: |status, _| status.verified_ms.map(seconds),
    },
    Metric {
        name: "waltrail_verify_failed",
        kind: "gauge",
        help: "1 if the last try to restore the replica failed.",
        value: |status, _| Some(f64::from(u8::from(status.verify_trouble.is_some()))),
    },
    Metric {
        name: "waltrail_waiting_bytes",
        kind: "gauge",
        help: "Bytes of segments that wait on the local disk to be shipped.",
        value: |status, _| Some(status.waiting_bytes as f64),
    },
    Metric {
        name: "waltrail_transactions_total",
        kind: "counter",
        help: "Transactions that were captured since the process started.",
        value: |status, _| Some(status.transactions as f64),
    },
    Metric {
        name: "waltrail_segments_total",
        kind: "counter",
        help: "Segments that were confirmed since the process started.",
        value: |status, _| Some(status.segments as f64),
    },
    Metric {
        name: "waltrail_segment_bytes_total",
        kind: "counter",
        help: "Bytes of the segments that were confirmed since the process started.",
        value: |status, _| Some(status.segments_len_bytes as f64),
    },
    Metric {
        name: "waltrail_snapshots_total",
        kind: "counter",
        help: "Snapshots that were confirmed since the process started.",
        value: |status, _| Some(status.snapshots as f64),
    },
];

fn seconds(time_ms: u64) -> f64 {
    time_ms as f64 / 1000.0
}

/// All metrics of these databases.
#[must_use]
pub fn text(statuses: &[Status], now_ms: u64) -> String {
    let mut out = String::new();
    let version = env!("CARGO_PKG_VERSION");
    let sqlite = rusqlite::version();
    // Writing to a string does not fail.
    write!(
        out,
        "# HELP waltrail_build_info The program; always 1.\n# TYPE waltrail_build_info gauge\n\
         waltrail_build_info{{version=\"{version}\",sqlite=\"{sqlite}\"}} 1\n"
    )
    .ok();
    for Metric { name, kind, help, value } in METRICS {
        write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n").ok();
        for status in statuses {
            if let Some(value) = value(status, now_ms) {
                let (database, replica) = (escaped(&status.database.to_string_lossy()), escaped(&status.replica));
                writeln!(out, "{name}{{database=\"{database}\",replica=\"{replica}\"}} {value}").ok();
            }
        }
    }
    out
}

/// A label's value: backslash, quote and line feed are escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Position;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let state = State { position: Position { epoch: 3, txid: 77 }, time_ms: 1_790_000_000_500 };
        let status = Status {
            database: "/data/a\"b\\c.db".into(),
            replica: "s3://b/a".into(),
            phase: Phase::Following,
            captured: Some(state),
            confirmed: None,
            unconfirmed_since_ms: Some(1_790_000_000_000),
            ..Status::default()
        };
        let text = text(&[status], 1_790_000_002_500);
        for line in [
            r#"waltrail_following{database="/data/a\"b\\c.db",replica="s3://b/a"} 1"#,
            r#"waltrail_lag_seconds{database="/data/a\"b\\c.db",replica="s3://b/a"} 2.5"#,
            r#"waltrail_captured_transaction{database="/data/a\"b\\c.db",replica="s3://b/a"} 77"#,
            r#"waltrail_captured_timestamp_seconds{database="/data/a\"b\\c.db",replica="s3://b/a"} 1790000000.5"#,
            "# TYPE waltrail_segments_total counter",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("waltrail_confirmed_transaction{"), "nothing is confirmed yet: no value, and not 0");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok() && name.starts_with("waltrail_"), "{line}");
        }
    }
}
