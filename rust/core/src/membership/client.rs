//! The handle of a membership.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::thread::{MembershipThread, Order};
use super::view::{MembershipView, Shared};
use crate::error::{Error, Result};
use crate::published::{CallerFds, Published, Wake};
use crate::rendezvous::member::{self, Call, MemberSettings, MembershipState};
use crate::rendezvous::message::Introduction;
use crate::sys::lease::LeasePage;
use crate::sys::wake::WakeFd;
use crate::thread::NativeThread;

const THREAD: &str = "ferro-rdzv";

/// An agent's membership in a rendezvous. Ends when it is dropped.
#[derive(Debug)]
pub struct RendezvousClient {
    thread: NativeThread<Order>,
    shared: Arc<Shared>,
}

impl RendezvousClient {
    /// Starts a membership. It connects with the first call to join.
    ///
    /// `host` and `port` are the address of the rendezvous, `who` is the agent. An empty name stands for the address of this node.
    pub fn start(host: &str, port: u16, who: Introduction, settings: MemberSettings) -> Result<Self> {
        let alarm = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let lease = LeasePage::create().map_err(|source| Error::os("create", "the page of a lease", source))?;
        let (lease, endpoint) = (Arc::new(lease), settings.endpoint.clone());
        let shared = Arc::new(Shared { view: Published::new(MembershipView::new()), alarm, lease, endpoint });
        let (host, its) = ((host.to_owned(), port), Arc::clone(&shared));
        let thread = NativeThread::start(THREAD, |inbox| MembershipThread::new(host, who, settings, inbox, its))?;
        Ok(Self { thread, shared })
    }

    /// Sends a call of the agent to its thread.
    pub fn call(&self, call: Call) -> Result<()> {
        self.thread.check_owner()?;
        if matches!(call, Call::Join { .. }) {
            self.shared.view.publish(|view| view.joins_under_way += 1);
        }
        self.thread.send(Order::Call(call))
    }

    /// The state of the membership.
    pub fn standing(&self) -> Result<MembershipState> {
        self.thread.check_owner()?;
        // A state from before a call to join is no answer to it.
        let standing = self.shared.view.read(|view| match view.joins_under_way {
            0 => view.standing.clone(),
            _ => MembershipState::Joining,
        });
        // After a suspension of this process, its thread may not have run yet.
        Ok(match standing {
            MembershipState::Placed(place) if self.shared.lease.is_over() => {
                MembershipState::Over(place, member::lapsed(&self.shared.endpoint))
            }
            standing => standing,
        })
    }

    /// The time until which the workers of this node may run, in shared memory. The guard process enforces it while this process is
    /// suspended.
    pub fn lease(&self) -> Result<&Arc<LeasePage>> {
        self.thread.check_owner()?;
        Ok(&self.shared.lease)
    }

    /// How long the workers of this node may still run, if the lease has lapsed.
    pub fn lapsed_left(&self) -> Result<Option<Duration>> {
        self.thread.check_owner()?;
        Ok(self.shared.lease.left().filter(|_| self.shared.lease.is_over()))
    }

    /// The address of this node by which it reaches the host, once it does.
    pub fn address(&self) -> Result<Option<IpAddr>> {
        self.thread.check_owner()?;
        Ok(self.shared.view.read(|view| view.address))
    }

    /// Takes the host's messages to the user since the last call.
    pub fn take_remarks(&self) -> Result<Vec<String>> {
        self.thread.check_owner()?;
        let mut remarks = Vec::new();
        // Taking nothing must not count as news: waiters call this after each wake-up.
        if !self.shared.view.read(|view| view.remarks.is_empty()) {
            self.shared.publish(|view| remarks = std::mem::take(&mut view.remarks));
        }
        Ok(remarks)
    }

    /// Grows with each change of the state.
    pub fn generation(&self) -> Result<u64> {
        self.thread.check_owner()?;
        Ok(self.shared.view.generation())
    }

    /// Blocks until there is something newer than `generation`, `timeout` has passed (`None`: never), or one of `others` is readable.
    pub fn wait(&self, generation: u64, timeout: Option<Duration>, others: CallerFds<'_>) -> Result<Wake> {
        self.thread.check_owner()?;
        self.shared.view.wait(generation, timeout, others, |view| match &view.failure {
            Some(text) => Err(Error::Panicked { thread: THREAD, text: text.clone() }),
            None if view.is_closed => Err(Error::Closed),
            None => Ok(()),
        })
    }

    /// Readable while there are messages to the user, and after the end of a round or of the rendezvous until the next call to join.
    pub fn alarm(&self) -> Result<BorrowedFd<'_>> {
        self.thread.check_owner()?;
        Ok(self.shared.alarm.as_fd())
    }

    /// Ends the membership after the earlier calls have been sent.
    pub fn close(&self) -> Result<()> {
        // A failure of the thread has been published.
        self.thread.close(Order::Close, None).map(drop)
    }
}
