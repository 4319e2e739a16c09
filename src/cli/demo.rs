//! `waltrail demo`: the main job on a database of its own, with the same program doing each part.

#![allow(clippy::print_stdout, reason = "a show that nobody watches any more may end")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use clap::Args;
use rusqlite::{Connection, params};
use xxhash_rust::xxh3::Xxh3;

use super::exit_code::Failure;
use super::interrupt::unless_interrupted;
use super::open_patiently;
use super::tell::say;
use crate::clock::{Clock, SystemClock, format_time, random_bytes};
use crate::config::replica_url::ReplicaUrl;
use crate::restore::RestoreError;
use crate::restore::history::History;
use crate::restore::plan::{Plan, Target, plan};
use crate::restore::tail::read_table;
use crate::store::SharedStore;

/// Rows before the first transaction that is watched.
const CUSTOMERS: i64 = 2000;
/// Transactions of the show, those after which a moment is noted, and the one soon after which the replicator is killed.
const TRANSACTIONS: usize = 1000;
const MOMENTS: [usize; 2] = [300, 650];
const KILL_AFTER: usize = 950;
const TRANSACTION_INTERVAL: Duration = Duration::from_millis(4);
/// From transaction [`KILL_AFTER`] to the kill: some of those that are left are then written, others not.
const UNTIL_KILL: Duration = Duration::from_millis(50);
/// After a noted moment nothing is written for so long, so that the next transaction has another time.
const PAUSE: Duration = Duration::from_millis(20);
/// The replica must have what was written within this time.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// Arguments of `demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  waltrail demo
  waltrail demo --replica s3://my-bucket/scratch

Everything is made in a temporary directory, which is removed in the end. Objects in a bucket stay.")]
pub struct DemoArguments {
    /// Replicate below this place instead of to a temporary directory
    #[arg(long, value_name = "URL")]
    replica: Option<String>,
}

/// A moment of the show, to come back to.
struct Moment {
    transactions: usize,
    time_ms: u64,
}

/// What the application did, by its own notes.
struct Written {
    moments: Vec<Moment>,
    /// When each transaction's COMMIT came back, in milliseconds since 1970.
    committed_ms: Vec<u64>,
}

impl Written {
    fn until(&self, time_ms: u64) -> usize {
        self.committed_ms.partition_point(|&at| at <= time_ms)
    }
}

/// Runs the show.
///
/// # Errors
/// When any part of it does not do what it should.
pub async fn run(arguments: DemoArguments) -> Result<(), Failure> {
    let work = tempfile::tempdir().map_err(|error| Failure::other(format!("no temporary directory: {error}")))?;
    let replica = match &arguments.replica {
        Some(url) => below(url)?,
        None => work.path().join("replica").display().to_string(),
    };
    let show = Show { work: work.path().to_owned(), replica, clock: SystemClock::new() };
    unless_interrupted(show.run(), "interrupted; nothing of the demo is left on this machine").await
}

/// A new place below `url`.
fn below(url: &str) -> Result<String, Failure> {
    let random = random_bytes::<4>().map_err(|error| Failure::other(error.to_string()))?;
    let (place, query) = url.split_once('?').unwrap_or((url, ""));
    let separator = if query.is_empty() { "" } else { "?" };
    let name = format!("demo-{:08x}", u32::from_le_bytes(random));
    Ok(format!("{}/{name}{separator}{query}", place.trim_end_matches('/')))
}

fn failed(doing: &str) -> impl FnOnce(std::io::Error) -> Failure {
    let doing = doing.to_owned();
    move |error| Failure::other(format!("{doing}: {error}"))
}

fn sqlite_failed(error: rusqlite::Error) -> Failure {
    Failure::other(format!("the demo's database: {error}"))
}

struct Show {
    work: PathBuf,
    replica: String,
    clock: SystemClock,
}

impl Show {
    fn database(&self) -> PathBuf {
        self.work.join("app.db")
    }

