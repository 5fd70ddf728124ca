//! The guard process of the engine: tells it about workers, notices its death and starts a new one.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::poller::{Interest, Poller};
use crate::sys::process::ProcessHandle;
use crate::sys::spawn::SpawnStack;
use crate::thread::Reply;

/// Most replacements of a dead guard. A user who kills every one of them wants none.
const MOST_REPLACEMENTS: u32 = 16;

/// Warnings of the engine for the program's log.
#[derive(Clone, Debug, Default)]
pub(super) struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    fn add(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The engine's end of its guard process, if it has one.
#[derive(Debug)]
pub(super) struct GuardPost {
    guard: Option<Guard>,
    program: Option<Program>,
    replaced: u32,
    dismissing: Option<Reply<()>>,
    lease: Option<Arc<LeasePage>>,
    warnings: Warnings,
}

impl GuardPost {
    pub(super) fn new(warnings: Warnings) -> Self {
        Self { guard: None, program: None, replaced: 0, dismissing: None, lease: None, warnings }
    }

    /// Takes over a guard. `program` starts a new one if it dies.
    pub(super) fn adopt(&mut self, guard: Guard, program: Program, poller: &Poller, token: u64) -> Result<()> {
        let watched = poller.add(guard.end_fd(), token, Interest::Readable);
        watched.map_err(|source| Error::os("watch", format!("the guard process {}", guard.pid()), source))?;
        if let Some(page) = &self.lease {
            guard.watch_lease(page);
        }
        (self.guard, self.program) = (Some(guard), Some(program));
        Ok(())
    }

    /// The workers may run until the time on this page.
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

    /// The guard has ended, or is about to; `true` if it died unexpectedly, which adds a warning.
    pub(super) fn ended<'a>(
        &mut self,
        poller: &Poller,
        token: u64,
        pidfd: bool,
        stack: &mut SpawnStack,
        leaders: impl Iterator<Item = &'a ProcessHandle>,
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
            self.warnings.add(format!(
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
                self.warnings
                    .add(format!("The guard process {lost} has ended unexpectedly; started a new one (pid {pid})"));
            }
            Err(error) => {
                self.warnings.add(format!(
                    "The guard process {lost} has ended unexpectedly, and a new one cannot be started: {error}"
                ));
            }
        }
        true
    }
}
