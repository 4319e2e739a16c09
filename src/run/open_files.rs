//! How many files may be open: many for us, as many as before for the application.

use std::io;

/// What was allowed before; `None` when that is not known, or has not been changed.
pub type Before = Option<libc::rlimit>;

/// Shells and service managers allow 1,024 open files at first, for the sake of programs of another age (systemd.exec(5), "Process
/// properties"); a process may allow itself more.
pub fn allow_many() -> Before {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a value of the right type, which lives for the call.
    let is_known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut before) } == 0;
    let many = libc::rlimit { rlim_cur: before.rlim_max, ..before };
    // SAFETY: as above.
    if !is_known || unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const many) } != 0 {
        tracing::warn!("the number of open files stays limited: {}", io::Error::last_os_error());
        return None;
    }
    Some(before)
}

/// Allows this process what was allowed before: programs that use select(2) break with descriptors of 1,024 and more. Makes a
/// system call and nothing else, so it may be done between fork and exec.
pub fn allow_as(before: &libc::rlimit) {
    // SAFETY: the pointer is to a value of the right type, which lives for the call. Less than the hard limit is always allowed.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, before) };
}
