//! Collecting exit statuses: `waitid(2)` with the kernel's resource accounting.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Exited(u8),
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: i32,
        /// Whether a core was dumped.
        core_dumped: bool,
    },
    /// Another process or thread collected the status, or `SIGCHLD` is ignored in this process.
    Unknown,
}

impl ExitStatus {
    /// Exit code 0.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == Self::Exited(0)
    }
}

/// For people: "exited with code 3", "was killed by signal 9", "ended".
impl fmt::Display for ExitStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exited with code {code}"),
            Self::Signalled { signal, .. } => write!(formatter, "was killed by signal {signal}"),
            Self::Unknown => write!(formatter, "ended"),
        }
    }
}

/// Resource usage of a process over its lifetime, from the kernel's accounting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time on a CPU in user mode.
    pub user_time: Duration,
    /// Time on a CPU in the kernel.
    pub system_time: Duration,
    /// Peak resident memory in bytes.
    pub max_rss_bytes: u64,
}

/// Whether reading a status also reaps the zombie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collect {
    /// Leave the zombie (`WNOWAIT`): its pid cannot be reused, and another thread can still collect the status.
    Observe,
    /// Reap it.
    Reap,
}

/// Whether to wait for the exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Wait until the process ends.
    Yes,
    /// Return immediately.
    No,
}

/// Maximum number of polls in [`reaped_status`].
const MAX_POLLS: usize = 100;

/// Exit status of a child, or `None` while it runs or if a signal interrupts the wait.
///
/// Returns [`ExitStatus::Unknown`] for a process that is not, or no longer, a child.
pub fn wait(pid: i32, collect: Collect, block: Block) -> io::Result<Option<(ExitStatus, Usage)>> {
    let mut options = libc::WEXITED;
    if collect == Collect::Observe {
        options |= libc::WNOWAIT;
    }
    if block == Block::No {
        options |= libc::WNOHANG;
    }
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // Uses the system call, because libc's waitid(3) does not return the rusage.
    // SAFETY: both pointers are valid for writes for the duration of the call.
    let result =
        unsafe { libc::syscall(libc::SYS_waitid, libc::P_PID, pid, info.as_mut_ptr(), options, usage.as_mut_ptr()) };
    if result != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ECHILD) => Ok(Some((ExitStatus::Unknown, Usage::default()))),
            Some(libc::EINTR) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: zeroed values are valid for both plain C structures, and the kernel has filled them in since.
    let (info, usage) = unsafe { (info.assume_init(), usage.assume_init()) };
    // SAFETY: waitid fills in the child's fields of the union, or leaves the zeros that mean "not yet".
    let (si_pid, si_status) = unsafe { (info.si_pid(), info.si_status()) };
    if si_pid == 0 {
        return Ok(None);
    }
    let status = match info.si_code {
        libc::CLD_EXITED => ExitStatus::Exited(u8::try_from(si_status & 0xff).unwrap_or(u8::MAX)),
        code => ExitStatus::Signalled { signal: si_status, core_dumped: code == libc::CLD_DUMPED },
    };
    Ok(Some((status, usage_from(&usage))))
}

/// Exit status of a process that was reaped elsewhere, or that the kernel reaped itself because `SIGCHLD` is ignored.
///
/// Uses `PIDFD_GET_INFO` with `PIDFD_INFO_EXIT` (Linux 6.15): a pidfd that was opened before the reap keeps the status. `None` on older
/// kernels. The status becomes available shortly after the pidfd becomes readable, so this polls for a short time.
#[must_use]
pub fn reaped_status(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    for _ in 0..MAX_POLLS {
        // SAFETY: a plain C structure, for which zeros are valid.
        let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
        info.mask = u64::from(libc::PIDFD_INFO_EXIT);
        // SAFETY: the descriptor is open, the structure valid for writes and of the size that the request's number holds.
        let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
        if result == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0 {
            return Some(status_from(info.exit_code));
        }
        if result != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH) {
            return None; // the kernel does not support the request
        }
        std::thread::yield_now();
    }
    None
}

/// Decodes a status word of `wait(2)`.
fn status_from(word: i32) -> ExitStatus {
    if libc::WIFSIGNALED(word) {
        ExitStatus::Signalled { signal: libc::WTERMSIG(word), core_dumped: libc::WCOREDUMP(word) }
    } else {
        ExitStatus::Exited(u8::try_from(libc::WEXITSTATUS(word)).unwrap_or(u8::MAX))
    }
}

fn usage_from(usage: &libc::rusage) -> Usage {
    let duration = |time: libc::timeval| {
        Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    Usage {
        user_time: duration(usage.ru_utime),
        system_time: duration(usage.ru_stime),
        // The kernel reports kibibytes.
        max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
    }
}
