//! The command line: arguments, output, exit codes. One file a command.

pub mod ask;
pub mod config;
mod daemon_log;
pub mod demo;
pub mod doctor;
pub mod exit_code;
pub mod generate;
pub mod health;
mod interrupt;
pub mod log;
pub mod mark;
pub mod moment;
pub mod prune;
mod recover;
pub mod replicate;
pub mod report;
pub mod restore;
pub mod run;
pub mod status;
mod tell;
pub mod verify;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tracing::Dispatch;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use self::daemon_log::FlushAtExit;
use self::exit_code::Failure;
use self::tell::tell;
use crate::clock::SystemClock;
use crate::config::fleet::{FleetConfig, Found};
use crate::config::replica_url::{Place, ReplicaUrl};
use crate::config::units::parse_address;
use crate::config::{Config, DatabaseConfig, LogConfig, LogFormat, LogLevel, default_state_dir, environment, file};
use crate::replicate::control::{ControlError, ask_status};
use crate::store::SharedStore;
use crate::store::retry::Retrying;

const SYSTEM_CONFIG: &str = "/etc/waltrail.toml";
/// A daemon answers how it is within this time.
const DAEMON_PATIENCE: Duration = Duration::from_secs(10);
const CONFIG_VARIABLE: &str = "WALTRAIL_CONFIG";
/// Where health is served.
const LISTEN_VARIABLE: &str = "WALTRAIL_LISTEN";
/// Of many databases, so many are named in a message.
const PATHS_SHOWN: usize = 5;

/// Continuous backup for SQLite: every transaction to S3-compatible storage, restored to any point in time.
#[derive(Debug, Parser)]
#[command(name = "waltrail", version, long_version = long_version(), max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    /// How much to log [default of replicate: info, or what the configuration says; of the others: warn]
    #[arg(long, global = true, value_enum)]
    log_level: Option<LogLevel>,
    /// How to write the log [default: text; for replicate what the configuration says]
    #[arg(long, global = true, value_enum)]
    log_format: Option<LogFormat>,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done · 1 failed · 10 usage or configuration · 11 storage not reachable or refused · 12 no such backup or \
point in time · 13 damaged object or unknown format · 14 target refused (exists, in use, not writable) · 15 stopped with \
transactions not confirmed · 16 another writer took over. verify: 1 degraded · 2 failed";

fn long_version() -> &'static str {
    static VERSION: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    VERSION.get_or_init(|| format!("{} (SQLite {})", env!("CARGO_PKG_VERSION"), rusqlite::version()))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Follow databases and ship every transaction, until SIGTERM or SIGINT
    Replicate(replicate::ReplicateArguments),
    /// Be a container's entry point: restore what is missing, replicate, run a command, ship its last transaction
    Run(run::RunArguments),
    /// Rebuild a database as it was after any transaction
    Restore(restore::RestoreArguments),
    /// Check that what is in storage can be restored: exit code 0 ok, 1 degraded, 2 failed
    Verify(verify::VerifyArguments),
    /// Show what a replica holds
    Log(log::LogArguments),
    /// Wait until everything that was committed to a database is confirmed in storage
    Sync(ask::SyncArguments),
    /// Show how replication is: what is captured, what is confirmed, what is wrong
    Status(status::StatusArguments),
    /// Ask a daemon's /healthz whether all is well, as a container's health check
    Health(health::HealthArguments),
    /// Have the daemon make a snapshot now, and wait until it is confirmed
    Snapshot(ask::AskArguments),
    /// Give a state a name; it stays restorable for as long as the name is there
    Mark(mark::MarkArguments),
    /// Show all marks
    Marks(mark::MarksArguments),
    /// Take a mark away
    Unmark(mark::UnmarkArguments),
    /// Let old history go, as the daemon does it every hour
    Prune(prune::PruneArguments),
    /// Look at a database's place and at the store: what could go wrong
    Doctor(doctor::DoctorArguments),
    /// Check a configuration
    Config(config::ConfigArguments),
    /// Write a shell's completions
    Completions(generate::CompletionsArguments),
    /// Write manual pages
    Man(generate::ManArguments),
    /// Show the main job on a database of its own: replicate, crash, restore, compare
    Demo(demo::DemoArguments),
}

