//! Deadlines: silent agents, last calls, join timeouts and announced failures.

use std::time::{Duration, Instant};

use super::reasons::names;
use super::{Departure, HostAction, Id, Participant, RoundPhase, Rounds, Seat, Suspicion};
use crate::rendezvous::message::HostMessage;

/// After this fraction of the silence timeout, the host checks whether the agent's machine answers.
const SUSPICION_FRACTION: u32 = 3;

/// How long the machine has to acknowledge the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

impl Rounds {
    /// Schedules a check of the deadlines at this time or earlier.
    pub(super) fn schedule(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Schedules the check of an agent that was heard at `now`.
    pub(super) fn schedule_silence_check(&mut self, now: Instant) {
        self.schedule(now + self.settings.silence / SUSPICION_FRACTION);
    }

    /// The earliest deadline. O(members).
    fn earliest_deadline(&self) -> Option<Instant> {
        let silences = self.members.values().filter(|member| !member.agent.is_host);
        let silences = silences.map(|member| member.last_heard + self.silence_limit(member));
        let begin = match self.phase {
            RoundPhase::Gathering { .. } if self.tally.returning > 0 || self.waits_for_replacement() => None,
            RoundPhase::Gathering { last_call: Some(_), opens_at, .. } if self.last_step < opens_at => Some(opens_at),
            RoundPhase::Gathering { last_call, .. } => last_call,
            _ => None,
        };
        let waits = self.members.values().filter_map(|member| self.join_deadline(member));
        let pending = self.pending.as_ref().map(|pending| match self.silent_until() {
            Some(until) if pending.is_final() => until.max(pending.at),
            _ => pending.at,
        });
        silences.chain(waits).chain(begin).chain(pending).chain(self.early_exit_at).chain(self.explain_at).min()
    }

    /// How long an agent may be silent before the next step of its check.
    fn silence_limit(&self, member: &Participant) -> Duration {
        let silence = self.settings.silence;
        match member.suspicion {
            Suspicion::None => silence / SUSPICION_FRACTION,
            Suspicion::Probed => (silence / SUSPICION_FRACTION + PROBE_TIMEOUT).min(silence),
            Suspicion::Checked => silence,
        }
    }

    /// The time at which all running nodes that are silent now would have been declared lost; `None` if none is silent.
    pub(super) fn silent_until(&self) -> Option<Instant> {
        let silent = self.members.values().filter(|member| {
            matches!(member.seat, Seat::Running(_)) && member.suspicion != Suspicion::None && !member.agent.is_host
        });
        silent.map(|member| member.last_heard + self.settings.silence).max()
    }

    /// Checks silent agents: has the machine gone, or is only the agent suspended? The result is for the user. In both cases the agent is
    /// lost when the silence timeout has passed.
    fn check_silent(&mut self, now: Instant) {
        let is_due = |member: &Participant| {
            let is_unchecked = matches!(member.suspicion, Suspicion::None | Suspicion::Probed);
            !member.agent.is_host && is_unchecked && now >= member.last_heard + self.silence_limit(member)
        };
        let suspects: Vec<Id> = self.members.iter().filter(|(_, member)| is_due(member)).map(|(id, _)| *id).collect();
        for id in suspects {
            let Some(member) = self.members.get_mut(&id) else { continue };
            if member.suspicion == Suspicion::None {
                member.suspicion = Suspicion::Probed;
                self.send(id, HostMessage::Probe);
            } else {
                member.suspicion = Suspicion::Checked;
                self.actions.push(HostAction::CheckProbe(id));
            }
        }
    }

    pub(super) fn probe_checked(&mut self, now: Instant, id: Id, is_acknowledged: bool) {
        let Some(member) = self.members.get(&id).filter(|member| member.suspicion == Suspicion::Checked) else {
            return;
        };
        let (silent, silence) = (now.saturating_duration_since(member.last_heard), self.settings.silence);
        let diagnosis = if is_acknowledged {
            "its machine answers, so the agent is suspended or stuck"
        } else {
            "its machine does not answer, or the network to it is down"
        };
        let text = format!(
            "{} has been silent for {:.1} s: {diagnosis}; it is declared lost after {:.1} s (heartbeat_timeout)",
            member.label(),
            silent.as_secs_f64(),
            silence.as_secs_f64()
        );
        self.warn_host(&text);
    }

    /// When a waiting agent times out. Spares have no deadline while a round runs.
    pub(super) fn join_deadline(&self, member: &Participant) -> Option<Instant> {
        let RoundPhase::Gathering { opens_at, .. } = self.phase else { return None };
        match &member.seat {
            Seat::Waiting { join, since } => opens_at.max(*since).checked_add(join.timeout),
            _ => None,
        }
    }

    /// If this process or its machine was suspended, it could not receive anything: resets the deadlines of all peers instead of declaring
    /// them lost.
    pub(super) fn reset_after_own_suspension(&mut self, now: Instant) {
        if self.due.is_some_and(|due| now > due.max(self.last_step) + self.settings.silence / 4) {
            for member in self.members.values_mut() {
                (member.last_heard, member.suspicion) = (now, Suspicion::None);
            }
        }
    }

    /// Handles the deadlines that have passed.
    pub(super) fn handle_deadlines(&mut self, now: Instant) {
        if self.due.is_none_or(|due| now < due) {
            return debug_assert!(self.earliest_deadline().is_none_or(|at| self.due.is_some_and(|due| due <= at)));
        }
        self.handle_due(now);
        self.due = self.earliest_deadline();
    }

    fn handle_due(&mut self, now: Instant) {
        let silence = self.settings.silence;
        let is_silent = |member: &Participant| !member.agent.is_host && now >= member.last_heard + silence;
        let silent: Vec<Id> = self.members.iter().filter(|(_, member)| is_silent(member)).map(|(id, _)| *id).collect();
        for id in silent {
            let text = format!("it was silent for {:.1} s", silence.as_secs_f64());
            self.send(id, HostMessage::Dropped { text: format!("this node was declared lost: {text}") });
            self.actions.push(HostAction::Disconnect(id));
            let last_heard = self.members.get(&id).map_or(now, |member| member.last_heard);
            self.remove(now, id, &format!("was lost: {text}"), Departure::Lost(last_heard));
        }
        self.check_silent(now);
        self.end_if_due(now);
        self.try_begin(now);
        self.explain(now);
        let is_late = |member: &Participant| self.join_deadline(member).is_some_and(|deadline| now >= deadline);
        let late: Vec<Id> = self.members.iter().filter(|(_, member)| is_late(member)).map(|(id, _)| *id).collect();
        if late.is_empty() {
            return;
        }
        if self.tally.waiting >= self.min_nodes() {
            // The returning nodes take longer than the waiting nodes allow: begin without them.
            return self.begin(now);
        }
        let waiting = names(self.waiting());
        let cause = self.cause.as_ref().map(|cause| cause.text.clone());
        for id in late {
            self.send(id, HostMessage::TimedOut { waiting: waiting.clone(), cause: cause.clone() });
            self.set_seat(id, Seat::Away);
        }
    }
}
