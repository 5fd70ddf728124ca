//! The decisions of one agent in a rendezvous: when it connects, which messages it sends, and how it handles the host's messages. Pure:
//! events in, actions out.

mod link;

use std::time::{Duration, Instant};

use link::Link;

use super::message::{AgentMessage, Cause, HostMessage, Join, MAX_DETAIL_BYTES, MAX_TEXT_BYTES, Place};
use super::policy::{Decision, FailureFacts};
use crate::sys::clock::{ENDLESS, later};
use crate::text::bounded;

pub use link::Lease;

/// Pauses between attempts to connect to a host that is not up yet. No event reports when it is.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(5);
const MAX_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// An agent that cannot reach the host reports the reason after this time, and again when the reason has changed.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// Settings of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberSettings {
    /// Address of the host, for messages to the user.
    pub endpoint: String,
    /// How long to try to connect to the host.
    pub connect_timeout: Duration,
    /// Whether the host is in this process. The agent then needs no heartbeats and no lease.
    pub is_host: bool,
}

/// A call of the program to its agent's membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Join the next round.
    Join {
        /// Role of the workers.
        role: String,
        /// Number of workers.
        local_world_size: u64,
        /// How long to wait for the round.
        timeout: Duration,
    },
    /// A worker has failed.
    Failed {
        /// Time of the failure in nanoseconds of the wall clock.
        at_ns: u64,
        /// The worker and its exit status, as text.
        text: String,
        /// Exit code of the job if this failure ends it.
        code: i32,
        /// The facts for the restart policy.
        facts: FailureFacts,
        /// The explanation of the failure. One that is longer than a message allows is not sent.
        detail: String,
    },
    /// The workers have made progress in this round.
    Progressed,
    /// All workers have succeeded.
    Finished,
    /// End the job: no further round begins.
    Close {
        /// The reason.
        text: String,
        /// Exit code of the job.
        code: i32,
    },
    /// Leave the rendezvous, for this reason.
    Leave(String),
}

/// An event at the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberEvent {
    /// The program has made a call.
    Call(Call),
    /// The connection is established.
    Connected,
    /// An attempt to connect has failed.
    NotConnected {
        /// The reason.
        text: String,
        /// The connection was refused: the machine is up, and no process listens at the port.
        is_refused: bool,
    },
    /// The server at the endpoint is not a rendezvous of ferrorun.
    ForeignServer(String),
    /// The connection has ended; the text is the reason.
    Disconnected(String),
    /// The host has sent a message.
    Received(HostMessage),
    /// A deadline may have passed.
    Tick,
}

/// An action for the caller to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberAction {
    /// Connect, and introduce the agent.
    Connect,
    /// Send a message to the host.
    Send(AgentMessage),
    /// Close the connection.
    Disconnect,
    /// Report a warning to the user.
    Warning(String),
}

/// Why an agent cannot take part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not enough nodes joined in time.
    TimedOut(String),
    /// The host cannot be reached, or has gone.
    Unreachable(String),
    /// The host refused the agent, or the server is not a host.
    Refused(String),
    /// The host's job had ended, or was about to end, when the agent joined. Another host may follow.
    Late(String),
}

/// The state of a membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipState {
    /// It has not asked to join.
    Idle,
    /// It waits for a round to begin.
    Joining,
    /// It is in a round.
    Placed(Place),
    /// Its round has ended.
    Over(Place, Cause),
    /// All workers of all nodes have succeeded.
    Released,
    /// There will be no further round.
    Closed {
        /// The reason.
        text: String,
        /// Exit code of the job; 0 if this node was a spare of a job that has succeeded.
        code: i32,
        /// The decision of the restart policy, if a failure ended the job.
        decision: Option<Box<Decision>>,
        /// The explanation of the worker's failure that ended the job, or empty.
        detail: String,
        /// Whether the loss of a node ended the job.
        is_loss: bool,
    },
    /// It cannot take part.
    Failed(Failure),
}

/// A call to join that has not been answered yet.
#[derive(Debug)]
struct PendingJoin {
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
    state: MembershipState,
    pending_join: Option<PendingJoin>,
    /// When it gives up connecting to the host.
    connect_deadline: Instant,
    retry_pause: Duration,
    /// The error of the last attempt to connect.
    last_connect_error: Option<String>,
    /// When a connection error is reported to the user, and the last error that was reported.
    report_at: Instant,
    reported_error: Option<String>,
    was_welcomed: bool,
    last_round: Option<u64>,
    /// Whether the last round began over the current connection. The next round then has a larger number. Another connection may lead to
    /// another host, which counts from 0.
    is_last_round_of_link: bool,
    /// The round in which its workers have succeeded.
    finished_round: Option<u64>,
    last_step: Instant,
    actions: Vec<MemberAction>,
}

