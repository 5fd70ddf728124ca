//! A job under a virtual clock and a virtual network: the host's decisions, every agent's, and what goes wrong between them.

mod counts;
mod decisions;
mod ends;
mod invariants;
mod random;
mod running;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use ferroelastic_core::rendezvous::member::{self, Call, Failure, Member, MembershipState};
use ferroelastic_core::rendezvous::message::{AgentMessage, HostMessage, Introduction, PROTOCOL, Place};
use ferroelastic_core::rendezvous::rounds::{self, Rounds};

use counts::Counts;
use decisions::Decisions;
pub(crate) use random::Random;

pub(crate) const MS: Duration = Duration::from_millis(1);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(15);
const LAST_CALL: Duration = Duration::from_secs(30);
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections break until then, also those of agents whose workers have succeeded.
const QUIET: Duration = Duration::from_secs(150);
/// Nothing else goes wrong after this, and workers succeed.
const CALM: Duration = Duration::from_secs(120);

/// What can go wrong.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    /// Percent of the runs of workers that fail.
    pub(crate) failing: u64,
    /// Percent of these failures after which their agent has no restart left.
    pub(crate) last: u64,
    /// Percent of the messages with which their connection breaks.
    pub(crate) breaking: u64,
    /// Percent of the messages that come twice.
    pub(crate) doubled: u64,
    /// Percent of the agents that are killed, lose their link for a while, or stop for a while, once each.
    pub(crate) disturbed: u64,
    pub(crate) longest_delay: Duration,
    /// Options of the restart policy.
    pub(crate) policy: &'static [(&'static str, &'static str)],
}

pub(crate) const NO_FAULTS: Faults =
    Faults { failing: 0, last: 0, breaking: 0, doubled: 0, disturbed: 0, longest_delay: Duration::ZERO, policy: &[] };

/// What an agent does besides its membership.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Work {
    Meeting,
    Running(Place),
    /// Its workers are stopped. After a failure of its own it waits for the host's decision.
    Stopping {
        has_failed: bool,
    },
    /// Whether there is a restart after its failure is the host's to say.
    Verdict,
    /// Its workers have succeeded, and it waits for the others.
    Barrier(Place),
    Ended(&'static str),
}

struct Agent {
    member: Member,
    work: Work,
    name: String,
    /// The connection it has, a number that is never used again.
    link: Option<u64>,
    is_alive: bool,
    /// Nothing gets through to or from it before this.
    cut_until: Instant,
    /// It does nothing before this.
    paused_until: Instant,
    turn: u64,
    tick: u64,
}

enum Happening {
    Start(usize),
    /// The connection is there, on the agent's side.
    Connected(usize, u64),
    ToHost(u64, AgentMessage),
    ToAgent(usize, u64, HostMessage),
    HostSeesEnd(u64),
    Examined(u64, bool),
    AgentSeesEnd(usize, u64),
    AgentTick(usize, u64),
    /// It goes on after a pause, with what came meanwhile.
    Resumes(usize, Option<u64>, member::MemberEvent),
    HostTick(u64),
    WorkersEnd(usize, u64, bool),
    WorkersAreGone(usize, u64),
    Kill(usize),
    Cut(usize, Duration),
    Pause(usize, Duration),
    /// Its agent is told to end.
    Leave(usize),
}

pub(crate) struct Job {
    random: Random,
    faults: Faults,
    pub(crate) start: Instant,
    pub(crate) now: Instant,
    rounds: Rounds,
    agents: Vec<Agent>,
    /// Connections that the host has, and whose they are.
    links: BTreeMap<u64, usize>,
    last_link: u64,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    last_happening: u64,
    /// When the last message of a link comes, each way: they do not overtake each other.
    arrivals: BTreeMap<(u64, bool), Instant>,
    host_tick: u64,
    min_nodes: u32,
    max_nodes: u32,
    pub(crate) messages: u64,
    /// The rounds that have begun, and who takes part.
    pub(crate) begun: Vec<(u64, Vec<Place>)>,
    /// When the last agent ended that was not killed.
    pub(crate) finished_at: Instant,
    counts: Counts,
    decisions: Decisions,
}

