//! The handle of the engine.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::event_loop::EventLoop;
use super::group::Group;
use super::guard::Warnings;
use super::health::HealthServer;
use super::order::{Line, Observed, Order};
use super::tail::Tail;
use super::watchdog::Watchdog;
use crate::error::{Error, Result};
use crate::logs::TailSpec;
use crate::sys::cgroup;
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::probe::{self, Support};
use crate::sys::spawn::Command;
use crate::thread::{CloseOutcome, NativeThread};
use crate::watchdog::Config;

/// Time for the thread to end after the last worker is gone.
const CLOSE_MARGIN: Duration = Duration::from_millis(100);

/// The engine: one thread that starts and supervises processes.
#[derive(Clone, Debug)]
pub struct Engine {
    line: Arc<Line>,
    support: Support,
    warnings: Warnings,
}

impl Engine {
    /// Starts the thread with the features of this kernel, which are probed in a short-lived child.
    pub fn start() -> Result<Self> {
        Self::start_with(probe::probe())
    }

    /// Starts the thread with fewer features than the kernel has: [`Support::NONE`] forces the fallback without pidfds.
    pub fn start_with(support: Support) -> Result<Self> {
        let warnings = Warnings::default();
        let its = warnings.clone();
        let line = NativeThread::start("ferro-sup", |inbox| EventLoop::new(inbox, support, its))?;
        Ok(Self { line: Arc::new(line), support, warnings })
    }

    /// The kernel features that the engine uses.
    #[must_use]
    pub fn support(&self) -> Support {
        self.support
    }

    /// Starts all commands, in order. If one cannot be started, the others are killed and reaped.
    pub fn spawn(&self, commands: Vec<Command>) -> Result<Group> {
        let started = self.line.ask(|reply| Order::Spawn { commands, reply })??;
        Ok(Group::new(&self.line, started))
    }

    /// Supervises processes that the caller has started and reaps: the engine sees their exits and does not collect them.
    ///
    /// Each may come with a descriptor that becomes readable when the process ends. The engine uses it where there are no pidfds and the
    /// process is not a child of this process.
    pub fn observe(&self, processes: Vec<(i32, Option<OwnedFd>)>) -> Result<Group> {
        let processes = processes.into_iter().map(|(pid, sentinel)| Observed { pid, sentinel }).collect();
        let started = self.line.ask(|reply| Order::Observe { processes, reply })??;
        Ok(Group::new(&self.line, started))
    }

    /// Follows growing files.
    pub fn tail(&self, spec: TailSpec) -> Result<Tail> {
        Tail::open(&self.line, spec)
    }

    /// Creates the named pipe of a watchdog. It serves from [`Watchdog::start`] on.
    pub fn watchdog(&self, config: Config) -> Result<Watchdog> {
        Watchdog::create(&self.line, config)
    }

    /// Serves health checks on a name or address of this host; port 0 picks a free port. The agent counts as dead when it has made no
    /// progress for longer than `timeout`.
    pub fn health_server(&self, host: &str, port: u16, timeout: Duration) -> Result<HealthServer> {
        HealthServer::open(&self.line, host, port, timeout)
    }

    /// Hands a guard to the engine, which reports all workers to it from now on. `program` starts a new guard if it dies.
    pub fn adopt_guard(&self, guard: Guard, program: Program) -> Result<()> {
        self.line.ask(|reply| Order::AdoptGuard { guard, program, reply })?
    }

    /// The guard ends the workers at the time on this page, also while this process is suspended.
    pub fn watch_lease(&self, page: Arc<LeasePage>) -> Result<()> {
        self.line.send(Order::WatchLease(page))
    }

    /// Declares that all children in other sessions than this process's own belong to workers. Where this process is PID 1 or a subreaper,
    /// the engine reaps them.
    pub fn own_orphans(&self) -> Result<()> {
        self.line.send(Order::OwnOrphans)
    }

    /// Starts workers in this cgroup from now on; `None` starts them in the agent's own. `false` if the kernel cannot do that.
    pub fn use_cgroup(&self, folder: Option<&Path>) -> Result<bool> {
        let failed = |source| Error::os("open", format!("cgroup {folder:?}"), source);
        let folder = folder.map(cgroup::open).transpose().map_err(failed)?;
        self.line.ask(|reply| Order::UseCgroup { folder, reply })
    }

    /// Kills the guard, because this process ends in order. `false` if the guard is not gone within `timeout`.
    pub fn dismiss_guard(&self, timeout: Duration) -> Result<bool> {
        Ok(self.line.ask_within(timeout, |reply| Order::DismissGuard { reply })?.is_some())
    }

    /// Takes the warnings of the engine since the last call.
    pub fn take_warnings(&self) -> Result<Vec<String>> {
        self.line.check_owner()?;
        Ok(self.warnings.take())
    }

    /// Ends the thread; workers that still run get SIGKILL. `false` if it has not ended within `timeout`. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        let ended = self.line.close(Order::Close { kill_wait: timeout }, Some(timeout + CLOSE_MARGIN))?;
        // A failure of the thread has been published to the waiters.
        Ok(matches!(ended, CloseOutcome::Ended(_)))
    }
}
