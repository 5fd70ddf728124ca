//! The decisions of the restart policy: one for the job, applied as announced.

use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::message::{HostMessage, Place};
use ferroelastic_core::rendezvous::policy::Decision;
use ferroelastic_core::vocabulary::{RestartCause, RestartReason};

use super::Job;

/// The decisions that agents were told.
#[derive(Debug, Default)]
pub(super) struct Decisions {
    /// The round that is over, when it ended and the decision.
    over: Option<(u64, Instant, Option<Box<Decision>>)>,
    /// The decisions with which the job has ended, as each agent was told.
    ends: Vec<Option<Box<Decision>>>,
    /// The restarts that were used when the last round began.
    used: u64,
    /// The delays of all restarts.
    pub(super) delays: Vec<Duration>,
}

impl Job {
    pub(super) fn has_early_exits(&self) -> bool {
        self.faults.policy.iter().any(|(name, _)| *name == "--early-exit-timeout")
    }

    /// All agents are told the same.
    pub(super) fn note_decision(&mut self, notice: &HostMessage) {
        match notice {
            HostMessage::Over { round, cause } => {
                if let Some((over, at, decision)) = &self.decisions.over
                    && over == round
                {
                    // A later one is for an agent that reconnects, after the cause may have changed.
                    return assert!(
                        *at != self.now || *decision == cause.decision,
                        "{decision:?} {:?}",
                        cause.decision
                    );
                }
                assert_eq!(cause.decision.is_some(), cause.kind == RestartCause::Failure, "{cause:?}");
                self.decisions.over = Some((*round, self.now, cause.decision.clone()));
            }
            HostMessage::Closed { decision, .. } => {
                self.decisions.ends.push(decision.clone());
                assert!(self.decisions.ends.iter().all(|end| end == decision));
                assert!(decision.as_ref().is_none_or(|decision| decision.is_final()));
            }
            _ => {}
        }
    }

    /// A round begins: no earlier than announced, and each failure has used up one restart.
    pub(super) fn check_decision(&mut self, place: &Place) {
        assert_eq!(place.restarts_used, place.failures, "the counters are lost: {place:?}");
        assert!(place.restarts_used >= self.decisions.used);
        self.decisions.used = place.restarts_used;
        let max = self.faults.policy.iter().find(|(name, _)| *name == "--max-restarts");
        assert!(max.is_none_or(|(_, max)| place.restarts_used <= max.parse().expect("a number")));
        let Some(cause) = place.cause.as_ref().filter(|cause| cause.kind == RestartCause::Failure) else { return };
        let decision = cause.decision.as_ref().expect("a decision");
        let delay = decision.after.expect("a restart");
        let (round, at, told) = self.decisions.over.as_ref().expect("it ended");
        assert_eq!((*round + 1, told.as_ref()), (place.round, Some(decision)));
        assert!(self.now >= *at + delay, "{place:?}");
        assert_eq!(delay.is_zero(), decision.reason == RestartReason::AtOnce);
        self.decisions.delays.push(delay);
    }

    /// The longest delay of a restart.
    pub(crate) fn longest_delay(&self) -> Duration {
        self.decisions.delays.iter().max().copied().unwrap_or_default()
    }
}
