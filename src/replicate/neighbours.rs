//! Several replicas of one database: each is followed by itself, with a pin of its own, and has its own progress, snapshots and
//! troubles. What they have to do together is to let the WAL begin anew, for which all pins have to move.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::time::Duration;

use super::locked;
use super::wake::{Event, Mailbox};

/// So long the write lock is held for the others to move their pins, before a barrier and after it.
const PATIENCE: Duration = Duration::from_millis(4);

/// Those who follow one database.
#[derive(Debug, Default)]
struct Neighbourhood {
    members: Mutex<Vec<Weak<Mailbox>>>,
    /// Of two barriers at once, each would wait for the other's pin.
    barrier: Mutex<()>,
}

/// Those who follow the same database, for all databases of the process.
#[derive(Debug, Default)]
pub struct Neighbourhoods(Mutex<HashMap<PathBuf, Weak<Neighbourhood>>>);

impl Neighbourhoods {
    /// Joins those who follow the database at `path`, until the value is dropped.
    #[must_use]
    pub fn join(&self, path: &Path, mailbox: &Arc<Mailbox>) -> Arc<Neighbour> {
        let mut all = locked(&self.0);
        all.retain(|_, neighbourhood| neighbourhood.strong_count() > 0);
        let known = all.get(path).and_then(Weak::upgrade);
        let neighbourhood = known.unwrap_or_else(|| {
            let new = Arc::new(Neighbourhood::default());
            all.insert(path.to_owned(), Arc::downgrade(&new));
            new
        });
        locked(&neighbourhood.members).push(Arc::downgrade(mailbox));
        Arc::new(Neighbour { neighbourhood, mailbox: mailbox.clone() })
    }
}

/// One of those who follow a database.
#[derive(Debug)]
pub struct Neighbour {
    neighbourhood: Arc<Neighbourhood>,
    mailbox: Arc<Mailbox>,
}

impl Neighbour {
    /// The right to a barrier, if nobody else has it.
    #[must_use]
    pub fn barrier(&self) -> Option<MutexGuard<'_, ()>> {
        match self.neighbourhood.barrier.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Has the others move their pins to where the WAL is now; tells whether all have. Soon: the write lock may be held.
    #[must_use]
    pub fn move_pins(&self) -> bool {
        let others: Vec<Arc<Mailbox>> = locked(&self.neighbourhood.members)
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|member| !Arc::ptr_eq(member, &self.mailbox))
            .collect();
        let (moved, answers) = sync_channel(others.len());
        for other in &others {
            other.send(Event::PinWanted(moved.clone()));
        }
        others.iter().all(|_| answers.recv_timeout(PATIENCE).is_ok())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        locked(&self.neighbourhood.members)
            .retain(|member| member.upgrade().is_some_and(|member| !Arc::ptr_eq(&member, &self.mailbox)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_moved_by_all_who_are_there() {
        let all = Neighbourhoods::default();
        let mailboxes = [(); 3].map(|()| Arc::new(Mailbox::default()));
        let alone = all.join(Path::new("/a.db"), &mailboxes[0]);
        assert!(alone.move_pins(), "there is nobody to wait for");
        let other = all.join(Path::new("/a.db"), &mailboxes[1]);
        let _elsewhere = all.join(Path::new("/b.db"), &mailboxes[2]);
        assert!(!alone.move_pins(), "the other one does not answer");
        let answering = mailboxes[1].clone();
        let answers = std::thread::spawn(move || {
            // The one that was not answered, and the one to come.
            for _ in 0..2 {
                for event in answering.wait(Duration::from_secs(10)).1 {
                    let Event::PinWanted(moved) = event else { panic!("{event:?}") };
                    moved.send(()).ok();
                }
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(alone.move_pins());
        answers.join().unwrap();
        let turn = alone.barrier();
        assert!(turn.is_some() && other.barrier().is_none());
        drop(turn);
        drop(other);
        assert!(alone.move_pins());
    }
}
