//! A rendezvous, its clock, and what it says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::message::{HostMessage, Introduction, Join, PROTOCOL, Place};
use ferroelastic_core::rendezvous::policy::{FailureFacts, RestartVerdict};
use ferroelastic_core::rendezvous::rounds::{HostAction, HostEvent, HostSettings, Id, Rounds};
use ferroelastic_core::vocabulary::RestartCause;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const SILENCE: Duration = Duration::from_secs(15);
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
pub(crate) const LOSS_GRACE: Duration = Duration::from_millis(250);
pub(crate) const MOMENT: Duration = Duration::from_millis(10);

pub(crate) fn settings(min_nodes: u32, max_nodes: u32) -> HostSettings {
    HostSettings {
        run_id: "job".into(),
        min_nodes,
        max_nodes,
        last_call: 30 * SECOND,
        silence: SILENCE,
        address: None,
        max_membership_changes: None,
    }
}

/// The facts of a failure after which no restart is left.
pub(crate) fn last() -> FailureFacts {
    FailureFacts { verdict: RestartVerdict::Exhausted, ..FailureFacts::default() }
}

pub(crate) fn introduction(id: Id) -> Introduction {
    Introduction {
        protocol: PROTOCOL,
        run_id: "job".into(),
        name: format!("node{id}"),
        pid: 100,
        membership: id,
        connection: id,
        is_host: id == 1,
        nodes: (2, 2),
        node_rank: None,
        settings: BTreeMap::from([("--restart-backoff".into(), "0".into())]),
    }
}

/// A rendezvous and the time. Agents have the numbers from 1; that of the host is number 1.
pub(crate) struct Table {
    pub(crate) rounds: Rounds,
    pub(crate) now: Instant,
}

impl Table {
    pub(crate) fn new(settings: HostSettings) -> Self {
        let now = Instant::now();
        Self { rounds: Rounds::new(settings, now), now }
    }

    pub(crate) fn step(&mut self, event: HostEvent) -> Vec<HostAction> {
        self.rounds.step(self.now, event)
    }

    pub(crate) fn enter(&mut self, id: Id, nodes: (u32, u32)) -> Vec<HostAction> {
        let who = Introduction { nodes, ..introduction(id) };
        self.step(HostEvent::Entered(id, who))
    }

    pub(crate) fn join(&mut self, id: Id, after: Option<u64>) -> Vec<HostAction> {
        self.join_as(id, after, "default", 2)
    }

    pub(crate) fn join_as(&mut self, id: Id, after: Option<u64>, role: &str, local_world_size: u64) -> Vec<HostAction> {
        self.step(HostEvent::Joined(id, Join { after, role: role.into(), local_world_size, timeout: JOIN_TIMEOUT }))
    }

    pub(crate) fn fail(&mut self, id: Id, round: u64, at_ns: u64) -> Vec<HostAction> {
        self.step(HostEvent::Failed {
            id,
            round,
            at_ns,
            text: format!("rank {id} exited with 1"),
            code: 7,
            facts: FailureFacts::default(),
            detail: String::new(),
        })
    }

    pub(crate) fn fail_for_good(&mut self, id: Id, round: u64) -> Vec<HostAction> {
        self.step(HostEvent::Failed {
            id,
            round,
            at_ns: 1,
            text: format!("rank {id} exited with 1"),
            code: 7,
            facts: last(),
            detail: detail(id),
        })
    }

    /// So many agents in their first round.
    pub(crate) fn running(min_nodes: u32, max_nodes: u32) -> Self {
        Self::running_with(min_nodes, max_nodes, &[("--restart-backoff", "0")])
    }

