//! Being the entry point of a container: the application as a child process, and whether its database lies where it stays.

pub mod child;
pub mod open_files;
pub mod place;
