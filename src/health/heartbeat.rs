//! A heartbeat: a GET to a URL that somebody watches, as long as all is well. Where it stays away, a person is told by the service
//! at the other end: also when this machine is gone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::Uri;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use crate::clock::Clock;
use crate::replicate::status::{Board, Phase, Status};

/// No more than one in this time.
const INTERVAL: Duration = Duration::from_secs(60);
/// An answer that takes longer is none.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks `url` once a minute, as long as everything that was committed to the database is confirmed and it is followed.
pub async fn beat(url: Uri, board: Arc<Board>, clock: Arc<dyn Clock>) {
    let provider = rustls::crypto::ring::default_provider();
    let connector = match hyper_rustls::HttpsConnectorBuilder::new().with_provider_and_native_roots(provider) {
        Ok(builder) => builder.https_or_http().enable_http1().build(),
        Err(error) => {
            tracing::error!(%error, "the system's certificates can't be read: there is no heartbeat");
            return;
        }
    };
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    let host = url.host().unwrap_or_default().to_owned();
    loop {
        if is_well(&board.status(), clock.now_ms()) {
            // The path may be a secret: only the host is logged.
            match tokio::time::timeout(TIMEOUT, client.get(url.clone())).await {
                Ok(Ok(response)) if response.status().is_success() => {}
                Ok(Ok(response)) => tracing::warn!(host, status = %response.status(), "the heartbeat was refused"),
                Ok(Err(error)) => tracing::warn!(host, %error, "the heartbeat did not arrive"),
                Err(_) => tracing::warn!(host, "the heartbeat was not answered"),
            }
            tokio::time::sleep(INTERVAL).await;
        } else {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Under load there is always something that was committed just now. What fails again and again is followed for moments in between.
fn is_well(status: &Status, now_ms: u64) -> bool {
    let is_steady = status.phase == Phase::Following && status.failing_for(now_ms).is_none();
    is_steady && status.snapshot_ms.is_some() && status.lag(now_ms) < INTERVAL
}
