//! Stores that behave oddly, as some providers do, or that let something happen at the worst moment.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use waltrail::clock::jitter_below;
use waltrail::store::{
    DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind,
};

/// What is odd.
#[derive(Debug)]
pub enum Quirk {
    /// `If-None-Match: *` is accepted and ignored.
    IgnoresConditions,
    /// It is answered with 501.
    RefusesConditions,
    /// Others go first before a request, now and then.
    Interleaves,
    /// Many objects are deleted key by key, so that a fault can hit in the middle.
    DeletesKeyByKey,
    /// Deletions are answered and not carried out.
    DeletesNothing,
    /// These objects are gone as soon as anything is put.
    LosesAtPut(Vec<String>),
    /// An object may be left out of the first listings after it was put: which ones follows from the seed.
    ListsLate { seed: u64, left_out: Mutex<HashMap<String, u64>> },
}

pub fn digest(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A store with a quirk.
#[derive(Debug)]
pub struct Quirky {
    pub inner: SharedStore,
    pub quirk: Quirk,
}

impl Quirky {
    pub fn shared(inner: SharedStore, quirk: Quirk) -> SharedStore {
        std::sync::Arc::new(Self { inner, quirk })
    }

    async fn let_others_go(&self) {
        if matches!(self.quirk, Quirk::Interleaves) {
            for _ in 0..jitter_below(4) {
                tokio::task::yield_now().await;
            }
        }
    }
}

#[async_trait]
impl ObjectStore for Quirky {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.let_others_go().await;
        let mode = if matches!(self.quirk, Quirk::IgnoresConditions) { PutMode::Overwrite } else { mode };
        if matches!(self.quirk, Quirk::RefusesConditions) && mode == PutMode::IfAbsent {
            let (kind, location, key) = (StoreErrorKind::NotSupported, self.location(), key.to_owned());
            return Err(StoreError { kind, operation: "put", location, key, message: "not implemented".into() });
        }
        self.inner.put(key, body, mode).await?;
        match &self.quirk {
            Quirk::LosesAtPut(doomed) => self.inner.delete_many(doomed).await.map(drop),
            _ => Ok(()),
        }
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, offset, len_bytes).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.let_others_go().await;
        let mut listed = self.inner.list(prefix, start_after).await?;
        if let Quirk::ListsLate { seed, left_out } = &self.quirk {
            let mut left_out = left_out.lock().unwrap();
            listed.retain(|object| {
                let times = left_out.entry(object.key.clone()).or_default();
                *times += 1;
                *times > digest(&(seed, &object.key)) % 3
            });
        }
        Ok(listed)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        if matches!(self.quirk, Quirk::DeletesNothing) { Ok(()) } else { self.inner.delete(key).await }
    }

    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let mut failures = Vec::new();
        for key in keys {
            if let Err(error) = self.delete(key).await {
                failures.push((key.clone(), error));
            }
        }
        Ok(failures)
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
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
        self.inner.put_part(key, upload_id, number, offset, body).await
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        self.inner.complete_multipart(key, upload_id, parts).await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.inner.abort_multipart(key, upload_id).await
    }
}
