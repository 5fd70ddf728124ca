//! The native threads of this crate: an owner, an inbox, a wake-up descriptor, one rule for forks and one for panics.
//!
//! Each thread runs a [`Service`] that waits in a poller. A [`NativeThread`] is the handle: it sends orders, and waits for replies only as
//! long as the service takes to answer.
//!
//! - Fork: a forked child has the handle but not the thread. The handle refuses every order there, and dropping it closes nothing.
//! - Panic: the panic is caught, the service cleans up, and whoever closes the thread gets the error.
//! - Drop: the thread gets its closing order and is not joined, so that a drop never blocks.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::owner::Owner;
use crate::sys::sigmask;
use crate::sys::threads;
use crate::sys::wake::WakeFd;

/// Where a thread sends the reply to an order. It has room for one value, so sending never blocks the thread.
pub(crate) type Reply<T> = SyncSender<T>;

/// An order to a thread.
pub(crate) trait ThreadOrder: Send + 'static {
    /// The order that ends the thread as soon as possible.
    fn close() -> Self;
}

/// The work of a native thread.
pub(crate) trait Service: Send + 'static {
    /// What handles ask of it.
    type Order: ThreadOrder;

    /// Serves orders and events until an order ends the thread.
    fn serve(&mut self) -> Result<()>;

    /// Cleans up after [`Service::serve`] has returned or panicked. After a panic the state may be inconsistent.
    fn finish(&mut self, outcome: &Result<()>);
}

/// The thread's end of the line to its handle.
pub(crate) struct Inbox<O> {
    orders: Receiver<O>,
    remote: Remote<O>,
}

impl<O> Inbox<O> {
    /// The next order, if there is one.
    pub(crate) fn next(&self) -> Option<O> {
        self.orders.try_recv().ok()
    }

    /// Readable while there may be orders; [`WakeFd::drain`] acknowledges it.
    pub(crate) fn wake(&self) -> &WakeFd {
        &self.remote.wake
    }

    /// A way for helper threads to send orders.
    pub(crate) fn remote(&self) -> Remote<O> {
        self.remote.clone()
    }
}

/// Sends orders to a thread from another thread of the crate.
pub(crate) struct Remote<O> {
    orders: Sender<O>,
    wake: Arc<WakeFd>,
}

