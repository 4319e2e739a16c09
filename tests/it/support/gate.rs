//! A store that can be held up: all of it, or some requests for ever. It knows when nothing moves any more, so that what happens in a test
//! depends on nothing but the test.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use waltrail::store::{DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError};

#[derive(Debug, Default)]
struct Counts {
    /// Requests that have no answer yet.
    under_way: usize,
    /// Of them those that are held up.
    held_up: usize,
    /// One request in three is held up for ever, half of them after they were carried out; which ones follows from the number.
    hanging: Option<u64>,
}

#[derive(Debug)]
pub struct Gate {
    inner: SharedStore,
    counts: Mutex<Counts>,
    is_open: watch::Sender<bool>,
}

/// Counts for as long as it lives: a request that is given up is not under way any more.
struct Counted<'a>(&'a Gate, fn(&mut Counts) -> &mut usize);

impl<'a> Counted<'a> {
    fn new(gate: &'a Gate, count: fn(&mut Counts) -> &mut usize) -> Self {
        *count(&mut gate.counts()) += 1;
        Self(gate, count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        *(self.1)(&mut self.0.counts()) -= 1;
    }
}

impl Gate {
    pub fn new(inner: SharedStore) -> Arc<Self> {
        Arc::new(Self { inner, counts: Mutex::default(), is_open: watch::Sender::new(true) })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap()
    }

    /// Whether every request that has no answer is held up.
    pub fn is_still(&self) -> bool {
        let counts = self.counts();
        counts.under_way == counts.held_up
    }

    /// Storage goes away, or comes back.
    pub fn set_open(&self, is_open: bool) {
        self.is_open.send_replace(is_open);
    }

    pub fn is_open(&self) -> bool {
        *self.is_open.borrow()
    }

    pub fn set_hanging(&self, number: Option<u64>) {
        self.counts().hanging = number;
    }

    async fn pass<T>(&self, operation: &str, key: &str, work: impl Future<Output = T> + Send) -> T {
        let _under_way = Counted::new(self, |counts| &mut counts.under_way);
        let hanging = self.counts().hanging;
        let fate = hanging.map_or(2, |number| {
            let mut hasher = DefaultHasher::new();
            (number, operation, key).hash(&mut hasher);
            hasher.finish() % 6
        });
        if fate == 0 {
            self.hang().await;
        }
        if !self.is_open() {
            let _held_up = Counted::new(self, |counts| &mut counts.held_up);
            self.is_open.subscribe().wait_for(|is_open| *is_open).await.unwrap();
        }
        let answer = work.await;
        if fate == 1 {
            self.hang().await;
        }
        answer
    }

    async fn hang(&self) {
        let _held_up = Counted::new(self, |counts| &mut counts.held_up);
        std::future::pending::<()>().await;
    }
}

#[async_trait]
impl ObjectStore for Gate {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.pass("put", key, self.inner.put(key, body, mode)).await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.pass("get", key, self.inner.get(key, limit_bytes)).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.pass("get range", key, self.inner.get_range(key, offset, len_bytes)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.pass("list", prefix, self.inner.list(prefix, start_after)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.pass("delete", key, self.inner.delete(key)).await
    }

    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        self.pass("delete many", "", self.inner.delete_many(keys)).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.pass("begin", key, self.inner.create_multipart(key)).await
    }

    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        self.pass("put part", key, self.inner.put_part(key, upload_id, number, offset, body)).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        self.pass("complete", key, self.inner.complete_multipart(key, upload_id, parts)).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.pass("abort", key, self.inner.abort_multipart(key, upload_id)).await
    }
}
