//! Any bytes as keys and records. What parses as a key must be written back the same.
#![no_main]

#[allow(dead_code)]
#[path = "../../src/format/mod.rs"]
mod format;

use format::key::{EpochKey, MarkKey, SegmentKey, SnapshotKey};
use format::record::{EpochRecord, MarkRecord, PresenceRecord, ReplicaMarker};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = EpochRecord::decode(bytes);
    let _ = ReplicaMarker::decode(bytes);
    let _ = MarkRecord::decode(bytes);
    let _ = PresenceRecord::decode(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(key) = SegmentKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
    if let Some(key) = SnapshotKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
    if let Some(key) = EpochKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
    if let Some(key) = MarkKey::parse(text) {
        assert_eq!(key.to_string(), text);
    }
});
