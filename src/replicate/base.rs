//! What a snapshot is based on: the newest one in storage. Extents that stand there already are not stored again, whoever
//! wrote them and on whatever line: what counts is what they hold.

use std::collections::{BTreeMap, HashSet};
use std::io;

use super::control::State;
use super::ledger::Ledger;
use crate::format::key::{SNAPSHOTS_PREFIX, SnapshotKey};
use crate::format::snapshot::{ExtentRecord, SnapshotFooter, SnapshotIndex, SnapshotInfo, extent_hash};
use crate::format::{FOOTER_LEN, FormatError, Position, extent_pages};
use crate::store::{SharedStore, StoreError};

/// An index refers to no more objects than this for long: a restore reads from all of them.
const MOST_SOURCES: usize = 32;
/// When there are more, so many are kept, so that not every snapshot has to give one up.
const SOURCES_KEPT: usize = 16;

/// The newest snapshot in storage, and the snapshot objects that are there.
#[derive(Debug, Clone)]
pub struct Base {
    info: SnapshotInfo,
    page_size: u32,
    index: SnapshotIndex,
    /// Length in bytes of each source's object; `None` for one that is gone.
    source_len_bytes: Vec<Option<u64>>,
}

impl Base {
    /// A base from its footer, its index and the lengths of the objects that its sources are.
    #[must_use]
    pub fn new(footer: &SnapshotFooter, index: SnapshotIndex, stored: &BTreeMap<SnapshotKey, u64>) -> Self {
        let source_len_bytes = index.sources.iter().map(|key| stored.get(key).copied()).collect();
        Self { info: footer.info, page_size: footer.page_size, index, source_len_bytes }
    }

    /// Reads the newest snapshot's index. `None` when there is none, or when it is damaged: then the next snapshot does without.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn load(store: &SharedStore) -> Result<Option<Self>, StoreError> {
        let listed = store.list(SNAPSHOTS_PREFIX, None).await?;
        let stored: BTreeMap<SnapshotKey, u64> =
            listed.iter().filter_map(|object| Some((SnapshotKey::parse(&object.key)?, object.len_bytes))).collect();
        let Some((key, &len_bytes)) = stored.last_key_value() else { return Ok(None) };
        match read_index(store, key, len_bytes).await? {
            Ok((footer, index)) => Ok(Some(Self::new(&footer, index, &stored))),
            Err(error) => {
                tracing::error!(%key, %error, "the newest snapshot is damaged; the next one does without it");
                Ok(None)
            }
        }
    }

    /// Where extent `index` is, if it is stored with this content.
    #[must_use]
    pub fn find(&self, index: u32, page_count: u32, content_hash: u64) -> Option<(SnapshotKey, &ExtentRecord)> {
        let extent = self.index.extents.get(index as usize)?;
        let is_same = (extent.page_count, extent.content_hash) == (page_count, content_hash);
        let source = *self.index.sources.get(extent.source as usize)?;
        is_same.then_some((source, extent))
    }

    /// The sources that the next snapshot must not refer to: those that are gone; those of which less than half is still
    /// needed, so that they can go; and, of too many, those with least in them. What is needed is told by `ledger`; if that
    /// does not know all pages yet, only the first rule counts.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn retired_sources(&self, ledger: &Ledger) -> io::Result<HashSet<SnapshotKey>> {
        let sources = || self.index.sources.iter().zip(&self.source_len_bytes);
        let mut retired: HashSet<SnapshotKey> =
            sources().filter(|(_, len_bytes)| len_bytes.is_none()).map(|(key, _)| *key).collect();
        if ledger.fingerprint().is_none() {
            return Ok(retired);
        }
        let mut needed_bytes: BTreeMap<SnapshotKey, u64> = BTreeMap::new();
        for (index, extent) in (0..).zip(&self.index.extents) {
            let (first_page, page_count) = extent_pages(index, ledger.size_pages(), self.page_size);
            if page_count == extent.page_count
                && extent_hash(ledger.hashes(first_page, page_count)?) == extent.content_hash
            {
                let source = self.index.sources[extent.source as usize];
                *needed_bytes.entry(source).or_default() += u64::from(extent.compressed_len);
            }
        }
        for (key, len_bytes) in sources() {
            let needed = needed_bytes.get(key).copied().unwrap_or(0);
            if needed.saturating_mul(2) < len_bytes.unwrap_or(u64::MAX) {
                retired.insert(*key);
            }
        }
        retired.extend(surplus(needed_bytes.into_iter().filter(|(key, _)| !retired.contains(key)).collect()));
        Ok(retired)
    }

    /// The snapshot's own key, the state that it serves, and the length of all its extents in bytes.
    #[must_use]
    pub fn summary(&self) -> (SnapshotKey, State, u64) {
        let SnapshotInfo { key, last_txid, time_ms, .. } = self.info;
        let extents_len_bytes = self.index.extents.iter().map(|extent| u64::from(extent.compressed_len)).sum();
        (key, State { position: Position { epoch: key.epoch, txid: last_txid }, time_ms }, extents_len_bytes)
    }

    /// Whether its extents are those of databases with this page size.
    #[must_use]
    pub fn has_page_size(&self, page_size: u32) -> bool {
        self.page_size == page_size
    }
}

/// Of too many sources those with least in them.
fn surplus(mut sources: Vec<(SnapshotKey, u64)>) -> Vec<SnapshotKey> {
    if sources.len() <= MOST_SOURCES {
        return Vec::new();
    }
    sources.sort_by_key(|&(_, needed_bytes)| std::cmp::Reverse(needed_bytes));
    sources.drain(SOURCES_KEPT..).map(|(key, _)| key).collect()
}

/// The outer result is the store's, the inner one what was found there.
async fn read_index(
    store: &SharedStore,
    key: &SnapshotKey,
    len_bytes: u64,
) -> Result<Result<(SnapshotFooter, SnapshotIndex), FormatError>, StoreError> {
    let name = key.to_string();
    let Some(footer_at) = len_bytes.checked_sub(FOOTER_LEN as u64) else {
        return Ok(Err(FormatError::TooShort { what: "the snapshot" }));
    };
    let tail = store.get_range(&name, footer_at, FOOTER_LEN as u64).await?;
    let footer = match SnapshotFooter::decode(&tail, len_bytes) {
        Ok(footer) if footer.info.key == *key => footer,
        Ok(_) => return Ok(Err(FormatError::Inconsistent("it is another snapshot".into()))),
        Err(error) => return Ok(Err(error)),
    };
    let index = store.get_range(&name, footer.index_offset, footer.index_and_sources_len()).await?;
    Ok(footer.decode_index(&index).map(|index| (footer, index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(txid: u64) -> SnapshotKey {
        SnapshotKey { epoch: 1, txid, time_ms: txid }
    }

    #[test]
    fn of_too_many_sources_the_small_ones_go() {
        let few: Vec<(SnapshotKey, u64)> = (0..32).map(|number| (key(number), number)).collect();
        assert_eq!(surplus(few), []);
        let many: Vec<(SnapshotKey, u64)> = (0..33).map(|number| (key(number), number)).collect();
        let mut gone = surplus(many);
        gone.sort();
        assert_eq!(gone, (0..17).map(key).collect::<Vec<_>>());
    }
}
