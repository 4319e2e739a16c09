//! Many databases: found, followed, laid to rest, let go of; and a configuration that is read again.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use waltrail::format::key::MARKER_KEY;

use crate::health::{address, get};
use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, run, stderr, wait_for};

struct Fleet {
    scene: Scene,
    configuration: PathBuf,
}

impl Fleet {
    /// Databases of these names in a directory, and a configuration that takes all that are there.
    fn new(names: &[&str], more: &str) -> (Self, Vec<Connection>) {
        let scene = Scene::new();
        std::fs::create_dir(scene.path("tenants")).unwrap();
        let fleet = Self { configuration: scene.path("waltrail.toml"), scene };
        let text = format!(
            "{more}\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\n",
            fleet.path("*.db").display(),
            fleet.scene.replica()
        );
        fleet.configure(&text);
        let applications = names.iter().map(|name| create_database(&fleet.path(name), 20, "")).collect();
        (fleet, applications)
    }

    fn configure(&self, text: &str) {
        std::fs::write(&self.configuration, text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scene.path("tenants").join(name)
    }

    fn start(&self) -> Daemon {
        self.scene.start_with(&["--config", self.configuration.to_str().unwrap()])
    }

    fn phase(&self, path: &Path) -> Option<String> {
        let answer = run(["status", path.to_str().unwrap(), "--format", "json"]);
        let json: serde_json::Value = serde_json::from_slice(&answer.stdout).ok()?;
        json["phase"].as_str().map(str::to_owned)
    }

    fn wait_until_followed(&self, path: &Path) {
        wait_for("the database to be followed", || (self.phase(path)? == "following").then_some(()));
    }

    fn sync(&self, path: &Path) {
        let done = run(["sync", path.to_str().unwrap()]);
        assert!(done.status.success(), "{}\n{}", stderr(&done), self.scene.log());
    }

    fn check_restored(&self, name: &str, expected: &[String]) {
        let replica = format!("{}/{name}", self.scene.replica());
        assert_eq!(content(&self.scene.restored(&replica, &[])), expected, "{name}");
    }

    fn is_let_go(&self, path: &Path) -> bool {
        stderr(&run(["status", path.to_str().unwrap()])).contains("no daemon follows")
    }
}

#[test]
fn databases_come_and_go() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "");
    let daemon = fleet.start();
    for name in ["a.db", "b.db"] {
        fleet.wait_until_followed(&fleet.path(name));
    }
    // A file that is no database, and one that is none yet, are nobody's business.
    std::fs::write(fleet.path("notes.db"), "not a database, however it is called").unwrap();
    std::fs::write(fleet.path("later.db"), "").unwrap();
    #[allow(clippy::disallowed_methods)]
    let made = Instant::now();
    let late = create_database(&fleet.path("late.db"), 30, "");
    wait_for("the new database to be followed", || fleet.phase(&fleet.path("late.db")));
    assert!(made.elapsed() < Duration::from_secs(2), "{:?}", made.elapsed());
    fleet.wait_until_followed(&fleet.path("late.db"));
    count_up(&late);
    fleet.sync(&fleet.path("late.db"));
    let expected = content(&fleet.path("late.db"));

    let gone = content(&fleet.path("b.db"));
    count_up(&applications[0]);
    drop(applications);
    for suffix in ["", "-wal", "-shm"] {
        std::fs::remove_file(format!("{}{suffix}", fleet.path("b.db").display())).ok();
    }
    wait_for("the lost database to be let go of", || fleet.is_let_go(&fleet.path("b.db")).then_some(()));
    let waltrail = run(["status", "--config", fleet.configuration.to_str().unwrap()]);
    let table = String::from_utf8(waltrail.stdout).unwrap();
    wait_for("its state to be gone", || (!fleet.path(".b.db-waltrail").exists()).then_some(()));
    assert!(table.contains("/a.db") && table.contains("/late.db") && !table.contains("/b.db"), "{table}");

    let last = content(&fleet.path("a.db"));
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    fleet.check_restored("a.db", &last);
    fleet.check_restored("b.db", &gone);
    fleet.check_restored("late.db", &expected);
}

