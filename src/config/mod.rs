//! TOML, environment and replica URLs, as one validated value.

pub mod replica_url;
