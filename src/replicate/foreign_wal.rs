//! A WAL that belongs to another database file than the one beside it.
//!
//! SQLite recovers whatever `-wal` it finds beside a main file (`walIndexRecover` checks the WAL's own checksums and
//! nothing of the main file). So when the main file is replaced while a WAL of the old one is left, the first connection
//! applies the old pages to the new file. SQLite alone leaves no WAL after the last close; a daemon that keeps the
//! database open can, if it is killed at the wrong moment.
//!
//! Another inode alone proves nothing: a database that was copied back together with its WAL has a
//! new inode, and SQLite must apply the WAL. So the pages decide. If the WAL belongs to the main
//! file, each page without a frame in the WAL is as the last captured transaction left it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::ledger::Ledger;
use crate::format::{lock_page, page_hash};
use crate::sqlite::descriptors::SharedFile;
use crate::sqlite::follow::WalPosition;
use crate::sqlite::header::{DatabaseHeader, HEADER_LEN};
use crate::sqlite::wal::{FRAME_HEADER_LEN, WAL_HEADER_LEN, WalHeader};
use crate::sqlite::{locks, sidecar};

/// Names that are tried for a WAL that is set aside.
const MOST_NAMES: u32 = 1000;

/// The main file and the WAL as they were together.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// Inode of the main file.
    pub main_inode: u64,
    /// Inode of the WAL, if it is known.
    pub wal_inode: Option<u64>,
    /// The place in the WAL after the last captured transaction.
    pub position: WalPosition,
}

/// Outcome of [`set_aside_if_foreign`].
#[derive(Debug, PartialEq, Eq)]
pub enum Wal {
    /// The WAL stays, or there is none. It stays if it is of another generation, if the main file
    /// matches it, or if another process already uses it with this main file.
    Left,
    /// It belongs to another main file, and has this name now.
    SetAside(PathBuf),
    /// It belongs to another main file, which another process still has open.
    InUse,
    /// It was beside another main file, and was restarted since: nothing proves what it belongs to.
    Unclear,
}

/// Sets a WAL aside that belongs to another main file than the one at `path`.
///
/// Blocks while the main file is compared; a file to which the WAL does not belong differs early.
///
/// # Errors
/// As the operating system answers. Then nothing was changed.
pub fn set_aside_if_foreign(path: &Path, pair: Pair, known: &Ledger) -> io::Result<Wal> {
    let file = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Wal::Left),
        other => other?,
    };
    let wal_path = sidecar(&file, "-wal");
    if fs::metadata(&file)?.ino() == pair.main_inode {
        return Ok(Wal::Left);
    }
    let wal = read_wal(&wal_path, pair.position)?;
    // A WAL that was put back with its main file has another inode, as that has.
    let was_beside_other =
        || Ok::<_, io::Error>(wal_has_header(&wal_path)? && Some(fs::metadata(&wal_path)?.ino()) == pair.wal_inode);
    if wal.is_none() && !was_beside_other()? {
        return Ok(Wal::Left);
    }
    let main = SharedFile::open(&file)?;
    let opening = main.opening();
    let _opening = opening.lock().unwrap_or_else(PoisonError::into_inner);
    let shm = match SharedFile::open(&sidecar(&file, "-shm")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other?),
    };
    if let Some(wal) = &wal
        && belongs(&main, wal, known)?
    {
        return Ok(Wal::Left);
    }
    if locks::is_open_elsewhere(&main, shm.as_deref())? {
        return Ok(if locks::is_split(&main, shm.as_deref())? { Wal::InUse } else { Wal::Left });
    }
    if wal.is_none() { Ok(Wal::Unclear) } else { set_aside(&file).map(Wal::SetAside) }
}

/// Gives the WAL beside `path` a name under which SQLite does not look for it.
///
/// # Errors
/// As the operating system answers.
pub fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let wal_path = sidecar(path, "-wal");
    let mut names = (1..=MOST_NAMES).map(|number| sidecar(path, &format!("-wal.set-aside-{number}")));
    let name = names.find(|name| fs::symlink_metadata(name).is_err()).ok_or(io::ErrorKind::AlreadyExists)?;
    fs::rename(&wal_path, &name)?;
    // At once: it says that there are frames, which the next one to connect would look for in a new WAL.
    match fs::remove_file(sidecar(path, "-shm")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())?;
    Ok(name)
}

/// What SQLite would recover from a WAL.
struct Recoverable {
    page_size: u32,
    /// Pages of the committed frames.
    pages: HashSet<u32>,
    /// Size of the database after the last commit, in pages.
    size_pages: u32,
}

/// Reads a WAL that continues from `position`. `None` if it does not: it is of another generation, or was copied before
/// the transaction at `position` was committed. Then nothing is known of the file that it belongs to.
fn read_wal(path: &Path, position: WalPosition) -> io::Result<Option<Recoverable>> {
    // The WAL carries no locks: closing it drops none.
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => io::BufReader::with_capacity(1 << 20, other?),
    };
    let mut bytes = [0; WAL_HEADER_LEN];
    if !read_exact(&mut file, &mut bytes)? {
        return Ok(None);
    }
    let Some(header) = WalHeader::parse(&bytes).filter(|header| header.salts == position.salts) else {
        return Ok(None);
    };
    let mut frame_bytes = vec![0; FRAME_HEADER_LEN + header.page_size as usize];
    let (mut checksum, mut pages, mut committed, mut size_pages) = (header.checksum, Vec::new(), 0, 0);
    let mut continues = position.frame_count == 0;
    while read_exact(&mut file, &mut frame_bytes)? {
        let Some(frame) = header.check_frame(checksum, &frame_bytes) else { break };
        checksum = frame.checksum;
        pages.push(frame.page_number);
        continues |= pages.len() == position.frame_count as usize && checksum == position.checksum;
        if frame.commit_size_pages != 0 {
            (committed, size_pages) = (pages.len(), frame.commit_size_pages);
        }
    }
    pages.truncate(committed);
    let wal = Recoverable { page_size: header.page_size, pages: pages.into_iter().collect(), size_pages };
    Ok((continues && committed > 0).then_some(wal))
}

/// Whether a WAL has a header, so that SQLite reads it.
fn wal_has_header(path: &Path) -> io::Result<bool> {
    let mut bytes = [0; WAL_HEADER_LEN];
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => Ok(read_exact(&mut other?, &mut bytes)? && WalHeader::parse(&bytes).is_some()),
    }
}

/// Fills `buffer`; returns `false` if the file ends before that.
fn read_exact(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    }
}

/// Returns whether each page of the main file without a frame in the WAL matches its hash in
/// `known`.
fn belongs(main: &File, wal: &Recoverable, known: &Ledger) -> io::Result<bool> {
    let mut header = [0; HEADER_LEN];
    let is_database = main.read_exact_at(&mut header, 0).is_ok();
    if !is_database || DatabaseHeader::parse(&header).is_ok_and(|header| header.page_size != wal.page_size) {
        return Ok(false);
    }
    let page_size = u64::from(wal.page_size);
    let main_pages = main.metadata()?.len() / page_size;
    let mut page = vec![0; wal.page_size as usize];
    let is_compared = |page: &u32| !wal.pages.contains(page) && *page != lock_page(wal.page_size);
    for page_number in (1..=known.known_pages().min(wal.size_pages)).filter(is_compared) {
        if u64::from(page_number) > main_pages {
            return Ok(false);
        }
        main.read_exact_at(&mut page, u64::from(page_number - 1) * page_size)?;
        if known.get(page_number)? != page_hash(page_number, &page) {
            return Ok(false);
        }
    }
    Ok(true)
}