#[test]
fn a_fleet_at_rest_holds_nothing_and_misses_nothing() {
    let names: Vec<String> = (0..12).map(|number| format!("tenant-{number}.db")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (fleet, mut applications) = Fleet::new(&names, "open-databases = 2");
    // Nobody has them open: what is held open is ours.
    applications.clear();
    let daemon = fleet.start();
    for name in &names {
        fleet.wait_until_followed(&fleet.path(name));
    }
    // Two that find a third one too many can both go to rest.
    wait_for("the others to rest", || (held_open(&daemon, "database") <= 2).then_some(()));
    wait_for("their locks to be let go of", || (held_open(&daemon, "lock") <= 2).then_some(()));
    assert!(held_open(&daemon, "socket") < names.len(), "one control socket serves them all");
    // Also who rests keeps others away, and answers.
    for name in &names {
        let path = fleet.path(name);
        let second = run(["replicate", path.to_str().unwrap(), &fleet.scene.replica()]);
        assert!(stderr(&second).contains("another waltrail works with"), "{name}: {}", stderr(&second));
        let replica = format!("{}/{name}", fleet.scene.replica());
        let restore = run(["restore", &replica, "--output", path.to_str().unwrap(), "--force"]);
        assert!(stderr(&restore).contains("is open in another process"), "{name}: {}", stderr(&restore));
        assert_eq!(restore.status.code(), Some(14), "{name}");
        let status = run(["status", path.to_str().unwrap(), "--format", "json"]);
        assert!(String::from_utf8_lossy(&status.stdout).contains(name), "{}", stderr(&status));
    }

    let objects = fleet.scene.objects("").len();
    for round in 0..3 {
        for name in &names {
            let application = crate::support::open(&fleet.path(name));
            for _ in 0..=round {
                count_up(&application);
            }
            // Closing the last connection checkpoints the WAL and deletes it, under a resting daemon's nose.
            drop(application);
        }
        for name in &names {
            fleet.sync(&fleet.path(name));
        }
    }
    assert!(fleet.scene.objects("").len() >= objects + 3 * names.len(), "each round of each is there");
    let expected: Vec<Vec<String>> = names.iter().map(|name| content(&fleet.path(name))).collect();
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    for (name, expected) in names.iter().zip(&expected) {
        fleet.check_restored(name, expected);
    }
    let epochs = fleet.scene.objects("tenant-3.db/epochs");
    assert_eq!(epochs.len(), 1, "a rest is no new start: {epochs:?}");
}

#[test]
fn many_that_start_are_not_all_open_at_once() {
    const MANY: usize = 100;
    const TAKEN_UP_AT_A_TIME: usize = 32;
    let (fleet, applications) = Fleet::new(&["tenant-0.db"], "open-databases = 2");
    // With a WAL that is not checkpointed none rests before a second is over: time enough for all to be taken up.
    count_up(&applications[0]);
    for (number, suffix) in (1..MANY).flat_map(|number| [(number, ""), (number, "-wal")]) {
        let copy = fleet.path(&format!("tenant-{number}.db{suffix}"));
        std::fs::copy(fleet.path(&format!("tenant-0.db{suffix}")), copy).unwrap();
    }
    drop(applications);
    let daemon = fleet.start();
    let mut most = 0;
    wait_for("all to have a snapshot and to rest", || {
        let open = held_open(&daemon, "database");
        most = most.max(open);
        let snapshots = fleet.scene.objects("").iter().filter(|key| key.contains("/snap/")).count();
        (snapshots == MANY && open <= 2).then_some(())
    });
    // Some are opened while they are counted.
    assert!((3..=20 + TAKEN_UP_AT_A_TIME).contains(&most), "{most} were open at once");
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
}

/// How many files of a kind a daemon has open.
fn held_open(daemon: &Daemon, kind: &str) -> usize {
    let links = std::fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap();
    let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    let is_of_the_kind = |target: &PathBuf| match kind {
        "database" => target.extension().is_some_and(|extension| extension == "db"),
        "lock" => target.file_name().is_some_and(|name| name == "lock"),
        _ => target.to_string_lossy().starts_with("socket:"),
    };
    let distinct: std::collections::BTreeSet<PathBuf> = targets.filter(is_of_the_kind).collect();
    distinct.len()
}

/// A directory that can't be read is told of, and what is below it is followed on; what came there meanwhile is taken up when it can be read
/// again, though no directory's time tells of it then.
#[test]
fn a_directory_that_can_not_be_read_lets_nothing_go() {
    let (fleet, mut applications) =
        Fleet::new(&["gone.db"], "[http]\nlisten = \"127.0.0.1:0\"\nhealthy-lag = \"1s\"\n");
    fleet.scene.expect_error("while looking for databases");
    std::fs::create_dir(fleet.path("eu")).unwrap();
    let (known, late, gone) = (fleet.path("eu/known.db"), fleet.path("eu/late.db"), fleet.path("gone.db"));
    let application = create_database(&known, 20, "");
    let everywhere = std::fs::read_to_string(&fleet.configuration).unwrap().replace("/*.db", "/**/*.db");
    fleet.configure(&everywhere);
    let configuration = fleet.configuration.display().to_string();
    let daemon = Daemon::start_bound_by_permissions(&["--config", &configuration], &fleet.scene.path("daemon.log"));
    for path in [&known, &gone] {
        fleet.wait_until_followed(path);
        fleet.sync(path);
    }
    let address = address(&fleet.scene);
    let set_mode = |mode| std::fs::set_permissions(fleet.path("eu"), Permissions::from_mode(mode)).unwrap();

    set_mode(0o311);
    // Something comes beside it, so that it is looked.
    std::fs::write(fleet.path("notes.txt"), "").unwrap();
    let told = wait_for("the trouble", || {
        Some(get(&address, "/healthz")).filter(|(_, told)| told.contains("while looking for databases"))
    });
    assert!(told.0 == 503 && told.1.contains("tenants/eu") && told.1.contains("Permission denied"), "{told:?}");
    count_up(&application);
    fleet.sync(&known);
    // What is known to be gone is let go of all the same.
    applications.clear();
    for suffix in ["", "-wal", "-shm"] {
        std::fs::remove_file(format!("{}{suffix}", gone.display())).ok();
    }
    wait_for("the deleted one to be let go of", || fleet.is_let_go(&gone).then_some(()));
    drop(create_database(&late, 5, ""));
    std::thread::sleep(Duration::from_secs(1));
    assert!(fleet.is_let_go(&late), "nobody can know of it yet: {}", fleet.scene.log());
    count_up(&application);
    fleet.sync(&known);

    set_mode(0o755);
    fleet.wait_until_followed(&late);
    wait_for("all to be well", || (get(&address, "/healthz").0 == 200).then_some(()));
    let log = fleet.scene.log();
    let let_go: Vec<&str> = log.lines().filter(|line| line.contains("not to be followed any more")).collect();
    assert!(let_go.len() == 1 && let_go[0].contains("gone.db"), "{log}");
    let expected = content(&known);
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    fleet.check_restored("eu/known.db", &expected);
    assert_eq!(fleet.scene.objects("eu/known.db/epochs").len(), 1, "it went on undisturbed");
}

/// What was committed last waits in the spool when the database is deleted, and storage comes back only later.
#[test]
fn a_database_that_goes_while_storage_is_away_is_shipped_to_its_end() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "shutdown-timeout = \"100ms\"");
    fleet.scene.expect_error("the replica's directory is not there");
    let daemon = fleet.start();
    for name in ["a.db", "b.db"] {
        fleet.wait_until_followed(&fleet.path(name));
        fleet.sync(&fleet.path(name));
    }
    std::fs::rename(fleet.scene.path("replica"), fleet.scene.path("unmounted")).unwrap();
    count_up(&applications[1]);
    let expected = content(&fleet.path("b.db"));
    let spool = fleet.path(".b.db-waltrail/spool");
    let waits = || std::fs::read_dir(&spool).unwrap().any(|entry| entry.unwrap().file_type().unwrap().is_file());
    wait_for("its last transaction to wait", || waits().then_some(()));
    drop(applications);
    for suffix in ["", "-wal", "-shm"] {
        std::fs::remove_file(format!("{}{suffix}", fleet.path("b.db").display())).ok();
    }
    wait_for("it to be missed", || fleet.scene.log().contains("not to be followed any more").then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    assert!(waits(), "{}", fleet.scene.log());
    std::fs::rename(fleet.scene.path("unmounted"), fleet.scene.path("replica")).unwrap();
    wait_for("its state to be gone", || (!fleet.path(".b.db-waltrail").exists()).then_some(()));
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    fleet.check_restored("b.db", &expected);
}

