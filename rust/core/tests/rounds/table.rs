//! A rendezvous, its clock, and what it says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::message::{HostMessage, Introduction, Join, PROTOCOL, Place};
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
        settings: BTreeMap::new(),
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
            is_final: false,
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
            is_final: true,
            detail: detail(id),
        })
    }

    /// So many agents in their first round.
    pub(crate) fn running(min_nodes: u32, max_nodes: u32) -> Self {
        let mut table = Self::new(settings(min_nodes, max_nodes));
        for id in 1..=u64::from(max_nodes) {
            table.enter(id, (min_nodes, max_nodes));
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

/// The end of the job after the last failure of an agent.
pub(crate) fn closed(failure: &str, id: Id) -> HostMessage {
    let text = format!("{failure}, and no restart is left");
    HostMessage::Closed { text, code: 7, detail: detail(id), is_loss: false }
}

/// The message of the last action.
pub(crate) fn last_message(actions: &[HostAction]) -> HostMessage {
    let Some(HostAction::Send(_, message)) = actions.last() else { panic!("{actions:?}") };
    message.clone()
}
