//! When a round begins, and when it is over. Pure: events in, actions out. `seating` says who takes part, with which ranks.
//!
//! A round begins when enough nodes wait for it, and ends for all of them when a worker fails or a node comes, goes or is lost. The nodes
//! of a round that is over are expected back, and seats are kept for them.

mod clock;
mod entry;
mod reasons;
mod round_end;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use round_end::Pending;

use super::message::{AgentMessage, Cause, HostMessage, Introduction, Join, MOST_TEXT_BYTES, Place};
pub use super::seating::Id;
use super::seating::{self, Candidate, Round};
use crate::sys::clock::ENDLESS;
use crate::text::bounded;
use crate::vocabulary::RestartCause;

/// So many nodes are named to somebody who has waited for more of them.
const MOST_NAMES: usize = 32;

/// What the host was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSettings {
    /// The job.
    pub run_id: String,
    /// Fewest nodes of a round.
    pub min_nodes: u32,
    /// Most nodes of a round. Others wait as spares.
    pub max_nodes: u32,
    /// How long a round that could begin waits for further nodes.
    pub last_call: Duration,
    /// A node that was silent for so long is lost.
    pub silence: Duration,
    /// Address of the host for workers; by default they take the one that their agent was given.
    pub address: Option<String>,
    /// How often nodes may come and go; no limit if `None`.
    pub most_membership_changes: Option<u64>,
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// An agent has connected and says who it is.
    Entered(Id, Introduction),
    /// It is ready for a round.
    Joined(Id, Join),
    /// One of its workers has failed.
    Failed {
        /// The agent.
        id: Id,
        /// The round.
        round: u64,
        /// When, in nanoseconds of the wall clock.
        at_ns: u64,
        /// Who, and how.
        text: String,
        /// Exit code of the job if this ends it.
        code: i32,
        /// It does not come back.
        is_final: bool,
    },
    /// All its workers have succeeded in this round.
    Finished(Id, u64),
    /// It ends the job, with this exit code.
    Closed(Id, String, i32),
    /// It goes.
    Left(Id, String),
    /// Its connection has ended.
    Lost(Id, String),
    /// It is there, and says so for the so-manieth time.
    Beat(Id, u64),
    /// A worker has left word of a failure in the store.
    Announced {
        /// What it wrote.
        text: String,
        /// How long it is given to end by itself.
        grace: Duration,
    },
    /// Something that is no agent of this package came to the endpoint.
    Stranger(String),
    /// What became of an [`HostAction::Examine`]: whether the agent's machine has acknowledged all that was sent to it.
    Examined(Id, bool),
    /// A deadline may have passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostAction {
    /// Empty the workers' store. Comes before the first of those who begin is told.
    RenewStore,
    /// Send this.
    Tell(Id, HostMessage),
    /// See whether the agent's machine answers, and say so with [`HostEvent::Examined`].
    Examine(Id),
    /// End the connection.
    Drop(Id),
}

/// Where an agent is.
#[derive(Clone, Debug)]
enum Seat {
    /// It has not joined.
    Away,
    /// It was in the round that is over, and stops its workers.
    Returning,
    /// It waits for a round to begin.
    Waiting { join: Join, since: Instant },
    /// Its workers run.
    Running(Place),
    /// Its workers have succeeded.
    Finished(Place),
}

/// How many members are where.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    waiting: usize,
    returning: usize,
    running: usize,
}

impl Tally {
    fn of(&mut self, seat: &Seat) -> Option<&mut usize> {
        match seat {
            Seat::Waiting { .. } => Some(&mut self.waiting),
            Seat::Returning => Some(&mut self.returning),
            Seat::Running(_) => Some(&mut self.running),
            Seat::Away | Seat::Finished(_) => None,
        }
    }

    fn add(&mut self, seat: &Seat) {
        if let Some(count) = self.of(seat) {
            *count += 1;
        }
    }

