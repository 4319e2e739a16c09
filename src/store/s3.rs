//! Objects in an S3-compatible bucket, through the AWS SDK.

mod delete;

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::BehaviorVersion;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    Region, RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Object};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::{Builder, tls};
use bytes::{Bytes, BytesMut};

use tracing::instrument;

use super::payload_hash::PayloadHash;
use super::{DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, StoreError, StoreErrorKind};

/// No request takes longer until its answer begins, the body that is sent included: enough for a 16 MiB part at 300 KB/s.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The SDK's timeouts end where an answer's body begins. No two pieces of a body come further apart than this.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a bucket is and how to get in. What is not given comes from the environment, the AWS profile files or the
/// machine's role, as with every AWS tool.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// What all keys begin with, without a slash at either end; may be empty.
    pub prefix: String,
    /// URL of the service, if it is not AWS.
    pub endpoint: Option<String>,
    /// The region. With an endpoint and no region: `us-east-1`.
    pub region: Option<String>,
    /// Whether the bucket stands in the path (`http://host/bucket`) and not in the host's name.
    pub path_style: Option<bool>,
    /// Profile of the AWS configuration files.
    pub profile: Option<String>,
    /// Access key, together with `secret_access_key`.
    pub access_key_id: Option<String>,
    /// Secret access key.
    pub secret_access_key: Option<String>,
    /// Session token, for an access key that is temporary.
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Options {
    /// Without the keys.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("S3Options")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .field("profile", &self.profile)
            .finish_non_exhaustive()
    }
}

impl S3Options {
    /// Where it is and how to get in, whatever the bucket: those that are alike can share connections.
    #[must_use]
    pub fn server(&self) -> Self {
        Self { bucket: String::new(), prefix: String::new(), ..self.clone() }
    }

    /// `s3://bucket/prefix`.
    #[must_use]
    pub fn location(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("s3://{}{slash}{}", self.bucket, self.prefix)
    }
}

/// A store in a bucket.
#[derive(Debug, Clone)]
pub struct S3Store {
    client: Client,
    bucket: String,
    /// Empty, or ending in a slash.
    prefix: String,
    location: String,
    stall_timeout: Duration,
    /// Without one every request fails, which the SDK reports as a failure to send.
    has_region: bool,
}

