//! Where a replica is: `s3://bucket/prefix?endpoint=…`, `file:///directory`, or a plain path.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use percent_encoding::{AsciiSet, CONTROLS};
use tokio::sync::Semaphore;

use super::identity;
use crate::store::SharedStore;
use crate::store::directory::DirectoryStore;
use crate::store::limited::Limited;
use crate::store::s3::{S3Options, S3Store};

/// Query parameters that an `s3://` URL may have.
const PARAMETERS: [&str; 4] = ["endpoint", "region", "path-style", "profile"];
/// What has another meaning in a URL than in a prefix.
const IN_A_PREFIX: &AsciiSet = &CONTROLS.add(b'%').add(b'?').add(b'#').add(b' ');

/// A place for a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaUrl {
    /// A bucket and a prefix in it.
    S3(S3Options),
    /// A directory.
    Directory(PathBuf),
}

/// What tells replicas apart. A replica's text leaves the server out, and buckets of different servers may have one name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// Its endpoint, if one is named.
    server: String,
    location: PathBuf,
}

impl Place {
    /// Whether one of them is in the other one, or they are one.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let is_nested = self.location.starts_with(&other.location) || other.location.starts_with(&self.location);
        self.server == other.server && is_nested
    }

    /// Whether both have the same location, perhaps on different servers.
    #[must_use]
    pub fn has_location_of(&self, other: &Self) -> bool {
        self.location == other.location
    }
}

/// Why a text is no replica URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{url}' is not a replica: {why}")]
pub struct ReplicaUrlError {
    url: String,
    why: String,
}

impl FromStr for ReplicaUrl {
    type Err = ReplicaUrlError;

    fn from_str(text: &str) -> Result<Self, ReplicaUrlError> {
        parse(text).map_err(|why| ReplicaUrlError { url: without_secrets(text), why })
    }
}

/// What stands before an `@` and in the query may be secrets that somebody put there by mistake.
fn without_secrets(text: &str) -> String {
    let place = text.split_once('?').map_or(text, |(before, _)| before);
    place.rsplit_once('@').map_or_else(|| place.to_owned(), |(_, after)| format!("…@{after}"))
}

fn parse(text: &str) -> Result<ReplicaUrl, String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return match text {
            "" => Err("it is empty; write s3://bucket/prefix or the path of a directory".into()),
            // Taken for a path, `s3:/bucket` would be backed up to a folder of that name beside the program.
            path if has_scheme(path) => {
                Err("a scheme is followed by '://': s3://bucket/prefix; a directory of this name is ./NAME".into())
            }
            path => {
                let absolute = std::path::absolute(path).map_err(|error| error.to_string())?;
                Ok(ReplicaUrl::Directory(absolute))
            }
        };
    };
    match scheme {
        "s3" => parse_s3(rest).map(ReplicaUrl::S3),
        "file" if rest.starts_with('/') && !rest.contains('?') => {
            let path = percent_encoding::percent_decode_str(rest).decode_utf8().map_err(|error| error.to_string())?;
            Ok(ReplicaUrl::Directory(PathBuf::from(path.as_ref())))
        }
        "file" => Err("a file URL has an absolute path and nothing else: file:///backup/app".into()),
        _ => Err(format!("unknown scheme '{scheme}'; write s3://bucket/prefix or file:///directory")),
    }
}

/// Whether a text begins like a URL, `name:`, and not like a path.
fn has_scheme(text: &str) -> bool {
    let is_name = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    text.split_once(':').is_some_and(|(before, _)| is_name(before))
}

fn parse_s3(rest: &str) -> Result<S3Options, String> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    if bucket.contains('@') {
        return Err("credentials do not belong in a URL; use the environment or the configuration file".into());
    }
    let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if bucket.is_empty() || !is_name(bucket) {
        return Err("it needs a bucket: s3://bucket/prefix".into());
    }
    let prefix = percent_encoding::percent_decode_str(prefix.trim_matches('/')).decode_utf8();
    let prefix = prefix.map_err(|error| error.to_string())?.into_owned();
    let mut options = S3Options { bucket: bucket.to_owned(), prefix, ..S3Options::default() };
    let mut seen = Vec::new();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        set_parameter(&mut options, &name, value.into_owned())?;
        if seen.contains(&name) {
            return Err(format!("parameter '{name}' is given twice"));
        }
        seen.push(name);
    }
    Ok(options)
}

