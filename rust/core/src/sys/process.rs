//! Signalling a process and its group without ever hitting a stranger.
//!
//! A pid is a number that the kernel gives to somebody else once its owner was reaped. Two holds keep that from mattering:
//!
//! - a *pidfd* names the process itself. From Linux 6.9 on it also signals the whole group the process leads, even when the leader
//!   was reaped, and answers ESRCH when nobody is left in it.
//! - on older kernels the leader is left a zombie until its group is empty: a zombie keeps its number. A process that somebody else
//!   may reap is told from a later one by the time at which it was started.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::probe::Support;
use super::procfs::{self, Stat};

/// `PIDFD_SIGNAL_PROCESS_GROUP`, Linux 6.9.
pub(super) const PIDFD_SIGNAL_PROCESS_GROUP: libc::c_uint = 4;

/// Pauses between two looks at a process that is not our child.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// A process that leads (or is about to lead) a process group.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    pidfd: Option<OwnedFd>,
    group_signals: bool,
    /// When it was started, in clock ticks since boot, where no pidfd names it.
    started: Option<u64>,
}

impl ProcessHandle {
    /// Takes hold of a process that was just spawned.
    #[must_use]
    pub fn spawned(pid: i32, pidfd: Option<OwnedFd>, support: Support) -> Self {
        let group_signals = support.group_signals && pidfd.is_some();
        let started = if pidfd.is_none() { procfs::stat(pid).map(|stat| stat.started) } else { None };
        Self { pid, pidfd, group_signals, started }
    }

    /// Takes hold of a running process.
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

    /// A second hold on the same process.
    pub fn try_clone(&self) -> io::Result<Self> {
        let pidfd = self.pidfd.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { pid: self.pid, pidfd, group_signals: self.group_signals, started: self.started })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The pidfd, readable once the process has ended.
    #[must_use]
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the leader may be reaped as soon as it has ended: its group can be reached without its pid.
    #[must_use]
    pub fn may_be_reaped(&self) -> bool {
        self.group_signals
    }

    /// Signals the leader alone. `false` if it is gone.
    pub fn signal(&self, signal: i32) -> io::Result<bool> {
        match &self.pidfd {
            Some(pidfd) => pidfd_send_signal(pidfd.as_fd(), signal, 0),
            None if !self.holds_its_number() => Ok(false),
            // SAFETY: takes integers. The number is still the leader's: it is alive, or a zombie that we have not collected.
            None => found(unsafe { libc::kill(self.pid, signal) }),
        }
    }

    /// Signals the group, or the leader alone while it has no group of its own yet. `false` if nobody is there.
    pub fn signal_group(&self, signal: i32) -> io::Result<bool> {
        let delivered = match &self.pidfd {
            Some(pidfd) if self.group_signals => pidfd_send_signal(pidfd.as_fd(), signal, PIDFD_SIGNAL_PROCESS_GROUP)?,
            // SAFETY: takes integers. The number still names our group: its leader is alive or an uncollected zombie.
            _ => found(unsafe { libc::killpg(self.pid, signal) })?,
        };
        Ok(delivered || self.signal(signal)?)
    }

    /// Whether the number is still this process's, dead or alive.
    fn holds_its_number(&self) -> bool {
        self.started.is_none_or(|started| procfs::stat(self.pid).is_some_and(|stat| stat.started == started))
    }

    /// Waits for the end of a process that is not our child, without a pidfd: the kernel has no event for that.
    pub fn wait_as_stranger(&self) {
        let mut pause = FIRST_PAUSE;
        while procfs::stat(self.pid).is_some_and(|stat| !stat.is_dead()) && self.holds_its_number() {
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether the leader is stopped (SIGSTOP, SIGTSTP, a debugger).
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        procfs::stat(self.pid).is_some_and(|stat| matches!(stat.state, 'T' | 't'))
    }

    /// The living members of the group, the leader included. Zombies whose parent has yet to collect them do not count.
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

/// Whether orphans become children of this process: it is PID 1 or a subreaper (`PR_SET_CHILD_SUBREAPER`).
#[must_use]
pub fn inherits_orphans() -> bool {
    let mut is_subreaper: libc::c_int = 0;
    // SAFETY: the pointer is valid for the write of an integer.
    let asked = unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut is_subreaper) };
    std::process::id() == 1 || (asked == 0 && is_subreaper != 0)
}

/// `pidfd_send_signal(2)`; libc has no wrapper. `false` for ESRCH.
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
    found(if result < 0 { -1 } else { 0 })
}

fn found(result: i32) -> io::Result<bool> {
    if result == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        error => Err(error),
    }
}
