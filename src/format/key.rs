//! Names of objects below a replica's root. Numbers are fixed-width lower-case hexadecimal, so that the order of names
//! is the order of history, and a listing alone tells which objects a restore needs.

use std::fmt;

/// Key of the object that makes a place a replica.
pub const MARKER_KEY: &str = "waltrail.json";
/// Key of the object that tells when a daemon that has nothing to ship was last there.
pub const PRESENCE_KEY: &str = "presence";
/// Prefix of all epoch records.
pub const EPOCHS_PREFIX: &str = "epochs/";
/// Prefix of all segments.
pub const LOG_PREFIX: &str = "log/";
/// Prefix of all snapshots.
pub const SNAPSHOTS_PREFIX: &str = "snap/";
/// Prefix of all marks.
pub const MARKS_PREFIX: &str = "marks/";
/// No mark's name is longer, in bytes.
const MARK_NAME_LIMIT: usize = 100;

/// Prefix of an epoch's segments.
#[must_use]
pub fn log_prefix(epoch: u32) -> String {
    format!("{LOG_PREFIX}{epoch:08x}/")
}

/// Prefix of an epoch's snapshots.
#[must_use]
pub fn snapshot_prefix(epoch: u32) -> String {
    format!("{SNAPSHOTS_PREFIX}{epoch:08x}/")
}

/// The epoch whose segments or snapshots a folder below [`LOG_PREFIX`] or [`SNAPSHOTS_PREFIX`] holds.
#[must_use]
pub fn epoch_of_folder(name: &str) -> Option<u32> {
    u32::try_from(hex(name, 8)?).ok()
}

/// The epoch of a segment or of a snapshot; `None` when the key is not exactly one of those.
#[must_use]
pub fn epoch_of_object(key: &str) -> Option<u32> {
    let segment = SegmentKey::parse(key).map(|key| key.0.epoch);
    segment.or_else(|| SnapshotKey::parse(key).map(|key| key.epoch))
}

/// A run of transactions of one epoch, and the time of the last one: what the name of a segment tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The epoch.
    pub epoch: u32,
    /// The first transaction.
    pub first_txid: u64,
    /// The last transaction.
    pub last_txid: u64,
    /// Commit time of the last transaction, in milliseconds since 1970.
    pub time_ms: u64,
}

/// Key of a segment: `log/<epoch>/<first txid>-<last txid>-<time>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey(pub Span);

impl SegmentKey {
    /// Reads a key; `None` when it is not exactly one of a segment.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let (epoch, rest) = key.strip_prefix(LOG_PREFIX)?.split_once('/')?;
        let mut parts = rest.split('-');
        let span = Span {
            epoch: u32::try_from(hex(epoch, 8)?).ok()?,
            first_txid: hex(parts.next()?, 16)?,
            last_txid: hex(parts.next()?, 16)?,
            time_ms: hex(parts.next()?, 12)?,
        };
        (parts.next().is_none() && span.first_txid <= span.last_txid).then_some(Self(span))
    }
}

impl fmt::Display for SegmentKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Span { epoch, first_txid, last_txid, time_ms } = self.0;
        write!(out, "{LOG_PREFIX}{epoch:08x}/{first_txid:016x}-{last_txid:016x}-{time_ms:012x}")
    }
}

/// Key of a snapshot: `snap/<epoch>/<txid>-<time>`.
///
/// The name is what is known when the upload begins. Which state the snapshot serves, a later one, is in its footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotKey {
    /// The epoch.
    pub epoch: u32,
    /// The last transaction before it was begun: none of its extents is older, and the segments after it are needed.
    pub txid: u64,
    /// Commit time of that transaction, in milliseconds since 1970.
    pub time_ms: u64,
}

impl SnapshotKey {
    /// Reads a key; `None` when it is not exactly one of a snapshot.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let (epoch, rest) = key.strip_prefix(SNAPSHOTS_PREFIX)?.split_once('/')?;
        let (txid, time_ms) = rest.split_once('-')?;
        Some(Self { epoch: u32::try_from(hex(epoch, 8)?).ok()?, txid: hex(txid, 16)?, time_ms: hex(time_ms, 12)? })
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{SNAPSHOTS_PREFIX}{:08x}/{:016x}-{:012x}", self.epoch, self.txid, self.time_ms)
    }
}

