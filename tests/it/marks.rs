//! Marks and pruning from the command line, beside a daemon.

use std::path::Path;

use crate::support::scene::Scene;
use crate::support::{count_up, create_database, number, open, run, stderr, wait_for, waltrail};

/// A configuration for the scene's database, with more lines in it.
fn config(scene: &Scene, more: &str) -> String {
    let config = scene.path("waltrail.toml");
    let (database, replica) = (scene.database(), scene.replica());
    let text = format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n{more}\n", database.display());
    std::fs::write(&config, text).unwrap();
    config.to_str().unwrap().to_owned()
}

fn counted(scene: &Scene, arguments: &[&str]) -> i64 {
    number(&open(&scene.restored(&scene.replica(), arguments)), "SELECT n FROM counter")
}

/// Its daemon knows where a database goes, also when nobody else was told.
#[test]
fn a_path_is_enough_while_a_daemon_follows_it() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let daemon = scene.start();
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    let path = scene.database();
    let path = path.to_str().unwrap();
    count_up(&application);
    let done = run(["mark", "one", path]);
    assert!(done.status.success(), "{}", stderr(&done));
    count_up(&application);
    assert_eq!(counted(&scene, &["--mark", "one"]), 1);
    let shipped = run(["sync", "--no-wait", path]);
    assert!(stderr(&shipped).starts_with("captured "), "{}", stderr(&shipped));
    wait_for("it to be stored", || (counted(&scene, &[]) == 2).then_some(()));
    count_up(&application);
    let waited = run(["sync", "--wait", path]);
    assert!(stderr(&waited).starts_with("confirmed "), "{}", stderr(&waited));
    assert_eq!(counted(&scene, &[]), 3);
    let pruned = run(["prune", path]);
    assert!(stderr(&pruned).contains("Say so with --retention"), "nobody said what is kept: {}", stderr(&pruned));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let unknown = run(["mark", "two", path]);
    assert!(stderr(&unknown).contains("or that a daemon follows"), "{}", stderr(&unknown));
    let turned = run(["mark", path, "two"]);
    assert!(stderr(&turned).contains("can't be a mark's name"), "{}", stderr(&turned));
    assert_eq!((unknown.status.code(), turned.status.code()), (Some(10), Some(10)));
}

#[test]
fn a_mark_holds_everything_that_was_committed_before_it() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    // Slow, so that only a sync brings it to storage in time.
    let config = config(&scene, "sync-interval = \"1h\"");
    let daemon = scene.start_with(&["--config", &config]);
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    for turn in 1..=5 {
        count_up(&application);
        let done = run(["mark", &format!("turn-{turn}"), "--config", &config]);
        assert!(done.status.success(), "{}", stderr(&done));
        assert!(stderr(&done).contains("marked     turn-"), "{}", stderr(&done));
    }
    count_up(&application);
    for turn in 1..=5 {
        assert_eq!(counted(&scene, &["--mark", &format!("turn-{turn}")]), turn);
    }
    let listed = run(["marks", &scene.replica()]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.lines().count(), 5, "{listed}");
    assert!(listed.starts_with("turn-1 "), "{listed}");
    // From the environment alone, as in a container.
    let taken = waltrail()
        .args(["unmark", "turn-3"])
        .env("DATABASE_URL", format!("file:{}", scene.database().display()))
        .env("WALTRAIL_REPLICA", scene.replica())
        .output()
        .unwrap();
    assert!(taken.status.success(), "{}", stderr(&taken));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());

    let no_daemon = run(["mark", "later", "--config", &config]);
    assert_eq!(no_daemon.status.code(), Some(1), "{}", stderr(&no_daemon));
    assert!(stderr(&no_daemon).contains("no daemon follows"), "{}", stderr(&no_daemon));
    for (arguments, code, says) in [
        (vec!["mark", "turn-1"], 1, "there is a mark 'turn-1'"),
        (vec!["mark", "../up"], 10, "can't be a mark's name"),
        (vec!["mark", "never", "--txid", "999"], 12, "can't be restored"),
        (vec!["unmark", "turn-3"], 12, "there is no mark 'turn-3'"),
        (vec!["restore", "--mark", "turn-3", "--dry-run"], 12, "there is no mark 'turn-3'"),
        (vec!["prune"], 10, "Say so with --retention"),
        (vec!["prune", "--retention", "30"], 10, "is not a duration"),
        (vec!["prune", "--retention", "forever", "--keep-daily", "3"], 10, "say nothing then"),
    ] {
        let replica = scene.replica();
        let at = if arguments[0] == "mark" || arguments[0] == "unmark" { 2 } else { 1 };
        let mut arguments = arguments.clone();
        arguments.insert(at, &replica);
        let done = run(&arguments);
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {}", stderr(&done));
        assert!(stderr(&done).contains(says), "{arguments:?}: {}", stderr(&done));
    }
    let marks = run(["marks", &scene.path("nothing").display().to_string()]);
    assert_ne!(marks.status.code(), Some(0), "no replica is not a replica without marks");
}

