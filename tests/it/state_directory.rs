//! A state directory that is removed or replaced while its daemon runs, and a spool whose files are
//! exchanged.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, run, stderr, wait_for};

/// A database in a directory of its own, with its state directory beside it, and a daemon that has
/// stored it.
struct Followed {
    scene: Scene,
    daemon: Daemon,
}

impl Followed {
    fn start(open_databases: usize) -> Self {
        let scene = Scene::new();
        std::fs::create_dir(scene.path("d")).unwrap();
        let database = scene.path("d/app.db");
        drop(create_database(&database, 100, ""));
        let text = format!(
            "open-databases = {open_databases}\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\n",
            database.display(),
            scene.replica()
        );
        std::fs::write(scene.path("waltrail.toml"), text).unwrap();
        let daemon = scene.start_with(&["--config", scene.path("waltrail.toml").to_str().unwrap()]);
        sync(&database);
        Self { scene, daemon }
    }

    fn database(&self) -> PathBuf {
        self.scene.path("d/app.db")
    }

    fn state_dir(&self) -> PathBuf {
        self.scene.path("d/.app.db-waltrail")
    }

    /// Waits until the daemon has said that the directory was replaced, and works with the new one.
    fn check_recovers(self, writer: Option<Writer>) {
        let Self { ref scene, .. } = self;
        wait_for("the replacement to be noticed", || {
            scene.log().contains("was removed or replaced while it was in use").then_some(())
        });
        sync(&self.database());
        assert!(self.state_dir().join("lock").exists() && self.state_dir().join("control").exists());
        let config = scene.path("waltrail.toml").display().to_string();
        let second = run(["replicate", "--config", &config]);
        assert_eq!(second.status.code(), Some(1), "{}", stderr(&second));
        assert!(stderr(&second).contains("another waltrail works with"), "{}", stderr(&second));
        if let Some(writer) = writer {
            writer.end();
        }
        let expected = content(&self.database());
        let log = scene.log();
        assert_eq!(self.daemon.terminate(), Some(0), "{}", scene.log());
        assert_eq!(scene.restored_content(&[]), expected, "{log}");
        let verified = run(["verify", &scene.replica()]);
        let told = String::from_utf8_lossy(&verified.stdout).into_owned();
        assert_eq!(verified.status.code(), Some(0), "{told}{}\n{log}", stderr(&verified));
    }
}

/// Waits for a sync that says everything is confirmed; the database may just be attached again.
fn sync(database: &Path) {
    wait_for("a sync", || run(["sync", database.to_str().unwrap()]).status.success().then_some(()));
}

/// An application that opens the database for each transaction, like a command that is run again
/// and again.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(database: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let write = move || {
            let connection = Connection::open_with_flags(&database, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            connection.busy_timeout(Duration::from_secs(5))?;
            connection.execute_batch("UPDATE counter SET n = n + 1")
        };
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                // It may be away for a moment.
                write().ok();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

#[test]
fn state_directory_removed_under_daemon_is_made_anew() {
    let followed = Followed::start(16);
    let writer = Writer::start(followed.database());
    std::thread::sleep(Duration::from_millis(500));
    // The daemon may meet it half removed, and may make a file in it meanwhile.
    followed.scene.allow_error("the database can't be followed; trying again");
    while followed.state_dir().exists() {
        std::fs::remove_dir_all(followed.state_dir()).ok();
    }
    followed.check_recovers(Some(writer));
}

#[test]
fn state_directory_replaced_by_copy_under_daemon_is_opened_anew() {
    let followed = Followed::start(16);
    let writer = Writer::start(followed.database());
    std::thread::sleep(Duration::from_millis(500));
    // As a file system's snapshot: no transaction is committed while it is made.
    let lock = crate::support::open(&followed.database());
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let [directory, copy, was] = ["d", "copy", "was"].map(|name| followed.scene.path(name));
    assert!(Command::new("cp").arg("-a").arg(&directory).arg(&copy).status().unwrap().success());
    std::fs::rename(&directory, &was).unwrap();
    std::fs::rename(&copy, &directory).unwrap();
    drop(lock);
    followed.check_recovers(Some(writer));
}

#[test]
fn state_directory_removed_from_idle_database_is_made_anew() {
    let followed = Followed::start(0);
    let holds_lock = || {
        let links = std::fs::read_dir(format!("/proc/{}/fd", followed.daemon.id())).unwrap();
        let mut targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        targets.any(|target| target.ends_with("lock"))
    };
    wait_for("the database to be idle", || (!holds_lock()).then_some(()));
    std::fs::remove_dir_all(followed.state_dir()).unwrap();
    count_up(&crate::support::open(&followed.database()));
    followed.check_recovers(None);
}

#[test]
fn state_directory_locked_by_another_daemon_after_replacement_ends_first_one() {
    let mut followed = Followed::start(16);
    followed.scene.expect_error("another waltrail works with");
    let config = followed.scene.path("waltrail.toml").display().to_string();
    followed.daemon.signal(libc::SIGSTOP);
    std::fs::remove_dir_all(followed.state_dir()).unwrap();
    let second = Daemon::start(&["--config", &config], &followed.scene.path("second.log"));
    sync(&followed.database());
    followed.daemon.signal(libc::SIGCONT);
    wait_for("the first daemon to leave", || (!followed.daemon.is_running()).then_some(()));
    assert_eq!(followed.daemon.terminate(), Some(1), "{}", followed.scene.log());
    let database = followed.scene.path("d/app.db");
    count_up(&crate::support::open(&database));
    sync(&database);
    assert_eq!(second.terminate(), Some(0));
    assert_eq!(followed.scene.restored_content(&[]), content(&database));
}

/// As when a part of a spool is put back from somewhere else.
#[test]
fn spooled_segments_with_exchanged_names_are_not_stored() {
    let (scene, server) = (Scene::new(), S3Server::start());
    scene.expect_error("is not the one that its name says");
    scene.allow_error("the database can't be followed; trying again");
    let application = create_database(&scene.database(), 100, "");
    let replica = server.url("app");
    let daemon = scene.start_to(&replica);
    sync(&scene.database());
    server.refuse(503);
    let spool = scene.path(".app.db-waltrail/spool");
    let waiting = || {
        let entries = std::fs::read_dir(&spool).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> = entries.filter(|path| path.is_file() && !path.ends_with("open")).collect();
        files.sort();
        files
    };
    for count in 1..=3 {
        count_up(&application);
        wait_for("a segment to wait", || (waiting().len() >= count).then_some(()));
    }
    let files = waiting();
    std::fs::rename(&files[1], scene.path("second")).unwrap();
    std::fs::rename(&files[2], &files[1]).unwrap();
    std::fs::rename(scene.path("second"), &files[2]).unwrap();
    server.refuse(0);
    wait_for("the mismatch to be found", || scene.log().contains("is not the one that its name says").then_some(()));
    count_up(&application);
    sync(&scene.database());
    assert!(scene.log().contains(files[1].to_str().unwrap()), "{}", scene.log());
    let expected = content(&scene.database());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.restored(&replica, &[])), expected);
    let verified = run(["verify", &replica]);
    assert_eq!(verified.status.code(), Some(0), "{}", String::from_utf8_lossy(&verified.stdout));
}
