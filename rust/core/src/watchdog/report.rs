//! What a watchdog tells others, and how they wait for it.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;
use crate::vocabulary::named_values;

named_values! {
    /// What happened to the process of an expired timer.
    ExpiryOutcome, "outcome of an expiry":
    /// The process was signalled.
    Signalled = "signalled",
    /// The timer asked for no signal.
    NoSignal = "no signal",
    /// The process had ended.
    Gone = "gone",
    /// The process is not a worker, not a descendant of one and not in a worker's session, so it was left alone. If no workers were named,
    /// this process and all its descendants count as workers.
    NotOurs = "not ours",
    /// The kernel refused to signal the process.
    Denied = "denied",
}

/// A timer that expired, and what was done.
#[derive(Clone, Debug)]
pub struct Expiry {
    /// The process whose timer it was.
    pub pid: i32,
    /// The timer's scope.
    pub scope: String,
    /// Seconds since the epoch; for a heartbeat, last beat plus timeout.
    pub expiration_time: f64,
    /// The signal that was asked for.
    pub signal: i32,
    /// From the deadline to the decision.
    pub late_ns: u64,
    /// `CLOCK_MONOTONIC` just before the signal in nanoseconds; 0 if none was sent.
    pub signalled_ns: u64,
    /// What became of it.
    pub outcome: ExpiryOutcome,
    /// The worker that the process is or descends from; 0 if none was named.
    pub worker: i32,
    /// Files with evidence, the own worker's first.
    pub evidence: Vec<PathBuf>,
}

/// What was received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchdogCounts {
    /// Requests that were understood.
    pub requests: u64,
    /// Lines that were torn, not JSON, or held what they cannot.
    pub broken: u64,
    /// Lines longer than [`super::lines::LONGEST`].
    pub oversized: u64,
    /// Requests of another version of the wire format.
    pub unknown_version: u64,
    /// Timers that found the table full, and heartbeats on a slot that is not their process's own.
    pub refused: u64,
    /// Timers that expired.
    pub expired: u64,
    /// Timers that are armed now.
    pub armed: usize,
    /// The newest line that was not understood, and why.
    pub last_broken: String,
}

#[derive(Debug, Default)]
struct ReportState {
    unread: VecDeque<Expiry>,
    by_process: HashMap<i32, Expiry>,
    closed: bool,
}

/// Expiries on their way from the engine thread to whoever waits for them.
#[derive(Debug)]
pub(crate) struct Reports {
    state: Mutex<ReportState>,
    news: WakeFd,
}

/// Nobody may come for them: the oldest make room.
const MOST_UNREAD: usize = 4096;

impl Reports {
    pub(crate) fn new() -> Result<Self> {
        let news = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        Ok(Self { state: Mutex::default(), news })
    }

    fn lock(&self) -> MutexGuard<'_, ReportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before the signal goes out: whoever sees the process end can ask why.
    pub(crate) fn note_cause(&self, expiry: &Expiry) {
        let mut state = self.lock();
        state.by_process.insert(expiry.pid, expiry.clone());
        if expiry.worker > 0 {
            state.by_process.insert(expiry.worker, expiry.clone());
        }
    }

    pub(crate) fn publish(&self, expiry: Expiry) {
        let mut state = self.lock();
        if state.unread.len() >= MOST_UNREAD {
            state.unread.pop_front();
        }
        state.unread.push_back(expiry);
        self.news.wake();
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.news.wake();
    }

    /// Forgets the causes of deaths that are not of `pids`.
    pub(crate) fn keep_causes(&self, pids: impl Fn(i32) -> bool) {
        self.lock().by_process.retain(|pid, _| pids(*pid));
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
            wait_readable([Some(&self.news)], None)
                .map_err(|source| Error::os("wait for", "expired timers", source))?;
            self.news.drain();
        }
    }
}
