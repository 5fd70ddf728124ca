//! Admission of agents: which agents are admitted or refused, and why.

use std::time::Instant;

use super::{Departure, HostAction, Id, Participant, RoundPhase, Rounds, Seat, Suspicion};
use crate::rendezvous::message::{HostMessage, Introduction, MAX_TEXT_BYTES, PROTOCOL};
use crate::rendezvous::policy::PolicySettings;
use crate::text::{bounded, printable};

/// Maximum length of a node name.
const MAX_NAME_BYTES: usize = 256;

/// Maximum length of a setting's value in a message.
const MAX_VALUE_BYTES: usize = 256;

impl Rounds {
    pub(super) fn enter(&mut self, now: Instant, id: Id, mut agent: Introduction) {
        let existing = self.members.iter().find(|(_, member)| member.agent.membership == agent.membership);
        if let Some((former, is_later)) = existing.map(|(id, member)| (*id, member.agent.connection < agent.connection))
        {
            if !is_later {
                // A duplicate, or a connection that the agent has replaced already.
                if former != id {
                    self.actions.push(HostAction::Disconnect(id));
                }
                return;
            }
            // The agent has noticed that its former connection is broken; the host has not.
            self.actions.push(HostAction::Disconnect(former));
            self.remove(now, former, "was lost: it reconnected", Departure::Lost(now));
        }
        agent.name.truncate(bounded(&agent.name, MAX_NAME_BYTES).len());
        if let Some(text) = self.reason_to_refuse(&agent) {
            return self.refuse(id, &agent, text);
        }
        let rank = agent.node_rank;
        if let Some(holder) = self.members.values().find(|member| rank.is_some() && member.agent.node_rank == rank) {
            if holder.agent.is_host {
                let text = rank_taken(&agent, holder);
                return self.refuse(id, &agent, text);
            }
            let text = format!(
                "node rank {} is held by {}, last heard from {:.1} s ago: waiting until that node responds or is lost",
                rank.unwrap_or_default(),
                holder.label(),
                now.saturating_duration_since(holder.last_heard).as_secs_f64()
            );
            self.send(id, HostMessage::Warning { text });
            return self.contenders.push((id, agent));
        }
        self.admit(now, id, agent);
    }

    fn admit(&mut self, now: Instant, id: Id, agent: Introduction) {
        let host = agent.is_host.then(|| agent.clone());
        if host.is_none() {
            self.schedule_silence_check(now);
        }
        let member = Participant {
            agent,
            last_heard: now,
            last: None,
            seat: Seat::Away,
            is_late: false,
            suspicion: Suspicion::None,
            last_warning: None,
        };
        if (host.is_some() || self.members.is_empty())
            && let Ok(settings) = PolicySettings::parse(&member.agent.settings)
        {
            self.policy.set_settings(settings);
        }
        let end = matches!(self.phase, RoundPhase::Closed { .. }).then(|| self.end_message(&member));
        if let Some(message @ HostMessage::Late { .. }) = end {
            self.warn_host(&format!("{} came after the end of the job and was turned away", member.label()));
            self.send(id, message);
            return self.actions.push(HostAction::Disconnect(id));
        }
        self.members.insert(id, member);
        self.send(id, HostMessage::Welcome { silence: self.settings.silence });
        if let Some(host) = host {
            for text in std::mem::take(&mut self.early_warnings) {
                self.send(id, HostMessage::Warning { text });
            }
            self.refuse_mismatched(now, &host);
        }
        self.actions.extend(end.map(|message| HostAction::Send(id, message)));
    }

    /// If no agent holds `rank` any more, admits the first contender for it. The other contenders keep waiting.
    pub(super) fn admit_contenders(&mut self, now: Instant, rank: Option<u32>) {
        if rank.is_none() || self.members.values().any(|member| member.agent.node_rank == rank) {
            return;
        }
        if let Some(index) = self.contenders.iter().position(|(_, agent)| agent.node_rank == rank) {
            let (id, agent) = self.contenders.remove(index);
            self.admit(now, id, agent);
        }
    }

    /// After the end of the job, contenders for ranks get its result too.
    pub(super) fn admit_all_contenders(&mut self) {
        for (id, agent) in std::mem::take(&mut self.contenders) {
            self.admit(self.last_step, id, agent);
        }
    }

