//! `waltrail run`: the entry point of a container.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::oracle::Oracle;
use crate::support::s3::S3Server;
use crate::support::scene::{COUNTER, Scene, now_ms};
use crate::support::{content, count_up, create_database, number, open, run, stderr, wait_for, waltrail};

/// A scene whose database is in the replica alone.
fn lost() -> (Scene, Vec<String>) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0));
    drop(application);
    let before = content(&scene.database());
    for file in ["app.db", "app.db-wal", "app.db-shm"] {
        std::fs::remove_file(scene.path(file)).ok();
    }
    std::fs::remove_dir_all(scene.path(".app.db-waltrail")).unwrap();
    (scene, before)
}

fn run_in(scene: &Scene, command: &[&str]) -> Output {
    let mut run = waltrail();
    run.arg("run").arg(scene.database()).arg(scene.replica()).arg("--").args(command);
    run.output().unwrap()
}

fn sql(database: &Path, sql: &str) -> String {
    format!("sqlite3 -cmd '.timeout 5000' '{}' \"{sql}\"", database.display())
}

#[test]
fn restores_what_is_missing_and_ships_what_the_command_wrote() {
    let (scene, before) = lost();
    let script = sql(&scene.database(), "SELECT n FROM counter; UPDATE counter SET n = 41; UPDATE counter SET n = 42");
    let done = run_in(&scene, &["sh", "-c", &script]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "1", "the command found what was restored");
    assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), COUNTER), 42);
    let known = scene.restored_content(&["--epoch", "1"]);
    assert_eq!(known, before, "the epoch before is still there");
}

#[test]
fn begins_empty_where_there_is_no_backup() {
    let scene = Scene::new();
    let script =
        sql(&scene.database(), "PRAGMA journal_mode=WAL; CREATE TABLE counter(n); INSERT INTO counter VALUES(5)");
    let done = run_in(&scene, &["sh", "-c", &script]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(!stderr(&done).contains("was never there"), "{}", stderr(&done));
    assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), COUNTER), 5);
}

