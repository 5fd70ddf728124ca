//! Finding the remaining processes of a run: descendants of its workers that are outside the workers' process groups.
//!
//! Three properties identify them. A process leaves its *session* with `setsid`. It may overwrite or clear its *environment*, as programs
//! that change their title do. It cannot leave the *cgroup*, but creating a cgroup is not always permitted.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup;
use super::pidfd::pidfd_send_signal;
use super::procfs::{self, Stat};

/// Name of guard processes in `/proc/PID/comm`.
pub(super) const GUARD_NAME: &str = "ferro-guard";

/// Name of zygotes and of their parked children in `/proc/PID/comm`.
pub(crate) const WARM_NAME: &CStr = c"ferro-warm";

/// The variable that marks the processes of a run. Runs can be nested: an inner run adds its token to the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Name of the variable.
    pub name: String,
    /// Token of this run. The value of the variable is a list of tokens, separated by colons.
    pub token: String,
}

/// A session that a worker leads.
#[derive(Debug)]
pub struct Session {
    /// Process id of the worker, which is also the session id.
    pub leader: i32,
    /// Pidfd of the worker, if the kernel supports pidfds.
    pub pidfd: Option<OwnedFd>,
    /// Start time of the worker in clock ticks since boot; `None` if the worker had ended before it was read.
    pub started: Option<u64>,
}

impl Session {
    /// Whether the session id still names this session. The kernel does not reuse the id while the session has members. A living process
    /// with this pid but another start time has therefore received it after the session's end.
    fn is_current(&self) -> bool {
        match procfs::stat(self.leader).filter(|stat| !stat.is_dead()) {
            Some(stat) => Some(stat.started) == self.started,
            None => true,
        }
    }
}

/// Selects processes of a run: those with the mark, in one of the sessions, or in the cgroup.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The mark in their environment. `None` does not search by the mark.
    pub mark: Option<&'a Mark>,
    /// Their sessions.
    pub sessions: &'a [Session],
    /// Their cgroup. `None` does not search by the cgroup.
    pub cgroup: Option<&'a Path>,
    /// Processes in these sessions are excluded: the agent's, and those of zygotes whose name does not show yet what they are.
    pub not_in_sessions: &'a [i32],
    /// Zygotes and parked workers are excluded: a live agent has them on purpose.
    pub spares_warm: bool,
}

/// A process. Its start time distinguishes it from a later process with the same pid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    pub started: u64,
}

impl Found {
    /// Sends a signal. `false` if the process has ended.
    #[must_use]
    pub fn signal(&self, signal: i32) -> bool {
        let Some(raw) = Pid::from_raw(self.pid) else { return false };
        let is_same = || procfs::stat(self.pid).is_some_and(|stat| stat.started == self.started);
        match pidfd_open(raw, PidfdFlags::empty()) {
            // Compare the start time after opening the pidfd: the pid may have been reused before.
            Ok(process) => is_same() && pidfd_send_signal(process.as_fd(), signal, 0).unwrap_or(false),
            Err(rustix::io::Errno::SRCH) => false,
            // SAFETY: takes integers.
            Err(_) => is_same() && unsafe { libc::kill(self.pid, signal) } == 0,
        }
    }
}

/// The living processes of a run. Excludes the guards of nested runs: they end by themselves, after killing the processes of their runs.
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
        .filter(|stat| !stat.is_dead() && !is_kernel_thread(*stat) && !query.not_in_sessions.contains(&stat.session))
        .filter(|stat| {
            sessions.contains(&stat.session)
                || in_cgroup.contains(&stat.pid)
                || query.mark.is_some_and(|mark| is_marked(stat.pid, mark))
        })
        .filter(|stat| {
            let name = procfs::name(stat.pid);
            name != GUARD_NAME && !(query.spares_warm && name.as_bytes() == WARM_NAME.to_bytes())
        })
        .map(|stat| Found { pid: stat.pid, started: stat.started })
        .collect()
}

fn is_kernel_thread(stat: Stat) -> bool {
    const KTHREADD: i32 = 2;
    stat.session == 0 && (stat.pid == KTHREADD || stat.parent == KTHREADD)
}

fn is_marked(pid: i32, mark: &Mark) -> bool {
    procfs::environment(pid).split(|byte| *byte == 0).any(|entry| {
        let value = entry.strip_prefix(mark.name.as_bytes()).and_then(|rest| rest.strip_prefix(b"="));
        value.is_some_and(|value| value.split(|byte| *byte == b':').any(|token| token == mark.token.as_bytes()))
    })
}
