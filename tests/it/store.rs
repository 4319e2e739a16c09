//! One set of promises, kept by every store.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use waltrail::store::directory::DirectoryStore;
use waltrail::store::memory::MemoryStore;
use waltrail::store::metered::Metered;
use waltrail::store::retry::{RetryPolicy, Retrying};
use waltrail::store::s3::{S3Options, S3Store};
use waltrail::store::upload::{Upload, put_file};
use waltrail::store::{ObjectStore, PutMode, SharedStore, StoreErrorKind};

use crate::support::s3::S3Server;

async fn keeps_its_promises(store: SharedStore) {
    let kind = |result: Result<_, waltrail::store::StoreError>| result.map(|_: Bytes| ()).unwrap_err().kind;
    store.put("log/a", Bytes::from_static(b"hello"), PutMode::IfAbsent).await.unwrap();
    assert_eq!(store.get("log/a", 100).await.unwrap(), "hello");
    assert_eq!(kind(store.get("log/a", 4).await), StoreErrorKind::WrongSize);
    assert_eq!(store.get_range("log/a", 1, 3).await.unwrap(), "ell");
    for (offset, len) in [(3, 3), (5, 1), (9, 1)] {
        assert_eq!(kind(store.get_range("log/a", offset, len).await), StoreErrorKind::WrongSize, "{offset}+{len}");
    }
    assert_eq!(kind(store.get("log/b", 100).await), StoreErrorKind::NotFound);
    assert_eq!(kind(store.get_range("log/b", 0, 1).await), StoreErrorKind::NotFound);
    let taken = store.put("log/a", Bytes::from_static(b"other"), PutMode::IfAbsent).await.unwrap_err();
    assert_eq!(taken.kind, StoreErrorKind::AlreadyExists);
    assert_eq!(store.get("log/a", 100).await.unwrap(), "hello");
    store.put("log/a", Bytes::from_static(b"new"), PutMode::Overwrite).await.unwrap();
    assert_eq!(store.get("log/a", 100).await.unwrap(), "new");

    for key in ["log/c", "log/b/2", "log/b/1", "other/z", "log.txt"] {
        store.put(key, Bytes::from_static(b"x"), PutMode::IfAbsent).await.unwrap();
    }
    let keys = async |prefix: &str, after: Option<&str>| {
        let listed = store.list(prefix, after).await.unwrap();
        listed.into_iter().map(|object| object.key).collect::<Vec<_>>()
    };
    assert_eq!(keys("log/", None).await, ["log/a", "log/b/1", "log/b/2", "log/c"]);
    assert_eq!(keys("log/b/", None).await, ["log/b/1", "log/b/2"]);
    assert_eq!(keys("log/", Some("log/b/1")).await, ["log/b/2", "log/c"]);
    assert_eq!(keys("nothing/", None).await, [""; 0]);
    assert_eq!(store.list("log/a", None).await.unwrap()[0].len_bytes, 3);
    store.delete("log/a").await.unwrap();
    store.delete("log/a").await.unwrap();
    assert_eq!(keys("log/a", None).await, [""; 0]);

    // 20 MB in pieces of 300,000: three parts. Nothing is visible before the end.
    let mut upload = Upload::new(store.clone(), "snap/large".into());
    let piece: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    for _ in 0..67 {
        upload.write(&piece).await.unwrap();
    }
    assert_eq!(keys("snap/", None).await, [""; 0]);
    let len = upload.finish(PutMode::Overwrite).await.unwrap();
    assert_eq!(len, 67 * 300_000);
    assert_eq!(keys("snap/", None).await, ["snap/large"]);
    assert_eq!(store.get_range("snap/large", 300_000 * 50, 300_000).await.unwrap(), piece);

    let mut given_up = Upload::new(store.clone(), "snap/given-up".into());
    for _ in 0..40 {
        given_up.write(&piece).await.unwrap();
    }
    given_up.abort().await.unwrap();
    assert_eq!(keys("snap/given-up", None).await, [""; 0]);

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"from a file").unwrap();
    put_file(&store, "log/file", file.path(), PutMode::IfAbsent).await.unwrap();
    assert_eq!(store.get("log/file", 100).await.unwrap(), "from a file");
}

