//! TOML, environment and replica URLs, as one validated value.