impl<O> Clone for Remote<O> {
    fn clone(&self) -> Self {
        Self { orders: self.orders.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<O> Remote<O> {
    /// Sends an order; `false` if the thread has ended.
    pub(crate) fn tell(&self, order: O) -> bool {
        let is_sent = self.orders.send(order).is_ok();
        self.wake.wake();
        is_sent
    }

    /// Wakes the thread without an order.
    pub(crate) fn wake(&self) {
        self.wake.wake();
    }
}

/// The two ends of a line to a thread.
pub(crate) fn line<O>() -> Result<(Remote<O>, Inbox<O>)> {
    let wake = Arc::new(WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?);
    let (sender, orders) = channel();
    let remote = Remote { orders: sender, wake };
    Ok((remote.clone(), Inbox { orders, remote }))
}

/// How a close went.
#[derive(Debug)]
pub(crate) enum CloseOutcome {
    /// The thread has ended. The outcome goes to the first caller; later callers get `Ok`.
    Yes(Result<()>),
    /// The thread still runs after the timeout.
    No,
}

/// The end of a thread, as its handle sees it.
#[derive(Debug, Default)]
struct End {
    state: Mutex<EndState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct EndState {
    outcome: Option<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, EndState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reached(&self, outcome: Result<()>) {
        self.lock().outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// Waits for the end. The lock is free while this waits.
    fn wait(&self, timeout: Option<Duration>) -> CloseOutcome {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &mut state.outcome {
                let outcome = std::mem::replace(outcome, Ok(()));
                let thread = state.thread.take();
                drop(state);
                if let Some(thread) = thread {
                    // Its last instruction was to report the end.
                    let _ = thread.join();
                }
                return CloseOutcome::Yes(outcome);
            }
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return CloseOutcome::No,
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

struct Parts<O> {
    remote: Remote<O>,
    end: Arc<End>,
}

/// The handle of a native thread.
pub(crate) struct NativeThread<O: ThreadOrder> {
    owner: Owner,
    /// `None` only while this is dropped.
    parts: Option<Parts<O>>,
}

impl<O: ThreadOrder> NativeThread<O> {
    /// Starts a thread. `create` makes its service on the calling thread, so that an error reaches the caller.
    pub(crate) fn start<S: Service<Order = O>>(
        name: &'static str,
        create: impl FnOnce(Inbox<O>) -> Result<S>,
    ) -> Result<Self> {
        let (remote, inbox) = line()?;
        let service = create(inbox)?;
        let end = Arc::new(End::default());
        let its_end = Arc::clone(&end);
        let thread = threads::builder(name).spawn(move || its_end.reached(run(name, service)));
        let thread = thread.map_err(|source| Error::os("start", format!("the thread {name}"), source))?;
        end.lock().thread = Some(thread);
        Ok(Self { owner: Owner::this_process(), parts: Some(Parts { remote, end }) })
    }

    /// Fails in a forked child, which does not have the thread.
    pub(crate) fn check_owner(&self) -> Result<()> {
        self.owner.check()
    }

    fn parts(&self) -> Result<&Parts<O>> {
        self.check_owner()?;
        self.parts.as_ref().ok_or(Error::Closed)
    }

    /// Sends an order. Fails if the thread has ended.
    pub(crate) fn tell(&self, order: O) -> Result<()> {
        if self.parts()?.remote.tell(order) { Ok(()) } else { Err(Error::Closed) }
    }

    /// Sends an order and waits for the reply. Fails if the thread ends without one.
    pub(crate) fn ask<T>(&self, order: impl FnOnce(Reply<T>) -> O) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.tell(order(reply))?;
        answer.recv().map_err(|_| Error::Closed)
    }

    /// As [`NativeThread::ask`], for at most `timeout`; `None` if there is no reply by then.
    pub(crate) fn ask_within<T>(&self, timeout: Duration, order: impl FnOnce(Reply<T>) -> O) -> Result<Option<T>> {
        let (reply, answer) = sync_channel(1);
        self.tell(order(reply))?;
        match answer.recv_timeout(timeout) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed),
        }
    }

    /// Sends an order that ends the thread, and waits for the end; `None` waits without a limit. Idempotent.
    pub(crate) fn close(&self, order: O, timeout: Option<Duration>) -> Result<CloseOutcome> {
        let parts = self.parts()?;
        // The thread may have ended already, or be about to: the wait tells.
        parts.remote.tell(order);
        Ok(parts.end.wait(timeout))
    }
}

impl<O: ThreadOrder> fmt::Debug for NativeThread<O> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("NativeThread").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl<O: ThreadOrder> Drop for NativeThread<O> {
    fn drop(&mut self) {
        let is_forked = self.check_owner().is_err();
        let Some(parts) = self.parts.take() else { return };
        if is_forked {
            // The channel belongs to the parent's thread, and may have been locked at the fork.
            std::mem::forget(parts);
        } else {
            parts.remote.tell(O::close());
        }
    }
}

fn run<S: Service>(name: &'static str, mut service: S) -> Result<()> {
    // Signals are for the interpreter's main thread.
    sigmask::block_all().forever();
    let outcome = catch_unwind(AssertUnwindSafe(|| service.serve()));
    let outcome = outcome.unwrap_or_else(|panic| Err(Error::panicked(name, &*panic)));
    // A second panic, caused by the state that the first one left, changes nothing about the outcome.
    let _ = catch_unwind(AssertUnwindSafe(|| service.finish(&outcome)));
    let _ = catch_unwind(AssertUnwindSafe(|| drop(service)));
    outcome
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::sys::poller::wait_readable;

    const TIMEOUT: Duration = Duration::from_secs(20);

    enum Order {
        Echo(u32, Reply<u32>),
        Hold(Receiver<()>),
        Panic,
        Close,
    }

    impl ThreadOrder for Order {
        fn close() -> Self {
            Self::Close
        }
    }

    struct Echo {
        inbox: Inbox<Order>,
        is_finished: Arc<AtomicBool>,
    }

    impl Service for Echo {
        type Order = Order;

        fn serve(&mut self) -> Result<()> {
            loop {
                wait_readable([Some(self.inbox.wake() as &dyn std::os::fd::AsFd)], None).expect("readable");
                self.inbox.wake().drain();
                while let Some(order) = self.inbox.next() {
                    match order {
                        Order::Echo(value, reply) => reply.send(value).expect("there is room"),
                        Order::Hold(until) => drop(until.recv()),
                        Order::Panic => panic!("on purpose"),
                        Order::Close => return Ok(()),
                    }
                }
            }
        }

        fn finish(&mut self, _outcome: &Result<()>) {
            self.is_finished.store(true, Ordering::SeqCst);
        }
    }

    fn start() -> (NativeThread<Order>, Arc<AtomicBool>) {
        let is_finished = Arc::new(AtomicBool::new(false));
        let its = Arc::clone(&is_finished);
        let thread = NativeThread::start("ferro-test", move |inbox| Ok(Echo { inbox, is_finished: its }));
        (thread.expect("started"), is_finished)
    }

    #[test]
    fn orders_are_answered_until_the_thread_is_closed() {
        let (thread, is_finished) = start();
        assert_eq!(thread.ask(|reply| Order::Echo(7, reply)).expect("an answer"), 7);
        assert!(matches!(thread.close(Order::Close, None), Ok(CloseOutcome::Yes(Ok(())))));
        assert!(is_finished.load(Ordering::SeqCst));
        assert!(matches!(thread.ask(|reply| Order::Echo(7, reply)), Err(Error::Closed)));
        assert!(matches!(thread.close(Order::Close, None), Ok(CloseOutcome::Yes(Ok(())))), "a close is idempotent");
    }

    #[test]
    fn a_panic_is_an_error_for_the_first_close_and_the_service_cleans_up() {
        let (thread, is_finished) = start();
        thread.tell(Order::Panic).expect("it runs");
        let Ok(CloseOutcome::Yes(Err(error))) = thread.close(Order::Close, Some(TIMEOUT)) else { panic!("no error") };
        assert_eq!(error.to_string(), "the thread ferro-test panicked: on purpose");
        assert!(is_finished.load(Ordering::SeqCst));
        assert!(matches!(thread.close(Order::Close, Some(TIMEOUT)), Ok(CloseOutcome::Yes(Ok(())))));
    }

    #[test]
    fn each_close_has_a_timeout_of_its_own() {
        let (thread, _) = start();
        let (release, held) = channel();
        thread.tell(Order::Hold(held)).expect("it runs");
        let thread = Arc::new(thread);
        let waiter = Arc::clone(&thread);
        let patient = std::thread::spawn(move || waiter.close(Order::Close, None));
        // Another close waits without a limit meanwhile. With a lock held across that wait this would not return.
        assert!(matches!(thread.close(Order::Close, Some(Duration::ZERO)), Ok(CloseOutcome::No)));
        assert!(matches!(thread.close(Order::Close, Some(Duration::from_millis(1))), Ok(CloseOutcome::No)));
        drop(release);
        assert!(matches!(patient.join().expect("ended"), Ok(CloseOutcome::Yes(Ok(())))));
    }

    #[test]
    fn a_drop_ends_the_thread_without_waiting_for_it() {
        let (thread, is_finished) = start();
        let (release, held) = channel::<()>();
        thread.tell(Order::Hold(held)).expect("it runs");
        let end = Arc::clone(&thread.parts.as_ref().expect("it lives").end);
        drop(thread);
        assert!(!is_finished.load(Ordering::SeqCst));
        drop(release);
        assert!(matches!(end.wait(Some(TIMEOUT)), CloseOutcome::Yes(Ok(()))));
    }
}