/// Fails if the daemon has lost its locks on a database that it follows. SQLite takes them once,
/// when it opens the database.
fn check_locks(fleet: &Fleet, daemon: &Daemon, name: &str, when: &str) {
    for file in [name.to_owned(), format!("{name}-shm")] {
        let is_held = daemon.holds_lock_on(&fleet.path(&file));
        assert!(is_held, "{when}: no lock on {file} any more\n{}", fleet.scene.log());
    }
}

#[test]
fn file_with_several_names_in_fleet_is_followed_once_and_stays_locked() {
    let (fleet, applications) = Fleet::new(&["b.db"], "");
    let link = |number: u32| {
        std::fs::hard_link(fleet.path("b.db"), fleet.path(&format!("c{number}.db"))).unwrap();
        symlink("b.db", fleet.path(&format!("d{number}.db"))).unwrap();
    };
    link(0);
    let daemon = fleet.start();
    fleet.wait_until_followed(&fleet.path("b.db"));
    for number in 1..4 {
        link(number);
        // Comes first in sorted order: what is followed already stays.
        std::fs::hard_link(fleet.path("b.db"), fleet.path(&format!("a{number}.db"))).unwrap();
        let second_name = fleet.path(&format!("a{number}.db")).display().to_string();
        wait_for("the directory to be searched", || fleet.scene.log().contains(&second_name).then_some(()));
        check_locks(&fleet, &daemon, "b.db", &second_name);
    }
    count_up(&applications[0]);
    fleet.sync(&fleet.path("b.db"));
    let expected = content(&fleet.path("b.db"));
    for name in ["a1.db", "a2.db", "a3.db", "c0.db", "c1.db", "c2.db", "c3.db"] {
        assert!(fleet.is_let_go(&fleet.path(name)), "{name}\n{}", fleet.scene.log());
        let both = format!("{} and {} are one file", fleet.path(name).display(), fleet.path("b.db").display());
        let warnings = fleet.scene.log().lines().filter(|line| line.contains("WARN") && line.contains(&both)).count();
        assert_eq!(warnings, 1, "{name}\n{}", fleet.scene.log());
    }
    check_locks(&fleet, &daemon, "b.db", "the end");
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    fleet.check_restored("b.db", &expected);
}

