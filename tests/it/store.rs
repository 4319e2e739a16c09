//! One set of promises, kept by every store.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use waltrail::store::directory::DirectoryStore;
use waltrail::store::faults::{Fault, Faulty, Request};
use waltrail::store::memory::MemoryStore;
use waltrail::store::metered::{Meter, Metered};
use waltrail::store::retry::{RetryPolicy, Retrying};
use waltrail::store::s3::{S3Options, S3Store};
use waltrail::store::upload::{Upload, put_file};
use waltrail::store::{DELETE_MANY_LIMIT, ObjectStore, Operation, PutMode, SharedStore, StoreErrorKind};

use crate::support::s3::S3Server;
use crate::support::scene::now_ms;
use crate::support::{stderr, waltrail};

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
    assert_eq!(store.folders("").await.unwrap(), ["log", "other"]);
    assert_eq!(store.folders("log/").await.unwrap(), ["b"]);
    assert_eq!(store.folders("log/b/").await.unwrap(), [""; 0]);
    store.delete("log/a").await.unwrap();
    store.delete("log/a").await.unwrap();
    assert_eq!(keys("log/a", None).await, [""; 0]);
    for key in ["gone/1", "gone/2", "gone/stays"] {
        store.put(key, Bytes::from_static(b"x"), PutMode::IfAbsent).await.unwrap();
    }
    let names = ["gone/1", "gone/never-there", "gone/2"].map(str::to_owned);
    assert!(store.delete_many(&names).await.unwrap().is_empty());
    assert_eq!(keys("gone/", None).await, ["gone/stays"]);

    // 20 MB in pieces of 300,000: three parts. Nothing is visible before the end.
    let mut upload = Upload::new(store.clone(), "snap/large".into(), 0);
    let piece: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    for _ in 0..67 {
        upload.write(&piece).await.unwrap();
    }
    assert_eq!(keys("snap/", None).await, [""; 0]);
    let len = upload.finish(PutMode::Overwrite).await.unwrap();
    assert_eq!(len, 67 * 300_000);
    assert_eq!(keys("snap/", None).await, ["snap/large"]);
    assert_eq!(store.get_range("snap/large", 300_000 * 50, 300_000).await.unwrap(), piece);

    let mut given_up = Upload::new(store.clone(), "snap/given-up".into(), 0);
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
    let store = MemoryStore::new();
    store.put("a", MINE, PutMode::Overwrite).await.unwrap();
    store.set_now_ms(7);
    store.put("b", MINE, PutMode::Overwrite).await.unwrap();
    let stored: Vec<u64> = store.list("", None).await.unwrap().iter().map(|object| object.stored_ms).collect();
    assert_eq!(stored, [0, 7]);
}

/// Within a minute of this machine's time.
async fn tells_when_objects_were_stored(store: &dyn ObjectStore) {
    store.put("stored/now", MINE, PutMode::Overwrite).await.unwrap();
    let stored_ms = store.list("stored/", None).await.unwrap()[0].stored_ms;
    assert!(stored_ms.abs_diff(now_ms()) < 60_000, "{stored_ms}");
}

