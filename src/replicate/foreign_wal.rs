//! A WAL that belongs to another database file than the one beside it.
//!
//! SQLite recovers whatever `-wal` it finds beside a main file (`walIndexRecover` checks the WAL's own checksums and
//! nothing of the main file). So when the main file is replaced while a WAL of the old one is left, the first connection
//! applies the old pages to the new file. SQLite alone leaves no WAL after the last close; a daemon that keeps the
//! database open can, if it is killed at the wrong moment.
//!
//! A file that was copied back together with its WAL has another inode, too, and needs it. So the pages decide: a
//! main file to which the WAL belongs holds, wherever the WAL has no frame, exactly the pages of the last captured
//! transaction.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::ledger::Ledger;
use crate::format::{lock_page, page_hash};
use crate::sqlite::descriptors::SharedFile;
use crate::sqlite::header::{DatabaseHeader, HEADER_LEN};
use crate::sqlite::wal::{FRAME_HEADER_LEN, Salts, WAL_HEADER_LEN, WalHeader};
use crate::sqlite::{locks, sidecar};

/// Names that are tried for a WAL that is set aside.
const MOST_NAMES: u32 = 1000;

/// The main file and the WAL as they were together.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// Inode of the main file.
    pub main_inode: u64,
    /// The generation of the WAL.
    pub salts: Salts,
}

/// What became of a WAL.
#[derive(Debug, PartialEq, Eq)]
pub enum Wal {
    /// It may stay: there is none, it is of another generation, its pages fit, or another process has the database open
    /// with it already.
    Left,
    /// It belongs to another main file, and has this name now.
    SetAside(PathBuf),
    /// It belongs to another main file, which another process still has open.
    InUse,
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
    let Some((header, pages)) = read_wal(&wal_path)?.filter(|(header, _)| header.salts == pair.salts) else {
        return Ok(Wal::Left);
    };
    let main = SharedFile::open(&file)?;
    let shm = match SharedFile::open(&sidecar(&file, "-shm")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other?),
    };
    if belongs(&main, header.page_size, &pages, known)? {
        return Ok(Wal::Left);
    }
    if locks::is_open_elsewhere(&main, shm.as_deref())? {
        return Ok(if locks::is_split(&main, shm.as_deref())? { Wal::InUse } else { Wal::Left });
    }
    set_aside(&file).map(Wal::SetAside)
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
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())?;
    Ok(name)
}

/// The header of a WAL and the pages of its committed frames; `None` where SQLite would find nothing to recover.
fn read_wal(path: &Path) -> io::Result<Option<(WalHeader, HashSet<u32>)>> {
    // The WAL carries no locks: closing it drops none.
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => io::BufReader::with_capacity(1 << 20, other?),
    };
    let mut bytes = [0; WAL_HEADER_LEN];
    if !read_exact(&mut file, &mut bytes)? {
        return Ok(None);
    }
    let Some(header) = WalHeader::parse(&bytes) else { return Ok(None) };
    let mut frame_bytes = vec![0; FRAME_HEADER_LEN + header.page_size as usize];
    let (mut checksum, mut pages, mut committed) = (header.checksum, Vec::new(), 0);
    while read_exact(&mut file, &mut frame_bytes)? {
        let Some(frame) = header.check_frame(checksum, &frame_bytes) else { break };
        checksum = frame.checksum;
        pages.push(frame.page_number);
        if frame.commit_size_pages != 0 {
            committed = pages.len();
        }
    }
    pages.truncate(committed);
    Ok((committed > 0).then(|| (header, pages.into_iter().collect())))
}

/// Whether the file went that far.
fn read_exact(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    }
}

/// Whether each page that the WAL has no frame of is as `known` has it.
fn belongs(main: &File, page_size: u32, in_wal: &HashSet<u32>, known: &Ledger) -> io::Result<bool> {
    let mut header = [0; HEADER_LEN];
    let is_database = main.read_exact_at(&mut header, 0).is_ok();
    if !is_database || DatabaseHeader::parse(&header).is_ok_and(|header| header.page_size != page_size) {
        return Ok(false);
    }
    let pages = main.metadata()?.len() / u64::from(page_size);
    let count = known.known_pages().min(u32::try_from(pages).unwrap_or(u32::MAX));
    let mut page = vec![0; page_size as usize];
    for page_number in (1..=count).filter(|page| !in_wal.contains(page) && *page != lock_page(page_size)) {
        main.read_exact_at(&mut page, u64::from(page_number - 1) * u64::from(page_size))?;
        if known.get(page_number)? != page_hash(page_number, &page) {
            return Ok(false);
        }
    }
    Ok(true)
}