    async fn run(&self) -> Result<(), Failure> {
        let replica: ReplicaUrl = self.replica.parse()?;
        say(format_args!("1. An application makes a database: {}", self.database().display()))?;
        let application = Application::create(&self.database()).map_err(sqlite_failed)?;
        say(format_args!("   {CUSTOMERS} customers, SQLite in WAL mode."))?;

        say(format_args!("\n2. A second process replicates it: waltrail replicate app.db {replica}"))?;
        let mut replicator = Replicator(self.start_replicator()?);
        let store = open_patiently(&replica).await;
        let (first, waited) = self.wait_for_plan(&store, &mut replicator, 0).await?;
        say(format_args!(
            "   The first snapshot is stored after {} ms: from now on the database can be restored.",
            waited.as_millis()
        ))?;

        say(format_args!("\n3. The application goes on: {TRANSACTIONS} transactions, a few milliseconds apart."))?;
        let (written, killed_ms) = self.write_and_kill(application, replicator, &store, &first).await?;

        let (at_kill, in_all) = (written.until(killed_ms), written.committed_ms.len());
        say("\n4. In the middle of that the replicator was killed (SIGKILL). Then the machine is lost.")?;
        say(format_args!(
            "   Killed at {} after {at_kill} transactions; the application wrote on.",
            format_time(killed_ms)
        ))?;
        let database_len = fs::metadata(self.database()).map_or(0, |found| found.len());
        self.lose_machine()?;
        say(format_args!("   Database ({database_len} bytes), WAL and local state are deleted."))?;

        say("\n5. Restore, elsewhere, from the replica alone:")?;
        let newest = self.restore("newest", &[])?;
        let confirmed = written.moments.last().map_or(0, |moment| moment.transactions);
        if newest < confirmed {
            return Err(Failure::other(format!(
                "restored {newest} transactions of {confirmed} that were in the replica"
            )));
        }
        for moment in &written.moments {
            let time = format_time(moment.time_ms);
            let found = self.restore(&format!("{} transactions", moment.transactions), &["--at", &time])?;
            if found != moment.transactions {
                let wanted = moment.transactions;
                return Err(Failure::other(format!("restored to {found} transactions instead of {wanted}")));
            }
        }

        say("\n6. What it cost:")?;
        report_loss(newest, at_kill, in_all, &written.committed_ms, killed_ms)?;
        self.report_storage(&store).await?;
        say("\nEverything restored is what the application had written. That is the whole job.")
    }

    /// Lets the application write, notes the moments, and kills the replicator while it writes. Gives what was written, and
    /// when the kill came.
    async fn write_and_kill(
        &self,
        mut application: Application,
        mut replicator: Replicator,
        store: &SharedStore,
        first: &Plan,
    ) -> Result<(Written, u64), Failure> {
        let mut moments = Vec::new();
        for transactions in MOMENTS {
            application = application.write(transactions).await?;
            moments.push(self.note(store, &mut replicator, first, transactions).await?);
        }
        application = application.write(KILL_AFTER).await?;
        let writing = tokio::spawn(application.write(TRANSACTIONS));
        tokio::time::sleep(UNTIL_KILL).await;
        let killed_ms = self.clock.now_ms();
        replicator.kill()?;
        let application = writing.await.map_err(|error| Failure::other(error.to_string()))??;
        Ok((Written { moments, committed_ms: application.committed_ms }, killed_ms))
    }

    /// Waits until the replica, which had the state of `first` before, has all `transactions`; then notes the time. A
    /// transaction's time is when the replicator saw it: before it did, no time means this state for certain.
    async fn note(
        &self,
        store: &SharedStore,
        replicator: &mut Replicator,
        first: &Plan,
        transactions: usize,
    ) -> Result<Moment, Failure> {
        let last_txid = first.position.txid + transactions as u64;
        let (_, waited) = self.wait_for_plan(store, replicator, last_txid).await?;
        let time_ms = self.clock.now_ms();
        tokio::time::sleep(PAUSE).await;
        say(format_args!(
            "   Noted: at {} there were {transactions} transactions, all in the replica {} ms after the last commit.",
            format_time(time_ms),
            waited.as_millis()
        ))?;
        Ok(Moment { transactions, time_ms })
    }

    fn log(&self) -> PathBuf {
        self.work.join("replicate.log")
    }

    fn start_replicator(&self) -> Result<Child, Failure> {
        let log = File::create(self.log()).map_err(failed("make the replicator's log"))?;
        let program = std::env::current_exe().map_err(failed("find this program"))?;
        let mut command = Command::new(program);
        command.arg("replicate").arg(self.database()).arg(&self.replica).stdout(Stdio::null()).stderr(log);
        command.spawn().map_err(failed("start the replicator"))
    }

