//! Where objects are: S3-compatible storage, a directory, or memory, all behind [`ObjectStore`].
//!
//! Behaviour that every store wants (retry, metering) is stacked on top as decorators of the same trait.

pub mod directory;
pub mod faults;
pub mod limited;
pub mod memory;
pub mod metered;
mod payload_hash;
pub mod probe;
pub mod retry;
pub mod s3;
pub mod upload;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

/// A store that is shared between tasks.
pub type SharedStore = Arc<dyn ObjectStore>;

/// No request to delete names more keys (S3's rule).
pub const DELETE_MANY_LIMIT: usize = 1000;

/// Name, size and age of one object, as a listing tells them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// The object's key, relative to the store's root; parts are separated by `/`.
    pub key: String,
    /// The object's size in bytes.
    pub len_bytes: u64,
    /// When it was stored, in milliseconds since 1970, by the store's clock. `u64::MAX`, "just now", where the store does not
    /// say: age is only ever asked for before something is deleted, and what is new is not.
    pub stored_ms: u64,
}

/// A key that could not be deleted, and why.
pub type DeleteFailure = (String, StoreError);

/// What a put does when the key already exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutMode {
    /// Replace what is there.
    Overwrite,
    /// Answer [`StoreErrorKind::AlreadyExists`] and leave what is there (`If-None-Match: *`). Stores exist that accept
    /// the condition and ignore it: see `replicate::claim` for how that is found out.
    IfAbsent,
}

/// One part of a multipart upload, as the store acknowledged it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartTag {
    /// Part number, counted from 1.
    pub number: u32,
    /// The store's own tag for the part (S3: the ETag).
    pub tag: String,
    /// The part's size in bytes.
    pub len_bytes: u64,
}

/// The requests that there are, for the decorators that tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`ObjectStore::put`].
    Put,
    /// [`ObjectStore::get`].
    Get,
    /// [`ObjectStore::get_range`].
    GetRange,
    /// [`ObjectStore::list`].
    List,
    /// [`ObjectStore::delete`].
    Delete,
    /// [`ObjectStore::delete_many`].
    DeleteMany,
    /// [`ObjectStore::create_multipart`].
    CreateMultipart,
    /// [`ObjectStore::put_part`].
    PutPart,
    /// [`ObjectStore::complete_multipart`].
    CompleteMultipart,
    /// [`ObjectStore::abort_multipart`].
    AbortMultipart,
}

/// A flat space of immutable objects under one root.
///
/// Every method is one request (or, for `list`, one per page of the listing); none retries on its own: that is the
/// [`retry`](self::retry) decorator's work. All are safe to repeat.
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Where this is, for messages: a URL without secrets.
    fn location(&self) -> String;

    /// Stores one object whole.
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError>;

    /// Reads one object whole. An object larger than `limit_bytes` is an error, never a short result.
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError>;

    /// Reads exactly `len_bytes` bytes from `offset`. An object that ends before is an error, never a short result.
    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError>;

    /// All objects whose key starts with `prefix` and, if given, sorts after `start_after`; in the order of their keys.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError>;

    /// Names of the folders directly below `prefix`, which is empty or ends in `/`: what stands before the next `/` of the keys
    /// there. In order, each once.
    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let listed = self.list(prefix, None).await?;
        let folder = |object: &ObjectInfo| Some(object.key.strip_prefix(prefix)?.split_once('/')?.0.to_owned());
        let folders: BTreeSet<String> = listed.iter().filter_map(folder).collect();
        Ok(folders.into_iter().collect())
    }

    /// Deletes one object. Deleting what is not there is no error.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// Deletes at most [`DELETE_MANY_LIMIT`] objects, in no order; gives those that could not be. Deleting what is not there
    /// is no error.
    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let mut failures = Vec::new();
        for key in keys {
            if let Err(error) = self.delete(key).await {
                failures.push((key.clone(), error));
            }
        }
        Ok(failures)
    }

    /// Begins a multipart upload and returns its id. Nothing is visible under `key` before it is completed.
    async fn create_multipart(&self, key: &str) -> Result<String, StoreError>;

    /// Stores part `number` (from 1), whose first byte is byte `offset` of the object. Every part but the last holds at
    /// least 5 MiB (S3's rule).
    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError>;

    /// Makes the object of `parts` visible, durably and whole.
    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError>;

    /// Gives a multipart upload up and frees what it holds.
    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError>;
}

/// What kind of failure a [`StoreError`] is: what can be done about it depends on this alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The object is not there. The store was reached and said so.
    NotFound,
    /// The bucket or the root directory is not there.
    NoSuchBucket,
    /// A put with [`PutMode::IfAbsent`] found the key taken.
    AlreadyExists,
    /// The credentials are missing or wrong, or do not allow this.
    Denied,
    /// The store is not to be reached, overloaded, or failed on its side; trying again can help.
    Unavailable,
    /// The object's size is not what was asked for (it is truncated, or larger than the caller's limit).
    WrongSize,
    /// The store does not know this kind of request (S3: status 501, which some answer to conditional puts).
    NotSupported,
    /// Anything else; trying again does not help.
    Other,
}

/// A failure of one request to a store.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation} {location}/{key}: {message}")]
pub struct StoreError {
    /// What kind of failure it is.
    pub kind: StoreErrorKind,
    /// What was being done: "put", "get", "list", …
    pub operation: &'static str,
    /// The store, as [`ObjectStore::location`] tells it.
    pub location: String,
    /// The object's key, or the prefix of a listing.
    pub key: String,
    /// What went wrong, in a sentence.
    pub message: String,
}

impl StoreError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.kind == StoreErrorKind::Unavailable
    }

    /// Whether it is about a directory that is not there yet: it is made by the first put. A bucket is not.
    #[must_use]
    pub fn is_of_missing_directory(&self) -> bool {
        self.kind == StoreErrorKind::NoSuchBucket && self.location.starts_with("file://")
    }

    /// Whether the store was reached and the object is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.kind == StoreErrorKind::NotFound
    }
}
