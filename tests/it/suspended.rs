//! The reader of the log stops reading, or the daemon itself is stopped by SIGSTOP: the application
//! comes first, and nothing is lost.

use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::runtime::Runtime;
use waltrail::replicate::control::{Request, ask};

use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, number, run, stderr, wait_for};

const PIPE_BYTES: libc::c_int = 4096;

/// Lines that the log may hold for a reader that stops.
const LINES_LIMIT: usize = 4096;

fn sync(scene: &Scene) {
    let database = scene.database().display().to_string();
    let done = run(["sync", &database, "--timeout", "20s"]);
    assert!(done.status.success(), "{}", stderr(&done));
}

/// A daemon that logs much, into a pipe that nobody reads and that is full.
fn start_unread(scene: &Scene) -> (Daemon, PipeReader, Connection) {
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nsync-interval = \"5ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(scene.path("waltrail.toml"), text).unwrap();
    let application = create_database(&scene.database(), 50, "");
    let (log, writer) = std::io::pipe().unwrap();
    // SAFETY: passes numbers only.
    assert!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) } > 0);
    let config = scene.path("waltrail.toml").display().to_string();
    let daemon = Daemon::start_piped(&["--config", &config, "--log-level", "trace"], writer);
    wait_for("a log that is full", || {
        count_up(&application);
        let mut unread: libc::c_int = 0;
        // SAFETY: writes one integer, which is there.
        assert_eq!(unsafe { libc::ioctl(log.as_raw_fd(), libc::FIONREAD, &mut unread) }, 0);
        // A line that has no room is not written in part.
        (unread > PIPE_BYTES - 300).then_some(())
    });
    (daemon, log, application)
}

#[test]
#[allow(clippy::disallowed_methods)]
fn log_reader_that_stops_stops_neither_capture_nor_exit() {
    let scene = Scene::new();
    let (daemon, _log, application) = start_unread(&scene);
    for _ in 0..20 {
        count_up(&application);
        sync(&scene);
    }
    let busy = number(&application, "PRAGMA wal_checkpoint(TRUNCATE)");
    assert_eq!(busy, 0, "the pin moves");
    count_up(&application);
    let begun = Instant::now();
    assert_eq!(daemon.terminate(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(scene.restored_content(&[]), content(&scene.database()));
}

#[test]
fn log_lines_lost_are_reported_when_reader_continues() {
    let scene = Scene::new();
    let (daemon, mut log, application) = start_unread(&scene);
    let (runtime, database, state_dir) = (Runtime::new().unwrap(), scene.database(), scene.path(".app.db-waltrail"));
    for _ in 0..LINES_LIMIT {
        count_up(&application);
        runtime.block_on(ask(&database, &state_dir, Request::Sync, Duration::from_secs(20))).unwrap();
    }
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        text
    });
    // The queue is empty by then: what is logged at the stop has room.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(daemon.terminate(), Some(0));
    let text = reading.join().unwrap();
    // Lines that come while the reader catches up may be lost, too, and are reported after it has.
    let lost = text.lines().filter(|line| line.contains("log lines were lost"));
    let lost: Vec<usize> = lost.map(|line| line.rsplit_once("lines=").unwrap().1.parse().unwrap()).collect();
    assert!(!lost.is_empty() && lost.iter().all(|&lines| lines > 0), "{lost:?}");
    assert!(text.contains("stopped; everything is confirmed"), "{text}");
}

/// What docs/OPERATIONS.md says of a daemon that is stopped and not ended.
#[test]
fn daemon_stopped_by_sigstop_holds_up_checkpoints_until_it_continues_or_ends() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "PRAGMA wal_autocheckpoint=0");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    let truncate = || number(&application, "PRAGMA wal_checkpoint(TRUNCATE)");
    application.busy_timeout(Duration::from_millis(200)).unwrap();
    let write_while_stopped = || {
        count_up(&application);
        std::thread::sleep(Duration::from_millis(50));
        daemon.signal(libc::SIGSTOP);
        let before_bytes = scene.wal_len();
        for _ in 0..50 {
            count_up(&application);
        }
        assert_eq!(truncate(), 1, "it is held up");
        assert!(scene.wal_len() > before_bytes + 50 * 4096, "the WAL grows");
    };
    write_while_stopped();
    daemon.signal(libc::SIGCONT);
    sync(&scene);
    wait_for("a checkpoint", || (truncate() == 0).then_some(()));
    write_while_stopped();
    daemon.kill();
    assert_eq!(truncate(), 0, "the kernel has released its locks");
    let daemon = scene.start();
    wait_for("a sync", || run(["sync", scene.database().to_str().unwrap()]).status.success().then_some(()));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(scene.restored_content(&[]), content(&scene.database()));
}
