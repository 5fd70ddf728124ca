//! The end of a round: by a worker's failure, or because a node joined, left or was lost. Also attributes failures to lost nodes.

use std::time::{Duration, Instant};

use super::{Departure, HostAction, Id, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::{Cause, HostMessage};
use crate::vocabulary::RestartCause;

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
    /// No restart is left: it ends the job.
    pub(super) is_final: bool,
}

impl Rounds {
    pub(super) fn fail(&mut self, now: Instant, id: Id, round: u64, cause: Cause, is_final: bool) {
        let Some(member) = self.members.get(&id) else { return };
        if self.begun != round + 1 || matches!(self.phase, RoundPhase::Closed { .. }) {
            return;
        }
        if member.is_in_round() {
            match is_final {
                true if self.members.values().filter(|member| member.is_in_round()).count() == 1 => {
                    self.close_after_failure(&cause);
                }
                true => self.schedule_round_end(now, now + LOSS_GRACE, cause, true),
                false if self.pending.as_ref().is_some_and(|pending| pending.is_final) => {}
                false => self.end_round(now, &cause),
            }
        } else if let Some(known) = &mut self.cause
            && known.kind == RestartCause::Failure
        {
            if is_final {
                return self.close_after_failure(&cause);
            }
            // This failure happened first but was reported later.
            if cause.is_before(known) {
                *known = cause;
            }
        }
    }

    /// Ends the running round with `cause` at `at`, unless it ends earlier. A final failure takes precedence over others.
    pub(super) fn schedule_round_end(&mut self, since: Instant, at: Instant, cause: Cause, is_final: bool) {
        if !matches!(self.phase, RoundPhase::Running) {
            return;
        }
        let pending = match self.pending.take() {
            Some(known) if known.is_final && !is_final => known,
            Some(known) if known.is_final == is_final => {
                // The failure that happened first counts, even if it was reported later.
                let cause = if cause.is_before(&known.cause) { cause } else { known.cause };
                PendingEnd { since: since.min(known.since), at: at.min(known.at), cause, is_final }
            }
            _ => PendingEnd { since, at, cause, is_final },
        };
        self.schedule(pending.at);
        self.pending = Some(pending);
    }

    /// A node of the running round has left or was lost. A loss explains a failure within [`LOSS_GRACE`], and no other.
    pub(super) fn handle_loss(&mut self, now: Instant, loss: &Cause, departure: Departure) {
        match self.pending.take() {
            Some(pending) if !departure.explains(pending.since) => {
                if pending.is_final {
                    self.pending = Some(pending);
                } else {
                    self.end_round(now, &pending.cause);
                }
            }
            _ => self.end_round(now, loss),
        }
    }

    pub(super) fn end_round(&mut self, now: Instant, cause: &Cause) {
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
        self.finished_departed.clear();
        self.phase = RoundPhase::Gathering { since: now, last_call: None };
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

    pub(super) fn close_after_failure(&mut self, cause: &Cause) {
        let text = format!("{}, and no restart is left", cause.text);
        self.close(Cause { text, ..cause.clone() });
    }

    /// Ends the job as failed, unless it has ended already. The exit code is never 0.
    pub(super) fn close(&mut self, cause: Cause) {
        if self.closed().is_none() {
            self.end(Cause { code: if cause.code == 0 { 1 } else { cause.code }, ..cause });
        }
    }

    pub(super) fn end(&mut self, cause: Cause) {
        let Cause { text: why, code, detail, is_loss, .. } = cause;
        self.phase = RoundPhase::Closed { why, code, detail, is_loss };
        self.pending = None;
        self.explain_at = None;
        let messages = self.members.iter().map(|(id, member)| HostAction::Send(*id, self.end_message(member)));
        let messages: Vec<_> = messages.collect();
        self.actions.extend(messages);
        self.admit_all_contenders();
    }

    /// The message that tells an agent the end of the job.
    pub(super) fn end_message(&self, member: &Participant) -> HostMessage {
        let RoundPhase::Closed { why, code, detail, is_loss } = &self.phase else { return HostMessage::Released };
        let membership = member.agent.membership;
        let has_finished = matches!(member.seat, Seat::Finished(_)) || self.finished_departed.contains_key(&membership);
        if *code == 0 && has_finished {
            return HostMessage::Released;
        }
        if member.is_late || !self.ever_waited.contains(&membership) {
            return HostMessage::Late { text: why.clone() };
        }
        HostMessage::Closed { text: why.clone(), code: *code, detail: detail.clone(), is_loss: *is_loss }
    }

    /// A node is lost from a round that has just ended. If a worker's failure ended the round, the loss is its cause.
    pub(super) fn attribute_failure(&mut self, loss: Cause) {
        if self.cause.as_ref().is_some_and(|cause| cause.kind == RestartCause::Failure) {
            self.failures -= 1;
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
