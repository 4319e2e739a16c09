//! `waltrail log`

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;

use super::exit_code::Failure;
use super::tell::{TextOrJson, shown, tell};
use super::{ConfigArgument, for_each_replica, open_patiently};
use crate::clock::format_time;
use crate::format::Position;
use crate::format::key::SegmentKey;
use crate::restore::history::{Epoch, History, Stored};
use crate::restore::tail::read_table;
use crate::store::SharedStore;

/// Arguments of `log`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail log s3://my-bucket/app
  waltrail log s3://my-bucket/app --transactions
  waltrail log --config /etc/waltrail.toml /data/app.db --format json")]
pub struct LogArguments {
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    /// One line for each transaction instead of for each object
    #[arg(long)]
    transactions: bool,
    /// How to write it
    #[arg(long, value_enum, default_value_t = TextOrJson::Text)]
    format: TextOrJson,
    #[command(flatten)]
    config: ConfigArgument,
}

/// A line of the log.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Line {
    /// Whose lines follow, where a database has several.
    Replica {
        replica: String,
    },
    Epoch {
        epoch: u32,
        claimed_ms: u64,
        first_txid: u64,
        continues: bool,
        parent: Option<Position>,
        writer: String,
        host: String,
        program: String,
    },
    Snapshot {
        epoch: u32,
        txid: u64,
        time_ms: u64,
        len_bytes: u64,
    },
    Segment {
        epoch: u32,
        first_txid: u64,
        last_txid: u64,
        time_ms: u64,
        len_bytes: u64,
    },
    Transaction {
        epoch: u32,
        txid: u64,
        time_ms: u64,
        pages: usize,
        bytes: u64,
        database_bytes: u64,
        schema_changed: bool,
        coalesced: bool,
    },
}

impl Line {
    fn text(&self) -> String {
        match self {
            Self::Replica { replica } => format!("in {replica}"),
            Self::Epoch { epoch, claimed_ms, first_txid, continues, parent, writer, host, program } => {
                let from = match (parent, continues) {
                    (None, _) => "begins".to_owned(),
                    (Some(parent), true) => format!("continues {parent}"),
                    (Some(parent), false) => format!("begins anew after {parent}"),
                };
                format!(
                    "epoch {epoch}  {}  {from}, first transaction {first_txid}  ({program} on {host}, writer {writer})",
                    format_time(*claimed_ms)
                )
            }
            Self::Snapshot { txid, time_ms, len_bytes, .. } => {
                format!("  snapshot  {}  begun after {txid:<25} {len_bytes:>12} bytes", format_time(*time_ms))
            }
            Self::Segment { first_txid, last_txid, time_ms, len_bytes, .. } => {
                let range = format!("{first_txid} to {last_txid}");
                format!("  segment   {}  {range:<37} {len_bytes:>12} bytes", format_time(*time_ms))
            }
            Self::Transaction { txid, time_ms, pages, bytes, database_bytes, schema_changed, coalesced, .. } => {
                let mut mark = if *schema_changed { "  schema" } else { "" }.to_owned();
                if *coalesced {
                    mark.push_str("  coalesced: what changed while nobody watched");
                }
                format!(
                    "  {txid:>12}  {}  {pages:>6} pages  {bytes:>10} bytes  database {database_bytes:>12} bytes{mark}",
                    format_time(*time_ms)
                )
            }
        }
    }
}

/// Shows what a replica holds.
///
/// # Errors
/// See [`crate::restore::RestoreError`].
pub async fn run(arguments: LogArguments) -> Result<(), Failure> {
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        let store = open_patiently(&source.replica).await;
        let history = History::load(&store).await?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        let heading: &[Line] = &[Line::Replica { replica: source.replica.to_string() }];
        let written = match write(&mut out, arguments.format, if names_replica { heading } else { &[] }) {
            Ok(()) => show(&store, &history, &arguments, &mut out).await?,
            unwritten => unwritten,
        };
        shown(written.and_then(|()| out.flush()))?;
        for stranger in &history.strangers {
            tell(format_args!("note: {stranger} belongs to no epoch and is not used"));
        }
        Ok(())
    })
    .await
}

