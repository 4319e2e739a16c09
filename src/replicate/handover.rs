//! What a restore leaves for the next start beside the restored database: the ledger and a state that names the restored
//! transaction. The start then goes on from there in a new epoch, and uploads nothing but its record.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use super::snapshots::SnapshotNote;
use super::spool;
use super::state::{LocalState, StateDirectory, StateDirectoryError};
use crate::clock::Clock;
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

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    fn of(found: &Metadata) -> Self {
        Self { uid: found.uid(), gid: found.gid() }
    }
}

/// A state directory that waits for the restored database to be in its place. What a restore leaves in it is for the daemon, which may run
/// as another user than the restore (`sudo waltrail restore`).
#[derive(Debug)]
pub struct Handover {
    directory: StateDirectory,
    /// Directories that were made for it, the outermost first; none if it was there.
    made: Vec<PathBuf>,
    /// Who made them.
    maker_uid: u32,
    /// Whose the state directory was; where it was made, whose the directory is that it was made in.
    owner: Owner,
}

impl Handover {
    /// Takes the state directory of a database that is about to be replaced, and makes it forget the old one.
    ///
    /// # Errors
    /// [`StateDirectoryError::Locked`] when a daemon has it.
    pub fn begin(state_dir: &Path) -> Result<Self, StateDirectoryError> {
        let failed = |source| StateDirectoryError::Io { path: state_dir.to_owned(), source };
        let (made, owner) = look_around(state_dir).map_err(failed)?;
        let directory = StateDirectory::open(state_dir)?;
        let maker_uid = fs::metadata(state_dir).map_err(failed)?.uid();
        let handover = Self { directory, made, maker_uid, owner };
        // The directory stays, also if the restore fails from here on. Otherwise this is done again at the end, and told of.
        handover.give_to(owner).ok();
        handover.directory.discard().map_err(failed)?;
        Ok(handover)
    }

    /// The database is in its place at `target`, and nobody has opened it: leaves what was restored, with the page hashes in
    /// `hashes` (8 bytes a page, little-endian, page 1 first). Returns what the user should know.
    ///
    /// # Errors
    /// As the operating system answers. Then the next start finds no state, and takes the database as it is.
    pub fn complete(
        self,
        restored: &Restored,
        hashes: File,
        target: &Path,
        clock: &dyn Clock,
    ) -> io::Result<Option<String>> {
        let left = self.leave(restored, hashes, target, clock.boot_id());
        let owner = self.owner_beside(&fs::metadata(target)?);
        let given = self.give_to(owner);
        left?;
        let (shown, Owner { uid, gid }) = (self.directory.path().display(), owner);
        Ok(given.err().map(|error| {
            format!(
                "{shown} could not be given to user {uid} and group {gid} ({error}): check that the daemon may write it"
            )
        }))
    }

    fn leave(&self, restored: &Restored, mut hashes: File, target: &Path, boot_id: Option<String>) -> io::Result<()> {
        // Anew: the directory may be somebody else's, and what is called so there may be a link to anything.
        spool::remove(&self.directory.ledger_path())?;
        let ledger = File::options().write(true).create_new(true).mode(0o600).open(self.directory.ledger_path());
        let mut ledger = ledger?;
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
            wal_inode: None,
            main: FileIdentity::of(target)?,
            boot_id,
            is_main_complete: false,
            snapshot: Some(restored.snapshot),
            is_restored: true,
        };
        self.directory.save(&state, &std::collections::BTreeMap::new(), true)
    }

    /// Whose the state directory should be. One that was made follows the database; but a database that the restoring user has made, too, tells
    /// nothing of who is to use it.
    fn owner_beside(&self, database: &Metadata) -> Owner {
        let tells = !self.made.is_empty() && database.uid() != self.maker_uid;
        if tells { Owner::of(database) } else { self.owner }
    }

    /// Gives everything that a restore makes to `owner`. Fails with the first that can't be given, after trying all.
    fn give_to(&self, owner: Owner) -> io::Result<()> {
        // A directory of root's is for many (/tmp, a container's /data), and tells nothing of whom the database is for.
        if owner.uid == 0 {
            return Ok(());
        }
        // Below a directory that is open: who owns it could put a link in a name's place meanwhile.
        let directory = open_directory(self.directory.path())?;
        let spool = open_directory(&below(&directory, "spool"))?;
        let files = ["lock", "ledger", "state", "spool"].map(|name| below(&directory, name));
        let all = files.into_iter().chain([below(&spool, "kept")]).chain(self.made.iter().rev().cloned());
        all.map(|path| give(&path, owner)).fold(Ok(()), Result::and)
    }
}

/// The directories that are to be made for `state_dir`, and whose it is; or, where it is not there, whose the directory around it is.
fn look_around(state_dir: &Path) -> io::Result<(Vec<PathBuf>, Owner)> {
    let state_dir = std::path::absolute(state_dir)?;
    let mut missing = Vec::new();
    for directory in state_dir.ancestors() {
        match fs::metadata(directory) {
            Ok(found) => {
                missing.reverse();
                return Ok((missing, Owner::of(&found)));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(directory.to_owned()),
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn open_directory(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY).open(path)
}

/// A name in a directory that is open, whatever is done to the path that it was opened by (proc(5)).
fn below(directory: &File, name: &str) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

/// Gives a file or directory to `owner`, if it is there. Who may write to the directory around it could have put a link to some other file
/// there, or a second name of it: these are left alone.
fn give(path: &Path, owner: Owner) -> io::Result<()> {
    let file = match File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let found = file.metadata()?;
    let is_ours = found.is_dir() || (found.is_file() && found.nlink() == 1);
    // Nobody but the user has any rights: which group it is does not matter.
    if !is_ours || found.uid() == owner.uid {
        return Ok(());
    }
    fchown(&file, Some(owner.uid), Some(owner.gid))
}
