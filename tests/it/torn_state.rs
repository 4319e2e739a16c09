//! Local state that is lost, torn, damaged or old: it is disposable, and never believed when it is wrong. The daemon is killed with
//! segments in its spool that storage has not taken, one file of its state directory is damaged, and the next start must end with every
//! confirmed state restorable as it was, and the newest one equal to the database.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use waltrail::format::Position;

use crate::support::syscalls::{CHANGES, Call, Verdict};
use crate::support::{Daemon, run, wait_for};

use super::crash_points::{Play, Replica};

/// So many kills may meet one moment by accident.
const UNLUCKY_KILLS: usize = 3;
/// They mostly wait.
const AT_A_TIME: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    /// Then what waited in the spool is shipped, too.
    None,
    Deleted,
    CutInHalf,
    Zeroed,
    /// One bit, so many eighths into the file.
    BitFlipped(u64),
    /// What stood there at an earlier confirmed state.
    Older,
}

const DAMAGES: [Damage; 6] =
    [Damage::Deleted, Damage::CutInHalf, Damage::Zeroed, Damage::BitFlipped(3), Damage::BitFlipped(5), Damage::Older];

/// What is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    State,
    Ledger,
    /// State and ledger together.
    Both,
    FirstWaiting,
    LastWaiting,
    AllWaiting,
    AllKept,
    /// The whole directory.
    Everything,
}

const VICTIMS: [Victim; 8] = [
    Victim::State,
    Victim::Ledger,
    Victim::Both,
    Victim::FirstWaiting,
    Victim::LastWaiting,
    Victim::AllWaiting,
    Victim::AllKept,
    Victim::Everything,
];

fn segments_in(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.is_file() && !path.ends_with("open")).collect();
    files.sort();
    files
}

impl Victim {
    fn files(self, directory: &Path) -> Vec<PathBuf> {
        let (state, ledger) = (directory.join("state"), directory.join("ledger"));
        let (waiting, kept) = (segments_in(&directory.join("spool")), segments_in(&directory.join("spool/kept")));
        match self {
            Self::State => vec![state],
            Self::Ledger => vec![ledger],
            Self::Both => vec![state, ledger],
            Self::FirstWaiting => vec![waiting[0].clone()],
            Self::LastWaiting => vec![waiting[waiting.len() - 1].clone()],
            Self::AllWaiting => waiting,
            Self::AllKept => kept,
            Self::Everything => [vec![state, ledger], waiting, kept].concat(),
        }
    }
}

impl Damage {
    fn inflict(self, file: &Path, older: &Path) {
        let bytes = std::fs::read(file).unwrap();
        let len = bytes.len();
        let damaged = match self {
            Self::None => return,
            Self::Deleted => return std::fs::remove_file(file).unwrap(),
            Self::CutInHalf => bytes[..len / 2].to_vec(),
            Self::Zeroed => vec![0; len],
            Self::BitFlipped(eighths) => {
                let mut flipped = bytes;
                flipped[len * eighths as usize / 8] ^= 1 << (eighths % 8);
                flipped
            }
            Self::Older => match std::fs::read(older) {
                Ok(older) => older,
                Err(_) => return std::fs::remove_file(file).unwrap(),
            },
        };
        std::fs::write(file, damaged).unwrap();
    }
}