#[tokio::test]
async fn a_directory_keeps_its_promises() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("made/by/the first put");
    let store: SharedStore = Arc::new(DirectoryStore::new(root.clone()));
    assert_eq!(store.list("", None).await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
    assert_eq!(store.folders("").await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
    assert_eq!(store.get("a", 1).await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
    keeps_its_promises(store.clone()).await;
    tells_when_objects_were_stored(store.as_ref()).await;
    for outside in ["../a", "/etc/a", "", "a/../../b"] {
        assert!(store.put(outside, Bytes::new(), PutMode::Overwrite).await.is_err(), "{outside}");
    }
    assert_eq!(std::fs::read_dir(root.join(".incoming")).unwrap().count(), 0, "nothing is left over");
}

#[tokio::test]
async fn s3_keeps_its_promises() {
    let server = S3Server::start();
    let store = Arc::new(S3Store::open(&server.options("some/prefix")).await);
    keeps_its_promises(store.clone()).await;
    tells_when_objects_were_stored(store.as_ref()).await;
    assert!(server.path("some/prefix/log/c").exists());
}

/// Answers the first connections with these, one after another; gives the requests' first lines.
fn answers(all: Vec<(u16, String)>) -> (S3Options, std::thread::JoinHandle<Vec<String>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let options = S3Options {
        bucket: "b".into(),
        prefix: "p".into(),
        endpoint: Some(format!("http://{}", listener.local_addr().unwrap())),
        access_key_id: Some("test".into()),
        secret_access_key: Some("testtest".into()),
        ..S3Options::default()
    };
    let served = std::thread::spawn(move || {
        let answer = |(status, body): (u16, String)| {
            let (mut socket, _) = listener.accept().unwrap();
            let (mut seen, mut chunk) = (Vec::new(), [0; 16384]);
            while !seen.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
                let len = socket.read(&mut chunk).unwrap();
                seen.extend_from_slice(&chunk[..len]);
            }
            let head = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
            socket.shutdown(std::net::Shutdown::Write).unwrap();
            // Until the client hangs up: what it sends after that would be answered with a reset.
            std::io::copy(&mut socket, &mut std::io::sink()).ok();
            String::from_utf8_lossy(&seen).lines().next().unwrap_or_default().to_owned()
        };
        all.into_iter().map(answer).collect()
    });
    (options, served)
}

#[tokio::test]
async fn each_key_of_a_deletion_has_its_own_answer() {
    let refusal = "<DeleteResult><Error><Key>p/log/2</Key><Code>AccessDenied</Code><Message>locked</Message></Error>\
                   <Error><Key>p/log/3</Key><Code>InternalError</Code></Error>\
                   <Error><Key>p/log/4</Key><Code>NoSuchKey</Code></Error></DeleteResult>";
    let (options, _) = answers(vec![(200, refusal.into())]);
    let keys = ["log/1", "log/2", "log/3", "log/4"].map(str::to_owned);
    let failures = S3Store::open(&options).await.delete_many(&keys).await.unwrap();
    let told: Vec<_> = failures.iter().map(|(key, error)| (key.as_str(), error.kind)).collect();
    assert_eq!(told, [("log/2", StoreErrorKind::Denied), ("log/3", StoreErrorKind::Unavailable)]);
    assert!(failures[0].1.to_string().contains("locked"), "{}", failures[0].1);
}

#[tokio::test]
async fn a_server_without_deletion_of_many_is_asked_for_each() {
    let error = |code: &str| format!("<Error><Code>{code}</Code><Message>m</Message></Error>");
    for (status, code) in [(501, "NotImplemented"), (400, "MalformedXML"), (400, "InvalidRequest")] {
        let all = vec![(status, error(code)), (204, String::new()), (403, error("AccessDenied"))];
        let (options, served) = answers(all);
        let keys = ["log/1", "log/2"].map(str::to_owned);
        let failures = S3Store::open(&options).await.delete_many(&keys).await.unwrap();
        assert_eq!(failures.len(), 1, "{code}");
        assert_eq!((failures[0].0.as_str(), failures[0].1.kind), ("log/2", StoreErrorKind::Denied));
        let requests = served.join().unwrap();
        assert!(requests[0].starts_with("POST /b/") && requests[1].starts_with("DELETE /b/p/log/1"), "{requests:?}");
    }
    // Refused as a whole: each key would be, too.
    let (options, _) = answers(vec![(403, error("AccessDenied"))]);
    let denied = S3Store::open(&options).await.delete_many(&["log/1".to_owned()]).await.unwrap_err();
    assert_eq!(denied.kind, StoreErrorKind::Denied);
}

#[tokio::test]
async fn many_are_deleted_with_one_request() {
    let server = S3Server::start();
    let directory = server.path("many/log");
    std::fs::create_dir_all(&directory).unwrap();
    let keys: Vec<String> = (0..DELETE_MANY_LIMIT).map(|number| format!("log/{number:04}")).collect();
    for key in &keys {
        std::fs::write(server.path("many").join(key), b"x").unwrap();
    }
    let (store, meter) = Metered::new(Arc::new(S3Store::open(&server.options("many")).await));
    assert!(store.delete_many(&keys).await.unwrap().is_empty());
    assert_eq!(store.list("", None).await.unwrap(), []);
    assert_eq!(meter.traffic().by_operation, [(Operation::DeleteMany, 1), (Operation::List, 1)].into());
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
    assert_eq!(elsewhere.folders("").await.unwrap_err().kind, StoreErrorKind::NoSuchBucket);
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

/// Retry over metering over a memory store whose requests numbered in `faults` fail so.
fn stacked(memory: &Arc<MemoryStore>, faults: &'static [(u64, Fault)]) -> (SharedStore, Meter) {
    let hook = |request: Request<'_>| {
        faults.iter().find(|(number, _)| *number == request.number).map_or(Fault::None, |(_, fault)| *fault)
    };
    let (metered, meter) = Metered::new(Arc::new(Faulty::new(memory.clone(), hook)));
    (Arc::new(Retrying::new(Arc::new(metered), QUICK)), meter)
}

const AWAY: Fault = Fault::Before(StoreErrorKind::Unavailable);
const ANSWER_LOST: Fault = Fault::After(StoreErrorKind::Unavailable);
const MINE: Bytes = Bytes::from_static(b"mine");

#[tokio::test]
async fn retry_asks_again_as_often_as_told() {
    let memory = Arc::new(MemoryStore::new());
    let (store, meter) = stacked(&memory, &[(0, AWAY), (1, AWAY), (2, AWAY)]);
    store.put("a", MINE, PutMode::IfAbsent).await.unwrap();
    assert_eq!(meter.traffic().by_operation, [(Operation::Put, 4)].into());
    let (store, meter) = stacked(&memory, &[(0, AWAY), (1, AWAY), (2, AWAY), (3, AWAY)]);
    assert!(store.put("b", MINE, PutMode::IfAbsent).await.unwrap_err().is_retryable());
    assert_eq!(meter.traffic().requests, 4);
    // Of several keys too, and what is deleted already is no failure.
    let (store, meter) = stacked(&memory, &[(0, ANSWER_LOST)]);
    assert!(store.delete_many(&["a".to_owned()]).await.unwrap().is_empty());
    assert_eq!(meter.traffic().by_operation, [(Operation::DeleteMany, 2)].into());
    // What does not help is not repeated.
    let (store, meter) = stacked(&memory, &[]);
    store.get("nothing", 1).await.unwrap_err();
    assert_eq!(meter.traffic().by_operation, [(Operation::Get, 1)].into());
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_knows_its_own() {
    let memory = Arc::new(MemoryStore::new());
    let (store, meter) = stacked(&memory, &[(0, ANSWER_LOST)]);
    store.put("a", MINE, PutMode::IfAbsent).await.unwrap();
    assert_eq!(meter.traffic().by_operation, [(Operation::Put, 2), (Operation::Get, 1)].into());
    // Somebody else's object is not ours, even when our first attempt failed; nor is it read when none did.
    for other in ["else", "something longer", ""] {
        memory.put("other", Bytes::from_static(other.as_bytes()), PutMode::Overwrite).await.unwrap();
        for faults in [&[][..], &[(0, AWAY)]] {
            let (store, meter) = stacked(&memory, faults);
            let error = store.put("other", MINE, PutMode::IfAbsent).await.unwrap_err();
            assert_eq!(error.kind, StoreErrorKind::AlreadyExists, "{other}");
            assert_eq!(meter.traffic().by_operation.contains_key(&Operation::Get), !faults.is_empty());
        }
    }
    // An object that can't be read is not called somebody else's.
    let (store, _) = stacked(&memory, &[(0, ANSWER_LOST), (2, Fault::Before(StoreErrorKind::Denied))]);
    let error = store.put("b", MINE, PutMode::IfAbsent).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Denied);
    // Reading it is tried again, too.
    let (store, _) = stacked(&memory, &[(0, ANSWER_LOST), (2, AWAY)]);
    store.put("c", MINE, PutMode::IfAbsent).await.unwrap();
}

/// Over memory, because the test server answers AccessDenied for an upload that is gone, where S3 answers NoSuchUpload.
#[tokio::test]
async fn an_upload_whose_completion_was_lost_knows_its_own() {
    let memory = Arc::new(MemoryStore::new());
    let completed = async |faults| {
        let (store, _) = stacked(&memory, faults);
        let id = store.create_multipart("b").await?;
        let part = store.put_part("b", &id, 1, 0, MINE).await?;
        store.complete_multipart("b", &id, &[part]).await
    };
    completed(&[(2, ANSWER_LOST)]).await.unwrap();
    assert_eq!(memory.get("b", 10).await.unwrap(), MINE);
    // The upload is lost, and what has its key is an older object: not done.
    memory.put("b", Bytes::from_static(b"older"), PutMode::Overwrite).await.unwrap();
    let error = completed(&[(2, AWAY), (3, Fault::Before(StoreErrorKind::NotFound))]).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::NotFound);
    assert_eq!(memory.get("b", 10).await.unwrap(), "older");
    // The first answer counts: no such upload, and no attempt that could have completed it.
    memory.put("b", MINE, PutMode::Overwrite).await.unwrap();
    let error = completed(&[(2, Fault::Before(StoreErrorKind::NotFound))]).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::NotFound);
}

