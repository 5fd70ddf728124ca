//! The reasons for which agents wait, told to them whenever they have changed.

use std::time::{Duration, Instant};

use super::{HostAction, Id, MOST_NAMES, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::HostMessage;

/// An agent that waits is told the reason after this time, and a changed reason as long after the former one.
const EXPLAIN_AFTER: Duration = Duration::from_secs(10);

impl Rounds {
    /// Lets the host's agent tell its user something.
    pub(super) fn remark(&mut self, text: &str) {
        let hosts = self.members.iter().filter(|(_, member)| member.who.is_host).map(|(id, _)| *id);
        let remarks = hosts.map(|id| HostAction::Tell(id, HostMessage::Remark { text: text.to_owned() }));
        self.actions.extend(remarks);
    }

    /// Agents that wait are told the reason, if they wait for long.
    pub(super) fn expect_explanation(&mut self, now: Instant) {
        if self.explain_at.is_none() && matches!(self.phase, RoundPhase::Gathering { .. }) && self.tally.waiting > 0 {
            let at = now + EXPLAIN_AFTER;
            self.explain_at = Some(at);
            self.expect_by(at);
        }
    }

    /// Tells the agents that wait the reason, if that is due and news to them.
    pub(super) fn explain(&mut self, now: Instant) {
        if self.explain_at.take_if(|at| now >= *at).is_none() {
            return;
        }
        let Some(text) = self.reason() else { return };
        let waiting = self.members.iter_mut().filter(|(_, member)| member.is_waiting());
        for (id, member) in waiting {
            if member.told.as_ref() != Some(&text) {
                member.told = Some(text.clone());
                self.actions.push(HostAction::Tell(*id, HostMessage::Remark { text: text.clone() }));
            }
        }
        self.expect_explanation(now);
    }

    /// Why the next round has not begun.
    fn reason(&self) -> Option<String> {
        if !matches!(self.phase, RoundPhase::Gathering { .. }) || self.tally.waiting == 0 {
            return None;
        }
        let (waiting, least, most) = (self.tally.waiting, self.least_nodes(), self.most_nodes());
        let returning = |member: &&Participant| matches!(member.seat, Seat::Returning);
        Some(if self.tally.returning > 0 {
            format!(
                "waiting for nodes that stop their workers: {}",
                names(self.members.values().filter(returning)).join(", ")
            )
        } else if waiting < least {
            format!("waiting for nodes: {waiting} of {least} have come ({})", names(self.waiting()).join(", "))
        } else {
            format!(
                "{waiting} nodes have come, which are enough; waiting for others, up to {most}, until the last call"
            )
        })
    }

    /// Tells an agent that it is a spare, and the host's agent that there is one.
    pub(super) fn tell_spare(&mut self, id: Id) {
        let (running, most) = (self.running(), self.most_nodes());
        let why = if self.has_succeeded_anywhere() {
            "workers of other nodes have succeeded already".to_owned()
        } else if running >= most {
            format!("{running} of {most} nodes run, and --nnodes allows no more")
        } else if !self.may_change_membership() {
            format!("{running} of {most} nodes run, but no membership change is left (max_membership_changes)")
        } else {
            format!("{running} of {most} nodes run, and the round is about to end")
        };
        let Some(member) = self.members.get_mut(&id) else { return };
        let text = format!("this node waits as a spare, and no worker is started: {why}");
        if member.told.as_ref() == Some(&text) {
            return;
        }
        member.told = Some(text.clone());
        let (label, is_host) = (member.label(), member.who.is_host);
        self.tell(id, HostMessage::Remark { text });
        if !is_host {
            self.remark(&format!("{label} waits as a spare: {why}"));
        }
    }
}

/// Names of agents; of many, some and the number of the others.
pub(super) fn names<'a>(members: impl Iterator<Item = &'a Participant>) -> Vec<String> {
    let mut names: Vec<String> = members.map(Participant::label).collect();
    if let Some(more) = names.len().checked_sub(MOST_NAMES).filter(|more| *more > 0) {
        names.truncate(MOST_NAMES);
        names.push(format!("{more} more"));
    }
    names
}
