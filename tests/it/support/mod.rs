//! What the tests drive: the built program, real databases, a real S3 server.

pub mod application;
pub mod clock;
pub mod gate;
pub mod machine;
pub mod oracle;
pub mod quirks;
pub mod s3;
pub mod scene;
pub mod syscalls;

use std::io::PipeWriter;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rusqlite::Connection;
use waltrail::format::change::Content;
use waltrail::format::key::SegmentKey;
use waltrail::format::segment::{Segment, SegmentFooter, SegmentWriter, Transaction};

use self::clock::Clock;
use self::syscalls::{Call, Verdict};

/// The built program, with credentials for [`s3::S3Server`] and nothing else of the environment that could change it.
pub fn waltrail() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waltrail"));
    for name in [
        "WALTRAIL_CONFIG",
        "WALTRAIL_LISTEN",
        "WALTRAIL_REPLICA",
        "DATABASE_URL",
        "AWS_S3_BUCKET_NAME",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_SESSION_TOKEN",
    ] {
        command.env_remove(name);
    }
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "testtest");
    command
}

/// Runs the program to its end.
pub fn run<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(arguments: I) -> Output {
    waltrail().args(arguments).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A running `waltrail replicate`. Killed when it is dropped.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    pub fn start(arguments: &[&str], log: &Path) -> Self {
        Self { child: Self::command(arguments, log).spawn().unwrap() }
    }

    fn command(arguments: &[&str], log: &Path) -> Command {
        Self::command_to(arguments, std::fs::File::options().create(true).append(true).open(log).unwrap())
    }

    fn command_to(arguments: &[&str], log: impl Into<Stdio>) -> Command {
        let mut command = waltrail();
        command.arg("replicate").args(arguments).stdout(Stdio::null()).stderr(log);
        command
    }

    /// The same, with a log that goes into a pipe.
    pub fn start_piped(arguments: &[&str], log: PipeWriter) -> Self {
        Self { child: Self::command_to(arguments, log).spawn().unwrap() }
    }

    /// The same, bound by the permissions of files even where root runs the tests.
    pub fn start_bound_by_permissions(arguments: &[&str], log: &Path) -> Self {
        // To pass over permissions, and to read and search in spite of them: capabilities(7).
        const CAP_DAC_OVERRIDE: libc::c_ulong = 1;
        const CAP_DAC_READ_SEARCH: libc::c_ulong = 2;
        let mut command = Self::command(arguments, log);
        let drop_capabilities = || {
            for capability in [CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH] {
                // SAFETY: takes numbers only. Who is not root can't drop them, and does not have them.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
            Ok(())
        };
        // SAFETY: only system calls after the fork.
        unsafe { command.pre_exec(drop_capabilities) };
        Self { child: command.spawn().unwrap() }
    }

    /// The same, with clocks that the test sets.
    pub fn start_with_clock(arguments: &[&str], log: &Path, clock: &Clock) -> Self {
        let mut command = Self::command(arguments, log);
        command.env("LD_PRELOAD", clock.library()).env("AHEAD_FILE", clock.file());
        Self { child: command.spawn().unwrap() }
    }

    /// The same, with its system calls in the test's hands.
    pub fn start_under(
        arguments: &[&str],
        log: &Path,
        calls: &[libc::c_long],
        decide: impl FnMut(&Call) -> Verdict + Send + 'static,
    ) -> Self {
        Self { child: syscalls::spawn(&mut Self::command(arguments, log), calls, decide) }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns whether the process holds a POSIX lock on a file, as an open connection of SQLite
    /// does.
    pub fn holds_lock_on(&self, path: &Path) -> bool {
        let inode = format!(":{}", std::fs::metadata(path).unwrap().ino());
        let process = self.id().to_string();
        let is_meant = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.len() > 5 && words[4] == process && words[5].ends_with(&inode)
        };
        // The kernel lists locks while they come and go: one listing may miss one.
        (0..50).any(|_| {
            let is_held = std::fs::read_to_string("/proc/locks").unwrap().lines().any(is_meant);
            std::thread::sleep(Duration::from_millis(if is_held { 0 } else { 2 }));
            is_held
        })
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends SIGTERM and waits; gives the exit code.
    pub fn terminate(mut self) -> Option<i32> {
        if self.is_running() {
            self.signal(libc::SIGTERM);
        }
        self.child.wait().unwrap().code()
    }

    pub fn signal(&self, number: libc::c_int) {
        // SAFETY: sends a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, number) }, 0);
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks again until there is an answer; fails after 30 seconds.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1500 {
        if let Some(answer) = ask() {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("waited too long for {what}");
}

/// Waits until a restore of the newest state gives `want` of `query`'s first column; returns the restored file's path.
pub fn wait_for_restored(replica: &str, directory: &Path, query: &str, want: i64) -> PathBuf {
    let output = directory.join("restored.db");
    let mut last = String::new();
    for _ in 0..200 {
        let done = run(["restore", replica, "--force", "--output", output.to_str().unwrap()]);
        last = stderr(&done);
        if done.status.success() && number(&open(&output), query) == want {
            return output;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("waited too long for {want} from {query}; the last restore said: {last}");
}

pub fn open(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(5)).unwrap();
    connection
}

pub fn number(connection: &Connection, query: &str) -> i64 {
    connection.query_row(query, [], |row| row.get(0)).unwrap()
}

/// Every row of every table, as text: what must be the same in a restored database.
pub fn content(path: &Path) -> Vec<String> {
    let connection = open(path);
    let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok", "{}", path.display());
    let mut tables =
        connection.prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    let tables: Vec<(String, String)> =
        tables.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect();
    let mut content = Vec::new();
    for (name, sql) in tables {
        content.push(sql);
        let mut rows = connection.prepare(&format!("SELECT * FROM \"{name}\" ORDER BY rowid")).unwrap();
        let columns = rows.column_count();
        let mut rows = rows.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values: Vec<String> =
                (0..columns).map(|column| format!("{:?}", row.get_ref(column).unwrap())).collect();
            content.push(values.join("|"));
        }
    }
    content
}

/// A database like an application's: two tables, an index, `rows` rows.
pub fn create_database(path: &Path, rows: i64, pragmas: &str) -> Connection {
    let connection = open(path);
    connection.execute_batch(pragmas).unwrap();
    connection
        .execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
             CREATE TABLE item(id INTEGER PRIMARY KEY, body TEXT, hash TEXT);
             CREATE INDEX item_hash ON item(hash);
             CREATE TABLE counter(n INT);
             INSERT INTO counter VALUES(0);",
        )
        .unwrap();
    insert(&connection, rows);
    connection
}

pub fn insert(connection: &Connection, rows: i64) {
    connection
        .execute(
            "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
             INSERT INTO item(body, hash) SELECT hex(randomblob(150)), hex(randomblob(8)) FROM c WHERE ?1 > 0",
            [rows],
        )
        .unwrap();
}

/// One small transaction.
pub fn count_up(connection: &Connection) {
    connection.execute_batch("UPDATE counter SET n = n + 1").unwrap();
}

/// A segment, and what it holds of its pages in the order of its table.
pub fn decoded(bytes: &[u8]) -> (Segment, Vec<Vec<u8>>) {
    let mut contents = Vec::new();
    let keep = |index, number, content: Content<'_>| contents.push((index, number, content.bytes().to_vec()));
    let segment = Segment::decode(bytes, keep).unwrap();
    contents.sort();
    (segment, contents.into_iter().map(|(_, _, content)| content).collect())
}

/// A segment of these transactions and contents.
pub fn encoded(footer: &SegmentFooter, transactions: &[Transaction], contents: &[Vec<u8>]) -> (Vec<u8>, SegmentKey) {
    let mut writer = SegmentWriter::new(Vec::new(), footer.page_size).unwrap();
    let mut contents = contents.iter();
    for transaction in transactions {
        writer.begin_transaction(&transaction.info, &transaction.page_numbers).unwrap();
        for bytes in contents.by_ref().take(transaction.page_numbers.len()) {
            let is_image = bytes.len() == footer.page_size as usize;
            writer.push(if is_image { Content::Image(bytes) } else { Content::Changes(bytes) }).unwrap();
        }
    }
    writer.finish(footer.span.epoch, footer.span.first_txid).unwrap()
}
