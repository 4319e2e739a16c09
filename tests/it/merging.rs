//! Merging: fewer objects, and every transaction still there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use waltrail::format::key::{SegmentKey, Span};

use crate::support::scene::Scene;
use crate::support::{content, count_up, create_database, run, wait_for};

fn spans(scene: &Scene) -> Vec<(PathBuf, Span)> {
    let root = scene.replica();
    let span = |object: String| {
        let key = Path::new(&object).strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        (PathBuf::from(object), SegmentKey::parse(&key).unwrap().0)
    };
    scene.objects("log").into_iter().map(span).collect()
}

fn is_superseded(all: &[(PathBuf, Span)], span: &Span) -> bool {
    all.iter().any(|(_, other)| {
        other != span
            && other.epoch == span.epoch
            && other.first_txid <= span.first_txid
            && span.last_txid <= other.last_txid
    })
}

/// Restores to every transaction that the log lists, and compares with what the application had counted then.
fn check_every_transaction(scene: &Scene, transactions: i64) {
    let log = String::from_utf8(run(["log", &scene.replica(), "--transactions"]).stdout).unwrap();
    let listed: Vec<u64> = log
        .lines()
        .filter(|line| line.contains(" pages "))
        .map(|line| line.split_whitespace().next().unwrap().parse().unwrap())
        .collect();
    assert!(listed.is_sorted_by(|before, after| before + 1 == *after), "{listed:?}");
    assert_eq!(listed.len() as i64, transactions);
    for (index, txid) in listed.iter().enumerate().step_by(17) {
        let restored = scene.restored(&scene.replica(), &["--txid", &txid.to_string()]);
        let counted = crate::support::number(&crate::support::open(&restored), "SELECT n FROM counter");
        assert_eq!(counted, index as i64 + 1, "transaction {txid}");
    }
}

#[test]
fn small_segments_become_large_ones() {
    let scene = Scene::new();
    let application = create_database(&scene.database(), 200, "");
    let config = scene.path("waltrail.toml");
    let text = format!(
        "[[database]]\npath = \"{}\"\nreplica = \"{}\"\nsync-interval = \"20ms\"\nmerge = [\"400ms\", \"1600ms\"]\n",
        scene.database().display(),
        scene.replica()
    );
    std::fs::write(&config, text).unwrap();
    let arguments = ["--config", config.to_str().unwrap()];
    let mut daemon = scene.start_with(&arguments);
    wait_for("the snapshot", || (!scene.objects("snap").is_empty()).then_some(()));
    let mut turns = 0;
    // Killed twice on the way: what is kept is merged by the next run.
    for round in 0..3 {
        for _ in 0..150 {
            count_up(&application);
            turns += 1;
            std::thread::sleep(Duration::from_millis(8));
        }
        if round < 2 {
            daemon.kill();
            daemon = scene.start_with(&arguments);
            // What is committed before could be coalesced: the WAL may begin anew while nobody watches.
            wait_for("the epoch", || (scene.log().matches("epoch claimed").count() == round + 2).then_some(()));
        }
    }
    // The last window is over when something later is confirmed.
    std::thread::sleep(Duration::from_millis(1700));
    count_up(&application);
    turns += 1;
    let all = wait_for("merges", || {
        let all = spans(&scene);
        let left = all.iter().filter(|(_, span)| !is_superseded(&all, span)).count();
        (left <= 14).then_some(all)
    });
    assert!(all.len() > 60, "{}", all.len());
    let synced = run(["sync", scene.database().to_str().unwrap()]);
    assert!(synced.status.success(), "{}", crate::support::stderr(&synced));
    check_every_transaction(&scene, turns);
    for (path, _) in all.iter().filter(|(_, span)| is_superseded(&all, span)) {
        std::fs::remove_file(path).unwrap();
    }
    check_every_transaction(&scene, turns);
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    assert_eq!(content(&scene.database()), scene.restored_content(&[]));
    assert!(!scene.log().contains("WARN"), "{}", scene.log());
}
