//! Tests of the built program and the library, in one binary: linking the storage SDK takes long.

mod cli;
mod downtime;
mod format;
mod install;
mod objects;
mod replicate;
mod restore;
mod retain;
mod store;
mod store_faults;
mod support;
