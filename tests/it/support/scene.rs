//! What most tests begin with.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Daemon, content, run, stderr, wait_for_restored};

pub const COUNTER: &str = "SELECT n FROM counter";

/// A database and a daemon that replicates it to a directory. What the daemon logs as ERROR asks for a person: at the end there must be
/// none that the test does not expect.
pub struct Scene {
    pub directory: tempfile::TempDir,
    /// Words of an ERROR, and whether one has to be there.
    expected_errors: RefCell<Vec<(&'static str, bool)>>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let log = std::fs::read_to_string(self.path("daemon.log")).unwrap_or_default();
        let expected = self.expected_errors.borrow();
        let is_unexpected =
            |line: &&str| line.contains("ERROR") && !expected.iter().any(|(words, _)| line.contains(words));
        let unexpected: Vec<&str> = log.lines().filter(is_unexpected).collect();
        assert!(unexpected.is_empty(), "not expected:\n{}\n\n{log}", unexpected.join("\n"));
        for (words, _) in expected.iter().filter(|(_, must_be)| *must_be) {
            assert!(log.contains(words), "expected, and not said: {words}\n\n{log}");
        }
    }
}

impl Scene {
    pub fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    pub fn at(directory: tempfile::TempDir) -> Self {
        Self { directory, expected_errors: RefCell::default() }
    }

    /// The log has to hold an ERROR with these words.
    pub fn expect_error(&self, words: &'static str) {
        self.expected_errors.borrow_mut().push((words, true));
    }

    /// The log may hold one: whether it comes to it depends on how fast the machine is.
    pub fn allow_error(&self, words: &'static str) {
        self.expected_errors.borrow_mut().push((words, false));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn database(&self) -> PathBuf {
        self.path("app.db")
    }

    pub fn replica(&self) -> String {
        self.path("replica").display().to_string()
    }

    pub fn start(&self) -> Daemon {
        self.start_to(&self.replica())
    }

    pub fn start_to(&self, replica: &str) -> Daemon {
        Daemon::start(&[self.database().to_str().unwrap(), replica], &self.path("daemon.log"))
    }

    pub fn start_with(&self, arguments: &[&str]) -> Daemon {
        Daemon::start(arguments, &self.path("daemon.log"))
    }

    pub fn wait_for(&self, n: i64) -> PathBuf {
        wait_for_restored(&self.replica(), self.directory.path(), COUNTER, n)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("daemon.log")).unwrap()
    }

    pub fn restored(&self, replica: &str, arguments: &[&str]) -> PathBuf {
        let output = self.path("out.db");
        let output_name = output.to_str().unwrap();
        let all: Vec<&str> = ["restore", replica, "--force", "--output", output_name]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        let done = run(all);
        assert!(done.status.success(), "{}\n{}", stderr(&done), self.log());
        output
    }

    pub fn wal_len(&self) -> u64 {
        std::fs::metadata(self.path("app.db-wal")).map_or(0, |found| found.len())
    }

    pub fn copy(&self, from: &str, to: &str) {
        // By another process: closing a descriptor of the database in this one would drop its locks.
        assert!(Command::new("cp").arg(self.path(from)).arg(self.path(to)).status().unwrap().success());
    }

    pub fn restored_content(&self, arguments: &[&str]) -> Vec<String> {
        content(&self.restored(&self.replica(), arguments))
    }

    pub fn objects(&self, folder: &str) -> Vec<String> {
        let mut found = Vec::new();
        for entry in walk(&self.path("replica").join(folder)) {
            found.push(entry.display().to_string());
        }
        found.sort();
        found
    }
}

#[allow(clippy::disallowed_methods)]
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
