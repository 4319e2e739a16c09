//! Bad input: one clear sentence, the right exit code, and nothing harmed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::support::s3::S3Server;
use crate::support::{Daemon, content, count_up, create_database, open, run, stderr, wait_for_restored, waltrail};

/// Fails with `code` and says `says`.
fn fails(arguments: &[&str], code: i32, says: &str) {
    let done = run(arguments);
    let text = stderr(&done);
    assert_eq!(done.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.contains(says), "{arguments:?}: {text}");
    assert!(!text.contains("testtest") && !text.contains("panicked"), "{text}");
}

/// A replica with a few transactions, and the database it is of.
fn make_replica(directory: &Path, replica: &str) {
    let database = directory.join("app.db");
    let application = create_database(&database, 100, "");
    // Not merged: when a minute ends in the middle, the small segments would not be those that are read.
    let config = directory.join("replica.toml");
    let text = format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\nmerge = []\n", database.display());
    std::fs::write(&config, text).unwrap();
    let daemon = Daemon::start(&["--config", config.to_str().unwrap()], &directory.join("daemon.log"));
    for n in 0..3 {
        wait_for_restored(replica, directory, "SELECT n FROM counter", n);
        count_up(&application);
    }
    wait_for_restored(replica, directory, "SELECT n FROM counter", 3);
    count_up(&application);
    assert_eq!(daemon.terminate(), Some(0));
}

#[test]
fn usage_and_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("waltrail.toml");
    let config_name = config.to_str().unwrap();
    fails(&["replicate", "--config", config_name], 10, "can't be read");
    std::fs::write(&config, "[[database]]\npath = \"/a.db\"\nreplika = \"s3://b/a\"\n").unwrap();
    fails(&["replicate", "--config", config_name], 10, "line 3: unknown key 'replika'; did you mean 'replica'?");
    let secret = "replica = { url = \"s3://b/a\", access-key-id = \"x\", secret-access-kye = \"testtest\" }\n";
    std::fs::write(&config, format!("[[database]]\npath = \"/a.db\"\n{secret}")).unwrap();
    fails(&["replicate", "--config", config_name], 10, "did you mean 'secret-access-key'?");
    std::fs::write(&config, "[[database]]\npath = \"/a.db\"\nreplica = \"s3://b/a\"\n").unwrap();
    fails(&["restore", "--config", config_name, "/b.db"], 10, "no database of the configuration");
    fails(&["replicate", "/a.db"], 10, "REPLICA");
    fails(&["replicate", "/a.db", "ftp://x"], 10, "unknown scheme 'ftp'");
    // A file of that name would be waited for, for ever.
    fails(&["replicate", "/data/*.db", "/b"], 10, "the path of a [[database]]");
    fails(&["run", "/data/", "/b", "--", "true"], 10, "the path of a [[database]]");
    fails(&["prune", "s3://b/a", "--retention", "0d"], 10, "would keep nothing");
    fails(&["restore", "s3://b/a"], 10, "--output");
    fails(&["replicate", "/a.db", "/b", "--config", config_name], 10, "--config has nothing to do here");
    fails(&["restore", "s3://b/other", "-o", "x", "--config", config_name], 10, "--config has nothing to do here");
    // A directory's path is a replica as its URL is.
    let plain = directory.path().to_str().unwrap();
    fails(&["log", plain, "--config", config_name], 10, "--config has nothing to do here");
    fails(&["restore", "s3://b/a", "-o", "-", "--force"], 10, "not standard output");
    fails(&["restore", "s3://b/a", "-o", "-", "--if-missing"], 10, "not standard output");
    fails(&["restore", "s3://b/a", "-o", "x", "--at", "yesterdayish"], 10, "is not a time");
    fails(&["restore", "s3://b/a", "-o", "x", "--txid", "1", "--at", "1s ago"], 10, "cannot be used with");
    fails(&["restore", "s3://b/a?secret-access-key=testtest", "-o", "x"], 10, "do not belong in a URL");
    let by_variable = |path: &str| waltrail().arg("replicate").env("WALTRAIL_CONFIG", path).output().unwrap();
    assert!(stderr(&by_variable("/no/such.toml")).contains("/no/such.toml can't be read"));
    assert!(!stderr(&by_variable("")).contains("can't be read"), "set to nothing is not set");
    std::fs::write(&config, "[[database]]\npath = \"/a.db\"\nreplica = \"s3://b/a\"\nspool-limit = \"0B\"\n").unwrap();
    fails(&["config", "check", config_name], 10, "spool-limit must not be 0");
    std::fs::write(&config, "[[database]]\npath = \"/a.db\"\nreplica = \"s3://b/a\"\nretention = \"0d\"\n").unwrap();
    fails(&["config", "check", config_name], 10, "would keep nothing");
    let version = run(["--version"]);
    assert!(version.status.success());
    assert!(String::from_utf8(version.stdout).unwrap().contains("SQLite 3."));
    for command in ["replicate", "restore", "log", "demo"] {
        let help = run([command, "--help"]);
        assert!(help.status.success());
        assert!(String::from_utf8(help.stdout).unwrap().contains("Examples:"), "{command}");
    }
}

