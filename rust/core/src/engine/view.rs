//! What the engine thread publishes about a group, and how others wait for it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::supervise::Exit;
use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;

/// Why a wait returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Something happened to the group.
    Event,
    /// The time is over.
    Timeout,
    /// The other descriptor became readable.
    Other,
}

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

/// What a finished stop found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReport {
    /// `CLOCK_MONOTONIC` just before the first signal, in nanoseconds.
    pub signalled_ns: u64,
    /// From the first signal to the end.
    pub elapsed: Duration,
    /// Workers whose process group outlived the grace and got SIGKILL.
    pub killed: Vec<usize>,
    /// Empty when every process group was verified empty.
    pub survivors: Vec<Survivor>,
}

#[derive(Debug, Default)]
struct Published {
    generation: u64,
    exits: Vec<Exit>,
    report: Option<StopReport>,
    failure: Option<String>,
    closed: bool,
    waiters: Vec<Arc<WakeFd>>,
}

/// The published state of one group.
#[derive(Debug, Default)]
pub(super) struct View(Mutex<Published>);

impl View {
    fn lock(&self) -> MutexGuard<'_, Published> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, change: impl FnOnce(&mut Published)) {
        let mut published = self.lock();
        change(&mut published);
        published.generation += 1;
        for waiter in &published.waiters {
            waiter.wake();
        }
    }

    pub(super) fn publish_exits(&self, exits: &[Exit]) {
        self.publish(|published| published.exits.extend_from_slice(exits));
    }

    pub(super) fn publish_report(&self, report: StopReport) {
        self.publish(|published| published.report = Some(report));
    }

    pub(super) fn publish_closed(&self, failure: Option<String>) {
        self.publish(|published| {
            published.closed = true;
            published.failure = failure;
        });
    }

    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    pub(super) fn exits(&self) -> Vec<Exit> {
        self.lock().exits.clone()
    }

    pub(super) fn report(&self) -> Option<StopReport> {
        self.lock().report.clone()
    }

    pub(super) fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<Wake> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let Some(waiter) = self.enter(generation)? else {
            return Ok(Wake::Event);
        };
        let outcome = loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let other = other.as_ref().map(|fd| fd as &dyn AsFd);
            match wait_readable([Some(&*waiter as &dyn AsFd), other], left) {
                Err(error) => break Err(Error::os("wait for", "a group of workers", error)),
                Ok([true, _]) => {
                    waiter.drain();
                    match self.look(generation) {
                        Ok(false) => {}
                        Ok(true) => break Ok(Wake::Event),
                        Err(error) => break Err(error),
                    }
                }
                Ok([_, true]) => break Ok(Wake::Other),
                Ok(_) if left.is_some_and(|left| left.is_zero()) => break Ok(Wake::Timeout),
                // Interrupted, or woken a moment early.
                Ok(_) => {}
            }
        };
        self.lock().waiters.retain(|other| !Arc::ptr_eq(other, &waiter));
        outcome
    }

    /// Registers a waiter unless there is news already.
    fn enter(&self, generation: u64) -> Result<Option<Arc<WakeFd>>> {
        if self.look(generation)? {
            return Ok(None);
        }
        let waiter = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let waiter = Arc::new(waiter);
        let mut published = self.lock();
        published.waiters.push(Arc::clone(&waiter));
        if published.generation > generation {
            // It came in between: look again with the waiter in place.
            waiter.wake();
        }
        Ok(Some(waiter))
    }

    fn look(&self, generation: u64) -> Result<bool> {
        let published = self.lock();
        if let Some(failure) = &published.failure {
            return Err(Error::Failed(failure.clone()));
        }
        if published.closed {
            return Err(Error::Closed);
        }
        Ok(published.generation > generation)
    }
}
