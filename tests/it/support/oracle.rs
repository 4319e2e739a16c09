//! A replica whose every state is known: made with the format's own writers from a database that exists only as pages in
//! memory. It knows nothing of how a restore plans, so that the two can be held against each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use waltrail::format::change::Content;
use waltrail::format::key::{EpochKey, MARKER_KEY, SegmentKey, SnapshotKey};
use waltrail::format::record::{EpochRecord, ReplicaMarker};
use waltrail::format::segment::{SegmentWriter, TransactionInfo};
use waltrail::format::snapshot::{SnapshotFooter, SnapshotIndex, SnapshotInfo, SnapshotWriter, content_hash};
use waltrail::format::{FOOTER_LEN, FORMAT_VERSION, Position, extent_count, extent_pages, page_hash};
use waltrail::store::memory::MemoryStore;
use waltrail::store::{PutMode, SharedStore};

/// A small generator of numbers that a seed replays.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 8) % bound.max(1)
    }
}

/// A database at one moment.
#[derive(Debug, Clone)]
pub struct State {
    pub pages: Vec<Arc<[u8]>>,
    pub time_ms: u64,
}

impl State {
    pub fn bytes(&self) -> Vec<u8> {
        self.pages.concat()
    }

    fn size_pages(&self) -> u32 {
        self.pages.len() as u32
    }

    fn fingerprint(&self) -> u64 {
        (1..).zip(&self.pages).fold(0, |sum, (number, page)| sum ^ page_hash(number, page))
    }
}

type Pending = (TransactionInfo, BTreeMap<u32, Written>);

/// A page that a transaction wrote.
#[derive(Debug, Clone)]
struct Written {
    image: Vec<u8>,
    /// What it found, if a segment is to have only what was changed.
    former: Option<Arc<[u8]>>,
}

/// The replica, and what it must give back.
pub struct Oracle {
    pub store: SharedStore,
    /// The same, for its clock.
    pub memory: Arc<MemoryStore>,
    pub page_size: u32,
    pub numbers: Numbers,
    /// Pages that don't compress make segments large.
    pub is_noise: bool,
    /// Most pages that a transaction changes or adds.
    pub most_pages: u64,
    /// Fewest pages that the database may have.
    pub least_pages: u64,
    /// Most pages that the database may have.
    pub size_limit: u64,
    /// Whether pages that are added are sometimes left out of the transaction: they are zeros, whatever stood there before.
    pub leaves_holes: bool,
    /// Off while an epoch's first snapshot is read.
    pub knows_fingerprints: bool,
    pub records: BTreeMap<u32, EpochRecord>,
    pub states: BTreeMap<Position, State>,
    /// Of each snapshot: the first state it was read at, and the last transaction.
    pub snapshots: Vec<(Position, u64)>,
    /// All transactions, for segments that are merged later.
    transactions: BTreeMap<Position, Pending>,
    pending: Vec<Pending>,
    current: State,
    position: Position,
}

impl Oracle {
    pub async fn new(page_size: u32, seed: u64) -> Self {
        let memory = Arc::new(MemoryStore::new());
        let store: SharedStore = memory.clone();
        let marker = ReplicaMarker { format: FORMAT_VERSION, replica: "5".repeat(32) };
        store.put(MARKER_KEY, Bytes::from(marker.encode()), PutMode::IfAbsent).await.unwrap();
        Self {
            store,
            memory,
            page_size,
            numbers: Numbers::new(seed),
            is_noise: false,
            most_pages: 6,
            least_pages: 1,
            size_limit: (3 * 256 * 1024 / u64::from(page_size)).clamp(8, 150),
            leaves_holes: false,
            knows_fingerprints: true,
            records: BTreeMap::new(),
            states: BTreeMap::new(),
            snapshots: Vec::new(),
            transactions: BTreeMap::new(),
            pending: Vec::new(),
            current: State { pages: Vec::new(), time_ms: 1_790_000_000_000 },
            position: Position { epoch: 0, txid: 0 },
        }
    }