#[test]
fn storage_that_refuses() {
    let server = S3Server::start();
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.db");
    let output_name = output.to_str().unwrap();
    let url = server.url("nothing");
    fails(&["restore", &url, "-o", output_name], 12, "there is no backup in s3://backups/nothing");
    fails(&["log", &url], 12, "there is no backup");
    let fine = run(["restore", &url, "-o", output_name, "--if-replica-exists"]);
    assert!(fine.status.success(), "{}", stderr(&fine));
    let no_bucket = url.replace("backups", "elsewhere");
    fails(&["restore", &no_bucket, "-o", output_name, "--if-replica-exists"], 11, "NoSuchBucket");
    let wrong = waltrail()
        .args(["restore", &url, "-o", output_name, "--if-replica-exists"])
        .env("AWS_SECRET_ACCESS_KEY", "wrong")
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(11), "{}", stderr(&wrong));
    assert!(stderr(&wrong).contains("AWS_SECRET_ACCESS_KEY"), "{}", stderr(&wrong));
    let missing = directory.path().join("no-such-directory");
    fails(&["log", &format!("file://{}", missing.display())], 12, "there is no backup");
    assert!(!output.exists());
    assert!(!missing.exists(), "looking makes nothing");
}

#[test]
fn storage_that_is_not_reached() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.db");
    let closed = "s3://b/a?endpoint=http://127.0.0.1:1&region=x";
    let done = run(["restore", closed, "-o", output.to_str().unwrap(), "--if-replica-exists"]);
    let told = stderr(&done);
    assert_eq!(done.status.code(), Some(11), "{told}");
    assert!(told.contains("refused") && told.contains("the store fails; asking it again"), "{told}");
    assert!(!output.exists());
}

