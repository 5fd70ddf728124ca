//! A value that a thread publishes, and waiting for its next version.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::poller::wait_readable;
use crate::sys::wake::WakeFd;
use crate::vocabulary::named_values;

named_values! {
    /// Why a wait returned.
    Wake, "reason to return from a wait":
    /// The value was published again.
    Event = "event",
    /// The timeout has passed.
    Timeout = "timeout",
    /// The caller's wake-up descriptor is readable.
    WakeFd = "wake",
    /// The caller's descriptor for other news is readable.
    NewsFd = "news",
}

/// Descriptors of a caller that end its wait: for wake-ups (signals) and for other news.
pub type CallerFds<'a> = [Option<BorrowedFd<'a>>; 2];

#[derive(Debug, Default)]
struct Inner<T> {
    generation: u64,
    value: T,
    waiters: Vec<Arc<WakeFd>>,
}

/// A value that one thread changes, and that other threads read and wait for.
#[derive(Debug, Default)]
pub(crate) struct Published<T>(Mutex<Inner<T>>);

impl<T> Published<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(Inner { generation: 0, value, waiters: Vec::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the value and wakes the waiters.
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

    /// Blocks until the generation exceeds `generation`, the timeout has passed, or one of `others` is readable.
    ///
    /// Returns the error of `check` if it fails: the value will not change any more.
    pub(crate) fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        others: CallerFds<'_>,
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
                Ok([_, true, _]) => break Ok(Wake::WakeFd),
                Ok([_, _, true]) => break Ok(Wake::NewsFd),
                Ok(_) if left.is_some_and(|left| left.is_zero()) => break Ok(Wake::Timeout),
                // Interrupted, or woken before the deadline.
                Ok(_) => {}
            }
        };
        self.lock().waiters.retain(|other| !Arc::ptr_eq(other, &waiter));
        outcome
    }

    /// Registers a waiter unless the generation exceeds `generation` already.
    fn enter(&self, generation: u64, check: &impl Fn(&T) -> Result<()>) -> Result<Option<Arc<WakeFd>>> {
        if self.look(generation, check)? {
            return Ok(None);
        }
        let waiter = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let waiter = Arc::new(waiter);
        let mut inner = self.lock();
        inner.waiters.push(Arc::clone(&waiter));
        if inner.generation > generation {
            // Published between the check and the registration: check again.
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
