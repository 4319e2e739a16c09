//! `waltrail replicate`

use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::exit_code::{Failure, NOT_CONFIRMED};
use super::tell::tell;
use super::{CONFIG_VARIABLE, ConfigArgument, SYSTEM_CONFIG, absolute};
use crate::clock::SystemClock;
use crate::config::replica_url::ReplicaUrl;
use crate::config::{Config, DEFAULT_SHUTDOWN_TIMEOUT, DatabaseConfig, LogConfig};
use crate::replicate::database::DatabaseSettings;
use crate::replicate::database::KEPT_SHARE;
use crate::replicate::merge::MergeSettings;
use crate::replicate::{Job, run as replicate};
use crate::store::retry::{RetryPolicy, Retrying};

/// Between these, the daemon's own loops ask again, without end.
const QUICK: RetryPolicy = RetryPolicy { attempts: 3, base_ms: 100, max_ms: 2000 };

/// Arguments of `replicate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail replicate /data/app.db s3://my-bucket/app
  waltrail replicate /data/app.db /mnt/backup/app
  waltrail replicate --config /etc/waltrail.toml

The database may not be there yet: then it is waited for. One that is not in WAL mode is switched to it.")]
pub struct ReplicateArguments {
    /// The database to follow
    #[arg(requires = "replica")]
    database: Option<std::path::PathBuf>,
    /// Where it goes: s3://bucket/prefix, file:///directory or a directory's path
    replica: Option<String>,
    #[command(flatten)]
    config: ConfigArgument,
}

impl ReplicateArguments {
    /// The configuration that the arguments mean.
    ///
    /// # Errors
    /// When there is none, or it is wrong.
    pub fn config(&self) -> Result<Config, Failure> {
        if let (Some(database), Some(replica)) = (&self.database, &self.replica) {
            self.config.refuse("a DATABASE and a REPLICA are all there is to replicate")?;
            let path = absolute(database)?;
            let replica: ReplicaUrl = replica.parse()?;
            let databases = vec![DatabaseConfig::new(path, replica)];
            return Ok(Config { log: LogConfig::default(), shutdown_timeout: DEFAULT_SHUTDOWN_TIMEOUT, databases });
        }
        self.config.load()?.ok_or_else(|| {
            Failure::usage(format!(
                "nothing to replicate: name a database and a replica, or a --config ({CONFIG_VARIABLE} is not set, and there is no {SYSTEM_CONFIG})"
            ))
        })
    }
}

/// Replicates until told to stop.
///
/// # Errors
/// The first thing that went wrong, when not everything ended as told.
pub async fn run(config: Config) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    watch_signals(stop.clone())?;
    let jobs = jobs_of(config.databases).await;
    let (standing, _) = mpsc::unbounded_channel();
    let mut failed = replicate(jobs, stop, config.shutdown_timeout, SystemClock::shared(), standing).await;
    match failed.is_empty() {
        true => {
            tracing::info!("stopped; everything is confirmed");
            Ok(())
        }
        false => Err(failed.swap_remove(0).into()),
    }
}

/// What is to be replicated, with its stores open.
pub(super) async fn jobs_of(databases: Vec<DatabaseConfig>) -> Vec<Job> {
    let mut jobs = Vec::new();
    for database in databases {
        let store = Arc::new(Retrying::new(database.replica.open().await, QUICK));
        tracing::info!(database = %database.path.display(), replica = %database.replica, "replicating");
        let settings = DatabaseSettings {
            path: database.path,
            sync_interval: database.sync_interval,
            poll_interval: database.poll_interval,
            checkpoint_threshold_bytes: database.checkpoint_threshold_bytes,
            spool_limit_bytes: database.spool_limit_bytes,
            snapshot_interval: database.snapshot_interval,
        };
        let kept_limit_bytes = settings.spool_limit_bytes / KEPT_SHARE;
        let merge = MergeSettings { windows: database.merge, kept_limit_bytes };
        let retention = database.retention;
        let presence_interval = database.presence_interval;
        jobs.push(Job { settings, state_dir: database.state_dir, store, merge, retention, presence_interval });
    }
    jobs
}

/// The first SIGTERM or SIGINT asks for a stop, the second one makes it happen at once.
fn watch_signals(stop: CancellationToken) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::other(format!("can't listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                tell("stopped at once; what was not confirmed is shipped by the next start");
                std::process::exit(i32::from(NOT_CONFIRMED));
            }
            tracing::info!("stopping: capturing and shipping what is left");
            stop.cancel();
        }
    });
    Ok(())
}
