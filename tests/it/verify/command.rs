//! `waltrail verify`, the built program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{count_up, create_database, insert, run, stderr, wait_for, waltrail};

/// Runs the command; its exit code must be this one.
fn verified(code: i32, arguments: &[&str]) -> Output {
    let done = run([&["verify"], arguments].concat());
    let told = format!("{}\n{}", stdout(&done), stderr(&done));
    assert_eq!(done.status.code(), Some(code), "{arguments:?}\n{told}");
    done
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A scene whose daemon has shipped so many transactions and stopped.
fn shipped(transactions: i64) -> Scene {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    scene.wait_for(0);
    for _ in 0..transactions {
        count_up(&application);
    }
    scene.wait_for(transactions);
    drop(application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    scene
}

fn only_below(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Every tag that is opened is closed, and what is in quotes is escaped. Gives how often each tag is there.
fn check_xml(text: &str) -> BTreeMap<String, usize> {
    let (mut open, mut counts) = (Vec::new(), BTreeMap::new());
    let mut rest = text.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").unwrap();
    while let Some(at) = rest.find('<') {
        let between = &rest[..at];
        assert!(!between.contains('>'), "{between}");
        let end = rest[at..].find('>').unwrap() + at;
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "{tag}");
        let name = tag.trim_matches('/').split(' ').next().unwrap().to_owned();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_ref(), Some(&name), "{text}");
        } else {
            *counts.entry(name.clone()).or_insert(0) += 1;
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?}");
    for (at, _) in text.match_indices('&') {
        let entity = text[at..].split(';').next().unwrap();
        assert!(["&amp", "&lt", "&gt", "&quot", "&apos", "&#10", "&#9"].contains(&entity), "{entity}");
    }
    counts
}

#[test]
fn verdicts_and_formats_of_the_command() {
    let scene = shipped(5);
    let replica = scene.replica();
    let scratch = scene.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let scratch_name = scratch.to_str().unwrap();
    for depth in ["structure", "data", "drill"] {
        let done = verified(0, &[&replica, "--depth", depth, "--scratch", scratch_name]);
        assert!(stdout(&done).contains("verdict    ok"), "{}", stdout(&done));
    }
    let found = stdout(&verified(0, &[&replica, "--format", "json", "--seed", "5"]));
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!((found["verdict"].as_str(), found["seed"].as_u64()), (Some("ok"), Some(5)), "{found}");
    assert!(found["newest"]["txid"].as_u64() >= Some(2), "{found}");
    let tags = check_xml(&stdout(&verified(0, &[&replica, "--format", "junit"])));
    assert_eq!((tags["testsuite"], tags.get("failure")), (1, None), "{tags:?}");

    std::fs::write(Path::new(&replica).join("a & \"b\" <c>"), "x").unwrap();
    let done = verified(1, &[&replica]);
    assert!(stdout(&done).contains("degraded   not of this replica, or left over: a & \"b\" <c>"), "{}", stdout(&done));
    let tags = check_xml(&stdout(&verified(1, &[&replica, "--format", "junit"])));
    assert_eq!(tags["failure"], 1, "{tags:?}");
    let snapshot = only_below(&Path::new(&replica).join("snap/00000001")).remove(0);
    let whole = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, &whole[..whole.len() - 1]).unwrap();
    let done = verified(2, &[&replica]);
    assert!(stdout(&done).contains("failed     snap/00000001/"), "{}", stdout(&done));
    // Several: one's trouble does not stop the next; the gravest counts.
    let nothing = scene.path("nothing");
    let away = "s3://b/a?endpoint=http://127.0.0.1:1&region=x";
    verified(12, &[&format!("file://{}", nothing.display())]);
    let done = verified(2, &[away, &replica, "--format", "json"]);
    let lines: Vec<serde_json::Value> = stdout(&done).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines[0]["exit_code"].as_u64(), lines[1]["verdict"].as_str()), (Some(11), Some("failed")));
    std::fs::write(&snapshot, &whole).unwrap();
    let done = verified(11, &[&format!("file://{}", nothing.display()), away, &replica, "--format", "junit"]);
    let tags = check_xml(&stdout(&done));
    assert_eq!((tags["testsuite"], tags["error"]), (3, 2), "{tags:?}");
    assert!(only_below(&scratch).is_empty());
    // For a job's page.
    let summary = scene.path("summary.md");
    let done = waltrail().args(["verify", &replica]).env("GITHUB_STEP_SUMMARY", &summary).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    let summary = std::fs::read_to_string(summary).unwrap();
    assert!(summary.contains("| degraded |") && summary.contains("**degraded** not of this replica"), "{summary}");
    for wrong in
        [["--sample", "5"], ["--points", "0"], ["--depth", "deep"], ["--scratch", "/no/such"], ["--max-lag", "x"]]
    {
        verified(10, &[&[replica.as_str()], &wrong[..]].concat());
    }
    verified(10, &["no-such-replica"]);
}

/// A verdict must not be taken for one of more than was looked at.
#[test]
fn what_says_nothing_at_a_depth_is_refused() {
    for (arguments, says) in [
        (&["--sample", "1%"][..], "--sample goes with --depth data"),
        (&["--depth", "structure", "--points", "20"], "--points goes with --depth drill"),
        (&["--depth", "data", "--points", "20"], "--points goes with --depth drill"),
        (&["--depth", "structure", "--no-integrity-check"], "--no-integrity-check goes with --depth drill"),
        (&["--depth", "data", "--sample", "0%"], "more than 0%"),
    ] {
        let done = verified(10, &[&["s3://b/a"], arguments].concat());
        assert!(stderr(&done).contains(says), "{arguments:?}: {}", stderr(&done));
    }
}

