//! What one agent does in a rendezvous: when it connects, what it says, and what it makes of the answers. Pure: events in, actions out.

mod link;

use std::time::{Duration, Instant};

use link::Link;

use super::message::{AgentMessage, Cause, HostMessage, Join, MOST_TEXT_BYTES, Place};
use crate::sys::clock::{ENDLESS, later};
use crate::text::bounded;
use crate::vocabulary::RestartCause;

pub use link::Lease;

/// Between attempts to connect to a host that is not up yet. Nothing tells when it is.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// An agent that has not reached the host for so long reports the reason, and again when the reason has changed.
const EXPLAIN_AFTER: Duration = Duration::from_secs(10);

/// What an agent was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberSettings {
    /// Where the host is, for messages to people.
    pub endpoint: String,
    /// How long it is tried to reach the host.
    pub connect_timeout: Duration,
    /// The host is in this process: it need not be told that the agent lives.
    pub is_host: bool,
}

/// What the program asks of its agent's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Take part in the next round.
    Join {
        /// Role of the workers.
        role: String,
        /// How many.
        local_world_size: u64,
        /// How long to wait.
        timeout: Duration,
    },
    /// A worker has failed.
    Failed {
        /// When, in nanoseconds of the wall clock.
        at_ns: u64,
        /// Who, and how.
        text: String,
        /// Exit code of the job if this ends it.
        code: i32,
        /// There is no restart left.
        is_final: bool,
    },
    /// All workers have succeeded.
    Finished,
    /// There shall be no other round.
    Close {
        /// Why.
        text: String,
        /// Exit code of the job.
        code: i32,
    },
    /// Go.
    Leave(String),
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberEvent {
    /// The program wants something.
    Call(Call),
    /// There is a connection.
    Connected,
    /// There is none.
    NotConnected {
        /// Why.
        text: String,
        /// Nobody listens there, and a machine said so.
        is_refused: bool,
    },
    /// Something answered that is no rendezvous of this package.
    Stranger(String),
    /// The connection has ended.
    Disconnected(String),
    /// The host says something.
    Received(HostMessage),
    /// A deadline may have passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberAction {
    /// Connect, and introduce the agent.
    Connect,
    /// Send this.
    Send(AgentMessage),
    /// End the connection.
    Disconnect,
    /// Tell the user.
    Remark(String),
}

/// Why an agent cannot take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not enough nodes came in time.
    TimedOut(String),
    /// The host cannot be reached, or is gone.
    Unreachable(String),
    /// The host does not want it.
    Refused(String),
    /// The job of this host had ended, or was about to, when the agent came. There may be another host.
    Late(String),
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipState {
    /// It has not asked to join.
    Idle,
    /// It waits for a round.
    Joining,
    /// It is in a round.
    Placed(Place),
    /// Its round is over.
    Over(Place, Cause),
    /// All workers of all nodes have succeeded.
    Released,
    /// There will be no other round.
    Closed {
        /// Why.
        text: String,
        /// Exit code of the job; 0 if it was a spare that is not needed.
        code: i32,
    },
    /// It cannot take part.
    Failed(Failure),
}

/// A round that is asked for.
#[derive(Debug)]
struct Wish {
    role: String,
    local_world_size: u64,
    timeout: Duration,
    deadline: Instant,
}

/// The state of one agent.
#[derive(Debug)]
pub struct Member {
    settings: MemberSettings,
    link: Link,
    standing: MembershipState,
    wish: Option<Wish>,
    /// Until when it is tried to reach the host.
    connect_until: Instant,
    pause: Duration,
    /// Why it was not reached so far.
    unreached: Option<String>,
    /// When people are told that it was not reached, and of which reason they know.
    explain_at: Instant,
    explained: Option<String>,
    was_welcome: bool,
    last_round: Option<u64>,
    /// The last round was told over the connection that there is: the next one has a larger number. Over another connection, it may be
    /// another host's.
    is_round_of_link: bool,
    /// The round in which its workers have succeeded.
    finished: Option<u64>,
    last_step: Instant,
    actions: Vec<MemberAction>,
}

impl Member {
    /// An agent that has not asked for anything.
    #[must_use]
    pub fn new(settings: MemberSettings, now: Instant) -> Self {
        Self {
            settings,
            link: Link::Down,
            standing: MembershipState::Idle,
            wish: None,
            connect_until: now,
            pause: FIRST_PAUSE,
            unreached: None,
            explain_at: now,
            explained: None,
            was_welcome: false,
            last_round: None,
            is_round_of_link: false,
            finished: None,
            last_step: now,
            actions: Vec::new(),
        }
    }

