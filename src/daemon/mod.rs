//! The daemon: which databases are to be followed, by a configuration that may change, among files that come and go; and who is told
//! how they are.

mod job;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::Signal;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use self::job::JobMaker;
use crate::clock::{Clock, SystemClock};
use crate::config::fleet::{Found, SecondName};
use crate::config::{Config, ConfigError, DatabaseConfig};
use crate::health::server::HealthServer;
use crate::health::systemd;
use crate::replicate::status::Boards;
use crate::replicate::wake::WatchHub;
use crate::replicate::{Order, ReplicateError, Replication, is_gone};

/// Where databases may turn up is looked at this often, for the case that an event got lost.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// One such look in so many reads the directories also when their times tell of no new name.
const THOROUGH_LOOK: u32 = 30;
/// Many files that turn up at once are one look.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// It takes a few milliseconds.
const GIVE_BACK_INTERVAL: Duration = Duration::from_secs(20);

/// Why a daemon can't begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Health and metrics can't be served.
    #[error("can't listen at {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Reads the configuration again.
pub type Reload = Box<dyn Fn() -> Result<Config, ConfigError> + Send>;

/// A daemon at work.
pub struct Daemon {
    /// Ends when all is stopped; gives what went wrong.
    pub replicating: JoinHandle<Vec<ReplicateError>>,
    /// Hears of each database, by its state directory, as soon as everything that is written to it from then on is captured.
    pub standing: mpsc::UnboundedReceiver<PathBuf>,
    /// How many databases are followed from the beginning; one with two replicas counts twice, as it does in `standing`.
    pub databases: usize,
    /// How each database is.
    pub boards: Arc<Boards>,
    /// What goes on beside it, for as long as the daemon is kept.
    _beside: JoinSet<()>,
}

/// Begins to follow what `config` names, until `stop` is cancelled. At each `hangup` (SIGHUP) the configuration is read again.
///
/// # Errors
/// See [`StartError`].
pub async fn start(
    config: Config,
    stop: CancellationToken,
    hangup: Option<(Signal, Option<Reload>)>,
) -> Result<Daemon, StartError> {
    let (clock, boards, hub) = (SystemClock::shared(), Arc::new(Boards::default()), Arc::new(WatchHub::new()));
    let mut beside = JoinSet::new();
    if let Some(address) = config.listen {
        let failed = |source| StartError::Listen { address, source };
        let server = HealthServer::bind(address, boards.clone(), config.healthy_lag, clock.clone()).await;
        let server = server.map_err(failed)?;
        tracing::info!(address = %server.address().map_err(failed)?, "serving /healthz, /readyz and /metrics");
        beside.spawn(server.serve());
    }
    let (standing_sender, standing) = mpsc::unbounded_channel();
    let (orders, queue) = mpsc::unbounded_channel();
    let replication = Replication::new(
        hub.clone(),
        boards.clone(),
        standing_sender,
        clock.clone(),
        config.shutdown_timeout,
        config.open_databases,
    );
    let mut roster = Roster {
        orders,
        maker: JobMaker::new(clock.clone()),
        hub,
        followed: BTreeMap::new(),
        watched: BTreeSet::new(),
        names_changed_at: Vec::new(),
        changed: Arc::new(Notify::new()),
        troubles: Vec::new(),
        second_names: BTreeSet::new(),
        boards: boards.clone(),
        clock: clock.clone(),
    };
    roster.look(&config).await;
    let databases = roster.followed.len();
    let replicating = tokio::spawn(replication.run(queue, stop));
    beside.spawn(systemd::notify(boards.clone(), clock));
    beside.spawn(give_memory_back());
    beside.spawn(roster.keep(config, hangup));
    Ok(Daemon { replicating, standing, databases, boards, _beside: beside })
}

