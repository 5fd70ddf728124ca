//! The handle of a watchdog.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::order::{EngineOrder, Line};
use crate::error::{Error, Result};
use crate::thread::Reply;
use crate::watchdog::{Config, Expiry, Reports, WatchdogCounts, WatchdogOrder, WorkerProcess, create_files, wire};

/// A named pipe through which processes set their own deadlines. Dropping the handle closes the watchdog.
#[derive(Debug)]
pub struct Watchdog {
    line: Arc<Line>,
    id: u64,
    config: Config,
    reports: Arc<Reports>,
}

impl Watchdog {
    /// Creates the named pipe of a watchdog. Requests are served after [`Watchdog::start`].
    pub(super) fn create(line: &Arc<Line>, config: Config) -> Result<Self> {
        line.check_owner()?;
        let files = create_files(&config.path)?;
        let reports = Arc::new(Reports::new()?);
        let (server_reports, server_config) = (Arc::clone(&reports), config.clone());
        let id = line.ask(|reply| EngineOrder::CreateWatchdog {
            config: server_config,
            files,
            reports: server_reports,
            reply,
        })?;
        Ok(Self { line: Arc::clone(line), id, config, reports })
    }

    fn ask<T>(&self, order: impl FnOnce(Reply<T>) -> WatchdogOrder) -> Result<T> {
        self.line.ask(|reply| EngineOrder::Watchdog { id: self.id, order: order(reply) })
    }