#[test]
fn what_is_pruned_is_told_first() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let config = config(&scene, "retention = \"1s\"");
    let daemon = scene.start_with(&["--config", &config]);
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    count_up(&application);
    let asked = run(["snapshot", "--config", &config]);
    assert!(asked.status.success(), "{}", stderr(&asked));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    // What was needed an hour ago stays: here that is all.
    let before = scene.objects("");
    let planned = run(["prune", "--config", &config, "--dry-run"]);
    let told = String::from_utf8(planned.stdout.clone()).unwrap();
    assert!(planned.status.success() && stderr(&planned).contains("nothing was deleted"), "{}", stderr(&planned));
    assert!(told.contains("goes       0 objects") && told.contains("states inside the window"), "{told}");
    // And when everything is older than that:
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for object in &before {
        std::fs::File::options().write(true).open(object).unwrap().set_modified(long_ago).unwrap();
    }
    let pruned = run(["prune", &scene.replica(), "--retention", "1s"]);
    assert!(pruned.status.success(), "{}", stderr(&pruned));
    assert!(stderr(&pruned).contains("deleted    0 objects"), "by its own times: {}", stderr(&pruned));
    assert_eq!(scene.objects(""), before);
    assert_eq!(counted(&scene, &[]), 1);
}

/// What fails in one replica can be done in the others, and afterwards in that one.
#[test]
fn a_mark_is_set_in_each_replica_that_can_have_it() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 50, "");
    let (first, second) = (scene.replica(), scene.path("second").display().to_string());
    let more = format!("[[database]]\npath = \"{}\"\nreplica = \"{second}\"", scene.database().display());
    let config = config(&scene, &more);
    let daemon = scene.start_with(&["--config", &config]);
    let has_snapshot = |replica: &str| {
        let folder = std::fs::read_dir(Path::new(replica).join("snap/00000001"));
        folder.is_ok_and(|mut entries| entries.next().is_some())
    };
    wait_for("both snapshots", || (has_snapshot(&first) && has_snapshot(&second)).then_some(()));
    count_up(&application);
    let with_config = |code: i32, arguments: &[&str]| {
        let done = run(arguments.iter().copied().chain(["--config", config.as_str()]));
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {}", stderr(&done));
        (String::from_utf8(done.stdout.clone()).unwrap(), stderr(&done))
    };
    assert!(run(["mark", "one", &first]).status.success());
    let (_, told) = with_config(1, &["mark", "one"]);
    assert!(told.contains(&format!("failed     file://{first}: ")) && told.contains("there is a mark 'one'"), "{told}");
    assert!(told.contains("marked     one: ") && told.contains(&format!(", in file://{second}")), "{told}");
    // As in a start command that runs again at each restart.
    let (_, told) = with_config(0, &["mark", "one", "--if-missing"]);
    assert_eq!((told.matches("note: one is there").count(), told.contains("marked")), (2, false), "{told}");
    assert!(run(["unmark", "one", &first]).status.success());
    let (_, told) = with_config(0, &["mark", "one", "--if-missing"]);
    assert_eq!((told.matches("note: one is there").count(), told.matches("marked     one").count()), (1, 1), "{told}");

    let (listed, _) = with_config(0, &["marks"]);
    for replica in [&first, &second] {
        assert!(listed.contains(&format!("in file://{replica}\none ")), "{listed}");
    }
    let (listed, _) = with_config(0, &["marks", "--format", "json"]);
    let replica_of = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["replica"].clone();
    let replicas: Vec<serde_json::Value> = listed.lines().map(replica_of).collect();
    assert_eq!(replicas, [format!("file://{first}"), format!("file://{second}")]);
    for command in [&["log"][..], &["prune", "--dry-run"]] {
        let (shown, told) = with_config(0, command);
        for replica in [&first, &second] {
            assert!(shown.contains(&format!("in file://{replica}\n")), "{command:?}: {shown}{told}");
        }
    }

    assert!(run(["unmark", "one", &first]).status.success());
    let (_, told) = with_config(12, &["unmark", "one"]);
    assert!(told.contains(&format!("failed     file://{first}: ")), "{told}");
    assert!(told.contains("unmarked   one: ") && told.contains(&format!(", in file://{second}")), "{told}");
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let (_, told) = with_config(1, &["mark", "later", "--if-missing"]);
    assert_eq!(told.matches("failed     file://").count(), 2, "nobody can say what was committed: {told}");
}
