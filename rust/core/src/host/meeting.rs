//! Agents at the host: their messages go to the decisions, and the actions go to the sockets.

use std::time::{Duration, Instant};

use super::connection::{Connection, Protocol};
use super::frames::AgentFrames;
use super::thread::HostThread;
use super::torchrun_peer::{self, Admission};
use crate::rendezvous::message::{self, AgentMessage, HostMessage, MOST_TEXT_BYTES};
use crate::rendezvous::rounds::{HostAction, HostEvent};
use crate::store::state::Peer;
use crate::store::wire::{Key, StoreRequest};
use crate::sys::clock::after;
use crate::text::bounded;

/// NCCL's watchdog sets this key when it gives up. The other ranks then dump their state and abort.
const DUMP_KEY: &[u8] = b"/exception_dump";
/// The dump takes 15 s at most, by default.
const DUMP_GRACE: Duration = Duration::from_secs(20);
/// NCCL's watchdog sets this key when a collective has failed. Its process exits by itself then, and the exit carries the code.
const ERROR_KEY: &[u8] = b"/remote_error";
const ERROR_GRACE: Duration = Duration::from_secs(1);

/// Reports of torchrun agents that were turned away. They retry again and again.
const MOST_REPORTED: u32 = 8;

impl HostThread {
    /// A connection has changed to the rendezvous protocol; `rest` are the bytes after that request.
    pub(super) fn upgrade(&mut self, peer: Peer, rest: Vec<u8>) {
        self.state.forget(peer);
        let Some(agents) = &mut self.agents else {
            self.flush();
            return self.disconnect(peer);
        };
        agents.visitors.push_back((after(agents.silence), peer));
        if let Some(connection) = self.connections.get_mut(&peer) {
            connection.protocol = Protocol::Agent(AgentFrames::new(rest));
            // Without it the heartbeats alone detect a broken network.
            let _ = connection.stream.set_peer_timeout(agents.silence);
        }
        self.take_messages(peer);
        self.set_timer();
    }

    /// Handles the complete messages of an agent.
    pub(super) fn take_messages(&mut self, peer: Peer) {
        while let Some(frames) = self.connections.get_mut(&peer).and_then(Connection::frames) {
            match frames.next() {
                Ok(Some(mut request)) => {
                    if let AgentMessage::Enter(who) = &mut request {
                        who.is_host &= who.pid == std::process::id() && self.is_of_this_machine(peer);
                    }
                    self.decide(HostEvent::requested(peer, request));
                }
                Ok(None) => break,
                Err(breach) => self.turn_out(peer, &breach.to_string()),
            }
        }
        self.flush();
    }

    /// An agent violates the protocol: it gets the reason, and its connection is closed.
    fn turn_out(&mut self, peer: Peer, why: &str) {
        self.decide(HostEvent::Lost(peer, why.to_owned()));
        if let Some(connection) = self.connections.get_mut(&peer) {
            message::encode(&HostMessage::Refused { text: why.to_owned() }, connection.output());
            self.to_flush.push(peer);
        }
        self.flush();
        self.disconnect(peer);
    }

    /// Closes the connections that have not introduced themselves by their deadline.
    pub(super) fn end_visits(&mut self, now: Instant) {
        while let Some(agents) = &mut self.agents
            && let Some((until, peer)) = agents.visitors.front().copied()
            && now >= until
        {
            agents.visitors.pop_front();
            if self.connections.get(&peer).is_some_and(|connection| !connection.has_entered()) {
                self.disconnect(peer);
            }
        }
    }

    /// Hands an event to the rendezvous and carries out its actions.
    pub(super) fn decide(&mut self, event: HostEvent) {
        let Some(agents) = &mut self.agents else { return };
        let mut actions = agents.rounds.step(Instant::now(), event);
        let (mut dropped, mut doubtful) = (Vec::new(), Vec::new());
        for action in actions.drain(..) {
            match action {
                HostAction::RenewStore => self.renew(),
                HostAction::Tell(peer, notice) => {
                    if let Some(connection) = self.connections.get_mut(&peer) {
                        message::encode(&notice, connection.output());
                        self.to_flush.push(peer);
                    }
                }
                HostAction::Examine(peer) => doubtful.push(peer),
                HostAction::Drop(peer) => dropped.push(peer),
            }
        }
        self.flush();
        for peer in doubtful {
            let stream = self.connections.get(&peer).map(|connection| &connection.stream);
            if let Some(is_acknowledged) = stream.and_then(|stream| stream.is_acknowledged().ok()) {
                self.decide(HostEvent::Examined(peer, is_acknowledged));
            }
        }
        for peer in dropped {
            self.disconnect(peer);
        }
        self.set_timer();
    }

    /// Whether an agent is connected.
    pub(super) fn has_agents(&self) -> bool {
        self.connections.values().any(Connection::has_entered)
    }

    /// Tells all agents that the rendezvous has ended with this node.
    pub(super) fn announce_end(&mut self, text: &str) {
        let notice = HostMessage::Closed { text: bounded(text, MOST_TEXT_BYTES).to_owned(), code: 1 };
        for connection in self.connections.values_mut().filter(|connection| connection.has_entered()) {
            message::encode(&notice, connection.output());
            // An agent whose connection takes no more bytes sees the end of the connection instead.
            let _ = connection.send();
        }
    }

    /// Inspects a request before the store applies it; `false` if the store must not apply it.
    pub(super) fn admit(&mut self, peer: Peer, request: &StoreRequest) -> bool {
        if self.agents.is_none() {
            return true;
        }
        let admission = torchrun_peer::screen(request);
        if admission != Admission::Worker {
            self.report_torchrun_peer(peer);
        }
        match admission {
            Admission::Worker => {
                if let StoreRequest::Set { key, value } = request {
                    self.note_set(key, value);
                }
                true
            }
            Admission::Answer(answer) => {
                if let Some(connection) = self.connections.get_mut(&peer) {
                    connection.reply(answer);
                    self.to_flush.push(peer);
                }
                false
            }
            Admission::Disconnect => {
                self.disconnect(peer);
                false
            }
        }
    }

    fn report_torchrun_peer(&mut self, peer: Peer) {
        let address = self.connections.get(&peer).and_then(|connection| connection.stream.peer_address().ok());
        let from = address.map_or_else(String::new, |address| format!(" from {}", address.ip()));
        let Some(agents) = &mut self.agents else { return };
        agents.turned_away += 1;
        if agents.turned_away <= MOST_REPORTED {
            let text = format!(
                "an agent of torchrun{from} tried to join and was turned away: start that node with ferrorun too"
            );
            self.decide(HostEvent::Stranger(text));
        }
    }

    /// A worker has set a key, which may announce a failure.
    fn note_set(&mut self, key: &Key, value: &[u8]) {
        let grace = match &**key {
            DUMP_KEY => DUMP_GRACE,
            ERROR_KEY => ERROR_GRACE,
            _ => return,
        };
        // The value is the rank as a native int.
        let who =
            value.try_into().map_or_else(|_| "a worker".into(), |rank| format!("rank {}", i32::from_le_bytes(rank)));
        let key = String::from_utf8_lossy(key);
        self.decide(HostEvent::Announced { text: format!("{who} wrote {key} to the store"), grace });
    }

    fn is_of_this_machine(&self, peer: Peer) -> bool {
        let stream = self.connections.get(&peer).map(|connection| &connection.stream);
        let addresses = stream.and_then(|stream| stream.local_address().ok().zip(stream.peer_address().ok()));
        addresses.is_some_and(|(here, there)| here.ip() == there.ip())
    }
}