#[test]
fn named_database_that_pattern_matches_through_link_stays_locked() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "");
    let linked = fleet.scene.path("linked");
    symlink(fleet.path(""), &linked).unwrap();
    let scene = &fleet.scene;
    let (named, others) = (scene.path("elsewhere/a.db"), scene.path("elsewhere/others"));
    fleet.configure(&format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\n[[database]]\npath = \"{}\"\nreplica = \"{}\"\n",
        fleet.path("a.db").display(),
        named.display(),
        linked.join("*.db").display(),
        others.display(),
    ));
    let daemon = fleet.start();
    fleet.wait_until_followed(&fleet.path("a.db"));
    fleet.wait_until_followed(&linked.join("b.db"));
    for number in 0..4 {
        std::fs::hard_link(fleet.path("a.db"), fleet.path(&format!("{number}.db"))).unwrap();
        let both = format!(
            "{} and {} are one file",
            linked.join(format!("{number}.db")).display(),
            fleet.path("a.db").display()
        );
        wait_for("the directory to be searched", || scene.log().contains(&both).then_some(()));
        check_locks(&fleet, &daemon, "a.db", &both);
        check_locks(&fleet, &daemon, "b.db", &both);
    }
    applications.iter().for_each(count_up);
    fleet.sync(&fleet.path("a.db"));
    fleet.sync(&linked.join("b.db"));
    let expected = ["a.db", "b.db"].map(|name| content(&fleet.path(name)));
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    for (replica, expected) in [named, others.join("b.db")].iter().zip(&expected) {
        assert_eq!(&content(&scene.restored(replica.to_str().unwrap(), &[])), expected);
    }
    let stored = std::fs::read_dir(&others).unwrap().count();
    assert_eq!(stored, 1, "b.db alone is of the pattern");
}