#[test]
fn the_exit_code_is_the_commands_own() {
    let (scene, _) = lost();
    assert_eq!(run_in(&scene, &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(run_in(&scene, &["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    let unknown = run_in(&scene, &["/no/such/program"]);
    assert_eq!(unknown.status.code(), Some(127), "{}", stderr(&unknown));
    assert_eq!(run_in(&scene, &["/etc/passwd"]).status.code(), Some(126));
}

#[test]
fn signals_reach_the_command() {
    let (scene, _) = lost();
    let (ready, database) = (scene.path("ready"), scene.database());
    let script = format!(
        "trap \"{}; exit 3\" TERM; touch started; while :; do sleep 0.05; done",
        sql(&database, "UPDATE counter SET n = 9").replace('"', "\\\"")
    );
    let mut run = waltrail();
    run.current_dir(scene.directory.path()).arg("run").arg("--ready-file").arg(&ready);
    run.arg(&database).arg(scene.replica()).args(["--", "sh", "-c", &script]).stdin(Stdio::null());
    let mut running = run.stderr(Stdio::null()).spawn().unwrap();
    wait_for("the command", || (ready.exists() && scene.path("started").exists()).then_some(()));
    let signalled = Command::new("kill").args(["-TERM", &running.id().to_string()]).status().unwrap();
    assert!(signalled.success());
    assert_eq!(running.wait().unwrap().code(), Some(3));
    assert!(!ready.exists());
    assert_eq!(number(&open(&scene.restored(&scene.replica(), &[])), COUNTER), 9);
}

/// In a container the entry point is process 1, and inherits what its application leaves behind.
#[test]
fn as_process_1_it_reaps_what_is_left_behind() {
    let unshared = |command: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", "--"])
            .args(command);
        unshare
    };
    if !unshared(&["true"]).status().is_ok_and(|status| status.success()) {
        eprintln!("not shown: this machine lets nobody make a process namespace");
        return;
    }
    let (scene, _) = lost();
    // The inner shell ends at once, and what it has started becomes process 1's.
    let script = "sh -c 'sleep 0.1 & echo $! > orphan'; sleep 2; cat /proc/1/comm > first; ls -d /proc/$(cat orphan) > left; exit 5";
    let program = waltrail().get_program().to_str().unwrap().to_owned();
    let (database, replica) = (scene.database(), scene.replica());
    let command = [&program, "run", database.to_str().unwrap(), &replica, "--", "sh", "-c", script];
    let done = unshared(&command).current_dir(scene.directory.path()).output().unwrap();
    assert_eq!(done.status.code(), Some(5), "{}", stderr(&done));
    let told = |name: &str| std::fs::read_to_string(scene.path(name)).unwrap();
    assert_eq!((told("first").trim(), told("left").as_str()), ("waltrail", ""), "orphan {}", told("orphan"));
}

/// An application on an empty database, with a backup that is only out of reach or damaged, would be the end of that backup's use.
#[test]
fn a_failed_restore_starts_nothing() {
    let (scene, _) = lost();
    let snapshot = scene.objects("snap").remove(0);
    let bytes = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, &bytes[..bytes.len() / 2]).unwrap();
    let started = scene.path("started");
    let done = run_in(&scene, &["touch", started.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(13), "{}", stderr(&done));
    assert!(!started.exists() && !scene.database().exists());
    std::fs::write(&snapshot, bytes).unwrap();
    assert_eq!(run_in(&scene, &["touch", started.to_str().unwrap()]).status.code(), Some(0));
    assert!(started.exists());
}

/// A replica that has lost its snapshots is not one that has none yet.
#[tokio::test]
async fn lost_snapshots_start_nothing() {
    let scene = Scene::new();
    let mut oracle = Oracle::new(4096, 3).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(2).await;
    oracle.pass_time(2 * 3_600_000);
    oracle.commit_and_cut(2).await;
    for object in oracle.store.list("", None).await.unwrap() {
        if object.key.starts_with("snap/") {
            continue;
        }
        let path = scene.path("replica").join(&object.key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, oracle.store.get(&object.key, object.len_bytes).await.unwrap()).unwrap();
    }
    let started = scene.path("started");
    let done = run_in(&scene, &["touch", started.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(13), "{}", stderr(&done));
    assert!(stderr(&done).contains("every snapshot") && stderr(&done).contains("versions"), "{}", stderr(&done));
    assert!(!started.exists() && !scene.database().exists());
    let (replica, output) = (scene.replica(), scene.path("out.db").display().to_string());
    let done = run(["restore", &replica, "--if-replica-exists", "--output", &output]);
    assert_eq!(done.status.code(), Some(13), "{}", stderr(&done));
}

/// The local state was lost, and the first snapshot of the epoch that began then, too: what is restored is older than what was
/// confirmed, and the application begins with it.
#[test]
fn an_older_state_is_not_restored_without_a_word() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 300, "");
    for n in 1..=2 {
        let daemon = scene.start();
        count_up(&application);
        scene.wait_for(n);
        assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
        std::fs::remove_dir_all(scene.path(".app.db-waltrail")).unwrap();
    }
    drop(application);
    for file in ["app.db", "app.db-wal", "app.db-shm"] {
        std::fs::remove_file(scene.path(file)).ok();
    }
    std::fs::remove_dir_all(scene.path("replica/snap/00000002")).unwrap();
    let done = run_in(&scene, &["sh", "-c", &sql(&scene.database(), "SELECT n FROM counter")]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "1", "the last state of the first epoch");
    let says = "epoch 2 began with a database that had changed unseen";
    let is_said = |line: &str| line.contains("ERROR") && line.contains(says);
    assert!(stderr(&done).lines().any(is_said), "{}", stderr(&done));
}

#[test]
fn the_environment_is_enough() {
    let (scene, _) = lost();
    let run = || {
        let mut run = waltrail();
        run.env("DATABASE_URL", format!("file:{}?connection_limit=1", scene.database().display()));
        run.args(["run", "--", "true"]);
        run
    };
    let unknown = run().output().unwrap();
    assert_eq!(unknown.status.code(), Some(10));
    assert!(stderr(&unknown).contains("WALTRAIL_REPLICA"), "{}", stderr(&unknown));
    let done =
        run().env("WALTRAIL_REPLICA", scene.replica()).env("RAILWAY_VOLUME_MOUNT_PATH", "/elsewhere").output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(scene.database().exists());
    assert!(stderr(&done).contains("DANGER") && stderr(&done).contains("/elsewhere/app.db"), "{}", stderr(&done));
}

/// Whoever waits for it would take what an earlier start has left for this one's.
#[test]
fn a_ready_file_that_was_left_is_removed() {
    let (scene, _) = lost();
    let (ready, database, replica) = (scene.path("ready"), scene.database().display().to_string(), scene.replica());
    std::fs::write(&ready, "").unwrap();
    let mut run = waltrail();
    run.args(["run", "--ready-file", ready.to_str().unwrap(), &database, &replica, "--", "/no/such/program"]);
    assert_eq!(run.output().unwrap().status.code(), Some(127));
    assert!(!ready.exists());
}

/// Programs that use select(2) break with descriptors of 1,024 and more; we need many.
#[test]
fn the_command_may_open_as_many_files_as_before() {
    let (scene, _) = lost();
    let program = waltrail().get_program().to_str().unwrap().to_owned();
    let (database, replica) = (scene.database(), scene.replica());
    let script = "ulimit -Sn; grep 'Max open files' /proc/$PPID/limits";
    let few = ["-c", "ulimit -Sn 512 && exec \"$0\" \"$@\"", &program];
    let run = ["run", database.to_str().unwrap(), &replica, "--", "sh", "-c", script];
    let done = Command::new("sh").args(few).args(run).output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let told = String::from_utf8(done.stdout).unwrap();
    let (commands, daemons) = told.split_once('\n').unwrap();
    assert_eq!(commands, "512", "{told}");
    // Max open files, the soft limit, the hard one, files.
    let daemons: Vec<&str> = daemons.split_whitespace().skip(3).collect();
    assert!(daemons[0] == daemons[1] && daemons[0] != "512", "{told}");
}

/// Nothing of it waits anywhere, so nobody may be told that it does.
#[test]
fn a_database_that_can_not_be_followed_is_named() {
    let scene = Scene::new();
    std::fs::write(scene.database(), vec![7; 5000]).unwrap();
    let (started, database) = (scene.path("started"), scene.database().display().to_string());
    let mut run = waltrail();
    run.args(["run", "--start-timeout", "2s", &database, &scene.replica(), "--", "touch", started.to_str().unwrap()]);
    let done = run.output().unwrap();
    let told = stderr(&done);
    assert!(told.contains("app.db can't be followed: it is not a SQLite database"), "{told}");
    assert!(told.contains("is not backed up") && told.contains("started all the same"), "{told}");
    assert!(!told.contains("waits here") && !told.contains("not reached"), "{told}");
    assert!(started.exists(), "the application comes first");
    assert_eq!(done.status.code(), Some(15), "{told}");
}

#[test]
fn storage_that_refuses_is_named() {
    let (scene, server) = (Scene::new(), S3Server::start());
    drop(create_database(&scene.database(), 20, ""));
    server.refuse(403);
    let (started, database) = (scene.path("started"), scene.database().display().to_string());
    let mut run = waltrail();
    run.args(["run", "--start-timeout", "3s", &database, &server.url("app"), "--"]).arg("touch").arg(&started);
    let done = run.output().unwrap();
    let told = stderr(&done);
    assert!(told.contains("s3://backups/app is not reached, or refuses:"), "{told}");
    assert!(told.contains("app.db waits here") && !told.contains("can't be followed"), "{told}");
    assert!(started.exists());
    assert_eq!(done.status.code(), Some(15), "{told}");
}

/// The commonest reason for a backup of nothing.
#[test]
fn a_database_that_the_command_never_made_is_named() {
    let scene = Scene::new();
    let done = run_in(&scene, &["true"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let says = format!("{} was never there", scene.database().display());
    assert!(stderr(&done).contains(&says), "{}", stderr(&done));
}

/// Where a server accepts a connection and says nothing: what is waited for is told, and the limit holds for the first request, too.
#[test]
fn storage_that_says_nothing_is_waited_for_no_longer_than_told() {
    let scene = Scene::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = scene.path("waltrail.toml");
    let parameters = format!("endpoint=http://{}&region=us-east-1", silent.local_addr().unwrap());
    for (name, says) in
        [("app.db", "looking for a backup in s3://b/app"), ("*.db", "looking for backups in s3://b/app")]
    {
        let path = scene.path(name).display().to_string();
        std::fs::write(&config, format!("[[database]]\npath = \"{path}\"\nreplica = \"s3://b/app?{parameters}\"\n"))
            .unwrap();
        let begun_ms = now_ms();
        let done = run(["run", "--restore-timeout", "1s", "--config", config.to_str().unwrap(), "--", "true"]);
        assert!(now_ms() - begun_ms < 10_000, "{}", stderr(&done));
        assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
        assert!(stderr(&done).contains(says), "{}", stderr(&done));
        assert!(stderr(&done).contains(&format!("{path} could not be restored within 1s")), "{}", stderr(&done));
    }
}
