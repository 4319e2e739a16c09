//! The command line: one file per command; arguments, output, exit codes.
