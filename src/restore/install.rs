//! Giving a restored database its name: never over something that is in use, never half, and what was there is whole until
//! the moment that the new file takes its place.

use std::fs::{self, File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};
use tempfile::{NamedTempFile, TempPath};

use super::RestoreError;
use crate::sqlite::{locks, sidecar};

/// No more links than this lead from one to the next (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// How a restore treats what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Manner {
    /// A database that is there is replaced; an empty file always is.
    pub forces: bool,
    /// And kept under another name.
    pub keeps_old: bool,
    /// What an earlier attempt left is gone on from, and what this one leaves is kept.
    pub resumes: bool,
}

/// A file beside the target that a database is restored into. Removed when it is dropped before it is installed, unless it is to
/// be resumed.
#[derive(Debug)]
pub struct Incoming {
    file: NamedTempFile,
    target: PathBuf,
    manner: Manner,
}

impl Incoming {
    /// Makes the file, after checking that the target may be replaced or is not there ([`is_there`]). A target that is a symbolic link stands
    /// for the file it leads to, as it does for SQLite, also where that is not there yet.
    ///
    /// # Errors
    /// [`RestoreError::TargetExists`] unless it is forced; [`RestoreError::TargetInUse`].
    pub fn create(target: &Path, manner: Manner) -> Result<Self, RestoreError> {
        let mut target = target.to_owned();
        // The file gets no more rights than what is there now has; where nothing is, those that SQLite gives, less the umask.
        let mut mode = 0o644;
        if is_there(&target)? && !manner.forces {
            return Err(RestoreError::TargetExists(target));
        }
        if target.exists() {
            target = fs::canonicalize(&target).map_err(RestoreError::io(&target, "follow"))?;
            check_unused(&target)?;
            mode = 0o600;
        } else {
            target = behind_links(&target);
        }
        let made =
            if manner.resumes { open_partial(&partial_path(&target), mode) } else { make_partial(&target, mode) };
        let file = made.map_err(RestoreError::io(&target, "make a file beside"))?;
        Ok(Self { file, target, manner })
    }

    /// What the target holds now, if it is to be replaced: much of it may be right. Nobody has it open, so there are no locks to
    /// lose when this is closed.
    #[must_use]
    pub fn old(&self) -> Option<File> {
        File::open(&self.target).ok().filter(|_| self.manner.forces)
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// A handle to write by.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn handle(&self) -> Result<File, RestoreError> {
        self.file.as_file().try_clone().map_err(RestoreError::io(&self.target, "open a file beside"))
    }

    /// Puts the file in the target's place. The file is whole and durable. Returns what the user should know.
    ///
    /// # Errors
    /// As at [`Incoming::create`]; then the target holds what it held.
    pub fn install(self) -> Result<Vec<String>, RestoreError> {
        let Self { file, target, manner } = self;
        let mut notes = Vec::new();
        let old = fs::metadata(&target).ok();
        // Before anything is changed: who may not read the directory could not make the new name durable.
        let directory = open_directory(&target)?;
        if let Some(old) = &old {
            if is_taken(old) && !manner.forces {
                return Err(RestoreError::TargetExists(target));
            }
            check_unused(&target)?;
            notes.extend(take_over_rights(&file, old, &target)?);
        } else {
            notes.extend(stranger_note(&file, &target));
        }
        // SQLite takes the WAL beside an empty file for a leftover and deletes it.
        let aside = settle_old(&target, old.as_ref().is_some_and(|old| old.len() > 0))?;
        let kept = if manner.keeps_old && old.is_some() { keep_old(&target).map(Some) } else { Ok(None) };
        let replaced = kept.and_then(|kept| {
            let replaced = replace(file, &target, manner.forces || old.is_some());
            if let (Err(_), Some(kept)) = (&replaced, &kept) {
                // A database with two names has two WALs, as soon as both are opened.
                fs::remove_file(kept).ok();
            }
            replaced.map(|()| kept)
        });
        let kept = match replaced {
            Ok(kept) => kept,
            Err(error) => {
                // The old database is still there, and it needs what stood beside it.
                move_back(&aside)?;
                return Err(error);
            }
        };
        notes.extend(kept.map(|kept| format!("what was there is kept as {}", kept.display())));
        notes.extend(aside.iter().map(Aside::note));
        // The new database is in its place: that is not undone.
        if let Err(error) = directory.sync_all() {
            let (shown, target) = (directory_of(&target).display(), target.display());
            notes.push(format!(
                "{shown} could not be synced ({error}): after a power failure {target} may be what it was"
            ));
        }
        Ok(notes)
    }
}

