//! While a daemon works, and where the store fails: nothing that is healthy is called damaged, and an error is no verdict.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use waltrail::restore::RestoreError;
use waltrail::restore::history::History;
use waltrail::restore::plan::{Target, plan};
use waltrail::retain::prune::prune;
use waltrail::retain::tails::TailCache;
use waltrail::retain::{Now, RetentionSettings};
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::memory::MemoryStore;
use waltrail::store::metered::Metered;
use waltrail::store::{ObjectInfo, ObjectStore, PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};
use waltrail::verify::report::Verdict;
use waltrail::verify::{Depth, VerifyError};

use super::{DEPTHS, HOUR_MS, assert_found, get, keys, sentences, settings, simple, verify_with};
use crate::support::oracle::Oracle;

/// A store in which, before each request from a certain one on, something happens: an object is put, or goes.
#[derive(Debug)]
struct Meddled {
    inner: Arc<MemoryStore>,
    /// Requests that pass before it begins, and how many things happen before each one from then on.
    state: Mutex<(u64, usize, VecDeque<Change>)>,
}

#[derive(Debug, Clone)]
enum Change {
    Put(String, Bytes),
    Delete(String),
}

impl Meddled {
    async fn meddle(&self) {
        let due: Vec<Change> = {
            let mut state = self.state.lock().unwrap();
            let (waits, at_once, changes) = &mut *state;
            if *waits > 0 {
                *waits -= 1;
                return;
            }
            let count = changes.len().min(*at_once);
            changes.drain(..count).collect()
        };
        for change in due {
            match change {
                Change::Put(key, bytes) => self.inner.put(&key, bytes, PutMode::Overwrite).await.unwrap(),
                Change::Delete(key) => self.inner.delete(&key).await.unwrap(),
            }
        }
    }
}

#[async_trait]
impl ObjectStore for Meddled {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn put(&self, key: &str, _: Bytes, _: PutMode) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.meddle().await;
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.meddle().await;
        self.inner.get_range(key, offset, len_bytes).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        self.meddle().await;
        self.inner.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        panic!("{key}: a verification deletes nothing");
    }

    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn put_part(&self, key: &str, _: &str, _: u32, _: u64, _: Bytes) -> Result<PartTag, StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn complete_multipart(&self, key: &str, _: &str, _: &[PartTag]) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }

    async fn abort_multipart(&self, key: &str, _: &str) -> Result<(), StoreError> {
        panic!("{key}: a verification writes nothing");
    }
}

/// A replica, and what a daemon does to it then: ships, merges, makes a snapshot and prunes.
async fn life() -> (BTreeMap<String, Bytes>, Vec<Change>, u64) {
    let (mut oracle, mut segments, _) = simple().await;
    let objects = async |oracle: &Oracle| {
        let mut objects = BTreeMap::new();
        for key in keys(&oracle.store, "").await {
            objects.insert(key.clone(), Bytes::from(get(&oracle.store, &key).await));
        }
        objects
    };
    let before = objects(&oracle).await;
    let mut known = before.clone();
    let mut changes = Vec::new();
    let mut note = |known: &mut BTreeMap<String, Bytes>, now: BTreeMap<String, Bytes>| {
        let new = now.iter().filter(|(key, _)| !known.contains_key(*key));
        changes.extend(new.map(|(key, bytes)| Change::Put(key.clone(), bytes.clone())));
        // As a prune does it: snapshots first, then segments, the newest first.
        let gone: Vec<&String> = known.keys().filter(|key| !now.contains_key(*key)).collect();
        changes.extend(gone.into_iter().rev().map(|key| Change::Delete(key.clone())));
        *known = now;
    };
    oracle.pass_time(10 * HOUR_MS);
    for _ in 0..4 {
        segments.push(oracle.commit_and_cut(2).await);
        note(&mut known, objects(&oracle).await);
    }
    let txid = oracle.position().txid;
    oracle.snapshot(txid - 3, txid).await;
    note(&mut known, objects(&oracle).await);
    for pair in segments.chunks(2) {
        oracle.merge(1, pair[0].0.first_txid, pair.last().unwrap().0.last_txid).await;
        note(&mut known, objects(&oracle).await);
    }
    oracle.commit_and_cut(1).await;
    note(&mut known, objects(&oracle).await);
    oracle.pass_time(3 * HOUR_MS);
    let settings = RetentionSettings { window_ms: Some(HOUR_MS / 2), ..RetentionSettings::default() };
    let outcome = prune(&oracle.store, &settings, Now::Told(oracle.now_ms()), &mut TailCache::default(), false).await;
    assert!(outcome.unwrap().deleted_objects > 5);
    note(&mut known, objects(&oracle).await);
    (before, changes, oracle.now_ms())
}

