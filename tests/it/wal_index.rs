//! A wal-index that SQLite recovers while the database is replicated: what a writer that dies while
//! it publishes a commit leaves behind.

use std::process::Command;

use waltrail::format::Position;

use crate::support::application::Application;
use crate::support::machine::Machine;

const INSERT: &str = "INSERT INTO item(body, n) VALUES(randomblob(2000), random())";

/// Makes the two copies of the wal-index's header differ, so that the next reader recovers it
/// (`walIndexRecover`). Another process writes, because to close the file here would drop SQLite's
/// locks.
fn tear_wal_index(machine: &Machine) {
    let target = format!("of={}-shm", machine.database().display());
    let mut command = Command::new("dd");
    command.args(["if=/dev/zero", "bs=1", "seek=8", "count=8", "conv=notrunc", "status=none"]).arg(target);
    assert!(command.status().unwrap().success());
}

#[test]
fn recovered_wal_index_keeps_the_epoch() {
    let mut machine = Machine::new("PRAGMA page_size=1024", |store| store);
    let wal = format!("{}-wal", machine.database().display());
    let salts = || std::fs::read(&wal).unwrap().get(16..24).map(<[u8]>::to_vec);
    // As long as another process has the database open the WAL is not emptied. After that its salts
    // are new ones, which prove nothing.
    let mut other = Application::open(&machine.database());
    other.run("SELECT count(*) FROM item");
    machine.start();
    machine.commit(INSERT);
    let before = machine.sync();
    for _ in 0..2 {
        // All of the WAL is in the main file, and the pin is at mark 0: the next commit restarts
        // the WAL.
        machine.application().query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).unwrap();
        machine.turns(2);
    }
    let generation = salts();
    machine.commit(INSERT);
    machine.commit(INSERT);
    assert_ne!(salts(), generation, "the WAL was restarted");
    tear_wal_index(&machine);
    machine.commit(INSERT);
    machine.turns(1);
    tear_wal_index(&machine);
    machine.commit(INSERT);
    let after = machine.sync();
    assert_eq!(after, Position { txid: before.txid + 4, ..before }, "each commit has its number in the same epoch");
    machine.states.keys().for_each(|&position| machine.check(position));
    assert_eq!(machine.states.len(), 5);
}
