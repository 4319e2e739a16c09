//! What a restore does to the place it restores to: nothing before the database is whole, and nothing that was there is lost.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use waltrail::restore::RestoreError;
use waltrail::restore::execute::execute;
use waltrail::restore::history::History;
use waltrail::restore::install::{Incoming, Manner, partial_path};
use waltrail::restore::plan::{Target, plan};
use waltrail::store::PutMode;

use crate::support::oracle::{Oracle, all_kinds};
use crate::support::{Daemon, create_database, decoded, encoded, insert, number, open, wait_for_restored};

/// Restores a newest state over `target`, as the command does.
async fn restore_to(oracle: &Oracle, target: &Path, force: bool) -> Result<Vec<String>, RestoreError> {
    restore_in(oracle, target, Manner { forces: force, ..Manner::default() }).await
}

async fn restore_in(oracle: &Oracle, target: &Path, manner: Manner) -> Result<Vec<String>, RestoreError> {
    let incoming = Incoming::create(target, manner)?;
    let history = History::load(&oracle.store).await?;
    let plan = plan(&oracle.store, &history, Target::Latest, None).await?;
    execute(&oracle.store, &plan, incoming.handle()?, incoming.path()).await?;
    incoming.install()
}

const FORCED: Manner = Manner { forces: true, keeps_old: false, resumes: false };

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

/// As where a container's link to a volume outlived what was on the volume. SQLite would make the file behind the link, too.
#[tokio::test]
async fn behind_links_that_lead_to_nothing_the_file_is_made() {
    let oracle = all_kinds(512, 24).await;
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    let (link, further) = (directory.path().join("link.db"), directory.path().join("further.db"));
    // One link is relative to the directory it is in, the other one is not.
    std::os::unix::fs::symlink("volume/app.db", &link).unwrap();
    std::os::unix::fs::symlink(&link, &further).unwrap();
    let resuming = Manner { resumes: true, ..Manner::default() };
    for manner in [Manner::default(), FORCED, resuming] {
        restore_in(&oracle, &further, manner).await.unwrap();
        assert_eq!(names(&volume), ["app.db"], "{manner:?}");
        assert!(std::fs::read(volume.join("app.db")).unwrap() == oracle.states[&oracle.position()].bytes());
        assert!([&link, &further].iter().all(|link| std::fs::symlink_metadata(link).unwrap().is_symlink()));
        assert_eq!(names(directory.path()), ["further.db", "link.db", "volume"]);
        std::fs::remove_file(volume.join("app.db")).unwrap();
    }
    // What a restore that was cut off leaves is beside the file, where the next one looks for it.
    drop(Incoming::create(&further, resuming).unwrap());
    assert_eq!(names(&volume), [".app.db.waltrail-restore-partial"]);
    assert!(partial_path(&further).exists());
    std::fs::remove_file(&further).unwrap();
    std::os::unix::fs::symlink(&further, &further).unwrap();
    let error = restore_in(&oracle, &further, FORCED).await.unwrap_err();
    assert!(matches!(error, RestoreError::Io { .. }), "a link to itself: {error}");
}

/// A read lock on one byte of a file, held by a description of its own: it counts against this process, too.
struct HeldLock {
    file: File,
    byte: i64,
}

impl HeldLock {
    fn new(path: &Path, byte: i64) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let held = Self { file, byte };
        held.set(libc::F_RDLCK);
        held
    }

    fn set(&self, kind: libc::c_int) {
        // SAFETY: a plain structure of integers, for which all zeros is a value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
        (lock.l_start, lock.l_len) = (self.byte, 1);
        // SAFETY: the descriptor is open, and `lock` outlives the call.
        assert_eq!(unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, 0);
    }
}