#[test]
fn restores_that_are_refused_harm_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let target = directory.path().join("target.db");
    let name = target.to_str().unwrap();
    let old = create_database(&target, 3, "");
    old.execute_batch("UPDATE counter SET n = 99").unwrap();
    fails(&["restore", &replica, "-o", name], 14, "is there already");
    let left = run(["restore", &replica, "-o", name, "--if-missing"]);
    assert!(left.status.success());
    fails(&["restore", &replica, "-o", name, "--force"], 14, "is open in another process");
    drop(old);
    for (arguments, says) in [
        (["--txid", "99999"], "transaction 99999 can't be restored"),
        (["--at", "2001-01-01T00:00:00Z"], "what can be: transactions"),
        (["--epoch", "9"], "there is no epoch 9"),
    ] {
        fails(&["restore", &replica, "-o", name, "--force", arguments[0], arguments[1]], 12, says);
    }
    let planned = run(["restore", &replica, "--dry-run"]);
    assert!(planned.status.success() && stderr(&planned).contains("fingerprint"), "{}", stderr(&planned));
    let planned = run(["restore", &replica, "-o", name, "--dry-run"]);
    assert!(planned.status.success() && stderr(&planned).contains("without --force"), "{}", stderr(&planned));
    let shown = run(["restore", &replica, "-o", name, "--dry-run", "--force"]);
    assert!(shown.status.success() && stderr(&shown).contains("snapshot   snap/00000001/"), "{}", stderr(&shown));
    assert_eq!(crate::support::number(&open(&target), "SELECT n FROM counter"), 99, "the target is as it was");
    // A WAL of the old database must not be taken for the new one's.
    std::fs::write(directory.path().join("target.db-wal"), b"stale").unwrap();
    let done = run(["restore", &replica, "-o", name, "--force"]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(content(&target), content(&directory.path().join("app.db")));
    let stdout = run(["restore", &replica, "-o", "-"]);
    assert!(stdout.status.success());
    assert!(stdout.stdout == std::fs::read(&target).unwrap());
    let left: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("waltrail-restore"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Every object of a replica, damaged in every way: found, named, and no file gets its name.
#[test]
fn damaged_objects_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("replica");
    let replica = root.display().to_string();
    make_replica(directory.path(), &replica);
    let output = directory.path().join("out.db");
    let name = output.to_str().unwrap();
    let only = |folder: &str| {
        let mut paths: Vec<_> =
            std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let segments = only("log/00000001");
    let snapshot = only("snap/00000001").remove(0);
    let (oldest, newest) = (segments[0].clone(), segments.last().unwrap().clone());
    let objects = [oldest, newest, snapshot, root.join("epochs/00000001"), root.join("waltrail.json")];
    for object in objects {
        let whole = std::fs::read(&object).unwrap();
        let shown = object.file_name().unwrap().to_str().unwrap().to_owned();
        let mut damages = vec![whole[..whole.len() / 2].to_vec(), Vec::new()];
        for at in [0, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x80;
            damages.push(flipped);
        }
        for damaged in damages {
            std::fs::write(&object, &damaged).unwrap();
            fails(&["restore", &replica, "-o", name], 13, &shown);
        }
        std::fs::write(&object, &whole).unwrap();
    }
    // Swapped: each is a good object, but not the one that its name says.
    let (first, last) = (std::fs::read(&segments[0]).unwrap(), std::fs::read(segments.last().unwrap()).unwrap());
    assert!(segments.len() > 1);
    std::fs::write(&segments[0], &last).unwrap();
    fails(&["restore", &replica, "-o", name], 13, "it is another segment");
    std::fs::write(&segments[0], &first).unwrap();
    // Every checksum is right, but the content is not what the writer had: the fingerprint tells.
    std::fs::write(segments.last().unwrap(), forged(&last)).unwrap();
    fails(&["restore", &replica, "-o", name], 13, "its fingerprint is");
    std::fs::write(segments.last().unwrap(), &last).unwrap();
    // Missing in the middle.
    std::fs::remove_file(&segments[0]).unwrap();
    fails(&["restore", &replica, "-o", name], 13, "are missing");
    std::fs::write(&segments[0], &first).unwrap();
    // Of a newer program.
    let marker = std::fs::read(root.join("waltrail.json")).unwrap();
    std::fs::write(root.join("waltrail.json"), br#"{"format":2}"#).unwrap();
    fails(&["restore", &replica, "-o", name], 13, "newer waltrail");
    fails(&["log", &replica], 13, "newer waltrail");
    fails(&["replicate", directory.path().join("app.db").to_str().unwrap(), &replica], 13, "format version 2");
    std::fs::write(root.join("waltrail.json"), marker).unwrap();
    assert!(!output.exists());
    assert!(run(["restore", &replica, "-o", name]).status.success());
}

/// A daemon that can't follow its database does not end as if all were well.
#[test]
fn a_database_that_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("app.db");
    std::fs::write(&database, vec![7; 5000]).unwrap();
    let log = directory.path().join("daemon.log");
    let replica = directory.path().join("replica");
    let daemon = Daemon::start(&[database.to_str().unwrap(), replica.to_str().unwrap()], &log);
    let says = "it is not a SQLite database";
    crate::support::wait_for("the complaint", || std::fs::read_to_string(&log).ok().filter(|log| log.contains(says)));
    assert_eq!(daemon.terminate(), Some(1));
    assert_eq!(std::fs::read(&database).unwrap(), vec![7; 5000]);
}

/// A segment with another byte in its last page, and all its checksums right.
pub fn forged(segment: &[u8]) -> Vec<u8> {
    let (whole, mut contents) = crate::support::decoded(segment);
    *contents.last_mut().unwrap().last_mut().unwrap() ^= 1;
    crate::support::encoded(&whole.footer, &whole.transactions, &contents).0
}

/// The database is gone, its WAL is not: it must not be taken for the restored database's.
#[test]
fn a_wal_without_its_database() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let expected = content(&directory.path().join("app.db"));
    let target = directory.path().join("target.db");
    // Made as the replicated one was, so that the WAL would fit.
    let other = create_database(&directory.path().join("other.db"), 100, "");
    other.execute_batch("PRAGMA wal_autocheckpoint=0; DELETE FROM item").unwrap();
    std::fs::copy(directory.path().join("other.db-wal"), directory.path().join("target.db-wal")).unwrap();
    let done = run(["restore", &replica, "-o", target.to_str().unwrap()]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(content(&target), expected);
}

#[test]
fn by_the_path_of_a_configured_database() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let database = directory.path().join("app.db");
    let config = directory.path().join("waltrail.toml");
    let text = format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n", database.display());
    std::fs::write(&config, text).unwrap();
    let expected = content(&database);
    for suffix in ["", "-wal", "-shm"] {
        std::fs::remove_file(directory.path().join(format!("app.db{suffix}"))).ok();
    }
    let arguments = ["restore", "--config", config.to_str().unwrap(), database.to_str().unwrap(), "--if-missing"];
    let done = run(arguments);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(content(&database), expected);
    assert!(run(arguments).status.success(), "the second time there is nothing to do");
}

/// A daemon that was told by arguments knows where its database goes for as long as it runs.
#[test]
fn a_mistake_is_undone_without_a_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let (database, replica) = (directory.path().join("app.db"), directory.path().join("replica"));
    let (name, replica) = (database.to_str().unwrap(), replica.to_str().unwrap());
    let application = create_database(&database, 20, "");
    let daemon = Daemon::start(&[name, replica], &directory.path().join("daemon.log"));
    wait_for_restored(replica, directory.path(), "SELECT n FROM counter", 0);
    let marked = run(["mark", "before-2.0", name]);
    assert!(marked.status.success(), "{}", stderr(&marked));
    count_up(&application);
    assert!(run(["sync", name]).status.success());
    drop(application);
    let undo = ["restore", name, "--mark", "before-2.0", "--force"];
    // Its own path is the target; it is in use, and that tells what to do.
    fails(&undo[..4], 14, "is there already");
    fails(&undo, 14, "stop what uses it");
    assert_eq!(daemon.terminate(), Some(0));
    fails(&undo, 10, "that a daemon follows now");
    fails(&undo, 10, "name the replica (`restore` needs --output, too)");
    let undone = run(["restore", replica, "--output", name, "--mark", "before-2.0", "--force"]);
    assert!(undone.status.success(), "{}", stderr(&undone));
    assert_eq!(crate::support::number(&open(&database), "SELECT n FROM counter"), 0);
}