#[test]
fn a_hangup_touches_only_what_differs() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db", "c.db"], "");
    fleet.scene.expect_error("the configuration is wrong; what it said before holds on");
    let one = |name: &str, more: &str| {
        let replica = fleet.scene.path("elsewhere").join(name);
        format!(
            "[[database]]\npath = \"{}\"\nreplica = \"{}\"\n{more}\n",
            fleet.path(name).display(),
            replica.display()
        )
    };
    fleet.configure(&format!("{}{}", one("a.db", ""), one("b.db", "")));
    let daemon = fleet.start();
    for name in ["a.db", "b.db"] {
        fleet.wait_until_followed(&fleet.path(name));
    }
    assert!(fleet.is_let_go(&fleet.path("c.db")));

    fleet.configure("[[database]]\npath = 7\n");
    daemon.signal(libc::SIGHUP);
    wait_for("the error", || fleet.scene.log().contains("the configuration is wrong").then_some(()));
    count_up(&applications[1]);
    fleet.sync(&fleet.path("b.db"));
    let left = content(&fleet.path("b.db"));

    fleet.configure(&format!("{}{}", one("a.db", ""), one("c.db", "sync-interval = \"2s\"")));
    daemon.signal(libc::SIGHUP);
    fleet.wait_until_followed(&fleet.path("c.db"));
    wait_for("b.db to be let go of", || fleet.is_let_go(&fleet.path("b.db")).then_some(()));
    count_up(&applications[0]);
    count_up(&applications[2]);
    let expected = [content(&fleet.path("a.db")), left, content(&fleet.path("c.db"))];
    assert_eq!(daemon.terminate(), Some(0), "{}", fleet.scene.log());
    for (name, expected) in ["a.db", "b.db", "c.db"].iter().zip(&expected) {
        let replica = fleet.scene.path("elsewhere").join(name).display().to_string();
        assert_eq!(&content(&fleet.scene.restored(&replica, &[])), expected, "{name}");
    }
    let epochs = std::fs::read_dir(fleet.scene.path("elsewhere/a.db/epochs")).unwrap().count();
    assert_eq!(epochs, 1, "a.db went on undisturbed");
}

#[test]
fn a_fleet_that_is_lost_comes_back_from_what_is_stored() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "");
    std::fs::create_dir_all(fleet.path("eu")).unwrap();
    drop(create_database(&fleet.path("eu/c.db"), 40, ""));
    let configuration = fleet.configuration.display().to_string();
    let everywhere = std::fs::read_to_string(&fleet.configuration).unwrap().replace("/*.db", "/**/*.db");
    fleet.configure(&everywhere);
    // The first time there is nothing to restore.
    let first = run(["run", "--config", &configuration, "--", "true"]);
    assert!(first.status.success(), "{}", stderr(&first));
    let names = ["a.db", "b.db", "eu/c.db"];
    let expected: Vec<Vec<String>> = names.iter().map(|name| content(&fleet.path(name))).collect();
    drop(applications);

    let elsewhere = fleet.scene.path("elsewhere");
    let all = run(["restore", "--config", &configuration, "--all", "--output-dir", elsewhere.to_str().unwrap()]);
    assert!(all.status.success(), "{}", stderr(&all));
    for (name, expected) in names.iter().zip(&expected) {
        assert_eq!(&content(&elsewhere.join(name)), expected);
    }

    // One that is missing was deleted; when all are, the volume is new.
    std::fs::remove_file(fleet.path("b.db")).unwrap();
    let command = ["run", "--config", &configuration, "--", "true"];
    assert!(run(command).status.success());
    assert!(!fleet.path("b.db").exists());
    std::fs::remove_dir_all(fleet.path("")).unwrap();
    let back = run(command);
    assert!(back.status.success(), "{}", stderr(&back));
    for (name, expected) in names.iter().zip(&expected) {
        assert_eq!(&content(&fleet.path(name)), expected, "{name}");
    }
}

