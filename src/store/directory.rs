//! Objects as files of a directory. A file gets its name only when it is whole and on the disk.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;

use tracing::instrument;

use super::{ObjectInfo, ObjectStore, PartTag, PutMode, StoreError, StoreErrorKind};
use crate::clock::{Clock, SystemClock};

/// Where files stand until they are whole. Never listed.
const INCOMING: &str = ".incoming";
/// A file there that nobody has written to for so long was left by a process that was killed.
const LEFTOVER_AGE_MS: u64 = 24 * 60 * 60 * 1000;

/// A store in a directory.
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    root: PathBuf,
    /// Whether the root has been there: one that goes away (a disk that is unmounted) is not made again.
    was_there: Arc<AtomicBool>,
    /// Leftovers are looked for once.
    cleaned: Arc<Once>,
}

impl DirectoryStore {
    /// The store below `root`, which the first put makes if it is not there.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root, was_there: Arc::default(), cleaned: Arc::new(Once::new()) }
    }

    /// Runs file work on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        work: impl FnOnce(&Self, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (store, name) = (self.clone(), key.to_owned());
        let done = tokio::task::spawn_blocking(move || work(&store, &name)).await;
        done.unwrap_or_else(|panicked| Err(io::Error::other(panicked))).map_err(|error| StoreError {
            kind: kind_of(&error),
            operation,
            location: self.location(),
            key: key.to_owned(),
            message: error.to_string(),
        })
    }

    fn path(&self, key: &str) -> io::Result<PathBuf> {
        let is_plain = key.split('/').all(|part| !matches!(part, "" | "." | ".."));
        let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "the key is not a plain relative path");
        if is_plain { Ok(self.root.join(key)) } else { Err(wrong()) }
    }

    /// A missing root is another thing than a missing object: the disk may not be mounted.
    fn check_root(&self) -> io::Result<()> {
        match fs::metadata(&self.root) {
            Ok(found) if found.is_dir() => {
                self.was_there.store(true, Ordering::Relaxed);
                Ok(())
            }
            Ok(_) => Err(io::Error::new(io::ErrorKind::NotADirectory, "the replica's path is not a directory")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(io::Error::new(io::ErrorKind::NotADirectory, "the replica's directory is not there"))
            }
            Err(error) => Err(error),
        }
    }

    fn open(&self, key: &str) -> io::Result<File> {
        self.check_root()?;
        File::open(self.path(key)?)
    }

    /// A new file that is not visible under any key.
    fn incoming(&self) -> io::Result<tempfile::NamedTempFile> {
        if self.was_there.load(Ordering::Relaxed) {
            self.check_root()?;
        }
        let incoming = self.root.join(INCOMING);
        create_directories(&incoming)?;
        self.check_root()?;
        self.cleaned.call_once(|| remove_leftovers(&incoming));
        tempfile::Builder::new().prefix("put-").tempfile_in(incoming)
    }

    /// Gives a whole file its name, durably.
    fn publish(&self, file: tempfile::NamedTempFile, key: &str, mode: PutMode) -> io::Result<()> {
        let path = self.path(key)?;
        file.as_file().sync_all()?;
        let parent = path.parent().unwrap_or(&self.root);
        create_directories(parent)?;
        match mode {
            PutMode::Overwrite => file.persist(&path).map_err(|failed| failed.error)?,
            PutMode::IfAbsent => file.persist_noclobber(&path).map_err(|failed| failed.error)?,
        };
        sync_directory(parent)
    }

    fn upload_path(&self, upload_id: &str) -> io::Result<PathBuf> {
        self.path(&format!("{INCOMING}/{upload_id}"))
    }
}

fn kind_of(error: &io::Error) -> StoreErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => StoreErrorKind::NotFound,
        io::ErrorKind::NotADirectory => StoreErrorKind::NoSuchBucket,
        io::ErrorKind::AlreadyExists => StoreErrorKind::AlreadyExists,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => StoreErrorKind::Denied,
        io::ErrorKind::UnexpectedEof | io::ErrorKind::FileTooLarge => StoreErrorKind::WrongSize,
        io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => StoreErrorKind::Other,
        // A full disk can be emptied, a network file system can come back.
        _ => StoreErrorKind::Unavailable,
    }
}

