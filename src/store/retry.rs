//! Retry: the one place that asks again. Bounded attempts, exponential waits with full jitter.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{DeleteFailure, ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};
use crate::clock::{Clock, jitter_below};

/// A patient client begins no further attempt when so much time has gone by. Each attempt may hang for a minute.
const PATIENCE: Duration = Duration::from_secs(120);

/// Least time between a failed attempt and one that a request brings forward: a stream of requests
/// must not become a busy loop.
pub const REQUEST_PAUSE: Duration = Duration::from_secs(1);

/// Calls for an attempt so far.
#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    requests: u64,
    is_stopping: bool,
}

/// Ends waits between attempts early: at a request, whose caller waits for what is retried, and at
/// a stop, after which there is little time left.
#[derive(Debug, Default)]
pub struct RetrySignal(watch::Sender<Calls>);

impl RetrySignal {
    /// Notes a request. It ends each wait once, but not within a second after the wait began.
    pub fn note_request(&self) {
        self.0.send_modify(|calls| calls.requests += 1);
    }

    /// Notes the stop. It ends each wait once, at once.
    pub fn note_stop(&self) {
        self.0.send_modify(|calls| calls.is_stopping = true);
    }

    /// Returns the waits of one piece of work, whose first attempt begins now.
    #[must_use]
    pub fn waits(&self) -> RetryWaits {
        let calls = self.0.subscribe();
        let served = *calls.borrow();
        RetryWaits { calls, served }
    }
}

/// The waits between the attempts of one piece of work.
#[derive(Debug)]
pub struct RetryWaits {
    calls: watch::Receiver<Calls>,
    /// Calls before the current attempt began: that attempt serves them.
    served: Calls,
}

/// The reason why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitEnd {
    /// It took its time.
    Elapsed,
    /// A request came after the last attempt had begun.
    Requested,
    /// The stop came after the last attempt had begun.
    Stopped,
}

impl RetryWaits {
    /// Begins an attempt, which serves every call that came before.
    pub fn begin_attempt(&mut self) {
        self.served = *self.calls.borrow();
    }

    /// Waits for `wait`, or less if a call came after the last attempt had begun, or comes now.
    pub async fn pause(&self, wait: Duration) -> WaitEnd {
        let served = self.served;
        let requested = async {
            tokio::time::sleep(REQUEST_PAUSE).await;
            self.call(|calls| calls.requests != served.requests).await;
        };
        tokio::select! {
            biased;
            () = self.call(|calls| calls.is_stopping && !served.is_stopping) => WaitEnd::Stopped,
            () = tokio::time::sleep(wait) => WaitEnd::Elapsed,
            () = requested => WaitEnd::Requested,
        }
    }

    async fn call(&self, is_meant: impl FnMut(&Calls) -> bool) {
        if self.calls.clone().wait_for(is_meant).await.is_err() {
            // Without a sender no call can come.
            std::future::pending().await
        }
    }
}

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
    signal: Arc<RetrySignal>,
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
        Self { inner, policy, patience: None, signal: Arc::default() }
    }

    /// The same, with waits that `signal` ends early.
    #[must_use]
    pub fn with_signal(self, signal: Arc<RetrySignal>) -> Self {
        Self { signal, ..self }
    }

    /// The same for a person or a job that waits: each failure is told in the log, and after two minutes there is no further attempt.
    #[must_use]
    pub fn patient(inner: SharedStore, clock: Arc<dyn Clock>) -> Self {
        Self { patience: Some(clock), ..Self::new(inner, RetryPolicy::PATIENT) }
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
        let (mut attempt, mut is_again) = (0, false);
        let mut waits = self.signal.waits();
        loop {
            waits.begin_attempt();
            match request(is_again).await {
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
                    is_again = true;
                    // Attempts that requests bring forward do not count: the limit stands for time.
                    if policy.base_ms == 0 || waits.pause(wait).await != WaitEnd::Requested {
                        attempt += 1;
                    }
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(1);

    async fn end_of_long_wait(waits: &RetryWaits) -> WaitEnd {
        tokio::time::timeout(LONG / 2, waits.pause(LONG)).await.expect("a wait that is cut short")
    }

    #[tokio::test]
    async fn wait_at_stop_ends_once() {
        let signal = RetrySignal::default();
        let mut waits = signal.waits();
        signal.note_stop();
        assert_eq!(waits.pause(LONG).await, WaitEnd::Stopped);
        waits.begin_attempt();
        assert_eq!(waits.pause(SHORT).await, WaitEnd::Elapsed, "the attempt after the stop was made");
    }

    #[tokio::test]
    #[allow(clippy::disallowed_methods)]
    async fn wait_at_request_ends_once_and_after_a_second() {
        let signal = RetrySignal::default();
        signal.note_request();
        let mut waits = signal.waits();
        assert_eq!(waits.pause(SHORT).await, WaitEnd::Elapsed, "it came before the attempt");
        for _ in 0..2 {
            let begun = Instant::now();
            signal.note_request();
            assert_eq!(end_of_long_wait(&waits).await, WaitEnd::Requested);
            assert!(begun.elapsed() >= REQUEST_PAUSE, "{:?}", begun.elapsed());
            waits.begin_attempt();
        }
        let longer = REQUEST_PAUSE + Duration::from_millis(100);
        assert_eq!(waits.pause(longer).await, WaitEnd::Elapsed, "each request was served");
    }
}
