fn main() -> std::process::ExitCode {
    give_memory_back();
    waltrail::cli::main()
}

/// zstd's buffers come and go, tens of megabytes at a time. glibc learns from that to keep such sizes in its heap for good
/// (mallopt(3), "dynamic mmap threshold"); with a fixed threshold it gives them back.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets parameters of the allocator, before there is another thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 512 * 1024);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}
