//! The state of a membership, shared between its thread and its handle.

use std::net::IpAddr;
use std::sync::Arc;

use crate::published::Published;
use crate::rendezvous::member::MembershipState;
use crate::sys::lease::LeasePage;
use crate::sys::wake::WakeFd;

/// What the thread publishes.
#[derive(Debug)]
pub(super) struct MembershipView {
    pub(super) state: MembershipState,
    /// Calls to join that the thread has not handled yet.
    pub(super) pending_joins: usize,
    /// The address of this node by which it reaches the host.
    pub(super) address: Option<IpAddr>,
    pub(super) warnings: Vec<String>,
    pub(super) failure: Option<String>,
    pub(super) is_closed: bool,
}

impl MembershipView {
    /// The view of an agent that has not joined.
    pub(super) fn new() -> Self {
        Self {
            state: MembershipState::Idle,
            pending_joins: 0,
            address: None,
            warnings: Vec::new(),
            failure: None,
            is_closed: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) view: Published<MembershipView>,
    /// Readable while there is an event that an agent with running workers must handle.
    pub(super) alarm: WakeFd,
    /// The time until which the workers may run.
    pub(super) lease: Arc<LeasePage>,
    pub(super) endpoint: String,
}

impl Shared {
    pub(super) fn publish(&self, change: impl FnOnce(&mut MembershipView)) {
        self.view.publish(|view| {
            change(view);
            // Under the lock of the view, so that the alarm agrees with the published view.
            let is_quiet =
                matches!(view.state, MembershipState::Joining | MembershipState::Placed(_) | MembershipState::Idle);
            if is_quiet && view.warnings.is_empty() && !view.is_closed {
                self.alarm.drain();
            } else {
                self.alarm.wake();
            }
        });
    }
}
