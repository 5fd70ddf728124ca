//! Sending signals through pidfds.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `PIDFD_SIGNAL_PROCESS_GROUP`, Linux 6.9.
pub(super) const PIDFD_SIGNAL_PROCESS_GROUP: libc::c_uint = 4;

/// `pidfd_send_signal(2)`, for which libc has no wrapper. `false` for ESRCH.
pub(super) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32, flags: libc::c_uint) -> io::Result<bool> {
    // SAFETY: the descriptor is open, the siginfo pointer may be null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            flags,
        )
    };
    is_delivered(if result < 0 { -1 } else { 0 })
}

/// Converts the result of a system call that sends a signal. `false` for ESRCH.
pub(super) fn is_delivered(result: i32) -> io::Result<bool> {
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        error => Err(error),
    }
}