/// Where the configuration is.
#[derive(Debug, Args)]
struct ConfigArgument {
    /// Configuration file [default: what WALTRAIL_CONFIG names, or /etc/waltrail.toml if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgument {
    /// The configuration that was named here or in the environment, or the system's; `None` when there is none of them.
    fn load(&self) -> Result<Option<Config>, Failure> {
        self.path().map(|path| file::load(&path)).transpose().map_err(Failure::from)
    }

    /// Where it is.
    fn path(&self) -> Option<PathBuf> {
        // Set to nothing is not set: that is how container files leave a variable out.
        let variable = || std::env::var_os(CONFIG_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        let system = || Some(PathBuf::from(SYSTEM_CONFIG)).filter(|path| path.exists());
        self.config.clone().or_else(variable).or_else(system)
    }

    /// A --config that would have no effect is a mistake. One of the environment or the system is there for other commands.
    fn refuse(&self, why: &str) -> Result<(), Failure> {
        match self.config {
            Some(_) => Err(Failure::usage(format!("--config has nothing to do here: {why}"))),
            None => Ok(()),
        }
    }

    /// What the configuration or, without one, the environment says of the database at `path`, for each of its replicas; nothing
    /// where it is not known.
    fn replicas_of(&self, path: &Path) -> Result<Vec<DatabaseConfig>, Failure> {
        let path = absolute(path)?;
        let config = match self.load()? {
            Some(config) => config,
            None => Config::new(environment_database().into_iter().collect()),
        };
        Ok(config.replicas_of(&path))
    }

    /// All databases of the configuration that are there, or the environment's.
    fn find(&self) -> Result<Found, Failure> {
        match self.load()? {
            Some(config) => Ok(config.find(&HashSet::new())),
            None => Ok(Found { databases: vec![environment_database()?], ..Found::default() }),
        }
    }

    /// These databases as they are known, or as they are by default.
    fn databases(&self, paths: &[PathBuf]) -> Result<Vec<DatabaseConfig>, Failure> {
        let mut databases = Vec::new();
        for path in paths {
            let mut known = self.replicas_of(path)?;
            if known.is_empty() {
                // Its daemon may have been told by arguments alone.
                known.push(DatabaseConfig::new(absolute(path)?, ReplicaUrl::Directory(PathBuf::new())));
            }
            databases.append(&mut known);
        }
        Ok(databases)
    }

    /// The only database of the configuration, with all its replicas, or, without one, the environment's.
    fn only_database(&self) -> Result<Vec<DatabaseConfig>, Failure> {
        let databases = self.find()?.databases;
        let mut paths: Vec<String> = databases.iter().map(|known| known.path.display().to_string()).collect();
        paths.dedup();
        if paths.len() == 1 {
            return Ok(databases);
        }
        if paths.is_empty() {
            return Err(Failure::usage(
                "which one? Nothing is here of what the configuration names by patterns".into(),
            ));
        }
        if paths.len() > PATHS_SHOWN {
            let more = paths.len() - PATHS_SHOWN;
            paths.truncate(PATHS_SHOWN);
            paths.push(format!("and {more} more"));
        }
        Err(Failure::usage(format!("which one? The configuration has {}", paths.join(", "))))
    }

    /// The replica that `source` names, the first one of a database that has several: for what can't be about all of them.
    async fn resolve(&self, source: Option<&str>) -> Result<Source, Failure> {
        Ok(self.resolve_replicas(source).await?.remove(0))
    }

    /// The replica that `source` names: a replica URL, or the path of a known database, with all its replicas, or of one that a daemon
    /// follows; without it those of the only database. At least one.
    async fn resolve_replicas(&self, source: Option<&str>) -> Result<Vec<Source>, Failure> {
        let of_all = |databases: Vec<DatabaseConfig>| Ok(databases.into_iter().map(Source::of).collect());
        let Some(source) = source else { return of_all(self.only_database()?) };
        if source.contains("://") {
            return self.resolve_replica(source.parse()?);
        }
        let known = self.replicas_of(Path::new(source))?;
        if !known.is_empty() {
            return of_all(known);
        }
        let path = absolute(Path::new(source))?;
        if path.is_dir() {
            return self.resolve_replica(ReplicaUrl::Directory(path));
        }
        if let Some(source) = Source::of_daemon(path).await? {
            return Ok(vec![source]);
        }
        Err(Failure::usage(format!(
            "'{source}' is not a replica: it is no URL, no directory, and no database of the \
             configuration or the environment, or that a daemon follows now. Of a database whose daemon was told by arguments and is \
             stopped, name the replica (`restore` needs --output, too)"
        )))
    }

    /// The replica itself, with what the configuration says of it.
    fn resolve_replica(&self, replica: ReplicaUrl) -> Result<Vec<Source>, Failure> {
        if let Some(known) = self.with_replica(&replica)? {
            return Ok(vec![Source::of(known)]);
        }
        self.refuse(&format!("{replica} is the replica already, and is not in it"))?;
        Ok(vec![Source::at(replica)])
    }

    /// The database that goes to `replica`, if --config names a configuration that has it: options and keys are taken from there.
    /// What the URL says of them must be what stands there: nobody's word is passed over, least of all on which server to delete.
    fn with_replica(&self, replica: &ReplicaUrl) -> Result<Option<DatabaseConfig>, Failure> {
        if self.config.is_none() {
            return Ok(None);
        }
        let place = replica.place();
        let mut named = self.load()?.map_or_else(Vec::new, |config| config.find(&HashSet::new()).databases);
        named.retain(|database| database.replica.place().has_location_of(&place));
        if named.is_empty() {
            return Ok(None);
        }
        named.retain(|database| replica.means(&database.replica));
        if named.is_empty() {
            return Err(Failure::usage(format!(
                "the configuration has {replica} with other parameters than the URL: leave those of the URL out, or --config"
            )));
        }
        if named.len() > 1 {
            named.retain(|database| database.replica.place() == place);
        }
        let several = || format!("which one? The configuration has {replica} on several servers: name the endpoint");
        named.pop().map(Some).ok_or_else(|| Failure::usage(several()))
    }

    /// The replicas that `sources` name; without any, those of all databases of the configuration or, without one, that of the
    /// environment's.
    async fn resolve_all(&self, sources: &[String]) -> Result<Sources, Failure> {
        let mut all = Sources::default();
        for source in sources {
            all.found.append(&mut self.resolve_replicas(Some(source)).await?);
        }
        if !sources.is_empty() {
            return Ok(all);
        }
        match self.load()? {
            Some(config) => Ok(everything(&config).await),
            None => Ok(Sources { found: vec![Source::of(environment_database()?)], ..all }),
        }
    }
}

/// Does `work` for each replica, whatever becomes of the others, and tells whose failure it was where there are several. The first
/// failure is the one that is given.
async fn for_each_replica(
    sources: Vec<Source>,
    work: impl AsyncFn(&Source) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut first = None;
    for source in &sources {
        let Err(failure) = work(source).await else { continue };
        if sources.len() > 1 {
            tell(format_args!("failed     {}: {failure}", source.replica));
        }
        first.get_or_insert(failure);
    }
    first.map_or(Ok(()), Err)
}

/// Replicas that a command is about, and where some should be that could not be found.
#[derive(Default)]
struct Sources {
    found: Vec<Source>,
    failures: Vec<(String, Failure)>,
}

/// The replicas of all databases, those of fleets by what is stored and what is here.
async fn everything(config: &Config) -> Sources {
    let (mut of_fleets, mut all_deleted, mut failures) = (Vec::new(), HashSet::new(), Vec::new());
    for fleet in &config.fleets {
        let Found { databases: here, troubles, .. } = fleet.find(&HashSet::new());
        for trouble in troubles {
            let failure = Failure::other(format!("while looking for databases: {trouble}"));
            failures.push((fleet.root.display().to_string(), failure));
        }
        let (databases, deleted) = stored_and_here(fleet, here).await.unwrap_or_else(|failure| {
            // One answer for all of them.
            failures.push((fleet.template().replica.to_string(), failure));
            (Vec::new(), Vec::new())
        });
        all_deleted.extend(deleted);
        of_fleets.push(Found { databases, ..Found::default() });
    }
    let source = |database: DatabaseConfig| {
        let is_deleted = all_deleted.contains(&database.replica.place());
        Source { is_deleted, ..Source::of(database) }
    };
    Sources { found: config.joined(of_fleets).databases.into_iter().map(source).collect(), failures }
}

/// What is stored for a fleet, because nothing may be left of it on this machine, and what is here; and the places of those that were
/// deleted, as `run` sees it: of a fleet that is here in part, those that are not.
async fn stored_and_here(
    fleet: &FleetConfig,
    mut here: Vec<DatabaseConfig>,
) -> Result<(Vec<DatabaseConfig>, Vec<Place>), Failure> {
    let mut stored = stored(fleet).await?;
    if stored.is_empty() && here.is_empty() {
        return Err(nothing_stored(fleet));
    }
    let paths: HashSet<&Path> = here.iter().map(|database| database.path.as_path()).collect();
    stored.retain(|database| !paths.contains(database.path.as_path()));
    let is_new = here.is_empty();
    let deleted = stored.iter().filter(|_| !is_new).map(|database| database.replica.place()).collect();
    here.append(&mut stored);
    here.sort_by(|one, other| one.path.cmp(&other.path));
    Ok((here, deleted))
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::usage(format!("'{}': {error}", path.display())))
}

