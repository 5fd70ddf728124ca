//! The part of the store's thread that agents talk to: messages to the decisions, their actions to the sockets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::connection::{Connection, Protocol};
use super::server::{Peer, Worker};
use super::talk::Talk;
use super::wire::{Key, Request as StoreRequest};
use crate::rendezvous::message::{self, MOST_TEXT_BYTES, Notice, Request};
use crate::rendezvous::rounds::{Action, Event, Rounds, Settings};
use crate::rendezvous::stranger::{self, Verdict};
use crate::sys::timer::after;
use crate::text::bounded;

/// What NCCL's watchdog leaves for the other ranks when it gives up. They write down what they know, and abort.
const DUMP_KEY: &[u8] = b"/exception_dump";
/// It takes them 15 s at most, by default.
const DUMP_GRACE: Duration = Duration::from_secs(20);
/// What it leaves when a collective has failed. Its process ends then, by itself: its exit says more.
const ERROR_KEY: &[u8] = b"/remote_error";
const ERROR_GRACE: Duration = Duration::from_secs(1);

/// The rendezvous at this store's port.
pub(super) struct Agents {
    rounds: Rounds,
    /// How long one may be silent.
    silence: Duration,
    /// Those who came, and until when they are to say who they are. Many have by then, or are gone.
    visitors: VecDeque<(Instant, Peer)>,
    /// Strangers that were told of.
    strangers: u32,
}

/// How often it is told of strangers: they come again and again.
const MOST_STRANGERS: u32 = 8;

impl Agents {
    pub(super) fn new(settings: Settings) -> Self {
        let silence = settings.silence;
        let rounds = Rounds::new(settings, Instant::now());
        Self { rounds, silence, visitors: VecDeque::new(), strangers: 0 }
    }

    /// When there is something to decide without anybody having said something.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let visit = self.visitors.front().map(|(until, _)| *until);
        [self.rounds.next_tick(), visit].into_iter().flatten().min()
    }
}

