//! Many databases under one `path`: a pattern like `/data/tenants/*.db`, or a directory with all that is in and below it.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use globset::{Glob, GlobBuilder};
use walkdir::{DirEntry, WalkDir};

use super::DatabaseConfig;
use super::replica_url::ReplicaUrl;
use crate::sqlite::descriptors::read_start;
use crate::sqlite::header::MAGIC;
use crate::store::{SharedStore, StoreError};

/// Begins the part of a path that is a pattern (`{a,b}` is one, too).
const WILDCARDS: [char; 4] = ['*', '?', '[', '{'];
/// Every replica has this folder, and no replica lies so deep.
const EPOCHS: &str = "epochs";
const DEEPEST: usize = 32;
/// What SQLite keeps beside a database.
const SIDECARS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// Databases that come and go, with what is said of all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetConfig {
    /// The directory that all of them are in or below.
    pub root: PathBuf,
    /// Matches their paths, relative to the root.
    glob: Glob,
    /// How far below the root they can be, in names; `None`: anywhere.
    depth: Option<usize>,
    /// What holds for each; its replica is the place that their own ones are below, its state directory likewise.
    template: DatabaseConfig,
    has_state_dir: bool,
    /// Whether its databases have another replica that was named before.
    is_further: bool,
}

/// What was found of a fleet.
#[derive(Debug, Default)]
pub struct Found {
    /// The databases.
    pub databases: Vec<DatabaseConfig>,
    /// Where others may turn up.
    pub directories: BTreeSet<PathBuf>,
    /// What could not be looked at, a sentence each.
    pub troubles: Vec<String>,
    /// Paths that are left out because they lead to a file that is followed by another one.
    pub second_names: BTreeSet<SecondName>,
}

/// A path to a file that is followed by another path: a hard link or a bind mount.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecondName {
    /// The path that is left out.
    pub path: PathBuf,
    /// The path that the file is followed by.
    pub followed: PathBuf,
}

impl FleetConfig {
    /// The fleet that `template.path` names; `Ok(None)` when that is one database's path. `has_state_dir` tells whether the
    /// template's state directory was chosen, `is_further` that the same databases have another replica already.
    ///
    /// # Errors
    /// Why the pattern is none.
    pub fn of(template: &DatabaseConfig, has_state_dir: bool, is_further: bool) -> Result<Option<Self>, String> {
        let Some(text) = template.path.to_str().filter(|_| !template.path.is_file()) else { return Ok(None) };
        let (root, pattern) = match text.find(WILDCARDS) {
            Some(at) => {
                // From the last slash before the first wildcard on it is a pattern.
                let (root, pattern) = text.split_at(text[..at].rfind('/').map_or(0, |slash| slash + 1));
                (PathBuf::from(root), pattern)
            }
            None if text.ends_with('/') || template.path.is_dir() => (template.path.clone(), "**"),
            None => return Ok(None),
        };
        let glob = GlobBuilder::new(pattern).literal_separator(true).build().map_err(|error| error.to_string())?;
        let depth = (!pattern.contains("**")).then(|| pattern.split('/').count());
        let root = root.components().collect();
        Ok(Some(Self { root, glob, depth, template: template.clone(), has_state_dir, is_further }))
    }

    /// What holds for each of its databases.
    #[must_use]
    pub fn template(&self) -> &DatabaseConfig {
        &self.template
    }

    /// The directory that all local state lies in, if one was chosen.
    #[must_use]
    pub fn state_dir(&self) -> Option<&Path> {
        self.has_state_dir.then_some(self.template.state_dir.as_path())
    }

