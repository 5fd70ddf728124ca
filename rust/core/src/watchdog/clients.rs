//! The processes that have timers, each with a handle, so a signal reaches that process or no process.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::sys::poller::wait_readable;
use crate::sys::probe::Support;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs::{self, Stat};

/// The relation of a process to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// This process itself, a descendant, or a member of a worker's session.
    Ours {
        /// The pid of the worker that it is or descends from; 0 if there is none.
        worker: i32,
    },
    /// Any other process; never signalled.
    Foreign,
}

/// A process that has timers.
#[derive(Debug)]
pub(crate) struct TimerClient {
    /// `None` for a foreign process, which is not worth a descriptor.
    handle: Option<ProcessHandle>,
    /// Start time. Without pidfds, a different start time shows that the pid was reused.
    started: u64,
    pub(crate) ownership: Ownership,
    pub(crate) last_request: Instant,
}

impl TimerClient {
    /// Opens a handle to a process. The pidfd is opened first, so everything read from `/proc` later is about the same process.
    fn open(pid: i32, now: Instant, support: Support, is_worker: &dyn Fn(i32) -> bool) -> io::Result<Self> {
        let handle = ProcessHandle::open(pid, support)?;
        let stat = match procfs::stat(pid) {
            Some(stat) if !stat.is_dead() => stat,
            None if handle.signal(0)? => return Err(io::Error::other("/proc cannot be read")),
            _ => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        let ownership = ownership_of(stat, is_worker);
        let handle = (ownership != Ownership::Foreign).then_some(handle);
        Ok(Self { handle, started: stat.started, ownership, last_request: now })
    }

    /// Signals the requesting process and no other. `false` if it has ended.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<bool> {
        let Some(handle) = &self.handle else { return Ok(false) };
        if handle.pidfd().is_none() && procfs::stat(handle.pid()).is_none_or(|stat| stat.started != self.started) {
            return Ok(false);
        }
        let delivered = handle.signal(signal)?;
        if delivered && handle.is_stopped() {
            let _ = handle.signal(libc::SIGCONT);
        }
        Ok(delivered)
    }

    /// Whether a signal would reach the requesting process.
    pub(crate) fn can_be_signalled(&self, pid: i32) -> bool {
        self.handle.as_ref().is_some_and(|handle| !self.has_ended(pid) && matches!(handle.signal(0), Ok(true)))
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.handle.as_ref().and_then(ProcessHandle::pidfd)
    }

    /// Whether the process has ended, by its pidfd, or without one by its `/proc` entry and start time.
    pub(crate) fn has_ended(&self, pid: i32) -> bool {
        match self.pidfd() {
            Some(pidfd) => matches!(wait_readable([Some(&pidfd)], Some(std::time::Duration::ZERO)), Ok([true])),
            None => procfs::stat(pid).is_none_or(|stat| stat.is_dead() || stat.started != self.started),
        }
    }
}

/// Follows the parents up to this process. The session identifies a worker's process whose parents have ended.
fn ownership_of(stat: Stat, is_worker: &dyn Fn(i32) -> bool) -> Ownership {
    const MAX_DEPTH: usize = 64;
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let mut worker = if is_worker(stat.session) { stat.session } else { 0 };
    let mut ours = worker > 0;
    let mut next = Some(stat);
    for _ in 0..MAX_DEPTH {
        let Some(process) = next else { break };
        if is_worker(process.pid) {
            worker = process.pid;
        }
        if process.pid == me || worker > 0 {
            ours = true;
            break;
        }
        next = if process.parent > 1 { procfs::stat(process.parent) } else { None };
    }
    if ours { Ownership::Ours { worker } } else { Ownership::Foreign }
}

/// All processes that have timers.
#[derive(Debug)]
pub(crate) struct Clients {
    by_pid: HashMap<i32, TimerClient>,
    support: Support,
}

impl Clients {
    pub(crate) fn new(support: Support) -> Self {
        Self { by_pid: HashMap::new(), support }
    }

    /// The client with this pid, and whether its handle was opened by this call. `ESRCH` if there is no such process.
    pub(crate) fn get_or_open(
        &mut self,
        pid: i32,
        now: Instant,
        is_worker: &dyn Fn(i32) -> bool,
    ) -> io::Result<(&mut TimerClient, bool)> {
        use std::collections::hash_map::Entry;

        // Without a pidfd, no event reports the end of a process, and its pid may have been reused.
        let is_unwatched = |client: &TimerClient| client.pidfd().is_none();
        if self.by_pid.get(&pid).is_some_and(|client| is_unwatched(client) && client.has_ended(pid)) {
            self.by_pid.remove(&pid);
        }
        match self.by_pid.entry(pid) {
            Entry::Occupied(entry) => Ok((entry.into_mut(), false)),
            Entry::Vacant(entry) => Ok((entry.insert(TimerClient::open(pid, now, self.support, is_worker)?), true)),
        }
    }

