//! A value that one thread publishes; other threads can wait for its next version.

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
    /// The caller's descriptor for other events is readable.
    NewsFd = "news",
}

/// Descriptors of a caller that end its wait: one for signals, one for other events.
pub type CallerFds<'a> = [Option<BorrowedFd<'a>>; 2];

#[derive(Debug, Default)]
struct Inner<T> {
    generation: u64,
    value: T,
    waiters: Vec<Arc<WakeFd>>,
}

/// A value that one thread changes. Other threads read it and wait for changes.
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

    /// Number of changes so far.
    pub(crate) fn generation(&self) -> u64 {
        self.lock().generation
    }

    pub(crate) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&self.lock().value)
    }

    /// Blocks until the generation exceeds `generation`, the timeout has passed, or one of `caller_fds` is readable.
    ///
    /// `check` fails if the value can no longer change. Returns its error then.
    pub(crate) fn wait(
        &self,
        generation: u64,
        timeout: Option<Duration>,
        caller_fds: CallerFds<'_>,
        check: impl Fn(&T) -> Result<()>,
    ) -> Result<Wake> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let Some(waiter) = self.register_waiter(generation, &check)? else {
            return Ok(Wake::Event);
        };
        let outcome = loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let [wake_fd, news_fd] = caller_fds.each_ref().map(|fd| fd.as_ref().map(|fd| fd as &dyn AsFd));
            match wait_readable([Some(&*waiter as &dyn AsFd), wake_fd, news_fd], left) {
                Err(error) => break Err(Error::os("wait for", "an event", error)),
                Ok([true, ..]) => {
                    waiter.drain();
                    match self.is_newer(generation, &check) {
                        Ok(false) => {}
                        Ok(true) => break Ok(Wake::Event),
                        Err(error) => break Err(error),
                    }
                }
                Ok([_, true, _]) => break Ok(Wake::WakeFd),
                Ok([_, _, true]) => break Ok(Wake::NewsFd),
                Ok(_) if left.is_some_and(|left| left.is_zero()) => break Ok(Wake::Timeout),
                // Interrupted, or returned shortly before the deadline.
                Ok(_) => {}
            }
        };
        self.lock().waiters.retain(|other| !Arc::ptr_eq(other, &waiter));
        outcome
    }

    /// Registers a waiter, unless the generation already exceeds `generation`.
    fn register_waiter(&self, generation: u64, check: &impl Fn(&T) -> Result<()>) -> Result<Option<Arc<WakeFd>>> {
        if self.is_newer(generation, check)? {
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

    fn is_newer(&self, generation: u64, check: &impl Fn(&T) -> Result<()>) -> Result<bool> {
        let inner = self.lock();
        check(&inner.value)?;
        Ok(inner.generation > generation)
    }
}
