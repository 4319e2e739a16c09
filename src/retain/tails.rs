//! The ends of all snapshots, each read once.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt};

use crate::format::key::SnapshotKey;
use crate::restore::RestoreError;
use crate::restore::history::{History, Stored};
use crate::restore::tail::{SnapshotTail, read_snapshot_tail};
use crate::store::SharedStore;

/// So many are read at a time.
const TAILS_IN_FLIGHT: usize = 8;

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// What it is of, and what it needs.
    Whole(SnapshotTail),
    /// It can't be read: in words.
    Damaged(String),
}

/// What snapshots are of. Objects never change, so whoever keeps this reads each once.
#[derive(Debug, Clone, Default)]
pub struct TailCache {
    known: BTreeMap<SnapshotKey, (u64, SnapshotTail)>,
}

impl TailCache {
    /// The ends of all snapshots of `history`, read where they are not known. Those that are gone are forgotten.
    ///
    /// # Errors
    /// When the store fails. One that is damaged is no error.
    pub async fn read(
        &mut self,
        store: &SharedStore,
        history: &History,
    ) -> Result<BTreeMap<SnapshotKey, Tail>, RestoreError> {
        let stored = || history.epochs.values().flat_map(|epoch| &epoch.snapshots).copied();
        let unknown = stored().filter(|stored| !self.knows(stored)).collect::<Vec<_>>();
        let read = |stored: Stored<SnapshotKey>| async move {
            (stored, read_snapshot_tail(store, &history.location, &stored).await)
        };
        let mut answers = stream::iter(unknown).map(read).buffered(TAILS_IN_FLIGHT);
        let mut tails = BTreeMap::new();
        while let Some((stored, answer)) = answers.next().await {
            match answer {
                Ok(tail) => {
                    self.known.insert(stored.key, (stored.len_bytes, tail));
                }
                // Not remembered: it may have been the network's doing.
                Err(damage @ (RestoreError::Damaged { .. } | RestoreError::NewerFormat { .. })) => {
                    tails.insert(stored.key, Tail::Damaged(damage.to_string()));
                }
                Err(error) => return Err(error),
            }
        }
        for stored in stored() {
            if let Some((_, tail)) = self.known.get(&stored.key) {
                tails.entry(stored.key).or_insert_with(|| Tail::Whole(tail.clone()));
            }
        }
        self.known.retain(|key, _| matches!(tails.get(key), Some(Tail::Whole(_))));
        Ok(tails)
    }

    fn knows(&self, stored: &Stored<SnapshotKey>) -> bool {
        self.known.get(&stored.key).is_some_and(|(len_bytes, _)| *len_bytes == stored.len_bytes)
    }
}
