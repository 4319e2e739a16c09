//! `waltrail restore`

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::exit_code::{Failure, NOT_THERE};
use super::interrupt::unless_interrupted;
use super::moment::{parse_moment, parse_txid, parse_zone};
use super::recover::{Recovered, Recovery, to_stdout};
use super::report::{Cost, Reporter, RestoreOutput};
use super::tell::tell;
use super::{ConfigArgument, Source, environment_database, nothing_stored, open_patiently, stored};
use crate::clock::{Clock, SystemClock};
use crate::config::fleet::{FleetConfig, Found};
use crate::config::{Config, DatabaseConfig, default_state_dir, identity};
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::install::{Manner, is_there, partial_path};
use crate::restore::plan::{Plan, Target, plan};
use crate::restore::progress::Progress;
use crate::retain::marks::find_mark;
use crate::store::SharedStore;
use crate::store::metered::{Meter, Metered};

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail restore s3://my-bucket/app --output app.db
  waltrail restore s3://my-bucket/app --output app.db --at '10 minutes ago'
  waltrail restore s3://my-bucket/app --output app.db --txid 1234 --dry-run
  waltrail restore --config /etc/waltrail.toml /data/app.db --if-missing --if-replica-exists
  waltrail restore s3://my-bucket/app --output app.db --before-schema-change
  waltrail restore s3://my-bucket/app --output - | gzip > app.db.gz
  waltrail restore --all --output-dir /tmp/check --at 'yesterday 14:00' --tz Europe/Berlin

