//! The events of a thread that copies output: orders, a deadline, and the tokens of its poller.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::sys::poller::{Interest, Poller};
use crate::sys::timer::Timer;
use crate::thread::Inbox;

const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
/// The largest token that a thread may use for its own descriptors.
pub(super) const MAX_TOKEN: u64 = u64::MAX - 2;

/// The poller of a thread, with its inbox and its timer.
pub(super) struct Events<O> {
    inbox: Inbox<O>,
    pub(super) poller: Poller,
    timer: Timer,
}

impl<O> Events<O> {
    /// `thread` is the name of the thread, for errors.
    pub(super) fn new(inbox: Inbox<O>, thread: &str) -> Result<Self> {
        let poller = Poller::new().map_err(|source| Error::os("create", "an epoll instance", source))?;
        let timer = Timer::new().map_err(|source| Error::os("create", "a timerfd", source))?;
        poller
            .add(inbox.wake(), WAKE, Interest::Readable)
            .and_then(|()| poller.add(&timer, TIMER, Interest::Readable))
            .map_err(|source| Error::os("watch", format!("the descriptors of the thread {thread}"), source))?;
        Ok(Self { inbox, poller, timer })
    }

    /// Waits until there is an event or `deadline` has passed; with `is_busy` it does not wait. Returns the orders. Appends the
    /// tokens of the thread's own descriptors that are ready.
    pub(super) fn wait(&mut self, deadline: Option<Instant>, is_busy: bool, ready: &mut Vec<u64>) -> Result<Vec<O>> {
        let poll_failed = |source| Error::os("wait for", "the output of workers", source);
        self.timer.set(deadline).map_err(poll_failed)?;
        let mut orders = Vec::new();
        self.poller.wait(!is_busy, ready).map_err(poll_failed)?;
        ready.retain(|token| match *token {
            WAKE => {
                self.inbox.wake().drain();
                orders.extend(std::iter::from_fn(|| self.inbox.next()));
                false
            }
            TIMER => {
                self.timer.drain();
                false
            }
            _ => true,
        });
        Ok(orders)
    }
}