impl Drop for HeldLock {
    /// Closing is not enough: a child that another test starts at this moment has the description, too, until it executes.
    fn drop(&mut self) {
        self.set(libc::F_UNLCK);
    }
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
        let held = HeldLock::new(&target, byte);
        let error = restore_to(&oracle, &target, true).await.unwrap_err();
        assert!(matches!(error, RestoreError::TargetInUse(_)), "{error}");
        drop(held);
    }
    // Taken into use while the restore was under way.
    let incoming = Incoming::create(&target, FORCED).unwrap();
    let held = HeldLock::new(&target, 0x4000_0002);
    let error = incoming.install().unwrap_err();
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
    Incoming::create(&target, FORCED).unwrap().install().unwrap_err();
    std::fs::remove_dir_all(directory.path().join("app.db-journal")).unwrap();
    assert_eq!(number(&open(&target), "SELECT count(*) FROM item"), 20);
    assert!(!names(directory.path()).iter().any(|name| name.contains("restore")), "{:?}", names(directory.path()));
}

/// The files of a database of 200 rows whose application was killed in a transaction that changed all of them, without a WAL.
fn crashed_with_journal(directory: &Path) -> PathBuf {
    let scratch = tempfile::tempdir().unwrap();
    let connection = create_database(&scratch.path().join("app.db"), 200, "");
    connection
        .execute_batch("PRAGMA journal_mode=DELETE; PRAGMA cache_size=1; BEGIN; UPDATE item SET body = 'lost'")
        .unwrap();
    for name in ["app.db", "app.db-journal"] {
        std::fs::copy(scratch.path().join(name), directory.join(name)).unwrap();
    }
    directory.join("app.db")
}

#[tokio::test]
async fn what_the_old_database_holds_in_its_journal_outlives_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let target = crashed_with_journal(directory.path());
    std::fs::create_dir_all(directory.path().join("app.db-shm/in-the-way")).unwrap();
    Incoming::create(&target, FORCED).unwrap().install().unwrap_err();
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

#[tokio::test]
async fn a_journal_that_can_not_be_settled_is_kept() {
    let oracle = all_kinds(512, 25).await;
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("app.db-journal");
    // The main file holds nothing, and the restore fails: the journal is where it was.
    let target = crashed_with_journal(directory.path());
    std::fs::write(&target, "").unwrap();
    let before = std::fs::read(&journal).unwrap();
    std::fs::create_dir_all(directory.path().join("app.db-shm/in-the-way")).unwrap();
    Incoming::create(&target, FORCED).unwrap().install().unwrap_err();
    std::fs::remove_dir_all(directory.path().join("app.db-shm")).unwrap();
    assert_eq!(names(directory.path()), ["app.db", "app.db-journal"]);
    assert!(std::fs::read(&journal).unwrap() == before);
    // It succeeds.
    let notes = restore_to(&oracle, &target, true).await.unwrap();
    let kept = directory.path().join("app.db-journal.before-restore");
    let is_told = |note: &String| note.contains("journal") && note.ends_with("app.db-journal.before-restore");
    assert!(notes.iter().any(is_told), "{notes:?}");
    assert!(std::fs::read(&kept).unwrap() == before);
    // The main file was deleted, its journal was not.
    std::fs::remove_file(crashed_with_journal(directory.path())).unwrap();
    restore_to(&oracle, &target, false).await.unwrap();
    assert_eq!(names(directory.path()), ["app.db", "app.db-journal.before-restore", "app.db-journal.before-restore-1"]);
    assert!(std::fs::read(&target).unwrap() == oracle.states[&oracle.position()].bytes(), "nothing is rolled back");
    // One that can be settled is not kept, and leaves nothing.
    crashed_with_journal(directory.path());
    assert_eq!(restore_to(&oracle, &target, true).await.unwrap(), Vec::<String>::new());
    assert_eq!(names(directory.path()).len(), 3);
}

