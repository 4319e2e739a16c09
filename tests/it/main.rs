//! Tests of the built program and the library, in one binary: linking the storage SDK takes long.

mod bounds;
mod cli;
mod crash_points;
mod descriptors;
mod doctor;
mod downtime;
mod entry_point;
mod format;
mod health;
mod install;
mod marks;
mod merging;
mod month;
mod objects;
mod recover;
mod replicate;
mod restore;
mod retain;
mod sequences;
mod starts;
mod store;
mod store_faults;
mod support;
mod torn_state;
mod two_writers;
mod verify;