/// Where health is served as the environment has it. Set to nothing is not set.
fn listen_variable() -> Result<Option<SocketAddr>, Failure> {
    let set = std::env::var(LISTEN_VARIABLE).ok().filter(|text| !text.trim().is_empty());
    let parsed = set.map(|text| parse_address(&text)).transpose();
    parsed.map_err(|why| Failure::usage(format!("{LISTEN_VARIABLE}: {why}")))
}

/// The database that the environment names, as containers have it.
fn environment_database() -> Result<DatabaseConfig, Failure> {
    let directory = std::env::current_dir().map_err(|error| Failure::other(format!("no directory: {error}")))?;
    Ok(environment::database(|name| std::env::var(name).ok(), &directory)?)
}

/// What a command is about.
struct Source {
    replica: ReplicaUrl,
    /// The database, when the configuration or the environment says all of it and not only where it goes.
    database: Option<DatabaseConfig>,
    /// A database whose daemon was told by arguments alone, and its state directory.
    followed: Option<(PathBuf, PathBuf)>,
    /// Of a fleet that is here, a database that is not: nobody writes to it any more.
    is_deleted: bool,
}

impl Source {
    /// A replica of which nothing else is known.
    fn at(replica: ReplicaUrl) -> Self {
        Self { replica, database: None, followed: None, is_deleted: false }
    }

