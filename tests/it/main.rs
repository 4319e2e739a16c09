//! Tests of the built program and the library, in one binary: linking the storage SDK takes long.

mod cli;
mod downtime;
mod format;
mod replicate;
mod store;
mod support;
