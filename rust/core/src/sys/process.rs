//! Signalling a process and its group, safe against pid reuse.
//!
//! The kernel may reuse a pid once its process was reaped. Two mechanisms prevent signals to the wrong process:
//!
//! - A *pidfd* refers to the process itself. Since Linux 6.9 it can also signal the whole group that the process leads, even after the
//!   leader was reaped; it fails with ESRCH if the group is empty.
//! - On older kernels the leader stays a zombie until its group is empty: the pid of a zombie is not reused. For a process that another
//!   process may reap, the start time is compared before each signal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::pidfd::{PIDFD_SIGNAL_PROCESS_GROUP, is_delivered, pidfd_send_signal};
use super::probe::Support;
use super::procfs::{self, Stat};

/// Pauses between two polls of a process that is not a child.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(32);

/// A process, and its process group if it leads one.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    pidfd: Option<OwnedFd>,
    group_signals: bool,
    /// Start time in clock ticks since boot. Only set without a pidfd.
    started: Option<u64>,
}

impl ProcessHandle {
    /// A handle of a process that was just spawned.
    #[must_use]
    pub fn spawned(pid: i32, pidfd: Option<OwnedFd>, support: Support) -> Self {
        let group_signals = support.group_signals && pidfd.is_some();
        let started = if pidfd.is_none() { procfs::stat(pid).map(|stat| stat.started) } else { None };
        Self { pid, pidfd, group_signals, started }
    }

    /// Opens a handle of a running process. Fails with ESRCH if there is none.
    pub fn open(pid: i32, support: Support) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).filter(|_| pid > 0).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = if support.pidfd {
            Some(pidfd_open(raw, PidfdFlags::empty())?)
        } else {
            rustix::process::test_kill_process(raw)?;
            None
        };
        Ok(Self::spawned(pid, pidfd, support))
    }

    /// A second handle of the same process.
    pub fn try_clone(&self) -> io::Result<Self> {
        let pidfd = self.pidfd.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { pid: self.pid, pidfd, group_signals: self.group_signals, started: self.started })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The pidfd. It is readable once the process has ended.
    #[must_use]
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the leader may be reaped before its group is empty: the pidfd can signal the group without the pid.
    #[must_use]
    pub fn may_be_reaped(&self) -> bool {
        self.group_signals
    }

    /// Signals the leader alone. `false` if it has ended and was reaped.
    pub fn signal(&self, signal: i32) -> io::Result<bool> {
        match &self.pidfd {
            Some(pidfd) => pidfd_send_signal(pidfd.as_fd(), signal, 0),
            None if !self.is_pid_current() => Ok(false),
            // SAFETY: takes integers. The number is still the leader's: it is alive, or a zombie that we have not collected.
            None => is_delivered(unsafe { libc::kill(self.pid, signal) }),
        }
    }

    /// Signals the group, or the leader alone if it does not lead a group yet. `false` if there is no such process.
    pub fn signal_group(&self, signal: i32) -> io::Result<bool> {
        let delivered = match &self.pidfd {
            Some(pidfd) if self.group_signals => pidfd_send_signal(pidfd.as_fd(), signal, PIDFD_SIGNAL_PROCESS_GROUP)?,
            // SAFETY: takes integers. The number still names our group: its leader is alive or an uncollected zombie.
            _ => is_delivered(unsafe { libc::killpg(self.pid, signal) })?,
        };
        Ok(delivered || self.signal(signal)?)
    }

    /// Whether the pid still belongs to this process, running or zombie.
    fn is_pid_current(&self) -> bool {
        self.started.is_none_or(|started| procfs::stat(self.pid).is_some_and(|stat| stat.started == started))
    }

    /// Polls until the process has ended. For a process that is not a child and has no pidfd, because the kernel has no event for its end.
    pub fn poll_until_end(&self) {
        let mut pause = FIRST_PAUSE;
        while procfs::stat(self.pid).is_some_and(|stat| !stat.is_dead()) && self.is_pid_current() {
            std::thread::sleep(pause);
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Whether the leader is stopped by SIGSTOP, SIGTSTP or a debugger.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        procfs::stat(self.pid).is_some_and(|stat| matches!(stat.state, 'T' | 't'))
    }

    /// The living members of the group, including the leader. Zombies are not included.
    #[must_use]
    pub fn living_members(&self) -> Vec<Stat> {
        if self.group_signals
            && let Some(pidfd) = &self.pidfd
            && matches!(pidfd_send_signal(pidfd.as_fd(), 0, PIDFD_SIGNAL_PROCESS_GROUP), Ok(false))
        {
            return Vec::new();
        }
        procfs::living_members(self.pid)
    }
}

/// Whether orphans become children of this process, because it is PID 1 or a subreaper (`PR_SET_CHILD_SUBREAPER`).
#[must_use]
pub fn inherits_orphans() -> bool {
    let mut is_subreaper: libc::c_int = 0;
    // SAFETY: the pointer is valid for the write of an integer.
    let result = unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut is_subreaper) };
    std::process::id() == 1 || (result == 0 && is_subreaper != 0)
}
