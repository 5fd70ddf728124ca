//! Decides when a round begins and when it ends. Pure: events in, actions out. `seating` selects the nodes and assigns the ranks.
//!
//! A round begins when enough nodes wait for it. It ends for all nodes when a worker fails, or when a node joins, leaves or is lost. After
//! a round has ended, its nodes are expected to return, and their seats are kept.

mod clock;
mod entry;
mod events;
mod reasons;
mod round_end;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

pub use events::{HostAction, HostEvent, HostSettings};
use round_end::PendingEnd;

use super::message::{Cause, HostMessage, Introduction, Join, MAX_TEXT_BYTES, Place};
use super::policy::{Decision, FailureFacts, OnNodeFailure, PolicySettings, RestartPolicy};
pub use super::seating::Id;
use super::seating::{self, Candidate, Round};
use crate::sys::clock::ENDLESS;
use crate::text::bounded;

/// Maximum number of node names in one message.
const MAX_NAMES: usize = 32;

/// The seat of an agent.
#[derive(Clone, Debug)]
enum Seat {
    /// It has not joined.
    Away,
    /// Its round has ended, and it is stopping its workers.
    Returning,
    /// It waits for a round to begin.
    Waiting { join: Join, since: Instant },
    /// Its workers run.
    Running(Place),
    /// Its workers have succeeded.
    Finished(Place),
}

/// Number of members by seat.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    waiting: usize,
    returning: usize,
    running: usize,
}

impl Tally {
    fn count_of(&mut self, seat: &Seat) -> Option<&mut usize> {
        match seat {
            Seat::Waiting { .. } => Some(&mut self.waiting),
            Seat::Returning => Some(&mut self.returning),
            Seat::Running(_) => Some(&mut self.running),
            Seat::Away | Seat::Finished(_) => None,
        }
    }

    fn add(&mut self, seat: &Seat) {
        if let Some(count) = self.count_of(seat) {
            *count += 1;
        }
    }

    fn subtract(&mut self, seat: &Seat) {
        if let Some(count) = self.count_of(seat) {
            *count -= 1;
        }
    }
}

#[derive(Debug)]
struct Participant {
    agent: Introduction,
    last_heard: Instant,
    /// The last round it took part in, and its rank there.
    last: Option<(u64, u64)>,
    seat: Seat,
    /// It came after workers had succeeded, so no later round is expected.
    is_late: bool,
    /// Progress of the check of its silence.
    suspicion: Suspicion,
    /// The last reason for waiting that was sent to it.
    last_warning: Option<String>,
}

impl Participant {
    fn label(&self) -> String {
        format!("{} (agent {})", self.agent.name, self.agent.pid)
    }

    fn is_in_round(&self) -> bool {
        matches!(self.seat, Seat::Running(_) | Seat::Finished(_))
    }

    fn is_waiting(&self) -> bool {
        matches!(self.seat, Seat::Waiting { .. })
    }
}

/// Why an agent is no longer a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Departure {
    /// It left on purpose.
    Left,
    /// It was lost at this time: the current time if its connection has ended, or the time of its last message if it is silent.
    Lost(Instant),
}

/// Progress of the check of a silent agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suspicion {
    /// It is not silent.
    None,
    /// A probe was sent to it, to see whether its machine acknowledges it.
    Probed,
    /// The acknowledgement was checked.
    Checked,
}

#[derive(Debug)]
enum RoundPhase {
    Gathering {
        since: Instant,
        /// The round does not begin earlier: the end of the restart's delay.
        opens_at: Instant,
        /// When the last call ends. `None` while fewer than the minimum number of nodes wait.
        last_call: Option<Instant>,
    },
    Running,
    Closed {
        why: String,
        /// Exit code of the job.
        code: i32,
        /// The decision of the restart policy, if a failure ended the job.
        decision: Option<Box<Decision>>,
        /// The explanation of the worker's failure that ended the job, or empty.
        detail: String,
        /// Whether the loss of a node ended the job.
        is_loss: bool,
    },
}

