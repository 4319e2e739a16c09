//! Objects that the store has answered for and does not have: found by whom, told how, and what makes good for them. The daemon never asks
//! for what is confirmed, so it goes on; `verify` finds it, by hand or as the daemon's own drill.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::Connection;

use crate::support::s3::S3Server;
use crate::support::scene::{Scene, now_ms};
use crate::support::{Daemon, content, count_up, create_database, insert, run, stderr, wait_for};

struct Play {
    scene: Scene,
    server: S3Server,
    application: Connection,
    config: String,
}

impl Play {
    fn new(more: &str) -> Self {
        let (scene, server) = (Scene::new(), S3Server::start());
        let application = create_database(&scene.database(), 100, "");
        let config = scene.path("waltrail.toml").display().to_string();
        let text = format!(
            "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nsync-interval = \"20ms\"\n{more}",
            scene.database().display(),
            server.url("app"),
        );
        std::fs::write(&config, text).unwrap();
        Self { scene, server, application, config }
    }

    /// When it returns, the first snapshot is there: what is written from then on is in segments.
    fn start(&self) -> Daemon {
        let daemon = self.scene.start_with(&["--config", &self.config]);
        wait_for("a sync", || self.ask("sync").then_some(()));
        daemon
    }

    /// Writes, until it is confirmed; gives the last transaction and what the database holds.
    fn write(&self) -> (String, Vec<String>) {
        insert(&self.application, 5);
        count_up(&self.application);
        assert!(self.ask("sync"), "{}", self.scene.log());
        (self.status()["confirmed"]["position"]["txid"].to_string(), content(&self.scene.database()))
    }

    fn ask(&self, what: &str) -> bool {
        run([what, self.scene.database().to_str().unwrap()]).status.success()
    }

    fn status(&self) -> serde_json::Value {
        let status = run(["status", self.scene.database().to_str().unwrap(), "--format", "json"]);
        serde_json::from_slice(&status.stdout).unwrap()
    }

    fn objects(&self, folder: &str) -> Vec<PathBuf> {
        self.files(&format!("{folder}/00000001"))
    }