impl Worker {
    /// A connection has become that of an agent; `rest` is what came after it said so.
    pub(super) fn upgrade(&mut self, peer: Peer, rest: Vec<u8>) {
        self.state.forget(peer);
        let Some(agents) = &mut self.agents else {
            self.flush();
            return self.end(peer);
        };
        agents.visitors.push_back((after(agents.silence), peer));
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.protocol = Protocol::Agent(Talk::new(rest));
            // Without it a broken network is noticed by what is said, or not.
            let _ = connection.stream.set_patience(agents.silence);
        }
        self.listen_to(peer);
        self.set_timer();
    }

    /// Takes in the messages of an agent that are complete.
    pub(super) fn listen_to(&mut self, peer: Peer) {
        while let Some(talk) = self.connections.get_mut(&peer).and_then(Connection::talk) {
            match talk.next() {
                Ok(Some(mut request)) => {
                    if let Request::Enter(who) = &mut request {
                        who.is_host &= who.pid == std::process::id() && self.is_of_this_machine(peer);
                    }
                    self.decide(Event::requested(peer, request));
                }
                Ok(None) => break,
                Err(breach) => self.turn_out(peer, &breach.to_string()),
            }
        }
        self.flush();
    }

    /// An agent does what none does: it is told, and gone.
    fn turn_out(&mut self, peer: Peer, why: &str) {
        self.decide(Event::Lost(peer, why.to_owned()));
        if let Some(connection) = self.connections.get_mut(&peer) {
            message::encode(&Notice::Refused { text: why.to_owned() }, connection.output());
            self.to_flush.push(peer);
        }
        self.flush();
        self.end(peer);
    }

    /// Ends the connections of those who were to say who they are, and have not.
    pub(super) fn end_visits(&mut self, now: Instant) {
        while let Some(agents) = &mut self.agents
            && let Some((until, peer)) = agents.visitors.front().copied()
            && now >= until
        {
            agents.visitors.pop_front();
            if self.connections.get(&peer).is_some_and(|connection| !connection.has_entered()) {
                self.end(peer);
            }
        }
    }

    /// Lets the rendezvous decide, and does what it says.
    pub(super) fn decide(&mut self, event: Event) {
        let Some(agents) = &mut self.agents else { return };
        let mut actions = agents.rounds.step(Instant::now(), event);
        let (mut dropped, mut doubtful) = (Vec::new(), Vec::new());
        for action in actions.drain(..) {
            match action {
                Action::RenewStore => self.renew(),
                Action::Tell(peer, notice) => {
                    if let Some(connection) = self.connections.get_mut(&peer) {
                        message::encode(&notice, connection.output());
                        self.to_flush.push(peer);
                    }
                }
                Action::Examine(peer) => doubtful.push(peer),
                Action::Drop(peer) => dropped.push(peer),
            }
        }
        self.flush();
        for peer in doubtful {
            let stream = self.connections.get(&peer).map(|connection| &connection.stream);
            if let Some(is_acknowledged) = stream.and_then(|stream| stream.is_acknowledged().ok()) {
                self.decide(Event::Examined(peer, is_acknowledged));
            }
        }
        for peer in dropped {
            self.end(peer);
        }
        self.set_timer();
    }

    /// Whether an agent waits here, or its workers run.
    pub(super) fn has_agents(&self) -> bool {
        self.connections.values().any(Connection::has_entered)
    }

    /// Tells all agents that there is nobody any more who decides.
    pub(super) fn say_farewell(&mut self, text: &str) {
        let notice = Notice::Closed { text: bounded(text, MOST_TEXT_BYTES).to_owned(), code: 1 };
        for connection in self.connections.values_mut().filter(|connection| connection.has_entered()) {
            message::encode(&notice, connection.output());
            // Whoever has no room for it finds the connection ended.
            let _ = connection.send();
        }
    }

    /// Looks at a request of the store before it is carried out; `false` if there is nothing left to do.
    pub(super) fn admit(&mut self, peer: Peer, request: &StoreRequest) -> bool {
        if self.agents.is_none() {
            return true;
        }
        let verdict = stranger::judge(request);
        if verdict != Verdict::Worker {
            self.tell_of_stranger(peer);
        }
        match verdict {
            Verdict::Worker => {
                if let StoreRequest::Set { key, value } = request {
                    self.notice(key, value);
                }
                true
            }
            Verdict::Answer(answer) => {
                if let Some(connection) = self.connections.get_mut(&peer) {
                    connection.reply(answer);
                    self.to_flush.push(peer);
                }
                false
            }
            Verdict::End => {
                self.end(peer);
                false
            }
        }
    }

    fn tell_of_stranger(&mut self, peer: Peer) {
        let address = self.connections.get(&peer).and_then(|connection| connection.stream.peer_address().ok());
        let from = address.map_or_else(String::new, |address| format!(" from {}", address.ip()));
        let Some(agents) = &mut self.agents else { return };
        agents.strangers += 1;
        if agents.strangers <= MOST_STRANGERS {
            let text = format!(
                "an agent of torchrun{from} tried to join and was turned away: start that node with ferrorun too"
            );
            self.decide(Event::Stranger(text));
        }
    }

    /// A worker has set a key: it may be word of a failure.
    fn notice(&mut self, key: &Key, value: &[u8]) {
        let grace = match &**key {
            DUMP_KEY => DUMP_GRACE,
            ERROR_KEY => ERROR_GRACE,
            _ => return,
        };
        // The rank as an int of the machine.
        let who =
            value.try_into().map_or_else(|_| "a worker".into(), |rank| format!("rank {}", i32::from_le_bytes(rank)));
        let key = String::from_utf8_lossy(key);
        self.decide(Event::Announced { text: format!("{who} wrote {key} to the store"), grace });
    }

    fn is_of_this_machine(&self, peer: Peer) -> bool {
        let stream = self.connections.get(&peer).map(|connection| &connection.stream);
        let addresses = stream.and_then(|stream| stream.local_address().ok().zip(stream.peer_address().ok()));
        addresses.is_some_and(|(here, there)| here.ip() == there.ip())
    }
}