/// Another process makes the database in the moment before the file gets its name: nothing of that is taken away.
#[tokio::test]
async fn a_database_that_is_made_meanwhile_keeps_what_is_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    let incoming = Incoming::create(&target, Manner::default()).unwrap();
    // It is not seen before the name is taken: a link that leads to nothing is like that.
    std::os::unix::fs::symlink(directory.path().join("nowhere"), &target).unwrap();
    let beside = ["app.db-wal", "app.db-shm", "app.db-journal"];
    for name in beside {
        std::fs::write(directory.path().join(name), format!("the content of {name}")).unwrap();
    }
    let error = incoming.install().unwrap_err();
    assert!(matches!(error, RestoreError::TargetExists(_)), "{error}");
    for name in beside {
        assert_eq!(std::fs::read_to_string(directory.path().join(name)).unwrap(), format!("the content of {name}"));
    }
    assert_eq!(names(directory.path()), ["app.db", "app.db-journal", "app.db-shm", "app.db-wal"]);
}

/// Every checksum of an object can be right and its pages wrong all the same, if its writer was.
#[tokio::test]
async fn only_the_fingerprint_tells() {
    let mut oracle = Oracle::new(512, 21).await;
    oracle.begin_with_snapshot(None, 0).await;
    let key = oracle.commit_and_cut(3).await.to_string();
    let good = oracle.store.get(&key, u64::MAX).await.unwrap();
    let (segment, mut contents) = decoded(&good);
    // The last byte of what the last transaction made of a page is still there at the end.
    *contents.iter_mut().rev().find_map(|content| content.last_mut()).unwrap() ^= 1;
    let (bytes, written) = encoded(&segment.footer, &segment.transactions, &contents);
    assert_eq!(written.to_string(), key);
    oracle.store.put(&key, Bytes::from(bytes), PutMode::Overwrite).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let error = restore_to(&oracle, &directory.path().join("app.db"), false).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::FingerprintMismatch { position, .. } if position == oracle.position()),
        "{error}"
    );
    assert!(names(directory.path()).is_empty());
}

/// Who may write to the directory could put something there that leads root, who restores for him, to another one's file.
#[tokio::test]
async fn names_that_lead_elsewhere_are_not_followed() {
    let oracle = all_kinds(512, 16).await;
    let directory = tempfile::tempdir().unwrap();
    let newest = oracle.states[&oracle.position()].bytes();
    let (target, elsewhere) = (directory.path().join("app.db"), directory.path().join("elsewhere"));
    std::fs::write(&elsewhere, "another one's").unwrap();
    let resumed = Manner { resumes: true, ..Manner::default() };
    let second_name = |from: &Path, to: &Path| std::fs::hard_link(from, to);
    let link = |from: &Path, to: &Path| std::os::unix::fs::symlink(from, to);
    for lead in [&link as &dyn Fn(&Path, &Path) -> std::io::Result<()>, &second_name] {
        lead(&elsewhere, &partial_path(&target)).unwrap();
        restore_in(&oracle, &target, resumed).await.unwrap();
        assert!(std::fs::read(&target).unwrap() == newest);
        assert!(std::fs::symlink_metadata(&target).unwrap().is_file());
        assert_eq!(std::fs::read(&elsewhere).unwrap(), b"another one's");
        std::fs::remove_file(&target).unwrap();
    }
    // Neither is the name that an old database is kept under.
    std::fs::write(&target, "mine").unwrap();
    link(&directory.path().join("nothing"), &directory.path().join("app.db.before-restore")).unwrap();
    restore_in(&oracle, &target, Manner { forces: true, keeps_old: true, resumes: false }).await.unwrap();
    assert_eq!(std::fs::read(directory.path().join("app.db.before-restore-1")).unwrap(), b"mine");
    assert!(!directory.path().join("nothing").exists());
}

/// With two names a database would have two WALs.
#[tokio::test]
async fn a_replacement_that_fails_leaves_one_name() {
    let oracle = all_kinds(512, 16).await;
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("app.db");
    std::fs::write(&target, "mine").unwrap();
    std::fs::create_dir(directory.path().join("app.db-shm")).unwrap();
    let manner = Manner { forces: true, keeps_old: true, resumes: false };
    restore_in(&oracle, &target, manner).await.unwrap_err();
    assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    assert_eq!(names(directory.path()), ["app.db", "app.db-shm"]);
}
