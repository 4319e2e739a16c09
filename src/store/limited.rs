//! So many requests at a time, of all that share the limit.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError};

/// Lets a request begin when one of the permits is free. Goes below retrying, so that nothing is held while it waits.
#[derive(Debug)]
pub struct Limited {
    inner: SharedStore,
    permits: Arc<Semaphore>,
}

impl Limited {
    /// Stacks the limit on `inner`.
    #[must_use]
    pub fn new(inner: SharedStore, permits: Arc<Semaphore>) -> Self {
        Self { inner, permits }
    }

    /// `None` never comes: the semaphore is not closed.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire().await.ok()
    }
}

#[async_trait]
impl ObjectStore for Limited {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        let _turn = self.turn().await;
        self.inner.put(key, body, mode).await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        let _turn = self.turn().await;
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        let _turn = self.turn().await;
        self.inner.get_range(key, offset, len_bytes).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        let _turn = self.turn().await;
        self.inner.list(prefix, start_after).await
    }

    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let _turn = self.turn().await;
        self.inner.folders(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let _turn = self.turn().await;
        self.inner.delete(key).await
    }

    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let _turn = self.turn().await;
        self.inner.delete_many(keys).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        let _turn = self.turn().await;
        self.inner.create_multipart(key).await
    }

    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        let _turn = self.turn().await;
        self.inner.put_part(key, upload_id, number, offset, body).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        let _turn = self.turn().await;
        self.inner.complete_multipart(key, upload_id, parts).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        let _turn = self.turn().await;
        self.inner.abort_multipart(key, upload_id).await
    }
}
