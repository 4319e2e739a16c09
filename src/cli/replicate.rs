//! `waltrail replicate`

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::daemon_log;
use super::exit_code::{Failure, NOT_CONFIRMED};
use super::tell::tell;
use super::{CONFIG_VARIABLE, ConfigArgument, SYSTEM_CONFIG, absolute, listen_variable};
use crate::clock::{Clock, SystemClock};
use crate::config::fleet::FleetConfig;
use crate::config::units::parse_address;
use crate::config::{Config, DatabaseConfig};
use crate::daemon::{self, Reload};
use crate::health::systemd;
use crate::run::open_files;

/// Signals to stop that come within this time are one request: process managers and coreutils' `timeout` signal the process and its
/// group.
const ONE_REQUEST: Duration = Duration::from_millis(500);

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
    /// Serve /healthz, /readyz and /metrics there: 127.0.0.1:9180, or 0.0.0.0:9180 for every network [default: what [http] listen of the configuration says, or WALTRAIL_LISTEN]
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
                let database = DatabaseConfig::new(absolute(database)?, replica.parse()?);
                refuse_many(&database)?;
                Config::new(vec![database])
            }
            _ => self.config.load()?.map_or_else(otherwise, Ok)?,
        };
        config.listen = self.listen.or(config.listen);
        if config.listen.is_none() {
            config.listen = listen_variable()?;
        }
        Ok(config)
    }
}

/// A file of that name would be waited for, for ever.
fn refuse_many(database: &DatabaseConfig) -> Result<(), Failure> {
    match FleetConfig::of(database, false, false) {
        Ok(None) => Ok(()),
        Ok(Some(_)) | Err(_) => Err(Failure::usage(format!(
            "'{}' stands for many databases: patterns and directories go into a configuration, as the path of a [[database]]",
            database.path.display()
        ))),
    }
}

impl ReplicateArguments {
    /// How to read the configuration again; `None` when it is in no file.
    #[must_use]
    pub fn reload(self) -> Option<Reload> {
        let path = self.what.config.path().filter(|_| self.what.database.is_none())?;
        // As at the start, so that only what differs then is told.
        let (told, otherwise) = (self.what.listen, listen_variable().ok().flatten());
        Some(Box::new(move || {
            let config = crate::config::file::load(&path)?;
            Ok(Config { listen: told.or(config.listen).or(otherwise), ..config })
        }))
    }

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

/// Replicates until told to stop. At SIGHUP `reload` reads the configuration again.
///
/// # Errors
/// The first thing that went wrong, when not everything ended as told.
pub async fn run(config: Config, reload: Option<Reload>) -> Result<(), Failure> {
    let stop = CancellationToken::new();
    watch_signals(stop.clone())?;
    let hangup = signal(SignalKind::hangup()).map_err(cant_listen)?;
    open_files::allow_many();
    let daemon = daemon::start(config, stop, Some((hangup, reload))).await?;
    let mut failed = daemon.replicating.await.map_err(|error| Failure::other(error.to_string()))?;
    match failed.is_empty() {
        true => {
            tracing::info!("stopped; everything is confirmed");
            Ok(())
        }
        false => Err(failed.swap_remove(0).into()),
    }
}

fn cant_listen(error: std::io::Error) -> Failure {
    Failure::other(format!("can't listen for signals: {error}"))
}

/// The first SIGTERM or SIGINT asks for a stop, a second one makes it happen at once: not one that comes with the first, as when the
/// process and its group are signalled.
fn watch_signals(stop: CancellationToken) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(cant_listen)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cant_listen)?;
    let clock = SystemClock::new();
    tokio::spawn(async move {
        let mut asked_at: Option<Duration> = None;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            let now = clock.monotonic();
            match asked_at {
                None => {
                    asked_at = Some(now);
                    systemd::stopping();
                    tracing::info!("stopping: capturing and shipping what is left");
                    stop.cancel();
                }
                Some(at) if now.saturating_sub(at) < ONE_REQUEST => {}
                Some(_) => {
                    tell("stopped at once; what was not confirmed is shipped by the next start");
                    daemon_log::finish();
                    std::process::exit(i32::from(NOT_CONFIRMED));
                }
            }
        }
    });
    Ok(())
}