    /// The databases that there are. Those in `followed` are not read: they stay databases while a
    /// copy is written over them.
    #[must_use]
    pub fn find(&self, followed: &HashSet<PathBuf>) -> Found {
        let matcher = self.glob.compile_matcher();
        let mut found = Found::default();
        let depth = self.depth.unwrap_or(usize::MAX);
        let walk = WalkDir::new(&self.root).max_depth(depth).into_iter();
        for entry in walk.filter_entry(|entry| entry.depth() == 0 || self.is_of_interest(entry)) {
            match entry {
                Ok(entry) if entry.file_type().is_dir() => {
                    if entry.depth() < depth {
                        found.directories.insert(entry.into_path());
                    }
                }
                Ok(entry) => {
                    let path = entry.path();
                    let is_meant = path.strip_prefix(&self.root).is_ok_and(|below| matcher.is_match(below));
                    if is_meant && (followed.contains(path) || is_database(path)) {
                        match self.database(path) {
                            Some(database) => found.databases.push(database),
                            None => found.troubles.push(format!("'{}' is no name that can be stored", path.display())),
                        }
                    }
                }
                // What goes while it is looked at is no trouble, and a root that is not there yet is waited for.
                Err(error) if error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound) => {}
                Err(error) => found.troubles.push(error.to_string()),
            }
        }
        if found.directories.is_empty() {
            found.directories.extend(self.root.ancestors().find(|directory| directory.is_dir()).map(PathBuf::from));
        }
        found
    }

    /// Notes durably that the fleet is being restored, until [`FleetConfig::end_restore`]: what is missing then was not deleted.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn begin_restore(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.root)?;
        File::create(self.restore_note())?.sync_all()?;
        File::open(&self.root)?.sync_all()
    }

    /// Whether a restore was begun that has not ended.
    #[must_use]
    pub fn is_being_restored(&self) -> bool {
        self.restore_note().exists()
    }

    /// Every database of the fleet is in its place.
    ///
    /// # Errors
    /// As the operating system answers.
    pub fn end_restore(&self) -> io::Result<()> {
        match std::fs::remove_file(self.restore_note()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn restore_note(&self) -> PathBuf {
        self.root.join(".waltrail-restore-unfinished")
    }

    /// What is hidden is somebody's own business (our state directories, too); links lead to what has another name.
    fn is_of_interest(&self, entry: &DirEntry) -> bool {
        let name = entry.file_name().to_string_lossy();
        let is_kind = entry.file_type().is_dir() || entry.file_type().is_file();
        let is_ours = self.has_state_dir && entry.path() == self.template.state_dir;
        // Of each volume's root, where only root may look.
        let is_ours = is_ours || name == "lost+found";
        is_kind && !is_ours && is_name(&name) && !SIDECARS.iter().any(|suffix| name.ends_with(suffix))
    }

    /// The databases that are stored in the fleet's place, whether they are on this machine or not. Names that the local search leaves
    /// out are left out here, too.
    ///
    /// # Errors
    /// When the place can't be listed.
    pub async fn stored(&self, place: &SharedStore) -> Result<Vec<DatabaseConfig>, StoreError> {
        let mut found = Vec::new();
        let mut folders = vec![String::new()];
        while let Some(prefix) = folders.pop() {
            let names = place.folders(&prefix).await?;
            // A replica has none of its own below it: its database is a file.
            if !prefix.is_empty() && names.iter().any(|name| name == EPOCHS) {
                found.extend(self.database_at(&self.root.join(prefix.trim_end_matches('/'))));
                continue;
            }
            let depth = prefix.matches('/').count();
            if depth < self.depth.unwrap_or(DEEPEST) {
                let (names, strange): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| is_name(name));
                folders.extend(names.iter().map(|name| format!("{prefix}{name}/")));
                for name in strange {
                    let replica = &self.template.replica;
                    tracing::warn!(%replica, folder = format!("{prefix}{name}"), "a name that no database here can have: left out");
                }
            }
        }
        found.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(found)
    }

    /// The configuration of the database at `path`, if it is one of the fleet's, whether it is there or not.
    #[must_use]
    pub fn database_at(&self, path: &Path) -> Option<DatabaseConfig> {
        let below = path.strip_prefix(&self.root).ok()?;
        self.glob.compile_matcher().is_match(below).then(|| self.database(path))?
    }

    /// `None` for a name that is no UTF-8: it can't be an object's.
    fn database(&self, path: &Path) -> Option<DatabaseConfig> {
        let below = path.strip_prefix(&self.root).ok()?;
        let mut database = self.template.clone();
        match &mut database.replica {
            ReplicaUrl::S3(options) => {
                let below = below.to_str()?;
                options.prefix =
                    if options.prefix.is_empty() { below.to_owned() } else { format!("{}/{below}", options.prefix) };
            }
            ReplicaUrl::Directory(directory) => *directory = directory.join(below),
        }
        database.state_dir = match self.has_state_dir {
            true => self.template.state_dir.join(below),
            // Named after the fleet's place, which is the same for all of them.
            false if self.is_further => super::further_state_dir(path, &self.template.replica),
            false => super::default_state_dir(path),
        };
        database.path = path.to_owned();
        Some(database)
    }
}

/// Whether a database, or a directory on the way to it, can be called so. In storage a name can also be `..`, or nothing: what is restored
/// must not leave its directory.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.')
}

