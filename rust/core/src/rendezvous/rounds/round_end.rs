//! The end of a round: by a worker's failure, or because a node joined, left or was lost. Also attributes failures to lost nodes.

use std::time::{Duration, Instant};

use super::reasons::names;
use super::{Departure, HostAction, Id, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::{Cause, HostMessage};
use crate::rendezvous::policy::{Decision, FailureFacts, OnNodeFailure};
use crate::sys::clock::later;
use crate::vocabulary::{RestartCause, RestartReason};

/// A node that is lost within this time after a worker's failure, or before it, explains the failure: workers fail with their peers, and
/// the failure may be reported first. A final failure ends the job after this time.
const LOSS_GRACE: Duration = Duration::from_millis(250);

/// A failure that will end the round.
#[derive(Debug)]
pub(super) struct PendingEnd {
    /// When the host heard of it.
    since: Instant,
    pub(super) at: Instant,
    pub(super) cause: Cause,
    /// The decision that it ends the job; `None` if the policy decides when the round ends.
    pub(super) decision: Option<Decision>,
}

impl PendingEnd {
    /// Whether it ends the job.
    pub(super) fn is_final(&self) -> bool {
        self.decision.is_some()
    }
}

impl Rounds {
    pub(super) fn fail(&mut self, now: Instant, id: Id, round: u64, cause: Cause, facts: &FailureFacts) {
        let Some(member) = self.members.get(&id) else { return };
        if self.begun != round + 1 || matches!(self.phase, RoundPhase::Closed { .. }) {
            return;
        }
        if member.is_in_round() {
            match self.pending.as_ref().and_then(|pending| pending.decision.clone()) {
                Some(decision) if decision.is_by_counters() => {
                    self.schedule_round_end(now, now + LOSS_GRACE, cause, Some(decision));
                }
                Some(_) => {}
                None => self.settle(now, cause, facts),
            }
        } else if let Some(known) = &mut self.cause
            && known.kind == RestartCause::Failure
        {
            if let Some(decision) = self.policy.fatal(facts) {
                return self.close_after_failure(cause, decision);
            }
            // This failure happened first but was reported later.
            if cause.is_before(known) {
                let decision = known.decision.take();
                *known = Cause { decision, ..cause };
            }
        }
    }

    /// A failure ends the round. The policy decides whether there is another one.
    pub(super) fn settle(&mut self, now: Instant, cause: Cause, facts: &FailureFacts) {
        let decision = self.policy.decide(now, facts);
        let is_alone = self.members.values().filter(|member| member.is_in_round()).count() == 1;
        if decision.is_final() && !is_alone {
            self.schedule_round_end(now, now + LOSS_GRACE, cause, Some(decision));
        } else {
            self.apply(now, cause, decision);
        }
    }

    /// Applies a decision of the policy.
    pub(super) fn apply(&mut self, now: Instant, cause: Cause, decision: Decision) {
        if decision.is_final() {
            self.close_after_failure(cause, decision);
        } else {
            self.end_round(now, &Cause { decision: Some(Box::new(decision)), ..cause });
        }
    }

    /// Ends the running round with `cause` at `at`, unless it ends earlier. A final failure takes precedence over others.
    pub(super) fn schedule_round_end(&mut self, since: Instant, at: Instant, cause: Cause, decision: Option<Decision>) {
        if !matches!(self.phase, RoundPhase::Running) {
            return;
        }
        let pending = match self.pending.take() {
            Some(known) if known.is_final() && decision.is_none() => known,
            Some(known) if known.is_final() == decision.is_some() => {
                // The failure that happened first counts, even if it was reported later.
                let cause = if cause.is_before(&known.cause) { cause } else { known.cause };
                let decision = known.decision.or(decision);
                PendingEnd { since: since.min(known.since), at: at.min(known.at), cause, decision }
            }
            _ => PendingEnd { since, at, cause, decision },
        };
        self.schedule(pending.at);
        self.pending = Some(pending);
    }

    /// Ends the round if the time of its pending end has come.
    pub(super) fn end_if_due(&mut self, now: Instant) {
        // If a silent node turns out to be lost, that may explain a final failure, so wait for it. Other failures can be explained later.
        let is_silent = self.silent_until().is_some();
        if let Some(pending) = self.pending.take_if(|pending| now >= pending.at && !(pending.is_final() && is_silent)) {
            match pending.decision {
                Some(decision) => self.close_after_failure(pending.cause, decision),
                None => self.settle(now, pending.cause, &FailureFacts::of_agent()),
            }
        }
        if self.early_exit_at.take_if(|at| now >= *at).is_some()
            && self.pending.is_none()
            && let Some(cause) = self.early_exit()
        {
            self.settle(now, cause, &FailureFacts { causes: vec!["early_exit".into()], ..FailureFacts::default() });
        }
    }

    /// The failure of a round in which the workers of some nodes have succeeded while others run on.
    fn early_exit(&self) -> Option<Cause> {
        let timeout = self.policy.settings().early_exit?;
        let running = self.members.values().filter(|member| matches!(member.seat, Seat::Running(_)));
        let text = format!(
            "all workers of other nodes have succeeded, and those of {} ran on for {} s (--early-exit-timeout)",
            names(running).join(", "),
            timeout.as_secs_f64()
        );
        Some(Cause::failure(String::new(), text))
    }

    /// A node of the running round has left or was lost. A loss explains a failure within [`LOSS_GRACE`], and no other.
    pub(super) fn handle_loss(&mut self, now: Instant, loss: &Cause, departure: Departure) {
        match self.pending.take() {
            Some(pending) if !departure.explains(pending.since) => {
                if pending.is_final() {
                    self.pending = Some(pending);
                } else {
                    let decision = self.policy.decide(now, &FailureFacts::of_agent());
                    self.apply(now, pending.cause, decision);
                }
            }
            _ if self.ends_job_with_a_node() => self.close_after_node_failure(loss),
            _ => self.end_round(now, loss),
        }
    }

    /// Whether the loss of a node ends the job.
    pub(super) fn ends_job_with_a_node(&self) -> bool {
        self.policy.settings().on_node_failure == OnNodeFailure::Exit
    }

    /// Ends the job because of a lost node.
    pub(super) fn close_after_node_failure(&mut self, loss: &Cause) {
        let text = "the job ends with any of its nodes (--on-node-failure=exit)".to_owned();
        self.close_after_failure(loss.clone(), Decision { reason: RestartReason::NodeFailure, text, after: None });
    }

    pub(super) fn end_round(&mut self, now: Instant, cause: &Cause) {
        if cause.kind == RestartCause::Membership {
            self.policy.undo();
            self.policy.note_membership_change(now);
        }
        if !self.count_end(cause.clone()) {
            return;
        }
        let mut returning = Vec::new();
        for (id, member) in &self.members {
            if let Seat::Running(place) | Seat::Finished(place) = &member.seat {
                self.actions
                    .push(HostAction::Send(*id, HostMessage::Over { round: place.round, cause: cause.clone() }));
                returning.push(*id);
            }
        }
        for id in returning {
            self.set_seat(id, Seat::Returning);
        }
        self.pending = None;
        self.early_exit_at = None;
        self.finished_departed.clear();
        let delay = cause.decision.as_ref().and_then(|decision| decision.after);
        let opens_at = later(now, delay.unwrap_or_default());
        self.phase = RoundPhase::Gathering { since: now, opens_at, last_call: None };
        self.members.values_mut().for_each(|member| member.is_late = false);
        // Spares had no deadline while the round ran.
        if let Some(deadline) = self.members.values().filter_map(|member| self.join_deadline(member)).min() {
            self.schedule(deadline);
        }
        self.schedule_explanation(now);
        self.try_begin(now);
    }

    /// Counts the end of a round; `false` if the limit of membership changes is exceeded and the job is closed.
    pub(super) fn count_end(&mut self, cause: Cause) -> bool {
        match cause.kind {
            RestartCause::Failure => self.failures += 1,
            RestartCause::Membership => self.membership_changes += 1,
        }
        if self.settings.max_membership_changes.is_some_and(|max| self.membership_changes > max) {
            let text = format!("{}, after {} membership changes", cause.text, self.membership_changes - 1);
            self.close(Cause { text, ..cause });
            return false;
        }
        self.cause = Some(cause);
        true
    }

    pub(super) fn close_after_failure(&mut self, cause: Cause, decision: Decision) {
        let text = format!("{}, and {}", cause.text, decision.text);
        self.close(Cause { text, decision: Some(Box::new(decision)), ..cause });
    }

    /// Ends the job as failed, unless it has ended already. The exit code is never 0.
    pub(super) fn close(&mut self, cause: Cause) {
        if self.closed().is_none() {
            self.end(Cause { code: if cause.code == 0 { 1 } else { cause.code }, ..cause });
        }
    }

    pub(super) fn end(&mut self, cause: Cause) {
        let Cause { text: why, code, decision, detail, is_loss, .. } = cause;
        self.phase = RoundPhase::Closed { why, code, decision, detail, is_loss };
        self.pending = None;
        self.explain_at = None;
        let messages = self.members.iter().map(|(id, member)| HostAction::Send(*id, self.end_message(member)));
        let messages: Vec<_> = messages.collect();
        self.actions.extend(messages);
        self.admit_all_contenders();
    }

    /// The message that tells an agent the end of the job.
    pub(super) fn end_message(&self, member: &Participant) -> HostMessage {
        let RoundPhase::Closed { why, code, decision, detail, is_loss } = &self.phase else {
            return HostMessage::Released;
        };
        let membership = member.agent.membership;
        let has_finished = matches!(member.seat, Seat::Finished(_)) || self.finished_departed.contains_key(&membership);
        if *code == 0 && has_finished {
            return HostMessage::Released;
        }
        if member.is_late || !self.ever_waited.contains(&membership) {
            return HostMessage::Late { text: why.clone() };
        }
        let (text, decision, detail) = (why.clone(), decision.clone(), detail.clone());
        HostMessage::Closed { text, code: *code, decision, detail, is_loss: *is_loss }
    }

    /// A node is lost from a round that has just ended. If a worker's failure ended the round, the loss is its cause.
    pub(super) fn attribute_failure(&mut self, loss: Cause) {
        if self.cause.as_ref().is_some_and(|cause| cause.kind == RestartCause::Failure) {
            self.failures -= 1;
            self.policy.undo();
            if let RoundPhase::Gathering { since, opens_at, .. } = &mut self.phase {
                *opens_at = *since;
            }
            self.count_end(loss);
        }
    }
}

impl Departure {
    /// Whether this departure may have caused failures reported at `since`.
    pub(super) fn explains(self, since: Instant) -> bool {
        matches!(self, Self::Lost(at) if at <= since + LOSS_GRACE)
    }
}