impl Job {
    pub(crate) fn new(seed: u64, min_nodes: u32, max_nodes: u32, agents: usize, faults: Faults) -> Self {
        let start = Instant::now();
        let settings = rounds::HostSettings {
            run_id: "job".into(),
            min_nodes,
            max_nodes,
            last_call: LAST_CALL,
            silence: SILENCE,
            address: None,
            max_membership_changes: None,
        };
        let mut job = Self {
            random: Random::new(seed),
            faults,
            start,
            now: start,
            rounds: Rounds::new(settings, start),
            agents: Vec::new(),
            links: BTreeMap::new(),
            last_link: 0,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            last_happening: 0,
            arrivals: BTreeMap::new(),
            host_tick: 0,
            min_nodes,
            max_nodes,
            messages: 0,
            begun: Vec::new(),
            finished_at: start,
            counts: Counts::default(),
            decisions: Decisions::default(),
        };
        for index in 0..agents {
            job.add_agent(Duration::ZERO);
            if index > 0 && job.random.chance(faults.disturbed) {
                let at = job.random.between(Duration::ZERO, CALM);
                job.disturb(index, at);
            }
        }
        job
    }

    fn add_agent(&mut self, least_delay: Duration) {
        let index = self.agents.len();
        let settings = member::MemberSettings {
            endpoint: "host:29400".into(),
            connect_timeout: CONNECT_TIMEOUT,
            is_host: index == 0,
        };
        self.agents.push(Agent {
            member: Member::new(settings, self.now),
            work: Work::Meeting,
            name: format!("node{index:04}"),
            link: None,
            is_alive: true,
            cut_until: self.start,
            paused_until: self.start,
            turn: 0,
            tick: 0,
        });
        let delay = least_delay + self.random.between(Duration::ZERO, self.faults.longest_delay * 10);
        self.later(delay, Happening::Start(index));
    }

    fn disturb(&mut self, index: usize, at: Duration) {
        match self.random.below(4) {
            0 => {
                self.later(at, Happening::Kill(index));
                if self.random.chance(50) {
                    let after = self.random.between(Duration::ZERO, SECOND * 40);
                    self.add_agent(at + after);
                }
            }
            1 => {
                // For longer than anybody waits, or for a while.
                let length = if self.random.chance(20) { SECOND * 3000 } else { self.random.between(MS, SECOND * 30) };
                self.later(at, Happening::Cut(index, length));
            }
            2 => {
                let length = self.random.between(MS, SECOND * 30);
                self.later(at, Happening::Pause(index, length));
            }
            _ => self.later(at, Happening::Leave(index)),
        }
    }

    fn later(&mut self, delay: Duration, happening: Happening) {
        self.last_happening += 1;
        self.happenings.insert(self.last_happening, happening);
        self.queue.push(Reverse((self.now + delay, self.last_happening)));
    }

    fn is_calm(&self) -> bool {
        self.now >= self.start + CALM
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(50) + self.random.between(Duration::ZERO, self.faults.longest_delay)
    }

    /// When a message that is sent now arrives: in order, and not while the agent is cut off.
    fn arrival(&mut self, agent: usize, link: u64, is_to_host: bool) -> Duration {
        let at = (self.now + self.delay()).max(self.agents[agent].cut_until);
        let last = self.arrivals.entry((link, is_to_host)).or_insert(at);
        *last = (*last).max(at);
        *last - self.now
    }

    // ---- of agents

