//! What the guard process does.

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

use super::{MESSAGE_BYTES, Orders, Word};
use crate::sys::cgroup;
use crate::sys::lease::{LeasePage, now_ns};
use crate::sys::leftovers::{GUARD_NAME, Query, Session, find};
use crate::sys::poller::wait_readable;
use crate::sys::process::pidfd_send_signal;
use crate::sys::procfs;

/// As in a stop: helpers that clean up after a killed worker have this time.
const KILL_DELAY: Duration = Duration::from_millis(100);
/// Between two looks for what is left. Who forks while being killed is found by the next one.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);
/// What is there after this time does not die.
const LAST_LOOK: Duration = Duration::from_secs(10);

/// Guards this process's parent until that is gone, then ends what it has left, and returns.
///
/// Closes all descriptors but `line` and ignores all signals: call it in a process of its own.
pub fn stand(line: OwnedFd, orders: &Orders) {
    let agent = rustix::process::getppid();
    let line = isolate(line);
    let agent = agent.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let held = listen(&line, agent.as_ref(), orders);
    sweep(&held, orders);
}

/// Leaves everything of the agent's behind but the line, which becomes descriptor 0: who reads the agent's output must see its end.
fn isolate(line: OwnedFd) -> OwnedFd {
    let name: Vec<u8> = GUARD_NAME.bytes().chain([0]).collect();
    // The disposition is the first word: SIG_IGN is one.
    let ignore = [1usize, 0, 0, 0];
    // SAFETY: integers, a string that ends in NUL, an array as large as the kernel's structure; SIG_IGN runs no code of ours. The
    // descriptors are not used after they were closed: the caller has nothing but `line`.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in 1..=64 as c_int {
            // Fails for SIGKILL and SIGSTOP. SIGCHLD too is ignored: there are no children.
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                ignore.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of::<u64>(),
            );
        }
        if line.as_raw_fd() != 0 {
            libc::dup2(line.as_raw_fd(), 0);
        }
        std::mem::forget(line);
        if libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32) < 0 {
            let highest = libc::sysconf(libc::_SC_OPEN_MAX).clamp(64, 65_536);
            for fd in 1..c_int::try_from(highest).unwrap_or(64) {
                libc::close(fd);
            }
        }
        OwnedFd::from_raw_fd(0)
    }
}

/// What the agent has told.
#[derive(Default)]
struct Held {
    sessions: Vec<Session>,
    lease: Option<LeasePage>,
    /// The end of a lease for which the workers have been ended.
    ended_at_ns: Option<u64>,
}

impl Held {
    fn release(&mut self, leader: i32) {
        self.sessions.retain(|session| session.leader != leader);
    }

    /// When the workers are to be ended, if there is such a time.
    fn due_ns(&self) -> Option<u64> {
        let due_ns = self.lease.as_ref().and_then(LeasePage::kill_at_ns);
        due_ns.filter(|due_ns| self.ended_at_ns != Some(*due_ns) && !self.sessions.is_empty())
    }
}

/// Takes note of the workers until the agent is gone. Ends them when their lease is over.
fn listen(line: &OwnedFd, agent: Option<&OwnedFd>, orders: &Orders) -> Vec<Session> {
    let mut held = Held::default();
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).ok();
    loop {
        let due_ns = held.due_ns();
        if let Some(timer) = &timer {
            // An absolute time of 0 disarms it. The lease may have been renewed by then: that is seen then.
            set_absolute(timer, due_ns.unwrap_or(0));
        }
        let timer = timer.as_ref().map(|timer| timer as &dyn AsFd);
        let ready = wait_readable([Some(line as &dyn AsFd), agent.map(|agent| agent as &dyn AsFd), timer], None);
        let Ok([has_message, is_gone, _]) = ready else { break };
        // The line first: what the agent has said before its end counts.
        if has_message {
            match receive(line) {
                Ok(Some(Message::Hold(session))) => {
                    held.release(session.leader);
                    held.sessions.push(session);
                }
                Ok(Some(Message::Release(leader))) => held.release(leader),
                Ok(Some(Message::Lease(page))) => held.lease = page,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(None) | Err(_) => break,
            }
        } else if is_gone {
            break;
        } else if let Some(due_ns) = held.due_ns().filter(|due_ns| now_ns() >= *due_ns) {
            held.ended_at_ns = Some(due_ns);
            kill_all(&held.sessions, orders);
        }
    }
    held.sessions
}

fn set_absolute(timer: &OwnedFd, at_ns: u64) {
    const NS: u64 = 1_000_000_000;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let part = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    let it_value = Timespec { tv_sec: part(at_ns / NS), tv_nsec: part(at_ns % NS) };
    // It fails for a descriptor that is none.
    let _ = timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: zero, it_value });
}

enum Message {
    Hold(Session),
    Release(i32),
    Lease(Option<LeasePage>),
}

/// The next message; `None` at the end of the line.
fn receive(line: &OwnedFd) -> io::Result<Option<Message>> {
    let mut bytes = [0u8; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let RecvMsg { bytes: count, .. } =
        rustix::net::recvmsg(line, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fd = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    if count != MESSAGE_BYTES {
        return Ok(None);
    }
    let [word, leader @ ..] = bytes;
    let leader = i32::from_ne_bytes(leader);
    Ok(Some(if word == Word::Release as u8 {
        Message::Release(leader)
    } else if word == Word::Lease as u8 {
        Message::Lease(fd.and_then(|fd| LeasePage::open(fd).ok()))
    } else {
        let started = procfs::stat(leader).map(|stat| stat.started);
        Message::Hold(Session { leader, pidfd: fd, started })
    }))
}

/// Kills what a killed agent has left, until there is nothing.
fn sweep(held: &[Session], orders: &Orders) {
    kill_all(held, orders);
    if let Some(folder) = &orders.cgroup {
        let _ = cgroup::remove(folder);
    }
}

/// Kills the workers and what they have started, until there is nothing left.
fn kill_all(held: &[Session], orders: &Orders) {
    // The kernel has done this where the agent was killed, for all that have not changed their death signal.
    for pidfd in held.iter().filter_map(|session| session.pidfd.as_ref()) {
        let _ = pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL, 0);
    }
    let folder = orders.cgroup.as_deref();
    let everywhere = !orders.keep_detached;
    let query = Query {
        mark: everywhere.then_some(&orders.mark),
        sessions: held,
        cgroup: folder.filter(|_| everywhere),
        not_in_session: i32::try_from(std::process::id()).unwrap_or(0),
    };
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    while began.elapsed() < LAST_LOOK {
        let found = find(&query);
        if found.is_empty() {
            break;
        }
        if began.elapsed() >= KILL_DELAY {
            for process in &found {
                // One that has ended meanwhile is what is wanted.
                let _ = process.signal(libc::SIGKILL);
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
