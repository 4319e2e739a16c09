//! Random sequences of everything that happens to a database and its replica: commits (that spill, have savepoints, shrink and grow),
//! rollbacks, checkpoints, syncs, snapshots, merges, prunes, marks, stops, crashes (in the middle of requests, too), restores, lost
//! state, time passing, clocks that are set, storage that fails, lists late or is away. After each step states are restored and compared byte
//! for byte with what SQLite had. All follows from the seed: one seed gives the same objects again, byte for byte.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use waltrail::clock::Clock;
use waltrail::format::Position;
use waltrail::restore::RestoreError;
use waltrail::retain::RetainError;
use waltrail::retain::tails::TailCache;
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::retry::{RetryPolicy, Retrying};
use waltrail::store::{SharedStore, StoreErrorKind};
use waltrail::verify::Depth;

use crate::support::machine::Machine;
use crate::support::oracle::Numbers;
use crate::support::quirks::{Quirk, Quirky, digest};
use crate::verify::check_sound;

/// One request in twenty fails, before it is carried out or after: which ones follows from the seed, the object, and how often it
/// was asked for.
fn with_faults(seed: u64) -> impl Fn(SharedStore) -> SharedStore {
    move |store| {
        let asked = Mutex::new(HashMap::<String, u64>::new());
        let faulty = Faulty::new(store, move |request| {
            let what = format!("{:?} {}", request.operation, request.key);
            let mut asked = asked.lock().unwrap();
            let times = asked.entry(what.clone()).or_default();
            *times += 1;
            match digest(&(seed, what, *times)) % 40 {
                0 => Fault::Before(StoreErrorKind::Unavailable),
                1 => Fault::After(StoreErrorKind::Unavailable),
                _ => Fault::None,
            }
        });
        let store = Retrying::new(Arc::new(faulty), RetryPolicy { attempts: 12, base_ms: 0, max_ms: 0 });
        match lists_late(seed) {
            true => Quirky::shared(Arc::new(store), Quirk::ListsLate { seed, left_out: Mutex::default() }),
            false => Arc::new(store),
        }
    }
}

/// Nobody prunes on such a store: what goes is what serves nothing that is listed, which is why `doctor` calls it bad.
fn lists_late(seed: u64) -> bool {
    seed.is_multiple_of(4)
}

