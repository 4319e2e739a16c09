//! The configuration file. `config/waltrail.toml` shows every key.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Uri;
use serde::{Deserialize, Deserializer};

use super::fleet::FleetConfig;
use super::replica_url::{ReplicaUrl, check_endpoint};
use super::toml_error::explain;
use super::units::{parse_address, parse_duration, parse_retention, parse_size};
use super::variables::substitute;
use super::{
    Config, ConfigError, DEFAULT_OPEN_DATABASES, DEFAULT_SHUTDOWN_TIMEOUT, DatabaseConfig, LogConfig, LogFormat,
    LogLevel, further_state_dir, identity,
};
use crate::health::DEFAULT_HEALTHY_LAG;

/// A configuration of thousands of databases is smaller.
const TEXT_LIMIT_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    #[serde(default)]
    log: LogTable,
    #[serde(default)]
    http: HttpTable,
    shutdown_timeout: Option<DurationText>,
    open_databases: Option<usize>,
    #[serde(default, deserialize_with = "tables")]
    database: Vec<DatabaseTable>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct LogTable {
    level: Option<LogLevel>,
    format: Option<LogFormat>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct HttpTable {
    listen: Option<AddressText>,
    healthy_lag: Option<DurationText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DatabaseTable {
    path: PathBuf,
    replica: ReplicaValue,
    state_dir: Option<PathBuf>,
    sync_interval: Option<DurationText>,
    poll_interval: Option<DurationText>,
    checkpoint_threshold: Option<SizeText>,
    spool_limit: Option<SizeText>,
    snapshot_interval: Option<DurationText>,
    merge: Option<Vec<DurationText>>,
    retention: Option<RetentionText>,
    keep_daily: Option<u32>,
    keep_weekly: Option<u32>,
    keep_monthly: Option<u32>,
    heartbeat_url: Option<UrlText>,
    verify_interval: Option<DurationText>,
    presence_interval: Option<DurationText>,
}

/// All `[[database]]`. With one pair of brackets it is one table, of which serde would say that a sequence was expected.
fn tables<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DatabaseTable>, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Vec<DatabaseTable>;

        fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            out.write_str("[[database]] tables")
        }

        fn visit_seq<S: serde::de::SeqAccess<'de>>(self, tables: S) -> Result<Self::Value, S::Error> {
            Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(tables))
        }

        fn visit_map<M: serde::de::MapAccess<'de>>(self, _: M) -> Result<Self::Value, M::Error> {
            Err(serde::de::Error::custom("write [[database]], in two pairs of brackets: there can be several"))
        }
    }
    deserializer.deserialize_seq(Visitor)
}

/// A URL, or a table with one.
enum ReplicaValue {
    Url(String),
    Table(ReplicaTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ReplicaTable {
    url: String,
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
    profile: Option<String>,
    access_key_id: Option<SecretText>,
    secret_access_key: Option<SecretText>,
    secret_access_key_file: Option<PathBuf>,
}

/// A text that no error may show.
struct SecretText(String);

impl<'de> Deserialize<'de> for SecretText {
    /// By way of any value, because serde's own error for a wrong type quotes the value.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Self(text)),
            _ => Err(serde::de::Error::custom("it is a text in quotes")),
        }
    }
}

