//! A real `waltrail prune` deletes while a real `waltrail restore` is in the middle of its work: before each file that the restore
//! opens in the replica, one after another.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use crate::support::oracle::Oracle;
use crate::support::scene::{Scene, now_ms};
use crate::support::syscalls::{self, Call, Verdict};
use crate::support::{run, stderr, waltrail};

const HOUR_MS: u64 = 3_600_000;
const OBJECTS_LIMIT: u64 = 100 << 20;

/// Four days with something each hour and a snapshot each half day, which end now.
async fn four_days() -> Oracle {
    let mut oracle = Oracle::new(4096, 7).await;
    oracle.begin_at(now_ms() - 96 * HOUR_MS);
    oracle.begin_with_snapshot(None, 3).await;
    for hour in 1..95 {
        oracle.pass_time(HOUR_MS);
        oracle.commit_and_cut(2).await;
        if hour % 12 == 0 {
            oracle.snapshot(oracle.position().txid - 1, oracle.position().txid).await;
        }
    }
    oracle
}

/// The replica as a directory, whose files are as old as the objects are.
async fn write_to(oracle: &Oracle, directory: &Path) {
    for object in oracle.store.list("", None).await.unwrap() {
        let path = directory.join(&object.key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, oracle.store.get(&object.key, OBJECTS_LIMIT).await.unwrap()).unwrap();
        let file = std::fs::File::options().append(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_millis(object.stored_ms)).unwrap();
    }
}

/// Restores a transaction; before the `nth` file of the replica is opened, the history beyond a day is let go. Tells, too, whether
/// it came to that.
fn restore_while_pruned(replica: &Path, output: &Path, txid: u64, nth: usize) -> (Output, bool) {
    let opened = Arc::new(AtomicUsize::new(0));
    let (count, place) = (opened.clone(), replica.to_owned());
    let decide = move |call: &Call| {
        let is_object =
            call.paths().iter().any(|path| path.as_os_str().as_bytes().starts_with(place.as_os_str().as_bytes()));
        if is_object && count.fetch_add(1, Ordering::SeqCst) + 1 == nth {
            let pruned = run(["prune", place.to_str().unwrap(), "--retention", "1d"]);
            assert!(pruned.status.success(), "{}", stderr(&pruned));
        }
        Verdict::Goes
    };
    let mut command = waltrail();
    command.arg("restore").arg(replica).args(["--txid", &txid.to_string(), "--output"]).arg(output);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = syscalls::spawn(&mut command, &[libc::SYS_openat], decide);
    (child.wait_with_output().unwrap(), opened.load(Ordering::SeqCst) >= nth)
}

/// What came of the restores of one transaction, a prune before each of their steps.
#[derive(Debug, Default)]
struct Seen {
    restored: usize,
    /// By its exit code: there is no such state any more; an object that was planned with is gone.
    refused: usize,
    missing: usize,
}

async fn play(oracle: &Oracle, txid: u64) -> Seen {
    let scene = Scene::new();
    let original = scene.path("original");
    write_to(oracle, &original).await;
    let right = oracle.line(1)[&txid].0;
    let (replica, output, mut seen) = (scene.path("replica"), scene.path("out.db"), Seen::default());
    for nth in 1.. {
        let copied = Command::new("cp").args(["-a", "--"]).args([&original, &replica]).status().unwrap();
        assert!(copied.success());
        let (done, is_pruned) = restore_while_pruned(&replica, &output, txid, nth);
        let said = stderr(&done);
        match done.status.code() {
            Some(0) => {
                seen.restored += 1;
                let restored = std::fs::read(&output).unwrap();
                assert!(
                    restored == oracle.states[&right].bytes(),
                    "{txid} is restored wrong, pruned before file {nth}"
                );
                std::fs::remove_file(&output).unwrap();
                std::fs::remove_dir_all(scene.path(".out.db-waltrail")).unwrap();
            }
            Some(12) => seen.refused += 1,
            Some(13) => {
                assert!(said.contains("missing") && said.contains("nothing was written"), "{said}");
                seen.missing += 1;
            }
            code => panic!("{code:?}: {said}"),
        }
        let left: Vec<_> =
            std::fs::read_dir(scene.directory.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert!(left.len() == 2, "a file is left: {left:?}");
        std::fs::remove_dir_all(&replica).unwrap();
        if !is_pruned {
            assert!(nth > 10, "the restore opens {nth} files");
            return seen;
        }
    }
    unreachable!()
}

#[tokio::test]
async fn what_the_window_holds_is_restored_whatever_a_prune_deletes_meanwhile() {
    let oracle = four_days().await;
    let txid = oracle.position().txid - 20;
    let seen = play(&oracle, txid).await;
    assert!(seen.refused == 0 && seen.missing == 0, "{seen:?}");
}

#[tokio::test]
async fn what_leaves_the_window_during_its_restore_is_right_or_refused() {
    let oracle = four_days().await;
    let txid = oracle.position().txid - 100;
    let seen = play(&oracle, txid).await;
    // A prune before its plan, in the middle, and after all was read.
    assert!(seen.refused > 0 && seen.missing > 0 && seen.restored > 0, "{seen:?}");
}