    /// The path of the pipe.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.config.path
    }

    /// Starts serving, and recreates the pipe if it was removed. Idempotent.
    pub fn start(&self) -> Result<()> {
        self.ask(WatchdogOrder::Start)?
    }

    /// Sets the workers, in place of the previous ones.
    pub fn set_workers(&self, workers: Vec<WorkerProcess>) -> Result<()> {
        self.ask(|reply| WatchdogOrder::SetWorkers(workers, reply))
    }

    /// Handles requests that did not come through the pipe.
    pub fn register(&self, requests: Vec<wire::TimerRequest>) -> Result<()> {
        self.ask(|reply| WatchdogOrder::Register(requests, reply))
    }

    /// Releases all timers of these processes.
    pub fn clear(&self, pids: Vec<i32>) -> Result<()> {
        self.ask(|reply| WatchdogOrder::Clear(pids, reply))
    }

    /// The armed timers, in no particular order.
    pub fn timers(&self) -> Result<Vec<wire::TimerRequest>> {
        self.ask(WatchdogOrder::Timers)
    }

    /// Counts of requests and timers.
    pub fn counts(&self) -> Result<WatchdogCounts> {
        self.ask(WatchdogOrder::Counts)
    }

    /// The time since the last request of a process; `None` if there was none, or if the process has ended.
    pub fn last_heard(&self, pid: i32) -> Result<Option<Duration>> {
        self.ask(|reply| WatchdogOrder::LastHeard(pid, reply))
    }

    /// The time since the oldest missed deadline of a process that has not ended.
    pub fn overdue(&self) -> Result<Duration> {
        self.ask(WatchdogOrder::Overdue)
    }

    /// Reads the pipe until it is empty, then handles the expired timers.
    pub fn drain(&self) -> Result<()> {
        self.line.ask(|reply| EngineOrder::DrainWatchdog { id: self.id, reply })
    }

    /// The last expired timer that caused a signal to the process.
    pub fn cause(&self, pid: i32) -> Result<Option<Expiry>> {
        self.line.check_owner()?;
        Ok(self.reports.cause(pid))
    }

    /// Blocks until timers have expired and their outcomes are known; empty once the watchdog is closed.
    pub fn next_expiries(&self) -> Result<Vec<Expiry>> {
        self.line.check_owner()?;
        self.reports.next()
    }

    /// Stops serving and removes the pipe.
    pub fn close(&self) -> Result<()> {
        match self.line.ask(|reply| EngineOrder::CloseWatchdog { id: self.id, reply: Some(reply) }) {
            // A closed engine has closed its watchdogs.
            Err(Error::Closed) => Ok(()),
            closed => closed,
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.line.send(EngineOrder::CloseWatchdog { id: self.id, reply: None });
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::path::PathBuf;
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::engine::Engine;
    use crate::sys::clock::Moment;
    use crate::sys::poller::wait_readable;
    use crate::sys::probe;
    use crate::sys::process::ProcessHandle;
    use crate::sys::spawn::Command;
    use crate::watchdog::WatchdogServer;

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// Runs `work` on the engine thread.
    fn run(watchdog: &Watchdog, work: impl FnOnce(&mut WatchdogServer) + Send + 'static) {
        let order = WatchdogOrder::Run(Box::new(work));
        watchdog.line.send(EngineOrder::Watchdog { id: watchdog.id, order }).expect("the engine runs");
    }

    /// Blocks the calling thread until the wall clock has passed `wall_s`.
    fn block_past(wall_s: f64) {
        while let Ok(left) = Duration::try_from_secs_f64(wall_s - Moment::now().wall_s()) {
            std::thread::sleep(left + Duration::from_millis(1));
        }
    }

    /// An engine with a watchdog, and the path of its pipe.
    fn start_engine(name: &str) -> (Engine, Watchdog, PathBuf) {
        let engine = Engine::start().expect("engine");
        let path = std::env::temp_dir().join(format!("ferroelastic-{name}-{}", std::process::id()));
        let config = Config { path: path.clone(), evidence: Duration::ZERO, py_spy: None };
        let watchdog = engine.watchdog(config).expect("watchdog");
        (engine, watchdog, path)
    }

    #[test]
    fn a_panic_on_the_engine_thread_kills_the_workers_and_fails_the_waiters() {
        let (engine, watchdog, path) = start_engine("panic");
        let argv = ["sleep", "1000"].map(|word| CString::new(word).expect("no NUL")).to_vec();
        let env = vec![CString::new("PATH=/usr/bin:/bin").expect("no NUL")];
        let group = engine.spawn(vec![Command { argv, env, ..Command::default() }; 2]).expect("spawn");
        let workers = group.pids().iter().map(|pid| ProcessHandle::open(*pid, probe::probe()).expect("a child"));
        let workers: Vec<ProcessHandle> = workers.collect();

        run(&watchdog, |_| panic!("on purpose"));

        let waited = group.wait(0, Some(TIMEOUT), [None; 2]).expect_err("the engine failed");
        assert_eq!(waited.to_string(), "the supervision engine failed: the thread ferro-sup panicked: on purpose");
        for worker in &workers {
            let Some(pidfd) = worker.pidfd() else { continue };
            assert!(
                matches!(wait_readable([Some(&pidfd)], Some(TIMEOUT)), Ok([true])),
                "worker {} still runs",
                worker.pid()
            );
        }
        assert!(watchdog.next_expiries().expect("own process").is_empty(), "waiters for expiries are woken");
        assert!(engine.close(TIMEOUT).expect("own process"), "the thread has ended");
        assert!(!path.exists());
        assert!(engine.spawn(Vec::new()).is_err());
    }

    #[test]
    fn a_release_written_in_time_counts_even_if_it_is_read_late() {
        let (_engine, watchdog, path) = start_engine("late");
        watchdog.start().expect("start");
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        let request = |expiration_time| wire::TimerRequest {
            pid,
            scope: "step".into(),
            expiration_time,
            signal: 0,
            heartbeat: None,
        };
        let soon = Moment::now().wall_s() + 0.05;
        watchdog.register(vec![request(soon)]).expect("served");
        let pipe = path.clone();
        run(&watchdog, move |server| {
            assert_eq!(server.counts().armed, 1);
            // Blocks the engine past the deadline. The process releases its timer meanwhile.
            let release =
                format!("{{\"pid\": {pid}, \"scope_id\": \"step\", \"expiration_time\": -1, \"signal\": 0}}\n");
            std::fs::write(pipe, release).expect("write");
            block_past(soon);
        });
        watchdog.drain().expect("served");
        let counts = watchdog.counts().expect("served");
        assert_eq!((counts.armed, counts.expired, counts.requests), (0, 0, 2));
    }

    #[test]
    fn reading_counts_does_not_handle_expired_timers() {
        let (_engine, watchdog, _) = start_engine("counts");
        watchdog.start().expect("start");
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        let expiration_time = Moment::now().wall_s() + 0.05;
        let request = wire::TimerRequest { pid, scope: "step".into(), expiration_time, signal: 0, heartbeat: None };
        watchdog.register(vec![request]).expect("served");
        let (release, held) = sync_channel::<()>(1);
        run(&watchdog, move |_| {
            let _ = held.recv();
            block_past(expiration_time);
        });
        // The engine serves this order right after the one that holds it past the deadline.
        let (reply, counts) = sync_channel(1);
        let order = WatchdogOrder::Counts(reply);
        watchdog.line.send(EngineOrder::Watchdog { id: watchdog.id, order }).expect("the engine runs");
        drop(release);
        let counts = counts.recv().expect("served");
        assert_eq!((counts.armed, counts.expired), (1, 0));
        watchdog.drain().expect("served");
        assert_eq!(watchdog.counts().expect("served").expired, 1);
    }
}