    fn of(database: DatabaseConfig) -> Self {
        Self { database: Some(database.clone()), ..Self::at(database.replica) }
    }

    /// Where the daemon that follows the database at `path` says that it goes; `None` where nobody answers.
    async fn of_daemon(path: PathBuf) -> Result<Option<Self>, Failure> {
        let state_dir = default_state_dir(&path);
        match ask_status(&path, &state_dir, DAEMON_PATIENCE).await {
            Err(ControlError::NoDaemon { .. }) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(status) => Ok(Some(Self { followed: Some((path, state_dir)), ..Self::at(status.replica_url.parse()?) })),
        }
    }

    /// A database that a daemon may follow, and its state directory.
    fn live(&self) -> Option<(&Path, &Path)> {
        match (&self.database, &self.followed) {
            (Some(database), _) => Some((&database.path, &database.state_dir)),
            (None, Some((path, state_dir))) => Some((path, state_dir)),
            (None, None) => None,
        }
    }
}

/// Opens a replica for a command that a person or a job waits for.
async fn open_patiently(replica: &ReplicaUrl) -> SharedStore {
    Arc::new(Retrying::patient(replica.open().await, SystemClock::shared()))
}

/// The databases that are stored for a fleet. A place that is not there yet holds none.
async fn stored(fleet: &FleetConfig) -> Result<Vec<DatabaseConfig>, Failure> {
    let place = open_patiently(&fleet.template().replica).await;
    match fleet.stored(&place).await {
        Err(error) if error.is_of_missing_directory() => Ok(Vec::new()),
        other => Ok(other?),
    }
}

fn nothing_stored(fleet: &FleetConfig) -> Failure {
    let DatabaseConfig { path, replica, .. } = fleet.template();
    Failure::not_there(format!("nothing is stored in {replica} for {}", path.display()))
}

