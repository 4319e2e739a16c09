//! `waltrail run`: the entry point of a container.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures_util::stream::{self, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::exit_code::{Failure, NOT_CONFIRMED};
use super::recover::Recovery;
use super::replicate::WhatArguments;
use super::report::{Reporter, RestoreOutput};
use super::tell::tell;
use super::{PATHS_SHOWN, environment_database, open_patiently, stored};
use crate::clock::format_time;
use crate::config::fleet::FleetConfig;
use crate::config::units::parse_duration;
use crate::config::{Config, DatabaseConfig};
use crate::daemon;
use crate::replicate::status::{Phase, Status};
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::install::{Manner, is_there};
use crate::restore::plan::{Plan, Target, plan};
use crate::restore::progress::Progress;
use crate::run::child::{Child, Signals, exit_code};
use crate::run::open_files;
use crate::run::place::loss_here;
use crate::store::SharedStore;

/// Each takes a processor, and some memory.
const RESTORES_AT_A_TIME: usize = 4;

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail run /data/app.db s3://my-bucket/app -- node server.js
  waltrail run --config /etc/waltrail.toml -- bin/rails server
  waltrail run -- npm start
      (DATABASE_URL names the database, WALTRAIL_REPLICA the replica, or AWS_S3_BUCKET_NAME the bucket)

A database that is not there is restored, if there is a backup; if there is none, the application begins with nothing. If the
restore fails, the application is not started. If a database is there and can't be followed, it is started after --start-timeout, and
the log and `waltrail status` say that it is not backed up.

