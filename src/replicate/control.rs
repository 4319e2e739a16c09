//! The control socket: how another process on the machine asks a running daemon for something about one database. A Unix
//! socket in the state directory, which only the user can enter. One JSON object a line: a request, then its answer.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::status::{Board, Link, Phase, Status};
use super::wake::Event;
use crate::format::Position;

/// No request or answer is longer, in bytes.
const LINE_LIMIT: u64 = 64 * 1024;
/// So many requests are answered at a time.
const REQUESTS_AT_A_TIME: usize = 32;

/// For a database that is about to be followed it is looked so often, so long apart.
const START_LOOKS: u32 = 600;
const START_LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Answered when everything that was committed before is confirmed.
    Sync,
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
    /// A snapshot that serves this state is confirmed.
    SnapshotStored(State),
    /// What is known of the database's replication.
    Status(Box<Status>),
    /// It could not be done; why, in a sentence.
    Failed(String),
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
    /// No daemon listens.
    #[error("no daemon follows {}: nobody listens in {}", database.display(), state_dir.display())]
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
    PathBuf::from(format!("/proc/self/fd/{}/control", directory.as_raw_fd()))
}

/// Listens in `state_dir`, and takes the place of a socket that an earlier run left: the directory is locked for this process.
///
/// # Errors
/// As the operating system answers.
pub fn listen(state_dir: &Path) -> io::Result<UnixListener> {
    let directory = File::open(state_dir)?;
    super::spool::remove(&state_dir.join("control"))?;
    UnixListener::bind(address(&directory))
}

/// Answers requests about one database, until it is dropped.
pub async fn serve(listener: UnixListener, board: Arc<Board>) {
    let mut answering = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if answering.len() < REQUESTS_AT_A_TIME => {
                    answering.spawn(answer(stream, board.clone()));
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

async fn answer(stream: UnixStream, board: Arc<Board>) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if (&mut stream).take(LINE_LIMIT).read_line(&mut line).await.is_err() {
        return;
    }
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Status) => Answer::Status(Box::new(board.status())),
        Ok(request) => match link(&board).await {
            Some(link) => carry_out(request, link).await,
            None => Answer::Failed(not_followed(&board)),
        },
        Err(error) => Answer::Failed(format!("the request can't be read: {error}")),
    };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    // Who asked may have left.
    stream.get_mut().write_all(&line).await.ok();
}

/// How to reach the database's thread; one that is about to begin is waited for.
async fn link(board: &Board) -> Option<Link> {
    for _ in 0..START_LOOKS {
        match board.link() {
            None if board.status().phase == Phase::Starting => tokio::time::sleep(START_LOOK_INTERVAL).await,
            link => return link,
        }
    }
    None
}

fn not_followed(board: &Board) -> String {
    let why = board.status().error.map_or(String::new(), |error| format!(": {error}"));
    format!("the database is not followed just now{why}")
}

async fn carry_out(request: Request, link: Link) -> Answer {
    let Link { mailbox, mut confirmed } = link;
    let (reply, replied) = oneshot::channel();
    let is_snapshot = request == Request::Snapshot;
    mailbox.send(if is_snapshot { Event::SnapshotWanted(reply) } else { Event::SyncWanted(reply) });
    let Ok(state) = replied.await else {
        return Answer::Failed(match is_snapshot {
            false => "the database can't be followed just now; its log says why".into(),
            true => "the snapshot was not stored; the log says why, and it is tried again".into(),
        });
    };
    match is_snapshot {
        true => Answer::SnapshotStored(state),
        false => match confirmed.wait_for(|&txid| txid >= state.position.txid).await {
            Ok(_) => Answer::Synced(state),
            Err(_) => Answer::Failed("it stopped before everything was confirmed".into()),
        },
    }
}

/// Asks the daemon that follows `database` for a state, and waits for its answer.
///
/// # Errors
/// See [`ControlError`].
pub async fn ask(database: &Path, state_dir: &Path, request: Request, limit: Duration) -> Result<State, ControlError> {
    match ask_anything(database, state_dir, request, limit).await? {
        Answer::Synced(state) | Answer::SnapshotStored(state) => Ok(state),
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
    let mut line = serde_json::to_vec(&request)?;
    line.push(b'\n');
    stream.get_mut().write_all(&line).await?;
    let mut line = String::new();
    (&mut stream).take(LINE_LIMIT).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}
