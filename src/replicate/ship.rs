//! Shipping: what a database's thread has cut goes to storage, in order, until it is confirmed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::base::Base;
use super::claim::{
    ClaimError, Claimed, Continuing, claim, claim_stored_ms, last_stored, list_claims, open_replica, read_record,
    records,
};
use super::control::State;
use super::scan::Finished;
use super::spool::{self, Spool, Spooled};
use super::status::Board;
use super::wake::{Event, Mailbox};
use crate::clock::Clock;
use crate::format::Position;
use crate::format::key::{EpochKey, SnapshotKey, Span};
use crate::format::record::EpochRecord;
use crate::store::probe::{CONDITIONS_IGNORED, Finding, Weight, clock_finding};
use crate::store::retry::{RetryPolicy, RetryWaits, WaitEnd};
use crate::store::upload::{Upload, put_open_file};
use crate::store::{PutMode, SharedStore, StoreError, StoreErrorKind};

/// How a failed request is asked again, for as long as it takes.
const FOREVER: RetryPolicy = RetryPolicy { attempts: u32::MAX, base_ms: 250, max_ms: 30_000 };
/// How often a writer that ships looks whether another one has taken over.
const SUCCESSOR_CHECK_INTERVAL: Duration = Duration::from_secs(3600);
/// A store that fails is complained of this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// What a database's thread asks for.
#[derive(Debug)]
pub enum Job {
    /// Claim an epoch: after shipping what an earlier run left.
    Claim {
        /// What can be proven to go on from.
        continuing: Option<Continuing>,
        /// What an earlier run left in the spool.
        leftovers: Vec<Spooled>,
    },
    /// Ship a segment.
    Ship(Spooled),
    /// Look up what the next snapshot is based on.
    FindBase,
    /// There is a snapshot of this later epoch: end, if that has a record.
    GiveWay {
        /// The epoch.
        epoch: u32,
    },
    /// Store a snapshot from its pieces.
    Snapshot {
        /// Where.
        key: SnapshotKey,
        /// Size of the database in bytes: the snapshot is not expected to be larger.
        database_len_bytes: u64,
        /// The pieces, in order.
        pieces: mpsc::Receiver<Piece>,
    },
}

/// A part of a snapshot that is being read.
#[derive(Debug)]
pub enum Piece {
    /// Bytes to append.
    Bytes(Vec<u8>),
    /// The last bytes.
    End(Finished),
}

/// What both sides see.
#[derive(Debug)]
pub struct Progress {
    /// Bytes of segments that wait in the spool.
    pub waiting_bytes: AtomicU64,
    /// The last transaction of the epoch that is confirmed.
    pub confirmed: watch::Sender<u64>,
    /// The epoch's record, once it is claimed.
    pub claimed: watch::Sender<Option<EpochRecord>>,
    /// Whether the first snapshot, without which nothing of the epoch can be restored, is not stored.
    pub snapshot_is_missing: AtomicBool,
    /// Where it is written down for others.
    pub board: Arc<Board>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            waiting_bytes: AtomicU64::new(0),
            confirmed: watch::Sender::new(0),
            claimed: watch::Sender::new(None),
            snapshot_is_missing: AtomicBool::new(false),
            board: Arc::default(),
        }
    }
}

/// Why shipping ended.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// The epoch could not be claimed, and asking again does not help.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Another writer has taken over.
    #[error("{location} was taken over by {host} (epoch {epoch}) at {claimed_ms} ms since 1970")]
    Replaced {
        /// The replica.
        location: String,
        /// The machine that took over.
        host: String,
        /// Its epoch.
        epoch: u32,
        /// When, in milliseconds since 1970.
        claimed_ms: u64,
    },
    /// An object stands under a key of ours that is not ours.
    #[error("{location}/{key} was written by somebody else")]
    Foreign {
        /// The replica.
        location: String,
        /// The object.
        key: String,
    },
    /// A spooled file can't be read or removed.
    #[error("the local state directory failed: {0}")]
    Spool(String),
}

/// Ships one database's objects.
pub struct Shipper {
    /// The replica.
    pub store: SharedStore,
    /// The database's thread.
    pub mailbox: Arc<Mailbox>,
    /// What both sides see.
    pub progress: Arc<Progress>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where segments wait, and are kept.
    pub spool: Spool,
    /// Whom to tell of segments that are confirmed and kept.
    pub kept: mpsc::UnboundedSender<Spooled>,
}

