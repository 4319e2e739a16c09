//! The task that says every now and then that the daemon is there: without it, a database that nobody writes to can't be told
//! from a daemon that stands still. Off unless it is asked for, because it causes requests when nothing is written.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::claim::{list_claims, records};
use crate::clock::Clock;
use crate::format::FORMAT_VERSION;
use crate::format::key::PRESENCE_KEY;
use crate::format::record::{EpochRecord, PresenceRecord};
use crate::store::{PutMode, SharedStore, StoreError};

/// Says that one database's daemon is there.
pub struct Presence {
    /// The replica.
    pub store: SharedStore,
    /// How often; `None` for never.
    pub interval: Option<Duration>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The epoch that is written, once it is claimed.
    pub claimed: watch::Receiver<Option<EpochRecord>>,
    /// The last transaction that is confirmed.
    pub confirmed: watch::Receiver<u64>,
}

impl Presence {
    /// Says it again and again, until another writer has taken over. That it can't be said is no failure of replication: it is
    /// logged, once until it can be said again.
    pub async fn run(mut self) {
        let Some(interval) = self.interval else { return };
        let mut has_complained = false;
        loop {
            let Ok(claimed) = self.claimed.wait_for(Option::is_some).await.map(|record| record.clone()) else { return };
            let Some(record) = claimed else { return };
            match self.say(&record).await {
                Ok(true) => has_complained = false,
                Ok(false) => {
                    tracing::warn!(
                        replica = self.store.location(),
                        "another writer has taken over; presence is its to tell"
                    );
                    return;
                }
                Err(error) => {
                    if !has_complained {
                        tracing::warn!(%error, "presence could not be told; replication goes on");
                    }
                    has_complained = true;
                }
            }
            tokio::time::sleep(interval).await;
        }
    }

    /// Whether this is still the newest writer: then it was said.
    async fn say(&self, record: &EpochRecord) -> Result<bool, StoreError> {
        // A daemon that has nothing to ship would not notice otherwise that another one has.
        if records(&list_claims(&self.store, Some(record.epoch)).await?).next().is_some() {
            return Ok(false);
        }
        let presence = PresenceRecord {
            format: FORMAT_VERSION,
            epoch: record.epoch,
            writer: record.writer.clone(),
            txid: *self.confirmed.borrow(),
            time_ms: self.clock.now_ms(),
            program: concat!("waltrail ", env!("CARGO_PKG_VERSION")).into(),
        };
        self.store.put(PRESENCE_KEY, Bytes::from(presence.encode()), PutMode::Overwrite).await?;
        Ok(true)
    }
}
