//! Restores onto a disk that holds much of it already, restores that are cut off, and what they tell.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::scene::Scene;
use crate::support::{content, count_up, create_database, number, open, run, stderr, wait_for};

/// A scene whose database of some megabytes was replicated, with the daemon stopped.
fn replicated() -> (Scene, rusqlite::Connection) {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 12_000, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    (scene, application)
}

fn restore(scene: &Scene, output: &Path, arguments: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let replica = scene.replica();
    let mut all = vec!["restore", &replica, "--output", output.to_str().unwrap(), "--format", "json"];
    all.extend(arguments);
    let done = run(all);
    let events = String::from_utf8(done.stdout.clone()).unwrap();
    let events = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (done.status.code(), events, stderr(&done))
}

fn last<'a>(events: &'a [Value], kind: &str) -> &'a Value {
    events.iter().rev().find(|event| event["event"] == kind).unwrap_or_else(|| panic!("{kind}: {events:?}"))
}

#[test]
fn what_is_right_already_is_not_fetched() {
    let (scene, _application) = replicated();
    let output = scene.path("out.db");
    let (code, events, error) = restore(&scene, &output, &[]);
    assert_eq!(code, Some(0), "{error}");
    let (planned, first) = (last(&events, "planned").clone(), last(&events, "restored").clone());
    assert_eq!((&first["reused_bytes"], &first["txid"]), (&0.into(), &planned["txid"]));
    assert_eq!(first["fingerprint"], planned["fingerprint"]);
    let (code, events, error) = restore(&scene, &scene.path("late.db"), &["--at", "2999-01-01T00:00:00Z", "--dry-run"]);
    let notes: Vec<&str> = events.iter().filter_map(|event| event["text"].as_str()).collect();
    let is_noted = |words: &str| notes.iter().any(|note| note.contains(words));
    assert!(code == Some(0) && is_noted("is in the future") && is_noted(" d before it"), "{notes:?} {error}");
    let (code, events, error) = restore(&scene, &scene.path("quiet.db"), &["--quiet"]);
    assert_eq!((code, events.len(), &events[0]["event"]), (Some(0), 1, &"restored".into()), "{error}");
    // A migration gone wrong: some pages changed, more at the end.
    let database = open(&output);
    database.execute_batch("PRAGMA journal_mode=DELETE; UPDATE counter SET n = -1; CREATE TABLE t(x)").unwrap();
    drop(database);
    let wrong = content(&output);
    let (code, events, error) = restore(&scene, &output, &["--force", "--keep-old"]);
    assert_eq!(code, Some(0), "{error}");
    let second = last(&events, "restored");
    let bytes = |event: &Value, name: &str| event[name].as_u64().unwrap();
    assert!(bytes(second, "reused_bytes") * 2 > bytes(second, "database_bytes"), "{second}");
    assert!(bytes(second, "received_bytes") * 2 < bytes(&first, "received_bytes"), "{second} {first}");
    assert_eq!(content(&output), content(&scene.database()));
    assert_eq!(content(&scene.path("out.db.before-restore")), wrong, "what was there is kept");
}

#[test]
fn a_restore_that_was_cut_off_goes_on() {
    let (scene, _application) = replicated();
    let output = scene.path("out.db");
    let partial = scene.path(".out.db.waltrail-restore-partial");
    let snapshot = scene.objects("snap").remove(0);
    let whole = std::fs::read(&snapshot).unwrap();
    let mut damaged = whole.clone();
    // In an extent at the end, so that much is written before it is met.
    damaged[whole.len() * 9 / 10] ^= 1;
    std::fs::write(&snapshot, &damaged).unwrap();
    assert_eq!(restore(&scene, &output, &[]).0, Some(13));
    assert!(!partial.exists(), "not without --resume");
    let (code, events, error) = restore(&scene, &output, &["--resume"]);
    assert_eq!(code, Some(13), "{error}");
    assert!(last(&events, "note")["text"].as_str().unwrap().contains("goes on from there"), "{events:?}");
    assert!(partial.exists() && !output.exists());
    std::fs::write(&snapshot, &whole).unwrap();
    let (code, events, error) = restore(&scene, &output, &["--resume"]);
    assert_eq!(code, Some(0), "{error}");
    let done = last(&events, "restored");
    let (reused, all) = (done["reused_bytes"].as_u64().unwrap(), done["database_bytes"].as_u64().unwrap());
    assert!(reused > 0 && done["received_bytes"].as_u64().unwrap() < whole.len() as u64, "{reused} of {all}");
    assert!(!partial.exists());
    assert_eq!(content(&output), content(&scene.database()));
}

