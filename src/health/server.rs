//! `/healthz`, `/readyz` and `/metrics` over HTTP.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::{is_ready, metrics, troubles};
use crate::clock::Clock;
use crate::replicate::status::{Boards, Status};

/// So many connections are answered at a time; others wait.
const CONNECTIONS: usize = 32;
/// No connection is open for longer: whoever asks slowly does not keep others out.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// Answers for all databases of the process.
pub struct HealthServer {
    listener: TcpListener,
    answerer: Arc<Answerer>,
}

struct Answerer {
    boards: Arc<Boards>,
    healthy_lag: Duration,
    clock: Arc<dyn Clock>,
}

impl HealthServer {
    /// Listens at `address`. What is confirmed later than `healthy_lag` after its capture is unhealthy.
    ///
    /// # Errors
    /// When the address can't be listened at.
    pub async fn bind(
        address: SocketAddr,
        boards: Arc<Boards>,
        healthy_lag: Duration,
        clock: Arc<dyn Clock>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self { listener, answerer: Arc::new(Answerer { boards, healthy_lag, clock }) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until it is dropped.
    pub async fn serve(self) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the health server can't accept a connection");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            let answerer = self.answerer.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let response = answerer.answer(&request);
                    async move { Ok::<_, Infallible>(response) }
                });
                let serving = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(CONNECTION_LIMIT)
                    .serve_connection(TokioIo::new(stream), service);
                // Whoever asked may have left; it is nobody's trouble.
                tokio::time::timeout(CONNECTION_LIMIT, serving).await.ok();
                drop(permit);
            });
        }
    }
}

impl Answerer {
    /// What a person should look at, a line each.
    fn troubles(&self, statuses: &[Status], now_ms: u64) -> Vec<String> {
        let mut all = troubles(statuses, now_ms, self.healthy_lag);
        all.extend(self.boards.search_troubles(now_ms, self.healthy_lag));
        all
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".into());
        }
        let (statuses, now_ms) = (self.boards.statuses(), self.clock.now_ms());
        match request.uri().path() {
            "/healthz" => match self.troubles(&statuses, now_ms) {
                troubles if troubles.is_empty() => plain(StatusCode::OK, "ok\n".into()),
                troubles => plain(StatusCode::SERVICE_UNAVAILABLE, troubles.join("\n") + "\n"),
            },
            "/readyz" if is_ready(&statuses) => plain(StatusCode::OK, "ready\n".into()),
            "/readyz" => plain(StatusCode::SERVICE_UNAVAILABLE, "not all databases are followed yet\n".into()),
            "/metrics" => {
                let mut response = plain(StatusCode::OK, metrics::text(&statuses, now_ms));
                let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            _ => plain(StatusCode::NOT_FOUND, "there are /healthz, /readyz and /metrics\n".into()),
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}
