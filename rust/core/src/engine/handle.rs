//! The handle of the engine.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::event_loop::EventLoop;
use super::group::Group;
use super::health::HealthServer;
use super::order::{EngineOrder, Line, Observed};
use super::rotation::LogRotation;
use super::warm::WarmPool;
use super::warnings::Warnings;
use super::watchdog::Watchdog;
use crate::error::{Error, Result};
use crate::logs::{LogThread, Relay, RotationLimits, Tail, TailSpec, TeeThread};
use crate::sys::cgroup;
use crate::sys::guard::{Guard, Program};
use crate::sys::lease::LeasePage;
use crate::sys::probe::{self, Support};
use crate::sys::spawn::Command;
use crate::sys::stop_file::StopFile;
use crate::thread::{CloseOutcome, NativeThread};
use crate::warm::WarmSpec;
use crate::watchdog::Config;

/// Time for the thread to end after the last worker has ended.
const CLOSE_MARGIN: Duration = Duration::from_millis(100);

/// The engine: one thread that starts and supervises processes.
#[derive(Clone, Debug)]
pub struct Engine {
    line: Arc<Line>,
    support: Support,
    warnings: Warnings,
    log_thread: Arc<LogThread>,
    tee_thread: Arc<TeeThread>,
}

impl Engine {
    /// Starts the thread with the features of this kernel, which are probed in a short-lived child.
    pub fn start() -> Result<Self> {
        Self::start_with(probe::probe())
    }

    /// Starts the thread with only these kernel features; [`Support::NONE`] forces the fallback without pidfds.
    pub fn start_with(support: Support) -> Result<Self> {
        let warnings = Warnings::default();
        let thread_warnings = warnings.clone();
        let line = NativeThread::start("ferro-sup", |inbox| EventLoop::new(inbox, support, thread_warnings))?;
        let engine = line.remote()?;
        let report = move |event| {
            // The engine may have ended.
            let _ = engine.send(EngineOrder::Logs(event));
        };
        let (log_thread, tee_thread) = (Arc::new(LogThread::start()?), Arc::new(TeeThread::start(report)?));
        Ok(Self { line: Arc::new(line), support, warnings, log_thread, tee_thread })
    }

    /// The kernel features that the engine uses.
    #[must_use]
    pub fn support(&self) -> Support {
        self.support
    }

    /// Starts all commands in order. If one fails to start, the started ones are killed and reaped.
    pub fn spawn(&self, commands: Vec<Command>) -> Result<Group> {
        self.start_group(commands, None, None)
    }

    /// As [`Engine::spawn`], but parked children of the pool become the first workers. Further commands start new processes.
    pub fn spawn_warm(&self, commands: Vec<Command>, pool: &WarmPool) -> Result<Group> {
        self.start_group(commands, Some(pool), None)
    }

    /// As [`Engine::spawn`] or [`Engine::spawn_warm`]. The workers can read the deadline of their stop in `stop_file`.
    pub fn start_group(
        &self,
        commands: Vec<Command>,
        pool: Option<&WarmPool>,
        stop_file: Option<Arc<StopFile>>,
    ) -> Result<Group> {
        let pool = pool.map(WarmPool::id);
        let started = self.line.ask(|reply| EngineOrder::Spawn { commands, pool, stop_file, reply })??;
        Ok(Group::new(&self.line, &self.tee_thread, started))
    }

    /// Supervises processes that the caller started and reaps. The engine observes their exits and does not reap them.
    ///
    /// Each process may come with a sentinel, a descriptor that becomes readable when the process ends. The engine uses the sentinel on
    /// kernels without pidfds if the process is not a child of this process. The processes can read the deadline of their stop in
    /// `stop_file`.
    pub fn observe(&self, processes: Vec<(i32, Option<OwnedFd>)>, stop_file: Option<Arc<StopFile>>) -> Result<Group> {
        let processes = processes.into_iter().map(|(pid, sentinel)| Observed { pid, sentinel }).collect();
        let started = self.line.ask(|reply| EngineOrder::Observe { processes, stop_file, reply })??;
        Ok(Group::new(&self.line, &self.tee_thread, started))
    }