/// A container that is ended in the middle goes on at its next start: what is missing then was not deleted.
#[test]
fn a_fleets_restore_that_is_cut_off_goes_on() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "");
    drop(applications);
    let configuration = fleet.configuration.display().to_string();
    let command = ["run", "--config", &configuration, "--", "true"];
    assert!(run(command).status.success());
    let expected = ["a.db", "b.db"].map(|name| content(&fleet.path(name)));
    std::fs::remove_dir_all(fleet.path("")).unwrap();
    let marker = fleet.scene.path("replica/b.db").join(MARKER_KEY);
    let sound = std::fs::read(&marker).unwrap();
    std::fs::write(&marker, b"damaged").unwrap();
    assert_eq!(run(command).status.code(), Some(13));
    // The first one was restored before that, or it was not.
    let replica = fleet.scene.path("replica/a.db").display().to_string();
    let first = fleet.path("a.db").display().to_string();
    assert!(run(["restore", "--if-missing", &replica, "--output", &first]).status.success());
    std::fs::write(&marker, sound).unwrap();
    let done = run(command);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(["a.db", "b.db"].map(|name| content(&fleet.path(name))), expected);
    // From here on one that is missing was deleted.
    std::fs::remove_file(fleet.path("b.db")).unwrap();
    assert!(run(command).status.success());
    assert!(!fleet.path("b.db").exists());
}

/// What the local search leaves out does not come in from storage, either.
#[test]
fn hidden_names_in_storage_are_nobodys_business() {
    let (fleet, applications) = Fleet::new(&["a.db"], "");
    drop(applications);
    let everywhere = std::fs::read_to_string(&fleet.configuration).unwrap().replace("/*.db", "/**/*.db");
    fleet.configure(&everywhere);
    let configuration = fleet.configuration.display().to_string();
    assert!(run(["run", "--config", &configuration, "--", "true"]).status.success());
    let replica = fleet.scene.path("replica");
    std::fs::create_dir(replica.join(".trash")).unwrap();
    for hidden in [".hidden.db", ".trash/b.db"] {
        let mut copy = std::process::Command::new("cp");
        assert!(copy.arg("-r").arg(replica.join("a.db")).arg(replica.join(hidden)).status().unwrap().success());
    }
    let elsewhere = fleet.scene.path("elsewhere");
    let all = run(["restore", "--config", &configuration, "--all", "--output-dir", elsewhere.to_str().unwrap()]);
    assert!(all.status.success(), "{}", stderr(&all));
    let restored: Vec<_> = std::fs::read_dir(&elsewhere).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let is_known = |name: &std::ffi::OsString| name == "a.db" || name == ".a.db-waltrail";
    assert!(restored.iter().all(is_known) && elsewhere.join("a.db").exists(), "{restored:?}");
    assert!(stderr(&all).contains(".hidden.db") && stderr(&all).contains(".trash"), "{}", stderr(&all));
}

#[test]
fn a_fleet_of_which_nothing_is_stored_is_not_restored() {
    let (fleet, applications) = Fleet::new(&["a.db"], "");
    drop(applications);
    let configuration = fleet.configuration.display().to_string();
    let elsewhere = fleet.scene.path("elsewhere").display().to_string();
    let all = ["restore", "--config", &configuration, "--all", "--output-dir", &elsewhere];
    let nothing = run(all);
    assert_eq!(nothing.status.code(), Some(12), "{}", stderr(&nothing));
    assert!(stderr(&nothing).contains("nothing is stored in"), "{}", stderr(&nothing));
    let fine = run(all.into_iter().chain(["--if-replica-exists"]));
    assert!(fine.status.success() && stderr(&fine).contains("nothing is stored in"), "{}", stderr(&fine));
}