/// Runs the command line and gives the process's exit code.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(shown) => {
            // Help and version are no failures. Where the output is closed there is nobody to tell.
            shown.print().ok();
            return if shown.use_stderr() { ExitCode::from(exit_code::USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let _flush = FlushAtExit;
    match run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    }
}

fn run(arguments: Arguments) -> Result<u8, Failure> {
    let flags = LogConfig { level: arguments.log_level, format: arguments.log_format };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::other(format!("can't start: {error}")))?;
    let done = runtime.block_on(arguments.command.carry_out(&flags));
    // A request that hangs must not keep a process that has done its work.
    runtime.shutdown_background();
    done
}

impl Command {
    /// Carries the command out; gives the exit code. The two that go on and on log as their configuration says.
    async fn carry_out(self, flags: &LogConfig) -> Result<u8, Failure> {
        if !matches!(self, Self::Replicate(_) | Self::Run(_)) {
            let (level, format) = log_settings(flags, None, LogLevel::Warn);
            log_to(level, format, std::io::stderr).init();
        }
        match self {
            Self::Replicate(arguments) => {
                let config = arguments.config()?;
                start_daemon_log(flags, &config.log);
                replicate::run(config, arguments.reload()).await?;
            }
            Self::Run(arguments) => {
                let config = arguments.config()?;
                start_daemon_log(flags, &config.log);
                return run::run(arguments, config).await;
            }
            Self::Verify(arguments) => return verify::run(arguments).await,
            Self::Restore(arguments) => restore::run(arguments).await?,
            Self::Log(arguments) => log::run(arguments).await?,
            Self::Sync(arguments) => ask::sync(arguments).await?,
            Self::Status(arguments) => status::run(arguments).await?,
            Self::Health(arguments) => health::run(arguments).await?,
            Self::Snapshot(arguments) => ask::snapshot(arguments).await?,
            Self::Mark(arguments) => mark::mark(arguments).await?,
            Self::Marks(arguments) => mark::marks(arguments).await?,
            Self::Unmark(arguments) => mark::unmark(arguments).await?,
            Self::Prune(arguments) => prune::run(arguments).await?,
            Self::Doctor(arguments) => doctor::run(arguments).await?,
            Self::Config(arguments) => config::run(arguments)?,
            Self::Completions(arguments) => generate::completions(&arguments)?,
            Self::Man(arguments) => generate::man(&arguments)?,
            Self::Demo(arguments) => demo::run(arguments).await?,
        }
        Ok(0)
    }
}

/// Returns how much to log, and how: what the command line says, else the configuration, else
/// `default`, as text.
fn log_settings(flags: &LogConfig, config: Option<&LogConfig>, default: LogLevel) -> (LogLevel, LogFormat) {
    let level = flags.level.or(config.and_then(|config| config.level)).unwrap_or(default);
    let format = flags.format.or(config.and_then(|config| config.format)).unwrap_or(LogFormat::Text);
    (level, format)
}

/// Starts the log of a command that runs on and on: see [`daemon_log`].
fn start_daemon_log(flags: &LogConfig, config: &LogConfig) {
    let (level, format) = log_settings(flags, Some(config), LogLevel::Info);
    // Written by the log's own thread, past the queue, whatever is logged otherwise.
    let report_lost = move |lines: usize| {
        tracing::dispatcher::with_default(&log_to(LogLevel::Warn, format, std::io::stderr), || {
            tracing::warn!(
                lines,
                "log lines were lost: standard error was not read fast enough, or could not be written"
            );
        });
    };
    log_to(level, format, daemon_log::start(Box::new(report_lost))).init();
}

/// Returns a log in `format`. Libraries log errors only: at finer levels they log complete requests.
fn log_to<W>(level: LogLevel, format: LogFormat, writer: W) -> Dispatch
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let filter = Targets::new().with_default(LevelFilter::ERROR).with_target("waltrail", level);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_target(false)
        // Each request is a span: at its end it is told, with the time it took.
        .with_span_events(FmtSpan::CLOSE)
        // Where it can't write, it would complain with `eprintln!`, which panics: the end of a daemon whose log reader left.
        .log_internal_errors(false);
    let log = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => log.with(lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).into(),
        LogFormat::Json => log.with(lines.json()).into(),
    }
}
