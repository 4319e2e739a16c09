//! `waltrail prune`

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;

use super::exit_code::Failure;
use super::interrupt::unless_interrupted;
use super::tell::{shown, tell};
use super::{ConfigArgument, Source, for_each_replica, open_patiently};
use crate::clock::{Clock, SystemClock};
use crate::config::units::parse_retention;
use crate::replicate::pruner::complaint_of;
use crate::retain::prune::{Outcome, prune};
use crate::retain::tails::TailCache;
use crate::retain::{Now, RetentionSettings};

/// Arguments of `prune`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail prune /data/app.db --dry-run
  waltrail prune --config /etc/waltrail.toml /data/app.db
  waltrail prune s3://my-bucket/app --retention 30d --keep-weekly 8

The daemon does the same every hour that it ships something in. States with a mark stay; so does everything that was needed
an hour ago, because a restore may be under way.")]
pub struct PruneArguments {
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    /// Keep every state of so long: 30d, or forever [default: what the configuration says; needed with a replica URL]
    #[arg(long, value_name = "DURATION", value_parser = parse_window)]
    retention: Option<Window>,
    /// And one state each of so many days
    #[arg(long, value_name = "COUNT")]
    keep_daily: Option<u32>,
    /// And one state each of so many weeks
    #[arg(long, value_name = "COUNT")]
    keep_weekly: Option<u32>,
    /// And one state each of so many months
    #[arg(long, value_name = "COUNT")]
    keep_monthly: Option<u32>,
    /// Show what would go and what would stay, and why; delete nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    config: ConfigArgument,
}

/// For how long everything is kept; `None` for ever.
#[derive(Debug, Clone, Copy)]
struct Window(Option<Duration>);

fn parse_window(text: &str) -> Result<Window, String> {
    parse_retention(text).map(Window)
}

impl PruneArguments {
    /// What the configuration says, and what is said here instead. What a URL alone means nobody knows: a default could let go
    /// what the configuration of another machine keeps.
    fn settings(&self, configured: Option<RetentionSettings>) -> Result<RetentionSettings, Failure> {
        let told = self.retention.map(|Window(window)| window.map(|window| window.as_millis() as u64));
        let mut settings = match (configured, told) {
            (Some(configured), None) => configured,
            (Some(configured), Some(window_ms)) => RetentionSettings { window_ms, ..configured },
            (None, Some(window_ms)) => RetentionSettings { window_ms, ..RetentionSettings::default() },
            (None, None) => return Err(Failure::usage("how much is to be kept? Say so with --retention".into())),
        };
        let kept = [self.keep_daily, self.keep_weekly, self.keep_monthly];
        if settings.window_ms.is_none() && kept.iter().any(|count| count.is_some_and(|count| count > 0)) {
            return Err(Failure::usage(
                "everything is kept forever; --keep-daily and the like say nothing then".into(),
            ));
        }
        settings.keep_daily = self.keep_daily.unwrap_or(settings.keep_daily);
        settings.keep_weekly = self.keep_weekly.unwrap_or(settings.keep_weekly);
        settings.keep_monthly = self.keep_monthly.unwrap_or(settings.keep_monthly);
        Ok(settings)
    }
}

/// Lets old history go.
///
/// # Errors
/// See [`crate::retain::RetainError`]; when the store does not delete.
pub async fn run(arguments: PruneArguments) -> Result<(), Failure> {
    let what = "interrupted; what was deleted was not needed, and the next prune does the rest";
    unless_interrupted(work(arguments), what).await
}

async fn work(arguments: PruneArguments) -> Result<(), Failure> {
    let sources = arguments.config.resolve_replicas(arguments.source.as_deref()).await?;
    let names_replica = sources.len() > 1;
    for_each_replica(sources, async |source| {
        if names_replica {
            shown(writeln!(io::stdout().lock(), "in {}", source.replica))?;
        }
        prune_one(&arguments, source).await
    })
    .await
}

async fn prune_one(arguments: &PruneArguments, source: &Source) -> Result<(), Failure> {
    let settings = arguments.settings(source.database.as_ref().map(|database| database.retention))?;
    let store = open_patiently(&source.replica).await;
    let now = Now::Told(SystemClock::new().now_ms());
    let outcome = prune(&store, &settings, now, &mut TailCache::default(), arguments.dry_run).await?;
    shown(writeln!(io::stdout().lock(), "{}", outcome.plan))?;
    for note in &outcome.plan.notes {
        tell(format_args!("note: {note}"));
    }
    if arguments.dry_run {
        tell("nothing was deleted: --dry-run");
        return Ok(());
    }
    tell(format_args!("deleted    {} objects, {} bytes", outcome.deleted_objects, outcome.deleted_bytes));
    not_deleted(&outcome)
}

fn not_deleted(outcome: &Outcome) -> Result<(), Failure> {
    match complaint_of(outcome) {
        None => Ok(()),
        Some(why) => {
            let (refused, undeleted) = (outcome.refused.objects, outcome.undeleted.objects);
            let example = outcome.undeleted.example.as_deref();
            let example =
                example.or(outcome.refused.example.as_ref().map(|error| error.key.as_str())).unwrap_or_default();
            Err(Failure::not_deleted(format!(
                "{} objects are still there, {example} for one: {why}",
                refused + undeleted
            )))
        }
    }
}
