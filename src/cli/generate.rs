//! `waltrail completions` and `waltrail man`: what packagers and shells need, made from the arguments themselves.

use std::io;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::exit_code::Failure;
use super::tell::shown;

/// Arguments of `completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  waltrail completions bash > /etc/bash_completion.d/waltrail")]
pub struct CompletionsArguments {
    /// The shell
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  waltrail man /usr/local/share/man/man1")]
pub struct ManArguments {
    /// Where the pages go; made if it is not there
    directory: PathBuf,
}

fn failed(error: &io::Error) -> Failure {
    Failure::other(format!("can't be written: {error}"))
}

/// Writes a shell's completions to standard output.
///
/// # Errors
/// When it can't be written.
pub fn completions(arguments: &CompletionsArguments) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Arguments::command(), "waltrail", &mut script);
    shown(io::Write::write_all(&mut io::stdout().lock(), &script))
}

/// Writes a manual page for each command.
///
/// # Errors
/// When one can't be written.
pub fn man(arguments: &ManArguments) -> Result<(), Failure> {
    std::fs::create_dir_all(&arguments.directory).map_err(|error| failed(&error))?;
    clap_mangen::generate_to(super::Arguments::command(), &arguments.directory).map_err(|error| failed(&error))
}
