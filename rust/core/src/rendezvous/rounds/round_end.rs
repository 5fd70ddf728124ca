//! How rounds end: of a worker's failure, or because a node came, went or was lost; and which of the two it was.

use std::time::{Duration, Instant};

use super::{Gone, HostAction, Id, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::{Cause, HostMessage};
use crate::vocabulary::RestartCause;

/// A node that is lost so long after a worker's failure, or before it, explains it: workers fail with their peers, and their agent may
/// be heard first. A last failure ends the job after this time.
const LOSS_GRACE: Duration = Duration::from_millis(250);

/// A failure that ends the round by a time at the latest.
#[derive(Debug)]
pub(super) struct Pending {
    /// When it was heard of.
    since: Instant,
    pub(super) at: Instant,
    pub(super) cause: Cause,
    /// It ends the job.
    pub(super) is_final: bool,
}

impl Rounds {
    pub(super) fn fail(&mut self, now: Instant, id: Id, round: u64, cause: Cause, is_final: bool) {
        let Some(member) = self.members.get(&id) else { return };
        if self.begun != round + 1 || matches!(self.phase, RoundPhase::Closed { .. }) {
            return;
        }
        if member.is_in() {
            match is_final {
                true if self.members.values().filter(|member| member.is_in()).count() == 1 => {
                    self.close_for_good(&cause);
                }
                true => self.expect_end(now, now + LOSS_GRACE, cause, true),
                false if self.pending.as_ref().is_some_and(|pending| pending.is_final) => {}
                false => self.end_round(now, &cause),
            }
        } else if let Some(known) = &mut self.cause
            && known.kind == RestartCause::Failure
        {
            if is_final {
                return self.close_for_good(&cause);
            }
            // It was first, and heard of second.
            if cause.is_before(known) {
                *known = cause;
            }
        }
    }

    /// The running round ends of `cause`, unless it ends before. What ends the job counts more than what does not.
    pub(super) fn expect_end(&mut self, since: Instant, at: Instant, cause: Cause, is_final: bool) {
        if !matches!(self.phase, RoundPhase::Running) {
            return;
        }
        let pending = match self.pending.take() {
            Some(known) if known.is_final && !is_final => known,
            Some(known) if known.is_final == is_final => {
                // What happened first counts, whichever was heard of first.
                let cause = if cause.is_before(&known.cause) { cause } else { known.cause };
                Pending { since: since.min(known.since), at: at.min(known.at), cause, is_final }
            }
            _ => Pending { since, at, cause, is_final },
        };
        self.expect_by(pending.at);
        self.pending = Some(pending);
    }

    /// A node of the running round is gone. That explains a failure of this time, and no other.
    pub(super) fn lose(&mut self, now: Instant, lost: &Cause, gone: Gone) {
        match self.pending.take() {
            Some(pending) if !gone.explains(pending.since) => {
                if pending.is_final {
                    self.pending = Some(pending);
                } else {
                    self.end_round(now, &pending.cause);
                }
            }
            _ => self.end_round(now, lost),
        }
    }

    pub(super) fn end_round(&mut self, now: Instant, cause: &Cause) {
        if !self.count(cause.clone()) {
            return;
        }
        let mut returning = Vec::new();
        for (id, member) in &self.members {
            if let Seat::Running(place) | Seat::Finished(place) = &member.seat {
                self.actions
                    .push(HostAction::Tell(*id, HostMessage::Over { round: place.round, cause: cause.clone() }));
                returning.push(*id);
            }
        }
        for id in returning {
            self.sit(id, Seat::Returning);
        }
        self.pending = None;
        self.gone_finished.clear();
        self.phase = RoundPhase::Gathering { since: now, last_call: None };
        self.members.values_mut().for_each(|member| member.is_late = false);
        // Spares have waited without a deadline.
        if let Some(deadline) = self.members.values().filter_map(|member| self.join_deadline(member)).min() {
            self.expect_by(deadline);
        }
        self.expect_explanation(now);
        self.try_begin(now);
    }

    /// Counts why a round ended; `false` if that was once too often, and the job is closed.
    pub(super) fn count(&mut self, cause: Cause) -> bool {
        match cause.kind {
            RestartCause::Failure => self.failures += 1,
            RestartCause::Membership => self.membership_changes += 1,
        }
        if self.settings.most_membership_changes.is_some_and(|most| self.membership_changes > most) {
            let text = format!("{}, after {} membership changes", cause.text, self.membership_changes - 1);
            self.close(&text, cause.code);
            return false;
        }
        self.cause = Some(cause);
        true
    }

    pub(super) fn close_for_good(&mut self, cause: &Cause) {
        self.close(&format!("{}, and no restart is left", cause.text), cause.code);
    }

    /// Ends the job, unless it has ended. It has not succeeded, whatever the code says.
    pub(super) fn close(&mut self, text: &str, code: i32) {
        if self.closed().is_none() {
            self.end(text, if code == 0 { 1 } else { code });
        }
    }

    pub(super) fn end(&mut self, text: &str, code: i32) {
        self.phase = RoundPhase::Closed { why: text.into(), code };
        self.pending = None;
        self.explain_at = None;
        let notices = self.members.iter().map(|(id, member)| HostAction::Tell(*id, self.end_for(member)));
        let notices: Vec<_> = notices.collect();
        self.actions.extend(notices);
        self.admit_all_contenders();
    }

    /// What the end of the job means for one agent.
    pub(super) fn end_for(&self, member: &Participant) -> HostMessage {
        let RoundPhase::Closed { why, code } = &self.phase else { return HostMessage::Released };
        let membership = member.who.membership;
        let has_finished = matches!(member.seat, Seat::Finished(_)) || self.gone_finished.contains_key(&membership);
        if *code == 0 && has_finished {
            return HostMessage::Released;
        }
        if member.is_late || !self.known.contains(&membership) {
            return HostMessage::Late { text: why.clone() };
        }
        HostMessage::Closed { text: why.clone(), code: *code }
    }

    /// A node is lost from a round that is just over: if that ended because a worker failed, it is why the worker did.
    pub(super) fn explain_failure(&mut self, lost: Cause) {
        if self.cause.as_ref().is_some_and(|cause| cause.kind == RestartCause::Failure) {
            self.failures -= 1;
            self.count(lost);
        }
    }
}

impl Gone {
    /// Whether workers may have failed at `since` because of this.
    pub(super) fn explains(self, since: Instant) -> bool {
        matches!(self, Self::Lost(at) if at <= since + LOSS_GRACE)
    }
}
