//! One pool of warm workers on the engine thread: its zygote and their children.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::guard::GuardSlot;
use super::warnings::Warnings;
use crate::error::{Error, Result};
use crate::health::status::WarmFigures;
use crate::published::Published;
use crate::sys::channel::{Channel, MAX_FDS};
use crate::sys::poller::{Interest, Poller};
use crate::sys::probe::Support;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs;
use crate::sys::spawn::{Command, SpawnStack, Stdio, open_log, spawn};
use crate::sys::wait::{Block, Collect, ExitStatus, wait};
use crate::thread::Reply;
use crate::warm::wire::{MAX_BYTES, Release, Report, fork_order};
use crate::warm::{ImportedFiles, WarmPhase, WarmProgress, WarmSpec, WarmState};

/// From a release to the order for new children. The released workers start in this time, undisturbed.
const REFILL_DELAY: Duration = Duration::from_millis(200);
/// A pool whose children end this often before they have parked is given up.
const MAX_EARLY_ENDS: u32 = 3;
/// A pool whose parked children end this often without a release is given up.
const MAX_PARKED_ENDS: u32 = 16;

/// A child of a zygote.
struct Child {
    leader: ProcessHandle,
    state: ChildState,
}

enum ChildState {
    Forked,
    /// With the agent's end of its channel.
    Parked(Channel),
    /// It was parked and has ended, but its end was not handled yet.
    Ended,
    /// It was suspended while it was parked. It was killed, and the log says so.
    Discarded,
}

impl Child {
    fn is_parked(&self) -> bool {
        matches!(self.state, ChildState::Parked(_))
    }
}

pub(super) struct Pool {
    zygote: Option<ProcessHandle>,
    channel: Channel,
    children: HashMap<i32, Child>,
    wanted: usize,
    /// Children of the last order that the zygote has not forked yet. A second order would fork them twice.
    ordered: usize,
    began: Instant,
    /// When the zygote is killed, unless it is ready.
    deadline: Option<Instant>,
    timeout: Duration,
    refill_at: Option<Instant>,
    early_ends: u32,
    parked_ends: u32,
    is_closing: bool,
    /// Waits for the end of all processes.
    closed: Option<Reply<()>>,
    shared: Arc<WarmProgress>,
    tokens: WarmTokens,
    warnings: Warnings,
}

/// The poller tokens of pools.
#[derive(Clone, Copy)]
pub(super) struct WarmTokens {
    /// The token of a zygote's channel, by pool.
    pub(super) channel: fn(u64) -> u64,
    /// The token of a zygote or of a child, by pid.
    pub(super) process: fn(i32) -> u64,
}

/// The parts of the engine that pools use.
#[derive(Clone, Copy)]
pub(super) struct PoolHost<'a> {
    pub(super) support: Support,
    pub(super) poller: &'a Poller,
    pub(super) guard: &'a GuardSlot,
}

impl Pool {
    /// Starts the zygote of the pool with this id.
    pub(super) fn start(
        id: u64,
        spec: WarmSpec,
        host: PoolHost<'_>,
        tokens: WarmTokens,
        warnings: Warnings,
        stack: &mut SpawnStack,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        let PoolHost { support, poller, guard } = host;
        if !support.pidfd {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(Error::os("create", "a pool of warm workers without pidfds", source));
        }
        let failed = |source| Error::os("create", "the channel of a zygote", source);
        let (own_end, zygote_end) = Channel::pair().map_err(failed)?;
        own_end.send(&spec.configuration, &[]).map_err(failed)?;
        let command = Command { stdin: Some(Arc::new(OwnedFd::from(zygote_end))), ..spec.command };
        let spawned = spawn(&command, 0, support.pidfd, cgroup, stack)?;
        let zygote = ProcessHandle::spawned(spawned.pid, spawned.pidfd, support);
        let began = Instant::now();
        let watched = zygote.pidfd().ok_or(io::ErrorKind::Unsupported.into()).and_then(|pidfd| {
            poller.add(pidfd, (tokens.process)(zygote.pid()), Interest::Readable)?;
            poller.add(&own_end, (tokens.channel)(id), Interest::Readable)
        });
        if let Err(source) = watched {
            let _ = zygote.signal_group(libc::SIGKILL);
            let _ = wait(zygote.pid(), Collect::Reap, Block::Yes);
            return Err(Error::os("watch", format!("the zygote (pid {})", zygote.pid()), source));
        }
        guard.add_worker(zygote.pid(), zygote.pidfd());
        let state = WarmState {
            phase: WarmPhase::Importing,
            reason: String::new(),
            shortage: String::new(),
            zygote: zygote.pid(),
            parked: 0,
            released: 0,
            ready_after: None,
        };
        Ok(Self {
            zygote: Some(zygote),
            channel: own_end,
            children: HashMap::new(),
            wanted: spec.children,
            ordered: 0,
            began,
            deadline: began.checked_add(spec.timeout),
            timeout: spec.timeout,
            refill_at: None,
            early_ends: 0,
            parked_ends: 0,
            is_closing: false,
            closed: None,
            shared: Arc::new(WarmProgress { state: Published::new(state), imported: OnceLock::new() }),
            tokens,
            warnings,
        })
    }

