//! What systemd is told of a service with `Type=notify` (sd_notify(3)): that it is ready, how it is, and that it is alive.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;

use super::{is_ready, summary};
use crate::clock::Clock;
use crate::replicate::status::Boards;

/// The status line is renewed this often.
const INTERVAL: Duration = Duration::from_secs(5);
/// Until then, readiness is looked at more often.
const START_INTERVAL: Duration = Duration::from_millis(100);

/// Tells systemd, as long as it is not dropped. Does nothing for a process that systemd does not wait for.
pub async fn notify(boards: Arc<Boards>, clock: Arc<dyn Clock>) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    // Half of the time that systemd gives, as sd_watchdog_enabled(3) recommends.
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let mut is_ready_told = false;
    loop {
        let statuses = boards.statuses();
        let text = summary(&statuses, clock.now_ms());
        let mut states = vec![NotifyState::Status(&text)];
        if !is_ready_told && is_ready(&statuses) {
            is_ready_told = true;
            states.push(NotifyState::Ready);
        }
        if watchdog.is_some() {
            states.push(NotifyState::Watchdog);
        }
        if let Err(error) = sd_notify::notify(&states) {
            tracing::debug!(%error, "systemd could not be told");
        }
        let pause = if is_ready_told { INTERVAL } else { START_INTERVAL };
        tokio::time::sleep(watchdog.map_or(pause, |limit| limit.min(pause))).await;
    }
}

/// Tells systemd that the process is on its way out.
pub fn stopping() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Stopping]) {
        tracing::debug!(%error, "systemd could not be told");
    }
}
