//! Failures on order, for tests and simulations: a hook decides for each request whether it passes, fails before it is
//! carried out, or is carried out and its answer lost.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    DeleteFailure, ObjectInfo, ObjectStore, Operation, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind,
};

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it goes through.
    None,
    /// It fails in this way and is not carried out.
    Before(StoreErrorKind),
    /// It is carried out, and its answer, if it succeeded, replaced by a failure of this kind.
    After(StoreErrorKind),
}

/// One request, as the hook sees it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What is asked for.
    pub operation: Operation,
    /// The object's key, the prefix of a listing, or the first key of several.
    pub key: &'a str,
    /// How many requests of any kind went before.
    pub number: u64,
}

/// A store that fails when its hook says so.
pub struct Faulty<H> {
    inner: SharedStore,
    hook: H,
    requests: AtomicU64,
}

impl<H> fmt::Debug for Faulty<H> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Faulty").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<H: Fn(Request<'_>) -> Fault + Send + Sync> Faulty<H> {
    /// Stacks the faults that `hook` decides on `inner`.
    #[must_use]
    pub fn new(inner: SharedStore, hook: H) -> Self {
        Self { inner, hook, requests: AtomicU64::new(0) }
    }

    async fn answer<T>(
        &self,
        operation: Operation,
        key: &str,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let failed = |kind, message: &str| StoreError {
            kind,
            operation: "injected fault in",
            location: self.inner.location(),
            key: key.to_owned(),
            message: message.to_owned(),
        };
        match (self.hook)(Request { operation, key, number }) {
            Fault::None => work.await,
            Fault::Before(kind) => Err(failed(kind, "not carried out")),
            Fault::After(kind) => work.await.and_then(|_| Err(failed(kind, "carried out, and the answer lost"))),
        }
    }
}

#[async_trait]
impl<H: Fn(Request<'_>) -> Fault + Send + Sync> ObjectStore for Faulty<H> {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.answer(Operation::Put, key, self.inner.put(key, body, mode)).await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.answer(Operation::Get, key, self.inner.get(key, limit_bytes)).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.answer(Operation::GetRange, key, self.inner.get_range(key, offset, len_bytes)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.answer(Operation::List, prefix, self.inner.list(prefix, start_after)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.answer(Operation::Delete, key, self.inner.delete(key)).await
    }

    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let first = keys.first().map_or("", String::as_str);
        self.answer(Operation::DeleteMany, first, self.inner.delete_many(keys)).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.answer(Operation::CreateMultipart, key, self.inner.create_multipart(key)).await
    }

    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        self.answer(Operation::PutPart, key, self.inner.put_part(key, upload_id, number, offset, body)).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        let work = self.inner.complete_multipart(key, upload_id, parts);
        self.answer(Operation::CompleteMultipart, key, work).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.answer(Operation::AbortMultipart, key, self.inner.abort_multipart(key, upload_id)).await
    }
}