    /// The state that the handle of the pool reads.
    pub(super) fn progress(&self) -> Arc<WarmProgress> {
        Arc::clone(&self.shared)
    }

    pub(super) fn figures(&self) -> WarmFigures {
        self.shared.state.read(|state| WarmFigures {
            ready_zygotes: u64::from(state.phase == WarmPhase::Ready && self.zygote.is_some()),
            parked: state.parked as u64,
            used: state.released,
        })
    }

    /// Whether this is the zygote or a child that was not released.
    pub(super) fn contains(&self, pid: i32) -> bool {
        self.zygote.as_ref().is_some_and(|zygote| zygote.pid() == pid) || self.children.contains_key(&pid)
    }

    /// Changes the number of children to keep parked. With `delayed`, missing ones are ordered a little later.
    pub(super) fn resize(&mut self, children: usize, delayed: bool) {
        self.wanted = children;
        if delayed {
            self.refill_later();
        } else {
            self.refill();
        }
    }

    /// Turns a parked child into a worker that runs `command` and has further descriptors with the given numbers. `None` if no child is
    /// parked.
    ///
    /// The poller and the guard already know the child; the caller watches it from now on.
    pub(super) fn release(
        &mut self,
        command: &Command,
        fds: &[(RawFd, OwnedFd)],
        poller: &Poller,
    ) -> Option<ProcessHandle> {
        if !self.children.values().any(Child::is_parked) {
            return None;
        }
        let streams = streams_of(command).ok()?;
        let message = Release::of(command, fds.iter().map(|(number, _)| *number).collect()).encode();
        let fds: Vec<BorrowedFd<'_>> = streams.iter().chain(fds.iter().map(|(_, fd)| fd)).map(AsFd::as_fd).collect();
        if message.len() > MAX_BYTES || fds.len() > MAX_FDS {
            self.warnings.add(format!(
                "A worker starts without warm imports: its command and environment have {} bytes and {} descriptors; {MAX_BYTES} and \
                 {MAX_FDS} are possible",
                message.len(),
                fds.len()
            ));
            return None;
        }
        while let Some(pid) = self.next_parked() {
            let child = self.children.remove(&pid)?;
            if matches!(&child.state, ChildState::Parked(channel) if channel.send(&message, &fds).is_ok()) {
                if let Some(pidfd) = child.leader.pidfd() {
                    let _ = poller.remove(pidfd);
                }
                self.refill_later();
                self.publish(|state| state.released += 1);
                return Some(child.leader);
            }
            // Its end is handled when the poller reports it.
            let _ = child.leader.signal_group(libc::SIGKILL);
            self.children.insert(pid, Child { state: ChildState::Ended, ..child });
        }
        None
    }

