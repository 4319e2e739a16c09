//! The control socket: how another process on the machine asks a running daemon for something about one database. A Unix
//! socket in the state directory, which only the user can enter. One JSON object a line: a request, then its answer.

mod server;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

pub use self::server::{ControlServer, Place};
use super::status::Status;
use crate::format::Position;

/// The socket's name in a state directory.
const NAME: &str = "control";
/// No request or answer is longer, in bytes.
const LINE_LIMIT: u64 = 64 * 1024;
/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Answered when everything that was committed before is confirmed.
    Sync,
    /// Everything that was committed before is shipped now, whenever it would be otherwise; answered when it is captured.
    Ship,
    /// Make a snapshot now; answered when it is confirmed.
    Snapshot,
    /// Answered at once.
    Status,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// This state is confirmed.
    Synced(State),
    /// This state is captured, and on its way.
    Shipping(State),
    /// A snapshot that serves this state is confirmed.
    SnapshotStored(State),
    /// What is known of the database's replication.
    Status(Box<Status>),
    /// It could not be done; why, in a sentence.
    Failed(String),
    /// The process that listens does not follow this database.
    NotHere,
}

/// A state of the database and the time of its last commit, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The state.
    pub position: Position,
    /// Its time.
    pub time_ms: u64,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No daemon listens. One may run all the same, without its socket.
    #[error("no daemon follows {}: no process listens in {}", database.display(), state_dir.display())]
    NoDaemon {
        /// The database.
        database: PathBuf,
        /// Its state directory.
        state_dir: PathBuf,
    },
    /// The daemon could not do it.
    #[error("the daemon that follows {}: {why}", database.display())]
    Failed {
        /// The database.
        database: PathBuf,
        /// Its own words.
        why: String,
    },
    /// It took too long.
    #[error("the daemon that follows {} has not done it within {limit:?}", database.display())]
    TimedOut {
        /// The database.
        database: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection broke.
    #[error("the connection to the daemon that follows {} broke: {source}", database.display())]
    Broken {
        /// The database.
        database: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// The socket's address. Those of Unix sockets are short, and paths may be long: so by way of an open directory.
fn address(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd()))
}

/// A state directory, whatever path leads to it: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct DirectoryId(u64, u64);

impl DirectoryId {
    fn of(directory: &File) -> io::Result<Self> {
        let metadata = directory.metadata()?;
        Ok(Self(metadata.dev(), metadata.ino()))
    }
}

/// A line that asks: one socket answers for many databases.
#[derive(Debug, Serialize, Deserialize)]
struct Question {
    directory: DirectoryId,
    request: Request,
}

/// Whether a process listens at the socket in `state_dir`: then it works with it, though it may not hold its lock at the moment
/// (see [`super::rest`]).
#[must_use]
pub fn somebody_listens(state_dir: &Path) -> bool {
    listening_process(state_dir).is_some()
}

/// Returns the id of the process that listens at the socket in `state_dir`, as in [`somebody_listens`]; 0 where it is of
/// another namespace. A state directory that was moved away and back has the socket of the process that served it.
#[must_use]
pub fn listening_process(state_dir: &Path) -> Option<u32> {
    let directory = File::open(state_dir).ok()?;
    let socket = std::os::unix::net::UnixStream::connect(address(&directory)).ok()?;
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: the descriptor is open, and the kernel writes no more than `len` bytes.
    unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut peer).cast(), &raw mut len) };
    Some(peer.pid.unsigned_abs())
}

/// Asks the daemon that follows `database` for a state, and waits for its answer.
///
/// # Errors
/// See [`ControlError`].
pub async fn ask(database: &Path, state_dir: &Path, request: Request, limit: Duration) -> Result<State, ControlError> {
    match ask_anything(database, state_dir, request, limit).await? {
        Answer::Synced(state) | Answer::Shipping(state) | Answer::SnapshotStored(state) => Ok(state),
        other => Err(unexpected(database, &other)),
    }
}

/// Asks the daemon that follows `database` how it is.
///
/// # Errors
/// See [`ControlError`].
pub async fn ask_status(database: &Path, state_dir: &Path, limit: Duration) -> Result<Status, ControlError> {
    match ask_anything(database, state_dir, Request::Status, limit).await? {
        Answer::Status(status) => Ok(*status),
        other => Err(unexpected(database, &other)),
    }
}

fn unexpected(database: &Path, answer: &Answer) -> ControlError {
    let database = database.to_owned();
    match answer {
        Answer::Failed(why) => ControlError::Failed { database, why: why.clone() },
        _ => ControlError::Broken { database, source: io::ErrorKind::InvalidData.into() },
    }
}

async fn ask_anything(
    database: &Path,
    state_dir: &Path,
    request: Request,
    limit: Duration,
) -> Result<Answer, ControlError> {
    let database = database.to_owned();
    match tokio::time::timeout(limit, exchange(state_dir, request)).await {
        Err(_) => Err(ControlError::TimedOut { database, limit }),
        Ok(Ok(Answer::NotHere)) => Err(ControlError::NoDaemon { database, state_dir: state_dir.to_owned() }),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Err(ControlError::NoDaemon { database, state_dir: state_dir.to_owned() })
        }
        Ok(Err(source)) => Err(ControlError::Broken { database, source }),
    }
}

async fn exchange(state_dir: &Path, request: Request) -> io::Result<Answer> {
    let directory = File::open(state_dir)?;
    let mut stream = BufReader::new(UnixStream::connect(address(&directory)).await?);
    let mut line = serde_json::to_vec(&Question { directory: DirectoryId::of(&directory)?, request })?;
    line.push(b'\n');
    stream.get_mut().write_all(&line).await?;
    let mut line = String::new();
    (&mut stream).take(LINE_LIMIT).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}
