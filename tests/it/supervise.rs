//! Replication of one database from its start to its stop, in this process; and a mistake in it that makes something panic: it is told,
//! the database is taken up again, nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use waltrail::clock::{Clock, SystemClock};
use waltrail::format::key::PRESENCE_KEY;
use waltrail::replicate::database::DatabaseSettings;
use waltrail::replicate::merge::MergeSettings;
use waltrail::replicate::status::{Board, Boards, Phase};
use waltrail::replicate::wake::WatchHub;
use waltrail::replicate::{Companions, Job, Order, ReplicateError, Replication};
use waltrail::retain::RetentionSettings;
use waltrail::store::directory::DirectoryStore;
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::{Operation, SharedStore, StoreErrorKind};

use crate::support::scene::Scene;
use crate::support::{content, count_up, create_database, wait_for};

/// What panics.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Where {
    /// The database's thread.
    Thread,
    /// A task that goes on in storage beside it.
    Beside,
    /// A companion, as the drills are.
    Companion,
}

/// Panics once when it is armed.
#[derive(Debug, Clone, Default)]
struct Mistake(Arc<AtomicBool>);

impl Mistake {
    fn arm(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn happens(&self) {
        assert!(!self.0.swap(false, Ordering::SeqCst), "a mistake, made on purpose");
    }
}

/// A clock that is wrong when it is asked by the thread of `app.db`.
struct PanickingClock {
    system: SystemClock,
    mistake: Mistake,
}

impl Clock for PanickingClock {
    fn now_ms(&self) -> u64 {
        self.system.now_ms()
    }

    fn monotonic(&self) -> Duration {
        if std::thread::current().name() == Some("app.db") {
            self.mistake.happens();
        }
        self.system.monotonic()
    }
}

/// What replicates a scene's database, in this process.
struct Replicating {
    runtime: Runtime,
    ending: JoinHandle<Vec<ReplicateError>>,
    stop: CancellationToken,
    board: Arc<Board>,
}

impl Replicating {
    fn start(scene: &Scene, store: SharedStore, clock: Arc<dyn Clock>, companions: Companions) -> Self {
        let board = Arc::new(Board::new(scene.database(), scene.replica(), scene.replica(), clock.now_ms()));
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
            store,
            merge: MergeSettings { windows: Vec::new(), kept_limit_bytes: 1 << 20 },
            retention: RetentionSettings::default(),
            board: board.clone(),
            presence_interval: Some(Duration::from_millis(50)),
        };
        let (standing, _) = mpsc::unbounded_channel();
        let (orders, queue) = mpsc::unbounded_channel();
        assert!(orders.send(Order::Follow(Box::new(job), companions)).is_ok());
        let stop = CancellationToken::new();
        let hub = Arc::new(WatchHub::new());
        let replication =
            Replication::new(hub, Arc::new(Boards::default()), standing, clock, Duration::from_secs(10), 16);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let ending = runtime.spawn(replication.run(queue, stop.clone()));
        Self { runtime, ending, stop, board }
    }

    /// What went wrong, if anything.
    fn stop(self) -> Vec<ReplicateError> {
        self.stop.cancel();
        self.runtime.block_on(self.ending).unwrap()
    }
}

/// The snapshot could not be begun, and the next try is half a minute away: a stop before that makes it after all.
#[test]
fn a_stop_before_the_first_snapshot_is_begun() {
    let scene = Scene::new();
    let _application = create_database(&scene.database(), 20, "");
    let (has_claimed, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (claimed, told) = (has_claimed.clone(), refused.clone());
    let store = Faulty::new(Arc::new(DirectoryStore::new(scene.path("replica"))), move |request| {
        if request.operation == Operation::Put && request.key.starts_with("epochs/") {
            claimed.store(true, Ordering::SeqCst);
        }
        let is_base = request.operation == Operation::List && request.key.starts_with("snap/");
        if is_base && claimed.load(Ordering::SeqCst) && !told.swap(true, Ordering::SeqCst) {
            return Fault::Before(StoreErrorKind::Unavailable);
        }
        Fault::None
    });
    let replicating = Replicating::start(&scene, Arc::new(store), Arc::new(SystemClock::new()), Vec::new());
    wait_for("the refusal", || refused.load(Ordering::SeqCst).then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(replicating.board.status().snapshot_ms, None);
    let failures = replicating.stop();
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(scene.restored_content(&[]), content(&scene.database()));
}

#[test]
fn a_panic_is_contained_told_and_survived() {
    for place in [Where::Thread, Where::Beside, Where::Companion] {
        play(place);
    }
}

fn play(place: Where) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 20, "");
    let mistakes = [Where::Thread, Where::Beside, Where::Companion].map(|it| (it, Mistake::default()));
    let mistake = |place: Where| mistakes.iter().find(|(it, _)| *it == place).unwrap().1.clone();
    let clock = Arc::new(PanickingClock { system: SystemClock::new(), mistake: mistake(Where::Thread) });
    let beside = mistake(Where::Beside);
    let store = Faulty::new(Arc::new(DirectoryStore::new(scene.path("replica"))), move |request| {
        if request.key == PRESENCE_KEY {
            beside.happens();
        }
        Fault::None
    });
    let companion = mistake(Where::Companion);
    let companion = async move {
        loop {
            companion.happens();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let replicating = Replicating::start(&scene, Arc::new(store), clock.clone(), vec![Box::pin(companion)]);
    let board = &replicating.board;
    wait_for("the first snapshot", || board.status().snapshot_ms);
    count_up(&application);

    mistake(place).arm();
    count_up(&application);
    let told = wait_for("the panic", || match place {
        // It does not end the following, but it is told as long as nobody checks.
        Where::Companion => board.status().trouble(clock.now_ms(), Duration::from_secs(60)),
        _ => board.status().error.filter(|_| board.status().phase == Phase::Failing),
    });
    assert!(told.contains("made on purpose"), "{place:?}: {told}");
    count_up(&application);
    wait_for("the database to be followed again", || (board.status().phase == Phase::Following).then_some(()));
    count_up(&application);

    let expected = content(&scene.database());
    let failures = replicating.stop();
    assert!(
        matches!(failures.as_slice(), [ReplicateError::Panicked { .. }]),
        "{place:?}: the exit code tells of it: {failures:?}"
    );
    assert_eq!(scene.restored_content(&[]), expected);
}
