//! Commands that a person waits for end at Ctrl-C as they end at an error: by way of all that cleans up behind them.

use std::future::Future;
use std::io;

use tokio::signal::unix::{SignalKind, signal};

use super::exit_code::Failure;

/// Does `work`, unless SIGTERM or SIGINT comes first: then `work` is dropped where it stands, and the failure says `what`.
///
/// # Errors
/// That of `work`, or that it was interrupted.
pub async fn unless_interrupted<T>(work: impl Future<Output = Result<T, Failure>>, what: &str) -> Result<T, Failure> {
    let failed = |error: io::Error| Failure::other(format!("can't listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        done = work => done,
        _ = terminate.recv() => Err(Failure::other(what.to_owned())),
        _ = interrupt.recv() => Err(Failure::other(what.to_owned())),
    }
}
