//! A process that outlives a killed agent by a moment, to end what the kernel does not end with it.
//!
//! `PR_SET_PDEATHSIG` reaches the workers and nobody else: data loader processes, servers and helpers that workers have started live on and
//! hold their GPUs. The agent tells the guard of each worker: its pid, which is the number of its session, and its pidfd. When the agent is
//! gone, the guard kills what is left of these sessions, of the run's cgroup, and what carries the run's mark in its environment.
//!
//! An agent that is suspended cannot end its workers either. Where others wait for it no longer than a lease lasts, the guard ends the
//! workers with the lease.
//!
//! The guard decides nothing else. An agent that ends as it should kills it.

mod stand;

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::lease::LeasePage;
use super::leftovers::Mark;
use super::process::pidfd_send_signal;
use super::spawn::{Command, SpawnStack, Stdio, spawn};
use super::wait::{Block, Collect, wait};
use crate::error::Result;
use crate::owner::Owner;

pub use stand::stand;

/// What a guard is to end when its agent is gone.
#[derive(Clone, Debug)]
pub struct Orders {
    /// Marks the run's processes in their environment.
    pub mark: Mark,
    /// Processes that have left the sessions of the workers live on.
    pub keep_detached: bool,
    /// The run's cgroup, if it has one.
    pub cgroup: Option<PathBuf>,
}

/// A program that calls [`stand`] with its descriptor 0, for an agent that cannot be forked.
#[derive(Clone, Debug)]
pub struct Program {
    /// Program and arguments.
    pub argv: Vec<CString>,
    /// The whole environment, as `NAME=value`. The run's mark is not in it.
    pub env: Vec<CString>,
}

/// The agent's end of a guard.
#[derive(Debug)]
pub struct Guard {
    owner: Owner,
    pid: i32,
    pidfd: Option<OwnedFd>,
    line: OwnedFd,
}

/// What the agent tells the guard: a worker was started, or is gone with all of its session; or where it reads until when they may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    Hold = b'H',
    Release = b'R',
    Lease = b'L',
}

const MESSAGE_BYTES: usize = 5;

impl Guard {
    /// Whether this process can be forked: there is no other thread, whose locks the child would inherit.
    pub fn can_fork() -> io::Result<bool> {
        Ok(fs::read_dir("/proc/self/task")?.count() == 1)
    }

    /// Forks the guard. It is this program without an exec, so there must be no other thread: `ResourceBusy` otherwise.
    pub fn fork(orders: &Orders) -> io::Result<Self> {
        if !Self::can_fork()? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let (theirs, ours) = line()?;
        // SAFETY: there is one thread, so the child may use whatever the parent may. It does not return from this branch.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(ours);
                let _ = std::panic::catch_unwind(|| stand(theirs, orders));
                // SAFETY: ends the process without running what the parent's libraries have registered for its end.
                unsafe { libc::_exit(0) }
            }
            pid => {
                let pidfd = Pid::from_raw(pid).and_then(|raw| pidfd_open(raw, PidfdFlags::empty()).ok());
                Ok(Self { owner: Owner::this_process(), pid, pidfd, line: ours })
            }
        }
    }

    /// Executes the guard.
    pub fn execute(program: &Program, pidfd: bool, stack: &mut SpawnStack) -> Result<Self> {
        let (theirs, ours) = line().map_err(|source| crate::Error::os("create", "the line to a guard", source))?;
        let command = Command {
            argv: program.argv.clone(),
            env: program.env.clone(),
            stdin: Some(Arc::new(theirs)),
            stdout: Stdio::File("/dev/null".into()),
            stderr: Stdio::File("/dev/null".into()),
            outlives_agent: true,
            ..Command::default()
        };
        let spawned = spawn(&command, 0, pidfd, None, stack)?;
        Ok(Self { owner: Owner::this_process(), pid: spawned.pid, pidfd: spawned.pidfd, line: ours })
    }

    /// Process id of the guard.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor that is readable once the guard has ended, or is about to.
    #[must_use]
    pub fn end_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_ref().unwrap_or(&self.line).as_fd()
    }

    /// A worker was started.
    pub fn hold(&self, leader: i32, pidfd: Option<BorrowedFd<'_>>) {
        let with = pidfd.is_some_and(|pidfd| self.send(Word::Hold, leader, Some(pidfd)).is_ok());
        if !with {
            // Without pidfds, or with too many descriptors on their way.
            let _ = self.send(Word::Hold, leader, None);
        }
    }

    /// A worker is gone, and so is its session.
    pub fn release(&self, leader: i32) {
        let _ = self.send(Word::Release, leader, None);
    }

    /// From now on the workers may run as long as this page says. That counts also while the agent is suspended.
    pub fn watch_lease(&self, page: &LeasePage) {
        let _ = self.send(Word::Lease, 0, Some(page.as_fd()));
    }

    /// Never waits: a guard that does not read (it is suspended) is not told.
    fn send(&self, word: Word, leader: i32, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut message = [word as u8; MESSAGE_BYTES];
        message[1..].copy_from_slice(&leader.to_ne_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.line, &[io::IoSlice::new(&message)], &mut ancillary, flags)?;
        Ok(())
    }

    /// Collects the guard if it has ended; `true` if it has.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        !matches!(wait(self.pid, Collect::Reap, Block::No), Ok(None))
    }

    /// Kills the guard; it touches nobody. It is collected by [`Guard::has_ended`].
    pub fn kill(&self) {
        match &self.pidfd {
            Some(pidfd) => {
                let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL, 0);
            }
            // SAFETY: takes integers. The number is the guard's until it is collected.
            None => unsafe {
                libc::kill(self.pid, libc::SIGKILL);
            },
        }
    }

    /// Kills the guard and waits until it is gone, for at most `timeout`; `false` if it is not.
    #[must_use]
    pub fn dismiss(self, timeout: Duration) -> bool {
        let began = Instant::now();
        self.kill();
        loop {
            if self.has_ended() {
                return true;
            }
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() {
                return false;
            }
            let _ = super::poller::wait_readable([Some(&self.end_fd() as &dyn AsFd)], Some(left));
        }
    }
}

impl Drop for Guard {
    /// A guard that nobody has dismissed has nothing to guard. In a forked child it is somebody else's.
    fn drop(&mut self) {
        if self.owner.check().is_ok() {
            self.kill();
            let _ = self.has_ended();
        }
    }
}

fn line() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