impl Shipper {
    /// Does jobs until there are no more.
    ///
    /// # Errors
    /// When going on makes no sense: see [`ShipError`]. A store that fails is asked again without end.
    pub async fn run(self, mut jobs: mpsc::UnboundedReceiver<Job>) -> Result<(), ShipError> {
        let mut background = JoinSet::new();
        // What is not waited for at the end.
        let mut beside = JoinSet::new();
        let mut claimed: Option<Claimed> = None;
        let mut checked = self.clock.monotonic();
        while let Some(job) = jobs.recv().await {
            match job {
                Job::Claim { continuing, leftovers } => {
                    let new = self.claim_patiently(continuing.as_ref(), &leftovers).await?;
                    // Known before the thread records anything: the state found, or the parent's last transaction.
                    let start_txid = new.record.first_txid - u64::from(new.record.continues);
                    self.progress.confirmed.send_replace(start_txid);
                    self.progress.claimed.send_replace(Some(new.record.clone()));
                    self.mailbox.send(Event::Claimed(Box::new(new.clone())));
                    let (store, clock, board) = (self.store.clone(), self.clock.clone(), self.progress.board.clone());
                    beside.spawn(look_at_store(store, clock, board, new.clone()));
                    claimed = Some(new);
                }
                Job::Ship(spooled) => {
                    if self.clock.monotonic().saturating_sub(checked) > SUCCESSOR_CHECK_INTERVAL {
                        checked = self.clock.monotonic();
                        self.check_successor(claimed.as_ref()).await?;
                    }
                    self.ship(&spooled, claimed.as_ref()).await?;
                    self.note_confirmed(&spooled);
                }
                Job::FindBase => {
                    let (store, mailbox) = (self.store.clone(), self.mailbox.clone());
                    background.spawn(async move {
                        mailbox.send(match Base::load(&store).await {
                            Ok(base) => Event::BaseFound(base.map(Box::new)),
                            Err(error) => {
                                tracing::warn!(%error, "the newest snapshot could not be looked up; trying again later");
                                Event::SnapshotFailed
                            }
                        });
                    });
                }
                Job::GiveWay { epoch } => self.check_replaced_by(epoch).await?,
                Job::Snapshot { key, database_len_bytes, pieces } => {
                    let (store, mailbox) = (self.store.clone(), self.mailbox.clone());
                    let progress = self.progress.clone();
                    background.spawn(async move {
                        let confirmed = progress.confirmed.subscribe();
                        let stored = store_snapshot(store, key, database_len_bytes, pieces, confirmed).await;
                        mailbox.send(match stored {
                            Ok(state) => {
                                progress.snapshot_is_missing.store(false, Ordering::Relaxed);
                                Event::SnapshotStored(state)
                            }
                            Err(error) => {
                                tracing::warn!(%error, "the snapshot was not stored; it is read again later");
                                Event::SnapshotFailed
                            }
                        });
                    });
                }
            }
        }
        while background.join_next().await.is_some() {}
        Ok(())
    }

    async fn claim_patiently(
        &self,
        continuing: Option<&Continuing>,
        leftovers: &[Spooled],
    ) -> Result<Claimed, ShipError> {
        let (mut complaint, mut attempts) = (self.complaint(), self.attempts());
        loop {
            attempts.begin();
            match self.try_claim(continuing, leftovers).await {
                Err(ShipError::Claim(ClaimError::Store(error))) => complaint.hear(&error),
                answer => return answer,
            }
            attempts.pause().await;
        }
    }

    async fn try_claim(&self, continuing: Option<&Continuing>, leftovers: &[Spooled]) -> Result<Claimed, ShipError> {
        let replica = open_replica(&self.store, self.clock.as_ref()).await?;
        if !leftovers.is_empty() {
            self.ship_leftovers(leftovers).await?;
        }
        Ok(claim(&self.store, &replica, continuing, self.clock.as_ref()).await?)
    }

