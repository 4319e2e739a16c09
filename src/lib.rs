//! waltrail: continuous backup for SQLite.
//!
//! A reader finds the room for a thing by the name on the door, and dependencies point downwards only:
//!
//! | module | knows | is used by |
//! | --- | --- | --- |
//! | [`sqlite`] | what SQLite's files are: header, WAL, wal-index, locks | `replicate`, `restore` |
//! | [`format`] | what our objects are: keys, segments, snapshots, records. Bytes in, bytes out | all above |
//! | [`store`] | where objects are: S3, a directory, memory; retry and metering | `replicate`, `restore`, `cli` |
//! | [`replicate`] | capture, ledger, spool, shipping, snapshots, epochs | `cli` |
//! | [`restore`] | the plan of a restore, and its execution | `retain`, `verify`, `cli` |
//! | [`retain`] | what of a history goes and what stays; marks | `replicate`, `verify`, `cli` |
//! | [`verify`] | whether what is stored can be restored | `health`, `cli` |
//! | [`health`] | telling others how replication is: HTTP, systemd, heartbeats, drills | `cli` |
//! | [`run`] | a child process, its signals, and whether its database's place lasts | `cli` |
//! | [`config`] | TOML, environment, URLs and fleets, as one validated value | `daemon`, `cli` |
//! | [`daemon`] | who is to be followed, by a configuration that may change | `cli` |
//! | [`cli`] | commands, text and JSON output, exit codes | `main` |
//!
//! `docs/ARCHITECTURE.md` follows a page through all of them.

// They panic when nobody reads their output any more: `cli::tell`, or `writeln!` with its error handled.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod clock;
pub mod config;
pub mod daemon;
pub mod format;
pub mod health;
pub mod replicate;
pub mod restore;
pub mod retain;
pub mod run;
pub mod sqlite;
pub mod store;
pub mod verify;

pub mod cli;
