//! Counts requests and bytes, for reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError};

/// What has gone to and come from a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Traffic {
    /// Requests, failed ones included.
    pub requests: u64,
    /// Bytes of bodies sent.
    pub sent_bytes: u64,
    /// Bytes of bodies received.
    pub received_bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
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
        Traffic {
            requests: self.0.requests.load(Ordering::Relaxed),
            sent_bytes: self.0.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.0.received_bytes.load(Ordering::Relaxed),
        }
    }

    fn request(&self, sent_bytes: usize) {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
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
        self.meter.request(body.len());
        self.inner.put(key, body, mode).await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.meter.request(0);
        self.inner.get(key, limit_bytes).await.inspect(|body| self.meter.received(body))
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.meter.request(0);
        self.inner.get_range(key, offset, len_bytes).await.inspect(|body| self.meter.received(body))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.meter.request(0);
        self.inner.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.meter.request(0);
        self.inner.delete(key).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.meter.request(0);
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
        self.meter.request(body.len());
        self.inner.put_part(key, upload_id, number, offset, body).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        self.meter.request(0);
        self.inner.complete_multipart(key, upload_id, parts).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.meter.request(0);
        self.inner.abort_multipart(key, upload_id).await
    }
}
