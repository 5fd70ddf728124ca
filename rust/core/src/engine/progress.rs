//! The progress of a group: published by the engine thread, read and awaited by handles.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::published::{CallerFds, Published, Wake};
use crate::supervise::Exit;

/// A process that was still alive at the last deadline of a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// The index of the worker that leads its process group.
    pub index: usize,
    /// Process id.
    pub pid: i32,
    /// State letter of `/proc/PID/stat`.
    pub state: char,
    /// The kernel function in which it sleeps (`/proc/PID/wchan`); empty if unreadable.
    pub wait_channel: String,
}

/// A process of a worker's group that got a signal because it had outlived the linger time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The index of the worker that leads its process group.
    pub index: usize,
    /// Process id.
    pub pid: i32,
    /// Its command line, or its name if the command line is empty.
    pub command: String,
}

/// The outcome of a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReport {
    /// `CLOCK_MONOTONIC` in nanoseconds just before the first signal.
    pub signalled_ns: u64,
    /// Time from the first signal to the end of the stop.
    pub elapsed: Duration,
    /// Indices of the workers whose process group outlived the grace period and got SIGKILL.
    pub killed: Vec<usize>,
    /// Processes that outlived the linger time.
    pub overdue: Vec<Leftover>,
    /// Processes alive at the last deadline; empty if every process group was verified empty.
    pub survivors: Vec<Survivor>,
}

/// A worker that has failed because of a line in its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFailure {
    /// Index of the worker.
    pub index: usize,
    /// The reason of the rule.
    pub reason: String,
    /// Description of the stream.
    pub stream: String,
    /// The beginning of the line.
    pub line: String,
    /// `CLOCK_REALTIME` in nanoseconds when the engine found the line.
    pub realtime_ns: u64,
}

#[derive(Debug, Default)]
struct Progress {
    exits: Vec<Exit>,
    log_failures: Vec<LogFailure>,
    report: Option<StopReport>,
    failure: Option<String>,
    closed: bool,
}

impl Progress {
    fn check(&self) -> Result<()> {
        if let Some(failure) = &self.failure {
            return Err(Error::Failed(failure.clone()));
        }
        if self.closed { Err(Error::Closed) } else { Ok(()) }
    }
}

/// The published progress of one group.
#[derive(Debug, Default)]
pub(super) struct GroupProgress(Published<Progress>);

impl GroupProgress {
    pub(super) fn publish_exits(&self, exits: &[Exit]) {
        self.0.publish(|progress| progress.exits.extend_from_slice(exits));
    }

    pub(super) fn publish_log_failure(&self, failure: LogFailure) {
        self.0.publish(|progress| progress.log_failures.push(failure));
    }

    pub(super) fn log_failures(&self) -> Vec<LogFailure> {
        self.0.read(|progress| progress.log_failures.clone())
    }

    pub(super) fn publish_report(&self, report: StopReport) {
        self.0.publish(|progress| progress.report = Some(report));
    }

    /// Wakes the waiters although the group has not changed.
    pub(super) fn wake_waiters(&self) {
        self.0.publish(|_| {});
    }

    pub(super) fn publish_closed(&self, failure: Option<String>) {
        self.0.publish(|progress| {
            progress.closed = true;
            progress.failure = failure;
        });
    }

    pub(super) fn generation(&self) -> u64 {
        self.0.generation()
    }

    pub(super) fn exits(&self, since: usize) -> Vec<Exit> {
        self.0.read(|progress| progress.exits.get(since..).unwrap_or_default().to_vec())
    }

    pub(super) fn report(&self) -> Option<StopReport> {
        self.0.read(|progress| progress.report.clone())
    }

    pub(super) fn wait(&self, generation: u64, timeout: Option<Duration>, others: CallerFds<'_>) -> Result<Wake> {
        self.0.wait(generation, timeout, others, Progress::check)
    }
}