/// Frees what killed processes left. Best effort: a leftover takes room and nothing else.
fn remove_leftovers(incoming: &Path) {
    let now_ms = SystemClock::new().now_ms();
    for entry in fs::read_dir(incoming).into_iter().flatten().flatten() {
        let written_ms = entry.metadata().map_or(u64::MAX, |metadata| modified_ms(&metadata));
        if written_ms.saturating_add(LEFTOVER_AGE_MS) < now_ms {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// When a file was written to for the last time, in milliseconds since 1970; "just now" where the file system does not say.
fn modified_ms(metadata: &fs::Metadata) -> u64 {
    let since_1970 = metadata.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    since_1970.map_or(u64::MAX, |since| since.as_millis() as u64)
}

/// Makes `path` and what is missing above it, each one's name durable.
fn create_directories(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    create_directories(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_directory(parent),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn list_below(directory: &Path, key_prefix: &str, found: &mut Vec<ObjectInfo>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let key = format!("{key_prefix}{name}");
        let metadata = match entry.metadata() {
            // Deleted while we were listing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if metadata.is_dir() {
            if key != INCOMING {
                list_below(&entry.path(), &format!("{key}/"), found)?;
            }
        } else {
            found.push(ObjectInfo { key, len_bytes: metadata.len(), stored_ms: modified_ms(&metadata) });
        }
    }
    Ok(())
}

#[async_trait]
impl ObjectStore for DirectoryStore {
    fn location(&self) -> String {
        format!("file://{}", self.root.display())
    }

    #[instrument(level = "trace", skip(self, body), fields(body_bytes = body.len()))]
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<(), StoreError> {
        self.blocking("put", key, move |store, key| {
            let mut file = store.incoming()?;
            file.write_all(&body)?;
            store.publish(file, key, mode)
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.blocking("get", key, move |store, key| {
            let file = store.open(key)?;
            let len_bytes = file.metadata()?.len();
            if len_bytes > limit_bytes {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the object is larger than it may be"));
            }
            let mut body = vec![0; len_bytes as usize];
            (&file).read_exact(&mut body)?;
            Ok(body.into())
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn get_range(&self, key: &str, offset: u64, len_bytes: u64) -> Result<Bytes, StoreError> {
        self.blocking("get", key, move |store, key| {
            let file = store.open(key)?;
            let object_len = file.metadata()?.len();
            if offset.checked_add(len_bytes).is_none_or(|end| end > object_len) {
                let message = "the object ends before the bytes asked for";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            let mut body = vec![0; len_bytes as usize];
            file.read_exact_at(&mut body, offset)?;
            Ok(body.into())
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StoreError> {
        let start_after = start_after.map(str::to_owned);
        self.blocking("list", prefix, move |store, prefix| {
            store.check_root()?;
            // Only the folder that the prefix names can hold such keys.
            let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
            let (directory, key_prefix) = match folder {
                "" => (store.root.clone(), String::new()),
                folder => (store.path(folder)?, format!("{folder}/")),
            };
            let mut found = Vec::new();
            list_below(&directory, &key_prefix, &mut found)?;
            found.retain(|object| {
                object.key.starts_with(prefix) && start_after.as_ref().is_none_or(|after| object.key > *after)
            });
            found.sort_by(|left, right| left.key.cmp(&right.key));
            Ok(found)
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.blocking("list", prefix, move |store, prefix| {
            store.check_root()?;
            let directory = match prefix.strip_suffix('/') {
                None => store.root.clone(),
                Some(folder) => store.path(folder)?,
            };
            let mut found = Vec::new();
            let entries = match fs::read_dir(directory) {
                // As in a bucket, where there are no folders.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
                other => other?,
            };
            for entry in entries {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_dir() && name != INCOMING {
                    found.push(name);
                }
            }
            found.sort();
            Ok(found)
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.blocking("delete", key, |store, key| {
            store.check_root()?;
            match fs::remove_file(store.path(key)?) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn create_multipart(&self, key: &str) -> Result<String, StoreError> {
        self.blocking("begin an upload of", key, |store, _| {
            let (_, path) = store.incoming()?.keep().map_err(|failed| failed.error)?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            name.ok_or_else(|| io::Error::other("a temporary file has no name"))
        })
        .await
    }

    #[instrument(level = "trace", skip(self, body), fields(body_bytes = body.len()))]
    async fn put_part(
        &self,
        key: &str,
        upload_id: &str,
        number: u32,
        offset: u64,
        body: Bytes,
    ) -> Result<PartTag, StoreError> {
        let upload_id = upload_id.to_owned();
        self.blocking("put part of", key, move |store, _| {
            let mut file = File::options().write(true).open(store.upload_path(&upload_id)?)?;
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(&body)?;
            Ok(PartTag { number, tag: String::new(), len_bytes: body.len() as u64 })
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn complete_multipart(&self, key: &str, upload_id: &str, _parts: &[PartTag]) -> Result<(), StoreError> {
        let upload_id = upload_id.to_owned();
        self.blocking("complete", key, move |store, key| {
            // By hand and not as a temporary file, which a failure would delete: completing is asked for again then.
            let (incoming, path) = (store.upload_path(&upload_id)?, store.path(key)?);
            File::options().write(true).open(&incoming)?.sync_all()?;
            let parent = path.parent().unwrap_or(&store.root);
            create_directories(parent)?;
            fs::rename(&incoming, &path)?;
            sync_directory(parent)
        })
        .await
    }

    #[instrument(level = "trace", skip(self))]
    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        let upload_id = upload_id.to_owned();
        self.blocking("give up the upload of", key, move |store, _| {
            match fs::remove_file(store.upload_path(&upload_id)?) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
        .await
    }
}