    /// Reads the messages of the zygote and of its children.
    pub(super) fn channel_ready(&mut self, host: PoolHost<'_>) {
        let mut buffer = vec![0; MAX_BYTES];
        loop {
            match self.channel.receive(&mut buffer, false) {
                Ok((0, _)) => {
                    // The zygote and all its children have closed their ends. Their pidfds report the ends of the processes.
                    let _ = host.poller.remove(&self.channel);
                    return;
                }
                Ok((length, fds)) => {
                    if let Some(report) = Report::decode(&buffer[..length]) {
                        self.handle(report, fds.into_iter().next(), host);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Handles the end of the zygote or of a child that was not released.
    pub(super) fn process_ended(&mut self, pid: i32, host: PoolHost<'_>) {
        let PoolHost { poller, guard, .. } = host;
        let Ok(Some(_)) = wait(pid, Collect::Observe, Block::No) else { return };
        // Children that were forked before the end of the zygote, and its reason.
        self.channel_ready(host);
        // Imports may have started processes. Until the leader is reaped, its pid names the group.
        let leader = self.zygote.as_ref().filter(|zygote| zygote.pid() == pid);
        if let Some(leader) = leader {
            let _ = leader.signal_group(libc::SIGKILL);
            self.reap_unreported(pid);
        } else if let Some(child) = self.children.get(&pid) {
            let _ = child.leader.signal_group(libc::SIGKILL);
        }
        let Ok(Some((status, _))) = wait(pid, Collect::Reap, Block::No) else { return };
        guard.remove_worker(pid);
        if let Some(zygote) = self.zygote.take_if(|zygote| zygote.pid() == pid) {
            let _ = zygote.pidfd().map(|pidfd| poller.remove(pidfd));
            self.give_up(WarmPhase::Lost, &format!("the zygote (pid {pid}) {status}"));
        } else if let Some(child) = self.children.remove(&pid) {
            let _ = child.leader.pidfd().map(|pidfd| poller.remove(pidfd));
            self.child_ended(pid, &child.state, status);
        }
        self.publish(|_| {});
    }

    /// Kills the zygote and all children. The reply is sent by [`Pool::confirm_close`].
    pub(super) fn close(&mut self, reply: Option<Reply<()>>) {
        self.kill();
        self.closed = reply;
    }

    /// Kills the zygote and all children.
    pub(super) fn kill(&mut self) {
        self.is_closing = true;
        self.refill_at = None;
        self.kill_zygote();
        for child in self.children.values() {
            let _ = child.leader.signal_group(libc::SIGKILL);
        }
    }

    /// Whether the pool was closed and all its processes have ended.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closing && self.zygote.is_none() && self.children.is_empty()
    }

    /// Replies to the request to close the pool.
    pub(super) fn confirm_close(&self) {
        if let Some(reply) = &self.closed {
            let _ = reply.send(());
        }
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        [self.deadline, self.refill_at].into_iter().flatten().min()
    }

    /// Handles the deadline of the imports and a delayed refill.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.refill_at.is_some_and(|at| at <= now) {
            self.refill();
        }
        if self.deadline.is_some_and(|at| at <= now) {
            let reason = format!("the imports have not ended within {} s", self.timeout.as_secs_f64());
            self.give_up(WarmPhase::Refused, &reason);
        }
    }

    fn publish(&self, change: impl FnOnce(&mut WarmState)) {
        let parked = self.children.values().filter(|child| child.is_parked()).count();
        self.shared.state.publish(|state| {
            state.parked = parked;
            change(state);
        });
    }

    fn phase(&self) -> WarmPhase {
        self.shared.state.read(|state| state.phase)
    }

    /// Gives the zygote up, unless it was given up before.
    fn give_up(&mut self, phase: WarmPhase, reason: &str) {
        if !self.is_closing && !matches!(self.phase(), WarmPhase::Lost | WarmPhase::Refused) {
            self.warnings.add(format!("The zygote prepares no further workers: {reason}"));
            self.publish(|state| {
                state.phase = phase;
                reason.clone_into(&mut state.reason);
            });
        }
        (self.deadline, self.refill_at) = (None, None);
        self.kill_zygote();
    }

    /// Reaps children that a killed zygote has not reported. A child leaves the zygote's session only after its report, so they were still
    /// in that session, and were killed with the zygote's group.
    fn reap_unreported(&self, zygote: i32) {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        for stat in procfs::pids().into_iter().filter_map(procfs::stat) {
            let is_unreported = stat.parent == own && stat.session == zygote && stat.pid != zygote;
            if is_unreported && !self.children.contains_key(&stat.pid) {
                let _ = wait(stat.pid, Collect::Reap, Block::Yes);
            }
        }
    }

    fn kill_zygote(&self) {
        if let Some(zygote) = &self.zygote {
            let _ = zygote.signal_group(libc::SIGKILL);
        }
    }

    /// A parked child that can run. Kills children that are suspended.
    fn next_parked(&mut self) -> Option<i32> {
        let parked: Vec<i32> =
            self.children.iter().filter(|(_, child)| child.is_parked()).map(|(pid, _)| *pid).collect();
        for pid in parked {
            let child = self.children.get_mut(&pid)?;
            if !child.leader.is_stopped() {
                return Some(pid);
            }
            let _ = child.leader.signal_group(libc::SIGKILL);
            child.state = ChildState::Discarded;
            self.warnings.add(format!("A parked process (pid {pid}) was suspended. It was killed and is replaced"));
        }
        None
    }

    fn refill_later(&mut self) {
        self.refill_at = self.refill_at.or(Some(Instant::now() + REFILL_DELAY));
    }

    /// Orders the missing children, unless the zygote still works on an order. The end of an order calls this again.
    fn refill(&mut self) {
        self.refill_at = None;
        let missing = self.wanted.saturating_sub(self.children.len());
        if missing > 0 && self.ordered == 0 && self.phase() == WarmPhase::Ready && !self.is_closing {
            let count = u32::try_from(missing).unwrap_or(u32::MAX);
            self.publish(|state| state.shortage.clear());
            match self.channel.send(&fork_order(count), &[]) {
                Ok(()) => self.ordered = missing,
                Err(error) => self.give_up(WarmPhase::Lost, &format!("the zygote does not accept orders: {error}")),
            }
        }
    }

    fn child_ended(&mut self, pid: i32, state: &ChildState, status: ExitStatus) {
        if self.is_closing {
            return;
        }
        let had_parked = !matches!(state, ChildState::Forked);
        // The end of a zygote takes children with it that have no process group of their own yet.
        let is_expected = !had_parked && self.phase() != WarmPhase::Ready;
        if !is_expected && !matches!(state, ChildState::Discarded) {
            let event = if had_parked { "A parked process" } else { "A process of the zygote" };
            self.warnings.add(format!("{event} (pid {pid}) {status} before it was used"));
        }
        self.count_end(had_parked);
    }

    fn count_end(&mut self, had_parked: bool) {
        let (count, limit) = if had_parked {
            self.parked_ends += 1;
            (self.parked_ends, MAX_PARKED_ENDS)
        } else {
            self.early_ends += 1;
            (self.early_ends, MAX_EARLY_ENDS)
        };
        if count >= limit {
            let reason = format!("{count} processes of the zygote ended before they were used");
            self.give_up(WarmPhase::Refused, &reason);
        } else {
            self.refill_later();
        }
    }

    /// Watches a new child.
    fn adopt(&mut self, pid: i32, host: PoolHost<'_>) {
        let PoolHost { support, poller, guard } = host;
        self.ordered = self.ordered.saturating_sub(1);
        // A process that is no child was reaped as an orphan, and its pid may have been reused. A child keeps its pid.
        if matches!(wait(pid, Collect::Observe, Block::No), Ok(Some((ExitStatus::Unknown, _)))) {
            return;
        }
        let watched = ProcessHandle::open(pid, support).and_then(|leader| {
            let pidfd = leader.pidfd().ok_or(io::ErrorKind::Unsupported)?;
            poller.add(pidfd, (self.tokens.process)(pid), Interest::Readable)?;
            Ok(leader)
        });
        match watched {
            Ok(leader) => {
                guard.add_worker(pid, leader.pidfd());
                if self.is_closing {
                    let _ = leader.signal_group(libc::SIGKILL);
                }
                self.children.insert(pid, Child { leader, state: ChildState::Forked });
            }
            Err(error) => {
                self.warnings
                    .add(format!("A process of the zygote (pid {pid}) cannot be watched ({error}). It was killed"));
                let _ = ProcessHandle::spawned(pid, None, support).signal(libc::SIGKILL);
                let _ = wait(pid, Collect::Reap, Block::Yes);
            }
        }
        if self.ordered == 0 {
            self.refill();
        }
    }

    fn handle(&mut self, report: Report, fd: Option<OwnedFd>, host: PoolHost<'_>) {
        match report {
            Report::Ready => {
                let Some(imported) = fd else { return };
                let _ = self.shared.imported.set(ImportedFiles::from(imported));
                self.deadline = None;
                let ready_after = self.began.elapsed();
                self.publish(|state| {
                    if state.phase == WarmPhase::Importing {
                        (state.phase, state.ready_after) = (WarmPhase::Ready, Some(ready_after));
                    }
                });
                self.refill();
            }
            Report::Refused(reason) => self.give_up(WarmPhase::Refused, &reason),
            Report::Shortage(reason) => {
                self.ordered = 0;
                self.warnings.add(format!(
                    "The zygote cannot fork another worker ({reason}); {} of {} are parked",
                    self.children.len(),
                    self.wanted
                ));
                self.publish(|state| state.shortage = reason);
            }
            Report::Forked { pid } => self.adopt(pid, host),
            Report::Parked { pid } => {
                if let (Some(child), Some(fd)) = (self.children.get_mut(&pid), fd) {
                    child.state = ChildState::Parked(Channel::from(fd));
                }
                self.publish(|_| {});
            }
        }
    }
}

/// The standard streams of a command: its files, or the agent's streams.
fn streams_of(command: &Command) -> io::Result<[OwnedFd; 3]> {
    let open = |stdio: &Stdio, own: BorrowedFd<'_>| match stdio {
        Stdio::Inherit => own.try_clone_to_owned(),
        Stdio::File(path) => open_log(path),
        Stdio::Fd(fd) => fd.try_clone(),
    };
    let stdin = match &command.stdin {
        Some(stdin) => stdin.try_clone()?,
        None => rustix::stdio::stdin().try_clone_to_owned()?,
    };
    Ok([stdin, open(&command.stdout, rustix::stdio::stdout())?, open(&command.stderr, rustix::stdio::stderr())?])
}

#[cfg(test)]
mod tests;