/// What another database, or nothing useful, left in the unfinished file does no harm.
#[test]
fn an_unfinished_file_with_anything_in_it() {
    let (scene, application) = replicated();
    let output = scene.path("out.db");
    let partial = scene.path(".out.db.waltrail-restore-partial");
    let len = std::fs::metadata(scene.database()).unwrap().len() as usize;
    for noise in [vec![7; len * 2], vec![7; 100], vec![7; len]] {
        std::fs::write(&partial, noise).unwrap();
        let (code, _, error) = restore(&scene, &output, &["--resume", "--force"]);
        assert_eq!(code, Some(0), "{error}");
        assert_eq!(content(&output), content(&scene.database()));
    }
    drop(application);
}

#[test]
fn the_state_before_a_migration() {
    let (scene, application) = replicated();
    let daemon = scene.start();
    for _ in 0..3 {
        count_up(&application);
    }
    application.execute_batch("ALTER TABLE item ADD COLUMN more TEXT").unwrap();
    for _ in 0..2 {
        count_up(&application);
    }
    scene.wait_for(6);
    let restored = scene.restored(&scene.replica(), &["--before-schema-change"]);
    assert_eq!(number(&open(&restored), "SELECT n FROM counter"), 4);
    assert_eq!(number(&open(&restored), "SELECT count(*) FROM pragma_table_info('item') WHERE name = 'more'"), 0);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
}

#[test]
fn all_databases_of_a_configuration() {
    let scene = Scene::new();
    let mut text = String::new();
    for name in ["one", "two"] {
        let path = scene.path(&format!("{name}.db"));
        create_database(&path, 20, "");
        let replica = scene.path(&format!("replica/{name}"));
        text += &format!("[[database]]\npath = \"{}\"\nreplica = \"{}\"\n", path.display(), replica.display());
    }
    let config = scene.path("waltrail.toml");
    std::fs::write(&config, &text).unwrap();
    let config = config.to_str().unwrap();
    let daemon = scene.start_with(&["--config", config]);
    wait_for("snapshots", || {
        let is_there = |name: &str| scene.objects(name).iter().any(|object| object.contains("/snap/"));
        (is_there("one") && is_there("two")).then_some(())
    });
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let directory = scene.path("check");
    let all = ["restore", "--config", config, "--all", "--output-dir", directory.to_str().unwrap(), "--quiet"];
    let planned = run([&all[..], &["--dry-run"]].concat());
    assert!(planned.status.success() && !directory.exists(), "{}", stderr(&planned));
    let done = run(all);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(stderr(&done).lines().count(), 2, "one line each: {}", stderr(&done));
    for name in ["one.db", "two.db"] {
        assert_eq!(content(&directory.join(name)), content(&scene.path(name)));
    }
    // The one that fails does not keep the other from being restored.
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::remove_dir_all(scene.path("replica/one/snap")).unwrap();
    let done = run(all);
    assert_eq!(done.status.code(), Some(12), "{}", stderr(&done));
    assert!(directory.join("two.db").exists() && !directory.join("one.db").exists());
}

/// Who runs the application, where root restores.
const APPLICATION_UID: u32 = 12_345;

fn give_to_the_application(path: &Path) {
    chown(path, Some(APPLICATION_UID), Some(APPLICATION_UID)).unwrap();
}