    fn step_agent(&mut self, index: usize, event: member::MemberEvent) {
        let agent = &mut self.agents[index];
        if !agent.is_alive {
            return;
        }
        if self.now < agent.paused_until {
            // It finds this when it goes on.
            let (wait, link) = (agent.paused_until - self.now, agent.link);
            return self.later(wait, Happening::Resumes(index, link, event));
        }
        let actions = agent.member.step(self.now, event);
        for action in actions {
            match action {
                member::MemberAction::Connect => {
                    self.last_link += 1;
                    let link = self.last_link;
                    self.agents[index].link = Some(link);
                    let at = self.arrival(index, link, true) * 2;
                    self.later(at, Happening::Connected(index, link));
                }
                member::MemberAction::Send(request) => self.send_to_host(index, request),
                member::MemberAction::Warning(_) => {}
                member::MemberAction::Disconnect => {
                    if let Some(link) = self.agents[index].link.take() {
                        let at = self.arrival(index, link, true);
                        self.later(at, Happening::HostSeesEnd(link));
                    }
                }
            }
        }
        self.work(index);
        let agent = &mut self.agents[index];
        agent.tick += 1;
        let tick = agent.tick;
        let next = agent.member.next_tick();
        let has_ended = matches!(agent.work, Work::Ended(_));
        let waits = matches!(agent.member.state(), MembershipState::Joining) && agent.is_alive && !has_ended;
        // The host's own agent leaves it to the host: they are one process.
        let is_with_host = index == 0 && agent.member.is_up();
        assert!(!waits || is_with_host || next.is_some(), "agent {index} waits without a deadline");
        if let Some(next) = next {
            self.later(next.saturating_duration_since(self.now), Happening::AgentTick(index, tick));
        }
    }

    fn send_to_host(&mut self, index: usize, request: AgentMessage) {
        let Some(link) = self.agents[index].link else { return };
        self.messages += 1;
        let at = self.arrival(index, link, true);
        let is_calm = self.now >= self.start + QUIET;
        if !is_calm && self.random.chance(self.faults.breaking) {
            return self.break_link(index, link);
        }
        if !is_calm && self.random.chance(self.faults.doubled) {
            self.later(at, Happening::ToHost(link, request.clone()));
        }
        self.later(at, Happening::ToHost(link, request));
    }

    fn send_to_agent(&mut self, link: u64, notice: HostMessage) {
        let Some(&index) = self.links.get(&link) else { return };
        self.messages += 1;
        let at = self.arrival(index, link, false);
        let is_calm = self.now >= self.start + QUIET;
        if !is_calm && self.random.chance(self.faults.breaking) {
            return self.break_link(index, link);
        }
        if !is_calm && self.random.chance(self.faults.doubled) {
            self.later(at, Happening::ToAgent(index, link, notice.clone()));
        }
        self.later(at, Happening::ToAgent(index, link, notice));
    }

    /// What is under way is lost, and both sides learn of it, each in its time.
    fn break_link(&mut self, index: usize, link: u64) {
        let (there, here) = (self.delay(), self.delay());
        self.later(there, Happening::HostSeesEnd(link));
        self.later(here, Happening::AgentSeesEnd(index, link));
    }

