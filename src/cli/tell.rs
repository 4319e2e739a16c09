//! Words for people. `println!` and `eprintln!` panic when nobody reads any more; these do not.

use std::fmt::Display;
use std::io::{self, Write};

use clap::ValueEnum;

use super::daemon_log;
use super::exit_code::Failure;

/// Writes a line to standard error; in a daemon as part of its log, without waiting for a reader. A
/// reader that is gone (`2>&1 | tee` got the same Ctrl-C) must not end what is being done.
pub fn tell(line: impl Display) {
    match daemon_log::writer() {
        // One write is one line of the queue.
        Some(mut log) => log.write_all(format!("{line}\n").as_bytes()).ok(),
        None => writeln!(io::stderr(), "{line}").ok(),
    };
}

/// Writes a line to standard output.
///
/// # Errors
/// When it can't be written.
pub fn say(line: impl Display) -> Result<(), Failure> {
    writeln!(io::stdout(), "{line}").map_err(|error| unwritable(&error))
}

/// What became of a report on standard output. That `| head` has read enough is no failure.
///
/// # Errors
/// When it could not be written.
pub fn shown(written: io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(unwritable(&error)),
        _ => Ok(()),
    }
}

fn unwritable(error: &io::Error) -> Failure {
    Failure::other(format!("can't write to standard output: {error}"))
}

/// How a command writes what it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TextOrJson {
    /// Columns.
    Text,
    /// One JSON object a line.
    Json,
}