/// The state of a job's rendezvous.
#[derive(Debug)]
pub struct Rounds {
    settings: HostSettings,
    members: BTreeMap<Id, Participant>,
    phase: RoundPhase,
    /// Number of rounds that have begun.
    begun: u64,
    failures: u64,
    membership_changes: u64,
    /// Number of nodes of the last round.
    size: usize,
    policy: RestartPolicy,
    cause: Option<Cause>,
    pending: Option<PendingEnd>,
    /// When the round has failed because the workers of some nodes have succeeded and the others run on.
    early_exit_at: Option<Instant>,
    /// Agents whose workers have succeeded in this round and whose connection has ended, by membership. They may reconnect to learn the
    /// outcome.
    finished_departed: HashMap<u64, Place>,
    /// Memberships that have waited for a round at least once. The others are told [`HostMessage::Late`] at the end of the job.
    ever_waited: HashSet<u64>,
    /// Contenders: agents whose node rank another agent holds. They wait until that agent sends a message or is lost.
    contenders: Vec<(Id, Introduction)>,
    /// Warnings for the host's agent from the time before it is a member, at most [`MAX_NAMES`].
    early_warnings: Vec<String>,
    /// When waiting agents are told the reason if it has changed.
    explain_at: Option<Instant>,
    last_step: Instant,
    /// Lower bound of the next deadline. Messages only postpone deadlines, so it is recomputed when it is reached, not for every message.
    due: Option<Instant>,
    tally: Tally,
    actions: Vec<HostAction>,
}

impl Rounds {
    /// A rendezvous without agents.
    #[must_use]
    pub fn new(settings: HostSettings, now: Instant) -> Self {
        let (last_call, silence) = (settings.last_call.min(ENDLESS), settings.silence.min(ENDLESS));
        let policy = RestartPolicy::new(PolicySettings::default(), &settings.run_id);
        Self {
            settings: HostSettings { last_call, silence, ..settings },
            members: BTreeMap::new(),
            phase: RoundPhase::Gathering { since: now, opens_at: now, last_call: None },
            begun: 0,
            failures: 0,
            membership_changes: 0,
            size: 0,
            policy,
            cause: None,
            pending: None,
            early_exit_at: None,
            finished_departed: HashMap::new(),
            ever_waited: HashSet::new(),
            contenders: Vec::new(),
            early_warnings: Vec::new(),
            explain_at: None,
            last_step: now,
            due: None,
            tally: Tally::default(),
            actions: Vec::new(),
        }
    }

    /// Handles an event and returns the actions to carry out.
    #[must_use = "the actions must be carried out"]
    pub fn step(&mut self, now: Instant, event: HostEvent) -> Vec<HostAction> {
        self.reset_after_own_suspension(now);
        self.last_step = now;
        match event {
            HostEvent::Entered(id, agent) => self.enter(now, id, agent),
            HostEvent::Joined(id, join) => {
                self.note_heard(now, id);
                self.join(now, id, join);
            }
            HostEvent::Failed { id, round, at_ns, text, code, facts, detail } => {
                self.note_heard(now, id);
                let node = self.members.get(&id).map(|member| member.agent.name.clone()).unwrap_or_default();
                let text = format!("{} on {node}", bounded(&text, MAX_TEXT_BYTES));
                let cause = Cause { at_ns: Some(at_ns), code, detail, ..Cause::failure(node, text) };
                self.fail(now, id, round, cause, &facts);
            }
            HostEvent::Finished(id, round) => {
                self.note_heard(now, id);
                self.finish(id, round);
            }
            HostEvent::Closed(id, text, code) => {
                if let Some(member) = self.members.get(&id) {
                    let text = format!("{}: {}", member.label(), bounded(&text, MAX_TEXT_BYTES));
                    self.close(Cause { code, ..Cause::failure(String::new(), text) });
                }
            }
            HostEvent::Left(id, text) => {
                self.remove(now, id, &format!("left: {}", bounded(&text, MAX_TEXT_BYTES)), Departure::Left);
            }
            HostEvent::Lost(id, text) => self.remove(now, id, &format!("was lost: {text}"), Departure::Lost(now)),
            HostEvent::Beat(id, number) => {
                self.note_heard(now, id);
                self.send(id, HostMessage::Beat { number });
            }
            HostEvent::FailureAnnounced { text, grace } => {
                self.schedule_round_end(now, now + grace, Cause::failure(String::new(), text), None);
            }
            HostEvent::ForeignPeer(text) => self.warn_host(&text),
            HostEvent::ProbeChecked(id, is_acknowledged) => self.probe_checked(now, id, is_acknowledged),
            HostEvent::Progressed(id, round) => {
                self.note_heard(now, id);
                if self.begun == round + 1 && matches!(self.phase, RoundPhase::Running) {
                    self.policy.note_progress();
                }
            }
            HostEvent::Tick => {}
        }
        self.handle_deadlines(now);
        debug_assert_eq!(self.tally, self.count_seats());
        std::mem::take(&mut self.actions)
    }

