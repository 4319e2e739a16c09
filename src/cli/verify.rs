//! `waltrail verify`

mod output;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use self::output::{Outcome, junit, markdown, text};
use super::exit_code::{Failure, gravest};
use super::interrupt::unless_interrupted;
use super::tell::{shown, tell};
use super::{ConfigArgument, Source, Sources, open_patiently};
use crate::clock::{SystemClock, random_bytes};
use crate::config::default_state_dir;
use crate::config::units::parse_duration;
use crate::verify::against::Live;
use crate::verify::{Depth, Settings, verify};

/// So many states are restored unless told otherwise.
const DEFAULT_POINTS: u32 = 3;
/// GitHub's place for what a step has to say, in Markdown.
const SUMMARY_VARIABLE: &str = "GITHUB_STEP_SUMMARY";

/// Arguments of `verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail verify s3://my-bucket/app
  waltrail verify --config /etc/waltrail.toml --max-lag 15m
  waltrail verify s3://my-bucket/app --depth data --sample 5% --max-duration 10m
  waltrail verify /data/app.db --against /data/app.db
  waltrail verify s3://my-bucket/app s3://my-bucket/jobs --format junit > verify.xml

Exit codes:
  0   ok: everything that was checked is as it should be
  1   degraded: what should be restorable is, but somebody should look; or the verification was interrupted
  2   failed: the newest state, or another one that should be restorable, is not
  10  wrong usage or configuration; the scratch directory is not there
  11  storage is not reached, or refuses; that is no verdict
  12  there is no such backup, or nothing in it yet, or nothing at all that a pattern or a directory stands for
  13  an object has an unknown format
  14  the scratch directory is there and can't be written
Of several replicas the gravest counts: 2, then 11, then the others from 10 on, then 1.")]
pub struct VerifyArguments {
    /// Replica URLs, or paths of databases of the configuration [default: all of the configuration, of patterns and directories what is
    /// stored, whether it is here or not; or the environment's]
    #[arg(value_name = "REPLICA")]
    sources: Vec<String>,
    /// How deep to go
    #[arg(long, value_enum, default_value_t = Depth::Drill)]
    depth: Depth,
    /// With --depth drill, restore so many states: the newest one, the oldest one, and others at random [default: 3]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    points: Option<u32>,
    /// With --depth data, read this share of all segments and extents, chosen at random [default: 100%]
    #[arg(long, value_name = "PERCENT", value_parser = parse_share)]
    sample: Option<f64>,
    /// Make the same random choices again
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Begin nothing more after this long; what was not reached is in the report
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    max_duration: Option<Duration>,
    /// Restore into this directory; nothing stays there [default: the directory for temporary files]
    #[arg(long, value_name = "DIRECTORY")]
    scratch: Option<PathBuf>,
    /// With --depth drill, do not have SQLite check what is restored: for databases that it can't read, because they are encrypted
    #[arg(long)]
    no_integrity_check: bool,
    /// Compare the newest state with this live database, which goes on being used
    #[arg(long, value_name = "DATABASE")]
    against: Option<PathBuf>,
    /// Where the daemon of that database keeps local state, if the configuration does not say so
    #[arg(long, value_name = "DIRECTORY", requires = "against")]
    state_dir: Option<PathBuf>,
    /// The newest transaction may be this old, unless the database is known to be idle
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    max_lag: Option<Duration>,
    /// How to write the report
    #[arg(long, value_enum, default_value_t = Output::Text)]
    format: Output,
    #[command(flatten)]
    config: ConfigArgument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// One JSON object a replica, each on a line.
    Json,
    /// JUnit XML: a test suite a replica, a test case a check.
    Junit,
}

/// A share of all: `5%`.
fn parse_share(text: &str) -> Result<f64, String> {
    let number = text.trim().strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    let share = number.filter(|percent| *percent > 0.0 && *percent <= 100.0).map(|percent| percent / 100.0);
    share.ok_or_else(|| format!("'{text}' is no share; write 5%, more than 0% and at most 100%"))
}

/// Verifies replicas, one after another; gives the exit code.
///
/// # Errors
/// When the arguments are wrong, or the report can't be written. One replica's trouble does not stop the next.
pub async fn run(arguments: VerifyArguments) -> Result<u8, Failure> {
    unless_interrupted(
        work(arguments),
        "interrupted; nothing was changed, and nothing is left in the scratch directory",
    )
    .await
}

async fn work(arguments: VerifyArguments) -> Result<u8, Failure> {
    arguments.check_depth()?;
    let Sources { found, failures } = arguments.sources().await?;
    let mut outcomes = Vec::new();
    for (location, failure) in failures {
        let outcome = Outcome { location, result: Err(failure) };
        report(&outcome, arguments.format)?;
        outcomes.push(outcome);
    }
    for source in found {
        let outcome = verify_one(&arguments, source).await?;
        report(&outcome, arguments.format)?;
        outcomes.push(outcome);
    }
    if arguments.format == Output::Junit {
        write(&junit(&outcomes))?;
    }
    if let Some(path) = std::env::var_os(SUMMARY_VARIABLE).filter(|path| !path.is_empty()) {
        append_summary(Path::new(&path), &markdown(&outcomes));
    }
    Ok(gravest(outcomes.iter().map(Outcome::code)))
}

