//! The daemon's side: one socket for all databases of a file system, with a name (a hard link) in each state directory. So a
//! database that nobody writes to holds no descriptor for it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::{Answer, DirectoryId, LINE_LIMIT, NAME, Question, Request, address};
use crate::replicate::status::{Board, Link, Phase};
use crate::replicate::wake::Event;
use crate::replicate::{locked, spool};

/// So many connections are open at a time.
const CONNECTIONS: usize = 512;
/// So many of them may wait for something. The others are for those who ask how things are, which is answered at once.
const WAITING: usize = 256;

/// Limit of the time that a request waits for an attempt to follow the database.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);

/// Who is answered for.
type Served = Arc<Mutex<HashMap<DirectoryId, Entry>>>;

/// One database that is answered for.
#[derive(Debug)]
struct Entry {
    /// Where the socket has a name.
    name: PathBuf,
    socket: SocketId,
    board: Arc<Board>,
}

/// Device and inode of a socket. Nobody else's as long as its listener is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SocketId(u64, u64);

impl SocketId {
    fn at(name: &Path) -> io::Result<Self> {
        fs::symlink_metadata(name).map(|metadata| Self(metadata.dev(), metadata.ino()))
    }
}

/// Answers requests about the databases of the process, until it is dropped.
#[derive(Debug, Default)]
pub struct ControlServer {
    served: Served,
    listening: Mutex<JoinSet<()>>,
}

/// One database is answered for until this is dropped.
#[derive(Debug)]
pub struct Place {
    served: Served,
    id: DirectoryId,
}

impl ControlServer {
    /// Answers for the database with this state directory, which is locked for this process. Takes the place of a socket that an
    /// earlier run left. Within a Tokio runtime.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn serve(&self, state_dir: &Path, board: Arc<Board>) -> io::Result<Place> {
        let directory = File::open(state_dir)?;
        let id = DirectoryId::of(&directory)?;
        let name = state_dir.join(NAME);
        spool::remove(&name)?;
        // Held until it is there: of many databases that start at once, one makes the socket.
        let mut served = locked(&self.served);
        // The other name may be gone or lead to a copy, and not every file system has second names.
        let shared = served.iter().find(|(other, _)| other.0 == id.0).map(|(_, other)| other).and_then(|other| {
            fs::hard_link(&other.name, &name).ok()?;
            SocketId::at(&name).ok().filter(|&socket| socket == other.socket)
        });
        let socket = match shared {
            Some(socket) => socket,
            None => {
                spool::remove(&name)?;
                let listener = UnixListener::bind(address(&directory))?;
                locked(&self.listening).spawn(listen(listener, self.served.clone()));
                SocketId::at(&name)?
            }
        };
        served.insert(id, Entry { name, socket, board });
        Ok(Place { served: self.served.clone(), id })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(Entry { name, socket, .. }) = locked(&self.served).remove(&self.id) else { return };
        // The directory may have been replaced, and another process may listen in the new one.
        if SocketId::at(&name).is_ok_and(|there| there == socket)
            && let Err(error) = spool::remove(&name)
        {
            tracing::warn!(%error, name = %name.display(), "the control socket can't be removed");
        }
    }
}

async fn listen(listener: UnixListener, served: Served) {
    let (mut answering, places) = (JoinSet::new(), Arc::new(Semaphore::new(WAITING)));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if answering.len() < CONNECTIONS => {
                    answering.spawn(answer(stream, served.clone(), places.clone()));
                }
                Ok(_) => tracing::warn!("too many requests at the control socket; one was turned away"),
                Err(error) => {
                    tracing::warn!(%error, "the control socket fails");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            Some(_) = answering.join_next() => {}
        }
    }
}

async fn answer(stream: UnixStream, served: Served, places: Arc<Semaphore>) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if (&mut stream).take(LINE_LIMIT).read_line(&mut line).await.is_err() {
        return;
    }
    let answer = tokio::select! {
        // What was asked for is passed on before it is looked whether somebody waits for it.
        biased;
        answer = answer_line(&line, &served, &places) => answer,
        // The question goes with who asked: while storage is away it would keep its place for ever.
        () = has_left(&mut stream) => return,
    };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    // Who asked may have left.
    stream.get_mut().write_all(&line).await.ok();
}

/// Ends when the other side has closed the connection. Who waits for an answer has nothing more to say.
async fn has_left(stream: &mut BufReader<UnixStream>) {
    // An error, too, says that nobody is there any more.
    tokio::io::copy(stream, &mut tokio::io::sink()).await.ok();
}

