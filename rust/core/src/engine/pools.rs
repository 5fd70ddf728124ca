//! All pools of warm workers on the engine thread. Each order and each event goes to its pool.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use super::order::PoolOrder;
use super::pool::{Pool, PoolHost, WarmTokens};
use super::warnings::Warnings;
use crate::error::Result;
use crate::health::status::WarmFigures;
use crate::sys::poller::Poller;
use crate::sys::process::ProcessHandle;
use crate::sys::spawn::{Command, SpawnStack};
use crate::thread::Reply;
use crate::warm::{WarmProgress, WarmSpec};

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
        let before = WarmFigures { used: self.used_before, ..WarmFigures::default() };
        self.by_id.values().map(Pool::figures).fold(before, |sum, of_pool| WarmFigures {
            ready_zygotes: sum.ready_zygotes + of_pool.ready_zygotes,
            parked: sum.parked + of_pool.parked,
            used: sum.used + of_pool.used,
        })
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
                let opened = self.open(new_id, *spec, host, stack, cgroup);
                let _ = reply.send(opened.map(|progress| (new_id, progress)));
            }
            PoolOrder::Resize { id, children, delayed } => {
                if let Some(pool) = self.by_id.get_mut(&id) {
                    pool.resize(children, delayed);
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

    fn open(
        &mut self,
        id: u64,
        spec: WarmSpec,
        host: PoolHost<'_>,
        stack: &mut SpawnStack,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Arc<WarmProgress>> {
        let pool = Pool::start(id, spec, host, self.tokens, self.warnings.clone(), stack, cgroup)?;
        let progress = pool.progress();
        self.by_id.insert(id, pool);
        Ok(progress)
    }

    /// Kills the processes of a pool. The reply is sent when they have ended.
    fn close(&mut self, id: u64, reply: Option<Reply<()>>) {
        if let Some(pool) = self.by_id.get_mut(&id) {
            pool.close(reply);
            self.remove_closed();
        } else if let Some(reply) = reply {
            let _ = reply.send(());
        }
    }

    /// Kills the processes of all pools.
    pub(super) fn close_all(&mut self) {
        self.by_id.values_mut().for_each(Pool::kill);
        self.remove_closed();
    }

    fn remove_closed(&mut self) {
        let used_before = &mut self.used_before;
        self.by_id.retain(|_, pool| {
            if pool.is_closed() {
                *used_before += pool.figures().used;
                pool.confirm_close();
            }
            !pool.is_closed()
        });
    }

    /// Turns a parked child of a pool into a worker, see [`Pool::release`].
    pub(super) fn release(
        &mut self,
        id: u64,
        command: &Command,
        fds: &[(RawFd, OwnedFd)],
        poller: &Poller,
    ) -> Option<ProcessHandle> {
        self.by_id.get_mut(&id)?.release(command, fds, poller)
    }

    /// Reads the messages of a zygote and of its children.
    pub(super) fn channel_ready(&mut self, id: u64, host: PoolHost<'_>) {
        if let Some(pool) = self.by_id.get_mut(&id) {
            pool.channel_ready(host);
        }
    }

    /// Handles the end of a zygote or of a child that was not released.
    pub(super) fn process_ended(&mut self, pid: i32, host: PoolHost<'_>) {
        if let Some(pool) = self.by_id.values_mut().find(|pool| pool.contains(pid)) {
            pool.process_ended(pid, host);
            self.remove_closed();
        }
    }

    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.by_id.values().filter_map(Pool::next_tick).min()
    }

    /// Handles deadlines and delayed refills.
    pub(super) fn tick(&mut self, now: Instant) {
        self.by_id.values_mut().for_each(|pool| pool.tick(now));
    }
}
