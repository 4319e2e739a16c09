//! `waltrail mark`, `marks` and `unmark`: names for states that stay.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::exit_code::Failure;
use super::moment::{parse_moment, parse_txid};
use super::tell::{TextOrJson, shown, tell};
use super::{ConfigArgument, Source, for_each_replica, open_patiently};
use crate::clock::{Clock, SystemClock, format_time};
use crate::config::units::parse_duration;
use crate::format::key::MarkKey;
use crate::format::record::MarkRecord;
use crate::replicate::control::{Request, State, ask};
use crate::restore::history::History;
use crate::restore::plan::Target;
use crate::retain::RetainError;
use crate::retain::marks::{find_mark, load_marks, remove_mark, set_mark};
use crate::store::SharedStore;

/// Arguments of `mark`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail mark before-2.0 /data/app.db && npx prisma migrate deploy
  waltrail mark before-2.0 s3://my-bucket/app
  waltrail mark friday s3://my-bucket/app --at '2026-03-06 18:00'
  waltrail restore s3://my-bucket/app --mark before-2.0 --output app.db

With the path of a database the daemon that follows it is asked first to ship everything that was committed: the mark holds
that. With a replica URL it holds the newest state that is in storage already. When the command returns, the mark is in
storage, in every replica of the database: one that fails does not keep the others from theirs. It keeps its state for as long
as it is there, whatever the retention.

In a container's start command, which runs again at each restart, --if-missing leaves the mark where the first run set it.")]
pub struct MarkArguments {
    /// 1 to 100 of A-Z, a-z, 0-9, '.', '_' and '-'
    #[arg(value_parser = parse_name)]
    name: String,
    /// The path of a database that is configured or followed, or a replica URL [default: the only configured one]
    source: Option<String>,
    /// Mark the state at this time
    #[arg(long, value_name = "TIME", conflicts_with = "txid")]
    at: Option<String>,
    /// Mark the state after this transaction
    #[arg(long, value_parser = parse_txid)]
    txid: Option<u64>,
    /// On the line that ends in this epoch, not the newest one
    #[arg(long)]
    epoch: Option<u32>,
    /// Give up after this long if the daemon does not confirm what was committed
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    /// Do nothing, successfully, in a replica that has a mark of this name, whatever it names
    #[arg(long)]
    if_missing: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Arguments of `marks`.
#[derive(Debug, Args)]
pub struct MarksArguments {
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    /// How to write them
    #[arg(long, value_enum, default_value_t = TextOrJson::Text)]
    format: TextOrJson,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Arguments of `unmark`.
#[derive(Debug, Args)]
pub struct UnmarkArguments {
    /// The mark
    name: String,
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    #[command(flatten)]
    config: ConfigArgument,
}

impl MarkArguments {
    /// The state to mark, and the line it is on. Without any wish the newest one, after everything that was committed is shipped.
    async fn target(&self, source: &Source, now_ms: u64) -> Result<(Target, Option<u32>), Failure> {
        match (&self.at, self.txid, self.epoch, source.live()) {
            (Some(at), ..) => {
                Ok((Target::Time(parse_moment(at, now_ms, &TimeZone::UTC).map_err(Failure::usage)?), self.epoch))
            }
            (None, Some(txid), ..) => Ok((Target::Txid(txid), self.epoch)),
            (None, None, None, Some((database, state_dir))) => {
                let State { position, .. } = ask(database, state_dir, Request::Sync, self.timeout).await?;
                Ok((Target::Txid(position.txid), Some(position.epoch)))
            }
            (None, None, epoch, _) => Ok((Target::Latest, epoch)),
        }
    }
}

/// Said before anything else is looked at: who has the arguments the wrong way round is told of that.
fn parse_name(name: &str) -> Result<String, RetainError> {
    MarkKey::of(name).map(|_| name.to_owned()).ok_or_else(|| RetainError::BadName(name.to_owned()))
}

/// Gives a state a name.
///
/// # Errors
/// See [`crate::retain::RetainError`] and [`crate::replicate::control::ControlError`].
pub async fn mark(arguments: MarkArguments) -> Result<(), Failure> {
    let now_ms = SystemClock::new().now_ms();
    // Each replica numbers transactions by itself.
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        let store = open_patiently(&source.replica).await;
        if arguments.if_missing
            && let Some(mark) = mark_of(&store, &arguments.name).await?
        {
            let what = format!("{}, {}", mark.position(), format_time(mark.time_ms));
            tell(format_args!("note: {} is there: {what}{}", mark.name, in_replica(source, names_replica)));
            return Ok(());
        }
        let (target, epoch) = arguments.target(source, now_ms).await?;
        let (mark, plan) = set_mark(&store, &arguments.name, target, epoch, now_ms).await?;
        let what = format!("{}, {}", mark.position(), format_time(mark.time_ms));
        tell(format_args!("marked     {}: {what}{}", mark.name, in_replica(source, names_replica)));
        for note in plan.notes {
            tell(format_args!("note: {note}"));
        }
        Ok(())
    })
    .await
}

/// The end of a line that is about one of several replicas.
fn in_replica(source: &Source, names_replica: bool) -> String {
    if names_replica { format!(", in {}", source.replica) } else { String::new() }
}

/// The mark of that name; `None` where there is none.
async fn mark_of(store: &SharedStore, name: &str) -> Result<Option<MarkRecord>, RetainError> {
    match find_mark(store, name).await {
        Err(RetainError::NoSuchMark { .. }) => Ok(None),
        other => other.map(Some),
    }
}

/// Shows all marks.
///
/// # Errors
/// See [`crate::retain::RetainError`].
pub async fn marks(arguments: MarksArguments) -> Result<(), Failure> {
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        let store = open_patiently(&source.replica).await;
        // That there is no replica is not the same as that it has no marks.
        History::load(&store).await?;
        let marks = load_marks(&store).await?;
        let heading = Some(source.replica.to_string()).filter(|_| names_replica);
        shown(show(&marks, heading, arguments.format))
    })
    .await
}

/// A mark, and the replica that it is in.
#[derive(Serialize)]
struct MarkIn<'a> {
    #[serde(flatten)]
    mark: &'a MarkRecord,
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<&'a str>,
}

/// The marks of a replica, which is named if there are several.
fn show(marks: &[MarkRecord], replica: Option<String>, format: TextOrJson) -> io::Result<()> {
    let (mut out, replica) = (io::stdout().lock(), replica.as_deref());
    if let (Some(replica), TextOrJson::Text) = (replica, format) {
        writeln!(out, "in {replica}")?;
    }
    for mark in marks {
        match format {
            TextOrJson::Text => {
                let (time, created) = (format_time(mark.time_ms), format_time(mark.created_ms));
                writeln!(out, "{:<32}  {time}  {}  (set {created})", mark.name, mark.position())?;
            }
            TextOrJson::Json => writeln!(out, "{}", serde_json::to_string(&MarkIn { mark, replica })?)?,
        }
    }
    out.flush()
}

/// Takes a name away.
///
/// # Errors
/// See [`crate::retain::RetainError`].
pub async fn unmark(arguments: UnmarkArguments) -> Result<(), Failure> {
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        let store = open_patiently(&source.replica).await;
        let what = match remove_mark(&store, &arguments.name).await? {
            Some(mark) => format!("{}, {}", mark.position(), format_time(mark.time_ms)),
            None => "it could not be read".into(),
        };
        tell(format_args!("unmarked   {}: {what}{}", arguments.name, in_replica(source, names_replica)));
        Ok(())
    })
    .await
}
