//! The clock of a real daemon is set while it runs, or wrong when it starts.

use std::time::Duration;

use waltrail::format::key::SegmentKey;
use waltrail::retain::tails::TailCache;

use crate::support::clock::Clock;
use crate::support::machine::Machine;
use crate::support::scene::Scene;
use crate::support::{Daemon, content, count_up, create_database, insert, run, stderr, wait_for};

const DAY_S: i64 = 86_400;

/// Set by days back and by a year ahead, with a daemon that is killed in between: every state stays restorable, the times of
/// a line never run backwards, and what a prune by the right time deletes harms nothing.
#[test]
fn the_daemons_clock_is_set() {
    let scene = Scene::new();
    let clock = Clock::new();
    let application = create_database(&scene.database(), 50, "");
    let database = scene.database().display().to_string();
    let start = || Daemon::start_with_clock(&[&database, &scene.replica()], &scene.path("daemon.log"), &clock);
    let status = || -> serde_json::Value {
        serde_json::from_slice(&run(["status", &database, "--format", "json"]).stdout).unwrap()
    };
    let (mut daemon, mut states) = (start(), Vec::new());
    for seconds in [0, -DAY_S, 365 * DAY_S, -3 * DAY_S, 0] {
        clock.set(seconds, 0);
        for _ in 0..3 {
            insert(&application, 5);
            count_up(&application);
            wait_for("a sync", || run(["sync", &database]).status.success().then_some(()));
        }
        let told = status();
        states.push((told["confirmed"]["position"]["txid"].to_string(), content(&scene.database())));
        assert!(told["error"].is_null(), "{told}");
        assert!(run(["snapshot", &database]).status.success(), "{}", scene.log());
        daemon.kill();
        daemon = start();
        wait_for("a sync", || run(["sync", &database]).status.success().then_some(()));
        // The directory's times are those of the right clock.
        let told = wait_for("what is found of the store", || {
            let notes = status()["notes"].clone();
            (notes["clock"].is_string() == (seconds != 0)).then_some(notes)
        });
        assert!(seconds == 0 || told["clock"].as_str().unwrap().contains("minutes apart"), "{told}");
    }
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    let pruned = run(["prune", &scene.replica(), "--retention", "1d"]);
    assert!(pruned.status.success(), "{}", stderr(&pruned));
    for (txid, right) in &states {
        assert!(scene.restored_content(&["--txid", txid]) == *right, "{txid} is restored wrong\n{}", scene.log());
    }
    let root = scene.path("replica").display().to_string();
    let key = |path: &String| SegmentKey::parse(path.strip_prefix(&root)?.trim_start_matches('/'));
    let mut spans: Vec<_> = scene.objects("log").iter().filter_map(key).map(|key| key.0).collect();
    spans.sort_by_key(|span| (span.last_txid, span.epoch));
    let times: Vec<u64> = spans.iter().map(|span| span.time_ms).collect();
    assert!(times.is_sorted() && times.len() > 10, "{times:?}");
    // The year ahead was seen, and stays.
    assert!(times[times.len() - 1] - times[0] > 360 * 86_400_000, "{times:?}");
}

/// A machine that does not keep the time while it is off starts far in the past, after a restore. The line that was left ended when the
/// store took the new epoch's record, not when its writer believed that it was.
#[test]
fn a_claim_by_a_clock_that_is_behind_takes_no_undone_state_away() {
    const INSERT: &str = "INSERT INTO item(body) VALUES(randomblob(300))";
    let days = |days: u64| Duration::from_secs(days * DAY_S as u64);
    let mut machine = Machine::new("PRAGMA page_size=4096", |store| store);
    machine.window = days(30);
    machine.start();
    machine.commit(INSERT);
    let restored = machine.sync();
    machine.snapshot();
    machine.commit(INSERT);
    let undone = machine.sync();
    machine.stop();
    // Nobody writes for longer than the window.
    machine.pass(days(40));
    machine.restore(restored, true);
    machine.clock.jump(-60 * DAY_S * 1000);
    machine.start();
    machine.commit(INSERT);
    let newest = machine.sync();
    assert_eq!((newest.epoch, newest.txid), (undone.epoch + 1, restored.txid + 1), "it goes on from what was restored");
    machine.clock.jump(60 * DAY_S * 1000);
    machine.prune(&mut TailCache::default()).unwrap();
    machine.check(undone);
    machine.check(newest);
}
