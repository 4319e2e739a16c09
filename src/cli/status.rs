//! `waltrail status`: asking the daemons of all databases how they are.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use futures_util::StreamExt;
use serde::Serialize;

use super::ConfigArgument;
use super::exit_code::{Failure, is_of_another_user};
use super::tell::{TextOrJson, shown};
use crate::clock::{Clock, SystemClock, format_time};
use crate::config::DatabaseConfig;
use crate::config::fleet::Found;
use crate::config::units::parse_duration;
use crate::health::DEFAULT_HEALTHY_LAG;
use crate::replicate::control::ask_status;
use crate::replicate::status::{Phase, Status};

/// So many databases are asked for at a time.
const ASKED_AT_A_TIME: usize = 64;
/// A daemon answers at once, or not.
const PATIENCE: Duration = Duration::from_secs(3);

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail status
  waltrail status /data/app.db --format json
  waltrail status --config /etc/waltrail.toml --watch

Exit code 1 when a database has no daemon or is not replicated any more; when for longer than --max-lag (5 minutes, unless told
otherwise) it can't be followed, fails again and again, or waits for its confirmation or its first snapshot; when it could not be
verified; when there is no database to tell of, or a directory can't be searched for them. Before that time is over, what is
wrong is shown, with exit code 0: most of it mends itself.")]
pub struct StatusArguments {
    /// Databases [default: all of the configuration, or the environment's]
    databases: Vec<std::path::PathBuf>,
    /// How to write it
    #[arg(long, value_enum, default_value_t = TextOrJson::Text)]
    format: TextOrJson,
    /// Show it again every second, until interrupted
    #[arg(long)]
    watch: bool,
    /// What is confirmed later than this after its capture is trouble; so is a database that can't be followed for longer
    /// [default: 5m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    max_lag: Option<Duration>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// A database, and what its daemon says; or why there is nothing to say.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    status: Status,
    /// Why a person should look.
    trouble: Option<String>,
    /// Nobody here may ask its daemon, if there is one.
    #[serde(skip)]
    is_unknown: bool,
}

/// Shows how replication is.
///
/// # Errors
/// When one of them is in trouble.
pub async fn run(arguments: StatusArguments) -> Result<(), Failure> {
    loop {
        // Databases come and go while it is watched.
        let Found { databases, troubles, .. } = match arguments.databases.as_slice() {
            [] => arguments.config.find()?,
            paths => Found { databases: arguments.config.databases(paths)?, ..Found::default() },
        };
        if databases.is_empty() && troubles.is_empty() && !arguments.watch {
            let why = "there is nothing to tell of: nothing is here of what the configuration names by patterns and \
                       directories";
            return Err(Failure::other(why.into()));
        }
        let rows = rows(&databases, arguments.max_lag.unwrap_or(DEFAULT_HEALTHY_LAG)).await;
        if let Err(error) = show(&rows, &arguments) {
            return shown(Err(error));
        }
        if arguments.watch {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        let of_row = |row: &Row| Some(format!("{}: {}", row.status.database.display(), row.trouble.as_ref()?));
        let of_search = troubles.iter().map(|trouble| format!("while looking for databases: {trouble}"));
        let troubled: Vec<String> = of_search.chain(rows.iter().filter_map(of_row)).collect();
        return if troubled.is_empty() { Ok(()) } else { Err(Failure::other(troubled.join("\n"))) };
    }
}

async fn rows(databases: &[DatabaseConfig], max_lag: Duration) -> Vec<Row> {
    let now_ms = SystemClock::new().now_ms();
    let row = |database: &DatabaseConfig| {
        let (path, state_dir) = (database.path.clone(), database.state_dir.clone());
        let replica = database.replica.to_string();
        async move {
            match ask_status(&path, &state_dir, PATIENCE).await {
                Ok(status) => Row { trouble: status.trouble(now_ms, max_lag), status, is_unknown: false },
                Err(error) => {
                    let is_of_another = is_of_another_user(&error);
                    let hint = if is_of_another { "; run it as the daemon's user" } else { "" };
                    let status = Status { database: path, replica, phase: Phase::Stopped, ..Status::default() };
                    Row { status, trouble: Some(format!("{error}{hint}")), is_unknown: is_of_another }
                }
            }
        }
    };
    // Each takes two descriptors here, and the daemon answers a limited number at a time.
    futures_util::stream::iter(databases).map(row).buffered(ASKED_AT_A_TIME).collect().await
}

fn show(rows: &[Row], arguments: &StatusArguments) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match arguments.format {
        TextOrJson::Json => {
            for row in rows {
                writeln!(out, "{}", serde_json::to_string(row)?)?;
            }
        }
        TextOrJson::Text => write!(out, "{}", table(rows, SystemClock::new().now_ms()))?,
    }
    out.flush()
}

fn table(rows: &[Row], now_ms: u64) -> String {
    let mut lines = vec![
        ["DATABASE", "STATE", "CAPTURED", "CONFIRMED", "LAG", "SNAPSHOT", "VERIFIED", "WAITING"]
            .map(str::to_owned)
            .to_vec(),
    ];
    lines.extend(rows.iter().map(|row| cells(row, now_ms).to_vec()));
    let databases: HashSet<&Path> = rows.iter().map(|row| row.status.database.as_path()).collect();
    if databases.len() < rows.len() {
        lines[0].push("REPLICA".into());
        for (line, row) in lines[1..].iter_mut().zip(rows) {
            line.push(row.status.replica.clone());
        }
    }
    let width = |column: usize| lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, cells) in lines.iter().enumerate() {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
        let row = index.checked_sub(1).and_then(|index| rows.get(index));
        let error = row.and_then(|row| row.trouble.as_ref().or(row.status.error.as_ref()));
        if let Some(error) = error {
            text.push_str(&format!("  {error}\n"));
        }
        for (what, found) in row.into_iter().flat_map(|row| &row.status.notes) {
            text.push_str(&format!("  note: {what}: {found}\n"));
        }
    }
    text
}

fn cells(row: &Row, now_ms: u64) -> [String; 8] {
    let (none, status) = (|| "-".to_owned(), &row.status);
    let phase = match status.phase {
        _ if row.is_unknown => "not known",
        Phase::Starting => "starting",
        Phase::Waiting => "not there yet",
        Phase::Following => "following",
        Phase::Failing => "failing",
        Phase::Stopped => "not running",
    };
    [
        status.database.display().to_string(),
        phase.to_owned(),
        status.captured.map_or_else(none, |state| format!("{} ({})", state.position.txid, format_time(state.time_ms))),
        status.confirmed.map_or_else(none, |state| state.position.txid.to_string()),
        format!("{:.1} s", status.lag(now_ms).as_secs_f64()),
        status.snapshot_ms.map_or_else(none, format_time),
        status.verified_ms.map_or_else(none, format_time),
        format!("{} bytes", status.waiting_bytes),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_may_not_be_asked_is_not_called_stopped() {
        let status = Status { database: "/app.db".into(), phase: Phase::Stopped, ..Status::default() };
        let table_of = |is_unknown| table(&[Row { status: status.clone(), trouble: None, is_unknown }], 0);
        let (unknown, stopped) = (table_of(true), table_of(false));
        assert!(unknown.contains("not known") && !unknown.contains("not running"), "{unknown}");
        assert!(stopped.contains("not running"), "{stopped}");
    }
}
