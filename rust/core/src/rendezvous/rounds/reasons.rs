//! Tells waiting agents why they wait, each time the reason changes.

use std::time::{Duration, Instant};

use super::{HostAction, Id, MAX_NAMES, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::HostMessage;

/// The host sends the reason to a waiting agent after this time. It checks for a changed reason at the same interval.
const EXPLAIN_AFTER: Duration = Duration::from_secs(10);

impl Rounds {
    /// Sends a warning for the user to the host's agent. A warning from before that agent is a member is kept for it.
    pub(super) fn warn_host(&mut self, text: &str) {
        match self.members.iter().find(|(_, member)| member.agent.is_host) {
            Some((id, _)) => self.send(*id, HostMessage::Warning { text: text.to_owned() }),
            None if self.early_warnings.len() < MAX_NAMES => self.early_warnings.push(text.to_owned()),
            None => {}
        }
    }

    /// Schedules the message with the reason to agents that wait.
    pub(super) fn schedule_explanation(&mut self, now: Instant) {
        if self.explain_at.is_none() && matches!(self.phase, RoundPhase::Gathering { .. }) && self.tally.waiting > 0 {
            let at = now + EXPLAIN_AFTER;
            self.explain_at = Some(at);
            self.schedule(at);
        }
    }

    /// Tells waiting agents the reason, if the time has come and the reason has changed.
    pub(super) fn explain(&mut self, now: Instant) {
        if self.explain_at.take_if(|at| now >= *at).is_none() {
            return;
        }
        let Some(text) = self.reason() else { return };
        let waiting = self.members.iter_mut().filter(|(_, member)| member.is_waiting());
        for (id, member) in waiting {
            if member.last_warning.as_ref() != Some(&text) {
                member.last_warning = Some(text.clone());
                self.actions.push(HostAction::Send(*id, HostMessage::Warning { text: text.clone() }));
            }
        }
        self.schedule_explanation(now);
    }

    /// Why the next round has not begun.
    fn reason(&self) -> Option<String> {
        if !matches!(self.phase, RoundPhase::Gathering { .. }) || self.tally.waiting == 0 {
            return None;
        }
        let (waiting, min, max) = (self.tally.waiting, self.min_nodes(), self.max_nodes());
        let returning = |member: &&Participant| matches!(member.seat, Seat::Returning);
        Some(if self.tally.returning > 0 {
            format!(
                "waiting for nodes that are stopping their workers: {}",
                names(self.members.values().filter(returning)).join(", ")
            )
        } else if let RoundPhase::Gathering { opens_at, .. } = self.phase
            && self.last_step < opens_at
        {
            let left_s = (opens_at - self.last_step).as_secs_f64();
            format!("waiting for {left_s:.1} s: the delay of the restart")
        } else if waiting >= min && self.waits_for_replacement() {
            let (size, names) = (self.size, names(self.waiting()).join(", "));
            format!(
                "waiting for nodes: {waiting} of {size} have joined ({names}), and --on-node-failure=wait waits for a replacement"
            )
        } else if waiting < min {
            format!("waiting for nodes: {waiting} of at least {min} have joined ({})", names(self.waiting()).join(", "))
        } else {
            format!(
                "{waiting} nodes have joined, which is enough; waiting for up to {max} nodes until the last call ends"
            )
        })
    }

    /// Tells an agent that it is a spare, and the host's agent that there is a spare.
    pub(super) fn warn_spare(&mut self, id: Id) {
        let (running, max) = (self.running(), self.max_nodes());
        let why = if self.has_succeeded_anywhere() {
            "workers of other nodes have succeeded already".to_owned()
        } else if running >= max {
            format!("{running} of {max} nodes run, and --nnodes allows no more")
        } else if !self.may_change_membership() {
            format!("{running} of {max} nodes run, but no membership change is left (max_membership_changes)")
        } else {
            format!("{running} of {max} nodes run, and the round is about to end")
        };
        let Some(member) = self.members.get_mut(&id) else { return };
        let text = format!("this node waits as a spare, and no worker is started: {why}");
        if member.last_warning.as_ref() == Some(&text) {
            return;
        }
        member.last_warning = Some(text.clone());
        let (label, is_host) = (member.label(), member.agent.is_host);
        self.send(id, HostMessage::Warning { text });
        if !is_host {
            self.warn_host(&format!("{label} waits as a spare: {why}"));
        }
    }
}

/// Names of agents, at most [`MAX_NAMES`] of them, then the number of the others.
pub(super) fn names<'a>(members: impl Iterator<Item = &'a Participant>) -> Vec<String> {
    let mut names: Vec<String> = members.map(Participant::label).collect();
    if let Some(more) = names.len().checked_sub(MAX_NAMES).filter(|more| *more > 0) {
        names.truncate(MAX_NAMES);
        names.push(format!("{more} more"));
    }
    names
}