Times: 2026-03-01T14:00:00Z, 2026-03-01T16:00:00+02:00, '2026-03-01 14:00' and 'yesterday 14:00' (UTC, or as --tz says), '10 minutes
ago', '2 days ago'. The last transaction that is not later is chosen.
What is restored is checked against its recorded fingerprint before the file gets its name.")]
pub struct RestoreArguments {
    /// A replica URL, or the path of a database that is configured or followed [default: the only configured one]
    source: Option<String>,
    /// Where to write the database; - for standard output [default: the database's path, if it is configured, or followed by a daemon
    /// (which has to be stopped to replace what is there)]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Restore the state at this time
    #[arg(long, value_name = "TIME", conflicts_with = "txid")]
    at: Option<String>,
    /// Restore the state after this transaction: 1234, 0x4d2 or, as in object names, 00000000000004d2
    #[arg(long, value_parser = parse_txid)]
    txid: Option<u64>,
    /// Follow the line that ends in this epoch, not the newest one
    #[arg(long)]
    epoch: Option<u32>,
    /// The time zone of --at, if it names none: Europe/Berlin, local [default: UTC]
    #[arg(long, value_name = "ZONE", value_parser = parse_zone, requires = "at")]
    tz: Option<jiff::tz::TimeZone>,
    /// Restore the state that a mark names
    #[arg(long, value_name = "NAME", conflicts_with_all = ["at", "txid", "epoch"])]
    mark: Option<String>,
    /// Restore the state that the last migration found: before the last transaction that changed the schema
    #[arg(long, conflicts_with_all = ["at", "txid", "mark"])]
    before_schema_change: bool,
    /// Show what would be done, and do nothing; needs no --output
    #[arg(long)]
    dry_run: bool,
    /// Replace the target if it is there
    #[arg(long)]
    force: bool,
    /// Do nothing, successfully, if the target is there; an empty file is not
    #[arg(long, conflicts_with = "force")]
    if_missing: bool,
    /// Do nothing, successfully, if there is no backup yet
    #[arg(long)]
    if_replica_exists: bool,
    /// With --force: keep what is there beside it, as FILE.before-restore
    #[arg(long, requires = "force")]
    keep_old: bool,
    /// Go on from what an earlier restore with --resume left, and leave what this one has if it does not come to its end
    #[arg(long)]
    resume: bool,
    /// Restore every database of the configuration; of several replicas from the one with the newest state
    #[arg(long, requires = "output_dir", conflicts_with_all = ["source", "output", "txid", "epoch"])]
    all: bool,
    /// With --all: where the databases go, under their own names
    #[arg(long, value_name = "DIRECTORY", requires = "all")]
    output_dir: Option<PathBuf>,
    /// Tell nothing but errors, and of success one line, or one event
    #[arg(long, short)]
    quiet: bool,
    /// How to tell: text on standard error, or JSON events on standard output
    #[arg(long, value_enum, default_value_t = RestoreOutput::Text)]
    format: RestoreOutput,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Restores, unless interrupted: then the file that was being written is removed on the way out, or kept to be resumed.
///
/// # Errors
/// See [`RestoreError`].
pub async fn run(arguments: RestoreArguments) -> Result<(), Failure> {
    let what = match arguments.resume {
        true => "interrupted; nothing was changed, and the same command goes on from here",
        false => "interrupted; nothing was changed",
    };
    unless_interrupted(restore(arguments), what).await
}

async fn restore(arguments: RestoreArguments) -> Result<(), Failure> {
    if let Some(directory) = &arguments.output_dir {
        return restore_all(&arguments, directory).await;
    }
    let source = arguments.config.resolve(arguments.source.as_deref()).await?;
    let known_path = source.live().map(|(path, _)| path.to_owned());
    // A plan needs no target; all else does.
    let output = match arguments.output.clone().or(known_path).map(Output::of) {
        None if arguments.dry_run => None,
        None => return Err(Failure::usage("where to? Name a file with --output".into())),
        Some(output) => Some(output.check(&arguments)?),
    };
    restore_one(&arguments, &source, output).await
}

/// One after another; all are tried, and the first failure is the one that is told.
async fn restore_all(arguments: &RestoreArguments, directory: &Path) -> Result<(), Failure> {
    let config = match arguments.config.load()? {
        Some(config) => config,
        None => Config::new(vec![environment_database()?]),
    };
    let (found, mut failures) = stored_everywhere(&config.fleets).await;
    failures.retain(|failure| !arguments.if_replica_exists || failure.code() != NOT_THERE);
    let all = by_name(&config, config.joined(found).databases);
    let mut outputs: HashSet<&Path> = HashSet::new();
    if let Some((name, _)) = all.iter().find(|(name, _)| !outputs.insert(name)) {
        let shown = directory.join(name);
        return Err(Failure::usage(format!("two databases would go to {}; restore them one by one", shown.display())));
    }
    for (name, replicas) in &all {
        let Some(database) = choose(arguments, replicas).await else { continue };
        let source = Source::at(database.replica.clone());
        let output = directory.join(name);
        let parent = output.parent().unwrap_or(directory);
        if !arguments.dry_run {
            std::fs::create_dir_all(parent)
                .map_err(|error| Failure::other(format!("{} can't be made: {error}", parent.display())))?;
        }
        if let Err(failure) = restore_one(arguments, &source, Some(Output::File(output))).await {
            tell(format_args!("{}: {failure}", database.path.display()));
            failures.push(failure);
        }
    }
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// What is stored for each fleet, because of those on this machine nothing may be left; and why there is nothing of some. Of one with
/// several replicas it is enough that one of them holds something.
async fn stored_everywhere(fleets: &[FleetConfig]) -> (Vec<Found>, Vec<Failure>) {
    let (mut all, mut failures, mut in_order) = (Vec::new(), Vec::new(), HashSet::new());
    for fleet in fleets {
        let path = &fleet.template().path;
        let held = match stored(fleet).await {
            Ok(databases) if databases.is_empty() => Err(nothing_stored(fleet)),
            other => other,
        };
        let databases = held.unwrap_or_else(|failure| {
            tell(format_args!("note: {failure}"));
            failures.push((path, failure));
            Vec::new()
        });
        if !databases.is_empty() {
            in_order.insert(path);
        }
        all.push(Found { databases, ..Found::default() });
    }
    failures.retain(|(path, _)| !in_order.contains(path));
    (all, failures.into_iter().map(|(_, failure)| failure).collect())
}

/// The databases, each with all its replicas and the name that it is restored under; those of fleets keep their folders.
fn by_name(config: &Config, databases: Vec<DatabaseConfig>) -> Vec<(PathBuf, Vec<DatabaseConfig>)> {
    let mut all: BTreeMap<PathBuf, (PathBuf, Vec<DatabaseConfig>)> = BTreeMap::new();
    for database in databases {
        let name = || {
            let is_named = config.databases.iter().any(|named| named.path == database.path);
            let is_of = |fleet: &&FleetConfig| !is_named && fleet.database_at(&database.path).is_some();
            let below = |fleet: &FleetConfig| database.path.strip_prefix(&fleet.root).ok().map(PathBuf::from);
            let last = || PathBuf::from(database.path.file_name().unwrap_or_default());
            (config.fleets.iter().find(is_of).and_then(below).unwrap_or_else(last), Vec::new())
        };
        all.entry(identity(&database.path)).or_insert_with(name).1.push(database);
    }
    all.into_values().collect()
}

/// Of a database's replicas the one that has the newest of the states that are asked for, as `run` does it: one that can't be read is
/// passed over if another one can. If none has any, one that can't be read has more to say than one that holds nothing.
async fn choose<'a>(arguments: &RestoreArguments, replicas: &'a [DatabaseConfig]) -> Option<&'a DatabaseConfig> {
    let (mut newest, mut unread): (Option<(u64, &DatabaseConfig)>, _) = (None, None);
    for database in replicas.iter().filter(|_| replicas.len() > 1) {
        match planned_ms(arguments, database).await {
            Ok(time_ms) if newest.is_none_or(|(best_ms, _)| time_ms > best_ms) => newest = Some((time_ms, database)),
            Ok(_) => {}
            Err(failure) => {
                tell(format_args!("note: {failure}"));
                unread = unread.or(Some(database).filter(|_| failure.code() != NOT_THERE));
            }
        }
    }
    newest.map(|(_, database)| database).or(unread).or(replicas.first())
}

