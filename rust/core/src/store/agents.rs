//! The part of the store's thread that agents talk to: messages to the decisions, their actions to the sockets.

use std::io;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::server::{Peer, Worker};
use super::wire::{Key, Request as StoreRequest};
use crate::rendezvous::message::{self, Request};
use crate::rendezvous::rounds::{Action, Event, Rounds, Settings};
use crate::rendezvous::stranger::{self, Verdict};
use crate::sys::timer::{ENDLESS, Timer};

/// What NCCL's watchdog leaves for the other ranks when it gives up. They write down what they know, and abort.
const DUMP_KEY: &[u8] = b"/exception_dump";
/// It takes them 15 s at most, by default.
const DUMP_GRACE: Duration = Duration::from_secs(20);
/// What it leaves when a collective has failed.
const ERROR_KEY: &[u8] = b"/remote_error";

/// The rendezvous at this store's port.
pub(super) struct Agents {
    rounds: Rounds,
    pub(super) timer: Timer,
    /// Strangers that were told of.
    strangers: u32,
}

/// How often it is told of strangers: they come again and again.
const MOST_STRANGERS: u32 = 8;

impl Agents {
    pub(super) fn new(mut settings: Settings) -> io::Result<Self> {
        settings.silence = settings.silence.min(ENDLESS);
        settings.last_call = settings.last_call.min(ENDLESS);
        Ok(Self { rounds: Rounds::new(settings, Instant::now()), timer: Timer::new()?, strangers: 0 })
    }
}

impl Worker {
    /// A connection has become that of an agent; `rest` is what came after it said so.
    pub(super) fn upgrade(&mut self, peer: Peer, rest: Vec<u8>) {
        self.state.forget(peer);
        if self.agents.is_none() {
            self.flush();
            return self.end(peer);
        }
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.become_agent(rest);
        }
        self.listen_to(peer);
    }

    /// Takes in the messages of an agent that are complete.
    pub(super) fn listen_to(&mut self, peer: Peer) {
        while let Some(input) = self.connections.get_mut(&peer).and_then(Connection::agent_input) {
            match message::decode::<Request>(input) {
                Ok(Some(mut request)) => {
                    if let Request::Enter(who) = &mut request {
                        who.is_host &= who.pid == std::process::id() && self.is_of_this_machine(peer);
                    }
                    self.decide(Event::requested(peer, request));
                }
                Ok(None) => break,
                Err(garbled) => {
                    self.decide(Event::Lost(peer, format!("its message is garbled: {garbled}")));
                    self.end(peer);
                }
            }
        }
        self.flush();
    }

    /// Lets the rendezvous decide, and does what it says.
    pub(super) fn decide(&mut self, event: Event) {
        let Some(agents) = &mut self.agents else { return };
        let mut actions = agents.rounds.step(Instant::now(), event);
        let mut dropped = Vec::new();
        for action in actions.drain(..) {
            match action {
                Action::RenewStore => self.renew(),
                Action::Tell(peer, notice) => {
                    if let Some(connection) = self.connections.get_mut(&peer) {
                        message::encode(&notice, connection.output());
                        self.to_flush.push(peer);
                    }
                }
                Action::Drop(peer) => dropped.push(peer),
            }
        }
        self.flush();
        for peer in dropped {
            self.end(peer);
        }
        self.set_timer();
    }

    /// Whether an agent waits here, or its workers run.
    pub(super) fn has_agents(&self) -> bool {
        self.connections.values().any(Connection::is_agent)
    }

    fn set_timer(&mut self) {
        if let Some(agents) = &mut self.agents {
            let next = [agents.rounds.next_tick(), self.close_at].into_iter().flatten().min();
            // It fails for a descriptor that is none.
            let _ = agents.timer.set(next);
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
            ERROR_KEY => Duration::ZERO,
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
