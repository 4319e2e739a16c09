//! What a power failure would show: what is synced, and in which order. No test cuts the power; but the daemon's own calls are all seen.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::support::Daemon;
use crate::support::syscalls::{CHANGES, Call, Verdict};

use super::crash_points::{Play, Replica};

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Written(PathBuf),
    Synced(PathBuf),
    /// From, to.
    Renamed(PathBuf, PathBuf),
}

fn event_of(call: &Call) -> Option<Event> {
    let mut paths = call.paths().into_iter();
    match call.number {
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_ftruncate => {
            Some(Event::Written(paths.next()?))
        }
        libc::SYS_fsync | libc::SYS_fdatasync => Some(Event::Synced(paths.next()?)),
        libc::SYS_renameat2 | libc::SYS_linkat => Some(Event::Renamed(paths.next()?, paths.next()?)),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rename | libc::SYS_link => Some(Event::Renamed(paths.next()?, paths.next()?)),
        _ => None,
    }
}

struct Events(Vec<Event>);

impl Events {
    fn last_before(&self, at: usize, is_it: impl Fn(&Event) -> bool) -> Option<usize> {
        self.0[..at].iter().rposition(is_it)
    }

    fn first_after(&self, at: usize, is_it: impl Fn(&Event) -> bool) -> Option<usize> {
        self.0[at..].iter().position(is_it).map(|found| at + found)
    }

    /// What got its name at `at` was whole on the disk before, and its name is after.
    fn assert_durable(&self, at: usize) {
        let Event::Renamed(from, to) = &self.0[at] else { panic!("no renaming") };
        let synced = self.last_before(at, |event| *event == Event::Synced(from.clone()));
        let written = self.last_before(at, |event| *event == Event::Written(from.clone()));
        assert!(synced.is_some() && synced > written, "{} got its name before it was synced", to.display());
        let directory = to.parent().unwrap();
        let named = self.first_after(at, |event| *event == Event::Synced(directory.to_owned()));
        assert!(named.is_some(), "the name of {} is not synced", to.display());
    }

    fn renamings(&self) -> impl Iterator<Item = (usize, &Path, &Path)> {
        self.0.iter().enumerate().filter_map(|(at, event)| match event {
            Event::Renamed(from, to) => Some((at, from.as_path(), to.as_path())),
            _ => None,
        })
    }
}

#[test]
fn what_must_outlive_a_power_failure_is_synced_in_order() {
    let mut play = Play::new(Replica::Directory);
    let arguments = play.arguments();
    let arguments = [arguments[0].as_str(), arguments[1].as_str()];
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let mut daemon = Daemon::start_under(&arguments, &play.scene.path("daemon.log"), CHANGES, move |call: &Call| {
        noted.lock().unwrap().extend(event_of(call));
        Verdict::Goes
    });
    play.act(&mut daemon).unwrap();
    assert_eq!(daemon.terminate(), Some(0), "{}", play.scene.log());
    let events = Events(std::mem::take(&mut *seen.lock().unwrap()));
    let (replica, state_dir) = (play.scene.path("replica"), play.scene.path(".app.db-waltrail"));

    // Every object is whole on the disk before it counts as confirmed.
    let objects: Vec<(usize, &Path)> = events
        .renamings()
        .filter(|(_, _, to)| to.starts_with(&replica))
        .map(|(at, _, to)| (at, to.strip_prefix(&replica).unwrap()))
        .collect();
    assert!(objects.len() > 8, "{objects:?}");
    for &(at, _) in &objects {
        events.assert_durable(at);
    }

    // The state that tells of a segment is saved before the segment is shipped.
    let (open, kept) = (state_dir.join("spool/open"), state_dir.join("spool/kept"));
    let mut segments = 0;
    for &(at, key) in objects.iter().filter(|(_, key)| key.starts_with("log")) {
        let name = key.to_str().unwrap().replace('/', ".");
        // One that was merged was confirmed in its parts before.
        let Some((cut, ..)) = events.renamings().find(|(_, from, to)| *from == open && to.ends_with(&name)) else {
            continue;
        };
        let is_saved = |event: &Event| matches!(event, Event::Renamed(_, to) if *to == state_dir.join("state"));
        let saved = events.first_after(cut, is_saved).unwrap_or(usize::MAX);
        assert!(saved < at, "{name} was shipped before the state that tells of it was saved");
        let let_go = events.renamings().find(|(_, _, to)| to.starts_with(&kept) && to.ends_with(&name));
        assert!(let_go.is_none_or(|(kept, ..)| kept > at), "{name} left the spool before it was confirmed");
        segments += 1;
    }
    assert!(segments > 6, "{segments} segments");

    // A stop leaves a state that outlives a power failure, and so does the first snapshot's end, with the ledger.
    let states: Vec<usize> =
        events.renamings().filter(|(_, _, to)| *to == state_dir.join("state")).map(|(at, ..)| at).collect();
    events.assert_durable(*states.last().unwrap());
    let ledger = state_dir.join("ledger");
    let written = events.last_before(events.0.len(), |event| *event == Event::Written(ledger.clone()));
    let synced = events.last_before(events.0.len(), |event| *event == Event::Synced(ledger.clone()));
    assert!(written.is_some() && synced > written, "the ledger is not synced");
}
