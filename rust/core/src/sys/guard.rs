//! The guard: a process that outlives a killed agent and kills the remaining processes of its run.
//!
//! `PR_SET_PDEATHSIG` reaches only the workers. Processes that workers have started (data loaders, servers, helpers) would survive the
//! agent and hold their GPUs. The agent sends the guard the pid of each worker, which is also its session id, and its pidfd. When the agent
//! is gone, the guard kills the processes in these sessions, in the run's cgroup, and those with the run's mark in their environment.
//!
//! A suspended agent cannot stop its workers when its lease expires. The guard kills them then.
//!
//! The guard has no other purpose. An agent that ends normally kills its guard.

mod stand;

use std::ffi::CString;
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
use super::pidfd::pidfd_send_signal;
use super::spawn::{Command, SpawnStack, Stdio, spawn};
use super::wait::{Block, Collect, wait};
use crate::error::Result;
use crate::owner::Owner;

pub use stand::stand;

/// Selects the processes to kill when the agent is gone.
#[derive(Clone, Debug)]
pub struct Orders {
    /// The mark of the run in the environment of its processes.
    pub mark: Mark,
    /// Spare the processes that have left the sessions of the workers.
    pub keep_detached: bool,
    /// The run's cgroup, if it has one.
    pub cgroup: Option<PathBuf>,
}

/// A program that calls [`stand`] with its descriptor 0. For agents with several threads, which must not fork without exec.
#[derive(Clone, Debug)]
pub struct Program {
    /// Program and arguments.
    pub argv: Vec<CString>,
    /// The whole environment, as `NAME=value`. Must not contain the run's mark.
    pub env: Vec<CString>,
}

/// The agent's handle of a guard process.
#[derive(Debug)]
pub struct Guard {
    owner: Owner,
    pid: i32,
    pidfd: Option<OwnedFd>,
    socket: OwnedFd,
}

/// First byte of a message from the agent to its guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum MessageKind {
    /// A worker was started.
    Hold = b'H',
    /// A worker and all processes of its session have ended.
    Release = b'R',
    /// The lease of the workers, as a descriptor of its page.
    Lease = b'L',
}

const MESSAGE_BYTES: usize = 5;

impl Guard {
    /// Forks the guard without an exec. Fails with `ResourceBusy` if this process has other threads.
    pub fn fork(orders: &Orders) -> io::Result<Self> {
        if !super::threads::is_single()? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let (guard_socket, socket) = socket_pair()?;
        // SAFETY: there is one thread, so the child may use whatever the parent may. It does not return from this branch.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(socket);
                let _ = std::panic::catch_unwind(|| stand(guard_socket, orders));
                // SAFETY: ends the process without running what the parent's libraries have registered for its end.
                unsafe { libc::_exit(0) }
            }
            pid => {
                let pidfd = Pid::from_raw(pid).and_then(|raw| pidfd_open(raw, PidfdFlags::empty()).ok());
                Ok(Self { owner: Owner::this_process(), pid, pidfd, socket })
            }
        }
    }

    /// Starts the guard as a program of its own.
    pub fn execute(program: &Program, pidfd: bool, stack: &mut SpawnStack) -> Result<Self> {
        let (guard_socket, socket) =
            socket_pair().map_err(|source| crate::Error::os("create", "the socket of a guard process", source))?;
        let command = Command {
            argv: program.argv.clone(),
            env: program.env.clone(),
            stdin: Some(Arc::new(guard_socket)),
            stdout: Stdio::File("/dev/null".into()),
            stderr: Stdio::File("/dev/null".into()),
            outlives_agent: true,
            ..Command::default()
        };
        let spawned = spawn(&command, 0, pidfd, None, stack)?;
        Ok(Self { owner: Owner::this_process(), pid: spawned.pid, pidfd: spawned.pidfd, socket })
    }

    /// Process id of the guard.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor that becomes readable when the guard ends. Without a pidfd this may be shortly before its end.
    #[must_use]
    pub fn end_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_ref().unwrap_or(&self.socket).as_fd()
    }

    /// Adds a worker and its session to the processes that the guard kills.
    pub fn hold(&self, leader: i32, pidfd: Option<BorrowedFd<'_>>) {
        let is_sent_with_pidfd = pidfd.is_some_and(|pidfd| self.send(MessageKind::Hold, leader, Some(pidfd)).is_ok());
        if !is_sent_with_pidfd {
            // There is no pidfd, or the kernel's limit of descriptors in flight is reached.
            let _ = self.send(MessageKind::Hold, leader, None);
        }
    }

    /// Removes a worker: all processes of its session have ended.
    pub fn release(&self, leader: i32) {
        let _ = self.send(MessageKind::Release, leader, None);
    }

    /// From now on the guard kills the workers when this lease expires, even while the agent is suspended.
    pub fn watch_lease(&self, page: &LeasePage) {
        let _ = self.send(MessageKind::Lease, 0, Some(page.as_fd()));
    }

    /// Never blocks. The message is lost if the socket is full, because the guard is suspended.
    fn send(&self, kind: MessageKind, leader: i32, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut message = [kind as u8; MESSAGE_BYTES];
        message[1..].copy_from_slice(&leader.to_ne_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.socket, &[io::IoSlice::new(&message)], &mut ancillary, flags)?;
        Ok(())
    }

    /// Whether the guard has ended. Reaps it.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        !matches!(wait(self.pid, Collect::Reap, Block::No), Ok(None))
    }

    /// Kills the guard; its workers are not affected. [`Guard::has_ended`] reaps it.
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

    /// Kills the guard and waits until it has ended. `false` if that takes longer than `timeout`.
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
    /// Kills a guard that was not dismissed. Does nothing in a forked child, where the guard belongs to the parent.
    fn drop(&mut self) {
        if self.owner.check().is_ok() {
            self.kill();
            let _ = self.has_ended();
        }
    }
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