    fn subtract(&mut self, seat: &Seat) {
        if let Some(count) = self.of(seat) {
            *count -= 1;
        }
    }
}

#[derive(Debug)]
struct Participant {
    who: Introduction,
    heard: Instant,
    /// The round it took part in last, and its rank there.
    last: Option<(u64, u64)>,
    seat: Seat,
    /// It came when workers had succeeded already: the round that it might have joined will not be.
    is_late: bool,
    /// How far it was looked into its silence.
    doubt: Doubt,
    /// What it was told last about why it waits.
    told: Option<String>,
}

impl Participant {
    fn label(&self) -> String {
        format!("{} (agent {})", self.who.name, self.who.pid)
    }

    fn is_in(&self) -> bool {
        matches!(self.seat, Seat::Running(_) | Seat::Finished(_))
    }

    fn is_waiting(&self) -> bool {
        matches!(self.seat, Seat::Waiting { .. })
    }
}

/// Why an agent is not a member any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// It said so.
    Left,
    /// It was lost at this time: now if its connection has ended, when it was last heard if it is silent.
    Lost(Instant),
}

/// What is known of a silent agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// It is not silent.
    None,
    /// It was sent something, to see whether its machine acknowledges that.
    Probed,
    /// Its machine was looked at.
    Examined,
}

#[derive(Debug)]
enum RoundPhase {
    Gathering {
        since: Instant,
        /// Since when, plus the last call, the round could begin.
        last_call: Option<Instant>,
    },
    Running,
    Closed {
        why: String,
        /// Exit code of the job.
        code: i32,
    },
}

/// The state of a job's rendezvous.
#[derive(Debug)]
pub struct Rounds {
    settings: HostSettings,
    members: BTreeMap<Id, Participant>,
    phase: RoundPhase,
    /// Rounds that have begun.
    begun: u64,
    failures: u64,
    membership_changes: u64,
    cause: Option<Cause>,
    pending: Option<Pending>,
    /// Agents whose workers have succeeded in this round and whose connection has ended, by membership: they may come back to hear how it
    /// goes on.
    gone_finished: HashMap<u64, Place>,
    /// Memberships that have ever waited for a round: to them the end of the job is news.
    known: HashSet<u64>,
    /// Agents that were given the rank of another one, which was not heard of since.
    contenders: Vec<(Id, Introduction)>,
    /// When agents that wait are told the reason, if it has changed.
    explain_at: Option<Instant>,
    last_step: Instant,
    /// Nothing is due before this. What is heard moves deadlines away, so it may be that nothing is due then either: that is found out then, and not
    /// with each message, of which there are as many as agents.
    due: Option<Instant>,
    tally: Tally,
    actions: Vec<HostAction>,
}

impl Rounds {
    /// A rendezvous to which nobody has come.
    #[must_use]
    pub fn new(settings: HostSettings, now: Instant) -> Self {
        let (last_call, silence) = (settings.last_call.min(ENDLESS), settings.silence.min(ENDLESS));
        Self {
            settings: HostSettings { last_call, silence, ..settings },
            members: BTreeMap::new(),
            phase: RoundPhase::Gathering { since: now, last_call: None },
            begun: 0,
            failures: 0,
            membership_changes: 0,
            cause: None,
            pending: None,
            gone_finished: HashMap::new(),
            known: HashSet::new(),
            contenders: Vec::new(),
            explain_at: None,
            last_step: now,
            due: None,
            tally: Tally::default(),
            actions: Vec::new(),
        }
    }