    fn files(&self, folder: &str) -> Vec<PathBuf> {
        let folder = self.server.path(&format!("app/{folder}"));
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    fn lose_newest(&self, folder: &str) {
        std::fs::remove_file(self.objects(folder).pop().unwrap()).unwrap();
    }

    fn restored(&self, arguments: &[&str]) -> Vec<String> {
        content(&self.scene.restored(&self.server.url("app"), arguments))
    }

    /// Exit code and what is said.
    fn verify(&self) -> (Option<i32>, String) {
        let done = run(["verify", &self.server.url("app"), "--depth", "structure"]);
        (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned())
    }

    fn fails(&self, arguments: &[&str], code: i32, says: &str) {
        let output = self.scene.path("never.db");
        let url = self.server.url("app");
        let done = run([&["restore", &url, "--output", output.to_str().unwrap()], arguments].concat());
        assert_eq!(done.status.code(), Some(code), "{}", stderr(&done));
        assert!(stderr(&done).contains(says), "{}", stderr(&done));
        assert!(!output.exists());
    }
}

/// In the middle of a line: what comes before it and, from the next snapshot on, what comes behind it can be restored.
#[test]
fn a_segment_that_is_lost_is_told_and_a_snapshot_makes_good_for_it() {
    let play = Play::new("merge = [\"1h\"]\nverify-interval = \"1s\"\n");
    play.scene.expect_error("the replica could not be verified");
    let daemon = play.start();
    let (before, before_content) = play.write();
    play.write();
    play.lose_newest("log");
    let (after, after_content) = play.write();
    let (code, told) = play.verify();
    assert!(code == Some(2) && told.contains("missing"), "{code:?} {told}");
    play.fails(&[], 13, "are missing");
    play.fails(&["--txid", &after], 13, "are missing");
    assert_eq!(play.restored(&["--txid", &before]), before_content);
    // The daemon's own drill sees it, too; the application and shipping go on.
    wait_for("the drill", || {
        play.status()["verify_trouble"].as_str().map(|said| assert!(said.contains("can't be restored"), "{said}"))
    });
    assert!(play.ask("snapshot"));
    assert_eq!(play.restored(&[]), after_content);
    let (last, last_content) = play.write();
    assert_eq!(play.restored(&["--txid", &last]), last_content);
    assert_eq!(play.restored(&["--txid", &before]), before_content);
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

/// The last one: nothing in storage tells of it. When its time is over it is stored again as a part of a larger one.
#[test]
fn a_segment_that_is_lost_comes_back_when_it_is_merged() {
    let play = Play::new("merge = [\"200ms\", \"1s\", \"3s\"]\n");
    let daemon = play.start();
    // What is alone in its window is merged with nothing.
    wait_for("the begin of a window", || (now_ms() % 3000 < 500).then_some(()));
    let (lost, lost_content) = play.write();
    play.lose_newest("log");
    play.fails(&["--txid", &lost], 12, &lost);
    let (last, last_content) = wait_for("the larger one", || {
        std::thread::sleep(Duration::from_millis(200));
        Some(play.write()).filter(|_| play.verify().0 == Some(0))
    });
    assert_eq!(play.restored(&["--txid", &lost]), lost_content);
    assert_eq!(play.restored(&["--txid", &last]), last_content);
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

/// A start looks whether all that was confirmed is there, and does not go on from what is not.
#[test]
fn a_start_does_not_go_on_behind_a_segment_that_is_lost() {
    let play = Play::new("merge = [\"1h\"]\n");
    let daemon = play.start();
    let (before, before_content) = play.write();
    play.write();
    play.lose_newest("log");
    play.write();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    let daemon = play.start();
    let (last, last_content) = play.write();
    let claims = play.scene.log().matches("continues=false").count();
    assert_eq!(claims, 2, "{}", play.scene.log());
    assert_eq!(play.restored(&["--txid", &last]), last_content);
    assert_eq!(play.restored(&["--txid", &before, "--epoch", "1"]), before_content);
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

/// The record of an epoch: its number is not given to another one, whose segments would stand among those that are there.
#[test]
fn an_epoch_that_lost_its_record_is_not_taken_for_a_new_one() {
    let play = Play::new("");
    let daemon = play.start();
    for _ in 0..3 {
        play.write();
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    for path in play.files("epochs") {
        std::fs::remove_file(path).unwrap();
    }
    let daemon = play.start();
    let (_, expected) = play.write();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    let records: Vec<String> = play.files("epochs").iter().map(|path| path.display().to_string()).collect();
    assert!(records.len() == 1 && records[0].ends_with("/00000002"), "{records:?}");
    assert_eq!(play.restored(&[]), expected);
}

/// Of a snapshot: an older one serves as well, if there is one; the next one does not rely on what is gone.
#[test]
fn a_snapshot_that_is_lost_is_made_good_for_by_the_next_one() {
    let play = Play::new("merge = [\"1h\"]\n");
    let daemon = play.start();
    let (_, first_content) = play.write();
    assert!(play.ask("snapshot"));
    play.lose_newest("snap");
    assert_eq!(play.restored(&[]), first_content);
    play.lose_newest("snap");
    play.fails(&[], 12, "snapshot");
    assert_eq!(play.verify().0, Some(12));
    let (_, content) = play.write();
    assert!(play.ask("snapshot"));
    assert_eq!(play.restored(&[]), content);
    assert_eq!(play.verify().0, Some(0));
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
}

/// Copies of objects beside them, as tools and people leave them: nobody takes one for the object.
#[test]
fn objects_that_are_there_twice() {
    let play = Play::new("");
    let daemon = play.start();
    play.write();
    let (last, last_content) = play.write();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    for object in play.objects("log").into_iter().chain(play.objects("snap")) {
        let name = object.file_name().unwrap().to_str().unwrap();
        for copy in [format!("{name}.bak"), format!("{name} (1)"), format!("copy-of-{name}")] {
            std::fs::copy(&object, object.with_file_name(copy)).unwrap();
        }
    }
    assert_eq!(play.restored(&[]), last_content);
    assert_eq!(play.restored(&["--txid", &last]), last_content);
    let (code, told) = play.verify();
    assert!(code == Some(1) && told.contains("not of this replica") && told.contains(".bak"), "{code:?} {told}");
    // A start goes on as if they were not there.
    let daemon = play.start();
    let (_, content_after) = play.write();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    assert_eq!(play.restored(&[]), content_after);
    assert_eq!(play.scene.log().matches("continues=true").count(), 1, "{}", play.scene.log());
    // One that claims another time by its name says itself that it is not what its name says.
    let newest = play.objects("log").into_iter().rfind(|path| !path.to_str().unwrap().contains("copy")).unwrap();
    let name =
        newest.file_name().unwrap().to_str().unwrap().trim_end_matches(".bak").trim_end_matches(" (1)").to_owned();
    let (span, time) = name.rsplit_once('-').unwrap();
    let later = u64::from_str_radix(time, 16).unwrap() + 1;
    std::fs::copy(&newest, newest.with_file_name(format!("{span}-{later:012x}"))).unwrap();
    let (code, told) = play.verify();
    assert!(code != Some(0) && told.contains(&format!("{later:012x}")), "{code:?} {told}");
}
