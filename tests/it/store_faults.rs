//! Stores that answer badly, and work on stores that is cut short.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use waltrail::clock::Clock;
use waltrail::store::directory::DirectoryStore;
use waltrail::store::faults::{Fault, Faulty, Request};
use waltrail::store::memory::MemoryStore;
use waltrail::store::retry::{RetryPolicy, Retrying};
use waltrail::store::s3::{S3Options, S3Store};
use waltrail::store::upload::Upload;
use waltrail::store::{ObjectStore, PutMode, SharedStore, StoreError, StoreErrorKind};

use crate::support::{stderr, waltrail};

/// A server that answers everything with the same bytes. Its thread ends with the test process.
fn server_that_says(answer: &'static str) -> S3Options {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
            while !seen.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
                match socket.read(&mut chunk) {
                    Ok(len @ 1..) => seen.extend_from_slice(&chunk[..len]),
                    _ => break,
                }
            }
            socket.write_all(answer.as_bytes()).ok();
        }
    });
    S3Options {
        bucket: "b".into(),
        endpoint: Some(format!("http://{address}")),
        access_key_id: Some("test".into()),
        secret_access_key: Some("testtest".into()),
        ..S3Options::default()
    }
}

fn answer(status: &str, head: &str, body: &str) -> &'static str {
    format!("HTTP/1.1 {status}\r\n{head}connection: close\r\n\r\n{body}").leak()
}

fn error(status: &str, head: &str, code: &str) -> &'static str {
    answer(status, head, &format!("<Error><Code>{code}</Code><Message>says why</Message></Error>"))
}

async fn get_error(answer: &'static str) -> StoreError {
    S3Store::open(&server_that_says(answer)).await.get("k", 100).await.unwrap_err()
}

#[tokio::test]
async fn answers_of_s3_are_told_apart() {
    use StoreErrorKind::{Denied, NoSuchBucket, NotFound, NotSupported, Unavailable};
    for (status, code, kind) in [
        ("404 Not Found", "NoSuchKey", NotFound),
        ("404 Not Found", "NoSuchBucket", NoSuchBucket),
        ("403 Forbidden", "AccessDenied", Denied),
        ("400 Bad Request", "ExpiredToken", Denied),
        ("400 Bad Request", "InvalidToken", Denied),
        ("409 Conflict", "ConditionalRequestConflict", Unavailable),
        ("429 Too Many Requests", "TooManyRequests", Unavailable),
        ("503 Service Unavailable", "SlowDown", Unavailable),
        // A store without conditional puts says this; asking again for ever helps nobody.
        ("501 Not Implemented", "NotImplemented", NotSupported),
    ] {
        let error = get_error(error(status, "", code)).await;
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(code), "{error}");
    }
    let taken = S3Store::open(&server_that_says(error("412 Precondition Failed", "", "PreconditionFailed"))).await;
    let taken = taken.put("k", Bytes::from_static(b"x"), PutMode::IfAbsent).await.unwrap_err();
    assert_eq!(taken.kind, StoreErrorKind::AlreadyExists, "{taken}");
}