    /// Ships what an earlier run left, under the epochs that it was captured in; it may be there already. What is of another replica,
    /// or was cut short by a power failure, is discarded, and what comes behind it, too: in storage it would stand behind a gap.
    /// The claim sees what is missing.
    async fn ship_leftovers(&self, leftovers: &[Spooled]) -> Result<(), ShipError> {
        let claims = list_claims(&self.store, None).await.map_err(ClaimError::Store)?;
        let mut reached: Option<Position> = None;
        for spooled in leftovers.iter().filter(|spooled| spooled.path.exists()) {
            let Span { epoch, first_txid, last_txid, .. } = spooled.key.0;
            if reached.is_none_or(|reached| reached.epoch != epoch) {
                reached = match records(&claims).find(|key| key.epoch == epoch) {
                    Some(key) => Some(last_stored(&self.store, key).await?.0),
                    None => None,
                };
            }
            match &mut reached {
                Some(reached) if first_txid <= reached.txid + 1 && is_whole(spooled)? => {
                    self.ship(spooled, None).await?;
                    reached.txid = reached.txid.max(last_txid);
                }
                _ => {
                    let path = spooled.path.display();
                    tracing::warn!(key = %spooled.key, %path, "a spooled segment can't be used and is discarded");
                    self.discard(spooled)?;
                }
            }
        }
        Ok(())
    }