    /// What the agent's program makes of how its membership stands.
    fn work(&mut self, index: usize) {
        let standing = self.agents[index].member.state().clone();
        let work = self.agents[index].work.clone();
        match (standing, work) {
            (_, Work::Ended(_)) => {}
            (MembershipState::Placed(place), Work::Meeting) => {
                let turn = self.set_work(index, Work::Running(place));
                let is_calm = self.is_calm();
                let fails = !is_calm && self.random.chance(self.faults.failing);
                // Workers end together, more or less, and only when nothing goes wrong any more.
                let least = if is_calm || fails { Duration::ZERO } else { CALM };
                let length = self.random.between(least, least + SECOND * 20);
                self.later(length, Happening::WorkersEnd(index, turn, fails));
            }
            (MembershipState::Over(..), Work::Running(_)) => self.stop_workers(index, false),
            (MembershipState::Over(..), Work::Verdict) => {
                self.set_work(index, Work::Meeting);
                self.later(Duration::ZERO, Happening::Start(index));
            }
            (MembershipState::Over(..), Work::Barrier(_)) => {
                // Its workers are gone.
                self.set_work(index, Work::Meeting);
                self.later(Duration::ZERO, Happening::Start(index));
            }
            (MembershipState::Closed { text, detail, .. }, work) => {
                invariants::check_end(&text, &detail);
                self.set_work(index, Work::Ended(if work == Work::Verdict { "failed" } else { "closed" }));
            }
            (MembershipState::Released, _) => {
                self.set_work(index, Work::Ended("released"));
            }
            (MembershipState::Failed(failure), _) => {
                let how = match failure {
                    Failure::TimedOut(_) => "timed out",
                    Failure::Unreachable(_) => "unreachable",
                    Failure::Refused(_) => "refused",
                    Failure::Late(_) => "late",
                };
                self.set_work(index, Work::Ended(how));
            }
            _ => {}
        }
        if let Work::Ended(_) = self.agents[index].work
            && self.agents[index].is_alive
        {
            self.finished_at = self.now;
            self.agents[index].is_alive = false;
            if index == 0 {
                // The host waits a moment for the others to go.
                for (link, index) in std::mem::take(&mut self.links) {
                    let at = SECOND + self.arrival(index, link, false);
                    self.later(at, Happening::AgentSeesEnd(index, link));
                }
            }
            if let Some(link) = self.agents[index].link.take() {
                let at = self.arrival(index, link, true);
                self.later(at, Happening::HostSeesEnd(link));
            }
        }
    }

    fn set_work(&mut self, index: usize, work: Work) -> u64 {
        let agent = &mut self.agents[index];
        agent.work = work;
        agent.turn += 1;
        agent.turn
    }

    fn stop_workers(&mut self, index: usize, has_failed: bool) {
        let turn = self.set_work(index, Work::Stopping { has_failed });
        let grace = self.random.between(Duration::ZERO, self.faults.longest_delay * 100);
        self.later(grace, Happening::WorkersAreGone(index, turn));
    }

    fn ask_to_join(&mut self, index: usize) {
        let call = Call::Join { role: "default".into(), local_world_size: 2, timeout: JOIN_TIMEOUT };
        self.step_agent(index, member::MemberEvent::Call(call));
    }

    // ---- of the host

    fn step_host(&mut self, event: rounds::HostEvent) {
        self.note(&event);
        let actions = self.rounds.step(self.now, event);
        let mut begun: Option<(u64, Vec<Place>)> = None;
        for action in actions {
            match action {
                rounds::HostAction::RenewStore => self.check_that_nobody_runs(),
                rounds::HostAction::Send(link, notice) => {
                    if matches!(notice, HostMessage::Dropped { .. }) {
                        self.check_that_its_workers_are_gone(link);
                        // It has been silent since then, at the latest.
                        self.note_loss(self.now.checked_sub(SILENCE).expect("it has been silent"));
                    }
                    self.note_decision(&notice);
                    if let HostMessage::Begin(place) = &notice {
                        let (_, places) = begun.get_or_insert((place.round, Vec::new()));
                        places.push(place.clone());
                    }
                    self.send_to_agent(link, notice);
                }
                rounds::HostAction::CheckProbe(link) => {
                    let is_cut = self.links.get(&link).is_some_and(|index| self.now < self.agents[*index].cut_until);
                    self.later(Duration::ZERO, Happening::Examined(link, !is_cut));
                }
                rounds::HostAction::Disconnect(link) => {
                    if let Some(index) = self.links.remove(&link) {
                        let at = self.arrival(index, link, false);
                        self.later(at, Happening::AgentSeesEnd(index, link));
                    }
                }
            }
        }
        // A single one is an answer that is given again.
        if let Some((round, places)) = begun
            && self.begun.last().is_none_or(|(last, _)| *last < round)
        {
            self.check_places(&places);
            self.check_decision(&places[0]);
            self.check_counts(&places[0]);
            self.begun.push((round, places));
        }
        self.host_tick += 1;
        let tick = self.host_tick;
        if let Some(next) = self.rounds.next_tick() {
            self.later(next.saturating_duration_since(self.now), Happening::HostTick(tick));
        }
    }

