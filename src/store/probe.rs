//! Finding out what a store keeps of its promises, with small objects of our own that are removed again. Providers of "S3" differ.

use std::fmt;

use bytes::Bytes;

use super::{PartTag, PutMode, SharedStore, StoreError, StoreErrorKind};
use crate::clock::{Clock, random_bytes};

/// Probes stand under this prefix, in a folder with a random name.
const PROBE_PREFIX: &str = "doctor/";
/// Every part of a multipart upload but the last has at least so many bytes (S3's rule).
const PART_LEN: usize = 5 << 20;
/// A difference of clocks up to this, in milliseconds, is no finding.
const SKEW_LIMIT_MS: u64 = 60_000;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// As it should be.
    Good,
    /// Otherwise, and it is managed without.
    Note,
    /// Something that is promised can't be kept.
    Bad,
}

/// What was found out, and what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How much it matters.
    pub weight: Weight,
    /// What was found and what follows, in a sentence.
    pub text: String,
}

impl Finding {
    /// A finding.
    #[must_use]
    pub fn new(what: &'static str, weight: Weight, text: impl Into<String>) -> Self {
        Self { what, weight, text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.weight {
            Weight::Good => "good",
            Weight::Note => "note",
            Weight::Bad => "BAD",
        };
        write!(out, "{word:<5} {:<18} {}", self.what, self.text)
    }
}

/// What is said of a store that does not honour conditional puts.
pub const CONDITIONS_IGNORED: &str = "accepted and ignored: two daemons that start in the same moment are told apart by their names; \
                                      one that is replaced notices within the hour";

/// What is said of the machine's clock, which shows `now_ms`, when an object that was put just now was stored at `stored_ms` by the
/// store's; `u64::MAX` where it does not tell.
#[must_use]
pub fn clock_finding(now_ms: u64, stored_ms: u64) -> Finding {
    const WHAT: &str = "clock";
    let skew_ms = now_ms.abs_diff(stored_ms);
    if stored_ms == u64::MAX {
        Finding::new(WHAT, Weight::Note, "the store does not tell when objects were stored: superseded ones stay")
    } else if skew_ms <= SKEW_LIMIT_MS {
        Finding::new(WHAT, Weight::Good, format!("{skew_ms} ms apart from the store's"))
    } else {
        let minutes = skew_ms / 60_000;
        let text = format!(
            "{minutes} minutes apart from the store's: times of transactions are those of this machine's clock"
        );
        Finding::new(WHAT, Weight::Bad, text)
    }
}

/// Asks a store for everything that replication relies on.
///
/// # Errors
/// When the store can't be reached or refuses what nothing works without: putting, reading, listing.
pub async fn probe(store: &SharedStore, clock: &dyn Clock) -> Result<Vec<Finding>, StoreError> {
    let name: String = random_bytes::<8>().unwrap_or_default().iter().map(|byte| format!("{byte:02x}")).collect();
    let probe = Probe { store, folder: format!("{PROBE_PREFIX}{name}/") };
    let found = probe.all(clock).await;
    probe.clean_up().await;
    found
}

struct Probe<'a> {
    store: &'a SharedStore,
    folder: String,
}

