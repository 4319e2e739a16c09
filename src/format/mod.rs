//! What our objects are: keys, segments, snapshots, records. Bytes in, bytes out; no I/O.