/// What the configuration keeps of a directory holds for its path as for its URL.
#[test]
fn the_path_of_a_configured_directory_is_its_url() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let config = directory.path().join("waltrail.toml");
    let text = format!("[[database]]\npath = \"{}/app.db\"\nreplica = \"{replica}\"\n", directory.path().display());
    std::fs::write(&config, text + "retention = \"7d\"\n").unwrap();
    for named in [replica.clone(), format!("file://{replica}")] {
        let pruned = run(["prune", "--config", config.to_str().unwrap(), &named, "--dry-run"]);
        assert!(pruned.status.success(), "{named}: {}", stderr(&pruned));
    }
    fails(&["prune", &replica, "--dry-run"], 10, "Say so with --retention");
}

#[test]
fn the_demo_shows_the_main_job() {
    let done = run(["demo"]);
    let text = String::from_utf8(done.stdout.clone()).unwrap();
    assert!(done.status.success(), "{text}\n{}", stderr(&done));
    assert_eq!(text.matches("content as written").count(), 3, "{text}");
    let server = S3Server::start();
    let done = run(["demo", "--replica", &server.url("scratch")]);
    assert!(done.status.success(), "{}", stderr(&done));
}

#[test]
fn a_demo_that_storage_refuses_says_so_at_once() {
    let server = S3Server::start();
    fails(&["demo", "--replica", &server.url("scratch").replace("backups", "elsewhere")], 11, "NoSuchBucket");
}

/// On a busy machine the replicator sees a commit late. Halted where the show notes its first moment, it still shows the truth.
#[test]
fn a_demo_whose_replicator_is_slow() {
    let mut demo = waltrail().arg("demo").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap());
    let mut shown = String::new();
    while !shown.contains("The application goes on") {
        assert!(lines.read_line(&mut shown).unwrap() > 0, "{shown}");
    }
    let replicator: libc::pid_t = children_of(demo.id()).remove(0).parse().unwrap();
    // SAFETY: both send a signal to a process that the demo has not waited for: it does so after the kill, later in the show.
    assert_eq!(unsafe { libc::kill(replicator, libc::SIGSTOP) }, 0);
    // Longer than the transactions before the moment take, which is some 1.3 s.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(unsafe { libc::kill(replicator, libc::SIGCONT) }, 0);
    std::io::Read::read_to_string(&mut lines, &mut shown).unwrap();
    assert!(demo.wait().unwrap().success(), "{shown}");
    assert_eq!(shown.matches("content as written").count(), 3, "{shown}");
}

