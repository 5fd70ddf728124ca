//! The guard process of the engine: registers workers with it, notices its death and starts a replacement.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::warnings::Warnings;
use crate::error::{Error, Result};
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::poller::{Interest, Poller};
use crate::sys::process::ProcessHandle;
use crate::sys::spawn::SpawnStack;
use crate::thread::Reply;

/// Limit on replacements of dead guards. Repeated kills are taken as intentional.
const MAX_REPLACEMENTS: u32 = 16;

/// The engine's guard process, if there is one.
#[derive(Debug)]
pub(super) struct GuardSlot {
    guard: Option<Guard>,
    program: Option<Program>,
    replaced: u32,
    dismissing: Option<Reply<()>>,
    lease: Option<Arc<LeasePage>>,
    warnings: Warnings,
}

impl GuardSlot {
    pub(super) fn new(warnings: Warnings) -> Self {
        Self { guard: None, program: None, replaced: 0, dismissing: None, lease: None, warnings }
    }

    /// Takes over a guard. `program` starts a replacement if the guard dies.
    pub(super) fn adopt(&mut self, guard: Guard, program: Program, poller: &Poller, token: u64) -> Result<()> {
        let watched = poller.add(guard.end_fd(), token, Interest::Readable);
        watched.map_err(|source| Error::os("watch", format!("the guard process {}", guard.pid()), source))?;
        if let Some(page) = &self.lease {
            guard.watch_lease(page);
        }
        (self.guard, self.program) = (Some(guard), Some(program));
        Ok(())
    }

    /// The guard kills the workers when the lease on this page expires.
    pub(super) fn watch_lease(&mut self, page: Arc<LeasePage>) {
        if let Some(guard) = &self.guard {
            guard.watch_lease(&page);
        }
        self.lease = Some(page);
    }

    pub(super) fn pid(&self) -> Option<i32> {
        self.guard.as_ref().map(Guard::pid)
    }

    pub(super) fn add_worker(&self, leader: i32, pidfd: Option<BorrowedFd<'_>>) {
        if let Some(guard) = &self.guard {
            guard.hold(leader, pidfd);
        }
    }

    pub(super) fn remove_worker(&self, leader: i32) {
        if let Some(guard) = &self.guard {
            guard.release(leader);
        }
    }

    /// Kills the guard. The reply is sent when it has ended.
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

    /// Handles readiness of the guard's descriptor. If the guard died unexpectedly, starts a replacement and adds a warning.
    pub(super) fn handle_end<'a>(
        &mut self,
        poller: &Poller,
        token: u64,
        pidfd: bool,
        stack: &mut SpawnStack,
        leaders: impl Iterator<Item = &'a ProcessHandle>,
    ) {
        let Some(guard) = self.guard.take_if(|guard| guard.has_ended()) else { return };
        let _ = poller.remove(guard.end_fd());
        if let Some(reply) = self.dismissing.take() {
            let _ = reply.send(());
            return;
        }
        let dead_pid = guard.pid();
        drop(guard);
        let Some(program) = self.program.take() else { return };
        self.replaced += 1;
        if self.replaced > MAX_REPLACEMENTS {
            self.warnings.add(format!(
                "The guard process {dead_pid} ended unexpectedly after {MAX_REPLACEMENTS} replacements; no new one is started"
            ));
            return;
        }
        let replaced = Guard::execute(&program, pidfd, stack).and_then(|guard| {
            let pid = guard.pid();
            self.adopt(guard, program, poller, token)?;
            Ok(pid)
        });
        match replaced {
            Ok(pid) => {
                leaders.for_each(|leader| self.add_worker(leader.pid(), leader.pidfd()));
                self.warnings
                    .add(format!("The guard process {dead_pid} ended unexpectedly; started a new one (pid {pid})"));
            }
            Err(error) => {
                self.warnings.add(format!(
                    "The guard process {dead_pid} ended unexpectedly, and a new one failed to start: {error}"
                ));
            }
        }
    }
}
