//! Any bytes as a segment. The checksum of the footer is mended, so that what stands behind it is reached, too.
#![no_main]

#[allow(dead_code)]
#[path = "../../src/format/mod.rs"]
mod format;

use format::FOOTER_LEN;
use format::segment::Segment;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut page = [0; 4096];
    let _ = Segment::decode(bytes, |_, _, content| drop(content.apply_to(&mut page)));
    let mut mended = bytes.to_vec();
    if let Some(footer) = mended.len().checked_sub(FOOTER_LEN).map(|at| &mut mended[at..]) {
        footer[88..96].copy_from_slice(b"WALTSEGE");
        footer[96..].fill(0);
        let crc32 = crc32fast::hash(&[&footer[..84], b"WALTSEGE"].concat());
        footer[84..88].copy_from_slice(&crc32.to_le_bytes());
        let _ = Segment::decode(&mended, |_, _, content| drop(content.apply_to(&mut page)));
    }
});
