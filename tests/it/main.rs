//! Tests of the built program and the library, in one binary: linking the storage SDK takes long.

mod cli;
mod doctor;
mod downtime;
mod entry_point;
mod fleet;
mod format;
mod health;
mod install;
mod marks;
mod merging;
mod month;
mod objects;
mod recover;
mod replicate;
mod rest;
mod restore;
mod retain;
mod sequences;
mod starts;
mod store;
mod store_faults;
mod support;
mod two_writers;
mod verify;