fn report(outcome: &Outcome, format: Output) -> Result<(), Failure> {
    match format {
        Output::Text => write(&text(outcome))?,
        Output::Json => write(&output::json(outcome)?)?,
        // One document for all.
        Output::Junit => {}
    }
    if let Err(failure) = &outcome.result {
        let _ = failure.report();
    }
    Ok(())
}

async fn verify_one(arguments: &VerifyArguments, source: Source) -> Result<Outcome, Failure> {
    let location = source.replica.to_string();
    let settings = arguments.settings(&source)?;
    let store = open_patiently(&source.replica).await;
    let result = verify(store, &settings, SystemClock::shared()).await.map_err(Failure::from);
    Ok(Outcome { location, result })
}

impl VerifyArguments {
    /// Refuses what would have no effect at the depth that was chosen: a verdict must not be taken for one of more than was looked at.
    fn check_depth(&self) -> Result<(), Failure> {
        let goes_with = |is_given: bool, option: &str, depth: Depth, name: &str| match is_given && self.depth != depth {
            true => Err(Failure::usage(format!("{option} goes with --depth {name}: it says nothing otherwise"))),
            false => Ok(()),
        };
        goes_with(self.sample.is_some(), "--sample", Depth::Data, "data")?;
        goes_with(self.points.is_some(), "--points", Depth::Drill, "drill")?;
        goes_with(self.no_integrity_check, "--no-integrity-check", Depth::Drill, "drill")
    }

    /// What is verified. With --against alone it is the replica of that database.
    async fn sources(&self) -> Result<Sources, Failure> {
        let Some(database) = &self.against else { return self.config.resolve_all(&self.sources).await };
        let known = self.config.replicas_of(database)?;
        if self.sources.is_empty() && !known.is_empty() {
            return Ok(Sources { found: known.into_iter().map(Source::of).collect(), ..Sources::default() });
        }
        let sources = self.config.resolve_all(&self.sources).await?;
        let databases: HashSet<Option<&PathBuf>> =
            sources.found.iter().map(|source| source.database.as_ref().map(|database| &database.path)).collect();
        let is_one = sources.found.len() == 1 || (databases.len() == 1 && !databases.contains(&None));
        if is_one {
            Ok(sources)
        } else {
            Err(Failure::usage("--against compares replicas of one database with it: which replica?".into()))
        }
    }

    fn settings(&self, source: &Source) -> Result<Settings, Failure> {
        let scratch = self.scratch.clone().unwrap_or_else(std::env::temp_dir);
        if !scratch.is_dir() {
            let shown = scratch.display();
            return Err(Failure::usage(format!(
                "'{shown}' is no directory: --scratch, or TMPDIR, names where to restore"
            )));
        }
        let no_randomness = |error| Failure::other(format!("the operating system has no random numbers: {error}"));
        let seed = match self.seed {
            Some(seed) => seed,
            // Short enough to be typed.
            None => u64::from(u32::from_le_bytes(random_bytes::<4>().map_err(no_randomness)?)),
        };
        Ok(Settings {
            depth: self.depth,
            points: self.points.unwrap_or(DEFAULT_POINTS),
            share: self.sample.unwrap_or(1.0),
            seed,
            max_duration: self.max_duration,
            scratch,
            checks_integrity: !self.no_integrity_check,
            max_lag: self.max_lag.filter(|_| !source.is_deleted),
            retention: source.database.as_ref().map(|database| database.retention),
            live: self.live(source)?,
        })
    }

    /// The live database, and where the daemon listens that follows it for this replica.
    fn live(&self, source: &Source) -> Result<Option<Live>, Failure> {
        let Some(path) = &self.against else { return Ok(None) };
        let database = super::absolute(path)?;
        let replicas = self.config.replicas_of(&database)?;
        let of_source = replicas.iter().find(|known| known.replica == source.replica);
        let known = of_source.or(replicas.first()).map(|known| known.state_dir.clone());
        let state_dir = self.state_dir.clone().or(known).unwrap_or_else(|| default_state_dir(&database));
        Ok(Some(Live { database, state_dir, patience: Duration::from_secs(30) }))
    }
}

fn write(report: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    shown(out.write_all(report.as_bytes()).and_then(|()| out.flush()))
}

/// That it can't be written changes no verdict.
fn append_summary(path: &Path, summary: &str) {
    let appended = File::options().create(true).append(true).open(path);
    if let Err(error) = appended.and_then(|mut file| file.write_all(summary.as_bytes())) {
        tell(format_args!("note: the summary can't be written to {}: {error}", path.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        assert_eq!(parse_share("5%"), Ok(0.05));
        assert_eq!(parse_share(" 100 % "), Ok(1.0));
        for wrong in ["", "5", "-1%", "0%", "101%", "NaN%", "x%"] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
    }
}