#[tokio::test]
async fn memory_keeps_its_promises() {
    keeps_its_promises(Arc::new(MemoryStore::new())).await;
}

#[tokio::test]
async fn a_directory_keeps_its_promises() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("made/by/the first put");
    let store: SharedStore = Arc::new(DirectoryStore::new(root.clone()));
    assert_eq!(store.list("", None).await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
    assert_eq!(store.get("a", 1).await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
    keeps_its_promises(store.clone()).await;
    for outside in ["../a", "/etc/a", "", "a/../../b"] {
        assert!(store.put(outside, Bytes::new(), PutMode::Overwrite).await.is_err(), "{outside}");
    }
    assert_eq!(std::fs::read_dir(root.join(".incoming")).unwrap().count(), 0, "nothing is left over");
}

#[tokio::test]
async fn s3_keeps_its_promises() {
    let server = S3Server::start();
    keeps_its_promises(Arc::new(S3Store::open(&server.options("some/prefix")).await)).await;
    assert!(server.path("some/prefix/log/c").exists());
}

#[tokio::test]
async fn s3_failures_are_told_apart() {
    let server = S3Server::start();
    let kind = async |options: S3Options| {
        let store = S3Store::open(&options).await;
        let error = store.get("waltrail.json", 100).await.unwrap_err();
        let text = error.to_string();
        assert!(!text.contains("testtest") && !text.contains("Error {"), "{text}");
        (error.kind, text)
    };
    assert_eq!(kind(server.options("x")).await.0, StoreErrorKind::NotFound);
    // This server answers a GET from a bucket that is not there with NoSuchKey; a listing tells.
    let elsewhere = S3Store::open(&S3Options { bucket: "nowhere".into(), ..server.options("x") }).await;
    let no_bucket = elsewhere.list("", None).await.unwrap_err();
    assert_eq!(no_bucket.kind, StoreErrorKind::NoSuchBucket, "{no_bucket}");
    let wrong_key = kind(S3Options { secret_access_key: Some("wrong".into()), ..server.options("x") }).await;
    assert_eq!(wrong_key.0, StoreErrorKind::Denied, "{}", wrong_key.1);
    let closed = kind(S3Options { endpoint: Some("http://127.0.0.1:1".into()), ..server.options("x") }).await;
    assert_eq!(closed.0, StoreErrorKind::Unavailable);
    assert!(closed.1.contains("refused"), "{}", closed.1);
}

#[tokio::test]
async fn s3_lists_more_than_a_page() {
    let server = S3Server::start();
    let directory = server.path("many/log");
    std::fs::create_dir_all(&directory).unwrap();
    for number in 0..2345 {
        std::fs::write(directory.join(format!("{number:04}")), b"x").unwrap();
    }
    let store = S3Store::open(&server.options("many")).await;
    let listed = store.list("log/", None).await.unwrap();
    assert_eq!(listed.len(), 2345);
    assert!(listed.is_sorted_by(|left, right| left.key < right.key));
}

const QUICK: RetryPolicy = RetryPolicy { attempts: 4, base_ms: 1, max_ms: 2 };

/// Fails as told, then passes through.
#[derive(Debug)]
struct Faulty {
    inner: MemoryStore,
    failures_before: std::sync::atomic::AtomicU32,
    failures_after: std::sync::atomic::AtomicU32,
}

impl Faulty {
    fn shared(failures_before: u32, failures_after: u32) -> SharedStore {
        Arc::new(Self {
            inner: MemoryStore::new(),
            failures_before: failures_before.into(),
            failures_after: failures_after.into(),
        })
    }

    fn unavailable(&self, left: &std::sync::atomic::AtomicU32) -> Result<(), waltrail::store::StoreError> {
        use std::sync::atomic::Ordering::SeqCst;
        if left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err() {
            return Ok(());
        }
        Err(waltrail::store::StoreError {
            kind: StoreErrorKind::Unavailable,
            operation: "put",
            location: "faulty:".into(),
            key: String::new(),
            message: "injected".into(),
        })
    }
}

#[async_trait::async_trait]
impl waltrail::store::ObjectStore for Faulty {
    fn location(&self) -> String {
        "faulty:".into()
    }

    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), waltrail::store::StoreError> {
        self.unavailable(&self.failures_before)?;
        self.inner.put(key, body, mode).await?;
        self.unavailable(&self.failures_after)
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, waltrail::store::StoreError> {
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, at: u64, len: u64) -> Result<Bytes, waltrail::store::StoreError> {
        self.inner.get_range(key, at, len).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<Vec<waltrail::store::ObjectInfo>, waltrail::store::StoreError> {
        self.inner.list(prefix, after).await
    }

    async fn delete(&self, key: &str) -> Result<(), waltrail::store::StoreError> {
        self.inner.delete(key).await
    }

    async fn create_multipart(&self, key: &str) -> Result<String, waltrail::store::StoreError> {
        self.inner.create_multipart(key).await
    }

    async fn put_part(
        &self,
        key: &str,
        id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<waltrail::store::PartTag, waltrail::store::StoreError> {
        self.inner.put_part(key, id, number, offset, body).await
    }

    async fn complete_multipart(
        &self,
        key: &str,
        id: &str,
        parts: &[waltrail::store::PartTag],
    ) -> Result<(), waltrail::store::StoreError> {
        self.inner.complete_multipart(key, id, parts).await?;
        self.unavailable(&self.failures_after)
    }

    async fn abort_multipart(&self, key: &str, id: &str) -> Result<(), waltrail::store::StoreError> {
        self.inner.abort_multipart(key, id).await
    }
}

#[tokio::test]
async fn retry_asks_again_and_knows_its_own() {
    let body = Bytes::from_static(b"mine");
    let stacked = |inner: SharedStore| {
        let (metered, meter) = Metered::new(inner);
        (Arc::new(Retrying::new(Arc::new(metered), QUICK)) as SharedStore, meter)
    };
    // Fails three times, passes the fourth.
    let (store, meter) = stacked(Faulty::shared(3, 0));
    store.put("a", body.clone(), PutMode::IfAbsent).await.unwrap();
    assert_eq!(meter.traffic().requests, 4);
    // Gives up after four.
    let (store, meter) = stacked(Faulty::shared(9, 0));
    assert!(store.put("a", body.clone(), PutMode::IfAbsent).await.unwrap_err().is_retryable());
    assert_eq!(meter.traffic().requests, 4);
    // Done, but the answer is lost: the object that is there is ours.
    let (store, _) = stacked(Faulty::shared(0, 1));
    store.put("a", body.clone(), PutMode::IfAbsent).await.unwrap();
    // Somebody else's object is not, even when our first attempt failed.
    let faulty = Arc::new(Faulty { inner: MemoryStore::new(), failures_before: 0.into(), failures_after: 0.into() });
    faulty.put("a", Bytes::from_static(b"else"), PutMode::IfAbsent).await.unwrap();
    faulty.failures_before.store(1, std::sync::atomic::Ordering::SeqCst);
    let (store, _) = stacked(faulty);
    let error = store.put("a", body.clone(), PutMode::IfAbsent).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::AlreadyExists);
    // A completed upload whose answer is lost is complete.
    let (store, _) = stacked(Faulty::shared(0, 1));
    let id = store.create_multipart("b").await.unwrap();
    let part = store.put_part("b", &id, 1, 0, body.clone()).await.unwrap();
    store.complete_multipart("b", &id, &[part]).await.unwrap();
    assert_eq!(store.get("b", 10).await.unwrap(), body);
    // What does not help is not repeated.
    let (store, meter) = stacked(Faulty::shared(0, 0));
    store.get("nothing", 1).await.unwrap_err();
    assert_eq!(meter.traffic().requests, 1);
}

#[test]
fn waits_are_bounded() {
    let policy = RetryPolicy { attempts: 100, base_ms: 100, max_ms: 1000 };
    for attempt in 0..100 {
        let wait = policy.wait(attempt);
        assert!(wait <= Duration::from_millis(1001) && wait > Duration::ZERO);
    }
    assert!(policy.wait(0) <= Duration::from_millis(101));
}