fn set_parameter(options: &mut S3Options, name: &str, value: String) -> Result<(), String> {
    match name {
        // Of an unset variable in a shell, mostly.
        known if value.is_empty() && PARAMETERS.contains(&known) => {
            return Err(format!("parameter '{known}' is empty; leave it out or give it a value"));
        }
        "endpoint" => options.endpoint = Some(check_endpoint(value)?),
        "region" => options.region = Some(value),
        "path-style" => {
            options.path_style = Some(value.parse().map_err(|_| "path-style is true or false".to_owned())?);
        }
        "profile" => options.profile = Some(value),
        secret if secret.contains("key") || secret.contains("secret") || secret.contains("token") => {
            return Err("credentials do not belong in a URL; use the environment (AWS_ACCESS_KEY_ID and \
                        AWS_SECRET_ACCESS_KEY), a profile, or the configuration file"
                .into());
        }
        unknown => return Err(format!("unknown parameter '{unknown}'; there are {}", PARAMETERS.join(", "))),
    }
    Ok(())
}

/// Checks that an endpoint is an http or https URL.
///
/// # Errors
/// A sentence that says what it must be.
pub fn check_endpoint(endpoint: String) -> Result<String, String> {
    let parsed = url::Url::parse(&endpoint);
    if parsed.as_ref().is_ok_and(|url| !url.username().is_empty() || url.password().is_some()) {
        return Err("credentials do not belong in an endpoint; use the environment or the configuration file".into());
    }
    let is_http = parsed.is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    if is_http { Ok(endpoint) } else { Err(format!("endpoint '{endpoint}' is not an http:// or https:// URL")) }
}

impl fmt::Display for ReplicaUrl {
    /// Without parameters and secrets.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3(options) => out.write_str(&options.location()),
            Self::Directory(path) => write!(out, "file://{}", path.display()),
        }
    }
}

impl ReplicaUrl {
    /// Where it is, however that is spelt.
    #[must_use]
    pub fn place(&self) -> Place {
        match self {
            Self::S3(options) => {
                let endpoint = options.endpoint.as_deref().unwrap_or_default().trim_end_matches('/');
                Place { server: endpoint.to_owned(), location: PathBuf::from(options.location()) }
            }
            Self::Directory(path) => Place { server: String::new(), location: identity(path) },
        }
    }

    /// The URL, or the path, that means the same again: with its parameters, without secrets.
    #[must_use]
    pub fn with_parameters(&self) -> String {
        let S3Options { bucket, prefix, endpoint, region, path_style, profile, .. } = match self {
            Self::S3(options) => options,
            Self::Directory(path) => return path.display().to_string(),
        };
        let prefix = percent_encoding::utf8_percent_encode(prefix, IN_A_PREFIX);
        let path_style = path_style.map(|path_style| path_style.to_string());
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        for (name, value) in PARAMETERS.into_iter().zip([endpoint, region, &path_style, profile]) {
            query.extend_pairs(value.as_ref().map(|value| (name, value)));
        }
        match query.finish() {
            query if query.is_empty() => format!("s3://{bucket}/{prefix}"),
            query => format!("s3://{bucket}/{prefix}?{query}"),
        }
    }

    /// Whether this, as far as it says anything, says the same as `known`: what a URL leaves out is as it is there.
    #[must_use]
    pub fn means(&self, known: &Self) -> bool {
        let (Self::S3(told), Self::S3(options)) = (self, known) else { return self.place() == known.place() };
        self.place().has_location_of(&known.place())
            && (told.endpoint.is_none() || self.place() == known.place())
            && (told.region.is_none() || told.region == options.region)
            && (told.path_style.is_none() || told.path_style == options.path_style)
            && (told.profile.is_none() || told.profile == options.profile)
    }

    /// Opens the store there; sends nothing.
    pub async fn open(&self) -> SharedStore {
        match self {
            Self::S3(options) => Arc::new(S3Store::open(options).await),
            Self::Directory(path) => Arc::new(DirectoryStore::new(path.clone())),
        }
    }
}

