//! The published results of a watchdog: expiries, causes of signals, and counts.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;
use crate::vocabulary::named_values;

named_values! {
    /// The outcome of an expired timer for its process.
    ExpiryOutcome, "outcome of an expiry":
    /// The process was signalled.
    Signalled = "signalled",
    /// The timer asked for no signal.
    NoSignal = "no signal",
    /// The process had ended.
    Gone = "gone",
    /// The process was left alone because it is no worker, no descendant of a worker and not in a worker's session. If no workers were
    /// set, this process and all its descendants count as workers.
    NotOurs = "not ours",
    /// The kernel refused to signal the process.
    Denied = "denied",
}

/// An expired timer and its outcome.
#[derive(Clone, Debug)]
pub struct Expiry {
    /// The process that set the timer.
    pub pid: i32,
    /// The timer's scope.
    pub scope: String,
    /// Seconds since the epoch; for a heartbeat, last beat plus timeout.
    pub expiration_time: f64,
    /// The requested signal.
    pub signal: i32,
    /// Nanoseconds from the deadline to the decision.
    pub late_ns: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds just before the signal; 0 if none was sent.
    pub signalled_ns: u64,
    /// What was done about the process.
    pub outcome: ExpiryOutcome,
    /// The pid of the worker that the process is or descends from; 0 if there is none.
    pub worker: i32,
    /// Files with evidence, those of the process's own worker first.
    pub evidence: Vec<PathBuf>,
}

/// Counts of requests, rejected lines and timers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchdogCounts {
    /// Valid requests.
    pub requests: u64,
    /// Lines that were torn, not JSON, or out of range.
    pub broken: u64,
    /// Lines longer than [`super::lines::MAX_LINE_BYTES`].
    pub oversized: u64,
    /// Requests in another version of the wire format.
    pub unknown_version: u64,
    /// Refused requests: the table was full, the process could not be opened, or the heartbeat slot belongs to another process.
    pub refused: u64,
    /// Expired timers.
    pub expired: u64,
    /// Timers armed now.
    pub armed: usize,
    /// The newest rejected line or request with the reason.
    pub last_broken: String,
}

#[derive(Debug, Default)]
struct ReportState {
    unread: VecDeque<Expiry>,
    by_process: HashMap<i32, Expiry>,
    closed: bool,
}

/// The queue of expiries from the engine thread to the waiters.
#[derive(Debug)]
pub(crate) struct Reports {
    state: Mutex<ReportState>,
    wake: WakeFd,
}

/// Limit on unread expiries. The oldest are dropped, because a program may never read them.
const MAX_UNREAD: usize = 4096;

impl Reports {
    pub(crate) fn new() -> Result<Self> {
        let wake = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        Ok(Self { state: Mutex::default(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, ReportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the cause of a signal. Called before the signal is sent, so the cause is available when the exit is seen.
    pub(crate) fn record_cause(&self, expiry: &Expiry) {
        let mut state = self.lock();
        state.by_process.insert(expiry.pid, expiry.clone());
        if expiry.worker > 0 {
            state.by_process.insert(expiry.worker, expiry.clone());
        }
    }

    pub(crate) fn publish(&self, expiry: Expiry) {
        let mut state = self.lock();
        if state.unread.len() >= MAX_UNREAD {
            state.unread.pop_front();
        }
        state.unread.push_back(expiry);
        self.wake.wake();
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake.wake();
    }

    /// Removes the causes of all processes except the workers.
    pub(crate) fn retain_causes(&self, is_worker: impl Fn(i32) -> bool) {
        self.lock().by_process.retain(|pid, _| is_worker(*pid));
    }

    pub(crate) fn cause(&self, pid: i32) -> Option<Expiry> {
        self.lock().by_process.get(&pid).cloned()
    }

    /// Blocks until there are expiries; empty once closed.
    pub(crate) fn next(&self) -> Result<Vec<Expiry>> {
        loop {
            let (unread, closed) = {
                let mut state = self.lock();
                (std::mem::take(&mut state.unread), state.closed)
            };
            if closed || !unread.is_empty() {
                return Ok(unread.into());
            }
            wait_readable([Some(&self.wake)], None)
                .map_err(|source| Error::os("wait for", "expired timers", source))?;
            self.wake.drain();
        }
    }
}