/// Objects come and go between any two requests: nothing that is healthy is called anything else.
#[tokio::test]
async fn a_daemon_that_ships_merges_and_prunes_meanwhile() {
    let (before, changes, now_ms) = life().await;
    let mut undisturbed = 0;
    for at_once in [1, 3, changes.len()] {
        for depth in DEPTHS {
            // In larger steps later on, where one request is like the other.
            let waits = (0..30).chain((30..140).step_by(7));
            for waits in waits {
                let inner = Arc::new(MemoryStore::new());
                for (key, bytes) in &before {
                    inner.put(key, bytes.clone(), PutMode::Overwrite).await.unwrap();
                }
                let state = Mutex::new((waits, at_once, changes.clone().into()));
                let meddled = Arc::new(Meddled { inner, state });
                let store: SharedStore = meddled.clone();
                let what = format!("{at_once} at once after {waits} requests");
                let found = verify_with(&store, &settings(depth), now_ms).await;
                let found = found.unwrap_or_else(|error| panic!("{what} ({depth:?}): {error}"));
                assert_ne!(found.verdict, Verdict::Failed, "{what} ({depth:?}):\n{}", sentences(&found));
                // When it is over, a second look finds nothing to complain of.
                if meddled.state.lock().unwrap().2.is_empty() {
                    assert_found(&found, Verdict::Ok, &[], &what);
                    undisturbed += 1;
                }
            }
        }
    }
    assert!(undisturbed > 100, "{undisturbed}");
}

/// Each look at the newest state finds something else to be wrong, so nobody knows whether it can be restored: that is no clean verdict.
#[tokio::test]
async fn a_newest_state_that_is_another_at_each_look() {
    let (oracle, ..) = simple().await;
    let (store, now_ms) = (&oracle.store, oracle.now_ms());
    let whole = verify_with(store, &settings(Depth::Structure), now_ms).await.unwrap();
    assert_found(&whole, Verdict::Ok, &[], "before");
    // What is done last is to look for the newest state.
    let (metered, meter) = Metered::new(store.clone());
    let metered: SharedStore = Arc::new(metered);
    plan(&metered, &History::load(&metered).await.unwrap(), Target::Latest, None).await.unwrap();
    let waits = whole.requests - meter.traffic().requests;
    let inner = Arc::new(MemoryStore::new());
    for key in keys(store, "").await {
        inner.put(&key, Bytes::from(get(store, &key).await), PutMode::Overwrite).await.unwrap();
    }
    // Where it ends too early is told, and each time it ends somewhere else.
    let key = "epochs/00000001";
    let record = Bytes::from(get(store, key).await);
    let cut = |number: usize| Change::Put(key.to_owned(), record.slice(..record.len() - 1 - number % 90));
    let state = Mutex::new((waits, 1, (0..400).map(cut).collect()));
    let meddled: SharedStore = Arc::new(Meddled { inner, state });
    let found = verify_with(&meddled, &settings(Depth::Structure), now_ms).await.unwrap();
    assert_found(&found, Verdict::Degraded, &["whether the newest state can be restored was not found out"], "cut");
    assert!(found.newest.is_none() && !found.not_reached.is_empty(), "{found:?}");
}

/// A store that fails is an error, at whatever request; never a verdict.
#[tokio::test]
async fn a_store_that_fails_is_no_damage() {
    let (oracle, ..) = simple().await;
    for depth in DEPTHS {
        for failing in 0..40 {
            let hook = move |request: waltrail::store::faults::Request<'_>| match request.number >= failing {
                true => Fault::Before(StoreErrorKind::Denied),
                false => Fault::None,
            };
            let store: SharedStore = Arc::new(Faulty::new(oracle.store.clone(), hook));
            match verify_with(&store, &settings(depth), oracle.now_ms()).await {
                Err(VerifyError::Restore(RestoreError::Store(error))) => assert_eq!(error.kind, StoreErrorKind::Denied),
                Ok(found) => assert_found(&found, Verdict::Ok, &[], "it needed fewer requests"),
                Err(error) => panic!("{failing}: {error}"),
            }
        }
    }
}
