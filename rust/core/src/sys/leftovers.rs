//! Finding what a run has left: processes that its workers have started and that no process group of a worker leads to.
//!
//! Three marks tell them, and each has its gap. A *session* of a worker is left with `setsid`. The *environment* of the run can be
//! overwritten (a process that changes its title does) or taken off. A *cgroup* has no gap, but cannot be made everywhere.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup;
use super::process::pidfd_send_signal;
use super::procfs::{self, Stat};

/// Name of guard processes, as `/proc/PID/comm` shows it. They end by themselves.
pub(super) const GUARD_NAME: &str = "ferro-guard";

/// The variable that marks the processes of a run. Runs nest: a run in a worker of another adds its token to the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Name of the variable.
    pub name: String,
    /// What stands for this run in its value, between colons.
    pub token: String,
}

/// The worker at the head of a session.
#[derive(Debug)]
pub struct Session {
    /// Its process id, which is the session's number.
    pub leader: i32,
    /// Its pidfd, if there are pidfds.
    pub pidfd: Option<OwnedFd>,
    /// When it was started, in clock ticks since boot; `None` if it had ended before that was asked.
    pub started: Option<u64>,
}

impl Session {
    /// Whether the number still means this session. It goes to nobody else while somebody is in the session; a process that has it now
    /// and is not the leader has got it after the session was gone.
    fn is_current(&self) -> bool {
        match procfs::stat(self.leader).filter(|stat| !stat.is_dead()) {
            Some(stat) => Some(stat.started) == self.started,
            None => true,
        }
    }
}

/// What tells the processes of a run.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The mark in their environment, unless they may leave their session.
    pub mark: Option<&'a Mark>,
    /// Their sessions.
    pub sessions: &'a [Session],
    /// Their cgroup, unless they may leave their session.
    pub cgroup: Option<&'a Path>,
    /// A session that none of them is in: that of the agent.
    pub not_in_session: i32,
}

/// A process, told from a later one with the same number by the time at which it was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Process id.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub started: u64,
}

impl Found {
    /// Sends it a signal; `false` if it is gone.
    #[must_use]
    pub fn signal(&self, signal: i32) -> bool {
        let Some(raw) = Pid::from_raw(self.pid) else { return false };
        let is_same = || procfs::stat(self.pid).is_some_and(|stat| stat.started == self.started);
        match pidfd_open(raw, PidfdFlags::empty()) {
            // Looked at again with the process held: the number may have gone to somebody else in between.
            Ok(process) => is_same() && pidfd_send_signal(process.as_fd(), signal, 0).unwrap_or(false),
            Err(rustix::io::Errno::SRCH) => false,
            // SAFETY: takes integers.
            Err(_) => is_same() && unsafe { libc::kill(self.pid, signal) } == 0,
        }
    }
}

/// The living processes of a run. Guards of runs that nest in this one are not among them: they end by themselves, and have work to do.
#[must_use]
pub fn find(query: &Query<'_>) -> Vec<Found> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let in_cgroup = query.cgroup.map(cgroup::members).unwrap_or_default();
    let sessions: Vec<i32> =
        query.sessions.iter().filter(|session| session.is_current()).map(|session| session.leader).collect();
    let pids = if query.mark.is_none() && sessions.is_empty() { in_cgroup.clone() } else { procfs::pids() };
    pids.into_iter()
        .filter(|pid| *pid != own)
        .filter_map(procfs::stat)
        .filter(|stat| !stat.is_dead() && !is_kernel_thread(*stat) && stat.session != query.not_in_session)
        .filter(|stat| {
            sessions.contains(&stat.session)
                || in_cgroup.contains(&stat.pid)
                || query.mark.is_some_and(|mark| is_marked(stat.pid, mark))
        })
        .filter(|stat| !is_guard(stat.pid))
        .map(|stat| Found { pid: stat.pid, started: stat.started })
        .collect()
}

fn is_kernel_thread(stat: Stat) -> bool {
    const KTHREADD: i32 = 2;
    stat.session == 0 && (stat.pid == KTHREADD || stat.parent == KTHREADD)
}

fn is_marked(pid: i32, mark: &Mark) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| {
        let value = entry.strip_prefix(mark.name.as_bytes()).and_then(|rest| rest.strip_prefix(b"="));
        value.is_some_and(|value| value.split(|byte| *byte == b':').any(|token| token == mark.token.as_bytes()))
    })
}

fn is_guard(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == GUARD_NAME)
}
