//! An application in a process of its own: its locks are another process's to the daemon, and it can be killed.
//!
//! The process is this test binary again, which runs [`serves_application_process`] and nothing else. Commands are lines
//! of text; the answers are the lines that begin with `@`.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use rusqlite::Connection;

const DATABASE: &str = "WALTRAIL_TEST_APPLICATION";
const BUSY_TIMEOUT_MS: &str = "WALTRAIL_TEST_BUSY_TIMEOUT_MS";

/// The process, with a connection to a database.
pub struct Application {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Application {
    /// Starts the process, which opens the database with a busy timeout of five seconds.
    pub fn open(database: &Path) -> Self {
        Self::open_with(database, Duration::from_secs(5))
    }

    pub fn open_with(database: &Path, busy_timeout: Duration) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "support::application::serves_application_process", "--nocapture", "--test-threads=1"])
            .env(DATABASE, database)
            .env(BUSY_TIMEOUT_MS, busy_timeout.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, commands, answers }
    }

    /// Runs statements; returns the first column of the last one's first row, as text.
    pub fn try_run(&mut self, sql: &str) -> Result<String, String> {
        let commands = self.commands.as_mut().unwrap();
        writeln!(commands, "{}", sql.replace('\n', " ")).map_err(|error| error.to_string())?;
        commands.flush().map_err(|error| error.to_string())?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String, String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.answers.read_line(&mut line).map_err(|error| error.to_string())? == 0 {
                return Err("the application ended".into());
            }
            let line = line.trim_end_matches('\n');
            if let Some(answer) = line.strip_prefix("@ok ") {
                return Ok(answer.to_owned());
            }
            if let Some(error) = line.strip_prefix("@error ") {
                return Err(error.to_owned());
            }
        }
    }

    pub fn run(&mut self, sql: &str) -> String {
        self.try_run(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    pub fn number(&mut self, sql: &str) -> i64 {
        let answer = self.run(sql);
        answer.parse().unwrap_or_else(|_| panic!("{sql}: {answer}"))
    }

    /// Locks one byte of a file exclusively until the process ends (fcntl(2)).
    pub fn lock_byte(&mut self, file: &Path, offset: i64) {
        self.run(&format!(".lock {offset} {}", file.display()));
    }

    /// Closes the connection and ends.
    pub fn close(mut self) {
        self.run(".close");
        self.commands = None;
        assert!(self.child.wait().unwrap().success());
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Does nothing unless [`Application`] has started it.
#[test]
fn serves_application_process() {
    let Ok(database) = std::env::var(DATABASE) else { return };
    let busy_timeout_ms = std::env::var(BUSY_TIMEOUT_MS).unwrap().parse().unwrap();
    let mut connection = None;
    let mut locked = Vec::new();
    let mut output = std::io::stdout();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let answer = if let Some(lock) = line.strip_prefix(".lock ") {
            let (offset, path) = lock.split_once(' ').unwrap();
            lock_byte(Path::new(path), offset.parse().unwrap(), &mut locked).map_err(|error| error.to_string())
        } else if line == ".close" {
            connection = None;
            Ok(String::new())
        } else {
            open_once(&mut connection, &database, busy_timeout_ms)
                .and_then(|open| run(open, &line))
                .map_err(|error| error.to_string())
        };
        match answer {
            Ok(answer) => writeln!(output, "\n@ok {answer}").unwrap(),
            Err(error) => writeln!(output, "\n@error {}", error.replace('\n', " ")).unwrap(),
        }
        output.flush().unwrap();
        if line == ".close" {
            std::process::exit(0);
        }
    }
}

fn open_once<'a>(
    connection: &'a mut Option<Connection>,
    database: &str,
    busy_timeout_ms: u64,
) -> rusqlite::Result<&'a Connection> {
    if connection.is_none() {
        let opened = Connection::open(database)?;
        opened.busy_timeout(Duration::from_millis(busy_timeout_ms))?;
        *connection = Some(opened);
    }
    Ok(connection.as_ref().unwrap())
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<String> {
    let mut answer = String::new();
    for statement in sql.split(';').filter(|statement| !statement.trim().is_empty()) {
        let mut statement = connection.prepare(statement)?;
        let has_columns = statement.column_count() > 0;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if has_columns && answer.is_empty() {
                answer = match row.get_ref(0)? {
                    rusqlite::types::ValueRef::Integer(number) => number.to_string(),
                    rusqlite::types::ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
                    other => format!("{other:?}"),
                };
            }
        }
    }
    Ok(answer)
}

fn lock_byte(path: &Path, offset: i64, locked: &mut Vec<std::fs::File>) -> std::io::Result<String> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (offset, 1);
    // SAFETY: the descriptor is open, and `lock` outlives the call.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) };
    let error = std::io::Error::last_os_error();
    // Closing it would drop what is locked already.
    locked.push(file);
    if answer == 0 { Ok(String::new()) } else { Err(error) }
}
