//! Agents that come: which are admitted, which are refused, and for what reason.

use std::time::Instant;

use super::{Doubt, Gone, HostAction, Id, Participant, RoundPhase, Rounds, Seat};
use crate::rendezvous::message::{HostMessage, Introduction, MOST_TEXT_BYTES, PROTOCOL};
use crate::text::{bounded, printable};

/// Longest name of a node.
const MOST_NAME_BYTES: usize = 256;

/// Longest value of a setting in a message.
const MOST_VALUE_BYTES: usize = 256;

impl Rounds {
    pub(super) fn enter(&mut self, now: Instant, id: Id, mut who: Introduction) {
        let same = self.members.iter().find(|(_, member)| member.who.membership == who.membership);
        if let Some((former, is_later)) = same.map(|(id, member)| (*id, member.who.connection < who.connection)) {
            if !is_later {
                // Said twice, or by a connection that it has given up.
                if former != id {
                    self.actions.push(HostAction::Drop(id));
                }
                return;
            }
            // Only it has noticed that its former connection is broken.
            self.actions.push(HostAction::Drop(former));
            self.remove(now, former, "was lost: it came over another connection", Gone::Lost(now));
        }
        who.name.truncate(bounded(&who.name, MOST_NAME_BYTES).len());
        if let Some(text) = self.objection(&who) {
            return self.refuse(id, &who, text);
        }
        let rank = who.node_rank;
        if let Some(holder) = self.members.values().find(|member| rank.is_some() && member.who.node_rank == rank) {
            if holder.who.is_host {
                let text = taken(&who, holder);
                return self.refuse(id, &who, text);
            }
            let text = format!(
                "node rank {} is held by {}, heard of {:.1} s ago: waiting until that node is heard of again or is lost",
                rank.unwrap_or_default(),
                holder.label(),
                now.saturating_duration_since(holder.heard).as_secs_f64()
            );
            self.tell(id, HostMessage::Remark { text });
            return self.contenders.push((id, who));
        }
        self.admit(now, id, who);
    }

    fn admit(&mut self, now: Instant, id: Id, who: Introduction) {
        let host = who.is_host.then(|| who.clone());
        if host.is_none() {
            self.expect_silence(now);
        }
        let member = Participant {
            who,
            heard: now,
            last: None,
            seat: Seat::Away,
            is_late: false,
            doubt: Doubt::None,
            told: None,
        };
        let end = matches!(self.phase, RoundPhase::Closed { .. }).then(|| self.end_for(&member));
        if let Some(notice @ HostMessage::Late { .. }) = end {
            self.remark(&format!("{} came after the end of the job and was turned away", member.label()));
            self.tell(id, notice);
            return self.actions.push(HostAction::Drop(id));
        }
        self.members.insert(id, member);
        self.tell(id, HostMessage::Welcome { silence: self.settings.silence });
        if let Some(host) = host {
            self.turn_out_those_unlike(now, &host);
        }
        self.actions.extend(end.map(|notice| HostAction::Tell(id, notice)));
    }

    /// The holder of their rank is gone: the first of those who wait for it takes its place, and the others go on to wait.
    pub(super) fn admit_contenders(&mut self, now: Instant, rank: Option<u32>) {
        if rank.is_none() || self.members.values().any(|member| member.who.node_rank == rank) {
            return;
        }
        if let Some(index) = self.contenders.iter().position(|(_, who)| who.node_rank == rank) {
            let (id, who) = self.contenders.remove(index);
            self.admit(now, id, who);
        }
    }

    /// The job has ended: to those who wait for the rank of another agent too.
    pub(super) fn admit_all_contenders(&mut self) {
        for (id, who) in std::mem::take(&mut self.contenders) {
            self.admit(self.last_step, id, who);
        }
    }

    /// An agent has said something: it lives, and keeps its rank.
    pub(super) fn hear(&mut self, now: Instant, id: Id) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let former = std::mem::replace(&mut member.doubt, Doubt::None);
        member.heard = now;
        if former != Doubt::None && !member.who.is_host {
            self.expect_silence(now);
            // What has waited for it.
            self.expect_by(now);
        }
        let Some(member) = self.members.get(&id) else { return };
        if self.contenders.is_empty() || member.who.node_rank.is_none() {
            return;
        }
        let rank = member.who.node_rank;
        let contenders = std::mem::take(&mut self.contenders);
        let refused: Vec<_>;
        (refused, self.contenders) = contenders.into_iter().partition(|(_, who)| who.node_rank == rank);
        for (contender, who) in refused {
            let text = taken(&who, &self.members[&id]);
            self.refuse(contender, &who, text);
        }
    }

    fn refuse(&mut self, id: Id, who: &Introduction, text: String) {
        self.remark(&format!("{} (agent {}) was turned away: {text}", who.name, who.pid));
        self.tell(id, HostMessage::Refused { text });
        self.actions.push(HostAction::Drop(id));
    }

    /// The host says how the job is set up. Others that came first are turned away if they are not set up like that.
    fn turn_out_those_unlike(&mut self, now: Instant, host: &Introduction) {
        let unlike = self.members.iter().filter_map(|(id, member)| Some((*id, difference(host, &member.who)?)));
        for (id, text) in unlike.collect::<Vec<_>>() {
            if let Some(member) = self.members.get(&id) {
                let who = member.who.clone();
                self.refuse(id, &who, text);
                self.remove(now, id, "was refused", Gone::Left);
            }
        }
    }

    /// Why an agent does not belong here.
    fn objection(&self, who: &Introduction) -> Option<String> {
        let settings = &self.settings;
        if who.protocol != PROTOCOL {
            return Some(format!(
                "its agents speak version {PROTOCOL} of the protocol, this one version {}: install the same ferroelastic on all nodes",
                who.protocol
            ));
        }
        if who.run_id != settings.run_id {
            return Some(format!(
                "it is that of job {:?}, not of job {:?}: give all nodes the same --rdzv-id, or this job another endpoint",
                settings.run_id,
                bounded(&who.run_id, MOST_TEXT_BYTES)
            ));
        }
        if who.nodes != (settings.min_nodes, settings.max_nodes) {
            return Some(format!(
                "its job has --nnodes={}:{}, this node was started with --nnodes={}:{}: give all nodes the same",
                settings.min_nodes, settings.max_nodes, who.nodes.0, who.nodes.1
            ));
        }
        let host = self.members.values().find(|member| member.who.is_host);
        if let Some(reference) = host.or_else(|| self.members.values().next()).filter(|_| !who.is_host)
            && let Some(text) = difference(&reference.who, who)
        {
            return Some(text);
        }
        let rank = who.node_rank.filter(|rank| *rank >= settings.max_nodes)?;
        Some(format!("node rank {rank} is not below the number of nodes, {}", settings.max_nodes))
    }
}

fn taken(who: &Introduction, holder: &Participant) -> String {
    let rank = who.node_rank.unwrap_or_default();
    format!("node rank {rank} is taken by {}: give each node its own --node-rank", holder.label())
}

/// The first setting that a node has otherwise than it should.
fn difference(should: &Introduction, who: &Introduction) -> Option<String> {
    should.settings.iter().find_map(|(name, value)| {
        let other = who.settings.get(name).filter(|other| *other != value)?;
        let [name, value, other] = [name, value, other].map(|text| printable(bounded(text, MOST_VALUE_BYTES)));
        Some(format!("its job has {name}={value}, this node was started with {name}={other}: give all nodes the same"))
    })
}