    /// Puts a segment, for as long as it takes.
    async fn ship(&self, spooled: &Spooled, claimed: Option<&Claimed>) -> Result<(), ShipError> {
        let key = spooled.key.to_string();
        let is_conditional = claimed.is_none_or(|claimed| claimed.has_conditional_puts);
        let mut mode = if is_conditional { PutMode::IfAbsent } else { PutMode::Overwrite };
        let (mut complaint, mut attempts) = (self.complaint(), self.attempts());
        loop {
            attempts.begin();
            // The file that was checked is stored, wherever its path leads to by then.
            let put = match spooled.open() {
                Ok(file) => put_open_file(&self.store, &key, file, mode).await,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(key, %error, "a spooled segment is not the one that its name says; it is not stored");
                    return Err(ShipError::Spool(error.to_string()));
                }
                Err(error) => Err(unreadable(spooled)(error)),
            };
            match put {
                Ok(_) => break,
                // A store without conditions; what an earlier run left is shipped before a claim tells us.
                Err(error) if error.kind == StoreErrorKind::NotSupported && mode == PutMode::IfAbsent => {
                    mode = PutMode::Overwrite;
                    continue;
                }
                Err(error) if error.kind == StoreErrorKind::AlreadyExists => match self.is_mine(spooled, &key).await {
                    Ok(true) => break,
                    Ok(false) => {
                        self.check_successor(claimed).await?;
                        return Err(ShipError::Foreign { location: self.store.location(), key });
                    }
                    Err(error) => complaint.hear(&error),
                },
                Err(error) if error.kind == StoreErrorKind::Other && !spooled.path.exists() => {
                    return Err(ShipError::Spool(format!("{} is gone", spooled.path.display())));
                }
                Err(error) => complaint.hear(&error),
            }
            attempts.pause().await;
        }
        tracing::debug!(key, len_bytes = spooled.len_bytes, "confirmed");
        let kept = self.spool.keep(spooled).map_err(|error| ShipError::Spool(error.to_string()))?;
        self.note_gone(spooled);
        // At a stop nobody merges any more.
        self.kept.send(kept).ok();
        Ok(())
    }

    /// A put whose answer was lost left our own bytes.
    async fn is_mine(&self, spooled: &Spooled, key: &str) -> Result<bool, StoreError> {
        let stored = match self.store.get(key, spooled.len_bytes).await {
            Err(error) if error.kind == StoreErrorKind::WrongSize => return Ok(false),
            other => other?,
        };
        // What can't be read says nothing of whose the object is.
        let local = tokio::fs::read(&spooled.path).await.map_err(unreadable(spooled))?;
        Ok(local == stored)
    }

    fn discard(&self, spooled: &Spooled) -> Result<(), ShipError> {
        spool::remove(&spooled.path).map_err(|error| ShipError::Spool(error.to_string()))?;
        self.note_gone(spooled);
        Ok(())
    }

    /// It does not wait any more.
    fn note_gone(&self, spooled: &Spooled) {
        let less = |waiting: u64| Some(waiting.saturating_sub(spooled.disk_bytes()));
        self.progress.waiting_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
        self.progress.board.note_waiting(self.progress.waiting_bytes.load(Ordering::Relaxed));
    }

    fn note_confirmed(&self, spooled: &Spooled) {
        let Span { epoch, last_txid, time_ms, .. } = spooled.key.0;
        let state = State { position: Position { epoch, txid: last_txid }, time_ms };
        self.progress.board.note_confirmed(state, spooled.len_bytes);
        self.progress.confirmed.send_replace(last_txid);
    }

    fn complaint(&self) -> Complaint {
        Complaint { clock: self.clock.clone(), board: self.progress.board.clone(), last: None }
    }

    fn attempts(&self) -> Attempts {
        Attempts { waits: self.progress.board.retry_signal().waits(), failures: 0 }
    }

    async fn check_successor(&self, claimed: Option<&Claimed>) -> Result<(), ShipError> {
        let Some(claimed) = claimed else { return Ok(()) };
        self.end_if_replaced(self.successor(claimed.record.epoch).await)
    }

    async fn check_replaced_by(&self, epoch: u32) -> Result<(), ShipError> {
        let record = read_record(&self.store, &EpochKey { epoch, writer: None }).await;
        self.end_if_replaced(record.map(Some))
    }

    fn end_if_replaced(&self, successor: Result<Option<EpochRecord>, ClaimError>) -> Result<(), ShipError> {
        match successor {
            Ok(None) => Ok(()),
            Ok(Some(successor)) => Err(ShipError::Replaced {
                location: self.store.location(),
                host: successor.host,
                epoch: successor.epoch,
                claimed_ms: successor.claimed_ms,
            }),
            // At the next look it will answer.
            Err(ClaimError::Store(error)) => {
                tracing::debug!(%error, "could not look for another writer");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The record of the newest epoch after this one.
    async fn successor(&self, epoch: u32) -> Result<Option<EpochRecord>, ClaimError> {
        let newer = list_claims(&self.store, Some(epoch)).await?;
        match records(&newer).next_back() {
            Some(newest) => read_record(&self.store, newest).await.map(Some),
            None => Ok(None),
        }
    }
}

/// A file that can't be read just now is neither whole nor damaged: it is asked again, as a store is.
fn is_whole(spooled: &Spooled) -> Result<bool, ShipError> {
    spooled.is_whole().map_err(unreadable(spooled)).map_err(|error| ClaimError::Store(error).into())
}

fn unreadable(spooled: &Spooled) -> impl FnOnce(io::Error) -> StoreError {
    move |error| StoreError {
        kind: StoreErrorKind::Other,
        operation: "read",
        location: spooled.path.display().to_string(),
        key: spooled.key.to_string(),
        message: error.to_string(),
    }
}

/// Says what a person should know of the store, in the log and in the status: what a claim found out by the way, and, with a
/// listing, what the store's clock shows.
async fn look_at_store(store: SharedStore, clock: Arc<dyn Clock>, board: Arc<Board>, claimed: Claimed) {
    let weight = if claimed.has_conditional_puts { Weight::Good } else { Weight::Note };
    let mut findings = vec![Finding::new("conditional put", weight, CONDITIONS_IGNORED)];
    match claim_stored_ms(&store, claimed.record.epoch).await {
        Ok(Some(stored_ms)) => findings.push(clock_finding(clock.now_ms(), stored_ms)),
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "the store's clock could not be looked at"),
    }
    for finding in findings.iter().filter(|finding| board.note_store(finding)) {
        let (replica, what, text) = (store.location(), finding.what, &finding.text);
        match finding.weight {
            Weight::Bad => tracing::warn!(replica, "{what}: {text}"),
            _ => tracing::info!(replica, "{what}: {text}"),
        }
    }
}

/// Stores a snapshot. It becomes visible only when every transaction it needs is confirmed: from then on the database can
/// be restored.
async fn store_snapshot(
    store: SharedStore,
    key: SnapshotKey,
    database_len_bytes: u64,
    mut pieces: mpsc::Receiver<Piece>,
    mut confirmed: watch::Receiver<u64>,
) -> Result<State, StoreError> {
    let given_up = || StoreError {
        kind: StoreErrorKind::Other,
        operation: "put",
        location: store.location(),
        key: key.to_string(),
        message: "the snapshot was given up before it was whole".into(),
    };
    let mut upload = Upload::new(store.clone(), key.to_string(), database_len_bytes);
    let written = loop {
        match pieces.recv().await {
            Some(Piece::Bytes(bytes)) => {
                if let Err(error) = upload.write(&bytes).await {
                    break Err(error);
                }
            }
            Some(Piece::End(Finished { bytes, info, .. })) => {
                let wanted = info.last_txid;
                let is_covered = confirmed.wait_for(|&confirmed| confirmed >= wanted).await.is_ok();
                break if is_covered { upload.write(&bytes).await.map(|()| info) } else { Err(given_up()) };
            }
            None => break Err(given_up()),
        }
    };
    match written {
        Ok(info) => {
            let len_bytes = upload.finish(PutMode::Overwrite).await?;
            tracing::info!(%key, len_bytes, txid = info.last_txid, "snapshot confirmed");
            let position = Position { epoch: key.epoch, txid: info.last_txid };
            Ok(State { position, time_ms: info.time_ms })
        }
        Err(error) => {
            // The first error is the one that counts.
            upload.abort().await.ok();
            Err(error)
        }
    }
}

/// The attempts at one operation, which is repeated until it succeeds.
struct Attempts {
    waits: RetryWaits,
    /// Since the first attempt, or since the stop.
    failures: u32,
}

impl Attempts {
    fn begin(&mut self) {
        self.waits.begin_attempt();
    }

    /// Waits until the next attempt is due, or asked for.
    async fn pause(&mut self) {
        let wait = FOREVER.wait(self.failures);
        tracing::debug!(wait_ms = wait.as_millis() as u64, "waiting to ask the store again");
        self.failures = match self.waits.pause(wait).await {
            // Little time is left: the waits begin short again.
            WaitEnd::Stopped => 0,
            WaitEnd::Elapsed | WaitEnd::Requested => self.failures.saturating_add(1),
        };
    }
}

/// Says that the store fails, at once and then at a decent pace.
struct Complaint {
    clock: Arc<dyn Clock>,
    board: Arc<Board>,
    last: Option<Duration>,
}

impl Complaint {
    fn hear(&mut self, error: &StoreError) {
        self.board.note_error(error.to_string());
        let now = self.clock.monotonic();
        if self.last.is_none_or(|last| now.saturating_sub(last) >= COMPLAINT_INTERVAL) {
            self.last = Some(now);
            if error.is_retryable() {
                tracing::warn!(%error, "the store fails; trying again");
            } else {
                tracing::error!(%error, "the store refuses; trying again, but somebody should look");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::format::change::Content;
    use crate::format::key::SegmentKey;
    use crate::format::segment::{SegmentWriter, TransactionInfo};
    use crate::store::memory::MemoryStore;

    /// Spools a segment of one transaction.
    fn spooled(spool: &Spool, txid: u64) -> Spooled {
        let file = std::fs::File::create(spool.open_segment_path()).unwrap();
        let mut writer = SegmentWriter::new(file, 512).unwrap();
        let info = TransactionInfo {
            time_ms: txid,
            size_pages: 1,
            schema_cookie: 1,
            fingerprint: None,
            coalesced: false,
            schema_changed: false,
        };
        writer.begin_transaction(&info, &[1]).unwrap();
        writer.push(Content::Image(&[txid as u8; 512])).unwrap();
        let (_, key) = writer.finish(1, txid).unwrap();
        spool.accept(key).unwrap()
    }

    #[tokio::test]
    async fn segment_under_wrong_name_is_not_stored_or_confirmed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("kept")).unwrap();
        let spool = Spool::new(directory.path().to_owned());
        let [right, wrong] = [2, 3].map(|txid| spooled(&spool, txid));
        std::fs::copy(&right.path, &wrong.path).unwrap();
        let store: SharedStore = Arc::new(MemoryStore::new());
        let progress = Arc::new(Progress::default());
        let (kept, mut kept_queue) = mpsc::unbounded_channel();
        let shipper = Shipper {
            store: store.clone(),
            mailbox: Arc::default(),
            progress: progress.clone(),
            clock: SystemClock::shared(),
            spool: spool.clone(),
            kept,
        };
        let (jobs, queue) = mpsc::unbounded_channel();
        jobs.send(Job::Ship(right.clone())).unwrap();
        jobs.send(Job::Ship(wrong.clone())).unwrap();
        drop(jobs);
        let ended = shipper.run(queue).await;
        let named = |what: &str| what.contains(&wrong.path.display().to_string());
        assert!(matches!(&ended, Err(ShipError::Spool(what)) if named(what)), "{ended:?}");
        let stored = store.list("", None).await.unwrap();
        let stored: Vec<&str> = stored.iter().map(|object| object.key.as_str()).collect();
        assert_eq!(stored, [right.key.to_string()]);
        assert_eq!(*progress.confirmed.borrow(), 2);
        assert_eq!(kept_queue.recv().await.map(|kept| kept.key), Some(right.key));
        assert!(kept_queue.recv().await.is_none() && wrong.path.exists());
        let names = |spooled: &[Spooled]| -> Vec<SegmentKey> { spooled.iter().map(|it| it.key).collect() };
        assert_eq!(names(&spool.waiting().unwrap()), [wrong.key]);
    }
}
