//! The native threads of this crate. Each has an inbox and a wake-up descriptor. All follow the same rules for forks and panics.
//!
//! Each thread runs a [`Service`] that waits in a poller. A [`NativeThread`] is the handle: it sends orders and can wait for the reply.
//!
//! - Fork: a forked child has the handle but not the thread. The handle refuses every order there, and dropping it closes nothing.
//! - Panic: the panic is caught, the service cleans up, and the first caller of [`NativeThread::close`] gets the error.
//! - Drop: the thread gets its closing order and is not joined. A drop never blocks.

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

/// Channel for the reply to an order. It has room for one value, so sending never blocks the thread.
pub(crate) type Reply<T> = SyncSender<T>;

/// An order to a thread.
pub(crate) trait ThreadOrder: Send + 'static {
    /// The order that ends the thread as soon as possible.
    fn close() -> Self;
}

/// The work of a native thread.
pub(crate) trait Service: Send + 'static {
    /// The orders it serves.
    type Order: ThreadOrder;

    /// Serves orders and events until an order ends the thread.
    fn serve(&mut self) -> Result<()>;

    /// Cleans up after [`Service::serve`] has returned or panicked. After a panic the state may be inconsistent.
    fn finish(&mut self, outcome: &Result<()>);
}

/// The receiving end of the channel from the handle to the thread.
pub(crate) struct Inbox<O> {
    orders: Receiver<O>,
    remote: Remote<O>,
}

impl<O> Inbox<O> {
    /// The next order, if there is one.
    pub(crate) fn next(&self) -> Option<O> {
        self.orders.try_recv().ok()
    }

    /// Readable while orders may be pending. Call [`WakeFd::drain`] before reading them.
    pub(crate) fn wake(&self) -> &WakeFd {
        &self.remote.wake
    }

    /// A sender for helper threads.
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
    pub(crate) fn send(&self, order: O) -> bool {
        let is_sent = self.orders.send(order).is_ok();
        self.wake.wake();
        is_sent
    }

    /// Wakes the thread without an order.
    pub(crate) fn wake(&self) {
        self.wake.wake();
    }
}

/// Creates the channel of a thread: its sender and its receiver.
pub(crate) fn order_channel<O>() -> Result<(Remote<O>, Inbox<O>)> {
    let wake = Arc::new(WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?);
    let (sender, orders) = channel();
    let remote = Remote { orders: sender, wake };
    Ok((remote.clone(), Inbox { orders, remote }))
}

/// Outcome of [`NativeThread::close`].
#[derive(Debug)]
pub(crate) enum CloseOutcome {
    /// The thread has ended. The first caller gets its result; later callers get `Ok`.
    Ended(Result<()>),
    /// The thread still ran when the timeout passed.
    TimedOut,
}

/// The end of a thread. The thread sets it; its handle waits for it.
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

    fn set(&self, outcome: Result<()>) {
        self.lock().outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// Waits for the end without holding the lock.
    fn wait(&self, timeout: Option<Duration>) -> CloseOutcome {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        loop {
            if let Some(outcome) = &mut state.outcome {
                let outcome = std::mem::replace(outcome, Ok(()));
                let thread = state.thread.take();
                drop(state);
                if let Some(thread) = thread {
                    // Does not block: setting the outcome was the thread's last action.
                    let _ = thread.join();
                }
                return CloseOutcome::Ended(outcome);
            }
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return CloseOutcome::TimedOut,
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
    /// `None` only during drop.
    parts: Option<Parts<O>>,
}

impl<O: ThreadOrder> NativeThread<O> {
    /// Starts a thread. `create` makes its service on the calling thread, so its error is returned to the caller.
    pub(crate) fn start<S: Service<Order = O>>(
        name: &'static str,
        create: impl FnOnce(Inbox<O>) -> Result<S>,
    ) -> Result<Self> {
        let (remote, inbox) = order_channel()?;
        let service = create(inbox)?;
        let end = Arc::new(End::default());
        let thread_end = Arc::clone(&end);
        let thread = threads::builder(name).spawn(move || thread_end.set(run(name, service)));
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

    /// A sender for other threads of the crate. It does not keep the thread running.
    pub(crate) fn remote(&self) -> Result<Remote<O>> {
        Ok(self.parts()?.remote.clone())
    }

    /// Sends an order. Fails if the thread has ended.
    pub(crate) fn send(&self, order: O) -> Result<()> {
        if self.parts()?.remote.send(order) { Ok(()) } else { Err(Error::Closed) }
    }

    /// Sends an order and waits for the reply. Fails if the thread ends without one.
    pub(crate) fn ask<T>(&self, order: impl FnOnce(Reply<T>) -> O) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.send(order(reply))?;
        answer.recv().map_err(|_| Error::Closed)
    }

    /// As [`NativeThread::ask`], but waits for at most `timeout`. Returns `None` after the timeout.
    pub(crate) fn ask_within<T>(&self, timeout: Duration, order: impl FnOnce(Reply<T>) -> O) -> Result<Option<T>> {
        let (reply, answer) = sync_channel(1);
        self.send(order(reply))?;
        match answer.recv_timeout(timeout) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed),
        }
    }

    /// Sends an order that ends the thread and waits for the end. A timeout of `None` waits without a limit. Idempotent.
    pub(crate) fn close(&self, order: O, timeout: Option<Duration>) -> Result<CloseOutcome> {
        let parts = self.parts()?;
        // Fails if the thread has ended; the wait returns its outcome then.
        parts.remote.send(order);
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
            // Dropping the channel could deadlock: a thread of the parent may have held its lock at the fork.
            std::mem::forget(parts);
        } else {
            parts.remote.send(O::close());
        }
    }
}

