//! What the engine thread publishes about a group, and how others wait for it.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::published::{Published, Wake};
use crate::supervise::Exit;

/// A process that was still there when a stop ran out of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// The worker whose process group it belongs to.
    pub index: usize,
    /// Process id.
    pub pid: i32,
    /// State letter of `/proc/PID/stat`.
    pub state: char,
    /// Kernel function it sleeps in; empty where it cannot be read.
    pub wait_channel: String,
}

/// A process of a worker's group that was signalled because it had not finished in the linger time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The worker whose process group it belongs to.
    pub index: usize,
    /// Process id.
    pub pid: i32,
    /// Its command line, or its name where that is empty.
    pub command: String,
}

/// What a finished stop found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReport {
    /// `CLOCK_MONOTONIC` just before the first signal, in nanoseconds.
    pub signalled_ns: u64,
    /// From the first signal to the end.
    pub elapsed: Duration,
    /// Workers whose process group outlived the grace and got SIGKILL.
    pub killed: Vec<usize>,
    /// Processes that outlived the linger time.
    pub overdue: Vec<Leftover>,
    /// Empty when every process group was verified empty.
    pub survivors: Vec<Survivor>,
}

#[derive(Debug, Default)]
struct News {
    exits: Vec<Exit>,
    report: Option<StopReport>,
    failure: Option<String>,
    closed: bool,
}

impl News {
    fn check(&self) -> Result<()> {
        if let Some(failure) = &self.failure {
            return Err(Error::Failed(failure.clone()));
        }
        if self.closed { Err(Error::Closed) } else { Ok(()) }
    }
}

/// The published state of one group.
#[derive(Debug, Default)]
pub(super) struct View(Published<News>);

impl View {
    pub(super) fn publish_exits(&self, exits: &[Exit]) {
        self.0.publish(|news| news.exits.extend_from_slice(exits));
    }

    pub(super) fn publish_report(&self, report: StopReport) {
        self.0.publish(|news| news.report = Some(report));
    }

    /// Wakes those who wait: there is something to be read elsewhere.
    pub(super) fn nudge(&self) {
        self.0.publish(|_| {});
    }

    pub(super) fn publish_closed(&self, failure: Option<String>) {
        self.0.publish(|news| {
            news.closed = true;
            news.failure = failure;
        });
    }

    pub(super) fn generation(&self) -> u64 {
        self.0.generation()
    }

    pub(super) fn exits(&self) -> Vec<Exit> {
        self.0.read(|news| news.exits.clone())
    }

    pub(super) fn report(&self) -> Option<StopReport> {
        self.0.read(|news| news.report.clone())
    }

    pub(super) fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: [Option<BorrowedFd<'_>>; 2],
    ) -> Result<Wake> {
        self.0.wait(generation, timeout, others, News::check)
    }
}