#[tokio::test]
async fn another_web_server_is_no_empty_store() {
    let page = answer("404 Not Found", "content-type: text/html\r\n", "<html><body>nothing here</body></html>");
    let error = get_error(page).await;
    assert_eq!(error.kind, StoreErrorKind::Other, "{error}");
    let store = S3Store::open(&server_that_says(page)).await;
    assert_eq!(store.list("", None).await.unwrap_err().kind, StoreErrorKind::Other);
    let empty = S3Store::open(&server_that_says(answer("404 Not Found", "content-length: 0\r\n", ""))).await;
    assert_eq!(empty.list("", None).await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
}

/// What a listing leaves out would count as missing, so one that can't be whole is an error.
#[tokio::test]
async fn listings_that_lie_are_refused() {
    for content in [
        "<IsTruncated>true</IsTruncated><Contents><Key>a</Key><Size>1</Size></Contents>",
        "<IsTruncated>false</IsTruncated><Contents><Key>a</Key></Contents>",
        "<IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents>",
    ] {
        let listing = answer("200 OK", "", &format!("<ListBucketResult>{content}</ListBucketResult>"));
        let store = S3Store::open(&server_that_says(listing)).await;
        assert_eq!(store.list("", None).await.unwrap_err().kind, StoreErrorKind::Other, "{content}");
    }
}

#[tokio::test]
async fn the_right_region_is_named() {
    let moved = error("301 Moved Permanently", "x-amz-bucket-region: eu-west-1\r\n", "PermanentRedirect");
    let error = get_error(moved).await;
    assert_eq!(error.kind, StoreErrorKind::Other);
    assert!(error.message.contains("region 'eu-west-1'"), "{error}");
}

#[tokio::test]
async fn bodies_that_lie_are_refused() {
    let cut = get_error(answer("200 OK", "content-length: 50\r\n", "0123456789")).await;
    assert_eq!(cut.kind, StoreErrorKind::Unavailable, "{cut}");
    let endless: &str = "x".repeat(101).leak();
    let too_long = get_error(answer("200 OK", "", endless)).await;
    assert_eq!(too_long.kind, StoreErrorKind::WrongSize, "{too_long}");
    // Bytes 5 to 7 are asked for; three others come.
    for head in ["content-length: 3\r\ncontent-range: bytes 0-2/10\r\n", "content-length: 3\r\n"] {
        let store = S3Store::open(&server_that_says(answer("206 Partial Content", head, "abc"))).await;
        let wrong = store.get_range("k", 5, 3).await.unwrap_err();
        assert_eq!(wrong.kind, StoreErrorKind::Other, "{wrong}");
    }
}

#[test]
fn a_missing_region_is_said_at_once() {
    let home = tempfile::tempdir().unwrap();
    let mut command = waltrail();
    command.env_remove("AWS_REGION").env_remove("AWS_DEFAULT_REGION").env("HOME", home.path());
    command.env("AWS_EC2_METADATA_DISABLED", "true");
    let output = command.args(["restore", "s3://b/x", "--output"]).arg(home.path().join("o.db")).output().unwrap();
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(said.contains("no region is known"), "{said}");
    assert!(!said.contains("tried again"), "{said}");
}

fn directory() -> (tempfile::TempDir, SharedStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(DirectoryStore::new(directory.path().to_owned()));
    (directory, store)
}

fn incoming_files(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join(".incoming")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn keys_that_are_no_keys_are_not_tried_again() {
    let (_directory, store) = directory();
    for key in ["../a", "/etc/a", "", "a/../../b", "a//b", "a/./b", "a/"] {
        let error = store.put(key, Bytes::new(), PutMode::Overwrite).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Other, "{key}: {error}");
    }
}

#[tokio::test]
async fn an_upload_outlives_a_failure_to_complete_it() {
    let (directory, store) = directory();
    let id = store.create_multipart("folder/x").await.unwrap();
    let parts = [store.put_part("folder/x", &id, 1, 0, Bytes::from_static(b"whole")).await.unwrap()];
    let in_the_way = directory.path().join("folder");
    std::fs::write(&in_the_way, b"").unwrap();
    store.complete_multipart("folder/x", &id, &parts).await.unwrap_err();
    std::fs::remove_file(&in_the_way).unwrap();
    store.complete_multipart("folder/x", &id, &parts).await.unwrap();
    assert_eq!(store.get("folder/x", 100).await.unwrap(), "whole");
    assert_eq!(incoming_files(directory.path()), [""; 0]);
}

#[tokio::test]
async fn an_upload_that_can_not_be_finished_is_given_up() {
    let (directory, store) = directory();
    let mut upload = Upload::new(store, "folder/x".into(), 0);
    upload.write(&vec![1; 20 << 20]).await.unwrap();
    assert_eq!(incoming_files(directory.path()).len(), 1);
    std::fs::write(directory.path().join("folder"), b"").unwrap();
    upload.finish(PutMode::Overwrite).await.unwrap_err();
    assert_eq!(incoming_files(directory.path()), [""; 0]);
}

#[tokio::test]
async fn leftovers_of_killed_processes_go_after_a_day() {
    let (directory, store) = directory();
    let incoming = directory.path().join(".incoming");
    std::fs::create_dir(&incoming).unwrap();
    #[allow(clippy::disallowed_methods)]
    let now = SystemTime::now();
    for (name, hours) in [("old", 25), ("young", 23)] {
        let file = std::fs::File::create(incoming.join(name)).unwrap();
        file.set_modified(now - Duration::from_secs(hours * 3600)).unwrap();
    }
    store.put("a", Bytes::new(), PutMode::Overwrite).await.unwrap();
    assert_eq!(incoming_files(directory.path()), ["young"]);
}

/// Each attempt takes a minute by this clock.
#[derive(Clone, Default)]
struct MinuteAnAttempt(Arc<AtomicU64>);

impl Clock for MinuteAnAttempt {
    fn now_ms(&self) -> u64 {
        self.monotonic().as_millis() as u64
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(60 * self.0.load(Ordering::SeqCst))
    }
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up_after_two_minutes() {
    let clock = MinuteAnAttempt::default();
    let attempts = clock.0.clone();
    let hangs: SharedStore = Arc::new(Faulty::new(Arc::new(MemoryStore::new()), move |_: Request<'_>| {
        attempts.fetch_add(1, Ordering::SeqCst);
        Fault::Before(StoreErrorKind::Unavailable)
    }));
    let patient = Retrying::patient(hangs.clone(), Arc::new(clock.clone()));
    assert!(patient.get("k", 100).await.unwrap_err().is_retryable());
    assert_eq!(clock.0.load(Ordering::SeqCst), 2);
    // A daemon has its own patience.
    let policy = RetryPolicy { attempts: 5, base_ms: 1, max_ms: 2 };
    assert!(Retrying::new(hangs, policy).get("k", 100).await.unwrap_err().is_retryable());
    assert_eq!(clock.0.load(Ordering::SeqCst), 2 + 5);
}