/// Whether a database is at `path`. An empty file is none: it is what opening a database that is not there leaves. A directory is none
/// either, and nothing to replace; and that it can't be known is not the same as that it is missing.
///
/// # Errors
/// In these two cases.
pub fn is_there(path: &Path) -> Result<bool, RestoreError> {
    let failed = RestoreError::io(path, "restore to");
    match path.metadata() {
        Ok(found) if found.is_dir() => Err(failed(io::ErrorKind::IsADirectory.into())),
        Ok(found) => Ok(is_taken(&found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Devices have no length, and are nothing to replace unasked.
fn is_taken(found: &Metadata) -> bool {
    found.len() > 0 || !found.is_file()
}

/// The path that a chain of links ends at, whether a file is there or not: a link that leads to nothing can't be canonicalized.
fn behind_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(leads_to) => path = directory_of(&path).join(leads_to),
            Err(_) => break,
        }
    }
    path
}

/// What a restore that can be resumed leaves behind: beside the file that is restored, wherever links to it are.
#[must_use]
pub fn partial_path(target: &Path) -> PathBuf {
    let target = behind_links(target);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.waltrail-restore-partial"))
}

fn make_partial(target: &Path, mode: u32) -> io::Result<NamedTempFile> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    tempfile::Builder::new()
        .prefix(&format!(".{name}.waltrail-restore-"))
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory_of(target))
}

/// Opens what an earlier attempt left, or makes it; for this process alone. What another user left, and what is a link or has a second
/// name, which somebody may have made who wants a file of another one written over, is not gone on from.
fn open_partial(path: &Path, mode: u32) -> io::Result<NamedTempFile> {
    let open = || {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(mode).custom_flags(libc::O_NOFOLLOW).open(path)
    };
    let is_plain = |found: &Metadata| found.is_file() && found.nlink() == 1;
    let file = match open() {
        Ok(file) if is_plain(&file.metadata()?) => file,
        Ok(_) | Err(_) if fs::symlink_metadata(path).is_ok_and(|found| !found.is_dir()) => {
            fs::remove_file(path)?;
            open()?
        }
        opened => opened?,
    };
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => {
            io::Error::new(io::ErrorKind::ResourceBusy, format!("another restore writes to {}", path.display()))
        }
        TryLockError::Error(error) => error,
    })?;
    let mut file = NamedTempFile::from_parts(file, TempPath::try_from_path(path)?);
    file.disable_cleanup(true);
    Ok(file)
}

/// A second name for what is there, so that there is no moment without it.
fn keep_old(target: &Path) -> Result<PathBuf, RestoreError> {
    let kept = free_name(target, "")?;
    let failed = RestoreError::io(target, "keep");
    // Not every file system has second names.
    fs::hard_link(target, &kept).or_else(|_| fs::copy(target, &kept).map(drop)).map_err(failed)?;
    Ok(kept)
}

/// Gives the file the mode and owner of what it replaces.
fn take_over_rights(file: &NamedTempFile, old: &Metadata, target: &Path) -> Result<Option<String>, RestoreError> {
    // Before the mode: a change of owner clears bits of it.
    let file = file.as_file();
    let chowned = fchown(file, Some(old.uid()), Some(old.gid()));
    file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))
        .map_err(RestoreError::io(target, "set the permissions of"))?;
    Ok(chowned.err().map(|error| {
        format!(
            "{} belonged to user {} and group {}, which could not be kept ({error}): check that the application may write it",
            target.display(),
            old.uid(),
            old.gid()
        )
    }))
}

/// What to know of a database that is made in another user's directory, as `sudo` does it. A directory of root's is for many.
fn stranger_note(file: &NamedTempFile, target: &Path) -> Option<String> {
    let (made, around) = (file.as_file().metadata().ok()?, fs::metadata(directory_of(target)).ok()?);
    let is_strange = around.uid() != made.uid() && around.uid() != 0;
    is_strange.then(|| {
        format!(
            "{} belongs to user {} now, and the directory it is in to user {}: check that the application may write it",
            target.display(),
            made.uid(),
            around.uid()
        )
    })
}

fn replace(file: NamedTempFile, target: &Path, force: bool) -> Result<(), RestoreError> {
    if !force {
        return take_free_name(file, target);
    }
    // A WAL of the old database beside the new one would be taken for its own.
    for suffix in ["-wal", "-shm", "-journal"] {
        remove_if_there(&sidecar(target, suffix))?;
    }
    file.persist(target).map(drop).map_err(|failed| RestoreError::io(target, "rename to")(failed.error))
}

