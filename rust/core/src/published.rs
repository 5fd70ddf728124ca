//! What a thread of this crate publishes, and how others wait for news of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;

/// Why a wait returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Something was published.
    Event,
    /// The time is over.
    Timeout,
    /// The first of the other descriptors became readable.
    First,
    /// The second of the other descriptors became readable.
    Second,
}

#[derive(Debug, Default)]
struct Inner<T> {
    generation: u64,
    value: T,
    waiters: Vec<Arc<WakeFd>>,
}

/// A value that one thread changes and others look at and wait for.
#[derive(Debug, Default)]
pub(crate) struct Published<T>(Mutex<Inner<T>>);

impl<T> Published<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(Inner { generation: 0, value, waiters: Vec::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the value and wakes who waits for that.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut T)) {
        let mut inner = self.lock();
        change(&mut inner.value);
        inner.generation += 1;
        for waiter in &inner.waiters {
            waiter.wake();
        }
    }

    /// Grows with each change.
    pub(crate) fn generation(&self) -> u64 {
        self.lock().generation
    }

    pub(crate) fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.lock().value)
    }

    /// Blocks until there is something newer than `generation`, the time is over, or one of `others` is readable.
    ///
    /// `check` says whether there can be news at all; what it fails with is returned.
    pub(crate) fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: [Option<BorrowedFd<'_>>; 2],
        check: impl Fn(&T) -> Result<()>,
    ) -> Result<Wake> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let Some(waiter) = self.enter(generation, &check)? else {
            return Ok(Wake::Event);
        };
        let outcome = loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let [first, second] = others.each_ref().map(|fd| fd.as_ref().map(|fd| fd as &dyn AsFd));
            match wait_readable([Some(&*waiter as &dyn AsFd), first, second], left) {
                Err(error) => break Err(Error::os("wait for", "news", error)),
                Ok([true, ..]) => {
                    waiter.drain();
                    match self.look(generation, &check) {
                        Ok(false) => {}
                        Ok(true) => break Ok(Wake::Event),
                        Err(error) => break Err(error),
                    }
                }
                Ok([_, true, _]) => break Ok(Wake::First),
                Ok([_, _, true]) => break Ok(Wake::Second),
                Ok(_) if left.is_some_and(|left| left.is_zero()) => break Ok(Wake::Timeout),
                // Interrupted, or woken a moment early.
                Ok(_) => {}
            }
        };
        self.lock().waiters.retain(|other| !Arc::ptr_eq(other, &waiter));
        outcome
    }

    /// Registers a waiter unless there is news already.
    fn enter(&self, generation: u64, check: &impl Fn(&T) -> Result<()>) -> Result<Option<Arc<WakeFd>>> {
        if self.look(generation, check)? {
            return Ok(None);
        }
        let waiter = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let waiter = Arc::new(waiter);
        let mut inner = self.lock();
        inner.waiters.push(Arc::clone(&waiter));
        if inner.generation > generation {
            // It came in between: look again with the waiter in place.
            waiter.wake();
        }
        Ok(Some(waiter))
    }

    fn look(&self, generation: u64, check: &impl Fn(&T) -> Result<()>) -> Result<bool> {
        let inner = self.lock();
        check(&inner.value)?;
        Ok(inner.generation > generation)
    }
}
