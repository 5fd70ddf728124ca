//! Handles on the engine, its groups and its tails.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::event_loop::EventLoop;
use super::guard::Remarks;
use super::request::{Observed, Reply, Request, Started};
use super::view::{StopReport, View};
use crate::error::{Error, Result};
use crate::logs::{TailReport, TailSpec};
use crate::published::Wake;
use crate::supervise::{Event, Exit, StopPlan};
use crate::sys::probe::{self, Support};
use crate::sys::spawn::Command;
use crate::sys::threads;
use crate::sys::wake::WakeFd;

/// The line to the engine thread. In a forked child, where that thread does not exist, it refuses work and its drop only closes.
#[derive(Debug)]
pub(super) struct Line {
    owner: u32,
    wake: Arc<WakeFd>,
    /// `None` only while it is dropped.
    ends: Option<Ends>,
}

#[derive(Debug)]
struct Ends {
    requests: Sender<Request>,
    thread: Mutex<Option<JoinHandle<()>>>,
    finished: Mutex<Receiver<()>>,
}

impl Line {
    pub(super) fn check_owner(&self) -> Result<()> {
        let here = std::process::id();
        if here == self.owner {
            return Ok(());
        }
        Err(Error::Forked { owner: self.owner, here })
    }

    fn ends(&self) -> Result<&Ends> {
        self.check_owner()?;
        self.ends.as_ref().ok_or(Error::Closed)
    }

    pub(super) fn tell(&self, request: Request) -> Result<()> {
        self.ends()?.requests.send(request).map_err(|_| Error::Closed)?;
        self.wake.wake();
        Ok(())
    }

    pub(super) fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.tell(request(reply))?;
        answer.recv().map_err(|_| Error::Closed)
    }

    /// As [`Line::ask`]; `false` if there is no answer within `timeout`.
    pub(super) fn ask_within(&self, timeout: Duration, request: impl FnOnce(Reply<()>) -> Request) -> Result<bool> {
        let (reply, answer) = sync_channel(1);
        self.tell(request(reply))?;
        match answer.recv_timeout(timeout) {
            Ok(()) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // The thread ends with the last handle. It is not joined: nobody waits for it here.
        let told = self.tell(Request::Close { kill_wait: Duration::ZERO });
        if let (Err(Error::Forked { .. }), Some(ends)) = (told, self.ends.take()) {
            // Another process's channel and thread, perhaps locked at the moment of the fork.
            std::mem::forget(ends);
        }
    }
}

/// Owner of the supervision thread.
#[derive(Clone, Debug)]
pub struct Engine {
    line: Arc<Line>,
    support: Support,
    remarks: Remarks,
}

impl Engine {
    /// Starts the thread with whatever this system supports; the features are probed in a throw-away child.
    pub fn start() -> Result<Self> {
        Self::start_with(probe::probe())
    }

    /// Starts the thread with less than the system supports: [`Support::NONE`] forces the fallback without pidfds.
    pub fn start_with(support: Support) -> Result<Self> {
        let (requests, inbox) = channel();
        let (finish, finished) = sync_channel(1);
        let wake = Arc::new(WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?);
        let remarks = Remarks::default();
        let event_loop = EventLoop::new(inbox, requests.clone(), Arc::clone(&wake), support, remarks.clone())?;
        let run = move || {
            event_loop.run();
            let _ = finish.send(());
        };
        let thread = threads::builder("ferro-sup").spawn(run);
        let thread = thread.map_err(|source| Error::os("start", "the supervision thread", source))?;
        let line = Line {
            owner: std::process::id(),
            wake,
            ends: Some(Ends { requests, thread: Mutex::new(Some(thread)), finished: Mutex::new(finished) }),
        };
        Ok(Self { line: Arc::new(line), support, remarks })
    }

    pub(super) fn line(&self) -> &Arc<Line> {
        &self.line
    }

    pub(super) fn remarks(&self) -> &Remarks {
        &self.remarks
    }

    /// What the engine makes use of.
    #[must_use]
    pub fn support(&self) -> Support {
        self.support
    }

    /// Starts all commands, in order. When one cannot be started, the others are killed and reaped.
    pub fn spawn(&self, commands: Vec<Command>) -> Result<Group> {
        let started = self.line.ask(|reply| Request::Spawn { commands, reply })??;
        Ok(self.group(started))
    }

