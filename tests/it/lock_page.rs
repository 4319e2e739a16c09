//! Databases that grow past 1 GiB while they are followed: the page at that byte is SQLite's place for locks, never written and
//! never stored. `cargo test` takes one page size; `WALTRAIL_LOCK_PAGE=all` takes all, and `WALTRAIL_LOCK_PAGE=512` another one.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rusqlite::Connection;
use waltrail::format::lock_page;

use crate::support::scene::Scene;
use crate::support::{number, open, run, stderr, wait_for};

const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536];
/// Two databases of a bit more than 1 GiB.
const ROOM_BYTES: u64 = 3 << 30;

/// In memory, where there is room for it.
fn scene() -> Scene {
    let free = |path: &Path| {
        let done = std::process::Command::new("df").args(["-B1", "--output=avail"]).arg(path).output();
        let text = done.map(|done| String::from_utf8_lossy(&done.stdout).into_owned()).unwrap_or_default();
        text.lines().last().and_then(|line| line.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let memory = Path::new("/dev/shm");
    match free(memory) > ROOM_BYTES {
        true => Scene::at(tempfile::tempdir_in(memory).unwrap()),
        false => Scene::new(),
    }
}

/// A database that ends a few pages before 1 GiB.
fn fill(path: &Path, page_size: u32) -> Connection {
    let application = open(path);
    let room_bytes = u64::from(lock_page(page_size) - 40) * u64::from(page_size - 4);
    let setup = format!(
        "PRAGMA page_size={page_size}; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; CREATE TABLE item(id INTEGER PRIMARY KEY, body BLOB);
         INSERT INTO item(body) VALUES(zeroblob({half})), (zeroblob({half}))",
        half = room_bytes / 2
    );
    application.execute_batch(&setup).unwrap();
    while number(&application, "PRAGMA page_count") < i64::from(lock_page(page_size)) - 4 {
        application.execute("INSERT INTO item(body) VALUES(randomblob(?1))", [page_size]).unwrap();
    }
    application.execute_batch("PRAGMA journal_mode=WAL").unwrap();
    application
}

fn check_same(left: &Path, right: &Path, what: &str) {
    let (mut left, mut right) = (File::open(left).unwrap(), File::open(right).unwrap());
    assert_eq!(left.metadata().unwrap().len(), right.metadata().unwrap().len(), "{what}");
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for chunk in 0.. {
        let len = left.read(&mut one).unwrap();
        if len == 0 {
            return;
        }
        right.read_exact(&mut other[..len]).unwrap();
        assert!(one[..len] == other[..len], "{what}: the {chunk}th MiB is another one");
    }
}

fn play(page_size: u32) {
    let scene = scene();
    let application = fill(&scene.database(), page_size);
    let database = scene.database().display().to_string();
    let daemon = scene.start();
    let sync = || wait_for("a sync", || run(["sync", &database, "--timeout", "60s"]).status.success().then_some(()));
    sync();
    let lock_page = i64::from(lock_page(page_size));
    let pages = || number(&application, "PRAGMA page_count");
    assert!(pages() < lock_page, "{page_size}: {} pages already", pages());
    // Transactions before the lock page, over it, and behind it.
    while pages() < lock_page + 20 {
        application.execute("INSERT INTO item(body) VALUES(randomblob(?1))", [2 * page_size]).unwrap();
    }
    sync();
    assert!(run(["snapshot", &database, "--timeout", "60s"]).status.success(), "{}", scene.log());
    application.execute_batch("UPDATE item SET body = randomblob(50) WHERE id % 2 AND length(body) < 1000000").unwrap();
    assert_eq!(daemon.terminate(), Some(0), "{}", scene.log());
    application.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(application);
    check_same(&scene.restored(&scene.replica(), &[]), &scene.database(), &format!("pages of {page_size} bytes"));
    let verified = run(["verify", &scene.replica(), "--depth", "data"]);
    assert_eq!(verified.status.code(), Some(0), "{}", stderr(&verified));
}

#[test]
fn over_the_lock_page() {
    match std::env::var("WALTRAIL_LOCK_PAGE") {
        Err(_) => play(65_536),
        Ok(all) if all == "all" => PAGE_SIZES.into_iter().for_each(play),
        Ok(one) => play(one.parse().unwrap()),
    }
}