/// Where no database is, what is beside it is left of one that was deleted. It must not stay: a process that still has that open would
/// share it with those who open the new one. But until the name is taken it may as well belong to who makes a database in this moment,
/// so it goes only then.
fn take_free_name(file: NamedTempFile, target: &Path) -> Result<(), RestoreError> {
    let left = [("WAL", "-wal"), ("index", "-shm"), ("journal", "-journal")];
    let aside = move_aside(target, left.into_iter().filter(|(_, suffix)| sidecar(target, suffix).exists()))?;
    let persisted = file.persist_noclobber(target).map(drop);
    persisted.or_else(|failed| {
        move_back(&aside)?;
        Err(match failed.error.kind() {
            io::ErrorKind::AlreadyExists => RestoreError::TargetExists(target.to_owned()),
            _ => RestoreError::io(target, "rename to")(failed.error),
        })
    })?;
    for Aside { kept, .. } in aside {
        // Under that name it harms nobody.
        fs::remove_file(kept).ok();
    }
    Ok(())
}

fn open_directory(target: &Path) -> Result<File, RestoreError> {
    let directory = directory_of(target);
    File::open(directory).map_err(RestoreError::io(directory, "open"))
}

fn directory_of(target: &Path) -> &Path {
    target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove_if_there(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RestoreError::io(path, "remove")(error)),
        _ => Ok(()),
    }
}

/// Refuses a database that another process has open: every connection in WAL mode holds a lock on it.
fn check_unused(target: &Path) -> Result<(), RestoreError> {
    let file = File::options().read(true).write(true).open(target).map_err(RestoreError::io(target, "open"))?;
    match locks::is_locked_elsewhere(&file).map_err(RestoreError::io(target, "ask for locks on"))? {
        true => Err(RestoreError::TargetInUse(target.to_owned())),
        false => Ok(()),
    }
}

/// A file that stood beside the old database and was given another name.
struct Aside {
    what: &'static str,
    was: PathBuf,
    kept: PathBuf,
}

impl Aside {
    fn note(&self) -> String {
        format!("the old database's {} could not be brought into it and was kept as {}", self.what, self.kept.display())
    }
}

/// Each that can be; the first failure is told. What somebody has made there meanwhile is not written over.
fn move_back(aside: &[Aside]) -> Result<(), RestoreError> {
    let rename = |kept: &Path, was: &Path| match fs::hard_link(kept, was) {
        Ok(()) => fs::remove_file(kept),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        // Not every file system has second names.
        Err(_) => fs::rename(kept, was),
    };
    let back = |Aside { was, kept, .. }: &Aside| rename(kept, was).map_err(RestoreError::io(kept, "move back"));
    aside.iter().map(back).fold(Ok(()), Result::and)
}

/// Brings what stands in the old database's WAL or journal into its main file, so that it loses nothing if we fail from here on.
/// If SQLite can't, or the main file holds nothing or is gone, both are kept under other names.
fn settle_old(target: &Path, has_main: bool) -> Result<Vec<Aside>, RestoreError> {
    let left = || {
        let has_content = |path: &Path| fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() > 0);
        let files = [("WAL", "-wal"), ("journal", "-journal")];
        files.into_iter().filter(move |(_, suffix)| has_content(&sidecar(target, suffix)))
    };
    if left().next().is_none() {
        return Ok(Vec::new());
    }
    let settle = || -> rusqlite::Result<bool> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(target, flags)?;
        // The first read rolls a transaction back that a crash left in the journal.
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        let (is_busy, frames, copied): (i64, i64, i64) =
            connection
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        Ok(is_busy == 0 && frames == copied)
    };
    if has_main && settle().unwrap_or(false) {
        return Ok(Vec::new());
    }
    // SQLite may have worked one of them off before it failed.
    move_aside(target, left())
}

/// Gives these of the files beside `target` other names: all, or none.
fn move_aside(
    target: &Path,
    files: impl Iterator<Item = (&'static str, &'static str)>,
) -> Result<Vec<Aside>, RestoreError> {
    let mut aside = Vec::new();
    for (what, suffix) in files {
        let was = sidecar(target, suffix);
        let moved = free_name(target, suffix)
            .and_then(|kept| fs::rename(&was, &kept).map(|()| kept).map_err(RestoreError::io(&was, "keep")));
        match moved {
            Ok(kept) => aside.push(Aside { what, was, kept }),
            Err(error) => {
                move_back(&aside)?;
                return Err(error);
            }
        }
    }
    Ok(aside)
}

/// What an earlier restore kept is not written over.
fn free_name(target: &Path, suffix: &str) -> Result<PathBuf, RestoreError> {
    let names = (0..1000).map(|number| match number {
        0 => sidecar(target, &format!("{suffix}.before-restore")),
        _ => sidecar(target, &format!("{suffix}.before-restore-{number}")),
    });
    let taken = || RestoreError::io(target, "keep")(io::ErrorKind::AlreadyExists.into());
    names.into_iter().find(|name| fs::symlink_metadata(name).is_err()).ok_or_else(taken)
}