    /// Waits until the replica can be restored to transaction `txid` or a later one; gives the plan, and how long it took.
    async fn wait_for_plan(
        &self,
        store: &SharedStore,
        replicator: &mut Replicator,
        txid: u64,
    ) -> Result<(Plan, Duration), Failure> {
        let begun = self.clock.monotonic();
        loop {
            let found = plan_newest(store).await;
            let waited = self.clock.monotonic().saturating_sub(begun);
            match found {
                Ok(plan) if plan.position.txid >= txid => return Ok((plan, waited)),
                Ok(_) | Err(RestoreError::NoReplica { .. } | RestoreError::NothingYet { .. }) => {}
                // What storage refuses now, it refuses the replicator, too.
                Err(error) => return Err(error.into()),
            }
            let is_gone = replicator.0.try_wait().map_err(failed("look after the replicator"))?.is_some();
            if is_gone || waited > PATIENCE {
                let log = fs::read_to_string(self.log()).map_err(failed("read the replicator's log"))?;
                return Err(Failure::other(format!("the replicator did not store what was written; it said:\n{log}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn lose_machine(&self) -> Result<(), Failure> {
        for name in ["app.db", "app.db-wal", "app.db-shm"] {
            match fs::remove_file(self.work.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(failed("delete the database")(error));
                }
                _ => {}
            }
        }
        fs::remove_dir_all(self.work.join(".app.db-waltrail")).map_err(failed("delete the local state"))
    }

    /// Restores with the program itself, compares with the same transactions run again, and returns how many there were.
    fn restore(&self, what: &str, arguments: &[&str]) -> Result<usize, Failure> {
        let output = self.work.join(format!("{}.db", what.replace(' ', "-")));
        let program = std::env::current_exe().map_err(failed("find this program"))?;
        let begun = self.clock.monotonic();
        let done = Command::new(program)
            .arg("restore")
            .arg(&self.replica)
            .arg("--output")
            .arg(&output)
            .args(arguments)
            .output();
        let Output { status, stderr, .. } = done.map_err(failed("start the restore"))?;
        let took = self.clock.monotonic().saturating_sub(begun);
        if !status.success() {
            return Err(Failure::other(format!("restore failed ({status}):\n{}", String::from_utf8_lossy(&stderr))));
        }
        let transactions = check(&output)?;
        say(format_args!(
            "   {what:<18} {transactions:>5} transactions in {:>4} ms: content as written, fingerprint and integrity_check ok",
            took.as_millis()
        ))?;
        Ok(transactions)
    }

    async fn report_storage(&self, store: &SharedStore) -> Result<(), Failure> {
        let history = History::load(store).await?;
        let (mut count, mut stored_bytes, mut image_bytes) = (0, 0, 0);
        for stored in history.epochs.values().flat_map(|epoch| &epoch.segments) {
            let (footer, table) = read_table(store, &history.location, stored).await?;
            let pages: usize = table.transactions.iter().map(|transaction| transaction.page_numbers.len()).sum();
            count += 1;
            stored_bytes += stored.len_bytes;
            image_bytes += pages as u64 * u64::from(footer.page_size);
        }
        let snapshots = history.epochs.values().flat_map(|epoch| &epoch.snapshots);
        let snapshot_bytes: u64 = snapshots.map(|stored| stored.len_bytes).sum();
        say(format_args!(
            "   In storage: a snapshot of {snapshot_bytes} bytes, and {count} segments of {stored_bytes} bytes in"
        ))?;
        say(format_args!("   all, which hold {image_bytes} bytes of changed pages, transaction by transaction."))
    }
}

async fn plan_newest(store: &SharedStore) -> Result<Plan, RestoreError> {
    let history = History::load(store).await?;
    plan(store, &history, Target::Latest, None).await
}

/// What the kill cost: of the transactions that were committed by then, those that no restore has.
fn report_loss(
    newest: usize,
    at_kill: usize,
    in_all: usize,
    committed_ms: &[u64],
    killed_ms: u64,
) -> Result<(), Failure> {
    let lost = at_kill.saturating_sub(newest);
    match committed_ms.get(newest).filter(|_| lost > 0) {
        Some(first_ms) => {
            let span_ms = killed_ms.saturating_sub(*first_ms);
            let first = newest + 1;
            say(format_args!(
                "   Lost with the kill: {lost} transactions ({first} to {at_kill}), the last {span_ms} ms before it."
            ))?;
        }
        None => say("   Lost with the kill: nothing that was committed before it.")?,
    }
    let after = in_all - newest.max(at_kill);
    say(format_args!("   {after} more were written when the replicator was dead already: they went with the machine."))
}

/// What writes the database. It knows nothing of waltrail.
struct Application {
    connection: Connection,
    /// When each transaction's COMMIT came back, in milliseconds since 1970.
    committed_ms: Vec<u64>,
}

impl Application {
    fn create(path: &Path) -> rusqlite::Result<Self> {
        let connection = Connection::open(path)?;
        create(&connection)?;
        Ok(Self { connection, committed_ms: Vec::new() })
    }

    /// Goes on, on a thread of its own, until there are `transactions` in all.
    async fn write(mut self, transactions: usize) -> Result<Self, Failure> {
        let work = move || {
            let clock = SystemClock::new();
            while self.committed_ms.len() < transactions {
                transaction(&self.connection, self.committed_ms.len() + 1)?;
                self.committed_ms.push(clock.now_ms());
                std::thread::sleep(TRANSACTION_INTERVAL);
            }
            Ok(self)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Failure::other(error.to_string()))?.map_err(sqlite_failed)
    }
}

/// A child process that does not outlive the show.
struct Replicator(Child);

impl Replicator {
    fn kill(&mut self) -> Result<(), Failure> {
        self.0.kill().and_then(|()| self.0.wait()).map(|_| ()).map_err(failed("kill the replicator"))
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        // It has ended already, or the show has failed.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn create(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
         CREATE TABLE customer(id INTEGER PRIMARY KEY, name TEXT, orders INT DEFAULT 0);
         CREATE TABLE purchase(id INTEGER PRIMARY KEY, customer INT, article TEXT, price INT);
         CREATE INDEX purchase_customer ON purchase(customer);
         CREATE TABLE progress(transactions INT);
         INSERT INTO progress VALUES(0);
         BEGIN;",
    )?;
    for id in 1..=CUSTOMERS {
        connection
            .execute("INSERT INTO customer(id, name) VALUES(?1, ?2)", params![id, format!("customer number {id}")])?;
    }
    connection.execute_batch("COMMIT")
}

/// Transaction `number`: what it does follows from its number alone, so that it can be run again to compare.
fn transaction(connection: &Connection, number: usize) -> rusqlite::Result<()> {
    let number = number as i64;
    connection.execute_batch("BEGIN IMMEDIATE")?;
    for line in 0..3 {
        let customer = (number * 7919 + line * 104_729) % CUSTOMERS + 1;
        let article = format!("article {} of the catalogue, in colour {}", number * 31 % 997, line);
        connection.execute(
            "INSERT INTO purchase(customer, article, price) VALUES(?1, ?2, ?3)",
            params![customer, article, number * 13 % 5000],
        )?;
        connection.execute("UPDATE customer SET orders = orders + 1 WHERE id = ?1", params![customer])?;
    }
    if number % 5 == 0 {
        connection.execute("DELETE FROM purchase WHERE id = ?1", params![number * 2])?;
    }
    connection.execute("UPDATE progress SET transactions = ?1", params![number])?;
    connection.execute_batch("COMMIT")
}

/// Checks a restored database against the same transactions run again; returns how many it holds.
fn check(path: &Path) -> Result<usize, Failure> {
    let restored = Connection::open(path).map_err(sqlite_failed)?;
    let verdict: String = restored.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(sqlite_failed)?;
    if verdict != "ok" {
        return Err(Failure::other(format!("integrity_check of the restored database says: {verdict}")));
    }
    let transactions: i64 =
        restored.query_row("SELECT transactions FROM progress", [], |row| row.get(0)).map_err(sqlite_failed)?;
    let again = Connection::open_in_memory().map_err(sqlite_failed)?;
    let replay = || {
        create(&again)?;
        (1..=transactions as usize).try_for_each(|number| transaction(&again, number))
    };
    replay().map_err(sqlite_failed)?;
    if content(&restored).map_err(sqlite_failed)? == content(&again).map_err(sqlite_failed)? {
        Ok(transactions as usize)
    } else {
        Err(Failure::other(format!("the restored database differs from what {transactions} transactions wrote")))
    }
}

/// A hash of every row.
fn content(connection: &Connection) -> rusqlite::Result<u64> {
    let mut hash = Xxh3::new();
    for query in [
        "SELECT id, name, orders FROM customer ORDER BY id",
        "SELECT id, customer || ' ' || article, price FROM purchase ORDER BY id",
    ] {
        let mut statement = connection.prepare(query)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (id, text, number): (i64, String, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            hash.update(&id.to_le_bytes());
            hash.update(text.as_bytes());
            hash.update(&number.to_le_bytes());
        }
    }
    Ok(hash.digest())
}
