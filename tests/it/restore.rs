//! Restores of replicas whose every state is known: each transaction, each moment, on every line, byte for byte; and what
//! happens when objects are not as they were.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use waltrail::format::Position;
use waltrail::format::key::{MARKER_KEY, SegmentKey};
use waltrail::format::segment::{Segment, SegmentWriter};
use waltrail::restore::RestoreError;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::install::Incoming;
use waltrail::restore::plan::{Plan, Target, plan};
use waltrail::store::memory::MemoryStore;
use waltrail::store::{PutMode, SharedStore};

use crate::support::oracle::{Numbers, Oracle};
use crate::support::{Daemon, create_database, insert, number, open, wait_for_restored};

/// Restores; gives the plan and the database's bytes.
async fn restore(store: &SharedStore, target: Target, epoch: Option<u32>) -> Result<(Plan, Vec<u8>), RestoreError> {
    let history = History::load(store).await?;
    let plan = plan(store, &history, target, epoch).await?;
    let mut file = tempfile::tempfile().unwrap();
    execute(store, &plan, file.try_clone().unwrap(), Path::new("scratch")).await?;
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    Ok((plan, bytes))
}

/// A replica with every kind of epoch: found, continued, found again, forked inside a segment, continued after a fork.
async fn all_kinds(page_size: u32, seed: u64) -> Oracle {
    let mut oracle = Oracle::new(page_size, seed).await;
    oracle.begin_with_snapshot(None, 5).await;
    for transactions in [1, 4, 2] {
        oracle.commit_and_cut(transactions).await;
    }
    // Read before and after the point that a later epoch forks from: of no use on its line.
    oracle.snapshot(8, 11).await;
    let end_of_first = oracle.position();
    // Continued at the end of its parent.
    oracle.begin(Some(end_of_first), true).await;
    oracle.commit_and_cut(3).await;
    for _ in 0..4 {
        oracle.commit();
    }
    oracle.cut_overlapping().await;
    let end_of_second = oracle.position();
    // Found with unseen changes, and no snapshot of it was ever stored.
    oracle.begin(Some(end_of_second), false).await;
    oracle.commit_and_cut(2).await;
    // Found again; snapshot read while it went on.
    oracle.begin_with_snapshot(Some(oracle.position()), 3).await;
    oracle.commit_and_cut(6).await;
    oracle.snapshot(oracle.position().txid - 4, oracle.position().txid - 1).await;
    oracle.commit_and_cut(2).await;
    // A restore went back into the middle of the first epoch's second segment; what was undone stays on its own line.
    oracle.begin(Some(Position { epoch: 1, txid: 9 }), true).await;
    oracle.commit_and_cut(8).await;
    let fork = oracle.position();
    // Forked from the fork, before the end of its only segment, and then found changed.
    oracle.begin(Some(Position { txid: fork.txid - 3, ..fork }), true).await;
    oracle.commit_and_cut(2).await;
    oracle.begin_with_snapshot(Some(oracle.position()), 0).await;
    oracle.commit_and_cut(3).await;
    oracle
}

