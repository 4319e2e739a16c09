//! `waltrail sync` and `waltrail snapshot`: asking the daemon that follows a database.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::ConfigArgument;
use super::exit_code::Failure;
use super::tell::tell;
use crate::clock::format_time;
use crate::config::default_state_dir;
use crate::config::units::parse_duration;
use crate::replicate::control::{Request, State, ask};

/// Arguments of `sync` and `snapshot`.
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

/// Waits until everything that was committed before is confirmed.
///
/// # Errors
/// See [`crate::replicate::control::ControlError`].
pub async fn sync(arguments: AskArguments) -> Result<(), Failure> {
    let State { position, time_ms } = arguments.ask(Request::Sync).await?;
    tell(format_args!("confirmed  {position}, {}", format_time(time_ms)));
    Ok(())
}

/// Has a snapshot made, and waits until it is confirmed.
///
/// # Errors
/// See [`crate::replicate::control::ControlError`].
pub async fn snapshot(arguments: AskArguments) -> Result<(), Failure> {
    let State { position, time_ms } = arguments.ask(Request::Snapshot).await?;
    tell(format_args!("confirmed  a snapshot of {position}, {}", format_time(time_ms)));
    Ok(())
}

impl AskArguments {
    async fn ask(&self, request: Request) -> Result<State, Failure> {
        let (database, known_state_dir) = match &self.database {
            // Its daemon may have been told by arguments alone.
            Some(path) => {
                let known = self.config.database(path)?;
                (path.clone(), known.map_or_else(|| default_state_dir(path), |known| known.state_dir))
            }
            None => {
                let known = self.config.only_database()?;
                (known.path, known.state_dir)
            }
        };
        let state_dir = self.state_dir.clone().unwrap_or(known_state_dir);
        Ok(ask(&database, &state_dir, request, self.timeout).await?)
    }
}