    /// The last state.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Claims the next epoch. If it does not continue its parent, unseen changes were made to the database.
    pub async fn begin(&mut self, parent: Option<Position>, continues: bool) {
        assert!(self.pending.is_empty());
        let epoch = self.records.len() as u32 + 1;
        let first_txid = parent.map_or(1, |parent| parent.txid + 1);
        let record = EpochRecord {
            format: FORMAT_VERSION,
            epoch,
            writer: format!("{epoch:032x}"),
            claimed_ms: self.current.time_ms,
            first_txid,
            continues,
            parent,
            program: "oracle".into(),
            host: "test".into(),
        };
        let key = EpochKey { epoch, writer: None }.to_string();
        self.store.put(&key, Bytes::from(record.encode()), PutMode::IfAbsent).await.unwrap();
        self.records.insert(epoch, record);
        let now_ms = self.current.time_ms;
        if let Some(parent) = parent {
            // An epoch without transactions of its own ends with a state of its parent.
            let state = self.line(parent.epoch)[&parent.txid].0;
            self.current = State { time_ms: now_ms, ..self.states[&state].clone() };
        }
        self.position = Position { epoch, txid: first_txid - 1 };
        if !continues {
            for _ in 0..3 {
                self.change();
            }
            self.current.time_ms += 1000;
            self.position.txid = first_txid;
            self.states.insert(self.position, self.current.clone());
        }
    }

    fn page(&mut self) -> Vec<u8> {
        let len = self.page_size as usize / 8;
        let value = self.numbers.next();
        let numbers = &mut self.numbers;
        let is_noise = self.is_noise;
        (0..len).flat_map(|_| if is_noise { numbers.next() } else { value }.to_le_bytes()).collect()
    }

    /// A page with a few other bytes, or quite another one.
    fn page_after(&mut self, former: &[u8]) -> Vec<u8> {
        if self.numbers.below(3) == 0 {
            return self.page();
        }
        let mut page = former.to_vec();
        for _ in 0..self.numbers.below(4) {
            let at = self.numbers.below(page.len() as u64 - 8) as usize;
            page[at..at + 8].copy_from_slice(&self.numbers.next().to_le_bytes());
        }
        page
    }

    /// Changes pages, sometimes the size; gives the pages that were written. Pages that are added are always written, as SQLite
    /// does, unless the oracle leaves holes.
    fn change(&mut self) -> BTreeMap<u32, Written> {
        let old_size = self.current.pages.len() as u64;
        let size = match self.numbers.below(8) {
            0 => 1 + self.numbers.below(old_size.max(1)),
            1..=3 => (old_size + self.numbers.below(self.most_pages)).min(self.size_limit),
            _ => old_size,
        };
        let size = size.max(self.least_pages);
        let mut written: BTreeMap<u32, Vec<u8>> =
            (old_size + 1..=size).map(|number| (number as u32, self.page())).collect();
        if self.leaves_holes {
            written.retain(|_, page| page[0] % 3 == 0);
        }
        let found = self.current.pages.clone();
        for _ in 0..=self.numbers.below(self.most_pages) {
            let number = 1 + self.numbers.below(size);
            let page = match found.get(number as usize - 1) {
                Some(former) => self.page_after(former),
                None => self.page(),
            };
            written.insert(number as u32, page);
        }
        self.current.pages.resize(size as usize, vec![0; self.page_size as usize].into());
        for (&number, page) in &written {
            self.current.pages[number as usize - 1] = page.as_slice().into();
        }
        let with_former = |(number, image): (u32, Vec<u8>)| {
            let former = found.get(number as usize - 1).filter(|_| self.numbers.below(4) > 0).cloned();
            (number, Written { image, former })
        };
        written.into_iter().map(with_former).collect()
    }

