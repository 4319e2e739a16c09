//! The history of a replica, the plan of a restore (a value), and its execution.
