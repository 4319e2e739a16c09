//! Following a live database and shipping every transaction: capture, ledger, spool, epochs, snapshots.
