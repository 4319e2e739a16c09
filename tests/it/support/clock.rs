//! The clocks of a child, which are ahead by as much as the test says.

use std::path::PathBuf;
use std::process::Command;

/// A library that a child's clocks are read through, and the file that rules it.
pub struct Clock {
    directory: tempfile::TempDir,
}

impl Clock {
    pub fn new() -> Self {
        let clock = Self { directory: tempfile::tempdir().unwrap() };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/clock.c");
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let mut build = Command::new(compiler);
        build.args(["-shared", "-fPIC", "-o"]).arg(clock.library()).arg(source);
        assert!(build.status().unwrap().success());
        clock.set(0, 0);
        clock
    }

    pub fn library(&self) -> PathBuf {
        self.directory.path().join("clock.so")
    }

    pub fn file(&self) -> PathBuf {
        self.directory.path().join("ahead")
    }

    /// By how many seconds the time of day is ahead, and how many more have passed since the machine was started.
    pub fn set(&self, of_day_s: i64, passed_s: u64) {
        let new = self.directory.path().join("new");
        std::fs::write(&new, format!("{of_day_s} {passed_s}")).unwrap();
        // As a whole: it is read all the time.
        std::fs::rename(new, self.file()).unwrap();
    }
}
