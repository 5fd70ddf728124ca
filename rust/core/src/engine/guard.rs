//! The engine's part in the guard process: it tells it of workers, notices its loss and starts another one.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::handle::Engine;
use super::request::{Reply, Request};
use crate::error::{Error, Result};
use crate::sys::cgroup;
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::poller::{Interest, Poller};
use crate::sys::process::Leader;
use crate::sys::spawn::SpawnStack;

/// So often a lost guard is replaced. Somebody who kills each one means it.
const MOST_REPLACEMENTS: u32 = 16;

/// What the engine has to say to its owner's log.
#[derive(Clone, Debug, Default)]
pub(super) struct Remarks(Arc<Mutex<Vec<String>>>);

impl Remarks {
    fn add(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The guard of this engine's workers, if there is one.
#[derive(Debug)]
pub(super) struct Post {
    guard: Option<Guard>,
    program: Option<Program>,
    replaced: u32,
    dismissing: Option<Reply<()>>,
    lease: Option<Arc<LeasePage>>,
    remarks: Remarks,
}

impl Post {
    pub(super) fn new(remarks: Remarks) -> Self {
        Self { guard: None, program: None, replaced: 0, dismissing: None, lease: None, remarks }
    }

    /// Takes over a guard. `program` starts another one when it is lost.
    pub(super) fn adopt(&mut self, guard: Guard, program: Program, poller: &Poller, token: u64) -> Result<()> {
        let watched = poller.add(guard.end_fd(), token, Interest::Readable);
        watched.map_err(|source| Error::os("watch", format!("the guard process {}", guard.pid()), source))?;
        if let Some(page) = &self.lease {
            guard.watch_lease(page);
        }
        (self.guard, self.program) = (Some(guard), Some(program));
        Ok(())
    }

    /// The workers may run as long as this page says.
    pub(super) fn watch_lease(&mut self, page: Arc<LeasePage>) {
        if let Some(guard) = &self.guard {
            guard.watch_lease(&page);
        }
        self.lease = Some(page);
    }

    /// Process id of the guard.
    pub(super) fn pid(&self) -> Option<i32> {
        self.guard.as_ref().map(Guard::pid)
    }

    pub(super) fn hold(&self, leader: i32, pidfd: Option<BorrowedFd<'_>>) {
        if let Some(guard) = &self.guard {
            guard.hold(leader, pidfd);
        }
    }

    pub(super) fn release(&self, leader: i32) {
        if let Some(guard) = &self.guard {
            guard.release(leader);
        }
    }

    /// Kills the guard; the answer comes when it is gone.
    pub(super) fn dismiss(&mut self, reply: Reply<()>) {
        match &self.guard {
            Some(guard) => {
                guard.kill();
                self.dismissing = Some(reply);
            }
            None => {
                let _ = reply.send(());
            }
        }
    }

    /// The guard has ended, or is about to: `true` if it was lost, and there is something to say about it.
    pub(super) fn ended<'a>(
        &mut self,
        poller: &Poller,
        token: u64,
        pidfd: bool,
        stack: &mut SpawnStack,
        leaders: impl Iterator<Item = &'a Leader>,
    ) -> bool {
        let Some(guard) = self.guard.take_if(|guard| guard.has_ended()) else { return false };
        let _ = poller.remove(guard.end_fd());
        if let Some(reply) = self.dismissing.take() {
            let _ = reply.send(());
            return false;
        }
        let lost = guard.pid();
        drop(guard);
        let Some(program) = self.program.take() else { return false };
        self.replaced += 1;
        if self.replaced > MOST_REPLACEMENTS {
            self.remarks.add(format!(
                "The guard process {lost} has ended, like {MOST_REPLACEMENTS} before it; no further one is started"
            ));
            return true;
        }
        let replaced = Guard::execute(&program, pidfd, stack).and_then(|guard| {
            let pid = guard.pid();
            self.adopt(guard, program, poller, token)?;
            Ok(pid)
        });
        match replaced {
            Ok(pid) => {
                leaders.for_each(|leader| self.hold(leader.pid(), leader.pidfd()));
                self.remarks
                    .add(format!("The guard process {lost} has ended unexpectedly; started a new one (pid {pid})"));
            }
            Err(error) => {
                self.remarks.add(format!(
                    "The guard process {lost} has ended unexpectedly, and a new one cannot be started: {error}"
                ));
            }
        }
        true
    }
}

impl Engine {
    /// Hands a guard over to the engine, which tells it of all workers from now on.
    pub fn adopt_guard(&self, guard: Guard, program: Program) -> Result<()> {
        self.line().ask(|reply| Request::AdoptGuard { guard, program, reply })?
    }

    /// The guard ends the workers when this page says that they may not run any longer, also while this process is suspended.
    pub fn watch_lease(&self, page: Arc<LeasePage>) -> Result<()> {
        self.line().tell(Request::WatchLease(page))
    }

    /// All orphans in other sessions than this process's own are of workers: this process has no such children of its own. Where it is PID 1 or a
    /// subreaper, their zombies are collected.
    pub fn own_orphans(&self) -> Result<()> {
        self.line().tell(Request::OwnOrphans)
    }

    /// Workers are born in this cgroup from now on; `None` lets them be born in the agent's. `false` if the kernel cannot do that.
    pub fn use_cgroup(&self, folder: Option<&Path>) -> Result<bool> {
        let failed = |source| Error::os("open", format!("cgroup {folder:?}"), source);
        let folder = folder.map(cgroup::open).transpose().map_err(failed)?;
        self.line().ask(|reply| Request::UseCgroup { folder, reply })
    }

    /// Kills the guard: this process ends as it should. `false` if the guard was not gone within `timeout`.
    pub fn dismiss_guard(&self, timeout: Duration) -> Result<bool> {
        self.line().ask_within(timeout, |reply| Request::DismissGuard { reply })
    }

    /// What the engine had to say since the last call.
    pub fn take_remarks(&self) -> Result<Vec<String>> {
        self.line().check_owner()?;
        Ok(self.remarks().take())
    }
}
