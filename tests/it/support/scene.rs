//! What most tests begin with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Daemon, content, run, stderr, wait_for_restored};

pub const COUNTER: &str = "SELECT n FROM counter";

/// A database and a daemon that replicates it to a directory.
pub struct Scene {
    pub directory: tempfile::TempDir,
}

impl Scene {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
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