/// What is logged as ERROR in this thread asks for a person, and nothing here does.
#[derive(Debug, Clone, Default)]
struct Errors(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Errors {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Errors {
    /// Until the guard is dropped.
    fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let errors = self.clone();
        let subscriber =
            tracing_subscriber::fmt().with_max_level(tracing::Level::ERROR).with_writer(move || errors.clone());
        tracing::subscriber::set_default(subscriber.finish())
    }

    fn check(&self) {
        let said = String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned();
        assert!(said.is_empty(), "{said}");
    }
}

struct Play {
    seed: u64,
    /// The one whose turn it is.
    machine: Machine,
    /// A clone of it that replicates to the same place, and knows nothing of it.
    other: Option<Machine>,
    names: [&'static str; 2],
    numbers: Numbers,
    /// Of their own, so that a verification changes no sequence.
    verifying: Numbers,
    trace: Vec<String>,
    cache: TailCache,
}

impl Play {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let page_size = 512 << numbers.below(4);
        let auto_vacuum = ["NONE", "FULL", "INCREMENTAL"][numbers.below(3) as usize];
        let pragmas = format!("PRAGMA page_size={page_size}; PRAGMA auto_vacuum={auto_vacuum}");
        let mut machine = Machine::new(&pragmas, with_faults(seed));
        machine.merge.kept_limit_bytes = 20_000 << numbers.below(6);
        let trace = vec![format!("seed {seed} page size {page_size} {auto_vacuum}")];
        let verifying = Numbers::new(seed + 1);
        let names = ["", "the second: "];
        let mut play =
            Self { seed, machine, other: None, names, numbers, verifying, trace, cache: TailCache::default() };
        play.machine.start();
        play
    }

    /// So many bytes that no other value has, as SQL.
    fn blob(&mut self, len: u64) -> String {
        let words: String = (0..len.div_ceil(8)).map(|_| format!("{:016x}", self.numbers.next())).collect();
        format!("x'{}'", &words[..len as usize * 2])
    }

    fn insert(&mut self, rows: u64, len: u64) -> String {
        let rows: Vec<String> = (0..rows).map(|n| format!("({}, {n})", self.blob(len))).collect();
        format!("INSERT INTO item(body, n) VALUES {}", rows.join(","))
    }

    fn note(&mut self, what: impl std::fmt::Display) {
        self.trace.push(format!("{}{what}", self.names[0]));
    }

    /// In some sequences the machine is cloned, running or not; from then on either of the two does something.
    fn choose_machine(&mut self, is_shared: bool) {
        if is_shared && self.other.is_none() && self.numbers.below(10) == 0 {
            self.note("cloned");
            self.other = Some(self.machine.cloned());
        }
        if let Some(other) = &mut self.other
            && self.numbers.below(2) == 0
        {
            std::mem::swap(&mut self.machine, other);
            self.names.reverse();
        }
    }

    fn tell(&mut self, sql: &str) {
        let start: String = sql.chars().take(150).collect();
        self.note(format_args!("{start} ({} bytes, {:x})", sql.len(), digest(&sql)));
    }

    fn commit(&mut self) {
        let id = self.numbers.below(300);
        let (len, count) = (1 + self.numbers.below(3000), 1 + self.numbers.below(40));
        let table = self.trace.len();
        // Each text is one transaction.
        let sql = match self.numbers.below(16) {
            0 => format!("BEGIN; DELETE FROM item WHERE id > {id}; INSERT INTO item(n) VALUES(1); COMMIT"),
            1 => "VACUUM".to_owned(),
            2 => format!("CREATE TABLE t{table}(x)"),
            3 | 4 => self.insert(count, len),
            5 => format!("BEGIN; DELETE FROM item; {}; COMMIT", self.insert(1, len)),
            // The cache is small: pages are written to the WAL before the commit, and written again.
            6 | 7 => format!(
                "PRAGMA cache_size=5; BEGIN; {}; UPDATE item SET n = n + 1; UPDATE item SET n = n * 2 + id; COMMIT; PRAGMA cache_size=500",
                self.insert(count, len)
            ),
            8 => format!(
                "BEGIN; {}; SAVEPOINT s; DELETE FROM item; ROLLBACK TO s; {}; RELEASE s; COMMIT",
                self.insert(2, len),
                self.insert(1, len)
            ),
            9 => format!(
                "BEGIN; DELETE FROM item WHERE id % 2; {}; PRAGMA incremental_vacuum; COMMIT",
                self.insert(1, 10)
            ),
            _ => format!(
                "INSERT OR REPLACE INTO item(id, body, n) VALUES({id}, {}, {})",
                self.blob(len),
                self.numbers.below(1 << 40)
            ),
        };
        self.tell(&sql);
        self.machine.commit(&sql);
        let pause_ms = self.numbers.below(3000);
        self.pass(Duration::from_millis(pause_ms));
    }

    /// A large transaction that comes to nothing: its frames stay in the WAL until others take their place.
    fn roll_back(&mut self) {
        let (rows, len) = (10 + self.numbers.below(40), 1 + self.numbers.below(3000));
        let sql = format!(
            "PRAGMA cache_size=5; BEGIN; {}; UPDATE item SET n = n + 1; ROLLBACK; PRAGMA cache_size=500",
            self.insert(rows, len)
        );
        self.tell(&sql);
        self.machine.application().execute_batch(&sql).unwrap();
    }

    fn set_clock(&mut self) {
        let seconds = self.numbers.below(6000) as i64 - 3000;
        self.note(format_args!("the clock is set by {seconds} s"));
        self.machine.clock.jump(seconds * 1000);
    }

    fn set_storage(&mut self, is_open: bool) {
        if self.machine.gate.is_open() != is_open {
            self.note(if is_open { "storage is back" } else { "storage is away" });
            self.machine.gate.set_open(is_open);
        }
    }

    fn pass(&self, time: Duration) {
        self.machine.pass(time);
    }

    fn step(&mut self) {
        let what = self.numbers.below(40);
        // What has to wait for storage.
        if matches!(what, 17..=23 | 27 | 30..=33) || !self.machine.is_running() {
            self.set_storage(true);
        }
        match what {
            30..=32 => return self.prune(),
            33 => return self.mark(),
            34 | 35 => return self.roll_back(),
            36 => return self.set_clock(),
            37 => {
                self.note("the application opens the database anew");
                return self.machine.open_application();
            }
            _ => {}
        }
        if !self.machine.is_running() {
            match what {
                0..=2 => {
                    self.note("state lost");
                    self.machine.lose_state();
                }
                3..=6 => self.restore(),
                7..=14 => self.commit(),
                15..=17 => self.checkpoint(),
                _ => {
                    self.note("start");
                    self.machine.start();
                }
            }
            return;
        }
        match what {
            0..=13 => {
                self.commit();
                let turns = self.numbers.below(4) as usize;
                self.machine.turns(turns);
            }
            14..=16 => self.checkpoint(),
            17..=21 => {
                self.note("sync");
                self.machine.try_sync();
            }
            22 | 23 => {
                self.note("snapshot");
                self.machine.snapshot();
            }
            24 => {
                let hours = 1 + self.numbers.below(60);
                self.note(format_args!("{hours} h pass"));
                self.pass(Duration::from_secs(hours * 3600));
                self.machine.turns(3);
            }
            25 | 26 => {
                let seconds = 20 + self.numbers.below(100);
                self.note(format_args!("{seconds} s pass"));
                self.pass(Duration::from_secs(seconds));
            }
            27 => {
                self.note("stop");
                self.machine.stop();
            }
            28 => {
                self.pass(Duration::from_secs(11));
                self.machine.turns(3);
                let rests = self.machine.rest();
                self.note(format_args!("rest: {rests}"));
            }
            38 => self.set_storage(false),
            29 => {
                self.note("crash");
                self.machine.crash();
            }
            _ => {
                let number = self.numbers.next();
                self.note("crash in requests");
                self.machine.crash_in_requests(number);
            }
        }
    }

    /// The application's own.
    fn checkpoint(&mut self) {
        let mode = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][self.numbers.below(4) as usize];
        self.note(mode);
        let application = self.machine.application();
        application.busy_timeout(Duration::ZERO).unwrap();
        application.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(())).unwrap();
        application.busy_timeout(Duration::from_secs(1)).unwrap();
    }

    fn any_state(&mut self) -> Option<Position> {
        let kept = self.machine.kept();
        let index = self.numbers.below(kept.len() as u64) as usize;
        kept.get(index).copied()
    }

    /// Whether it comes to its end or not: nothing that is kept may suffer.
    fn prune(&mut self) {
        if lists_late(self.seed) {
            return;
        }
        self.note("prune");
        let outcome = match self.machine.prune(&mut self.cache) {
            Ok(outcome) => {
                format!("{} deleted, {} refused\n{}", outcome.deleted_objects, outcome.refused.objects, outcome.plan)
            }
            Err(RetainError::Restore(RestoreError::Store(error))) => error.to_string(),
            // Nothing was ever shipped.
            Err(RetainError::Restore(RestoreError::NoReplica { .. }))
                if self.machines().all(|it| it.states.is_empty()) =>
            {
                "no replica".into()
            }
            Err(error) => panic!("{error}"),
        };
        self.note(outcome);
        for machine in self.machines() {
            for position in machine.kept() {
                machine.check(position);
            }
        }
    }

    fn machines(&self) -> impl Iterator<Item = &Machine> {
        std::iter::once(&self.machine).chain(&self.other)
    }

    fn mark(&mut self) {
        let Some(position) = self.any_state() else { return };
        self.note(format_args!("mark {position}"));
        let name = self.trace.len().to_string();
        if let Err(error) = self.machine.mark(&name, position) {
            // Who is shown a part only may refuse; it is never told that something was done that was not.
            let is_refusal = matches!(&error, RetainError::Restore(_)) && lists_late(self.seed);
            assert!(is_refusal || matches!(&error, RetainError::Restore(RestoreError::Store(_))), "{error}");
        }
    }

    fn restore(&mut self) {
        let Some(position) = self.any_state() else { return };
        let leaves_state = self.numbers.below(3) > 0;
        self.note(format_args!("restore {position}, leaves state: {leaves_state}"));
        self.machine.restore(position, leaves_state);
    }

    /// One after the other starts a last time, and ships what it has; every state of both is restored.
    fn end(&mut self) {
        for _ in 0..2 {
            self.machine.crash();
            self.machine.start();
            self.machine.sync();
            if let Some(other) = &mut self.other {
                std::mem::swap(&mut self.machine, other);
                self.names.reverse();
            }
        }
        for machine in self.machines() {
            let kept = machine.kept();
            kept.iter().for_each(|&position| machine.check(position));
        }
        let replaced = self.machines().map(|machine| machine.replaced.to_string()).collect::<Vec<_>>().join(", ");
        self.note(format_args!("replaced: {replaced}"));
    }

    fn check(&mut self) {
        for _ in 0..2 {
            if let Some(position) = self.any_state() {
                self.machine.check(position);
            }
        }
        if let Some(newest) = self.machine.newest.filter(|newest| self.machine.kept().contains(newest)) {
            self.machine.check(newest);
        }
        if self.verifying.below(3) == 0 {
            self.verify();
        }
    }

    fn verify(&mut self) {
        let depth = [Depth::Structure, Depth::Data, Depth::Drill][self.verifying.below(3) as usize];
        let (seed, now_ms) = (self.verifying.next(), self.machine.clock.now_ms());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let told = runtime.block_on(check_sound(&self.machine.memory, depth, seed, now_ms));
        self.note(format_args!("verify: {told:?}"));
        assert!(told.is_ok(), "{told:?}");
    }
}