    /// A message has arrived: the agent is alive and keeps its rank.
    pub(super) fn note_heard(&mut self, now: Instant, id: Id) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let former = std::mem::replace(&mut member.suspicion, Suspicion::None);
        member.last_heard = now;
        if former != Suspicion::None && !member.agent.is_host {
            self.schedule_silence_check(now);
            // Decisions that waited for this agent can be made now.
            self.schedule(now);
        }
        let Some(member) = self.members.get(&id) else { return };
        if self.contenders.is_empty() || member.agent.node_rank.is_none() {
            return;
        }
        let rank = member.agent.node_rank;
        let contenders = std::mem::take(&mut self.contenders);
        let refused: Vec<_>;
        (refused, self.contenders) = contenders.into_iter().partition(|(_, agent)| agent.node_rank == rank);
        for (contender, agent) in refused {
            let text = rank_taken(&agent, &self.members[&id]);
            self.refuse(contender, &agent, text);
        }
    }

    fn refuse(&mut self, id: Id, agent: &Introduction, text: String) {
        self.warn_host(&format!("{} (agent {}) was turned away: {text}", agent.name, agent.pid));
        self.send(id, HostMessage::Refused { text });
        self.actions.push(HostAction::Disconnect(id));
    }

    /// The host's settings are authoritative: refuses the agents that came earlier and have other settings.
    fn refuse_mismatched(&mut self, now: Instant, host: &Introduction) {
        let mismatched =
            self.members.iter().filter_map(|(id, member)| Some((*id, setting_mismatch(host, &member.agent)?)));
        for (id, text) in mismatched.collect::<Vec<_>>() {
            if let Some(member) = self.members.get(&id) {
                let agent = member.agent.clone();
                self.refuse(id, &agent, text);
                self.remove(now, id, "was refused", Departure::Left);
            }
        }
    }

    /// Why the agent must be refused; `None` if it is admitted.
    fn reason_to_refuse(&self, agent: &Introduction) -> Option<String> {
        let settings = &self.settings;
        if agent.protocol != PROTOCOL {
            return Some(format!(
                "the rendezvous uses protocol version {PROTOCOL}, this node version {}: install the same version of ferroelastic on all nodes",
                agent.protocol
            ));
        }
        if agent.run_id != settings.run_id {
            return Some(format!(
                "the rendezvous belongs to job {:?}, not to job {:?}: give all nodes the same --rdzv-id, or use another endpoint for this job",
                settings.run_id,
                bounded(&agent.run_id, MAX_TEXT_BYTES)
            ));
        }
        if agent.nodes != (settings.min_nodes, settings.max_nodes) {
            return Some(format!(
                "the job has --nnodes={}:{}, this node was started with --nnodes={}:{}: give all nodes the same",
                settings.min_nodes, settings.max_nodes, agent.nodes.0, agent.nodes.1
            ));
        }
        if let Err(invalid) = PolicySettings::parse(&agent.settings) {
            return Some(printable(bounded(&invalid.to_string(), MAX_TEXT_BYTES)));
        }
        let host = self.members.values().find(|member| member.agent.is_host);
        if let Some(reference) = host.or_else(|| self.members.values().next()).filter(|_| !agent.is_host)
            && let Some(text) = setting_mismatch(&reference.agent, agent)
        {
            return Some(text);
        }
        let rank = agent.node_rank.filter(|rank| *rank >= settings.max_nodes)?;
        Some(format!("node rank {rank} is not below the number of nodes, {}", settings.max_nodes))
    }
}

fn rank_taken(agent: &Introduction, holder: &Participant) -> String {
    let rank = agent.node_rank.unwrap_or_default();
    format!("node rank {rank} is taken by {}: give each node its own --node-rank", holder.label())
}

/// Describes the first setting of `agent` that differs from the reference.
fn setting_mismatch(reference: &Introduction, agent: &Introduction) -> Option<String> {
    reference.settings.iter().find_map(|(name, value)| {
        let other = agent.settings.get(name).filter(|other| *other != value)?;
        let [name, value, other] = [name, value, other].map(|text| printable(bounded(text, MAX_VALUE_BYTES)));
        Some(format!("the job has {name}={value}, this node was started with {name}={other}: give all nodes the same"))
    })
}