#[tokio::test]
async fn every_transaction_on_every_line() {
    for (page_size, seed) in [(512, 1), (512, 2), (4096, 3), (65_536, 4)] {
        let oracle = all_kinds(page_size, seed).await;
        for &epoch in oracle.records.keys() {
            let line = oracle.line(epoch);
            let newest = *line.keys().next_back().unwrap();
            for txid in 0..=newest + 2 {
                let what = format!("transaction {txid} on the line of epoch {epoch}, page size {page_size}");
                match restore(&oracle.store, Target::Txid(txid), Some(epoch)).await {
                    Ok((plan, bytes)) => {
                        assert!(oracle.is_restorable(epoch, txid), "{what}");
                        let position = line[&txid].0;
                        assert_eq!(plan.position, position, "{what}");
                        assert!(bytes == oracle.states[&position].bytes(), "{what}: wrong bytes");
                        assert_eq!(plan.time_ms, oracle.states[&position].time_ms, "{what}");
                    }
                    Err(RestoreError::OutOfRange { .. }) => assert!(!oracle.is_restorable(epoch, txid), "{what}"),
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn every_moment_on_every_line() {
    for (page_size, seed) in [(512, 5), (4096, 6)] {
        let oracle = all_kinds(page_size, seed).await;
        let times: Vec<u64> = oracle.states.values().map(|state| state.time_ms).collect();
        for &epoch in oracle.records.keys() {
            for asked_ms in times.iter().flat_map(|&time_ms| [time_ms - 1, time_ms, time_ms + 1]) {
                let what = format!("{asked_ms} on the line of epoch {epoch}, page size {page_size}");
                match restore(&oracle.store, Target::Time(asked_ms), Some(epoch)).await {
                    Ok((plan, bytes)) => {
                        assert_eq!(Some(plan.position.txid), oracle.at_time(epoch, asked_ms), "{what}");
                        assert_eq!(plan.position, oracle.line(epoch)[&plan.position.txid].0, "{what}");
                        assert!(plan.time_ms <= asked_ms, "{what}");
                        assert!(bytes == oracle.states[&plan.position].bytes(), "{what}: wrong bytes");
                    }
                    Err(RestoreError::OutOfRange { range, .. }) => {
                        assert_eq!(oracle.at_time(epoch, asked_ms), None, "{what}");
                        assert!(range.contains("transactions "), "{what}: {range}");
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn the_newest_state_and_what_is_said_of_it() {
    let oracle = all_kinds(512, 7).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert_eq!(plan.position, oracle.position());
    assert!(bytes == oracle.states[&oracle.position()].bytes());
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
    // Epoch 3 never got its snapshot: what was known before it is restored, and that is said.
    let (plan, bytes) = restore(&oracle.store, Target::Latest, Some(3)).await.unwrap();
    assert_eq!(plan.position.epoch, 2);
    assert!(bytes == oracle.states[&plan.position].bytes());
    assert!(plan.notes.iter().any(|note| note.contains("epoch 3")), "{:?}", plan.notes);
}

#[tokio::test]
async fn a_note_is_given_only_where_it_is_true() {
    let mut oracle = Oracle::new(512, 8).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(9).await;
    let end = oracle.position();
    oracle.begin_with_snapshot(Some(end), 0).await;
    let unseen = |plan: &Plan| plan.notes.iter().any(|note| note.contains("unseen"));
    let end_ms = oracle.states[&end].time_ms;
    let (plan, _) = restore(&oracle.store, Target::Time(end_ms + 5), None).await.unwrap();
    assert!(plan.position == end && unseen(&plan), "{:?}", plan.notes);
    // In the middle of the older history nothing is unknown.
    let (middle, state) = oracle.states.iter().rev().find(|(_, state)| state.time_ms < end_ms).unwrap();
    let (plan, _) = restore(&oracle.store, Target::Time(state.time_ms), None).await.unwrap();
    assert!(plan.position == *middle && !unseen(&plan), "{:?}", plan.notes);
}

#[tokio::test]
async fn a_gap_is_named_and_never_stepped_over() {
    let mut oracle = Oracle::new(512, 9).await;
    oracle.begin_with_snapshot(None, 2).await;
    let before = oracle.commit_and_cut(3).await.0;
    let lost = oracle.commit_and_cut(3).await;
    oracle.commit_and_cut(3).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    let SegmentKey(lost) = lost;
    let is_the_gap = |error: RestoreError| match error {
        RestoreError::Gap { first_missing, last_missing, newest, .. } => {
            assert_eq!((first_missing, last_missing), (lost.first_txid, lost.last_txid));
            assert_eq!(newest, Some(before.last_txid));
        }
        other => panic!("{other}"),
    };
    is_the_gap(restore(&oracle.store, Target::Latest, None).await.unwrap_err());
    for txid in lost.first_txid..=oracle.position().txid {
        is_the_gap(restore(&oracle.store, Target::Txid(txid), None).await.unwrap_err());
    }
    // Those that are missing may have been in that very millisecond.
    let before_ms = oracle.states[&Position { epoch: 1, txid: before.last_txid }].time_ms;
    is_the_gap(restore(&oracle.store, Target::Time(before_ms), None).await.unwrap_err());
    let far_ms = oracle.states[&oracle.position()].time_ms + 1000;
    is_the_gap(restore(&oracle.store, Target::Time(far_ms), None).await.unwrap_err());
    for txid in before.first_txid..=before.last_txid {
        let (plan, bytes) = restore(&oracle.store, Target::Txid(txid), None).await.unwrap();
        assert!(bytes == oracle.states[&plan.position].bytes());
    }
    // Beyond everything that was ever stored there is no gap, only nothing.
    let beyond = restore(&oracle.store, Target::Txid(oracle.position().txid + 1), None).await.unwrap_err();
    assert!(matches!(beyond, RestoreError::OutOfRange { .. }), "{beyond}");
    // A snapshot behind the gap makes what follows it restorable.
    oracle.commit_and_cut(2).await;
    oracle.snapshot(oracle.position().txid - 1, oracle.position().txid).await;
    let first_again = oracle.position().txid;
    oracle.commit_and_cut(2).await;
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert_eq!(plan.position, oracle.position());
    assert!(bytes == oracle.states[&plan.position].bytes());
    is_the_gap(restore(&oracle.store, Target::Txid(first_again - 1), None).await.unwrap_err());
}

#[tokio::test]
async fn transactions_missing_at_a_parents_end_are_a_gap() {
    let mut oracle = Oracle::new(512, 10).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(3).await;
    let lost = oracle.commit_and_cut(2).await;
    oracle.begin(Some(oracle.position()), true).await;
    oracle.commit_and_cut(3).await;
    oracle.store.delete(&lost.to_string()).await.unwrap();
    for target in [Target::Latest, Target::Txid(lost.0.first_txid), Target::Txid(oracle.position().txid)] {
        let error = restore(&oracle.store, target, None).await.unwrap_err();
        let is_gap = matches!(error, RestoreError::Gap { first_missing, .. } if first_missing == lost.0.first_txid);
        assert!(is_gap, "{target:?}: {error}");
    }
}

/// Makes an object other than it was.
async fn damage(store: &SharedStore, key: &str, how: usize, numbers: &mut Numbers) {
    let good = store.get(key, u64::MAX).await.unwrap();
    let mut bytes = good.to_vec();
    match how {
        0 => return store.delete(key).await.unwrap(),
        1 => bytes.truncate(numbers.below(good.len() as u64) as usize),
        2 => bytes.clear(),
        3 => bytes.extend_from_slice(&good),
        4 => {
            // What is under another key of the same kind.
            let kind = key.split_inclusive('/').next().unwrap();
            let all = store.list(kind, None).await.unwrap();
            let other = &all[numbers.below(all.len() as u64) as usize];
            bytes = store.get(&other.key, u64::MAX).await.unwrap().to_vec();
        }
        _ => {
            let bit = numbers.below(good.len() as u64 * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
    store.put(key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
}

/// Whatever is done to whichever object: an error, or exactly the bytes of the state that the plan names.
async fn damage_everything(oracle: &Oracle, ways: usize) -> (usize, usize) {
    let mut numbers = Numbers::new(99);
    let newest = oracle.position();
    let (mut refused, mut right) = (0, 0);
    for object in oracle.store.list("", None).await.unwrap() {
        let good = oracle.store.get(&object.key, u64::MAX).await.unwrap();
        for how in 0..ways {
            damage(&oracle.store, &object.key, how, &mut numbers).await;
            let some_txid = 1 + numbers.below(newest.txid);
            let some_epoch = 1 + numbers.below(newest.epoch.into()) as u32;
            for (target, epoch) in [(Target::Latest, None), (Target::Txid(some_txid), Some(some_epoch))] {
                let Ok((plan, bytes)) = restore(&oracle.store, target, epoch).await else {
                    refused += 1;
                    continue;
                };
                right += 1;
                assert!(target == Target::Latest || target == Target::Txid(plan.position.txid));
                assert!(
                    bytes == oracle.states[&plan.position].bytes(),
                    "{}, damage {how}: wrong bytes for {}",
                    object.key,
                    plan.position
                );
            }
            oracle.store.put(&object.key, good.clone(), PutMode::Overwrite).await.unwrap();
        }
    }
    (refused, right)
}

#[tokio::test]
async fn damage_never_gives_wrong_bytes() {
    let oracle = all_kinds(512, 11).await;
    let (refused, right) = damage_everything(&oracle, 25).await;
    assert!(refused > 100 && right > 100, "{refused} refused, {right} right");
}

/// The object that is wrong is named, so that a person can act.
#[tokio::test]
async fn an_object_under_anothers_name_is_named() {
    let mut oracle = Oracle::new(512, 23).await;
    oracle.begin_with_snapshot(None, 0).await;
    let first = oracle.commit_and_cut(2).await.to_string();
    let second = oracle.commit_and_cut(2).await.to_string();
    oracle.commit_and_cut(2).await;
    let bytes = oracle.store.get(&first, u64::MAX).await.unwrap();
    oracle.store.put(&second, bytes, PutMode::Overwrite).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if *object == second), "{error}");
    oracle.store.delete(&second).await.unwrap();
    let error = restore(&oracle.store, Target::Txid(4), None).await.unwrap_err();
    assert!(matches!(error, RestoreError::Gap { first_missing: 4, last_missing: 5, newest: Some(3), .. }), "{error}");
}

/// Segments so large that they are read block by block.
async fn large(seed: u64) -> Oracle {
    let mut oracle = Oracle::new(4096, seed).await;
    (oracle.is_noise, oracle.most_pages, oracle.size_limit) = (true, 400, 3000);
    oracle.begin_with_snapshot(None, 3).await;
    oracle.commit_and_cut(2).await;
    oracle.commit_and_cut(12).await;
    oracle.commit_and_cut(8).await;
    oracle
}

#[tokio::test]
async fn large_segments() {
    let oracle = large(12).await;
    let segments = oracle.store.list("log/", None).await.unwrap();
    assert!(segments.iter().any(|segment| segment.len_bytes > 6 << 20), "{segments:?}");
    for txid in 4..=oracle.position().txid {
        let (plan, bytes) = restore(&oracle.store, Target::Txid(txid), None).await.unwrap();
        assert!(bytes == oracle.states[&plan.position].bytes(), "{txid}");
    }
    let (refused, right) = damage_everything(&oracle, 12).await;
    assert!(refused > 10 && right > 10, "{refused} refused, {right} right");
}

#[tokio::test]
async fn what_is_not_a_replica() {
    let oracle = all_kinds(512, 13).await;
    let newer = Bytes::from_static(br#"{"format":2,"replica":{"id":7}}"#);
    oracle.store.put(MARKER_KEY, newer, PutMode::Overwrite).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err().to_string();
    assert!(error.contains("format version 2"), "{error}");
    // A replica that lost its marker is damaged; only a place where nothing is has no backup.
    oracle.store.delete(MARKER_KEY).await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(error, RestoreError::Damaged { .. }), "{error}");
    let nothing: SharedStore = Arc::new(MemoryStore::new());
    let error = restore(&nothing, Target::Latest, None).await.unwrap_err();
    assert!(matches!(error, RestoreError::NoReplica { .. }), "{error}");
    let mut empty = Oracle::new(512, 14).await;
    empty.begin(None, false).await;
    empty.commit_and_cut(2).await;
    for target in [Target::Latest, Target::Txid(1), Target::Time(u64::MAX)] {
        let error = restore(&empty.store, target, None).await.unwrap_err();
        assert!(matches!(error, RestoreError::NothingYet { .. }), "{error}");
    }
    let error = restore(&empty.store, Target::Latest, Some(2)).await.unwrap_err();
    assert!(matches!(error, RestoreError::NoSuchEpoch { epoch: 2, .. }), "{error}");
}

#[tokio::test]
async fn a_record_that_contradicts_its_parent() {
    let mut oracle = Oracle::new(512, 22).await;
    oracle.begin_with_snapshot(None, 0).await;
    oracle.commit_and_cut(5).await;
    oracle.begin(Some(oracle.position()), true).await;
    oracle.commit_and_cut(2).await;
    let mut record = oracle.records[&2].clone();
    // The second epoch began with transaction 7, on top of 6.
    for (txid, is_possible) in [(5, false), (6, true), (7, true)] {
        (record.epoch, record.parent, record.first_txid) = (3, Some(Position { epoch: 2, txid }), txid + 1);
        oracle.store.put("epochs/00000003", Bytes::from(record.encode()), PutMode::Overwrite).await.unwrap();
        match restore(&oracle.store, Target::Latest, None).await {
            Ok((plan, bytes)) => {
                assert!(is_possible && plan.position.txid == txid);
                assert!(bytes == oracle.states[&plan.position].bytes());
            }
            Err(RestoreError::Damaged { object, .. }) => assert!(!is_possible && object == "epochs/00000003"),
            Err(error) => panic!("{txid}: {error}"),
        }
    }
    oracle.store.delete("epochs/00000002").await.unwrap();
    let error = restore(&oracle.store, Target::Latest, None).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if object == "epochs/00000002"), "{error}");
}

#[tokio::test]
async fn strangers_are_listed_and_harm_nothing() {
    let oracle = all_kinds(512, 15).await;
    for key in [
        "log/zz",
        "log/00000001/1-2-3",
        "log/000000ff/0000000000000001-0000000000000002-000000000003",
        "snap/x",
        "epochs/1",
    ] {
        oracle.store.put(key, Bytes::from_static(b"?"), PutMode::IfAbsent).await.unwrap();
    }
    let history = History::load(&oracle.store).await.unwrap();
    assert_eq!(history.strangers.len(), 5, "{:?}", history.strangers);
    let (plan, bytes) = restore(&oracle.store, Target::Latest, None).await.unwrap();
    assert!(bytes == oracle.states[&plan.position].bytes());
}

/// Every checksum of an object can be right and its pages wrong all the same, if its writer was.
#[tokio::test]
async fn only_the_fingerprint_tells() {
    let mut oracle = Oracle::new(512, 21).await;
    oracle.begin_with_snapshot(None, 0).await;
    let key = oracle.commit_and_cut(3).await.to_string();
    let good = oracle.store.get(&key, u64::MAX).await.unwrap();
    let mut pages = Vec::new();
    let Segment { footer, transactions } = Segment::decode(&good, |_, _, page| pages.push(page.to_vec())).unwrap();
    // The last image of a transaction is the one that a restore to it takes.
    pages.last_mut().unwrap()[100] ^= 1;
    let mut writer = SegmentWriter::new(Vec::new(), 512).unwrap();
    let mut images = pages.iter();
    for transaction in &transactions {
        writer.begin_transaction(&transaction.info, &transaction.page_numbers).unwrap();
        images.by_ref().take(transaction.page_numbers.len()).for_each(|page| writer.push_page(page).unwrap());
    }
    let (bytes, written) = writer.finish(footer.span.epoch, footer.span.first_txid).unwrap();
    assert_eq!(written.to_string(), key);
    oracle.store.put(&key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let error = restore_to(&oracle, &directory.path().join("app.db"), false).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::FingerprintMismatch { position, .. } if position == oracle.position()),
        "{error}"
    );
    assert!(names(directory.path()).is_empty());
    let before = Target::Txid(oracle.position().txid - 1);
    let (plan, bytes) = restore(&oracle.store, before, None).await.unwrap();
    assert!(bytes == oracle.states[&plan.position].bytes());
}

/// Restores a newest state over `target`, as the command does.
async fn restore_to(oracle: &Oracle, target: &Path, force: bool) -> Result<Vec<String>, RestoreError> {
    let incoming = Incoming::create(target, force)?;
    let history = History::load(&oracle.store).await?;
    let plan = plan(&oracle.store, &history, Target::Latest, None).await?;
    execute(&oracle.store, &plan, incoming.handle()?, incoming.path()).await?;
    incoming.install(force)
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn a_target_is_made_and_replaced_only_when_told() {
    let oracle = all_kinds(512, 16).await;
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    let newest = oracle.states[&oracle.position()].bytes();
    restore_to(&oracle, &target, false).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == newest);
    // As SQLite would make it: what the umask leaves of 0644.
    let made = directory.path().join("made");
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&made).unwrap();
    assert_eq!(mode(&target), mode(&made));
    std::fs::remove_file(made).unwrap();
    std::fs::write(&target, "mine").unwrap();
    let error = restore_to(&oracle, &target, false).await.unwrap_err();
    assert!(matches!(error, RestoreError::TargetExists(_)), "{error}");
    assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o640)).unwrap();
    restore_to(&oracle, &target, true).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == newest);
    assert_eq!(mode(&target), 0o640);
    assert_eq!(names(directory.path()), ["app.db"]);
    // Through a link, the file behind it is replaced.
    let link = directory.path().join("link.db");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    std::fs::write(&target, "mine").unwrap();
    restore_to(&oracle, &link, true).await.unwrap();
    assert!(std::fs::read(&target).unwrap() == newest);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
}

/// A read lock on one byte of a file, held by a description of its own: it counts against this process, too.
fn hold_lock(path: &Path, byte: i64) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: a plain structure of integers, for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence) = (libc::F_RDLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    (lock.l_start, lock.l_len) = (byte, 1);
    // SAFETY: the descriptor is open, and `lock` outlives the call.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, 0);
    file
}

#[tokio::test]
async fn a_target_in_use_is_left_alone() {
    let oracle = all_kinds(512, 17).await;
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    drop(create_database(&target, 10, ""));
    let before = std::fs::read(&target).unwrap();
    // Pending, reserved, the first and the last of the bytes that readers lock.
    for byte in [0x4000_0000, 0x4000_0001, 0x4000_0002, 0x4000_01ff] {
        let held = hold_lock(&target, byte);
        let error = restore_to(&oracle, &target, true).await.unwrap_err();
        assert!(matches!(error, RestoreError::TargetInUse(_)), "{error}");
        drop(held);
    }
    // Taken into use while the restore was under way.
    let incoming = Incoming::create(&target, true).unwrap();
    let held = hold_lock(&target, 0x4000_0002);
    let error = incoming.install(true).unwrap_err();
    assert!(matches!(error, RestoreError::TargetInUse(_)), "{error}");
    drop(held);
    assert!(std::fs::read(&target).unwrap() == before);
    assert_eq!(names(directory.path()), ["app.db"]);
    restore_to(&oracle, &target, true).await.unwrap();
    assert_eq!(names(directory.path()), ["app.db"]);
}

/// A real process that has the database open, and is idle.
#[tokio::test]
async fn a_database_that_is_replicated_is_in_use() {
    let oracle = all_kinds(512, 18).await;
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    drop(create_database(&target, 10, ""));
    let replica = format!("file://{}", directory.path().join("replica").display());
    let daemon = Daemon::start(&[target.to_str().unwrap(), &replica], &directory.path().join("log"));
    wait_for_restored(&replica, directory.path(), "SELECT count(*) FROM item", 10);
    let error = restore_to(&oracle, &target, true).await.unwrap_err();
    assert!(matches!(error, RestoreError::TargetInUse(_)), "{error}");
    drop(daemon);
    assert_eq!(number(&open(&target), "SELECT count(*) FROM item"), 10);
}

#[tokio::test]
async fn nothing_is_left_of_a_failed_restore() {
    let oracle = all_kinds(512, 19).await;
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    let snapshot = oracle.store.list("snap/", None).await.unwrap().pop().unwrap();
    let mut bytes = oracle.store.get(&snapshot.key, u64::MAX).await.unwrap().to_vec();
    bytes[40] ^= 1;
    oracle.store.put(&snapshot.key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
    let error = restore_to(&oracle, &target, false).await.unwrap_err();
    assert!(matches!(&error, RestoreError::Damaged { object, .. } if *object == snapshot.key), "{error}");
    assert!(names(directory.path()).is_empty());
    drop(create_database(&target, 10, ""));
    restore_to(&oracle, &target, true).await.unwrap_err();
    assert_eq!(names(directory.path()), ["app.db"]);
    assert_eq!(number(&open(&target), "SELECT count(*) FROM item"), 10);
}

/// The files of a database whose application was killed: `rows` rows, the last one of them in the WAL alone.
fn crashed(directory: &Path, rows: i64) -> PathBuf {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("app.db");
    let connection = create_database(&path, rows - 1, "");
    connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    insert(&connection, 1);
    for name in ["app.db", "app.db-wal", "app.db-shm"] {
        std::fs::copy(scratch.path().join(name), directory.join(name)).unwrap();
    }
    directory.join("app.db")
}

#[tokio::test]
async fn what_the_old_database_holds_in_its_wal_outlives_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let target = crashed(directory.path(), 20);
    // The journal can't be removed, so the restore fails after the old database was settled.
    std::fs::create_dir_all(directory.path().join("app.db-journal/in-the-way")).unwrap();
    Incoming::create(&target, true).unwrap().install(true).unwrap_err();
    std::fs::remove_dir_all(directory.path().join("app.db-journal")).unwrap();
    assert_eq!(number(&open(&target), "SELECT count(*) FROM item"), 20);
    assert!(!names(directory.path()).iter().any(|name| name.contains("restore")), "{:?}", names(directory.path()));
}

#[tokio::test]
async fn what_the_old_database_holds_in_its_journal_outlives_a_failure() {
    let (scratch, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = scratch.path().join("app.db");
    let connection = create_database(&path, 200, "");
    connection
        .execute_batch("PRAGMA journal_mode=DELETE; PRAGMA cache_size=1; BEGIN; UPDATE item SET body = 'lost'")
        .unwrap();
    for name in ["app.db", "app.db-journal"] {
        std::fs::copy(scratch.path().join(name), directory.path().join(name)).unwrap();
    }
    std::fs::create_dir_all(directory.path().join("app.db-shm/in-the-way")).unwrap();
    let target = directory.path().join("app.db");
    Incoming::create(&target, true).unwrap().install(true).unwrap_err();
    std::fs::remove_dir_all(directory.path().join("app.db-shm")).unwrap();
    // No journal any more: what it held is in the main file.
    assert_eq!(names(directory.path()), ["app.db"]);
    assert_eq!(number(&open(&target), "SELECT count(*) FROM item WHERE body <> 'lost'"), 200);
}

#[tokio::test]
async fn a_wal_that_can_not_be_settled_is_kept() {
    let oracle = all_kinds(512, 20).await;
    let directory = tempfile::tempdir().unwrap();
    for kept in ["app.db-wal.before-restore", "app.db-wal.before-restore-1"] {
        let target = crashed(directory.path(), 20);
        std::fs::write(&target, "").unwrap();
        let wal = std::fs::read(directory.path().join("app.db-wal")).unwrap();
        let notes = restore_to(&oracle, &target, true).await.unwrap();
        assert!(notes.iter().any(|note| note.ends_with(kept)), "{notes:?}");
        assert!(std::fs::read(directory.path().join(kept)).unwrap() == wal);
        assert!(std::fs::read(&target).unwrap() == oracle.states[&oracle.position()].bytes());
    }
    // The main file was deleted, its WAL was not.
    let target = crashed(directory.path(), 20);
    std::fs::remove_file(&target).unwrap();
    restore_to(&oracle, &target, false).await.unwrap();
    let expected =
        ["app.db", "app.db-wal.before-restore", "app.db-wal.before-restore-1", "app.db-wal.before-restore-2"];
    assert_eq!(names(directory.path()), expected);
    // One that can be is not kept, and leaves nothing.
    let target = crashed(directory.path(), 20);
    assert_eq!(restore_to(&oracle, &target, true).await.unwrap(), Vec::<String>::new());
    assert_eq!(names(directory.path()), expected);
}