    /// One transaction, sometimes in the same millisecond as the one before.
    pub fn commit(&mut self) {
        let pages = self.change();
        self.current.time_ms += self.numbers.below(3) * 10;
        self.position.txid += 1;
        self.states.insert(self.position, self.current.clone());
        let info = TransactionInfo {
            time_ms: self.current.time_ms,
            size_pages: self.current.size_pages(),
            schema_cookie: 1,
            fingerprint: self.knows_fingerprints.then(|| self.current.fingerprint()),
            coalesced: false,
            schema_changed: false,
        };
        self.transactions.insert(self.position, (info, pages.clone()));
        self.pending.push((info, pages));
    }

    fn segment(&self, epoch: u32, first_txid: u64, transactions: &[Pending]) -> (SegmentKey, Vec<u8>) {
        let mut writer = SegmentWriter::new(Vec::new(), self.page_size).unwrap();
        for (info, pages) in transactions {
            writer.begin_transaction(info, &pages.keys().copied().collect::<Vec<_>>()).unwrap();
            for page in pages.values() {
                writer.push(Content::of(&page.image, page.former.as_deref(), &mut Vec::new())).unwrap();
            }
        }
        let (bytes, key) = writer.finish(epoch, first_txid).unwrap();
        (key, bytes)
    }

    /// Stores what was committed since the last time as one segment; gives its key.
    pub async fn cut(&mut self) -> SegmentKey {
        let pending = self.pending.clone();
        let key = self.cut_part(&pending, 0).await;
        self.pending.clear();
        key
    }

    /// Stores the same transactions twice: once in small segments that overlap, once in one that covers them.
    pub async fn cut_overlapping(&mut self) {
        let pending = self.pending.clone();
        for (index, two) in pending.windows(2).enumerate() {
            self.cut_part(two, index).await;
        }
        self.cut().await;
    }

    async fn cut_part(&self, transactions: &[Pending], skipped: usize) -> SegmentKey {
        let first_txid = self.position.txid + 1 - (self.pending.len() - skipped) as u64;
        let (key, bytes) = self.segment(self.position.epoch, first_txid, transactions);
        self.store.put(&key.to_string(), Bytes::from(bytes), PutMode::IfAbsent).await.unwrap();
        key
    }