    /// Starts a zygote that forks warm workers. Needs pidfds.
    pub fn warm_pool(&self, spec: WarmSpec) -> Result<WarmPool> {
        WarmPool::open(&self.line, spec)
    }

    /// Follows growing files.
    pub fn tail(&self, spec: TailSpec) -> Result<Tail> {
        Tail::open(&self.tee_thread, spec)
    }

    /// Copies streams of workers to a console. Workers get their ends of the streams with [`Stdio::Fd`](crate::sys::spawn::Stdio::Fd).
    ///
    /// `successor` copies its standard input to standard error. It is started at the end of the engine for each stream that processes still
    /// use, and outlives this process. Without it, writes to such a stream fail.
    pub fn relay(&self, console: BorrowedFd<'_>, streams: usize, successor: Option<Command>) -> Result<Relay> {
        Relay::open(&self.log_thread, console, streams, successor)
    }

    /// Keeps log files within `limits`, while workers append to them. Call it before the files are followed.
    pub fn rotate_logs(&self, files: Vec<PathBuf>, limits: RotationLimits) -> Result<LogRotation> {
        LogRotation::open(&self.tee_thread, files, limits, &self.warnings)
    }

    /// Creates the named pipe of a watchdog. Requests are served after [`Watchdog::start`].
    pub fn watchdog(&self, config: Config) -> Result<Watchdog> {
        Watchdog::create(&self.line, config)
    }

    /// Serves health checks on a name or address of this host; port 0 picks a free port. Liveness probes fail when the agent has made no
    /// progress for longer than `timeout`.
    pub fn health_server(&self, host: &str, port: u16, timeout: Duration) -> Result<HealthServer> {
        HealthServer::open(&self.line, host, port, timeout)
    }

    /// Hands a guard to the engine, which registers all later workers with it. `program` starts a replacement if the guard dies.
    pub fn adopt_guard(&self, guard: Guard, program: Program) -> Result<()> {
        self.line.ask(|reply| EngineOrder::AdoptGuard { guard, program, reply })?
    }

    /// The guard kills the workers when the lease on this page expires, also while this process is suspended.
    pub fn watch_lease(&self, page: Arc<LeasePage>) -> Result<()> {
        self.line.send(EngineOrder::WatchLease(page))
    }

    /// Declares that all children outside this process's own session belong to workers. If this process is PID 1 or a subreaper, the
    /// engine reaps them.
    pub fn own_orphans(&self) -> Result<()> {
        self.line.send(EngineOrder::OwnOrphans)
    }

    /// Starts later workers in this cgroup; `None` starts them in the agent's own cgroup. `false` if the kernel does not support it.
    pub fn use_cgroup(&self, folder: Option<&Path>) -> Result<bool> {
        let failed = |source| Error::os("open", format!("cgroup {folder:?}"), source);
        let folder = folder.map(cgroup::open).transpose().map_err(failed)?;
        self.line.ask(|reply| EngineOrder::UseCgroup { folder, reply })
    }

    /// Kills the guard before an orderly end of this process. `false` if the guard has not ended within `timeout`.
    pub fn dismiss_guard(&self, timeout: Duration) -> Result<bool> {
        Ok(self.line.ask_within(timeout, |reply| EngineOrder::DismissGuard { reply })?.is_some())
    }

    /// Returns the engine's warnings since the last call.
    pub fn take_warnings(&self) -> Result<Vec<String>> {
        self.line.check_owner()?;
        Ok(self.warnings.take())
    }

    /// Ends the thread; running workers get SIGKILL. `false` if the thread has not ended within `timeout`. Idempotent.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        let ended = self.line.close(EngineOrder::Close { kill_wait: timeout }, Some(timeout + CLOSE_MARGIN))?;
        // Last, because the workers may write until they are killed.
        self.log_thread.close(CLOSE_MARGIN)?;
        self.tee_thread.close(CLOSE_MARGIN)?;
        // The waiters already have the error of a failed thread.
        Ok(matches!(ended, CloseOutcome::Ended(_)))
    }
}