    /// Supervises processes that somebody else starts and reaps: exits are seen, never collected.
    ///
    /// Each may come with a descriptor that becomes readable when the process ends; it is used where there are no pidfds and
    /// the process is no child of this one.
    pub fn observe(&self, processes: Vec<(i32, Option<OwnedFd>)>) -> Result<Group> {
        let processes = processes.into_iter().map(|(pid, sentinel)| Observed { pid, sentinel }).collect();
        let started = self.line.ask(|reply| Request::Observe { processes, reply })??;
        Ok(self.group(started))
    }

    /// Follows growing files.
    pub fn tail(&self, spec: TailSpec) -> Result<Tail> {
        let id = self.line.ask(|reply| Request::Tail { spec, reply })??;
        Ok(Tail { line: Arc::clone(&self.line), id })
    }

    /// Ends the thread; workers that still run get SIGKILL. `false` if it did not end within `timeout`.
    pub fn close(&self, timeout: Duration) -> Result<bool> {
        let ends = self.line.ends()?;
        let began = Instant::now();
        // It fails where the thread has ended, or is about to: what it owns may still be there.
        let _ = self.line.tell(Request::Close { kill_wait: timeout });
        let finished = ends.finished.lock().unwrap_or_else(PoisonError::into_inner);
        let left = timeout.saturating_sub(began.elapsed()) + Duration::from_millis(100);
        let ended = !matches!(finished.recv_timeout(left), Err(RecvTimeoutError::Timeout));
        let thread = ends.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (true, Some(thread)) = (ended, thread) {
            // It has said its last word: this does not take long. Its panics are caught inside.
            let _ = thread.join();
        }
        Ok(ended)
    }

    fn group(&self, started: Started) -> Group {
        Group { line: Arc::clone(&self.line), id: started.id, pids: started.pids, view: started.view }
    }
}

/// Processes that were started together, each the leader of its own session and process group.
#[derive(Debug)]
pub struct Group {
    line: Arc<Line>,
    id: u64,
    pids: Vec<i32>,
    view: Arc<View>,
}

impl Group {
    /// Process ids by index.
    #[must_use]
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }

    /// Counts what has happened: grows with every batch of exits, when a stop finishes and when the engine ends.
    pub fn generation(&self) -> Result<u64> {
        self.line.check_owner()?;
        Ok(self.view.generation())
    }

    /// The exits so far, in the order the kernel reported them.
    pub fn exits(&self) -> Result<Vec<Exit>> {
        self.line.check_owner()?;
        Ok(self.view.exits())
    }

    /// Blocks until there is something newer than `generation`, `timeout` has passed (`None`: never), or one of `others` is readable.
    pub fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: [Option<BorrowedFd<'_>>; 2],
    ) -> Result<Wake> {
        self.line.check_owner()?;
        self.view.wait(generation, timeout, others)
    }

    /// Signals the process group of one worker, or its leader alone. `false` if nobody was there.
    pub fn signal(&self, index: usize, signal: i32, leader_only: bool) -> Result<bool> {
        let group = self.id;
        let delivered = self.line.ask(|reply| Request::Signal { group, index, signal, leader_only, reply })?;
        delivered.map_err(|source| Error::os("signal", format!("worker {index} (pid {})", self.pids[index]), source))
    }

    /// Begins to stop the group. A stop that runs or is over stays as it is.
    pub fn stop(&self, plan: StopPlan) -> Result<()> {
        self.decide(Event::Stop(plan))
    }

    /// From now on the engine begins the stop itself, at the first exit that is a failure.
    pub fn stop_on_failure(&self, plan: StopPlan) -> Result<()> {
        self.decide(Event::StopOnFailure(plan))
    }

    /// Ends the grace of a running stop now.
    pub fn hurry(&self) -> Result<()> {
        self.decide(Event::Hurry)
    }

    /// The outcome of the stop, once it is over.
    pub fn stop_report(&self) -> Result<Option<StopReport>> {
        self.line.check_owner()?;
        Ok(self.view.report())
    }

    fn decide(&self, event: Event) -> Result<()> {
        let group = self.id;
        self.line.tell(Request::Decide { group, event })
    }
}

impl Drop for Group {
    /// Processes that still run are left to run, and reaped when they end.
    fn drop(&mut self) {
        let _ = self.line.tell(Request::Release { group: self.id });
    }
}

/// A tail that follows files until it is finished or dropped.
#[derive(Debug)]
pub struct Tail {
    line: Arc<Line>,
    id: u64,
}

impl Tail {
    /// Copies what the files still hold and ends; gives up when the console has taken nothing for `patience`.
    pub fn finish(&self, patience: Duration) -> Result<TailReport> {
        let tail = self.id;
        self.line.ask(|reply| Request::FinishTail { tail, patience, reply })
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.line.tell(Request::DropTail { tail: self.id });
    }
}
