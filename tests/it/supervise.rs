//! A mistake in this program that makes a database's thread panic: it is told, the database is taken up again, nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use waltrail::clock::{Clock, SystemClock};
use waltrail::replicate::database::DatabaseSettings;
use waltrail::replicate::merge::MergeSettings;
use waltrail::replicate::status::{Board, Boards, Phase};
use waltrail::replicate::wake::WatchHub;
use waltrail::replicate::{Job, Order, ReplicateError, Replication};
use waltrail::retain::RetentionSettings;
use waltrail::store::directory::DirectoryStore;

use crate::support::scene::Scene;
use crate::support::{content, count_up, create_database, wait_for};

/// A clock that panics once, when it is asked by the thread of `app.db`.
struct PanickingClock {
    system: SystemClock,
    is_armed: AtomicBool,
}

impl Clock for PanickingClock {
    fn now_ms(&self) -> u64 {
        self.system.now_ms()
    }

    fn monotonic(&self) -> Duration {
        let is_the_thread = std::thread::current().name() == Some("app.db");
        assert!(!(is_the_thread && self.is_armed.swap(false, Ordering::SeqCst)), "a mistake, made on purpose");
        self.system.monotonic()
    }
}

#[test]
fn a_panic_is_contained_told_and_survived() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 20, "");
    let clock = Arc::new(PanickingClock { system: SystemClock::new(), is_armed: AtomicBool::new(false) });
    let board = Arc::new(Board::new(scene.database(), scene.replica(), clock.now_ms()));
    let job = Job {
        settings: DatabaseSettings {
            path: scene.database(),
            sync_interval: Duration::from_millis(50),
            poll_interval: Duration::from_millis(100),
            checkpoint_threshold_bytes: 4 << 20,
            spool_limit_bytes: 64 << 20,
            snapshot_interval: Duration::from_secs(3600),
        },
        state_dir: scene.path("state"),
        store: Arc::new(DirectoryStore::new(scene.path("replica"))),
        merge: MergeSettings { windows: Vec::new(), kept_limit_bytes: 1 << 20 },
        retention: RetentionSettings::default(),
        board: board.clone(),
        presence_interval: None,
    };
    let (standing, _) = mpsc::unbounded_channel();
    let (orders, queue) = mpsc::unbounded_channel();
    assert!(orders.send(Order::Follow(Box::new(job), Vec::new())).is_ok());
    let stop = CancellationToken::new();
    let hub = Arc::new(WatchHub::new());
    let replication =
        Replication::new(hub, Arc::new(Boards::default()), standing, clock.clone(), Duration::from_secs(10), 16);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let replicating = runtime.spawn(replication.run(queue, stop.clone()));
    wait_for("the first snapshot", || board.status().snapshot_ms);
    count_up(&application);

    clock.is_armed.store(true, Ordering::SeqCst);
    count_up(&application);
    let told = wait_for("the panic", || board.status().error.filter(|_| board.status().phase == Phase::Failing));
    assert!(told.contains("internal error") && told.contains("made on purpose"), "{told}");
    count_up(&application);
    wait_for("the database to be followed again", || (board.status().phase == Phase::Following).then_some(()));
    count_up(&application);

    let expected = content(&scene.database());
    stop.cancel();
    let failures = runtime.block_on(replicating).unwrap();
    assert!(
        matches!(failures.as_slice(), [ReplicateError::Panicked { .. }]),
        "the exit code tells of it: {failures:?}"
    );
    assert_eq!(scene.restored_content(&[]), expected);
}