/// Plays a seed; gives what happened, and every object that is in storage at the end.
fn play(seed: u64, steps: usize) -> Vec<String> {
    /// Says how it came to the failure.
    struct Told(Play);
    impl Drop for Told {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let (trace, seed) = (self.0.trace.join("\n"), self.0.seed);
                eprintln!("{trace}\n\nagain: WALTRAIL_SEED={seed} cargo test random_sequences");
            }
        }
    }
    let errors = Errors::default();
    let _listening = errors.listen();
    let mut told = Told(Play::new(seed));
    for _ in 0..steps {
        told.0.choose_machine(seed.is_multiple_of(3));
        told.0.step();
        told.0.check();
    }
    told.0.set_storage(true);
    told.0.end();
    errors.check();
    let mut trace = std::mem::take(&mut told.0.trace);
    for object in told.0.machine.stored() {
        trace.push(format!("{} {:x}", object.key, digest(&told.0.machine.object(&object))));
    }
    trace.iter().flat_map(|entry| entry.lines()).map(str::to_owned).collect()
}

#[test]
fn one_seed_gives_the_same_trace_again() {
    for seed in [3, 11, 20] {
        let (first, second) = (play(seed, 80), play(seed, 80));
        let differs = first.iter().zip(&second).position(|(first, second)| first != second);
        let differs = differs.map(|at| (&first[at.saturating_sub(3)..=at], &second[at]));
        assert!(differs.is_none() && first.len() == second.len(), "seed {seed}: {differs:#?}");
        assert!(first.len() > 100, "seed {seed}: {} lines", first.len());
    }
}

#[test]
fn random_sequences() {
    // WALTRAIL_SEED=n plays one, and prints it if it fails; WALTRAIL_SEEDS=n plays so many.
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("WALTRAIL_SEED") {
        play(seed, 80);
        return;
    }
    let (seeds, next) = (number("WALTRAIL_SEEDS").unwrap_or(240), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds {
                        break;
                    }
                    play(seed, 80);
                }
            });
        }
    });
    println!("{seeds} seeds");
}
