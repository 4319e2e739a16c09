//! TOML, environment and replica URLs, as one validated value.

pub mod environment;
pub mod file;
pub mod fleet;
pub mod replica_url;
mod toml_error;
pub mod units;
mod variables;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Uri;

use self::fleet::{FleetConfig, Found, SecondName};
use self::replica_url::ReplicaUrl;
use crate::health::DEFAULT_HEALTHY_LAG;
use crate::retain::RetentionSettings;

/// How long a stop may take. Docker kills after 10 seconds.
pub const DEFAULT_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);
/// So many databases are held open, unless told otherwise.
pub const DEFAULT_OPEN_DATABASES: usize = 16;

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Logging.
    pub log: LogConfig,
    /// Where health and metrics are served; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// What is confirmed later than this after its capture is reported as unhealthy.
    pub healthy_lag: Duration,
    /// At a stop, shipping what is left may take so long.
    pub shutdown_timeout: Duration,
    /// No more databases than this are held open, apart from those that are written to.
    pub open_databases: usize,
    /// The databases that have a name.
    pub databases: Vec<DatabaseConfig>,
    /// Those that are found by a pattern or in a directory. There is at least one of either kind.
    pub fleets: Vec<FleetConfig>,
}

impl Config {
    /// These databases, and everything else as it is by default.
    #[must_use]
    pub fn new(databases: Vec<DatabaseConfig>) -> Self {
        Self {
            log: LogConfig::default(),
            listen: None,
            healthy_lag: DEFAULT_HEALTHY_LAG,
            shutdown_timeout: DEFAULT_SHUTDOWN_TIMEOUT,
            open_databases: DEFAULT_OPEN_DATABASES,
            databases,
            fleets: Vec::new(),
        }
    }

    /// All databases, those of the fleets as far as they are there, each file once. `followed` as
    /// in [`FleetConfig::find`].
    #[must_use]
    pub fn find(&self, followed: &HashSet<PathBuf>) -> Found {
        let mut found = self.joined(self.fleets.iter().map(|fleet| fleet.find(followed)));
        self.leave_out_second_names(&mut found, followed);
        found
    }

    /// Leaves one path of several that lead to one file (device and inode): that of a database that
    /// is called by name, then one that is followed already, then the first in sorted order. By two
    /// paths SQLite would give the file two WALs.
    fn leave_out_second_names(&self, found: &mut Found, followed: &HashSet<PathBuf>) {
        let file_at = |path: &Path| std::fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
        let (named, of_fleets) = found.databases.split_at(self.databases.len());
        let mut of_fleets: Vec<&Path> = of_fleets.iter().map(|database| database.path.as_path()).collect();
        of_fleets.sort_by_key(|&path| (!followed.contains(path), path));
        let mut chosen: HashMap<(u64, u64), PathBuf> = HashMap::new();
        for path in named.iter().map(|database| database.path.as_path()).chain(of_fleets) {
            if let Some(file) = file_at(path) {
                chosen.entry(file).or_insert_with(|| path.to_owned());
            }
        }
        // Several replicas of one database have one path. What is called by name was chosen by a
        // person.
        for database in found.databases.split_off(self.databases.len()) {
            let first = file_at(&database.path).and_then(|file| chosen.get(&file));
            match first.filter(|first| identity(first) != identity(&database.path)) {
                Some(first) => {
                    let (path, followed) = (database.path, first.clone());
                    found.second_names.insert(SecondName { path, followed });
                }
                None => found.databases.push(database),
            }
        }
    }

    /// All databases, with what was found of each fleet, in their order. What one of them is called by name comes first.
    #[must_use]
    pub fn joined(&self, found: impl IntoIterator<Item = Found>) -> Found {
        let mut all = Found { databases: self.databases.clone(), ..Found::default() };
        // By which path each was found: what has one path is one database, with several replicas.
        let mut taken: HashMap<PathBuf, &Path> = HashMap::new();
        for database in &self.databases {
            taken.insert(identity(&database.path), &database.path);
        }
        for (fleet, found) in self.fleets.iter().zip(found) {
            let path = fleet.template().path.as_path();
            let is_ours = |database: &DatabaseConfig| *taken.entry(identity(&database.path)).or_insert(path) == path;
            all.databases.extend(found.databases.into_iter().filter(is_ours));
            all.directories.extend(found.directories);
            all.troubles.extend(found.troubles);
        }
        all
    }