impl S3Store {
    /// Sets a client up. Sends nothing: whether bucket and credentials are right is seen at the first request.
    pub async fn open(options: &S3Options) -> Self {
        let endpoint = options
            .endpoint
            .clone()
            .or_else(|| environment("AWS_ENDPOINT_URL_S3"))
            .or_else(|| environment("AWS_ENDPOINT_URL"));
        let http_client = Builder::new().tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build_https();
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
            .http_client(http_client.clone())
            .timeout_config(timeouts)
            // The one place that asks again is `store::retry`.
            .retry_config(RetryConfig::disabled());
        if let Some(profile) = &options.profile {
            // By itself the SDK looks into the environment first, and a profile that was asked for would be ignored.
            let machine = ProviderConfig::default().with_http_client(http_client.clone());
            let credentials =
                ProfileFileCredentialsProvider::builder().configure(&machine).profile_name(profile).build();
            loader = loader.profile_name(profile).credentials_provider(credentials);
        }
        if let (Some(id), Some(secret)) = (&options.access_key_id, &options.secret_access_key) {
            let token = options.session_token.clone();
            loader = loader.credentials_provider(Credentials::new(id, secret, token, None, "waltrail configuration"));
        }
        let region = options.region.clone().or_else(|| {
            let elsewhere = environment("AWS_REGION").or_else(|| environment("AWS_DEFAULT_REGION"));
            elsewhere.or_else(|| endpoint.as_ref().map(|_| "us-east-1".to_owned()))
        });
        if let Some(region) = region {
            loader = loader.region(Region::new(region));
        }
        let shared = loader.load().await;
        let path_style = options.path_style.unwrap_or_else(|| match environment("AWS_S3_URL_STYLE").as_deref() {
            Some("path") => true,
            Some("virtual") => false,
            _ => endpoint.as_deref().is_some_and(has_no_names_below),
        });
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(path_style)
            .interceptor(PayloadHash)
            // Checksums in trailers, which newer SDKs send by default, are refused by many S3-compatible servers.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // What is sent is bounded by the attempt's timeout, what is received by ours; a slow line is no error.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if let Some(endpoint) = endpoint {
            config = config.endpoint_url(endpoint);
        }
        let no_place = Self {
            client: Client::from_conf(config.build()),
            bucket: String::new(),
            prefix: String::new(),
            location: String::new(),
            stall_timeout: STALL_TIMEOUT,
            has_region: shared.region().is_some(),
        };
        no_place.at(options)
    }

    /// Another place on the same server, through the same connections.
    #[must_use]
    pub fn at(&self, options: &S3Options) -> Self {
        let prefix = if options.prefix.is_empty() { String::new() } else { format!("{}/", options.prefix) };
        Self { bucket: options.bucket.clone(), prefix, location: options.location(), ..self.clone() }
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Turns an error of the SDK into one of ours.
    fn failed<E, R>(&self, operation: &'static str, key: &str) -> impl FnOnce(SdkError<E, R>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        R: HttpStatus + fmt::Debug + Send + Sync + 'static,
    {
        let (location, key, has_region) = (self.location.clone(), key.to_owned(), self.has_region);
        move |error| {
            let (kind, message) = explain(&error, has_region);
            StoreError { kind, operation, location, key, message }
        }
    }

    fn error(&self, kind: StoreErrorKind, key: &str, message: impl fmt::Display) -> StoreError {
        StoreError {
            kind,
            operation: "get",
            location: self.location.clone(),
            key: key.to_owned(),
            message: message.to_string(),
        }
    }

    /// A listing of nothing is empty: what is not found is the bucket.
    fn not_listed<E, R>(&self, prefix: &str) -> impl FnOnce(SdkError<E, R>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        R: HttpStatus + fmt::Debug + Send + Sync + 'static,
    {
        let failed = self.failed("list", prefix);
        |error| match failed(error) {
            error if error.is_not_found() => StoreError { kind: StoreErrorKind::NoSuchBucket, ..error },
            error => error,
        }
    }

    fn bad_listing(&self, prefix: &str, message: &str) -> StoreError {
        StoreError { operation: "list", ..self.error(StoreErrorKind::Other, prefix, message) }
    }

    /// An object of a listing. One outside of our prefix is not ours; one without name or size is a listing not to be trusted.
    fn listed(&self, prefix: &str, object: &Object) -> Result<Option<ObjectInfo>, StoreError> {
        let len_bytes = object.size().and_then(|size| u64::try_from(size).ok());
        let (Some(key), Some(len_bytes)) = (object.key(), len_bytes) else {
            return Err(self.bad_listing(prefix, "the store lists an object without a name or a size"));
        };
        let stored_ms = object.last_modified().and_then(|at| at.to_millis().ok()).and_then(|ms| u64::try_from(ms).ok());
        let key = key.strip_prefix(self.prefix.as_str());
        Ok(key.map(|key| ObjectInfo { key: key.to_owned(), len_bytes, stored_ms: stored_ms.unwrap_or(u64::MAX) }))
    }

    /// Reads a body, at most `limit_bytes` of it.
    async fn body(&self, key: &str, answer: GetObjectOutput, limit_bytes: u64) -> Result<Bytes, StoreError> {
        let too_large =
            || self.error(StoreErrorKind::WrongSize, key, format!("the answer has more than {limit_bytes} bytes"));
        let announced = u64::try_from(answer.content_length().unwrap_or(0)).unwrap_or(0);
        if announced > limit_bytes {
            return Err(too_large());
        }
        let mut stream = answer.body;
        let mut body = BytesMut::with_capacity(announced as usize);
        let stalled = |_| self.error(StoreErrorKind::Unavailable, key, "the answer stopped in the middle");
        while let Some(chunk) = tokio::time::timeout(self.stall_timeout, stream.next()).await.map_err(stalled)? {
            // A connection that breaks in the middle of a body.
            let chunk = chunk.map_err(|error| self.error(StoreErrorKind::Unavailable, key, root_cause(&error)))?;
            if (body.len() + chunk.len()) as u64 > limit_bytes {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        if (body.len() as u64) < announced {
            return Err(self.error(StoreErrorKind::Unavailable, key, "the answer ended too early"));
        }
        Ok(body.freeze())
    }
}

/// A part larger than 15 MiB (see `store::upload`) gets the time that it needs at this rate, per second.
const SLOWEST_UPLOAD_BYTES: u64 = 256 << 10;

/// How long an attempt to send `len_bytes` bytes may take.
fn attempt_timeout(len_bytes: u64) -> Duration {
    ATTEMPT_TIMEOUT.max(Duration::from_secs(len_bytes / SLOWEST_UPLOAD_BYTES))
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// An address or `localhost`: there are no host names below it that a bucket could be.
fn has_no_names_below(endpoint: &str) -> bool {
    url::Url::parse(endpoint).is_ok_and(|url| match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || !name.contains('.'),
        Some(_) => true,
        None => false,
    })
}

/// What an answer's head says.
trait HttpStatus {
    fn status(&self) -> u16;
    /// Where the bucket is: AWS says it to those who ask in the wrong place.
    fn bucket_region(&self) -> Option<&str>;
}

impl HttpStatus for aws_sdk_s3::config::http::HttpResponse {
    fn status(&self) -> u16 {
        self.status().as_u16()
    }

    fn bucket_region(&self) -> Option<&str> {
        self.headers().get("x-amz-bucket-region")
    }
}

fn explain<E, R>(error: &SdkError<E, R>, has_region: bool) -> (StoreErrorKind, String)
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: HttpStatus + fmt::Debug + Send + Sync + 'static,
{
    let cause = || error.source().map_or_else(|| error.to_string(), root_cause);
    match error {
        SdkError::ServiceError(service) => {
            let status = service.raw().status();
            let code = service.err().code().unwrap_or_default();
            let text = service.err().message().unwrap_or_default();
            let message = match (code, text) {
                ("", "") => format!("the store answered status {status}"),
                (code, "") => format!("the store answered {code} (status {status})"),
                ("", text) => format!("the store answered status {status}: {text}"),
                (code, text) => format!("the store answered {code} (status {status}): {text}"),
            };
            match service.raw().bucket_region().filter(|_| matches!(status, 301 | 307 | 400)) {
                Some(region) => (kind_of(status, code), format!("{message}; the bucket is in region '{region}'")),
                None => (kind_of(status, code), message),
            }
        }
        SdkError::TimeoutError(_) => (StoreErrorKind::Unavailable, "the store did not answer in time".into()),
        SdkError::DispatchFailure(_) if is_credentials_failure(error) => {
            (StoreErrorKind::Denied, format!("no usable credentials: {}", cause()))
        }
        SdkError::DispatchFailure(_) if !has_region => (
            StoreErrorKind::Other,
            "no region is known: give region=… in the URL, AWS_REGION, or one in the profile".into(),
        ),
        SdkError::DispatchFailure(_) => (StoreErrorKind::Unavailable, cause()),
        SdkError::ResponseError(broken) => match broken.raw().status() {
            status if status >= 400 => (kind_of(status, ""), format!("the store answered status {status}")),
            _ => (StoreErrorKind::Unavailable, cause()),
        },
        _ => (StoreErrorKind::Other, cause()),
    }
}

/// The SDK reports missing credentials as a failure to send.
fn is_credentials_failure(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<aws_credential_types::provider::error::CredentialsError>() {
            return true;
        }
        next = error.source();
    }
    false
}

fn kind_of(status: u16, code: &str) -> StoreErrorKind {
    match (status, code) {
        (_, "NoSuchBucket") => StoreErrorKind::NoSuchBucket,
        (501, _) => StoreErrorKind::NotSupported,
        // A conditional put that raced with another one: it was decided neither way.
        (409, _) | (408 | 429 | 500..=599, _) | (_, "SlowDown" | "RequestTimeout" | "InternalError") => {
            StoreErrorKind::Unavailable
        }
        (412, _) => StoreErrorKind::AlreadyExists,
        (401 | 403, _)
        | (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken" | "AccessDenied") => {
            StoreErrorKind::Denied
        }
        (416, _) => StoreErrorKind::WrongSize,
        // A 404 that names no code is no S3 server's: the address is wrong, and nothing is known about the object.
        (404, "") => StoreErrorKind::Other,
        (404, _) => StoreErrorKind::NotFound,
        _ => StoreErrorKind::Other,
    }
}

/// The innermost cause: "connection refused", not "dispatch failure".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[async_trait]
impl ObjectStore for S3Store {
    fn location(&self) -> String {
        self.location.clone()
    }

    #[instrument(level = "trace", skip(self, body), fields(body_bytes = body.len()))]
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        let condition = (mode == PutMode::IfAbsent).then(|| "*".to_owned());
        let request = self.client.put_object().bucket(&self.bucket).key(self.full(key)).set_if_none_match(condition);
        request.body(ByteStream::from(body)).send().await.map_err(self.failed("put", key))?;
        Ok(())
    }

    #[instrument(level = "trace", skip(self))]
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        let request = self.client.get_object().bucket(&self.bucket).key(self.full(key));
        let answer = request.send().await.map_err(self.failed("get", key))?;
        self.body(key, answer, limit_bytes).await
    }

    #[instrument(level = "trace", skip(self))]
    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        let Some(last) = len_bytes.checked_sub(1).and_then(|more| offset.checked_add(more)) else {
            return Ok(Bytes::new());
        };
        let request = self.client.get_object().bucket(&self.bucket).key(self.full(key));
        let answer = request.range(format!("bytes={offset}-{last}")).send().await.map_err(self.failed("get", key))?;
        // A server that ignores the range, or a cache that mixes ranges up, must not pass for the object.
        let is_asked_for = match answer.content_range() {
            Some(range) => range.strip_prefix("bytes ").is_some_and(|at| at.starts_with(&format!("{offset}-"))),
            None => offset == 0,
        };
        if !is_asked_for {
            return Err(self.error(
                StoreErrorKind::Other,
                key,
                "the store answered with other bytes than those asked for",
            ));
        }
        let body = self.body(key, answer, len_bytes).await?;
        if body.len() as u64 != len_bytes {
            let message = format!("the object ends before the bytes asked for ({} of {len_bytes})", body.len());
            return Err(self.error(StoreErrorKind::WrongSize, key, message));
        }
        Ok(body)
    }

    #[instrument(level = "trace", skip(self))]
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        let request = self.client.list_objects_v2().bucket(&self.bucket).prefix(self.full(prefix));
        let mut pages = request.set_start_after(start_after.map(|after| self.full(after))).into_paginator().send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(self.not_listed(prefix))?;
            for object in page.contents() {
                found.extend(self.listed(prefix, object)?);
            }
            // The paginator would take this for the end, and what was not listed would count as missing.
            if page.is_truncated() == Some(true) && page.next_continuation_token().is_none_or(str::is_empty) {
                return Err(self.bad_listing(prefix, "the store says that there is more and not how to get it"));
            }
        }
        // S3 lists general-purpose buckets in order; not every server does.
        found.sort_by(|left, right| left.key.cmp(&right.key));
        found.retain(|object| start_after.is_none_or(|after| object.key.as_str() > after));
        Ok(found)
    }

    #[instrument(level = "trace", skip(self))]
    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let full = self.full(prefix);
        let request = self.client.list_objects_v2().bucket(&self.bucket).prefix(&full).delimiter("/");
        let mut pages = request.into_paginator().send();
        let mut found = BTreeSet::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(self.not_listed(prefix))?;
            for folder in page.common_prefixes().iter().filter_map(|common| common.prefix()) {
                let name = folder.strip_prefix(&full).and_then(|name| name.strip_suffix('/'));
                let name =
                    name.ok_or_else(|| self.bad_listing(prefix, "the store listed a folder of another place"))?;
                found.insert(name.to_owned());
            }
            if page.is_truncated() == Some(true) && page.next_continuation_token().is_none_or(str::is_empty) {
                return Err(self.bad_listing(prefix, "the store says that there is more and not how to get it"));
            }
        }
        Ok(found.into_iter().collect())
    }

    #[instrument(level = "trace", skip(self))]
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let request = self.client.delete_object().bucket(&self.bucket).key(self.full(key));
        match request.send().await.map_err(self.failed("delete", key)) {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    #[instrument(level = "trace", skip(self, keys), fields(keys = keys.len()))]
    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        self.delete_objects(keys).await
    }

    #[instrument(level = "trace", skip(self))]
    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        let operation = "begin an upload of";
        let request = self.client.create_multipart_upload().bucket(&self.bucket).key(self.full(key));
        let answer = request.send().await.map_err(self.failed(operation, key))?;
        let missing = || self.error(StoreErrorKind::Other, key, "the store gave no id for the upload");
        answer.upload_id().map(str::to_owned).ok_or_else(missing)
    }

    #[instrument(level = "trace", skip(self, body), fields(body_bytes = body.len()))]
    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        _offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        let request = self.client.upload_part().bucket(&self.bucket).key(self.full(key)).upload_id(upload_id);
        let part_number = i32::try_from(number).map_err(|error| self.error(StoreErrorKind::Other, key, error))?;
        let len_bytes = body.len() as u64;
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(attempt_timeout(len_bytes)).build();
        let patient = aws_sdk_s3::config::Builder::new().timeout_config(timeouts);
        let request = request.part_number(part_number).body(ByteStream::from(body)).customize();
        let answer = request.config_override(patient).send().await.map_err(self.failed("put part of", key))?;
        let missing = || StoreError {
            operation: "put part of",
            ..self.error(StoreErrorKind::Other, key, "the store gave no tag for the part")
        };
        let tag = answer.e_tag().map(str::to_owned).ok_or_else(missing)?;
        Ok(PartTag { number, tag, len_bytes })
    }

    #[instrument(level = "trace", skip(self, parts))]
    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        let part =
            |part: &PartTag| CompletedPart::builder().part_number(part.number as i32).e_tag(part.tag.clone()).build();
        let all = CompletedMultipartUpload::builder().set_parts(Some(parts.iter().map(part).collect())).build();
        let request = self.client.complete_multipart_upload().bucket(&self.bucket).key(self.full(key));
        let request = request.upload_id(upload_id).multipart_upload(all);
        request.send().await.map_err(self.failed("complete", key))?;
        Ok(())
    }

    #[instrument(level = "trace", skip(self))]
    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        let request = self.client.abort_multipart_upload().bucket(&self.bucket).key(self.full(key));
        request.upload_id(upload_id).send().await.map_err(self.failed("give up the upload of", key))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// The SDK's own timeouts do not cover bodies: without ours this waits for ever.
    #[tokio::test]
    async fn a_body_that_stalls_is_given_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let _request = socket.read(&mut [0; 16384]).unwrap();
            socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n0123456789").unwrap();
            // Holds the connection until the client hangs up; not waited for, because that needs this test's runtime.
            let _whatever_came = socket.read(&mut [0; 16]);
        });
        let options = S3Options {
            bucket: "b".into(),
            endpoint: Some(endpoint),
            access_key_id: Some("test".into()),
            secret_access_key: Some("testtest".into()),
            ..S3Options::default()
        };
        let store = S3Store { stall_timeout: Duration::from_millis(200), ..S3Store::open(&options).await };
        let error = tokio::time::timeout(Duration::from_secs(20), store.get("k", 5000)).await.unwrap().unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Unavailable, "{error}");
        assert!(error.message.contains("stopped"), "{error}");
    }
}
