//! Small objects that are JSON: the replica's marker, epoch records, marks, and the daemon's presence. A field that this program does not know is
//! passed over; a format version that it does not know is refused.

use serde::{Deserialize, Serialize};

use super::{FORMAT_VERSION, FormatError, Position};

/// No JSON object of ours is larger, in bytes.
pub const RECORD_LIMIT: u64 = 64 * 1024;

/// `waltrail.json`: makes a place a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaMarker {
    /// Version of the storage layout.
    pub format: u32,
    /// Random id of the replica, 32 hexadecimal digits: tells it from another one at the same place.
    pub replica: String,
}

/// `epochs/…`: one writer's claim to go on from a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Version of the storage layout.
    pub format: u32,
    /// The epoch that is claimed.
    pub epoch: u32,
    /// Random id of the writer, 32 hexadecimal digits; new at each start.
    pub writer: String,
    /// When it was claimed, in milliseconds since 1970.
    pub claimed_ms: u64,
    /// The parent's transaction plus one, or 1. If the epoch continues its parent, its first transaction; otherwise the
    /// number of the state that was found at the start, which only a snapshot holds.
    pub first_txid: u64,
    /// Whether nothing happened between the parent's state and the first transaction.
    pub continues: bool,
    /// The state that this epoch goes on from, or, if it does not continue, the last one known before.
    pub parent: Option<Position>,
    /// The program that wrote it: `waltrail 0.1.0`.
    pub program: String,
    /// The name of the machine, for people.
    pub host: String,
}

/// `marks/…`: a named state, which is kept for as long as the mark is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkRecord {
    /// Version of the storage layout.
    pub format: u32,
    /// The name, as in the key.
    pub name: String,
    /// The epoch of the state: the mark is about the line that ends there.
    pub epoch: u32,
    /// The transaction after which it was the state.
    pub txid: u64,
    /// Commit time of that transaction, in milliseconds since 1970.
    pub time_ms: u64,
    /// When the mark was set, in milliseconds since 1970.
    pub created_ms: u64,
    /// The program that wrote it: `waltrail 0.1.0`.
    pub program: String,
}

/// `presence`: that a daemon was there, and up to where all was confirmed. The one object that is put again and again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceRecord {
    /// Version of the storage layout.
    pub format: u32,
    /// The epoch that it writes.
    pub epoch: u32,
    /// The writer's id, as in the epoch's record.
    pub writer: String,
    /// The last transaction that was confirmed.
    pub txid: u64,
    /// When it was put, in milliseconds since 1970.
    pub time_ms: u64,
    /// The program that wrote it: `waltrail 0.1.0`.
    pub program: String,
}

impl PresenceRecord {
    /// The last state that was confirmed.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, txid: self.txid }
    }
}

impl MarkRecord {
    /// The state that it names.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, txid: self.txid }
    }
}

/// Records that are right when their fields are.
macro_rules! plain_record {
    ($($record:ty),+) => {$(
        impl $record {
            /// Reads the object.
            ///
            /// # Errors
            /// When it is not such an object, or one of another format version.
            pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
                check_version(bytes)?;
                parse(bytes)
            }

            /// The object's bytes.
            #[must_use]
            pub fn encode(&self) -> Vec<u8> {
                encode(self)
            }
        }
    )+};
}

plain_record!(ReplicaMarker, MarkRecord, PresenceRecord);

impl EpochRecord {
    /// Reads the object.
    ///
    /// # Errors
    /// When it is not such an object, or one of another format version.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        check_version(bytes)?;
        let record: Self = parse(bytes)?;
        let expected_first = record.parent.map_or(Some(1), |parent| parent.txid.checked_add(1));
        if expected_first != Some(record.first_txid) || record.parent.is_some_and(|parent| parent.epoch >= record.epoch)
        {
            return Err(FormatError::Inconsistent("the record does not follow its parent".into()));
        }
        Ok(record)
    }

    /// The number of the epoch's first state: the parent's, or the one that was found.
    #[must_use]
    pub fn start_txid(&self) -> u64 {
        // Decoding refuses a first transaction of 0.
        if self.continues { self.first_txid.saturating_sub(1) } else { self.first_txid }
    }

    /// The object's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    // Structs of numbers and strings: serde_json can't fail on them, and an empty object would be refused when read.
    serde_json::to_vec(record).unwrap_or_default()
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FormatError> {
    serde_json::from_slice(bytes).map_err(|error| FormatError::Inconsistent(format!("it can't be read: {error}")))
}

/// The version is read before the rest, which a newer version may have changed.
fn check_version(bytes: &[u8]) -> Result<(), FormatError> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    match parse::<Version>(bytes)?.format {
        FORMAT_VERSION => Ok(()),
        found => Err(FormatError::UnknownVersion { found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_versions() {
        let record = EpochRecord {
            format: 1,
            epoch: 3,
            writer: "0123456789abcdef0123456789abcdef".into(),
            claimed_ms: 1_790_000_000_000,
            first_txid: 12,
            continues: true,
            parent: Some(Position { epoch: 2, txid: 11 }),
            program: "waltrail 0.1.0".into(),
            host: "web-1".into(),
        };
        assert_eq!(EpochRecord::decode(&record.encode()).unwrap(), record);
        let mark = MarkRecord {
            format: 1,
            name: "before-2.0".into(),
            epoch: 3,
            txid: 12,
            time_ms: 1_790_000_000_000,
            created_ms: 1_790_000_000_001,
            program: "waltrail 0.1.0".into(),
        };
        assert_eq!(MarkRecord::decode(&mark.encode()).unwrap(), mark);
        let presence = PresenceRecord {
            format: 1,
            epoch: 3,
            writer: "0123456789abcdef0123456789abcdef".into(),
            txid: 12,
            time_ms: 1_790_000_000_000,
            program: "waltrail 0.1.0".into(),
        };
        assert_eq!(PresenceRecord::decode(&presence.encode()).unwrap(), presence);
        let newer = br#"{"format":2,"replica":{"id":1}}"#;
        assert_eq!(ReplicaMarker::decode(newer), Err(FormatError::UnknownVersion { found: 2 }));
        let more = br#"{"format":1,"replica":"00","colour":"red"}"#;
        assert_eq!(ReplicaMarker::decode(more).unwrap().replica, "00");
        let orphan = EpochRecord { first_txid: 13, ..record.clone() };
        assert!(EpochRecord::decode(&orphan.encode()).is_err());
        let own_parent = EpochRecord { parent: Some(Position { epoch: 3, txid: 11 }), ..record };
        assert!(EpochRecord::decode(&own_parent.encode()).is_err());
    }
}
