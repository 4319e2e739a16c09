//! `waltrail replicate`

use std::net::SocketAddr;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::exit_code::{Failure, NOT_CONFIRMED};
use super::tell::tell;
use super::{CONFIG_VARIABLE, ConfigArgument, SYSTEM_CONFIG, absolute};
use crate::clock::SystemClock;
use crate::config::units::parse_address;
use crate::config::{Config, DatabaseConfig};
use crate::health::drill::Driller;
use crate::health::heartbeat::beat;
use crate::health::server::HealthServer;
use crate::health::{Boards, systemd};
use crate::replicate::database::DatabaseSettings;
use crate::replicate::database::KEPT_SHARE;
use crate::replicate::merge::MergeSettings;
use crate::replicate::status::Board;
use crate::replicate::{Job, run as replicate};
use crate::store::retry::{RetryPolicy, Retrying};

/// A drill takes a processor, and room for a database.
const DRILLS_AT_A_TIME: usize = 1;
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
    #[command(flatten)]
    what: WhatArguments,
}

/// What to replicate, and how others see it: arguments that `replicate` and `run` share.
#[derive(Debug, Args)]
pub struct WhatArguments {
    /// The database to follow
    #[arg(requires = "replica")]
    database: Option<std::path::PathBuf>,
    /// Where it goes: s3://bucket/prefix, file:///directory or a directory's path
    replica: Option<String>,
    /// Serve /healthz, /readyz and /metrics there: 127.0.0.1:9180, or 0.0.0.0:9180 for every network
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    config: ConfigArgument,
}

impl WhatArguments {
    /// The configuration that the arguments mean, or `otherwise`, when they and the usual places name none.
    ///
    /// # Errors
    /// When it is wrong.
    pub fn config(&self, otherwise: impl FnOnce() -> Result<Config, Failure>) -> Result<Config, Failure> {
        let mut config = match (&self.database, &self.replica) {
            (Some(database), Some(replica)) => {
                self.config.refuse("a DATABASE and a REPLICA are all there is to replicate")?;
                Config::new(vec![DatabaseConfig::new(absolute(database)?, replica.parse()?)])
            }
            _ => self.config.load()?.map_or_else(otherwise, Ok)?,
        };
        config.listen = self.listen.or(config.listen);
        Ok(config)
    }
}

impl ReplicateArguments {
    /// The configuration that the arguments mean.
    ///
    /// # Errors
    /// When there is none, or it is wrong.
    pub fn config(&self) -> Result<Config, Failure> {
        self.what.config(|| {
            Err(Failure::usage(format!(
                "nothing to replicate: name a database and a replica, or a --config ({CONFIG_VARIABLE} is not set, and there is no {SYSTEM_CONFIG})"
            )))
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
    let shutdown_timeout = config.shutdown_timeout;
    let (jobs, _telling) = jobs_of(config).await?;
    let (standing, _) = mpsc::unbounded_channel();
    let mut failed = replicate(jobs, stop, shutdown_timeout, SystemClock::shared(), standing).await;
    match failed.is_empty() {
        true => {
            tracing::info!("stopped; everything is confirmed");
            Ok(())
        }
        false => Err(failed.swap_remove(0).into()),
    }
}

/// What is to be replicated, with its stores open; and the tasks that tell others how it is, for as long as they are kept.
///
/// # Errors
/// When the address to listen at is taken, or is not ours.
pub(super) async fn jobs_of(config: Config) -> Result<(Vec<Job>, JoinSet<()>), Failure> {
    let (clock, mut telling) = (SystemClock::shared(), JoinSet::new());
    let drills = Arc::new(Semaphore::new(DRILLS_AT_A_TIME));
    let mut jobs = Vec::new();
    for database in config.databases {
        let (heartbeat, verify_interval) = (database.heartbeat.clone(), database.verify_interval);
        let job = job_of(database, clock.now_ms()).await;
        if let Some(interval) = verify_interval {
            let driller = Driller {
                store: job.store.clone(),
                database: job.settings.path.clone(),
                interval,
                retention: job.retention,
                board: job.board.clone(),
                clock: clock.clone(),
                permits: drills.clone(),
            };
            telling.spawn(driller.run());
        }
        if let Some(url) = heartbeat {
            telling.spawn(beat(url, job.board.clone(), clock.clone()));
        }
        jobs.push(job);
    }
    let boards: Boards = jobs.iter().map(|job| job.board.clone()).collect();
    if let Some(address) = config.listen {
        let failed = |error: std::io::Error| Failure::other(format!("can't listen at {address}: {error}"));
        let server = HealthServer::bind(address, boards.clone(), config.healthy_lag, clock.clone()).await;
        let server = server.map_err(failed)?;
        tracing::info!(address = %server.address().map_err(failed)?, "serving /healthz, /readyz and /metrics");
        telling.spawn(server.serve());
    }
    telling.spawn(systemd::notify(boards, clock));
    Ok((jobs, telling))
}

async fn job_of(database: DatabaseConfig, now_ms: u64) -> Job {
    let store = Arc::new(Retrying::new(database.replica.open().await, QUICK));
    tracing::info!(database = %database.path.display(), replica = %database.replica, "replicating");
    let board = Arc::new(Board::new(database.path.clone(), database.replica.to_string(), now_ms));
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
    let (retention, presence_interval) = (database.retention, database.presence_interval);
    Job { settings, state_dir: database.state_dir, store, merge, retention, presence_interval, board }
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
            systemd::stopping();
            tracing::info!("stopping: capturing and shipping what is left");
            stop.cancel();
        }
    });
    Ok(())
}