impl<'de> Deserialize<'de> for ReplicaValue {
    /// By hand, because an untagged enum would say nothing of an unknown key.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = ReplicaValue;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("a replica URL, or a table with a url")
            }

            fn visit_str<E>(self, text: &str) -> Result<ReplicaValue, E> {
                Ok(ReplicaValue::Url(text.to_owned()))
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(self, map: M) -> Result<ReplicaValue, M::Error> {
                let table = serde::de::value::MapAccessDeserializer::new(map);
                ReplicaTable::deserialize(table).map(ReplicaValue::Table)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

struct DurationText(Duration);

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

struct SizeText(u64);

impl<'de> Deserialize<'de> for SizeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_size(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

struct AddressText(SocketAddr);

impl<'de> Deserialize<'de> for AddressText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_address(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// The path of such a URL may be a secret, so no error shows it.
struct UrlText(Uri);

impl<'de> Deserialize<'de> for UrlText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let SecretText(text) = SecretText::deserialize(deserializer)?;
        let is_web = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
        let wrong = || serde::de::Error::custom("a heartbeat-url begins with https:// or http:// and names a host");
        text.parse().ok().filter(is_web).map(Self).ok_or_else(wrong)
    }
}

struct RetentionText(Option<Duration>);

impl<'de> Deserialize<'de> for RetentionText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_retention(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

impl ReplicaValue {
    fn resolve(self) -> Result<ReplicaUrl, String> {
        let table = match self {
            Self::Url(url) => {
                return url.parse().map_err(|error: super::replica_url::ReplicaUrlError| error.to_string());
            }
            Self::Table(table) => table,
        };
        let mut replica = table.url.parse().map_err(|error: super::replica_url::ReplicaUrlError| error.to_string())?;
        let ReplicaUrl::S3(options) = &mut replica else {
            let is_plain = table.endpoint.is_none() && table.region.is_none() && table.path_style.is_none();
            let is_plain = is_plain && table.profile.is_none() && table.access_key_id.is_none();
            return if is_plain && table.secret_access_key.is_none() && table.secret_access_key_file.is_none() {
                Ok(replica)
            } else {
                Err(format!("{replica} is a directory; endpoint, region, path-style, profile and keys are for s3://"))
            };
        };
        let secret_access_key = secret(table.secret_access_key, table.secret_access_key_file)?;
        if table.access_key_id.is_some() != secret_access_key.is_some() {
            return Err("access-key-id and secret-access-key (or secret-access-key-file) go together".into());
        }
        if let Some(endpoint) = table.endpoint {
            options.endpoint = Some(check_endpoint(endpoint)?);
        }
        options.region = table.region.or(options.region.take());
        options.path_style = table.path_style.or(options.path_style);
        options.profile = table.profile.or(options.profile.take());
        options.access_key_id = table.access_key_id.map(|SecretText(text)| text);
        options.secret_access_key = secret_access_key;
        Ok(replica)
    }
}

/// Reads a small file; one that is larger than any configuration is none.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(TEXT_LIMIT_BYTES + 1).read_to_string(&mut text)?;
    match text.len() as u64 > TEXT_LIMIT_BYTES {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than a configuration can be")),
        false => Ok(text),
    }
}

/// A secret that stands in the configuration, or in a file of its own, as container platforms mount them.
fn secret(text: Option<SecretText>, file: Option<PathBuf>) -> Result<Option<String>, String> {
    match (text, file) {
        (Some(_), Some(_)) => Err("of secret-access-key and secret-access-key-file only one can be".into()),
        (text, None) => Ok(text.map(|SecretText(text)| text)),
        (None, Some(file)) => match read_text(&file) {
            Ok(text) => Ok(Some(text.trim_end_matches(['\n', '\r']).to_owned())),
            Err(error) => Err(format!("secret-access-key-file '{}': {error}", file.display())),
        },
    }
}

impl DatabaseTable {
    fn resolve(self) -> Result<DatabaseConfig, String> {
        let shown = self.path.display().to_string();
        let path = std::path::absolute(&self.path).map_err(|error| format!("path '{shown}': {error}"))?;
        let mut database =
            DatabaseConfig::new(path, self.replica.resolve().map_err(|why| format!("database '{shown}': {why}"))?);
        if let Some(state_dir) = self.state_dir {
            database.state_dir = std::path::absolute(&state_dir)
                .map_err(|error| format!("database '{shown}': state-dir '{}': {error}", state_dir.display()))?;
        }
        if let Some(DurationText(interval)) = self.sync_interval {
            database.sync_interval = interval;
        }
        if let Some(DurationText(interval)) = self.poll_interval {
            if interval.is_zero() {
                return Err(format!("database '{shown}': poll-interval must not be 0"));
            }
            database.poll_interval = interval;
        }
        if let Some(SizeText(bytes)) = self.checkpoint_threshold {
            if bytes == 0 {
                return Err(format!("database '{shown}': checkpoint-threshold must not be 0"));
            }
            database.checkpoint_threshold_bytes = bytes;
        }
        if let Some(SizeText(bytes)) = self.spool_limit {
            if bytes == 0 {
                return Err(format!("database '{shown}': spool-limit must not be 0"));
            }
            database.spool_limit_bytes = bytes;
        }
        if let Some(DurationText(interval)) = self.snapshot_interval {
            if interval.is_zero() {
                return Err(format!("database '{shown}': snapshot-interval must not be 0"));
            }
            database.snapshot_interval = interval;
        }
        if let Some(DurationText(interval)) = self.presence_interval {
            if interval.is_zero() {
                return Err(format!(
                    "database '{shown}': presence-interval must not be 0; leave it out to turn it off"
                ));
            }
            database.presence_interval = Some(interval);
        }
        if let Some(windows) = self.merge {
            database.merge = windows.into_iter().map(|DurationText(window)| window).collect();
            let ascends = database.merge.is_sorted_by(|before, after| before < after);
            if !ascends || database.merge.first().is_some_and(Duration::is_zero) {
                return Err(format!("database '{shown}': merge is a list of ascending durations: [\"1m\", \"1h\"]"));
            }
        }
        if let Some(DurationText(interval)) = self.verify_interval {
            if interval.is_zero() {
                return Err(format!("database '{shown}': verify-interval must not be 0"));
            }
            database.verify_interval = Some(interval);
        }
        database.heartbeat = self.heartbeat_url.map(|UrlText(url)| url);
        let retention = &mut database.retention;
        if let Some(RetentionText(window)) = self.retention {
            retention.window_ms = window.map(|window| window.as_millis() as u64);
        }
        retention.keep_daily = self.keep_daily.unwrap_or(retention.keep_daily);
        retention.keep_weekly = self.keep_weekly.unwrap_or(retention.keep_weekly);
        retention.keep_monthly = self.keep_monthly.unwrap_or(retention.keep_monthly);
        if retention.window_ms.is_none() && retention.keeps_periods() {
            return Err(format!(
                "database '{shown}': everything is kept forever; keep-daily and the like say nothing then"
            ));
        }
        Ok(database)
    }
}

/// Reads and checks the configuration at `path`.
///
/// # Errors
/// When the file can't be read, has a key that there is not (the error names key and line), or contradicts itself.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = read_text(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let wrong = |what| ConfigError::Wrong { path: path.to_owned(), what };
    let text = substitute(&text, |name| std::env::var(name).ok()).map_err(wrong)?;
    parse(&text).map_err(wrong)
}

/// Reads a configuration from its text.
///
/// # Errors
/// A sentence that says what is wrong, and where.
pub fn parse(text: &str) -> Result<Config, String> {
    let file: ConfigFile = toml::from_str(text).map_err(|error| explain(text, &error))?;
    let (mut databases, mut fleets, mut paths) = (Vec::new(), Vec::new(), HashSet::new());
    for table in file.database {
        let has_state_dir = table.state_dir.is_some();
        let mut database = table.resolve()?;
        // What is named twice has two replicas, each with local state of its own.
        let is_further = !paths.insert(identity(&database.path));
        if is_further && !has_state_dir {
            database.state_dir = further_state_dir(&database.path, &database.replica);
        }
        let shown = database.path.display();
        match FleetConfig::of(&database, has_state_dir, is_further)
            .map_err(|why| format!("database '{shown}': {why}"))?
        {
            Some(_) if database.heartbeat.is_some() => {
                return Err(format!(
                    "database '{shown}': a heartbeat-url is for one database; for many, watch /healthz"
                ));
            }
            Some(fleet) => fleets.push(fleet),
            None => databases.push(database),
        }
    }
    if databases.is_empty() && fleets.is_empty() {
        return Err("there is no [[database]] in it".into());
    }
    check_apart(&databases)?;
    check_fleets_apart(&databases, &fleets)?;
    Ok(Config {
        log: LogConfig { level: file.log.level, format: file.log.format },
        listen: file.http.listen.map(|AddressText(address)| address),
        healthy_lag: file.http.healthy_lag.map_or(DEFAULT_HEALTHY_LAG, |DurationText(lag)| lag),
        shutdown_timeout: file.shutdown_timeout.map_or(DEFAULT_SHUTDOWN_TIMEOUT, |DurationText(timeout)| timeout),
        open_databases: file.open_databases.unwrap_or(DEFAULT_OPEN_DATABASES),
        databases,
        fleets,
    })
}

/// A fleet's databases go to places below its own, whatever they are called: nobody else may store there.
fn check_fleets_apart(databases: &[DatabaseConfig], fleets: &[FleetConfig]) -> Result<(), String> {
    for (index, fleet) in fleets.iter().enumerate() {
        let place = fleet.template().replica.place();
        let others = fleets[index + 1..].iter().map(FleetConfig::template).chain(databases);
        for other in others {
            if place.overlaps(&other.replica.place()) {
                return Err(format!(
                    "'{}' and '{}' go to one place; many databases need one that nobody else is in",
                    fleet.template().path.display(),
                    other.path.display()
                ));
            }
        }
    }
    Ok(())
}

/// No two databases may share a replica or a state directory, however they are spelt.
fn check_apart(databases: &[DatabaseConfig]) -> Result<(), String> {
    let (mut replicas, mut state_dirs) = (HashSet::new(), HashSet::new());
    for database in databases {
        if !replicas.insert(database.replica.place()) {
            return Err(format!("two databases go to {}; each needs a place of its own", database.replica));
        }
        if !state_dirs.insert(identity(&database.state_dir)) {
            let shown = database.state_dir.display();
            return Err(format!("two databases have the state-dir '{shown}'; each needs one of its own"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_files_are_right() {
        let full = parse(include_str!("../../config/waltrail.toml")).unwrap();
        assert_eq!((full.databases.len(), full.fleets.len()), (3, 1));
        let intervals: Vec<_> = full.databases.iter().map(|database| database.presence_interval).collect();
        assert_eq!(intervals, [Some(Duration::from_secs(300)), None, None]);
        assert_eq!(full.open_databases, DEFAULT_OPEN_DATABASES);
        let minimal = parse(include_str!("../../config/waltrail.minimal.toml")).unwrap();
        assert_eq!(minimal.shutdown_timeout, DEFAULT_SHUTDOWN_TIMEOUT);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let one = "[[database]]\npath = \"/a.db\"\nreplica = \"s3://b/a\"\n";
        for (text, says) in [
            (String::new(), "no [[database]]"),
            (
                format!("{one}sync-intervall = \"1s\"\n"),
                "line 4: unknown key 'sync-intervall'; did you mean 'sync-interval'?",
            ),
            (one.replace("[[database]]", "[[databases]]"), "line 1: unknown key 'databases'; did you mean 'database'?"),
            (one.replace("[[database]]", "[database]"), "write [[database]], in two pairs of brackets"),
            ("database = 7\n".into(), "expected [[database]] tables"),
            (format!("[http]\nlisten = \"everywhere\"\n{one}"), "127.0.0.1:9180"),
            (format!("{one}heartbeat-url = \"hc.example.com/secret\"\n"), "https://"),
            (format!("{one}colour = \"30d\"\n"), "line 4: unknown key 'colour'; there are path, replica"),
            (format!("{one}retention = \"off\"\n"), "write forever, or a duration"),
            (format!("{one}retention = \"forever\"\nkeep-daily = 3\n"), "keep-daily"),
            (format!("{one}checkpoint-threshold = \"0B\"\n"), "must not be 0"),
            (format!("{one}spool-limit = \"0B\"\n"), "must not be 0"),
            (format!("{one}presence-interval = \"0s\"\n"), "leave it out"),
            (format!("colour = 1\n{one}"), "colour"),
            (format!("{one}sync-interval = \"1 parsec\"\n"), "is not a duration"),
            (format!("{one}spool-limit = 5\n"), "spool-limit"),
            (format!("{one}{one}"), "each needs a place of its own"),
            (format!("{one}{}", one.replace("a.db", "b.db")), "each needs a place of its own"),
            (one.replace("s3://b/a", "ftp://b/a"), "unknown scheme 'ftp'"),
            ("[[database]]\npath = \"/a.db\"\n".into(), "replica"),
            ("[[database]]\npath = \"/a.db\"\nreplica = { url = \"s3://b/a\", colour = 1 }\n".into(), "colour"),
            (
                "[[database]]\npath = \"/a.db\"\nreplica = { url = \"s3://b/a\", access-key-id = \"x\" }\n".into(),
                "go together",
            ),
            (
                "[[database]]\npath = \"/a.db\"\nreplica = { url = \"s3://b/a\", access-key-id = \"x\", secret-access-key-file = \"/no/file\" }\n".into(),
                "secret-access-key-file '/no/file'",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(says), "{text}\n{error}");
            assert!(!error.contains('\n'), "one sentence: {error}");
        }
    }

    #[test]
    fn one_place_spelt_in_two_ways() {
        let two = |first: &str, second: &str| {
            parse(&format!("[[database]]\npath = \"/no/a.db\"\n{first}\n[[database]]\npath = \"/no/b.db\"\n{second}\n"))
        };
        for (first, second) in [
            ("replica = \"/backup/x\"", "replica = \"file:///backup//x/\""),
            ("replica = \"/tmp/x\"", "replica = \"/tmp/../tmp/x\""),
            ("replica = \"s3://b/x\"", "replica = \"s3://b/x/?region=eu-1\""),
            ("replica = \"s3://b/x?endpoint=http://h\"", "replica = { url = \"s3://b/x\", endpoint = \"http://h/\" }"),
            ("replica = \"/x\"\nstate-dir = \"/s\"", "replica = \"/y\"\nstate-dir = \"/s/\""),
        ] {
            let error = two(first, second).unwrap_err();
            assert!(error.contains("of its own"), "{first} {second}: {error}");
        }
        let other_server = two("replica = \"s3://b/x\"", "replica = \"s3://b/x?endpoint=http://h\"");
        assert!(other_server.is_ok(), "{other_server:?}");
        let two_replicas = parse(
            "[[database]]\npath = \"/tmp/a.db\"\nreplica = \"/x\"\n[[database]]\npath = \"/tmp/../tmp/a.db\"\nreplica = \"/y\"\n",
        );
        let two_replicas = two_replicas.unwrap().replicas_of(Path::new("/tmp/a.db"));
        assert_eq!(two_replicas.len(), 2);
        assert_ne!(two_replicas[0].state_dir, two_replicas[1].state_dir);
    }

    #[test]
    fn no_error_shows_a_secret() {
        let table = "[[database]]\npath = \"/a.db\"\n[database.replica]\nurl = \"s3://b/a\"\naccess-key-id = \"x\"\n";
        for line in [
            "secret-access-key = hunter2",
            "secret-access-key = \"hunter2",
            "secret-access-key = 'hunter2\"",
            "secret-access-key = \"hunter2\" x",
            "secret-access-key = \"hunter2\\q\"",
            "secret-access-kye = \"hunter2\"",
            "secret-access-key: \"hunter2\"",
            "secret-access-key = [\"hunter2\"]",
            "secret-access-key = 72077207",
            "secret-access-key = \"hunter2\"\nsecret-access-key = \"hunter2\"",
            "secret-access-key = \"hunter2\"\ncolour = 1",
        ] {
            let error = parse(&format!("{table}{line}\n")).unwrap_err();
            assert!(!error.contains("hunter2") && !error.contains("72077207"), "{line}: {error}");
            assert!(error.starts_with("line "), "{line}: {error}");
        }
    }
}
