//! From a database's configuration to what replicates it.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::clock::Clock;
use crate::config::DatabaseConfig;
use crate::config::replica_url::Stores;
use crate::health::drill::Driller;
use crate::health::heartbeat::beat;
use crate::replicate::database::{DatabaseSettings, KEPT_SHARE};
use crate::replicate::merge::MergeSettings;
use crate::replicate::status::Board;
use crate::replicate::{Companions, Job, Order};
use crate::store::retry::{RetryPolicy, Retrying};

/// A drill takes a processor, and room for a database.
const DRILLS_AT_A_TIME: usize = 1;
/// Of all databases together.
const REQUESTS_AT_A_TIME: usize = 32;
/// Between these, the daemon's own loops ask again, without end.
const QUICK: RetryPolicy = RetryPolicy { attempts: 3, base_ms: 100, max_ms: 2000 };

/// Makes jobs; knows what those of one process share.
pub struct JobMaker {
    stores: Stores,
    drills: Arc<Semaphore>,
    clock: Arc<dyn Clock>,
}

impl JobMaker {
    /// For one process.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { stores: Stores::new(REQUESTS_AT_A_TIME), drills: Arc::new(Semaphore::new(DRILLS_AT_A_TIME)), clock }
    }

    /// The order to replicate a database.
    pub async fn make(&mut self, database: DatabaseConfig, now_ms: u64) -> Order {
        let store = self.stores.open(&database.replica).await;
        tracing::info!(database = %database.path.display(), replica = %database.replica, "replicating");
        let (replica, replica_url) = (database.replica.to_string(), database.replica.with_parameters());
        let board = Arc::new(Board::new(database.path.clone(), replica, replica_url, now_ms));
        let store = Arc::new(Retrying::new(store, QUICK).with_signal(board.retry_signal().clone()));
        let settings = DatabaseSettings {
            path: database.path,
            sync_interval: database.sync_interval,
            poll_interval: database.poll_interval,
            checkpoint_threshold_bytes: database.checkpoint_threshold_bytes,
            spool_limit_bytes: database.spool_limit_bytes,
            snapshot_interval: database.snapshot_interval,
        };
        let mut companions = Companions::new();
        if let Some(interval) = database.verify_interval {
            let driller = Driller {
                store: store.clone(),
                database: settings.path.clone(),
                interval,
                retention: database.retention,
                board: board.clone(),
                clock: self.clock.clone(),
                permits: self.drills.clone(),
            };
            companions.push(Box::pin(driller.run()));
        }
        if let Some(url) = database.heartbeat {
            companions.push(Box::pin(beat(url, board.clone(), self.clock.clone())));
        }
        let merge =
            MergeSettings { windows: database.merge, kept_limit_bytes: settings.spool_limit_bytes / KEPT_SHARE };
        let (retention, presence_interval) = (database.retention, database.presence_interval);
        let state_dir = database.state_dir;
        let job = Job { settings, state_dir, store, merge, retention, presence_interval, board };
        Order::Follow(Box::new(job), companions)
    }
}