/// To give an upload up means to send all of it again.
#[tokio::test]
async fn parts_of_an_upload_are_asked_for_more_patiently() {
    let memory = Arc::new(MemoryStore::new());
    let (store, meter) = stacked(
        &memory,
        &[(1, AWAY), (2, AWAY), (3, AWAY), (4, AWAY), (5, AWAY), (7, AWAY), (8, AWAY), (9, AWAY), (10, AWAY)],
    );
    let id = store.create_multipart("b").await.unwrap();
    let part = store.put_part("b", &id, 1, 0, MINE).await.unwrap();
    store.complete_multipart("b", &id, &[part]).await.unwrap();
    assert_eq!(memory.get("b", 10).await.unwrap(), MINE);
    assert_eq!(meter.traffic().requests, 12);
}

#[tokio::test]
async fn traffic_is_counted_by_kind() {
    let (store, meter) = stacked(&Arc::new(MemoryStore::new()), &[]);
    store.put("a", MINE, PutMode::Overwrite).await.unwrap();
    store.get_range("a", 1, 2).await.unwrap();
    store.list("", None).await.unwrap();
    let id = store.create_multipart("b").await.unwrap();
    store.put_part("b", &id, 1, 0, MINE).await.unwrap();
    store.abort_multipart("b", &id).await.unwrap();
    store.delete("a").await.unwrap();
    let traffic = meter.traffic();
    use Operation::{AbortMultipart, CreateMultipart, Delete, GetRange, List, Put, PutPart};
    let once = [Put, GetRange, List, CreateMultipart, PutPart, AbortMultipart, Delete].map(|operation| (operation, 1));
    assert_eq!(traffic.by_operation, once.into());
    assert_eq!((traffic.requests, traffic.sent_bytes, traffic.received_bytes), (7, 8, 2));
}

