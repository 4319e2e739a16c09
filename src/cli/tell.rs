//! Words for people. `println!` and `eprintln!` panic when nobody reads any more; these do not.

use std::fmt::Display;
use std::io::{self, Write};

use super::exit_code::Failure;

/// Writes a line to standard error. That nobody reads it (`2>&1 | tee` got the same Ctrl-C) must not end what is being done.
pub fn tell(line: impl Display) {
    writeln!(io::stderr(), "{line}").ok();
}

/// Writes a line to standard output.
///
/// # Errors
/// When it can't be written.
pub fn say(line: impl Display) -> Result<(), Failure> {
    writeln!(io::stdout(), "{line}").map_err(|error| Failure::other(format!("can't write to standard output: {error}")))
}