/// The stores of one process. Replicas on one server share its connections and a limit of requests at a time, and so do all
/// directories: a thousand databases that begin at once are no storm, and a server that does not answer holds up no other.
#[derive(Debug)]
pub struct Stores {
    servers: Vec<Server>,
    requests: usize,
    of_directories: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
struct Server {
    options: S3Options,
    store: S3Store,
    requests: Arc<Semaphore>,
}

impl Stores {
    /// With so many requests at a time to each server.
    #[must_use]
    pub fn new(requests: usize) -> Self {
        Self { servers: Vec::new(), requests, of_directories: Arc::new(Semaphore::new(requests)) }
    }

    /// Opens a replica's store. Nothing is sent: whether it can be reached is seen at the first request.
    pub async fn open(&mut self, replica: &ReplicaUrl) -> SharedStore {
        match replica {
            ReplicaUrl::S3(options) => {
                let server = self.server(options).await;
                Arc::new(Limited::new(Arc::new(server.store.at(options)), server.requests))
            }
            ReplicaUrl::Directory(_) => Arc::new(Limited::new(replica.open().await, self.of_directories.clone())),
        }
    }

    async fn server(&mut self, options: &S3Options) -> Server {
        let wanted = options.server();
        if let Some(known) = self.servers.iter().find(|known| known.options == wanted) {
            return known.clone();
        }
        let requests = Arc::new(Semaphore::new(self.requests));
        let server = Server { options: wanted, store: S3Store::open(options).await, requests };
        self.servers.push(server.clone());
        server
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_a_replica_means_it_again() {
        for text in [
            "s3://b-1/apps/shop?endpoint=http%3A%2F%2F127.0.0.1%3A9000&region=eu-1&path-style=true&profile=p",
            "s3://b/",
            "s3://b/a%3Fb%20c%25d",
            "s3://b/%C3%A4?region=eu-1",
            "/backup/app%20",
        ] {
            let replica: ReplicaUrl = text.parse().unwrap();
            assert_eq!(replica.with_parameters(), text);
            assert_eq!(replica.with_parameters().parse(), Ok(replica));
        }
    }

    #[test]
    fn what_is_a_replica() {
        let parsed: ReplicaUrl =
            "s3://b-1/apps/shop/?endpoint=http://127.0.0.1:9000&region=eu-1&path-style=true".parse().unwrap();
        let ReplicaUrl::S3(options) = &parsed else { panic!("{parsed:?}") };
        assert_eq!((options.bucket.as_str(), options.prefix.as_str()), ("b-1", "apps/shop"));
        assert_eq!(options.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        assert_eq!((options.region.as_deref(), options.path_style), (Some("eu-1"), Some(true)));
        assert_eq!(parsed.to_string(), "s3://b-1/apps/shop");
        let directory = |path: &str| Ok(ReplicaUrl::Directory(PathBuf::from(path)));
        assert_eq!("file:///back%20up/app".parse(), directory("/back up/app"));
        assert_eq!("/backup".parse(), directory("/backup"));
        assert_eq!("/s3:x/backup".parse(), directory("/s3:x/backup"));
        assert!("./s3:x".parse::<ReplicaUrl>().is_ok());
    }

    #[test]
    fn what_is_none() {
        for (text, says) in [
            ("", "empty"),
            ("s3://", "needs a bucket"),
            ("s3:///prefix", "needs a bucket"),
            ("gs://bucket/x", "unknown scheme 'gs'"),
            ("https://bucket.s3.amazonaws.com/x", "unknown scheme 'https'"),
            ("file://relative/x", "absolute path"),
            ("s3://b/x?color=red", "unknown parameter 'color'"),
            ("s3://b/x?path-style=maybe", "true or false"),
            ("s3://b/x?endpoint=localhost:9000", "not an http"),
            ("s3://b/x?secret-access-key=hunter2", "do not belong in a URL"),
            ("s3://key:hunter2@b/x", "do not belong in a URL"),
            ("s3://b/x?endpoint=http://key:hunter2@host", "do not belong in an endpoint"),
            ("s3:/bucket/app", "followed by '://'"),
            ("s3:bucket/app", "followed by '://'"),
            ("file:/backup", "followed by '://'"),
            ("s3://b/x?region=", "'region' is empty"),
            ("s3://b/x?region=a&region=b", "'region' is given twice"),
        ] {
            let error = text.parse::<ReplicaUrl>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