/// The time of the state that would be restored.
async fn planned_ms(arguments: &RestoreArguments, database: &DatabaseConfig) -> Result<u64, Failure> {
    let store = open_patiently(&database.replica).await;
    let (target, epoch) = arguments.target(&store).await?;
    let history = History::load(&store).await?;
    Ok(plan(&store, &history, target, epoch).await?.time_ms)
}

impl RestoreArguments {
    fn manner(&self) -> Manner {
        Manner { forces: self.force, keeps_old: self.keep_old, resumes: self.resume }
    }

    /// What to restore, and the line it is on.
    async fn target(&self, store: &SharedStore) -> Result<(Target, Option<u32>), Failure> {
        let zone = self.tz.clone().unwrap_or(jiff::tz::TimeZone::UTC);
        Ok(match (&self.at, self.txid, &self.mark) {
            (Some(at), ..) => {
                let asked_ms = parse_moment(at, SystemClock::new().now_ms(), &zone).map_err(Failure::usage)?;
                (Target::Time(asked_ms), self.epoch)
            }
            (None, Some(txid), _) => (Target::Txid(txid), self.epoch),
            (None, None, Some(name)) => {
                let mark = find_mark(store, name).await?;
                (Target::Txid(mark.txid), Some(mark.epoch))
            }
            (None, None, None) if self.before_schema_change => (Target::BeforeSchemaChange, self.epoch),
            (None, None, None) => (Target::Latest, self.epoch),
        })
    }
}

