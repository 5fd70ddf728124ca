//! The program of the guard process.

use std::ffi::c_int;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg};
use rustix::process::{PidfdFlags, pidfd_open};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::{MESSAGE_BYTES, MessageKind, Orders};
use crate::sys::cgroup;
use crate::sys::lease::{LeasePage, now_ns};
use crate::sys::leftovers::{GUARD_NAME, Query, Session, find};
use crate::sys::pidfd::pidfd_send_signal;
use crate::sys::poller::wait_readable;
use crate::sys::procfs;

/// From the SIGKILL of the workers to that of the remaining processes. As in a stop, helpers clean up after a killed worker in this time.
const KILL_DELAY: Duration = Duration::from_millis(100);
/// Pauses between two scans of /proc. A process that forks while it is killed is found by the next scan.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(32);
/// The guard gives up on processes that survive for this long.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Waits until the parent process, the agent, has ended, then kills the remaining processes of its run and returns.
///
/// Closes all descriptors except `socket` and ignores all signals: call it in a process of its own.
pub fn stand(socket: OwnedFd, orders: &Orders) {
    let agent = rustix::process::getppid();
    let socket = isolate(socket);
    let agent = agent.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let sessions = watch_agent(&socket, agent.as_ref(), orders);
    sweep(&sessions, orders);
}

/// Detaches the process from the agent: its session, its signals and its descriptors. The socket becomes descriptor 0. With a copy of the
/// agent's output, its readers would not see the end of the stream.
fn isolate(socket: OwnedFd) -> OwnedFd {
    let name: Vec<u8> = GUARD_NAME.bytes().chain([0]).collect();
    // The disposition is the first word; the value of SIG_IGN is 1.
    let ignore = [1usize, 0, 0, 0];
    // SAFETY: integers, a string that ends in NUL, an array as large as the kernel's structure; SIG_IGN runs no code of ours. The
    // descriptors are not used after they were closed: the caller has nothing but `socket`.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in 1..=64 as c_int {
            // Fails for SIGKILL and SIGSTOP. SIGCHLD can be ignored too: there are no children.
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                ignore.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of::<u64>(),
            );
        }
        if socket.as_raw_fd() != 0 {
            libc::dup2(socket.as_raw_fd(), 0);
        }
        std::mem::forget(socket);
        if libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32) < 0 {
            let highest = libc::sysconf(libc::_SC_OPEN_MAX).clamp(64, 65_536);
            for fd in 1..c_int::try_from(highest).unwrap_or(64) {
                libc::close(fd);
            }
        }
        OwnedFd::from_raw_fd(0)
    }
}

/// The messages of the agent so far.
#[derive(Default)]
struct GuardedAgent {
    sessions: Vec<Session>,
    lease: Option<LeasePage>,
    /// The deadline at which the workers were last killed. It is not enforced twice.
    enforced_ns: Option<u64>,
}

impl GuardedAgent {
    fn release(&mut self, leader: i32) {
        self.sessions.retain(|session| session.leader != leader);
    }

    /// The deadline for killing the workers, if there are any.
    fn deadline_ns(&self) -> Option<u64> {
        let deadline_ns = self.lease.as_ref().and_then(LeasePage::kill_at_ns);
        deadline_ns.filter(|deadline_ns| self.enforced_ns != Some(*deadline_ns) && !self.sessions.is_empty())
    }
}

/// Receives messages until the agent has ended, and returns the sessions of its workers. Kills the workers when their lease expires.
fn watch_agent(socket: &OwnedFd, agent: Option<&OwnedFd>, orders: &Orders) -> Vec<Session> {
    let mut state = GuardedAgent::default();
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).ok();
    loop {
        let deadline_ns = state.deadline_ns();
        if let Some(timer) = &timer {
            // An absolute time of 0 disarms the timer. The agent renews the lease without a message, so the deadline is read again below.
            set_absolute(timer, deadline_ns.unwrap_or(0));
        }
        let timer = timer.as_ref().map(|timer| timer as &dyn AsFd);
        let ready = wait_readable([Some(socket as &dyn AsFd), agent.map(|agent| agent as &dyn AsFd), timer], None);
        let Ok([has_message, is_gone, _]) = ready else { break };
        // Messages first: the agent may have sent some just before its end.
        if has_message {
            match receive(socket) {
                Ok(Some(Message::Hold(session))) => {
                    state.release(session.leader);
                    state.sessions.push(session);
                }
                Ok(Some(Message::Release(leader))) => state.release(leader),
                Ok(Some(Message::Lease(page))) => state.lease = page,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => break,
            }
        } else if is_gone {
            break;
        } else if let Some(deadline_ns) = state.deadline_ns().filter(|deadline_ns| now_ns() >= *deadline_ns) {
            state.enforced_ns = Some(deadline_ns);
            kill_all(&state.sessions, orders);
        }
    }
    state.sessions
}

fn set_absolute(timer: &OwnedFd, at_ns: u64) {
    const NS: u64 = 1_000_000_000;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let part = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    let it_value = Timespec { tv_sec: part(at_ns / NS), tv_nsec: part(at_ns % NS) };
    // Cannot fail: the descriptor and the times are valid.
    let _ = timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value });
}

enum Message {
    Hold(Session),
    Release(i32),
    Lease(Option<LeasePage>),
}

/// The next message; `None` at the end of the stream.
fn receive(socket: &OwnedFd) -> io::Result<Option<Message>> {
    let mut bytes = [0u8; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let RecvMsg { bytes: count, .. } =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fd = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    if count != MESSAGE_BYTES {
        return Ok(None);
    }
    let [kind, leader @ ..] = bytes;
    let leader = i32::from_ne_bytes(leader);
    Ok(Some(if kind == MessageKind::Release as u8 {
        Message::Release(leader)
    } else if kind == MessageKind::Lease as u8 {
        Message::Lease(fd.and_then(|fd| LeasePage::open(fd).ok()))
    } else {
        let started = procfs::stat(leader).map(|stat| stat.started);
        Message::Hold(Session { leader, pidfd: fd, started })
    }))
}

/// Kills the remaining processes of a run whose agent has ended, and removes its cgroup.
fn sweep(sessions: &[Session], orders: &Orders) {
    kill_all(sessions, orders);
    if let Some(folder) = &orders.cgroup {
        let _ = cgroup::remove(folder);
    }
}

/// Kills the workers and their descendants. Returns when none is left or [`KILL_TIMEOUT`] has passed.
fn kill_all(sessions: &[Session], orders: &Orders) {
    // After the end of the agent this only affects workers that have changed their parent death signal.
    for pidfd in sessions.iter().filter_map(|session| session.pidfd.as_ref()) {
        let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL, 0);
    }
    let folder = orders.cgroup.as_deref();
    let kill_detached = !orders.keep_detached;
    let query = Query {
        mark: kill_detached.then_some(&orders.mark),
        sessions,
        cgroup: folder.filter(|_| kill_detached),
        not_in_sessions: &[i32::try_from(std::process::id()).unwrap_or(0)],
        spares_warm: false,
    };
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    while began.elapsed() < KILL_TIMEOUT {
        let found = find(&query);
        if found.is_empty() {
            break;
        }
        if began.elapsed() >= KILL_DELAY {
            for process in &found {
                // `false` if the process has ended in the meantime.
                let _ = process.signal(libc::SIGKILL);
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(MAX_PAUSE);
    }
}
