//! How rounds end: of a worker's failure, or because a node came, went or was lost; and which of the two it was.

use std::time::{Duration, Instant};

use super::{Action, Id, Phase, Rounds, Seat};
use crate::rendezvous::message::{Cause, Kind, MOST_TEXT_BYTES, Notice, bounded};

/// After a worker's failure that is to end the job, how long it is waited for word of a lost node, which would explain it: workers fail
/// with their peers, and their agent may be heard first.
const LOSS_GRACE: Duration = Duration::from_millis(250);

/// A failure that ends the round by a time at the latest.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) at: Instant,
    pub(super) cause: Cause,
    /// It ends the job.
    pub(super) is_final: bool,
}

impl Rounds {
    pub(super) fn fail(&mut self, now: Instant, id: Id, round: u64, at_ns: u64, text: &str, is_final: bool) {
        let Some(member) = self.members.get(&id) else { return };
        let node = member.who.name.clone();
        let text = format!("{} on {node}", bounded(text, MOST_TEXT_BYTES));
        let cause = Cause { kind: Kind::Failure, node, at_ns: Some(at_ns), text };
        if self.begun != round + 1 {
            return;
        }
        if member.is_in() {
            match is_final {
                true if self.members.values().filter(|member| member.is_in()).count() == 1 => {
                    self.close_for_good(&cause);
                }
                true => self.expect_end(now + LOSS_GRACE, cause, true),
                false if self.pending.as_ref().is_some_and(|pending| pending.is_final) => {}
                false => self.end_round(now, &cause),
            }
        } else if let Some(known) = &mut self.cause
            && known.kind == Kind::Failure
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
    pub(super) fn expect_end(&mut self, at: Instant, cause: Cause, is_final: bool) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let pending = match self.pending.take() {
            Some(known) if known.is_final && !is_final => known,
            Some(known) if known.is_final == is_final => {
                // What happened first counts, whichever was heard of first.
                let cause = if cause.is_before(&known.cause) { cause } else { known.cause };
                Pending { at: at.min(known.at), cause, is_final }
            }
            _ => Pending { at, cause, is_final },
        };
        self.expect_by(pending.at);
        self.pending = Some(pending);
    }

    pub(super) fn end_round(&mut self, now: Instant, cause: &Cause) {
        if !self.count(cause.clone()) {
            return;
        }
        let mut returning = Vec::new();
        for (id, member) in &self.members {
            if let Seat::Running(place) | Seat::Finished(place) = &member.seat {
                self.actions.push(Action::Tell(*id, Notice::Over { round: place.round, cause: cause.clone() }));
                returning.push(*id);
            }
        }
        for id in returning {
            self.sit(id, Seat::Returning);
        }
        self.pending = None;
        self.gone_finished.clear();
        self.phase = Phase::Gathering { since: now, last_call: None };
        // Spares have waited without a deadline.
        if let Some(deadline) = self.members.values().filter_map(|member| self.join_deadline(member)).min() {
            self.expect_by(deadline);
        }
        self.try_begin(now);
    }

    /// Counts why a round ended; `false` if that was once too often, and the job is closed.
    pub(super) fn count(&mut self, cause: Cause) -> bool {
        match cause.kind {
            Kind::Failure => self.failures += 1,
            Kind::Membership => self.membership_changes += 1,
        }
        if self.settings.most_membership_changes.is_some_and(|most| self.membership_changes > most) {
            let text = format!("{}, after {} membership changes", cause.text, self.membership_changes - 1);
            self.close(&text);
            return false;
        }
        self.cause = Some(cause);
        true
    }

    pub(super) fn close_for_good(&mut self, cause: &Cause) {
        self.close(&format!("{}, and no restart is left", cause.text));
    }

    pub(super) fn close(&mut self, text: &str) {
        if self.closed().is_some() {
            return;
        }
        let is_running = matches!(self.phase, Phase::Running);
        for (id, member) in &self.members {
            let is_spare = is_running && matches!(member.seat, Seat::Waiting { .. });
            self.actions.push(Action::Tell(*id, Notice::Closed { text: text.into(), is_spare }));
        }
        self.pending = None;
        self.phase = Phase::Closed { why: text.into(), is_success: false };
    }

    /// A node is lost from a round that is just over: if that ended because a worker failed, it is why the worker did.
    pub(super) fn explain_failure(&mut self, lost: Cause) {
        if self.cause.as_ref().is_some_and(|cause| cause.kind == Kind::Failure) {
            self.failures -= 1;
            self.count(lost);
        }
    }
}
