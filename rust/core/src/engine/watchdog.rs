//! A handle on a watchdog of the engine.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::handle::{Engine, Line};
use super::request::Request;
use crate::error::{Error, Result};
use crate::supervise::Moment;
use crate::sys::poller::Poller;
use crate::watchdog::{Config, Counts, Expiry, Reports, Server, WorkerProcess, make_files, wire};

/// What is done to a watchdog on the engine thread.
pub(super) type Work = Box<dyn FnOnce(&mut Server, &Poller) + Send>;

/// A named pipe through which processes set themselves deadlines. Ends when it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    line: Arc<Line>,
    id: u64,
    config: Config,
    reports: Arc<Reports>,
}

impl Engine {
    /// Makes the named pipe of a watchdog. Nothing is served before [`Watchdog::start`].
    pub fn watchdog(&self, config: Config) -> Result<Watchdog> {
        let line = self.line();
        line.check_owner()?;
        let files = make_files(&config.path)?;
        let reports = Arc::new(Reports::new()?);
        let (theirs, set_up) = (Arc::clone(&reports), config.clone());
        let id = line.ask(|reply| Request::Watch { config: set_up, files, reports: theirs, reply })?;
        Ok(Watchdog { line: Arc::clone(line), id, config, reports })
    }
}

impl Watchdog {
    /// Runs `work` on the engine thread and waits for its result.
    fn ask<T: Send + 'static>(&self, work: impl FnOnce(&mut Server, &Poller) -> T + Send + 'static) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        let work: Work = Box::new(move |server, poller| {
            let _ = reply.send(work(server, poller));
        });
        self.line.tell(Request::Watchdog { id: self.id, work })?;
        // The work is dropped with the watchdog if that is closed.
        answer.recv().map_err(|_| Error::Closed)
    }

    /// The path of the pipe.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.config.path
    }

    /// Begins to serve, or makes the pipe anew if somebody has removed it.
    pub fn start(&self) -> Result<()> {
        self.ask(Server::start)?
    }

    /// Names the workers, in place of the former ones.
    pub fn set_workers(&self, workers: Vec<WorkerProcess>) -> Result<()> {
        self.ask(move |server, _| server.set_workers(workers))
    }

    /// Takes requests that did not come through the pipe.
    pub fn register(&self, requests: Vec<wire::Request>) -> Result<()> {
        self.ask(move |server, poller| {
            let now = Moment::now();
            for request in requests {
                server.accept(request, now, poller);
            }
        })
    }

    /// Forgets all timers of these processes.
    pub fn clear(&self, pids: Vec<i32>) -> Result<()> {
        self.ask(move |server, _| pids.into_iter().for_each(|pid| server.clear(pid)))
    }

    /// The armed timers, in no order.
    pub fn timers(&self) -> Result<Vec<wire::Request>> {
        self.ask(|server, _| server.timers())
    }

    /// What was received.
    pub fn counts(&self) -> Result<Counts> {
        self.ask(|server, _| server.counts())
    }

    /// How long ago a process was last heard of; `None` if never, or if it has ended.
    pub fn last_heard(&self, pid: i32) -> Result<Option<Duration>> {
        self.ask(move |server, _| server.last_heard(pid, Moment::now()))
    }

    /// How long the oldest missed deadline has been waiting for its process to end.
    pub fn overdue(&self) -> Result<Duration> {
        self.ask(|server, _| server.overdue(Instant::now()))
    }

    /// Reads what is in the pipe and deals with what has expired.
    pub fn drain(&self) -> Result<()> {
        self.ask(Server::drain)?;
        // The engine has dealt with what has expired before it serves the next request.
        self.ask(|_, _| ())
    }

    /// The last timer over which a process was signalled.
    pub fn cause(&self, pid: i32) -> Result<Option<Expiry>> {
        self.line.check_owner()?;
        Ok(self.reports.cause(pid))
    }

    /// Blocks until timers have expired and were dealt with; empty once the watchdog is closed.
    pub fn next_expiries(&self) -> Result<Vec<Expiry>> {
        self.line.check_owner()?;
        self.reports.next()
    }

    /// Stops to serve and removes the pipe.
    pub fn close(&self) -> Result<()> {
        let (reply, answer) = sync_channel(1);
        match self.line.tell(Request::Unwatch { id: self.id, reply: Some(reply) }) {
            // A closed engine has closed its watchdogs.
            Ok(()) => answer.recv().or(Ok(())),
            Err(Error::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.line.tell(Request::Unwatch { id: self.id, reply: None });
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::path::PathBuf;

    use super::*;
    use crate::sys::poller::wait_readable;
    use crate::sys::probe;
    use crate::sys::process::Leader;
    use crate::sys::spawn::Command;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// An engine with a watchdog, and the path of its pipe.
    fn begin(name: &str) -> (Engine, Watchdog, PathBuf) {
        let engine = Engine::start().expect("engine");
        let path = std::env::temp_dir().join(format!("ferroelastic-{name}-{}", std::process::id()));
        let config = Config { path: path.clone(), evidence: Duration::ZERO, py_spy: None };
        let watchdog = engine.watchdog(config).expect("watchdog");
        (engine, watchdog, path)
    }

    #[test]
    fn a_panic_on_the_engine_thread_kills_the_workers_and_is_told_to_who_waits() {
        let (engine, watchdog, path) = begin("panic");
        let argv = ["sleep", "1000"].map(|word| CString::new(word).expect("no NUL")).to_vec();
        let env = vec![CString::new("PATH=/usr/bin:/bin").expect("no NUL")];
        let group = engine.spawn(vec![Command { argv, env, ..Command::default() }; 2]).expect("spawn");
        let workers = group.pids().iter().map(|pid| Leader::open(*pid, probe::probe()).expect("a child"));
        let workers: Vec<Leader> = workers.collect();

        let answer = watchdog.ask(|_, _| panic!("on purpose"));
        assert!(matches!(answer, Err(Error::Closed)));

        let waited = group.wait(0, Some(PATIENCE), [None; 2]).expect_err("the engine is gone");
        assert_eq!(waited.to_string(), "the supervision engine failed: on purpose");
        for worker in &workers {
            let Some(pidfd) = worker.pidfd() else { continue };
            assert!(matches!(wait_readable([Some(&pidfd)], Some(PATIENCE)), Ok([true])), "{} lives", worker.pid());
        }
        assert!(watchdog.next_expiries().expect("own process").is_empty(), "who waits for expiries is told, too");
        assert!(engine.close(PATIENCE).expect("own process"), "the thread has ended");
        assert!(!path.exists());
        assert!(engine.spawn(Vec::new()).is_err());
    }

    #[test]
    fn a_release_that_came_in_time_counts_however_late_it_is_read() {
        let (_engine, watchdog, path) = begin("late");
        watchdog.start().expect("start");
        let pid = i32::try_from(std::process::id()).expect("pids fit");
        let request =
            |expiration_time| wire::Request { pid, scope: "step".into(), expiration_time, signal: 0, heartbeat: None };
        let in_a_moment = Duration::from_nanos(Moment::now().realtime_ns).as_secs_f64() + 0.05;
        watchdog.register(vec![request(in_a_moment)]).expect("served");
        let pipe = path.clone();
        let held_up = watchdog.ask(move |server, _| {
            // The engine does nothing else until the deadline has passed; meanwhile the process is done.
            let release =
                format!("{{\"pid\": {pid}, \"scope_id\": \"step\", \"expiration_time\": -1, \"signal\": 0}}\n");
            std::fs::write(pipe, release).expect("write");
            std::thread::sleep(Duration::from_millis(100));
            server.counts().armed
        });
        assert_eq!(held_up.expect("served"), 1);
        let counts = watchdog.counts().expect("served");
        assert_eq!((counts.armed, counts.expired, counts.requests), (0, 0, 2));
    }
}