The exit code is the command's own (128 and the signal's number, if one ended it); 15 if the command ended with 0 and not
everything is confirmed; 127 or 126 if it can't be started; of waltrail's own codes, if it did not come to that.")]
pub struct RunArguments {
    #[command(flatten)]
    what: WhatArguments,
    /// Fail if looking for a backup and restoring it takes longer than this [default: no limit]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    restore_timeout: Option<Duration>,
    /// Start the command after this long, even if storage can't be reached (what it writes waits on the local disk) or a database can't
    /// be followed (then it is not backed up); the log says so
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    start_timeout: Duration,
    /// Make this file when the command is started: when replication stands, or after --start-timeout; remove it before and at the end
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// The command to run, with its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

impl RunArguments {
    /// The configuration that the arguments mean, or, without any, the environment.
    ///
    /// # Errors
    /// When there is none, or it is wrong.
    pub fn config(&self) -> Result<Config, Failure> {
        self.what.config(|| environment_database().map(|database| Config::new(vec![database])))
    }
}

/// Restores what is missing, replicates, runs the command, ships what is left. Gives the process's exit code.
///
/// # Errors
/// When it does not come to the command.
pub async fn run(arguments: RunArguments, config: Config) -> Result<u8, Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't listen for signals: {error}"));
    let mut signals = Signals::listen().map_err(failed)?;
    if let Some(ready_file) = &arguments.ready_file {
        take_away(ready_file);
    }
    warn_of_loss(&config);
    let files = open_files::allow_many();
    tokio::select! {
        restored = restore_missing(&config, arguments.restore_timeout) => restored?,
        number = signals.asked_to_end() => return Ok(128 + number as u8),
    }
    let stop = CancellationToken::new();
    // A hangup is the command's.
    let mut daemon = daemon::start(config, stop.clone(), None).await?;
    let replicating = &mut daemon.replicating;
    tokio::select! {
        () = all_stand(&mut daemon.standing, daemon.databases) => {}
        () = tokio::time::sleep(arguments.start_timeout) => tell_what_does_not_stand(&daemon.boards.statuses()),
        number = signals.asked_to_end() => {
            stop.cancel();
            replicating.await.ok();
            return Ok(128 + number as u8);
        }
        // It says itself what is wrong. Without replication nothing is started.
        ended = &mut *replicating => {
            let failures = ended.map_err(|error| Failure::other(error.to_string()))?;
            return Err(failures.into_iter().next().map_or_else(|| Failure::other("replication ended".into()), Failure::from));
        }
    }
    let child = match Child::start(&arguments.command, files) {
        Ok(child) => child,
        Err(error) => {
            stop.cancel();
            replicating.await.ok();
            tell(format_args!("error: '{}' can't be started: {error}", arguments.command[0].to_string_lossy()));
            return Ok(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    if let Some(ready_file) = &arguments.ready_file
        && let Err(error) = std::fs::write(ready_file, b"")
    {
        tracing::error!(%error, file = %ready_file.display(), "the ready file can't be made");
    }
    // Replication that ends before the command does not end the command: the application comes first. The log has said why.
    let status =
        child.wait(&mut signals).await.map_err(|error| Failure::other(format!("can't wait for it: {error}")))?;
    tracing::info!(%status, "the command has ended; shipping what is left");
    for database in never_there(&daemon.boards.statuses()) {
        tracing::warn!(
            "{} was never there, so nothing of it is backed up: does the command write elsewhere?",
            database.display()
        );
    }
    stop.cancel();
    let failures = replicating.await.map_err(|error| Failure::other(error.to_string()))?;
    if let Some(ready_file) = &arguments.ready_file {
        take_away(ready_file);
    }
    let code = exit_code(status);
    Ok(if code == 0 && !failures.is_empty() { NOT_CONFIRMED } else { code })
}

/// One that an earlier start has left would be taken for this one's.
fn take_away(ready_file: &Path) {
    match std::fs::remove_file(ready_file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!(%error, file = %ready_file.display(), "the ready file can't be removed");
        }
        _ => {}
    }
}

/// The commonest loss there is: a database that goes with its container.
fn warn_of_loss(config: &Config) {
    let named = config.databases.iter().map(|database| &database.path);
    let places: BTreeSet<&PathBuf> = named.chain(config.fleets.iter().map(|fleet| &fleet.root)).collect();
    for why in places.into_iter().filter_map(|place| loss_here(place)) {
        tracing::error!("DANGER: {why}");
    }
}

/// The command is started without being backed up as it should be: says of which database, and why.
fn tell_what_does_not_stand(statuses: &[Status]) {
    let mut troubles: Vec<String> = statuses.iter().filter_map(why_it_does_not_stand).collect();
    if troubles.len() > PATHS_SHOWN {
        let more = troubles.len() - PATHS_SHOWN;
        troubles.truncate(PATHS_SHOWN);
        troubles.push(format!("and {more} more"));
    }
    for trouble in troubles {
        tracing::error!("{trouble}");
    }
    tracing::error!("not everything is replicated; the command is started all the same");
}

/// A sentence; `None` for a database that is followed, or that the command may make.
fn why_it_does_not_stand(status: &Status) -> Option<String> {
    let (database, replica) = (status.database.display(), &status.replica);
    match (status.phase, &status.error) {
        (Phase::Following | Phase::Waiting, _) => None,
        (Phase::Failing | Phase::Stopped, error) => {
            let error = error.as_deref().unwrap_or("for a reason that is not known");
            Some(format!("{database} is not replicated: {error}; what the command writes to it is not backed up"))
        }
        (Phase::Starting, Some(error)) => Some(format!(
            "{replica} is not reached, or refuses: {error}; what the command writes to {database} waits here"
        )),
        (Phase::Starting, None) => Some(format!(
            "{database} is not followed yet: it is still looked at, or {replica} does not answer; what the command writes waits here"
        )),
    }
}

/// Databases that the command was expected to make, and has not.
fn never_there(statuses: &[Status]) -> BTreeSet<&Path> {
    let is_meant = |status: &&Status| {
        status.phase == Phase::Waiting
            && status.captured.is_none()
            && is_there(&status.database).is_ok_and(|there| !there)
    };
    statuses.iter().filter(is_meant).map(|status| status.database.as_path()).collect()
}

async fn all_stand(stands: &mut mpsc::UnboundedReceiver<PathBuf>, databases: usize) {
    let mut standing = HashSet::new();
    while standing.len() < databases {
        match stands.recv().await {
            Some(state_dir) => standing.insert(state_dir),
            // Replication has ended; what it says is looked at beside this.
            None => return std::future::pending().await,
        };
    }
}

/// Restores what is missing, and takes no longer than `limit` for that and for looking for it.
async fn restore_missing(config: &Config, limit: Option<Duration>) -> Result<(), Failure> {
    let all = restore_all(config);
    let Some(limit) = limit else { return all.await };
    tokio::time::timeout(limit, all).await.map_err(|_| {
        let names = names_of_missing(config);
        Failure::other(format!("{names} could not be restored within {limit:?}; the command is not started"))
    })?
}

async fn restore_all(config: &Config) -> Result<(), Failure> {
    let (missing, fleets) = missing(config).await?;
    // Were it cut off, the next start would find a fleet that is there in part.
    for fleet in &fleets {
        fleet.begin_restore().map_err(unfinished_failure(fleet))?;
    }
    let mut restoring =
        stream::iter(missing.values().map(|replicas| restore(replicas))).buffer_unordered(RESTORES_AT_A_TIME);
    while let Some(restored) = restoring.next().await {
        restored?;
    }
    for fleet in &fleets {
        fleet.end_restore().map_err(unfinished_failure(fleet))?;
    }
    Ok(())
}

fn unfinished_failure(fleet: &FleetConfig) -> impl FnOnce(io::Error) -> Failure {
    let root = fleet.root.display().to_string();
    move |error| Failure::other(format!("that a restore begins, or ends, can't be noted in {root}: {error}"))
}

/// What is not there, as the configuration calls it. Of a fleet a part may have been restored.
fn names_of_missing(config: &Config) -> String {
    let named = config.databases.iter().map(|database| &database.path);
    let missing: BTreeSet<&PathBuf> = named.filter(|path| is_there(path).is_ok_and(|there| !there)).collect();
    let fleets = config.fleets.iter().map(|fleet| &fleet.template().path);
    let names: Vec<String> = missing.into_iter().chain(fleets).map(|path| path.display().to_string()).collect();
    names.join(", ")
}

/// The databases to restore before the command begins: those that have a name and are not there; and of a fleet, if nothing of it is
/// there or an earlier restore of it was cut off, all that are not. Of another one those that are missing were deleted by somebody who
/// had his reasons. Gives these fleets, too.
async fn missing(config: &Config) -> Result<(Missing, Vec<&FleetConfig>), Failure> {
    let (mut missing, mut fleets) = (Missing::new(), Vec::new());
    for database in &config.databases {
        if !is_there(&database.path)? {
            missing.entry(database.path.clone()).or_default().push(database.clone());
        }
    }
    for fleet in &config.fleets {
        let found = fleet.find(&HashSet::new());
        if !found.databases.is_empty() && !fleet.is_being_restored() {
            continue;
        }
        if let Some(trouble) = found.troubles.first() {
            return Err(Failure::other(format!("whether databases are there can't be seen: {trouble}")));
        }
        tracing::info!("looking for backups in {}", fleet.template().replica);
        let (stored, mut is_empty) = (stored(fleet).await?, true);
        for database in stored {
            if !is_there(&database.path)? {
                missing.entry(database.path.clone()).or_default().push(database);
                is_empty = false;
            }
        }
        if !is_empty || fleet.is_being_restored() {
            fleets.push(fleet);
        }
    }
    Ok((missing, fleets))
}

/// Databases that are not there, each with its replicas.
type Missing = BTreeMap<PathBuf, Vec<DatabaseConfig>>;

/// The newest state that a replica has, and how to get at it.
struct Backup<'a> {
    database: &'a DatabaseConfig,
    store: SharedStore,
    history: History,
    plan: Plan,
}

/// What a replica holds; `None` where there is nothing yet.
async fn look(database: &DatabaseConfig) -> Result<Option<Backup<'_>>, Failure> {
    tracing::info!("looking for a backup in {}", database.replica);
    let store = open_patiently(&database.replica).await;
    let history = match History::load(&store).await {
        Err(RestoreError::NoReplica { .. }) => return Ok(None),
        other => other?,
    };
    match plan(&store, &history, Target::Latest, None).await {
        Err(RestoreError::NothingYet { .. }) => {
            tracing::warn!(replica = %database.replica, "the backup has no first snapshot: nothing can be restored from it");
            Ok(None)
        }
        Ok(plan) => Ok(Some(Backup { database, store, history, plan })),
        Err(error) => Err(error.into()),
    }
}

