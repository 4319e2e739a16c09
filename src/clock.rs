//! Time, randomness and the boot id: the one place that reads them, so that everything above can be
//! driven by a simulator.
//!
//! `clippy.toml` bans `SystemTime::now` and `Instant::now` everywhere else.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A source of time. Cloned freely; shared between threads.
pub trait Clock: Send + Sync + 'static {
    /// Wall-clock time in milliseconds since 1970-01-01T00:00:00Z. May jump in either direction.
    fn now_ms(&self) -> u64;
    /// Time since some fixed moment. Never runs backwards.
    fn monotonic(&self) -> Duration;
    /// The time by which the operating system dates files, in milliseconds since 1970.
    fn file_time_ms(&self) -> u64 {
        SystemClock::new().now_ms()
    }
    /// A new name that nobody else has: 128 random bits. A simulation gives names that follow from its seed.
    ///
    /// # Errors
    /// When the operating system has no source of randomness.
    fn random_id(&self) -> Result<[u8; 16], getrandom::Error> {
        random_bytes()
    }
    /// The id of this boot of the machine (random(4)); `None` if the kernel does not provide one.
    fn boot_id(&self) -> Option<String> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty())
    }
}

/// The machine's own clocks.
#[derive(Debug, Clone)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts at zero, now.
    #[allow(clippy::disallowed_methods)]
    #[must_use]
    pub fn new() -> Self {
        Self { started: Instant::now() }
    }

    /// A shared [`SystemClock`].
    #[must_use]
    pub fn shared() -> Arc<dyn Clock> {
        Arc::new(Self::new())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now_ms(&self) -> u64 {
        // A machine whose clock stands before 1970 is treated as standing at 1970: commit times never run
        // backwards, so this only delays the first time that differs.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }

    #[allow(clippy::disallowed_methods)]
    fn monotonic(&self) -> Duration {
        Instant::now().duration_since(self.started)
    }
}

/// Random bytes from the operating system.
///
/// # Errors
/// When the operating system has no source of randomness.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// A random number below `bound` (which must not be 0), for the jitter of waiting times. Falls back to 0, the
/// shortest wait, when the operating system has no randomness: jitter is a courtesy, not a promise.
#[must_use]
pub fn jitter_below(bound: u64) -> u64 {
    random_bytes::<8>().map_or(0, |bytes| u64::from_le_bytes(bytes) % bound.max(1))
}

/// A time in milliseconds since 1970 as people write it: `2026-03-01T14:00:05.123Z`.
#[must_use]
pub fn format_time(time_ms: u64) -> String {
    let timestamp = i64::try_from(time_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    timestamp.map_or_else(|| format!("{time_ms} ms since 1970"), |timestamp| format!("{timestamp:.3}"))
}
