//! The spool: segments on the local disk, from the moment that they are cut until they are confirmed, and, below `kept`, until
//! they are merged.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::format::FOOTER_LEN;
use crate::format::block::{BLOCK_HEADER_LEN, BlockHeader};
use crate::format::key::SegmentKey;
use crate::format::segment::SegmentFooter;

/// What names of files that segments are merged into begin with.
const MERGE_PREFIX: &str = "merging-";

/// A segment that waits to be shipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spooled {
    /// Its key in storage.
    pub key: SegmentKey,
    /// Its file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len_bytes: u64,
}

/// File systems give room in blocks of so many bytes, mostly.
const DISK_BLOCK_LEN: u64 = 4096;

impl Spooled {
    /// What it takes of the disk: of many small ones that is a multiple of their length.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.len_bytes.next_multiple_of(DISK_BLOCK_LEN)
    }

    /// Whether the file is the segment that its name says, every block of it.
    ///
    /// # Errors
    /// As the operating system answers: that says nothing of what is in the file.
    pub fn is_whole(&self) -> io::Result<bool> {
        match self.check() {
            Err(error) if is_lost(&error) => Ok(false),
            answer => answer,
        }
    }

    /// Opens the file, and checks by its footer that it holds the transactions that its name says.
    /// The path can lead to another file later; the file that is returned is the one that was
    /// checked.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if it holds others, or is no segment; otherwise as the
    /// operating system answers.
    pub fn open(&self) -> io::Result<File> {
        let file = File::open(&self.path)?;
        let wrong =
            |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", self.path.display()));
        match read_footer(&file)? {
            Some(footer) if footer.span == self.key.0 => Ok(file),
            Some(footer) => Err(wrong(format!("it holds the segment {}", SegmentKey(footer.span)))),
            None => Err(wrong("it has no footer of a segment".into())),
        }
    }

    /// Reads the file block by block.
    fn check(&self) -> io::Result<bool> {
        let file = self.open()?;
        let Some(footer) = read_footer(&file)? else { return Ok(false) };
        let footer_at = file.metadata()?.len().saturating_sub(FOOTER_LEN as u64);
        let mut at = footer.pages_offset;
        while at < footer_at {
            let mut header = [0; BLOCK_HEADER_LEN];
            file.read_exact_at(&mut header, at)?;
            let Ok(header) = BlockHeader::decode(&header, "a spooled block") else { return Ok(false) };
            let mut compressed = vec![0; header.compressed_len];
            file.read_exact_at(&mut compressed, at + BLOCK_HEADER_LEN as u64)?;
            if !header.has_checksum_of(&compressed) {
                return Ok(false);
            }
            at += (BLOCK_HEADER_LEN + header.compressed_len) as u64;
        }
        Ok(at == footer_at)
    }
}

/// The footer at the end of a file; `None` if there is none.
fn read_footer(file: &File) -> io::Result<Option<SegmentFooter>> {
    let mut tail = [0; FOOTER_LEN];
    let len_bytes = file.metadata()?.len();
    let Some(footer_at) = len_bytes.checked_sub(FOOTER_LEN as u64) else { return Ok(None) };
    file.read_exact_at(&mut tail, footer_at)?;
    Ok(SegmentFooter::decode(&tail, len_bytes).ok())
}

/// The directory of waiting segments, and of those that are kept.
#[derive(Debug, Clone)]
pub struct Spool {
    directory: PathBuf,
}

impl Spool {
    /// The spool in `directory`, which exists.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where the segment that is being written stands; what an earlier run left there is worth nothing.
    #[must_use]
    pub fn open_segment_path(&self) -> PathBuf {
        self.directory.join("open")
    }

    /// A file to write a merged segment to; gone when it is dropped.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn merge_file(&self) -> io::Result<NamedTempFile> {
        tempfile::Builder::new().prefix(MERGE_PREFIX).tempfile_in(&self.directory)
    }

    /// Removes what a merge left that was ended by a crash.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn remove_unfinished_merges(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(MERGE_PREFIX) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn kept_directory(&self) -> PathBuf {
        self.directory.join("kept")
    }

    /// Gives the segment that was written its name: it is whole.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn accept(&self, key: SegmentKey) -> io::Result<Spooled> {
        take_in(&self.open_segment_path(), &self.directory, key)
    }

    /// Keeps a segment that is confirmed.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn keep(&self, confirmed: &Spooled) -> io::Result<Spooled> {
        take_in(&confirmed.path, &self.kept_directory(), confirmed.key)
    }

    /// Keeps the segment that was merged, and is confirmed.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn keep_merged(&self, merged: NamedTempFile, key: SegmentKey) -> io::Result<Spooled> {
        let (_, path) = merged.keep().map_err(|failed| failed.error)?;
        take_in(&path, &self.kept_directory(), key)
    }

    /// All waiting segments, oldest first.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn waiting(&self) -> io::Result<Vec<Spooled>> {
        segments_in(&self.directory)
    }

    /// All segments that are confirmed and kept, oldest first.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn kept(&self) -> io::Result<Vec<Spooled>> {
        segments_in(&self.kept_directory())
    }

    /// Makes what is in the spool outlive a power failure.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn sync(&self) -> io::Result<()> {
        for spooled in self.waiting()? {
            if let Some(file) = unless_gone(File::open(spooled.path))? {
                file.sync_all()?;
            }
        }
        File::open(&self.directory)?.sync_all()
    }
}

/// Gives a segment's file its name in `directory`.
fn take_in(file: &Path, directory: &Path, key: SegmentKey) -> io::Result<Spooled> {
    let path = directory.join(key.to_string().replace('/', "."));
    fs::rename(file, &path)?;
    Ok(Spooled { key, len_bytes: fs::metadata(&path)?.len(), path })
}

fn segments_in(directory: &Path) -> io::Result<Vec<Spooled>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let key = entry.file_name().to_str().and_then(|name| SegmentKey::parse(&name.replace('.', "/")));
        if let Some(key) = key
            && let Some(found) = unless_gone(entry.metadata())?
        {
            segments.push(Spooled { key, path: entry.path(), len_bytes: found.len() });
        }
    }
    segments.sort_by_key(|spooled| spooled.key);
    Ok(segments)
}

/// Whether an error says that a file's content is gone for good; with others (a permission, too many open files) it could not be read just
/// now.
#[must_use]
pub fn is_lost(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(libc::EIO)
}

/// What was listed a moment ago may be confirmed, and moved, by now.
fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Removes a spooled file. That it is gone already is fine.
///
/// # Errors
/// As the operating system answers.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