    // ---- of the world

    fn happen(&mut self, happening: Happening) {
        if let Happening::WorkersEnd(index, ..) | Happening::WorkersAreGone(index, _) | Happening::Start(index) =
            happening
            && self.now < self.agents[index].paused_until
        {
            let wait = self.agents[index].paused_until - self.now;
            return self.later(wait, happening);
        }
        match happening {
            Happening::Start(index) => self.ask_to_join(index),
            Happening::Connected(index, link) => {
                if self.agents[index].link != Some(link) {
                    return;
                }
                if !self.agents[0].is_alive {
                    self.agents[index].link = None;
                    let text = "connection refused".into();
                    return self.step_agent(index, member::MemberEvent::NotConnected { text, is_refused: true });
                }
                self.links.insert(link, index);
                self.step_agent(index, member::MemberEvent::Connected);
                let who = Introduction {
                    protocol: PROTOCOL,
                    run_id: "job".into(),
                    name: self.agents[index].name.clone(),
                    pid: u32::try_from(index).expect("small"),
                    membership: u64::try_from(index).expect("small"),
                    connection: link,
                    is_host: index == 0,
                    nodes: (self.min_nodes, self.max_nodes),
                    node_rank: None,
                    settings: self
                        .faults
                        .policy
                        .iter()
                        .map(|(name, value)| ((*name).into(), (*value).into()))
                        .collect(),
                };
                self.send_to_host(index, AgentMessage::Enter(who));
            }
            Happening::ToHost(link, request) => {
                if self.links.contains_key(&link) {
                    self.step_host(rounds::HostEvent::from_message(link, request));
                }
            }
            Happening::ToAgent(index, link, notice) => {
                if self.agents[index].link == Some(link) {
                    self.step_agent(index, member::MemberEvent::Received(notice));
                }
            }
            Happening::HostSeesEnd(link) => {
                if self.links.remove(&link).is_some() {
                    self.step_host(rounds::HostEvent::Lost(link, "the connection broke".into()));
                }
            }
            Happening::AgentSeesEnd(index, link) => {
                if self.agents[index].link == Some(link) {
                    self.agents[index].link = None;
                    self.step_agent(index, member::MemberEvent::Disconnected("it broke".into()));
                }
            }
            Happening::AgentTick(index, tick) => {
                if self.agents[index].tick == tick {
                    self.step_agent(index, member::MemberEvent::Tick);
                }
            }
            Happening::Resumes(index, link, event) => {
                // A call is the agent's own, the rest is of the connection that it had.
                if matches!(event, member::MemberEvent::Call(_)) || self.agents[index].link == link {
                    self.step_agent(index, event);
                }
            }
            Happening::HostTick(tick) => {
                if self.host_tick == tick {
                    self.step_host(rounds::HostEvent::Tick);
                }
            }
            Happening::WorkersEnd(index, turn, fails) => self.workers_end(index, turn, fails),
            Happening::WorkersAreGone(index, turn) => self.workers_are_gone(index, turn),
            Happening::Examined(link, is_acknowledged) => {
                self.step_host(rounds::HostEvent::ProbeChecked(link, is_acknowledged));
            }
            Happening::Leave(index) => self.leave(index),
            Happening::Cut(index, length) => self.agents[index].cut_until = self.now + length,
            Happening::Pause(index, length) => self.agents[index].paused_until = self.now + length,
            Happening::Kill(index) => self.kill(index),
        }
    }
}
