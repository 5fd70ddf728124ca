//! The processes that have timers: who they are, held so that a signal hits them or nobody.

use std::collections::HashMap;
use std::io;
use std::time::Instant;

use crate::sys::poller::wait_readable;
use crate::sys::probe::Support;
use crate::sys::process::Leader;
use crate::sys::procfs::{self, Stat};

/// What a process is to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kin {
    /// This process itself, a descendant, or a member of a worker's session. With the worker, if one was named.
    Ours {
        /// Its pid, or 0.
        worker: i32,
    },
    /// Somebody else's: never signalled.
    Foreign,
}

/// A process that has timers.
#[derive(Debug)]
pub(crate) struct Client {
    /// `None` for a foreign process: no descriptor is spent on it.
    hold: Option<Leader>,
    /// For systems without pidfds: the pid still names the process as long as this is the same.
    started: u64,
    pub(crate) kin: Kin,
    pub(crate) last_request: Instant,
}

impl Client {
    /// Takes hold of a process. The descriptor comes first: what is found out about the pid after that is about this very process.
    fn open(pid: i32, now: Instant, support: Support, is_worker: &dyn Fn(i32) -> bool) -> io::Result<Self> {
        let hold = Leader::open(pid, support)?;
        let stat = match procfs::stat(pid) {
            Some(stat) if !stat.is_dead() => stat,
            None if hold.signal(0)? => return Err(io::Error::other("/proc cannot be read")),
            _ => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
        };
        let kin = kin_of(stat, is_worker);
        let hold = (kin != Kin::Foreign).then_some(hold);
        Ok(Self { hold, started: stat.started, kin, last_request: now })
    }

    /// Signals the process that asked, or nobody. `false` if it has ended.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<bool> {
        let Some(hold) = &self.hold else { return Ok(false) };
        if hold.pidfd().is_none() && procfs::stat(hold.pid()).is_none_or(|stat| stat.started != self.started) {
            return Ok(false);
        }
        let delivered = hold.signal(signal)?;
        if delivered && hold.is_stopped() {
            let _ = hold.signal(libc::SIGCONT);
        }
        Ok(delivered)
    }

    /// Whether a signal would reach the process that asked.
    pub(crate) fn can_be_signalled(&self, pid: i32) -> bool {
        self.hold.as_ref().is_some_and(|hold| !self.has_ended(pid) && matches!(hold.signal(0), Ok(true)))
    }

    pub(crate) fn hold(&self) -> Option<&Leader> {
        self.hold.as_ref()
    }

    /// Whether the process has ended, for what its pidfd says. Without one: whether the pid means something else by now.
    pub(crate) fn has_ended(&self, pid: i32) -> bool {
        match self.hold.as_ref().and_then(Leader::pidfd) {
            Some(pidfd) => matches!(wait_readable([Some(&pidfd)], Some(std::time::Duration::ZERO)), Ok([true])),
            None => procfs::stat(pid).is_none_or(|stat| stat.is_dead() || stat.started != self.started),
        }
    }
}

/// Follows the parents up to this process. A process whose parents have gone is known by its session.
fn kin_of(stat: Stat, is_worker: &dyn Fn(i32) -> bool) -> Kin {
    const DEEPEST: usize = 64;
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let mut worker = if is_worker(stat.session) { stat.session } else { 0 };
    let mut ours = worker > 0;
    let mut next = Some(stat);
    for _ in 0..DEEPEST {
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
    if ours { Kin::Ours { worker } } else { Kin::Foreign }
}

/// All processes that have timers.
#[derive(Debug)]
pub(crate) struct Clients {
    by_pid: HashMap<i32, Client>,
    support: Support,
}

impl Clients {
    pub(crate) fn new(support: Support) -> Self {
        Self { by_pid: HashMap::new(), support }
    }

    /// The client with this pid, taken hold of if it is new (second value). `ESRCH` if there is no such process.
    pub(crate) fn known(
        &mut self,
        pid: i32,
        now: Instant,
        is_worker: &dyn Fn(i32) -> bool,
    ) -> io::Result<(&mut Client, bool)> {
        use std::collections::hash_map::Entry;

        // Nobody tells of the end of a process that is not held by a pidfd: its number may be somebody else's by now.
        let is_unwatched = |client: &Client| client.hold.as_ref().and_then(Leader::pidfd).is_none();
        if self.by_pid.get(&pid).is_some_and(|client| is_unwatched(client) && client.has_ended(pid)) {
            self.by_pid.remove(&pid);
        }
        match self.by_pid.entry(pid) {
            Entry::Occupied(known) => Ok((known.into_mut(), false)),
            Entry::Vacant(place) => Ok((place.insert(Client::open(pid, now, self.support, is_worker)?), true)),
        }
    }

    /// The workers are others now: who belongs to whom is found out anew.
    pub(crate) fn look_again(&mut self, is_worker: &dyn Fn(i32) -> bool) {
        for (pid, client) in &mut self.by_pid {
            if client.hold.is_some()
                && !client.has_ended(*pid)
                && let Some(stat) = procfs::stat(*pid)
                && let kin @ Kin::Ours { .. } = kin_of(stat, is_worker)
            {
                client.kin = kin;
            }
        }
    }

    pub(crate) fn get(&self, pid: i32) -> Option<&Client> {
        self.by_pid.get(&pid)
    }

    pub(crate) fn remove(&mut self, pid: i32) -> Option<Client> {
        self.by_pid.remove(&pid)
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = (i32, Client)> + '_ {
        self.by_pid.drain()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::sys::probe;

    /// A child that ends with the test.
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
        let (client, is_new) = clients.known(child.pid(), Instant::now(), &|_| false).expect("a child");
        assert_eq!((client.kin, is_new), (Kin::Ours { worker: 0 }, true));
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
        let mut said = String::new();
        let mut output = std::io::BufReader::new(shell.0.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut output, &mut said).expect("a line");
        let pid: i32 = said.trim().parse().expect("a pid");

        let mut clients = Clients::new(probe::probe());
        let mut kin = |workers: &'static [i32]| {
            clients.remove(pid);
            let mine = move |pid: i32| workers.contains(&pid);
            clients.known(pid, Instant::now(), &mine).expect("alive").0.kin
        };
        assert_eq!(kin(&[]), Kin::Ours { worker: 0 });
        assert_eq!(kin(Box::leak(Box::new([shell_pid]))), Kin::Ours { worker: shell_pid });
        clients.look_again(&|_| false);
        let client = clients.get(pid).expect("known");
        assert_eq!(client.kin, Kin::Ours { worker: 0 });
        assert!(client.signal(libc::SIGKILL).expect("signal"));
    }
}