async fn show(
    store: &SharedStore,
    history: &History,
    arguments: &LogArguments,
    out: &mut impl Write,
) -> Result<io::Result<()>, Failure> {
    for epoch in history.epochs.values() {
        let mut lines = vec![epoch_line(epoch)];
        if !arguments.transactions {
            lines.extend(object_lines(epoch));
        }
        if let Err(error) = write(out, arguments.format, &lines) {
            return Ok(Err(error));
        }
        if arguments.transactions {
            for stored in not_superseded(epoch) {
                let (footer, table) = read_table(store, &history.location, stored).await?;
                let lines: Vec<Line> = table
                    .transactions
                    .iter()
                    .map(|transaction| Line::Transaction {
                        epoch: epoch.record.epoch,
                        txid: transaction.txid,
                        time_ms: transaction.info.time_ms,
                        pages: transaction.page_numbers.len(),
                        bytes: transaction.page_numbers.len() as u64 * u64::from(footer.page_size),
                        database_bytes: u64::from(transaction.info.size_pages) * u64::from(footer.page_size),
                        schema_changed: transaction.info.schema_changed,
                        coalesced: transaction.info.coalesced,
                    })
                    .collect();
                if let Err(error) = write(out, arguments.format, &lines) {
                    return Ok(Err(error));
                }
            }
        }
    }
    Ok(Ok(()))
}

/// The segments without those that another one holds whole: each transaction is shown once.
fn not_superseded(epoch: &Epoch) -> Vec<&Stored<SegmentKey>> {
    let mut segments: Vec<&Stored<SegmentKey>> = epoch.segments.iter().collect();
    segments.sort_by_key(|stored| (stored.key.0.first_txid, std::cmp::Reverse(stored.key.0.last_txid)));
    let mut reached_txid = 0;
    segments.retain(|stored| {
        let goes_further = stored.key.0.last_txid > reached_txid;
        reached_txid = reached_txid.max(stored.key.0.last_txid);
        goes_further
    });
    segments
}

fn write(out: &mut impl Write, format: TextOrJson, lines: &[Line]) -> io::Result<()> {
    for line in lines {
        match format {
            TextOrJson::Text => writeln!(out, "{}", line.text())?,
            TextOrJson::Json => writeln!(out, "{}", serde_json::to_string(line)?)?,
        }
    }
    Ok(())
}

fn epoch_line(epoch: &Epoch) -> Line {
    let record = epoch.record.clone();
    Line::Epoch {
        epoch: record.epoch,
        claimed_ms: record.claimed_ms,
        first_txid: record.first_txid,
        continues: record.continues,
        parent: record.parent,
        writer: record.writer,
        host: record.host,
        program: record.program,
    }
}

/// Snapshots and segments of an epoch in the order of their transactions.
fn object_lines(epoch: &Epoch) -> Vec<Line> {
    let snapshots = epoch.snapshots.iter().map(|stored| {
        let key = stored.key;
        let line =
            Line::Snapshot { epoch: key.epoch, txid: key.txid, time_ms: key.time_ms, len_bytes: stored.len_bytes };
        (key.txid, line)
    });
    let segments = epoch.segments.iter().map(|stored| {
        let span = stored.key.0;
        let line = Line::Segment {
            epoch: span.epoch,
            first_txid: span.first_txid,
            last_txid: span.last_txid,
            time_ms: span.time_ms,
            len_bytes: stored.len_bytes,
        };
        (span.first_txid, line)
    });
    let mut lines: Vec<(u64, Line)> = snapshots.chain(segments).collect();
    lines.sort_by_key(|(txid, _)| *txid);
    lines.into_iter().map(|(_, line)| line).collect()
}
