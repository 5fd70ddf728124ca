//! The agents at the host.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::rendezvous::rounds::{HostSettings, Rounds};
use crate::store::state::Peer;

/// The rendezvous that shares the port of the store.
pub(super) struct Agents {
    pub(super) rounds: Rounds,
    /// The silence timeout of agents.
    pub(super) silence: Duration,
    /// Connections that have not introduced themselves, with their deadline, earliest first. Entries may be stale.
    pub(super) unintroduced: VecDeque<(Instant, Peer)>,
    /// Number of torchrun agents that were turned away.
    pub(super) rejected_torchrun: u32,
}

impl Agents {
    pub(super) fn new(settings: HostSettings) -> Self {
        let silence = settings.silence;
        let rounds = Rounds::new(settings, Instant::now());
        Self { rounds, silence, unintroduced: VecDeque::new(), rejected_torchrun: 0 }
    }

    /// The next deadline.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let introduction = self.unintroduced.front().map(|(until, _)| *until);
        [self.rounds.next_tick(), introduction].into_iter().flatten().min()
    }
}