    /// Stores transactions of an epoch, which are stored already, once more in one segment.
    pub async fn merge(&mut self, epoch: u32, first_txid: u64, last_txid: u64) -> SegmentKey {
        let range = Position { epoch, txid: first_txid }..=Position { epoch, txid: last_txid };
        let transactions: Vec<Pending> = self.transactions.range(range).map(|(_, pending)| pending.clone()).collect();
        let (key, bytes) = self.segment(epoch, first_txid, &transactions);
        self.store.put(&key.to_string(), Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
        key
    }

    /// Its first state is of this time, in milliseconds since 1970.
    pub fn begin_at(&mut self, ms: u64) {
        assert!(self.records.is_empty());
        self.current.time_ms = ms;
        self.memory.set_now_ms(ms);
    }

    /// Nothing happens for a while. What is put afterwards is stored then.
    pub fn pass_time(&mut self, ms: u64) {
        self.current.time_ms += ms;
        self.memory.set_now_ms(self.current.time_ms);
    }

    pub fn now_ms(&self) -> u64 {
        self.current.time_ms
    }

    pub async fn commit_and_cut(&mut self, transactions: usize) -> SegmentKey {
        for _ in 0..transactions {
            self.commit();
        }
        self.cut().await
    }

    /// Stores a snapshot of the current epoch whose extents were read at states from `first_txid` to `last_txid`.
    pub async fn snapshot(&mut self, first_txid: u64, last_txid: u64) -> SnapshotKey {
        self.snapshot_on(None, first_txid, last_txid).await
    }

    /// The same; extents that are in the objects of an older snapshot already are not stored again.
    pub async fn snapshot_on(&mut self, base: Option<SnapshotKey>, first_txid: u64, last_txid: u64) -> SnapshotKey {
        let base = match base {
            Some(base) => Some(self.index(base).await),
            None => None,
        };
        let at = |txid| Position { txid, ..self.position };
        let last = self.states[&at(last_txid)].clone();
        let key =
            SnapshotKey { epoch: self.position.epoch, txid: first_txid, time_ms: self.states[&at(first_txid)].time_ms };
        let (mut writer, mut bytes) = SnapshotWriter::new(self.page_size);
        let mut txid = first_txid;
        for index in 0..extent_count(last.size_pages(), self.page_size) {
            let most = last_txid - txid;
            txid += self.numbers.below(most + 1);
            // An extent that is not there yet can only be read later.
            while extent_pages(index, self.states[&at(txid)].size_pages(), self.page_size).1 == 0 {
                txid += 1;
            }
            let state = &self.states[&at(txid)];
            let (first_page, count) = extent_pages(index, state.size_pages(), self.page_size);
            let content = state.pages[first_page as usize - 1..][..count as usize].concat();
            let hash = content_hash(index, &content, self.page_size);
            let known = base.as_ref().and_then(|base| Some((base, base.extents.get(index as usize)?)));
            match known.filter(|(_, known)| known.content_hash == hash && known.page_count == count) {
                Some((base, known)) => {
                    writer.refer_to_extent(index, txid, base.sources[known.source as usize], known).unwrap();
                }
                None => bytes.extend(writer.encode_extent(index, txid, &content).unwrap()),
            }
        }
        let info = SnapshotInfo {
            key,
            last_txid,
            time_ms: last.time_ms,
            size_pages: last.size_pages(),
            schema_cookie: 1,
            fingerprint: last.fingerprint(),
        };
        bytes.extend(writer.finish(&info).unwrap());
        self.store.put(&key.to_string(), Bytes::from(bytes), PutMode::IfAbsent).await.unwrap();
        self.snapshots.push((at(first_txid), last_txid));
        key
    }

    async fn index(&self, key: SnapshotKey) -> SnapshotIndex {
        let bytes = self.store.get(&key.to_string(), u64::MAX).await.unwrap();
        let footer = SnapshotFooter::decode(&bytes, bytes.len() as u64).unwrap();
        footer.decode_index(&bytes[footer.index_offset as usize..bytes.len() - FOOTER_LEN]).unwrap()
    }

    /// An epoch that begins with a database as it was found, whose first snapshot is read while transactions go on.
    pub async fn begin_with_snapshot(&mut self, parent: Option<Position>, transactions_meanwhile: u64) {
        self.begin(parent, false).await;
        let first_txid = self.position.txid;
        self.knows_fingerprints = false;
        for _ in 0..transactions_meanwhile {
            self.commit();
        }
        self.knows_fingerprints = true;
        if transactions_meanwhile > 0 {
            self.cut().await;
        }
        self.snapshot(first_txid, self.position.txid).await;
    }

    /// The states on the line that ends in `epoch`: by transaction, with the first transaction of the run each belongs to.
    pub fn line(&self, epoch: u32) -> BTreeMap<u64, (Position, u64)> {
        let mut line: BTreeMap<u64, Position> = BTreeMap::new();
        let mut starts = Vec::new();
        let (mut epoch, mut cap) = (epoch, u64::MAX);
        loop {
            let states = self.states.keys().filter(|position| position.epoch == epoch && position.txid <= cap);
            line.extend(states.map(|position| (position.txid, *position)));
            let record = &self.records[&epoch];
            if !record.continues {
                starts.push(record.first_txid);
            }
            let Some(parent) = record.parent else { break };
            (epoch, cap) = (parent.epoch, parent.txid);
        }
        let run_of = |txid: u64| starts.iter().copied().filter(|&start| start <= txid).max().unwrap_or(0);
        line.into_iter().map(|(txid, position)| (txid, (position, run_of(txid)))).collect()
    }

    /// Whether the state after `txid` can be restored on the line that ends in `epoch`: a snapshot of its run serves it.
    pub fn is_restorable(&self, epoch: u32, txid: u64) -> bool {
        let line = self.line(epoch);
        let Some(&(_, run)) = line.get(&txid) else { return false };
        self.snapshots.iter().any(|&(first, last_txid)| {
            let last = Position { txid: last_txid, ..first };
            let is_on_line = line.get(&last_txid).is_some_and(|(position, _)| *position == last);
            is_on_line && first.txid >= run && last_txid <= txid
        })
    }

    /// The state that a restore to a time must give: the last one not later or, of a run of which nothing can be restored, the
    /// last one that was known before it; so, too, while its first snapshot was read. When the run's first snapshot is not the
    /// one that it began with, nobody knows what was before that.
    pub fn at_time(&self, epoch: u32, asked_ms: u64) -> Option<u64> {
        let line = self.line(epoch);
        let runs: BTreeSet<u64> = line.values().map(|(_, run)| *run).collect();
        for &run in runs.iter().rev() {
            let of_run = || line.iter().filter(|(_, (_, its_run))| *its_run == run);
            let first = of_run().next().map(|(_, (position, _))| position.epoch)?;
            if self.records[&first].claimed_ms > asked_ms {
                continue;
            }
            let not_later = of_run().rev().find(|(_, (position, _))| self.states[position].time_ms <= asked_ms);
            if let Some((&txid, _)) = not_later
                && self.is_restorable(epoch, txid)
            {
                return Some(txid);
            }
            if self.snapshots_of_run(&line, run).map(|(first, _)| first.txid).min().is_some_and(|first| first > run) {
                return None;
            }
        }
        None
    }

    fn snapshots_of_run<'a>(
        &'a self,
        line: &'a BTreeMap<u64, (Position, u64)>,
        run: u64,
    ) -> impl Iterator<Item = &'a (Position, u64)> {
        self.snapshots.iter().filter(move |(first, last_txid)| {
            let last = Position { txid: *last_txid, ..*first };
            line.get(last_txid) == Some(&(last, run)) && first.txid >= run
        })
    }
}

