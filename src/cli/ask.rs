//! `waltrail sync` and `waltrail snapshot`: asking the daemon that follows a database.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use futures_util::future::join_all;

use super::ConfigArgument;
use super::exit_code::Failure;
use super::tell::tell;
use crate::clock::format_time;
use crate::config::units::parse_duration;
use crate::replicate::control::{Request, State, ask};

/// Arguments of `sync`.
#[derive(Debug, Args)]
pub struct SyncArguments {
    /// Return when it is confirmed: what it does anyway
    #[arg(long = "wait", conflicts_with = "no_wait")]
    _wait: bool,
    /// Return when it is captured and on its way
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    ask: AskArguments,
}

/// Arguments of `snapshot`, and what `sync` has in common with it.
#[derive(Debug, Args)]
pub struct AskArguments {
    /// The database [default: the configuration's only one, or the environment's]
    database: Option<PathBuf>,
    /// Where its daemon keeps local state, if the configuration does not say so [default: .NAME-waltrail beside it]
    #[arg(long, value_name = "DIRECTORY")]
    state_dir: Option<PathBuf>,
    /// Give up after this long; what was asked for goes on
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Waits until everything that was committed before is confirmed, in every replica.
///
/// # Errors
/// See [`crate::replicate::control::ControlError`].
pub async fn sync(arguments: SyncArguments) -> Result<(), Failure> {
    match arguments.no_wait {
        false => arguments.ask.ask(Request::Sync, "confirmed  ").await,
        true => arguments.ask.ask(Request::Ship, "captured   ").await,
    }
}

/// Has a snapshot made, in every replica, and waits until it is confirmed.
///
/// # Errors
/// See [`crate::replicate::control::ControlError`].
pub async fn snapshot(arguments: AskArguments) -> Result<(), Failure> {
    arguments.ask(Request::Snapshot, "confirmed  a snapshot of ").await
}

impl AskArguments {
    /// Asks for all replicas at once; the first failure is told when all have answered.
    async fn ask(&self, request: Request, what: &str) -> Result<(), Failure> {
        let mut databases = match &self.database {
            Some(path) => self.config.databases(std::slice::from_ref(path))?,
            None => self.config.only_database()?,
        };
        if let Some(state_dir) = &self.state_dir {
            databases.truncate(1);
            databases.iter_mut().for_each(|database| database.state_dir.clone_from(state_dir));
        }
        let answers = join_all(databases.iter().map(|it| ask(&it.path, &it.state_dir, request, self.timeout))).await;
        let mut failure = None;
        for (database, answer) in databases.iter().zip(answers) {
            let State { position, time_ms } = match answer {
                Ok(state) => state,
                Err(error) => {
                    if databases.len() > 1 {
                        tell(format_args!("failed     {}: {error}", database.replica));
                    }
                    failure.get_or_insert(error);
                    continue;
                }
            };
            let to = if databases.len() > 1 { format!(", in {}", database.replica) } else { String::new() };
            tell(format_args!("{what}{position}, {}{to}", format_time(time_ms)));
        }
        failure.map_or(Ok(()), |error| Err(error.into()))
    }
}