fn run<S: Service>(name: &'static str, mut service: S) -> Result<()> {
    // Signals must be delivered to the interpreter's main thread.
    sigmask::block_all().forever();
    let outcome = catch_unwind(AssertUnwindSafe(|| service.serve()));
    let outcome = outcome.unwrap_or_else(|panic| Err(Error::panicked(name, &*panic)));
    // The first panic may have left an inconsistent state. A second panic caused by it is ignored.
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
        Block(Receiver<()>),
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
                        Order::Block(until) => drop(until.recv()),
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
        let flag = Arc::clone(&is_finished);
        let thread = NativeThread::start("ferro-test", move |inbox| Ok(Echo { inbox, is_finished: flag }));
        (thread.expect("started"), is_finished)
    }

    #[test]
    fn orders_are_answered_until_the_thread_is_closed() {
        let (thread, is_finished) = start();
        assert_eq!(thread.ask(|reply| Order::Echo(7, reply)).expect("an answer"), 7);
        assert!(matches!(thread.close(Order::Close, None), Ok(CloseOutcome::Ended(Ok(())))));
        assert!(is_finished.load(Ordering::SeqCst));
        assert!(matches!(thread.ask(|reply| Order::Echo(7, reply)), Err(Error::Closed)));
        assert!(matches!(thread.close(Order::Close, None), Ok(CloseOutcome::Ended(Ok(())))), "a close is idempotent");
    }

    #[test]
    fn the_first_close_after_a_panic_returns_the_error_and_the_service_cleans_up() {
        let (thread, is_finished) = start();
        thread.send(Order::Panic).expect("it runs");
        let Ok(CloseOutcome::Ended(Err(error))) = thread.close(Order::Close, Some(TIMEOUT)) else { panic!("no error") };
        assert_eq!(error.to_string(), "the thread ferro-test panicked: on purpose");
        assert!(is_finished.load(Ordering::SeqCst));
        assert!(matches!(thread.close(Order::Close, Some(TIMEOUT)), Ok(CloseOutcome::Ended(Ok(())))));
    }

    #[test]
    fn concurrent_closes_have_independent_timeouts() {
        let (thread, _) = start();
        let (release, blocked) = channel();
        thread.send(Order::Block(blocked)).expect("it runs");
        let thread = Arc::new(thread);
        let waiter = Arc::clone(&thread);
        let unlimited = std::thread::spawn(move || waiter.close(Order::Close, None));
        // If the close without a limit held a lock while it waits, these two would block.
        assert!(matches!(thread.close(Order::Close, Some(Duration::ZERO)), Ok(CloseOutcome::TimedOut)));
        assert!(matches!(thread.close(Order::Close, Some(Duration::from_millis(1))), Ok(CloseOutcome::TimedOut)));
        drop(release);
        assert!(matches!(unlimited.join().expect("ended"), Ok(CloseOutcome::Ended(Ok(())))));
    }

    #[test]
    fn a_drop_ends_the_thread_without_joining_it() {
        let (thread, is_finished) = start();
        let (release, blocked) = channel::<()>();
        thread.send(Order::Block(blocked)).expect("it runs");
        let end = Arc::clone(&thread.parts.as_ref().expect("it lives").end);
        drop(thread);
        assert!(!is_finished.load(Ordering::SeqCst));
        drop(release);
        assert!(matches!(end.wait(Some(TIMEOUT)), CloseOutcome::Ended(Ok(()))));
    }
}
