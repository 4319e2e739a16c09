//! What `doctor` finds, on stores that keep their promises and on those that do not.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use waltrail::clock::SystemClock;
use waltrail::store::faults::{Fault, Faulty};
use waltrail::store::memory::MemoryStore;
use waltrail::store::probe::{Finding, Weight, probe};
use waltrail::store::{Operation, SharedStore, StoreErrorKind};

use crate::support::machine::Machine;
use crate::support::quirks::{Quirk, Quirky};
use crate::support::s3::S3Server;
use crate::support::scene::Scene;
use crate::support::{create_database, run, stderr, waltrail};

fn finding<'a>(findings: &'a [Finding], what: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.what == what).unwrap()
}

/// Also where root runs the tests, who passes over permissions: CAP_DAC_OVERRIDE of capabilities(7).
fn bound_by_permissions(command: &mut Command) -> &mut Command {
    const CAP_DAC_OVERRIDE: libc::c_ulong = 1;
    let drop_capability = || {
        // SAFETY: takes numbers only. Who is not root can't drop it, and does not have it.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) };
        Ok(())
    };
    // SAFETY: only a system call after the fork.
    unsafe { command.pre_exec(drop_capability) }
}

#[test]
fn a_good_store_and_a_good_place() {
    let server = S3Server::start();
    let scene = Scene::new();
    drop(create_database(&scene.database(), 5, ""));
    let config = scene.path("waltrail.toml");
    let (database, replica) = (scene.database(), server.url("doctor"));
    std::fs::write(&config, format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n", database.display()))
        .unwrap();
    let done = waltrail()
        .args(["doctor", "--config", config.to_str().unwrap(), database.to_str().unwrap()])
        .env_remove("RAILWAY_VOLUME_MOUNT_PATH")
        .output()
        .unwrap();
    let told = String::from_utf8(done.stdout.clone()).unwrap();
    for says in
        ["in WAL mode, pages of 4096", "conditional put    honoured", "delete             what is deleted is gone"]
    {
        assert!(told.contains(says), "{says}\n{told}{}", stderr(&done));
    }
    let is_advice = |line: &str| line.starts_with("note  busy timeout");
    assert!(told.lines().skip(1).all(|line| line.starts_with("good") || is_advice(line)), "{told}");
    // Nothing is left, and nothing was made.
    let log = run(["log", &replica]);
    assert_eq!(log.status.code(), Some(12), "{}", stderr(&log));
    assert!(!scene.path("app.db-wal").exists() && !scene.path(".app.db-waltrail").exists());
    // A volume elsewhere.
    let done = waltrail()
        .args(["doctor", "--config", config.to_str().unwrap()])
        .env("RAILWAY_VOLUME_MOUNT_PATH", "/elsewhere")
        .output()
        .unwrap();
    let told = String::from_utf8(done.stdout.clone()).unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(told.starts_with("BAD   place") && told.contains("/elsewhere/app.db"), "{told}");
}

/// The directory can be written, the file in it can not.
#[test]
fn a_database_that_can_not_be_written() {
    let scene = Scene::new();
    drop(create_database(&scene.database(), 5, ""));
    std::fs::set_permissions(scene.database(), std::fs::Permissions::from_mode(0o444)).unwrap();
    let config = scene.path("waltrail.toml");
    let (database, replica) = (scene.database(), scene.replica());
    std::fs::write(&config, format!("[[database]]\npath = \"{}\"\nreplica = \"{replica}\"\n", database.display()))
        .unwrap();
    let done =
        bound_by_permissions(waltrail().args(["doctor", "--config", config.to_str().unwrap()])).output().unwrap();
    let told = String::from_utf8(done.stdout.clone()).unwrap();
    assert_eq!(done.status.code(), Some(1), "{told}{}", stderr(&done));
    assert!(told.contains("BAD   database           it can't be written"), "{told}");
}

#[test]
fn a_store_that_is_not_there() {
    let done = run(["doctor", "s3://nobody/app?endpoint=http://127.0.0.1:1&region=us-east-1"]);
    assert_eq!(done.status.code(), Some(11), "{}", stderr(&done));
}

#[tokio::test]
async fn stores_that_break_promises() {
    let answer = |kind| {
        move |request: waltrail::store::faults::Request<'_>, operation: Operation, key: &str| {
            if request.operation == operation && request.key.ends_with(key) { Fault::Before(kind) } else { Fault::None }
        }
    };
    for (operation, key, kind, what, weight) in [
        (Operation::Delete, "gone", StoreErrorKind::Denied, "delete", Weight::Note),
        (Operation::GetRange, "range", StoreErrorKind::Other, "ranges", Weight::Bad),
        (Operation::CreateMultipart, "parts", StoreErrorKind::NotSupported, "multipart upload", Weight::Bad),
        (Operation::Get, "never", StoreErrorKind::Denied, "put and get", Weight::Bad),
    ] {
        let memory = MemoryStore::new();
        let told = answer(kind);
        let store: SharedStore = Arc::new(Faulty::new(Arc::new(memory), move |request| told(request, operation, key)));
        let findings = probe(&store, &SystemClock::new()).await.unwrap();
        assert_eq!(finding(&findings, what).weight, weight, "{findings:?}");
        // The memory store's clock stands at 1970.
        assert!(
            findings.iter().all(|found| found.what == what || found.what == "clock" || found.weight == Weight::Good)
        );
        assert_eq!(finding(&findings, "clock").weight, Weight::Bad);
    }
}

/// What a start finds out by the way is in the status for as long as it is so, and costs an idle database nothing.
#[test]
fn a_daemon_tells_what_it_finds_at_its_start() {
    let notes = |quirk: Option<Quirk>, ahead_ms: i64| {
        let quirk = std::cell::RefCell::new(quirk);
        let mut machine = Machine::new("PRAGMA page_size=4096", |store| match quirk.take() {
            Some(quirk) => Quirky::shared(store, quirk),
            None => store,
        });
        machine.clock.jump(ahead_ms);
        machine.start();
        machine.commit("INSERT INTO item(n) VALUES(1)");
        machine.sync();
        let notes = machine.status().notes;
        // Set right, it is said no more after the next start.
        machine.clock.jump(-ahead_ms);
        machine.stop();
        machine.start();
        machine.sync();
        assert!(!machine.status().notes.contains_key("clock"));
        notes
    };
    assert!(notes(None, 0).is_empty());
    let found = notes(Some(Quirk::IgnoresConditions), -3_600_000);
    assert!(found["conditional put"].contains("ignored"), "{found:?}");
    assert!(found["clock"].starts_with("60 minutes apart"), "{found:?}");
    assert_eq!(found.len(), 2);
}