#[test]
fn a_directory_is_no_target() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let target = directory.path().join("target.db");
    std::fs::create_dir(&target).unwrap();
    let name = target.to_str().unwrap();
    for flag in ["--if-missing", "--force", "--if-replica-exists"] {
        fails(&["restore", &replica, "-o", name, flag], 14, "target.db: is a directory");
    }
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
}

/// `waltrail … 2>&1 | tee log`: Ctrl-C ends `tee`, too. A log that nobody reads must not end a daemon, or a restore.
#[test]
fn nobody_reads_the_log_any_more() {
    for format in ["text", "json"] {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("app.db");
        let replica = directory.path().join("replica").display().to_string();
        let application = create_database(&database, 10, "");
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut daemon = waltrail()
            .args(["--log-level", "debug", "--log-format", format, "replicate", database.to_str().unwrap(), &replica])
            .stderr(writer)
            .spawn()
            .unwrap();
        assert!(std::io::Read::read(&mut reader, &mut [0; 1]).unwrap() > 0, "it has begun to log");
        drop(reader);
        for n in 0..3 {
            wait_for_restored(&replica, directory.path(), "SELECT n FROM counter", n);
            count_up(&application);
        }
        // SAFETY: sends a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(daemon.id() as libc::pid_t, libc::SIGTERM) }, 0);
        assert_eq!(daemon.wait().unwrap().code(), Some(0), "{format}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = directory.path().join("out.db");
        let done = waltrail().args(["restore", &replica, "-o", output.to_str().unwrap()]).stderr(writer).status();
        assert_eq!(done.unwrap().code(), Some(0), "{format}");
        assert_eq!(content(&output), content(&database));
    }
}

/// `waltrail … | head`: who has read enough is no failure.
#[test]
fn nobody_reads_standard_output_any_more() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let output = directory.path().join("out.db");
    let restore = ["restore", &replica, "-o", output.to_str().unwrap(), "--format", "json"];
    for arguments in [&restore[..], &["doctor", &replica], &["completions", "bash"], &["log", &replica]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let done = waltrail().args(arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(done.status.code(), Some(0), "{arguments:?}: {}", stderr(&done));
    }
    assert_eq!(content(&output), content(&directory.path().join("app.db")));
}

/// The processes whose parent is `pid`.
fn children_of(pid: u32) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let parent = |process: &String| {
        // Not a process, or one that has ended meanwhile: no parent. The name, in parentheses, may hold anything.
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    processes.filter(|process| parent(process) == Some(pid)).collect()
}

/// However the demo ends, it leaves neither files nor a replicator behind.
#[test]
fn a_demo_that_is_cut_short() {
    let directory = tempfile::tempdir().unwrap();
    let demo = || {
        let mut command = waltrail();
        command.arg("demo").env("TMPDIR", directory.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let first_line = |child: &mut Child| {
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_line(&mut String::new()).unwrap();
        lines
    };
    let mut unread = demo();
    drop(first_line(&mut unread));
    let done = unread.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(stderr(&done).starts_with("error: can't write to standard output"), "{}", stderr(&done));

    let mut interrupted = demo();
    let mut lines = first_line(&mut interrupted);
    let mut shown = String::new();
    while !shown.contains("The application goes on") {
        assert!(lines.read_line(&mut shown).unwrap() > 0, "{shown}");
    }
    let replicators = children_of(interrupted.id());
    assert_eq!(replicators.len(), 1);
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(interrupted.id() as libc::pid_t, libc::SIGTERM) }, 0);
    let done = interrupted.wait_with_output().unwrap();
    assert_eq!((done.status.code(), stderr(&done).contains("interrupted")), (Some(1), true), "{}", stderr(&done));
    assert!(!Path::new("/proc").join(&replicators[0]).exists(), "the replicator is gone");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the temporary directory is gone");
}

#[test]
fn a_configuration_is_checked_without_being_used() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("waltrail.toml");
    let text = "[[database]]\npath = \"${APP_DATA}/app.db\"\nreplica = \"s3://b/${NOT_SET:-app}\"\n";
    std::fs::write(&file, text).unwrap();
    let check = || {
        crate::support::waltrail().args(["config", "check", file.to_str().unwrap()]).env("APP_DATA", "/srv").output()
    };
    let done = check().unwrap();
    let told = String::from_utf8(done.stdout.clone()).unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(told.contains("/srv/app.db\n  to s3://b/app, every 1s under load, kept for 30d"), "{told}");
    std::fs::write(&file, text.replace(":-app", "")).unwrap();
    let done = check().unwrap();
    assert_eq!(done.status.code(), Some(10));
    assert!(stderr(&done).contains("line 3: the environment variable NOT_SET is not set"), "{}", stderr(&done));
}