async fn answer_line(line: &str, served: &Served, places: &Semaphore) -> Answer {
    let Question { directory, request } = match serde_json::from_str(line) {
        Ok(question) => question,
        Err(error) => return Answer::Failed(format!("the request can't be read: {error}")),
    };
    let board = locked(served).get(&directory).map(|entry| entry.board.clone());
    let Some(board) = board else { return Answer::NotHere };
    if request == Request::Status {
        return Answer::Status(Box::new(board.status()));
    }
    let Ok(_place) = places.try_acquire() else {
        return Answer::Failed(format!("{WAITING} others wait for an answer already; ask again later"));
    };
    carry_out(request, &board).await
}

/// What is not answered at once.
async fn carry_out(request: Request, board: &Board) -> Answer {
    let Some(Link { mailbox, mut confirmed }) = link(board).await else { return Answer::Failed(not_followed(board)) };
    let (reply, replied) = oneshot::channel();
    let is_snapshot = request == Request::Snapshot;
    mailbox.send(if is_snapshot { Event::SnapshotWanted(reply) } else { Event::SyncWanted(reply) });
    // What nobody takes from it any more goes with it, and the question with that: we are not to keep it alive.
    drop(mailbox);
    let Ok(state) = replied.await else {
        return Answer::Failed(match is_snapshot {
            false => not_followed(board),
            true => "the snapshot was not stored; the log says why, and it is tried again".into(),
        });
    };
    match request {
        Request::Snapshot => Answer::SnapshotStored(state),
        Request::Ship => Answer::Shipping(state),
        Request::Sync | Request::Status => match confirmed.wait_for(|&txid| txid >= state.position.txid).await {
            Ok(_) => Answer::Synced(state),
            Err(_) => Answer::Failed("it stopped before everything was confirmed".into()),
        },
    }
}

/// Returns the link to the database's thread. Without a thread it asks for an attempt to follow the
/// database, and waits for it; `None` if that attempt failed already.
async fn link(board: &Board) -> Option<Link> {
    let mut links = board.links();
    // Before the request: an attempt that follows it is a change.
    let link = links.borrow_and_update().clone();
    board.retry_signal().note_request();
    if link.is_some() || board.status().phase == Phase::Stopped {
        return link;
    }
    tokio::time::timeout(ATTEMPT_TIMEOUT, links.changed()).await.ok()?.ok()?;
    let link = links.borrow();
    link.clone()
}

fn not_followed(board: &Board) -> String {
    let why = board.status().error.map_or("; its log says why".into(), |error| format!(": {error}"));
    format!("the database is not followed just now{why}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicate::control::somebody_listens;
    use crate::replicate::wake::Mailbox;

    #[tokio::test]
    async fn socket_of_replaced_directory_is_not_shared_or_removed() {
        let scene = tempfile::tempdir().unwrap();
        let [one, two, was] = ["one", "two", "was"].map(|name| scene.path().join(name));
        let server = ControlServer::default();
        [&one, &two].into_iter().for_each(|directory| fs::create_dir(directory).unwrap());
        let place = server.serve(&one, Arc::default()).unwrap();
        assert!(somebody_listens(&one));
        // As a copy of the directory has it: a socket that no process listens at.
        fs::rename(&one, &was).unwrap();
        fs::create_dir(&one).unwrap();
        drop(std::os::unix::net::UnixListener::bind(one.join(NAME)).unwrap());
        let second = server.serve(&two, Arc::default()).unwrap();
        assert!(somebody_listens(&two));
        drop(place);
        assert!(one.join(NAME).exists(), "it is another one's");
        drop(second);
        assert!(!two.join(NAME).exists());
    }

    /// The thread that would have answered has ended, and with it goes its mailbox: who asked is told so, and does not wait for ever.
    #[tokio::test]
    async fn a_question_that_nobody_takes_is_answered() {
        let board = Arc::new(Board::default());
        let mailbox = Arc::new(Mailbox::default());
        let (_confirmed, receiver) = tokio::sync::watch::channel(0);
        board.set_link(Some(Link { mailbox: mailbox.clone(), confirmed: receiver }));
        let asked = board.clone();
        let answer = tokio::spawn(async move { carry_out(Request::Sync, &asked).await });
        tokio::task::yield_now().await;
        board.set_link(None);
        drop(mailbox);
        let answer = tokio::time::timeout(Duration::from_secs(10), answer).await.expect("an answer").unwrap();
        assert!(matches!(answer, Answer::Failed(_)));
    }
}
