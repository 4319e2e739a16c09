//! What a restore leaves for the next start beside the restored database: the ledger and a state that names the restored
//! transaction. The start then goes on from there in a new epoch, and uploads nothing but its record.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::snapshots::SnapshotNote;
use super::state::{LocalState, StateDirectory, StateDirectoryError};
use crate::format::Position;
use crate::sqlite::header::{HEADER_LEN, schema_cookie};
use crate::sqlite::live::FileIdentity;

/// What was restored.
#[derive(Debug, Clone)]
pub struct Restored {
    /// The replica's id.
    pub replica: String,
    /// The writer of the epoch of `position`.
    pub writer: String,
    /// The state.
    pub position: Position,
    /// Its time, in milliseconds since 1970.
    pub time_ms: u64,
    /// Page size in bytes.
    pub page_size: u32,
    /// Size of the database in pages.
    pub size_pages: u32,
    /// Its fingerprint.
    pub fingerprint: u64,
    /// The snapshot that the restore began with.
    pub snapshot: SnapshotNote,
}

/// A state directory that waits for the restored database to be in its place.
#[derive(Debug)]
pub struct Handover {
    directory: StateDirectory,
}

impl Handover {
    /// Takes the state directory of a database that is about to be replaced, and makes it forget the old one.
    ///
    /// # Errors
    /// [`StateDirectoryError::Locked`] when a daemon has it.
    pub fn begin(state_dir: &Path) -> Result<Self, StateDirectoryError> {
        let directory = StateDirectory::open(state_dir)?;
        directory.discard().map_err(|source| StateDirectoryError::Io { path: state_dir.to_owned(), source })?;
        Ok(Self { directory })
    }

    /// The database is in its place at `target`, and nobody has opened it: leaves what was restored, with the page hashes in
    /// `hashes` (8 bytes a page, little-endian, page 1 first).
    ///
    /// # Errors
    /// As the operating system answers. Then the next start finds no state, and takes the database as it is.
    pub fn complete(self, restored: &Restored, mut hashes: File, target: &Path) -> io::Result<()> {
        let mut ledger = File::create(self.directory.ledger_path())?;
        io::Seek::rewind(&mut hashes)?;
        io::copy(&mut hashes, &mut ledger)?;
        ledger.set_len(u64::from(restored.size_pages) * 8)?;
        ledger.sync_all()?;
        let mut header = [0; HEADER_LEN];
        File::open(target)?.read_exact_at(&mut header, 0)?;
        let state = LocalState {
            replica: restored.replica.clone(),
            writer: restored.writer.clone(),
            captured: restored.position,
            time_ms: restored.time_ms,
            page_size: restored.page_size,
            size_pages: restored.size_pages,
            schema_cookie: schema_cookie(&header),
            fingerprint: restored.fingerprint,
            wal: None,
            main: FileIdentity::of(target)?,
            whole_in_boot: None,
            snapshot: Some(restored.snapshot),
            is_restored: true,
        };
        self.directory.save(&state, &std::collections::BTreeMap::new(), true)
    }
}
