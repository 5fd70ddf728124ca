//! The system calls of the tests.

/// Ignores SIGCHLD in this process: the kernel discards the exit statuses of its children.
pub(crate) fn ignore_children() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}
