//! What becomes due: silences, last calls, join timeouts, and failures that were announced.

use std::time::{Duration, Instant};

use super::reasons::names;
use super::{Doubt, Gone, HostAction, Id, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::HostMessage;

/// After this part of the silence with which an agent is lost, its machine is asked whether it is there.
const DOUBTFUL_PART: u32 = 3;

/// The machine has so long to answer.
const ANSWER_TIME: Duration = Duration::from_secs(1);

impl Rounds {
    /// Something is due at this time, and may be before.
    pub(super) fn expect_by(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// An agent that was heard now may be silent from now on.
    pub(super) fn expect_silence(&mut self, now: Instant) {
        self.expect_by(now + self.settings.silence / DOUBTFUL_PART);
    }

    /// The earliest deadline that there is. To find it all members are looked at.
    fn earliest(&self) -> Option<Instant> {
        let silences = self.members.values().filter(|member| !member.who.is_host);
        let silences = silences.map(|member| member.heard + self.patience(member));
        let last_call = match self.phase {
            RoundPhase::Gathering { last_call, .. } => last_call.filter(|_| self.tally.returning == 0),
            _ => None,
        };
        let waits = self.members.values().filter_map(|member| self.join_deadline(member));
        let pending = self.pending.as_ref().map(|pending| match self.silent_until() {
            Some(until) if pending.is_final => until.max(pending.at),
            _ => pending.at,
        });
        silences.chain(waits).chain(last_call).chain(pending).chain(self.explain_at).min()
    }

    /// For how long an agent may be silent until something is done about it.
    fn patience(&self, member: &Participant) -> Duration {
        let silence = self.settings.silence;
        match member.doubt {
            Doubt::None => silence / DOUBTFUL_PART,
            Doubt::Probed => (silence / DOUBTFUL_PART + ANSWER_TIME).min(silence),
            Doubt::Examined => silence,
        }
    }

    /// When the last of the nodes of this round that are silent now would be lost.
    fn silent_until(&self) -> Option<Instant> {
        let silent = self.members.values().filter(|member| {
            matches!(member.seat, Seat::Running(_)) && member.doubt != Doubt::None && !member.who.is_host
        });
        silent.map(|member| member.heard + self.settings.silence).max()
    }

    /// Looks into the silence of an agent: has its machine gone, or only stopped the agent? That is for people to know; either way it is
    /// lost when it has been silent for long enough.
    fn doubt(&mut self, now: Instant) {
        let is_due = |member: &Participant| {
            let is_doubtful = matches!(member.doubt, Doubt::None | Doubt::Probed);
            !member.who.is_host && is_doubtful && now >= member.heard + self.patience(member)
        };
        let doubtful: Vec<Id> = self.members.iter().filter(|(_, member)| is_due(member)).map(|(id, _)| *id).collect();
        for id in doubtful {
            let Some(member) = self.members.get_mut(&id) else { continue };
            if member.doubt == Doubt::None {
                member.doubt = Doubt::Probed;
                self.tell(id, HostMessage::Probe);
            } else {
                member.doubt = Doubt::Examined;
                self.actions.push(HostAction::Examine(id));
            }
        }
    }

    pub(super) fn examined(&mut self, now: Instant, id: Id, is_acknowledged: bool) {
        let Some(member) = self.members.get(&id).filter(|member| member.doubt == Doubt::Examined) else { return };
        let (silent, silence) = (now.saturating_duration_since(member.heard), self.settings.silence);
        let guess = if is_acknowledged {
            "its machine answers, so the agent is suspended or stuck"
        } else {
            "its machine does not answer either, or the network to it is down"
        };
        let text = format!(
            "{} has been silent for {:.1} s: {guess}; it is lost after {:.1} s (heartbeat_timeout)",
            member.label(),
            silent.as_secs_f64(),
            silence.as_secs_f64()
        );
        self.remark(&text);
    }

    /// When an agent that waits is told that it has waited in vain. Spares wait as long as there is a round.
    pub(super) fn join_deadline(&self, member: &Participant) -> Option<Instant> {
        let RoundPhase::Gathering { since: gathering, .. } = self.phase else { return None };
        match &member.seat {
            Seat::Waiting { join, since } => gathering.max(*since).checked_add(join.timeout),
            _ => None,
        }
    }

    /// This process was stopped, or its machine was: it has heard nobody meanwhile, and nobody is to blame for that.
    pub(super) fn forgive_own_pause(&mut self, now: Instant) {
        if self.due.is_some_and(|due| now > due.max(self.last_step) + self.settings.silence / 4) {
            for member in self.members.values_mut() {
                (member.heard, member.doubt) = (now, Doubt::None);
            }
        }
    }

    /// Does what is due.
    pub(super) fn look_at_clock(&mut self, now: Instant) {
        if self.due.is_none_or(|due| now < due) {
            return debug_assert!(self.earliest().is_none_or(|at| self.due.is_some_and(|due| due <= at)));
        }
        self.end_what_is_due(now);
        self.due = self.earliest();
    }

    fn end_what_is_due(&mut self, now: Instant) {
        let silence = self.settings.silence;
        let is_silent = |member: &Participant| !member.who.is_host && now >= member.heard + silence;
        let silent: Vec<Id> = self.members.iter().filter(|(_, member)| is_silent(member)).map(|(id, _)| *id).collect();
        for id in silent {
            let text = format!("it was silent for {:.1} s", silence.as_secs_f64());
            self.tell(id, HostMessage::Dropped { text: format!("this node was taken for lost: {text}") });
            self.actions.push(HostAction::Drop(id));
            let heard = self.members.get(&id).map_or(now, |member| member.heard);
            self.remove(now, id, &format!("was lost: {text}"), Gone::Lost(heard));
        }
        self.doubt(now);
        // A silent node may have been lost before, which would explain a last failure. One that is not the last is explained later.
        let is_silent = self.silent_until().is_some();
        if let Some(pending) = self.pending.take_if(|pending| now >= pending.at && !(pending.is_final && is_silent)) {
            if pending.is_final {
                self.close_for_good(&pending.cause);
            } else {
                self.end_round(now, &pending.cause);
            }
        }
        self.try_begin(now);
        self.explain(now);
        let is_late = |member: &Participant| self.join_deadline(member).is_some_and(|deadline| now >= deadline);
        let late: Vec<Id> = self.members.iter().filter(|(_, member)| is_late(member)).map(|(id, _)| *id).collect();
        if late.is_empty() {
            return;
        }
        if self.tally.waiting >= self.least_nodes() {
            // Those who are on their way take longer than the others wait.
            return self.begin();
        }
        let waiting = names(self.waiting());
        let cause = self.cause.as_ref().map(|cause| cause.text.clone());
        for id in late {
            self.tell(id, HostMessage::TimedOut { waiting: waiting.clone(), cause: cause.clone() });
            self.sit(id, Seat::Away);
        }
    }
}
