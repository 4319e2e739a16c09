//! `waltrail config check`: what a configuration says, and whether it can be.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::ConfigArgument;
use super::exit_code::Failure;
use super::tell::say;
use crate::config::units::show_duration;
use crate::config::{Config, DatabaseConfig};

/// Arguments of `config`.
#[derive(Debug, Args)]
pub struct ConfigArguments {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Read a configuration as `replicate` would, and say what it means
    Check(CheckArguments),
}

#[derive(Debug, Args)]
struct CheckArguments {
    /// The file [default: as for --config]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArgument,
}

/// Checks a configuration.
///
/// # Errors
/// When there is none, or it is wrong: with file, line and key.
pub fn run(arguments: ConfigArguments) -> Result<(), Failure> {
    let ConfigCommand::Check(CheckArguments { file, config }) = arguments.command;
    let loaded = match file {
        Some(file) => {
            config.refuse("the file is named already")?;
            Some(crate::config::file::load(&file)?)
        }
        None => config.load()?,
    };
    let Some(config) = loaded else { return Err(Failure::usage("there is no configuration to check; name it".into())) };
    say(describe(&config))
}

fn describe(config: &Config) -> String {
    let databases = config.databases.len();
    let mut lines = vec![match config.fleets.len() {
        0 => format!("good: {databases} databases"),
        1 => format!("good: {databases} databases, and 1 pattern or directory of many"),
        fleets => format!("good: {databases} databases, and {fleets} patterns or directories of many"),
    }];
    if let Some(address) = config.listen {
        lines.push(format!("health and metrics at http://{address}"));
    }
    lines.extend(config.databases.iter().map(|database| {
        let state_dir = format!("in {}", database.state_dir.display());
        describe_database(database, &format!("to {}", database.replica), &state_dir)
    }));
    lines.extend(config.fleets.iter().map(|fleet| {
        let template = fleet.template();
        let state_dir = fleet.state_dir().map_or("beside each".to_owned(), |place| format!("in {}", place.display()));
        describe_database(template, &format!("each to its own place below {}", template.replica), &state_dir)
    }));
    lines.join("\n")
}

fn describe_database(database: &DatabaseConfig, to: &str, state_dir: &str) -> String {
    let window = database
        .retention
        .window_ms
        .map_or("forever".to_owned(), |ms| format!("for {}", show_duration(std::time::Duration::from_millis(ms))));
    format!(
        "{}\n  {to}, every {} under load, kept {window}\n  local state {state_dir}",
        database.path.display(),
        show_duration(database.sync_interval),
    )
}