    /// As [`Table::running`], with these options of the restart policy.
    pub(crate) fn running_with(min_nodes: u32, max_nodes: u32, options: &[(&str, &str)]) -> Self {
        let mut table = Self::new(settings(min_nodes, max_nodes));
        for id in 1..=u64::from(max_nodes) {
            let settings = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let agent = Introduction { nodes: (min_nodes, max_nodes), settings, ..introduction(id) };
            table.step(HostEvent::Entered(id, agent));
        }
        let last: Vec<_> = (1..=u64::from(max_nodes)).map(|id| table.join(id, None)).collect();
        assert_eq!(begun(last.last().expect("one")).len(), max_nodes as usize);
        table
    }

    /// As [`Table::pass`], with what is said besides.
    pub(crate) fn listen(&mut self, time: Duration, living: &[Id]) -> Vec<HostAction> {
        let end = self.now + time;
        let mut actions = Vec::new();
        loop {
            let next = self.rounds.next_tick().unwrap_or(end).min(self.now + SECOND).min(end);
            self.now = next.max(self.now);
            for id in living {
                actions.extend(self.step(HostEvent::Beat(*id, 0)));
            }
            actions.extend(self.step(HostEvent::Tick));
            if self.now >= end {
                return actions;
            }
        }
    }

    /// Lets time pass as it does: with a tick whenever one is due, and beats of those who live.
    pub(crate) fn pass(&mut self, time: Duration, living: &[Id]) -> Vec<HostAction> {
        let mut actions = self.listen(time, living);
        actions.retain(|action| !is_small_talk(action));
        actions
    }
}

/// What is said without anything having been decided.
fn is_small_talk(action: &HostAction) -> bool {
    use HostMessage::{Beat, Probe, Warning};
    matches!(action, HostAction::CheckProbe(_) | HostAction::Send(_, Beat { .. } | Probe | Warning { .. }))
}

pub(crate) fn remarks(actions: &[HostAction]) -> Vec<(Id, String)> {
    let remarks = actions.iter().filter_map(|action| match action {
        HostAction::Send(id, HostMessage::Warning { text }) => Some((*id, text.clone())),
        _ => None,
    });
    remarks.collect()
}

pub(crate) fn begun(actions: &[HostAction]) -> Vec<(Id, Place)> {
    let begun = actions.iter().filter_map(|action| match action {
        HostAction::Send(id, HostMessage::Begin(place)) => Some((*id, place.clone())),
        _ => None,
    });
    begun.collect()
}

pub(crate) fn over(actions: &[HostAction]) -> Vec<(Id, RestartCause, String)> {
    let over = actions.iter().filter_map(|action| match action {
        HostAction::Send(id, HostMessage::Over { cause, .. }) => Some((*id, cause.kind, cause.text.clone())),
        _ => None,
    });
    over.collect()
}

/// The agents that are told the end of the job, with its reason and its exit code.
pub(crate) fn closed(actions: &[HostAction]) -> Vec<(Id, String, i32)> {
    let closed = actions.iter().filter_map(|action| match action {
        HostAction::Send(id, HostMessage::Closed { text, code, .. }) => Some((*id, text.clone(), *code)),
        _ => None,
    });
    closed.collect()
}

pub(crate) fn refused(actions: &[HostAction]) -> Option<String> {
    actions.iter().find_map(|action| match action {
        HostAction::Send(_, HostMessage::Refused { text }) => Some(text.clone()),
        _ => None,
    })
}

/// The explanation that an agent sends with its last failure.
pub(crate) fn detail(id: Id) -> String {
    format!("{{\"rank\":{id}}}")
}

/// As [`closed`], with the explanation.
pub(crate) fn explained(actions: &[HostAction]) -> Vec<(Id, String, i32, String)> {
    let closed = actions.iter().filter_map(|action| match action {
        HostAction::Send(id, HostMessage::Closed { text, code, detail, .. }) => {
            Some((*id, text.clone(), *code, detail.clone()))
        }
        _ => None,
    });
    closed.collect()
}

/// The end of the job at agent `id` after the last failure of agent `failed`.
pub(crate) fn end(id: Id, failure: &str, failed: Id) -> (Id, String, i32, String) {
    (id, format!("{failure}, and no restart is left"), 7, detail(failed))
}
