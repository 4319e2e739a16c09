//! How long a verification may take.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;

/// Time that is left.
pub(super) struct Budget {
    clock: Arc<dyn Clock>,
    /// By the monotonic clock; `None` without a bound.
    end: Option<Duration>,
}

impl Budget {
    pub(super) fn new(clock: Arc<dyn Clock>, most: Option<Duration>) -> Self {
        let end = most.map(|most| clock.monotonic() + most);
        Self { clock, end }
    }

    pub(super) fn is_over(&self) -> bool {
        self.end.is_some_and(|end| self.clock.monotonic() >= end)
    }

    /// Does `work` if it ends in time; otherwise drops it where it stands.
    pub(super) async fn within<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match self.end {
            None => Some(work.await),
            Some(end) => {
                let left = end.saturating_sub(self.clock.monotonic());
                if left.is_zero() { None } else { tokio::time::timeout(left, work).await.ok() }
            }
        }
    }
}
