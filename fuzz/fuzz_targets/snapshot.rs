//! Any bytes as a snapshot. The checksum of the footer is mended, so that what stands behind it is reached, too.
#![no_main]

#[allow(dead_code)]
#[path = "../../src/format/mod.rs"]
mod format;

use format::FOOTER_LEN;
use format::snapshot::{SnapshotFooter, check_snapshot_header, decode_extent};
use libfuzzer_sys::fuzz_target;

fn read(bytes: &[u8]) -> Option<()> {
    let footer = SnapshotFooter::decode(bytes, bytes.len() as u64).ok()?;
    check_snapshot_header(bytes, footer.page_size).ok();
    let end = footer.index_offset.checked_add(footer.index_and_sources_len())?;
    let index = footer.decode_index(bytes.get(footer.index_offset as usize..end as usize)?).ok()?;
    for (number, extent) in (0..).zip(&index.extents) {
        let start = extent.offset as usize;
        let compressed = bytes.get(start..start.checked_add(extent.compressed_len as usize)?)?;
        decode_extent(number, extent, compressed, footer.page_size).ok();
    }
    Some(())
}

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let mut mended = bytes.to_vec();
    if let Some(footer) = mended.len().checked_sub(FOOTER_LEN).map(|at| &mut mended[at..]) {
        footer[88..96].copy_from_slice(b"WALTSNPE");
        footer[96..].fill(0);
        let crc32 = crc32fast::hash(&[&footer[..84], b"WALTSNPE"].concat());
        footer[84..88].copy_from_slice(&crc32.to_le_bytes());
        read(&mended);
    }
});