impl Member {
    /// An agent that has not joined.
    #[must_use]
    pub fn new(settings: MemberSettings, now: Instant) -> Self {
        Self {
            settings,
            link: Link::Down,
            state: MembershipState::Idle,
            pending_join: None,
            connect_deadline: now,
            retry_pause: FIRST_RETRY_PAUSE,
            last_connect_error: None,
            report_at: now,
            reported_error: None,
            was_welcomed: false,
            last_round: None,
            is_last_round_of_link: false,
            finished_round: None,
            last_step: now,
            actions: Vec::new(),
        }
    }

    /// Whether the connection is established and the host has welcomed the agent.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// Whether a connection is being made.
    #[must_use]
    pub fn is_connecting(&self) -> bool {
        matches!(self.link, Link::Connecting)
    }

    /// Whether any host has welcomed this agent.
    #[must_use]
    pub fn was_welcomed(&self) -> bool {
        self.was_welcomed
    }

    /// The state of the membership.
    #[must_use]
    pub fn state(&self) -> &MembershipState {
        &self.state
    }

    /// How long the workers of its round may run; `None` without a connection, or if the host is in this process.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        if self.settings.is_host { None } else { self.link.lease() }
    }

    /// Handles an event and returns the actions to carry out.
    #[must_use = "the actions must be carried out"]
    pub fn step(&mut self, now: Instant, event: MemberEvent) -> Vec<MemberAction> {
        self.reset_after_own_suspension(now);
        self.last_step = now;
        // The lease first: if it has lapsed, the event must not count for the job any more.
        self.check_lease(now);
        match event {
            MemberEvent::Call(call) => self.call(now, call),
            MemberEvent::Connected => self.link = Link::Entering { since: now },
            MemberEvent::NotConnected { text, is_refused } => self.not_connected(now, &text, is_refused),
            MemberEvent::ForeignServer(text) => {
                self.link = Link::Down;
                self.fail(Failure::Refused(text));
            }
            MemberEvent::Disconnected(text) => self.disconnected(now, &text),
            MemberEvent::Received(message) => self.receive(now, message),
            MemberEvent::Tick => {}
        }
        self.handle_deadlines(now);
        std::mem::take(&mut self.actions)
    }

    /// When the next [`MemberEvent::Tick`] is due.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Pausing { next } => Some(*next),
            Link::Connecting | Link::Entering { .. } => Some(self.connect_deadline),
            Link::Up(up) if !self.settings.is_host => Some(up.next_tick(self.has_running_workers())),
            Link::Up(_) | Link::Lapsed(_) | Link::Down => None,
        };
        link.into_iter().chain(self.join_deadline()).min()
    }

    /// When it gives up waiting for a round. While connected it does not: the host applies the join timeout, because it knows which nodes
    /// have joined and which are spares.
    fn join_deadline(&self) -> Option<Instant> {
        self.pending_join.as_ref().filter(|_| !self.is_up()).map(|pending_join| pending_join.deadline)
    }

    /// Whether the workers of this node have succeeded while those of other nodes may still run.
    fn has_finished(&self) -> bool {
        matches!(&self.state, MembershipState::Placed(place) if self.finished_round == Some(place.round))
    }

    /// Whether this node is in a round and its workers have not succeeded yet.
    #[must_use]
    pub fn has_running_workers(&self) -> bool {
        matches!(self.state, MembershipState::Placed(_)) && !self.has_finished()
    }

    /// Whether its lease has lapsed and it has not connected again.
    #[must_use]
    pub fn has_lapsed(&self) -> bool {
        matches!(self.link, Link::Lapsed(_))
    }

    fn call(&mut self, now: Instant, call: Call) {
        match call {
            Call::Join { role, local_world_size, timeout } => {
                if matches!(self.state, MembershipState::Closed { .. } | MembershipState::Released) {
                    return;
                }
                self.state = MembershipState::Joining;
                self.finished_round = None;
                self.pending_join =
                    Some(PendingJoin { role, local_world_size, timeout, deadline: later(now, timeout) });
                match self.link {
                    Link::Down | Link::Lapsed(_) => self.connect(now),
                    Link::Up(_) => self.send_join(now),
                    Link::Pausing { .. } | Link::Connecting | Link::Entering { .. } => {}
                }
            }
            Call::Failed { at_ns, text, code, facts, detail } => {
                if let Some(round) = self.last_round {
                    let (text, facts) = (bounded_text(&text), facts.shortened());
                    let detail = if detail.len() > MAX_DETAIL_BYTES { String::new() } else { detail };
                    self.send(AgentMessage::Failed { round, at_ns, text, code, facts, detail });
                }
            }
            Call::Progressed => {
                if let Some(round) = self.last_round {
                    self.send(AgentMessage::Progressed { round });
                }
            }
            Call::Finished => {
                if let MembershipState::Placed(place) = &self.state {
                    let round = place.round;
                    self.finished_round = Some(round);
                    self.send(AgentMessage::Finished { round });
                }
            }
            Call::Close { text, code } => self.send(AgentMessage::Close { text: bounded_text(&text), code }),
            Call::Leave(text) => {
                self.send(AgentMessage::Leave { text: bounded_text(&text) });
                self.pending_join = None;
                self.link = Link::Down;
                self.actions.push(MemberAction::Disconnect);
            }
        }
    }

    fn send(&mut self, message: AgentMessage) {
        if matches!(self.link, Link::Up(_)) {
            self.actions.push(MemberAction::Send(message));
        }
    }

    /// Sends the pending request to join.
    fn send_join(&mut self, now: Instant) {
        let Some(pending_join) = &self.pending_join else { return };
        let join = Join {
            after: self.last_round,
            role: pending_join.role.clone(),
            local_world_size: pending_join.local_world_size,
            timeout: pending_join.deadline.saturating_duration_since(now),
        };
        self.send(AgentMessage::Join(join));
    }

    fn connect(&mut self, now: Instant) {
        self.connect_deadline = later(now, self.settings.connect_timeout);
        self.retry_pause = FIRST_RETRY_PAUSE;
        self.last_connect_error = None;
        self.report_at = now + REPORT_AFTER;
        self.link = Link::Connecting;
        self.actions.push(MemberAction::Connect);
    }

    fn not_connected(&mut self, now: Instant, text: &str, is_refused: bool) {
        self.link = Link::Down;
        if self.pending_join.is_none() && !self.has_finished() {
            return;
        }
        let endpoint = &self.settings.endpoint;
        if is_refused && self.was_welcomed {
            let text = format!("the agent that hosted the rendezvous at {endpoint} is gone: {text}");
            return self.fail(Failure::Unreachable(text));
        }
        if now >= self.connect_deadline {
            let tried_s = self.settings.connect_timeout.as_secs_f64();
            let text =
                format!("the host of the rendezvous at {endpoint} was not reached within {tried_s:.0} s: {text}");
            return self.fail(Failure::Unreachable(text));
        }
        if now >= self.report_at && self.reported_error.as_deref() != Some(text) {
            let left_s = self.connect_deadline.saturating_duration_since(now).as_secs_f64();
            self.actions.push(MemberAction::Warning(format!(
                "the host of the rendezvous at {endpoint} cannot be reached: {text}; retrying for {left_s:.0} s (read_timeout)"
            )));
            self.reported_error = Some(text.to_owned());
            self.report_at = now + REPORT_AFTER;
        }
        self.last_connect_error = Some(text.to_owned());
        self.link = Link::Pausing { next: (now + self.retry_pause).min(self.connect_deadline) };
        self.retry_pause = (self.retry_pause * 2).min(MAX_RETRY_PAUSE);
    }

    fn disconnected(&mut self, now: Instant, text: &str) {
        let was_up = matches!(self.link, Link::Up(_));
        self.link = Link::Down;
        let description = format!("the connection to the rendezvous at {} was lost: {text}", self.settings.endpoint);
        if self.has_finished() {
            // Its workers have succeeded: it reconnects to learn how the other nodes end.
            if was_up {
                self.connect(now);
            } else {
                self.not_connected(now, text, false);
            }
        } else if let MembershipState::Placed(place) = &self.state {
            let cause = Cause::loss(String::new(), description);
            self.state = MembershipState::Over(place.clone(), cause);
        } else if let Some(pending_join) = &mut self.pending_join {
            if was_up {
                pending_join.deadline = later(now, pending_join.timeout);
                self.connect(now);
            } else {
                self.not_connected(now, text, false);
            }
        }
    }

    fn receive(&mut self, now: Instant, message: HostMessage) {
        if let Link::Up(up) = &mut self.link {
            up.note_heard(now);
        }
        match message {
            HostMessage::Welcome { silence } => {
                if let Link::Entering { since } = self.link {
                    self.link = Link::up(since, now, silence.min(ENDLESS));
                    self.reported_error = None;
                    self.was_welcomed = true;
                    self.is_last_round_of_link = false;
                    if self.has_finished()
                        && let Some(round) = self.finished_round
                    {
                        return self.send(AgentMessage::Finished { round });
                    }
                    // The host may be another one, or count this agent as a new member.
                    self.last_round = None;
                    self.send_join(now);
                }
            }
            HostMessage::Begin(place) => {
                let is_new = !self.is_last_round_of_link || self.last_round.is_none_or(|last| place.round > last);
                if self.pending_join.is_some() && is_new {
                    self.pending_join = None;
                    self.last_round = Some(place.round);
                    self.is_last_round_of_link = true;
                    self.state = MembershipState::Placed(place);
                }
            }
            HostMessage::Over { round, cause } => {
                if let MembershipState::Placed(place) = &self.state
                    && place.round == round
                {
                    self.state = MembershipState::Over(place.clone(), cause);
                }
            }
            HostMessage::TimedOut { waiting, cause } => {
                if self.pending_join.is_some() {
                    let previous =
                        cause.map_or_else(String::new, |cause| format!("; the previous round ended: {cause}"));
                    self.fail(Failure::TimedOut(format!("these nodes joined: {}{previous}", waiting.join(", "))));
                }
            }
            HostMessage::Released => {
                if self.has_finished() {
                    self.state = MembershipState::Released;
                }
            }
            HostMessage::Closed { text, code, decision, detail, is_loss } => {
                self.pending_join = None;
                if self.state != MembershipState::Released {
                    // The workers of this node have not succeeded, so this node must not report success.
                    let code = if code == 0 && self.has_running_workers() { 1 } else { code };
                    self.state = MembershipState::Closed { text, code, decision, detail, is_loss };
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
                let text = format!("the rendezvous at {} refused this node: {text}", self.settings.endpoint);
                self.fail(Failure::Refused(text));
            }
            HostMessage::Dropped { text } => {
                self.actions.push(MemberAction::Disconnect);
                self.disconnected(now, &text);
            }
            HostMessage::Warning { text } => self.actions.push(MemberAction::Warning(text)),
            HostMessage::Beat { number } => {
                if let Link::Up(up) = &mut self.link {
                    up.note_answer(number);
                }
            }
            HostMessage::Probe => {}
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.pending_join = None;
        if matches!(self.link, Link::Pausing { .. }) {
            self.link = Link::Down;
        }
        self.state = MembershipState::Failed(failure);
    }

    /// If this process was suspended, it could not receive anything: resets the deadlines of the host instead of declaring it lost.
    fn reset_after_own_suspension(&mut self, now: Instant) {
        let due = self.next_tick().map(|due| due.max(self.last_step));
        if let (Link::Up(up), Some(due)) = (&mut self.link, due) {
            up.reset_after_suspension(now, due);
        }
    }

    /// If the lease has lapsed, gives up the connection and ends the round: the workers must be gone before other nodes take their ranks.
    fn check_lease(&mut self, now: Instant) {
        let Some(lease) = self.lease().filter(|lease| self.has_running_workers() && now >= lease.stop_at) else {
            return;
        };
        if let MembershipState::Placed(place) = &self.state {
            self.state = MembershipState::Over(place.clone(), lapsed_cause(&self.settings.endpoint));
        }
        self.link = Link::Lapsed(lease);
        self.actions.push(MemberAction::Disconnect);
    }

    fn handle_deadlines(&mut self, now: Instant) {
        let may_lapse = self.has_running_workers();
        match &mut self.link {
            Link::Pausing { next } if now >= *next => {
                self.link = Link::Connecting;
                self.actions.push(MemberAction::Connect);
            }
            Link::Connecting | Link::Entering { .. } if now >= self.connect_deadline => {
                self.actions.push(MemberAction::Disconnect);
                // The last attempt had no time for an answer.
                let text = self.last_connect_error.take();
                self.not_connected(now, text.as_deref().unwrap_or("no answer"), false);
            }
            Link::Up(up) if !self.settings.is_host => {
                if let Some(silence) = up.exceeded_silence(now).filter(|_| !may_lapse) {
                    self.actions.push(MemberAction::Disconnect);
                    self.disconnected(now, &format!("it was silent for {:.1} s", silence.as_secs_f64()));
                } else if let Some(number) = up.next_beat(now) {
                    self.send(AgentMessage::Beat { number });
                }
            }
            _ => {}
        }
        if self.join_deadline().is_some_and(|at| now >= at) {
            self.fail(Failure::TimedOut("the host is not connected, so the nodes that joined are not known".into()));
        }
    }
}

/// The cause for which a round ends when its lease has lapsed.
pub(crate) fn lapsed_cause(endpoint: &str) -> Cause {
    let text = format!(
        "the host of the rendezvous at {endpoint} has not answered for too long (heartbeat_timeout): this node stops its workers before others take their ranks"
    );
    Cause::loss(String::new(), text)
}

/// Shortens a text to the limit of a message.
fn bounded_text(text: &str) -> String {
    bounded(text, MAX_TEXT_BYTES).to_owned()
}
