//! Marks: names for states that are kept for as long as the name is there.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::RetainError;
use crate::clock::format_time;
use crate::format::FORMAT_VERSION;
use crate::format::key::{MARKS_PREFIX, MarkKey};
use crate::format::record::{MarkRecord, RECORD_LIMIT};
use crate::restore::history::History;
use crate::restore::plan::{Plan, Target, plan};
use crate::store::{PutMode, SharedStore, StoreErrorKind};

/// So many are read at a time.
const MARKS_IN_FLIGHT: usize = 8;

/// All marks of a replica, by name.
///
/// # Errors
/// When the store fails, or one can't be read.
pub async fn load_marks(store: &SharedStore) -> Result<Vec<MarkRecord>, RetainError> {
    let listed = store.list(MARKS_PREFIX, None).await?;
    let keys: Vec<MarkKey> = listed.iter().filter_map(|object| MarkKey::parse(&object.key)).collect();
    let read = stream::iter(keys).map(|key| async move { read_mark(store, &key).await }).buffered(MARKS_IN_FLIGHT);
    // One that was deleted since the listing is none.
    read.try_filter_map(|mark| async move { Ok(mark) }).try_collect().await
}

/// The mark of that name.
///
/// # Errors
/// [`RetainError::BadName`], [`RetainError::NoSuchMark`]; when the store fails, or it can't be read.
pub async fn find_mark(store: &SharedStore, name: &str) -> Result<MarkRecord, RetainError> {
    let key = key_of(name)?;
    read_mark(store, &key).await?.ok_or_else(|| no_such_mark(store, name))
}

/// Gives the state that `target` means on the line of `epoch` (of the newest one, if not given) a name. It can be restored: that is checked before the mark is put and, because it
/// may be let go in between, afterwards again.
///
/// # Errors
/// [`RetainError::BadName`], [`RetainError::MarkExists`]; when the state can't be restored, or the store fails.
pub async fn set_mark(
    store: &SharedStore,
    name: &str,
    target: Target,
    epoch: Option<u32>,
    now_ms: u64,
) -> Result<(MarkRecord, Plan), RetainError> {
    let key = key_of(name)?;
    if let Some(mark) = read_mark(store, &key).await? {
        return Err(exists(store, &mark));
    }
    let planned = plan(store, &History::load(store).await?, target, epoch).await?;
    let mark = MarkRecord {
        format: FORMAT_VERSION,
        name: name.to_owned(),
        // Of an epoch's last state the first snapshot may be one of the epoch that continues it: then it is on that one's line alone.
        epoch: planned.position.epoch.max(planned.snapshot.key.epoch),
        txid: planned.position.txid,
        time_ms: planned.time_ms,
        created_ms: now_ms,
        program: concat!("waltrail ", env!("CARGO_PKG_VERSION")).into(),
    };
    put_mark(store, &key, &mark).await?;
    let history = History::load(store).await?;
    match plan(store, &history, Target::Txid(mark.txid), Some(mark.epoch)).await {
        Ok(_) => Ok((mark, planned)),
        Err(gone) => {
            store.delete(&key.to_string()).await?;
            Err(gone.into())
        }
    }
}

/// Takes a mark away; gives what it was.
///
/// # Errors
/// [`RetainError::BadName`], [`RetainError::NoSuchMark`], [`RetainError::NotDeleted`]; when the store fails. A mark that can't
/// be read can be taken away: then there is nothing to give.
pub async fn remove_mark(store: &SharedStore, name: &str) -> Result<Option<MarkRecord>, RetainError> {
    let key = key_of(name)?;
    let mark = match read_mark(store, &key).await {
        Ok(mark) => Some(mark.ok_or_else(|| no_such_mark(store, name))?),
        Err(RetainError::UnreadableMark { .. }) => None,
        Err(error) => return Err(error),
    };
    let key = key.to_string();
    store.delete(&key).await?;
    if store.list(&key, None).await?.iter().any(|object| object.key == key) {
        return Err(RetainError::NotDeleted { location: store.location(), name: name.to_owned() });
    }
    Ok(mark)
}

fn key_of(name: &str) -> Result<MarkKey, RetainError> {
    MarkKey::of(name).ok_or_else(|| RetainError::BadName(name.to_owned()))
}

fn no_such_mark(store: &SharedStore, name: &str) -> RetainError {
    RetainError::NoSuchMark { location: store.location(), name: name.to_owned() }
}

fn exists(store: &SharedStore, mark: &MarkRecord) -> RetainError {
    let created = format_time(mark.created_ms);
    RetainError::MarkExists { location: store.location(), name: mark.name.clone(), created, txid: mark.txid }
}

async fn read_mark(store: &SharedStore, key: &MarkKey) -> Result<Option<MarkRecord>, RetainError> {
    let name = key.to_string();
    let unreadable = |what: String| RetainError::UnreadableMark { location: store.location(), key: name.clone(), what };
    let bytes = match store.get(&name, RECORD_LIMIT).await {
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) if error.kind == StoreErrorKind::WrongSize => return Err(unreadable(error.message)),
        other => other?,
    };
    let mark = MarkRecord::decode(&bytes).map_err(|error| unreadable(error.to_string()))?;
    if mark.name == key.name() { Ok(Some(mark)) } else { Err(unreadable("it is that of another name".into())) }
}

/// Where the store does not know conditions, two marks of one name that are set in the same moment are one: the later.
async fn put_mark(store: &SharedStore, key: &MarkKey, mark: &MarkRecord) -> Result<(), RetainError> {
    let (name, body) = (key.to_string(), Bytes::from(mark.encode()));
    match store.put(&name, body.clone(), PutMode::IfAbsent).await {
        Err(error) if error.kind == StoreErrorKind::NotSupported => {
            store.put(&name, body, PutMode::Overwrite).await?;
        }
        Err(error) if error.kind == StoreErrorKind::AlreadyExists => {
            let other = read_mark(store, key).await?;
            // A put whose answer was lost and that was asked again met itself.
            if other.as_ref() != Some(mark) {
                return Err(exists(store, other.as_ref().unwrap_or(mark)));
            }
        }
        other => other?,
    }
    Ok(())
}
