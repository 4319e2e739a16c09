//! The part of a restore that writes the snapshot's extents: from what is on the local disk already where it has the right content,
//! otherwise from the objects they are in, neighbours with one request.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt};

use super::RestoreError;
use super::execute::Execution;
use super::image::Image;
use crate::format::snapshot::{
    ExtentRecord, SnapshotFooter, SnapshotIndex, check_snapshot_header, content_hash, decode_extent,
};
use crate::format::{HEADER_LEN, extent_pages};
use crate::store::SharedStore;

/// Neighbouring extents are fetched together up to this many bytes. Stores charge for requests, and each begins with a wait.
const BATCH_LEN: u64 = 12 << 20;
/// Extents that lie no further apart are fetched together: bytes that nobody wants cost less than another request.
const GAP_LEN: u64 = 256 << 10;
/// So many batches are fetched, decoded and written at a time.
const BATCHES_IN_FLIGHT: usize = 4;

/// An extent and its number.
pub(crate) type Numbered = (u32, ExtentRecord);

/// Reads a snapshot's header and index.
///
/// # Errors
/// When the store fails, or one of the two is damaged.
pub(crate) async fn read_index(
    store: &SharedStore,
    location: &str,
    footer: &SnapshotFooter,
) -> Result<SnapshotIndex, RestoreError> {
    let key = &footer.info.key;
    let header = store.get_range(&key.to_string(), 0, HEADER_LEN as u64).await;
    let header = header.map_err(RestoreError::object(location, key))?;
    check_snapshot_header(&header, footer.page_size).map_err(RestoreError::format(location, key))?;
    let blocks = store.get_range(&key.to_string(), footer.index_offset, footer.index_and_sources_len()).await;
    let blocks = blocks.map_err(RestoreError::object(location, key))?;
    footer.decode_index(&blocks).map_err(RestoreError::format(location, key))
}

/// The extents that an earlier attempt left in the file: asked before anything is written to it.
pub(super) async fn kept(execution: &Arc<Execution>, index: &SnapshotIndex) -> Result<Vec<u32>, RestoreError> {
    let extents: Vec<Numbered> = (0..).zip(index.extents.iter().copied()).collect();
    let is_kept = |execution: &Execution, (number, extent): &Numbered| {
        let first_page = first_page(*number, &execution.image);
        let content = execution.image.read_extent(first_page, extent.page_count);
        content.is_some_and(|content| is_content(*number, extent, &content, &execution.image))
    };
    let look = move |execution: &Execution, part: &[Numbered]| {
        let kept = part.iter().filter(|extent| is_kept(execution, extent));
        Ok(kept.map(|(number, _)| *number).collect::<Vec<u32>>())
    };
    Ok(execution.in_parallel(&extents, look).await?.concat())
}

fn first_page(number: u32, image: &Image) -> u32 {
    extent_pages(number, u32::MAX, image.page_size).0
}

fn is_content(number: u32, extent: &ExtentRecord, content: &[u8], image: &Image) -> bool {
    content_hash(number, content, image.page_size) == extent.content_hash
}

/// Writes all extents of which anything is in the restored database. `kept` are the numbers, ascending, of those that the file holds. Gives the
/// bytes of the database that were not fetched.
pub(super) async fn apply(
    execution: &Arc<Execution>,
    index: &SnapshotIndex,
    kept: &[u32],
    old: Option<File>,
) -> Result<u64, RestoreError> {
    let image = &execution.image;
    let is_wanted = |&(number, _): &Numbered| first_page(number, image) <= image.size_pages;
    let wanted: Vec<Numbered> = (0..).zip(index.extents.iter().copied()).filter(is_wanted).collect();
    let (here, missing): (Vec<Numbered>, Vec<Numbered>) =
        wanted.into_iter().partition(|(number, _)| kept.binary_search(number).is_ok());
    let mut reused_bytes: u64 = execution.in_parallel(&here, keep).await?.iter().sum();
    let missing = match old {
        Some(old) => {
            let old = Arc::new(old);
            let copy = move |execution: &Execution, part: &[Numbered]| copy(execution, &old, part);
            let (copied, missing): (Vec<u64>, Vec<Vec<Numbered>>) =
                execution.in_parallel(&missing, copy).await?.into_iter().unzip();
            reused_bytes += copied.iter().sum::<u64>();
            missing.concat()
        }
        None => missing,
    };
    let fetched = stream::iter(batches(missing)).map(|batch| fetch(execution, index, batch));
    let mut fetched = fetched.buffer_unordered(BATCHES_IN_FLIGHT);
    while let Some(done) = fetched.next().await {
        done?;
    }
    Ok(reused_bytes)
}

