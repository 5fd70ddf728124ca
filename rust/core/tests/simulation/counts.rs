//! What rounds end of: failures are counted as such, unless a node was lost at the same time.

use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::message::Place;
use ferroelastic_core::rendezvous::rounds::HostEvent;

use super::{Job, MS};

/// A loss so long after a failure explains it.
const LOSS_GRACE: Duration = Duration::from_millis(250);

/// What the host has heard since the last round began, and what it had counted by then.
#[derive(Debug, Default)]
pub(super) struct Counts {
    failed_at: Option<Instant>,
    /// When nodes of the round were lost: their connection ended, or they were heard last.
    losses: Vec<Instant>,
    /// An agent has joined that was not heard of the end of its round.
    is_unclear: bool,
    failures: u64,
    changes: u64,
}

impl Job {
    pub(super) fn note(&mut self, event: &HostEvent) {
        match event {
            HostEvent::Failed { round, .. } if round + 1 == self.rounds.begun() => {
                self.counts.failed_at.get_or_insert(self.now);
            }
            HostEvent::Lost(..) => self.note_loss(self.now),
            // A second connection, of which only the agent knows why; or a wish that says that its workers are gone.
            HostEvent::Entered(..) => self.counts.is_unclear = true,
            HostEvent::Joined(_, join) if join.after.is_some_and(|after| after + 1 == self.rounds.begun()) => {
                self.counts.is_unclear |= self.counts.failed_at.is_none() && self.counts.losses.is_empty();
            }
            _ => {}
        }
    }

    pub(super) fn note_loss(&mut self, at: Instant) {
        self.counts.losses.push(at);
    }

    /// A round has begun: the one before has ended once, and of a failure if there was one that no loss explains.
    pub(super) fn check_counts(&mut self, place: &Place) {
        let before = std::mem::take(&mut self.counts);
        (self.counts.failures, self.counts.changes) = (place.failures, place.membership_changes);
        if place.round == 0 {
            return;
        }
        let (failures, changes) = (place.failures - before.failures, place.membership_changes - before.changes);
        assert_eq!(failures + changes, 1, "{before:?}");
        if before.is_unclear || self.has_early_exits() {
            return;
        }
        match before.failed_at {
            None => assert_eq!(failures, 0, "{before:?}"),
            Some(failed_at) => {
                let may_explain = |at: &Instant| *at <= failed_at + LOSS_GRACE + MS;
                assert!(failures == 1 || before.losses.iter().any(may_explain), "{before:?}");
            }
        }
    }
}