    /// Recomputes ownership after a change of the workers.
    pub(crate) fn update_ownership(&mut self, is_worker: &dyn Fn(i32) -> bool) {
        for (pid, client) in &mut self.by_pid {
            if client.handle.is_some()
                && !client.has_ended(*pid)
                && let Some(stat) = procfs::stat(*pid)
                && let ownership @ Ownership::Ours { .. } = ownership_of(stat, is_worker)
            {
                client.ownership = ownership;
            }
        }
    }

    pub(crate) fn get(&self, pid: i32) -> Option<&TimerClient> {
        self.by_pid.get(&pid)
    }

    pub(crate) fn remove(&mut self, pid: i32) -> Option<TimerClient> {
        self.by_pid.remove(&pid)
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = (i32, TimerClient)> + '_ {
        self.by_pid.drain()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::sys::probe;

    /// A child that is killed and reaped when dropped.
    struct Running(Child);

    impl Running {
        fn sleeper() -> Self {
            Self(Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().expect("spawn"))
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).expect("pids fit")
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A child of the given pid that started at another tick of the kernel's clock. Root chooses the next pid with `ns_last_pid`.
    fn child_with(pid: i32, former_start: u64) -> Option<Running> {
        for _ in 0..200 {
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).expect("ns_last_pid");
            let child = Running::sleeper();
            let stat = procfs::stat(child.pid()).expect("a child");
            if stat.pid == pid && stat.started != former_start {
                return Some(child);
            }
        }
        None
    }

    /// A table that knows a child.
    fn table_with(child: &Running, support: Support) -> Clients {
        let mut clients = Clients::new(support);
        let (client, is_new) = clients.get_or_open(child.pid(), Instant::now(), &|_| false).expect("a child");
        assert_eq!((client.ownership, is_new), (Ownership::Ours { worker: 0 }, true));
        assert!(!client.has_ended(child.pid()));
        clients
    }

    fn assert_is_not_signalled(clients: &Clients, pid: i32) {
        let client = clients.get(pid).expect("not forgotten yet");
        assert!(client.has_ended(pid));
        assert!(matches!(client.signal(libc::SIGKILL), Ok(false)));
    }

    #[test]
    fn a_process_that_has_ended_is_not_signalled() {
        for support in [probe::probe(), Support::NONE] {
            let child = Running::sleeper();
            let clients = table_with(&child, support);
            let pid = child.pid();
            drop(child);
            assert_is_not_signalled(&clients, pid);
        }
    }

    #[test]
    fn a_process_that_got_the_pid_of_an_ended_one_is_not_signalled() {
        if File::options().write(true).open("/proc/sys/kernel/ns_last_pid").is_err() {
            eprintln!("skipped: choosing a pid takes root and /proc/sys/kernel/ns_last_pid");
            return;
        }
        for support in [probe::probe(), Support::NONE] {
            let reused = (0..10).find_map(|_| {
                let child = Running::sleeper();
                let clients = table_with(&child, support);
                let pid = child.pid();
                let started = clients.get(pid).expect("known").started;
                drop(child);
                Some((clients, pid, child_with(pid, started)?))
            });
            let (clients, pid, mut another) = reused.expect("no process got the pid of an ended one");
            assert_is_not_signalled(&clients, pid);
            assert!(another.0.try_wait().expect("wait").is_none(), "another process was signalled");
        }
    }

    #[test]
    fn descendants_belong_to_the_nearest_worker() {
        let script = "sleep 1000 & echo $!; wait";
        let mut shell = Command::new("/bin/sh");
        let mut shell = Running(shell.args(["-c", script]).stdout(Stdio::piped()).spawn().expect("spawn"));
        let shell_pid = shell.pid();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(shell.0.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut output, &mut line).expect("a line");
        let pid: i32 = line.trim().parse().expect("a pid");

        let mut clients = Clients::new(probe::probe());
        let mut ownership = |workers: &'static [i32]| {
            clients.remove(pid);
            let is_worker = move |pid: i32| workers.contains(&pid);
            clients.get_or_open(pid, Instant::now(), &is_worker).expect("alive").0.ownership
        };
        assert_eq!(ownership(&[]), Ownership::Ours { worker: 0 });
        assert_eq!(ownership(Box::leak(Box::new([shell_pid]))), Ownership::Ours { worker: shell_pid });
        clients.update_ownership(&|_| false);
        let client = clients.get(pid).expect("known");
        assert_eq!(client.ownership, Ownership::Ours { worker: 0 });
        assert!(client.signal(libc::SIGKILL).expect("signal"));
    }
}
