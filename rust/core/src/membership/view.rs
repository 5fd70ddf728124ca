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
    pub(super) standing: MembershipState,
    /// Calls to join that the thread has not served yet.
    pub(super) joins_under_way: usize,
    /// The address of this node by which it reaches the host.
    pub(super) address: Option<IpAddr>,
    pub(super) remarks: Vec<String>,
    pub(super) failure: Option<String>,
    pub(super) is_closed: bool,
}

impl MembershipView {
    /// Of an agent that has not joined.
    pub(super) fn new() -> Self {
        Self {
            standing: MembershipState::Idle,
            joins_under_way: 0,
            address: None,
            remarks: Vec::new(),
            failure: None,
            is_closed: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) view: Published<MembershipView>,
    /// Readable while there is news for an agent whose workers run.
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
                matches!(view.standing, MembershipState::Joining | MembershipState::Placed(_) | MembershipState::Idle);
            if is_quiet && view.remarks.is_empty() && !view.is_closed {
                self.alarm.drain();
            } else {
                self.alarm.wake();
            }
        });
    }
}
