//! Waits between two attempts: a stop and a request at the control socket end them, both where the
//! database fails and where storage does.

use std::time::Duration;

use rusqlite::Connection;

use crate::support::s3::S3Server;
use crate::support::scene::{COUNTER, Scene};
use crate::support::{Daemon, content, count_up, create_database, number, open, run, stderr, wait_for};

/// Storage, a database, and a configuration of both.
struct Play {
    scene: Scene,
    server: S3Server,
}

impl Play {
    fn new(shutdown_timeout: &str) -> Self {
        let (scene, server) = (Scene::new(), S3Server::start());
        let text = format!(
            "shutdown-timeout = \"{shutdown_timeout}\"\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\n\
             sync-interval = \"50ms\"\n",
            scene.database().display(),
            server.url("app"),
        );
        std::fs::write(scene.path("waltrail.toml"), text).unwrap();
        Self { scene, server }
    }

    fn start(&self) -> Daemon {
        let config = self.scene.path("waltrail.toml").display().to_string();
        self.scene.start_with(&["--config", &config, "--log-level", "debug"])
    }

    /// Waits until a new line of the log with `words` says that a wait of at least `least` begins.
    fn wait_for_wait(&self, words: &str, least: Duration) {
        let seen = self.scene.log().lines().count();
        let is_long = |line: &str| {
            let wait_ms = line.rsplit_once("wait_ms=").and_then(|(_, text)| text.trim().parse::<u64>().ok());
            line.contains(words) && wait_ms.is_some_and(|wait_ms| wait_ms >= least.as_millis() as u64)
        };
        // Waits double at random: a long one may take a minute to come.
        for _ in 0..6000 {
            if self.scene.log().lines().skip(seen).any(is_long) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("no wait of {least:?} begins\n{}", self.scene.log());
    }

    fn sync(&self, timeout: &str) {
        let database = self.scene.database().display().to_string();
        let done = run(["sync", &database, "--timeout", timeout]);
        assert!(done.status.success(), "{}\n{}", stderr(&done), self.scene.log());
    }

    fn wait_for_sync(&self) {
        let database = self.scene.database().display().to_string();
        wait_for("a sync", || run(["sync", &database]).status.success().then_some(()));
    }

    fn assert_restored(&self) {
        let restored = self.scene.restored(&self.server.url("app"), &[]);
        assert_eq!(content(&restored), content(&self.scene.database()), "{}", self.scene.log());
    }
}

const DATABASE_FAILS: &str = "the database can't be followed";
const STORE_FAILS: &str = "waiting to ask the store again";

/// Keeps every other process from using the database, and has commits that no attempt could see.
fn lock(play: &Play) -> Connection {
    let application = open(&play.scene.database());
    application.execute_batch("PRAGMA locking_mode=EXCLUSIVE").unwrap();
    count_up(&application);
    application
}

/// A database that was replicated, and that a daemon can't open since its start.
fn locked_database(shutdown_timeout: &str) -> (Play, Daemon, Connection) {
    let play = Play::new(shutdown_timeout);
    play.scene.expect_error("another process has it locked");
    drop(create_database(&play.scene.database(), 100, ""));
    let daemon = play.start();
    play.wait_for_sync();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    let application = lock(&play);
    let daemon = play.start();
    (play, daemon, application)
}

#[test]
fn stop_while_database_fails_ships_what_became_readable() {
    let (play, daemon, application) = locked_database("10s");
    play.wait_for_wait(DATABASE_FAILS, Duration::from_secs(2));
    count_up(&application);
    drop(application);
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    play.assert_restored();
    assert_eq!(number(&open(&play.scene.database()), COUNTER), 2);
}

#[test]
fn stop_while_database_and_storage_fail_exits_with_15() {
    let (play, daemon, application) = locked_database("2s");
    play.scene.allow_error("stopped with transactions not confirmed");
    play.wait_for_wait(DATABASE_FAILS, Duration::from_secs(2));
    drop(application);
    play.server.refuse(503);
    assert_eq!(daemon.terminate(), Some(15), "{}", play.scene.log());
    play.server.refuse(0);
    let daemon = play.start();
    play.wait_for_sync();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    play.assert_restored();
}

#[test]
fn stop_while_database_fails_for_good_exits_with_1() {
    let (play, daemon, application) = locked_database("10s");
    play.wait_for_wait(DATABASE_FAILS, Duration::from_secs(1));
    assert_eq!(daemon.terminate(), Some(1), "{}", play.scene.log());
    drop(application);
}

#[test]
fn request_while_database_fails_ends_the_wait() {
    let (play, daemon, application) = locked_database("10s");
    play.wait_for_wait(DATABASE_FAILS, Duration::from_secs(6));
    // Answered by an attempt of its own, which fails.
    let database = play.scene.database().display().to_string();
    let done = run(["sync", &database, "--timeout", "4s"]);
    let said = stderr(&done);
    assert_eq!(done.status.code(), Some(1), "{said}\n{}", play.scene.log());
    assert!(said.contains("another process has it locked"), "{said}");
    play.wait_for_wait(DATABASE_FAILS, Duration::from_secs(6));
    drop(application);
    play.sync("4s");
    play.assert_restored();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

/// Storage is away for so long that a wait for it is long.
fn storage_away(shutdown_timeout: &str) -> (Play, Daemon) {
    let play = Play::new(shutdown_timeout);
    let application = create_database(&play.scene.database(), 100, "");
    let daemon = play.start();
    play.wait_for_sync();
    play.server.refuse(503);
    count_up(&application);
    play.wait_for_wait(STORE_FAILS, Duration::from_secs(7));
    play.server.refuse(0);
    (play, daemon)
}

#[test]
fn request_while_storage_fails_ends_the_wait() {
    let (play, daemon) = storage_away("10s");
    play.sync("4s");
    play.assert_restored();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

#[test]
fn stop_while_storage_fails_ends_the_wait() {
    let (play, daemon) = storage_away("4s");
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    play.assert_restored();
}