    /// The configuration of the database at `path`, whether it is there or not: of each of its replicas.
    #[must_use]
    pub fn replicas_of(&self, path: &Path) -> Vec<DatabaseConfig> {
        let is_meant = |database: &&DatabaseConfig| identity(&database.path) == identity(path);
        let named: Vec<DatabaseConfig> = self.databases.iter().filter(is_meant).cloned().collect();
        if !named.is_empty() {
            return named;
        }
        let first = self.fleets.iter().find(|fleet| fleet.database_at(path).is_some());
        let is_same = |fleet: &&FleetConfig| first.is_some_and(|first| first.template().path == fleet.template().path);
        self.fleets.iter().filter(is_same).filter_map(|fleet| fleet.database_at(path)).collect()
    }
}

/// Logging.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// What is logged; `None` leaves it to the command line or the default.
    pub level: Option<LogLevel>,
    /// How it is written.
    pub format: Option<LogFormat>,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what a person must act on.
    Error,
    /// And what a person should know of.
    Warn,
    /// And what happens in the large.
    Info,
    /// And every object.
    Debug,
    /// And every request.
    Trace,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// One database and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseConfig {
    /// The database's absolute path.
    pub path: PathBuf,
    /// Where it is replicated to.
    pub replica: ReplicaUrl,
    /// Where local state is kept.
    pub state_dir: PathBuf,
    /// Under load, what was captured is shipped this often.
    pub sync_interval: Duration,
    /// The WAL is looked at this often, events or not.
    pub poll_interval: Duration,
    /// The WAL is made to begin anew before more bytes of it than this are captured.
    pub checkpoint_threshold_bytes: u64,
    /// No more than so many bytes wait on the local disk while storage is away.
    pub spool_limit_bytes: u64,
    /// A snapshot is made this often, if anything was written.
    pub snapshot_interval: Duration,
    /// Segments of windows of these lengths are merged; ascending. Empty: nothing is.
    pub merge: Vec<Duration>,
    /// What of the history is kept.
    pub retention: RetentionSettings,
    /// The daemon restores and checks its own replica this often; `None` for never.
    pub verify_interval: Option<Duration>,
    /// Asked once a minute as long as all is well. May hold a secret.
    pub heartbeat: Option<Uri>,
    /// The daemon says in storage this often that it is there; `None` for never.
    pub presence_interval: Option<Duration>,
}

impl DatabaseConfig {
    /// A database with everything else as it is by default.
    #[must_use]
    pub fn new(path: PathBuf, replica: ReplicaUrl) -> Self {
        Self {
            state_dir: default_state_dir(&path),
            path,
            replica,
            sync_interval: Duration::from_secs(1),
            poll_interval: Duration::from_secs(1),
            checkpoint_threshold_bytes: 3840 << 10,
            spool_limit_bytes: 256 << 20,
            snapshot_interval: Duration::from_secs(24 * 3600),
            merge: vec![Duration::from_secs(60), Duration::from_secs(3600)],
            retention: RetentionSettings::default(),
            heartbeat: None,
            verify_interval: None,
            presence_interval: None,
        }
    }
}

/// `.app.db-waltrail` beside `app.db`.
#[must_use]
pub fn default_state_dir(database: &Path) -> PathBuf {
    let name = database.file_name().unwrap_or_default().to_string_lossy();
    database.with_file_name(format!(".{name}-waltrail"))
}

/// `.app.db-waltrail-1a2b3c4d`: for a replica that is not the database's first. Named after the replica's text, without the server, as it
/// always was: of two that differ only in that, one needs a `state-dir` in the configuration.
#[must_use]
pub fn further_state_dir(database: &Path, replica: &ReplicaUrl) -> PathBuf {
    let mut name = default_state_dir(database).into_os_string();
    name.push(format!("-{:08x}", crc32fast::hash(replica.to_string().as_bytes())));
    PathBuf::from(name)
}

/// A path that two spellings of one place share: without `..`, `//` or links, as far as the place is there.
///
/// Only to compare by; files are opened by the name that the user gave.
#[must_use]
pub fn identity(path: &Path) -> PathBuf {
    let missing = || match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => identity(parent).join(name),
        _ => path.to_owned(),
    };
    std::fs::canonicalize(path).unwrap_or_else(|_| missing())
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("the configuration {} can't be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The environment does not say what to do.
    #[error("{what}")]
    Environment {
        /// What is missing or wrong.
        what: String,
    },
    /// The file says something that can't be.
    #[error("{}: {what}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
}
