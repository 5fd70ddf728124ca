//! Pools of warm workers on the engine thread: a zygote, its parked children, and their release.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use super::order::PoolOrder;
use super::pool::{Child, ChildState, Pool, PoolHost, REFILL_DELAY, WarmTokens, streams_of};
use super::warnings::Warnings;
use crate::error::{Error, Result};
use crate::health::status::WarmFigures;
use crate::published::Published;
use crate::sys::channel::{Channel, MAX_FDS};
use crate::sys::poller::{Interest, Poller};
use crate::sys::process::ProcessHandle;
use crate::sys::spawn::{Command, SpawnStack, spawn};
use crate::sys::wait::{Block, Collect, wait};
use crate::thread::Reply;
use crate::warm::wire::{MAX_BYTES, Release, Report};
use crate::warm::{WarmPhase, WarmProgress, WarmSpec, WarmState};

/// All pools of an engine.
pub(super) struct Pools {
    by_id: BTreeMap<u64, Pool>,
    /// Number of workers that closed pools have released.
    used_before: u64,
    /// Released processes that the program reaps and has not let the engine observe yet.
    unobserved: HashSet<i32>,
    tokens: WarmTokens,
    warnings: Warnings,
}

impl Pools {
    pub(super) fn new(tokens: WarmTokens, warnings: Warnings) -> Self {
        Self { by_id: BTreeMap::new(), used_before: 0, unobserved: HashSet::new(), tokens, warnings }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The sums over all pools.
    pub(super) fn figures(&self) -> WarmFigures {
        let mut figures = WarmFigures { used: self.used_before, ..WarmFigures::default() };
        for pool in self.by_id.values() {
            pool.shared.state.read(|state| {
                figures.ready_zygotes += u64::from(state.phase == WarmPhase::Ready && pool.zygote.is_some());
                figures.parked += state.parked as u64;
                figures.used += state.released;
            });
        }
        figures
    }

    /// Whether this is a zygote, a child that was not released, or a released child that the engine does not observe yet.
    pub(super) fn contains(&self, pid: i32) -> bool {
        self.unobserved.contains(&pid) || self.by_id.values().any(|pool| pool.contains(pid))
    }

    /// The indices of released children among processes that the engine observes from now on.
    pub(super) fn observed(&mut self, pids: &[i32]) -> Vec<usize> {
        (0..pids.len()).filter(|index| self.unobserved.remove(&pids[*index])).collect()
    }

    /// Handles an order. A new pool gets the id `new_id`.
    pub(super) fn handle(
        &mut self,
        order: PoolOrder,
        new_id: u64,
        host: PoolHost<'_>,
        stack: &mut SpawnStack,
        cgroup: Option<BorrowedFd<'_>>,
    ) {
        match order {
            PoolOrder::Open { spec, reply } => {
                let opened = self.open(new_id, spec, host, stack, cgroup);
                let _ = reply.send(opened.map(|shared| (new_id, shared)));
            }
            PoolOrder::Resize { id, children, delayed } => {
                if let Some(pool) = self.by_id.get_mut(&id) {
                    pool.wanted = children;
                    if delayed {
                        pool.refill_at = pool.refill_at.or(Some(Instant::now() + REFILL_DELAY));
                    } else {
                        pool.refill(&self.warnings);
                    }
                }
            }
            PoolOrder::Release { id, command, fds, reply } => {
                let pid = self.release(id, &command, &fds, host.poller).map(|leader| leader.pid());
                if let Some(pid) = pid {
                    // Registered again when the engine observes it.
                    host.guard.remove_worker(pid);
                    self.unobserved.insert(pid);
                }
                let _ = reply.send(pid);
            }
            PoolOrder::Close { id, reply } => self.close(id, reply),
        }
    }

    /// Starts the zygote of a new pool.
    fn open(
        &mut self,
        id: u64,
        spec: Box<WarmSpec>,
        host: PoolHost<'_>,
        stack: &mut SpawnStack,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Arc<WarmProgress>> {
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
        let state = WarmState {
            phase: WarmPhase::Importing,
            reason: String::new(),
            shortage: String::new(),
            zygote: zygote.pid(),
            parked: 0,
            released: 0,
            ready_after: None,
        };
        let shared = Arc::new(WarmProgress { state: Published::new(state), imported: std::sync::OnceLock::new() });
        let watched = zygote.pidfd().ok_or(io::ErrorKind::Unsupported.into()).and_then(|pidfd| {
            poller.add(pidfd, (self.tokens.process)(zygote.pid()), Interest::Readable)?;
            poller.add(&own_end, (self.tokens.channel)(id), Interest::Readable)
        });
        if let Err(source) = watched {
            let _ = zygote.signal_group(libc::SIGKILL);
            let _ = wait(zygote.pid(), Collect::Reap, Block::Yes);
            return Err(Error::os("watch", format!("the zygote (pid {})", zygote.pid()), source));
        }
        guard.add_worker(zygote.pid(), zygote.pidfd());
        self.by_id.insert(
            id,
            Pool {
                zygote: Some(zygote),
                channel: own_end,
                children: HashMap::new(),
                half_reported: HashSet::new(),
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
                shared: Arc::clone(&shared),
            },
        );
        Ok(shared)
    }

    /// Kills the zygote and all children. The reply is sent when they have ended.
    fn close(&mut self, id: u64, reply: Option<Reply<()>>) {
        match self.by_id.get_mut(&id) {
            Some(pool) => {
                pool.kill();
                pool.closed = reply;
            }
            None => {
                if let Some(reply) = reply {
                    let _ = reply.send(());
                }
            }
        }
        self.remove_closed();
    }

    /// Kills the processes of all pools.
    pub(super) fn close_all(&mut self) {
        for pool in self.by_id.values_mut() {
            pool.kill();
        }
        self.remove_closed();
    }

    fn remove_closed(&mut self) {
        let used_before = &mut self.used_before;
        self.by_id.retain(|_, pool| {
            let has_ended = pool.zygote.is_none() && pool.children.is_empty();
            if has_ended && pool.is_closing {
                *used_before += pool.shared.state.read(|state| state.released);
            }
            if has_ended && let Some(reply) = &pool.closed {
                let _ = reply.send(());
            }
            !(has_ended && pool.is_closing)
        });
    }

    /// Turns a parked child into a worker that runs `command` and has further descriptors with the given numbers. `None` if no child is
    /// parked.
    ///
    /// The poller and the guard already know the child; the caller watches it from now on.
    pub(super) fn release(
        &mut self,
        id: u64,
        command: &Command,
        fds: &[(RawFd, OwnedFd)],
        poller: &Poller,
    ) -> Option<ProcessHandle> {
        let pool = self.by_id.get_mut(&id)?;
        if !pool.children.values().any(Child::is_parked) {
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
        while let Some(pid) = pool.next_parked(&self.warnings) {
            let child = pool.children.remove(&pid)?;
            if matches!(&child.state, ChildState::Parked(channel) if channel.send(&message, &fds).is_ok()) {
                if let Some(pidfd) = child.leader.pidfd() {
                    let _ = poller.remove(pidfd);
                }
                pool.refill_at = pool.refill_at.or(Some(Instant::now() + REFILL_DELAY));
                pool.publish(|state| state.released += 1);
                return Some(child.leader);
            }
            // Its end is handled when the poller reports it.
            let _ = child.leader.signal_group(libc::SIGKILL);
            pool.children.insert(pid, Child { state: ChildState::Ended, ..child });
        }
        None
    }

    /// Reads the messages of a zygote and of its children.
    pub(super) fn channel_ready(&mut self, id: u64, host: PoolHost<'_>) {
        let tokens = self.tokens;
        let Some(pool) = self.by_id.get_mut(&id) else { return };
        let mut buffer = vec![0; MAX_BYTES];
        loop {
            match pool.channel.receive(&mut buffer, false) {
                Ok((0, _)) => {
                    // The zygote and all its children have closed their ends. Their pidfds report the ends of the processes.
                    let _ = host.poller.remove(&pool.channel);
                    return;
                }
                Ok((length, fds)) => {
                    if let Some(report) = Report::decode(&buffer[..length]) {
                        pool.handle(report, fds.into_iter().next(), host, tokens, &self.warnings);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Handles the end of a zygote or of a child that was not released.
    pub(super) fn process_ended(&mut self, pid: i32, host: PoolHost<'_>) {
        let PoolHost { poller, guard, .. } = host;
        let Some(id) = self.by_id.iter().find(|(_, pool)| pool.contains(pid)).map(|(id, _)| *id) else { return };
        let Ok(Some(_)) = wait(pid, Collect::Observe, Block::No) else { return };
        // Children that were forked before the end of the zygote, and its reason.
        self.channel_ready(id, host);
        let Some(pool) = self.by_id.get_mut(&id) else { return };
        // Imports may have started processes. Until the leader is reaped, its pid names the group.
        let leader = pool.zygote.as_ref().filter(|zygote| zygote.pid() == pid);
        if let Some(leader) = leader {
            let _ = leader.signal_group(libc::SIGKILL);
            pool.reap_unreported(pid);
        } else if let Some(child) = pool.children.get(&pid) {
            let _ = child.leader.signal_group(libc::SIGKILL);
        }
        let Ok(Some((status, _))) = wait(pid, Collect::Reap, Block::No) else { return };
        guard.remove_worker(pid);
        if let Some(zygote) = pool.zygote.take_if(|zygote| zygote.pid() == pid) {
            let _ = zygote.pidfd().map(|pidfd| poller.remove(pidfd));
            let reason = format!("the zygote (pid {pid}) {status}");
            pool.give_up(WarmPhase::Lost, &reason, &self.warnings);
        } else if let Some(child) = pool.children.remove(&pid) {
            let _ = child.leader.pidfd().map(|pidfd| poller.remove(pidfd));
            if !pool.is_closing {
                let had_parked = !matches!(child.state, ChildState::Forked);
                if !had_parked {
                    pool.half_reported.remove(&pid);
                }
                // The end of a zygote takes children with it that have no process group of their own yet.
                let is_expected = !had_parked && pool.phase() != WarmPhase::Ready;
                if !is_expected && !matches!(child.state, ChildState::Discarded) {
                    let event = if had_parked { "A parked process" } else { "A process of the zygote" };
                    self.warnings.add(format!("{event} (pid {pid}) {status} before it was used"));
                }
                pool.count_end(had_parked, &self.warnings);
            }
        }
        self.by_id.values().for_each(|pool| pool.publish(|_| {}));
        self.remove_closed();
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.by_id.values().flat_map(|pool| [pool.deadline, pool.refill_at]).flatten().min()
    }

    /// Handles deadlines and delayed refills.
    pub(super) fn tick(&mut self, now: Instant) {
        for pool in self.by_id.values_mut() {
            if pool.refill_at.is_some_and(|at| at <= now) {
                pool.refill(&self.warnings);
            }
            if pool.deadline.is_some_and(|at| at <= now) {
                let reason = format!("the imports have not ended within {} s", pool.timeout.as_secs_f64());
                pool.give_up(WarmPhase::Refused, &reason, &self.warnings);
            }
        }
    }
}