/// What the second start found.
fn play(victim: Victim, damage: Damage, writes_on: bool) -> &'static str {
    let case = format!("{victim:?} {damage:?}, written to meanwhile: {writes_on}");
    let mut play = Play::new(Replica::Directory);
    // Pages that only the ledger's file knows at the next start, and that change after it.
    let fill = "CREATE TABLE old AS
        WITH RECURSIVE c(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM c WHERE value < 300)
        SELECT value, printf('%.400c', 'x') AS body FROM c";
    play.change(fill);
    let log = play.scene.path("daemon.log");
    let arguments = play.arguments();
    let arguments = [arguments[0].as_str(), arguments[1].as_str()];
    let is_away = Arc::new(AtomicBool::new(false));
    let (switch, replica) = (is_away.clone(), play.scene.path("replica"));
    let mut daemon = Daemon::start_under(&arguments, &log, CHANGES, move |call: &Call| {
        let fails = switch.load(Ordering::SeqCst) && call.paths().iter().any(|path| path.starts_with(&replica));
        if fails { Verdict::Fails(libc::EIO) } else { Verdict::Goes }
    });
    let state_dir = play.scene.path(".app.db-waltrail");
    let older = play.scene.path("older");
    for turn in 0..3 {
        play.commit();
        play.sync(&mut daemon).unwrap();
        if turn == 0 {
            assert!(Command::new("cp").arg("-r").arg(&state_dir).arg(&older).status().unwrap().success());
        }
    }
    is_away.store(true, Ordering::SeqCst);
    for waiting in 1..=3 {
        play.commit();
        wait_for("a segment in the spool", || (segments_in(&state_dir.join("spool")).len() >= waiting).then_some(()));
    }
    // The kill may come before the state that tells of the last one was saved.
    let newest = *play.confirmed.keys().next_back().unwrap();
    let waiting: Vec<Vec<String>> = play.commits.iter().take(2).cloned().collect();
    daemon.kill();
    if damage == Damage::None {
        for (txid, content) in (newest.txid + 1..).zip(waiting) {
            play.confirmed.insert(Position { txid, ..newest }, content);
        }
    }
    if writes_on {
        play.checkpoint("TRUNCATE");
        play.commit();
    }
    for file in victim.files(&state_dir) {
        damage.inflict(&file, &older.join(file.strip_prefix(&state_dir).unwrap()));
    }
    let said_before = play.scene.log().len();
    play.sees_all = false;
    let mut daemon = Daemon::start(&arguments, &log);
    play.sync(&mut daemon).unwrap_or_else(|| panic!("{case}: died\n{}", play.scene.log()));
    play.change("UPDATE old SET body = printf('%.400c', 'y')");
    for _ in 0..3 {
        // In a window of its own each, so that what is kept is merged.
        play.commit();
        play.sync(&mut daemon).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(160));
    }
    assert!(
        run(["snapshot", play.scene.database().to_str().unwrap()]).status.success(),
        "{case}\n{}",
        play.scene.log()
    );
    play.commit();
    play.sync(&mut daemon).unwrap();
    assert_eq!(daemon.terminate(), Some(0), "{case}\n{}", play.scene.log());
    play.check(&case);
    let start = Play::start_told(&play.scene.log()[said_before..]);
    // Without the state nothing is proven; without a segment that storage has not got, neither.
    let proves_nothing = match victim {
        _ if damage == Damage::None => false,
        Victim::State | Victim::Both | Victim::Everything | Victim::FirstWaiting | Victim::AllWaiting => true,
        // The kill may have come before the state that tells of it was saved.
        Victim::LastWaiting => false,
        // Most of its entries may be in the state file, too.
        Victim::Ledger => !matches!(damage, Damage::BitFlipped(_) | Damage::Older),
        Victim::AllKept => false,
    };
    assert!(!proves_nothing || start == "re-anchor", "{case}: {start}\n{}", play.scene.log());
    start
}

#[test]
fn damaged_state_is_never_believed() {
    // Written to in every other case, so that each damage meets both.
    let cases: Vec<(Victim, Damage, bool)> = VICTIMS
        .into_iter()
        .enumerate()
        .flat_map(|(index, victim)| DAMAGES.iter().zip(index..).map(move |(&damage, at)| (victim, damage, at % 2 == 0)))
        .chain([(Victim::Everything, Damage::None, false), (Victim::Everything, Damage::None, true)])
        .collect();
    let (next, starts) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<(Victim, &str), u32>::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(&(victim, damage, writes_on)) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let mut start = play(victim, damage, writes_on);
                    // A kill between the segment's last rename and the state that tells of it costs a new epoch. It is short.
                    for _ in 0..UNLUCKY_KILLS {
                        if damage == Damage::None && start == "re-anchor" {
                            start = play(victim, damage, writes_on);
                        }
                    }
                    assert!(damage != Damage::None || start != "re-anchor", "nothing is damaged, and still: {start}");
                    *starts.lock().unwrap_or_else(PoisonError::into_inner).entry((victim, start)).or_default() += 1;
                }
            });
        }
    });
    println!("{} cases: {:?}", cases.len(), starts.into_inner().unwrap_or_else(PoisonError::into_inner));
}
