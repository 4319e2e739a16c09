//! Retry: the one place that asks again. Bounded attempts, exponential waits with full jitter.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};
use crate::clock::{Clock, jitter_below};

/// A patient client begins no further attempt when so much time has gone by. Each attempt may hang for a minute.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often to ask, and how long to wait in between.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Requests at most, the first one included.
    pub attempts: u32,
    /// The longest first wait; each next one may be twice as long.
    pub base_ms: u64,
    /// No wait is longer.
    pub max_ms: u64,
}

impl RetryPolicy {
    /// For a person or a job that waits: asks a store that fails at once for some ten seconds, 23 at most. One that hangs is given up
    /// after two or three minutes: see [`Retrying::patient`].
    const PATIENT: Self = Self { attempts: 8, base_ms: 200, max_ms: 10_000 };

    /// For the parts and the completion of an upload: to give one up means to send all of it again, which may be hours. Rides out about a
    /// minute and a half.
    const OF_UPLOADS: Self = Self { attempts: 14, base_ms: 100, max_ms: 30_000 };

    /// How long to wait after failed attempt number `attempt`, counted from 0: anything up to the exponential bound, so
    /// that many clients that failed together don't come back together.
    #[must_use]
    pub fn wait(&self, attempt: u32) -> Duration {
        let bound = self.base_ms.saturating_mul(1 << attempt.min(20)).min(self.max_ms);
        Duration::from_millis(jitter_below(bound) + 1)
    }

    /// Waits for as long as [`RetryPolicy::wait`] has said. With a `base_ms` of 0 nobody waits: a simulation's course must not depend
    /// on timers.
    async fn pause(&self, wait: Duration) {
        if self.base_ms > 0 {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Asks again when a request failed in a way that asking again can mend.
pub struct Retrying {
    inner: SharedStore,
    policy: RetryPolicy,
    /// Measures the patience of somebody who waits and wants to know for what.
    patience: Option<Arc<dyn Clock>>,
}

impl fmt::Debug for Retrying {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Retrying").field("inner", &self.inner).field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Retrying {
    /// Stacks retry on `inner`.
    #[must_use]
    pub fn new(inner: SharedStore, policy: RetryPolicy) -> Self {
        Self { inner, policy, patience: None }
    }

    /// The same for a person or a job that waits: each failure is told in the log, and after two minutes there is no further attempt.
    #[must_use]
    pub fn patient(inner: SharedStore, clock: Arc<dyn Clock>) -> Self {
        Self { inner, policy: RetryPolicy::PATIENT, patience: Some(clock) }
    }

    /// For an upload that has begun. Where nobody waits, in a simulation, all requests are asked alike.
    fn of_uploads(&self) -> RetryPolicy {
        if self.policy.base_ms == 0 { self.policy } else { RetryPolicy::OF_UPLOADS }
    }

    /// Calls `request` until it answers something else than "not available"; tells it whether an attempt went before.
    async fn repeat<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        request: impl FnMut(bool) -> F,
    ) -> Result<T, StoreError> {
        self.repeat_by(self.policy, request).await
    }

    async fn repeat_by<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        policy: RetryPolicy,
        mut request: impl FnMut(bool) -> F,
    ) -> Result<T, StoreError> {
        let now = || self.patience.as_ref().map(|clock| clock.monotonic());
        let begun = now();
        let mut attempt = 0;
        loop {
            match request(attempt > 0).await {
                Err(error) if error.is_retryable() && attempt + 1 < policy.attempts => {
                    let wait = policy.wait(attempt);
                    match now().zip(begun) {
                        Some((now, begun)) if now.saturating_sub(begun) + wait >= PATIENCE => return Err(error),
                        Some(_) => {
                            let wait_ms = wait.as_millis() as u64;
                            tracing::warn!(%error, attempt, wait_ms, "the store fails; asking it again");
                        }
                        None => tracing::debug!(%error, attempt, "asking the store again"),
                    }
                    policy.pause(wait).await;
                    attempt += 1;
                }
                answer => return answer,
            }
        }
    }
}

#[async_trait]
impl ObjectStore for Retrying {
    fn location(&self) -> String {
        self.inner.location()
    }

    /// Unsafe sequence: the put is carried out, its answer is lost, the next attempt finds the key taken. By us, if the
    /// bytes are the same. What can't be read is neither ours nor foreign: calling it foreign would make a writer give way
    /// to itself.
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.repeat(|is_again| {
            let body = body.clone();
            async move {
                match self.inner.put(key, body.clone(), mode).await {
                    Err(taken) if is_again && taken.kind == StoreErrorKind::AlreadyExists => {
                        match self.inner.get(key, body.len() as u64).await {
                            Ok(stored) if stored == body => Ok(()),
                            Ok(_) => Err(taken),
                            // Larger than ours, or deleted since: another one's.
                            Err(other)
                                if matches!(other.kind, StoreErrorKind::WrongSize | StoreErrorKind::NotFound) =>
                            {
                                Err(taken)
                            }
                            Err(unknown) => Err(unknown),
                        }
                    }
                    answer => answer,
                }
            }
        })
        .await
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.repeat(|_| self.inner.get(key, limit_bytes)).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.repeat(|_| self.inner.get_range(key, offset, len_bytes)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.repeat(|_| self.inner.list(prefix, start_after)).await
    }

    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.repeat(|_| self.inner.folders(prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.repeat(|_| self.inner.delete(key)).await
    }

    /// Within an answer each key has one of its own: those that asking again can mend are asked for again.
    async fn delete_many(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let (mut left, mut failures) = (keys.to_vec(), Vec::new());
        for attempt in 0.. {
            let failed = self.repeat(|_| self.inner.delete_many(&left)).await?;
            let is_last = attempt + 1 >= self.policy.attempts;
            let (again, others): (Vec<_>, Vec<_>) =
                failed.into_iter().partition(|(_, error)| error.is_retryable() && !is_last);
            failures.extend(others);
            if again.is_empty() {
                break;
            }
            left = again.into_iter().map(|(key, _)| key).collect();
            self.policy.pause(self.policy.wait(attempt)).await;
        }
        Ok(failures)
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.repeat(|_| self.inner.create_multipart(key)).await
    }

    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        let put = |_| self.inner.put_part(key, upload_id, number, offset, body.clone());
        self.repeat_by(self.of_uploads(), put).await
    }

    /// Unsafe sequence: the upload is completed, the answer is lost, the next attempt finds no upload of that id. Then the
    /// object is there, with the size of all parts. One of another size is older: this upload was lost, not completed.
    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[PartTag]) -> Result<(), StoreError> {
        self.repeat_by(self.of_uploads(), |is_again| async move {
            match self.inner.complete_multipart(key, upload_id, parts).await {
                Err(error) if is_again && error.is_not_found() => {
                    let len_bytes: u64 = parts.iter().map(|part| part.len_bytes).sum();
                    let listed = self.inner.list(key, None).await?;
                    let is_there = listed.iter().any(|object| object.key == key && object.len_bytes == len_bytes);
                    if is_there { Ok(()) } else { Err(error) }
                }
                answer => answer,
            }
        })
        .await
    }

    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        self.repeat(|_| self.inner.abort_multipart(key, upload_id)).await
    }
}
