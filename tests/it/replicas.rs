//! Several replicas of one database, each with a life of its own.

use std::time::Duration;

use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, insert, run, stderr, wait_for};

/// Nobody listens there.
const NOBODY: &str = "s3://nobody/app?endpoint=http://127.0.0.1:1&region=us-east-1";

fn configure(scene: &Scene, replicas: &[&str]) -> String {
    let table =
        |replica: &&str| format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n", scene.database().display());
    let configuration = scene.path("waltrail.toml");
    let text: String = replicas.iter().map(table).collect();
    std::fs::write(&configuration, format!("shutdown-timeout = \"3s\"\n{text}")).unwrap();
    configuration.display().to_string()
}

fn start(scene: &Scene, replicas: &[&str]) -> Daemon {
    scene.start_with(&["--config", &configure(scene, replicas)])
}

fn with_configuration(scene: &Scene, arguments: &[&str]) -> std::process::Output {
    let configuration = scene.path("waltrail.toml").display().to_string();
    run(arguments.iter().copied().chain(["--config", configuration.as_str()]))
}

#[test]
fn each_replica_has_every_transaction_and_the_wal_stays_small() {
    let scene = Scene::new();
    let server = S3Server::start();
    let (first, second) = (scene.replica(), server.url("app"));
    let application = create_database(&scene.database(), 200, "");
    let database = scene.database().display().to_string();
    let daemon = start(&scene, &[&first, &second]);
    wait_for("both to be followed", || with_configuration(&scene, &["status"]).status.success().then_some(()));
    let mut largest_wal = 0;
    for _ in 0..1500 {
        insert(&application, 12);
        count_up(&application);
        largest_wal = largest_wal.max(scene.wal_len());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(largest_wal < 24 << 20, "the WAL has grown to {largest_wal} bytes: one pin holds up the other");
    let synced = with_configuration(&scene, &["sync", &database]);
    assert!(synced.status.success(), "{}\n{}", stderr(&synced), scene.log());
    assert_eq!(stderr(&synced).matches("confirmed").count(), 2);
    let marked = with_configuration(&scene, &["mark", "now", &database]);
    assert_eq!(stderr(&marked).matches("marked").count(), 2, "{}", stderr(&marked));
    let table = String::from_utf8(with_configuration(&scene, &["status"]).stdout).unwrap();
    assert!(table.contains("REPLICA") && table.contains("s3://"), "{table}");
    let expected = content(&scene.database());
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    for replica in [first.as_str(), &second] {
        assert_eq!(content(&scene.restored(replica, &["--mark", "now"])), expected, "{replica}");
    }
    let verified = with_configuration(&scene, &["verify", "--depth", "structure"]);
    assert!(verified.status.success(), "{}", stderr(&verified));
}

#[test]
fn one_that_is_down_holds_nobody_up() {
    let scene = Scene::new();
    scene.expect_error("stopped with transactions not confirmed");
    let application = create_database(&scene.database(), 20, "");
    let database = scene.database().display().to_string();
    let daemon = start(&scene, &[NOBODY, &scene.replica()]);
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    for _ in 0..5 {
        count_up(&application);
    }
    let synced = with_configuration(&scene, &["sync", &database, "--timeout", "2s"]);
    assert!(!synced.status.success(), "one of them is not confirmed");
    assert!(stderr(&synced).contains("confirmed  "), "the other one is: {}", stderr(&synced));
    let expected = content(&scene.database());
    assert_eq!(daemon.terminate(), Some(15), "{}", scene.log());
    assert_eq!(scene.restored_content(&[]), expected);

    // A container's start takes the one that it can reach.
    for suffix in ["", "-wal", "-shm"] {
        std::fs::remove_file(format!("{database}{suffix}")).ok();
    }
    let again = with_configuration(&scene, &["run", "--start-timeout", "1s"]);
    assert_eq!(again.status.code(), Some(10), "a command is missing: {}", stderr(&again));
    let configuration = scene.path("waltrail.toml").display().to_string();
    let again = run(["run", "--config", &configuration, "--start-timeout", "1s", "--", "true"]);
    assert_eq!(content(&scene.database()), expected, "{}", stderr(&again));
}

/// Not when the time to wait for them is over.
#[test]
fn a_command_begins_when_both_stand() {
    let scene = Scene::new();
    drop(create_database(&scene.database(), 20, ""));
    let configuration = configure(&scene, &[&scene.replica(), &scene.path("second").display().to_string()]);
    let done = run(["run", "--config", &configuration, "--start-timeout", "20s", "--", "true"]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(!stderr(&done).contains("started all the same"), "{}", stderr(&done));
}

#[test]
fn all_databases_are_restored_from_the_replica_with_the_newest_state() {
    let scene = Scene::new();
    let (first, second) = (scene.path("replica"), scene.path("second"));
    let application = create_database(&scene.database(), 20, "");
    let configuration = configure(&scene, &[first.to_str().unwrap(), second.to_str().unwrap()]);
    let replicate = || run(["run", "--config", &configuration, "--start-timeout", "2s", "--", "true"]);
    assert!(replicate().status.success());
    let copied = std::process::Command::new("cp").arg("-r").arg(&first).arg(scene.path("old")).status().unwrap();
    assert!(copied.success());
    count_up(&application);
    assert!(replicate().status.success());
    let expected = content(&scene.database());
    let restored = |directory: &str| {
        let into = scene.path(directory);
        let all = ["restore", "--config", &configuration, "--all", "--output-dir", into.to_str().unwrap()];
        let done = run(all);
        assert!(done.status.success(), "{}", stderr(&done));
        (content(&into.join("app.db")), stderr(&done))
    };
    assert_eq!(restored("both").0, expected);
    std::fs::rename(&first, scene.path("first")).unwrap();
    let (found, told) = restored("one");
    assert_eq!(found, expected);
    assert!(told.contains("there is no backup in"), "it is told that one is missing: {told}");
    std::fs::rename(scene.path("old"), &first).unwrap();
    assert_eq!(restored("behind").0, expected, "the first one is behind");
    let marker = second.join("waltrail.json");
    std::fs::write(&marker, r#"{"format":2}"#).unwrap();
    assert_ne!(restored("older").0, expected, "what can be read is better than nothing");
    std::fs::remove_dir_all(&first).unwrap();
    let into = scene.path("none").display().to_string();
    let none = run(["restore", "--config", &configuration, "--all", "--if-replica-exists", "--output-dir", &into]);
    assert_eq!(none.status.code(), Some(13), "nobody knows what the second one holds: {}", stderr(&none));
}