/// Restores a database from that one of its replicas which has the newest state. One that can't be read is passed over if another
/// one can; if none can, it is not known whether there is a backup, and nothing may begin empty.
async fn restore(replicas: &[DatabaseConfig]) -> Result<(), Failure> {
    let (mut backups, mut failure) = (Vec::new(), None);
    for database in replicas {
        match look(database).await {
            Ok(backup) => backups.extend(backup),
            Err(error) => {
                tracing::warn!(%error, replica = %database.replica, "the replica can't be read");
                failure.get_or_insert(error);
            }
        }
    }
    let newest = backups.into_iter().max_by_key(|backup| backup.plan.time_ms);
    let Some(Backup { database, store, history, plan }) = newest else {
        if let Some(failure) = failure {
            return Err(failure);
        }
        for DatabaseConfig { path, replica, .. } in replicas {
            tracing::info!(database = %path.display(), %replica, "not there, and no backup: it begins empty");
        }
        return Ok(());
    };
    let (path, shown) = (&database.path, database.path.display().to_string());
    tracing::info!(database = shown, replica = %database.replica, state = %plan.position, "not there; restoring it");
    // An older state than the newest one: the application starts with it all the same, and somebody has to know.
    for note in &plan.notes {
        tracing::error!(database = shown, replica = %database.replica, state = %plan.position, "{note}");
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .map_err(|error| Failure::other(format!("{} can't be made: {error}", directory.display())))?;
    }
    // A container that is ended in the middle goes on.
    let manner = Manner { resumes: true, ..Manner::default() };
    let (state_dir, progress) = (database.state_dir.as_path(), Arc::new(Progress::default()));
    let _watching = Reporter::new(RestoreOutput::Text, false).watch(&progress, plan.work_len_bytes());
    let recovery =
        Recovery { store: &store, history: &history, plan: &plan, output: path, state_dir, manner, progress };
    for note in recovery.carry_out().await?.notes {
        tracing::info!("{note}");
    }
    tracing::info!(database = shown, state = %plan.position, time = format_time(plan.time_ms), "restored");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_database_does_not_stand() {
        let of = |phase, error: Option<&str>| {
            let error = error.map(str::to_owned);
            let (database, replica) = ("/data/app.db".into(), "s3://b/app".into());
            why_it_does_not_stand(&Status { database, replica, phase, error, ..Status::default() })
        };
        assert_eq!((of(Phase::Following, Some("x")), of(Phase::Waiting, None)), (None, None));
        for (phase, error, begins, waits) in [
            (Phase::Failing, Some("it is locked"), "/data/app.db is not replicated: it is locked;", false),
            (Phase::Stopped, None, "/data/app.db is not replicated:", false),
            (Phase::Starting, Some("AccessDenied"), "s3://b/app is not reached, or refuses: AccessDenied;", true),
            (Phase::Starting, None, "/data/app.db is not followed yet:", true),
        ] {
            let told = of(phase, error).unwrap();
            assert!(told.starts_with(begins), "{told}");
            assert_eq!((told.contains("waits here"), told.contains("not backed up")), (waits, !waits), "{told}");
        }
    }
}
