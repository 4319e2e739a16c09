//! The ends of objects: what small ranged reads tell of segments and snapshots.

use bytes::Bytes;

use super::RestoreError;
use super::history::Stored;
use crate::format::FOOTER_LEN;
use crate::format::key::{SegmentKey, SnapshotKey};
use crate::format::segment::{SegmentFooter, Table};
use crate::format::snapshot::SnapshotFooter;
use crate::store::SharedStore;

/// What is read of a segment at first, to find its footer and, mostly, its table.
const SEGMENT_TAIL_GUESS: u64 = 32 * 1024;
/// What is read of a snapshot at first, to find its footer and, mostly, its sources: there is room for 97.
const SNAPSHOT_TAIL_GUESS: u64 = 2 * 1024;

/// What a snapshot is of, and the objects that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotTail {
    /// Its footer.
    pub footer: SnapshotFooter,
    /// The snapshot objects that its extents are in, itself first.
    pub sources: Vec<SnapshotKey>,
}

/// Reads a snapshot's footer and sources.
///
/// # Errors
/// When the store fails, or the object is not the snapshot that its name says.
pub async fn read_snapshot_tail(
    store: &SharedStore,
    location: &str,
    stored: &Stored<SnapshotKey>,
) -> Result<SnapshotTail, RestoreError> {
    let bad = || RestoreError::format(location, &stored.key);
    let end = tail(store, location, stored, SNAPSHOT_TAIL_GUESS).await?;
    let footer = SnapshotFooter::decode(&end, stored.len_bytes).map_err(bad())?;
    if footer.info.key != stored.key {
        return Err(RestoreError::damaged(location, &stored.key, &"it is another snapshot"));
    }
    let wanted = footer.sources_and_footer_len();
    let end = if end.len() as u64 >= wanted { end } else { tail(store, location, stored, wanted).await? };
    let sources = footer.decode_sources(&end[..end.len() - FOOTER_LEN]).map_err(bad())?;
    Ok(SnapshotTail { footer, sources })
}

/// Reads a segment's footer and table.
///
/// # Errors
/// When the store fails, or the object is not the segment that its name says.
pub async fn read_table(
    store: &SharedStore,
    location: &str,
    stored: &Stored<SegmentKey>,
) -> Result<(SegmentFooter, Table), RestoreError> {
    let end = tail(store, location, stored, SEGMENT_TAIL_GUESS).await?;
    let footer = SegmentFooter::decode(&end, stored.len_bytes).map_err(RestoreError::format(location, &stored.key))?;
    check_footer(&footer, &stored.key, location)?;
    let wanted = footer.table_len as usize + FOOTER_LEN;
    let table = match end.len().checked_sub(wanted) {
        Some(at) => end.slice(at..at + footer.table_len as usize),
        None => {
            let name = stored.key.to_string();
            let range = store.get_range(&name, footer.table_offset(), footer.table_len).await;
            range.map_err(RestoreError::object(location, &stored.key))?
        }
    };
    let table = footer.decode_table(&table).map_err(RestoreError::format(location, &stored.key))?;
    Ok((footer, table))
}

/// An object under another's name is found out here.
///
/// # Errors
/// [`RestoreError::Damaged`].
pub fn check_footer(footer: &SegmentFooter, key: &SegmentKey, location: &str) -> Result<(), RestoreError> {
    if footer.span == key.0 { Ok(()) } else { Err(RestoreError::damaged(location, key, &"it is another segment")) }
}

/// The last `len_bytes` bytes of an object, or all of a shorter one; never less than a footer.
async fn tail<K: ToString>(
    store: &SharedStore,
    location: &str,
    stored: &Stored<K>,
    len_bytes: u64,
) -> Result<Bytes, RestoreError> {
    let len_bytes = stored.len_bytes.min(len_bytes).max(FOOTER_LEN as u64);
    let Some(offset) = stored.len_bytes.checked_sub(len_bytes) else {
        return Err(RestoreError::damaged(location, &stored.key, &"it is too short"));
    };
    let name = stored.key.to_string();
    store.get_range(&name, offset, len_bytes).await.map_err(RestoreError::object(location, &stored.key))
}
