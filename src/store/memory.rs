//! Objects in memory, for tests and simulations: deterministic, and gone with the process.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use super::{ObjectInfo, ObjectStore, PartTag, PutMode, StoreError, StoreErrorKind};

/// A store in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Stored>,
    /// When objects that are put now are stored.
    now_ms: u64,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    uploads_begun: u64,
}

/// An object's bytes, and when they were stored.
#[derive(Debug, Clone)]
struct Stored {
    body: Bytes,
    stored_ms: u64,
}

impl State {
    fn store(&mut self, key: &str, body: Bytes) {
        self.objects.insert(key.to_owned(), Stored { body, stored_ms: self.now_ms });
    }
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the store's clock, which stands still otherwise and begins at 0; in milliseconds since 1970.
    pub fn set_now_ms(&self, now_ms: u64) {
        self.state().now_ms = now_ms;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, kind: StoreErrorKind, operation: &'static str, key: &str, message: &str) -> StoreError {
        StoreError { kind, operation, location: self.location(), key: key.to_owned(), message: message.to_owned() }
    }

    fn object(&self, operation: &'static str, key: &str) -> Result<Bytes, StoreError> {
        let missing = || self.error(StoreErrorKind::NotFound, operation, key, "there is no such object");
        self.state().objects.get(key).map(|stored| stored.body.clone()).ok_or_else(missing)
    }
}

#[async_trait]
impl ObjectStore for MemoryStore {
    fn location(&self) -> String {
        "memory:".into()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        let mut state = self.state();
        if mode == PutMode::IfAbsent && state.objects.contains_key(key) {
            return Err(self.error(StoreErrorKind::AlreadyExists, "put", key, "the object is there already"));
        }
        state.store(key, body);
        Ok(())
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        let object = self.object("get", key)?;
        if object.len() as u64 > limit_bytes {
            return Err(self.error(StoreErrorKind::WrongSize, "get", key, "the object is larger than it may be"));
        }
        Ok(object)
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        let object = self.object("get", key)?;
        match offset.checked_add(len_bytes) {
            Some(end) if end <= object.len() as u64 => Ok(object.slice(offset as usize..end as usize)),
            _ => Err(self.error(StoreErrorKind::WrongSize, "get", key, "the object ends before the bytes asked for")),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        let info = |(key, stored): (&String, &Stored)| ObjectInfo {
            key: key.clone(),
            len_bytes: stored.body.len() as u64,
            stored_ms: stored.stored_ms,
        };
        let state = self.state();
        let with_prefix = state.objects.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        Ok(with_prefix.filter(|(key, _)| start_after.is_none_or(|after| key.as_str() > after)).map(info).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.state().objects.remove(key);
        Ok(())
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        let mut state = self.state();
        state.uploads_begun += 1;
        let upload_id = format!("{key}#{}", state.uploads_begun);
        state.uploads.insert(upload_id.clone(), BTreeMap::new());
        Ok(upload_id)
    }

    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        _offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        let missing = || self.error(StoreErrorKind::NotFound, "put part", key, "there is no such upload");
        let len_bytes = body.len() as u64;
        self.state().uploads.get_mut(upload_id).ok_or_else(missing)?.insert(number, body);
        Ok(PartTag { number, tag: number.to_string(), len_bytes })
    }

    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        let mut state = self.state();
        let missing = || self.error(StoreErrorKind::NotFound, "complete", key, "there is no such upload or part");
        let stored = state.uploads.get(upload_id).ok_or_else(missing)?;
        // As Cloudflare's R2 asks for it.
        let len_bytes = parts.first().map_or(0, |part| part.len_bytes);
        if parts.iter().rev().skip(1).any(|part| part.len_bytes != len_bytes)
            || parts.last().is_some_and(|part| part.len_bytes > len_bytes)
        {
            return Err(self.error(
                StoreErrorKind::Other,
                "complete",
                key,
                "all parts but the last must have one size",
            ));
        }
        let mut object = BytesMut::new();
        for part in parts {
            object.extend_from_slice(stored.get(&part.number).ok_or_else(missing)?);
        }
        state.uploads.remove(upload_id);
        state.store(key, object.freeze());
        Ok(())
    }

    async fn abort_multipart(&self, _key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.state().uploads.remove(upload_id);
        Ok(())
    }
}