#[test]
fn a_replica_in_s3() {
    let server = S3Server::start();
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let replica = server.url("app");
    let daemon = scene.start_to(&replica);
    crate::support::wait_for_restored(&replica, scene.directory.path(), crate::support::scene::COUNTER, 0);
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    for depth in ["structure", "data", "drill"] {
        verified(0, &[&replica, "--depth", depth]);
    }
    // The last transactions are gone without a trace: only the live database tells.
    for segment in only_below(&server.path("app/log/00000001")) {
        std::fs::remove_file(segment).unwrap();
    }
    verified(0, &[&replica]);
    let done = verified(2, &[&replica, "--against", scene.database().to_str().unwrap()]);
    assert!(stdout(&done).contains("the live database and transaction"), "{}", stdout(&done));
}

#[test]
fn storage_that_refuses_is_no_verdict() {
    let server = S3Server::start();
    verified(12, &[&server.url("nothing")]);
    let no_bucket = server.url("nothing").replace("backups", "elsewhere");
    verified(11, &[&no_bucket]);
}

/// The pages are those that were written; what was written is damaged.
#[test]
fn a_database_that_sqlite_calls_corrupt() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    verified(0, &[&scene.replica()]);
    application
        .execute_batch(
            "PRAGMA writable_schema=ON;
             UPDATE sqlite_schema SET sql = 'CREATE INDEX item_hash ON item(body)' WHERE name = 'item_hash';
             PRAGMA writable_schema=OFF;",
        )
        .unwrap();
    drop(application);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let done = verified(2, &[&scene.replica(), "--points", "1"]);
    assert!(stdout(&done).contains("SQLite calls the database corrupt, as it was then: "), "{}", stdout(&done));
    verified(0, &[&scene.replica(), "--points", "1", "--no-integrity-check"]);
    verified(0, &[&scene.replica(), "--depth", "data"]);
}

/// While it is written to by an application, followed by a daemon, and after both have stopped.
#[test]
fn against_the_live_database() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    let (replica, database) = (scene.replica(), scene.database().display().to_string());
    let against = [&replica, "--against", database.as_str(), "--points", "1"];
    for _ in 0..3 {
        insert(&application, 20);
        let done = verified(0, &against);
        assert!(stdout(&done).contains("the live database is transaction"), "{}", stdout(&done));
    }
    // Schema changes, a larger cookie, and pages that were cut off.
    application.execute_batch("CREATE TABLE more(x); DELETE FROM item; VACUUM").unwrap();
    verified(0, &against);
    // Another database's daemon has confirmed what is not in this replica.
    let other = shipped(3);
    let done = verified(2, &[&other.replica(), "--against", &database, "--points", "1"]);
    assert!(stdout(&done).contains("failed "), "{}", stdout(&done));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    verified(0, &against);
    // The schema cookie alone, and a page alone.
    application.execute_batch("PRAGMA schema_version = 1000").unwrap();
    let done = verified(2, &against);
    assert!(stdout(&done).contains("differ in one page, page 1;"), "{}", stdout(&done));
    count_up(&application);
    let done = verified(2, &against);
    assert!(stdout(&done).contains("differ in 2 pages; the first one is page 1;"), "{}", stdout(&done));
    insert(&application, 100);
    let done = verified(2, &against);
    let told = stdout(&done);
    assert!(told.contains("pages; the first one is page") && told.contains("no daemon follows"), "{told}");
    assert!(scene.wal_len() > 0, "it left the WAL alone");
    verified(10, &[&replica, "--against", "/no/such.db"]);
    verified(10, &[&replica, &other.replica(), "--against", &database]);
}

#[test]
fn an_application_that_never_stops_writing() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    let (replica, database) = (scene.replica(), scene.database().display().to_string());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let writing = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            count_up(&application);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    for _ in 0..4 {
        verified(0, &[&replica, "--points", "5"]);
        verified(0, &[&replica, "--depth", "data"]);
    }
    let done = run(["verify", &replica, "--against", &database, "--points", "1"]);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.join().unwrap();
    let told = stdout(&done);
    assert!(matches!(done.status.code(), Some(0 | 1)), "{told}");
    assert!(done.status.code() == Some(0) || told.contains("was written to each of"), "{told}");
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

/// An idle database is known to be idle when its daemon says so.
#[test]
fn presence_of_a_daemon() {
    let scene = Scene::new();
    let config = scene.path("waltrail.toml");
    let application = create_database(&scene.database(), 3, "");
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\npresence-interval = \"200ms\"\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let daemon = scene.start_with(&["--config", config]);
    count_up(&application);
    scene.wait_for(1);
    std::thread::sleep(Duration::from_secs(3));
    // All databases of the configuration.
    let done = verified(0, &["--config", config, "--max-lag", "2s"]);
    assert!(stdout(&done).contains("freshness"), "{}", stdout(&done));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    wait_for("a stale replica", || {
        let done = run(["verify", "--config", config, "--max-lag", "2s", "--depth", "structure"]);
        (done.status.code() == Some(1) && stdout(&done).contains("the daemon was last there at")).then_some(())
    });
    drop(application);
    let done = run(["log", &scene.replica()]);
    assert!(!stderr(&done).contains("presence"), "{}", stderr(&done));
}

/// Nothing stays in the scratch directory.
#[test]
fn an_interruption_cleans_up() {
    let scene = shipped(40);
    let scratch = scene.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let mut child = waltrail()
        .args(["verify", &scene.replica(), "--points", "10000", "--scratch", scratch.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..20_000 {
        if !only_below(&scratch).is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(only_below(&scratch).is_empty());
}