/// Whether a file is a database, as its first bytes tell.
fn is_database(path: &Path) -> bool {
    let mut begins = [0; MAGIC.len()];
    read_start(path, &mut begins).is_ok() && &begins == MAGIC
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::store::PutMode;
    use crate::store::memory::MemoryStore;

    fn fleet(path: &Path) -> FleetConfig {
        let template = DatabaseConfig::new(path.to_owned(), "s3://b/fleet".parse().unwrap());
        FleetConfig::of(&template, false, false).unwrap().unwrap()
    }

    fn names(fleet: &FleetConfig, known: &[&Path]) -> Vec<String> {
        let known = known.iter().map(|path| path.to_path_buf()).collect();
        let relative =
            |database: &DatabaseConfig| database.path.strip_prefix(&fleet.root).unwrap().to_string_lossy().into_owned();
        let mut names: Vec<String> = fleet.find(&known).databases.iter().map(relative).collect();
        names.sort();
        names
    }

    fn scene() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for below in ["eu/deep", ".a.db-waltrail"] {
            fs::create_dir_all(directory.path().join(below)).unwrap();
        }
        let database = [MAGIC.as_slice(), &[0; 496]].concat();
        for name in ["a.db", "b.db", "b.db-wal", ".hidden.db", "eu/c.db", "eu/deep/d.sqlite", ".a.db-waltrail/e.db"] {
            fs::write(directory.path().join(name), &database).unwrap();
        }
        fs::write(directory.path().join("empty.db"), b"").unwrap();
        fs::write(directory.path().join("other.db"), b"something else that is long enough").unwrap();
        std::os::unix::fs::symlink(directory.path().join("a.db"), directory.path().join("link.db")).unwrap();
        directory
    }

    #[test]
    fn a_pattern_finds_its_databases() {
        let directory = scene();
        let of = |pattern: &str| names(&fleet(&directory.path().join(pattern)), &[]);
        assert_eq!(of("*.db"), ["a.db", "b.db"]);
        assert_eq!(of("*/*.db"), ["eu/c.db"]);
        assert_eq!(of("**/*.db"), ["a.db", "b.db", "eu/c.db"]);
        assert_eq!(of("{a,eu/c}.db"), ["a.db", "eu/c.db"]);
        assert_eq!(of(""), ["a.db", "b.db", "eu/c.db", "eu/deep/d.sqlite"]);
        let known = directory.path().join("other.db");
        assert_eq!(names(&fleet(&directory.path().join("*.db")), &[&known]), ["a.db", "b.db", "other.db"]);
    }

    #[test]
    fn each_has_a_place_of_its_own() {
        let directory = scene();
        let fleet = fleet(&directory.path().join("**/*.db"));
        let path = directory.path().join("eu/c.db");
        let database = fleet.database_at(&path).unwrap();
        assert_eq!(database.replica.to_string(), "s3://b/fleet/eu/c.db");
        assert_eq!(database.state_dir, directory.path().join("eu/.c.db-waltrail"));
        assert_eq!(fleet.database_at(&directory.path().join("x.txt")), None);
        assert_eq!(fleet.database_at(Path::new("/elsewhere/x.db")), None);
        assert_eq!(fleet.find(&HashSet::new()).directories.len(), 3, "the root, eu and eu/deep");
    }

    #[test]
    fn a_root_that_is_not_there_is_waited_for() {
        let directory = scene();
        let found = fleet(&directory.path().join("later/below/*.db")).find(&HashSet::new());
        assert!(found.databases.is_empty() && found.troubles.is_empty());
        assert_eq!(found.directories.into_iter().collect::<Vec<_>>(), [directory.path()]);
    }

    #[tokio::test]
    async fn what_is_stored_stays_below_the_root() {
        let place: SharedStore = Arc::new(MemoryStore::new());
        for below in ["a.db", "eu/c.db", "../../etc/x.db", "./x.db", "/etc/x.db", "eu//x.db", ".hidden/x.db", ".x.db"] {
            let key = format!("{below}/epochs/00000001");
            place.put(&key, Bytes::new(), PutMode::IfAbsent).await.unwrap();
        }
        let found = fleet(Path::new("/data/**/*.db")).stored(&place).await.unwrap();
        let paths: Vec<&str> = found.iter().map(|database| database.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/data/a.db", "/data/eu/c.db"]);
    }

    #[test]
    fn one_database_is_no_fleet() {
        let directory = scene();
        let template = DatabaseConfig::new(directory.path().join("a.db"), "s3://b/a".parse().unwrap());
        assert_eq!(FleetConfig::of(&template, false, false), Ok(None));
        let broken = DatabaseConfig::new("/data/[a.db".into(), "s3://b/a".parse().unwrap());
        assert!(FleetConfig::of(&broken, false, false).is_err());
    }
}