    /// Handles an event and returns the actions to carry out.
    #[must_use = "dropped actions are messages that nobody sends"]
    pub fn step(&mut self, now: Instant, event: HostEvent) -> Vec<HostAction> {
        self.forgive_own_pause(now);
        self.last_step = now;
        match event {
            HostEvent::Entered(id, who) => self.enter(now, id, who),
            HostEvent::Joined(id, join) => {
                self.hear(now, id);
                self.join(now, id, join);
            }
            HostEvent::Failed { id, round, at_ns, text, code, is_final } => {
                self.hear(now, id);
                let node = self.members.get(&id).map(|member| member.who.name.clone()).unwrap_or_default();
                let text = format!("{} on {node}", bounded(&text, MOST_TEXT_BYTES));
                let cause = Cause { kind: RestartCause::Failure, node, at_ns: Some(at_ns), text, code };
                self.fail(now, id, round, cause, is_final);
            }
            HostEvent::Finished(id, round) => {
                self.hear(now, id);
                self.finish(id, round);
            }
            HostEvent::Closed(id, text, code) => {
                if let Some(member) = self.members.get(&id) {
                    let text = format!("{}: {}", member.label(), bounded(&text, MOST_TEXT_BYTES));
                    self.close(&text, code);
                }
            }
            HostEvent::Left(id, text) => {
                self.remove(now, id, &format!("left: {}", bounded(&text, MOST_TEXT_BYTES)), Gone::Left);
            }
            HostEvent::Lost(id, text) => self.remove(now, id, &format!("was lost: {text}"), Gone::Lost(now)),
            HostEvent::Beat(id, number) => {
                self.hear(now, id);
                self.tell(id, HostMessage::Beat { number });
            }
            HostEvent::Announced { text, grace } => {
                let cause = Cause { kind: RestartCause::Failure, node: String::new(), at_ns: None, text, code: 1 };
                self.expect_end(now, now + grace, cause, false);
            }
            HostEvent::Stranger(text) => self.remark(&text),
            HostEvent::Examined(id, is_acknowledged) => self.examined(now, id, is_acknowledged),
            HostEvent::Tick => {}
        }
        self.look_at_clock(now);
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

    /// Rounds that have begun.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Whether there will be no other round, and why.
    #[must_use]
    pub fn closed(&self) -> Option<&str> {
        if let RoundPhase::Closed { why, .. } = &self.phase { Some(why) } else { None }
    }

    // ---- of agents

    fn join(&mut self, now: Instant, id: Id, join: Join) {
        let Some(member) = self.members.get(&id) else { return };
        if matches!(self.phase, RoundPhase::Closed { .. }) {
            let notice = self.end_for(member);
            return self.tell(id, notice);
        }
        match &member.seat {
            Seat::Running(place) | Seat::Finished(place) if join.after != Some(place.round) => {
                // What it asks for it has got: the answer crossed the question.
                let place = place.clone();
                self.tell(id, HostMessage::Begin(place));
            }
            Seat::Running(_) | Seat::Finished(_) => {
                if let Some(pending) = self.pending.take_if(|pending| pending.is_final) {
                    return self.close_for_good(&pending.cause);
                }
                let text = format!("{} starts its workers again", member.label());
                let cause =
                    Cause { kind: RestartCause::Failure, node: member.who.name.clone(), at_ns: None, text, code: 1 };
                self.end_round(now, &cause);
                self.wait(now, id, join);
            }
            Seat::Waiting { since, .. } => {
                let since = *since;
                self.take_seat(id, join, since);
            }
            // The wish for the round that is over, a second time: its workers may still run.
            Seat::Returning if join.after != member.last.map(|(round, _)| round) => {}
            Seat::Away | Seat::Returning => self.wait(now, id, join),
        }
    }

    fn wait(&mut self, now: Instant, id: Id, join: Join) {
        self.take_seat(id, join, now);
        let is_late = self.has_succeeded_anywhere();
        let Some(member) = self.members.get(&id) else { return };
        self.known.insert(member.who.membership);
        let newcomer = member.label();
        match self.phase {
            RoundPhase::Gathering { .. } => self.try_begin(now),
            RoundPhase::Running if self.has_room() => {
                let text = format!("{newcomer} joins");
                let node = self.members[&id].who.name.clone();
                self.end_round(now, &Cause { kind: RestartCause::Membership, node, at_ns: None, text, code: 1 });
            }
            RoundPhase::Running => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.is_late = is_late;
                }
                self.tell_spare(id);
            }
            RoundPhase::Closed { .. } => {}
        }
    }

    fn take_seat(&mut self, id: Id, join: Join, since: Instant) {
        self.sit(id, Seat::Waiting { join, since });
        self.expect_explanation(self.last_step);
        if let Some(deadline) = self.members.get(&id).and_then(|member| self.join_deadline(member)) {
            self.expect_by(deadline);
        }
    }

    /// Every change of seats.
    fn sit(&mut self, id: Id, seat: Seat) {
        let Some(member) = self.members.get_mut(&id) else { return };
        self.tally.subtract(&member.seat);
        self.tally.add(&seat);
        member.seat = seat;
    }

    /// Whether the running round would be larger with one more, and may be interrupted for that.
    fn has_room(&self) -> bool {
        let is_ending = self.pending.is_some() || self.has_succeeded_anywhere();
        self.running() < self.most_nodes() && !is_ending && self.may_change_membership()
    }

    /// Nodes of the running round.
    fn running(&self) -> usize {
        self.members.values().filter(|member| member.is_in()).count()
    }

    fn has_succeeded_anywhere(&self) -> bool {
        let has_finished = |member: &Participant| matches!(member.seat, Seat::Finished(_));
        !self.gone_finished.is_empty() || self.members.values().any(has_finished)
    }

    fn may_change_membership(&self) -> bool {
        self.settings.most_membership_changes.is_none_or(|most| self.membership_changes < most)
    }

    fn finish(&mut self, id: Id, round: u64) {
        let Some(member) = self.members.get_mut(&id) else { return };
        match &member.seat {
            Seat::Running(place) if place.round == round => {
                let place = place.clone();
                self.sit(id, Seat::Finished(place));
            }
            // It says so again: its connection had ended.
            Seat::Away => match self.gone_finished.remove(&member.who.membership) {
                Some(place) => {
                    member.last = Some((place.round, place.group_rank));
                    self.sit(id, Seat::Finished(place));
                }
                None if !matches!(self.phase, RoundPhase::Closed { .. }) => {
                    if matches!(self.phase, RoundPhase::Gathering { .. }) && self.begun == round + 1 {
                        // It comes back, as the others do. What its rank was does not matter.
                        member.last = Some((round, u64::MAX));
                        self.sit(id, Seat::Returning);
                    }
                    let text = "the connection had ended before its workers did".to_owned();
                    let lost =
                        Cause { kind: RestartCause::Membership, node: String::new(), at_ns: None, text, code: 1 };
                    let cause = self.cause.clone().unwrap_or(lost);
                    return self.tell(id, HostMessage::Over { round, cause });
                }
                None => return,
            },
            _ => return,
        }
        self.release_if_all_finished();
    }

    fn release_if_all_finished(&mut self) {
        if !matches!(self.phase, RoundPhase::Running) || self.tally.running > 0 {
            return;
        }
        self.end("the job has succeeded", 0);
    }

    fn remove(&mut self, now: Instant, id: Id, how: &str, gone: Gone) {
        let Some(member) = self.members.remove(&id) else {
            return self.contenders.retain(|(contender, _)| *contender != id);
        };
        self.tally.subtract(&member.seat);
        let text = format!("{} {how}", member.label());
        let lost = Cause { kind: RestartCause::Membership, node: member.who.name.clone(), at_ns: None, text, code: 1 };
        match (&self.phase, member.seat) {
            (RoundPhase::Running, Seat::Running(_)) => self.lose(now, &lost, gone),
            // Its workers have succeeded: it is not missed.
            (RoundPhase::Running, Seat::Finished(place)) => {
                self.gone_finished.insert(member.who.membership, place);
                self.release_if_all_finished();
            }
            (RoundPhase::Gathering { since, .. }, Seat::Returning) => {
                if gone.explains(*since) {
                    self.explain_failure(lost);
                }
                self.try_begin(now);
            }
            (RoundPhase::Gathering { .. }, _) => self.try_begin(now),
            (RoundPhase::Running | RoundPhase::Closed { .. }, _) => {}
        }
        self.admit_contenders(now, member.who.node_rank);
    }

    // ---- of rounds

    fn most_nodes(&self) -> usize {
        usize::try_from(self.settings.max_nodes).unwrap_or(usize::MAX)
    }

    fn least_nodes(&self) -> usize {
        usize::try_from(self.settings.min_nodes).unwrap_or(usize::MAX)
    }

    fn waiting(&self) -> impl Iterator<Item = &Participant> {
        self.members.values().filter(|member| member.is_waiting())
    }

    fn is_of_last_round(&self, member: &Participant) -> bool {
        member.last.is_some_and(|(round, _)| round + 1 == self.begun)
    }

    /// Begins the round if it should not wait for anybody any more.
    fn try_begin(&mut self, now: Instant) {
        let (waiting, least) = (self.tally.waiting, self.least_nodes());
        let RoundPhase::Gathering { last_call, .. } = &mut self.phase else { return };
        if waiting < least {
            *last_call = None;
            return;
        }
        let last_call = *last_call.get_or_insert(now + self.settings.last_call);
        // Whoever stops its workers is known to be on its way.
        if self.tally.returning > 0 {
            return;
        }
        self.expect_by(last_call);
        let returned = self.waiting().filter(|member| self.is_of_last_round(member)).count();
        if waiting >= self.most_nodes() || returned >= self.least_nodes() || now >= last_call {
            self.begin();
        }
    }

    fn begin(&mut self) {
        let waiting = self.members.iter().filter_map(|(id, member)| self.candidate(*id, member)).collect();
        let seated = seating::choose(waiting, self.most_nodes());
        let round = Round {
            number: self.begun,
            address: self.settings.address.clone(),
            failures: self.failures,
            membership_changes: self.membership_changes,
            cause: self.cause.clone(),
        };
        let places = seating::places(&seated, &round);
        self.actions.push(HostAction::RenewStore);
        for (id, place) in places {
            self.actions.push(HostAction::Tell(id, HostMessage::Begin(place.clone())));
            if let Some(member) = self.members.get_mut(&id) {
                member.last = Some((place.round, place.group_rank));
            }
            self.sit(id, Seat::Running(place));
        }
        self.begun += 1;
        self.cause = None;
        self.phase = RoundPhase::Running;
        self.explain_at = None;
        let spares: Vec<Id> = self.members.iter().filter(|(_, one)| one.is_waiting()).map(|(id, _)| *id).collect();
        for id in spares {
            self.tell_spare(id);
        }
    }

    fn candidate<'a>(&self, id: Id, member: &'a Participant) -> Option<Candidate<'a>> {
        let Seat::Waiting { join, since } = &member.seat else { return None };
        let former = member.last.filter(|_| self.is_of_last_round(member)).map(|(_, rank)| rank);
        Some(Candidate { id, who: &member.who, join, since: *since, former })
    }

    fn tell(&mut self, id: Id, notice: HostMessage) {
        self.actions.push(HostAction::Tell(id, notice));
    }
}

impl HostEvent {
    /// What an agent's message means.
    #[must_use]
    pub fn requested(id: Id, request: AgentMessage) -> Self {
        match request {
            AgentMessage::Enter(who) => Self::Entered(id, who),
            AgentMessage::Join(join) => Self::Joined(id, join),
            AgentMessage::Failed { round, at_ns, text, code, is_final } => {
                Self::Failed { id, round, at_ns, text, code, is_final }
            }
            AgentMessage::Finished { round } => Self::Finished(id, round),
            AgentMessage::Close { text, code } => Self::Closed(id, text, code),
            AgentMessage::Leave { text } => Self::Left(id, text),
            AgentMessage::Beat { number } => Self::Beat(id, number),
        }
    }
}