/// A replica with every kind of epoch: found, continued, found again, forked inside a segment, continued after a fork.
pub async fn all_kinds(page_size: u32, seed: u64) -> Oracle {
    all_kinds_in(Oracle::new(page_size, seed).await).await
}

/// The same in an oracle that is set up otherwise.
pub async fn all_kinds_in(mut oracle: Oracle) -> Oracle {
    oracle.begin_with_snapshot(None, 5).await;
    for transactions in [1, 4, 2] {
        oracle.commit_and_cut(transactions).await;
    }
    // Read before and after the point that a later epoch forks from: of no use on its line.
    oracle.snapshot(8, 11).await;
    let end_of_first = oracle.position();
    // Continued at the end of its parent.
    oracle.begin(Some(end_of_first), true).await;
    oracle.commit_and_cut(3).await;
    for _ in 0..4 {
        oracle.commit();
    }
    oracle.cut_overlapping().await;
    let end_of_second = oracle.position();
    // Found with unseen changes, and no snapshot of it was ever stored.
    oracle.begin(Some(end_of_second), false).await;
    oracle.commit_and_cut(2).await;
    // Found again; snapshot read while it went on.
    oracle.begin_with_snapshot(Some(oracle.position()), 3).await;
    oracle.commit_and_cut(6).await;
    oracle.snapshot(oracle.position().txid - 4, oracle.position().txid - 1).await;
    oracle.commit_and_cut(2).await;
    // A restore went back into the middle of the first epoch's second segment; what was undone stays on its own line.
    oracle.begin(Some(Position { epoch: 1, txid: 9 }), true).await;
    oracle.commit_and_cut(8).await;
    let fork = oracle.position();
    // Forked from the fork, before the end of its only segment, and then found changed.
    oracle.begin(Some(Position { txid: fork.txid - 3, ..fork }), true).await;
    oracle.commit_and_cut(2).await;
    oracle.begin_with_snapshot(Some(oracle.position()), 0).await;
    oracle.commit_and_cut(3).await;
    oracle
}
