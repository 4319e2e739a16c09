//! Counts requests and bytes, for reports.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::{DeleteFailure, ObjectInfo, ObjectStore, Operation, PartTag, PutMode, SharedStore, StoreError};

/// What has gone to and come from a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Requests, failed ones included. A listing counts as one, however many pages it has.
    pub requests: u64,
    /// The same by kind; a kind without requests is not in it.
    pub by_operation: HashMap<Operation, u64>,
    /// Bytes of bodies sent.
    pub sent_bytes: u64,
    /// Bytes of bodies received.
    pub received_bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: Mutex<HashMap<Operation, u64>>,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

/// Reads the counters of a [`Metered`] store.
#[derive(Debug, Clone, Default)]
pub struct Meter(Arc<Counters>);

impl Meter {
    /// The traffic so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let by_operation = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Traffic {
            requests: by_operation.values().sum(),
            by_operation,
            sent_bytes: self.0.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.0.received_bytes.load(Ordering::Relaxed),
        }
    }

    fn request(&self, operation: Operation, sent_bytes: usize) {
        *self.0.requests.lock().unwrap_or_else(PoisonError::into_inner).entry(operation).or_default() += 1;
        self.0.sent_bytes.fetch_add(sent_bytes as u64, Ordering::Relaxed);
    }

    fn received(&self, body: &Bytes) {
        self.0.received_bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
    }
}

/// Counts what passes through.
#[derive(Debug)]
pub struct Metered {
    inner: SharedStore,
    meter: Meter,
}

impl Metered {
    /// Stacks counting on `inner`; the meter reads the counts.
    #[must_use]
    pub fn new(inner: SharedStore) -> (Self, Meter) {
        let meter = Meter::default();
        (Self { inner, meter: meter.clone() }, meter)
    }
}

#[async_trait]
impl ObjectStore for Metered {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.meter.request(Operation::Put, body.len());
        self.inner.put(key, body, mode).await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.meter.request(Operation::Get, 0);
        self.inner.get(key, limit_bytes).await.inspect(|body| self.meter.received(body))
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.meter.request(Operation::GetRange, 0);
        self.inner.get_range(key, offset, len_bytes).await.inspect(|body| self.meter.received(body))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.meter.request(Operation::List, 0);
        self.inner.list(prefix, start_after).await
    }

    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.meter.request(Operation::List, 0);
        self.inner.folders(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.meter.request(Operation::Delete, 0);
        self.inner.delete(key).await
    }

    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        self.meter.request(Operation::DeleteMany, 0);
        self.inner.delete_many(keys).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.meter.request(Operation::CreateMultipart, 0);
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
        self.meter.request(Operation::PutPart, body.len());
        self.inner.put_part(key, upload_id, number, offset, body).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        self.meter.request(Operation::CompleteMultipart, 0);
        self.inner.complete_multipart(key, upload_id, parts).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.meter.request(Operation::AbortMultipart, 0);
        self.inner.abort_multipart(key, upload_id).await
    }
}