/// Key of an epoch's record, `epochs/<epoch>`, or of a claim to it, `epochs/<epoch>-<writer>`, as they precede the record on a
/// store without conditional puts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EpochKey {
    /// The epoch.
    pub epoch: u32,
    /// The writer's id, 32 hexadecimal digits, where the name holds it.
    pub writer: Option<String>,
}

impl EpochKey {
    /// Reads a key; `None` when it is not exactly one of an epoch record.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let name = key.strip_prefix(EPOCHS_PREFIX)?;
        let (epoch, writer) = name.split_once('-').map_or((name, None), |(epoch, writer)| (epoch, Some(writer)));
        if writer.is_some_and(|writer| !is_hex(writer, 32)) {
            return None;
        }
        Some(Self { epoch: u32::try_from(hex(epoch, 8)?).ok()?, writer: writer.map(str::to_owned) })
    }
}

impl fmt::Display for EpochKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{EPOCHS_PREFIX}{:08x}", self.epoch)?;
        self.writer.as_ref().map_or(Ok(()), |writer| write!(out, "-{writer}"))
    }
}

/// Key of a mark: `marks/<name>`. A name is 1 to 100 characters of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`, and does not begin
/// with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MarkKey {
    name: String,
}

impl MarkKey {
    /// The key of the mark of that name; `None` when it can't be one.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let is_name =
            (1..=MARK_NAME_LIMIT).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_allowed);
        is_name.then(|| Self { name: name.to_owned() })
    }

    /// Reads a key; `None` when it is not exactly one of a mark.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        Self::of(key.strip_prefix(MARKS_PREFIX)?)
    }

    /// The mark's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for MarkKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{MARKS_PREFIX}{}", self.name)
    }
}

fn is_hex(text: &str, width: usize) -> bool {
    text.len() == width && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(text: &str, width: usize) -> Option<u64> {
    is_hex(text, width).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_exact() {
        let span = Span { epoch: 0x1a, first_txid: 5, last_txid: 255, time_ms: 1_790_000_000_000 };
        let key = SegmentKey(span).to_string();
        assert_eq!(key, "log/0000001a/0000000000000005-00000000000000ff-01a0c4506c00");
        assert_eq!(SegmentKey::parse(&key), Some(SegmentKey(span)));
        let snapshot = SnapshotKey { epoch: 2, txid: 7, time_ms: 9 };
        assert_eq!(snapshot.to_string(), "snap/00000002/0000000000000007-000000000009");
        assert_eq!(SnapshotKey::parse(&snapshot.to_string()), Some(snapshot));
        assert_eq!(SnapshotKey::parse(&key), None);
        for wrong in [
            "log/0000001A/0000000000000005-00000000000000ff-01a0c4506c00",
            "log/0000001a/0000000000000005-00000000000000ff-01a0c4506c00-",
            "log/0000001a/0000000000000005-00000000000000ff",
            "log/0000001a/0000000000000100-00000000000000ff-01a0c4506c00",
            "log/1a/0000000000000005-00000000000000ff-01a0c4506c00",
            "snap/0000001a/0000000000000005-00000000000000ff-01a0c4506c00",
            "log/+000001a/0000000000000005-00000000000000ff-01a0c4506c00",
        ] {
            assert_eq!(SegmentKey::parse(wrong), None, "{wrong}");
        }
        let writer = "0123456789abcdef0123456789abcdef";
        for key in ["epochs/0000000a".to_owned(), format!("epochs/0000000a-{writer}")] {
            assert_eq!(EpochKey::parse(&key).unwrap().to_string(), key);
        }
        assert_eq!(EpochKey::parse("epochs/0000000a-0123"), None);
    }

    #[test]
    fn names_of_marks() {
        let longest = "x".repeat(100);
        for name in ["a", "before-2.0_rc", "-", "7", &longest] {
            let key = MarkKey::of(name).unwrap().to_string();
            assert_eq!(MarkKey::parse(&key).unwrap().name(), name);
        }
        let too_long = "x".repeat(101);
        for wrong in ["", ".hidden", "..", "a/b", "a b", "\u{e4}", "a\n", &too_long] {
            assert_eq!(MarkKey::of(wrong), None, "{wrong:?}");
        }
        assert_eq!(MarkKey::parse("mark/a"), None);
    }
}