    /// Whether the host has welcomed it, and they talk.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// Whether it waits for a connection to be made.
    #[must_use]
    pub fn is_connecting(&self) -> bool {
        matches!(self.link, Link::Connecting)
    }

    /// Whether a host has welcomed it at any time.
    #[must_use]
    pub fn was_welcome(&self) -> bool {
        self.was_welcome
    }

    /// How it stands.
    #[must_use]
    pub fn standing(&self) -> &MembershipState {
        &self.standing
    }

    /// Until when the workers of its round may run, by its own clock; `None` while the host sees to that.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        if self.settings.is_host { None } else { self.link.lease() }
    }

    /// Handles an event and returns the actions to carry out.
    #[must_use = "dropped actions are messages that nobody sends"]
    pub fn step(&mut self, now: Instant, event: MemberEvent) -> Vec<MemberAction> {
        self.forgive_own_pause(now);
        self.last_step = now;
        // What its workers do after the end of its lease says nothing about the job.
        self.look_at_lease(now);
        match event {
            MemberEvent::Call(call) => self.call(now, call),
            MemberEvent::Connected => self.link = Link::Entering { since: now },
            MemberEvent::NotConnected { text, is_refused } => self.not_connected(now, &text, is_refused),
            MemberEvent::Stranger(text) => {
                self.link = Link::Down;
                self.fail(Failure::Refused(text));
            }
            MemberEvent::Disconnected(text) => self.disconnected(now, &text),
            MemberEvent::Received(notice) => self.receive(now, notice),
            MemberEvent::Tick => {}
        }
        self.look_at_clock(now);
        std::mem::take(&mut self.actions)
    }

    /// When the next [`MemberEvent::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Pausing { next } => Some(*next),
            Link::Connecting | Link::Entering { .. } => Some(self.connect_until),
            Link::Up(up) if !self.settings.is_host => Some(up.next_tick(self.has_running_workers())),
            Link::Up(_) | Link::Lapsed(_) | Link::Down => None,
        };
        link.into_iter().chain(self.give_up_at()).min()
    }

    /// When it gives up waiting for a round, unless the host hears it: that says when it is enough, knows who came and who is a spare,
    /// and is not silent for long.
    fn give_up_at(&self) -> Option<Instant> {
        self.wish.as_ref().filter(|_| !self.is_up()).map(|wish| wish.deadline)
    }

    /// Its workers have succeeded, and those of others may not have yet.
    fn has_finished(&self) -> bool {
        matches!(&self.standing, MembershipState::Placed(place) if self.finished == Some(place.round))
    }

    /// Whether this node is in a round, and its workers have not succeeded.
    #[must_use]
    pub fn has_running_workers(&self) -> bool {
        matches!(self.standing, MembershipState::Placed(_)) && !self.has_finished()
    }

    /// Whether it has given up its connection because the host did not answer, and has no other yet.
    #[must_use]
    pub fn has_lapsed(&self) -> bool {
        matches!(self.link, Link::Lapsed(_))
    }

    fn call(&mut self, now: Instant, call: Call) {
        match call {
            Call::Join { role, local_world_size, timeout } => {
                if matches!(self.standing, MembershipState::Closed { .. } | MembershipState::Released) {
                    return;
                }
                self.standing = MembershipState::Joining;
                self.finished = None;
                self.wish = Some(Wish { role, local_world_size, timeout, deadline: later(now, timeout) });
                match self.link {
                    Link::Down | Link::Lapsed(_) => self.connect(now),
                    Link::Up(_) => self.ask(now),
                    Link::Pausing { .. } | Link::Connecting | Link::Entering { .. } => {}
                }
            }
            Call::Failed { at_ns, text, code, is_final } => {
                if let Some(round) = self.last_round {
                    self.send(AgentMessage::Failed { round, at_ns, text: short(&text), code, is_final });
                }
            }
            Call::Finished => {
                if let MembershipState::Placed(place) = &self.standing {
                    let round = place.round;
                    self.finished = Some(round);
                    self.send(AgentMessage::Finished { round });
                }
            }
            Call::Close { text, code } => self.send(AgentMessage::Close { text: short(&text), code }),
            Call::Leave(text) => {
                self.send(AgentMessage::Leave { text: short(&text) });
                self.wish = None;
                self.link = Link::Down;
                self.actions.push(MemberAction::Disconnect);
            }
        }
    }

    fn send(&mut self, request: AgentMessage) {
        if matches!(self.link, Link::Up(_)) {
            self.actions.push(MemberAction::Send(request));
        }
    }

    /// Asks for the round that is wished for.
    fn ask(&mut self, now: Instant) {
        let Some(wish) = &self.wish else { return };
        let join = Join {
            after: self.last_round,
            role: wish.role.clone(),
            local_world_size: wish.local_world_size,
            timeout: wish.deadline.saturating_duration_since(now),
        };
        self.send(AgentMessage::Join(join));
    }

    fn connect(&mut self, now: Instant) {
        self.connect_until = later(now, self.settings.connect_timeout);
        self.pause = FIRST_PAUSE;
        self.unreached = None;
        self.explain_at = now + EXPLAIN_AFTER;
        self.link = Link::Connecting;
        self.actions.push(MemberAction::Connect);
    }

    fn not_connected(&mut self, now: Instant, text: &str, is_refused: bool) {
        self.link = Link::Down;
        if self.wish.is_none() && !self.has_finished() {
            return;
        }
        let endpoint = &self.settings.endpoint;
        if is_refused && self.was_welcome {
            let text = format!("the agent that hosted the rendezvous at {endpoint} is gone: {text}");
            return self.fail(Failure::Unreachable(text));
        }
        if now >= self.connect_until {
            let tried_s = self.settings.connect_timeout.as_secs_f64();
            let text =
                format!("the host of the rendezvous at {endpoint} was not reached within {tried_s:.0} s: {text}");
            return self.fail(Failure::Unreachable(text));
        }
        if now >= self.explain_at && self.explained.as_deref() != Some(text) {
            let left_s = self.connect_until.saturating_duration_since(now).as_secs_f64();
            self.actions.push(MemberAction::Remark(format!(
                "the host of the rendezvous at {endpoint} is not reached: {text}; trying for {left_s:.0} s more (read_timeout)"
            )));
            self.explained = Some(text.to_owned());
            self.explain_at = now + EXPLAIN_AFTER;
        }
        self.unreached = Some(text.to_owned());
        self.link = Link::Pausing { next: (now + self.pause).min(self.connect_until) };
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn disconnected(&mut self, now: Instant, text: &str) {
        let was_up = matches!(self.link, Link::Up(_));
        self.link = Link::Down;
        let lost = format!("the connection to the rendezvous at {} was lost: {text}", self.settings.endpoint);
        if self.has_finished() {
            // Its workers are done, whatever happens: it comes back to hear how the others fare.
            if was_up {
                self.connect(now);
            } else {
                self.not_connected(now, text, false);
            }
        } else if let MembershipState::Placed(place) = &self.standing {
            let cause = Cause { kind: RestartCause::Membership, node: String::new(), at_ns: None, text: lost, code: 1 };
            self.standing = MembershipState::Over(place.clone(), cause);
        } else if let Some(wish) = &mut self.wish {
            if was_up {
                wish.deadline = later(now, wish.timeout);
                self.connect(now);
            } else {
                self.not_connected(now, text, false);
            }
        }
    }

    fn receive(&mut self, now: Instant, notice: HostMessage) {
        if let Link::Up(up) = &mut self.link {
            up.hear(now);
        }
        match notice {
            HostMessage::Welcome { silence } => {
                if let Link::Entering { since } = self.link {
                    self.link = Link::up(since, now, silence.min(ENDLESS));
                    self.explained = None;
                    self.was_welcome = true;
                    self.is_round_of_link = false;
                    if self.has_finished()
                        && let Some(round) = self.finished
                    {
                        return self.send(AgentMessage::Finished { round });
                    }
                    // To this host, or by now, it is a new one.
                    self.last_round = None;
                    self.ask(now);
                }
            }
            HostMessage::Begin(place) => {
                let is_new = !self.is_round_of_link || self.last_round.is_none_or(|last| place.round > last);
                if self.wish.is_some() && is_new {
                    self.wish = None;
                    self.last_round = Some(place.round);
                    self.is_round_of_link = true;
                    self.standing = MembershipState::Placed(place);
                }
            }
            HostMessage::Over { round, cause } => {
                if let MembershipState::Placed(place) = &self.standing
                    && place.round == round
                {
                    self.standing = MembershipState::Over(place.clone(), cause);
                }
            }
            HostMessage::TimedOut { waiting, cause } => {
                if self.wish.is_some() {
                    let since = cause.map_or_else(String::new, |cause| format!(", after this: {cause}"));
                    self.fail(Failure::TimedOut(format!("these did: {}{since}", waiting.join(", "))));
                }
            }
            HostMessage::Released => {
                if self.has_finished() {
                    self.standing = MembershipState::Released;
                }
            }
            HostMessage::Closed { text, code } => {
                self.wish = None;
                if self.standing != MembershipState::Released {
                    // A job whose workers of this node have not succeeded has not.
                    let code = if code == 0 && self.has_running_workers() { 1 } else { code };
                    self.standing = MembershipState::Closed { text, code };
                }
            }
            HostMessage::Late { text } => {
                self.link = Link::Down;
                self.actions.push(MemberAction::Disconnect);
                self.fail(Failure::Late(text));
            }
            HostMessage::Refused { text } => {
                self.link = Link::Down;
                self.actions.push(MemberAction::Disconnect);
                let text = format!("the rendezvous at {} does not take this node: {text}", self.settings.endpoint);
                self.fail(Failure::Refused(text));
            }
            HostMessage::Dropped { text } => {
                self.actions.push(MemberAction::Disconnect);
                self.disconnected(now, &text);
            }
            HostMessage::Remark { text } => self.actions.push(MemberAction::Remark(text)),
            HostMessage::Beat { number } => {
                if let Link::Up(up) = &mut self.link {
                    up.answered(number);
                }
            }
            HostMessage::Probe => {}
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.wish = None;
        if matches!(self.link, Link::Pausing { .. }) {
            self.link = Link::Down;
        }
        self.standing = MembershipState::Failed(failure);
    }

    /// This process was stopped: that it has heard nothing meanwhile says nothing about the host.
    fn forgive_own_pause(&mut self, now: Instant) {
        let due = self.next_tick().map(|due| due.max(self.last_step));
        if let (Link::Up(up), Some(due)) = (&mut self.link, due) {
            up.forgive_pause(now, due);
        }
    }

    /// Its workers run, and the host may have taken this node for lost: they end before others take their ranks.
    fn look_at_lease(&mut self, now: Instant) {
        let Some(lease) = self.lease().filter(|lease| self.has_running_workers() && now >= lease.stop_at) else {
            return;
        };
        if let MembershipState::Placed(place) = &self.standing {
            self.standing = MembershipState::Over(place.clone(), lapsed(&self.settings.endpoint));
        }
        self.link = Link::Lapsed(lease);
        self.actions.push(MemberAction::Disconnect);
    }

    fn look_at_clock(&mut self, now: Instant) {
        let may_lapse = self.has_running_workers();
        match &mut self.link {
            Link::Pausing { next } if now >= *next => {
                self.link = Link::Connecting;
                self.actions.push(MemberAction::Connect);
            }
            Link::Connecting | Link::Entering { .. } if now >= self.connect_until => {
                self.actions.push(MemberAction::Disconnect);
                // The last attempt has no time left for an answer.
                let text = self.unreached.take();
                self.not_connected(now, text.as_deref().unwrap_or("no answer"), false);
            }
            Link::Up(up) if !self.settings.is_host => {
                if let Some(silence) = up.is_silent(now).filter(|_| !may_lapse) {
                    self.actions.push(MemberAction::Disconnect);
                    self.disconnected(now, &format!("it was silent for {:.1} s", silence.as_secs_f64()));
                } else if let Some(number) = up.beat(now) {
                    self.send(AgentMessage::Beat { number });
                }
            }
            _ => {}
        }
        if self.give_up_at().is_some_and(|at| now >= at) {
            self.fail(Failure::TimedOut("the host was not there to say who did".into()));
        }
    }
}

/// The cause of the end of a round for a node whose lease has lapsed.
pub(crate) fn lapsed(endpoint: &str) -> Cause {
    let text = format!(
        "the host of the rendezvous at {endpoint} has not answered for too long (heartbeat_timeout): this node stops its workers before others take their ranks"
    );
    Cause { kind: RestartCause::Membership, node: String::new(), at_ns: None, text, code: 1 }
}

/// What fits into a message.
fn short(text: &str) -> String {
    bounded(text, MOST_TEXT_BYTES).to_owned()
}