    fn count_seats(&self) -> Tally {
        let mut tally = Tally::default();
        self.members.values().for_each(|member| tally.add(&member.seat));
        tally
    }

    /// When the next [`HostEvent::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        self.due
    }

    /// Number of rounds that have begun.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Why there will be no other round; `None` while there may be one.
    #[must_use]
    pub fn closed(&self) -> Option<&str> {
        if let RoundPhase::Closed { why, .. } = &self.phase { Some(why) } else { None }
    }

    // ---- agents

    fn join(&mut self, now: Instant, id: Id, join: Join) {
        let Some(member) = self.members.get(&id) else { return };
        if matches!(self.phase, RoundPhase::Closed { .. }) {
            let message = self.end_message(member);
            return self.send(id, message);
        }
        match &member.seat {
            Seat::Running(place) | Seat::Finished(place) if join.after != Some(place.round) => {
                // Its request crossed the `Begin` that answers it: send `Begin` again.
                let place = place.clone();
                self.send(id, HostMessage::Begin(place));
            }
            Seat::Running(_) | Seat::Finished(_) => {
                let text = format!("{} restarts its workers", member.label());
                let cause = Cause::failure(member.agent.name.clone(), text);
                let (cause, decision) = match self.pending.take() {
                    Some(PendingEnd { cause, decision: Some(decision), .. }) => (cause, decision),
                    _ => (cause, self.policy.decide(now, &FailureFacts::of_agent())),
                };
                self.apply(now, cause, decision);
                if self.closed().is_none() {
                    self.wait(now, id, join);
                }
            }
            Seat::Waiting { since, .. } => {
                let since = *since;
                self.set_waiting(id, join, since);
            }
            // A duplicate of the request for the round that has ended. Its workers may still run.
            Seat::Returning if join.after != member.last.map(|(round, _)| round) => {}
            Seat::Away | Seat::Returning => self.wait(now, id, join),
        }
    }

    fn wait(&mut self, now: Instant, id: Id, join: Join) {
        self.set_waiting(id, join, now);
        let is_late = self.has_succeeded_anywhere();
        let Some(member) = self.members.get(&id) else { return };
        self.ever_waited.insert(member.agent.membership);
        let label = member.label();
        match self.phase {
            RoundPhase::Gathering { .. } => self.try_begin(now),
            RoundPhase::Running if self.has_room() => {
                let text = format!("{label} joins");
                let node = self.members[&id].agent.name.clone();
                self.end_round(now, &Cause::membership(node, text));
            }
            RoundPhase::Running => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.is_late = is_late;
                }
                self.warn_spare(id);
            }
            RoundPhase::Closed { .. } => {}
        }
    }

    fn set_waiting(&mut self, id: Id, join: Join, since: Instant) {
        self.set_seat(id, Seat::Waiting { join, since });
        self.schedule_explanation(self.last_step);
        if let Some(deadline) = self.members.get(&id).and_then(|member| self.join_deadline(member)) {
            self.schedule(deadline);
        }
    }

    /// Changes a seat. All changes go through here, so that the tally stays correct.
    fn set_seat(&mut self, id: Id, seat: Seat) {
        let Some(member) = self.members.get_mut(&id) else { return };
        self.tally.subtract(&member.seat);
        self.tally.add(&seat);
        member.seat = seat;
    }

    /// Whether the running round has room for another node and may be interrupted to admit it.
    fn has_room(&self) -> bool {
        let is_ending = self.pending.is_some() || self.has_succeeded_anywhere();
        self.running() < self.max_nodes() && !is_ending && self.may_change_membership()
    }

    /// Number of nodes of the running round.
    fn running(&self) -> usize {
        self.members.values().filter(|member| member.is_in_round()).count()
    }

    fn has_succeeded_anywhere(&self) -> bool {
        let has_finished = |member: &Participant| matches!(member.seat, Seat::Finished(_));
        !self.finished_departed.is_empty() || self.members.values().any(has_finished)
    }

    fn may_change_membership(&self) -> bool {
        self.settings.max_membership_changes.is_none_or(|max| self.membership_changes < max)
    }

    fn finish(&mut self, id: Id, round: u64) {
        let Some(member) = self.members.get_mut(&id) else { return };
        match &member.seat {
            Seat::Running(place) if place.round == round => {
                let place = place.clone();
                self.set_seat(id, Seat::Finished(place));
            }
            // It reports this again after it has reconnected.
            Seat::Away => match self.finished_departed.remove(&member.agent.membership) {
                Some(place) => {
                    member.last = Some((place.round, place.group_rank));
                    self.set_seat(id, Seat::Finished(place));
                }
                None if !matches!(self.phase, RoundPhase::Closed { .. }) => {
                    if matches!(self.phase, RoundPhase::Gathering { .. }) && self.begun == round + 1 {
                        // It returns like the other nodes. Its former rank does not matter.
                        member.last = Some((round, u64::MAX));
                        self.set_seat(id, Seat::Returning);
                    }
                    let text = "its connection ended before its workers".to_owned();
                    let loss = Cause::loss(String::new(), text);
                    let cause = self.cause.clone().unwrap_or(loss);
                    return self.send(id, HostMessage::Over { round, cause });
                }
                None => return,
            },
            _ => return,
        }
        self.release_if_all_finished();
    }

    fn release_if_all_finished(&mut self) {
        if !matches!(self.phase, RoundPhase::Running) {
            return;
        }
        if self.tally.running == 0 {
            return self.end(Cause { code: 0, ..Cause::failure(String::new(), "the job has succeeded".into()) });
        }
        if let Some(timeout) = self.policy.settings().early_exit {
            let at = *self.early_exit_at.get_or_insert(self.last_step + timeout);
            self.schedule(at);
        }
    }

    fn remove(&mut self, now: Instant, id: Id, reason: &str, departure: Departure) {
        let Some(member) = self.members.remove(&id) else {
            return self.contenders.retain(|(contender, _)| *contender != id);
        };
        self.tally.subtract(&member.seat);
        let text = format!("{} {reason}", member.label());
        let loss = Cause::loss(member.agent.name.clone(), text);
        match (&self.phase, member.seat) {
            (RoundPhase::Running, Seat::Running(_)) => self.handle_loss(now, &loss, departure),
            // Its workers have succeeded, so the round goes on without it.
            (RoundPhase::Running, Seat::Finished(place)) => {
                self.finished_departed.insert(member.agent.membership, place);
                self.release_if_all_finished();
            }
            (RoundPhase::Gathering { .. }, Seat::Returning) if self.ends_job_with_a_node() => {
                self.close_after_node_failure(&loss);
            }
            (RoundPhase::Gathering { since, .. }, Seat::Returning) => {
                if departure.explains(*since) {
                    self.attribute_failure(loss);
                }
                self.try_begin(now);
            }
            (RoundPhase::Gathering { .. }, _) => self.try_begin(now),
            (RoundPhase::Running | RoundPhase::Closed { .. }, _) => {}
        }
        self.admit_contenders(now, member.agent.node_rank);
    }

    // ---- rounds

    fn max_nodes(&self) -> usize {
        usize::try_from(self.settings.max_nodes).unwrap_or(usize::MAX)
    }

    fn min_nodes(&self) -> usize {
        usize::try_from(self.settings.min_nodes).unwrap_or(usize::MAX)
    }

    fn waiting(&self) -> impl Iterator<Item = &Participant> {
        self.members.values().filter(|member| member.is_waiting())
    }

    fn is_of_last_round(&self, member: &Participant) -> bool {
        member.last.is_some_and(|(round, _)| round + 1 == self.begun)
    }

    /// Begins the round unless it has to wait for further nodes.
    fn try_begin(&mut self, now: Instant) {
        let (waiting, minimum) = (self.tally.waiting, self.min_nodes());
        let RoundPhase::Gathering { last_call, opens_at, .. } = &mut self.phase else { return };
        if waiting < minimum {
            *last_call = None;
            return;
        }
        let (last_call, opens_at) = (*last_call.get_or_insert(now + self.settings.last_call), *opens_at);
        // Nodes that stop their workers are known to return.
        if self.tally.returning > 0 || self.waits_for_replacement() {
            return;
        }
        if now < opens_at {
            return self.schedule(opens_at);
        }
        self.schedule(last_call);
        let returned = self.waiting().filter(|member| self.is_of_last_round(member)).count();
        if waiting >= self.max_nodes() || returned >= self.min_nodes() || now >= last_call {
            self.begin(now);
        }
    }

    /// Whether the next round waits for a node in the place of a lost one.
    fn waits_for_replacement(&self) -> bool {
        let wanted = self.size.min(self.max_nodes());
        self.policy.settings().on_node_failure == OnNodeFailure::Wait && self.tally.waiting < wanted
    }

    fn begin(&mut self, now: Instant) {
        let waiting = self.members.iter().filter_map(|(id, member)| self.candidate(*id, member)).collect();
        let chosen = seating::choose(waiting, self.max_nodes());
        let round = Round {
            number: self.begun,
            address: self.settings.address.clone(),
            failures: self.failures,
            restarts_used: self.policy.used(),
            membership_changes: self.membership_changes,
            cause: self.cause.clone(),
        };
        self.size = chosen.len();
        let places = seating::places(&chosen, &round);
        self.actions.push(HostAction::RenewStore);
        for (id, place) in places {
            self.actions.push(HostAction::Send(id, HostMessage::Begin(place.clone())));
            if let Some(member) = self.members.get_mut(&id) {
                member.last = Some((place.round, place.group_rank));
            }
            self.set_seat(id, Seat::Running(place));
        }
        self.begun += 1;
        self.policy.begin_round(now);
        self.cause = None;
        self.early_exit_at = None;
        self.phase = RoundPhase::Running;
        self.explain_at = None;
        let spares: Vec<Id> =
            self.members.iter().filter(|(_, member)| member.is_waiting()).map(|(id, _)| *id).collect();
        for id in spares {
            self.warn_spare(id);
        }
    }

    fn candidate<'a>(&self, id: Id, member: &'a Participant) -> Option<Candidate<'a>> {
        let Seat::Waiting { join, since } = &member.seat else { return None };
        let former_rank = member.last.filter(|_| self.is_of_last_round(member)).map(|(_, rank)| rank);
        Some(Candidate { id, agent: &member.agent, join, since: *since, former_rank })
    }

    fn send(&mut self, id: Id, message: HostMessage) {
        self.actions.push(HostAction::Send(id, message));
    }
}