#[test]
fn many_databases_are_checked_too() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("waltrail.toml");
    let text = "[[database]]\npath = \"/srv/*.db\"\nreplica = \"s3://b/fleet\"\n";
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let done = run(["config", "check", file.to_str().unwrap()]);
        assert!(done.status.success(), "{}", stderr(&done));
        String::from_utf8(done.stdout).unwrap()
    };
    let told = check(text);
    assert!(told.contains("good: 0 databases, and 1 pattern or directory of many\n/srv/*.db\n"), "{told}");
    assert!(told.contains("each to its own place below s3://b/fleet, every 1s under load, kept for 30d"), "{told}");
    assert!(told.contains("local state beside each"), "{told}");
    let told = check(&format!("{text}state-dir = \"/var/state\"\n"));
    assert!(told.contains("local state in /var/state"), "{told}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let bash = run(["completions", "bash"]);
    assert!(String::from_utf8(bash.stdout).unwrap().contains("--before-schema-change"));
    assert!(run(["man", directory.path().to_str().unwrap()]).status.success());
    for page in ["waltrail.1", "waltrail-restore.1", "waltrail-config-check.1"] {
        let text = std::fs::read_to_string(directory.path().join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
}

/// What opening a database that is not there leaves.
#[test]
fn an_empty_file_is_no_database() {
    let directory = tempfile::tempdir().unwrap();
    let replica = directory.path().join("replica").display().to_string();
    make_replica(directory.path(), &replica);
    let expected = content(&directory.path().join("app.db"));
    for (name, arguments) in [("one.db", vec!["--if-missing"]), ("two.db", vec![])] {
        let target = directory.path().join(name);
        std::fs::write(&target, "").unwrap();
        let done = run([vec!["restore", &replica, "-o", target.to_str().unwrap()], arguments].concat());
        assert!(done.status.success(), "{name}: {}", stderr(&done));
        assert_eq!(content(&target), expected, "{name}");
    }
}

/// Buckets of two servers may have one name.
#[test]
fn a_url_with_parameters_means_what_it_says() {
    let (one, two) = (S3Server::start(), S3Server::start());
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("first.db"), directory.path().join("second.db"));
    let config = directory.path().join("waltrail.toml");
    let mut text = String::new();
    for (database, server, rows) in [(&first, &one, 10), (&second, &two, 30)] {
        drop(create_database(database, rows, ""));
        text += &format!("[[database]]\npath = \"{}\"\nreplica = \"{}\"\n", database.display(), server.url("app"));
    }
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let shipped = run(["run", "--config", config, "--", "true"]);
    assert!(shipped.status.success(), "{}", stderr(&shipped));
    let output = directory.path().join("out.db");
    for (database, server) in [(&first, &one), (&second, &two)] {
        let url = server.url("app");
        let endpoint_alone = url.split('&').next().unwrap();
        for url in [url.as_str(), endpoint_alone, &url.replace("&region", "/&region")] {
            let done = run(["restore", "--config", config, url, "-o", output.to_str().unwrap(), "--force"]);
            assert!(done.status.success(), "{url}: {}", stderr(&done));
            assert_eq!(content(&output), content(database), "{url}");
        }
        let url = url.replace("us-east-1", "eu-west-1");
        fails(&["verify", "--config", config, &url], 10, "with other parameters");
        fails(&["prune", "--config", config, &url], 10, "with other parameters");
    }
    let elsewhere = "s3://backups/app?endpoint=http://127.0.0.1:1";
    fails(&["prune", "--config", config, elsewhere], 10, "with other parameters");
    fails(&["prune", "--config", config, "s3://backups/app"], 10, "on several servers");
}