/// What many databases have used at once, at a start or under load, stays with the allocator where something lies behind it that is
/// still in use; it gives the pages back when it is asked to (malloc_trim(3)).
async fn give_memory_back() {
    loop {
        tokio::time::sleep(GIVE_BACK_INTERVAL).await;
        #[cfg(target_env = "gnu")]
        // SAFETY: takes no pointers, and the allocator locks what it changes.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Who is followed, and who should be.
struct Roster {
    orders: mpsc::UnboundedSender<Order>,
    maker: JobMaker,
    hub: Arc<WatchHub>,
    /// By their state directories: a database may be followed twice, for two replicas.
    followed: BTreeMap<PathBuf, DatabaseConfig>,
    watched: BTreeSet<PathBuf>,
    /// What the directories' times were when they were read; `None` for one that could not be looked at.
    names_changed_at: Vec<Option<SystemTime>>,
    changed: Arc<Notify>,
    /// What the last look could not look at.
    troubles: Vec<String>,
    /// What the last look left out.
    second_names: BTreeSet<SecondName>,
    boards: Arc<Boards>,
    clock: Arc<dyn Clock>,
}

impl Roster {
    /// Keeps it right, for ever.
    async fn keep(mut self, mut config: Config, hangup: Option<(Signal, Option<Reload>)>) {
        let (mut signal, reload) = hangup.map_or((None, None), |(signal, reload)| (Some(signal), reload));
        let mut looks = 0;
        loop {
            let hung_up = async {
                match &mut signal {
                    Some(signal) => signal.recv().await,
                    None => std::future::pending().await,
                }
            };
            let is_looked_for = !config.fleets.is_empty();
            tokio::select! {
                _ = hung_up => {
                    if let Some(new) = read_again(reload.as_ref(), &config) {
                        config = new;
                    }
                }
                () = self.changed.notified(), if is_looked_for => tokio::time::sleep(LOOK_PAUSE).await,
                () = tokio::time::sleep(LOOK_INTERVAL), if is_looked_for => {
                    looks += 1;
                    if looks % THOROUGH_LOOK != 0 && self.saw_all() && self.names_change_at() == self.names_changed_at {
                        continue;
                    }
                }
            }
            self.look(&config).await;
        }
    }

    /// Whether the last look met no trouble. What it could not read may hold names that no directory's time tells of.
    fn saw_all(&self) -> bool {
        self.troubles.is_empty()
    }

    /// The times of the directories that are watched.
    fn names_change_at(&self) -> Vec<Option<SystemTime>> {
        let time = |directory: &PathBuf| std::fs::metadata(directory).and_then(|found| found.modified()).ok();
        self.watched.iter().map(time).collect()
    }

    /// Finds out who should be followed now, and gives the orders for that.
    async fn look(&mut self, config: &Config) {
        let (looked_at, followed) = (config.clone(), self.followed.clone());
        // Reading directories blocks.
        let found = tokio::task::spawn_blocking(move || find(&looked_at, &followed)).await;
        let Found { databases, directories, troubles, second_names } = match found {
            Ok(found) => found,
            Err(error) => return tracing::error!(%error, "could not look for databases"),
        };
        for directory in directories.difference(&self.watched) {
            self.hub.watch_names(directory, &self.changed);
        }
        self.watched = directories;
        self.names_changed_at = self.names_change_at();
        for trouble in troubles.iter().filter(|trouble| !self.troubles.contains(trouble)) {
            tracing::error!("while looking for databases: {trouble}");
        }
        self.boards.note_search(&troubles, self.clock.now_ms());
        self.troubles = troubles;
        for SecondName { path, followed } in second_names.difference(&self.second_names) {
            let (path, followed) = (path.display(), followed.display());
            tracing::warn!(
                "{path} and {followed} are one file: it is followed as {followed} only; let every \
                 application open it by that name, because two names give a database two WALs"
            );
        }
        self.second_names = second_names;
        let wanted = databases.into_iter().map(|database| (database.state_dir.clone(), database)).collect();
        for change in changes(&self.followed, &wanted) {
            match change {
                Change::LetGo(state_dir) => {
                    let database = self.followed.get(&state_dir).map(|database| database.path.display().to_string());
                    tracing::info!(database, "not to be followed any more");
                    self.order(Order::LetGo(state_dir));
                }
                Change::Follow(database) => {
                    let order = self.maker.make(*database, self.clock.now_ms()).await;
                    self.order(order);
                }
            }
        }
        self.followed = wanted;
        self.order(Order::StayWithout(!config.fleets.is_empty()));
    }

    /// Nobody takes orders any more when all has ended.
    fn order(&self, order: Order) {
        self.orders.send(order).ok();
    }
}

/// The databases that there are, and those that are followed and only can't be seen at the moment.
fn find(config: &Config, followed: &BTreeMap<PathBuf, DatabaseConfig>) -> Found {
    let mut found = config.find(&followed.values().map(|database| database.path.clone()).collect());
    let unseen = unseen(config, followed, &found);
    found.databases.extend(unseen);
    found
}

/// Those of `followed` that were not found while something could not be looked at: that a directory can't be read for a moment must not end
/// the replication of all that is below it. Not among them is what is known to be gone, and what the configuration does not name any
/// more, or otherwise than before.
fn unseen(config: &Config, followed: &BTreeMap<PathBuf, DatabaseConfig>, found: &Found) -> Vec<DatabaseConfig> {
    if found.troubles.is_empty() {
        return Vec::new();
    }
    let seen: HashSet<&PathBuf> = found.databases.iter().map(|database| &database.state_dir).collect();
    let is_unseen = |database: &&DatabaseConfig| {
        !seen.contains(&database.state_dir)
            && !is_gone(&database.path)
            && config.replicas_of(&database.path).contains(database)
    };
    followed.values().filter(is_unseen).cloned().collect()
}

/// A difference between who is followed and who should be.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    LetGo(PathBuf),
    Follow(Box<DatabaseConfig>),
}

/// What is to be done; nothing to those that stay as they are. One of which something is said anew is let go of and taken up again.
fn changes(followed: &BTreeMap<PathBuf, DatabaseConfig>, wanted: &BTreeMap<PathBuf, DatabaseConfig>) -> Vec<Change> {
    let is_let_go = |&(key, database): &(&PathBuf, &DatabaseConfig)| wanted.get(key) != Some(database);
    let is_new = |&(key, database): &(&PathBuf, &DatabaseConfig)| followed.get(key) != Some(database);
    let let_go = followed.iter().filter(is_let_go).map(|(state_dir, _)| Change::LetGo(state_dir.clone()));
    let follow = wanted.iter().filter(is_new).map(|(_, database)| Change::Follow(Box::new(database.clone())));
    let_go.chain(follow).collect()
}

/// The configuration as it is now; `None` when the old one stays.
fn read_again(reload: Option<&Reload>, old: &Config) -> Option<Config> {
    let Some(reload) = reload else {
        tracing::warn!("told to read the configuration again, but there is no file to read: all stays as it is");
        return None;
    };
    match reload() {
        Ok(new) => {
            let at_start = |config: &Config| {
                (config.log.clone(), config.listen, config.healthy_lag, config.shutdown_timeout, config.open_databases)
            };
            if at_start(&new) != at_start(old) {
                tracing::warn!("of the configuration only databases are read again; the rest takes a restart");
            }
            tracing::info!("the configuration was read again");
            Some(new)
        }
        Err(error) => {
            tracing::error!(%error, "the configuration is wrong; what it said before holds on");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::fleet::FleetConfig;

    #[test]
    fn only_what_differs_is_touched() {
        let of = |path: &str| DatabaseConfig::new(path.into(), format!("s3://b{path}").parse().unwrap());
        let all = |databases: &[DatabaseConfig]| -> BTreeMap<PathBuf, DatabaseConfig> {
            databases.iter().map(|database| (database.path.clone(), database.clone())).collect()
        };
        let before = all(&[of("/a"), of("/b"), of("/c")]);
        assert_eq!(changes(&before, &before), []);
        let changed = DatabaseConfig { sync_interval: Duration::from_secs(9), ..of("/b") };
        let after = all(&[changed.clone(), of("/c"), of("/d")]);
        let expected = [
            Change::LetGo("/a".into()),
            Change::LetGo("/b".into()),
            Change::Follow(Box::new(changed)),
            Change::Follow(Box::new(of("/d"))),
        ];
        assert_eq!(changes(&before, &after), expected);
    }

    #[test]
    fn what_can_not_be_seen_at_the_moment_is_not_let_go_of() {
        let directory = tempfile::tempdir().unwrap();
        let config = |pattern: &str, sync_interval_s| {
            let path = directory.path().join(pattern);
            let sync_interval = Duration::from_secs(sync_interval_s);
            let template =
                DatabaseConfig { sync_interval, ..DatabaseConfig::new(path, "s3://b/fleet".parse().unwrap()) };
            let fleets = FleetConfig::of(&template, false, false).unwrap().into_iter().collect();
            Config { fleets, ..Config::new(Vec::new()) }
        };
        let before = config("*.db", 1);
        let database = |name: &str| before.fleets[0].database_at(&directory.path().join(name)).unwrap();
        let (there, gone, seen) = (database("there.db"), database("gone.db"), database("seen.db"));
        std::fs::write(&there.path, "").unwrap();
        let all = [&there, &gone, &seen].map(|database| (database.state_dir.clone(), database.clone()));
        let followed = BTreeMap::from(all);
        let troubled = Found { databases: vec![seen], troubles: vec!["not to be read".into()], ..Found::default() };
        assert_eq!(unseen(&before, &followed, &troubled), [there]);
        assert_eq!(unseen(&config("*.db", 9), &followed, &troubled), [], "it is to be followed otherwise");
        assert_eq!(unseen(&config("*.sqlite", 1), &followed, &troubled), [], "it is not named any more");
        assert_eq!(unseen(&before, &followed, &Found::default()), [], "all was looked at");
    }
}
