//! Random sequences of everything that happens to a database and its replica: commits, checkpoints, syncs, snapshots, merges,
//! prunes, marks, stops, crashes, restores, lost state, time passing, storage that fails. After each step states are restored and compared
//! byte for byte with what SQLite had.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
use crate::verify::check_sound;

/// One request in twenty fails, before it is carried out or after.
fn with_faults(seed: u64) -> impl Fn(SharedStore) -> SharedStore {
    move |store| {
        let counter = AtomicU64::new(seed);
        let faulty = Faulty::new(store, move |_| {
            match Numbers::new(counter.fetch_add(0x9e37_79b9, Ordering::SeqCst)).below(40) {
                0 => Fault::Before(StoreErrorKind::Unavailable),
                1 => Fault::After(StoreErrorKind::Unavailable),
                _ => Fault::None,
            }
        });
        Arc::new(Retrying::new(Arc::new(faulty), RetryPolicy { attempts: 4, base_ms: 1, max_ms: 2 }))
    }
}

struct Play {
    machine: Machine,
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
        let mut play = Self { machine, numbers, verifying, trace, cache: TailCache::default() };
        play.machine.start();
        play
    }

    fn commit(&mut self) {
        let id = self.numbers.below(300);
        let (len, count) = (self.numbers.below(3000), 1 + self.numbers.below(40));
        let table = self.trace.len();
        // Each text is one transaction, and changes something.
        let sql = match self.numbers.below(12) {
            0 => format!("BEGIN; DELETE FROM item WHERE id > {id}; INSERT INTO item(n) VALUES(1); COMMIT"),
            1 => "VACUUM".to_owned(),
            2 => format!("CREATE TABLE t{table}(x)"),
            3 | 4 => format!(
                "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {count})
                 INSERT INTO item(body, n) SELECT randomblob({len}), i FROM c"
            ),
            5 => format!("BEGIN; DELETE FROM item; INSERT INTO item(body) VALUES(randomblob({len})); COMMIT"),
            _ => format!("INSERT OR REPLACE INTO item(id, body, n) VALUES({id}, randomblob({len}), random())"),
        };
        self.trace.push(sql.clone());
        self.machine.commit(&sql);
        let pause_ms = self.numbers.below(3000);
        self.pass(Duration::from_millis(pause_ms));
    }

    fn pass(&self, time: Duration) {
        self.machine.pass(time);
    }

    fn step(&mut self) {
        let what = self.numbers.below(34);
        match what {
            30..=32 => return self.prune(),
            33 => return self.mark(),
            _ => {}
        }
        if !self.machine.is_running() {
            match what {
                0..=2 => {
                    self.trace.push("state lost".into());
                    self.machine.lose_state();
                }
                3..=6 => self.restore(),
                7..=14 => self.commit(),
                15..=17 => self.checkpoint(),
                _ => {
                    self.trace.push("start".into());
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
                self.trace.push("sync".into());
                self.machine.sync();
            }
            22 | 23 => {
                self.trace.push("snapshot".into());
                self.machine.snapshot();
            }
            24 => {
                let hours = 1 + self.numbers.below(60);
                self.trace.push(format!("{hours} h pass"));
                self.pass(Duration::from_secs(hours * 3600));
                self.machine.turns(3);
            }
            25 | 26 => {
                let seconds = 20 + self.numbers.below(100);
                self.trace.push(format!("{seconds} s pass"));
                self.pass(Duration::from_secs(seconds));
            }
            27 => {
                self.trace.push("stop".into());
                self.machine.stop();
            }
            28 => {
                self.pass(Duration::from_secs(11));
                self.machine.turns(3);
                let rests = self.machine.rest();
                self.trace.push(format!("rest: {rests}"));
            }
            _ => {
                self.trace.push("crash".into());
                self.machine.crash();
            }
        }
    }

    /// The application's own.
    fn checkpoint(&mut self) {
        let mode = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][self.numbers.below(4) as usize];
        self.trace.push(mode.into());
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
        self.trace.push("prune".into());
        let outcome = match self.machine.prune(&mut self.cache) {
            Ok(outcome) => {
                format!("{} deleted, {} refused\n{}", outcome.deleted_objects, outcome.refused.objects, outcome.plan)
            }
            Err(RetainError::Restore(RestoreError::Store(error))) => error.to_string(),
            // Nothing was ever shipped.
            Err(RetainError::Restore(RestoreError::NoReplica { .. })) if self.machine.states.is_empty() => {
                "no replica".into()
            }
            Err(error) => panic!("{error}"),
        };
        self.trace.push(outcome);
        for position in self.machine.kept() {
            self.machine.check(position);
        }
    }

    fn mark(&mut self) {
        let Some(position) = self.any_state() else { return };
        self.trace.push(format!("mark {position}"));
        let name = self.trace.len().to_string();
        if let Err(error) = self.machine.mark(&name, position) {
            assert!(matches!(&error, RetainError::Restore(RestoreError::Store(_))), "{error}");
        }
    }

    fn restore(&mut self) {
        let Some(position) = self.any_state() else { return };
        let leaves_state = self.numbers.below(3) > 0;
        self.trace.push(format!("restore {position}, leaves state: {leaves_state}"));
        self.machine.restore(position, leaves_state);
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
        self.trace.push(format!("verify: {told:?}"));
        assert!(told.is_ok(), "{told:?}");
    }
}

fn play(seed: u64, steps: usize) {
    /// Says how it came to the failure.
    struct Told(Play);
    impl Drop for Told {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("{}", self.0.trace.join("\n"));
            }
        }
    }
    let mut told = Told(Play::new(seed));
    for _ in 0..steps {
        told.0.step();
        told.0.check();
    }
    if !told.0.machine.is_running() {
        told.0.machine.start();
    }
    told.0.machine.sync();
    told.0.check();
}

#[test]
fn random_sequences() {
    // WALTRAIL_SEED=n plays one, WALTRAIL_SEEDS=n so many.
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("WALTRAIL_SEED") {
        return play(seed, 80);
    }
    for seed in 0..number("WALTRAIL_SEEDS").unwrap_or(25) {
        play(seed, 80);
    }
}
