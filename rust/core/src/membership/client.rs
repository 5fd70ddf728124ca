//! The handle of a membership.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::thread::{MembershipOrder, MembershipThread};
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
    thread: NativeThread<MembershipOrder>,
    shared: Arc<Shared>,
}

impl RendezvousClient {
    /// Starts a membership. It connects with the first call to join.
    ///
    /// `host` and `port` are the address of the rendezvous; `introduction` describes the agent. If its name is empty, the address of this
    /// node is used.
    pub fn start(host: &str, port: u16, introduction: Introduction, settings: MemberSettings) -> Result<Self> {
        let alarm = WakeFd::new().map_err(|source| Error::os("create", "an eventfd", source))?;
        let lease = LeasePage::create().map_err(|source| Error::os("create", "the page of a lease", source))?;
        let (lease, endpoint) = (Arc::new(lease), settings.endpoint.clone());
        let shared = Arc::new(Shared { view: Published::new(MembershipView::new()), alarm, lease, endpoint });
        let (host, thread_shared) = ((host.to_owned(), port), Arc::clone(&shared));
        let thread = NativeThread::start(THREAD, |inbox| {
            MembershipThread::new(host, introduction, settings, inbox, thread_shared)
        })?;
        Ok(Self { thread, shared })
    }

    /// Sends a call of the agent to the membership's thread.
    pub fn call(&self, call: Call) -> Result<()> {
        self.thread.check_owner()?;
        if matches!(call, Call::Join { .. }) {
            self.shared.view.publish(|view| view.pending_joins += 1);
        }
        self.thread.send(MembershipOrder::Call(call))
    }

    /// The state of the membership.
    pub fn state(&self) -> Result<MembershipState> {
        self.thread.check_owner()?;
        // A state from before a call to join must not be taken for its result.
        let state = self.shared.view.read(|view| match view.pending_joins {
            0 => view.state.clone(),
            _ => MembershipState::Joining,
        });
        // After a suspension of this process, the membership's thread may not have run yet.
        Ok(match state {
            MembershipState::Placed(place) if self.shared.lease.is_over() => {
                MembershipState::Over(place, member::lapsed_cause(&self.shared.endpoint))
            }
            state => state,
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

    /// The address by which this node reaches the host; `None` before the first connection.
    pub fn address(&self) -> Result<Option<IpAddr>> {
        self.thread.check_owner()?;
        Ok(self.shared.view.read(|view| view.address))
    }

    /// Takes the warnings for the user that have arrived since the last call.
    pub fn take_warnings(&self) -> Result<Vec<String>> {
        self.thread.check_owner()?;
        let mut warnings = Vec::new();
        // Do not publish if there is nothing to take: that would wake waiters, which call this after each wake-up.
        if !self.shared.view.read(|view| view.warnings.is_empty()) {
            self.shared.publish(|view| warnings = std::mem::take(&mut view.warnings));
        }
        Ok(warnings)
    }

    /// Grows with each change of the state.
    pub fn generation(&self) -> Result<u64> {
        self.thread.check_owner()?;
        Ok(self.shared.view.generation())
    }

    /// Blocks until the generation exceeds `generation`, `timeout` has passed (`None`: no timeout), or one of `others` is readable.
    pub fn wait(&self, generation: u64, timeout: Option<Duration>, others: CallerFds<'_>) -> Result<Wake> {
        self.thread.check_owner()?;
        self.shared.view.wait(generation, timeout, others, |view| match &view.failure {
            Some(text) => Err(Error::Panicked { thread: THREAD, text: text.clone() }),
            None if view.is_closed => Err(Error::Closed),
            None => Ok(()),
        })
    }

    /// Readable while there are warnings for the user, and from the end of a round or of the rendezvous until the next call to join.
    pub fn alarm(&self) -> Result<BorrowedFd<'_>> {
        self.thread.check_owner()?;
        Ok(self.shared.alarm.as_fd())
    }

    /// Ends the membership after the earlier calls have been sent.
    pub fn close(&self) -> Result<()> {
        // A failure of the thread has been published already.
        self.thread.close(MembershipOrder::Close, None).map(drop)
    }
}