/// Takes extents that the file holds for written.
fn keep(execution: &Execution, extents: &[Numbered]) -> Result<u64, RestoreError> {
    let mut len_bytes = 0;
    for (number, extent) in extents {
        let first_page = first_page(*number, &execution.image);
        if let Some(content) = execution.image.read_extent(first_page, extent.page_count) {
            execution.image.keep_extent(first_page, &content)?;
            len_bytes += content.len() as u64;
        }
    }
    Ok(len_bytes)
}

/// Copies extents that an old file holds; gives their bytes, and those extents that it does not hold.
fn copy(execution: &Execution, old: &File, extents: &[Numbered]) -> Result<(u64, Vec<Numbered>), RestoreError> {
    let image = &execution.image;
    let (mut len_bytes, mut missing) = (0, Vec::new());
    for &(number, extent) in extents {
        let first_page = first_page(number, image);
        let mut content = vec![0; extent.page_count as usize * image.page_size as usize];
        let at = u64::from(first_page - 1) * u64::from(image.page_size);
        // A file that can't be read has nothing for us.
        let is_read = old.read_exact_at(&mut content, at).is_ok();
        if is_read && is_content(number, &extent, &content, image) {
            image.write_extent(first_page, &content)?;
            len_bytes += content.len() as u64;
        } else {
            missing.push((number, extent));
        }
    }
    Ok((len_bytes, missing))
}

/// Extents that one request fetches.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Number of the object in the index's list of sources.
    pub(crate) source: u32,
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    pub(crate) extents: Vec<Numbered>,
}

/// Neighbours in an object together, in whatever order they lie there.
pub(crate) fn batches(mut extents: Vec<Numbered>) -> Vec<Batch> {
    extents.sort_by_key(|(_, extent)| (extent.source, extent.offset));
    let mut batches: Vec<Batch> = Vec::new();
    for (number, extent) in extents {
        let end = extent.offset + u64::from(extent.compressed_len);
        match batches.last_mut() {
            Some(batch)
                if batch.source == extent.source
                    && extent.offset - (batch.offset + batch.len_bytes).min(extent.offset) <= GAP_LEN
                    && end - batch.offset <= BATCH_LEN =>
            {
                batch.len_bytes = batch.len_bytes.max(end - batch.offset);
                batch.extents.push((number, extent));
            }
            _ => batches.push(Batch {
                source: extent.source,
                offset: extent.offset,
                len_bytes: end - extent.offset,
                extents: vec![(number, extent)],
            }),
        }
    }
    batches
}

async fn fetch(execution: &Arc<Execution>, index: &SnapshotIndex, batch: Batch) -> Result<(), RestoreError> {
    let key = index.sources[batch.source as usize];
    let range = execution.store.get_range(&key.to_string(), batch.offset, batch.len_bytes).await;
    let bytes = range.map_err(RestoreError::object(&execution.plan.location, &key))?;
    let write = move |execution: &Execution| {
        let image = &execution.image;
        for (number, extent) in &batch.extents {
            let at = (extent.offset - batch.offset) as usize;
            let compressed = &bytes[at..at + extent.compressed_len as usize];
            let content = decode_extent(*number, extent, compressed, image.page_size);
            let content = content.map_err(RestoreError::format(&execution.plan.location, &key))?;
            image.write_extent(first_page(*number, image), &content)?;
        }
        Ok(())
    };
    execution.blocking(write).await
}