impl Probe<'_> {
    async fn all(&self, clock: &dyn Clock) -> Result<Vec<Finding>, StoreError> {
        Ok(vec![
            self.round_trip().await?,
            self.conditions().await?,
            self.ranges().await?,
            self.listing().await?,
            self.clock(clock).await?,
            self.multipart().await,
            self.deletion().await?,
        ])
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.folder)
    }

    async fn put(&self, name: &str, body: &'static [u8], mode: PutMode) -> Result<(), StoreError> {
        self.store.put(&self.key(name), Bytes::from_static(body), mode).await
    }

    async fn round_trip(&self) -> Result<Finding, StoreError> {
        const WHAT: &str = "put and get";
        self.put("a", b"first", PutMode::Overwrite).await?;
        let read = self.store.get(&self.key("a"), 100).await?;
        let missing = self.store.get(&self.key("never"), 100).await;
        Ok(match missing {
            _ if read != "first" => Finding::new(WHAT, Weight::Bad, "what was read is not what was put"),
            Err(error) if error.is_not_found() => Finding::new(
                WHAT,
                Weight::Good,
                "what was put is read at once; what is missing is told from what is refused",
            ),
            Err(error) => Finding::new(
                WHAT,
                Weight::Bad,
                format!(
                    "an object that is not there is answered with '{}': is listing the bucket allowed?",
                    error.message
                ),
            ),
            Ok(_) => Finding::new(WHAT, Weight::Bad, "an object that is not there can be read"),
        })
    }

    async fn conditions(&self) -> Result<Finding, StoreError> {
        const WHAT: &str = "conditional put";
        self.put("once", b"one", PutMode::Overwrite).await?;
        match self.put("once", b"two", PutMode::IfAbsent).await {
            Err(error) if error.kind == StoreErrorKind::AlreadyExists => Ok(Finding::new(
                WHAT,
                Weight::Good,
                "honoured: of two daemons that start in the same moment one gives way at once; one that is replaced later notices within the hour",
            )),
            Err(error) if error.kind == StoreErrorKind::NotSupported => {
                Ok(Finding::new(WHAT, Weight::Note, CONDITIONS_IGNORED.replace("accepted and ignored", "not known")))
            }
            Ok(()) => Ok(Finding::new(WHAT, Weight::Note, CONDITIONS_IGNORED)),
            Err(error) => Err(error),
        }
    }

    async fn ranges(&self) -> Result<Finding, StoreError> {
        const WHAT: &str = "ranges";
        self.put("range", b"0123456789", PutMode::Overwrite).await?;
        Ok(match self.store.get_range(&self.key("range"), 3, 4).await {
            Ok(part) if part == "3456" => Finding::new(WHAT, Weight::Good, "a part of an object can be read"),
            Ok(_) => Finding::new(WHAT, Weight::Bad, "another part is answered than was asked for: restores fail"),
            Err(error) => Finding::new(WHAT, Weight::Bad, format!("restores need them: {error}")),
        })
    }

    async fn listing(&self) -> Result<Finding, StoreError> {
        const WHAT: &str = "listing";
        for name in ["list/b", "list/a", "list/c", "lisu"] {
            self.put(name, b"", PutMode::Overwrite).await?;
        }
        let names = |listed: Vec<super::ObjectInfo>| listed.into_iter().map(|object| object.key).collect::<Vec<_>>();
        let all = names(self.store.list(&self.key("list/"), None).await?);
        let rest = names(self.store.list(&self.key("list/"), Some(&self.key("list/a"))).await?);
        let expected = ["list/a", "list/b", "list/c"].map(|name| self.key(name));
        Ok(if all == expected && rest == expected[1..] {
            Finding::new(WHAT, Weight::Good, "complete, in order, at once, and from a key on")
        } else {
            Finding::new(WHAT, Weight::Bad, format!("not what was put, or not in order: {all:?}, {rest:?}"))
        })
    }

    async fn clock(&self, clock: &dyn Clock) -> Result<Finding, StoreError> {
        self.put("clock", b"", PutMode::Overwrite).await?;
        let listed = self.store.list(&self.key("clock"), None).await?;
        Ok(clock_finding(clock.now_ms(), listed.first().map_or(u64::MAX, |object| object.stored_ms)))
    }

    /// A refusal is a finding here: small databases never need it.
    async fn multipart(&self) -> Finding {
        const WHAT: &str = "multipart upload";
        match self.try_multipart().await {
            Ok(true) => Finding::new(WHAT, Weight::Good, "an object of two parts is whole"),
            Ok(false) => Finding::new(WHAT, Weight::Bad, "an object of two parts is not what was put"),
            Err(error) => Finding::new(WHAT, Weight::Bad, format!("snapshots larger than a part need it: {error}")),
        }
    }

    async fn try_multipart(&self) -> Result<bool, StoreError> {
        let key = self.key("parts");
        let upload = self.store.create_multipart(&key).await?;
        let mut parts: Vec<PartTag> = Vec::new();
        let bodies = [Bytes::from(vec![1; PART_LEN]), Bytes::from_static(b"end")];
        let mut offset = 0;
        for (number, body) in (1..).zip(bodies) {
            let len_bytes = body.len() as u64;
            match self.store.put_part(&key, &upload, number, offset, body).await {
                Ok(part) => parts.push(part),
                Err(error) => {
                    // What is not completed would be paid for until the bucket's rules remove it.
                    self.store.abort_multipart(&key, &upload).await.ok();
                    return Err(error);
                }
            }
            offset += len_bytes;
        }
        self.store.complete_multipart(&key, &upload, &parts).await?;
        let tail = self.store.get_range(&key, PART_LEN as u64 - 1, 4).await?;
        Ok(tail == [&[1][..], b"end"].concat())
    }

    async fn deletion(&self) -> Result<Finding, StoreError> {
        const WHAT: &str = "delete";
        self.put("gone", b"", PutMode::Overwrite).await?;
        self.put("gone-too", b"", PutMode::Overwrite).await?;
        let deleted = match self.store.delete(&self.key("gone")).await {
            Ok(()) => self.store.delete_many(&[self.key("gone-too")]).await.map(|failures| failures.into_iter().next()),
            Err(error) => Err(error),
        };
        let refused = match deleted {
            Ok(None) => None,
            Ok(Some((_, error))) | Err(error) => Some(error),
        };
        let left = self.store.list(&self.key("gone"), None).await?.len();
        Ok(match (refused, left) {
            (None, 0) => Finding::new(WHAT, Weight::Good, "what is deleted is gone"),
            (None, _) => {
                Finding::new(WHAT, Weight::Note, "answered and not done (a bucket with a lock?): storage grows")
            }
            (Some(error), _) => Finding::new(
                WHAT,
                Weight::Note,
                format!("refused ({}): old history stays, storage grows", error.message),
            ),
        })
    }

    /// What can't be deleted stays; nobody looks at it.
    async fn clean_up(&self) {
        if let Ok(listed) = self.store.list(&self.folder, None).await {
            let keys: Vec<String> = listed.into_iter().map(|object| object.key).collect();
            self.store.delete_many(&keys).await.ok();
        }
    }
}