/// With keys in the environment that are wrong, a profile that is named in the URL is what counts.
#[test]
fn a_named_profile_comes_before_the_environment() {
    let server = S3Server::start();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("credentials");
    std::fs::write(&file, "[backup]\naws_access_key_id = test\naws_secret_access_key = testtest\n").unwrap();
    let log = |url: String| {
        let mut command = waltrail();
        command.env("AWS_SHARED_CREDENTIALS_FILE", &file).env("AWS_CONFIG_FILE", home.path().join("none"));
        stderr(&command.env("AWS_SECRET_ACCESS_KEY", "wrong").args(["log", &url]).output().unwrap())
    };
    let (denied, found) = (log(server.url("x")), log(format!("{}&profile=backup", server.url("x"))));
    assert!(denied.contains("SignatureDoesNotMatch"), "{denied}");
    assert!(!found.contains("SignatureDoesNotMatch") && found.contains("no backup"), "{found}");
}

#[tokio::test]
async fn a_session_token_is_sent_and_never_shown() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let options = S3Options {
        bucket: "b".into(),
        endpoint: Some(format!("http://{}", listener.local_addr().unwrap())),
        access_key_id: Some("temporary".into()),
        secret_access_key: Some("hunter2".into()),
        session_token: Some("token-7".into()),
        ..S3Options::default()
    };
    let shown = format!("{options:?}");
    assert!(!shown.contains("hunter2") && !shown.contains("token-7"), "{shown}");
    let request = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
        while !seen.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            let len = std::io::Read::read(&mut socket, &mut chunk).unwrap();
            assert_ne!(len, 0, "the request ended early");
            seen.extend_from_slice(&chunk[..len]);
        }
        String::from_utf8_lossy(&seen).to_lowercase()
    });
    let store = S3Store::open(&options).await;
    assert!(!format!("{store:?}").contains("hunter2"), "the secret is shown");
    store.get("k", 1).await.unwrap_err();
    let request = request.join().unwrap();
    assert!(request.contains("x-amz-security-token: token-7"), "{request}");
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
