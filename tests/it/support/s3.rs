//! A real S3 server (s3s over a directory) in the test process, on a loopback port of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use waltrail::store::s3::S3Options;

pub const BUCKET: &str = "backups";

/// The server. Ends when it is dropped.
pub struct S3Server {
    address: SocketAddr,
    directory: tempfile::TempDir,
    /// What every request is answered with instead of being carried out; 0: nothing.
    refusal: Arc<AtomicU16>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl S3Server {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(BUCKET)).unwrap();
        let root = directory.path().to_owned();
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = std::sync::mpsc::channel();
        let refusal = Arc::new(AtomicU16::new(0));
        let refuses = refusal.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut service = S3ServiceBuilder::new(FileSystem::new(root).unwrap());
                service.set_auth(SimpleAuth::from_single("test", "testtest"));
                let service = service.build();
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                let serve = async {
                    loop {
                        let Ok((socket, _)) = listener.accept().await else { continue };
                        let (service, refuses) = (service.clone(), refuses.clone());
                        let service = service_fn(move |request: Request<Incoming>| {
                            let (service, refusal) = (service.clone(), refuses.load(Ordering::SeqCst));
                            let is_in_bucket = request.uri().path().starts_with(&format!("/{BUCKET}"));
                            async move {
                                match refusal {
                                    // S3 refuses this; the directory's server makes the bucket.
                                    0 if request.method() == Method::PUT && !is_in_bucket => {
                                        let error = "<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>";
                                        let refused = Response::builder().status(404).body(error.to_owned().into());
                                        Ok(refused.unwrap())
                                    }
                                    0 => Service::call(&service, request).await,
                                    status => {
                                        let refused = Response::builder().status(status).body(s3s::Body::empty());
                                        Ok(refused.unwrap())
                                    }
                                }
                            }
                        });
                        tokio::spawn(async move {
                            let http = Builder::new(TokioExecutor::new());
                            http.serve_connection(TokioIo::new(socket), service).await.ok();
                        });
                    }
                };
                tokio::select! {
                    () = serve => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address: address.recv().unwrap(), directory, refusal, stop: Some(stop), thread: Some(thread) }
    }

    pub fn options(&self, prefix: &str) -> S3Options {
        S3Options {
            bucket: BUCKET.into(),
            prefix: prefix.into(),
            endpoint: Some(format!("http://{}", self.address)),
            region: Some("us-east-1".into()),
            path_style: Some(true),
            access_key_id: Some("test".into()),
            secret_access_key: Some("testtest".into()),
            ..S3Options::default()
        }
    }

    /// Answers every request with this status from now on; with 0 it does again what it is asked.
    pub fn refuse(&self, status: u16) {
        self.refusal.store(status, Ordering::SeqCst);
    }

    /// For the program, with the credentials in its environment.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}?endpoint=http://{}&region=us-east-1&path-style=true", self.address)
    }

    /// Where an object's bytes are.
    pub fn path(&self, key: &str) -> PathBuf {
        self.directory.path().join(BUCKET).join(key)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
