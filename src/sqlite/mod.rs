//! What SQLite's files are: database header, WAL, wal-index, locks. Knows nothing of storage.
