//! Objects of unknown or large size: in parts, with memory for one part.

use std::fs::File;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::{PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};

/// The size of parts, where the object does not need larger ones. Above S3's least (5 MiB).
const PART_LEN: u64 = 8 << 20;
/// Parts are as large as it takes for so many to hold an object of the size that is expected: S3 takes 10,000, so that it may turn
/// out twice as large.
const PARTS_EXPECTED: u64 = 5_000;

/// Writes one object from front to back. Nothing is visible before [`Upload::finish`].
#[derive(Debug)]
pub struct Upload {
    store: SharedStore,
    key: String,
    /// All parts but the last have one size: Cloudflare's R2 completes no others ("Multipart upload limitations").
    part_len: usize,
    buffer: BytesMut,
    upload_id: Option<String>,
    parts: Vec<PartTag>,
    sent_bytes: u64,
}

impl Upload {
    /// Begins an object of about `expected_bytes`; sends nothing yet.
    #[must_use]
    pub fn new(store: SharedStore, key: String, expected_bytes: u64) -> Self {
        let part_len = part_len(expected_bytes) as usize;
        Self { store, key, part_len, buffer: BytesMut::new(), upload_id: None, parts: Vec::new(), sent_bytes: 0 }
    }

    /// Adds bytes; sends a part each time that one is full.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.buffer.extend_from_slice(bytes);
        while self.buffer.len() > self.part_len {
            let part = self.buffer.split_to(self.part_len).freeze();
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Bytes) -> Result<(), StoreError> {
        let upload_id = match &self.upload_id {
            Some(upload_id) => upload_id.clone(),
            None => self.upload_id.insert(self.store.create_multipart(&self.key).await?).clone(),
        };
        let (number, len) = (self.parts.len() as u32 + 1, part.len() as u64);
        let tag = self.store.put_part(&self.key, &upload_id, number, self.sent_bytes, part).await?;
        self.parts.push(tag);
        self.sent_bytes += len;
        Ok(())
    }

    /// Makes the object visible, whole. What fits one part goes as one put with `mode`; a multipart upload has no mode:
    /// its key must be the writer's own. Returns the object's length in bytes.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn finish(mut self, mode: PutMode) -> Result<u64, StoreError> {
        let last = self.buffer.split().freeze();
        let len = self.sent_bytes + last.len() as u64;
        if self.upload_id.is_none() {
            self.store.put(&self.key, last, mode).await?;
            return Ok(len);
        }
        if let Err(error) = self.complete(last).await {
            // Nobody else knows the upload's id, and stores charge for parts. If the upload was completed after all and only
            // the answer is lost, this finds nothing to give up. The first error is the one that counts.
            self.abort().await.ok();
            return Err(error);
        }
        Ok(len)
    }

    async fn complete(&mut self, last: Bytes) -> Result<(), StoreError> {
        self.send(last).await?;
        let upload_id = self.upload_id.as_deref().unwrap_or_default();
        self.store.complete_multipart(&self.key, upload_id, &self.parts).await
    }

    /// Gives the object up and frees what the store holds of it.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn abort(mut self) -> Result<(), StoreError> {
        match self.upload_id.take() {
            Some(upload_id) => self.store.abort_multipart(&self.key, &upload_id).await,
            None => Ok(()),
        }
    }
}

/// The size of an object's parts in bytes: whole MiB.
fn part_len(expected_bytes: u64) -> u64 {
    PART_LEN.max(expected_bytes.div_ceil(PARTS_EXPECTED).next_multiple_of(1 << 20))
}

/// Stores the file at `path` as object `key`, with memory for one part.
///
/// # Errors
/// What the store answers, or the file system, as [`StoreErrorKind::Other`].
pub async fn put_file(store: &SharedStore, key: &str, path: &Path, mode: PutMode) -> Result<u64, StoreError> {
    let file = tokio::fs::File::open(path).await.map_err(unreadable(store, key))?;
    put_open_file(store, key, file.into_std().await, mode).await
}

fn unreadable(store: &SharedStore, key: &str) -> impl Fn(std::io::Error) -> StoreError {
    move |error| StoreError {
        kind: StoreErrorKind::Other,
        operation: "put",
        location: store.location(),
        key: key.to_owned(),
        message: format!("the file can't be read: {error}"),
    }
}

/// Stores a file that is open, from where it is read next on, as object `key`, with memory for one
/// part.
///
/// # Errors
/// As [`put_file`].
pub async fn put_open_file(store: &SharedStore, key: &str, file: File, mode: PutMode) -> Result<u64, StoreError> {
    let unreadable = unreadable(store, key);
    let mut file = tokio::fs::File::from_std(file);
    let len = file.metadata().await.map_err(&unreadable)?.len();
    let mut upload = Upload::new(store.clone(), key.to_owned(), len);
    let mut chunk = vec![0; len.min(1 << 20) as usize];
    loop {
        let written = match file.read(&mut chunk).await.map_err(&unreadable) {
            Ok(0) => return upload.finish(mode).await,
            Ok(read) => upload.write(&chunk[..read]).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            // The first error is the one that counts.
            upload.abort().await.ok();
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_large_as_the_object_needs() {
        const GB: u64 = 1_000_000_000;
        assert_eq!([0, 1, 40 * GB].map(part_len), [PART_LEN; 3]);
        for expected_bytes in [50 * GB, 440 * GB, 5_000 * GB] {
            let most_parts = (2 * expected_bytes).div_ceil(part_len(expected_bytes));
            assert!((8_000..=10_000).contains(&most_parts), "{most_parts} parts of {expected_bytes} bytes");
        }
    }
}
