//! The agents that the thread of a host serves.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::rendezvous::rounds::{HostSettings, Rounds};
use crate::store::state::Peer;

/// The rendezvous at the port of the store.
pub(super) struct Agents {
    pub(super) rounds: Rounds,
    /// Longest silence of an agent.
    pub(super) silence: Duration,
    /// Connections that have not introduced themselves, with their deadline, earliest first. Entries may be stale.
    pub(super) visitors: VecDeque<(Instant, Peer)>,
    /// Number of torchrun agents that were turned away.
    pub(super) turned_away: u32,
}

impl Agents {
    pub(super) fn new(settings: HostSettings) -> Self {
        let silence = settings.silence;
        let rounds = Rounds::new(settings, Instant::now());
        Self { rounds, silence, visitors: VecDeque::new(), turned_away: 0 }
    }

    /// The next deadline.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let visit = self.visitors.front().map(|(until, _)| *until);
        [self.rounds.next_tick(), visit].into_iter().flatten().min()
    }
}