async fn restore_one(arguments: &RestoreArguments, source: &Source, output: Option<Output>) -> Result<(), Failure> {
    let is_there = match &output {
        Some(Output::File(path)) => is_there(path)?,
        Some(Output::Stdout) | None => false,
    };
    let reporter = Reporter::new(arguments.format, arguments.quiet);
    if let Some(output) = &output
        && arguments.if_missing
        && is_there
    {
        return reporter.note(&format!("{output} is there; nothing to do"));
    }
    let clock = SystemClock::new();
    let begun = clock.monotonic();
    let (store, meter) = Metered::new(open_patiently(&source.replica).await);
    let store: SharedStore = Arc::new(store);
    let (target, epoch) = arguments.target(&store).await?;
    let planned = match History::load(&store).await {
        Ok(history) => plan(&store, &history, target, epoch).await.map(|plan| (history, plan)),
        Err(error) => Err(error),
    };
    let (history, plan) = match planned {
        Err(error @ (RestoreError::NoReplica { .. } | RestoreError::NothingYet { .. }))
            if arguments.if_replica_exists =>
        {
            return reporter.note(&format!("{error}; nothing to do"));
        }
        other => other?,
    };
    let asked_ms = if let Target::Time(asked_ms) = target { Some(asked_ms) } else { None };
    reporter.planned(&plan, asked_ms)?;
    if asked_ms.is_some_and(|asked_ms| asked_ms > clock.now_ms()) {
        reporter.note("the time asked for is in the future: this is the newest state that there is now")?;
    }
    for note in &plan.notes {
        reporter.note(note)?;
    }
    let output = match output {
        Some(output) if !arguments.dry_run => output,
        planned => {
            return match planned {
                Some(output) if is_there && !arguments.force => {
                    reporter.note(&format!("{output} is there: without --force, the restore is refused"))
                }
                _ => Ok(()),
            };
        }
    };
    let reused_bytes = carry_out(arguments, source, &store, &history, &plan, &output, reporter).await?;
    let seconds = (clock.monotonic() - begun).as_secs_f64();
    reporter.restored(&plan, &output.to_string(), cost(&meter, reused_bytes, seconds))
}

fn cost(meter: &Meter, reused_bytes: u64, seconds: f64) -> Cost {
    let traffic = meter.traffic();
    Cost { reused_bytes, received_bytes: traffic.received_bytes, requests: traffic.requests, seconds }
}

/// Gives the bytes that were on the local disk already.
async fn carry_out(
    arguments: &RestoreArguments,
    source: &Source,
    store: &SharedStore,
    history: &History,
    plan: &Plan,
    output: &Output,
    reporter: Reporter,
) -> Result<u64, Failure> {
    let progress = Arc::new(Progress::default());
    let mut watching = reporter.watch(&progress, plan.work_len_bytes());
    let Output::File(path) = output else {
        to_stdout(store, plan, progress).await?;
        return Ok(0);
    };
    let configured = source.database.as_ref().filter(|_| arguments.output.is_none());
    let state_dir = configured.map_or_else(|| default_state_dir(path), |database| database.state_dir.clone());
    let manner = arguments.manner();
    let recovery = Recovery { store, history, plan, output: path, state_dir: &state_dir, manner, progress };
    let recovered = recovery.carry_out().await;
    watching.shutdown().await;
    let Recovered { notes, reused_bytes } = match recovered {
        Err(error) if manner.resumes && partial_path(path).exists() => {
            reporter.note(&format!(
                "what was written is kept as {}; the same command goes on from there",
                partial_path(path).display()
            ))?;
            return Err(error.into());
        }
        other => other?,
    };
    for note in notes {
        reporter.note(&note)?;
    }
    Ok(reused_bytes)
}

/// Where the database goes.
enum Output {
    Stdout,
    File(PathBuf),
}

impl Output {
    fn of(path: PathBuf) -> Self {
        if path == Path::new("-") { Self::Stdout } else { Self::File(path) }
    }

    /// Refuses what makes no sense for standard output.
    fn check(self, arguments: &RestoreArguments) -> Result<Self, Failure> {
        match self {
            Self::Stdout if arguments.force || arguments.if_missing || arguments.resume => {
                Err(Failure::usage("--force, --if-missing and --resume are about a file, not standard output".into()))
            }
            Self::Stdout if arguments.format == RestoreOutput::Json => {
                Err(Failure::usage("standard output is the database; --format json needs a file as --output".into()))
            }
            Self::Stdout if io::stdout().is_terminal() && !arguments.dry_run => {
                Err(Failure::usage("standard output is a terminal, and a database is no text; redirect it".into()))
            }
            output => Ok(output),
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => out.write_str("standard output"),
            Self::File(path) => path.display().fmt(out),
        }
    }
}
