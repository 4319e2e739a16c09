//! Words for people on standard error.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line. That nobody reads it any more (`2>&1 | tee` got the same Ctrl-C) must not end what is being done, as
/// `eprintln!` would with its panic.
pub fn tell(line: impl Display) {
    writeln!(io::stderr(), "{line}").ok();
}