/// Everything that a restore leaves in a state directory belongs to the application's user, who can use it.
fn check_given(state_dir: &Path) {
    for name in ["", "lock", "ledger", "state", "spool", "spool/kept"] {
        let found = std::fs::metadata(state_dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((found.uid(), found.gid()), (APPLICATION_UID, APPLICATION_UID), "{name} in {}", state_dir.display());
    }
    let script =
        "cat state ledger > spool/copy && rm spool/copy && test -w state -a -w ledger -a -w lock -a -w spool/kept";
    let mut usable = Command::new("sh");
    usable.args(["-c", script]).uid(APPLICATION_UID).gid(APPLICATION_UID).current_dir(state_dir);
    assert!(usable.status().unwrap().success(), "{}", state_dir.display());
}

fn notes(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|event| event["event"] == "note").map(|event| event["text"].as_str().unwrap()).collect()
}

/// `sudo waltrail restore`: the daemon, which runs as the application's user, goes on from what is left.
#[test]
fn what_root_restores_is_the_applications() {
    let scene = Scene::new();
    let is_root = std::fs::metadata(scene.directory.path()).unwrap().uid() == 0;
    // Root of a namespace of its own can't give files to just anybody, either.
    if !is_root || chown(scene.directory.path(), Some(APPLICATION_UID), Some(APPLICATION_UID)).is_err() {
        eprintln!("not shown: only root can give files to others");
        return;
    }
    let application = create_database(&scene.database(), 50, "");
    let daemon = scene.start();
    count_up(&application);
    scene.wait_for(1);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    std::fs::create_dir(scene.path("place")).unwrap();
    give_to_the_application(&scene.path("place"));
    // Where nothing was.
    let (output, state_dir) = (scene.path("place/out.db"), scene.path("place/.out.db-waltrail"));
    let (code, events, error) = restore(&scene, &output, &[]);
    assert_eq!(code, Some(0), "{error}");
    assert!(
        notes(&events)
            .iter()
            .any(|note| note.contains("belongs to user 0 now, and the directory it is in to user 12345")),
        "{events:?}"
    );
    check_given(&state_dir);
    // Over a database of the application's, with a state directory that was there.
    give_to_the_application(&output);
    let (code, events, error) = restore(&scene, &output, &["--force"]);
    assert_eq!(code, Some(0), "{error}");
    assert!(!notes(&events).iter().any(|note| note.contains("check that")), "{events:?}");
    assert_eq!(std::fs::metadata(&output).unwrap().uid(), APPLICATION_UID);
    check_given(&state_dir);
    // Its state directory was lost, and is to be in a place of root's.
    let (config, state_dir) = (scene.path("waltrail.toml"), scene.path("root/below/state"));
    std::fs::create_dir(scene.path("root")).unwrap();
    std::fs::set_permissions(scene.path("root"), Permissions::from_mode(0o755)).unwrap();
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nstate-dir = \"{}\"\n",
        output.display(),
        scene.replica(),
        state_dir.display()
    );
    std::fs::write(&config, text).unwrap();
    let done = run(["restore", "--config", config.to_str().unwrap(), output.to_str().unwrap(), "--force"]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(std::fs::metadata(scene.path("root/below")).unwrap().uid(), APPLICATION_UID);
    check_given(&state_dir);
    assert_eq!(content(&output), content(&scene.database()));
    // A link in the application's directory does not give it other files.
    let precious = scene.path("precious");
    std::fs::write(&precious, "root's").unwrap();
    std::fs::remove_file(state_dir.join("ledger")).unwrap();
    std::os::unix::fs::symlink(&precious, state_dir.join("ledger")).unwrap();
    std::fs::remove_file(state_dir.join("lock")).unwrap();
    std::fs::hard_link(&precious, state_dir.join("lock")).unwrap();
    let done = run(["restore", "--config", config.to_str().unwrap(), output.to_str().unwrap(), "--force"]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "root's");
    assert_eq!(std::fs::metadata(&precious).unwrap().uid(), 0);
    // In a directory of root's all is root's, and there is nothing to say of it.
    let output = scene.path("root/out.db");
    let (code, events, error) = restore(&scene, &output, &[]);
    assert_eq!(code, Some(0), "{error}");
    assert!(!notes(&events).iter().any(|note| note.contains("check that")), "{events:?}");
    assert_eq!(std::fs::metadata(scene.path("root/.out.db-waltrail/state")).unwrap().uid(), 0);
}
