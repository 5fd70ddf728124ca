//! Detects which features the kernel, the container runtime and the seccomp policy allow, by trying them in a short-lived child.
//!
//! Some policies kill a process that makes an unknown system call, so the agent itself never tries.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::pidfd::{PIDFD_SIGNAL_PROCESS_GROUP, pidfd_send_signal};
use super::spawn::SpawnStack;
use super::wait::{Block, Collect, wait};
use super::{poller, sigmask};

/// The features that determine how the engine detects exits and signals groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// `clone` returns pidfds, and they can be opened, polled and signalled (Linux 5.4, Docker since late 2020, not every gVisor).
    pub pidfd: bool,
    /// A pidfd can signal the process group that its process leads (Linux 6.9).
    pub group_signals: bool,
}

impl Support {
    /// The fallback: one thread per worker blocks in `waitid`, and a zombie is kept until its group is empty.
    pub const NONE: Self = Self { pidfd: false, group_signals: false };
}

const PIDFD_WORKS: u8 = 0;
const GROUP_SIGNALS_WORK: u8 = 1;
const NOTHING_WORKS: u8 = 2;

/// Tries each feature once. Takes about 0.2 ms.
#[must_use]
pub fn probe() -> Support {
    match run_probe() {
        Ok(PIDFD_WORKS) => Support { pidfd: true, group_signals: false },
        Ok(GROUP_SIGNALS_WORK) => Support { pidfd: true, group_signals: true },
        _ => Support::NONE,
    }
}

/// The child returns its result through shared memory. An exit status would be lost if SIGCHLD is ignored.
fn run_probe() -> io::Result<u8> {
    let mut result = NOTHING_WORKS;
    let mut stack = SpawnStack::new();
    let mut raw_pidfd: c_int = -1;
    let blocked = sigmask::block_all();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: as in `spawn::spawn`: the child has its own stack and ends before this call returns.
    let pid = unsafe {
        libc::clone(
            probe_child,
            stack.top(),
            flags,
            (&raw mut result).cast(),
            &raw mut raw_pidfd,
            std::ptr::null_mut::<c_void>(),
            std::ptr::null_mut::<c_void>(),
        )
    };
    let error = io::Error::last_os_error();
    drop(blocked);
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: the kernel has stored a new descriptor there that nobody else owns; the check comes first.
    let pidfd = (raw_pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(raw_pidfd) });
    let readable = pidfd.as_ref().is_some_and(|pidfd| matches!(poller::wait_readable([Some(pidfd)], None), Ok([true])));
    wait(pid, Collect::Reap, Block::Yes)?;
    // SAFETY: the child, which has ended, was the only one to write it.
    let result = unsafe { std::ptr::read_volatile(&raw const result) };
    Ok(if readable { result } else { NOTHING_WORKS })
}

/// Runs in the child, which shares the agent's memory. It must make system calls only.
extern "C" fn probe_child(result: *mut c_void) -> c_int {
    // SAFETY: `result` is the parent's, which stands still until this process ends; the rest are integers. The descriptor is checked before it is wrapped, and the child exits without unwinding.
    unsafe {
        libc::setsid();
        let raw = libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0u32);
        let outcome = match c_int::try_from(raw) {
            Ok(raw) if raw >= 0 => {
                let pidfd = OwnedFd::from_raw_fd(raw);
                if !matches!(pidfd_send_signal(pidfd.as_fd(), 0, 0), Ok(true)) {
                    NOTHING_WORKS
                } else if matches!(pidfd_send_signal(pidfd.as_fd(), 0, PIDFD_SIGNAL_PROCESS_GROUP), Ok(true)) {
                    GROUP_SIGNALS_WORK
                } else {
                    PIDFD_WORKS
                }
            }
            _ => NOTHING_WORKS,
        };
        std::ptr::write_volatile(result.cast::<u8>(), outcome);
        libc::_exit(0)
    }
}