/// As a job elsewhere does it, without the databases.
#[test]
fn a_fleet_is_verified_by_what_is_stored() {
    let (fleet, applications) = Fleet::new(&["a.db", "b.db"], "");
    drop(applications);
    let configuration = fleet.configuration.display().to_string();
    let verify = |more: &[&str]| {
        let arguments = ["verify", "--config", &configuration, "--depth", "structure"];
        let done = run(arguments.iter().chain(more));
        (done.status.code(), format!("{}{}", String::from_utf8_lossy(&done.stdout), stderr(&done)))
    };
    let (code, told) = verify(&[]);
    assert_eq!(code, Some(12), "{told}");
    assert_eq!(told.matches("there is no backup in").count(), 2, "those that are here: {told}");
    assert!(run(["run", "--config", &configuration, "--", "true"]).status.success());

    // One that was deleted is still to be restored, and nobody writes to it any more.
    std::fs::remove_file(fleet.path("b.db")).unwrap();
    let (code, told) = verify(&["--max-lag", "1ms", "--format", "json"]);
    let verdict = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["verdict"].clone();
    let verdicts: Vec<serde_json::Value> = told.lines().map(verdict).collect();
    assert_eq!((code, verdicts), (Some(1), vec!["degraded".into(), "ok".into()]), "{told}");

    std::fs::remove_dir_all(fleet.path("")).unwrap();
    let (code, told) = verify(&[]);
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(told.matches("verdict    ok").count(), 2, "{told}");
    assert_eq!(verify(&["--max-lag", "1ms"]).0, Some(1), "nothing is here: nobody knows that they were deleted");

    let text = std::fs::read_to_string(&fleet.configuration).unwrap();
    fleet.configure(&text.replace("/replica\"", "/elsewhere\""));
    let (code, told) = verify(&["--format", "junit"]);
    assert_eq!(code, Some(12), "{told}");
    assert!(told.contains("errors=\"1\"") && told.contains("nothing is stored in"), "{told}");
    fleet.configure(&text.replace(&fleet.scene.replica(), "s3://b/a?endpoint=http://127.0.0.1:1&region=x"));
    assert_eq!(verify(&[]).0, Some(11));
}

#[test]
fn what_can_not_be_looked_at_is_told() {
    let (fleet, applications) = Fleet::new(&[], "");
    drop(applications);
    std::fs::create_dir(fleet.path("eu")).unwrap();
    drop(create_database(&fleet.path("eu/a.db"), 20, ""));
    let text = std::fs::read_to_string(&fleet.configuration).unwrap().replace("/*.db", "/eu/*.db");
    fleet.configure(&text);
    let configuration = fleet.configuration.display().to_string();
    assert!(run(["run", "--config", &configuration, "--", "true"]).status.success());
    std::fs::remove_dir_all(fleet.path("")).unwrap();
    let status = run(["status", "--config", &configuration]);
    assert_eq!(status.status.code(), Some(1), "{}", stderr(&status));
    assert!(stderr(&status).contains("there is nothing to tell of"), "{}", stderr(&status));

    // Where a directory should be is something else.
    std::fs::write(fleet.scene.path("tenants"), "").unwrap();
    let verified = run(["verify", "--config", &configuration, "--depth", "structure"]);
    let told = String::from_utf8(verified.stdout.clone()).unwrap();
    assert_eq!(verified.status.code(), Some(1), "{told}\n{}", stderr(&verified));
    assert!(told.contains("verdict    ok"), "{told}");
    assert!(stderr(&verified).contains("tenants/eu"), "{}", stderr(&verified));
    let status = run(["status", "--config", &configuration]);
    assert_eq!(status.status.code(), Some(1), "{}", stderr(&status));
    assert!(stderr(&status).contains("tenants/eu"), "{}", stderr(&status));
}

#[test]
fn a_fleet_that_goes_with_its_container_is_said_to() {
    let (fleet, applications) = Fleet::new(&["a.db"], "");
    drop(applications);
    let mut command = crate::support::waltrail();
    command.args(["run", "--config", fleet.configuration.to_str().unwrap(), "--", "true"]);
    let done = command.env("RAILWAY_VOLUME_MOUNT_PATH", "/elsewhere").output().unwrap();
    assert!(done.status.success(), "{}", stderr(&done));
    assert!(stderr(&done).contains("DANGER") && stderr(&done).contains("/elsewhere/tenants"), "{}", stderr(&done));
}
